"""What does the study with a known truth measure, and what does it show?

Synthetic-study.py trains; here are its data sets, its networks' first weights, its metrics, tables
and the figure of the data. Its curves are in utils/smoothing_curves.py.
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from models import build_model
from utils import evaluate, gaussians, tables
from utils.plots import CLASS_STYLES, COLUMN, STYLE, save
from utils.replicas import Replicas, Samples, Trained
from utils.tables import Measured, Shown

VANILLA, LABEL_SMOOTHING, BAYES = "vanilla", "label-smoothing", "Bayes-optimal"

SHOWN = {
    "accuracy": Shown("Accuracy %", 2, "max", 100),
    "log_loss": Shown("Log loss", 4, "min"),
    "ece": Shown("ECE", 4, "min"),
    "classwise_ece": Shown("Class-wise ECE", 4, "min"),
    "true_calibration_error": Shown("True calibration error", 4, "min"),
    "pointwise_calibration_error": Shown("Pointwise", 4, "min"),
    "divergence": Shown("KL from truth", 4, "min"),
}
# ILS paper, appendix: the first four of SHOWN, without temperature scaling.
PUBLISHED = {
    BAYES: "81.98, .4444, .0067, .0234",
    VANILLA: "78.45, .5589, .0426, .0668",
    LABEL_SMOOTHING: "79.44, .5318, .0293, .0723",
    "instance-based-ils1": "80.18, .5041, .0235, .0495",
    "instance-based-ils2": "79.56, .5232, .0287, .0496",
    "instance-based-ils": "80.13, .5089, .0269, .0449",
}


class Data(NamedTuple):
    """R sampled data sets."""

    training: Samples
    validation: Samples
    test: Samples


def draw(replicas: int, first: int) -> Data:
    """Data sets of the streams from `first` on: stream 0 is the data set "gaussians".

    Training and validation have 50 points of each class, the test split 5000.
    """
    count = gaussians.TRAINING_POINTS + gaussians.TEST_POINTS
    drawn = [gaussians.sample(count, first + number) for number in range(replicas)]
    images = torch.stack([torch.from_numpy(points) for points, _ in drawn])[..., None, None]
    labels = torch.stack([torch.from_numpy(labels) for _, labels in drawn])
    half = gaussians.TRAINING_POINTS // 2
    parts = (half, half, gaussians.TEST_POINTS)
    return Data(*map(Samples, images.split(parts, 1), labels.split(parts, 1)))


def truth(samples: Samples) -> Tensor:
    """P(class | x) of each point, (R, N, 3) float64."""
    return gaussians.posterior(samples.images.flatten(2))


def new_networks(training: Samples, first: int) -> Replicas:
    """The feed-forward networks as the scripts would begin with them, of the seeds from `first`."""
    networks = []
    for number, images in enumerate(training.images.double() / 255):
        torch.manual_seed(first + number)
        mean, std = images.mean(0).flatten(), images.std(0, correction=0).flatten()
        shape, classes = tuple(images.shape[1:]), len(gaussians.CLASSES)
        networks.append(
            build_model("feed_forward", shape, classes, mean.tolist(), std.tolist()).eval()
        )
    return Replicas.stack(networks)


# ------------------------------------------------------------------------------------------ tables


def measure(logits: Tensor, labels: Tensor, posterior: Tensor, bins: int) -> dict[str, float]:
    """What a network says of its test points (N, 3), by their labels and by the truth."""
    return {
        **evaluate.all_metrics(logits, labels, bins),
        "true_calibration_error": evaluate.true_calibration_error(logits, posterior, bins),
        "pointwise_calibration_error": evaluate.pointwise_calibration_error(logits, posterior),
        "divergence": evaluate.divergence_from_truth(logits, posterior),
    }


def temperatures(networks: Replicas, validation: Samples) -> list[float]:
    """Each network's, fitted to its validation points."""
    logits = networks.predict(validation.images)
    return [evaluate.fit_temperature(z, y) for z, y in zip(logits, validation.labels, strict=True)]


def tidy_rows(method: str, trained: Trained, data: Data, first: int, bins: int) -> list[dict]:
    """Two rows a network, without and with temperature scaling, of its test points."""
    logits, posteriors = trained.networks.predict(data.test.images).double(), truth(data.test)
    fitted, rows = temperatures(trained.networks, data.validation), []
    for replica, temperature in enumerate(fitted):
        z, y, posterior = logits[replica], data.test.labels[replica], posteriors[replica]
        about = {
            "replica": first + replica,
            "method": method,
            "hyper_parameters": json.dumps(trained.hyper_parameters[replica]),
            "epoch": int(trained.epoch[replica]),
            "validation_log_loss": float(trained.loss[replica]),
        }
        for scaling, divisor in (("no", 1.0), ("yes", temperature)):
            metrics = measure(z / divisor, y, posterior, bins)
            rows.append({**about, "scaling": scaling, "temperature": divisor, **metrics})
    return rows


def bayes_rows(data: Data, first: int, bins: int) -> list[dict]:
    """What the truth itself scores on the same test points."""
    return [
        {
            "replica": first + replica,
            "method": BAYES,
            "scaling": "no",
            **measure(posterior.log(), labels, posterior, bins),
        }
        for replica, (posterior, labels) in enumerate(
            zip(truth(data.test), data.test.labels, strict=True)
        )
    ]


