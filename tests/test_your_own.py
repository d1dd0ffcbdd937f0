"""docs/your-own.md: its changes are made in a copy of the project, its commands run there."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Forks, write_image
from sklearn.datasets import load_digits

pytest.importorskip("timm")

PAGE = (ROOT / "docs/your-own.md").read_text()
# The language of each block, and what is said before it: there the file is named.
BLOCKS = [
    (before.rpartition("```")[2], language, content)
    for before, language, content in re.findall(r"(.*?)^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
]


def change(project, said: str, language: str, content: str) -> None:
    """Does what the page says before a block of Python, or of a difference."""
    how, name = re.findall(r"(new file|at the end of|in)\s`([^`]+\.py)`", said)[-1]
    path = project / name
    if language == "diff":
        assert how == "in"
        code = path.read_text()
        for line in content.splitlines(keepends=True):
            if line.startswith(" "):
                place = line[1:]
                assert code.count(place) == 1, f"{place!r} is not once in {name}"
            else:
                code = code.replace(place, place + line[1:])
        path.write_text(code)
    elif how == "new file":
        assert not path.exists()
        path.write_text(content)
    else:
        assert how == "at the end of"
        path.write_text(f"{path.read_text()}\n\n{content}")


def write_flowers(project, layout: str) -> None:
    draw = np.random.default_rng(0)
    for place in layout.split():
        for number in range(8):
            pixels = draw.integers(256, size=(20 + number, 30, 3), dtype=np.uint8)
            write_image(project / place.replace("*", str(number)), pixels)


def write_letters(project) -> None:
    """Of four digits, which look like letters to one who has never seen any."""
    digits = load_digits(n_class=4)
    images = (digits.images * 255 / 16).astype(np.uint8)
    (project / "letters").mkdir()
    np.savez(
        project / "letters/letters.npz",
        train_images=images[:200], train_labels=digits.target[:200],
        test_images=images[200:260], test_labels=digits.target[200:260],
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with all of the page's changes."""
    project = tmp_path_factory.mktemp("your-own") / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "demo", "results")
    shutil.copytree(ROOT, project, ignore=ignored)
    for said, language, content in BLOCKS:
        if language in ("python", "diff"):
            change(project, said, language, content)
        elif not language:
            write_flowers(project, content)
    write_letters(project)
    return project


@pytest.fixture(scope="module")
def commands(project):
    """The commands of the page and what each says, in forks of one process to be quick."""
    forks, said = Forks(project / "log", project), {}
    for _, language, content in BLOCKS:
        for command in content.splitlines() if language == "sh" else ():
            python, *arguments = shlex.split(command)
            assert python == "python"
            said[command] = forks.run(*arguments)
    forks.close()
    return said


def test_the_commands_of_the_page_train_what_it_adds(project, commands):
    assert len(commands) == 8
    finished = {str(path.parent.relative_to(project)) for path in project.rglob("metrics.json")}
    assert finished == {
        f"{name}/seed0"
        for name in (
            "runs/imagefolder/shallownet/vanilla",
            "runs/letters/shallownet/label-smoothing",
            "runs/letters/timm-mobilenetv3_small_050/vanilla",
            "runs/digits/tiny/vanilla",
            "runs/digits/tiny/distilled-tiny-vanilla",
            "runs/digits/tiny/distilled-tiny-vanilla-scaled",
            "runs/digits/tiny/poly",
            "study/digits/tiny/vanilla",
            "study/digits/tiny/poly",
        )
    }


def test_what_it_adds_learns(project, commands):
    for name, chance in (("letters/shallownet/label-smoothing", 0.25), ("digits/tiny/poly", 0.1)):
        metrics = json.loads((project / f"runs/{name}/seed0/metrics.json").read_text())
        assert metrics["test"]["unscaled"]["accuracy"] > 2 * chance


def test_the_loss_of_the_page_is_cross_entropy_where_it_says_so(project, commands):
    folder = project / "runs/digits/tiny"
    search = pd.read_csv(folder / "poly/seed0/search.csv").set_index("epsilon")
    vanilla = pd.read_csv(folder / "vanilla/seed0/history.csv")
    expected = vanilla["validation_log_loss"].min()
    assert search["validation_log_loss"][0.0] == pytest.approx(expected, rel=1e-3)
    assert set(search.index) == {0.0, 1.0, 2.0}


def test_the_code_of_the_page_is_formatted_as_the_rest(project):
    for arguments in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=project, check=True)
