"""What cannot be used ends in one line, status 2, with nothing written: through the real scripts.

The fixture `refused` checks those four; the tests here check that the line says what was given and
what would do.
"""

import copy
import functools
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, peak_memory, run
from PIL import Image

from models import build_model
from utils import arguments, checkpoint, data_loader, training
from utils.errors import InputError
from utils.inference import evaluate_checkpoint

TRAINING = (
    "Vanilla-cross-entropy.py",
    "Label-smoothing.py",
    "Instance-based-smoothing.py",
    "Label-relaxation.py",
    "Focal-loss.py",
    "Confidence-penalty.py",
)
ILS, DISTILLATION, EVALUATION = (
    "Instance-based-smoothing.py",
    "Network-distillation.py",
    "Models-evaluation.py",
)
# How each script that reads checkpoints is given one.
READING = {
    ILS: ("--model", "shallownet", "--teacher"),
    DISTILLATION: ("--teacher",),
    EVALUATION: (),
}


@pytest.fixture
def refuses(refused, tmp_path):
    """refused, with all output going to a folder where anything written is noticed."""

    def call(script: str, *arguments) -> str:
        return refused(
            script, *arguments, "--output_dir", tmp_path / "runs", written=tmp_path
        )  # fmt: skip

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 112. GiB for an array with shape (15000, 1000000)"),
    ],
)
def test_memory_that_is_short_is_said_in_one_line(error, refused, monkeypatch, tmp_path):
    def check(*_):
        raise error

    # Of what another module imports by name it would keep this one, if it is imported here first.
    monkeypatch.setattr(training, "_check_network", check)
    said = refused("Vanilla-cross-entropy.py", "--output_dir", tmp_path)
    first, *_ = str(error).splitlines()
    assert f"error: {first}; smaller batches (--batch_size) or images" in said


def test_a_gpu_that_is_too_old_is_said_in_one_line(refused, monkeypatch, tmp_path):
    def check(*_):
        first = "CUDA error: no kernel image is available for execution on the device"
        raise torch.AcceleratorError(f"{first}\nSearch for `cudaErrorNoKernelImageForDevice'")

    monkeypatch.setattr(training, "_check_network", check)
    said = refused("Vanilla-cross-entropy.py", "--output_dir", tmp_path)
    assert "error: CUDA error: no kernel image is available" in said
    assert "device; a PyTorch made for this GPU, or --device cpu, would do" in said


@pytest.mark.parametrize(
    ("capability", "taken"),
    [((6, 1), "cpu"), ((7, 5), "cuda"), ((8, 0), "cpu"), ((8, 9), "cuda"), ((12, 0), "cuda")],
)
def test_a_gpu_without_kernels_is_taken_when_named_only(capability, taken, monkeypatch, capsys):
    has_kernels = arguments._has_kernels.__wrapped__
    gpu = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda: capability,
        "get_device_name": lambda: "GTX",
        "get_arch_list": lambda: ["sm_75", "sm_86", "compute_90"],
    }
    for name, answer in gpu.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(arguments, "_has_kernels", functools.cache(has_kernels))
    assert arguments.device("auto").type == arguments.device("auto").type == taken
    assert arguments.device("cuda").type == "cuda"
    said = capsys.readouterr().err
    assert said.count("this PyTorch has nothing for GTX, of compute capability") == (taken == "cpu")
    monkeypatch.setattr(arguments, "_has_kernels", functools.cache(has_kernels))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx942"])
    assert arguments.device("auto").type == "cuda"


def test_an_operation_that_is_not_deterministic_is_said_in_one_line(refused, monkeypatch, tmp_path):
    def check(*_):
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but "
            "you set 'torch.use_deterministic_algorithms(True)'. You can turn off determinism"
        )

    monkeypatch.setattr(training, "_check_network", check)
    said = refused("Vanilla-cross-entropy.py", "--deterministic", "--output_dir", tmp_path)
    assert "error: adaptive_avg_pool2d_backward_cuda does not have a determ" in said
    assert "implementation on this device; leave --deterministic out" in said


def test_a_terminal_without_greek_letters_shows_escapes():
    code = "from utils.errors import run; run(lambda: print('ε'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "\\u03b5\n"), ended.stderr


def test_a_network_that_cannot_be_compiled_leaves_nothing(refuses, monkeypatch):
    def compiled(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compiled)
    error = refuses("Vanilla-cross-entropy.py", "--compile", "--device", "cpu")
    assert "--compile does not work on cpu here (RuntimeError: no compiler)" in error


