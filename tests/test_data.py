"""Where images come from, who is in which split, what a batch is.

The data sets that cannot be downloaded here are written by the tests, small, in the format in which
torchvision finds the real ones, with its table of checksums changed to theirs: so its own integrity
check runs.
"""

import gzip
import hashlib
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import urllib.request
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from conftest import FASHION_MNIST, idx, write_image
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from utils import data_loader
from utils.data_loader import AUGMENTATIONS, Augmentation, ImageData
from utils.errors import InputError

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
URLOPEN = urllib.request.urlopen
DOWNLOADED = ("mnist", "fashionmnist", "cifar10", "cifar100", "svhn")


@pytest.fixture(autouse=True)
def timeouts(monkeypatch) -> list:
    """No test reaches the network; each attempt to is noted with its time limit."""
    seen = []

    def refuse(*_, **__):
        seen.append(socket.getdefaulttimeout())
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return seen


@pytest.fixture
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(data_loader, "DEBIAN_FASHION_MNIST", tmp_path / "no such folder")


def error_of(*arguments) -> str:
    """The one line that load(*arguments) is refused with."""
    with pytest.raises(InputError) as refused:
        data_loader.load(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------- formats on disk


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_mnist(folder: Path, monkeypatch):
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    parts = {}
    for seed, (part, (image_file, label_file)) in enumerate(IDX_FILES.items()):
        images, labels = random_images(11 - seed, 28, 28, seed=seed), np.arange(11 - seed) % 10
        (raw / image_file).write_bytes(idx(images))
        (raw / label_file).write_bytes(idx(labels.astype(np.uint8)))
        parts[part] = (images[..., None], labels)
    return parts, datasets.MNIST.classes


def write_fashionmnist(folder: Path, monkeypatch):
    """As Debian's package has it: compressed, and not where torchvision looks."""
    package = folder.parent / "debian"
    package.mkdir()
    parts, resources = {}, []
    for seed, (part, files) in enumerate(IDX_FILES.items()):
        images, labels = random_images(12 - seed, 28, 28, seed=seed), np.arange(12 - seed) % 10
        for name, array in zip(files, (images, labels.astype(np.uint8)), strict=True):
            path = package / f"{name}.gz"
            path.write_bytes(gzip.compress(idx(array)))
            resources.append((path.name, md5(path)))
        parts[part] = (images[..., None], labels)
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(data_loader, "DEBIAN_FASHION_MNIST", package)
    return parts, datasets.FashionMNIST.classes


def write_cifar(kind, folder: Path, monkeypatch, key: str, classes: list[str]):
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    sums = {}
    whole = {}
    for part, table in (("train", kind.train_list), ("test", kind.test_list)):
        images, labels, written = [], [], []
        for name, _ in table:
            new = random_images(4, 32, 32, 3, seed=len(sums))
            values = [(len(sums) + k) % len(classes) for k in range(4)]
            rows = new.transpose(0, 3, 1, 2).reshape(4, 3072)  # red, then green, then blue
            (base / name).write_bytes(pickle.dumps({"data": rows, key: values}, protocol=2))
            sums[name] = md5(base / name)
            written.append([name, sums[name]])
            images.append(new)
            labels += values
        monkeypatch.setattr(kind, f"{part}_list", written)
        whole[part] = (np.concatenate(images), np.array(labels))
    meta = base / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: classes}, protocol=2))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return whole, classes


def write_cifar10(folder: Path, monkeypatch):
    names = [f"class {number}" for number in range(10)]
    return write_cifar(datasets.CIFAR10, folder, monkeypatch, "labels", names)


def write_cifar100(folder: Path, monkeypatch):
    names = [f"fine {number}" for number in range(100)]
    return write_cifar(datasets.CIFAR100, folder, monkeypatch, "fine_labels", names)


def write_svhn(folder: Path, monkeypatch):
    folder.mkdir(parents=True)
    table, parts = dict(datasets.SVHN.split_list), {}
    for seed, part in enumerate(("train", "test")):
        images, labels = random_images(12, 32, 32, 3, seed=seed), np.arange(12) % 10
        path = folder / f"{part}_32x32.mat"
        # As in the real files a 0 has the label 10, and the images are numbered by the last axis.
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": y})
        table[part] = [table[part][0], path.name, md5(path)]
        parts[part] = (images, labels)
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    return parts, [str(digit) for digit in range(10)]


