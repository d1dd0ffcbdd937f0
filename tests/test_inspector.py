"""The target inspector: every number shown is recomputed from the formulas, in float64 numpy."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from utils import data_loader, inspector
from utils.errors import InputError
from utils.inference import Evaluated

CPU = torch.device("cpu")
T = 1.7


@pytest.fixture(scope="module")
def teacher() -> Evaluated:
    """A made-up network on real images: of rising certainty, wrong on every seventh image."""
    data = data_loader.load("digits")
    splits = data_loader.split(data, 0.8, 0)
    stream = torch.Generator().manual_seed(0)
    logits, labels = {}, {}
    for name in ("validation", "test"):
        labels[name] = data.labels[getattr(splits, name)]
        count = len(labels[name])
        logits[name] = torch.randn(count, 10, generator=stream)
        believed = torch.where(torch.arange(count) % 7 == 0, (labels[name] + 1) % 10, labels[name])
        logits[name][torch.arange(count), believed] += torch.linspace(0, 12, count)
    description = {
        "dataset": "digits",
        "image_size": None,
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "input_shape": data.input_shape,
        "protocol": "ils",
        "tr_size": 0.8,
        "seed": 0,
        "splits": splits.hashes(),
    }
    return Evaluated(
        path="runs/best.pt",
        model_name="shallownet",
        weights_hash="0",
        is_student=False,
        training={"method": "vanilla", "requested": {}, "seed": 0},
        data=description,
        teacher=None,
        logits=logits,
        labels=labels,
        temperature=T,
        warnings=[],
        splits=splits,
        seen_by_teacher=(0, 0),
    )


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def targets_by_hand(teacher, index) -> dict[str, np.ndarray]:
    """What each method asks, written down a second time from REFERENCE's table."""
    u = teacher.logits["test"][index].double().numpy()
    y = int(teacher.labels["test"][index])
    wrong = np.arange(10) != y
    onehot = 1.0 - wrong

    def shared(kept, shares):
        return (1 - kept) * onehot + kept * shares

    def over_wrong(weights):
        return np.where(wrong, weights, 0) / weights[wrong].sum()

    q, even = softmax(u), over_wrong(np.ones(10))
    calibrated = softmax(u / T)
    amount = min(2 * (calibrated[y] - 0.8) ** 2, 0.2)
    scores = (u - u.min()) / (u - u.min()).sum()
    validation = teacher.logits["validation"].double().numpy()
    members = validation[teacher.labels["validation"].numpy() == y]
    average = np.mean([softmax(row) for row in members], axis=0)
    return {
        "cross-entropy": onehot,
        "label smoothing": 0.9 * onehot + 0.01,
        "ILS2": shared(0.1, over_wrong(q)),
        "ILS1": shared(amount, even),
        "ILS": shared(amount, over_wrong(calibrated)),
        "scores": shared(0.1 * scores[y], over_wrong(scores)),
        "class-based": shared(0.1, over_wrong(average)),
        "label relaxation": q if q[y] >= 0.9 else shared(0.1, over_wrong(q)),
    }


INDICES = [0, 1, 50, 200, 350, 359]  # wrong and unsure, unsure, ..., certain


@pytest.mark.parametrize("index", INDICES)
def test_targets_losses_and_minima_are_those_of_the_formulas(teacher, index):
    p = softmax(teacher.logits["test"][index].double().numpy())
    y = int(teacher.labels["test"][index])
    expected = targets_by_hand(teacher, index)
    found = {request.method: request for request in inspector.requests(teacher, index)}
    assert list(found) == list(expected)
    for method, t in expected.items():
        request = found[method]
        assert request.target.numpy() == pytest.approx(t, abs=1e-7), method
        if method == "label relaxation":
            outside = 0.9 * np.log(0.9 / p[y]) + 0.1 * np.log(0.1 / (1 - p[y]))
            assert request.loss == pytest.approx(outside if p[y] < 0.9 else 0, abs=1e-7)
            assert request.least == 0
            continue
        assert request.loss == pytest.approx(-(t * np.log(p)).sum(), abs=1e-6)
        positive = t[t > 0]
        assert request.least == pytest.approx(-(positive * np.log(positive)).sum(), abs=1e-6)
        assert request.loss >= request.least


