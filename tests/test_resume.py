"""A run that was stopped anywhere ends in the same bits as one that was not."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, Forks, files, run, run_here, start, stopped_script
from torch import nn

from models import MODELS
from utils import checkpoint, data_loader, progress, training
from utils.arguments import training_parser
from utils.teacher import make_cross_entropy

FAST = ("--model", "shallownet", "--batch_size", 128, "--save_every", 0.0005)
VANILLA = ("Vanilla-cross-entropy.py", *FAST)
SEARCH = (
    "Label-smoothing.py", "--model", "shallownet", "--epochs", 1, "--tr_size", 0.1,
    "--batch_size", 80, "--save_every", 1e-9, "--smoothing",
)  # fmt: skip
KILLS = 9  # of each kind of training, at random moments


def outcome(folder: Path) -> dict[str, bytes]:
    """What must be the same after any history: all files, but for what records the history."""
    kept = {
        name: content
        for name, content in files(folder).items()
        if not name.endswith(("config.json", ".pt"))
    }
    weights = {
        str(path.relative_to(folder)): checkpoint.load(path).weights_hash.encode()
        for path in folder.rglob("best.pt")
    }
    return kept | weights


def assert_same_outcome(folder: Path, uninterrupted: Path) -> None:
    here, there = outcome(folder), outcome(uninterrupted)
    assert here.keys() == there.keys()
    assert [name for name in there if here[name] != there[name]] == []
    assert files(folder).keys() == files(uninterrupted).keys()


# ----------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def teacher(forks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    forks.run(*VANILLA, "--epochs", 3, "--output_dir", folder)
    return folder / "digits/shallownet/vanilla/seed0/best.pt"


def commands(teacher: Path) -> dict[str, tuple]:
    return {
        "training": (*VANILLA, "--epochs", 6),
        "teacher, search and student": (
            "Instance-based-smoothing.py", *FAST, "--epochs", 3, "--smoothing", 0.05, 0.3
        ),
        "distillation": (
            "Network-distillation.py", "--teacher", teacher, "--batch_size", 128, "--epochs", 3,
            "--save_every", 0.0005,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["training", "teacher, search and student", "distillation"])
def test_kills_at_random_moments_leave_no_trace(forks, teacher, tmp_path, kind):
    command, moments = commands(teacher)[kind], random.Random(kind)
    forks.run(*command, "--output_dir", tmp_path / "whole")
    began = time.monotonic()
    forks.run(*command, "--output_dir", tmp_path / "whole", "--overwrite")
    duration = time.monotonic() - began
    kills = within = 0
    for attempt in range(100):
        folder = tmp_path / str(attempt)
        for _ in range(100):
            process = forks.start(*command, "--output_dir", folder)
            # Often enough that there are many, late enough that each start gets somewhere.
            delay = moments.uniform(0.1, 0.6) * duration
            timer = threading.Timer(delay, os.kill, (process, signal.SIGKILL))
            timer.start()
            status = forks.end()
            timer.cancel()
            timer.join()
            assert status in (0, -signal.SIGKILL), forks.said
            kills += status != 0
            within += "continued after" in forks.said and ", step 0" not in forks.said
            if status == 0:
                break
        assert_same_outcome(folder, tmp_path / "whole")
        if kills >= KILLS:
            break
    print(f"\n{kind}: {kills} kills at random moments, {attempt + 1} runs, {duration:.2f} s each;")
    print(f"  {within} starts went on within an epoch")
    assert kills >= KILLS


def test_a_kill_at_every_change_of_the_disk_leaves_no_trace(forks, tmp_path):
    """Killed while a file is written (it is cut in half), before and after it is renamed, and
    while the candidates are removed."""
    command = (*SEARCH, 0.05, 0.3)
    forks.run(*command, "--output_dir", tmp_path / "whole")
    for moment in itertools.count(1):
        folder = tmp_path / str(moment)
        forks.start(*command, "--output_dir", folder, kill_at=moment)
        if forks.end() == 0:
            break
        forks.run(*command, "--output_dir", folder)
        assert_same_outcome(folder, tmp_path / "whole")
    print(f"\n{moment - 1} kills, one at each change of the disk")
    assert moment > 40


def test_a_kill_while_an_earlier_run_is_removed(forks, tmp_path):
    """Whether the old command follows or the new one, nothing of two runs is mixed."""
    old, new = (*SEARCH, 0.05, 0.3), (*SEARCH, 0.2)
    forks.run(*old, "--output_dir", tmp_path / "old")
    forks.run(*new, "--output_dir", tmp_path / "new")
    folder = tmp_path / "killed"
    # Where both candidates are there, and the winner's files, and metrics.json is not.
    process = forks.start(*old, "--output_dir", folder, pause=["_final_metrics", 600])
    forks.wait_for("pausing in _final_metrics")
    os.kill(process, signal.SIGKILL)
    forks.end()
    candidates = folder / "digits/shallownet/label-smoothing/seed0/candidates"
    kills = 0
    while candidates.exists():
        assert kills < 100
        # Each start removes one file or folder more.
        forks.run(*new, "--overwrite", "--output_dir", folder, kill_at=1, status=-signal.SIGKILL)
        kills += 1
        shutil.copytree(folder, tmp_path / str(kills))
        forks.run(*old, "--output_dir", tmp_path / str(kills))
        assert_same_outcome(tmp_path / str(kills), tmp_path / "old")
    print(f"\n{kills} kills while an earlier run is removed")
    assert kills >= 10
    forks.run(*new, "--overwrite", "--output_dir", folder)
    assert_same_outcome(folder, tmp_path / "new")


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bfloat16", "--optimizer", "adam", "--augment", "crop-flip"),
        ("--schedule", "cosine", "--weight_decay", 0.01),
        ("--model", "resnet56", "--batch_size", 500, "--epochs", 1),
    ],
)
def test_every_state_of_a_recipe_comes_back(forks, tmp_path, flags):
    """Adam's moments, the schedule, batch norm, dropout, bfloat16."""
    command = (*VANILLA, "--epochs", 4, "--save_every", 1e-9, *flags)
    forks.run(*command, "--output_dir", tmp_path / "whole")
    folder, kills, status = tmp_path / "killed", 0, None
    while status != 0 and kills < 100:
        forks.start(*command, "--output_dir", folder, kill_at=11)
        status = forks.end()
        assert status in (0, -signal.SIGKILL), forks.said
        assert kills == 0 or status == 0 or "continued after epoch" in forks.said
        kills += status != 0
    print(f"\n{kills} kills with {flags}")
    assert kills >= 2
    assert_same_outcome(folder, tmp_path / "whole")


