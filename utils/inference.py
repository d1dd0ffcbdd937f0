"""What a network says of a split: its logits, from which every metric is computed."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import checkpoint, data_loader
from utils.data_loader import ImageData, ordered_batches
from utils.errors import InputError
from utils.evaluate import fit_temperature

EVALUATION_BATCH = 1024


@torch.no_grad()
def collect_logits(
    model: nn.Module, data: ImageData, indices: Tensor, batch_size: int = EVALUATION_BATCH
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, K) and labels int64 (N,), in the order of the indices, on the CPU.

    The images are shown as they are, without augmentation. The network's mode is restored.
    """
    was_training = model.training
    model.eval()
    parts = [model(batch.images).float() for batch in ordered_batches(data, indices, batch_size)]
    model.train(was_training)
    return torch.cat(parts).cpu(), data.labels.cpu()[indices]


@dataclass
class Evaluated:
    """A checkpoint and all that its network says: what tables and figures are made from."""

    path: Path
    model_name: str
    weights_hash: str
    is_student: bool
    training: dict  # these three as in Checkpoint
    data: dict
    teacher: dict | None
    logits: dict[str, Tensor]  # of "validation" and "test", (N, K) float32
    labels: dict[str, Tensor]
    temperature: float  # fitted to the validation split, here and now
    warnings: list[str]  # what is to be said of the fit


def evaluate_checkpoint(path: Path, data_dir: str | Path, device: torch.device) -> Evaluated:
    """Loads a checkpoint and its data set, and shows the network its validation and test images.

    Raises InputError if the checkpoint is damaged, or the data set or its splits are others than
    those of the training.
    """
    trained = checkpoint.load(path, device)
    data, splits = data_loader.reload(trained.data, data_dir, device)
    logits, labels = {}, {}
    for name in ("validation", "test"):
        logits[name], labels[name] = collect_logits(trained.model, data, getattr(splits, name))
        if not logits[name].isfinite().all():
            raise InputError(f"{path} gives logits that are not finite, and cannot be evaluated")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        temperature = fit_temperature(logits["validation"], labels["validation"])
    return Evaluated(
        path=path,
        model_name=trained.model.name,
        weights_hash=trained.weights_hash,
        is_student=trained.is_student,
        training=trained.training,
        data=trained.data,
        teacher=trained.teacher,
        logits=logits,
        labels=labels,
        temperature=temperature,
        warnings=[str(warning.message) for warning in caught],
    )
