"""The target inspector: what each method asks of the network for one image.

    markdown, drawing = inspect(evaluated, index, "data", torch.device("cpu"), Path("evaluation"))

A training method is an answer to the question what a network should say of an image. Here the
answers stand side by side: for one test image, the target of each method, and how the loss pulls
at what the network says now. Read from left to right it explains label smoothing, instance-based
smoothing and label relaxation without their papers.

For all of them the gradient of the loss with respect to the logits is p - t: what the network
says, less what it is asked to say. For label relaxation t is the member of the credal set nearest
to p, which inside the set is p itself (LR paper, eq. 4 and 5).
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from torch.func import grad_and_value

from utils import data_loader, synthetic, tables
from utils.checkpoint import write_text
from utils.errors import InputError
from utils.image_files import AUTO, Streaming
from utils.inference import Evaluated
from utils.losses import (
    cross_entropy_loss,
    instance_based_smoothing_loss,
    instance_based_targets,
    label_relaxation_loss,
    label_smoothing_loss,
)
from utils.plots import PAGE, STYLE, Drawing, save, shorten, slugify

# The scripts' own defaults.
SMOOTHING, ALPHA = 0.1, 0.1
CLASSES_SHOWN = 10

CAPTION = (
    "What each method asks of the network for this image. Bars: the probabilities asked for. "
    "Circles: what the network says. Arrows: where the loss pulls it, the difference of the two. "
    "Hatched: what label relaxation allows at no loss, for each class alone; it has no single "
    "target. The true class is the first; the axis is a square root, so that small shares show."
)
ASKED, ALLOWED = "#56B4E9", "#BFE3D6"


@dataclass
class Request:
    """What a method asks for an image, all (K,) float64; p is what the network says now."""

    method: str
    short: str  # what it asks, on two lines of a panel
    words: str  # the same, plainly and whole
    target: Tensor  # t; for label relaxation the member of the credal set nearest to p
    low: Tensor  # what is allowed without loss: low = high = t, but for label relaxation
    high: Tensor
    loss: float  # at p
    least: float  # the loss at its minimiser, which is t (for label relaxation all of the set)
    gradient: Tensor  # of the loss with respect to the logits, at p

    @property
    def is_set(self) -> bool:
        return bool((self.low < self.high).any())


def choose_teacher(evaluated: Sequence[Evaluated], index: int) -> Evaluated:
    """The vanilla network of the lowest seed among those given, or else the first.

    Raises InputError if its test split has no image of that index.
    """
    vanilla = [run for run in evaluated if run.training["method"] == "vanilla"]
    teacher = min(vanilla, key=lambda run: run.training["seed"]) if vanilla else evaluated[0]
    count = len(teacher.labels["test"])
    if not 0 <= index < count:
        raise InputError(
            f"--inspect {index}: the test split of {teacher.data['dataset']} has the images 0 to "
            f"{count - 1}"
        )
    return teacher


def inspect(
    evaluated: Sequence[Evaluated],
    index: int,
    data_dir: str | Path,
    device: torch.device,
    output: Path,
    streaming: Streaming = AUTO,
) -> tuple[str, Drawing]:
    """A table in Markdown, and the figure; beside it the table is written as .csv and .md.

    index: of the image in the test split, from 0. Raises InputError if there is no such image.
    """
    teacher = choose_teacher(evaluated, index)
    dataset = teacher.data["dataset"]
    data, splits = data_loader.reload(teacher.data, data_dir, device, streaming)
    (image,) = next(data.gather([splits.test[[index]]])).cpu().numpy()
    label = int(teacher.labels["test"][index])
    wanted = requests(teacher, index)
    said = teacher.logits["test"][index].double().softmax(0)

    name = f"inspect-{slugify(f'{dataset}-{teacher.model_name}')}-{index}"
    names = teacher.data["classes"]
    heading = f"test image {index} of {dataset}: {shorten(names[label], 30)}"
    figure = draw(image, heading, names, label, said, wanted)
    drawing = save(figure, output, name, f"Target inspector, {heading}", CAPTION)
    about = (
        f"{teacher.model_name} ({tables.setting(teacher.training['method'], {})}, seed "
        f"{teacher.training['seed']}, {teacher.path})"
    )
    markdown = in_words(heading, about, names, label, said, wanted)
    write_text(output / f"{name}.csv", tidy(names, label, said, wanted).to_csv(index=False))
    write_text(output / f"{name}.md", markdown)
    return markdown, drawing


# ------------------------------------------------------------------------------ what is asked


def requests(teacher: Evaluated, index: int) -> list[Request]:
    """Each method's, for a network that says just what the teacher says."""
    logits = teacher.logits["test"][index].double()[None]
    true = teacher.labels["test"][index][None]
    label, num_classes = int(true), logits.shape[1]
    calibrated = logits / teacher.temperature
    sure = float(calibrated.softmax(1)[0, label])
    onehot = torch.zeros_like(logits).index_fill(1, true, 1.0)
    found = [
        _towards(
            "cross-entropy",
            "everything for the true class",
            "Be certain of the true class: every other class is asked to vanish.",
            logits,
            onehot,
            lambda z: cross_entropy_loss(z, true),
        ),
        _towards(
            "label smoothing",
            f"{SMOOTHING:g} kept back, for all classes alike",
            f"Keep ε = {SMOOTHING:g} of the certainty back and give every class the same part of "
            "it, whatever the image shows.",
            logits,
            (1 - SMOOTHING) * onehot + SMOOTHING / num_classes,
            lambda z: label_smoothing_loss(z, true, SMOOTHING),
        ),
    ]
    variants = {
        "ILS2": (
            "ils2",
            logits,
            f"{SMOOTHING:g} kept back, for what the image resembles",
            f"Keep ε = {SMOOTHING:g} back, and give it to the classes that the teacher finds this "
            "image similar to.",
        ),
        "ILS1": (
            "ils1",
            calibrated,
            "teacher says how much: {kept:.2g}, for all others alike",
            "Let the teacher's certainty decide how much to keep back (here ε = {kept:.2g}, as it "
            f"gives the true class {sure:.2g}); the other classes share it evenly.",
        ),
        "ILS": (
            "ils",
            calibrated,
            "teacher says how much: {kept:.2g}, and for whom",
            "Both: the teacher's certainty decides how much to keep back (ε = {kept:.2g}), its "
            "view of the image who gets it.",
        ),
        "scores": (
            "scores",
            logits,
            "{kept:.2g} kept back, by the teacher's raw scores",
            "ILS as first published: shares are the teacher's raw scores, not its probabilities "
            "(here ε = {kept:.2g}), so unlikely classes get nearly as much as likely ones.",
        ),
    }
    average = class_view(teacher, label)
    if average is not None:
        variants["class-based"] = (
            "class",
            average,
            f"{SMOOTHING:g} kept back, for what the class resembles",
            f"Keep ε = {SMOOTHING:g} back and share it as the teacher does on average over images "
            "of this class; the image itself is not looked at.",
        )
    for method, (variant, view, *texts) in variants.items():
        options = {"variant": variant, "smoothing": SMOOTHING}  # which ILS1 and ILS do not read
        target = instance_based_targets(view, true, **options)
        short, words = (text.format(kept=1 - float(target[0, label])) for text in texts)
        loss = partial(instance_based_smoothing_loss, targets=true, teacher_logits=view, **options)
        found.append(_towards(method, short, words, logits, target, loss))
    found.append(_relaxation(logits, true))
    return found