@pytest.mark.parametrize("stopped_after", [None, 1, 3])
def test_a_training_stops_early_and_keeps_the_best_epoch(stopped_after, tmp_path, monkeypatch):
    """After validation log losses of 3, 1, 2 and 2, also in two goes."""
    losses, validate = [3.0, 1.0, 2.0, 2.0], training._validate

    def scripted(trial, model, row):
        validated = validate(trial, model, row)
        row["validation_log_loss"] = losses[row["epoch"] - 1]
        return validated

    monkeypatch.setattr(training, "_validate", scripted)
    flags = ("--model", "simple_dense", "--epochs", "9", "--estop", "2", "--batch_size", "512")
    args = training_parser("").parse_args(flags)
    args.device = torch.device("cpu")
    trial = training.new_trial(args, data_loader.load("digits"), args.model, 0)

    def epochs():
        return training.fit(trial, "vanilla", {}, make_cross_entropy, tmp_path)

    if stopped_after:
        first = epochs()
        assert next(p for p in first if p.epoch == stopped_after).waited == (stopped_after == 3)
        first.close()
    *_, progress = epochs()
    assert (progress.epoch, progress.best_epoch, progress.waited) == (4, 2, 2)
    assert checkpoint.load(tmp_path / "best.pt").training["epoch"] == 2
    assert list(pd.read_csv(tmp_path / "history.csv")["validation_log_loss"]) == losses