def write_tables(rows: pd.DataFrame, folder: Path, ece_bins: int) -> str:
    """Writes results.csv, summary and comparison (.csv, .md, .tex); returns the summary as text.

    rows: replica, method, scaling and what `measure` gives, a row for each network and scaling.
    """
    tables.write_text(folder / "results.csv", rows.to_csv(index=False))
    replicas = rows["replica"].nunique()
    summary = summarise(rows)
    caption = (
        f"Test split, mean ± standard deviation over {replicas} sampled data sets; temperature "
        f"fitted to the validation split. {tables.ece_rule(ece_bins)} True calibration error: the "
        "same with the true probability of the prediction in place of hit or miss. Pointwise: its "
        "mean distance from the confidence, point by point. KL from truth: log loss above the "
        "least possible. Published: the ILS paper's appendix, whose Gaussians lie elsewhere. The "
        "best of what was trained is bold."
    )
    text = tables.write(folder, "summary", summary, summary_cells(summary), caption)
    differences = compare(rows)
    caption = (
        "Row less reference on the same data set with the same first weights, "
        f"mean [95 % interval of the paired t-test over {replicas} data sets], not corrected for "
        "the number of comparisons."
    )
    cells = comparison_cells(differences)
    tables.write(folder, "comparison", differences, cells, caption)
    return text


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """<metric>_mean and <metric>_std over the replicas, for each method and scaling."""
    names = [*SHOWN, "temperature", "epoch"]
    summary = rows.groupby(["method", "scaling"], sort=False)[names].agg(["mean", "std"])
    summary.columns = ["_".join(column) for column in summary.columns]
    summary = summary.reset_index()
    unscaled = summary["scaling"] == "no"
    summary["published"] = summary["method"].map(PUBLISHED).where(unscaled).fillna("")
    return summary


def summary_cells(summary: pd.DataFrame) -> pd.DataFrame:
    cells = pd.DataFrame({"Training": summary["method"], "Temp. scaling": summary["scaling"]})
    trained = summary["method"] != BAYES
    for name, column in SHOWN.items():
        values = (column.factor * summary[f"{name}_mean"]).round(column.digits)
        best = trained & (values == getattr(values[trained], column.best)())
        cells[column.heading] = [
            Measured(column.text(mean), f" ± {column.text(std)}", is_best)
            for mean, std, is_best in zip(
                summary[f"{name}_mean"], summary[f"{name}_std"], best, strict=True
            )
        ]
    cells["Published accuracy %, log loss, ECE, class-wise ECE"] = summary["published"]
    return cells


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Paired differences to vanilla and to label smoothing: a row each, metric by metric."""
    compared = []
    for scaling, group in rows[rows["method"] != BAYES].groupby("scaling", sort=False):
        values = group.set_index(["method", "replica"])[list(SHOWN)]
        for reference in (VANILLA, LABEL_SMOOTHING):
            for method in group["method"].unique():
                difference = values.loc[method] - values.loc[reference]
                if method == reference or (reference, method) == (LABEL_SMOOTHING, VANILLA):
                    continue
                row = {"reference": reference, "method": method, "scaling": scaling}
                interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
                for name, *three in zip(SHOWN, difference.mean(), *interval, strict=True):
                    row |= dict(zip((name, f"{name}_low", f"{name}_high"), three, strict=True))
                compared.append(row)
    return pd.DataFrame(compared)


def comparison_cells(compared: pd.DataFrame) -> pd.DataFrame:
    cells = pd.DataFrame(
        {
            "Reference": compared["reference"],
            "Training": compared["method"],
            "Temp. scaling": compared["scaling"],
        }
    )
    for name in ("accuracy", "log_loss", "ece", "true_calibration_error", "divergence"):
        column = SHOWN[name]
        difference, low, high = (
            compared[name + end].map(lambda value, column=column: column.text(value, "+"))
            for end in ("", "_low", "_high")
        )
        cells[f"Δ {column.heading}"] = list(
            map(Measured, difference, " [" + low + ", " + high + "]")
        )
    return cells


# ------------------------------------------------------------------------------------ the data seen

DATA_CAPTION = (
    "The training points of the first sampled data set, and the class that is likeliest at each "
    "place: the Bayes-optimal decision. The lighter, the less sure; crosses are the centres of the "
    "wide Gaussians (large) and of the narrow ones (small)."
)
EXTENT = 5.0  # of the part of the plane that is shown, from the origin


def draw_regions(axes) -> None:
    """Shades the plane by the likeliest class, the paler the less sure."""
    line = torch.linspace(-EXTENT, EXTENT, 301, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    probabilities, likeliest = gaussians.posterior(torch.stack([x, y], -1)).max(-1)
    colours = np.array([mpl.colors.to_rgb(style["color"]) for style in CLASS_STYLES[:3]])
    strength = 0.45 * (1.5 * probabilities.numpy() - 0.5)[..., None]  # 0 at a probability of 1/3
    shades = 1 - strength * (1 - colours[likeliest.numpy()])
    axes.imshow(shades, origin="lower", extent=2 * (-EXTENT, EXTENT), interpolation="bilinear")
    axes.set(aspect="equal", xlabel="x1", ylabel="x2")


@mpl.rc_context(STYLE)
def data_figure(training: Samples, folder: Path) -> None:
    figure = Figure(figsize=(COLUMN, COLUMN), layout="constrained")
    axes = figure.subplots()
    draw_regions(axes)
    points, labels = training.images[0].flatten(1), training.labels[0]
    for k, (name, style) in enumerate(zip(gaussians.CLASSES, CLASS_STYLES, strict=False)):
        inside = points[labels == k].numpy()
        axes.plot(*inside.T, linestyle="none", markersize=3, label=f"class {name}", **style)
    for centres, size in zip(gaussians.CENTRES.swapaxes(0, 1), (9, 5), strict=True):
        axes.plot(*centres.T, "x", color="black", markersize=size, markeredgewidth=1.5)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, folder, "data", "The data", DATA_CAPTION)
