"""utils/evaluate.py against other people's libraries, naive formulas and sums done by hand.

Compared with torchmetrics 1.9.0 and scikit-learn 1.9.1.
"""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn import metrics as sklearn_metrics
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from torchmetrics.functional.classification import multiclass_calibration_error

from utils import evaluate
from utils.evaluate import (
    accuracy,
    adaptive_calibration_error,
    all_metrics,
    area_under_risk_coverage,
    brier_score,
    calibrated_ece_by_chance,
    calibration_bins,
    classwise_calibration_error,
    expected_calibration_error,
    fit_temperature,
    kolmogorov_smirnov_calibration_error,
    log_loss,
    maximum_calibration_error,
    root_mean_square_calibration_error,
    top_k_accuracy,
)

# all_metrics' keys, in order, and the function each stands for.
NAMED = {
    "accuracy": accuracy,
    "top5_accuracy": top_k_accuracy,
    "log_loss": log_loss,
    "brier": brier_score,
    "ece": expected_calibration_error,
    "classwise_ece": classwise_calibration_error,
    "adaptive_ece": adaptive_calibration_error,
    "mce": maximum_calibration_error,
    "rmsce": root_mean_square_calibration_error,
    "ks": kolmogorov_smirnov_calibration_error,
    "aurc": area_under_risk_coverage,
}
BINNED = ("ece", "classwise_ece", "adaptive_ece", "mce", "rmsce")


def sample(n, classes, spread=2.0, temperature=1.0, seed=0):
    """Logits of the given spread, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * spread
    cumulative = softmax(logits / temperature, axis=1).cumsum(1)
    labels = (rng.random((n, 1)) > cumulative).sum(1).clip(max=classes - 1)
    return torch.tensor(logits), torch.tensor(labels)


def logits_of(*rows):
    """float64 logits whose softmax is, up to rounding, these rows of probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def naive_bins(values, outcomes, bins):
    """(count, mean value, mean outcome) of each non-empty bin (m/M, (m+1)/M], and 0 in bin 0."""
    found = []
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        inside = [i for i, v in enumerate(values) if low < v <= high or (m == 0 and v == 0)]
        if inside:
            found.append((len(inside), np.mean(values[inside]), np.mean(outcomes[inside])))
    assert sum(count for count, _, _ in found) == len(values)
    return found


def naive_top_label(logits, labels):
    p = softmax(logits.double().numpy(), axis=1)
    return p.max(1), (p.argmax(1) == labels.numpy()).astype(float)


# ------------------------------------------------------------------ against other libraries


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_binned_errors_match_torchmetrics(classes, bins):
    logits, labels = sample(3000, classes, temperature=1.7)
    for function, norm in (
        (expected_calibration_error, "l1"),
        (root_mean_square_calibration_error, "l2"),
        (maximum_calibration_error, "max"),
    ):
        theirs = multiclass_calibration_error(logits, labels, classes, n_bins=bins, norm=norm)
        assert function(logits, labels, bins=bins) == pytest.approx(float(theirs), abs=2e-6)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_scores_match_scikit_learn(classes):
    logits, labels = sample(2000, classes)
    p, y, named = softmax(logits.numpy(), axis=1), labels.numpy(), np.arange(classes)
    ours = log_loss(logits, labels)
    assert ours == pytest.approx(sklearn_metrics.log_loss(y, p, labels=named), rel=1e-12)
    assert accuracy(logits, labels) == sklearn_metrics.accuracy_score(y, p.argmax(1))
    theirs = sklearn_metrics.brier_score_loss(y, p, labels=named, scale_by_half=False)
    assert brier_score(logits, labels) == pytest.approx(theirs, rel=1e-12)
    by_hand = ((p - np.eye(classes)[y]) ** 2).sum(1).mean()
    assert brier_score(logits, labels) == pytest.approx(by_hand, rel=1e-12)
    for k in {1, 2, 5} if classes > 5 else ():
        theirs = sklearn_metrics.top_k_accuracy_score(y, p, k=k, labels=named)
        assert top_k_accuracy(logits, labels, k=k) == theirs