def test_memory_that_is_short_when_a_run_goes_on_is_no_damage(refused, tmp_path, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    command = ("Vanilla-cross-entropy.py", "--model", "simple_dense", "--epochs", 1)
    command = (*command, "--output_dir", tmp_path)
    assert not run_here(*command)
    (tmp_path / "digits/simple_dense/vanilla/seed0/metrics.json").unlink()
    monkeypatch.setattr(progress, "_fill", short)
    said = refused(*command, written=tmp_path)
    assert "CUDA out of memory. Tried to allocate 9.00 GiB.; smaller batches" in said


def test_a_finished_run_is_reported_and_nothing_is_written(forks, teacher):
    folder = teacher.parent
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    command = (*VANILLA, "--epochs", 3, "--output_dir", folder.parents[3])
    said = forks.run(*command)
    assert f"finished earlier, nothing to do (--overwrite starts anew): {teacher}" in said
    assert "temperature" in said
    assert "epoch   1/3" not in said
    del before[folder / ".lock"]
    for path, state in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == state


def test_a_loss_of_ones_own_goes_on_whatever_its_types_and_names(forks, tmp_path):
    loss = """{
            "loss": F.cross_entropy(logits, labels),
            "right": (logits.argmax(1) == labels).sum(),
            "mean-logit": logits.mean().view(1),
            "weight": 0.3,
        }"""
    script = stopped_script(tmp_path, "own", loss, step=20)
    command = (script, "--model", "simple_dense", "--epochs", 1, "--batch_size", 32)
    command += ("--precision", "bfloat16", "--output_dir", tmp_path)
    forks.run(*command, status=128 + signal.SIGTERM)
    assert "continued after epoch 0, step 20" in forks.run(*command)
    assert "continued" not in forks.run(*command), "it has been read once more, and is finished"
    (row,) = pd.read_csv(tmp_path / "digits/simple_dense/own/seed0/history.csv").to_dict("records")
    assert 3 < row["train_right"] < 32
    assert row["train_weight"] == pytest.approx(0.3)


def test_a_loss_whose_terms_change_their_names_is_refused(tmp_path):
    loss = """{
            "loss": F.cross_entropy(logits, labels),
            **({"first": 1} if steps == 3 else {}),
        }"""
    script = stopped_script(tmp_path, "own", loss, step=0)
    command = (script, "--model", "simple_dense", "--epochs", 1, "--batch_size", 32)
    error = run(*command, "--output_dir", tmp_path, status=2).err
    assert "the loss gave loss for one batch and loss, first for another" in error


def test_a_method_whose_name_cannot_be_one_is_refused_before_it_is_trained(tmp_path):
    script = stopped_script(tmp_path, "my loss", '{"loss": logits.mean()}', step=0)
    error = run(script, "--model", "simple_dense", "--output_dir", tmp_path, status=2).err
    assert "training.method is 'my loss', a name of at most 255 letters, digits and" in error


def with_a_mask(network):
    network.register_buffer("mask", torch.tensor([0, -torch.inf]))


def with_rates(network):
    network.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]


def with_an_array(network):
    network.window = torch.hann_window(5).numpy()


SIZES = itertools.count(1)


