"""What is on disk: checkpoints that describe themselves, and files that are whole or not there.

A run's folder holds config.json, history.csv, best.pt, last.pt and metrics.json. best.pt carries
all that evaluation and distillation need, so a path to it is enough for them. Nothing is read with
pickle's powers (weights_only=True), and nothing is written in place.
"""

import hashlib
import io
import json
import math
import os
import platform
import re
import reprlib
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
import torchvision
from torch import nn

from models import ImageClassifier, build_model, canonical_name
from utils import distributed
from utils.data_loader import PROTOCOLS, READERS
from utils.errors import InputError

FORMAT = 2
CANDIDATES = ("candidates", "kept-candidates")  # the folders of a search's trainings
ROOT = Path(__file__).parent.parent  # of the project


# ----------------------------------------------------------------------------------------- writing


def write_file(path: Path, write: Callable) -> None:
    """Calls write(binary file) on a temporary file and renames it, so that path is always whole.

    Its folder is made if need be. Of several processes of one training, which all call this, the
    first writes, not before the others have read what was there, and they wait for it. Raises
    InputError, on a full disk for instance.
    """
    distributed.wait_for_all()
    if distributed.is_first():
        _write_file(path, write)
    distributed.wait_for_all()


def _write_file(path: Path, write: Callable) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; any earlier file is untouched") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what write_file leaves when it is killed; for one who holds the folder."""
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, content: dict) -> None:
    # By way of memory: torch.save makes of a full disk a RuntimeError that says nothing of it.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, lambda file: file.write(buffer.getbuffer()))


def update(path: Path, **fields) -> None:
    """Replaces fields of a file written by write_tensors, if they are not so already."""
    content = read_tensors(path)
    if any(content[name] != value for name, value in fields.items()):
        write_tensors(path, {**content, **fields})


def copy_file(source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {source}: {error}") from None
    write_file(target, lambda file: file.write(content))


# ----------------------------------------------------------------------------------------- reading


@dataclass
class Checkpoint:
    """A trained network and where it comes from."""

    path: Path
    model: nn.Module
    # method, hyper_parameters, requested, seed, epoch, recipe, trained_on, selected_on,
    # temperature_fitted_on; of a search select_by
    training: dict
    # dataset, classes, image_size, protocol, tr_size, seed, fingerprint, splits, normalisation,
    # input_shape
    data: dict
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
            "network_size": list(model.network_size),
        },
        "weights": model.state_dict(),
        "training": training,
        "data": data,
        "teacher": teacher,
        "temperature": temperature,
        "metrics": metrics,
    }


def check(content: dict, file_size: float = math.inf) -> None:
    """Raises ValueError unless this is what `load` can make a network of.

    No memory is taken for the network. ModuleNotFoundError if it is one of timm, which is missing.
    """
    _check_fields(content)
    try:
        with torch.device("meta"):  # shapes alone
            model = _build(content["model"])
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:  # the constructor may be anybody's
        name = content["model"]["name"]
        raise ValueError(
            f"{name} cannot be made without numbers ({type(error).__name__}: {error})"
        ) from None
    _check_weights(content["weights"], model, file_size)


def read_tensors(path: Path) -> dict:
    """The dictionary in a file written by write_tensors. Raises InputError for anything else."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint; a file such as best.pt would do")
    if not path.exists():
        raise InputError(f"no checkpoint {path}; the training scripts write best.pt")
    if not path.is_file():  # reading a pipe would never end
        raise InputError(f"{path} is not a regular file; a file such as best.pt would do")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types on files that are not its own
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"{path} is not a whole checkpoint of these scripts: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint of these scripts: it holds no dictionary")
    return content


def _check_archive(path: Path) -> None:
    """torch.save stores its files uncompressed: what claims to unpack to more is no work of it."""
    with zipfile.ZipFile(path) as archive:
        if sum(file.file_size for file in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than its size")
        if damaged := archive.testzip():  # torch.load looks at no checksum
            raise ValueError(f"the checksum of its part {damaged} is wrong")


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Rebuilds the network that a best.pt describes, in evaluation mode on the device.

    Raises InputError, in one line, if the file is missing, damaged, or of another kind. Nothing in
    it is believed before it is checked, and no memory is taken for a network before its weights
    are known to be there.
    """
    path = Path(path)
    content = read_tensors(path)
    number = content.get("format")
    if type(number) is not int or number != FORMAT or "weights" not in content:
        raise InputError(
            f"{path} is not a checkpoint of format {FORMAT}; a best.pt of the training scripts "
            "would do"
        )
    try:
        check(content, path.stat().st_size)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from None
    except ModuleNotFoundError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    # Not from the shapes: a network may hold tensors that are not among its weights.
    with torch.random.fork_rng(devices=[]):
        model = _build(content["model"])
    model.load_state_dict(content["weights"], assign=True)
    return Checkpoint(
        path=path,
        model=model.to(device, memory_format=torch.channels_last).eval(),
        training=content["training"],
        data={**content["data"], "input_shape": model.input_shape},
        teacher=content["teacher"],
        temperature=content["temperature"],
        metrics=content["metrics"],
    )


