"""How the results of many runs are read side by side.

Tidy rows (one a checkpoint, split and scaling) become a table of means over seeds (`summarise`,
`comparison.compare`). A table is written at full precision as CSV for machines, and rounded as
Markdown and LaTeX for people: `*_cells` choose and round, `markdown` and `latex` render. Names come
from checkpoints and are escaped when rendered, so that none of them can break a table.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.checkpoint import write_text
from utils.comparison import BLOCK, Bootstrap, differing
from utils.errors import InputError

METRICS = [
    "accuracy",
    "top5_accuracy",  # only of more than five classes
    "log_loss",
    "brier",
    "ece",
    "ece_by_chance",
    "classwise_ece",
    "adaptive_ece",
    "mce",
    "rmsce",
    "ks",
    "aurc",
]
STUDENT_METRICS = ["accuracy", "log_loss", "brier", "ece", "classwise_ece"]


class Shown(NamedTuple):
    """How a column of a summary is shown to people."""

    heading: str  # {} becomes the number of bins
    digits: int
    best: str | None = None  # "max" or "min": the best of each data set and network is bold
    factor: int = 1

    def text(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign}.{self.digits}f}"


# Columns of the tables, by the name in the summary.
ECE = "ECE ({} bins)"
MAIN = {
    "accuracy": Shown("Accuracy %", 2, "max", 100),
    "log_loss": Shown("Log loss", 4, "min"),
    "ece": Shown(ECE, 4, "min"),
    "ece_by_chance": Shown("By chance", 4),
    "student_accuracy": Shown("Student accuracy %", 2, "max", 100),
    "student_log_loss": Shown("Student log loss", 4, "min"),
}
STUDENTS = {
    "student_accuracy": Shown("Accuracy %", 2, "max", 100),
    "student_log_loss": Shown("Log loss", 4, "min"),
    "student_brier": Shown("Brier", 4, "min"),
    "student_ece": Shown(ECE, 4, "min"),
    "student_classwise_ece": Shown("Class-wise ECE", 4, "min"),
    "ece": Shown("Teacher's ECE", 4),
    "temperature": Shown("Temperature", 3),
    "class_similarity": Shown("Similarity kept %", 2, None, 100),
}
COMPARED = {
    "accuracy": Shown("Δ Accuracy %", 2, None, 100),
    "log_loss": Shown("Δ Log loss", 4),
    "brier": Shown("Δ Brier", 4),
    "ece": Shown("Δ " + ECE, 4),
}


class Measured(NamedTuple):
    """A cell with a number: rendered as value + spread, the value in bold if it is the best."""

    value: str
    spread: str = ""
    best: bool = False


# ------------------------------------------------------------------------------- rows and summaries


def setting(method: str, requested: dict[str, list]) -> str:
    """A method and its hyper-parameters in words: 'label-smoothing, smoothing 0.1'.

    Of more than three values the first and the last. The recipe has all of them, by which
    `differences` tells apart what would be called the same.
    """
    said = [method]
    for name, values in requested.items():
        if name != "variant":  # which is in the method's name
            words = [value if isinstance(value, str) else f"{value:g}" for value in values]
            few = words if len(words) <= 3 else [words[0], "...", words[-1]]
            said.append(f"{name} {' or '.join(few)}")
    return ", ".join(said)


def differences(rows: pd.DataFrame) -> pd.Series:
    """Of each row what tells its recipe from others of the same `training`: ', epochs 2', or ''.

    Of a student, which has a `teacher`: from all students of the same data set and network.
    """
    said = pd.Series("", index=rows.index)
    # All students of a network are read side by side, whoever taught them.
    trained = rows["training"].where(rows["teacher"].isna(), "")
    for _, same in rows.groupby([*(rows[key] for key in BLOCK), trained]):
        recipes = [json.loads(recipe) for recipe in same["recipe"]]
        keys = differing(recipes)
        said[same.index] = ["".join(f", {key} {r.get(key)}" for key in keys) for r in recipes]
    return said


def with_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Tidy rows in whose `training` and `student_setting` runs of other recipes are told apart."""
    extra = differences(rows)
    return rows.assign(
        training=rows["training"] + extra, student_setting=rows["student_setting"] + extra
    )