# ------------------------------------------------------------------------------------------- flags

SHARED = {
    "--lr": ["0", "-1", "nan", "inf", "fast"],
    "--weight_decay": ["-1", "nan", "inf", "none"],
    "--batch_size": ["0", "-1", "1.5", "many", "9" * 20],
    "--epochs": ["0", "-3", "1e3", "nan"],
    "--estop": ["-1", "0.5"],
    "--seed": ["-1", "1.5", "9" * 30],
    "--ece_bins": ["0", "-5", "ten", "9" * 12],
    "--save_every": ["-1", "nan", "inf"],
    "--optimizer": ["adamm", ""],
    "--schedule": ["cosin"],
    "--milestones": ["0", "-1", "1.5", "late"],
    "--fall": ["0", "1", "-0.1", "nan", "half"],
    "--params": ["publishd"],
    "--augment": ["flop"],
    "--precision": ["float61"],
    "--output_dir": [""],
    "--data_dir": [""],
    "--device": ["gpu", "cuda:x", "cuda:-1", "cpu:1", "meta", "", "cuda:99999999999"],
}
OF_TRAINING = {
    "--dataset": ["minst", "CIFAR10", "../digits"],
    "--model": ["resnet81", "os.system"],
    "--tr_size": ["0", "1", "1.5", "-0.1", "nan", "inf", "half"],
    "--num_classes": ["0", "-10", "ten"],
    "--image_size": ["0", "-8", "1000000", "8x8"],
    "--trials": ["0", "-1", "two"],
}
OF_ONE = {
    "Label-smoothing.py": {"--smoothing": ["-0.1", "1.1", "nan", "inf", "some"]},
    "Label-relaxation.py": {"--alpha": ["0", "1", "-0.1", "nan", "inf", "some"]},
    "Focal-loss.py": {"--gamma": ["-1", "nan", "inf", "some"]},
    "Confidence-penalty.py": {"--beta": ["-1", "nan", "inf", "some"]},
    ILS: {
        "--variant": ["ils3", "ILS2"],
        "--factor": ["cubic"],
        "--smoothing": ["-0.1", "1", "nan", "inf", "some"],
        "--temperature": ["0", "-1", "1e-40", "nan", "inf", "warm"],
        "--shift": ["-0.1", "1.1", "nan"],
        "--slope": ["-1", "nan", "inf"],
        "--cap": ["-0.1", "1", "nan"],
        "--teacher": [""],
    },
    DISTILLATION: {
        "--alpha": ["-0.1", "1.1", "nan", "inf", "some"],
        "--temperature": ["0", "-1", "1e30", "nan", "inf", "warm"],
        "--student": ["shallow"],
        "--scale_teacher": ["maybe"],
        "--teacher": [""],
    },
    EVALUATION: {
        "--ece_bins": SHARED["--ece_bins"],
        "--bootstrap": ["-1", "some", "9" * 13],
        "--compare": ["runs/digits"],
        "--device": SHARED["--device"],
        "--output_dir": [""],
        "--data_dir": [""],
    },
}
FLAGS = [
    (script, flag, value)
    for script in (*TRAINING, DISTILLATION, EVALUATION)
    for flags in (
        SHARED if script != EVALUATION else {},
        OF_TRAINING if script in TRAINING else {},
        OF_ONE.get(script, {}),
    )
    for flag, values in flags.items()
    for value in values
]


@pytest.mark.parametrize(("script", "flag", "value"), FLAGS)
def test_a_value_outside_its_range_is_named_with_the_range(script, flag, value, refuses):
    needed = {DISTILLATION: ("--teacher", "best.pt"), EVALUATION: ("best.pt",)}.get(script, ())
    error = refuses(script, *needed, flag, value)
    assert f"argument {flag}: {value!r} given" in error
    assert "expected" in error


