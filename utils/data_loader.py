"""Where images come from, who is in which split, and what a batch is.

A data set is one uint8 tensor. It is read once, moved to the device once, and batches are taken
from it by index there: no worker processes, no per-image Python. Crop and flip work on the whole
batch; scaling and normalisation are the network's first layer (models/classifier.py), so a batch is
exactly what is on disk and any two networks can look at the same one.
"""

import gzip
import hashlib
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from utils.distributed import WHOLE, Shard
from utils.errors import InputError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageData:
    """A data set: the official training images first, the official test images behind them.

    images: uint8 (N, H, W, C); the layout in which a batch is channels-last without a copy.
    labels: int64 (N,), each in [0, len(classes)).
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    train_size: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as a network gets it."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def to(self, device: torch.device) -> "ImageData":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every pixel and label: two data sets are the same if this is."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.train_size)).encode())
        digest.update(np.ascontiguousarray(self.images.cpu().numpy()))
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------- reading data sets


def _digits(data_dir: Path, image_size: int | None):
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


def _torchvision(class_name: str, **split_argument):
    """A reader for one of torchvision's data sets; torchvision downloads and verifies the files."""

    ((keyword, values),) = split_argument.items()

    def read(data_dir: Path, image_size: int | None):
        from torchvision import datasets

        constructor = getattr(datasets, class_name)
        try:
            with _downloading_to(data_dir):
                if class_name == "FashionMNIST":
                    _use_debian_package(data_dir / class_name / "raw")
                parts = [
                    constructor(str(data_dir), download=True, **{keyword: value})
                    for value in values
                ]
            classes = getattr(parts[0], "classes", [str(digit) for digit in range(10)])
            train, test = (_arrays(part, len(classes)) for part in parts)
            if train[0].shape[1:] != test[0].shape[1:]:
                raise ValueError("training and test images differ in size")
        except Exception as error:  # torchvision's readers raise a dozen types on damaged files
            debian = ", or install Debian's dataset-fashion-mnist" * (class_name == "FashionMNIST")
            raise InputError(
                f"no usable {class_name} data in {data_dir.resolve()} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); delete what is "
                "damaged and run once with a network, or put the files that torchvision expects "
                f"there{debian}"
            ) from None
        return train, test, classes

    return read


