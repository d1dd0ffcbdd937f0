"""One training by several processes, started by torchrun as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, run, stopped_script, weights
from torch import nn

from utils import distributed
from utils.errors import InputError

FLAGS = ("--precision", "float32", "--lr", 0.02, "--epochs", 3, "--batch_size", 99)


def start_torchrun(*command) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    return subprocess.Popen(
        [sys.executable, *map(str, (*launcher, *command))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def torchrun(*command) -> str:
    process = start_torchrun(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{command}\n{out}\n{err}"
    return out


@pytest.mark.parametrize(
    ("script", "flags", "why"),
    [
        ("Models-evaluation.py", ("runs",), "evaluation is of one process"),
        (
            "Hyperparameter-study.py",
            ("--model", "lenet"),
            "a study's workers each train",
        ),
    ],
)
def test_scripts_of_one_process_are_not_for_torchrun(script, flags, why, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"started by torchrun, but {why}" in refused(script, *flags)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes on this machine, but it has 2 GPUs; --nproc"):
        distributed.start(torch.device("cuda"))


def history(folder: Path, method: str) -> pd.DataFrame:
    (path,) = folder.glob(f"digits/*/{method}/seed0/history.csv")
    return pd.read_csv(path)


def assert_same_curve(one: pd.DataFrame, other: pd.DataFrame, tolerance: float) -> None:
    assert list(one.columns) == list(other.columns)
    for name in ("train_loss", "validation_log_loss", "validation_accuracy"):
        assert one[name].tolist() == pytest.approx(other[name].tolist(), abs=tolerance), name


def test_without_batch_norm_the_loss_curve_is_that_of_one_process(tmp_path):
    """The instance-based script trains its teacher too. Two processes share batches of 99 images,
    and the 61 of the last, unequally."""
    command = ("Instance-based-smoothing.py", "--model", "simple_dense", *FLAGS, "--output_dir")
    run(*command, tmp_path / "one")
    said = torchrun(*command, tmp_path / "two")
    assert said.count("epoch   3/3") == 2, "the teacher's and the network's, said once each"
    for method in ("vanilla", "instance-based-ils2"):
        curves = [history(tmp_path / name, method) for name in ("one", "two")]
        assert_same_curve(*curves, tolerance=1e-5)
        assert curves[0]["train_loss"].iloc[-1] < 0.9 * curves[0]["train_loss"].iloc[0]
    folders = [tmp_path / name / "digits/simple_dense/vanilla/seed0" for name in ("one", "two")]
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]

    student = ("Network-distillation.py", "--teacher", folders[0] / "best.pt", "--student")
    # Not Adam, which divides by what may be rounding alone.
    student += ("simple_dense", "--scale_teacher", "yes", *FLAGS, "--optimizer", "sgd")
    student += ("--output_dir",)
    run(*student, tmp_path / "one")
    torchrun(*student, tmp_path / "two")
    method = "distilled-simple_dense-vanilla-scaled"
    assert_same_curve(
        *(history(tmp_path / name, method) for name in ("one", "two")), tolerance=1e-4
    )


def test_what_one_process_has_begun_several_go_on_with(tmp_path):
    command = ("Vanilla-cross-entropy.py", "--model", "simple_dense", *FLAGS, "--epochs", 1)
    command += ("--batch_size", 20, "--output_dir")
    run(*command, tmp_path / "one")
    script = stopped_script(tmp_path, "vanilla", '{"loss": F.cross_entropy(logits, labels)}', 30)
    run(script, *command[1:], tmp_path / "two", status=128 + signal.SIGTERM)
    assert "continued after epoch 0, step 30" in torchrun(*command, tmp_path / "two")
    curves = [history(tmp_path / name, "vanilla") for name in ("one", "two")]
    assert_same_curve(*curves, tolerance=1e-5)


def test_with_batch_norm_the_loss_curve_is_that_of_one_process_but_for_rounding(tmp_path):
    command = ("Vanilla-cross-entropy.py", "--model", "densenet", *FLAGS, "--lr", 0.001)
    command += ("--tr_size", 0.2, "--output_dir")
    run(*command, tmp_path / "one")
    torchrun(*command, tmp_path / "two")
    assert_same_curve(*(history(tmp_path / name, "vanilla") for name in ("one", "two")), 1e-3)


def test_statistics_of_batch_norm_are_those_of_the_whole_batch(tmp_path):
    """Values, running statistics and gradients, of 19 images that two processes share."""
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n")
    with program.open("a") as file:
        file.write("import test_distributed; test_distributed.compare_batch_norm()\n")
    assert torchrun(program).strip() == "compared"


def compare_batch_norm() -> None:
    """One of the processes of the test above."""
    distributed.start(torch.device("cpu"))
    rank, count = distributed.shard()
    draw = torch.Generator().manual_seed(0)
    images, factors = torch.randn(19, 2, 8, 8, generator=draw), torch.rand(19, 10, generator=draw)
    images += 30  # a mean that is large beside the deviation

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
            nn.BatchNorm1d(10, affine=False),
        )  # fmt: skip

    whole, shared = network(), network()
    parallel = distributed.over_processes(shared)
    for _ in range(2):
        expected = whole(images)
        (expected * factors).mean().backward()
        part = slice(rank, None, count)
        logits = parallel(images[part])
        weight = len(images[part]) * count / len(images)
        ((logits * factors[part]).mean() * weight).backward()
        torch.testing.assert_close(logits, expected[part], rtol=1e-3, atol=1e-3)
    for one, other in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    print("compared")
    distributed.end()


def test_a_process_that_dies_ends_the_job_in_words_and_the_next_start_goes_on(tmp_path):
    command = ("Label-smoothing.py", "--model", "simple_dense", *FLAGS, "--epochs", 40)
    process = start_torchrun(*command, "--output_dir", tmp_path / "killed")
    last = tmp_path / "killed/digits/simple_dense/label-smoothing/seed0/last.pt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this training has ended" in err
    assert "RuntimeError" not in err.partition("ChildFailedError")[0].replace("error_file", ""), err
    said = torchrun(*command, "--output_dir", tmp_path / "killed")
    assert "continued after epoch" in said
    torchrun(*command, "--output_dir", tmp_path / "whole")
    one, other = (weights(tmp_path / name / "digits/simple_dense/label-smoothing/seed0/best.pt")
                  for name in ("killed", "whole"))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--batch_size", 1, "--model", "simple_dense"),
            "--batch_size 1 and 1150 training images, but 2 processes",
        ),
        (
            ("--tr_size", 0.0007, "--model", "simple_dense"),
            "--batch_size 512 and 1 training images, but 2 processes",
        ),
        (
            ("--model", "timm/test_efficientnet"),
            "timm-test_efficientnet has BatchNormAct2d, whose statistics 2 processes cannot share",
        ),
    ],
)
def test_what_several_processes_cannot_train_is_refused(tmp_path, flags, expected):
    process = start_torchrun("Label-smoothing.py", *flags, "--output_dir", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert expected in err
    assert "InputError" not in err  # which a traceback would name
    assert not list(tmp_path.iterdir())
