"""Many small networks trained at once, each on data of its own.

A network of some thousand weights and a batch of some hundred points keep no processor busy. So R
networks of one architecture are trained side by side: their weights are stacked and one step of
all of them is one vectorised step (torch.func). Nothing is shared between them: each has its own
data, its own best epoch and its own end, and is what it would be if it were trained alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from utils.errors import DivergedError
from utils.losses import cross_entropy_loss

POINTS_AT_ONCE = 2**16


class Samples(NamedTuple):
    """What R networks are shown: images (R, N, C, H, W) float, labels (R, N) int64."""

    images: Tensor
    labels: Tensor

    def of(self, rows: Tensor) -> "Samples":
        return Samples(self.images[rows], self.labels[rows])


class Replicas(NamedTuple):
    """R networks of one architecture: every tensor's first dimension is R."""

    architecture: nn.Module  # without values
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def stack(cls, networks: Sequence[nn.Module]) -> "Replicas":
        return cls(deepcopy(networks[0]).to("meta"), *stack_module_state(networks))

    def logits(self, images: Tensor, at_once: int | None = None) -> Tensor:
        """(R, N, K) of images (R, N, C, H, W). at_once: networks, to bound the memory."""

        def one(parameters, buffers, images):
            return functional_call(self.architecture, (parameters, buffers), (images,))

        return vmap(one, chunk_size=at_once)(self.parameters, self.buffers, images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The logits, of so few networks at once that the memory needed stays small."""
        return self.logits(images, max(1, POINTS_AT_ONCE // images.shape[1]))

    def of(self, rows: Tensor) -> "Replicas":
        parameters = {name: p.detach()[rows] for name, p in self.parameters.items()}
        buffers = {name: buffer[rows] for name, buffer in self.buffers.items()}
        return self._replace(parameters=parameters, buffers=buffers)


class Candidate(NamedTuple):
    """One combination of a method's hyper-parameters: a loss for all replicas.

    loss: of utils/losses.py, its hyper-parameters given and reduction="none": a function of
    (logits, labels), or of (logits, labels, teacher_logits) with a teacher.
    """

    hyper_parameters: dict
    loss: Callable[..., Tensor]
    teacher_logits: Tensor | None = None  # (R, N, K), of the training images


class Trained(NamedTuple):
    """R networks at their best epochs, and how each was found."""

    networks: Replicas
    loss: Tensor  # (R,) validation log loss, the criterion
    epoch: Tensor  # (R,) int64
    hyper_parameters: list[dict]  # of each network


def search(
    start: Replicas,
    training: Samples,
    validation: Samples,
    candidates: Iterable[Candidate],
    **settings,
) -> Trained:
    """Trains every candidate; each replica keeps its own best one by validation log loss.

    settings: of `train`. Raises DivergedError if a replica has not one finite validation loss.
    """
    best = None
    for candidate in candidates:
        found = train(start, training, validation, candidate, **settings)
        if best is None:
            best = found
            continue
        better = found.loss < best.loss
        for name, parameter in best.networks.parameters.items():
            parameter[better] = found.networks.parameters[name][better]
        best.loss[better], best.epoch[better] = found.loss[better], found.epoch[better]
        for replica in better.nonzero().flatten().tolist():
            best.hyper_parameters[replica] = candidate.hyper_parameters
    broken = (~best.loss.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise DivergedError(
            f"the validation loss of replica {broken[0]} was never finite; try a smaller --lr"
        )
    return best


def train(
    start: Replicas,
    training: Samples,
    validation: Samples,
    candidate: Candidate,
    *,
    lr: float,
    epochs: int,
    patience: int,
) -> Trained:
    """Adam on the whole training split, an epoch being one step; `start` is left as it is.

    A replica ends after `patience` epochs (0: never) without a better validation log loss, or
    after `epochs`, and is given back as it was in its best epoch.
    """
    count = len(training.labels)
    best = start.of(torch.arange(count))
    best_loss = torch.full((count,), math.inf)
    best_epoch = torch.zeros(count, dtype=torch.int64)
    teacher = candidate.teacher_logits
    # What follows is of the replicas in `still` only: those that have ended cost nothing more.
    still, waited = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    networks, optimizer = _trainable(start.of(still), lr)
    for epoch in range(1, epochs + 1):
        logits = networks.logits(training.images)
        views = [] if teacher is None else [teacher.flatten(0, 1)]
        losses = candidate.loss(logits.flatten(0, 1), training.labels.flatten(), *views)
        # The sum over replicas, as the gradient of each is then that of its own mean.
        losses.unflatten(0, training.labels.shape).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

        loss = log_losses(networks, validation)
        better = loss < best_loss[still]
        rows = still[better]
        best_loss[rows], best_epoch[rows] = loss[better], epoch
        for name, parameter in networks.parameters.items():
            best.parameters[name][rows] = parameter.detach()[better]
        waited = torch.where(better, 0, waited + 1)
        if patience and (waited >= patience).any():
            going_on = (waited < patience).nonzero().flatten()
            if len(going_on) == 0:
                break
            still, waited = still[going_on], waited[going_on]
            networks, optimizer = _trainable(networks.of(going_on), lr, optimizer, going_on)
            training, validation = training.of(going_on), validation.of(going_on)
            teacher = None if teacher is None else teacher[going_on]
    return Trained(best, best_loss, best_epoch, [candidate.hyper_parameters] * count)


def log_losses(networks: Replicas, samples: Samples) -> Tensor:
    """(R,): each network's mean cross-entropy on its samples."""
    logits = networks.predict(samples.images).flatten(0, 1)
    losses = cross_entropy_loss(logits, samples.labels.flatten(), reduction="none")
    return losses.unflatten(0, samples.labels.shape).mean(1)


def _trainable(
    networks: Replicas,
    lr: float,
    before: torch.optim.Optimizer | None = None,
    rows: Tensor | None = None,
) -> tuple[Replicas, torch.optim.Optimizer]:
    """The networks with an optimizer, which remembers what `before` knew of these rows.

    Adam treats each number on its own, so that of stacked networks is that of each network.
    """
    parameters = [p.requires_grad_() for p in networks.parameters.values()]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    if before:
        for new, old in zip(parameters, before.param_groups[0]["params"], strict=True):
            optimizer.state[new] = {
                name: value[rows] if value.dim() else value
                for name, value in before.state[old].items()
            }
    return networks, optimizer