def _arrays(part, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one of torchvision's data sets.

    Not all of torchvision's files carry a checksum: MNIST's unpacked ones have none.
    """
    # SVHN alone says labels for targets and has the channels in front.
    svhn = hasattr(part, "labels")
    images = np.asarray(part.data.transpose(0, 2, 3, 1) if svhn else part.data)
    labels = np.asarray(part.labels if svhn else part.targets)
    if images.dtype != np.uint8 or not 0 < len(images) == len(labels):
        raise ValueError(f"{len(images)} images of {images.dtype} for {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()} for {num_classes} classes")
    return images, labels


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


# Pillow knows more, among them EPS, which it has Ghostscript run as a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**25  # of one file; a few working copies of it stay well below 1 GiB


def _imagefolder(data_dir: Path, image_size: int | None):
    files = {part: _image_files(data_dir, part) for part in ("train", "test")}
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

    paths = [path for part in files.values() for name in classes for path in part[name]]
    labels = [k for part in files.values() for k, name in enumerate(classes) for _ in part[name]]
    images = np.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata beside sound pixels
        for position, path in enumerate(paths):
            image = _read_image(path, image_size)
            if position == 0:
                images = np.empty((len(paths), *image.shape), np.uint8)
            if image.shape != images[0].shape:
                (height, width), (h, w) = images.shape[1:3], image.shape[:2]
                raise InputError(
                    f"images of unequal size: {str(paths[0])!r} is {width}x{height}, "
                    f"{str(path)!r} is {w}x{h}; give --image_size N to bring all of them to N x N "
                    "pixels"
                )
            images[position] = image
    count = sum(map(len, files["train"].values()))
    return (images[:count], labels[:count]), (images[count:], labels[count:]), classes


def _image_files(data_dir: Path, part: str) -> dict[str, list[Path]]:
    """The images of each class, which is a folder, at any depth below it.

    Hidden files and other kinds of files are passed over. Links may lead to files inside data_dir:
    a folder of images from elsewhere must not bring in what is private here.
    """
    folder, root = data_dir / part, os.path.realpath(data_dir)

    def refuse_link(path: Path) -> None:
        outside = not Path(os.path.realpath(path)).is_relative_to(root)
        if path.is_symlink() and (path.is_dir() or outside):
            raise InputError(
                f"{str(path)!r} is a link to a folder, or leads outside {data_dir}; copies, or "
                "links to files inside, expected"
            )

    if not folder.is_dir():
        raise InputError(
            f"no folder {folder}: --dataset imagefolder reads --data_dir with "
            "train/<class>/<image> and test/<class>/<image>"
        )
    refuse_link(folder)
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        images = []
        for path in (entry, *sorted(entry.rglob("*"))):
            refuse_link(path)
            kind = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            if kind and not path.is_dir():
                images.append(path)
        if not images:
            raise InputError(
                f"the class {str(entry)!r} holds no image; at least one file expected that ends in "
                + ", ".join(SUFFIXES)
            )
        # Names need not be UTF-8 on Linux, but must be to be printed and stored.
        found[os.fsencode(entry.name).decode("utf-8", "backslashreplace")] = images
    return found


def _read_image(path: Path, image_size: int | None) -> np.ndarray:
    """uint8 (H, W, 3), upright; with image_size scaled and centre-cropped to a square of it.

    Of several frames the first is taken.
    """
    try:
        if not path.is_file():  # reading a pipe would never end
            raise ValueError("it is not a regular file")
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(
                    f"it has {file.width}x{file.height} pixels, at most {MAX_PIXELS} expected"
                )
            image = _to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise InputError(f"cannot use the image {str(path)!r}: {error}") from None
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of grey, palette, CMYK and 16-bit images; what is transparent lies on white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255, which is near black
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("it has 32-bit pixels, at most 16 bits expected")
        image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it has floating-point pixels, 8 or 16 bits expected")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


READERS: dict[str, Callable] = {
    "digits": _digits,
    "mnist": _torchvision("MNIST", train=(True, False)),
    "fashionmnist": _torchvision("FashionMNIST", train=(True, False)),
    "cifar10": _torchvision("CIFAR10", train=(True, False)),
    "cifar100": _torchvision("CIFAR100", train=(True, False)),
    "svhn": _torchvision("SVHN", split=("train", "test")),
    "imagefolder": _imagefolder,
}


def load(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> ImageData:
    """Reads a data set, downloading it into data_dir if torchvision knows it and it is not there.

    name: a key of READERS. image_size: None, or the side in pixels that all images are brought to.
    Raises InputError if the files are missing and cannot be downloaded, or are not what they
    should be.
    """
    try:
        train, test, classes = READERS[name](Path(data_dir), image_size)
    except (OSError, MemoryError) as error:
        raise InputError(f"cannot read the {name} data in {data_dir}: {error}") from None

    def both(part: int) -> Tensor:
        return torch.from_numpy(np.concatenate([train[part], test[part]]))

    images, labels = both(0), both(1).long()
    if images.ndim == 3:
        images = images.unsqueeze(-1)
    if image_size and images.shape[1:3] != (image_size, image_size):
        images = _resize(images, image_size)
    return ImageData(name, images.contiguous(), labels, tuple(classes), train_size=len(train[0]))


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

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the indices of each split, which a checkpoint carries."""
        return {
            name: hashlib.sha256(indices.numpy().tobytes()).hexdigest()
            for name, indices in self._asdict().items()
        }


PROTOCOLS = ("ils", "lr")

# What random numbers are drawn for. Each has streams of its own, so that none depends on how many
# numbers another has drawn.
PURPOSES = {"split": 0, "order": 1, "pool": 2, "dropout": 3}


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


def reload(
    description: dict, data_dir: str | Path, device: torch.device
) -> tuple[ImageData, Splits]:
    """The data and the splits that a checkpoint's network was trained with, on the device.

    description: Checkpoint.data. Raises InputError if the images found, or the splits drawn from
    them, are not those of the checkpoint: then a test image could be one that was trained on.
    """
    name = description["dataset"]
    if name not in READERS:
        raise InputError(f"unknown data set {name!r}; one of {', '.join(READERS)} expected")
    data = _reload(name, str(data_dir), description["image_size"], device)
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


@lru_cache(maxsize=1)  # many checkpoints of one data set are evaluated in a row
def _reload(name: str, data_dir: str, image_size: int | None, device: torch.device) -> ImageData:
    return load(name, data_dir, image_size).to(device)


def pixel_statistics(data: ImageData, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the given images, pixels in [0, 1]."""
    counts = torch.zeros(data.images.shape[-1], 256, dtype=torch.int64)
    for portion in indices.split(512):
        pixels = data.images[portion.to(data.images.device)].flatten(0, 2)
        counts += torch.stack([c.bincount(minlength=256) for c in pixels.unbind(1)]).cpu()
    # From whole numbers on, the result is the same bits on every device.
    shares, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    # A channel without any variation carries no information; dividing by 1 keeps it finite.
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


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
    """images: uint8 (B, C, H, W), channels-last in memory. labels: int64 (B,). indices: int64 (B,),
    the images' positions in the data set. flipped: bool (B,). All on the data's device.

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
    for chosen in indices.to(data.images.device).split(batch_size):
        images = data.images[chosen]
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
    device, count = data.images.device, len(indices)
    stream = generator(seed, PURPOSES["order"], epoch)
    order = indices[torch.randperm(count, generator=stream)].to(device)
    flips = ((torch.rand(count, generator=stream) < 0.5) & augmentation.flip).to(device)
    shifts = torch.randint(2 * augmentation.padding + 1, (count, 2), generator=stream).to(device)
    for step in range(first, steps_per_epoch(count, batch_size, shard.count)):
        start, end = step * batch_size, min((step + 1) * batch_size, count)
        part = slice(start + shard.rank, end, shard.count)
        chosen = order[part]
        images = data.images[chosen]
        if augmentation.padding:
            images = _crop(images, shifts[part], augmentation.padding)
        if augmentation.flip:
            images = torch.where(flips[part, None, None, None], images.flip(2), images)
        yield Batch(
            images.permute(0, 3, 1, 2), data.labels[chosen], chosen, flips[part], end - start
        )


def _crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Pads uint8 (B, H, W, C) with zeros and cuts (H, W) out at each image's (row, column)."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    device = images.device
    rows = shifts[:, 0, None] + torch.arange(height, device=device)
    columns = shifts[:, 1, None] + torch.arange(width, device=device)
    image = torch.arange(count, device=device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
