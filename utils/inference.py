"""What a network says of a split: its logits, from which every metric is computed."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.classifier import ImageClassifier
from utils import checkpoint, data_loader, distributed
from utils.data_loader import Batch, ImageData, Splits, ordered_batches, seen_by_teacher
from utils.errors import InputError
from utils.evaluate import fit_temperature
from utils.image_files import AUTO, Streaming

# Of images up to 64x64 pixels 1024 are shown at a time; of larger ones fewer, so that no network
# needs more memory for them.
EVALUATION_BATCH, EVALUATION_PIXELS = 1024, 1024 * 64 * 64


def exact_convolutions():
    """float32 means float32 on CUDA too, by one algorithm wherever a network is evaluated.

    By default cuDNN's convolutions round their float32 input to 10 bits (TF32), and take the
    algorithm that was the fastest in a trial.
    """
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def evaluation_batch(model: ImageClassifier) -> int:
    """How many images the network is shown at a time: whatever it was trained with, as the last
    bits of its answers may depend on it."""
    return max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(model.network_size)))


@torch.no_grad()
def collect_logits(
    model: ImageClassifier, data: ImageData, indices: Tensor, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, K) and labels int64 (N,), in the order of the indices, on the CPU.

    The images are shown as they are, without augmentation, batch_size or `evaluation_batch` at a
    time; each of several processes shows its share. The network's mode is restored.
    """
    batch_size = batch_size or evaluation_batch(model)
    was_training = model.training
    model.eval()
    rank, count = distributed.shard()
    batches = ordered_batches(data, indices[rank::count], batch_size)
    with exact_convolutions():
        logits = torch.cat([model(batch.images).float() for batch in batches])
    model.train(was_training)
    return distributed.gather_rows(logits, len(indices)).cpu(), data.labels.cpu()[indices]


class StoredLogits:
    """What a network says of each image, and of its mirror image if `flip`, computed once.

    An answer is found by the image's position in the data set and whether it is flipped, never by
    its place in a batch. The network is asked in batches of the given size, the last one filled up,
    because the last bits of a network's answer may depend on the size of the batch; so to a smaller
    last batch of an epoch it might answer otherwise in them.
    """

    def __init__(
        self, model: Callable, data: ImageData, indices: Tensor, flip: bool, batch_size: int
    ) -> None:
        count = len(indices)
        batch_size = min(batch_size, count)
        filled = indices[torch.arange(-(-count // batch_size) * batch_size) % count]
        forms = [
            [model(batch.images).float() for batch in ordered_batches(data, filled, batch_size, f)]
            for f in ((False, True) if flip else (False,))
        ]
        self.logits = torch.stack([torch.cat(form)[:count] for form in forms])  # (forms, N, K)
        self.rows = torch.full((len(data.labels),), count, device=self.logits.device)
        self.rows[indices.to(self.rows.device)] = torch.arange(count, device=self.rows.device)

    def __call__(self, batch: Batch) -> Tensor:
        """float32 (B, K). Raises IndexError for an image that the network was not asked about."""
        return self.logits[batch.flipped.long(), self.rows[batch.indices]]


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
    # Of "validation", unless it was trained on that too (protocol lr), and "test": (N, K) float32
    logits: dict[str, Tensor]
    labels: dict[str, Tensor]
    temperature: float  # fitted to the validation split, here and now where that can be
    warnings: list[str]  # what is to be said of the fit
    splits: Splits
    seen_by_teacher: tuple[int, int]  # validation and test images that its teacher was trained on

    @property
    def temperatures(self) -> dict[str, float]:
        """By which logits are divided without ("no") and with ("yes") temperature scaling."""
        return {"no": 1.0, "yes": self.temperature}

    def scaled(self, split: str, scaling: str) -> Tensor:
        """Logits (N, K), float64, divided by the temperature if `scaling` is "yes"."""
        return self.logits[split].double() / self.temperatures[scaling]

    @property
    def recipe(self) -> dict:
        """All by which runs of one `tables.setting` may differ, but for the seed."""
        training, teacher = self.training, self.teacher
        selected = training["requested"] != {
            k: [v] for k, v in training["hyper_parameters"].items()
        }
        guided = teacher and not self.is_student
        return training["recipe"] | {
            "image_size": self.data["image_size"],
            "trained_on": training["trained_on"],
            "requested": training["requested"] if selected else None,
            "select_by": training.get("select_by") if selected else None,
            "teacher": f"{teacher['model']} {teacher['method']}" if guided else None,
        }


def evaluate_checkpoint(
    path: Path, data_dir: str | Path, device: torch.device, streaming: Streaming = AUTO
) -> Evaluated:
    """Loads a checkpoint and its data set, and shows the network its validation and test images.

    Raises InputError if the checkpoint is damaged, or the data set or its splits are others than
    those of the training.
    """
    trained = checkpoint.load(path, device)
    teacher = trained.teacher
    data, splits = data_loader.reload(trained.data, data_dir, device, streaming)
    logits, labels = {}, {}
    held_out = ["validation", "test"] if trained.training["trained_on"] == "train" else ["test"]
    for name in held_out:
        logits[name], labels[name] = collect_logits(trained.model, data, getattr(splits, name))
        if not logits[name].isfinite().all():
            raise InputError(f"{path} gives logits that are not finite, and cannot be evaluated")
    temperature, caught = trained.temperature, []
    if "validation" in logits:
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
        teacher=teacher,
        logits=logits,
        labels=labels,
        temperature=temperature,
        warnings=[str(warning.message) for warning in caught],
        splits=splits,
        seen_by_teacher=seen_by_teacher(teacher, data, splits) if teacher else (0, 0),
    )