def test_where_torchmetrics_takes_the_other_bin():
    """torchmetrics 1.9.0 bins [lo, hi) and gives confidence 1.0 a bin of its own."""
    # One row of confidence 0.5 that is right, one of 0.55 that is wrong. (lo, hi] parts them.
    logits = torch.tensor([[-1.0, -1.0], [math.log(11 / 9) - 1, -1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx(0.5 * 0.5 + 0.5 * 0.55)
    theirs = multiclass_calibration_error(logits, labels, 2, n_bins=10)
    assert float(theirs) == pytest.approx(0.525 - 0.5, abs=1e-6)

    # Confidence 1.0 wrong, 0.95 right: together in (0.9, 1].
    logits = torch.tensor([[1000.0, 0.0], [math.log(19), 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    assert expected_calibration_error(logits, labels) == pytest.approx(0.975 - 0.5)
    theirs = multiclass_calibration_error(logits, labels, 2, n_bins=10)
    assert float(theirs) == pytest.approx(0.5 * 1 + 0.5 * 0.05, abs=1e-6)


def test_where_torchmetrics_takes_logits_for_probabilities():
    """torchmetrics 1.9.0 applies softmax only if some value lies outside [0, 1]."""
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 0])
    sure = (1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5)))  # 0.731, 0.622
    assert expected_calibration_error(logits, labels) == pytest.approx(1 - sum(sure) / 2)
    assert float(multiclass_calibration_error(logits, labels, 2, n_bins=10)) == 0.0


# ------------------------------------------------------------------ against naive formulas


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("bins", [1, 7, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_naive_loops(classes, bins, seed):
    logits, labels = sample(200, classes, spread=3.0, temperature=2.0, seed=seed)
    n = len(labels)
    confidence, correct = naive_top_label(logits, labels)

    gaps = [(count / n, abs(a - c)) for count, c, a in naive_bins(confidence, correct, bins)]
    ece = sum(share * gap for share, gap in gaps)
    assert expected_calibration_error(logits, labels, bins=bins) == pytest.approx(ece)
    rmsce = sum(share * gap**2 for share, gap in gaps) ** 0.5
    assert root_mean_square_calibration_error(logits, labels, bins=bins) == pytest.approx(rmsce)
    mce = max(gap for _, gap in gaps)
    assert maximum_calibration_error(logits, labels, bins=bins) == pytest.approx(mce)

    p, classwise = softmax(logits.numpy(), axis=1), 0.0
    for k in range(classes):
        is_k = (labels.numpy() == k).astype(float)
        found = naive_bins(p[:, k], is_k, bins)
        classwise += sum(count / n * abs(a - c) for count, c, a in found) / classes
    assert classwise_calibration_error(logits, labels, bins=bins) == pytest.approx(classwise)

    order = np.argsort(confidence)
    mass = [[] for _ in range(bins)]
    for i, row in enumerate(order):
        mass[i * bins // n].append(correct[row] - confidence[row])
    adaptive = sum(abs(sum(members)) for members in mass) / n
    assert adaptive_calibration_error(logits, labels, bins=bins) == pytest.approx(adaptive)

    ks = max(abs((correct - confidence)[order[: i + 1]].sum()) / n for i in range(n))
    assert kolmogorov_smirnov_calibration_error(logits, labels) == pytest.approx(ks)
    aurc = np.mean([1 - correct[order[::-1][: i + 1]].mean() for i in range(n)])
    assert area_under_risk_coverage(logits, labels) == pytest.approx(aurc)


def tied():
    """Six rows: confidence 0.9 twice and 0.6 three times, each mixed right and wrong; 0.7 once."""
    sure = [0.9, 0.6, 0.6, 0.9, 0.7, 0.6]
    right = [1, 0, 1, 0, 1, 1]
    return logits_of(*((c, 1 - c) for c in sure)), torch.tensor([1 - r for r in right])


def test_tied_aurc_is_the_mean_over_orders_of_the_ties():
    logits, labels = tied()
    confidence, correct = naive_top_label(logits, labels)
    areas = []
    for order in itertools.permutations(range(6)):
        if all(confidence[i] >= confidence[j] for i, j in itertools.pairwise(order)):
            wrong = 1 - correct[list(order)]
            areas.append(np.mean(wrong.cumsum() / np.arange(1, 7)))
    assert len(areas) == 2 * 6
    assert max(areas) - min(areas) > 0.1  # so that breaking ties in any one order would show
    assert area_under_risk_coverage(logits, labels) == pytest.approx(np.mean(areas), rel=1e-12)


def test_tied_ks_looks_only_between_groups():
    # Sums over the groups, in units of 1/6: 0.6 x3, two right: 2 - 1.8; 0.7 right: 1 - 0.7;
    # 0.9 x2, one right: 1 - 1.8. So 0.2, 0.5, -0.3.
    assert kolmogorov_smirnov_calibration_error(*tied()) == pytest.approx(0.5 / 6)


def test_tied_adaptive_bins_share_the_groups_mean():
    # Two bins of three: the three 0.6 rows (mean a 2/3), then 0.7, 0.9, 0.9.
    expected = (abs(2 - 1.8) + abs(2 - 2.5)) / 6
    assert adaptive_calibration_error(*tied(), bins=2) == pytest.approx(expected)
    # Six bins of one: a 0.6 row counts as 2/3 right, a 0.9 row as 1/2.
    expected = (3 * abs(2 / 3 - 0.6) + abs(1 - 0.7) + 2 * abs(1 / 2 - 0.9)) / 6
    assert adaptive_calibration_error(*tied(), bins=6) == pytest.approx(expected)
    # More bins than rows: every row still has its own.
    assert adaptive_calibration_error(*tied(), bins=50) == pytest.approx(expected)


def test_ties_do_not_depend_on_the_order_of_rows():
    """Saturated float16 logits: hundreds of rows share a confidence, 1.0 among them."""
    logits, labels = sample(1000, 4, spread=30.0, temperature=20.0)
    logits = (logits / 8).round().half() * 8
    confidence, correct = evaluate.top_label(logits, labels)
    assert len(confidence.unique()) < 200
    assert 0 < correct[confidence == 1].double().mean() < 1
    before = all_metrics(logits, labels)
    for seed in range(5):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        after = all_metrics(logits[order], labels[order])
        assert after == pytest.approx(before, rel=1e-12, abs=1e-14)
        for sorting in ("adaptive_ece", "ks", "aurc"):
            assert after[sorting] == before[sorting]


# ------------------------------------------------------------------ worked by hand


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 7, 10, 20])
@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 7, 10, 15, 20])
def test_equal_logits_fall_in_the_bin_that_exact_fractions_say(classes, bins):
    logits, labels = torch.zeros(1, classes), torch.tensor([0])
    binned = calibration_bins(logits, labels, bins=bins)
    on_paper = math.ceil(Fraction(1, classes) * bins) - 1  # (m/M, (m+1)/M]
    assert binned.count.nonzero().tolist() == [[on_paper]]
    assert binned.confidence[on_paper] == 1 / classes


def test_half_lies_below_its_edge():
    logits, labels = torch.zeros(2, 2), torch.tensor([0, 0])
    assert calibration_bins(logits, labels, bins=10).count.tolist() == [0] * 4 + [2] + [0] * 5
    assert calibration_bins(logits, labels, bins=2).count.tolist() == [2, 0]


def test_every_edge_belongs_to_the_bin_below():
    for bins in range(1, 60):
        edges = evaluate.bin_edges(bins)
        assert edges.tolist() == [k / bins for k in range(bins + 1)]
        on_edges = evaluate.bin_index(edges, edges)
        assert on_edges.tolist() == [0, *range(bins)]
        just_above = evaluate.bin_index(torch.nextafter(edges[:-1], torch.tensor(2.0)), edges)
        assert just_above.tolist() == list(range(bins))


def test_certainty_lies_in_the_last_bin_and_zero_in_the_first():
    logits, labels = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([1])
    binned = calibration_bins(logits, labels, bins=4)
    assert binned.count.tolist() == [0, 0, 0, 1]
    assert binned.confidence[3] == 1.0
    # Class-wise: p = (1, 0, 0) against (0, 1, 0), so gaps 1, 1, 0.
    assert classwise_calibration_error(logits, labels, bins=4) == pytest.approx(2 / 3)
    assert expected_calibration_error(logits, labels) == 1.0
    assert maximum_calibration_error(logits, labels) == 1.0
    assert brier_score(logits, labels) == 2.0
    assert log_loss(logits, labels) == 2e4


def test_bins_by_hand_with_empty_ones():
    # Confidences 0.6 (right), 0.7 (wrong), 0.95 (right) in 4 bins: 2 in (.5, .75], 1 in (.75, 1].
    logits = logits_of((0.6, 0.4), (0.3, 0.7), (0.05, 0.95))
    labels = torch.tensor([0, 0, 1])
    binned = calibration_bins(logits, labels, bins=4)
    assert binned.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert binned.count.tolist() == [0, 0, 2, 1]
    assert binned.confidence.tolist() == pytest.approx(
        [math.nan, math.nan, 0.65, 0.95], nan_ok=True
    )
    assert binned.accuracy.tolist() == pytest.approx([math.nan, math.nan, 0.5, 1], nan_ok=True)
    assert all(field.dtype == torch.float64 for field in binned)

    assert expected_calibration_error(logits, labels, bins=4) == pytest.approx(0.35 / 3)
    assert maximum_calibration_error(logits, labels, bins=4) == pytest.approx(0.15)
    rmsce = math.sqrt(2 / 3 * 0.15**2 + 1 / 3 * 0.05**2)
    assert root_mean_square_calibration_error(logits, labels, bins=4) == pytest.approx(rmsce)
    # Class 0: 0.05 | 0.3 0.6 -> bins (0, .25], (.25, .5], (.5, .75]: gaps .05, .7, .4; class 1
    # mirrors it: 0.4 | 0.7 | 0.95 -> gaps .4, .7, .05.
    assert classwise_calibration_error(logits, labels, bins=4) == pytest.approx(1.15 / 3)
    # Sorted .6 right, .7 wrong, .95 right: cumulative .4, -.3, -.25.
    assert kolmogorov_smirnov_calibration_error(logits, labels) == pytest.approx(0.4 / 3)
    # Most sure first: right, wrong, right: risks 0, 1/2, 1/3.
    assert area_under_risk_coverage(logits, labels) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    brier = 2 * (0.4**2 + 0.7**2 + 0.05**2) / 3
    assert brier_score(logits, labels) == pytest.approx(brier)
    assert log_loss(logits, labels) == pytest.approx(-math.log(0.6 * 0.3 * 0.95) / 3)


def test_classwise_counts_classes_no_label_names():
    # Only class 0 occurs; classes 1 and 2 are predicted 0.2 and 0.1 for nothing.
    logits, labels = logits_of((0.7, 0.2, 0.1), (0.7, 0.2, 0.1)), torch.tensor([0, 0])
    assert classwise_calibration_error(logits, labels) == pytest.approx((0.3 + 0.2 + 0.1) / 3)


def test_single_row():
    logits, labels = logits_of((0.2, 0.5, 0.3)), torch.tensor([2])
    assert all_metrics(logits, labels) == pytest.approx(
        {
            "accuracy": 0.0,
            "log_loss": -math.log(0.3),
            "brier": 0.2**2 + 0.5**2 + 0.7**2,
            "ece": 0.5,
            "classwise_ece": (0.2 + 0.5 + 0.7) / 3,
            "adaptive_ece": 0.5,
            "mce": 0.5,
            "rmsce": 0.5,
            "ks": 0.5,
            "aurc": 1.0,
        }
    )


def test_of_tied_logits_the_lowest_class_is_predicted():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]] * 4)
    labels = torch.tensor([0, 1, 2, 3])
    assert accuracy(logits, labels) == 1 / 4
    assert [top_k_accuracy(logits, labels, k=k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]


def test_large_float32_logits_stay_finite_and_exact():
    logits, labels = sample(500, 6)
    logits = (logits * 64).round() / 64  # so that adding 8192 is exact in float32
    offset = (logits + 8192).float()
    assert all_metrics(offset, labels) == all_metrics(logits, labels)
    huge = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert log_loss(huge, torch.tensor([0, 0])) == 1e4
    assert all(math.isfinite(v) for v in all_metrics(huge, torch.tensor([0, 0])).values())


def test_brier_of_a_nearly_certain_row_does_not_cancel():
    tiny = math.exp(-30)
    logits, labels = torch.tensor([[30.0, 0.0]]), torch.tensor([0])
    assert brier_score(logits, labels) == pytest.approx(2 * tiny**2, rel=1e-2)


# ------------------------------------------------------------------ chance


def test_chance_ece_of_one_bin_by_hand():
    # One row of confidence 0.75: |a - 0.75| is 0.25 with probability 3/4, else 0.75.
    expected = 0.75 * 0.25 + 0.25 * 0.75
    assert calibrated_ece_by_chance(logits_of((0.75, 0.25)), draws=20_000) == pytest.approx(
        expected, abs=0.01
    )


def test_chance_ece_is_what_calibrated_labels_give():
    logits, _ = sample(300, 5)
    drawn = [  # labels redrawn from these very logits' softmax
        expected_calibration_error(
            logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        )
        for generator in (torch.Generator().manual_seed(seed) for seed in range(200))
    ]
    chance = calibrated_ece_by_chance(logits, draws=200)
    assert chance == pytest.approx(np.mean(drawn), rel=0.1)
    assert chance > 0.02


def test_chance_ece_is_seeded():
    logits, _ = sample(100, 3)
    torch.manual_seed(5)
    first, state = calibrated_ece_by_chance(logits, seed=1), torch.get_rng_state()
    torch.manual_seed(6)
    assert calibrated_ece_by_chance(logits, seed=1) == first
    assert calibrated_ece_by_chance(logits, seed=2) != first
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_chance_ece_of_a_certain_network_is_zero():
    assert calibrated_ece_by_chance(torch.tensor([[100.0, 0.0]] * 3)) == 0.0


# ------------------------------------------------------------------ all_metrics


@pytest.mark.parametrize("classes", [2, 5, 6, 50])
def test_all_metrics_are_the_functions_in_order(classes):
    logits, labels = sample(300, classes)
    found = all_metrics(logits, labels, bins=7)
    named = [key for key in NAMED if key != "top5_accuracy" or classes > 5]
    assert list(found) == named
    for key in named:
        extra = {"bins": 7} if key in BINNED else {}
        assert found[key] == NAMED[key](logits, labels, **extra), key
        assert type(found[key]) is float, key


def test_bins_are_ten_unless_told():
    logits, labels = sample(300, 6)
    assert all_metrics(logits, labels) == all_metrics(logits, labels, bins=10)
    for key in BINNED:
        assert NAMED[key](logits, labels) == NAMED[key](logits, labels, bins=10)
        assert NAMED[key](logits, labels) != NAMED[key](logits, labels, bins=9)


@pytest.mark.parametrize("chunk", [1, 7, 64, 6 * 100])
def test_the_size_of_a_chunk_does_not_show(monkeypatch, chunk):
    logits, labels = sample(500, 6, temperature=1.5)
    whole, temperature = all_metrics(logits, labels), fit_temperature(logits, labels)
    chance = calibrated_ece_by_chance(logits, draws=3)
    alone = {key: function(logits, labels) for key, function in NAMED.items()}
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    assert all_metrics(logits, labels) == pytest.approx(whole, rel=1e-12)
    assert {key: f(logits, labels) for key, f in NAMED.items()} == pytest.approx(alone, rel=1e-12)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=1e-10)
    assert calibrated_ece_by_chance(logits, draws=3) == pytest.approx(chance, rel=1e-12)
    logits[321, 2] = math.nan
    with pytest.raises(ValueError, match="row 321"):
        all_metrics(logits, labels)


