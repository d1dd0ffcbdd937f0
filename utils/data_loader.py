"""Where images come from, who is in which split, and what a batch is.

A data set is one uint8 tensor. It is read once, moved to the device once, and batches are taken
from it by index there: no worker processes, no per-image Python. Only a folder of images that is
too large for that is decoded batch by batch (image_files.py), and `ImageData.gather` is the one
place that knows. Crop and flip work on the whole batch; scaling and normalisation are the network's
first layer (models/classifier.py), so a batch is exactly what is on disk and any two networks can
look at the same one.
"""

import gzip
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from utils import gaussians
from utils.distributed import WHOLE, Shard
from utils.errors import InputError
from utils.image_files import AUTO, CPU, ImageFiles, Streaming, available_memory, find_images

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageData:
    """A data set: the official training images first, the official test images behind them.

    images: uint8 (N, H, W, C); the layout in which a batch is channels-last without a copy. Points
        of the plane are float32 "images" of one pixel with a channel for each coordinate.
    labels: int64 (N,), each in [0, len(classes)).
    files_digest: of a folder of images, whether or not it is in memory, what identifies its files.
    """

    name: str
    images: Tensor | ImageFiles
    labels: Tensor
    classes: tuple[str, ...]
    train_size: int
    files_digest: bytes | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as a network gets it."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def to(self, device: torch.device) -> "ImageData":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def gather(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """uint8 (B, H, W, C) on the device, of each batch of indices in turn."""
        if isinstance(self.images, ImageFiles):
            return self.images.gather(batches)
        if not batches:
            return iter(())
        # To the device in one copy, not one a step.
        everything = torch.cat([*batches]).to(self.images.device)
        # Whole rows; images[chosen] would copy byte by byte.
        chosen = everything.split([len(batch) for batch in batches])
        return (self.images.index_select(0, batch) for batch in chosen)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every pixel and label: two data sets are the same if this is.

        For pixels that come from image files it is of the files' bytes and of the size that they
        are brought to, so that it is the same in memory and streamed.
        """
        digest = hashlib.sha256(str((tuple(self.images.shape), self.train_size)).encode())
        digest.update(self.files_digest or np.ascontiguousarray(self.images.cpu().numpy()))
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------- reading data sets


def _digits(data_dir: Path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey levels are 0..16. There is no official split: 360 images drawn once are the test images.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = torch.randperm(len(images), generator=generator(0)).numpy()
    train, test = order[:-360], order[-360:]
    return (
        (images[train], digits.target[train]),
        (images[test], digits.target[test]),
        [str(digit) for digit in digits.target_names],
    )


def _gaussians(data_dir: Path):
    points, labels = gaussians.sample(gaussians.TRAINING_POINTS + gaussians.TEST_POINTS)
    images, count = points[:, None, None, :], gaussians.TRAINING_POINTS
    return (images[:count], labels[:count]), (images[count:], labels[count:]), gaussians.CLASSES


def _torchvision(class_name: str, *splits: dict):
    """A reader for one of torchvision's data sets; torchvision downloads and verifies the files.

    splits: what torchvision's class is to be told for the training and for the test images.
    """

    def read(data_dir: Path):
        from torchvision import datasets

        constructor = getattr(datasets, class_name)
        try:
            with _downloading_to(data_dir):
                if class_name == "FashionMNIST":
                    _use_debian_package(data_dir / class_name / "raw")
                parts = [constructor(str(data_dir), download=True, **split) for split in splits]
            classes = getattr(parts[0], "classes", [str(digit) for digit in range(10)])
            train, test = map(_arrays, parts)
            _check(train, test, classes)
        except Exception as error:  # torchvision's readers raise a dozen types on damaged files
            debian = ", or install Debian's dataset-fashion-mnist" * (class_name == "FashionMNIST")
            raise InputError(
                f"no usable {class_name} data in {data_dir.resolve()} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); delete what is "
                "damaged and run once with internet access, or put the files that torchvision "
                f"expects there{debian}"
            ) from None
        return train, test, classes

    return read


def _arrays(part) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one of torchvision's data sets."""
    # SVHN alone says labels for targets and has the channels in front.
    svhn = hasattr(part, "labels")
    images = part.data.transpose(0, 2, 3, 1) if svhn else part.data
    return np.asarray(images), np.asarray(part.labels if svhn else part.targets)


def _check(train: tuple, test: tuple, classes: Sequence) -> None:
    """Raises ValueError unless this is what ImageData can hold.

    Readers can be anybody's, and not all of torchvision's files carry a checksum: MNIST's unpacked
    ones have none.
    """
    for part in (train, test):
        images, labels = map(np.asarray, part)
        if not len(images) or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{len(images)} images with labels of {labels.dtype} and shape {labels.shape}; a "
                "whole number for each image expected"
            )
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(
                f"labels {labels.min()} to {labels.max()}; 0 to {len(classes) - 1} expected, as "
                f"there are {len(classes)} classes"
            )
        if images.dtype.kind == "S":  # names of files
            continue
        points = images.dtype == np.float32 and images.ndim == 4 and images.shape[1:3] == (1, 1)
        if not points and (images.dtype != np.uint8 or images.ndim not in (3, 4)):
            raise ValueError(
                f"images of {images.dtype} and shape {images.shape}; uint8 and (N, H, W) or "
                "(N, H, W, C) expected"
            )
        if images.shape[1:] != np.shape(train[0])[1:]:
            raise ValueError(
                f"training images of shape {np.shape(train[0])[1:]} and test images of "
                f"{images.shape[1:]}; one shape expected"
            )


