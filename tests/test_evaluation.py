"""Models-evaluation.py on checkpoints made by hand: what it reads, refuses, warns of and writes."""

import base64
import re

import pandas as pd
import pytest
import torch
from conftest import ROOT, Finished, files, run_here
from matplotlib.figure import Figure
from torch.nn import functional as F

from models import build_model
from utils import checkpoint, comparison, data_loader, plots
from utils.evaluate import calibrated_ece_by_chance

SCRIPT = "Models-evaluation.py"

TEACHER = {"weights": "0" * 64, "model": "shallownet", "method": "vanilla", "trained_on": "train"}
TEACHER |= {"seed": 5, "protocol": "ils", "tr_size": 0.8}


@pytest.fixture(scope="module")
def digits():
    return data_loader.load("digits")


@pytest.fixture(scope="module")
def make(digits):
    """Trains the smallest network for a few steps and writes it as a checkpoint."""

    def call(
        path, method="vanilla", seed=0, *, data_seed=None, smoothing=0.0, teacher=None, **more
    ):
        torch.manual_seed(seed)
        splits = data_loader.split(digits, 0.8, seed if data_seed is None else data_seed)
        model = build_model("shallownet", digits.input_shape, 10)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        images, labels = (
            digits.images.permute(0, 3, 1, 2)[splits.train],
            digits.labels[splits.train],
        )
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
            optimizer.step()
        training = {
            "method": method,
            "hyper_parameters": {},
            "requested": {},
            "seed": seed,
            "epoch": 1,
            "trained_on": "train",
            "recipe": {"lr": 0.01},
        }
        data = {
            "dataset": "digits",
            "classes": list(digits.classes),
            "image_size": None,
            "protocol": "ils",
            "tr_size": 0.8,
            "seed": seed if data_seed is None else data_seed,
            "fingerprint": digits.fingerprint,
            "splits": splits.hashes(),
            "normalisation": {"mean": [0.5], "std": [0.25]},
        }
        content = checkpoint.contents(
            model, training | more, data, teacher, 1.0, {"validation": {}}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(path, content)
        return checkpoint.weights_hash(model.state_dict())

    return call


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
    """Two methods of two seeds, and a student of each of the first."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        weights = make(folder / f"vanilla/seed{seed}/best.pt", "vanilla", seed)
        make(folder / f"ls/seed{seed}/best.pt", "label-smoothing", seed, smoothing=0.3)
        about = TEACHER | {"weights": weights, "seed": seed, "scaled": False}
        make(folder / f"student/seed{seed}/best.pt", "distilled_of", seed, teacher=about)
    return folder


@pytest.fixture
def evaluate(capsys, tmp_path):
    """Runs the script in this process: importing torch anew takes longer than its work."""

    def call(*arguments, status=0) -> Finished:
        capsys.readouterr()
        ended = run_here(SCRIPT, *arguments, "--output_dir", tmp_path / "out", "--device", "cpu")
        said = capsys.readouterr()
        assert (ended or 0) == status, said.err
        return Finished(said.out, said.err)

    return call


def test_many_checkpoints_read_the_data_set_once(evaluate, runs, monkeypatch):
    reads = []

    def counted(data_dir, read=data_loader.READERS["digits"]):
        reads.append(data_dir)
        return read(data_dir)

    monkeypatch.setitem(data_loader.READERS, "digits", counted)
    data_loader._reload.cache_clear()
    evaluate(runs, "--bootstrap", 10, "--compare")
    assert len(reads) == 1


def test_every_file_is_written_and_the_tables_are_printed(evaluate, runs, tmp_path):
    said = evaluate(runs, "--bootstrap", 100, "--compare", "--ece_bins", 7)
    out = tmp_path / "out"
    tables = [f"{name}.{kind}" for name in ("summary", "students", "comparison")
              for kind in ("csv", "md", "tex")]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"results.csv", *tables}
    for name in ("summary", "students", "comparison"):
        text = (out / f"{name}.md").read_text()
        assert text in said.out
        assert "ECE (7 bins)" in text
        assert "ECE: 7 equal-width bins (lo, hi], top label." in text
        assert "7 equal-width bins" in (out / f"{name}.tex").read_text()
    assert f"written to {out}" in said.out
    results = pd.read_csv(out / "results.csv")
    assert len(results) == 6 * 2 * 2
    assert set(results["ece_bins"]) == {7}
    test = results[results["split"] == "test"]
    for metric in comparison.METRICS:
        assert (test[f"{metric}_low"] < test[f"{metric}_high"]).all()
    for metric in ("accuracy", "log_loss", "brier"):  # unlike the ECE's, unbiased
        assert (test[f"{metric}_low"] <= test[metric]).all()
        assert (test[metric] <= test[f"{metric}_high"]).all()
    assert results[results["split"] == "validation"]["ece_low"].isna().all()
    students = pd.read_csv(out / "students.csv")
    assert list(students["training"]) == ["vanilla"]
    own = results[(results["method"] == "distilled_of") & (results["split"] == "test")]
    own = own[own["scaling"] == "no"]
    for metric in ("accuracy", "log_loss", "brier", "ece", "classwise_ece"):
        assert students[f"student_{metric}_mean"].item() == pytest.approx(own[metric].mean())
    teachers = test[(test["method"] == "vanilla") & (test["scaling"] == "no")]
    for column in ("ece", "temperature", "class_similarity"):
        assert students[f"{column}_mean"].item() == pytest.approx(teachers[column].mean())


def test_the_columns_are_those_of_the_documentation(evaluate, runs, tmp_path):
    evaluate(runs, "--bootstrap", 10, "--compare")
    text = (ROOT / "docs/evaluation.md").read_text()
    for name in ("results", "summary", "students", "comparison"):
        for column in pd.read_csv(tmp_path / f"out/{name}.csv").columns:
            if name in ("summary", "students"):  # <metric>_mean and the like
                column = column.removeprefix("student_")
                for ending in ("_mean", "_std", "_low", "_high"):
                    column = column.removesuffix(ending)
            elif name == "results":
                column = column.removesuffix("_low").removesuffix("_high")
            assert f"`{column}`" in text, f"{name}.csv: {column}"


def test_the_table_says_what_chance_alone_would_show(evaluate, runs, tmp_path, digits):
    evaluate(runs / "vanilla/seed0/best.pt")
    results = pd.read_csv(tmp_path / "out/results.csv")
    row = results[(results["split"] == "test") & (results["scaling"] == "yes")].iloc[0]
    trained = checkpoint.load(runs / "vanilla/seed0/best.pt")
    with torch.no_grad():
        images = digits.images.permute(0, 3, 1, 2)
        logits = trained.model(images[digits.train_size :]).double() / row["temperature"]
    assert row["ece_by_chance"] == pytest.approx(calibrated_ece_by_chance(logits), rel=1e-5)
    summary = pd.read_csv(tmp_path / "out/summary.csv").set_index("scaling")
    assert summary.loc["yes", "ece_by_chance_mean"] == row["ece_by_chance"]
    assert "By chance" in (tmp_path / "out/summary.md").read_text()


def test_the_comparison_pairs_seeds(evaluate, runs, tmp_path):
    evaluate(runs, "--compare", "label-smoothing")
    results = pd.read_csv(tmp_path / "out/results.csv")
    test = results[results["split"] == "test"]
    results = test.set_index(["method", "scaling", "seed"]).sort_index()
    compared = pd.read_csv(tmp_path / "out/comparison.csv")
    assert set(compared["training"]) == {"vanilla"}  # the students stand beside their teachers
    assert set(compared["seeds"]) == {2}
    for row in compared.itertuples():
        ours = results.loc[("vanilla", row.scaling), row.metric]
        theirs = results.loc[("label-smoothing", row.scaling), row.metric]
        assert row.difference == pytest.approx((ours - theirs).mean())


@pytest.mark.parametrize(
    "flags", [("--inspect", 360), ("--plots", "--tsne_classes", 0, "x"), ("--report", ".")]
)
def test_bad_flags_leave_the_tables_as_they_are(evaluate, runs, tmp_path, flags):
    evaluate(runs, "--compare")
    before = files(tmp_path)
    evaluate(runs / "ls", *flags, status=2)
    assert files(tmp_path) == before


def test_figures_and_one_page_with_all_of_it(evaluate, runs, tmp_path):
    page, drawn = tmp_path / "report.html", ("--plots", "--tsne_classes", 3, 8, "--inspect", 5)
    said = evaluate(runs, "--compare", *drawn, "--report", page)
    assert f"written to {tmp_path / 'out'} and {page}" in said.out
    named = re.findall(r"\]\((\S+\.png)\)", (tmp_path / "out/figures.md").read_text())
    assert sorted(named) == sorted(path.name for path in tmp_path.glob("out/*.png"))
    assert set(named) == {"loss-triangle.png", "inspect-digits-shallownet-5.png"} | {
        f"digits-shallownet{students}-{kind}.png"
        for students in ("", "-distilled-students")
        for kind in ("reliability", "ece-by-bins", "t-sne")  # no curves: there is no history
    }
    text = page.read_text()
    for name in named:
        assert base64.b64encode((tmp_path / "out" / name).read_bytes()).decode() in text
    for table in ("summary", "students", "comparison"):
        cell = (tmp_path / f"out/{table}.md").read_text().splitlines()[2].split("|")[2].strip()
        assert f">{cell}<" in text
    assert "--tsne_classes 3 8" in text


def test_the_classes_of_the_t_sne_are_those_asked_for(evaluate, runs, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        plots, "embedding", lambda methods, classes: chosen.append(classes) or Figure()
    )
    evaluate(runs, "--plots", "--tsne_classes", 3, 8)
    assert chosen == [[3, 8]] * 2  # of the networks, and of the students


def test_no_table_of_another_evaluation_stays(evaluate, runs, tmp_path):
    evaluate(runs, "--compare")
    evaluate(runs / "ls")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.csv", "summary.csv", "summary.md", "summary.tex"}


def test_unequal_trainings_are_not_compared_without_a_word(evaluate, runs, make, tmp_path):
    make(tmp_path / "runs/focal/best.pt", "focal", recipe={"lr": 0.02})
    said = evaluate(runs / "vanilla", tmp_path / "runs", "--compare")
    warning = "digits, shallownet: focal was trained with lr 0.02, vanilla with lr 0.01; their"
    assert f"warning: {warning}" in said.err
    assert warning in (tmp_path / "out/comparison.md").read_text()
    assert "trained with" not in evaluate(runs, "--compare").err


def test_several_networks_are_ranked(evaluate, make, tmp_path, digits):
    for method in ("vanilla", "label-smoothing"):
        smoothing = 0.3 * (method != "vanilla")
        path = tmp_path / f"runs/shallownet/{method}.pt"
        make(path, method, smoothing=smoothing)
        content = torch.load(path, weights_only=True)
        dense = build_model("simple_dense", digits.input_shape, 10)
        content |= {"weights": dense.state_dict()}
        content["model"]["name"] = "simple_dense"
        checkpoint.write_tensors(tmp_path / f"runs/{method}.pt", content)
    paths = sorted((tmp_path / "runs").rglob("*.pt"))
    said = evaluate(*paths, "--compare")
    ranks = pd.read_csv(tmp_path / "out/comparison_ranks.csv")
    assert set(ranks["blocks"]) == {2}
    assert set(ranks["training"]) == {"vanilla", "label-smoothing"}
    for metric in comparison.METRICS:
        for scaled in ("", "-scaled"):
            path = tmp_path / f"out/critical-difference-{metric}{scaled}"
            assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
            assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
            assert f"]({path.name}.png)\n" in (tmp_path / "out/figures.md").read_text()
    assert "| shallownet" in said.out
    assert "| simple_dense" in said.out


@pytest.mark.parametrize("name", ["nobody", ""])
def test_an_unknown_method_to_compare_with(name, evaluate, runs, tmp_path):
    said = evaluate(runs, "--compare", name, status=2)
    assert said.err.count("\n") == 1
    assert f"--compare {name!r} given" in said.err
    assert "label-smoothing, vanilla" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content["training"].update(selected_on="test"), "on the test split"),
        (
            lambda content: content["training"].update(temperature_fitted_on="test"),
            "its temperature was fitted on the test split",
        ),
        (
            lambda content: content["training"].update(select_by=torch.tensor(1.0)),
            "training.select_by is tensor(1.), a name expected",
        ),
        (lambda content: content["data"].update(fingerprint="0" * 64), "are not those"),
        (lambda content: content["data"]["splits"].update(test="0" * 64), "splits of digits"),
        # Finite weights whose logits are not.
        (lambda content: [w.mul_(1e30) for w in content["weights"].values() if w.ndim],
         "logits that are not finite"),
        (lambda content: content.pop("weights"), "not a checkpoint of format"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_others_are_evaluated(
    evaluate, runs, tmp_path, damage, reason
):
    content = torch.load(runs / "ls/seed0/best.pt", weights_only=True)
    damage(content)
    broken = tmp_path / "broken" / "best.pt"
    broken.parent.mkdir()
    checkpoint.write_tensors(broken, content)
    said = evaluate(broken, runs / "vanilla", status=1)
    (line,) = [line for line in said.err.splitlines() if "left out:" in line]
    assert str(broken) in line
    assert reason in line
    assert "1 of 3 checkpoints left out" in said.err
    assert set(pd.read_csv(tmp_path / "out/results.csv")["method"]) == {"vanilla"}
    alone = evaluate(broken, status=2).err
    assert f"{SCRIPT}: error: " in alone
    assert str(broken) in alone
    assert alone.count("\n") == 1


def test_what_runs_of_one_setting_differ_in_tells_them_apart(evaluate, make, tmp_path):
    several = {"requested": {"smoothing": [0.1, 0.2]}}
    for by in ("ece", "accuracy"):
        make(tmp_path / f"runs/{by}/best.pt", "ls", **several, select_by=by)
    make(tmp_path / "runs/one/best.pt", "vanilla", select_by="ece")
    make(tmp_path / "runs/two/best.pt", "vanilla", seed=1, select_by="accuracy")
    other = TEACHER | {"method": "focal"}
    for number, teacher in enumerate((TEACHER, other)):
        make(tmp_path / f"runs/ib{number}/best.pt", "ib", data_seed=5, teacher=teacher)
    evaluate(tmp_path / "runs")
    trainings = list(pd.read_csv(tmp_path / "out/summary.csv")["training"].unique())
    assert set(pd.read_csv(tmp_path / "out/results.csv")["training"]) == set(trainings)
    assert trainings == [
        "ls, smoothing 0.1 or 0.2, select_by accuracy",
        "ls, smoothing 0.1 or 0.2, select_by ece",
        "ib, teacher shallownet vanilla",
        "ib, teacher shallownet focal",
        "vanilla",  # where nothing was selected it does not matter by what
    ]


def test_long_searches_with_the_same_ends_are_told_apart(evaluate, make, tmp_path):
    for name, values in {"one": [0.1, 0.2, 0.3, 0.4], "two": [0.1, 0.15, 0.3, 0.4]}.items():
        make(tmp_path / f"runs/{name}/best.pt", "ls", requested={"smoothing": values})
    evaluate(tmp_path / "runs")
    summary = pd.read_csv(tmp_path / "out/summary.csv")
    assert summary["training"].nunique() == 2
    assert (summary["seeds"] == 1).all()
    assert summary["training"].str.startswith("ls, smoothing 0.1 or ... or 0.4, requested ").all()


def test_a_teacher_that_saw_the_validation_images_is_warned_of(evaluate, make, digits, tmp_path):
    runs = tmp_path / "runs"
    make(runs / "student/best.pt", "instance", seed=6, teacher=TEACHER)
    make(runs / "fine/best.pt", "instance", seed=7, data_seed=5, teacher=TEACHER)
    said = evaluate(runs)
    (line,) = [line for line in said.err.splitlines() if "teacher" in line.partition("warning")[2]]
    splits = [data_loader.split(digits, 0.8, seed) for seed in (5, 6)]
    seen = len(set(splits[0].train.tolist()) & set(splits[1].validation.tolist()))
    assert f"{runs}/student/best.pt: its teacher, vanilla of seed 5," in line
    assert f"trained on {seen} of its {len(splits[1].validation)} validation images" in line


def test_a_teacher_that_saw_the_test_images_is_refused(evaluate, make, digits, tmp_path):
    teacher = TEACHER | {"protocol": "lr", "trained_on": "train+validation"}
    make(tmp_path / "student/best.pt", "instance", seed=5, teacher=teacher)
    said = evaluate(tmp_path / "student/best.pt", status=2)
    theirs = data_loader.split(digits, 0.8, 5, "lr")
    _, seen = data_loader.split(digits, 0.8, 5).seen(theirs.of("train+validation"))
    assert seen > 0
    assert "student/best.pt has a teacher, vanilla of seed 5, that was trained on" in said.err
    assert f"{seen} of its 360 test images" in said.err


def test_different_test_images_of_one_seed_are_not_compared(evaluate, runs, monkeypatch, tmp_path):
    content = torch.load(runs / "ls/seed0/best.pt", weights_only=True)
    content["data"]["splits"]["test"] = "0" * 64
    other = tmp_path / "other.pt"
    checkpoint.write_tensors(other, content)
    # As if a protocol had drawn them so: the splits are taken at their word.
    reload = data_loader.reload

    def trusting(description, *arguments):
        return reload(checkpoint.load(runs / "ls/seed0/best.pt").data, *arguments)

    monkeypatch.setattr(data_loader, "reload", trusting)
    said = evaluate(other, runs / "vanilla/seed0/best.pt", status=2)
    assert "both of digits and seed 0, have different test images" in said.err
    evaluate(other, runs / "vanilla/seed1/best.pt")  # another seed may have others
    assert not (tmp_path / "out/comparison.csv").exists()


def test_a_network_given_twice_is_one_seed(evaluate, runs, tmp_path):
    evaluate(runs / "vanilla", runs / "vanilla/seed0/best.pt", "--bootstrap", 10)
    assert list(pd.read_csv(tmp_path / "out/summary.csv")["seeds"]) == [2, 2]


def test_a_training_that_has_not_ended_is_pointed_out(tmp_path, capsys):
    places = ("ended", "running", "kept/candidates/single")
    paths = [tmp_path / place / "best.pt" for place in places]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
        path.with_name("config.json").touch()
    paths[0].with_name("metrics.json").touch()
    assert checkpoint.find([*map(str, paths)]) == paths
    assert capsys.readouterr().err == f"warning: {paths[1]}: its training has not ended\n"
