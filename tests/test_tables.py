"""Tables: what is averaged, what is shown, and that no name can break them."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from utils import tables
from utils.comparison import Bootstrap, PerImage
from utils.tables import Measured

HASH = "ab" * 32
NASTY = "a_b|c*d* _e_ [f](g) <b>h</b> `i` 5% & $x$ #1 {y} ~z ^w \\q\nnew"


def row(weights: str, seed: int, value: float, **columns) -> dict:
    return {
        "dataset": "digits", "model": "resnet18", "training": "vanilla", "method": "vanilla",
        "recipe": json.dumps({"lr": 0.1}), "seed": seed, "weights": weights, "teacher": None,
        "teacher_scaling": None, "student_setting": "", "ece_bins": 10, "split": "test",
        "scaling": "no", "temperature": 1.0, "class_similarity": 0.1,
        **{metric: value for metric in tables.METRICS if metric != "top5_accuracy"}, **columns,
    }  # fmt: skip


def student(weights: str, seed: int, value: float, teacher: str, **columns) -> dict:
    about = {"model": "shallownet", "training": "distilled", "method": "distilled"}
    about |= {"student_setting": ", alpha 0.9", "teacher": teacher, "teacher_scaling": "no"}
    return row(weights, seed, value, **(about | columns))


def summary_of(*rows: dict, bootstrap=None) -> pd.DataFrame:
    rows = tables.with_differences(pd.DataFrame(rows))
    return tables.summarise(tables.with_students(rows), bootstrap)


def test_a_setting_in_words():
    assert tables.setting("vanilla", {}) == "vanilla"
    requested = {"variant": ["ils"], "smoothing": [0.1, 0.05], "temperature": [1.0]}
    assert tables.setting("ils", requested) == "ils, smoothing 0.1 or 0.05, temperature 1"
    assert tables.setting("own", {"smoothing": ["0.1..0.3"]}) == "own, smoothing 0.1..0.3"
    assert tables.setting("own", {"a": [1, 2, 3]}) == "own, a 1 or 2 or 3"
    assert tables.setting("own", {"a": [4, 3, 2, 1.0]}) == "own, a 4 or ... or 1"


def test_recipes_that_differ_are_told_apart():
    other = json.dumps({"lr": 0.01})
    summary = summary_of(row("a", 0, 0.5), row("b", 0, 0.7, recipe=other))
    assert set(summary["training"]) == {"vanilla, lr 0.1", "vanilla, lr 0.01"}
    assert list(summary["seeds"]) == [1, 1]


def test_a_student_of_some_seeds_leaves_the_row_of_all_of_them():
    taught = student("s", 0, 0.9, teacher="a")
    summary = summary_of(row("a", 0, 0.2), row("b", 1, 0.4), taught)
    assert (summary["seeds"].item(), summary["student_seeds"].item()) == (2, 1)
    assert summary["ece_mean"].item() == pytest.approx(0.3)
    assert summary["student_ece_mean"].item() == 0.9
    for shown, seeds in (tables.MAIN, "Seeds"), (tables.STUDENTS, "Teacher seeds"):
        cells = tables.summary_cells(summary, shown)
        assert (cells[seeds].item(), cells["Student seeds"].item()) == ("2", "1")


def test_students_that_were_trained_differently_are_told_apart():
    other = json.dumps({"lr": 0.01})
    taught = student("s", 0, 0.9, teacher="a"), student("t", 0, 0.1, teacher="a", recipe=other)
    summary = summary_of(row("a", 0, 0.2), *taught)
    found = dict(zip(summary["student"], summary["student_ece_mean"], strict=True))
    assert found == {
        "shallownet, alpha 0.9, lr 0.1": 0.9,
        "shallownet, alpha 0.9, lr 0.01": pytest.approx(0.1),
    }


def test_students_of_different_methods_are_told_apart_too():
    other = json.dumps({"lr": 0.01})
    smoothed = row("b", 0, 0.3, training="label-smoothing", method="label-smoothing")
    taught = (
        student("s", 0, 0.9, teacher="a", training="distilled-vanilla"),
        student("t", 0, 0.1, teacher="b", training="distilled-label-smoothing", recipe=other),
    )
    summary = summary_of(row("a", 0, 0.2), smoothed, *taught).set_index("training")
    assert summary.loc["vanilla", "student"] == "shallownet, alpha 0.9, lr 0.1"
    assert summary.loc["label-smoothing", "student"] == "shallownet, alpha 0.9, lr 0.01"


def test_mean_and_sample_deviation_over_seeds_by_hand():
    summary = summary_of(row("a", 0, 0.2), row("b", 1, 0.3), row("c", 2, 0.7))
    assert summary["ece_mean"].item() == pytest.approx(0.4)
    assert summary["ece_std"].item() == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert (summary["seeds"].item(), summary["ece_bins"].item()) == (3, 10)
    assert math.isnan(summary_of(row("a", 0, 0.2))["ece_std"].item())


def test_the_validation_split_is_not_averaged_in():
    summary = summary_of(row("a", 0, 0.2), row("a", 0, 0.9, split="validation"))
    assert summary["accuracy_mean"].item() == pytest.approx(0.2)


def test_a_seed_counts_once_however_many_networks_or_students_it_has():
    rows = [row("a", 0, 0.2), row("a2", 0, 0.4), row("b", 1, 0.5)]
    assert summary_of(*rows)["brier_mean"].item() == pytest.approx((0.3 + 0.5) / 2)
    rows = [row("a", 0, 0.2), row("b", 1, 0.4)]
    taught = [student("s", 0, 0.1, "a"), student("t", 7, 0.5, "a"), student("u", 1, 0.7, "b")]
    summary = summary_of(*rows, *taught)
    assert len(summary) == 1
    assert summary["accuracy_mean"].item() == pytest.approx(0.3)
    assert summary["student_accuracy_mean"].item() == pytest.approx((0.3 + 0.7) / 2)


def test_students_stand_beside_the_teacher_that_taught_them_scaled_or_not():
    rows = [
        row("a", 0, 0.2),
        row("a", 0, 0.2, scaling="yes", temperature=1.5),
        student("s", 0, 0.6, "a"),
        student("s", 0, 0.9, "a", scaling="yes"),  # a student's own scaling is not shown
        student("t", 0, 0.8, "a", teacher_scaling="yes"),
        student("x", 0, 0.1, "unknown"),
    ]
    summary = summary_of(*rows).set_index(["model", "scaling"])
    assert summary.loc[("resnet18", "no"), "student_ece_mean"] == pytest.approx(0.6)
    assert summary.loc[("resnet18", "yes"), "student_ece_mean"] == pytest.approx(0.8)
    assert summary.loc[("resnet18", "yes"), "temperature_mean"] == pytest.approx(1.5)
    # A student without its teacher is a network of its own.
    assert summary.loc[("shallownet", "no"), "accuracy_mean"] == pytest.approx(0.1)
    cells = tables.summary_cells(summary.reset_index(), tables.STUDENTS)
    assert list(cells["Teacher"]) == ["resnet18", "resnet18"]
    assert [cell.value for cell in cells["Temperature"]] == ["1.000", "1.500"]
    assert [cell.value for cell in cells["ECE (10 bins)"]] == ["0.6000", "0.8000"]
    assert [cell.value for cell in cells["Teacher's ECE"]] == ["0.2000", "0.2000"]
    assert {"Brier", "Class-wise ECE", "Similarity kept %"} < set(cells.columns)


def test_intervals_of_networks_and_students():
    """Seeds 0 and 1 with constant images: a quarter of the means are the lower of the two."""
    one = np.ones(4)
    samples = {
        (name, "no"): (HASH, PerImage(one * 0, value * one, one, one))
        for name, value in (("a", 0.2), ("b", 0.4), ("s", 1.0), ("u", 3.0))
    }
    bootstrap = Bootstrap(samples, 10, 500)
    rows = [row("a", 0, 0.2), row("b", 1, 0.4), student("s", 0, 1, "a"), student("u", 1, 3, "b")]
    summary = summary_of(*rows, bootstrap=bootstrap)
    interval = summary[["log_loss_low", "log_loss_high"]].to_numpy()[0]
    assert interval == pytest.approx([0.2, 0.4])
    assert summary["student_log_loss_low"].item() == pytest.approx(1.0)
    assert summary["student_log_loss_high"].item() == pytest.approx(3.0)
    assert summary["ece_low"].item() == pytest.approx(1.0)  # sure, and never right
    assert "classwise_ece_low" not in summary
    text = tables.markdown(tables.summary_cells(summary, tables.MAIN))
    assert "**0.3000** ± 0.1414 [0.2000, 0.4000]" in text
    tidy = pd.DataFrame([*rows, row("a", 0, 0.9, split="validation")])
    found = tables.with_intervals(tidy, bootstrap)
    assert list(found["log_loss_high"].iloc[:4]) == pytest.approx([0.2, 0.4, 1.0, 3.0])
    assert math.isnan(found["log_loss_high"].iloc[4])
    assert "log_loss_low" not in tidy


def test_the_best_of_each_block_is_bold_as_rounded():
    summary = summary_of(
        row("a", 0, 0.12341), row("b", 0, 0.12344, training="focal"),
        row("c", 0, 0.5, training="ls"), row("d", 0, 0.9, model="lenet"),
    )  # fmt: skip
    cells = tables.summary_cells(summary, tables.MAIN)
    assert list(cells["Log loss"]) == [
        Measured("0.1234", "", True), Measured("0.1234", "", True), Measured("0.5000"),
        Measured("0.9000", "", True),
    ]  # fmt: skip
    assert [cell.best for cell in cells["Accuracy %"]] == [False, False, True, True]
    assert not any(cell.best for cell in cells["By chance"])  # nothing to win there
    assert "Student log loss" not in cells  # nobody has a student


def test_nothing_is_best_where_seeds_differ(tmp_path):
    other = row("c", 1, 0.1, training="ls")
    summary = summary_of(row("a", 0, 0.5), row("b", 1, 0.7), other, row("d", 1, 0.9, model="lenet"))
    assert list(summary["seed_numbers"]) == ["0 1", "1", "1"]
    cells = tables.summary_cells(summary, tables.MAIN)
    assert [cell.best for cell in cells["Log loss"]] == [False, False, True]
    said = tables.write_all(tmp_path, summary, None, [], 10)["Test split"]
    assert "Numbers of unequal seeds are not ranked" in said
    said = tables.write_all(tmp_path, summary[1:], None, [], 10)["Test split"]
    assert "unequal" not in said


def test_students_of_equal_seeds_are_ranked_though_their_teachers_are_not(tmp_path):
    taught = student("s", 0, 0.9, "a"), student("t", 0, 0.7, "c")
    rows = row("a", 0, 0.5), row("b", 1, 0.7), row("c", 0, 0.1, training="ls")
    cells = tables.summary_cells(summary_of(*rows, *taught), tables.MAIN)
    assert [cell.best for cell in cells["Log loss"]] == [False, False]
    assert [cell.best for cell in cells["Student log loss"]] == [False, True]
    said = tables.write_all(tmp_path, summary_of(*rows, *taught), None, [], 10)
    assert "unequal" in said["Test split"]
    assert "unequal" not in said["Students"]


def test_a_student_of_a_student_stands_by_itself():
    teacher, taught = row("a", 0, 0.2), student("s", 0, 0.6, "a")
    again = student("t", 0, 0.8, "s", training="distilled twice")
    summary = summary_of(teacher, taught, again).set_index("training")
    assert summary.loc["vanilla", "student_ece_mean"] == 0.6
    assert summary.loc["distilled twice", "ece_mean"] == 0.8


def test_several_networks_of_one_seed_are_named():
    rows = pd.DataFrame([
        row("a", 0, 0.2, checkpoint="one"), row("a", 0, 0.2, checkpoint="one", scaling="yes"),
        row("b", 0, 0.4, checkpoint="two"), row("c", 1, 0.4, checkpoint="three"),
        student("s", 0, 0.1, "a", checkpoint="x"), student("t", 0, 0.5, "b", checkpoint="y"),
    ])  # fmt: skip
    assert tables.counted_as_one(rows) == [
        "digits, resnet18: 2 networks of vanilla, seed 0, count as their mean: one, two"
    ]
    # Students whose teachers are not there stand by themselves, and count as one.
    alone = pd.DataFrame(
        [student("s", 0, 0.1, "a", checkpoint="x"), student("t", 0, 0.5, "b", checkpoint="y")]
    )
    assert tables.counted_as_one(alone) == [
        "digits, shallownet: 2 networks of distilled, seed 0, count as their mean: x, y"
    ]


def test_what_all_rows_share_is_said_once():
    cells = pd.DataFrame({"Data set": ["d"] * 2, "Student": ["s"] * 2, "Training": ["v"] * 2,
                          "Seeds": ["1", "2"], "ECE": [Measured("0.1")] * 2})  # fmt: skip
    left, line = tables.without_shared(cells)
    assert list(left.columns) == ["Data set", "Training", "Seeds", "ECE"]
    assert line == "Student: s."
    assert tables.without_shared(left)[1] == ""


def test_comparison_for_people():
    compared = pd.DataFrame(
        [
            {
                "dataset": "d", "model": "m", "scaling": "no", "training": "t", "reference": "v",
                "metric": metric, "seeds": 3, "difference": -0.0123, "low": low, "high": 0.01,
                "p_value": p,
            }
            for metric, low, p in (
                ("accuracy", -0.03, 0.0421),
                ("log_loss", -0.03, 0.0001),
                ("ece", math.nan, math.nan),
            )
        ]
    )  # fmt: skip
    cells = tables.comparison_cells(compared, 15)
    assert list(cells.iloc[0]) == [
        "d", "m", "t", "v", "no", "3",
        Measured("-1.23", " [-3.00, +1.00] p = 0.042"),
        Measured("-0.0123", " [-0.0300, +0.0100] p < 0.001"),
        Measured("-0.0123"),
    ]  # fmt: skip
    assert cells.columns[-1] == "Δ ECE (15 bins)"


# ---------------------------------------------------------------------------------------- rendering


def unescaped(characters: str, text: str, allowed: str = "") -> list[str]:
    """The special characters of the text that no backslash takes the meaning from."""
    text = re.sub(allowed, "", text) if allowed else text
    return re.findall(f"[{re.escape(characters)}]", re.sub(r"\\.", "", text))


def test_markdown_shows_names_as_they_are():
    text = tables.escape_markdown(NASTY)
    assert unescaped("|*[]<>`#~&${}", text) == []
    assert "\n" not in text
    # An underscore is a sign of Markdown at the edge of a word only.
    assert text.startswith(r"a_b\|c")
    assert r"\_e\_" in text
    assert re.sub(r"\\(.)", r"\1", text) == " ".join(NASTY.split())
    assert tables.escape_markdown("simple_dense") == "simple_dense"


def test_a_markdown_table_keeps_its_columns():
    cells = pd.DataFrame({"A|B": [NASTY, "x"], "C": [Measured("1.0", " ± 2", True), Measured("")]})
    lines = tables.markdown(cells, "Said below.").splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    for line in lines[:4]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "**1.0** ± 2" in lines[2]
    assert lines[4:] == ["", "Said below."]


def test_latex_shows_names_as_they_are():
    text = tables.escape_latex(NASTY)
    known = r"\\text(backslash|asciitilde|asciicircum|less|greater|bar)\{\}|\{\[\}"
    assert unescaped("&%$#_{}~^<>|\\[", text, known) == []
    assert "\n" not in text
    assert tables.escape_latex("a_b 5% ±") == r"a\_b 5\% $\pm$"


def test_a_latex_table_is_booktabs_with_its_columns_and_no_more():
    cells = pd.DataFrame(
        {"Net_work": [NASTY, "[x]"], "Δ ECE %": [Measured("-1.0", " ± 2", True), Measured("")]}
    )
    text = tables.latex(cells, "100 % of [all]", "summary")
    lines = text.splitlines()
    assert lines[2:4] == [r"\caption{100 \% of {[}all]}", r"\label{tab:summary}"]
    assert lines[4] == r"\begin{tabular}{lr}"
    assert lines[5:9:2] == [r"\toprule", r"\midrule"]
    assert lines[6] == r"Net\_work & $\Delta$ ECE \% \\"
    assert lines[8].endswith(r"& \textbf{$-$1.0} $\pm$ 2 \\")
    assert lines[9] == r"{[}x] &  \\"
    for line in (lines[6], lines[8], lines[9]):
        assert len(re.findall(r"(?<!\\)&", line)) == 1
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\begin") == text.count(r"\end") == 2


def test_what_names_a_row_stays_though_all_share_it():
    cells = pd.DataFrame({"method": ["ls"] * 2, "selected": ["0.1"] * 2, "tried": ["7"] * 2})
    left, shared = tables.without_shared(cells)
    assert list(left) == ["method", "selected"]
    assert shared == "Tried: 7."


def test_a_single_row_keeps_what_it_is_about(tmp_path):
    cells = pd.DataFrame([{"Seed": "0", "Selected": "smoothing=0.1", "Trained": "2"}])
    text = tables.write(tmp_path, "name", cells, cells, "")
    assert re.search(r"\| 0 +\| smoothing=0.1 +\| 2 +\|", text)
    assert "0 & smoothing=0.1 & 2" in (tmp_path / "name.tex").read_text()


def test_a_table_is_written_three_times_and_read_back_in_full_precision(tmp_path):
    table = pd.DataFrame({"x": [0.1 + 0.2, 1 / 3]})
    cells = pd.DataFrame(
        {"Training": ["a", "b"], "Student": ["d_1_"] * 2, "x": [Measured("0.3")] * 2}
    )
    text = tables.write(tmp_path, "name", table, cells, tables.ece_rule(15))
    assert {path.name for path in tmp_path.iterdir()} == {"name.csv", "name.md", "name.tex"}
    assert list(pd.read_csv(tmp_path / "name.csv")["x"]) == [0.1 + 0.2, 1 / 3]
    assert (tmp_path / "name.md").read_text() == text
    said = "ECE: 15 equal-width bins (lo, hi], top label."
    assert text.endswith(f"\n\nStudent: d_1\\_. {said}\n")
    assert rf"\caption{{Student: d\_1\_. {said}}}" in (tmp_path / "name.tex").read_text()