def counted_as_one(rows: pd.DataFrame) -> list[str]:
    """What is to be said of several networks of one setting and seed, a sentence each.

    rows: of with_differences. Students that stand beside their teachers are told apart by these.
    """
    said = []
    networks = rows[~_stands_beside(rows)].drop_duplicates("weights")
    for (*block, training, seed), group in networks.groupby([*BLOCK, "training", "seed"]):
        if len(group) > 1:
            said.append(
                f"{', '.join(block)}: {len(group)} networks of {training}, seed {seed}, count as "
                f"their mean: {', '.join(group['checkpoint'])}"
            )
    return said


def _stands_beside(rows: pd.DataFrame) -> pd.Series:
    """Whether each is a student of a network that is among the rows, and no student itself."""
    return rows["teacher"].isin(rows.loc[rows["teacher"].isna(), "weights"])


def with_students(rows: pd.DataFrame) -> pd.DataFrame:
    """The test rows of networks, each beside the students that were distilled from it.

    rows: the tidy rows of Models-evaluation.py. A teacher's row is joined to the unscaled metrics
    of the students that were taught without or with temperature scaling, as the row's own
    `scaling` says: their means, as student_<metric>, and the hashes of their weights, as
    `student_weights` (a list). `student` tells students of several networks or settings apart; it
    is "" without one. A student whose teacher is not among the rows, or is a student itself, stands
    as a network of its own.
    """
    test = rows[rows["split"] == "test"]
    is_student = _stands_beside(test)
    students = test[is_student & (test["scaling"] == "no")]
    students = students.assign(student=students["model"] + students["student_setting"])
    taught = students.groupby(
        ["teacher", "teacher_scaling", "student"], as_index=False, sort=False
    ).agg(
        **{f"student_{metric}": (metric, "mean") for metric in STUDENT_METRICS},
        student_weights=("weights", list),
    )
    taught = taught.rename(columns={"teacher": "weights", "teacher_scaling": "scaling"})
    networks, setting = test[~is_student], [*BLOCK, "training", "scaling"]
    # Where some seeds of a setting have students, its other seeds stand beside them without.
    students = networks.merge(taught, on=["weights", "scaling"])
    students = students[[*setting, "student"]].drop_duplicates()
    joined = networks.merge(students, how="left", on=setting)
    joined = joined.merge(taught, how="left", on=["weights", "scaling", "student"])
    return joined.fillna({"student": ""})


