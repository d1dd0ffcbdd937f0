"""How image files are found and decoded, here or in worker processes.

A folder of images that fits in memory is decoded once. One that does not stays where it is
(`ImageFiles`): whenever a batch is asked for, forks of this process decode it, and the batches that
come next, while the network is busy.
"""

import hashlib
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from utils.errors import InputError, signals_held_back

# Pillow knows more, among them EPS, which it has Ghostscript run as a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**25  # of one file; a few working copies of it stay well below 1 GiB

# What a worker decodes at a time: enough for the cost of handing it over not to matter, and little
# enough for all workers to have their share of a batch.
PORTION_IMAGES, PORTION_BYTES = 64, 2**21


# ------------------------------------------------------------------------------------ finding files


def find_images(data_dir: Path, part: str) -> dict[str, list[bytes]]:
    """The files of each class, which is a folder, at any depth below it.

    Hidden files and other kinds of files are passed over. Links may lead to files inside data_dir:
    a folder of images from elsewhere must not bring in what is private here.
    """
    folder, root = data_dir / part, os.path.realpath(data_dir)

    def refuse_link(path: Path) -> None:
        if path.is_symlink() and (
            path.is_dir() or not Path(os.path.realpath(path)).is_relative_to(root)
        ):
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
            hidden = any(part.startswith(".") for part in path.relative_to(entry).parts)
            if path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir():
                images.append(os.fsencode(path))
        if not images:
            raise InputError(
                f"the class {str(entry)!r} holds no image; at least one file expected that ends in "
                + ", ".join(SUFFIXES)
            )
        # Names need not be UTF-8 on Linux, but must be to be printed and stored.
        found[os.fsencode(entry.name).decode("utf-8", "backslashreplace")] = images
    return found


