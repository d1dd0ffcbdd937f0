"""Figures for a paper, made from logits that were collected once: what `--plots` writes.

    drawings = write_all(evaluated, Path("evaluation"), tsne_classes=None, bins=10)

Every figure is a PNG (300 dpi) and a PDF of the same content, between one column (3.3 in) and two
(6.9 in) wide, as it has panels, in letters of 7 points or more. Colours are Okabe and Ito's, which
the colour-blind tell apart; line styles, markers and hatches tell the same in black and white.

How seeds are treated. Runs that differ in nothing but their seed are one method here. Each figure
says below what it does with its seeds; docs/figures.md shows the figures and how to read them.

Nothing here touches pyplot: figures are objects that no global state knows of.
"""

import itertools
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FuncFormatter
from threadpoolctl import threadpool_limits
from torch import Tensor

from utils import comparison, evaluate, tables
from utils.checkpoint import write_file
from utils.errors import InputError
from utils.evaluate import calibration_bins, expected_calibration_error
from utils.inference import Evaluated
from utils.losses import label_relaxation_loss, label_smoothing_loss

COLUMN, PAGE = 3.3, 6.9  # widths in inches, of one column and of two
PANELS_A_ROW = 4

# Okabe and Ito, Color Universal Design, 2008; without yellow, too pale for a line on white.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # letters stay letters: journals refuse matplotlib's default, Type 3
    "text.parse_math": False,  # a class may be called "$x$"
    "text.usetex": False,
}

BIN_COUNTS = range(5, 51)
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point

TSNE_IMAGES = 600  # at most; shared equally by the classes
TSNE_CLASSES = 3
TSNE_PERPLEXITY = 30
# Filled, open and crossed marks stay apart in black and white where shades of grey would not.
CLASS_STYLES = [
    {"marker": marker, "color": COLOURS[colour], "markerfacecolor": face, "markeredgewidth": 0.6}
    for marker, colour, face in (
        ("o", 2, COLOURS[2]), ("^", 1, "white"), ("+", 0, "none"),
        ("s", 5, COLOURS[5]), ("D", 3, "white"), ("x", 4, "none"),
    )
]  # fmt: skip

SCALINGS = {"no": "without temperature scaling", "yes": "with temperature scaling"}
SCALED_WORD = {"no": "unscaled", "yes": "temperature-scaled"}  # where there is little room


class Drawing(NamedTuple):
    """A figure on disk, and what is said of it."""

    title: str
    caption: str
    png: Path
    pdf: Path


@dataclass
class Method:
    """The runs of a block that differ in their seed alone, and how they are drawn everywhere."""

    label: str
    style: dict  # color, linestyle, marker
    runs: list[Evaluated] = field(default_factory=list)  # lowest seed first


# ------------------------------------------------------------------------------ what is compared


def blocks(evaluated: Sequence[Evaluated]) -> dict[str, list[Method]]:
    """The methods of each data set and network, under a title; the vanilla one first.

    Students stand in a block of their own. The same network given twice counts once.
    """
    found: dict[str, dict[str, Method]] = {}
    seen = set()
    for run, label in zip(evaluated, _labels(evaluated), strict=True):
        if (run.weights_hash, label) in seen:
            continue
        seen.add((run.weights_hash, label))
        kind = ", distilled students" if run.is_student else ""
        methods = found.setdefault(f"{run.data['dataset']}, {run.model_name}{kind}", {})
        methods.setdefault(label, Method(label, {})).runs.append(run)
    for title, methods in found.items():
        ordered = sorted(methods.values(), key=lambda m: m.runs[0].training["method"] != "vanilla")
        for number, method in enumerate(ordered):
            method.style = line_style(number)
            method.runs.sort(key=lambda run: run.training["seed"])
        found[title] = ordered
    return found


def _labels(evaluated: Sequence[Evaluated]) -> list[str]:
    """The names that the tables give to the settings."""
    rows = [
        {
            "dataset": run.data["dataset"],
            "model": run.model_name,
            "training": tables.setting(run.training["method"], run.training["requested"]),
            "recipe": json.dumps(run.recipe),
            "teacher": run.teacher["weights"] if run.is_student else None,
        }
        for run in evaluated
    ]
    table = pd.DataFrame(rows)
    return list(table["training"] + tables.differences(table))