@contextmanager
def _downloading_to(folder: Path):
    """One process at a time, as torchvision unpacks in place; and no endless wait for a server."""
    folder.mkdir(parents=True, exist_ok=True)
    # Where nobody can write nobody unpacks, and no lock is needed.
    lock = FileLock(folder / ".lock") if os.access(folder, os.W_OK) else nullcontext()
    before = socket.getdefaulttimeout()
    with lock:
        socket.setdefaulttimeout(30)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


def _use_debian_package(raw: Path) -> None:
    """Unpacks Debian's dataset-fashion-mnist to where torchvision looks for unpacked files.

    Debian packed the same files anew, so the archives would fail torchvision's checksums; their own
    (gzip's CRC) is verified by unpacking them. A file appears under its name only when it is whole.
    """
    for archive in DEBIAN_FASHION_MNIST.glob("*.gz"):
        if not (raw / archive.stem).exists():
            raw.mkdir(parents=True, exist_ok=True)
            unfinished = raw / f".{archive.stem}"
            with gzip.open(archive) as packed, open(unfinished, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            unfinished.replace(raw / archive.stem)


def _imagefolder(data_dir: Path):
    """Files in place of images."""
    files = {part: find_images(data_dir, part) for part in ("train", "test")}
    for part, other in (("train", "test"), ("test", "train")):
        if missing := sorted(files[other].keys() - files[part].keys()):
            raise InputError(
                f"{data_dir / part} lacks classes that {data_dir / other} has: "
                f"{', '.join(map(repr, missing[:5]))}; a folder of images for each class is "
                "expected in both"
            )
    classes = sorted(files["train"])
    if len(classes) < 2:
        raise InputError(f"{data_dir / 'train'} holds {len(classes)} classes, 2 or more expected")

    def listed(part: dict[str, list[bytes]]) -> tuple[list[bytes], list[int]]:
        labels = [k for k, name in enumerate(classes) for _ in part[name]]
        return [path for name in classes for path in part[name]], labels

    return listed(files["train"]), listed(files["test"]), classes


TRAIN_AND_TEST = {"train": True}, {"train": False}
READERS: dict[str, Callable] = {
    "digits": _digits,
    "mnist": _torchvision("MNIST", *TRAIN_AND_TEST),
    "fashionmnist": _torchvision("FashionMNIST", *TRAIN_AND_TEST),
    "cifar10": _torchvision("CIFAR10", *TRAIN_AND_TEST),
    "cifar100": _torchvision("CIFAR100", *TRAIN_AND_TEST),
    "svhn": _torchvision("SVHN", {"split": "train"}, {"split": "test"}),
    "imagefolder": _imagefolder,
    "gaussians": _gaussians,
}


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    device: torch.device = CPU,
    streaming: Streaming = AUTO,
) -> ImageData:
    """Reads a data set, downloading it into data_dir if torchvision knows it and it is not there.

    name: a key of READERS. image_size: None, or the side in pixels that all images are brought to.
    device: where the data set, or a batch of it, is wanted. streaming: of imagefolder alone.
    Raises InputError if the files are missing and cannot be downloaded, or are not what they
    should be.
    """
    try:
        train, test, classes = READERS[name](Path(data_dir))
        try:
            _check(train, test, classes)
        except ValueError as error:
            raise InputError(f"the reader of {name} gives {error}") from None
        images, labels = (np.concatenate(parts) for parts in zip(train, test, strict=True))
        digest = None
        if name == "imagefolder":
            files = ImageFiles(images, image_size, streaming.workers)
            digest = files.digest()
            large = files.nbytes > available_memory(device) / 2
            stream = streaming.mode == "yes" or (streaming.mode == "auto" and large)
            images = files if stream else files.in_memory()
        else:
            images = _tensor(images, image_size)
    except (OSError, MemoryError) as error:
        raise InputError(f"cannot read the {name} data in {data_dir}: {error}") from None
    labels = torch.from_numpy(labels.astype(np.int64))
    classes = tuple(map(str, classes))
    return ImageData(name, images, labels, classes, len(train[0]), digest).to(device)