@pytest.mark.parametrize("index", INDICES)
def test_the_gradient_is_what_the_network_says_less_what_is_asked(teacher, index):
    """The gradient is autograd's, of the loss that trains; the claim is the module's docstring."""
    p = teacher.logits["test"][index].double().softmax(0).numpy()
    for request in inspector.requests(teacher, index):
        assert request.gradient.numpy() == pytest.approx(p - request.target.numpy(), abs=1e-7)


def test_the_credal_set_is_shown_as_a_region_and_holds_the_nearest_answer(teacher):
    for index in INDICES:
        *others, relaxation = inspector.requests(teacher, index)
        assert not any(request.is_set for request in others)
        assert relaxation.is_set
        y = int(teacher.labels["test"][index])
        assert (float(relaxation.low[y]), float(relaxation.high[y])) == (0.9, 1)
        wrong = torch.arange(10) != y
        assert relaxation.low[wrong].max() == 0
        assert relaxation.high[wrong].tolist() == [0.1] * 9
        assert (relaxation.target >= relaxation.low - 1e-12).all()
        assert (relaxation.target <= relaxation.high + 1e-12).all()


def test_both_sides_of_the_credal_set_are_among_the_examples(teacher):
    inside = [inspector.requests(teacher, index)[-1].loss == 0 for index in INDICES]
    assert set(inside) == {True, False}


def test_the_panels_draw_the_targets_and_the_network(teacher):
    index = 50
    wanted = inspector.requests(teacher, index)
    label = int(teacher.labels["test"][index])
    said = teacher.logits["test"][index].double().softmax(0)
    image = np.zeros((8, 8, 1), np.uint8)
    names = [f"$name_{k}" for k in range(10)]
    figure = inspector.draw(image, "heading", names, label, said, wanted)
    shown = inspector.shown_classes(said, label)
    _, now, *panels = figure.axes
    assert shown[0] == label
    assert said[shown[1:]].tolist() == sorted(said[shown[1:]].tolist(), reverse=True)
    assert now.lines[0].get_xdata() == pytest.approx(said[shown].numpy())
    assert now.get_yticklabels()[0].get_text() == names[label]
    for axes, request in zip(panels, wanted, strict=True):
        bars = axes.patches[: len(shown)]
        assert axes.lines[0].get_xdata() == pytest.approx(said[shown].numpy())
        widths = (request.high - request.low if request.is_set else request.target)[shown]
        assert [bar.get_width() for bar in bars] == pytest.approx(widths.tolist())
        starts = request.low[shown].tolist() if request.is_set else [0] * 10
        assert [bar.get_x() for bar in bars] == pytest.approx(starts)
        assert f"loss {request.loss:.2f}, least {request.least:.2f}" in axes.get_title()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channels_are_shown(teacher, channels):
    wanted, names = inspector.requests(teacher, 0), [*"abcdefghij"]
    image = np.full((8, 8, channels), 100, np.uint8)
    image[..., -1] = 200
    figure = inspector.draw(
        image, "heading", names, 0, teacher.logits["test"][0].softmax(0), wanted
    )
    shown = figure.axes[0].images[0].get_array()
    if channels == 3:
        assert (shown == image).all()
    else:
        assert np.unique(shown) == pytest.approx((200 + 100 * (channels - 1)) / channels)


def test_many_classes_show_the_true_one_and_the_likeliest(teacher):
    said = torch.linspace(0, 1, 100).double()
    assert inspector.shown_classes(said, 3) == [3, *range(99, 90, -1)]


