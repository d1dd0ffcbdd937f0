"""Differences between networks, against scipy, resampling by hand, and Demšar's own example."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from utils import comparison, plots
from utils.comparison import Bootstrap, PerImage, per_image
from utils.data_loader import Splits
from utils.errors import InputError
from utils.evaluate import all_metrics, expected_calibration_error

BINS = 10
HASH = "0123456789abcdef" * 4


def network(seed: int, images: int = 300, classes: int = 5, strength: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += strength
    return logits, labels


# ------------------------------------------------------------------------------------------- leaks


def test_only_the_validation_split_may_choose():
    comparison.check_selection({})
    comparison.check_selection({"selected_on": "validation", "temperature_fitted_on": "validation"})
    with pytest.raises(InputError, match="hyper-parameters were chosen on the test split"):
        comparison.check_selection({"selected_on": "test"})
    with pytest.raises(InputError, match="temperature was fitted on the test split"):
        comparison.check_selection({"temperature_fitted_on": "test"})


def test_other_test_images_are_refused_within_a_seed_and_allowed_between_seeds():
    rows = pd.DataFrame(
        {
            "checkpoint": ["a", "b", "c"],
            "dataset": "digits",
            "seed": [0, 0, 1],
            "test_images": ["x", "x", "y"],
        }
    )
    comparison.check_test_images(rows)
    rows.loc[1, "test_images"] = "y"
    with pytest.raises(InputError, match="a and b, both of digits and seed 0, have different test"):
        comparison.check_test_images(rows)


def test_images_that_the_teacher_has_seen_are_counted():
    teacher = Splits(torch.tensor([0, 1, 2, 7]), torch.tensor([3]), torch.tensor([9]))
    student = Splits(torch.tensor([3, 4]), torch.tensor([0, 2, 5]), torch.tensor([7, 8]))
    assert student.seen(teacher.train) == (2, 1)
    assert teacher.seen(teacher.train) == (0, 0)


# --------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
def test_the_mean_over_images_is_the_metric(scale):
    logits, labels = network(0)
    logits = logits * scale
    images, metrics = per_image(logits, labels), all_metrics(logits, labels, BINS)
    assert images.correct.mean() == pytest.approx(metrics["accuracy"], abs=1e-15)
    assert images.log_loss.mean() == pytest.approx(metrics["log_loss"], rel=1e-12)
    assert images.brier.mean() == pytest.approx(metrics["brier"], rel=1e-12)


def test_a_resample_has_the_metrics_of_the_repeated_images():
    """Against utils.evaluate on logits that are repeated as often as they were drawn."""
    logits, labels = network(1)
    logits[0] = 0  # confidence 0.2, on the edge of a bin
    labels[0] = 3
    generator = np.random.default_rng(0)
    weights = comparison._multiplicities(generator, 4, len(labels))
    assert (weights.sum(1) == len(labels)).all()
    assert weights.max() > 1
    values = comparison._weighted(weights, per_image(logits, labels), BINS)
    for row, drawn in zip(values, weights, strict=True):
        chosen = torch.from_numpy(np.repeat(np.arange(len(labels)), drawn.astype(int)))
        metrics = all_metrics(logits[chosen], labels[chosen], BINS)
        np.testing.assert_allclose(row, [metrics[name] for name in comparison.METRICS], rtol=1e-10)


def test_the_interval_of_accuracy_is_the_binomial_one():
    """The resampled accuracy of one network is binomial / N, exactly."""
    correct = np.repeat([1.0, 0.0], [320, 80])
    images = PerImage(correct, np.ones(400), np.ones(400), np.full(400, 0.75))
    bootstrap = Bootstrap({("w", "no"): (HASH, images)}, BINS, 20_000)
    intervals = bootstrap.interval(bootstrap.mean({0: [("w", "no")]}))
    expected = stats.binom.ppf([0.025, 0.975], 400, 0.8) / 400
    np.testing.assert_allclose(intervals["accuracy"], expected, atol=1 / 400 + 1e-12)
    assert intervals["log_loss"] == (1.0, 1.0)  # every image has the same


def test_networks_of_one_split_are_resampled_together_in_any_company():
    first, second = (per_image(*network(seed)) for seed in (2, 3))
    runs = {("a", "no"): (HASH, first), ("b", "no"): (HASH, second)}
    together = Bootstrap(runs, BINS, 50)
    alone = Bootstrap({("b", "no"): (HASH, second)}, BINS, 50)
    b = {0: [("b", "no")]}
    np.testing.assert_array_equal(together.mean(b), alone.mean(b))
    # A network that is always better by the same amount is so in every resample.
    better = PerImage(first.correct, first.log_loss - 0.25, first.brier, first.confidence)
    paired = Bootstrap({("a", "no"): (HASH, first), ("c", "no"): (HASH, better)}, BINS, 50)
    difference = paired.mean({0: [("a", "no")]}) - paired.mean({0: [("c", "no")]})
    np.testing.assert_allclose(difference[:, 1], 0.25, rtol=1e-12)
    np.testing.assert_array_equal(difference[:, [0, 2, 3]], 0)
    other = Bootstrap({("b", "no"): ("f" * 64, second)}, BINS, 50)
    assert (other.mean(b) != alone.mean(b)).any()


def test_portions_do_not_change_the_resamples(monkeypatch):
    runs = {("a", "no"): (HASH, per_image(*network(2)))}
    whole = Bootstrap(runs, BINS, 50).mean({0: [("a", "no")]})
    monkeypatch.setattr(Bootstrap, "PORTION", 1000)  # three replicates of 300 images
    parts = Bootstrap(runs, BINS, 50).mean({0: [("a", "no")]})
    np.testing.assert_allclose(whole, parts, rtol=1e-12)


def test_seeds_are_resampled_together():
    """Constant images: what varies is only which seeds are drawn."""
    one = np.ones(4)

    def runs(name: str, *losses: float) -> dict:
        return {
            (f"{name}{seed}", "no"): (HASH, PerImage(one, loss * one, one, one))
            for seed, loss in enumerate(losses)
        }

    bootstrap = Bootstrap(runs("a", 0, 3, 6) | runs("b", 1, 4, 7), BINS, 27_000)
    mean = [bootstrap.mean({s: [(f"{name}{s}", "no")] for s in range(3)})[:, 1] for name in "ab"]
    # The mean of three draws from {0, 3, 6} is 0, 1, ..., 6 with 1, 3, 6, 7, 6, 3, 1 in 27.
    values, counts = np.unique(mean[0].round(9), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(7))
    np.testing.assert_allclose(counts / 1000, [1, 3, 6, 7, 6, 3, 1], rtol=0.15)
    np.testing.assert_allclose(mean[1] - mean[0], 1, rtol=1e-12)
    two_of_a_seed = bootstrap.mean({5: [("a0", "no"), ("a2", "no")]})
    np.testing.assert_allclose(two_of_a_seed[:, 1], 3, rtol=1e-12)


# ---------------------------------------------------------------------------------- paired methods


def table(values: dict[str, dict[int, float]], **columns) -> pd.DataFrame:
    """Rows of methods whose four metrics are {seed: value}; of one data set and network."""
    return pd.DataFrame(
        [
            {
                "dataset": "digits", "model": "shallownet", "training": training,
                "method": training.partition(",")[0], "scaling": "no", "seed": seed,
                "weights": f"{training}{seed}", **dict.fromkeys(comparison.METRICS, value),
                **columns,
            }
            for training, seeds in values.items()
            for seed, value in seeds.items()
        ]
    )  # fmt: skip


def test_differences_over_seeds_are_the_paired_t_test_of_scipy():
    rows = table(
        {
            "vanilla": {0: 0.30, 1: 0.34, 2: 0.33, 9: 0.9},
            "smoothing, 0.1": {2: 0.31, 1: 0.29, 0: 0.28, 7: 0.1},
        }
    )
    found = comparison.compare(rows, "vanilla", {}).set_index("metric").loc["log_loss"]
    # By hand: the seeds in common are 0, 1, 2; differences -0.02, -0.05, -0.02.
    mean, sd = -0.03, math.sqrt((0.01**2 + 0.02**2 + 0.01**2) / 2)
    half = stats.t.ppf(0.975, 2) * sd / math.sqrt(3)
    assert found["seeds"] == 3
    assert found["difference"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half))
    expected = stats.ttest_rel([0.28, 0.29, 0.31], [0.30, 0.34, 0.33]).pvalue
    assert found["p_value"] == pytest.approx(expected)
    assert (found["test"], found["interval"]) == ("paired t over seeds", "t over seeds")
    assert found["value"] - found["reference_value"] == pytest.approx(mean)


def test_seeds_that_are_split_anew_are_tested_as_nadeau_and_bengio_do():
    rows = table({"vanilla": {0: 0.30, 1: 0.34, 2: 0.33}, "focal": {0: 0.28, 1: 0.29, 2: 0.31}})
    shared = comparison.compare(rows.assign(test_images="s"), "vanilla", {}).iloc[0]
    assert shared["test"] == "paired t over seeds"
    rows["test_images"] = rows["seed"].map({0: "a", 1: "b", 2: "c"})
    rows["test_per_training_image"] = 10_000 / 60_000
    found = comparison.compare(rows, "vanilla", {}).iloc[0]
    assert (found["test"], found["interval"]) == (
        "corrected paired t over seeds",
        "corrected t over seeds",
    )
    # Three seeds: 1/3 + 1/6 in the place of 1/3.
    half, plain = (row["high"] - row["difference"] for row in (found, shared))
    assert half == pytest.approx(plain * math.sqrt(1.5))
    t = stats.ttest_rel([0.28, 0.29, 0.31], [0.30, 0.34, 0.33]).statistic / math.sqrt(1.5)
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(abs(t), 2))


def test_what_differs_besides_the_method_is_said():
    rows = table({"vanilla": {0: 0.3, 1: 0.4}, "a": {0: 0.2, 1: 0.2}, "b": {0: 0.2, 1: 0.2}})
    compared = comparison.compare(rows, "vanilla", {})
    recipe = {"lr": 0.1, "epochs": 9, "select_by": None, "requested": None, "teacher": None}
    own = {
        "vanilla": {},
        "a": {"select_by": "ece", "requested": {"x": [1, 2]}, "teacher": "resnet18 vanilla"},
        "b": {"lr": 0.2, "epochs": 3},
    }
    rows["recipe"] = [json.dumps(recipe | own[training]) for training in rows["training"]]
    assert comparison.unequal_recipes(rows, compared) == [
        "digits, shallownet: b was trained with lr 0.2, epochs 3, vanilla with lr 0.1, epochs 9; "
        "their difference is not the method's alone"
    ]


def test_differences_that_do_not_vary_have_no_test():
    rows = table({"vanilla": {0: 0.1, 1: 0.2}, "focal": {0: 0.4, 1: 0.5}})
    found = comparison.compare(rows, "vanilla", {})
    assert found["difference"].to_numpy() == pytest.approx(0.3)
    assert found[["low", "high", "p_value"]].isna().all(axis=None)
    assert (found["test"] == "").all()


def test_one_seed_is_tested_over_its_images():
    a, b = (per_image(*network(seed, strength=s)) for seed, s in ((4, 2.0), (5, 1.2)))
    samples = {("vanilla0", "no"): (HASH, b), ("focal0", "no"): (HASH, a)}
    rows = table({"vanilla": {0: 0.0}, "focal": {0: 0.0}})
    found = comparison.compare(rows, "vanilla", samples).set_index("metric")
    t_test = stats.ttest_rel(a.log_loss, b.log_loss)
    assert found.loc["log_loss", "p_value"] == pytest.approx(t_test.pvalue)
    assert found.loc["log_loss", "low"] == pytest.approx(t_test.confidence_interval().low)
    assert found.loc["accuracy", "test"] == "exact McNemar"
    only_a = ((a.correct == 1) & (b.correct == 0)).sum()
    only_b = ((a.correct == 0) & (b.correct == 1)).sum()
    assert only_a > only_b > 0
    expected = 2 * stats.binom.cdf(only_b, only_a + only_b, 0.5)
    assert found.loc["accuracy", "p_value"] == pytest.approx(expected)
    assert math.isnan(found.loc["ece", "p_value"])
    bootstrap = Bootstrap(samples, BINS, 200)
    found = comparison.compare(rows, "vanilla", samples, bootstrap).set_index("metric")
    assert (found["interval"] == "bootstrap over images").all()
    assert found.loc["ece", "low"] < found.loc["ece", "high"]
    assert found.loc["log_loss", "p_value"] == pytest.approx(t_test.pvalue)
    # The bootstrap and t agree about a mean of 300 images.
    low, high = t_test.confidence_interval()
    assert found.loc["log_loss", "low"] == pytest.approx(low, abs=0.3 * (high - low))
    assert found.loc["log_loss", "high"] == pytest.approx(high, abs=0.3 * (high - low))


def test_several_networks_of_one_seed_are_tested_as_their_mean():
    a, b, c = (per_image(*network(seed, strength=s)) for seed, s in ((4, 2.0), (5, 1.2), (6, 0.4)))
    names = "vanilla", "focal a", "focal b"
    samples = {(name, "no"): (HASH, one) for name, one in zip(names, (a, b, c), strict=True)}
    rows = table({"vanilla": {0: a.correct.mean()}, "focal": {0: b.correct.mean()}})
    rows["weights"] = ["vanilla", "focal a"]
    other = rows[1:].assign(weights="focal b", accuracy=c.correct.mean())
    for order in ([rows, other], [other, rows]):
        found = comparison.compare(pd.concat(order), "vanilla", samples).set_index("metric")
        for metric, name in (("accuracy", "correct"), ("log_loss", "log_loss")):
            ours = (getattr(b, name) + getattr(c, name)) / 2
            t_test = stats.ttest_rel(ours, getattr(a, name))
            assert found.loc[metric, "test"] == "paired t over images"
            assert found.loc[metric, "p_value"] == pytest.approx(t_test.pvalue)
        found = found.loc["accuracy"]
        assert found["low"] < found["difference"] < found["high"]


def test_mcnemar_by_hand():
    ours = np.array([1, 1, 1, 1, 0, 1, 0])
    theirs = np.array([0, 0, 0, 0, 1, 1, 0])
    # 4 against 1: 2 (C(5,0) + C(5,1)) / 2^5
    assert comparison.mcnemar(ours, theirs) == pytest.approx(2 * 6 / 32)
    assert comparison.mcnemar(ours, ours) == 1


def test_the_reference_is_a_method_or_a_training():
    two = {0: 0.2, 1: 0.4}
    rows = table({"vanilla": {0: 0.1, 1: 0.2}, "focal, 1": two, "focal, 2": two})
    assert set(comparison.compare(rows, "focal, 1", {})["reference"]) == {"focal, 1"}
    with pytest.raises(InputError, match=r"--compare 'nobody' given.*one of focal, vanilla,"):
        comparison.compare(rows, "nobody", {})
    with pytest.raises(InputError, match="several settings; one of 'focal, 1'; 'focal, 2'"):
        comparison.compare(rows, "focal", {})
    with pytest.raises(InputError, match="nothing shares a seed"):
        comparison.compare(table({"vanilla": {0: 1}, "focal": {1: 1}}), "vanilla", {})
    elsewhere = table({"focal": {0: 0.1, 1: 0.2}}).assign(model="resnet18")
    both = pd.concat([rows[rows["training"] != "focal, 2"], elsewhere])
    assert set(comparison.compare(both, "vanilla", {})["model"]) == {"shallownet"}


# ------------------------------------------------------------------------------------------- ranks

# Demšar 2006, table 6: areas under the curve of C4.5 and three variants on 14 data sets. On the
# 13th, two that are printed as 0.975 have ranks 2 and 3 there: here the first is a little larger.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
    ]
)  # fmt: skip


def test_average_ranks_are_those_of_demsar():
    ranks = comparison.average_ranks(DEMSAR, larger_is_better=True)
    np.testing.assert_allclose(ranks, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    np.testing.assert_allclose(comparison.average_ranks(DEMSAR, False), 5 - ranks)


def test_critical_differences_are_those_of_demsar():
    # Demšar 2006, table 5a, two-tailed Nemenyi test at 0.05
    for methods, q in zip(range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102,
                                         3.164), strict=True):  # fmt: skip
        found = comparison.critical_difference(methods, 1) / math.sqrt(methods * (methods + 1) / 6)
        assert found == pytest.approx(q, abs=1e-3)
    assert comparison.critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


@pytest.mark.parametrize(
    ("ranks", "difference", "expected"),
    [
        ([3.143, 2.000, 2.893, 1.964], 1.25, [[3, 1, 2, 0]]),
        ([3.143, 2.000, 2.893, 1.964], 1.16, [[3, 1, 2], [1, 2, 0]]),
        ([3.143, 2.000, 2.893, 1.964], 0.5, [[3, 1], [2, 0]]),
        ([1.0, 2.0, 3.0], 1.0, []),  # as far apart as the difference is significant
        ([1.0, 1.0, 3.0], 0.5, [[0, 1]]),
    ],
)
def test_cliques_are_the_largest_groups_that_do_not_differ(ranks, difference, expected):
    assert comparison.cliques(ranks, difference) == expected


def test_ranks_over_blocks_with_the_friedman_test():
    rows = pd.concat(
        table({f"m{i}": {0: value, 1: value} for i, value in enumerate(values)}, dataset=f"d{d}")
        for d, values in enumerate(DEMSAR)
    )
    found = comparison.rank(rows)
    accuracy = found[found["metric"] == "accuracy"]
    assert list(accuracy["training"]) == ["m3", "m1", "m2", "m0"]
    assert set(accuracy["blocks"]) == {14}
    chi2, p = stats.friedmanchisquare(*DEMSAR.T)
    # Demšar has 9.28, without the correction for ties.
    assert accuracy["friedman_chi2"].to_numpy() == pytest.approx(chi2)
    assert 9.28 < chi2 < 10.5
    assert accuracy["friedman_p"].to_numpy() == pytest.approx(p)
    assert list(found[found["metric"] == "log_loss"]["training"]) == ["m0", "m2", "m1", "m3"]
    # Only what every block has is ranked; one block or one method is not.
    lacking = rows[(rows["dataset"] != "d0") | (rows["training"] != "m2")]
    assert set(comparison.rank(lacking)["training"]) == {"m0", "m1", "m3"}
    two = comparison.rank(rows[rows["training"].isin(["m0", "m1"])])
    assert two["friedman_p"].isna().all()
    assert comparison.rank(rows[rows["dataset"] == "d0"]).empty
    assert comparison.rank(rows[rows["training"] == "m0"]).empty


def test_ranks_are_of_the_seeds_that_all_methods_have():
    """Over all its seeds m0 would be the better one; on the seed of both it is the worse."""
    rows = pd.concat(
        table({"m0": {0: 0.5, 1: 0.9, 2: 0.9}, "m1": {0: 0.6}}, dataset=dataset)
        for dataset in ("d0", "d1")
    )
    found = comparison.rank(rows)
    found = found[found["metric"] == "accuracy"].set_index("training")
    assert dict(found["average_rank"]) == {"m1": 1, "m0": 2}


def test_the_diagram_names_all_methods_within_its_borders():
    names = ["vanilla", "a_$b^c$, x 0.1", "instance-based-ils2, smoothing 0.1, temperature 1", "d"]
    figure = plots.critical_difference_diagram(names, [3.1, 2.0, 2.9, 1.96], 1.25, "Title")
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    shown = " ".join(" ".join(text.get_text().split()) for text in texts)
    for name in ("vanilla (3.10)", "a_$b^c$, x 0.1 (2.00)", "temperature 1 (2.90)", "d (1.96)"):
        assert name in shown
    assert "CD = 1.25" in shown
    canvas = figure.bbox
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1
        assert canvas.y0 <= box.y0 < box.y1 <= canvas.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    thick = [line for line in figure.axes[0].lines if line.get_linewidth() == 3]
    assert len(thick) == 1
    assert min(thick[0].get_xdata()) < 1.96 < 3.1 < max(thick[0].get_xdata())


# -------------------------------------------------------------------------------- class similarity


def test_a_teacher_collapsed_to_its_class_means_keeps_no_similarity():
    labels = torch.tensor([0, 0, 1, 1, 2])
    pattern = torch.tensor([[4.0, 1.0, -2.0], [0.5, 3.0, 0.0], [0.0, -1.0, 2.0]])
    logits = pattern[labels]
    assert comparison.class_similarity(logits, labels) == 0
    # Nor does it with another confidence, or another offset, for each image.
    logits[torch.arange(5), labels] += torch.tensor([0.0, 5.0, 1.0, -1.0, 3.0])
    logits += torch.arange(5.0)[:, None]
    assert comparison.class_similarity(logits, labels) == pytest.approx(0, abs=1e-30)


def test_class_similarity_by_hand():
    labels = torch.tensor([0, 0])
    logits = torch.tensor([[3.0, 1.0, -1.0], [3.0, -1.0, 1.0]])
    # w = (1, -1) and (-1, 1), their mean is 0: kept 4. c = (2, 0, -2) and (2, -2, 0): 16 in all.
    assert comparison.class_similarity(logits, labels) == pytest.approx(4 / 16)
    for temperature in (0.1, 7.0):
        found = comparison.class_similarity(logits / temperature + 5, labels)
        assert found == pytest.approx(4 / 16, rel=1e-5)
    assert comparison.class_similarity(torch.zeros(2, 3), labels) == 0
    assert comparison.class_similarity(torch.randn(9, 2), torch.arange(9) % 2) == 0


def test_class_similarity_grows_with_what_the_wrong_classes_tell():
    logits, labels = network(6, strength=0.0)
    noise = logits.clone()
    sure = torch.nn.functional.one_hot(labels, 5) * 6.0
    found = [comparison.class_similarity(sure + s * noise, labels) for s in (0, 0.1, 0.5, 2.0)]
    assert found == sorted(found)
    assert found[0] == 0
    assert 0 < found[1] < found[3] < 1


def test_ece_by_bins_is_that_of_evaluate_for_every_number_of_bins():
    logits, labels = network(7)
    weights = np.ones((1, len(labels)))
    for bins in (1, 2, 10, 15, 50):
        found = comparison._weighted(weights, per_image(logits, labels), bins)[0, 3]
        assert found == pytest.approx(expected_calibration_error(logits, labels, bins), rel=1e-12)