def write_imagefolder(folder: Path, monkeypatch):
    parts = {}
    for seed, part in enumerate(("train", "test")):
        images, labels = random_images(6, 9, 7, 3, seed=seed), np.repeat([0, 1], 3)
        for number, image in enumerate(images):
            write_image(folder / part / ("ant", "bee")[number // 3] / f"{number}.png", image)
        parts[part] = (images, labels)
    return parts, ["ant", "bee"]


WRITERS = {
    "mnist": write_mnist,
    "fashionmnist": write_fashionmnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "imagefolder": write_imagefolder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_pixel_and_label_is_what_is_on_disk(name, tmp_path, monkeypatch, timeouts):
    parts, classes = WRITERS[name](tmp_path / "data", monkeypatch)
    for _ in range(2):  # the second time the files are there, unpacked
        data = data_loader.load(name, tmp_path / "data")
        images, labels = (np.concatenate([parts["train"][k], parts["test"][k]]) for k in (0, 1))
        assert data.images.dtype == torch.uint8
        assert data.images.is_contiguous()
        np.testing.assert_array_equal(data.images.numpy(), images)
        assert data.labels.dtype == torch.int64
        np.testing.assert_array_equal(data.labels.numpy(), labels)
        assert data.classes == tuple(classes)
        assert data.train_size == len(parts["train"][0])
        _, height, width, channels = images.shape
        assert data.input_shape == (channels, height, width)
        shutil.rmtree(tmp_path / "debian", ignore_errors=True)
    assert timeouts == []


def test_digits_are_those_of_scikit_learn_each_once():
    data, source = data_loader.load("digits"), load_digits()
    assert data.images.shape == (1797, 8, 8, 1)
    assert data.train_size == 1437
    assert data.classes == tuple("0123456789")

    def rows(images, labels):
        return sorted(
            bytes([*image.flatten().tolist(), int(label)])
            for image, label in zip(images, labels, strict=True)
        )

    expected = np.rint(source.images * 255 / 16).astype(np.uint8)
    assert rows(data.images, data.labels) == rows(expected, source.target)


def test_real_fashion_mnist(fashion_mnist, monkeypatch, tmp_path):
    monkeypatch.setattr(data_loader, "DEBIAN_FASHION_MNIST", FASHION_MNIST)
    data = data_loader.load("fashionmnist", tmp_path)
    assert data.images.shape == (70000, 28, 28, 1)
    assert data.train_size == 60000
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    assert data.labels[:60000].bincount().tolist() == [6000] * 10
    assert data.labels[60000:].bincount().tolist() == [1000] * 10
    assert data.labels[:5].tolist() == [9, 0, 0, 3, 0]
    mean, std = data_loader.pixel_statistics(data, torch.arange(60000))
    assert mean == pytest.approx([0.2860], abs=5e-5)  # as published
    assert std == pytest.approx([0.3530], abs=5e-5)


def test_image_size_brings_every_data_set_to_a_square(tmp_path, monkeypatch):
    write_imagefolder(tmp_path / "data", monkeypatch)
    assert data_loader.load("imagefolder", tmp_path / "data", 5).input_shape == (3, 5, 5)
    small, large = data_loader.load("digits"), data_loader.load("digits", image_size=16)
    assert large.input_shape == (1, 16, 16)
    assert large.images.dtype == torch.uint8
    assert torch.equal(large.labels, small.labels)


@pytest.mark.parametrize("size", [3, 4, 16, 20])
def test_images_are_resized_as_pillow_does(size):
    """Bilinear, antialiased where they shrink, and rounded: halves up there, to even ones here."""
    images, ours = (data_loader.load("digits", image_size=s).images[..., 0] for s in (None, size))
    theirs = [
        np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        for image in images[:100].numpy()
    ]
    difference = ours[:100].double().numpy() - theirs
    assert np.abs(difference).max() <= 1
    assert abs(difference.mean()) < 0.2


# ------------------------------------------------------------------------- files that are not there


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_network_and_files_one_line_names_folder_and_both_ways(
    name, tmp_path, no_debian_package, timeouts
):
    error = error_of(name, tmp_path / "nothing")
    assert str(tmp_path / "nothing") in error
    assert "once with internet access" in error
    assert "put the files that torchvision expects there" in error
    assert ("dataset-fashion-mnist" in error) == (name == "fashionmnist")
    assert "no network in tests" in error
    # A server that does not answer must not hold a run up for ever; and nothing else is limited.
    assert timeouts
    assert None not in timeouts
    assert socket.getdefaulttimeout() is None


def test_without_network_the_script_ends_with_that_line(tmp_path, no_debian_package, refused):
    error = refused(
        "Vanilla-cross-entropy.py", "--dataset", "fashionmnist", "--data_dir", tmp_path / "nothing",
        "--output_dir", tmp_path / "runs",
    )  # fmt: skip
    assert str(tmp_path / "nothing") in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["fashionmnist", "cifar10", "cifar100", "svhn"])
def test_a_changed_byte_is_noticed_by_the_checksum(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / "data", monkeypatch)
    folder = tmp_path / ("debian" if name == "fashionmnist" else "data")
    path = sorted(path for path in folder.rglob("*") if path.is_file())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(tmp_path / "data") in error_of(name, tmp_path / "data")


def test_a_partial_download_is_repeated_and_not_used(tmp_path, monkeypatch):
    parts, _ = write_cifar10(tmp_path / "server", monkeypatch)
    archive = tmp_path / "server/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "server" / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    served = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(datasets.CIFAR10, "url", url)
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
        (tmp_path / "data").mkdir()
        downloaded = tmp_path / "data" / archive.name
        downloaded.write_bytes(archive.read_bytes()[:-100])
        data = data_loader.load("cifar10", tmp_path / "data")
        server.shutdown()
    assert downloaded.read_bytes() == archive.read_bytes()
    np.testing.assert_array_equal(data.images[data.train_size :].numpy(), parts["test"][0])


def test_an_interrupted_copy_of_the_debian_package_is_repeated(tmp_path, monkeypatch):
    parts, _ = write_fashionmnist(tmp_path / "data", monkeypatch)
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b half of it")
    data = data_loader.load("fashionmnist", tmp_path / "data")
    np.testing.assert_array_equal(data.images[12:].numpy(), parts["test"][0])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"\x00\x00\x08"),
        ("train-images-idx3-ubyte", idx(random_images(11, 28, 28))[:-1]),
        ("train-images-idx3-ubyte", struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + b"\0" * 9),
        ("train-images-idx3-ubyte", struct.pack(">4B3I", 0, 0, 10, 3, 11, 28, 28) + b"\0" * 99),
        ("train-images-idx3-ubyte", struct.pack(">4B3I", 0, 0, 13, 3, 1, 1, 1) + b"\0" * 4),
        ("train-images-idx3-ubyte", idx(random_images(11, 784))),
        ("train-images-idx3-ubyte", idx(random_images(11, 14, 56))),
        ("train-images-idx3-ubyte", idx(random_images(10, 28, 28))),
        ("train-labels-idx1-ubyte", idx(np.zeros(12, np.uint8))),
        ("train-labels-idx1-ubyte", idx(np.full(11, 10, np.uint8))),
        ("t10k-images-idx3-ubyte", idx(random_images(0, 28, 28))),
    ],
    ids=[
        "empty", "no header", "cut off", "enormous", "unknown type", "floats", "flat",
        "other shape", "fewer images", "more labels", "label 10", "no images",
    ],
)  # fmt: skip
def test_damaged_idx_files_are_refused(file, content, tmp_path, monkeypatch):
    write_mnist(tmp_path, monkeypatch)
    (tmp_path / "MNIST/raw" / file).write_bytes(content)
    assert "no usable MNIST data" in error_of("mnist", tmp_path)


