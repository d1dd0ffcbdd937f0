"""Figures: what is drawn is what an independent calculation says, and each file is a real image."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from utils import plots
from utils.data_loader import Splits
from utils.errors import InputError
from utils.inference import Evaluated

CLASSES = ["cat", "dog", "ship", "$x_$ <b>", "7"]


def network(tmp_path, method="vanilla", seed=0, images=400, sharpness=1.0, **changes) -> Evaluated:
    """What a network of five classes might say; classes 0 and 1 look alike, 2 a little like 1."""
    stream = torch.Generator().manual_seed(seed + 10 * sum(map(ord, method)))
    labels = torch.arange(images) % len(CLASSES)
    likeness = torch.eye(len(CLASSES), dtype=torch.float64) * 2
    likeness[0, 1] = likeness[1, 0] = 1.8
    likeness[1, 2] = likeness[2, 1] = 0.7
    noise = torch.randn(images, len(CLASSES), generator=stream, dtype=torch.float64)
    logits = (sharpness * (likeness[labels] + noise)).float()
    folder = tmp_path / method / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    epochs = 3 + seed
    pd.DataFrame(
        {
            "epoch": range(1, epochs + 1),
            "learning_rate": 0.1,
            "train_loss": np.linspace(2, 1, epochs) + seed,
            "validation_log_loss": np.linspace(1.5, 0.5, epochs),
            "validation_accuracy": np.linspace(0.5, 0.9, epochs),
            "validation_ece": np.linspace(0.2, 0.05, epochs),
        }
    ).to_csv(folder / "history.csv", index=False)
    values = {
        "path": folder / "best.pt",
        "model_name": "shallownet",
        "weights_hash": f"{method} {seed}",
        "is_student": False,
        "training": {
            "method": method,
            "requested": {"smoothing": [0.1]} if method != "vanilla" else {},
            "hyper_parameters": {"smoothing": 0.1} if method != "vanilla" else {},
            "seed": seed,
            "epoch": 2,
            "recipe": {"lr": 0.1, "epochs": 5},
            "trained_on": "train",
        },
        "data": {"dataset": "digits", "classes": CLASSES, "splits": {"test": "a" * 64}}
        | {"image_size": None},
        "teacher": None,
        "logits": {"validation": logits[:50], "test": logits},
        "labels": {"validation": labels[:50], "test": labels},
        "temperature": 2.0,
        "warnings": [],
        "splits": Splits(*map(torch.arange, (1, 50, 200))),
        "seen_by_teacher": (0, 0),
    }
    return Evaluated(**(values | changes))


@pytest.fixture
def four(tmp_path):
    """Two methods of two seeds."""
    return [
        network(tmp_path, method, seed, sharpness=sharpness)
        for method, sharpness in (("label-smoothing", 1.0), ("vanilla", 4.0))
        for seed in (1, 0)
    ]


def methods_of(evaluated):
    (methods,) = plots.blocks(evaluated).values()
    return methods


def top_label(run, temperature=1.0):
    """Confidence and correctness, by numpy alone."""
    z = run.logits["test"].double().numpy() / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return p.max(1), p.argmax(1) == run.labels["test"].numpy()


def ece(confidence, correct, bins):
    """The definition, bin by bin."""
    total = 0.0
    for low, high in itertools.pairwise(np.arange(bins + 1) / bins):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            total += inside.mean() * abs(gap)
    return total


# ------------------------------------------------------------------------------ what is compared


def test_seeds_are_one_method_and_the_vanilla_one_comes_first(four, tmp_path):
    twice = network(tmp_path, "vanilla", 0)
    other = network(
        tmp_path, "vanilla", 0, weights_hash="x", is_student=True, teacher={"weights": "t"}
    )
    found = plots.blocks([*four, twice, other])
    assert list(found) == ["digits, shallownet", "digits, shallownet, distilled students"]
    vanilla, smoothing = found["digits, shallownet"]
    assert vanilla.label == "vanilla"
    assert smoothing.label == "label-smoothing, smoothing 0.1"
    for method in (vanilla, smoothing):
        assert [run.training["seed"] for run in method.runs] == [0, 1]


def test_runs_of_another_recipe_are_another_method(four, tmp_path):
    changed = network(tmp_path, "vanilla", 2)
    changed.training["recipe"]["lr"] = 0.5
    labels = {method.label for method in methods_of([*four, changed])}
    assert {"vanilla, lr 0.1", "vanilla, lr 0.5"} < labels
    enlarged = network(tmp_path, "vanilla", 2)
    enlarged.data["image_size"] = 16
    labels = {method.label for method in methods_of([*four, enlarged])}
    assert {"vanilla, image_size None", "vanilla, image_size 16"} < labels


def test_curves_of_protocol_lr_are_of_the_network_selected(tmp_path):
    run = network(tmp_path, "vanilla", 0)
    run.training["trained_on"] = "train+validation"
    (run.path.parent / "selection").mkdir()
    history = run.path.with_name("history.csv")
    history.rename(run.path.parent / "selection/history.csv")
    history.write_text("epoch,learning_rate,train_loss\n1,0.1,2.0\n")
    assert list(plots.read_histories(methods_of([run]))) == [run.path]


def test_styles_differ_in_black_and_white_and_in_colour():
    styles = [plots.line_style(number) for number in range(20)]
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles}) == 20
    assert len({style["color"] for style in styles[:7]}) == 7
    marks = {(style["marker"], style["markerfacecolor"]) for style in plots.CLASS_STYLES}
    assert len(marks) == len(plots.CLASS_STYLES)


# ------------------------------------------------------------------------------ reliability


def test_wilson_interval_is_scipys():
    share, count = np.array([0.0, 0.3, 1.0, 0.5]), np.array([1, 10, 50, 10_000])
    low, high = plots.wilson_interval(share, count)
    for i in range(4):
        theirs = binomtest(round(share[i] * count[i]), int(count[i])).proportion_ci(method="wilson")
        assert (low[i], high[i]) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert np.isnan(plots.wilson_interval(np.array([np.nan]), np.array([0.0]))).all()


@pytest.mark.parametrize("scaling", ["no", "yes"])
def test_reliability_draws_the_pooled_bins(four, scaling):
    bins = 8
    methods = methods_of(four)
    figure = plots.reliability(methods, bins)
    panels = dict(zip(itertools.product((0, 1), ("no", "yes")), pairs(figure.axes), strict=True))
    for number, method in enumerate(methods):
        axes, below = panels[number, scaling]
        pooled = [top_label(r, 2.0 if scaling == "yes" else 1.0) for r in method.runs]
        confidence, correct = (np.concatenate(parts) for parts in zip(*pooled, strict=True))
        edges = np.arange(bins + 1) / bins
        inside = [(confidence > a) & (confidence <= b) for a, b in itertools.pairwise(edges)]
        assert [bar.get_height() * 2 for bar in below.patches] == [m.sum() for m in inside]
        heights = [bar.get_height() for bar in axes.patches]
        expected = [correct[m].mean() if m.any() else np.nan for m in inside]
        assert heights == pytest.approx(expected, nan_ok=True)
        assert [bar.get_x() for bar in axes.patches] == pytest.approx(edges[:-1])
        points, _, (stems,) = axes.containers[1]
        filled = [m for m in inside if m.any()]
        assert points.get_xdata() == pytest.approx([confidence[m].mean() for m in filled])
        assert points.get_ydata() == pytest.approx([correct[m].mean() for m in filled])
        for segment, m in zip(stems.get_segments(), filled, strict=True):
            # Two seeds show the same images twice: the evidence is that of half the rows.
            low, high = plots.wilson_interval(correct[m].mean(), np.array(m.sum() / 2))
            assert segment[:, 1] == pytest.approx([low, high])
        values = [ece(*part, bins) for part in pooled]
        shown = f"ECE (8 bins) {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        assert shown in axes.get_title()


def pairs(axes):
    return zip(axes[::2], axes[1::2], strict=True)


def test_the_intervals_of_a_calibrated_network_cover_the_diagonal(tmp_path):
    """Of a network whose confidences are true the interval of a bin misses in about 1 of 20."""
    missed = total = 0
    for seed in range(20):
        stream = np.random.default_rng(seed)
        confidence = stream.uniform(0.5, 1, 2000)
        logits = np.stack([np.log(confidence), np.log(1 - confidence)], 1)
        labels = (stream.uniform(size=2000) > confidence).astype(int)
        run = network(tmp_path, logits={"test": torch.from_numpy(logits)},
                      labels={"test": torch.from_numpy(labels)})  # fmt: skip
        found = plots.reliability_bins([run], "no", 10)
        inside = (found.low <= found.confidence) & (found.confidence <= found.high)
        missed += (~inside[found.count > 0]).sum()
        total += (found.count > 0).sum()
    assert total == 100
    assert 0 < missed < 15


# ------------------------------------------------------------------------------ ECE by bins


def test_ece_by_bins_draws_mean_and_range_over_seeds(four):
    methods = methods_of(four)
    figure = plots.ece_by_bins(methods, 10)
    for axes, temperature in zip(figure.axes, (1.0, 2.0), strict=True):
        grey, *lines = axes.lines
        assert set(grey.get_xdata()) == {10}
        for line, band, method in zip(lines, axes.collections, methods, strict=True):
            assert list(line.get_xdata()) == list(range(5, 51))
            curves = np.array(
                [[ece(*top_label(r, temperature), b) for b in range(5, 51)] for r in method.runs]
            )
            assert line.get_ydata() == pytest.approx(curves.mean(0), abs=1e-12)
            corners = band.get_paths()[0].vertices
            assert corners[:, 1].min() == pytest.approx(curves.min())
            assert corners[:, 1].max() == pytest.approx(curves.max())


# ------------------------------------------------------------------------------ training curves


def test_training_curves_are_the_histories_with_the_kept_epoch_marked(four):
    methods = methods_of(four)
    figure = plots.training_curves(methods, plots.read_histories(methods))
    loss, _, accuracy, _ = figure.axes
    assert [line.get_ydata()[0] for line in loss.lines] == [2, 3, 2, 3]  # seeds 0, 1 of each
    assert [len(line.get_xdata()) for line in loss.lines] == [3, 4, 3, 4]
    assert accuracy.lines[0].get_ydata() == pytest.approx([50, 70, 90])
    assert all(line.get_markevery() == [1] for line in loss.lines)  # epoch 2


@pytest.mark.parametrize("damage", ["missing", "binary", "other columns", "words", "no rows"])
def test_a_damaged_history_is_named_and_left_out(four, damage, capsys):
    history = four[0].path.with_name("history.csv")
    columns = "epoch,train_loss,validation_log_loss,validation_accuracy,validation_ece\n"
    match damage:
        case "missing":
            history.unlink()
        case "binary":
            history.write_bytes(bytes(range(256)))
        case "other columns":
            history.write_text("a,b\n1,2\n")
        case "words":
            history.write_text(columns + "1,2,three,4,5\n")
        case "no rows":
            history.write_text(columns)
    methods = methods_of(four)
    found = plots.read_histories(methods)
    assert set(found) == {run.path for run in four[1:]}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(history) in error
    assert len(plots.training_curves(methods, found).axes[0].lines) == 3


# ------------------------------------------------------------------------------ t-SNE


def test_the_most_confused_classes_are_chosen(four):
    assert plots.choose_classes(methods_of(four), None) == [0, 1, 2]


def test_classes_are_chosen_by_name_before_number(four):
    methods = methods_of(four)
    assert plots.choose_classes(methods, ["ship", "0", "7"]) == [2, 0, 4]
    assert plots.choose_classes(methods, ["1", "dog", "cat"]) == [1, 0]


@pytest.mark.parametrize("wanted", ["lion", "5", "-1", "9" * 5000, "²", ""])
def test_an_unknown_class_lists_those_there(four, wanted):
    with pytest.raises(InputError, match=r"0 cat, 1 dog, 2 ship, 3 .*, 4 7") as caught:
        plots.choose_classes(methods_of(four), ["cat", wanted])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_one_class_is_too_few(four):
    with pytest.raises(InputError, match="two different ones"):
        plots.choose_classes(methods_of(four), ["cat", "0"])


def test_the_embedding_shows_the_same_images_of_every_method(four, monkeypatch):
    seen = []

    def first_two(logits):
        seen.append(logits)
        return logits[:, :2].numpy()

    monkeypatch.setattr(plots, "embed", first_two)
    methods = methods_of(four)
    figure = plots.embedding(methods, [0, 3])
    labels = four[0].labels["test"]
    chosen = torch.cat([(labels == 0).nonzero().flatten(), (labels == 3).nonzero().flatten()])
    for axes, method, logits in zip(figure.axes, methods, seen, strict=True):
        assert torch.equal(logits, method.runs[0].logits["test"][chosen])
        drawn = np.concatenate([line.get_xydata() for line in axes.lines])
        assert drawn == pytest.approx(logits[:, :2].numpy())
        assert [len(line.get_xdata()) for line in axes.lines] == [80, 80]


def test_the_number_of_embedded_images_is_capped():
    labels = torch.arange(5000) % 4
    chosen = plots.embedded_images(labels, [3, 1])
    assert len(chosen) == plots.TSNE_IMAGES
    assert torch.equal(labels[chosen], torch.tensor([3, 1]).repeat_interleave(300))


def test_a_method_of_other_test_images_is_left_out_of_the_embedding(four, tmp_path, capsys):
    other = network(tmp_path, "focal", 5)
    other.data["splits"] = {"test": "b" * 64}
    shown = plots.embedded_runs(methods_of([*four, other]))
    assert [method.label.split(",")[0] for method, _ in shown] == ["vanilla", "label-smoothing"]
    assert "focal" in capsys.readouterr().err


def test_the_shown_seed_is_one_that_all_methods_have(four, tmp_path):
    only_seed_1 = network(tmp_path, "focal", 1)
    shown = plots.embedded_runs(methods_of([*four, only_seed_1]))
    assert [run.training["seed"] for _, run in shown] == [1, 1, 1]


def test_tsne_is_repeatable_and_separates_what_is_separate():
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=stream)
    logits[30:] += 20
    points = plots.embed(logits)
    assert np.array_equal(points, plots.embed(logits))
    centre = points[:30].mean(0), points[30:].mean(0)
    nearest = [np.linalg.norm(points - c, axis=1) for c in centre]
    assert ((nearest[0] > nearest[1]) == (np.arange(60) >= 30)).all()
    assert np.isfinite(plots.embed(torch.zeros(10, 4))).all()


# ------------------------------------------------------------------------------ loss triangle


def test_the_triangle_shows_the_losses_of_the_formulas():
    p = plots.triangle_grid(30)
    assert p.sum(1) == pytest.approx(1)
    smoothing, relaxation = plots.excess_losses(p).values()
    a, q = plots.SIMPLEX_ALPHA, p.numpy()
    target = np.array([1 - 2 * a / 3, a / 3, a / 3])
    divergence = (target * np.log(target / q)).sum(1)  # KL(t || p): the loss less its minimum
    assert smoothing.numpy() == pytest.approx(divergence, abs=1e-6)
    true = q[:, 0]
    outside = (1 - a) * np.log((1 - a) / true) + a * np.log(a / (1 - true))
    assert relaxation.numpy() == pytest.approx(np.where(true >= 1 - a, 0, outside), abs=1e-6)


def test_the_triangle_outlines_the_credal_set_and_marks_the_minimum():
    figure = plots.simplex()
    left, right = figure.axes[:2]
    # A point of the plane is in the set exactly if its probability of the true class says so.
    inside = (
        right.patches[-1]
        .get_path()
        .contains_points(plots.triangle_grid(30).numpy() @ plots.CORNERS)
    )
    true = plots.triangle_grid(30)[:, 0].numpy()
    assert (inside == (true > 1 - plots.SIMPLEX_ALPHA)).all()
    assert 0 < inside.sum() < len(inside)
    x, y = left.lines[-1].get_data()
    weights = np.linalg.solve(np.vstack([plots.CORNERS.T, np.ones(3)]), [x[0], y[0], 1])
    assert weights == pytest.approx([1 - 2 * 0.25 / 3, 0.25 / 3, 0.25 / 3])


# ------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """All figures of two methods, and of a data set whose names are out to get us."""
    folder = tmp_path_factory.mktemp("plots")
    evaluated = [network(folder, m, s) for m in ("vanilla", "label-smoothing") for s in (0, 1)]
    evil = network(folder, "vanilla", 7, model_name="../../$\\evil$\n" + "x" * 300)
    evil.data = {**evil.data, "dataset": "/etc/passwd"}
    before = dict(mpl.rcParams)
    drawn = plots.write_all([*evaluated, evil], folder / "out", ["$x_$ <b>", "cat", "dog"], 10)
    assert dict(mpl.rcParams) == before
    return folder / "out", drawn


def test_every_figure_is_a_real_image_between_one_column_and_two_wide(drawings):
    folder, drawn = drawings
    assert len(drawn) == 4 + 4 + 1
    assert {path.name for path in folder.iterdir()} == {
        path.name for drawing in drawn for path in (drawing.png, drawing.pdf)
    }
    for drawing in drawn:
        with Image.open(drawing.png) as image:
            image.load()
            inches = image.width / 300
            assert plots.COLUMN - 0.01 <= inches <= plots.PAGE + 0.01
            pixels = np.asarray(image.convert("L"))
        assert 0.01 < (pixels < 250).mean() < 0.9, drawing.png  # drawn on, and not all over
        assert len(np.unique(pixels)) > 20
        pdf = drawing.pdf.read_bytes()
        assert pdf.startswith(b"%PDF-")
        assert pdf.rstrip().endswith(b"%%EOF")
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
        assert drawing.caption


def test_names_lead_nowhere_else(drawings):
    folder, drawn = drawings
    for drawing in drawn:
        assert drawing.png.resolve().parent == folder.resolve()
        assert set(drawing.png.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
        assert len(drawing.png.name) < 130
    assert plots.slugify("..") == plots.slugify("") == "unnamed"
    assert plots.slugify("Ä/../b\x00 C") == "b-c"


def test_letters_are_large_enough_and_axes_labelled(four):
    methods = methods_of(four)
    figures = [
        plots.reliability(methods, 10),
        plots.ece_by_bins(methods, 10),
        plots.training_curves(methods, plots.read_histories(methods)),
        plots.simplex(),
    ]
    with mpl.rc_context(plots.STYLE):
        for figure in figures:
            figure.canvas.draw()
            for text in figure.findobj(mpl.text.Text):
                assert not text.get_text() or text.get_fontsize() >= 7
    for figure in figures[:3]:
        grid = [axes.get_subplotspec() for axes in figure.axes]
        assert all(a.get_ylabel() for a, g in zip(figure.axes, grid, strict=True)
                   if g.is_first_col() or figure is figures[2])  # fmt: skip
        assert all(
            a.get_xlabel() for a, g in zip(figure.axes, grid, strict=True) if g.is_last_row()
        )


def test_an_unknown_class_is_refused_before_anything_is_written(four, tmp_path):
    with pytest.raises(InputError):
        plots.write_all(four, tmp_path / "out", ["cat", "lion"], 10)
    assert not (tmp_path / "out").exists()


def test_no_figure_of_pyplot_is_left_behind(drawings):
    from matplotlib._pylab_helpers import Gcf

    assert not Gcf.figs