def summarise(rows: pd.DataFrame, bootstrap: Bootstrap | None = None) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds, a row for each setting and scaling.

    rows: what with_students returns. <metric>_mean and <metric>_std (NaN for one seed) of METRICS,
    of student_<metric> and of temperature and class_similarity; `seeds` counts the seeds,
    `seed_numbers` names them, and `student_seeds` and `student_seed_numbers` those that have
    students. Several networks of one seed count as their mean. With a bootstrap <metric>_low and
    _high (95 %) for comparison.METRICS, of the networks and of their students.
    """
    keys = [*BLOCK, "training", "scaling", "student"]
    numbers = [*METRICS, "temperature", "class_similarity"]
    numbers += [f"student_{metric}" for metric in STUDENT_METRICS]
    numbers = [name for name in numbers if name in rows]
    summary = []
    for key, group in rows.groupby(keys, sort=False):
        seeds = group.groupby("seed")[numbers].mean()
        taught = group[group["student_weights"].notna()]["seed"].unique()
        row = dict(zip(keys, key, strict=True)) | {
            "seeds": len(seeds),
            "seed_numbers": " ".join(map(str, seeds.index)),
            "student_seeds": len(taught),
            "student_seed_numbers": " ".join(map(str, sorted(taught))),
            "ece_bins": group["ece_bins"].iloc[0],
        }
        intervals = _intervals(group, bootstrap) if bootstrap else {}
        for name in numbers:
            row[f"{name}_mean"], row[f"{name}_std"] = seeds[name].mean(), seeds[name].std()
            if name in intervals:
                row[f"{name}_low"], row[f"{name}_high"] = intervals[name]
        summary.append(row)
    return pd.DataFrame(summary)


def with_intervals(rows: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """Adds <metric>_low and <metric>_high of comparison.METRICS to the test rows of tidy rows.

    They are of one network, so over test images alone.
    """
    rows = rows.copy()
    for row in rows[rows["split"] == "test"].itertuples():
        values = bootstrap.mean({row.seed: [(row.weights, row.scaling)]})
        for metric, interval in bootstrap.interval(values).items():
            rows.loc[row.Index, [f"{metric}_low", f"{metric}_high"]] = interval
    return rows


def _intervals(group: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, tuple[float, float]]:
    """The bootstrap's intervals of one setting's networks and of their students."""
    networks: dict[int, list] = {}
    students: dict[int, list] = {}
    for row in group.itertuples():
        networks.setdefault(row.seed, []).append((row.weights, row.scaling))
        if isinstance(row.student_weights, list):
            students.setdefault(row.seed, []).extend((w, "no") for w in row.student_weights)
    intervals = bootstrap.interval(bootstrap.mean(networks))
    if students:
        taught = bootstrap.interval(bootstrap.mean(students))
        intervals |= {f"student_{metric}": interval for metric, interval in taught.items()}
    return intervals


# -------------------------------------------------------------------------- what people see of them


def summary_cells(summary: pd.DataFrame, shown: dict[str, Shown]) -> pd.DataFrame:
    """A summary as a table for people: mean ± sd [low, high], the best of each block in bold.

    No best among numbers `of_unequal_seeds`: the difference may be that of the seeds.

    shown: MAIN, or STUDENTS, which is of the rows that have a student. Columns without any value
    are left out.
    """
    if shown is STUDENTS:
        summary = summary[summary["student"] != ""]
    taught = summary["student"] != ""
    fewer_taught = (summary["student_seeds"] != summary["seeds"])[taught].any()
    teachers = "Teacher seeds" if shown is STUDENTS and fewer_taught else "Seeds"
    cells = pd.DataFrame(
        {
            "Data set": summary["dataset"],
            "Teacher" if shown is STUDENTS else "Network": summary["model"],
            "Training": summary["training"],
            "Temp. scaling": summary["scaling"],
            teachers: summary["seeds"].astype(str),
        }
    )
    if fewer_taught:
        cells["Student seeds"] = summary["student_seeds"].astype(str)
    if summary["student"].nunique() > 1 + ("" in set(summary["student"])) or shown is STUDENTS:
        cells["Student"] = summary["student"]
    blocks = [summary[key] for key in BLOCK]
    for name, column in shown.items():
        mean = summary[f"{name}_mean"]
        if mean.isna().all():
            continue
        rounded = (column.factor * mean).round(column.digits)
        best = rounded == rounded.groupby(blocks).transform(column.best or "min")
        best &= ~of_unequal_seeds(summary, name)
        cells[column.heading.format(summary["ece_bins"].iloc[0])] = [
            _measured(column, row, name, is_best and column.best is not None)
            for is_best, (_, row) in zip(best, summary.iterrows(), strict=True)
        ]
    return cells


def of_unequal_seeds(summary: pd.DataFrame, name: str) -> pd.Series:
    """Of each row whether this metric of others of its block has been measured on other seeds."""
    seeds = "student_seed_numbers" if name.startswith("student_") else "seed_numbers"
    measured = summary[seeds].where(summary[f"{name}_mean"].notna())
    return measured.groupby([summary[key] for key in BLOCK]).transform("nunique") > 1


def _unranked(summary: pd.DataFrame, shown: dict[str, Shown]) -> str:
    """What a caption says of numbers among which `summary_cells` names no best."""
    ranked = [name for name, column in shown.items() if column.best and f"{name}_mean" in summary]
    unequal = any(of_unequal_seeds(summary, name).any() for name in ranked)
    return " Numbers of unequal seeds are not ranked: none of them is bold." * unequal


def _measured(column: Shown, row: pd.Series, name: str, best: bool) -> Measured:
    if pd.isna(row[f"{name}_mean"]):
        return Measured("")
    spread = "" if pd.isna(row[f"{name}_std"]) else f" ± {column.text(row[f'{name}_std'])}"
    if not pd.isna(row.get(f"{name}_low", np.nan)):
        spread += f" [{column.text(row[f'{name}_low'])}, {column.text(row[f'{name}_high'])}]"
    return Measured(column.text(row[f"{name}_mean"]), spread, best)


def comparison_cells(compared: pd.DataFrame, ece_bins: int) -> pd.DataFrame:
    """What comparison.compare gives, for people: difference [low, high] p, a column a metric."""
    table = []
    for key, group in compared.groupby(
        [*BLOCK, "training", "reference", "scaling", "seeds"], sort=False
    ):
        headings = ["Data set", "Network", "Training", "Reference", "Temp. scaling", "Seeds"]
        row: dict = dict(zip(headings, map(str, key), strict=True))
        for values in group.itertuples():
            column = COMPARED[values.metric]
            spread = ""
            if not pd.isna(values.low):
                spread += f" [{column.text(values.low, '+')}, {column.text(values.high, '+')}]"
            if not pd.isna(values.p_value):
                small = values.p_value < 0.001
                spread += " p < 0.001" if small else f" p = {values.p_value:.3f}"
            difference = column.text(values.difference, "+")
            row[column.heading.format(ece_bins)] = Measured(difference, spread)
        table.append(row)
    return pd.DataFrame(table)


# ---------------------------------------------------------------------------------------- rendering


def escape_markdown(text: str) -> str:
    """Text that Markdown (GFM) shows as it is, in a cell of a table.

    An underscore inside a word is none of its signs, and stays readable in a terminal.
    """
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*{}\[\]<>#|~&$!])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "[": "{[}",  # after \\ it would begin an argument
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is, in a cell of a table."""
    return "".join(LATEX.get(character, character) for character in " ".join(str(text).split()))