IMAGES, LABELS = random_images(6, 8, 8), np.arange(6) % 2


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ((IMAGES / 255, LABELS), None, "images of float64 and shape (6, 8, 8); uint8 and"),
        ((IMAGES.astype(np.float32), LABELS), None, "images of float32"),
        ((IMAGES.reshape(6, 64), LABELS), None, "images of uint8 and shape (6, 64)"),
        ((IMAGES[:5], LABELS), None, "5 images with labels of int64 and shape (6,)"),
        ((IMAGES, LABELS[:, None]), None, "6 images with labels of int64 and shape (6, 1)"),
        ((IMAGES, LABELS / 1), None, "6 images with labels of float64 and shape (6,)"),
        ((IMAGES, LABELS + 1), None, "labels 1 to 2; 0 to 1 expected, as there are 2"),
        (None, (IMAGES, LABELS - 1), "labels -1 to 0; 0 to 1 expected"),
        (None, (IMAGES[:0], LABELS[:0]), "0 images"),
        (None, (IMAGES[:, :7], LABELS), "of shape (8, 8) and test images of (7, 8)"),
    ],
)
def test_a_reader_that_gives_what_nothing_can_hold_is_refused(train, test, said, monkeypatch):
    given = (train or (IMAGES, LABELS), test or (IMAGES, LABELS), "ab")
    monkeypatch.setitem(data_loader.READERS, "letters", lambda folder: given)
    error = error_of("letters", "data")
    assert error.startswith("the reader of letters gives ")
    assert said in error