@pytest.mark.parametrize(
    ("script", "flags", "meant"),
    [
        ("Vanilla-cross-entropy.py", ("--dataset", "fashoinmnist"), "fashionmnist"),
        ("Vanilla-cross-entropy.py", ("--model", "resnet81"), "resnet18"),
        ("Instance-based-smoothing.py", ("--variant", "scroes"), "scores"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(script, flags, meant, refuses):
    assert f"did you mean {meant}?" in refuses(script, *flags)


def test_a_misspelt_flag_gets_the_nearest_one(refuses):
    error = refuses("Label-smoothing.py", "--smothing", 0.1, "--lr", 1)
    assert "unrecognized arguments: --smothing 0.1; did you mean --smoothing?" in error


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize(
    "flags", [("--epoch", "3"), ("--smothing", "0.1"), ("stray",), ("-\n", "")]
)
def test_unknown_flags_are_not_guessed(script, flags, refuses):
    assert "unrecognized arguments" in refuses(script, *flags)


def test_classes_of_a_figure_that_is_not_drawn(refuses):
    error = refuses(EVALUATION, "best.pt", "--tsne_classes", "1", "2")
    assert "--tsne_classes does nothing without --plots" in error


def test_no_name_is_not_the_working_directory(refuses):
    assert "CHECKPOINT_OR_FOLDER: '' given, a path expected" in refuses(EVALUATION, "")


@pytest.mark.parametrize("flag", ["--smoothing", "--epochs"])
def test_a_flag_without_a_value(flag, refused):
    assert f"argument {flag}: expected" in refused("Label-smoothing.py", flag)


def test_one_bad_value_among_several_is_refused(refuses):
    error = refuses("Label-smoothing.py", "--smoothing", "0.1", "0.2", "2")
    assert "'2' given" in error


@pytest.mark.parametrize("script", [*TRAINING, DISTILLATION, EVALUATION])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(script, device, refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needed = {DISTILLATION: ("--teacher", "best.pt"), EVALUATION: ("best.pt",)}.get(script, ())
    error = refuses(script, *needed, "--device", device)
    assert f"{device!r} given" in error
    assert "cpu would do" in error


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (("--variant", "ils1", "--smoothing", "0.2"), "--smoothing"),
        (("--variant", "ils", "--smoothing", "0.2"), "--smoothing"),
        (("--variant", "ils1", "--temperature", "2"), "--temperature"),
        (("--variant", "scores", "--temperature", "2"), "--temperature"),
        (("--variant", "ils2", "--shift", "0.7"), "--shift"),
        (("--variant", "class", "--factor", "proportional"), "--factor"),
        (("--variant", "ils1", "--factor", "proportional", "--cap", "0.5"), "--cap"),
        (("--variant", "scores", "--temperature", "1"), "--temperature"),  # the default, but given
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags, idle, refuses):
    error = refuses(ILS, *flags)
    assert f"{idle} does nothing with --variant {flags[1]}" in error
    assert "which reads --variant" in error


# ------------------------------------------------------------------------ flags against the data


@pytest.mark.parametrize("script", TRAINING)
def test_num_classes_against_the_data(script, refuses):
    error = refuses(script, "--num_classes", 9)
    assert "--num_classes 9 given, but digits has 10 classes" in error


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("share", ["0.0001", "0.9999"])
def test_a_share_that_leaves_a_split_empty(script, share, refuses):
    error = refuses(script, "--tr_size", share)
    assert f"--tr_size {share} leaves" in error
    assert "would do" in error


def test_an_average_over_a_class_without_images(refuses):
    flags = ("--model", "simple_dense", "--variant", "class", "--tr_size", 0.01)
    error = refuses(ILS, *flags, "--overwrite")
    assert "which has no image of 0; a larger --tr_size" in error


@pytest.mark.parametrize("flags", [("--batch_size", 1), ("--tr_size", 0.0007)])
def test_batches_of_one_image_are_too_small_for_batch_norm(flags, refuses):
    error = refuses("Vanilla-cross-entropy.py", "--model", "shallownet", *flags)
    assert "batch norm" in error


# ----------------------------------------------------------------------------------- image folders


@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("train/ant/1", "train/ant/2", "train/bee/3", "test/ant/4", "test/bee/5"):
        path = tmp_path / f"images/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (int(name[-1]), 0, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("script", TRAINING)
def test_image_folders_that_cannot_be_used(script, images, refuses):
    def error() -> str:
        return refuses(script, "--dataset", "imagefolder", "--data_dir", images)

    path = images / "train/bee/3.png"
    content = path.read_bytes()
    path.write_bytes(content[:40])
    assert str(path) in error()
    Image.new("RGB", (8, 9)).save(path)
    assert "--image_size" in error()
    path.unlink()
    assert str(path.parent) in error()  # an empty class
    path.write_bytes(content)
    shutil.rmtree(images / "test/bee")
    assert f"{images / 'test'} lacks classes" in error()
    shutil.rmtree(images / "test")
    assert f"no folder {images / 'test'}" in error()


# ----------------------------------------------------------------------------------- output folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder that holds a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run("Vanilla-cross-entropy.py", "--model", "shallownet", "--epochs", 1, "--output_dir", folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--epochs", 1, "--lr", 0.05), "recipe.lr is 0.1 there and 0.05 here"),
        (("--epochs", 2), "recipe.epochs is 1 there and 2 here"),
        (("--epochs", 1, "--tr_size", 0.5), "recipe.tr_size is 0.8 there and 0.5 here"),
    ],
)
def test_an_output_folder_with_another_configuration(finished, flags, difference, refused):
    error = refused(
        "Vanilla-cross-entropy.py", "--model", "shallownet", *flags, "--output_dir", finished,
        written=finished,
    )  # fmt: skip
    assert difference in error
    assert "--overwrite" in error


def test_a_pipe_for_a_checkpoint_holds_nobody_up(refuses, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert "is not a regular file" in refuses(EVALUATION, tmp_path / "pipe.pt")


@pytest.mark.parametrize("file", ["config.json", "metrics.json"])
def test_a_pipe_for_a_file_of_an_earlier_run_holds_nobody_up(finished, file, tmp_path, refused):
    shutil.copytree(finished, tmp_path / "runs")
    path = tmp_path / "runs/digits/shallownet/vanilla/seed0" / file
    path.unlink()
    os.mkfifo(path)
    flags = ("--model", "shallownet", "--epochs", 1, "--output_dir", tmp_path / "runs")
    assert f"{path} is damaged" in refused("Vanilla-cross-entropy.py", *flags)


@pytest.mark.parametrize("file", ["config.json", "metrics.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"settings": 3}', b"\xff\x00", b"[" * 5000]
)
def test_a_damaged_file_of_an_earlier_run(finished, file, content, tmp_path, refused):
    shutil.copytree(finished, tmp_path / "runs")
    path = tmp_path / "runs/digits/shallownet/vanilla/seed0" / file
    path.write_bytes(content)
    error = refused(
        "Vanilla-cross-entropy.py", "--model", "shallownet", "--epochs", 1,
        "--output_dir", tmp_path / "runs",
    )  # fmt: skip
    assert str(path.parent) in error
    assert "--overwrite" in error
    assert path.read_bytes() == content


@pytest.mark.parametrize("script", [*TRAINING, DISTILLATION, EVALUATION])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_folder_should_be(script, below, good, tmp_path, refused):
    (tmp_path / "file").write_text("something else")
    needed = {
        DISTILLATION: ("--teacher", good),
        EVALUATION: (good,),
        ILS: ("--teacher", good, "--model", "shallownet"),
    }.get(script, ("--model", "shallownet"))
    error = refused(
        script, *needed, "--output_dir", tmp_path / "file" / below, written=tmp_path
    )  # fmt: skip
    assert str(tmp_path / "file" / below) in error


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def sound() -> dict:
    """What the best.pt of an untrained network holds."""
    data = data_loader.load("digits")
    return checkpoint.contents(
        build_model("shallownet", (1, 8, 8), 10, [0.3], [0.4]),
        training={
            "method": "vanilla",
            "hyper_parameters": {},
            "requested": {},
            "seed": 0,
            "epoch": 1,
            "trained_on": "train",
            "recipe": {"optimizer": "sgd", "lr": 0.1, "tr_size": 0.8},
        },
        data={
            "dataset": "digits",
            "classes": list(data.classes),
            "image_size": None,
            "protocol": "ils",
            "tr_size": 0.8,
            "seed": 0,
            "fingerprint": data.fingerprint,
            "splits": data_loader.split(data, 0.8, 0).hashes(),
            "normalisation": {"mean": [0.3], "std": [0.4]},
        },
        teacher={
            "weights": "0" * 64,
            "model": "resnet18",
            "method": "vanilla",
            "trained_on": "train",
            "seed": 0,
            "protocol": "ils",
            "tr_size": 0.8,
        },
        temperature=1.5,
        metrics={"validation": {"log_loss": 2.3}},
    )


@pytest.fixture
def content(sound) -> dict:
    """A copy of it, to be damaged."""
    return copy.deepcopy(sound)


@pytest.fixture
def good(sound, tmp_path) -> Path:
    return saved(sound, tmp_path)


def saved(content, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    return path


def change(content: dict, field: str, value) -> None:
    *parents, last = field.split(".")
    for key in parents:
        content = content[key]
    content[last] = value


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        checkpoint.load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_sound_checkpoint_is_read_and_nobodys_random_numbers_with_it(good, sound):
    state = torch.get_rng_state()
    read = checkpoint.load(good)
    assert torch.equal(torch.get_rng_state(), state)
    assert not read.model.training
    assert read.weights_hash == checkpoint.weights_hash(sound["weights"])
    assert read.temperature == 1.5
    assert all(parameter.requires_grad for parameter in read.model.parameters())
    assert not read.is_student


def test_the_sound_checkpoint_can_be_evaluated(good):
    """So the refusals below are for what was changed."""
    evaluated = evaluate_checkpoint(good, "data", torch.device("cpu"))
    assert evaluated.logits["test"].shape == (360, 10)


class RunsCode:
    """Unpickled with pickle's full powers, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def make_missing(path: Path, sound: dict) -> None: ...


def make_empty(path: Path, sound: dict) -> None:
    path.write_bytes(b"")


def make_truncated(path: Path, sound: dict) -> None:
    torch.save(sound, path)
    path.write_bytes(path.read_bytes()[:-1000])


def make_text(path: Path, sound: dict) -> None:
    path.write_text("epoch,loss\n1,2.3\n")


def make_zip(path: Path, sound: dict) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "not a network")


def make_tensor(path: Path, sound: dict) -> None:
    torch.save(torch.zeros(3), path)


def make_state_dict(path: Path, sound: dict) -> None:
    torch.save(sound["weights"], path)


def make_last(path: Path, sound: dict) -> None:
    names = ("optimizer", "schedule", "progress", "random")
    torch.save({"model": sound["weights"], **{name: {} for name in names}}, path)


def make_whole_model(path: Path, sound: dict) -> None:
    torch.save(build_model("shallownet", (1, 8, 8), 10), path)


def make_later_format(path: Path, sound: dict) -> None:
    torch.save({**sound, "format": 99}, path)


def make_format_that_is_a_tensor(path: Path, sound: dict) -> None:
    torch.save({**sound, "format": torch.zeros(2)}, path)


def make_code(path: Path, sound: dict) -> None:
    torch.save({**sound, "weights": RunsCode(path.parent / "ran")}, path)


def make_code_in_a_plain_pickle(path: Path, sound: dict) -> None:
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "ran")))


def make_folder(path: Path, sound: dict) -> None:
    path.mkdir()


KINDS = {
    name.removeprefix("make_"): function
    for name, function in list(globals().items())
    if name.startswith("make_")
}


@pytest.mark.parametrize("script", READING)
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_checkpoints(kind, script, sound, tmp_path, refuses):
    path = tmp_path / "best.pt"
    KINDS[kind](path, sound)
    assert str(path) in refuses(script, *READING[script], path)
    assert not (tmp_path / "ran").exists()


def test_the_pickle_above_would_have_run_code(tmp_path):
    make_code_in_a_plain_pickle(tmp_path / "best.pt", {})
    pickle.loads((tmp_path / "best.pt").read_bytes())
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_cut_off_anywhere_is_refused(good):
    whole = good.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        good.write_bytes(whole[:length])
        error_of(good)


FIELDS = (
    *("model", "model.name", "model.input_shape", "model.num_classes", "model.network_size"),
    "weights",
    *("training", "training.method", "training.hyper_parameters", "training.requested"),
    *("training.seed", "training.epoch", "training.recipe", "training.trained_on"),
    *("data", "data.dataset", "data.classes", "data.image_size", "data.protocol", "data.tr_size"),
    *("data.seed", "data.fingerprint"),
    *("data.splits", "data.splits.train", "data.splits.validation", "data.splits.test"),
    *("data.normalisation", "data.normalisation.mean", "data.normalisation.std"),
    *("teacher", "teacher.weights", "teacher.model", "teacher.method", "teacher.trained_on"),
    *("teacher.seed", "teacher.protocol", "teacher.tr_size"),
    *("temperature", "metrics", "metrics.validation"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_must_be_there_and_of_its_type(field, content, tmp_path):
    for value in (object, {"nested": {"deeper": [1]}}, [[]], b"bytes", "two words\n", 1j, -1):
        if value is object:
            *parents, last = field.split(".")
            there = content
            for key in parents:
                there = there[key]
            kept = there.pop(last)
        else:
            change(content, field, value)
        error = error_of(saved(content, tmp_path))
        # "weights" tell the format, and a teacher without its own is no teacher.
        assert field in error or field == "weights" or f"{field.split('.')[0]} is" in error
    change(content, field, kept)
    checkpoint.load(saved(content, tmp_path))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("format", [0, 1, "2", None]),
        ("model.name", ["resnet19", "../vanilla", "densetnet", ["shallownet"]]),
        ("model.num_classes", [1, 0, 11, 10**12, 10.0, True, "10"]),
        (
            "model.input_shape",
            [[1, 8], [1, 8, 10**9], [0, 8, 8], [1, 8.0, 8], (1, 8, 8)],
        ),
        ("training.method", ["../../home", "", "a b", "\x1b[2J", "<script>", "x" * 1000, "a|b"]),
        ("training.requested", [{"smoothing": 0.1}, {"a|b": [1]}, {"smoothing": [None]}]),
        ("training.requested", [{"smoothing": []}, {"smoothing": [0.1, "x"]}, {"s": [NAN]}]),
        ("training.hyper_parameters", [{"smoothing": INF}, {"smoothing": [0.1]}, {3: 1}]),
        ("training.recipe", [{"lr": NAN}, {"lr": 10**30}, {"lr": "a b"}]),
        ("training.seed", [-1, 0.0, 10**30, True]),
        ("training.epoch", [0, 1.0]),
        ("data.dataset", ["imagenet", "../digits", ""]),
        ("data.classes", [[], ["0"] * 9, [0] * 10, "0123456789"]),
        ("data.image_size", [0, 10**9, 8.0]),
        ("data.tr_size", [0.0, 1.0, NAN, 1, "0.8"]),
        ("data.fingerprint", ["", "0" * 63, "G" * 64, "../../../"]),
        ("data.splits", [None, {}, {"train": "0" * 64}]),
        ("data.normalisation.std", [[], [0.0], [NAN], [-0.4]]),
        ("data.normalisation.mean", [[INF], [None]]),
        ("teacher", [False, [], {"weights": "abc"}, {"scaled": True}]),
        ("temperature", [NAN, INF, 0.0, -1.0, None, "1", 10**400]),
        ("metrics.validation", [{"log_loss": NAN}, {"log loss": 1.0}]),
    ],
)
def test_fields_outside_their_ranges(field, values, content, tmp_path):
    for value in values:
        change(content, field, value)
        error = error_of(saved(content, tmp_path))
        assert error.isprintable()
        assert len(error) < 1000


def test_a_field_that_is_endless_when_written_out(content, tmp_path):
    """Lists that hold one another twice: 60 of them, and 2^60 commas."""
    value = [0]
    for _ in range(60):
        value = [value, value]
    for field in ("training.method", "data.classes", "metrics.validation", "training.recipe"):
        damaged = copy.copy(content)
        damaged[field.split(".")[0]] = dict(content[field.split(".")[0]])
        change(damaged, field, value)
        error_of(saved(damaged, tmp_path))


def nan(weights):
    weights["network.0.weight"][0, 0, 0, 0] = NAN


def infinite_statistics(weights):
    weights["network.1.running_mean"][0] = INF


def other_shape(weights):
    weights["network.0.weight"] = weights["network.0.weight"].flatten()


def other_type(weights):
    weights["network.0.weight"] = weights["network.0.weight"].double()


def lacking(weights):
    del weights["network.0.weight"]


def surplus(weights):
    weights["network.0.more"] = torch.zeros(3)


def strange_name(weights):
    weights[3] = torch.zeros(3)


def sparse(weights):
    weights["mean"] = weights["mean"].to_sparse()


def no_tensor(weights):
    weights["mean"] = [0.3]


def zero_std(weights):
    weights["std"].zero_()


def negative_variance(weights):
    weights["network.1.running_var"][0] = -1.0


def one_number_for_all(weights):
    for name, tensor in weights.items():
        weights[name] = torch.ones((), dtype=tensor.dtype).expand(tensor.shape)


@pytest.mark.parametrize(
    "damage",
    [
        *(nan, infinite_statistics, other_shape, other_type, lacking, surplus, strange_name),
        *(sparse, no_tensor, zero_std, negative_variance, one_number_for_all),
    ],
)
def test_weights_that_no_such_network_has(damage, content, tmp_path):
    damage(content["weights"])
    assert "weights" in error_of(saved(content, tmp_path))


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes"),
    [
        ("shallownet", [1, 10**9, 10**9], 10),
        ("shallownet", [1, 8, 8], 10**12),
        ("simple_dense", [1, 512, 512], 10),  # weights of 1 GiB
        ("simple_dense", [4096, 4096, 4096], 100_000),
        ("vgg16", [3, 4096, 4096], 100_000),
    ],
)
def test_no_memory_is_taken_on_the_word_of_a_file(
    name, input_shape, num_classes, content, tmp_path
):
    content["model"] |= {"name": name, "input_shape": input_shape, "num_classes": num_classes}
    content["model"]["network_size"] = input_shape[1:]
    content["data"]["classes"] = ["x"] * min(num_classes, 100_000)
    path, peak = saved(content, tmp_path), peak_memory()
    error = error_of(path)
    assert peak() < 100
    assert ("weights" in error) == (name != "shallownet"), error  # whose numbers no network has


def test_an_archive_that_unpacks_to_more_than_its_size(good):
    with zipfile.ZipFile(good, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data/999", bytes(50_000_000))
    assert good.stat().st_size < 5_000_000
    assert "unpacks" in error_of(good)


# ---------------------------------------------------------------------------------------- teachers


def described(content: dict, input_shape: tuple[int, int, int], classes: int) -> dict:
    """The checkpoint of such a network."""
    model = build_model("shallownet", input_shape, classes)
    content["model"] = {
        "name": "shallownet",
        "input_shape": list(input_shape),
        "num_classes": classes,
        "network_size": list(model.network_size),
    }
    content["weights"] = model.state_dict()
    content["data"]["classes"] = [str(k) for k in range(classes)]
    return content


@pytest.mark.parametrize("script", READING)
@pytest.mark.parametrize(
    ("input_shape", "classes", "told"),
    [((1, 8, 8), 5, "classes"), ((1, 16, 16), 10, "(1, 16, 16)"), ((3, 8, 8), 10, "(3, 8, 8)")],
)
def test_a_network_for_other_images(script, input_shape, classes, told, content, tmp_path, refuses):
    path = saved(described(content, input_shape, classes), tmp_path)
    assert told in refuses(script, *READING[script], path)


def test_a_teacher_of_another_data_set(content, tmp_path, refuses):
    content["data"]["dataset"] = "mnist"
    error = refuses(ILS, *READING[ILS], saved(content, tmp_path))
    assert "the data set mnist, and digits is needed" in error


@pytest.mark.parametrize("script", READING)
def test_a_teacher_of_other_images(script, content, tmp_path, refuses):
    content["data"]["fingerprint"] = "0" * 64
    path = saved(content, tmp_path)
    assert refuses(script, *READING[script], path)


@pytest.mark.parametrize("script", [DISTILLATION, EVALUATION])
def test_splits_that_are_not_those_of_the_seed(script, content, tmp_path, refuses):
    content["data"]["splits"]["test"] = "0" * 64
    assert "splits" in refuses(script, *READING[script], saved(content, tmp_path))


def test_an_evaluated_network_whose_logits_overflow(content, tmp_path, refuses):
    for tensor in content["weights"].values():
        if tensor.ndim == 2:
            tensor *= 1e37
    assert "finite" in refuses(EVALUATION, saved(content, tmp_path))


@pytest.mark.parametrize("script", READING)
def test_a_folder_without_checkpoints(script, tmp_path, refuses):
    (tmp_path / "nothing").mkdir()
    error = refuses(script, *READING[script], tmp_path / "nothing")
    assert f"no best.pt in the folder {tmp_path / 'nothing'}" in error


def test_two_teachers_for_one_seed(sound, tmp_path, refuses):
    paths = []
    for name in ("one", "two"):
        path = tmp_path / name / "seed0/best.pt"
        path.parent.mkdir(parents=True)
        torch.save(sound, path)
        paths.append(path)
    assert "names 2 checkpoints for seed 0" in refuses(ILS, *READING[ILS], *paths)


@pytest.mark.parametrize("script", [DISTILLATION, EVALUATION])
def test_a_script_that_needs_a_checkpoint_says_so(script, refused):
    assert "required" in refused(script)
