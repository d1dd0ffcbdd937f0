"""Every script through its real command line, on real images (scikit-learn's digits)."""

import hashlib
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run, run_here, same_bits, weights

from utils import training

FAST = ("--model", "shallownet", "--epochs", 3, "--batch_size", 128)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The README's chain: a teacher is trained by itself, then distilled, then all is evaluated."""
    folder = tmp_path_factory.mktemp("chain")
    output = ("--output_dir", folder / "runs")
    said = {}
    said["ils"] = run("Instance-based-smoothing.py", *FAST, *output, "--trials", 2)
    said["ls"] = run("Label-smoothing.py", *FAST, *output, "--trials", 2)
    said["lr"] = run("Label-relaxation.py", *FAST, *output)
    said["distil"] = run(
        "Network-distillation.py", "--teacher", folder / "runs/digits/shallownet",
        "--epochs", 2, *output,
    )  # fmt: skip
    said["evaluate"] = run(
        "Models-evaluation.py", folder / "runs", "--output_dir", folder / "evaluation"
    )
    return folder, said


def test_the_teacher_is_trained_when_there_is_none_and_found_when_there_is(runs):
    folder, said = runs
    assert said["ils"].out.count("it is trained first") == 2
    vanilla = folder / "runs/digits/shallownet/vanilla/seed0/best.pt"
    assert vanilla.exists()
    content = torch.load(
        folder / "runs/digits/shallownet/instance-based-ils2/seed0/best.pt", weights_only=True
    )
    assert content["teacher"]["method"] == "vanilla"
    assert content["training"]["hyper_parameters"] == {
        "variant": "ils2", "smoothing": 0.1, "temperature": 1.0,
    }  # fmt: skip
    # The vanilla script takes the teacher for its own run: the settings are the same.
    again = run("Vanilla-cross-entropy.py", *FAST, "--output_dir", folder / "runs")
    assert "finished earlier" in again.out


def test_how_to_select_is_no_setting_where_nothing_is_selected(capsys, tmp_path):
    flags = ("--model", "simple_dense", "--epochs", 1, "--output_dir", tmp_path)
    assert not run_here("Vanilla-cross-entropy.py", *flags, "--select_by", "accuracy")
    capsys.readouterr()
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    assert "finished earlier" in capsys.readouterr().out


def test_a_finished_run_of_other_code_is_pointed_out(capsys, tmp_path):
    flags = ("--model", "simple_dense", "--epochs", 1, "--output_dir", tmp_path)
    config = tmp_path / "digits/simple_dense/vanilla/seed0/config.json"
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    content = json.loads(config.read_text())
    code = content["environment"]["code"]
    assert {"Vanilla-cross-entropy.py", "utils/losses.py", "models/simple_dense.py"} <= code.keys()
    for name, digest in code.items():
        assert digest == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
    code["utils/losses.py"] = "0" * 64
    config.write_text(json.dumps(content))
    capsys.readouterr()
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    said = capsys.readouterr()
    assert "finished earlier" in said.out
    changed = f"warning: since {config.parent} was trained, or begun, utils/losses.py changed; "
    assert changed in said.err
    capsys.readouterr()
    assert not run_here("Vanilla-cross-entropy.py", *flags, "--overwrite")
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    assert "warning" not in capsys.readouterr().err


def test_a_temperature_that_was_not_fitted_is_not_called_so(capsys, tmp_path):
    perfect = {"accuracy": 1.0, "log_loss": 0.1, "ece": 0.1}
    scalings = {"unscaled": perfect, "scaled": perfect}
    metrics = {"epoch": 1, "temperature": 1.0, "ece_bins": 10, "validation": scalings}
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "test": scalings}))
    training._print_metrics(tmp_path / "metrics.json")
    said = capsys.readouterr().out
    assert "temperature 1.000 not fitted: every validation label has the largest logit" in said


def test_a_run_leaves_the_files_that_are_promised(runs):
    folder, said = runs
    run_folder = folder / "runs/digits/shallownet/label-smoothing/seed1"
    assert {path.name for path in run_folder.iterdir()} - {".lock"} == {
        "config.json", "history.csv", "best.pt", "last.pt", "metrics.json",
    }  # fmt: skip
    assert f"checkpoint: {run_folder / 'best.pt'}" in said["ls"].out
    lines = said["ls"].out.strip().splitlines()
    assert lines[-2] == f"  python Models-evaluation.py {folder / 'runs/digits'}"
    assert lines[-1].startswith(f"  python Network-distillation.py --teacher {run_folder.parent}")
    assert lines[-1].endswith(f"/seed1/best.pt --output_dir {folder / 'runs'}")
    history = pd.read_csv(run_folder / "history.csv")
    assert list(history["epoch"]) == [1, 2, 3]
    config = json.loads((run_folder / "config.json").read_text())
    assert config["settings"]["hyper_parameters"] == {"smoothing": [0.1]}
    assert config["environment"]["torch"] == torch.__version__
    metrics = json.loads((run_folder / "metrics.json").read_text())
    best = history.loc[history["validation_log_loss"].idxmin()]
    assert metrics["epoch"] == best["epoch"]
    # The one in float32, the other in the precision of the training.
    assert math.isclose(
        metrics["validation"]["unscaled"]["log_loss"], best["validation_log_loss"], rel_tol=0.02
    )
    # Digits are learnt in three epochs; chance is 10 %.
    assert metrics["test"]["unscaled"]["accuracy"] > 0.85
    scaled = metrics["validation"]["scaled"]["log_loss"]
    assert scaled <= metrics["validation"]["unscaled"]["log_loss"] + 1e-9