@pytest.mark.parametrize("classes", [range(2), np.array(["0", "1"]), ("0", "1")])
def test_classes_become_names_that_a_checkpoint_can_hold(classes, monkeypatch):
    given = ((IMAGES, LABELS.astype(">u2")), (IMAGES, LABELS), classes)
    monkeypatch.setitem(data_loader.READERS, "letters", lambda folder: given)
    data = data_loader.load("letters")
    assert [type(name) for name in data.classes] == [str, str]
    assert data.classes == ("0", "1")
    assert data.labels.tolist() == [*LABELS, *LABELS]


def test_a_data_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "data").write_text("")
    assert str(tmp_path / "data") in error_of("cifar10", tmp_path / "data")


def test_one_process_at_a_time_unpacks(tmp_path, monkeypatch):
    write_fashionmnist(tmp_path / "data", monkeypatch)
    (tmp_path / "data").mkdir()
    done = []
    thread = threading.Thread(
        target=lambda: done.append(data_loader.load("fashionmnist", tmp_path / "data"))
    )
    with FileLock(tmp_path / "data/.lock"):
        thread.start()
        thread.join(0.3)
        assert not done
        assert not (tmp_path / "data/FashionMNIST").exists()
    thread.join(30)
    assert len(done) == 1


# ------------------------------------------------------------------------------------------ splits


@pytest.fixture
def data() -> ImageData:
    """100 training and 20 test images, all different, 3 channels, not square."""
    images = torch.from_numpy(random_images(120, 10, 7, 3))
    return ImageData("test", images, torch.arange(120) % 4, tuple("abcd"), train_size=100)


@pytest.mark.parametrize("tr_size", [0.01, 0.5, 0.8, 0.99])
def test_splits_are_disjoint_complete_and_leave_the_test_images_alone(data, tr_size):
    train, validation, test = data_loader.split(data, tr_size, seed=0)
    assert len(train) == round(100 * tr_size)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(100))
    assert test.tolist() == list(range(100, 120))
    assert {part.dtype for part in (train, validation, test)} == {torch.int64}


def test_splits_are_a_function_of_the_seed(data):
    torch.manual_seed(0)
    one = data_loader.split(data, 0.8, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    same, other = data_loader.split(data, 0.8, seed=1), data_loader.split(data, 0.8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up
    assert all(map(torch.equal, one, same))
    assert one.hashes() == same.hashes()
    differing = {name for name in one.hashes() if one.hashes()[name] != other.hashes()[name]}
    assert differing == {"train", "validation"}
    assert not torch.equal(one.train, torch.arange(80))  # drawn, not cut off
    expected = hashlib.sha256(one.train.numpy().astype("<i8").tobytes()).hexdigest()
    assert one.hashes()["train"] == expected


@pytest.mark.parametrize("tr_size", [0.001, 0.999])
def test_a_split_without_images_is_refused(data, tr_size):
    with pytest.raises(InputError, match=f"--tr_size {tr_size} leaves .* empty"):
        data_loader.split(data, tr_size, seed=0)


def test_random_streams_differ_by_seed_and_purpose():
    purposes = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2)]
    first = [torch.rand(4, generator=data_loader.generator(*p)).tolist() for p in purposes]
    assert len({tuple(numbers) for numbers in first}) == len(purposes)
    assert first[0] == torch.rand(4, generator=data_loader.generator(0)).tolist()


def test_points_and_pixels_that_do_not_vary_are_divided_by_one(monkeypatch):
    points = np.zeros((6, 1, 1, 2), np.float32)
    points[:, 0, 0, 0] = np.arange(6)
    for images, varies in (points, [True, False]), (np.full((6, 8, 8), 7, np.uint8), [False]):
        given = ((images, LABELS), (images, LABELS), "ab")
        monkeypatch.setitem(data_loader.READERS, "letters", lambda folder, given=given: given)
        data = data_loader.load("letters")
        _, std = data_loader.pixel_statistics(data, torch.arange(6))
        assert [value != 1 for value in std] == varies


def test_pixel_statistics_are_of_the_training_split_alone(data):
    train, validation, test = data_loader.split(data, 0.8, seed=0)
    mean, std = data_loader.pixel_statistics(data, train)
    pixels = data.images[train].numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)
    data.images[torch.cat([validation, test])] = 0
    assert (mean, std) == data_loader.pixel_statistics(data, train)


def test_a_channel_without_variation_is_not_divided_by_zero(data):
    data.images[..., 1] = 51
    mean, std = data_loader.pixel_statistics(data, torch.arange(100))
    assert mean[1] == pytest.approx(0.2)
    assert std[1] == 1.0


