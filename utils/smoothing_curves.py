"""How much should be smoothed, given what the teacher says of the true class?

ILS1 takes a factor that is quadratic in the teacher's probability q_y of the true class. Where the
truth is known the question has two answers, and both are drawn as functions of q_y:

* The *ideal* factor. The target nearest to the truth keeps t_y = P(y | x), so it gives up
  1 - P(y | x). The mean of this over points with the same q_y is the one factor ε that brings
  their targets nearest to the truth (the least mean KL(P(. | x) || t), whatever the shares).
* The *trained* factor, which the appendix's curves show: the constant ε that makes the best
  network when only the training points in one bin of q_y are smoothed, and all others are not.
  "Best" by the validation log loss, or by the divergence from the truth.

They need not agree: the second also mends what training on few points does wrong.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import r2_score
from torch import Tensor
from tqdm import tqdm

from utils import synthetic
from utils.checkpoint import write_text
from utils.evaluate import divergence_from_truth
from utils.losses import (
    cross_entropy_loss,
    instance_based_smoothing_loss,
    instance_based_targets,
)
from utils.plots import COLOURS, PAGE, STYLE, save
from utils.replicas import Candidate, Replicas, Samples, Trained, train

JUDGES = ("validation log loss", "divergence from the truth")  # of the trained factor
RESAMPLES = 1000  # of the replicas, for the intervals of the trained factor


def true_class_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """q_y, (...,), of logits (..., K)."""
    return logits.softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def ideal_factor(q_true: Tensor, posterior: Tensor, labels: Tensor, bins: int) -> pd.DataFrame:
    """Mean of 1 - P(y | x) in equal-width bins of q_y: a row for each bin that is not empty.

    q_true and labels (R, N), posterior (R, N, K). Columns: teacher_probability (mean q_y), factor,
    low and high (its quartiles over points), points (a replica).
    """
    ideal = 1 - posterior.gather(-1, labels[..., None]).squeeze(-1)
    points = pd.DataFrame({"q": q_true.flatten().numpy(), "ideal": ideal.flatten().numpy()})
    groups = points.groupby(_bin(q_true.flatten(), bins).numpy())
    return pd.DataFrame(
        {
            "teacher_probability": groups["q"].mean(),
            "factor": groups["ideal"].mean(),
            "low": groups["ideal"].quantile(0.25),
            "high": groups["ideal"].quantile(0.75),
            "points": groups.size() / len(q_true),
        }
    ).reset_index(drop=True)


def trained_factors(
    start: Replicas,
    data: synthetic.Data,
    vanilla: Trained,
    teacher_logits: Tensor,
    smoothings: Sequence[float],
    bins: int,
    **settings,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Trains all replicas for each bin of q_y and each ε, which smooths that bin alone.

    Returns what each training changed against no smoothing (means over the replicas and their
    standard errors), and for each of JUDGES the best ε of each bin, with the columns of
    `ideal_factor`: low and high are the 2.5 and 97.5 percentiles of the best ε over bootstrap
    samples of the replicas.
    """
    truth, count = synthetic.truth(data.test), len(teacher_logits)
    q_true = true_class_probability(teacher_logits, data.training.labels)
    filled = [b for b in range(bins) if (_bin(q_true, bins) == b).any()]
    without = torch.stack([vanilla.loss.double(), _divergences(vanilla, data, truth)])
    runs, values = [], torch.empty(2, len(filled), 1 + len(smoothings), count, dtype=torch.float64)
    values[:, :, 0] = without[:, None]  # no smoothing is the vanilla network, whatever the bin
    combinations = list(itertools.product(enumerate(filled), enumerate(smoothings, 1)))
    for (row, number), (column, smoothing) in tqdm(combinations, "curves", disable=None):
        loss = partial(smooth_bin, smoothing=smoothing, number=number, bins=bins)
        candidate = Candidate({}, loss, teacher_logits)
        found = train(start, data.training, data.validation, candidate, **settings)
        values[0, row, column] = found.loss
        values[1, row, column] = _divergences(found, data, truth)
        gained = values[:, row, column] - without
        about = {"bin": number, "smoothing": smoothing}
        for name, difference in zip(("log_loss", "divergence"), gained, strict=True):
            about[f"{name}_difference"] = float(difference.mean())
            about[f"{name}_error"] = float(difference.std() / count**0.5)
        runs.append(about)

    grid, resample = np.array([0.0, *smoothings]), np.random.default_rng(0)
    weights = resample.multinomial(count, [1 / count] * count, RESAMPLES).T / count
    curves = {}
    for name, value in zip(JUDGES, values.numpy(), strict=True):
        again = grid[(value @ weights).argmin(1)]  # (bins, resamples)
        low, high = np.quantile(again, (0.025, 0.975), axis=1)
        inside = [_bin(q_true, bins) == number for number in filled]
        curves[name] = pd.DataFrame(
            {
                "teacher_probability": [float(q_true[part].mean()) for part in inside],
                "factor": grid[value.mean(2).argmin(1)],
                "low": low,
                "high": high,
                "points": [int(part.sum()) / count for part in inside],
            }
        )
    return pd.DataFrame(runs), curves


def smooth_bin(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, smoothing: float, number: int, bins: int
) -> Tensor:
    """(N,): label smoothing as in ILS1, t_j = ε/(K - 1), in one bin of q_y; elsewhere -log p_y."""
    q_true = true_class_probability(teacher_logits, labels)
    even = torch.zeros_like(logits)  # a teacher to whom all wrong classes are alike
    return torch.where(
        _bin(q_true, bins) == number,
        instance_based_smoothing_loss(logits, labels, even, smoothing, reduction="none"),
        cross_entropy_loss(logits, labels, reduction="none"),
    )


