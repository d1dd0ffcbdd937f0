"""What is on disk: checkpoints that describe themselves, and files that are whole or not there.

A run's folder holds config.json, history.csv, best.pt, last.pt and metrics.json. best.pt carries
all that evaluation and distillation need, so a path to it is enough for them. Nothing is read with
pickle's powers (weights_only=True), and nothing is written in place.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torchvision
from torch import nn

from models import MODELS, build_model
from utils.errors import InputError

FORMAT = 1


# ----------------------------------------------------------------------------------------- writing


def write_file(path: Path, write) -> None:
    """Calls write(binary file) on a temporary file and renames it, so that path is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; any earlier file is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, content: dict) -> None:
    write_file(path, lambda file: torch.save(content, file))


# ----------------------------------------------------------------------------------------- reading


@dataclass
class Checkpoint:
    """A trained network and where it comes from. See `contents` for the fields."""

    path: Path
    model: nn.Module
    training: dict  # method, hyper_parameters, requested, seed, epoch, recipe
    data: dict  # dataset, classes, image_size, tr_size, seed, fingerprint, splits, normalisation
    teacher: dict | None
    temperature: float  # fitted to the validation split
    metrics: dict  # of the validation split

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.model.state_dict())

    @property
    def is_student(self) -> bool:
        """Whether Network-distillation.py made it (an instance-based network has a teacher too)."""
        return self.teacher is not None and "scaled" in self.teacher


def contents(
    model: nn.Module,
    training: dict,
    data: dict,
    teacher: dict | None,
    temperature: float,
    metrics: dict,
) -> dict:
    """What best.pt holds: plain values and tensors only."""
    return {
        "format": FORMAT,
        "model": {
            "name": model.name,
            "input_shape": list(model.input_shape),
            "num_classes": model.num_classes,
        },
        "weights": model.state_dict(),
        "training": training,
        "data": data,
        "teacher": teacher,
        "temperature": temperature,
        "metrics": metrics,
    }


def read_tensors(path: Path) -> dict:
    """The dictionary in a file written by write_tensors. Raises InputError for anything else."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint; a file such as best.pt would do")
    if not path.exists():
        raise InputError(f"no checkpoint {path}; the training scripts write best.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types on files that are not its own
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"{path} is not a whole checkpoint of these scripts: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint of these scripts: it holds no dictionary")
    return content


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Rebuilds the network that a best.pt describes, in evaluation mode on the device.

    Raises InputError, in one line, if the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    content = read_tensors(path)
    if content.get("format") != FORMAT or "weights" not in content:
        raise InputError(
            f"{path} is not a checkpoint of format {FORMAT}; a best.pt of the training scripts "
            "would do"
        )
    try:
        described = content["model"]
        if described["name"] not in MODELS:
            raise ValueError(f"unknown model {described['name']!r}")
        with torch.random.fork_rng(devices=[]):  # initial weights must not move anybody's stream
            model = build_model(
                described["name"], tuple(described["input_shape"]), described["num_classes"]
            )
        model.load_state_dict(content["weights"])
        return Checkpoint(
            path=path,
            model=model.to(device, memory_format=torch.channels_last).eval(),
            training=dict(content["training"]),
            data=dict(content["data"]),
            teacher=content["teacher"],
            temperature=float(content["temperature"]),
            metrics=dict(content["metrics"]),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged: {type(error).__name__}: {reason}") from None


def find(paths: list[str]) -> list[Path]:
    """The checkpoints that the paths name: files as they are, folders searched for best.pt."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("best.pt") if "candidates" not in p.parts)
            if not inside:
                raise InputError(f"no best.pt in the folder {path} or below it")
            found.update(dict.fromkeys(inside))
        else:
            found[path] = None
    return list(found)


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all parameters and buffers: tells whether two files hold the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict:
    """What a result may depend on besides its settings: versions, hardware, state of the code."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        try:
            return subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    cuda = device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD"),
        "modified": git("status", "--porcelain", "--untracked-files=no").splitlines(),
    }