def test_the_fingerprint_is_of_every_pixel_label_and_the_division(data):
    prints = {data.fingerprint}
    for change in ("pixel", "label", "division"):
        images, labels, size = data.images.clone(), data.labels.clone(), data.train_size
        if change == "pixel":
            images[-1, -1, -1, -1] ^= 1
        if change == "label":
            labels[0] += 1
        size -= change == "division"
        prints.add(ImageData("test", images, labels, data.classes, size).fingerprint)
    assert len(prints) == 4
    same = ImageData("test", data.images.clone(), data.labels, data.classes, data.train_size)
    assert same.fingerprint in prints


def test_protocol_lr_draws_the_test_images_anew_for_each_seed(data):
    one, same, other = (data_loader.split(data, 0.75, seed, "lr") for seed in (1, 1, 2))
    assert one.hashes() == same.hashes()
    assert not torch.equal(one.test, other.test)
    official = data_loader.split(data, 0.75, 1)
    assert [len(part) for part in one] == [len(part) for part in official]
    assert torch.cat(one).unique().tolist() == list(range(len(data.labels)))
    assert one.test.min() < data.train_size, "no official training image is tested"
    assert torch.equal(one.of("train+validation"), torch.cat([one.train, one.validation]))


def test_reload_gives_the_images_and_splits_of_the_description_or_nothing(tmp_path, monkeypatch):
    write_imagefolder(tmp_path / "one", monkeypatch)
    data = data_loader.load("imagefolder", tmp_path / "one")
    splits = data_loader.split(data, 0.5, seed=3)
    description = {
        "dataset": "imagefolder",
        "classes": ["ant", "bee"],
        "image_size": None,
        "input_shape": (3, 9, 7),
        "protocol": "ils",
        "tr_size": 0.5,
        "seed": 3,
        "fingerprint": data.fingerprint,
        "splits": splits.hashes(),
    }
    cpu = torch.device("cpu")
    again, splits_again = data_loader.reload(description, tmp_path / "one", cpu)
    assert torch.equal(again.images, data.images)
    assert all(map(torch.equal, splits, splits_again))

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    Image.fromarray(random_images(1, 9, 7, 3, seed=9)[0]).save(tmp_path / "two/test/bee/5.png")
    for change, folder, message in (
        ({}, "two", "not those that the checkpoint was trained with"),
        ({"seed": 4}, "one", "splits"),
        ({"classes": ["ant", "wasp"]}, "one", "classes"),
        ({"input_shape": (3, 7, 9)}, "one", "height"),
    ):
        with pytest.raises(InputError, match=message):
            data_loader.reload({**description, **change}, tmp_path / folder, cpu)


# ----------------------------------------------------------------------------------------- batches


def epoch(data, augmentation="none", batch_size=16, seed=0, number=0, first=0, count=100):
    if isinstance(augmentation, str):
        augmentation = AUGMENTATIONS[augmentation]
    return list(
        data_loader.shuffled_batches(
            data, torch.arange(count), batch_size, augmentation, seed, number, first
        )
    )


def order(batches) -> list[int]:
    return torch.cat([batch.indices for batch in batches]).tolist()


def same_batch(one, other) -> bool:
    return one.count == other.count and all(map(torch.equal, one[:4], other[:4]))


def as_stored(batch) -> np.ndarray:
    return batch.images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("count", "batch_size", "left_out"),
    [(100, 16, 0), (100, 100, 0), (100, 512, 0), (97, 16, 1), (98, 16, 0), (5, 1, 0), (1, 16, 0)],
)
def test_an_epoch_shows_every_image_once(data, count, batch_size, left_out):
    """A last batch of one image is left out: batch norm has no variance over a single image."""
    batches = epoch(data, count=count, batch_size=batch_size)
    assert len(batches) == data_loader.steps_per_epoch(count, batch_size)
    assert len(set(order(batches))) == len(order(batches)) == count - left_out
    assert set(order(batches)) <= set(range(count))
    assert all(len(batch.labels) == batch_size for batch in batches[:-1])