# ----------------------------------------------------------------------------------- one image file


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, its header read. What goes wrong with it in the context becomes an InputError."""
    try:
        if not path.is_file():  # reading a pipe would never end
            raise ValueError("it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata beside sound pixels
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(
                        f"it has {image.width}x{image.height} pixels, at most {MAX_PIXELS} expected"
                    )
                yield image
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise InputError(f"cannot use the image {str(path)!r}: {error}") from None


def _read_image(path: Path, image_size: int | None) -> np.ndarray:
    """uint8 (H, W, 3), upright; with image_size scaled and centre-cropped to a square of it.

    Of several frames the first is taken.
    """
    with _opened(path) as file:
        image = _to_rgb(ImageOps.exif_transpose(file))
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


# ---------------------------------------------------------------------------------- all image files


class Streaming(NamedTuple):
    """How image folders are read. The result is the same bits, whatever is chosen.

    mode: "yes" leaves the images on disk, "no" decodes all of them into memory, "auto" leaves them
    on disk if they would take more than half of `available_memory`.
    workers: processes that decode, 0 for this one; None: one for each core that may be used.
    """

    mode: str = "auto"
    workers: int | None = None


AUTO, CPU = Streaming(), torch.device("cpu")


def available_memory(device: torch.device) -> int:
    """Bytes that data for the device can take: what is free, or what a container or batch job is
    allowed if that is less; of the host's memory the share of this process among torchrun's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    with suppress(OSError):
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        folder = Path(f"/sys/fs/cgroup{group}")
        first = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")  # control groups, version 1
        for file in (first, *(above / "memory.max" for above in (folder, *folder.parents))):
            with suppress(OSError, ValueError):  # not there; no limit
                limits.append(int(file.read_text()))
    limits = [limit // processes_here() for limit in limits]
    if device.type == "cuda":
        limits.append(torch.cuda.mem_get_info(device)[0])
    return min(limits)


def processes_here() -> int:
    """How many processes torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclass(frozen=True)
class ImageFiles:
    """Images of one size that stay in their files; to the data set what the uint8 tensor
    (N, H, W, 3) of them would be, but for indexing.

    paths: (N,) bytes, one block of memory, which forks share; they would copy Python's objects,
    whose reference counts change.
    device: where batches go.
    """

    paths: np.ndarray
    image_size: int | None = None
    workers: int | None = None
    device: torch.device = CPU
    dtype = torch.uint8

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, 3), H and W being those of the first image."""
        return len(self), *_read_image(self._path(0), self.image_size).shape

    @property
    def nbytes(self) -> int:
        """What all of them would take, decoded."""
        return math.prod(self.shape)

    def to(self, device: torch.device) -> "ImageFiles":
        return replace(self, device=device)

    def gather(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """uint8 (B, H, W, 3) on the device, of each batch of indices in turn.

        Raises InputError for an image that is damaged or of another size.
        """
        _, *shape = self.shape
        portion = min(PORTION_IMAGES, max(1, PORTION_BYTES // math.prod(shape)))
        workers = self._workers(sum(map(len, batches)) / portion)
        # A batch and more is under way while the one before it is in use.
        largest = max(map(len, batches), default=0)
        ahead = workers and max(2, math.ceil(largest / portion / workers))
        # Forks share this memory. The one place more is that which is being read here.
        places = torch.frombuffer(
            mmap.mmap(-1, (workers * ahead + 1) * portion * math.prod(shape)), dtype=torch.uint8
        ).view(-1, portion, *shape)
        portions = (part.tolist() for batch in batches for part in batch.split(portion))
        tasks = zip(itertools.cycle(range(len(places))), portions, strict=False)
        decoded = in_workers(partial(self._decode, places), tasks, workers, ahead)
        for batch in batches:
            images = torch.empty(
                (len(batch), *shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
            for part in images.split(portion):
                part.copy_(places[next(decoded)][: len(part)])
            yield images.to(self.device, non_blocking=True)

    def in_memory(self) -> Tensor:
        """All of them as a tensor."""
        images = torch.from_numpy(np.empty(self.shape, np.uint8))
        everything = torch.arange(len(self)).split(PORTION_IMAGES)
        for part, decoded in zip(
            images.split(PORTION_IMAGES), self.gather(everything), strict=True
        ):
            part.copy_(decoded)
        return images

    def digest(self) -> bytes:
        """SHA-256 of the files' own, in order.

        Every file is read whole, so it costs up to an epoch's reading (100 GB at 500 MB/s: three
        minutes): names, sizes or parts of files would not tell two versions of uncompressed or
        padded images apart. Raises InputError for a file that says it is no image, or one of
        another size; what is wrong behind its header shows when it is decoded.
        """
        portions = torch.arange(len(self)).split(PORTION_IMAGES)
        digests = in_workers(
            self._digests, (part.tolist() for part in portions), self._workers(len(portions)), 2
        )
        return hashlib.sha256(b"".join(digests)).digest()

    def _path(self, position: int) -> Path:
        return Path(os.fsdecode(self.paths[position]))

    def _workers(self, portions: float) -> int:
        """One portion is not worth a fork. Outside of Linux not every library survives one."""
        most = self.workers
        if most is None:
            most = max(1, cpu_count() // processes_here()) if sys.platform == "linux" else 0
        return min(most, math.ceil(portions)) if portions > 1 else 0

    def _decode(self, places: Tensor, task: tuple[int, list[int]]) -> int:
        """Decodes the images at some positions into one of the places. Returns which."""
        place, positions = task
        for target, position in zip(places[place].numpy(), positions, strict=False):
            image = _read_image(self._path(position), self.image_size)
            if image.shape != target.shape:
                raise self._unequal(position, *image.shape[:2])
            target[:] = image
        return place

    def _digests(self, positions: list[int]) -> bytes:
        digests = []
        for position in positions:
            path = self._path(position)
            with _opened(path) as image, open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
                width, height = image.size
            # Whether it lies on its side is not always known from its beginning.
            if not self.image_size and {width, height} != {*self.shape[1:3]}:
                raise self._unequal(position, height, width)
        return b"".join(digests)

    def _unequal(self, position: int, height: int, width: int) -> InputError:
        _, h, w, _ = self.shape
        return InputError(
            f"images of unequal size: {str(self._path(0))!r} is {w}x{h}, "
            f"{str(self._path(position))!r} is {width}x{height}; give --image_size N to bring all "
            "of them to N x N pixels"
        )


# --------------------------------------------------------------------------------- worker processes


def in_workers(
    function: Callable[[Any], Any], tasks: Iterable, workers: int, ahead: int
) -> Iterator:
    """function(task) of each task in turn, computed in that many forks of this process.

    While one result is in use, `ahead` tasks of each fork are under way or done. The forks end with
    the iterator, and with this process however it ends. 0 workers: computed here, when asked for.
    Raises the InputError that function raises.
    """
    if not workers:
        yield from map(function, tasks)
        return
    loader = DataLoader(
        _Answers(function),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=_end_with_parent,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # without one of its own it draws from the global stream
    )
    for answer in _started(loader):
        if isinstance(answer, InputError):
            raise InputError(str(answer))  # a new one, as this one would keep the loader alive
        yield answer


class _Answers:
    """What torch takes for a data set: function(task), or the InputError that it raises."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, task: Any) -> Any:
        try:
            return self.function(task)
        except InputError as error:
            return error


def _started(loader: DataLoader) -> Iterator:
    try:
        with signals_held_back():
            return iter(loader)
    except OSError as error:
        raise InputError(
            f"cannot start {loader.num_workers} worker processes: {error}; fewer --workers, or 0, "
            "would do"
        ) from None


def _end_with_parent(worker: int) -> None:
    """Has this worker end when its parent has ended, or says so by a SIGTERM."""
    parent = multiprocessing.parent_process().pid

    def watch() -> None:
        sender = None
        while sender != parent and os.getppid() == parent:
            received = signal.sigtimedwait([signal.SIGTERM], 0.1)
            sender = received and received.si_pid
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
