"""benchmarks/throughput.py through its command line. What it measures is no matter of a test."""

import math

import pandas as pd
import torch
from conftest import run

RATES = (
    "ceiling", "ours", "ours_crop", "ils_stored", "ils_live", "plain",
    "evaluation", "evaluation_ceiling",
)  # fmt: skip
RATIOS = (
    "ours/ceiling", "ours_crop/ceiling", "ours/plain", "time ils_stored/ours",
    "time ils_live/ours_crop", "evaluation/ceiling", "matmul_share",
)  # fmt: skip


def test_a_row_for_each_network_with_rates_ratios_hardware_and_versions(tmp_path):
    table = tmp_path / "throughput.csv"
    said = run(
        "benchmarks/throughput.py", "--networks", "simple_dense", "--rounds", 2, "--seconds", 0.01,
        "--batch_size", 32, "--precision", "float32", "--device", "cpu", "--memory_epochs", 3,
        "--output", table,
    ).out  # fmt: skip
    (row,) = pd.read_csv(table).to_dict("records")
    assert row["network"] == "simple_dense"
    assert (row["batch_size"], row["precision"], row["compile"]) == (32, "float32", False)
    for name in (*RATES, *RATIOS, "epoch_rest"):
        assert math.isfinite(row[name]), name
        assert row[name] > 0 or name == "epoch_rest", name  # a difference, of very few steps here
        assert f"\n{name} " in said
    assert row["torch"] == torch.__version__
    assert row["device"] in said.splitlines()[0]
    assert row["threads"] >= 1
    assert "resident memory: " in said


def test_bad_input_is_one_line():
    said = run("benchmarks/throughput.py", "--networks", "resnet19", status=2)
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "'resnet19' given (did you mean resnet18?)" in line