def test_the_image_left_out_is_another_in_each_epoch(data):
    missing = {
        (set(range(97)) - set(order(epoch(data, count=97, number=k)))).pop() for k in range(9)
    }
    assert len(missing) > 3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_labels_and_indices_belong_together(data, name):
    for batch in epoch(data, name):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (3, 10, 7)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels, data.labels[batch.indices])
        if name == "none":
            assert torch.equal(batch.images, data.images[batch.indices].permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_order_and_augmentation_are_a_function_of_seed_and_epoch(data, name):
    torch.manual_seed(0)
    batches = epoch(data, name, seed=5, number=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = epoch(data, name, seed=5, number=2)
    assert torch.equal(torch.get_rng_state(), state)
    for batch, same in zip(batches, again, strict=True):
        assert same_batch(batch, same)
    for other in (epoch(data, name, seed=5, number=3), epoch(data, name, seed=6, number=2)):
        assert order(other) != order(batches)
    # What is done to the images does not change their order: runs are paired across settings.
    assert order(epoch(data, seed=5, number=2)) == order(batches)


@pytest.mark.parametrize("first", [0, 1, 3, 6, 7])
def test_an_interrupted_epoch_goes_on_exactly_where_it_stopped(data, first):
    rest = epoch(data, "crop-flip", first=first)
    for batch, same in zip(epoch(data, "crop-flip")[first:], rest, strict=True):
        assert same_batch(batch, same)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shards_of_several_processes_are_the_batch_without_duplicates(data, processes):
    whole = epoch(data, "crop-flip", count=70)
    shards = [
        list(
            data_loader.shuffled_batches(
                data, torch.arange(70), 16, AUGMENTATIONS["crop-flip"], 0, 0,
                shard=data_loader.Shard(rank, processes),
            )
        )
        for rank in range(processes)
    ]  # fmt: skip
    for batch, *parts in zip(whole, *shards, strict=True):
        assert {part.count for part in parts} == {batch.count} == {len(batch.labels)}
        for rank, part in enumerate(parts):
            for field, field_of_part in zip(batch[:4], part[:4], strict=True):
                assert torch.equal(field[rank::processes], field_of_part)


def test_a_last_batch_that_some_process_would_have_no_image_of_is_left_out():
    assert data_loader.steps_per_epoch(34, 16, 2) == 3
    assert data_loader.steps_per_epoch(34, 16, 3) == 2
    assert data_loader.steps_per_epoch(35, 16, 3) == 3


def test_a_batch_says_which_of_its_images_are_flipped(data):
    seen = set()
    for batch in epoch(data, "flip"):
        for image, index, flipped in zip(
            as_stored(batch), batch.indices, batch.flipped, strict=True
        ):
            source = data.images[index].numpy()
            assert np.array_equal(image, source[:, ::-1] if flipped else source)
            seen.add(bool(flipped))
    assert seen == {False, True}
    assert not any(batch.flipped.any() for batch in epoch(data, "crop"))


def test_about_half_of_the_images_are_flipped_left_right(data):
    flipped, total = 0, 0
    for number in range(10):
        for batch in epoch(data, "flip", number=number):
            for image, index in zip(as_stored(batch), batch.indices, strict=True):
                source = data.images[index].numpy()
                mirrored = np.array_equal(image, source[:, ::-1])
                assert mirrored or np.array_equal(image, source)
                flipped += mirrored
                total += 1
    assert abs(flipped / total - 0.5) < 5 * 0.5 / total**0.5  # five standard deviations


def test_crops_are_slices_of_the_image_padded_with_zeros(data):
    seen = set()
    for number in range(8):
        for batch in epoch(data, "crop", number=number):
            for image, index in zip(as_stored(batch), batch.indices, strict=True):
                padded = np.pad(data.images[index].numpy(), ((4, 4), (4, 4), (0, 0)))
                found = [
                    (row, column)
                    for row in range(9)
                    for column in range(9)
                    if np.array_equal(image, padded[row : row + 10, column : column + 7])
                ]
                assert len(found) == 1
                seen.update(found)
    assert seen == {(row, column) for row in range(9) for column in range(9)}


def test_crop_and_flip_together_are_the_flip_of_a_crop(data):
    augmentation = Augmentation(padding=2, flip=True)
    crops = epoch(data, Augmentation(padding=2))
    mirrored = 0
    for batch, crop in zip(epoch(data, augmentation), crops, strict=True):
        for image, cut in zip(as_stored(batch), as_stored(crop), strict=True):
            assert np.array_equal(image, cut) or np.array_equal(image, cut[:, ::-1])
            mirrored += not np.array_equal(image, cut)
    assert 20 < mirrored < 80


def test_augmentation_leaves_the_data_set_as_it_is(data):
    before = data.images.clone()
    epoch(data, "crop-flip")
    assert torch.equal(data.images, before)


def test_ordered_batches_show_images_as_they_are_in_the_order_of_the_indices(data):
    indices = torch.tensor([5, 3, 119, 0, 7])
    batches = list(data_loader.ordered_batches(data, indices, 2))
    assert [len(batch.labels) for batch in batches] == [2, 2, 1]  # none is left out
    assert order(batches) == indices.tolist()
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images, data.images[indices].permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data.labels[indices])


# ----------------------------------------------------------------------------------- image folders

SIDE = 6
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def folder(tmp_path) -> Path:
    """train and test with the classes ant and bee, a 6x6 image each; train/ant/0.png comes first
    of all images, is missing, and is put there by the test."""
    for number, name in enumerate(("train/ant/1", "train/bee/2", "test/ant/3", "test/bee/4")):
        path = tmp_path / "folder" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(1, SIDE, SIDE, 3, seed=number)[0]).save(path)
    return tmp_path / "folder"