def _build(described: dict) -> ImageClassifier:
    return build_model(
        described["name"],
        tuple(described["input_shape"]),
        described["num_classes"],
        network_size=tuple(described["network_size"]),
    )


def _check_weights(weights: dict, model: nn.Module, file_size: float) -> None:
    """Raises ValueError unless these are weights that the network can take and compute with.

    model: the network on the meta device.
    """
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        differing = sorted(map(reprlib.repr, weights.keys() ^ expected.keys()))
        raise ValueError(f"weights are missing or not the network's: {', '.join(differing[:3])}")
    for name, tensor in weights.items():
        here = (tensor.dtype, tuple(tensor.shape), tensor.layout)
        there = (expected[name].dtype, tuple(expected[name].shape), torch.strided)
        if here != there:
            raise ValueError(f"weights {name} are {here}, {there} expected")
    # Strides of zero make a tensor of any size out of one number; but what the network itself uses
    # twice, a layer say, is in the file once.
    distinct = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    if sum(distinct.values()) > file_size:
        raise ValueError("its weights are larger than the file")
    # Such as a transformer's table of relative positions, which no file needs to hold.
    beside = sum(tensor.nbytes for name, tensor in model.named_buffers() if name not in expected)
    if beside > MAX_BESIDE:
        raise ValueError(f"the network takes {beside} bytes beside its weights")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"weights {name} are not finite")
        if name == "std" or name.endswith("running_var"):
            positive = tensor > 0 if name == "std" else tensor >= 0
            if not positive.all():
                raise ValueError(f"weights {name} must not be negative, nor std zero")


# What the fields of a checkpoint may be. They end up in paths, tables and messages, so words are
# plain words; numbers are finite; and sizes are such that a network of them can exist.
MAX_CLASSES, MAX_SIDE, MAX_BESIDE = 100_000, 4096, 2**29


def _whole(low: int, high: int = 2**63 - 1) -> Callable:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float = math.inf) -> Callable:
    """Between the bounds, which are left out."""
    return lambda value: type(value) is float and low < value < high


OF_A_FOLDER = "of at most 255 letters, digits and _.+:-"


def _is_word(value) -> bool:
    """A name that can be a folder's, too."""
    return type(value) is str and re.fullmatch(r"[A-Za-z0-9_.+:-]{1,255}", value) is not None


def _network(value) -> bool:
    try:
        return _is_word(value) and canonical_name(value) == value
    except ValueError:
        return False


def _sha256(value) -> bool:
    return type(value) is str and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _list_of(accepted: Callable, lengths: Callable = lambda length: length > 0) -> Callable:
    return lambda value: type(value) is list and lengths(len(value)) and all(map(accepted, value))


def _dict_of(accepted: Callable) -> Callable:
    return lambda value: (
        type(value) is dict and all(map(_is_word, value)) and all(map(accepted, value.values()))
    )


def _number(value) -> bool:
    return type(value) is bool or _whole(-(2**63))(value) or _real(-math.inf)(value)


def _plain(value) -> bool:
    return value is None or _number(value) or _is_word(value)


def _setting(value) -> bool:
    return _plain(value) or _list_of(_number)(value)


def _values(value) -> bool:
    return _list_of(_number)(value) or _list_of(_is_word)(value)