def line_style(number: int) -> dict:
    """Differs in colour, dashes and marker from its neighbours, and repeats after 280 methods."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


# ------------------------------------------------------------------------------ writing


def write_all(
    evaluated: Sequence[Evaluated],
    output: Path,
    tsne_classes: Sequence[str] | None = None,
    bins: int = 10,
) -> list[Drawing]:
    """Writes every figure of every data set and network into the folder `output`.

    tsne_classes: names or numbers of at least two classes, or None for those that the vanilla
    network (or the first method) confuses most. bins: of the reliability diagrams, and marked in
    the figure of ECE against bins. Raises InputError if a class is unknown or nothing can be
    written.
    """
    compared = blocks(evaluated)
    chosen = choose_all_classes(evaluated, tsne_classes)
    drawings = []
    for title, methods in compared.items():
        name = slugify(title)

        def add(kind: str, figure: Figure, caption: str, name=name, title=title) -> None:
            heading = f"{kind}: {title}"
            drawings.append(save(figure, output, f"{name}-{slugify(kind)}", heading, caption))

        add("Reliability", reliability(methods, bins), RELIABILITY_CAPTION)
        add("ECE by bins", ece_by_bins(methods, bins), ECE_CAPTION)
        histories = read_histories(methods)
        if histories:
            add("Training curves", training_curves(methods, histories), CURVES_CAPTION)
        try:
            add("t-SNE", embedding(methods, chosen[title]), TSNE_CAPTION)
        except InputError as error:  # too few images
            if tsne_classes:
                raise
            print(f"left out: the t-SNE of {title} ({error})", file=sys.stderr)
    drawings.append(save(simplex(), output, "loss-triangle", "Loss triangle", SIMPLEX_CAPTION))
    return drawings


def choose_all_classes(
    evaluated: Sequence[Evaluated], tsne_classes: Sequence[str] | None
) -> dict[str, list[int]]:
    """The classes of the t-SNE of each data set and network. Raises InputError as `write_all` does,
    before anything is written."""
    return {
        title: choose_classes(methods, tsne_classes) for title, methods in blocks(evaluated).items()
    }


def save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Drawing:
    """Writes <folder>/<name>.png and .pdf, whole or not at all."""
    drawing = Drawing(title, caption, folder / f"{name}.png", folder / f"{name}.pdf")
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The font lacks, say, Chinese: it draws boxes, as it says once a letter.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        write_file(drawing.png, lambda file: figure.savefig(file, format="png", dpi=300))
        # Without its date the file is the same whenever it is made.
        undated = {"CreationDate": None}
        write_file(drawing.pdf, lambda file: figure.savefig(file, format="pdf", metadata=undated))
    return drawing


def in_markdown(drawings: Sequence[Drawing]) -> str:
    """A page of the figures in one folder, each with its caption."""
    parts = []
    for drawing in drawings:
        title, caption = map(tables.escape_markdown, (drawing.title, drawing.caption))
        parts.append(f"**{title}.** {caption}\n\n![{title}]({drawing.png.name})\n")
    return "\n".join(parts)


def slugify(text: str) -> str:
    """A file name of lower-case letters, digits and single hyphens, whatever the text."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:80].strip("-") or "unnamed"


