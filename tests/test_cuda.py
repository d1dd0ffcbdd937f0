"""The scripts on a GPU, through their command line: `python -m pytest -m cuda` runs these."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run, same_bits, start, stopped_script, write_image

from utils.losses import VARIANTS

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
FLAGS = ("--model", "resnet18", "--batch_size", 64, "--device", DEVICE)


def test_train_distil_and_evaluate(tmp_path):
    flags = (*FLAGS, "--epochs", 5, "--output_dir", tmp_path / "runs")
    run("Instance-based-smoothing.py", *flags)
    student = ("--device", DEVICE, "--batch_size", 64, "--epochs", 10)
    student = (*student, "--output_dir", tmp_path / "runs")
    run("Network-distillation.py", "--teacher", tmp_path / "runs", *student)
    results = {}
    for device in (DEVICE, "cpu"):
        folder = tmp_path / device
        run("Models-evaluation.py", tmp_path / "runs", "--device", device, "--output_dir", folder)
        table = pd.read_csv(folder / "results.csv").set_index(["checkpoint", "split", "scaling"])
        results[device] = table
    assert len(results[DEVICE]) == 6 * 4  # two teachers and four students
    for (path, split, scaling), row in results[DEVICE].iterrows():
        said = json.loads(Path(path).with_name("metrics.json").read_text())
        said = said[split][{"no": "unscaled", "yes": "scaled"}[scaling]]
        assert row["log_loss"] == pytest.approx(said["log_loss"], abs=1e-6)
        on_cpu = results["cpu"].loc[(path, split, scaling)]
        assert row["log_loss"] == pytest.approx(on_cpu["log_loss"], abs=1e-4)
        assert row["accuracy"] > 0.5  # of ten classes
    config = json.loads((tmp_path / "runs/digits/resnet18/vanilla/seed0/config.json").read_text())
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    expected = "bfloat16" if native else "float32"
    assert config["settings"]["recipe"]["precision"] == expected


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("Label-smoothing.py", ()),
        ("Label-relaxation.py", ()),
        ("Focal-loss.py", ()),
        ("Confidence-penalty.py", ()),
        *(("Instance-based-smoothing.py", ("--variant", name)) for name in VARIANTS),
    ],
)
def test_every_loss_learns(script, flags, tmp_path):
    """Of cropped images, so a teacher sees each batch; by deterministic algorithms alone."""
    flags = (*flags, "--model", "shallownet", "--batch_size", 64, "--device", DEVICE)
    flags = (*flags, "--augment", "crop", "--deterministic")
    flags = (*flags, "--epochs", 10, "--optimizer", "adam", "--lr", 0.003)
    run(script, *flags, "--output_dir", tmp_path)
    (path,) = (p for p in tmp_path.rglob("metrics.json") if "vanilla" not in p.parts)
    assert json.loads(path.read_text())["test"]["unscaled"]["accuracy"] > 0.5  # of ten classes


@pytest.mark.parametrize(
    ("model", "optimizer", "lr"),
    [("resnet18", "sgd", 0.1), ("resnet18", "adam", 0.001), ("shallownet", "sgd", 0.01)],
)
def test_deterministic_runs_give_the_same_bits_also_when_stopped(model, optimizer, lr, tmp_path):
    """shallownet has dropout, whose random numbers are the GPU's."""
    flags = ("Vanilla-cross-entropy.py", *FLAGS, "--model", model, "--optimizer", optimizer)
    flags = (*flags, "--lr", lr, "--deterministic", "--epochs", 4)
    best = f"digits/{model}/vanilla/seed0/best.pt"
    for name in ("one", "two"):
        run(*flags, "--output_dir", tmp_path / name)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = start(*flags, "--output_dir", tmp_path / "stopped", env=unbuffered)
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=300)
    assert process.returncode == 143
    run(*flags, "--output_dir", tmp_path / "stopped")
    for name in ("two", "stopped"):
        assert same_bits(tmp_path / "one" / best, tmp_path / name / best)


@pytest.mark.parametrize("devices", [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_run_goes_on_where_there_is_a_gpu_and_where_there_is_none(devices, tmp_path):
    script = stopped_script(tmp_path, "own", '{"loss": F.cross_entropy(logits, labels)}', step=30)
    flags = ("--model", "shallownet", "--batch_size", 64, "--epochs", 3, "--precision", "float32")
    command = (script, *flags, "--output_dir", tmp_path, "--device")
    run(*command, devices[0], status=128 + signal.SIGTERM)
    assert "continued after epoch 1, step" in run(*command, devices[1]).out


def test_images_are_decoded_by_workers_beside_a_gpu(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(120):
        place = tmp_path / ("train" if number < 80 else "test") / ("ant", "bee")[number % 2]
        write_image(place / f"{number}.png", draw.integers(256, size=(32, 32, 3), dtype=np.uint8))
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path, "--model", "shallownet")
    flags = (*flags, "--batch_size", 16, "--epochs", 2, "--device", DEVICE, "--deterministic")
    for streamed in ("yes", "no"):
        flags_of = ("--stream", streamed, *(("--workers", 2) if streamed == "yes" else ()))
        run("Vanilla-cross-entropy.py", *flags, *flags_of, "--output_dir", tmp_path / streamed)
    best = "imagefolder/shallownet/vanilla/seed0/best.pt"
    assert same_bits(tmp_path / "yes" / best, tmp_path / "no" / best)


def test_a_compiled_network_learns(tmp_path):
    flags = (*FLAGS, "--compile", "--epochs", 2, "--output_dir", tmp_path)
    said = run("Vanilla-cross-entropy.py", *flags)
    assert "epoch   2/2" in said.out