def _check_fields(content: dict) -> None:
    """Raises ValueError naming the first field that cannot be what `contents` put there."""
    fields = {
        "model.name": (_network, f"a network's name {OF_A_FOLDER}"),
        "model.num_classes": (_whole(2, MAX_CLASSES), f"2 to {MAX_CLASSES}"),
        "model.input_shape": (
            _list_of(_whole(1, MAX_SIDE), lambda length: length == 3),
            f"[channels, height, width], each 1 to {MAX_SIDE}",
        ),
        "model.network_size": (
            _list_of(_whole(1, MAX_SIDE), lambda length: length == 2),
            f"[height, width], each 1 to {MAX_SIDE}",
        ),
        "weights": (
            lambda value: isinstance(value, dict) and all(map(torch.is_tensor, value.values())),
            "a dictionary of tensors",
        ),
        "training.method": (_is_word, f"a name {OF_A_FOLDER}"),
        "training.hyper_parameters": (_dict_of(_plain), "a dictionary of plain values"),
        "training.requested": (_dict_of(_values), "a dictionary of lists of numbers or of names"),
        "training.seed": (_whole(0), "a whole number"),
        "training.epoch": (_whole(1), "a whole number from 1 on"),
        "training.recipe": (
            _dict_of(_setting),
            "a dictionary of plain values and lists of numbers",
        ),
        "data.dataset": (
            lambda value: _is_word(value) and value in READERS,
            f"a data set's name {OF_A_FOLDER}",
        ),
        "data.classes": (_list_of(lambda value: type(value) is str), "a list of names"),
        "data.image_size": (
            lambda value: value is None or _whole(1, MAX_SIDE)(value),
            f"None or 1 to {MAX_SIDE}",
        ),
        "training.trained_on": (
            lambda value: value in ("train", "train+validation"),
            "train or train+validation",
        ),
        "data.protocol": (lambda value: value in PROTOCOLS, f"one of {', '.join(PROTOCOLS)}"),
        "data.tr_size": (_real(0, 1), "a number in (0, 1)"),
        "data.seed": (_whole(0), "a whole number"),
        "data.fingerprint": (_sha256, "a SHA-256"),
        "data.splits.train": (_sha256, "a SHA-256"),
        "data.splits.validation": (_sha256, "a SHA-256"),
        "data.splits.test": (_sha256, "a SHA-256"),
        "data.normalisation.mean": (_list_of(_real(-math.inf)), "a list of numbers"),
        "data.normalisation.std": (_list_of(_real(0)), "a list of positive numbers"),
        "teacher": (
            lambda value: value is None or _dict_of(_plain)(value),
            "None, or plain values",
        ),
        "temperature": (_real(0), "a positive number"),
        "metrics.validation": (_dict_of(_plain), "a dictionary of plain values"),
    }
    if content.get("teacher") is not None:
        fields["teacher.weights"] = (_sha256, "a SHA-256")
        fields["teacher.model"] = fields["model.name"]
        for name in ("training.method", "training.trained_on"):
            fields[name.replace("training", "teacher")] = fields[name]
        for name in ("data.seed", "data.protocol", "data.tr_size"):
            fields[name.replace("data", "teacher")] = fields[name]
    if isinstance(content.get("training"), dict) and "select_by" in content["training"]:
        fields["training.select_by"] = (_is_word, "a name")
    for name, (accepted, expected) in fields.items():
        value = content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"it has no {name}")
            value = value[key]
        if not accepted(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}, {expected} expected")
    if len(content["data"]["classes"]) != content["model"]["num_classes"]:
        raise ValueError("data.classes and model.num_classes are not the same number")


def find(paths: list[str]) -> list[Path]:
    """The checkpoints that the paths name: files as they are, folders searched for best.pt."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            # Those of a search are steps on the way to the one beside or above them.
            inside = sorted(
                file
                for file in path.rglob("best.pt")
                if not {*CANDIDATES, "selection"} & {*file.relative_to(path).parts}
            )
            if not inside:
                raise InputError(f"no best.pt in the folder {path} or below it")
            found.update(dict.fromkeys(inside))
        else:
            found[path] = None
    for path in found:
        started, ended = (path.with_name(name).exists() for name in ("config.json", "metrics.json"))
        of_a_search = {*CANDIDATES} & {*path.parts}  # these have no metrics.json
        if started and not ended and not of_a_search:
            print(f"warning: {path}: its training has not ended", file=sys.stderr)
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

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": getattr(sys.modules.get("timm"), "__version__", None),  # None: not used
        "device": hardware,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "modified": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "code": code(),
    }


def code() -> dict[str, str]:
    """The SHA-256 of each of the project's files that this process runs: committed or not."""
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    names = {os.path.abspath(sys.argv[0]), *filter(None, loaded)}
    ours = sorted(Path(name) for name in names if name.startswith(f"{ROOT}{os.sep}"))
    return {
        str(path.relative_to(ROOT)): _digest(path)
        for path in ours
        if path.parent in (ROOT, ROOT / "models", ROOT / "utils") and path.suffix == ".py"
    }


# What is edited while a process runs is not what runs in it, so each is looked at once.
@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
