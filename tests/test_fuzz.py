"""Files from strangers: whatever is in one, it works, or one line says what is wrong.

Never another exception, a hang, more than 1 GiB over the normal, or code run. Mutations are drawn
from seeds; a failure names the kind and the seed. `pytest -s` prints the counts.
"""

import copy
import gzip
import io
import json
import math
import pickle
import random
import shutil
import signal
import struct
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import idx, peak_memory
from PIL import Image

from utils import checkpoint, data_loader, training
from utils.data_loader import ImageData
from utils.errors import DivergedError, InputError

# Mutations of each kind; more than 2,000 in all.
CASES = {
    "checkpoint, bytes": 400,
    "checkpoint, archive": 150,
    "checkpoint, fields": 600,
    "last.pt, bytes": 100,
    "last.pt, fields": 300,
    "config.json": 300,
    "metrics.json": 300,
    "IDX": 350,
    "CIFAR": 100,
    "images": 450,
}
SECONDS, MIB = 20, 1024  # most that a case may take over the normal


class Hang(BaseException):
    pass


class Payload:
    """Unpickled with pickle's powers, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Strangers:
    """Counts how the cases end, and fails where one ends otherwise."""

    def __init__(self, folder: Path) -> None:
        self.ends, self.folder, self.ran = Counter(), folder, folder / "code-was-run"

    def run(self, kind: str, case) -> None:
        """case(random numbers) mutates and returns the function that reads what it mutated."""
        peak = peak_memory()

        def hang(number, frame):
            raise Hang

        handler = signal.signal(signal.SIGALRM, hang)
        try:
            for seed in range(CASES[kind]):
                read = case(random.Random(f"{kind} {seed}"))
                end, message = "works", ""
                signal.alarm(SECONDS)
                try:
                    read()
                except InputError as error:
                    end, message = "refused", str(error)
                except DivergedError:
                    end = "diverged"
                except (Exception, Hang) as error:
                    raise AssertionError(f"{kind} {seed} ended with {error!r}") from error
                finally:
                    signal.alarm(0)
                assert message.isprintable(), f"{kind} {seed}: {message!r}"
                assert (len(message) > 20) == (end == "refused"), f"{kind} {seed}: {message}"
                assert not self.ran.exists(), f"{kind} {seed} ran code"
                self.ends[kind, end] += 1
        finally:
            signal.signal(signal.SIGALRM, handler)
        # What refuses everything refuses what is sound, too. Only a checksum may do so.
        assert kind == "CIFAR" or self.ends[kind, "works"], kind
        assert peak() < MIB, f"{kind} took {peak():.0f} MiB"


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    strangers = Strangers(tmp_path_factory.mktemp("strangers"))
    began = time.monotonic()
    yield strangers
    total = sum(strangers.ends.values())
    print(f"\n{total} mutations in {time.monotonic() - began:.0f} s:")
    for kind in CASES:
        ends = {end: count for (k, end), count in strangers.ends.items() if k == kind}
        print(f"  {kind:20} {', '.join(f'{count} {end}' for end, count in sorted(ends.items()))}")


# -------------------------------------------------------------------------------------- mutations


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some of: flips, cuts, splices, zeros, numbers where a size may be."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        size = len(changed)
        start = draw.randrange(size + 1)
        # Sizes, names and magic numbers are at the beginning and the end of most formats.
        start = draw.choice(
            (start, min(draw.randrange(64), size), max(0, size - draw.randrange(400)))
        )
        stop = min(size, start + draw.choice((1, 2, 4, 8, 100, 10_000)))
        kind = draw.randrange(7)
        if kind == 0:
            for position in range(start, stop)[:20]:
                changed[position] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[start:]
        elif kind == 2:
            del changed[start:stop]
        elif kind == 3:
            changed[start:stop] = bytes(stop - start)
        elif kind == 4:
            target = draw.randrange(size + 1)
            changed[target:target] = changed[start:stop]
        elif kind == 5:
            changed[start:start] = draw.randbytes(draw.choice((1, 8, 1000)))
        else:
            number = draw.choice((0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**31))
            changed[start : start + 4] = struct.pack(draw.choice("<>") + "I", number)
    return bytes(changed)


def odd_value(draw: random.Random, tensors: bool):
    """What a field was never meant to be."""
    nested: object = 1
    for _ in range(60):
        nested = draw.choice(([nested], {"a": nested}))
    values = [
        None, True, -1, 0, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf,
        -math.inf, "", "x", "../../x", "/etc/passwd", "a\0b", "\ud800", "é\n\x1b[31m", "$(touch x)",
        "x" * 10**5, [], {}, [[]], [1, "a", None], {"a": {"b": []}}, ["a"] * 10**4, {"": 1},
        {"__class__": "x"}, {str(i): i for i in range(1000)}, nested,
    ]  # fmt: skip
    zeros = torch.zeros
    if tensors and draw.random() < 0.5:
        values = [
            b"bytes", (1, 2), {1, 2}, OrderedDict(a=1), {1: 2}, {None: 1}, 1j, torch.float16,
            zeros(()), zeros(0), zeros(3), torch.ones(2, 2).double(), torch.tensor(math.nan),
            torch.tensor([2**62]), zeros(1).expand(2**20, 2**14), zeros(3, dtype=torch.bool),
            zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(), zeros(2, requires_grad=True),
            zeros(3, device="meta"), torch.nn.Parameter(zeros(2)), zeros(5000).byte(),
        ]  # fmt: skip
    return draw.choice(values)


def odd_tensor(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Another type, shape, layout or sign; no number; one number for all."""
    changes = (
        lambda: value * math.nan,
        lambda: value.double(),
        lambda: value.flatten()[:0],
        lambda: value.unsqueeze(0),
        lambda: -value.float(),
        lambda: value.flatten()[0].expand(value.shape),
        lambda: value.to_sparse(),
        lambda: value.byte(),
    )
    return draw.choice(changes)()