def _tensor(images: np.ndarray, image_size: int | None) -> Tensor:
    """(N, H, W) or (N, H, W, C) as ImageData has it."""
    tensor = torch.from_numpy(images)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(-1)
    if image_size and tensor.dtype.is_floating_point:
        raise InputError(
            f"--image_size {image_size} given, but these are points, which have no size; leave the "
            "flag out"
        )
    if image_size and tensor.shape[1:3] != (image_size, image_size):
        tensor = _resize(tensor, image_size)
    return tensor.contiguous()


def _resize(images: Tensor, size: int) -> Tensor:
    """Bilinear, with antialiasing; in portions, because the float copy is several times larger."""
    resized = [
        F.interpolate(
            portion.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True
        )
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        for portion in images.split(1024)
    ]
    return torch.cat(resized)


# ------------------------------------------------------------------------------------------ splits


class Splits(NamedTuple):
    """Positions in ImageData.images, int64, on the CPU."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def of(self, names: str) -> Tensor:
        """The positions in one split, or in several: "train", "train+validation"."""
        return torch.cat([getattr(self, name) for name in names.split("+")])

    def seen(self, trained_on: Tensor) -> tuple[int, int]:
        """How many validation and how many test images are among these positions."""
        validation, test = (torch.isin(part, trained_on).sum() for part in self[1:])
        return int(validation), int(test)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the indices of each split, which a checkpoint carries."""
        return {
            name: hashlib.sha256(indices.numpy().tobytes()).hexdigest()
            for name, indices in self._asdict().items()
        }


PROTOCOLS = ("ils", "lr")

# What random numbers are drawn for. Each has streams of its own, so that none depends on how many
# numbers another has drawn.
PURPOSES = {"split": 0, "order": 1, "pool": 2, "dropout": 3, "statistics": 4}


