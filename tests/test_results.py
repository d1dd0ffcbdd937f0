"""The page of published and measured numbers says what the measured tables say."""

import json
import re
import runpy
import shlex
import shutil
import subprocess

import pandas as pd
import pytest
from conftest import ROOT, run_here

from utils import data_loader, synthetic


def test_the_tables_of_the_pages_are_those_of_the_results():
    parity = runpy.run_path(str(ROOT / "results/parity.py"))
    for page, shown in parity["PAGES"].items():
        text = page.read_text()
        assert parity["replaced"](text, shown) == text, "python results/parity.py writes it anew"


def test_a_measured_number_stands_beside_its_published_one_with_z():
    compared = runpy.run_path(str(ROOT / "results/parity.py"))["compare"]()
    measured = compared[compared["n"] > 1]
    assert {"LR paper", "ILS appendix"} <= set(measured["source"])
    # By hand from the rows of its seeds: a scaled teacher's students, and the network unscaled.
    table = pd.read_csv(ROOT / "results/fashionmnist-densenet-8-epochs/results.csv")
    table = table[(table["split"] == "test") & (table["scaling"] == "no")].set_index("method")
    ours = measured[measured["model"] == "densenet"].set_index(["method", "metric", "scaling"])
    for metric, scaling, method, name in (
        ("log_loss", "no", "vanilla", "log_loss"),
        ("student_accuracy", "yes", "distilled-densenet-vanilla-scaled", "accuracy"),
    ):
        values, shown = table.loc[method, name], ours.loc[("vanilla", metric, scaling)]
        assert (shown["mean"], shown["n"]) == (pytest.approx(values.mean()), len(values))
        distance = (values.mean() - float(shown["published"])) / values.std()
        assert shown["z"] == pytest.approx(distance)


def join(folder, left_out):
    runpy.run_path(str(ROOT / "results/join.py"))["join"](folder, left_out)


def test_the_joined_tables_are_those_of_their_parts(tmp_path):
    folder = tmp_path / "joined"
    shutil.copytree(ROOT / "results/fashionmnist-densenet-8-epochs", folder)
    for path in folder.glob("*.*"):
        path.unlink()
    join(folder, ["label-smoothing, smoothing 0.02"])
    for name in ("summary.md", "comparison.md", "students.md"):
        expected = ROOT / "results/fashionmnist-densenet-8-epochs" / name
        assert (folder / name).read_text() == expected.read_text()


def test_a_method_that_shares_one_seed_alone_is_joined_without_a_test(tmp_path):
    for part in ("seeds-0-1", "seed-4"):
        source = ROOT / "results/fashionmnist-densenet-8-epochs" / part / "results.csv"
        (tmp_path / part).mkdir()
        shutil.copy(source, tmp_path / part)
    join(tmp_path, [])
    compared = pd.read_csv(tmp_path / "comparison.csv").set_index("training")
    alone = compared[compared["seeds"] == 1]
    assert {name.partition(",")[0] for name in alone.index} == {"instance-based-ils2"}
    assert alone["p_value"].isna().all()
    assert compared.drop(index=alone.index)["p_value"].notna().all()


def test_the_published_numbers_of_the_synthetic_data_are_those_of_the_list():
    listed = pd.read_csv(ROOT / "results/published.csv")
    listed = listed[listed["dataset"] == "gaussians"].pivot(
        index="method", columns="metric", values="published"
    )
    shown = {
        method: [100 * accuracy, *others]
        for method, accuracy, *others in listed[[*synthetic.SHOWN][:4]].itertuples()
    }
    assert shown.keys() == synthetic.PUBLISHED.keys()
    for method, text in synthetic.PUBLISHED.items():
        assert [*map(float, text.split(", "))] == pytest.approx(shown[method])


def test_what_parts_that_are_joined_differ_in_is_said(capsys, tmp_path):
    table = pd.read_csv(ROOT / "results/mnist-simple-dense-lr/ece/seeds-0-2/results.csv")
    for part, precision in ("a", "float32"), ("b", "bfloat16"):
        (tmp_path / part).mkdir()
        seeds = table[table["seed"] == 0] if part == "a" else table[table["seed"] != 0]
        if part == "b":  # an earlier version had no such column
            seeds = seeds.assign(test_per_training_image=10_000 / 60_000)
        recipes = [json.dumps(json.loads(r) | {"precision": precision}) for r in seeds["recipe"]]
        seeds.assign(recipe=recipes).to_csv(tmp_path / part / "results.csv", index=False)
    join(tmp_path, [])
    said = capsys.readouterr().err.splitlines()
    expected = "warning: mnist, simple_dense: what is joined as vanilla differs in precision"
    assert expected in said
    assert len(said) == 3
    compared = pd.read_csv(tmp_path / "comparison.csv")
    assert set(compared["test"]) == {"corrected paired t over seeds"}
    relaxed = compared[compared["training"].str.startswith("label-relaxation")]
    found = relaxed.set_index(["scaling", "metric"]).loc[("no", "ece")]
    assert found["p_value"] == pytest.approx(0.02, abs=0.005)  # docs/results.md, computed apart


def test_a_network_learns_as_the_published_code_and_as_ours_trains_it():
    train = runpy.run_path(str(ROOT / "results/as_published.py"))["train"]
    train.__globals__["EPOCHS"] = 5  # of 24 steps
    digits = data_loader.load("digits")
    published, ours = (train(digits, 0, published) for published in (True, False))
    assert published != ours
    for accuracy, ece, log_loss in (published, ours):
        assert accuracy > 0.8
        assert ece < 0.2
        assert log_loss < 0.7


@pytest.mark.parametrize(
    "target",
    [
        "mnist-simple-dense-lr",
        "fashionmnist-simple-dense-lr",
        "students",
        "densenet-8-epochs",
        "densenet",
        "resnet18",
    ],
)
def test_the_commands_of_a_target_are_taken(target, capfd, monkeypatch, tmp_path):
    """All but those that train. What they read is not there: they say so, of the right folder."""
    monkeypatch.chdir(tmp_path)  # where nobody has any runs
    make = ["make", "--dry-run", "--directory", ROOT, target]
    said = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    script = r"(?:Models-evaluation|Network-distillation)\.py [^&|;\n]+"
    commands = re.findall(script, said.replace("\\\n", " "))
    assert commands
    for command in commands:
        capfd.readouterr()
        assert run_here(*shlex.split(command.replace("$by", "none").replace("$T", "1"))) == 2
        assert "no checkpoint runs/" in capfd.readouterr().err
