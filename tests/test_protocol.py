"""The protocol of the LR paper: images split anew, the last epoch kept, trained again on all."""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import run, run_here

from utils import checkpoint, data_loader, training

FLAGS = ("--model", "simple_dense", "--epochs", 3, "--batch_size", 64, "--protocol", "lr")
FLAGS += ("--precision", "float32", "--lr", 0.05)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocol")
    flags = ("--smoothing", 0.05, 0.6, "--select_by", "ece", "--output_dir", folder / "runs")
    said = run("Instance-based-smoothing.py", *FLAGS, *flags).out
    return folder, said


def test_the_network_selected_is_trained_again_on_the_validation_split_too(runs):
    folder, said = runs
    place = folder / "runs/digits/simple_dense/instance-based-ils2/seed0"
    assert {path.name for path in place.iterdir()} - {".lock"} == {
        "config.json", "history.csv", "best.pt", "last.pt", "metrics.json", "search.csv",
        "selection",
    }  # fmt: skip
    selected = checkpoint.load(place / "selection/best.pt")
    kept = checkpoint.load(place / "best.pt")
    assert selected.training["trained_on"] == "train"
    assert kept.training["trained_on"] == "train+validation"
    assert kept.training["epoch"] == selected.training["epoch"] == 3, "the last epoch is kept"
    assert kept.training["hyper_parameters"] == selected.training["hyper_parameters"]
    assert kept.temperature == selected.temperature
    history = pd.read_csv(place / "history.csv")
    assert list(history.columns) == ["epoch", "learning_rate", "train_loss"]

    search = pd.read_csv(place / "search.csv")
    assert list(search["selected"]) == list(
        search["validation_ece"] == search["validation_ece"].min()
    )
    chosen = search.loc[search["selected"], "smoothing"].item()
    assert kept.training["hyper_parameters"]["smoothing"] == chosen
    assert "selected by validation ece" in said


def test_the_teacher_has_not_seen_what_its_pupils_are_selected_on(runs):
    folder, said = runs
    teacher = folder / "runs/digits/simple_dense/vanilla/seed0/selection/best.pt"
    assert f"teacher: {teacher}" in said
    assert checkpoint.load(teacher).training["trained_on"] == "train"
    assert "warning" not in said


def test_a_teacher_that_has_seen_test_images_is_refused(runs, refused):
    folder, _ = runs
    teacher = folder / "runs/digits/simple_dense/vanilla/seed0/best.pt"
    flags = ("--model", "simple_dense", "--output_dir", folder / "leak", "--teacher", teacher)
    error = refused("Instance-based-smoothing.py", *flags)
    assert f"the teacher {teacher} was trained on" in error
    assert "of the 360 test images of this run" in error
    student = ("--seed", 1, "--output_dir", folder / "leak")
    error = refused("Network-distillation.py", "--teacher", teacher, *student)
    assert "test images of this run" in error
    assert not (folder / "leak").exists()


def test_a_teacher_that_has_seen_validation_images_names_the_one_that_has_not(runs):
    folder, _ = runs
    place = folder / "runs/digits/simple_dense/vanilla/seed0"
    flags = ("--epochs", 1, "--scale_teacher", "no", "--precision", "float32")
    distil = ("Network-distillation.py", *flags, "--teacher")
    said = run(*distil, place / "best.pt", "--output_dir", folder / "seen")
    assert "of the 239 validation images of this run" in said.err
    assert "(that in its folder selection has not seen them)" in said.err
    # Where the teacher is elsewhere, the next command names it too.
    assert f"Models-evaluation.py {place / 'best.pt'} {folder / 'seen'}" in said.out
    said = run(*distil, place / "selection/best.pt", "--output_dir", folder / "unseen")
    assert "warning" not in said.err