# ------------------------------------------------------------------ temperature


def independent_loss(logits, labels, temperature):
    z = logits.double().numpy() / temperature
    return np.mean(logsumexp(z, axis=1) - z[np.arange(len(z)), labels.numpy()])


def independent_temperature(logits, labels):
    """A fine grid over log T, then golden-section-like search of the loss around its best."""
    z = logits.double() - logits.double().max(1, keepdim=True).values
    grid = np.linspace(-5, 7, 601)
    best = grid[np.argmin([independent_loss(z, labels, math.exp(t)) for t in grid])]
    found = minimize_scalar(
        lambda t: independent_loss(z, labels, math.exp(t)),
        bounds=(best - 0.05, best + 0.05),
        options={"xatol": 1e-10},
    )
    return math.exp(found.x)


@pytest.mark.parametrize("true", [0.05, 0.3, 1.0, 1.7, 8.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_temperature_is_the_one_the_labels_were_drawn_with(true, dtype):
    logits, labels = sample(1500, 4, spread=2 * true, temperature=true)
    logits = logits.to(dtype)
    found = fit_temperature(logits, labels)
    assert type(found) is float
    # The loss is flat at its minimum: a search that sees only the loss finds T to about 1e-8.
    assert found == pytest.approx(independent_temperature(logits, labels), rel=1e-6)
    assert found == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_temperature_is_blind_to_an_offset(dtype):
    logits, labels = sample(1000, 4, temperature=1.5)
    logits = (logits * 256).round() / 256  # so that 1e4 can be added exactly in float32
    found = fit_temperature((logits + 1e4).to(dtype), labels)
    assert found == fit_temperature(logits, labels)


class Given(ClassifierMixin, BaseEstimator):
    """A trained network, as scikit-learn sees it: its decision function is given the logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return x.argmax(1)


@pytest.mark.parametrize("true", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("classes", [3, 10])
def test_temperature_matches_scikit_learn(true, classes):
    logits, labels = sample(1000, classes, temperature=true)
    given = FrozenEstimator(Given().fit(logits.numpy(), labels.numpy()))
    fitted = CalibratedClassifierCV(given, method="temperature")
    fitted.fit(logits.numpy(), labels.numpy())
    theirs = 1 / fitted.calibrated_classifiers_[0].calibrators[0].beta_
    assert fit_temperature(logits, labels) == pytest.approx(theirs, rel=1e-6)


def test_temperature_by_hand():
    # Logit gap 2, right three times in four: softmax(2 / T) = 3/4 where 2 / T = log 3.
    logits, labels = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(3), rel=1e-10)


def test_temperature_of_perfect_predictions_is_one_with_a_warning():
    logits, _ = sample(50, 3)
    with pytest.warns(UserWarning, match="every label has the largest logit"):
        assert fit_temperature(logits, logits.argmax(1)) == 1.0
    # Logits that are all equal: every label has the largest, and the loss is flat.
    with pytest.warns(UserWarning, match="every label has the largest logit"):
        assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_temperature_of_useless_predictions_is_the_highest():
    logits, _ = sample(50, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(logits, logits.argmin(1)) == evaluate.HIGHEST_TEMPERATURE
        assert fit_temperature(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 1])) == 1e6


def test_temperature_of_logits_of_no_spread_is_the_lowest():
    logits, labels = torch.tensor([[1e-8, 0.0]] * 3), torch.tensor([0, 0, 1])
    assert fit_temperature(logits, labels) == evaluate.LOWEST_TEMPERATURE


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_temperature_follows_the_scale_of_the_logits(factor):
    logits, labels = sample(500, 4)
    expected = fit_temperature(logits, labels) * factor
    assert fit_temperature(logits * factor, labels) == pytest.approx(expected, rel=1e-9)


def test_temperature_lowers_the_log_loss_and_keeps_the_accuracy():
    logits, labels = sample(1000, 5, temperature=3.0)
    scaled = logits / fit_temperature(logits, labels)
    assert log_loss(scaled, labels) < log_loss(logits, labels) - 0.1
    assert expected_calibration_error(scaled, labels) < expected_calibration_error(logits, labels)
    assert accuracy(scaled, labels) == accuracy(logits, labels)


# ------------------------------------------------------------------ what goes in


EVERY = [*NAMED.values(), calibration_bins, all_metrics, fit_temperature]


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_an_error_and_not_a_number(function, bad):
    logits, labels = sample(20, 6)
    logits[[7, 11], 3] = bad
    with pytest.raises(ValueError, match=rf"^logits must be finite, got {bad}.* in row 7$"):
        function(logits, labels)


def test_infinities_that_cancel_are_found():
    logits = torch.tensor([[0.0, 1.0], [math.inf, -math.inf]])
    with pytest.raises(ValueError, match="row 1"):
        accuracy(logits, torch.tensor([0, 0]))


def test_logits_whose_sum_overflows_are_no_error():
    logits = torch.tensor([[1.5e308, 1.5e308, 0.0]], dtype=torch.float64)
    assert log_loss(logits, torch.tensor([1])) == pytest.approx(math.log(2))


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"shape \(N, K\).*got \(4,\)"),
        (torch.zeros(4, 6, 1), torch.zeros(4).long(), r"got \(4, 6, 1\)"),
        (torch.zeros(0, 6), torch.zeros(0).long(), r"N >= 1.*got \(0, 6\)"),
        (torch.zeros(4, 1), torch.zeros(4).long(), r"K >= 2, got \(4, 1\)"),
        (
            torch.zeros(4, 6).long(),
            torch.zeros(4).long(),
            "floating-point numbers, got torch.int64",
        ),
        (np.array([["a", "b"]]), np.array([0]), "logits must be a tensor or a numeric array"),
        (torch.zeros(4, 6), torch.zeros(3).long(), r"shape \(4,\).*got \(3,\)"),
        (torch.zeros(4, 6), torch.zeros(4, 6).long(), r"shape \(4,\).*got \(4, 6\)"),
        (torch.zeros(4, 6), torch.zeros(4), "labels must be integers, got torch.float32"),
        (torch.zeros(4, 6), torch.zeros(4).bool(), "labels must be integers, got torch.bool"),
        (torch.zeros(4, 6), torch.tensor([0, 5, 6, 7]), r"in \[0, 6\).*got 6 in row 2"),
        (torch.zeros(4, 6), torch.tensor([0, -1, 6, 7]), r"in \[0, 6\).*got -1 in row 1"),
        (torch.zeros(4, 6), None, "labels must be a tensor or a numeric array, got NoneType"),
    ],
)
def test_bad_arguments_say_what_is_wrong(function, logits, labels, says):
    with pytest.raises(ValueError, match=says) as error:
        function(logits, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bins", [0, -3, 2.5, "10", True, None])
def test_bad_bins_are_an_error(bins):
    logits, labels = sample(5, 6)
    for function in (*(NAMED[key] for key in BINNED), calibration_bins, all_metrics):
        with pytest.raises(ValueError, match="bins must be an integer of at least 1, got"):
            function(logits, labels, bins=bins)
    with pytest.raises(ValueError, match="bins must be an integer of at least 1, got"):
        calibrated_ece_by_chance(logits, bins=bins)


def test_other_bad_numbers_are_errors():
    logits, labels = sample(5, 6)
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        top_k_accuracy(logits, labels, k=0)
    with pytest.raises(ValueError, match="k must be at most the number of classes, 6, got 7"):
        top_k_accuracy(logits, labels, k=7)
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        calibrated_ece_by_chance(logits, draws=0)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        calibrated_ece_by_chance(logits, seed=-1)


def test_what_is_accepted_gives_the_same_numbers():
    logits, labels = sample(100, 6)
    logits = (logits * 8).round() / 8  # exact in every float type but float8
    expected = all_metrics(logits, labels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all_metrics(logits.to(dtype), labels) == expected
    for dtype in (torch.uint8, torch.int32, torch.uint16):
        assert all_metrics(logits, labels.to(dtype)) == expected
    array = logits.numpy()
    assert all_metrics(array, labels.numpy()) == expected
    assert all_metrics(array.astype(np.float16), labels.numpy().astype(np.uint8)) == expected
    assert all_metrics(np.asfortranarray(array), labels) == expected
    assert all_metrics(array[::-1][::-1], labels.numpy()[::-1][::-1]) == expected
    assert all_metrics(logits.clone().requires_grad_(), labels) == expected
    assert all_metrics(logits.T.contiguous().T, labels) == expected
    assert all_metrics(array, labels, bins=np.int64(10)) == expected
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns at read-only memory
        assert all_metrics(array, labels) == expected


def test_arguments_are_left_as_they_were():
    logits, labels = sample(50, 6)  # float64 on the CPU: a conversion would not copy
    before = logits.clone(), labels.clone()
    for function in EVERY:
        function(logits, labels)
    calibrated_ece_by_chance(logits, draws=2)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.cuda
def test_a_gpu_gives_the_same_numbers():
    logits, labels = sample(500, 6, temperature=1.5)
    logits = logits.float()
    assert all_metrics(logits.cuda(), labels.cuda()) == all_metrics(logits, labels)
    assert all_metrics(logits.cuda(), labels) == all_metrics(logits, labels)
    assert fit_temperature(logits.cuda(), labels.cuda()) == fit_temperature(logits, labels)


def test_several_numbers_of_bins_at_once_are_each_of_them():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 4), torch.randint(4, (500,))
    together = evaluate.expected_calibration_errors(logits, labels, [5, 10, 50])
    assert together == [
        evaluate.expected_calibration_error(logits, labels, bins) for bins in (5, 10, 50)
    ]