def with_another_size_each_time(network):
    network.register_buffer("size", torch.zeros(next(SIZES)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_a_mask, "weights network.mask are not finite"),
        (with_rates, "lenet cannot be made without numbers (RuntimeError: Tensor.item() cannot be"),
        (with_an_array, "lenet cannot be made without numbers (TypeError: "),
        (with_another_size_each_time, "weights network.size are (torch.float32, ("),
    ],
)
def test_a_network_that_no_checkpoint_could_hold_is_refused_before_it_is_trained(
    change, said, refused, tmp_path, monkeypatch
):
    def constructor(input_shape, num_classes):
        network = MODELS["simple_dense"].constructor(input_shape, num_classes)
        change(network)
        return network

    monkeypatch.setitem(MODELS, "lenet", MODELS["simple_dense"]._replace(constructor=constructor))
    error = refused(
        "Vanilla-cross-entropy.py", "--model", "lenet", "--output_dir", tmp_path / "runs"
    )
    assert f"the checkpoint of this training could not be read: {said}" in error
    assert not (tmp_path / "runs").exists()


def test_names_that_no_checkpoint_could_hold_are_refused_before_a_training(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setitem(MODELS, "my net", MODELS["simple_dense"])
    monkeypatch.setitem(data_loader.READERS, "my/digits", data_loader.READERS["digits"])
    for flag, name in ("--model", "my net"), ("--dataset", "my/digits"):
        given = (flag, name, "--output_dir", tmp_path / "runs")
        error = refused("Vanilla-cross-entropy.py", *given)
        assert f" is '{name}', a " in error
    assert not (tmp_path / "runs").exists()


def test_a_network_that_uses_a_layer_twice_is_read_again_and_goes_on(tmp_path, monkeypatch):
    def constructor(input_shape, num_classes):
        layer = nn.Linear(64, 64)
        return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(64, num_classes))

    monkeypatch.setitem(MODELS, "lenet", MODELS["simple_dense"]._replace(constructor=constructor))
    command = ("Vanilla-cross-entropy.py", "--model", "lenet", "--epochs", 4, "--output_dir")
    assert not run_here(*command, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _validate, calls = training._validate, itertools.count(1)

        def stopping(*arguments):
            if next(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            return _validate(*arguments)

        patch.setattr(training, "_validate", stopping)
        assert run_here(*command, tmp_path / "stopped") == 128 + signal.SIGTERM
    assert not run_here(*command, tmp_path / "stopped")
    place = "digits/lenet/vanilla/seed0"
    assert_same_outcome(tmp_path / "stopped" / place, tmp_path / "whole" / place)


def test_settings_may_not_change_on_the_way_but_the_data_folder_may(forks, tmp_path):
    command = (*VANILLA, "--epochs", 3, "--save_every", 0, "--output_dir", tmp_path)
    forks.run(*command, kill_at=12, status=-signal.SIGKILL)
    before = files(tmp_path)
    said = forks.run(*command, "--lr", 0.05, status=2)
    assert "recipe.lr is 0.1 there and 0.05 here" in said
    # Errors of other bins would stand in one column, to be selected from.
    assert "ece_bins is 10 there" in forks.run(*command, "--ece_bins", 5, status=2)
    assert {name: before[name] for name in before if ".tmp" not in name} == files(tmp_path)
    said = forks.run(*command, "--data_dir", tmp_path / "elsewhere", "--device", "cpu")
    assert "continued after epoch" in said


# -------------------------------------------------------------------------- signals, second process


def assert_stopped(forks, process: int, number: int, again: int = 0) -> None:
    """Sends the signal, and it again while the state is being saved."""
    os.kill(process, number)
    began = time.monotonic()
    for _ in range(again):
        time.sleep(0.005)
        try:
            os.kill(process, number)
        except ProcessLookupError:
            break
    status = forks.end()
    assert time.monotonic() - began < 60
    assert status == 128 + number, forks.said
    *_, line = forks.said.splitlines()
    assert f": stopped by {signal.Signals(number).name}; " in line
    assert "to continue: python " in line
    assert "Traceback" not in forks.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("again", [0, 20])
def test_a_signal_finishes_the_step_and_saves(forks, tmp_path, number, again):
    command = (*VANILLA, "--epochs", 400, "--estop", 0, "--output_dir", tmp_path)
    process = forks.start(*command)
    forks.wait_for("epoch   2/400")
    assert_stopped(forks, process, number, again)
    assert "training state saved" in forks.said
    again = forks.said.partition("to continue: ")[2].split()
    assert again == ["python", *map(str, command)]
    folder = tmp_path / "digits/shallownet/vanilla/seed0"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "best.pt", "config.json", "history.csv", "last.pt",
    }  # fmt: skip
    state = checkpoint.read_tensors(folder / "last.pt")["progress"]
    process = forks.start(*command)
    forks.wait_for(f"continued after epoch {state['epoch']}, step {state['step']}\n")
    os.kill(process, signal.SIGKILL)
    forks.end()


@pytest.mark.parametrize(
    "function", ["requested_values", "_check_network", "collect_logits", "_final_metrics"]
)
def test_a_signal_outside_the_steps_is_obeyed_too(forks, teacher, tmp_path, function):
    """Between the data and the training, in the evaluation of an epoch, and in that at the end."""
    command = (*VANILLA, "--epochs", 3, "--output_dir", tmp_path)
    process = forks.start(*command, pause=[function, 1])
    forks.wait_for(f"pausing in {function}")
    assert_stopped(forks, process, signal.SIGTERM)
    forks.run(*command)
    assert_same_outcome(tmp_path, teacher.parents[4])


def test_a_signal_between_two_trials_is_obeyed(forks, tmp_path):
    command = (*VANILLA, "--epochs", 1, "--trials", 200, "--output_dir", tmp_path)
    process = forks.start(*command)
    forks.wait_for("checkpoint: ")
    assert_stopped(forks, process, signal.SIGINT, again=3)
    said = forks.run(*VANILLA, "--epochs", 1, "--trials", 2, "--output_dir", tmp_path)
    assert "finished earlier" in said


IN_A_FINALIZER = """
import os, signal, time
from utils.errors import run

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

def main():
    Dropped()
    time.sleep(60)

run(main)
"""
WHILE_IT_DIVERGES = """
import os, signal
from utils.errors import DivergedError, StopRequest, run

def main():
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            raise DivergedError("of this training, and a study goes on to the next")
    except DivergedError:
        pass

run(main)
"""


IN_A_LIBRARY = """
import os, signal
from utils.errors import Stopped, run

def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Stopped:
        raise ValueError("Invalid bounding box")

run(main)
"""


@pytest.mark.parametrize("program", [IN_A_FINALIZER, WHILE_IT_DIVERGES, IN_A_LIBRARY])
def test_a_signal_is_not_lost_where_another_exception_passes(program):
    """Python ignores what is raised in a finalizer; matplotlib makes something else of it."""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr.startswith("-c: stopped by SIGTERM; to continue: ")
    assert ended.stderr.count("\n") == 1


def test_what_continues_a_run_that_was_overwriting_does_not_overwrite(forks, tmp_path):
    command = (*VANILLA, "--epochs", 400, "--estop", 0, "--output_dir", tmp_path)
    process = forks.start(*command, "--overwrite")
    forks.wait_for("epoch   1/400")
    assert_stopped(forks, process, signal.SIGTERM)
    assert "--overwrite" not in forks.said


@pytest.mark.parametrize("both", [False, True])
def test_a_closed_output_is_said_in_one_line(tmp_path, both):
    """As by `| head -1`; with `2>&1 | head -1` there is nobody to tell."""
    command = (*VANILLA, "--epochs", 400, "--estop", 0, "--output_dir", tmp_path)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    error = "" if both else process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE, error
    if not both:
        said = "Vanilla-cross-entropy.py: nobody reads the output any more; to continue: python "
        assert error.startswith(said)
        assert error.count("\n") == 1


def test_overwriting_leaves_the_teacher(forks, tmp_path):
    flags = ("--model", "simple_dense", "--output_dir", tmp_path, "--precision", "float32")
    process = forks.start("Vanilla-cross-entropy.py", *flags, "--lr", 0.01, "--epochs", 1000)
    forks.wait_for("epoch   1/")
    assert_stopped(forks, process, signal.SIGTERM)
    before = files(tmp_path)
    said = forks.run("Instance-based-smoothing.py", *flags, "--overwrite", status=2)
    assert "recipe.lr is 0.01 there and 0.1 here" in said
    assert files(tmp_path) == before


def test_a_signal_through_the_real_command_line(tmp_path):
    process = start(*VANILLA, "--epochs", 4000, "--estop", 0, "--output_dir", tmp_path)
    for line in process.stdout:
        if line.startswith("epoch   1/"):
            break
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 130
    assert error.startswith("Vanilla-cross-entropy.py: stopped by SIGINT; training state saved; ")
    assert error.count("\n") == 1


def test_what_is_printed_keeps_up_with_the_training(tmp_path):
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    flags = ("--epochs", 4000, "--estop", 0, "--output_dir", tmp_path)
    process = start(*VANILLA, *flags, env=buffered)
    history = tmp_path / "digits/shallownet/vanilla/seed0/history.csv"
    while not history.exists() or history.read_text().count("\n") < 4:  # a heading and three epochs
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    out, _ = process.communicate(timeout=60)
    rows = history.read_text().count("\n") - 1
    assert sum(line.startswith("epoch ") for line in out.splitlines()) >= rows - 1


def test_a_state_without_the_optimizers_memory_is_refused(forks, tmp_path):
    command = (*VANILLA, "--epochs", 2, "--output_dir", tmp_path)
    forks.run(*command)
    folder = tmp_path / "digits/shallownet/vanilla/seed0"
    (folder / "metrics.json").unlink()
    checkpoint.update(folder / "last.pt", optimizer={})
    said = forks.run(*command, status=2)
    assert "last.pt is damaged (ValueError: it lacks what the optimizer remembers" in said


def test_a_network_with_a_parameter_that_is_not_used_goes_on(monkeypatch, tmp_path):
    def constructor(input_shape, num_classes):
        network = MODELS["simple_dense"].constructor(input_shape, num_classes)
        network.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
        return network

    monkeypatch.setitem(MODELS, "lenet", MODELS["simple_dense"]._replace(constructor=constructor))
    command = ("Vanilla-cross-entropy.py", "--model", "lenet", "--epochs", 1)
    assert not run_here(*command, "--output_dir", tmp_path)
    metrics = tmp_path / "digits/lenet/vanilla/seed0/metrics.json"
    metrics.unlink()
    assert not run_here(*command, "--output_dir", tmp_path)  # which restores the optimizer
    assert metrics.exists()


def test_a_second_process_disturbs_nothing_and_a_dead_ones_lock_is_no_obstacle(
    forks, tmp_path, tmp_path_factory
):
    command = (*VANILLA, "--epochs", 2, "--output_dir", tmp_path)
    process = forks.start(*command, pause=["collect_logits", 600])
    forks.wait_for("pausing")
    before = files(tmp_path)
    second = Forks(tmp_path_factory.mktemp("log") / "log")
    for flags in ((), ("--overwrite",)):
        *_, line = second.run(*command, *flags, status=2).splitlines()
        assert line.startswith("Vanilla-cross-entropy.py: error: another process is training in")
        assert "Traceback" not in second.said
        assert files(tmp_path) == before
    second.server.communicate()
    os.kill(process, signal.SIGKILL)
    assert forks.end() == -signal.SIGKILL
    assert (tmp_path / "digits/shallownet/vanilla/seed0/.lock").exists()
    forks.run(*command)


# ------------------------------------------------------------------------------ disk full, diverged


def assert_refused_but_whole(forks, said: str, folder: Path) -> None:
    """One line says that a file cannot be written; those that are there can be used."""
    *_, line = said.splitlines()
    assert re.search(r": error: cannot write .*; any earlier file is untouched$", line), said
    assert "Traceback" not in said
    assert not list(folder.rglob("*.tmp"))
    for path in folder.rglob("best.pt"):
        checkpoint.load(path)
    for path in folder.rglob("last.pt"):
        checkpoint.read_tensors(path)


def test_a_full_disk_at_every_write_leaves_the_earlier_files_whole(forks, tmp_path):
    command = (*SEARCH, 0.05, 0.3)
    forks.run(*command, "--output_dir", tmp_path / "whole")
    folder = tmp_path / "full"
    for moment in range(1, 200):
        forks.start(*command, "--output_dir", folder, full_at=moment)
        status = forks.end()
        if status == 0:
            break
        assert status == 2, forks.said
        assert_refused_but_whole(forks, forks.said, folder)
        if moment % 4 == 0:  # each of the others finds what the one before it has left
            forks.run(*command, "--output_dir", folder)
            assert_same_outcome(folder, tmp_path / "whole")
            shutil.rmtree(folder)
    assert moment > 12
    assert_same_outcome(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("file", "share"), [("last.pt", 0.9), ("best.pt", 0.5), ("config.json", 0.9)]
)
def test_a_file_size_limit_leaves_the_earlier_checkpoint_whole(
    forks, teacher, tmp_path, file, share
):
    """Halfway through the tensors, where torch.save does not say that the disk is full."""
    command = (*VANILLA, "--epochs", 3, "--save_every", 0, "--output_dir", tmp_path)
    forks.run(*command, kill_at=12, status=-signal.SIGKILL)
    limit = int(share * (teacher.parent / file).stat().st_size)
    said = forks.run(*command, limit=limit, status=2)
    assert "File too large" in said
    assert_refused_but_whole(forks, said, tmp_path)
    assert list(tmp_path.rglob("best.pt"))
    forks.run(*command)
    assert_same_outcome(tmp_path, teacher.parents[4])


def test_a_full_file_system_leaves_the_earlier_checkpoint_whole(forks, teacher, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only who may mount file systems can make a small one")
    try:
        command = (*VANILLA, "--epochs", 3, "--save_every", 0, "--output_dir", tmp_path)
        forks.run(*command, kill_at=12, status=-signal.SIGKILL)
        with suppress(OSError), open(tmp_path / "filler", "wb") as filler:
            while filler.write(bytes(4096)):
                filler.flush()
        said = forks.run(*command, status=2)
        assert "No space left on device" in said
        (tmp_path / "filler").unlink()
        assert_refused_but_whole(forks, said, tmp_path)
        assert list(tmp_path.rglob("best.pt"))
        forks.run(*command)
        assert_same_outcome(tmp_path, teacher.parents[4])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_loss_that_diverges_leaves_the_last_good_checkpoint(forks, tmp_path):
    # Each step multiplies the weights by a number below -1, so they overflow after a few epochs.
    command = (
        "Vanilla-cross-entropy.py", "--model", "simple_dense", "--epochs", 30, "--estop", 0,
        "--weight_decay", 60, "--output_dir", tmp_path,
    )  # fmt: skip
    first = forks.run(*command, status=3)
    *_, line = first.splitlines()
    found = re.search(r"NaN or infinite in epoch (\d+)(, step \d+)? at learning rate 0.1;", line)
    assert found, first
    assert "try a smaller --lr" in line
    epoch = int(found[1])
    assert epoch > 1
    folder = tmp_path / "digits/simple_dense/vanilla/seed0"
    assert checkpoint.load(folder / "best.pt").training["epoch"] < epoch
    assert checkpoint.read_tensors(folder / "last.pt")["progress"]["epoch"] == epoch - 1
    before = files(tmp_path)
    again = forks.run(*command, status=3)
    assert again.splitlines()[-1] == line
    assert f"continued after epoch {epoch - 1}, step 0" in again
    after = files(tmp_path)
    assert [name for name in before if before[name] != after[name]] == []