def test_the_files_and_the_words(teacher, tmp_path):
    markdown, drawing = inspector.inspect([teacher], 50, "data", CPU, tmp_path)
    names = [f"inspect-digits-shallownet-50.{suffix}" for suffix in ("csv", "md", "pdf", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert drawing.png == tmp_path / names[3]
    table = pd.read_csv(tmp_path / "inspect-digits-shallownet-50.csv")
    assert len(table) == 8 * 10
    assert table.groupby("method")["target"].sum().to_numpy() == pytest.approx(1)
    assert table.groupby("method")["gradient"].sum().to_numpy() == pytest.approx(0, abs=1e-9)
    expected = targets_by_hand(teacher, 50)
    for method, rows in table.groupby("method"):
        assert rows["target"].to_numpy() == pytest.approx(expected[method], abs=1e-7)
    assert (tmp_path / "inspect-digits-shallownet-50.md").read_text() == markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8
    for request, row in zip(inspector.requests(teacher, 50), rows[2:], strict=True):
        assert f"| {request.loss:.4f} " in row
        assert request.words.split("(")[0] in row
        assert "{" not in row
    with Image.open(tmp_path / "inspect-digits-shallownet-50.png") as image:
        assert image.width == 2070
        assert 0.01 < (np.asarray(image.convert("L")) < 250).mean() < 0.9


def test_the_image_shown_is_the_one_of_the_test_split(teacher, tmp_path, monkeypatch):
    seen = []
    draw = inspector.draw
    monkeypatch.setattr(
        inspector, "draw", lambda image, *rest: seen.append(image) or draw(image, *rest)
    )
    inspector.inspect([teacher], 3, "data", CPU, tmp_path)
    data = data_loader.load("digits")
    assert np.array_equal(seen[0], data.images[data.train_size + 3].numpy())


def test_the_vanilla_network_of_the_lowest_seed_teaches(teacher, tmp_path):
    from dataclasses import replace

    def other(method, seed):
        training = {"method": method, "requested": {}, "seed": seed}
        return replace(teacher, training=training, path=f"{method}{seed}")

    given = [other("label-smoothing", 0), other("vanilla", 2), other("vanilla", 1)]
    markdown, _ = inspector.inspect(given, 0, "data", CPU, tmp_path)
    assert "vanilla1" in markdown
    markdown, _ = inspector.inspect(given[:1], 0, "data", CPU, tmp_path)
    assert "label-smoothing0" in markdown


@pytest.mark.parametrize("index", [-1, 360, 10**9])
def test_an_index_out_of_range_gives_the_range(teacher, tmp_path, index):
    with pytest.raises(InputError, match="0 to 359") as caught:
        inspector.inspect([teacher], index, "data", CPU, tmp_path)
    assert str(index) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_class_without_validation_images_has_no_class_based_target(teacher):
    from dataclasses import replace

    label = int(teacher.labels["test"][0])
    kept = teacher.labels["validation"] != label
    emptied = replace(
        teacher,
        logits={**teacher.logits, "validation": teacher.logits["validation"][kept]},
        labels={**teacher.labels, "validation": teacher.labels["validation"][kept]},
    )
    methods = [request.method for request in inspector.requests(emptied, 0)]
    assert "class-based" not in methods
    assert len(methods) == 7


def test_certain_and_extreme_logits_stay_finite(teacher):
    from dataclasses import replace

    logits = torch.zeros(2, 10)
    logits[0, 3], logits[1, 4] = 1e4, -1e4
    labels = torch.tensor([3, 4])
    extreme = replace(
        teacher,
        logits={"test": logits, "validation": logits},
        labels={"test": labels, "validation": labels},
    )
    for index in (0, 1):
        for request in inspector.requests(extreme, index):
            for values in (request.target, request.gradient):
                assert values.isfinite().all(), request.method
            assert np.isfinite([request.loss, request.least]).all()
            assert float(request.target.sum()) == pytest.approx(1)