def markdown(cells: pd.DataFrame, caption: str = "") -> str:
    """The table with its columns aligned, so that it reads well in a terminal too.

    cells: strings, which are escaped, and Measured. caption: Markdown, below the table.
    """

    def render(cell: str | Measured) -> str:
        if not isinstance(cell, Measured):
            return escape_markdown(cell)
        return (f"**{cell.value}**" if cell.best and cell.value else cell.value) + cell.spread

    table = [[render(cell) for cell in row] for row in (cells.columns, *cells.to_numpy())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in table
    )
    table_text = "\n".join(f"| {line} |" for line in lines) + "\n"
    return f"{table_text}\n{caption}\n" if caption else table_text


def latex(cells: pd.DataFrame, caption: str, label: str) -> str:
    """A table environment for \\usepackage{booktabs}, numbers aligned on the right.

    cells: strings and Measured. caption: text; both are escaped.
    """

    def render(cell: str | Measured) -> str:
        if not isinstance(cell, Measured):
            return escape_latex(cell)
        value = escape_latex(cell.value).replace("-", "$-$")
        spread = escape_latex(cell.spread.lstrip()).replace("-", "$-$")
        value = f"\\textbf{{{value}}}" if cell.best and value else value
        return f"{value} {spread}".rstrip()

    header, *body = (
        " & ".join(render(cell) for cell in row) + r" \\"
        for row in (cells.columns, *cells.to_numpy())
    )
    columns = "".join("r" if isinstance(cell, Measured) else "l" for cell in cells.iloc[0])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escape_latex(caption)}}}",
            f"\\label{{tab:{label}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            header,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