def test_the_evaluation_agrees_with_what_the_runs_said_and_with_scikit_learn(runs):
    from sklearn.metrics import accuracy_score
    from sklearn.metrics import log_loss as sklearn_log_loss

    from utils import checkpoint, data_loader

    folder, _ = runs
    table = pd.read_csv(folder / "evaluation/results.csv")
    # 7 networks and 2 students of each; 2 splits, without and with scaling.
    assert len(table) == 7 * 3 * 2 * 2
    for path, rows in table[table["split"] == "test"].groupby("checkpoint"):
        metrics = json.loads((folder / path).with_name("metrics.json").read_text())
        unscaled = rows[rows["scaling"] == "no"].iloc[0]
        for name in ("accuracy", "log_loss", "ece"):
            assert math.isclose(unscaled[name], metrics["test"]["unscaled"][name], abs_tol=1e-6)
    # One of them from nothing but torch and scikit-learn.
    path = folder / "runs/digits/shallownet/vanilla/seed1/best.pt"
    trained = checkpoint.load(path)
    data, splits = data_loader.reload(trained.data, "data", torch.device("cpu"))
    images = data.images[splits.test].permute(0, 3, 1, 2)
    with torch.no_grad():
        probabilities = trained.model(images).double().softmax(1).numpy()
    labels = data.labels[splits.test].numpy()
    row = table[(table["checkpoint"] == str(path)) & (table["split"] == "test")]
    row = row[row["scaling"] == "no"].iloc[0]
    assert row["accuracy"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    assert row["log_loss"] == pytest.approx(sklearn_log_loss(labels, probabilities), rel=1e-6)


def test_the_summary_is_mean_and_sample_deviation_with_the_students_beside(runs):
    folder, said = runs
    table = pd.read_csv(folder / "evaluation/results.csv")
    summary = pd.read_csv(folder / "evaluation/summary.csv")
    assert len(summary) == 4 * 2  # vanilla, ILS2, LS, LR; without and with scaling
    vanilla = table[(table["method"] == "vanilla") & (table["split"] == "test")]
    for scaling in ("no", "yes"):
        values = vanilla[vanilla["scaling"] == scaling]["log_loss"].to_numpy()
        row = summary[(summary["training"] == "vanilla") & (summary["scaling"] == scaling)].iloc[0]
        assert row["seeds"] == 2
        assert row["log_loss_mean"] == pytest.approx(np.mean(values))
        assert row["log_loss_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        suffix = "-scaled" if scaling == "yes" else ""
        students = [
            json.loads(
                (
                    folder / f"runs/digits/shallownet/distilled-shallownet-vanilla{suffix}"
                    f"/seed{seed}/metrics.json"
                ).read_text()
            )["test"]["unscaled"]["accuracy"]
            for seed in (0, 1)
        ]
        assert row["student_accuracy_mean"] == pytest.approx(np.mean(students), abs=1e-6)
    markdown = (folder / "evaluation/summary.md").read_text()
    assert markdown in said["evaluate"].out
    assert "ECE (10 bins)" in markdown
    assert "Numbers of unequal seeds are not ranked" in markdown  # label relaxation has one seed
    assert "±" in markdown


def test_the_students_log_both_terms_and_minimise_their_mixture(runs):
    folder, _ = runs
    history = pd.read_csv(
        folder / "runs/digits/shallownet/distilled-shallownet-vanilla/seed0/history.csv"
    )
    mixture = 0.9 * history["train_distillation"] + 0.1 * history["train_classification"]
    np.testing.assert_allclose(history["train_loss"], mixture, rtol=1e-5)


def test_trials_equal_seed_by_seed_and_a_run_is_repeatable_bit_for_bit(runs, tmp_path):
    folder, _ = runs
    run("Vanilla-cross-entropy.py", *FAST, "--seed", 1, "--output_dir", tmp_path)
    name = "digits/shallownet/vanilla/seed1/"
    assert same_bits(folder / "runs" / name / "best.pt", tmp_path / name / "best.pt")
    for file in ("history.csv", "metrics.json"):
        assert (folder / "runs" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.parametrize(
    ("script", "method", "flags"),
    [
        ("Label-smoothing.py", "label-smoothing", ("--smoothing", 0)),
        ("Focal-loss.py", "focal", ("--gamma", 0)),
        ("Confidence-penalty.py", "confidence-penalty", ("--beta", 0)),
    ],
)
def test_runs_of_a_seed_are_paired(runs, tmp_path, script, method, flags):
    """With its hyper-parameter off a method is cross-entropy, so all else being equal is visible:
    initial weights, order of the images, dropout."""
    folder, _ = runs
    run(script, *FAST, *flags, "--output_dir", tmp_path)
    ours = weights(tmp_path / f"digits/shallownet/{method}/seed0/best.pt")
    vanilla = weights(folder / "runs/digits/shallownet/vanilla/seed0/best.pt")
    for name in vanilla:
        torch.testing.assert_close(ours[name], vanilla[name], rtol=1e-3, atol=1e-4)
    other = weights(folder / "runs/digits/shallownet/vanilla/seed1/best.pt")
    assert not torch.allclose(ours["network.0.weight"], other["network.0.weight"], atol=1e-2)


def test_of_several_values_the_best_on_validation_is_kept(tmp_path):
    said = run(
        "Label-smoothing.py", *FAST, "--smoothing", 0.05, 0.6, "--output_dir", tmp_path
    ).out  # fmt: skip
    folder = tmp_path / "digits/shallownet/label-smoothing/seed0"
    search = pd.read_csv(folder / "search.csv")
    assert list(search["smoothing"]) == [0.05, 0.6]
    best = search.loc[search["validation_log_loss"].idxmin()]
    assert list(search["selected"]) == list(search["smoothing"] == best["smoothing"])
    assert f"selected by validation log loss {best['validation_log_loss']:.4f}" in said
    kept = torch.load(folder / "best.pt", weights_only=True)
    assert kept["training"]["hyper_parameters"] == {"smoothing": best["smoothing"]}
    metrics = kept["metrics"]["validation"]
    assert metrics["log_loss"] == pytest.approx(best["validation_log_loss"], rel=0.02)
    assert not (folder / "candidates").exists()


@pytest.mark.parametrize("values", [(1e30, 0.1, 0.3), (1e30,), (1e30, 2e30)])
def test_of_several_values_those_that_diverge_are_left_out(tmp_path, values):
    status = 0 if 0.1 in values else 3
    flags = (*FAST, "--epochs", 1, "--output_dir", tmp_path, "--beta", *values)
    said = run("Confidence-penalty.py", *flags, status=status)
    folder = tmp_path / "digits/shallownet/confidence-penalty/seed0"
    assert said.out.count("\ndiverged: ") == (len(values) > 1) * len([v for v in values if v > 1])
    if status:
        assert "Confidence-penalty.py: diverged: " in said.err
        assert not (folder / "metrics.json").exists()
    else:
        assert list(pd.read_csv(folder / "search.csv")["beta"]) == [0.1, 0.3]
        kept = torch.load(folder / "best.pt", weights_only=True)
        assert kept["training"]["hyper_parameters"]["beta"] in (0.1, 0.3)


@pytest.mark.parametrize(
    "flags",
    [
        ("--variant", "ils1", "--shift", 0.75),
        ("--variant", "ils", "--factor", "complementary", "--temperature", 4),
        ("--variant", "scores", "--smoothing", 0.05),
        ("--variant", "class", "--temperature", 2),
    ],
)
def test_every_variant_trains(runs, tmp_path, flags):
    folder, _ = runs
    teacher = folder / "runs/digits/shallownet/vanilla/seed0/best.pt"
    run(
        "Instance-based-smoothing.py", *FAST, *flags, "--teacher", teacher,
        "--output_dir", tmp_path,
    )  # fmt: skip
    metrics = tmp_path / f"digits/shallownet/instance-based-{flags[1]}/seed0/metrics.json"
    assert json.loads(metrics.read_text())["test"]["unscaled"]["accuracy"] > 0.8


def test_a_loss_that_diverges_has_its_own_status(tmp_path):
    said = run(
        "Vanilla-cross-entropy.py", "--model", "simple_dense", "--epochs", 5, "--lr", 1e9,
        "--output_dir", tmp_path, status=3,
    )  # fmt: skip
    assert "NaN or infinite in epoch 1" in said.err
    assert "--lr" in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("[A-Z]*.py")))
def test_help_is_enough_to_work_from(script):
    text = run(script, "--help").out
    assert "GPU:" in text or script == "Synthetic-study.py"  # networks of 64 units, for a CPU
    assert "CPU:" in text
    flags = re.split(r"\n  (?=--)", text.split("options:")[1])[1:]
    assert len(flags) >= 4
    for flag in flags:
        required = flag.startswith("--teacher") and script == "Network-distillation.py"
        assert "default" in flag or "off" in flag or required, f"no default: {flag}"
