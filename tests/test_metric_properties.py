"""What must hold of utils/evaluate.py for any logits and labels (hypothesis, derandomised)."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from utils.evaluate import (
    all_metrics,
    calibrated_ece_by_chance,
    calibration_bins,
    fit_temperature,
    log_loss,
)

bounded = settings(max_examples=60)

CLASSES = st.one_of(st.integers(2, 12), st.sampled_from([100, 1000]))
BINS = st.integers(1, 25)
SEEDS = st.integers(0, 2**32)


@st.composite
def continuous(draw):
    """Logits without ties. (Tied logits make the prediction depend on the order of classes.)"""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    n, classes, spread = draw(st.integers(1, 40)), draw(CLASSES), draw(st.floats(0.1, 6.0))
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * spread
    return logits, torch.randint(0, classes, (n,), generator=generator)


@st.composite
def coarse(draw):
    """Small integers times a scale, in any float type: ties within rows and between rows."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    n, classes = draw(st.integers(1, 40)), draw(CLASSES)
    steps = torch.randint(-2, 3, (n, classes), generator=generator)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    logits = (steps * draw(st.sampled_from([0.0, 0.125, 1.0, 20.0, 10_000.0]))).to(dtype)
    return logits, torch.randint(0, classes, (n,), generator=generator)


either = st.one_of(continuous(), coarse())


def same(a, b):
    return a == pytest.approx(b, rel=1e-9, abs=1e-11)


@bounded
@given(either, BINS)
def test_ranges_and_order(data, bins):
    logits, labels = data
    found = all_metrics(logits, labels, bins=bins)
    for key in ("accuracy", "ece", "classwise_ece", "adaptive_ece", "mce", "rmsce", "ks", "aurc"):
        assert 0 <= found[key] <= 1 + 1e-12, key
    assert 0 <= found["brier"] <= 2 + 1e-12
    assert 0 <= found["log_loss"] < math.inf
    assert found["ece"] <= found["rmsce"] + 1e-12  # Jensen
    assert found["rmsce"] <= found["mce"] + 1e-12
    assert found["classwise_ece"] <= 2 / logits.shape[1] + 1e-12  # sum of |p - onehot| is <= 2
    assert found.get("top5_accuracy", 1.0) >= found["accuracy"]
    # The overall gap between accuracy and confidence is the least any partition can show.
    binned = calibration_bins(logits, labels, bins=bins)
    confidence = float((binned.confidence * binned.count).nansum() / len(labels))
    least = abs(found["accuracy"] - confidence) - 1e-12
    assert min(found["ece"], found["adaptive_ece"], found["ks"]) >= least
    assert 0 <= calibrated_ece_by_chance(logits, bins=bins, draws=2) <= 1


@bounded
@given(either, BINS)
def test_bins_partition_the_rows(data, bins):
    binned = calibration_bins(*data, bins=bins)
    assert binned.count.sum() == len(data[1])
    filled = binned.count > 0
    assert bool((binned.confidence[filled] <= binned.edges[1:][filled] + 1e-12).all())
    assert bool((binned.confidence[filled] >= binned.edges[:-1][filled] - 1e-12).all())
    assert bool(binned.accuracy[~filled].isnan().all())


@bounded
@given(either, SEEDS, BINS)
def test_the_order_of_rows_does_not_matter(data, seed, bins):
    logits, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = all_metrics(logits[order], labels[order], bins=bins)
    assert same(shuffled, all_metrics(logits, labels, bins=bins))


@bounded
@given(continuous(), SEEDS, BINS)
def test_the_names_of_classes_do_not_matter(data, seed, bins):
    logits, labels = data
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    renamed = all_metrics(logits[:, order], order.argsort()[labels], bins=bins)
    assert same(renamed, all_metrics(logits, labels, bins=bins))


@bounded
@given(continuous(), SEEDS, st.floats(0, 1e3))
def test_a_constant_added_to_a_row_does_not_matter(data, seed, size):
    logits, labels = data
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(len(labels), 1, generator=generator, dtype=torch.float64) * size
    assert same(all_metrics(logits + shift, labels), all_metrics(logits, labels))


@bounded
@given(continuous(), st.integers(2, 4), BINS)
def test_repeating_every_row_changes_nothing(data, times, bins):
    """Ties only: no metric but the adaptive bins and AURC knows how many rows there are."""
    logits, labels = data
    once = all_metrics(logits, labels, bins=bins)
    again = all_metrics(logits.repeat(times, 1), labels.repeat(times), bins=bins)
    for key in ("adaptive_ece", "aurc"):
        del once[key], again[key]
    assert same(again, once)


@bounded
@given(continuous(), st.floats(0.05, 20))
def test_scaling_by_a_temperature_keeps_the_accuracy(data, temperature):
    logits, labels = data
    before, after = all_metrics(logits, labels), all_metrics(logits / temperature, labels)
    assert after["accuracy"] == before["accuracy"]
    assert after.get("top5_accuracy") == before.get("top5_accuracy")


@bounded
@given(either, st.floats(0.001, 2))
def test_the_fitted_temperature_is_better_than_its_neighbours(data, step):
    logits, labels = data
    logits = logits.double()
    assume(bool((logits.max(1).values > logits.gather(1, labels[:, None]).squeeze(1)).any()))
    found = fit_temperature(logits, labels)
    assert 1e-6 <= found <= 1e6
    at_best = log_loss(logits / found, labels)
    neighbours = [t for t in (found * math.exp(step), found / math.exp(step)) if 1e-6 <= t <= 1e6]
    for neighbour in neighbours:
        assert at_best <= log_loss(logits / neighbour, labels) + 1e-12 * (1 + at_best)
    assert at_best <= log_loss(logits, labels) + 1e-12
    assert at_best <= math.log(logits.shape[1]) + 0.1  # the uniform prediction is in reach
