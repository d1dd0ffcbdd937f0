"""Real Fashion-MNIST through the real scripts.

All 60000 + 10000 images; a small network for three epochs. The bounds are what a sound chain clears
with room to spare and a broken one does not: labels or images in a wrong order give 10 %, a split
that leaks or a validation on training images would not move them, so test and validation are
compared as well; a wrong scale of the pixels or of the loss costs more than the room.
"""

import json

import pandas as pd
import pytest
from conftest import run

FLAGS = (
    "--dataset", "fashionmnist", "--model", "lenet", "--epochs", 3, "--batch_size", 256,
    "--seed", 1,
)  # fmt: skip


@pytest.mark.usefixtures("fashion_mnist")
def test_three_epochs_on_real_images(tmp_path):
    data = ("--data_dir", tmp_path / "data")
    run("Vanilla-cross-entropy.py", *FLAGS, *data, "--output_dir", tmp_path / "runs")
    folder = tmp_path / "runs/fashionmnist/lenet/vanilla/seed1"
    metrics = json.loads((folder / "metrics.json").read_text())
    test, validation = metrics["test"]["unscaled"], metrics["validation"]["unscaled"]
    assert 0.83 < test["accuracy"] < 0.92
    assert 0.25 < test["log_loss"] < 0.47
    assert test["ece"] < 0.04
    assert abs(test["accuracy"] - validation["accuracy"]) < 0.02
    assert abs(test["log_loss"] - validation["log_loss"]) < 0.05
    history = pd.read_csv(folder / "history.csv")
    assert history["train_loss"].is_monotonic_decreasing
    # Training on the training split, validation on images that it has not seen: close, not equal.
    assert 0 < abs(history["train_loss"].iloc[-1] - validation["log_loss"]) < 0.1

    run(
        "Models-evaluation.py", tmp_path / "runs", *data, "--output_dir", tmp_path / "evaluation"
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "evaluation/results.csv")
    row = table[(table["split"] == "test") & (table["scaling"] == "no")].iloc[0]
    assert row["accuracy"] == pytest.approx(test["accuracy"], abs=1e-4)
    assert row["log_loss"] == pytest.approx(test["log_loss"], rel=1e-4)
