"""Images that stay on disk give the same bits as images in memory, and their workers never remain.

Each portion of images is a worker's task, and one portion alone needs no worker: the folder here
has more images than that in each split.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, files, write_image
from matplotlib.figure import Figure
from PIL import Image
from test_resume import assert_same_outcome, assert_stopped

from utils import data_loader, image_files, inspector
from utils.checkpoint import read_tensors
from utils.data_loader import AUGMENTATIONS, ImageData
from utils.errors import InputError
from utils.image_files import ImageFiles, Streaming
from utils.inference import evaluate_checkpoint

CPU = torch.device("cpu")
TRAIN = (
    "Vanilla-cross-entropy.py", "--dataset", "imagefolder", "--model", "shallownet",
    "--batch_size", 100, "--tr_size", 0.7, "--augment", "crop-flip", "--epochs", 6, "--estop", 0,
)  # fmt: skip
STREAM = Streaming("yes", 2)
STREAMED = ("--stream", "yes", "--workers", 2)
RUN = Path("imagefolder/shallownet/vanilla/seed0")


def write_folder(folder: Path, train: int, test: int, height: int = 8, width: int = 9) -> Path:
    """Noise whose brightness hints at its class, ant or bee, in files that differ in size."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            pixels = draw.integers(0, 200, (height, width, 3)) + 55 * (number % 2)
            path = folder / part / ("ant", "bee")[number % 2] / f"{number:04}.png"
            write_image(path, pixels.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), 300, 80)


def load(folder: Path, mode: str, workers: int | None = 2, image_size: int | None = None):
    return data_loader.load("imagefolder", folder, image_size, CPU, Streaming(mode, workers))


