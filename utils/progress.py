"""How far has a training come, and what is needed to go on? What last.pt holds."""

import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoint
from utils.run_folder import damaged


@dataclass
class Progress:
    """How far a training has come. Saved in last.pt."""

    epoch: int = 0  # epochs completed
    step: int = 0  # batches done of the epoch in hand
    best_epoch: int = 0
    best_loss: float = math.inf
    waited: int = 0  # epochs since the best one
    history: list[dict] = field(default_factory=list)  # a row an epoch
    terms: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)  # of each batch done

    @property
    def kept(self) -> dict:
        """Number and validation metrics of the epoch that is kept."""
        row = self.history[self.best_epoch - 1]
        return {k: value for k, value in row.items() if k == "epoch" or k.startswith("validation_")}

    def finished(self, recipe: dict) -> bool:
        stopped = recipe["estop"] and self.waited >= recipe["estop"]
        return bool(self.epoch >= recipe["epochs"] or stopped)

    def check(self, epochs: int, steps: int) -> None:
        """Raises ValueError, or what wrong types raise, unless a training of that many epochs and
        steps an epoch can have come this far."""
        for count, most in (
            (self.epoch, epochs),
            (self.step, steps),
            (self.best_epoch, self.epoch),
            (self.waited, self.epoch),
        ):
            if type(count) is not int or not 0 <= count <= most:
                raise ValueError(f"{reprlib.repr(count)} where 0 to {most} is expected")
        rows = [{**row} for row in self.history]
        if [row.pop("epoch") for row in rows] != list(range(1, self.epoch + 1)):
            raise ValueError("its history has not a row for each epoch")
        if not all(
            type(value) is float and type(name) is str
            for row in rows
            for name, value in row.items()
        ):
            raise ValueError("its history holds something else than named numbers")
        if type(self.best_loss) is not float or len(self.terms) != self.step:
            raise ValueError("its losses are not numbers, or not one for each step")
        for count, values in self.terms:
            if type(count) is not int or not 0 < count < 2**31 or "loss" not in values:
                raise ValueError("its terms of the loss are not those of a batch")
            for name, value in values.items():
                if type(name) is not str or value.shape != () or value.dtype != torch.float32:
                    raise ValueError("its terms of the loss are not named numbers")


def save_progress(path: Path, device: torch.device, model, optimizer, progress: Progress) -> None:
    """Everything needed to go on that does not follow from the settings.

    The schedule does, given the epoch; and so does the optimizer, but for what it remembers of
    each parameter. What is not in the file cannot be wrong in it.
    """
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.write_tensors(
        path,
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "progress": vars(progress),
            "random": random,
        },
    )


def restore_progress(
    path: Path, recipe: dict, steps: int, device: torch.device, model, optimizer, schedule
) -> Progress:
    """Puts back what `save_progress` saved. Raises InputError if that is not what the file holds.

    steps: of an epoch.
    """
    state = checkpoint.read_tensors(path)
    try:
        progress = Progress(**state["progress"])
        progress.check(recipe["epochs"], steps)
        kept = recipe["protocol"] == "ils" or progress.finished(recipe)
        if progress.best_epoch and kept and not path.with_name("best.pt").exists():
            raise ValueError("no best.pt beside it")
        # A first step gives an optimizer its memory. What it does to the weights is overwritten.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        memory = optimizer.state_dict()["state"]
        if not state["optimizer"]:  # a parameter that is not used has none, but not all of them
            raise ValueError("it lacks what the optimizer remembers")
        for index, saved in state["optimizer"].items():
            _fill(memory[index], saved)
        _fill(model.state_dict(), state["model"])
        for _ in range(progress.epoch):
            schedule.step()
        for _, values in progress.terms:
            values.update({name: value.to(device) for name, value in values.items()})
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda" and "cuda" in state["random"]:  # the device may change
            torch.cuda.set_rng_state(state["random"]["cuda"], device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the GPU, not of the file
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise damaged(path, error) from None
    return progress


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Overwrites the tensors with those of the same name that were saved."""
    if saved.keys() != tensors.keys():
        raise ValueError("tensors are missing, or of another network or optimizer")
    for name, tensor in tensors.items():
        there = saved[name]
        if there.shape != tensor.shape or there.dtype != tensor.dtype:
            raise ValueError(f"{name} is of {there.dtype} {tuple(there.shape)}")
        if name == "step" and there < 1:
            raise ValueError("an optimizer that has made no step")
        tensor.copy_(there)