def test_each_seed_takes_its_own_teacher_which_has_not_seen_what_selects(tmp_path):
    flags = (*FLAGS, "--epochs", 1, "--trials", 2, "--output_dir")
    run("Vanilla-cross-entropy.py", *flags, tmp_path / "teachers")
    teachers = tmp_path / "teachers/digits/simple_dense/vanilla"
    ils = ("Instance-based-smoothing.py", *flags)
    selected = [teachers / f"seed{seed}/selection/best.pt" for seed in (0, 1)]
    for name, given in (("folder", [teachers]), ("files", selected)):
        said = run(*ils, tmp_path / name, "--teacher", *given)
        assert "warning" not in said.err
        assert all(f"teacher: {teacher}" in said.out for teacher in selected)
    shutil.rmtree(teachers / "seed1")
    error = run(*ils, tmp_path / "one", "--teacher", teachers, status=2).err
    assert "--teacher names 0 checkpoints for seed 1; one file for all seeds, or" in error


def test_a_teacher_of_another_protocol_is_named(refused, tmp_path):
    flags = ("--model", "simple_dense", "--epochs", 1, "--output_dir", tmp_path)
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    error = refused("Instance-based-smoothing.py", *flags, "--protocol", "lr")
    assert "vanilla/seed0/best.pt was not trained with --protocol lr" in error


def test_the_evaluation_takes_the_temperature_of_the_network_selected(runs):
    folder, _ = runs
    run("Models-evaluation.py", folder / "runs", "--output_dir", folder / "tables")
    results = pd.read_csv(folder / "tables/results.csv")
    assert set(results["split"]) == {"test"}, "nothing else is held out"
    for method in ("vanilla", "instance-based-ils2"):
        place = folder / f"runs/digits/simple_dense/{method}/seed0"
        metrics = json.loads((place / "metrics.json").read_text())
        for scaling, name in (("no", "unscaled"), ("yes", "scaled")):
            (row,) = results[
                (results["method"] == method) & (results["scaling"] == scaling)
            ].to_dict("records")
            for metric in ("accuracy", "log_loss", "ece"):
                assert row[metric] == pytest.approx(metrics["test"][name][metric], rel=1e-4)
        assert len(set(results["test_images"])) == 1


def test_a_student_is_told_that_its_teacher_saw_the_validation_images(runs):
    folder, _ = runs
    done = run(
        "Network-distillation.py", "--teacher", folder / "runs/digits/simple_dense/vanilla",
        "--student", "simple_dense", "--scale_teacher", "no", "--epochs", 1,
        "--output_dir", folder / "students",
    )  # fmt: skip
    assert "was trained on 239 of the 239 validation images" in done.err
    (student,) = checkpoint.find([str(folder / "students")])
    assert checkpoint.load(student).data["protocol"] == "lr"
    done = run("Models-evaluation.py", student, "--output_dir", folder / "students/tables")
    assert "trained on 239 of its 239 validation images, so its temperature" in done.err


def test_what_keeps_the_last_epoch_has_no_early_stop(refused, tmp_path):
    said = refused(
        "Label-smoothing.py", *FLAGS, "--estop", 3, "--output_dir", tmp_path, written=tmp_path
    )
    assert "--estop 3 given, but --protocol lr keeps the last of all epochs; 0 expected" in said


@pytest.mark.parametrize(
    ("by", "expected"), [("accuracy", 2), ("log_loss", 1), ("ece", 3)]
)  # fmt: skip
def test_selection_takes_the_best_and_among_equals_the_lowest_log_loss(by, expected):
    table = pd.DataFrame(
        {
            "validation_accuracy": [0.9, 0.8, 0.9, 0.7],
            "validation_log_loss": [0.5, 0.3, 0.4, 0.6],
            "validation_ece": [0.02, 0.03, 0.02, 0.01],
        }
    )
    assert training.select(table, by) == expected


def test_all_images_are_used_and_the_test_split_is_another_for_each_seed():
    digits = data_loader.load("digits")
    splits = [data_loader.split(digits, 5 / 6, seed, "lr") for seed in range(3)]
    assert [len(part) for part in splits[0]] == [1198, 239, 360]
    tested = torch.cat([split.test for split in splits]).unique()
    assert len(tested) > 2.4 * 360