def containers_in(content) -> list:
    """The content and all dictionaries and lists in it."""
    found = [content]
    for container in found:
        inside = container.values() if isinstance(container, dict) else container
        found += [value for value in inside if isinstance(value, dict | list) and value]
    return found


def mutate_fields(content: dict, draw: random.Random, tensors: bool) -> dict:
    """Removes, replaces, renames, wraps or exchanges fields, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        containers = containers_in(content)
        container = draw.choice(containers)
        if not container:
            break
        key = draw.choice(list(container if isinstance(container, dict) else range(len(container))))
        value, kind = container[key], draw.randrange(7)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            odd = odd_value(draw, tensors)
            del container[key]
            container[odd if isinstance(odd, str | int | float | None) else "odd"] = value
        elif kind == 2:
            container[key] = draw.choice(([value], {"a": value}, [value, value]))
        elif kind == 3:
            container[key] = copy.deepcopy(draw.choice(containers[1:] or [7]))
        elif kind <= 5 and torch.is_tensor(value) and value.numel():
            container[key] = odd_tensor(value, draw)
        elif kind == 4 and isinstance(value, int | float) and abs(value) < 1e300:
            odd = (-value, value + 1, value * 10**9, float(value), str(value))
            container[key] = draw.choice(odd)
        else:
            container[key] = odd_value(draw, tensors)
    return content


def mutate_json(content, draw: random.Random) -> bytes:
    text = json.dumps(content, indent=2).encode()
    kind = draw.randrange(10)
    if kind < 3:
        return mutate_bytes(text, draw)
    if kind == 3:
        return draw.choice(
            (b"", b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000,
             b"\xff\xfe" + text, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text * 2,
             b'{"settings": ' + b'{"a":' * 900 + b"1" + b"}" * 901, bytes(1000))
        )  # fmt: skip
    return json.dumps(mutate_fields(content, draw, tensors=False)).encode()


# ------------------------------------------------------------------------------------- checkpoints


def small_trial(folder: Path) -> training.Trial:
    draw = torch.Generator().manual_seed(0)
    data = ImageData(
        name="digits",
        images=torch.randint(256, (48, 8, 8, 1), generator=draw).byte(),
        labels=torch.randint(3, (48,), generator=draw),
        classes=("a", "b", "c"),
        train_size=40,
    )
    recipe = {
        "optimizer": "adam", "lr": 0.01, "weight_decay": 0.0, "schedule": "steps", "batch_size": 8,
        "epochs": 2, "estop": 0, "augment": "none", "precision": "float32", "compile": False,
        "deterministic": False, "protocol": "ils", "tr_size": 0.8, "pretrained": False,
        "milestones": None, "fall": 0.1,
    }  # fmt: skip
    return training.Trial(
        data, None, "shallownet", 0, recipe, torch.device("cpu"), folder, 10, save_every=1e-9
    )


class Interrupted(Exception):
    pass


def fit(trial: training.Trial, folder: Path, steps: float = float("inf")) -> None:
    """Trains for that many steps, or to the end."""
    done = 0

    def make_loss(trial, smoothing):
        def loss(logits, batch):
            nonlocal done
            done += 1
            if done > steps:
                raise Interrupted
            return {"loss": torch.nn.functional.cross_entropy(logits, batch.labels)}

        return loss

    training._train(trial, "vanilla", {"smoothing": 0.1}, make_loss, folder)


@pytest.fixture(scope="module")
def run_folder(strangers) -> Path:
    """An unfinished run: the first epoch and two steps of the second are done."""
    folder = strangers.folder / "run"
    trial = small_trial(strangers.folder)
    with pytest.raises(Interrupted):
        fit(trial, folder, 4 + 2)
    assert checkpoint.read_tensors(folder / "last.pt")["progress"]["step"] == 2
    checkpoint.load(folder / "best.pt")
    return folder


def test_checkpoints_as_bytes(strangers, run_folder):
    content, path = (run_folder / "best.pt").read_bytes(), strangers.folder / "stranger.pt"

    def case(draw):
        path.write_bytes(mutate_bytes(content, draw))
        return lambda: checkpoint.load(path)

    strangers.run("checkpoint, bytes", case)


def test_one_flipped_bit_of_the_weights_is_noticed(strangers, run_folder):
    """torch.load alone would take it for a weight."""
    path = strangers.folder / "flipped.pt"
    content = bytearray((run_folder / "best.pt").read_bytes())
    with zipfile.ZipFile(run_folder / "best.pt") as archive:
        largest = max(map(archive.read, archive.namelist()), key=len)
    content[content.index(largest) + 1000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match=r"checksum|CRC"):
        checkpoint.load(path)


def test_checkpoints_as_archives(strangers, run_folder):
    """Members dropped, renamed, exchanged, compressed, doubled; and pickles that would run code."""
    path = strangers.folder / "stranger.pt"
    with zipfile.ZipFile(run_folder / "best.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    original = torch.load(run_folder / "best.pt", weights_only=True)
    payload = Payload(strangers.ran)

    def case(draw):
        kind, now = draw.randrange(9), dict(members)
        name = draw.choice(list(now))
        pickled = next(n for n in now if n.endswith("data.pkl"))
        way = zipfile.ZIP_STORED
        if kind == 0:
            del now[name]
        elif kind == 1:
            odd = draw.choice(("../../x", "/tmp/x", "a\\b", "x" * 1000, "archive/data/999", "é"))
            now[odd] = now.pop(name)
        elif kind == 2:
            now[name] = now[draw.choice(list(now))]
        elif kind == 3:
            way = zipfile.ZIP_DEFLATED
            now[draw.choice((name, "more"))] = bytes(2 * 10**8 if draw.random() < 0.1 else 10**6)
        elif kind == 4:
            now[pickled] = pickle.dumps(
                draw.choice((payload, {"format": checkpoint.FORMAT, "weights": payload}))
            )
        elif kind == 5:
            now[pickled] = mutate_bytes(now[pickled], draw)
        elif kind == 6:
            torch.save(
                {**original, draw.choice(list(original)): payload}, path,
                _use_new_zipfile_serialization=draw.random() < 0.5,
            )  # fmt: skip
            return lambda: checkpoint.load(path)
        elif kind == 7:
            path.write_bytes(pickle.dumps(payload, protocol=draw.randrange(5)))
            return lambda: checkpoint.load(path)
        else:
            with tarfile.open(path, "w") as archive:
                member = tarfile.TarInfo(draw.choice(("../../x", "pickle", "storages")))
                member.size = len(now[pickled])
                archive.addfile(member, io.BytesIO(now[pickled]))
            return lambda: checkpoint.load(path)
        with zipfile.ZipFile(path, "w", way) as archive:
            for member, content in now.items():
                archive.writestr(member, content)
        return lambda: checkpoint.load(path)

    strangers.run("checkpoint, archive", case)


def test_checkpoints_as_fields(strangers, run_folder):
    original = torch.load(run_folder / "best.pt", weights_only=True)
    path = strangers.folder / "stranger.pt"

    def case(draw):
        torch.save(mutate_fields(original, draw, tensors=True), path)

        def read():
            trained = checkpoint.load(path)
            with torch.no_grad():
                trained.model(torch.zeros(1, *trained.model.input_shape, dtype=torch.uint8))

        return read

    strangers.run("checkpoint, fields", case)


@pytest.mark.parametrize("kind", ["last.pt, bytes", "last.pt, fields"])
def test_training_states(strangers, run_folder, kind):
    """They are not only read: the training goes on with them to its end."""
    original = torch.load(run_folder / "last.pt", weights_only=True)
    content = (run_folder / "last.pt").read_bytes()
    folder, trial = strangers.folder / "continued", small_trial(strangers.folder)

    def case(draw):
        shutil.copytree(run_folder, folder, dirs_exist_ok=True)
        if kind == "last.pt, bytes":
            (folder / "last.pt").write_bytes(mutate_bytes(content, draw))
        else:
            torch.save(mutate_fields(original, draw, tensors=True), folder / "last.pt")
        return lambda: fit(trial, folder)

    strangers.run(kind, case)


def test_settings(strangers):
    settings = {
        "dataset": "digits", "image_size": None, "fingerprint": "0" * 64, "model": "shallownet",
        "method": "label-smoothing", "hyper_parameters": {"smoothing": [0.1, 0.2]}, "seed": 0,
        "recipe": small_trial(strangers.folder).recipe, "teacher": {"weights": "0" * 64},
    }  # fmt: skip
    content = {"settings": settings, "environment": {"torch": "2", "modified": []}}
    path = strangers.folder / "config.json"

    def case(draw):
        path.write_bytes(mutate_json(content, draw))
        return lambda: training.run_folder.check_settings(path, settings)

    strangers.run("config.json", case)


def test_metrics(strangers, capsys):
    row = {"accuracy": 0.9, "log_loss": 0.3, "ece": 0.05}
    splits = {name: {"unscaled": row, "scaled": row} for name in ("validation", "test")}
    content = {"epoch": 3, "ece_bins": 10, "temperature": 1.5, **splits}
    path = strangers.folder / "metrics.json"

    def case(draw):
        path.write_bytes(mutate_json(content, draw))
        return lambda: training._print_metrics(path)

    strangers.run("metrics.json", case)
    said = capsys.readouterr().out
    assert len(said) < 10**6
    assert said.replace("\n", "").isprintable()


# ---------------------------------------------------------------------------------------- data sets


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)


def read_data(name: str, folder: Path) -> None:
    data = data_loader.load(name, folder)
    data_loader.pixel_statistics(data, data_loader.split(data, 0.5, 0).train)


def test_idx_files(strangers, no_network):
    """torchvision has checksums for the archives, none for what is unpacked."""
    folder, draw = strangers.folder / "idx", np.random.default_rng(0)
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    parts = {}
    for part in ("train", "t10k"):
        images = draw.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        parts[f"{part}-images-idx3-ubyte"] = idx(images)
        parts[f"{part}-labels-idx1-ubyte"] = idx(draw.integers(0, 10, 12, dtype=np.uint8))
    for name, content in parts.items():
        (raw / name).write_bytes(content)
    read_data("mnist", folder)

    def case(draw):
        for path in raw.iterdir():
            path.unlink()
        for name, content in parts.items():
            (raw / name).write_bytes(content)
        name = draw.choice(list(parts))
        mutated = mutate_bytes(parts[name], draw)
        if draw.random() < 0.25:
            (raw / name).unlink()
            packed = gzip.compress(mutated)
            mutated = draw.choice((packed, mutate_bytes(packed, draw)))
            name += ".gz"
        (raw / name).write_bytes(mutated)
        return lambda: read_data("mnist", folder)

    strangers.run("IDX", case)


def test_cifar_files(strangers, no_network):
    """They are pickles, which torchvision reads with all of pickle's powers: the checksum that
    stands before it is what keeps a stranger's out."""
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 10}
    payload = Payload(strangers.ran)
    folder = strangers.folder / "cifar"

    def case(draw):
        shutil.rmtree(folder, ignore_errors=True)
        name, inside, first = draw.choice(
            (
                ("cifar10", "cifar-10-batches-py", "data_batch_1"),
                ("cifar100", "cifar-100-python", "train"),
            )
        )
        (folder / inside).mkdir(parents=True)
        content = pickle.dumps(draw.choice((batch, payload, {**batch, "labels": payload})))
        if draw.random() < 0.5:
            content = mutate_bytes(content, draw)
        files = {first, "data_batch_2", "test_batch", "test", "batches.meta", "meta"}
        for file in files:
            (folder / inside / file).write_bytes(content)
        with tarfile.open(folder / f"{inside.removesuffix('-py')}.tar.gz", "w:gz") as archive:
            archive.add(folder / inside, inside)
        return lambda: read_data(name, folder)

    strangers.run("CIFAR", case)
    assert strangers.ends["CIFAR", "works"] == 0


def test_images(strangers):
    folder = strangers.folder / "images"
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            for number in range(2):
                path = folder / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pictures = {}
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        buffer = io.BytesIO()
        again = {"save_all": True, "append_images": [picture.rotate(90)]} if suffix == "gif" else {}
        picture.save(buffer, Image.registered_extensions()[f".{suffix}"], **again)
        pictures[suffix] = buffer.getvalue()
    read_data("imagefolder", folder)

    def case(draw):
        suffix = draw.choice(list(pictures))
        for path in (folder / "train/a").glob("odd.*"):
            path.unlink()
        (folder / f"train/a/odd.{suffix}").write_bytes(mutate_bytes(pictures[suffix], draw))
        return lambda: read_data("imagefolder", folder)

    strangers.run("images", case)


def test_a_pickle_of_the_test_would_run_code(strangers):
    """Otherwise that none did would say nothing."""
    pickle.loads(pickle.dumps(Payload(strangers.ran))).close()
    assert strangers.ran.exists()
    strangers.ran.unlink()
