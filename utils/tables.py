"""How the results of many runs are read side by side: one tidy row a checkpoint and split, then
mean ± standard deviation over seeds, as CSV for machines and Markdown for people.
"""

import json

import pandas as pd

# What a setting is made of, besides the seed: runs that agree in these are averaged.
BLOCK = ["dataset", "model"]
# Columns of the table: heading, direction of better, digits after the point, factor shown.
SHOWN = {
    "accuracy": ("Accuracy %", max, 2, 100),
    "log_loss": ("Log loss", min, 4, 1),
    "ece": ("ECE", min, 4, 1),
    "student_accuracy": ("Student accuracy %", max, 2, 100),
    "student_log_loss": ("Student log loss", min, 4, 1),
}


def setting(method: str, requested: dict[str, list]) -> str:
    """A method and its hyper-parameters in words: 'label-smoothing, smoothing 0.1'."""
    values = [
        f"{name} {' or '.join(format(value, 'g') for value in values)}"
        for name, values in requested.items()
        if not isinstance(values[0], str)
    ]
    return ", ".join([method, *values])


def distinguish(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds to a `training` that stands for several recipes what they differ in."""
    rows = rows.copy()
    for _, same in rows.groupby([*BLOCK, "training"]):
        recipes = [json.loads(recipe) for recipe in same["recipe"]]
        differing = [key for key in recipes[0] if len({str(r.get(key)) for r in recipes}) > 1]
        for index, recipe in zip(same.index, recipes, strict=True):
            extra = "".join(f", {key} {recipe.get(key)}" for key in differing)
            rows.loc[index, "training"] += extra
    return rows


def with_students(rows: pd.DataFrame) -> pd.DataFrame:
    """The test rows of networks, each beside the student that was distilled from it.

    rows: the tidy rows of Models-evaluation.py. A teacher's row is joined to the unscaled row of
    the students that were taught without or with temperature scaling, as the row's own `scaling`
    says. A student whose teacher is not among the rows stands as a network of its own.
    """
    test = distinguish(rows[rows["split"] == "test"])
    is_student = test["teacher"].isin(test["weights"])
    students = test[is_student & (test["scaling"] == "no")]
    students = students[
        ["teacher", "teacher_scaling", "model", "student_setting", "accuracy", "log_loss"]
    ]
    students = students.assign(student=students["model"] + students["student_setting"]).rename(
        columns={"accuracy": "student_accuracy", "log_loss": "student_log_loss"}
    )
    joined = test[~is_student].merge(
        students.drop(columns=["model", "student_setting"]),
        how="left",
        left_on=["weights", "scaling"],
        right_on=["teacher", "teacher_scaling"],
        suffixes=("", "_of_student"),
    )
    return joined.fillna({"student": ""})


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds, a row for each setting and scaling.

    rows: what with_students returns. The columns of SHOWN become <name>_mean and <name>_std (NaN
    for one seed); `seeds` counts them.
    """
    keys = [*BLOCK, "training", "scaling", "student"]
    groups = rows.groupby(keys, sort=False)
    summary = groups[list(SHOWN)].agg(["mean", "std"])
    summary.columns = ["_".join(column) for column in summary.columns]
    summary.insert(0, "seeds", groups["seed"].nunique())
    return summary.reset_index()


def to_markdown(summary: pd.DataFrame, ece_bins: int) -> str:
    """The ILS README's table: mean ± sd, the best of each data set and network in bold."""
    cells = pd.DataFrame(
        {
            "Data set": summary["dataset"],
            "Network": summary["model"],
            "Training": summary["training"],
            "Temperature scaling": summary["scaling"],
            "Seeds": summary["seeds"].astype(str),
        }
    )
    for name, (heading, best, digits, factor) in SHOWN.items():
        mean, std = factor * summary[f"{name}_mean"], factor * summary[f"{name}_std"]
        shown = mean.round(digits)
        blocks = [summary[key] for key in BLOCK]
        winner = shown == shown.groupby(blocks).transform(best.__name__)
        texts = []
        for m, s, wins in zip(mean, std, winner, strict=True):
            text = "" if pd.isna(m) else f"{m:.{digits}f}"
            text = f"**{text}**" if wins and text else text
            texts.append(text if pd.isna(s) else f"{text} ± {s:.{digits}f}")
        heading = f"{heading} ({ece_bins} bins)" if name == "ece" else heading
        cells[heading] = texts
    if summary["student"].nunique() > 1 + ("" in set(summary["student"])):
        cells["Student"] = summary["student"]
    return markdown(cells)


def markdown(cells: pd.DataFrame) -> str:
    """A table of strings with its columns aligned, so that it reads well in a terminal too."""
    table = [list(cells.columns), *cells.astype(str).to_numpy().tolist()]
    table = [[text.replace("|", "\\|") for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in table
    )
    return "\n".join(f"| {line} |" for line in lines) + "\n"