def first_image(folder: Path) -> np.ndarray:
    data = data_loader.load("imagefolder", folder)
    assert data.labels.tolist() == [0, 0, 1, 0, 1]
    return data.images[0].numpy()


GREY = random_images(1, SIDE, SIDE)[0]
COLOURS = random_images(1, SIDE, SIDE, 3)[0]


def with_palette() -> Image.Image:
    image = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE), "L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(COLOURS.tobytes())
    return image


def oriented() -> dict:
    """EXIF: the camera was turned, a viewer must turn the image clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


def solid(mode: str, colour) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


SIXTEEN = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
# Each of another kind: the image, the file's name, options of saving, the RGB pixels expected.
KINDS = {
    "colours": (Image.fromarray(COLOURS), "0.png", {}, COLOURS),
    "grey": (Image.fromarray(GREY), "0.png", {}, np.repeat(GREY[..., None], 3, 2)),
    "black and white": (solid("1", 1), "0.png", {}, WHITE),
    "palette": (with_palette(), "0.png", {}, COLOURS),
    "16-bit PNG": (Image.fromarray(SIXTEEN), "0.png", {}, (SIXTEEN / 257).round()[..., None]),
    "16-bit TIFF": (Image.fromarray(SIXTEEN), "0.tif", {}, (SIXTEEN / 257).round()[..., None]),
    "opaque alpha": (solid("RGBA", (*RED, 255)), "0.png", {}, RED),
    "half transparent": (solid("RGBA", (*RED, 128)), "0.png", {}, (255, 127, 127)),
    "transparent": (solid("RGBA", (*RED, 0)), "0.png", {}, WHITE),
    "grey with alpha": (solid("LA", (100, 0)), "0.png", {}, WHITE),
    "transparent colour": (solid("RGB", RED), "0.png", {"transparency": RED}, WHITE),
    "CMYK": (solid("CMYK", (0, 255, 255, 0)), "0.jpg", {"quality": 95}, RED),
    "JPEG, suffix in capitals": (solid("RGB", BLUE), "0.JPEG", {"quality": 95}, BLUE),
    "animated": (
        solid("RGB", RED),
        "0.gif",
        {"save_all": True, "append_images": [solid("RGB", BLUE)]},
        RED,
    ),
    "turned": (Image.fromarray(COLOURS), "0.png", oriented(), np.rot90(COLOURS, -1)),
    "bitmap": (Image.fromarray(COLOURS), "0.bmp", {}, COLOURS),
    "WebP": (Image.fromarray(COLOURS), "0.webp", {"lossless": True}, COLOURS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_8_bit_rgb(kind, folder):
    image, name, options, expected = KINDS[kind]
    image.save(folder / "train/ant" / name, **options)
    pixels = first_image(folder).astype(int)
    assert pixels.shape == (SIDE, SIDE, 3)
    lossy = 3 if name.lower().endswith(("jpg", "jpeg")) else 0
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=lossy)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, pixels: bytes) -> bytes:
    """An 8-bit RGB PNG that says it is so large; pixels: rows of 0 and 3 x width values."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


SOUND = png(SIDE, SIDE, (b"\0" + bytes(3 * SIDE)) * SIDE)
BROKEN = {
    "empty": b"",
    "text": b"no image\n",
    "truncated": SOUND[:-28],
    "too few pixels": png(SIDE, SIDE, bytes(20)),
    "bomb": png(100_000, 100_000, b""),
    "small bomb": png(6_000, 6_000, b""),
    # Pillow would have Ghostscript run it, whatever the file's name says.
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n",
}


def test_the_image_that_is_broken_below_is_sound_when_whole(folder):
    (folder / "train/ant/0.png").write_bytes(SOUND)
    assert first_image(folder).max() == 0


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_in_one_line(kind, folder):
    path = folder / "train/ant/0.png"
    path.write_bytes(BROKEN[kind])
    error = error_of("imagefolder", folder)
    assert str(path) in error
    if kind.endswith("bomb"):
        assert "pixels" in error
    if kind == "PostScript":
        assert "cannot identify" in error  # rather than: there is no Ghostscript here


@pytest.mark.parametrize(("mode", "value"), [("I", 2**20), ("F", 0.5)])
def test_pixels_without_an_agreed_white_are_refused(mode, value, folder):
    Image.new(mode, (SIDE, SIDE), value).save(folder / "train/ant/0.tif")
    assert "0.tif" in error_of("imagefolder", folder)