def _bin(q_true: Tensor, bins: int) -> Tensor:
    return (q_true * bins).long().clamp(max=bins - 1)


def _divergences(trained: Trained, data: synthetic.Data, truth: Tensor) -> Tensor:
    """(R,), on the test points."""
    pairs = zip(trained.networks.predict(data.test.images), truth, strict=True)
    return torch.tensor([divergence_from_truth(*pair) for pair in pairs], dtype=torch.float64)


# ------------------------------------------------------------------------------------------- shapes


def fit(curve: pd.DataFrame) -> dict[str, float]:
    """Least squares, each bin weighted by its points: how well a line and a parabola explain it.

    P2·(q - P1)² + least is the parabola; the r2 are the shares of the variation explained.
    """
    q, factor, weight = (curve[name] for name in ("teacher_probability", "factor", "points"))
    result = {}
    for name, degree in (("line", 1), ("parabola", 2)):
        terms = np.polyfit(q, factor, degree, w=np.sqrt(weight))
        result[f"{name}_r2"] = r2_score(factor, np.polyval(terms, q), sample_weight=weight)
    shift = -terms[1] / (2 * terms[0])
    return result | {"P1": shift, "P2": terms[0], "least": np.polyval(terms, shift)}


def parabola(q: np.ndarray, fitted: dict[str, float]) -> np.ndarray:
    return fitted["P2"] * (q - fitted["P1"]) ** 2 + fitted["least"]


def write_all(
    start: Replicas,
    data: synthetic.Data,
    vanilla: Trained,
    temperatures: Tensor,
    smoothings: Sequence[float],
    bins: int,
    recipe: dict,
    folder: Path,
) -> None:
    """Draws both answers: curves.csv, curve_fits.csv, curve_runs.csv and the figure in `folder`.

    The teachers are the vanilla networks, their logits divided by `temperatures` (R,).
    """

    def teacher_logits(samples: Samples) -> Tensor:
        return vanilla.networks.predict(samples.images) / temperatures[:, None, None]

    curves = {}
    for name, samples in (("test points", data.test), ("training points", data.training)):
        q_true = true_class_probability(teacher_logits(samples), samples.labels)
        curves[name] = ideal_factor(q_true, synthetic.truth(samples), samples.labels, 2 * bins)
    runs, trained = trained_factors(
        start, data, vanilla, teacher_logits(data.training), smoothings, bins, **recipe
    )
    write(curves | trained, runs, folder)


def write(curves: dict[str, pd.DataFrame], runs: pd.DataFrame, folder: Path) -> None:
    fits = {name: fit(curve) for name, curve in curves.items()}
    table = pd.concat([curve.assign(curve=name) for name, curve in curves.items()])
    write_text(folder / "curves.csv", table.to_csv(index=False))
    fitted = pd.DataFrame({"curve": name, **values} for name, values in fits.items())
    write_text(folder / "curve_fits.csv", fitted.to_csv(index=False))
    write_text(folder / "curve_runs.csv", runs.to_csv(index=False))
    save(draw(curves, fits), folder, "curves", "Smoothing factor curves", CAPTION)


CAPTION = (
    "How much the true class should give up, against the probability that the calibrated teacher "
    "gives it. Left: the ideal factor, 1 less the true probability of the label; bars are its "
    "quartiles. Right: the constant factor that makes the best networks when it smooths the "
    "training points of one bin only; bars are 95 % intervals over the sampled data sets. Solid: "
    "the factor of ILS1 as it was reconstructed from the paper, min(2 (q - 0.8)^2, 0.2). Broken: "
    "the least-squares parabola of the curve of its colour."
)


@mpl.rc_context(STYLE)
def draw(curves: dict[str, pd.DataFrame], fits: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(PAGE, 3.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    q = np.linspace(0, 1, 201)
    teacher = torch.from_numpy(np.stack([q, 1 - q], axis=1)).log()
    targets = instance_based_targets(teacher, torch.zeros(len(q), dtype=torch.long), variant="ils1")
    reconstructed = 1 - targets[:, 0].numpy()
    marks = zip(("o", "s"), COLOURS[1:3], (-0.006, 0.006), strict=True)
    styles = dict(zip(("test points", "training points"), marks, strict=True))
    styles |= dict(zip(JUDGES, styles.values(), strict=True))
    for axes, title in zip(panels, ("Ideal factor", "Factor of the best networks"), strict=True):
        axes.plot(q, reconstructed, color="black", linewidth=1.6, label="ILS1, reconstructed")
        axes.set(title=title, xlabel="Teacher's probability of the true class", xlim=(0, 1))
        axes.set(ylim=(-0.02, 1.3), yticks=np.arange(6) / 5)  # with room for the legend
    panels[0].set_ylabel("Smoothing factor")
    for name, curve in curves.items():
        axes = panels[0] if name.endswith("points") else panels[1]
        marker, colour, aside = styles[name]
        # Beside each other where they would hide one another.
        place, factor = curve["teacher_probability"] + aside, curve["factor"]
        reach = [(factor - curve["low"]).clip(lower=0), (curve["high"] - factor).clip(lower=0)]
        axes.errorbar(
            place, factor, reach, linestyle="none", marker=marker, color=colour, linewidth=0.8,
            label=("on " if name.endswith("points") else "by ") + name,
        )  # fmt: skip
        axes.plot(q, parabola(q, fits[name]), color=colour, linestyle=(0, (4, 1.5)), linewidth=0.9)
    for axes in panels:
        axes.legend(loc="upper right")
    return figure