def class_view(teacher: Evaluated, label: int) -> Tensor | None:
    """(1, K): log of the teacher's mean probabilities over the validation images of a class.

    Training takes the training images; the validation images are at hand. None if there is none.
    """
    if "validation" not in teacher.logits:  # it was trained on that too
        return None
    members = teacher.logits["validation"][teacher.labels["validation"] == label]
    if len(members) == 0:
        return None
    return members.double().log_softmax(1).logsumexp(0)[None] - math.log(len(members))


def _towards(
    method: str, short: str, words: str, logits: Tensor, target: Tensor, loss: Callable
) -> Request:
    """The request of a loss that is least at one distribution, its target."""
    (gradient,), value = grad_and_value(loss)(logits)
    # Where the target has zeros the least loss is approached, and never reached.
    least = float(torch.special.entr(target).sum())
    target, value = target[0], float(value)
    return Request(method, short, words, target, target, target, value, least, gradient)


def _relaxation(logits: Tensor, true: Tensor) -> Request:
    label = int(true)
    loss = partial(label_relaxation_loss, targets=true, alpha=ALPHA)
    (gradient,), value = grad_and_value(loss)(logits)
    said = logits.softmax(1)[0]
    others = torch.arange(len(said)) != label
    low, high = torch.zeros_like(said), torch.full_like(said, ALPHA)
    low[label], high[label] = 1 - ALPHA, 1.0
    nearest = said.clone()
    if said[label] < 1 - ALPHA:
        nearest[label] = 1 - ALPHA
        nearest[others] = ALPHA * logits[0, others].softmax(0)
        state = "It is not there yet, and is pulled to the nearest answer that is."
    else:
        state = "It is there already: no loss, no pull."
    words = (
        f"Any answer with at least {1 - ALPHA:g} on the true class (α = {ALPHA:g}) is as good as "
        f"any other; the network chooses. {state}"
    )
    short = f"{1 - ALPHA:g} or more for the true class, all else free"
    value = float(value)
    return Request("label relaxation", short, words, nearest, low, high, value, 0.0, gradient)


