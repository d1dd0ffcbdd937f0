"""The page of published and measured numbers says what the measured tables say."""

import re
import runpy
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run_here


def test_the_tables_of_the_pages_are_those_of_the_results():
    parity = runpy.run_path(str(ROOT / "results/parity.py"))
    for page, shown in parity["PAGES"].items():
        text = page.read_text()
        assert parity["replaced"](text, shown) == text, "python results/parity.py writes it anew"


def test_a_measured_number_stands_beside_its_published_one_with_z():
    compared = runpy.run_path(str(ROOT / "results/parity.py"))["compare"]()
    measured = compared[compared["n"] > 1]
    assert {"LR paper", "ILS appendix"} <= set(measured["source"])
    expected = (measured["mean"] - measured["published"].astype(float)) / measured["std"]
    assert (measured["z"] - expected).abs().max() < 1e-12


def test_the_joined_tables_are_those_of_their_parts(tmp_path):
    join = runpy.run_path(str(ROOT / "results/join.py"))["join"]
    folder = tmp_path / "joined"
    shutil.copytree(ROOT / "results/fashionmnist-densenet-8-epochs", folder)
    for path in folder.glob("*.*"):
        path.unlink()
    join(folder, ["label-smoothing, smoothing 0.02"])
    for name in ("summary.md", "comparison.md", "students.md"):
        expected = ROOT / "results/fashionmnist-densenet-8-epochs" / name
        assert (folder / name).read_text() == expected.read_text()


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
def test_the_commands_of_a_target_are_taken(target, capfd):
    """All but those that train. What they read is not there: they say so, of the right folder."""
    make = ["make", "--dry-run", "--directory", ROOT, target]
    said = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    script = r"(?:Models-evaluation|Network-distillation)\.py [^&|;\n]+"
    commands = re.findall(script, said.replace("\\\n", " "))
    assert commands
    for command in commands:
        capfd.readouterr()
        assert run_here(*shlex.split(command.replace("$by", "none").replace("$T", "1"))) == 2
        assert "no checkpoint runs/" in capfd.readouterr().err