def generator(seed: int, *purpose: int) -> torch.Generator:
    """A random stream of its own for each seed and purpose, which may have further numbers.

    Split, order and augmentation never draw from the global stream, so they cannot depend on how
    many numbers a network or a method has drawn: runs of one seed are paired.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *purpose))


def stream_seed(seed: int, *purpose: int) -> int:
    state = np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1, np.uint64)
    return int(state[0])


def split(data: ImageData, tr_size: float, seed: int, protocol: str = "ils") -> Splits:
    """Divides the images at random, the same for every method of a seed.

    tr_size: share in (0, 1) of the training images that is trained on, the rest is for validation.
    protocol: "ils" leaves the official test images untouched. "lr" pools them with the training
    images and draws as many test images anew for each seed (LR paper, section 4).
    """
    count = round(tr_size * data.train_size)
    if not 0 < count < data.train_size:
        raise InputError(
            f"--tr_size {tr_size} leaves the training or the validation split of "
            f"{data.train_size} images empty; a share between {1 / data.train_size:.2g} and "
            f"{1 - 1 / data.train_size:.6g} would do"
        )
    images = torch.arange(len(data.labels))
    if protocol == "lr":
        images = images[torch.randperm(len(images), generator=generator(seed, PURPOSES["pool"]))]
    training, test = images[: data.train_size], images[data.train_size :]
    stream = generator(seed, PURPOSES["split"])
    training = training[torch.randperm(data.train_size, generator=stream)]
    parts = training[:count], training[count:], test
    return Splits(*(part.sort().values for part in parts))


def seen_by_teacher(teacher: Mapping, data: ImageData, splits: Splits) -> tuple[int, int]:
    """How many validation and how many test images of these splits a teacher was trained on.

    teacher: its seed, protocol and tr_size, and the splits that it was trained_on.
    """
    theirs = split(data, teacher["tr_size"], teacher["seed"], teacher["protocol"])
    return splits.seen(theirs.of(teacher["trained_on"]))


def reload(
    description: dict,
    data_dir: str | Path,
    device: torch.device,
    streaming: Streaming = AUTO,
) -> tuple[ImageData, Splits]:
    """The data and the splits that a checkpoint's network was trained with, on the device.

    description: Checkpoint.data. Raises InputError if the images found, or the splits drawn from
    them, are not those of the checkpoint: then a test image could be one that was trained on.
    """
    name = description["dataset"]
    data = _reload(name, str(data_dir), description["image_size"], device, streaming)
    if data.fingerprint != description["fingerprint"]:
        raise InputError(
            f"the {name} images in {data_dir} are not those that the checkpoint was trained with; "
            "give the --data_dir of its training"
        )
    for what, here, there in (
        ("classes", list(data.classes), description["classes"]),
        ("(channels, height, width)", data.input_shape, description["input_shape"]),
    ):
        if here != there:
            raise InputError(
                f"the checkpoint does not fit its own data: {what} of {name} are {here}, and it "
                f"says {there}"
            )
    splits = split(data, description["tr_size"], description["seed"], description["protocol"])
    if splits.hashes() != description["splits"]:
        raise InputError(
            f"the splits of {name} drawn from seed {description['seed']} are not those that the "
            "checkpoint names; it is damaged or of another version of these scripts"
        )
    return data, splits


# Many checkpoints of one data set are evaluated in a row.
_reload = lru_cache(maxsize=1)(load)


# Of so many images the mean is known to a thousandth, and they are decoded in minutes.
STATISTICS_IMAGES = 2**15


def pixel_statistics(data: ImageData, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the given images, pixels in [0, 1].

    Of a folder of more than STATISTICS_IMAGES images, in memory or not, over so many of them, the
    same ones each time. Float features are divided by 255 like pixels, so that a network need not
    know which it gets.
    """
    if data.files_digest and len(indices) > STATISTICS_IMAGES:
        stream = generator(0, PURPOSES["statistics"])
        indices = indices[torch.randperm(len(indices), generator=stream)[:STATISTICS_IMAGES]]
    if data.images.dtype.is_floating_point:
        (features,) = (part.cpu().double().flatten(0, 2) / 255 for part in data.gather([indices]))
        mean, std = features.mean(0), features.std(0, correction=0)
        return mean.tolist(), _divisors(std)
    counts = torch.zeros(data.images.shape[-1], 256, dtype=torch.int64)
    for images in data.gather(indices.split(512)):
        pixels = images.flatten(0, 2)
        counts += torch.stack([c.bincount(minlength=256) for c in pixels.unbind(1)]).cpu()
    # From whole numbers on, the result is the same bits on every device.
    shares, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.tolist(), _divisors(std)