# ------------------------------------------------------------------------------ shown


def tidy(names: list[str], label: int, said: Tensor, wanted: list[Request]) -> pd.DataFrame:
    """A row for each method and class, at full precision."""
    return pd.DataFrame(
        {
            "method": request.method,
            "class": names[k],
            "is_true_class": k == label,
            "network_probability": float(said[k]),
            "target": float(request.target[k]),
            "allowed_low": float(request.low[k]),
            "allowed_high": float(request.high[k]),
            "gradient": float(request.gradient[k]),
            "loss": request.loss,
            "least_loss": request.least,
        }
        for request in wanted
        for k in range(len(names))
    )


def in_words(
    heading: str, about: str, names: list[str], label: int, said: Tensor, wanted: list[Request]
) -> str:
    """Markdown: what the network says, and a row for each method."""
    top = said.argsort(descending=True)[:3].tolist()
    says = ", ".join(f"{shorten(names[k], 30)} {float(said[k]):.3f}" for k in top)
    says, about = tables.escape_markdown(says), tables.escape_markdown(about)
    rows = []
    for request in wanted:
        others = request.target.clone()
        others[label] = -1
        largest = int(others.argmax())
        alike = float(others[torch.arange(len(others)) != label].std(correction=0)) < 1e-9
        who = "each other class" if alike else f"then {shorten(names[largest], 30)}"
        sought = f"true class {float(request.target[label]):.3f}, {who}"
        minimiser = f"{sought} {float(others[largest]):.3f}"
        if request.is_set:
            minimiser = f"any with {1 - ALPHA:g} or more on the true class; nearest: {minimiser}"
        rows.append(
            {
                "Method": request.method,
                "Loss now": f"{request.loss:.4f}",
                "Least loss": f"{request.least:.4f}",
                "Gradient, true class": f"{float(request.gradient[label]):+.4f}",
                "Least where the network says (minimiser)": minimiser,
                "What it asks": request.words,
            }
        )
    heading = tables.escape_markdown(heading[0].upper() + heading[1:])
    average = ""
    if any(request.method == "class-based" for request in wanted):
        average = (
            "The class-based target is from the teacher's validation images; training takes the "
            "training images. "
        )
    return (
        f"{heading}. The network, which is the teacher too: {about}. It says {says}.\n\n"
        f"{tables.markdown(pd.DataFrame(rows))}\n"
        "A negative gradient raises the logit, a positive one lowers it; it is what the network "
        f"says less the method's target. {average}As the network is its own teacher here, label "
        "relaxation's nearest answer is ILS2's target: it is what ILS2 with itself as its "
        "teacher would ask, but only where the network is not sure enough.\n"
    )


