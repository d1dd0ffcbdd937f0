"""Puts every published number beside what was measured here: the tables of docs/results.md.

    python results/parity.py

reads published.csv, in which a row is a published number, and the results.csv of the measured
tables, and replaces what stands between the marks in docs/results.md and, for MNIST and
Fashion-MNIST, in the README. Of a number that has not been measured the place stays empty.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
# The pages, and which rows of published.csv each shows.
PAGES = {
    HERE.parent / "docs" / "results.md": lambda row: True,
    HERE.parent / "README.md": lambda row: row["dataset"] in ("mnist", "fashionmnist"),
}
MARKS = "<!-- tables: python results/parity.py -->\n", "<!-- end of tables -->\n"
CELL = ["source", "dataset", "model", "method", "selected_by", "scaling"]
METRICS = {
    "accuracy": "accuracy %",
    "log_loss": "log loss",
    "ece": "ECE",
    "classwise_ece": "class-wise ECE",
    "student_accuracy": "student accuracy %",
    "student_log_loss": "student log loss",
}
# Equal-width bins of each source's ECE, and of ours beside it; who is counted by n.
BINS = {"ILS README": 10, "LR paper": 15, "ILS appendix": 15}
COUNTED = {"ILS README": "seeds", "LR paper": "seeds", "ILS appendix": "data sets"}
# The whole row once it has been measured.
DENSENET = "fashionmnist-densenet"
DENSENET += "-8-epochs" * (not (HERE / DENSENET).exists())
# Where the measured counterpart of a published table is: folder by (source, data set, network,
# what selected the hyper-parameters); without selection either will do.
MEASURED = {
    ("ILS README", "fashionmnist", "densenet", "validation log loss"): DENSENET,
    **{
        ("LR paper", dataset, "simple_dense", by): f"{dataset}-simple-dense-lr/{folder}"
        for dataset in ("mnist", "fashionmnist")
        for by, folder in (("none", "accuracy"), ("accuracy", "accuracy"), ("ece", "ece"))
    },
    ("ILS appendix", "gaussians", "feed_forward", "validation log loss"): "gaussians",
}


def measured(folder: str, model: str) -> pd.DataFrame:
    """method, scaling, metric and value, a row for each seed, of the test split."""
    path = HERE / folder / "results.csv"
    if not path.exists():
        return pd.DataFrame(columns=["method", "scaling", "metric", "value"])
    table = pd.read_csv(path)
    if "split" not in table:  # of Synthetic-study.py, which tests only
        return _long(table)
    table = table[table["split"] == "test"]
    networks = table[table["teacher"].isna() & (table["model"] == model)]
    # A student is known by its teacher, and measured without a temperature of its own.
    students = table[table["teacher"].isin(networks["weights"]) & (table["scaling"] == "no")]
    method = networks.drop_duplicates("weights").set_index("weights")["method"]
    students = students.assign(
        method=students["teacher"].map(method), scaling=students["teacher_scaling"]
    )
    students = _long(students.rename(columns=lambda name: f"student_{name}").rename(
        columns={"student_method": "method", "student_scaling": "scaling"}
    ))  # fmt: skip
    return pd.concat([_long(networks), students])


def _long(table: pd.DataFrame) -> pd.DataFrame:
    metrics = [name for name in METRICS if name in table]
    return table.melt(["method", "scaling"], metrics, "metric")


def compare() -> pd.DataFrame:
    """published.csv with the mean, standard deviation and number of our seeds, and z.

    z is the difference of our mean from the published number in standard deviations of ours over
    seeds or data sets: of the published numbers only the means are at hand.
    """
    published = pd.read_csv(HERE / "published.csv", dtype={"published": str})
    for column in ("mean", "std", "n"):
        published[column] = math.nan
    tables = {key: measured(folder, key[2]) for key, folder in MEASURED.items()}
    for index, row in published.iterrows():
        table = tables.get((row["source"], row["dataset"], row["model"], row["selected_by"]))
        if table is None:
            continue
        same = (table[["method", "scaling", "metric"]] == row[["method", "scaling", "metric"]]).all(
            axis=1
        )
        values = table.loc[same, "value"]
        if len(values):
            published.loc[index, ["mean", "std", "n"]] = values.mean(), values.std(), len(values)
    published["z"] = (published["mean"] - published["published"].astype(float)) / published["std"]
    return published


def text(row: pd.Series) -> str:
    percent = row["metric"].endswith("accuracy")
    scale, decimals = (100, 2) if percent else (1, 4)
    said = f"{100 * float(row['published']):.2f}" if percent else row["published"]
    if math.isnan(row["mean"]):
        return said + " /"
    said += f" / **{scale * row['mean']:.{decimals}f}**"
    if row["n"] > 1:
        said += f" ± {scale * row['std']:.{decimals}f}"
        # The published log losses of students seem to be on another scale: docs/results.md
        said += f" (z {row['z']:+z.1f})" * (row["metric"] != "student_log_loss")
    return said


def tables(shown: Callable[[pd.Series], bool]) -> str:
    """One Markdown table for each source, of the rows shown: published / ours."""
    parts = []
    compared = compare()
    for source, rows in compared[compared.apply(shown, axis=1)].groupby("source", sort=False):
        cells = rows.assign(text=rows.apply(text, axis=1)).pivot_table(
            "text", CELL, "metric", aggfunc="first", sort=False
        )
        metrics = [name for name in METRICS if name in cells]
        cells = cells[metrics].rename(columns=METRICS)
        student = rows["metric"].str.startswith("student_")
        for name, counted in ((COUNTED[source], rows[~student]), ("student seeds", rows[student])):
            if len(counted):
                cells[name] = counted.groupby(CELL)["n"].max().map("{:.0f}".format, "ignore")
        cells = cells.fillna("").reset_index()
        if cells["selected_by"].nunique() == 1:  # it tells no rows apart: the page says it
            cells = cells.drop(columns="selected_by")
        cells = cells.drop(columns="source").rename(
            columns={"dataset": "data set", "model": "network", "selected_by": "selected by"}
        )
        lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
        parts.append(f"### {source}\n\nPublished / ours. ECE: {BINS[source]} bins.\n\n")
        parts.append("".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines) + "\n")
    return "".join(parts)


def replaced(text: str, shown: Callable[[pd.Series], bool]) -> str:
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return before + MARKS[0] + "\n" + tables(shown) + MARKS[1] + after


if __name__ == "__main__":
    for page, shown in PAGES.items():
        page.write_text(replaced(page.read_text(), shown))