def shorten(text: str, width: int) -> str:
    """On one line, with an ellipsis if need be."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def wrap(text: str, width: int) -> str:
    """On at most about three lines; "smoothing 0.1" is not torn apart where that can be helped."""
    parts = shorten(text, 3 * width).split(", ")
    parts = [part if len(part) >= width else part.replace(" ", "\xa0") for part in parts]
    return textwrap.fill(", ".join(parts), width).replace("\xa0", " ")


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns of panels, a panel for each method."""
    rows = -(-count // PANELS_A_ROW)
    return rows, -(-count // rows)


def _legend_below(figure: Figure, methods: list[Method]) -> None:
    handles = [Line2D([], [], label=shorten(m.label, 70), **m.style) for m in methods]
    # Columns that are as wide as their longest name, as many as fit.
    widest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(120 / (widest + 10))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2)


def _plain(axis) -> None:
    """Powers of ten as numbers: matplotlib would write them in formulas, which are turned off."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


# ------------------------------------------------------------------------------ reliability


RELIABILITY_CAPTION = (
    "Accuracy in equal-width bins of the confidence, on the test split, without (above) and with "
    "temperature scaling (below). Bars: accuracy of the bin. Points: the same at the bin's mean "
    "confidence, with a 95 % Wilson interval; on the diagonal confidence is deserved, below it "
    "the network is overconfident. Beneath: images in each bin. Several seeds are pooled; as they "
    "share test images (with --protocol lr some), intervals and counts are for the mean number of "
    "images a seed. "
    "ECE is the mean over the seeds ± sample standard deviation, as in the tables."
)


class ReliabilityBins(NamedTuple):
    """float64 arrays (M,); NaN where a bin is empty, save count."""

    count: np.ndarray  # images a seed
    confidence: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray  # 95 % interval of the accuracy
    high: np.ndarray


def reliability_bins(runs: Sequence[Evaluated], scaling: str, bins: int) -> ReliabilityBins:
    """The bins of all seeds together.

    Seeds are repeats on the same images, and pooling them is no evidence on more images: so the
    interval's number of images is the mean over the seeds, not the sum.
    """
    parts = [calibration_bins(r.scaled("test", scaling), r.labels["test"], bins) for r in runs]
    count = sum(part.count for part in parts)
    confidence = sum((part.confidence * part.count).nan_to_num() for part in parts) / count
    accuracy = sum((part.accuracy * part.count).nan_to_num() for part in parts) / count
    count = (count / len(runs)).numpy()
    low, high = wilson_interval(accuracy.numpy(), count)
    return ReliabilityBins(count, confidence.numpy(), accuracy.numpy(), low, high)


def wilson_interval(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a probability, of which `share` was seen in `count` trials; NaN for none.

    Wilson, Probable inference, the law of succession, and statistical inference, 1927. Unlike
    share ± 2 standard errors it stays in [0, 1] and is not empty at a share of 0 or 1.
    """
    count = np.where(count > 0, count, np.nan)
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * np.sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    total = 1 + Z_95**2 / count
    return (centre - spread) / total, (centre + spread) / total


@mpl.rc_context(STYLE)
def reliability(methods: list[Method], bins: int) -> Figure:
    bands, columns = _grid(len(methods))
    rows = bands * len(SCALINGS)
    figure = Figure(figsize=(max(COLUMN, PAGE * columns / PANELS_A_ROW), 2.15 * rows + 0.3))
    figure.set_layout_engine("constrained", h_pad=0.035, w_pad=0.03)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    share = None
    for number, method in enumerate(methods):
        for place, scaling in enumerate(SCALINGS):
            row = 2 * (len(SCALINGS) * (number // columns) + place)
            column = number % columns
            axes = figure.add_subplot(grid[row, column])
            below = figure.add_subplot(grid[row + 1, column], sharex=axes, sharey=share)
            share = share or below
            _reliability_panel(axes, below, method, scaling, bins)
            if column == 0:
                axes.set_ylabel(f"{SCALED_WORD[scaling]}\n\nAccuracy")
                below.set_ylabel("Images")
            else:
                axes.tick_params(labelleft=False)
                below.tick_params(labelleft=False)
            heading = [wrap(method.label, 28)] if place == 0 else []
            axes.set_title("\n".join([*heading, _ece_in_words(method.runs, scaling, bins)]))
    handles = [
        Patch(facecolor="#BFD9EA", edgecolor="0.4", label="accuracy of the bin"),
        Line2D([], [], color="black", marker="o", linestyle="-", label="at mean confidence, 95 %"),
        Line2D([], [], color="0.3", linestyle="--", label="perfectly calibrated"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if columns > 1 else 1)
    return figure


def _reliability_panel(axes, below, method: Method, scaling: str, bins: int) -> None:
    binned = reliability_bins(method.runs, scaling, bins)
    lefts = np.arange(bins) / bins
    bar = {"width": 1 / bins, "align": "edge", "edgecolor": "0.4", "linewidth": 0.4}
    axes.bar(lefts, binned.accuracy, facecolor="#BFD9EA", **bar)
    axes.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=0.8)
    filled = binned.count > 0
    errors = [binned.accuracy - binned.low, binned.high - binned.accuracy]
    axes.errorbar(
        binned.confidence[filled],
        binned.accuracy[filled],
        # The interval can miss the share itself by a rounding error, at a share of 0 or 1.
        yerr=np.maximum(np.array(errors)[:, filled], 0),
        color="black", marker="o", markersize=2.5, linestyle="none", elinewidth=0.9, capsize=1.5,
        clip_on=False, zorder=3,
    )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.tick_params(labelbottom=False)
    below.bar(lefts, binned.count, facecolor="0.75", **bar)
    below.set_yscale("log")
    most = len(method.runs[0].labels["test"])
    # Below the bar of a bin that has one image in one of the seeds.
    below.set(ylim=(0.5 / len(method.runs), 2 * most), xlabel="Confidence", xticks=[0, 0.5, 1])
    below.set_xticklabels(["0", "0.5", "1"])
    ticks = [10**power for power in range(0, 9, 2) if 10**power <= most]
    below.set_yticks(ticks)
    _plain(below.yaxis)


def _ece_in_words(runs: list[Evaluated], scaling: str, bins: int) -> str:
    values = [
        expected_calibration_error(run.scaled("test", scaling), run.labels["test"], bins)
        for run in runs
    ]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"ECE ({bins} bins) {np.mean(values):.3f}{spread}"


# ------------------------------------------------------------------------------ ECE by bins


ECE_CAPTION = (
    "Expected calibration error on the test split against its number of equal-width bins. Lines: "
    "mean over the seeds. Bands: from the lowest seed to the highest. Where lines cross, the "
    "ranking hangs on the bins. Grey line: the bins of the tables."
)


def ece_curves(method: Method, scaling: str) -> np.ndarray:
    """(seeds, numbers of bins): the ECE of each run at each of BIN_COUNTS."""
    curves = [
        evaluate.expected_calibration_errors(
            run.scaled("test", scaling), run.labels["test"], BIN_COUNTS
        )
        for run in method.runs
    ]
    return np.array(curves)


@mpl.rc_context(STYLE)
def ece_by_bins(methods: list[Method], bins: int) -> Figure:
    figure = Figure(figsize=(PAGE, 2.5 + 0.12 * len(methods)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (scaling, words) in zip(panels, SCALINGS.items(), strict=True):
        axes.axvline(bins, color="0.8", linewidth=2, zorder=0)
        for number, method in enumerate(methods):
            curves = ece_curves(method, scaling)
            axes.plot(BIN_COUNTS, curves.mean(0), markevery=(number % 5, 5), **method.style)
            if len(curves) > 1:
                band = {"color": method.style["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(BIN_COUNTS, curves.min(0), curves.max(0), **band)
        axes.set(title=words.capitalize(), xlabel="Number of bins", xlim=(BIN_COUNTS[0], 50))
    panels[0].set(ylabel="ECE", ylim=(0, None))
    _legend_below(figure, methods)
    return figure


# ------------------------------------------------------------------------------ training curves


CURVES_CAPTION = (
    "Training loss, and log loss, accuracy and ECE of the validation split after each epoch. A "
    "line for each seed; its marker is the epoch that was kept. With --protocol lr the line is of "
    "the network selected, before it was trained again. Training losses of different methods are "
    "different quantities and not to be compared in height."
)
CURVES = {
    "train_loss": "Training loss, each its own",
    "validation_log_loss": "Validation log loss",
    "validation_accuracy": "Validation accuracy (%)",
    "validation_ece": "Validation ECE",
}


def read_histories(methods: list[Method]) -> dict[Path, pd.DataFrame]:
    """The history.csv beside each checkpoint; those that are missing or damaged are named."""
    histories = {}
    for run in (run for method in methods for run in method.runs):
        path = run.path.with_name("history.csv")
        if run.training["trained_on"] != "train":  # nothing was left to validate on
            path = run.path.with_name("selection") / "history.csv"
        try:
            table = pd.read_csv(path, usecols=["epoch", *CURVES], dtype=float)
            if table.empty:
                raise ValueError("it has no rows")
            histories[run.path] = table
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            reason = " ".join(str(error).split())[:200]
            print(f"left out of the training curves: {path} ({reason})", file=sys.stderr)
    return histories


@mpl.rc_context(STYLE)
def training_curves(methods: list[Method], histories: dict[Path, pd.DataFrame]) -> Figure:
    lines, methods = [], [m for m in methods if any(run.path in histories for run in m.runs)]
    for method, run in ((m, run) for m in methods for run in m.runs if run.path in histories):
        history = histories[run.path]
        kept = np.flatnonzero(history["epoch"] == run.training["epoch"])
        lines.append((history, {**method.style, "linewidth": 0.9, "markevery": list(kept)}))
    figure = _curves(4.1 + 0.12 * len(methods), lines)
    _legend_below(figure, methods)
    return figure


@mpl.rc_context(STYLE)
def training_curve(history: Path) -> Figure:
    """The same panels for one training. history: its history.csv."""
    return _curves(4.1, [(pd.read_csv(history), {})])


def _curves(height: float, lines: list[tuple[pd.DataFrame, dict]]) -> Figure:
    """A panel for each of CURVES. lines: each a history and how it is drawn."""
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, words) in zip(panels.flat, CURVES.items(), strict=True):
        factor = 100 if column.endswith("accuracy") else 1
        for history, style in lines:
            axes.plot(history["epoch"], factor * history[column], **style)
        axes.set_ylabel(words)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[1]:
        axes.set_xlabel("Epoch")
    figure.align_ylabels()
    return figure


# ------------------------------------------------------------------------------ t-SNE


TSNE_CAPTION = (
    "t-SNE (van der Maaten and Hinton 2008) of the logits of the same test images for every "
    "method, with the same settings and seed; networks of the lowest seed that all have. Distances "
    "between clusters, their sizes and the axes mean little; which classes touch, and how tight a "
    "class lies, is what the panels show."
)


def choose_classes(methods: list[Method], wanted: Sequence[str] | None) -> list[int]:
    """The classes that were asked for, by name or number; or those most confused."""
    names = methods[0].runs[0].data["classes"]
    if wanted is None:
        return most_confused(methods[0].runs, len(names))
    chosen = []
    for text in wanted:
        if text in names:
            chosen.append(names.index(text))
        elif text.isascii() and text.isdecimal() and int(text[:9]) < len(names):
            chosen.append(int(text[:9]))
        else:
            known = ", ".join(f"{i} {shorten(name, 30)}" for i, name in enumerate(names[:200]))
            raise InputError(
                f"--tsne_classes: no class {text[:50]!r} in "
                f"{methods[0].runs[0].data['dataset']}; a name or a number of these would do: "
                f"{known}"
            )
    chosen = list(dict.fromkeys(chosen))
    if len(chosen) < 2:
        raise InputError(
            f"--tsne_classes: {len(chosen)} class given, two different ones or more expected"
        )
    return chosen


def most_confused(runs: Sequence[Evaluated], num_classes: int) -> list[int]:
    """The two classes taken for each other most often, and the one that adds most to them.

    Confusion of two classes: share of the images of each that are taken for the other, added up
    over both directions and all seeds. In ascending order.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for run in runs:
        labels, predicted = run.labels["test"], run.logits["test"].argmax(1)
        cell = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        confusion += cell.view(num_classes, num_classes)
    confusion /= confusion.sum(1, keepdim=True).clamp(min=1)
    confusion += confusion.T.clone()
    confusion.fill_diagonal_(-1)  # never chosen again
    chosen = list(divmod(int(confusion.argmax()), num_classes))
    while len(chosen) < min(TSNE_CLASSES, num_classes):
        gain = confusion[chosen].sum(0)
        gain[chosen] = -len(chosen) - 1.0
        chosen.append(int(gain.argmax()))
    return sorted(chosen)


def embedded_runs(methods: list[Method]) -> list[tuple[Method, Evaluated]]:
    """One run a method, all of the same test images: of the lowest seed that all methods have.

    Some protocols draw other test images for each seed. A method without a run on the first
    method's images is left out, and stderr says so.
    """
    shared = set.intersection(*({r.training["seed"] for r in m.runs} for m in methods))
    seed = min(shared, default=methods[0].runs[0].training["seed"])
    found, images = [], None
    for method in methods:
        run = next((r for r in method.runs if r.training["seed"] == seed), method.runs[0])
        images = images or run.data["splits"]["test"]
        if run.data["splits"]["test"] == images:
            found.append((method, run))
        else:
            print(f"left out of the t-SNE: {method.label}, of other test images", file=sys.stderr)
    return found


def embedded_images(labels: Tensor, classes: list[int]) -> Tensor:
    """Positions in the test split: the first images of each class, as many of each."""
    most = TSNE_IMAGES // len(classes)
    return torch.cat([(labels == k).nonzero().flatten()[:most] for k in classes])


def embed(logits: Tensor) -> np.ndarray:
    """(N, 2): t-SNE with fixed settings; the same logits give the same picture."""
    from sklearn.manifold import TSNE  # slow to import, and only this needs it

    rows = logits.double().numpy()
    settings = {
        "perplexity": min(TSNE_PERPLEXITY, (len(rows) - 1) / 3),
        # Principal components of a network that says the same of all images do not exist.
        "init": "pca" if len(np.unique(rows, axis=0)) > 2 else "random",
        "random_state": 0,
    }
    with threadpool_limits(1):  # for so few points; threads would add up in a random order too
        return TSNE(2, **settings).fit_transform(rows)


@mpl.rc_context(STYLE)
def embedding(methods: list[Method], classes: list[int]) -> Figure:
    shown = embedded_runs(methods)
    first = shown[0][1]
    chosen = embedded_images(first.labels["test"], classes)
    if len(chosen) < 4:
        raise InputError(
            f"--tsne_classes: the test split of {first.data['dataset']} has {len(chosen)} images "
            "of these classes, 4 or more expected"
        )
    labels = first.labels["test"][chosen]
    rows, columns = _grid(len(shown))
    figure = Figure(figsize=(max(COLUMN, PAGE * columns / PANELS_A_ROW), 1.95 * rows + 0.3))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("t-SNE 2")
    for axes, (method, run) in zip(panels.flat, shown, strict=False):
        points = embed(run.logits["test"][chosen])
        for k, style in zip(classes, itertools.cycle(CLASS_STYLES), strict=False):
            inside = points[(labels == k).numpy()]
            axes.plot(*inside.T, linestyle="none", markersize=2.3, rasterized=True, **style)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1")
        axes.set_title(wrap(f"{method.label}, seed {run.training['seed']}", 28))
    names = first.data["classes"]
    handles = [
        Line2D([], [], linestyle="none", label=shorten(names[k], 30), **style)
        for k, style in zip(classes, itertools.cycle(CLASS_STYLES), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


# ------------------------------------------------------------------------------ loss triangle


SIMPLEX_ALPHA = 0.25  # larger than one trains with, so that the credal set can be seen
SIMPLEX_LEVELS = (0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
SIMPLEX_CAPTION = (
    "The loss of an image of the true class (starred corner) over all predictions for three "
    "classes: a corner is certainty, the centre is the uniform prediction. The smallest loss is "
    "subtracted, so that both panels start from 0. Left: label smoothing pulls every prediction "
    "to one point, the circle, and punishes being surer than that. Right: label relaxation is "
    "content with the whole hatched credal set, where loss and gradient are 0. Computed by the "
    f"losses that train, ε = α = {SIMPLEX_ALPHA}; see the LR paper's supplement."
)
CORNERS = np.array([[0.5, np.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])  # the true class on top


def triangle_grid(steps: int = 120) -> Tensor:
    """(N, 3) float64, probabilities on a grid that stays 0.001 off the edges, where log is."""
    weights = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return 0.001 + 0.997 * torch.tensor(weights, dtype=torch.float64) / steps


def excess_losses(probabilities: Tensor) -> dict[str, Tensor]:
    """(N,) for each loss, above the smallest it can be; class 0 is the true one."""

    def smoothing(p: Tensor) -> Tensor:
        true = torch.zeros(len(p), dtype=torch.int64)
        return label_smoothing_loss(p.log(), true, SIMPLEX_ALPHA, reduction="none")

    true = torch.zeros(len(probabilities), dtype=torch.int64)
    return {
        f"Label smoothing, ε = {SIMPLEX_ALPHA}": smoothing(probabilities)
        - smoothing(smoothed_target()),
        f"Label relaxation, α = {SIMPLEX_ALPHA}": label_relaxation_loss(
            probabilities.log(), true, SIMPLEX_ALPHA, reduction="none"
        ),
    }


def smoothed_target() -> Tensor:
    """(1, 3): where label smoothing's loss is least."""
    rest = SIMPLEX_ALPHA / 3
    return torch.tensor([[1 - 2 * rest, rest, rest]], dtype=torch.float64)


@mpl.rc_context(STYLE)
def simplex() -> Figure:
    figure = Figure(figsize=(PAGE, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    p = triangle_grid()
    x, y = (p.numpy() @ CORNERS).T
    colours = mpl.colormaps["cividis_r"]
    norm = mpl.colors.BoundaryNorm(SIMPLEX_LEVELS, colours.N, extend="max")
    for axes, (title, loss) in zip(panels, excess_losses(p).items(), strict=True):
        # Rounding may leave -1e-7 at the minimum, which no level would hold.
        values = loss.clamp(min=0).numpy()
        filled = axes.tricontourf(
            x, y, values, SIMPLEX_LEVELS, cmap=colours, norm=norm, extend="max"
        )
        axes.tricontour(x, y, values, SIMPLEX_LEVELS[1:], colors="black", linewidths=0.4)
        axes.add_patch(Polygon(CORNERS, fill=False, linewidth=0.8))
        axes.plot(*CORNERS[0], marker="*", markersize=9, color="black", clip_on=False)
        axes.set_title(title)
        for corner, name, place in zip(
            CORNERS, ("true class", "class 2", "class 3"), ("left", "center", "center"), strict=True
        ):
            shift = (8, -2) if place == "left" else (0, -9)
            axes.annotate(
                f"p({name}) = 1", corner, shift, textcoords="offset points", ha=place, va="center"
            )
        axes.set(aspect="equal", xlim=(-0.25, 1.25), ylim=(-0.1, 0.93))
        axes.set_axis_off()
    panels[0].plot(
        *(smoothed_target().numpy() @ CORNERS).T, marker="o", markersize=5, markerfacecolor="white",
        color="black",
    )  # fmt: skip
    panels[1].add_patch(
        Polygon(credal_corners(), fill=False, hatch="////", linewidth=1.2, linestyle="-")
    )
    bar = figure.colorbar(filled, ax=panels, shrink=0.9, ticks=SIMPLEX_LEVELS)
    bar.ax.set_yticklabels([f"{level:g}" for level in SIMPLEX_LEVELS])
    bar.set_label("Loss above its minimum")
    return figure


def credal_corners() -> np.ndarray:
    """(3, 2): the corners of {p : p_true >= 1 - α} in the plane."""
    kept = 1 - SIMPLEX_ALPHA
    return np.array([[1, 0, 0], [kept, 1 - kept, 0], [kept, 0, 1 - kept]]) @ CORNERS


# ----------------------------------------------------------------------------- critical differences


@mpl.rc_context(STYLE)
def critical_difference_diagram(
    names: Sequence[str], ranks: Sequence[float], difference: float, title: str
) -> Figure:
    """Methods on a line of average ranks; a bar joins those that do not differ (Demšar, figure 1).

    names, ranks: of at least two methods. difference: see comparison.critical_difference. Black on
    white; the better half of the methods is named on the left.
    """
    order, groups = np.argsort(ranks, kind="stable"), comparison.cliques(ranks, difference)
    count, half = len(names), (len(names) + 1) // 2
    texts = [textwrap.fill(f"{names[i]} ({ranks[i]:.2f})", 32) for i in order]
    line = 0.14 * max(text.count("\n") + 1.6 for text in texts)  # inches, as all heights here
    bars = 0.08 * (len(groups) + 1)
    depth = bars + half * line
    figure = Figure(figsize=(PAGE, depth + 0.9))
    axes = figure.add_axes((0, 0, 1, 1))
    margin = 0.65 * (count - 1)  # for the names, in ranks
    axes.set(xlim=(1 - margin, count + margin), ylim=(-depth, 0.9))
    axes.axis("off")

    def draw(x: list[float], y: list[float], width: float) -> None:
        axes.plot(x, y, color="black", linewidth=width, solid_capstyle="butt")

    axes.text((1 + count) / 2, 0.75, title, ha="center", va="center")
    draw([1, 1 + difference], [0.42, 0.42], 1)
    for end in (1, 1 + difference):
        draw([end, end], [0.38, 0.46], 1)
    axes.text(1 + difference / 2, 0.46, f"CD = {difference:.2f}", ha="center", va="bottom")
    draw([1, count], [0, 0], 1)
    for value in range(1, count + 1):
        draw([value, value], [0, 0.06], 1)
        axes.text(value, 0.09, str(value), ha="center", va="bottom")
    for place, group in enumerate(groups):
        overhang = 0.006 * (count - 1)
        ends = [ranks[group[0]] - overhang, ranks[group[-1]] + overhang]
        draw(ends, [-0.08 * (place + 1)] * 2, 3)
    for place, (i, text) in enumerate(zip(order, texts, strict=True)):
        left = place < half
        height = -bars - line * ((place if left else count - 1 - place) + 0.5)
        side = 1 - 0.06 * margin if left else count + 0.06 * margin
        draw([ranks[i], ranks[i], side], [0, height, height], 0.7)
        axes.annotate(
            text,
            (side, height),
            (-3 if left else 3, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
        )
    return figure