# Columns that say what a row is about.
NAMES = ("Data set", "Network", "Training", "method", "hyper_parameter", "selected")


def without_shared(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table without the labels that all its rows share, which fit in a line: so that the
    table fits in a terminal or a column. What names a row stays, as does all of a single row."""
    if len(cells) < 2:
        return cells, ""
    shared = [
        name
        for name in cells.columns
        if name not in NAMES and isinstance(cells[name].iloc[0], str) and cells[name].nunique() == 1
    ]
    line = "; ".join(f"{name.lower()}: {cells[name].iloc[0]}" for name in shared)
    return cells.drop(columns=shared), f"{line[:1].upper()}{line[1:]}." if line else ""


def ece_rule(ece_bins: int) -> str:
    """How every ECE of a table was made."""
    return f"ECE: {ece_bins} equal-width bins (lo, hi], top label."


def remove_earlier(folder: Path, names: tuple[str, ...]) -> None:
    """Removes tables of an earlier evaluation that this one may not make anew, and that would then
    stand beside those of other networks."""
    for name in names:
        for suffix in (".csv", ".md", ".tex"):
            path = folder / f"{name}{suffix}"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"cannot remove the earlier {path}: {error.strerror}") from None


def write(folder: Path, name: str, table: pd.DataFrame, cells: pd.DataFrame, caption: str) -> str:
    """Writes <name>.csv, <name>.md and <name>.tex; returns the Markdown."""
    cells, shared = without_shared(cells)
    text = markdown(cells, f"{escape_markdown(shared)} {caption}".lstrip())
    write_text(folder / f"{name}.csv", table.to_csv(index=False))
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.tex", latex(cells, f"{shared} {caption}".lstrip(), name))
    return text


def write_all(
    folder: Path,
    summary: pd.DataFrame,
    compared: pd.DataFrame | None,
    unequal: list[str],
    ece_bins: int,
    replicates: int = 0,
) -> dict[str, str]:
    """Writes the tables of an evaluation, each with a caption that says what it shows.

    summary: of `summarise`. compared: of `comparison.compare`, if it was asked for, and unequal
    what `comparison.unequal_recipes` says of it. replicates: of the bootstrap whose intervals they
    have; 0 for none. Returns the Markdown of each under its title.
    """
    texts = {}
    spread = "mean ± sample standard deviation over seeds"
    spread += f", [95 % interval of {replicates} bootstraps]" * bool(replicates)
    rule = ece_rule(ece_bins)
    caption = (
        f"Test split; temperature fitted to the validation split; {spread}. {rule} By chance: the "
        f"ECE of a perfectly calibrated network with these confidences.{_unranked(summary, MAIN)}"
    )
    cells = summary_cells(summary, MAIN)
    texts["Test split"] = write(folder, "summary", summary, cells, caption)

    students = summary[summary["student"] != ""]
    if len(students):
        caption = (
            f"Students on the test split, unscaled, beside their teachers (scaled: by the "
            f"temperature); {spread}. {rule} Similarity kept: the share of the variation of the "
            "teacher's logits that tells which other classes an image resembles."
            f"{_unranked(students, STUDENTS)}"
        )
        cells = summary_cells(students, STUDENTS)
        texts["Students"] = write(folder, "students", students, cells, caption)
    if compared is not None:
        intervals = " or ".join(filter(None, compared["interval"].unique()))
        tests = ", ".join(filter(None, compared["test"].unique()))
        caption = (
            "Paired differences on the test split, training less reference, [95 % interval: "
            f"{intervals or 'none'}], p ({tests or 'no test'}; not corrected for their number). "
            f"{rule}"
        )
        caption = " ".join([caption, *(f"{warning}." for warning in unequal)])
        cells = comparison_cells(compared, ece_bins)
        texts["Paired differences"] = write(folder, "comparison", compared, cells, caption)
    return texts