@mpl.rc_context(STYLE)
def draw(
    image: np.ndarray,
    heading: str,
    names: list[str],
    label: int,
    said: Tensor,
    wanted: list[Request],
) -> Figure:
    """The image and what the network says of it on the left, a panel for each method beside it."""
    shown = shown_classes(said, label)
    columns = -(-len(wanted) // 2)
    figure = Figure(figsize=(PAGE, 5.5))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03)
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[1.1] + [1] * columns)
    picture = figure.add_subplot(grid[0, 0])
    if image.dtype == np.uint8:
        pixels = image if image.shape[-1] == 3 else image.mean(-1)
        picture.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set_visible(False)
    else:  # a point of the plane
        synthetic.draw_regions(picture)
        picture.plot(*image.flatten(), "*", color="black", markersize=8, markeredgecolor="white")
    picture.set_title(textwrap.fill(heading[0].upper() + heading[1:], 20))

    now = figure.add_subplot(grid[1, 0])
    _probability_axes(now, names, shown)
    now.set_title("the network now,\nwhich is the teacher too")
    _dots(now, said, shown)
    for number, request in enumerate(wanted):
        axes = figure.add_subplot(grid[number // columns, 1 + number % columns])
        _probability_axes(axes, names, shown)
        if number % columns:
            axes.set_yticklabels([])
        _request_panel(axes, request, said, shown)
    handles = [
        Patch(facecolor=ASKED, edgecolor="black", linewidth=0.5, label="asked for, t"),
        Patch(facecolor=ALLOWED, edgecolor="black", linewidth=0.5, hatch="/////",
              label="allowed without loss"),
        Line2D([], [], marker="o", linestyle="none", color="black", markerfacecolor="white",
               label="the network now, p"),
        Line2D([], [], marker=">", markersize=3, linewidth=0.7, color="black",
               label="pull on the logit, t - p (minus the gradient)"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.4)
    return figure


def shown_classes(said: Tensor, label: int) -> list[int]:
    """The true class first, then the others from the likeliest down, at most CLASSES_SHOWN."""
    others = [k for k in said.argsort(descending=True, stable=True).tolist() if k != label]
    return [label, *others][:CLASSES_SHOWN]


def _probability_axes(axes, names: list[str], shown: list[int]) -> None:
    # A square root lets shares of 0.01 be seen beside 0.9, and keeps 0 where bars begin.
    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_xlim(0, 1)
    axes.set_xticks([0.01, 0.1, 0.5, 1], [".01", ".1", ".5", "1"])
    axes.set_yticks(range(len(shown)), [shorten(names[k], 14) for k in shown])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Probability")
    axes.grid(axis="x", linewidth=0.3, color="0.85")
    axes.set_axisbelow(True)


def _dots(axes, said: Tensor, shown: list[int]) -> None:
    axes.plot(
        said[shown], range(len(shown)), linestyle="none", marker="o", markersize=3.5,
        markerfacecolor="white", color="black", markeredgewidth=0.8, clip_on=False, zorder=4,
    )  # fmt: skip


def _request_panel(axes, request: Request, said: Tensor, shown: list[int]) -> None:
    places = range(len(shown))
    bar = {"height": 0.7, "edgecolor": "black", "linewidth": 0.4}
    if request.is_set:
        low, high = request.low[shown].numpy(), request.high[shown].numpy()
        axes.barh(places, high - low, left=low, facecolor=ALLOWED, hatch="/////", **bar)
    else:
        axes.barh(places, request.target[shown].numpy(), facecolor=ASKED, **bar)
    _dots(axes, said, shown)
    for place, k in enumerate(shown):
        here, there = float(said[k]), float(request.target[k])
        if abs(here**0.5 - there**0.5) > 0.06:  # shorter ones would be all arrowhead
            pull = {"arrowstyle": "-|>,head_width=0.15,head_length=0.3", "linewidth": 0.7}
            pull |= {"facecolor": "black", "shrinkA": 2, "shrinkB": 0}
            axes.annotate("", (there, place), (here, place), arrowprops=pull, zorder=5)
    losses = f"loss {request.loss:.2f}, least {request.least:.2f}"
    axes.set_title(f"{request.method.upper()}\n{textwrap.fill(request.short, 21)}\n{losses}")