def children(process: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except FileNotFoundError:
        return []


def wait_for_workers(process: int, seconds: float = 60) -> list[int]:
    """The processes that decode for this one, once they are all there."""
    end = time.monotonic() + seconds
    while len(found := children(process)) < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


def has_ended(process: int) -> bool:
    """Or is a zombie: it neither runs nor holds anything, but its new parent has not asked for its
    status. Some systems' first process asks every few seconds only."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def assert_gone(processes: list[int], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        while not has_ended(process):
            assert time.monotonic() < end, f"worker {process} is still there"
            time.sleep(0.01)


# ---------------------------------------------------------------------------------- the same images


@pytest.fixture(scope="module")
def memory(folder) -> ImageData:
    data = load(folder, "no")
    assert isinstance(data.images, torch.Tensor)
    return data


@pytest.fixture(scope="module")
def stream(folder) -> ImageData:
    data = load(folder, "yes")
    assert isinstance(data.images, ImageFiles)
    return data


@pytest.mark.parametrize(("workers", "image_size"), [(0, None), (1, None), (2, 5), (None, 5)])
def test_batches_are_those_of_images_in_memory(folder, workers, image_size):
    memory = load(folder, "no", 0, image_size)
    stream = load(folder, "yes", workers, image_size)
    assert stream.input_shape == memory.input_shape
    assert len(stream.images) == len(memory.images) == 380
    assert torch.equal(stream.labels, memory.labels)
    indices = torch.arange(380).flip(0)[:333]
    for batch_size in (7, 100, 1000):
        batches, expected = (
            list(data_loader.ordered_batches(data, indices, batch_size))
            for data in (stream, memory)
        )
        for batch, same in zip(batches, expected, strict=True):
            assert batch.count == same.count
            assert all(map(torch.equal, batch[:4], same[:4]))
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("augmentation", "first"), [("none", 0), ("crop-flip", 0), ("crop-flip", 1), ("crop-flip", 2)]
)
def test_epochs_are_those_of_images_in_memory(memory, stream, augmentation, first):
    arguments = (torch.arange(201), 100, AUGMENTATIONS[augmentation], 3, 4, first)
    batches, expected = (
        list(data_loader.shuffled_batches(data, *arguments)) for data in (stream, memory)
    )
    assert len(batches) == len(expected) == 2 - first
    for batch, same in zip(batches, expected, strict=True):
        assert batch.count == same.count
        assert all(map(torch.equal, batch[:4], same[:4]))


def test_the_global_random_stream_is_left_alone(stream):
    """Dropout draws from it, so a training on streamed images would be another one."""
    state = torch.get_rng_state()
    list(stream.gather(torch.arange(200).split(100)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fingerprint_is_of_every_file_however_they_are_read(folder, memory, stream, tmp_path):
    prints = {memory.fingerprint, stream.fingerprint, load(folder, "yes", 0).fingerprint}
    assert len(prints) == 1
    prints.add(load(folder, "yes", image_size=5).fingerprint)

    def copied(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    images = copied("pixel")
    path = images / "test/bee/0079.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path, compress_level=0)
    prints.add(load(images, "yes").fingerprint)
    images = copied("label")
    (images / "train/ant/0298.png").rename(images / "train/bee/0000.png")
    prints.add(load(images, "yes").fingerprint)
    images = copied("swap")
    shutil.copy(folder / "train/ant/0000.png", images / "train/ant/0002.png")
    shutil.copy(folder / "train/ant/0002.png", images / "train/ant/0000.png")
    prints.add(load(images, "yes").fingerprint)
    assert len(prints) == 5
    (images / "train/ant").rename(images / "train/ANT")  # names are compared as such
    (images / "test/ant").rename(images / "test/ANT")
    assert load(images, "yes").fingerprint in prints


def test_pixel_statistics_of_many_images_are_of_the_same_sample(memory, stream, monkeypatch):
    train = data_loader.split(memory, 0.7, seed=0).train
    exact = data_loader.pixel_statistics(memory, train)
    assert data_loader.pixel_statistics(stream, train) == exact
    pixels = memory.images[train].double() / 255
    np.testing.assert_allclose(exact[0], pixels.mean((0, 1, 2)), rtol=1e-9)
    monkeypatch.setattr(data_loader, "STATISTICS_IMAGES", 70)
    sampled = data_loader.pixel_statistics(memory, train)
    assert data_loader.pixel_statistics(stream, train) == sampled
    assert sampled != exact
    np.testing.assert_allclose(sampled[0], exact[0], atol=0.02)
    # A data set that is a tensor from the start is counted whole.
    digits = data_loader.load("digits")
    mean, _ = data_loader.pixel_statistics(digits, torch.arange(1437))
    assert mean[0] == pytest.approx(digits.images[:1437].double().mean().item() / 255, rel=1e-12)


@pytest.mark.parametrize(("share", "streams"), [(1.9, True), (2.1, False)])
def test_auto_streams_what_takes_more_than_half_of_the_memory(folder, monkeypatch, share, streams):
    size = 380 * 8 * 9 * 3
    monkeypatch.setattr(data_loader, "available_memory", lambda device: int(share * size))
    assert isinstance(load(folder, "auto", 0).images, ImageFiles) == streams
    assert isinstance(load(folder, "yes", 0).images, ImageFiles)
    assert isinstance(load(folder, "no", 0).images, torch.Tensor)


def test_available_memory_is_what_the_machine_has():
    assert image_files.available_memory(CPU) > 2**24


def test_available_memory_is_what_a_container_or_batch_job_is_allowed(tmp_path, monkeypatch):
    group = tmp_path / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("3000000\n")
    monkeypatch.setattr(image_files, "Path", lambda path: tmp_path / path.removeprefix("/"))
    assert image_files.available_memory(CPU) == 3000000
    (tmp_path / "sys/fs/cgroup/memory").mkdir()  # version 1
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("2000000\n")
    assert image_files.available_memory(CPU) == 2000000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's processes of one machine share it
    assert image_files.available_memory(CPU) == 500000


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """1,000 images of 256x256 are 197 MB decoded; and a process that leaves an epoch half done
    open ends all the same."""
    write_folder(tmp_path, 2, 2, 256, 256)
    for number in range(1000):
        (tmp_path / f"train/ant/link{number}.png").symlink_to(tmp_path / "train/ant/0000.png")
    program = f"""
import resource, torch
from utils import data_loader
from utils.image_files import Streaming

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

torch.set_num_threads(1)
before = peak()
data = data_loader.load("imagefolder", {str(tmp_path)!r}, streaming=Streaming("yes", 2))
everything = torch.arange(len(data.images))
count = sum(len(batch.labels) for batch in data_loader.ordered_batches(data, everything, 100))
batches = data_loader.ordered_batches(data, everything, 10)
next(batches)
print(count, peak() - before)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert ended.stderr == ""
    count, grown = map(int, ended.stdout.split())
    assert count == 1004
    assert grown < 100, f"{grown} MiB"


# -------------------------------------------------------------------------------- the same networks


@pytest.fixture(scope="module")
def in_memory(forks, folder, tmp_path_factory) -> Path:
    """--output_dir of a training on images in memory."""
    output = tmp_path_factory.mktemp("memory")
    forks.run(*TRAIN, "--data_dir", folder, "--output_dir", output, "--stream", "no")
    return output


def test_a_training_on_streamed_images_gives_the_same_files(forks, folder, in_memory, tmp_path):
    command = (*TRAIN, "--data_dir", folder, "--output_dir", tmp_path)
    said = forks.run(*command, *STREAMED)
    assert "--stream yes --workers 2" in said.splitlines()[-1]  # the next command needs them too
    here, there = files(tmp_path), files(in_memory)
    assert here.keys() == there.keys()
    assert [name for name in there if here[name] != there[name]] == [str(RUN / "config.json")]
    # How the images are read is no setting of a run.
    assert "finished earlier" in forks.run(*command)


def test_evaluation_and_distillation_are_the_same(forks, folder, in_memory, tmp_path):
    for mode in ("yes", "no"):
        flags = ("--data_dir", folder, "--stream", mode)
        forks.run(
            "Models-evaluation.py", in_memory, *flags, "--output_dir", tmp_path / mode / "tables"
        )
        forks.run(
            "Network-distillation.py", "--teacher", in_memory, *flags, "--epochs", 1,
            "--scale_teacher", "no", "--output_dir", tmp_path / mode,
        )  # fmt: skip
    here, there = files(tmp_path / "yes"), files(tmp_path / "no")
    assert here.keys() == there.keys()
    differing = [name for name in there if here[name] != there[name]]
    assert [Path(name).name for name in differing] == ["config.json"]


def test_the_inspector_shows_a_streamed_image(in_memory, folder, monkeypatch, tmp_path):
    evaluated = evaluate_checkpoint(in_memory / RUN / "best.pt", folder, CPU, STREAM)
    shown = []
    monkeypatch.setattr(inspector, "draw", lambda image, *_: shown.append(image) or Figure())
    inspector.inspect([evaluated], 3, folder, CPU, tmp_path, STREAM)
    expected = Image.open(folder / "test/ant/0006.png")
    assert np.array_equal(shown[0], np.asarray(expected))


# ------------------------------------------------------------------------------------ what is wrong


def test_a_damaged_image_is_named_as_it_is_in_memory(folder, refused, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    path = images / "train/bee/0101.png"
    path.write_bytes(path.read_bytes()[:-30])  # the header is sound
    lines = {
        refused(
            *TRAIN, "--data_dir", images, "--output_dir", tmp_path / "runs", "--stream", mode,
            "--workers", 2, "--tr_size", 0.99,
        )
        for mode in ("yes", "no")
    }  # fmt: skip
    assert len(lines) == 1
    assert f"cannot use the image {str(path)!r}: " in lines.pop()
    assert multiprocessing.active_children() == []


def test_an_image_that_is_damaged_later_ends_the_epoch_in_one_line(folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    data = load(images, "yes")
    path = images / "train/bee/0299.png"
    path.unlink()
    path.write_text("no image")
    with pytest.raises(InputError, match=r"0299\.png.*cannot identify image file") as caught:
        list(data.gather(torch.arange(300).split(50)))
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []  # while the exception is still held


def test_unequal_sizes_are_found_before_anything_is_decoded(folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    path = images / "train/bee/0299.png"
    Image.new("RGB", (9, 7)).save(path)
    for mode in ("yes", "no"):
        with pytest.raises(InputError, match=r"is 9x8, .*0299\.png' is 9x7; give --image_size N"):
            load(images, mode)
    assert load(images, "yes", image_size=6).input_shape == (3, 6, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: upright it is as the others are
    Image.new("RGB", (8, 9)).save(path, exif=exif)
    assert list(load(images, "yes").gather(torch.arange(300).split(100)))[-1][-1].max() == 0
    Image.new("RGB", (8, 9)).save(path)  # lies on its side, which the header need not say
    with pytest.raises(InputError, match=r"0299\.png' is 8x9; give --image_size N"):
        list(load(images, "yes").gather(torch.arange(300).split(100)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stream", "yes"), "do nothing with digits"),
        (("--workers", 2), "do nothing with digits"),
        (("--stream", "maybe"), "'maybe' given (did you mean yes?), one of auto, yes, no expected"),
        (("--workers", -1), "a whole number in [0, 1024] expected"),
    ],
)
def test_flags_that_do_nothing_or_say_nothing(refused, tmp_path, flags, message):
    assert message in refused("Focal-loss.py", *flags, "--output_dir", tmp_path / "runs")


def test_flags_that_do_nothing_are_refused_where_the_checkpoint_names_the_data(
    forks, refused, tmp_path
):
    forks.run("Vanilla-cross-entropy.py", "--model", "simple_dense", "--epochs", 1,
              "--output_dir", tmp_path)  # fmt: skip
    for script in (("Models-evaluation.py",), ("Network-distillation.py", "--teacher")):
        for flags in (("--stream", "no"), ("--workers", 0)):
            error = refused(*script, tmp_path, *flags, "--output_dir", tmp_path / "out")
            assert "do nothing with digits" in error
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- the workers' end

SLOWLY = ("_validate", 0.5)  # so that a signal comes before the last epoch


def test_workers_end_with_the_iterator(stream):
    list(stream.gather(torch.arange(300).split(100)))
    assert multiprocessing.active_children() == []
    batches = data_loader.shuffled_batches(
        stream, torch.arange(300), 20, AUGMENTATIONS["none"], seed=0, epoch=0
    )
    next(batches)
    assert multiprocessing.active_children() != []
    del batches
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_ends_all(forks, folder, in_memory, tmp_path, number):
    """A terminal and a batch system send it to the workers too; and on goes it in memory."""
    command = (*TRAIN, "--data_dir", folder, "--output_dir", tmp_path)
    process = forks.start(*command, *STREAMED, pause=SLOWLY)
    forks.wait_for("epoch   1/6")
    workers = wait_for_workers(process)
    for worker in workers:
        with suppress(ProcessLookupError):  # an epoch's evaluation is over soon
            os.kill(worker, number)
    assert_stopped(forks, process, number)
    assert "training state saved" in forks.said
    assert_gone(workers)
    assert read_tensors(tmp_path / RUN / "last.pt")["progress"]["epoch"] >= 1
    assert "continued after epoch" in forks.run(*command, "--stream", "no")
    assert_same_outcome(tmp_path, in_memory)


def test_a_signal_ends_an_evaluation_and_its_workers(forks, folder, in_memory, tmp_path):
    copies = [shutil.copytree(in_memory / RUN, tmp_path / str(k)) for k in range(20)]
    process = forks.start(
        "Models-evaluation.py", *copies, "--data_dir", folder, *STREAMED,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    workers = wait_for_workers(process)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGINT)
    assert_stopped(forks, process, signal.SIGINT)
    assert_gone(workers)
    assert not (tmp_path / "out").exists()


def test_workers_do_not_outlive_a_killed_parent(forks, folder, in_memory, tmp_path):
    command = (*TRAIN, "--data_dir", folder, "--output_dir", tmp_path, *STREAMED)
    process = forks.start(*command, pause=SLOWLY)
    forks.wait_for("epoch   1/6")
    workers = wait_for_workers(process)
    os.kill(process, signal.SIGKILL)
    assert forks.end() == -signal.SIGKILL
    assert_gone(workers)  # and the run's lock with them, which they have inherited
    assert "continued after epoch" in forks.run(*command)
    assert_same_outcome(tmp_path, in_memory)


def test_a_worker_that_is_killed_is_said_in_one_line(forks, folder, tmp_path):
    command = (*TRAIN, "--data_dir", folder, "--output_dir", tmp_path, "--epochs", 100, *STREAMED)
    process = forks.start(*command)
    forks.wait_for("epoch   1/")
    workers: set[int] = set()
    end = time.monotonic() + 60
    while not has_ended(process):  # one whose epoch is over is not missed
        assert time.monotonic() < end
        workers |= set(found := children(process))
        for worker in found[-1:]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    assert forks.end() == 2, forks.said
    assert_gone([*workers])
    *_, line = forks.said.splitlines()
    assert line.startswith("Vanilla-cross-entropy.py: error: DataLoader worker")
    assert "Traceback" not in forks.said