def test_a_pipe_named_like_an_image_holds_nobody_up(folder):
    os.mkfifo(folder / "train/ant/0.png")
    assert "not a regular file" in error_of("imagefolder", folder)


def test_hidden_and_other_files_are_passed_over(folder):
    (folder / "train/.checkpoints").mkdir()
    for name in ("train/ant/._1.png", "train/ant/notes.txt", "train/notes.txt", "README"):
        (folder / name).write_text("not an image")
    (folder / "train/ant/.thumbnails").mkdir()
    shutil.copy(folder / "train/ant/1.png", folder / "train/ant/.thumbnails")
    assert len(data_loader.load("imagefolder", folder).images) == 4


def test_images_are_found_at_any_depth_and_in_order(folder):
    for name in ("b", "a/c", "a/b"):
        path = folder / f"train/ant/{name}/x.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), (len(name), 0, 0)).save(path)
    images = data_loader.load("imagefolder", folder).images
    assert len(images) == 7
    assert images[[1, 2, 3], 0, 0, 0].tolist() == [3, 3, 1]  # 1.png, a/b, a/c, b


def test_file_and_class_names_need_not_be_utf_8(folder):
    for part in ("train", "test"):
        path = folder / part / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff\n.png")
        path.parent.mkdir()
        solid("RGB", BLUE).save(path)
    data = data_loader.load("imagefolder", folder)
    assert data.classes == ("ant", "bee", "caf\\xe9")
    assert "".join(data.classes).encode().decode() == "".join(data.classes)
    path.write_bytes(b"")
    error = error_of("imagefolder", folder)
    assert r"\udcff\n.png" in error  # neither the byte nor the line break reaches the terminal
    assert error.isprintable()


def test_a_class_with_one_image_is_a_class(folder):
    data = data_loader.load("imagefolder", folder)
    assert data.labels.tolist() == [0, 1, 0, 1]
    splits = data_loader.split(data, 0.5, seed=0)
    assert [len(part) for part in splits] == [1, 1, 2]


def test_unequal_sizes_need_image_size_and_are_scaled_and_cropped_by_it(folder):
    wide = np.zeros((12, 24, 3), np.uint8)
    wide[:, 6:18] = 200  # the middle square
    Image.fromarray(wide).save(folder / "train/ant/0.png")
    error = error_of("imagefolder", folder)
    assert "--image_size" in error
    assert "24x12" in error
    assert "6x6" in error
    data = data_loader.load("imagefolder", folder, 4)
    assert data.input_shape == (3, 4, 4)
    assert data.images[0, 1:3, 1:3].unique().tolist() == [200]


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_named(part, folder):
    (folder / part / "bee").rename(folder / part / "moved")
    (folder / part / "moved").rename(folder / "elsewhere")
    (folder / part / "bee").mkdir()
    error = error_of("imagefolder", folder)
    assert str(folder / part / "bee") in error
    assert ".png" in error


@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("test", "train")])
def test_a_class_missing_in_one_part_is_named(part, other, folder):
    shutil.rmtree(folder / part / "bee")
    error = error_of("imagefolder", folder)
    assert f"{folder / part} lacks classes that {folder / other} has: 'bee'" in error


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_named(part, folder):
    shutil.rmtree(folder / part)
    assert f"no folder {folder / part}" in error_of("imagefolder", folder)


def test_one_class_cannot_be_told_from_another(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "bee")
    assert "1 classes, 2 or more expected" in error_of("imagefolder", folder)


def test_links_to_files_inside_are_followed(folder):
    (folder / "train/ant/0.png").symlink_to(folder / "train/bee/2.png")
    np.testing.assert_array_equal(
        first_image(folder), np.asarray(Image.open(folder / "train/bee/2.png"))
    )


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/ant/0.png", "../../../private.png"),
        ("train/ant/more", "../../../outside"),
        ("train/cow", "../../outside"),
        ("train/ant/round", ".."),  # a walk that followed it would never end
        ("train/ant/0.png", "0.png"),
    ],
)
def test_links_that_lead_outside_or_round_are_refused(link, target, folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    solid("RGB", RED).save(outside / "5.png")
    solid("RGB", RED).save(folder.parent / "private.png")
    (folder / link).symlink_to(target)
    assert str(folder / link) in error_of("imagefolder", folder)


def test_the_data_folder_itself_may_be_a_link(folder):
    (folder.parent / "link").symlink_to(folder)
    assert len(data_loader.load("imagefolder", folder.parent / "link").images) == 4