def _divisors(std: Tensor) -> list[float]:
    """A channel without any variation carries no information; dividing by 1 keeps it finite."""
    return torch.where(std > 0, std, 1.0).tolist()


# ----------------------------------------------------------------------------------------- batches


class Augmentation(NamedTuple):
    """padding: zero pixels added on each side before a random crop. flip: left-right, half of the
    time."""

    padding: int = 0
    flip: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop": Augmentation(padding=4),
    "crop-flip": Augmentation(padding=4, flip=True),
    # The LR paper's shifts by up to a tenth of 32 pixels, where Keras repeats the nearest pixels.
    "shift-flip": Augmentation(padding=3, flip=True),
}


class Batch(NamedTuple):
    """images: as ImageData has them, but (B, C, H, W), channels-last in memory. labels: int64 (B,).
    indices: int64 (B,), the positions in the data set. flipped: bool (B,). All on its device.

    count: images of the whole batch, of which this may be one process's share.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    flipped: Tensor
    count: int


def ordered_batches(
    data: ImageData, indices: Tensor, batch_size: int, flip: bool = False
) -> Iterator[Batch]:
    """The images as they are, or all of them flipped, in the order of the indices."""
    batches = indices.to(data.labels.device).split(batch_size)
    for chosen, images in zip(batches, data.gather(indices.split(batch_size)), strict=True):
        images = images.flip(2) if flip else images
        flipped = torch.full_like(chosen, flip, dtype=torch.bool)
        yield Batch(images.permute(0, 3, 1, 2), data.labels[chosen], chosen, flipped, len(chosen))


def steps_per_epoch(count: int, batch_size: int, processes: int = 1) -> int:
    """A last batch of one image is left out: batch norm has no variance over a single image.

    So is one that has no image for some of the processes.
    """
    full, rest = divmod(count, batch_size)
    return full + (rest >= max(2, processes) or (rest > 0 and full == 0))


def shuffled_batches(
    data: ImageData,
    indices: Tensor,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    first: int = 0,
    shard: Shard = WHOLE,
) -> Iterator[Batch]:
    """One epoch of training batches, or of a shard of each, from batch number `first` on.

    Order and augmentation are a function of (seed, epoch) alone, drawn on the CPU: the same for
    every method, device and number of processes, and an interrupted epoch goes on where it stopped.
    """
    device, count = data.labels.device, len(indices)
    stream = generator(seed, PURPOSES["order"], epoch)
    order = indices[torch.randperm(count, generator=stream)]
    flips = (torch.rand(count, generator=stream) < 0.5) & augmentation.flip
    shifts = torch.randint(2 * augmentation.padding + 1, (count, 2), generator=stream)
    steps = slice(first, steps_per_epoch(count, batch_size, shard.count))

    def batches(values: Tensor) -> list[Tensor]:
        return [batch[shard.rank :: shard.count] for batch in values.split(batch_size)[steps]]

    shown = data.gather(batches(order))
    order, flips, shifts = order.to(device), flips.to(device), shifts.to(device)
    counts = [len(batch) for batch in order.split(batch_size)[steps]]
    for images, chosen, flipped, shift, count in zip(
        shown, batches(order), batches(flips), batches(shifts), counts, strict=True
    ):
        if augmentation.padding:
            images = _crop(images, shift, augmentation.padding)
        if augmentation.flip:
            images = _flip(images, flipped)
        yield Batch(images.permute(0, 3, 1, 2), data.labels[chosen], chosen, flipped, count)


def _flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirrors left-right those of uint8 (B, H, W, C) that bool (B,) says."""
    both = torch.cat([images, images.flip(2)])
    chosen = torch.arange(len(images), device=images.device) + len(images) * flipped
    return both.index_select(0, chosen)  # whole images; torch.where would go byte by byte


def _crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Pads uint8 (B, H, W, C) with zeros and cuts (H, W) out at each image's (row, column)."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    # Every window there is, as a view: (B, rows, columns, H, W, C).
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    return windows[torch.arange(count, device=images.device), shifts[:, 0], shifts[:, 1]]
