"""Which networks may be compared, and how sure is a difference between them?

Leaks are looked for first (`check_selection`, `teacher_warning`). Then images and seeds are
resampled (`Bootstrap`), methods are paired seed by seed (`compare`), and ranked over several data
sets and networks (`rank`). `class_similarity` says what a teacher has to tell a student beyond the
label.

Papers: Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006. Owen,
The pigeonhole bootstrap, Annals of Applied Statistics 2007. McNemar, Note on the sampling error of
the difference between correlated proportions, Psychometrika 1947. Müller et al., When Does Label
Smoothing Help?, NeurIPS 2019.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from utils.errors import InputError
from utils.evaluate import bin_edges, bin_index, top_label
from utils.inference import Evaluated

METRICS = ("accuracy", "log_loss", "brier", "ece")  # what is resampled and compared
BLOCK = ["dataset", "model"]  # only networks of one data set and architecture are compared

# ------------------------------------------------------------------------------------------- leaks


def check_selection(training: dict) -> None:
    """Raises InputError if anything was chosen by another split than the validation split.

    training: Checkpoint.training, whose `selected_on` (epoch and hyper-parameters) and
    `temperature_fitted_on` name a split; a checkpoint without them is of a script that knows no
    other than the validation split.
    """
    for field, what in (
        ("selected_on", "epoch or hyper-parameters were chosen"),
        ("temperature_fitted_on", "temperature was fitted"),
    ):
        split = training.get(field, "validation")
        if split != "validation":
            raise InputError(
                f"its {what} on the {split} split, which makes its numbers too good; the "
                "validation split is expected"
            )


def check_test_images(rows: pd.DataFrame) -> None:
    """Raises InputError unless all networks of a data set and seed have the same test images.

    Of one seed, because a protocol may draw other test images for each. rows: with the columns
    checkpoint, dataset, seed and test_images (the hash of their indices).
    """
    for (dataset, seed), group in rows.groupby(["dataset", "seed"]):
        if group["test_images"].nunique() > 1:
            first, second = group.drop_duplicates("test_images")["checkpoint"].head(2)
            raise InputError(
                f"{first} and {second}, both of {dataset} and seed {seed}, have different test "
                "images; numbers of different images are not compared, evaluate them apart"
            )


def teacher_warning(student: Evaluated) -> str | None:
    """What is to be said of the images on which the network's teacher was trained, if anything.

    student: a network with a teacher: a distilled one, or one trained with instance-based
    smoothing. Raises InputError if the teacher was trained on test images of the student.
    """
    teacher, splits = student.teacher, student.splits
    if teacher is None:
        return None
    validation, test = student.seen_by_teacher
    name = f"teacher, {teacher['method']} of seed {teacher['seed']},"
    if test:
        raise InputError(
            f"{student.path} has a {name} that was trained on {test} of its {len(splits.test)} "
            "test images; a teacher of the same seed, --tr_size and --protocol would do"
        )
    if not validation:
        return None
    return (
        f"its {name} was trained on {validation} of its {len(splits.validation)} validation "
        "images, so its temperature and what was chosen by them are too good to be true"
    )


# --------------------------------------------------------------------------------------- bootstrap


class PerImage(NamedTuple):
    """What each image adds to the metrics. float64, (N,), in the order of the test split.

    Formulas: utils/evaluate.py, whose accuracy, log loss and Brier score are the means of these.
    """

    correct: np.ndarray  # 1 or 0
    log_loss: np.ndarray  # [0, inf)
    brier: np.ndarray  # [0, 2]
    confidence: np.ndarray  # (0, 1]


def per_image(logits: Tensor, labels: Tensor) -> PerImage:
    """logits (N, K), of any float type; labels (N,) in [0, K)."""
    z = logits.double()
    confidence, correct = top_label(z, labels)
    distance = z.softmax(1)
    distance[torch.arange(len(labels)), labels] -= 1
    return PerImage(
        correct.double().numpy(),
        F.cross_entropy(z, labels, reduction="none").numpy(),
        distance.square_().sum(1).numpy(),
        confidence.numpy(),
    )


Run = tuple[str, str]  # the hash of a network's weights; its scaling, "no" or "yes"


class Bootstrap:
    """METRICS of many networks on resampled test images, and their means over resampled seeds.

    Images and seeds are drawn with replacement, independently of each other (two crossed factors:
    Owen 2007). All networks with the same test split see the same resampled images, and all
    methods with the same seeds the same resampled seeds, so that differences stay paired. The
    draws depend on nothing but the split, the seeds and the number of replicates: a network's
    interval is the same whatever it is evaluated beside.

    An image's share in accuracy, log loss, Brier score and in the gap of its bin never changes, so
    each replicate is one matrix product of the images' multiplicities and their shares.
    """

    PORTION = 2**21  # multiplicities held at one time, 16 MiB

    def __init__(
        self, samples: Mapping[Run, tuple[str, PerImage]], bins: int, replicates: int
    ) -> None:
        """samples: for each network the hash of its test split, and its images."""
        self.replicates = replicates
        self._values = {run: np.empty((replicates, len(METRICS))) for run in samples}
        for test_split in dict.fromkeys(split for split, _ in samples.values()):
            runs = [run for run, (split, _) in samples.items() if split == test_split]
            count = len(samples[runs[0]][1].correct)
            generator = np.random.default_rng([0, int(test_split[:16], 16)])
            portion = max(1, self.PORTION // count)
            for start in range(0, replicates, portion):
                here = slice(start, min(start + portion, replicates))
                weights = _multiplicities(generator, here.stop - here.start, count)
                for run in runs:
                    self._values[run][here] = _weighted(weights, samples[run][1], bins)

    def mean(self, runs: Mapping[int, Sequence[Run]]) -> np.ndarray:
        """Means over resampled seeds, (replicates, len(METRICS)). runs: the networks of a seed."""
        seeds = sorted(runs)
        values = np.stack([np.mean([self._values[run] for run in runs[s]], axis=0) for s in seeds])
        generator = np.random.default_rng([1, *seeds])
        drawn = generator.integers(len(seeds), size=(self.replicates, len(seeds)))
        return values[drawn, np.arange(self.replicates)[:, None]].mean(1)

    @staticmethod
    def interval(values: np.ndarray) -> dict[str, tuple[float, float]]:
        """For each of METRICS the 2.5 % and 97.5 % percentiles of what `mean` gave, or of a
        difference of two of them."""
        low, high = np.percentile(values, [2.5, 97.5], axis=0).tolist()
        return dict(zip(METRICS, zip(low, high, strict=True), strict=True))


def _multiplicities(generator: np.random.Generator, replicates: int, count: int) -> np.ndarray:
    """(replicates, count): how often each image is drawn. Each row adds up to count."""
    drawn = generator.integers(count, size=(replicates, count))
    drawn += count * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * count).reshape(replicates, count) * 1.0


def _weighted(weights: np.ndarray, images: PerImage, bins: int) -> np.ndarray:
    """METRICS, (replicates, 4), of images that count as often as weights (replicates, N) say."""
    count = len(images.correct)
    index = bin_index(torch.from_numpy(images.confidence), bin_edges(bins)).numpy()
    gaps = np.zeros((count, bins))
    gaps[np.arange(count), index] = images.correct - images.confidence
    means = weights @ np.column_stack([images.correct, images.log_loss, images.brier, gaps]) / count
    return np.column_stack([means[:, :3], np.abs(means[:, 3:]).sum(1)])


# ---------------------------------------------------------------------------------- paired methods


def find_reference(rows: pd.DataFrame, name: str) -> dict[tuple, str]:
    """Which `training` of each data set and network the name stands for.

    name: a method ("vanilla"), or a training as the tables show it ("label-smoothing, smoothing
    0.1"). Raises InputError if there is none, or a method with several settings.
    """
    found = rows[(rows["method"] == name) | (rows["training"] == name)]
    if found.empty:
        there = ", ".join(sorted(set(rows["method"])))
        raise InputError(
            f"--compare {name!r} given, but no network was trained so; one of {there}, or a "
            "training as the tables show it, expected"
        )
    for block, group in found.groupby(BLOCK):
        if group["training"].nunique() > 1:
            there = "; ".join(repr(setting) for setting in group["training"].unique())
            raise InputError(
                f"--compare {name!r} given, which {', '.join(block)} has with several settings; "
                f"one of {there} expected"
            )
    return found.groupby(BLOCK)["training"].first().to_dict()


def compare(
    rows: pd.DataFrame,
    name: str,
    samples: Mapping[Run, tuple[str, PerImage]],
    bootstrap: Bootstrap | None = None,
) -> pd.DataFrame:
    """Paired differences of every method to the reference, a row for each of METRICS.

    rows: a network and scaling each, with the columns dataset, model, training, method, scaling,
    seed, weights and METRICS. name: see find_reference, whose InputError it raises. samples: of
    each run the hash of its test split and its images; where they are not at hand, empty.

    Runs of one seed are paired; a seed that one of the two lacks is left out. Columns: BLOCK,
    scaling, training, reference, metric, seeds (how many pairs), value and reference_value (means
    over them), difference (value - reference_value), low, high (95 %), interval (how they were
    made), p_value, test.

    Two seeds or more: a paired t-test over seeds and its interval, which assume normal differences
    and see the images as given; with few seeds it can hardly reject (two seeds: 1 degree of
    freedom). Where each seed has test images of its own (the column test_images), and so training
    images that others are tested on, its variance is that of Nadeau and Bengio, for which rows have
    test_per_training_image. With a bootstrap the interval is its percentiles, of images and seeds.

    One seed: the exact McNemar test for accuracy (binomial, on the images that only one of the two
    gets right; of several networks on a side the paired t-test), a paired t-test over images for
    log loss and Brier score. They speak of these networks, not of their methods. ECE is no mean
    over images: it has neither, unless by bootstrap.

    What does not vary (all differences equal), or is one seed without images, has no test: NaN.
    """
    references = find_reference(rows, name)
    compared = []
    for key, group in rows.groupby([*BLOCK, "scaling"], sort=False):
        about = dict(zip([*BLOCK, "scaling"], key, strict=True))
        reference = references.get(key[:-1])
        theirs = _of_seeds(group[group["training"] == reference])
        for training, method in group.groupby("training", sort=False):
            ours = _of_seeds(method)
            seeds = sorted(ours.keys() & theirs.keys())
            if training == reference or not seeds:
                continue
            pair = [pd.concat([side[s] for s in seeds]) for side in (ours, theirs)]
            runs = [
                {s: [*zip(side[s]["weights"], side[s]["scaling"], strict=True)] for s in seeds}
                for side in (ours, theirs)
            ]
            resampled = {}
            if bootstrap:
                resampled = bootstrap.interval(bootstrap.mean(runs[0]) - bootstrap.mean(runs[1]))
            overlap = _overlap(pair)
            for metric in METRICS:
                a, b = (side.groupby("seed")[metric].mean().to_numpy() for side in pair)
                if len(seeds) > 1:
                    result = _paired_t(a, b, "seeds", overlap)
                elif not samples:
                    result = NO_TEST
                else:
                    images = [[samples[run][1] for run in side[seeds[0]]] for side in runs]
                    result = _over_images(metric, *images)
                if bootstrap:
                    low, high = resampled[metric]
                    over = "images and seeds" if len(seeds) > 1 else "images"
                    result = dict(result, low=low, high=high, interval=f"bootstrap over {over}")
                compared.append(
                    {
                        **about,
                        "training": training,
                        "reference": reference,
                        "metric": metric,
                        "seeds": len(seeds),
                        "value": a.mean(),
                        "reference_value": b.mean(),
                        "difference": a.mean() - b.mean(),
                        **result,
                    }
                )
    if not compared:
        raise InputError(f"--compare {name!r} given, but nothing shares a seed with it")
    return pd.DataFrame(compared)


def differing(recipes: Sequence[dict]) -> list[str]:
    """The settings in which recipes are not all alike, in the order in which they first appear."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({str(recipe.get(key)) for recipe in recipes}) > 1]


# In what the recipes of methods differ by their nature. The tables name them.
OF_THE_METHOD = ("requested", "select_by", "teacher")


def unequal_recipes(rows: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """What else than the method differs between those that were compared, a sentence a pair.

    rows, with the column recipe (JSON), and compared: what `compare` takes and gives.
    """
    recipes = rows.drop_duplicates([*BLOCK, "training"]).set_index([*BLOCK, "training"])["recipe"]
    said = []
    pairs = compared.drop_duplicates([*BLOCK, "training"])[[*BLOCK, "training", "reference"]]
    for *block, ours, theirs in pairs.itertuples(index=False):
        pair = [json.loads(recipes[*block, training]) for training in (ours, theirs)]
        keys = [key for key in differing(pair) if key not in OF_THE_METHOD]
        if keys:
            here, there = (", ".join(f"{key} {r.get(key)}" for key in keys) for r in pair)
            said.append(
                f"{', '.join(block)}: {ours} was trained with {here}, {theirs} with {there}; their "
                "difference is not the method's alone"
            )
    return said


def _of_seeds(rows: pd.DataFrame) -> dict[int, pd.DataFrame]:
    return dict(iter(rows.groupby("seed")))


NO_TEST = {"low": math.nan, "high": math.nan, "interval": "", "p_value": math.nan, "test": ""}


def _overlap(pair: Sequence[pd.DataFrame]) -> float:
    """Test images for each training image if seeds are split anew, 0 if they share their test."""
    rows = pd.concat(pair)
    if rows.get("test_images", pd.Series()).nunique() < 2:
        return 0.0
    return float(rows["test_per_training_image"].max())


def _paired_t(a: np.ndarray, b: np.ndarray, over: str, overlap: float = 0.0) -> dict:
    """Low, high and p of the paired t-test; NaN where the differences do not vary.

    overlap: of `_overlap`. The variance of the mean of n differences is their variance times
    1/n + overlap (Nadeau and Bengio, Inference for the Generalization Error, 2003, section 3).
    """
    differences, n = a - b, len(a)
    # Equal differences of decimal fractions may differ in their last bits.
    if np.ptp(differences) <= 1e-12:
        return NO_TEST
    mean, error = differences.mean(), differences.std(ddof=1) * math.sqrt(1 / n + overlap)
    half = stats.t.ppf(0.975, n - 1) * error
    corrected = "corrected " * (overlap > 0)
    return {
        "low": float(mean - half),
        "high": float(mean + half),
        "interval": f"{corrected}t over {over}",
        "p_value": float(2 * stats.t.sf(abs(mean) / error, n - 1)),
        "test": f"{corrected}paired t over {over}",
    }


def _over_images(metric: str, *sides: Sequence[PerImage]) -> dict:
    """sides: the networks of one seed, ours and theirs; several of them count as their mean."""
    if metric == "ece":
        return NO_TEST
    name = "correct" if metric == "accuracy" else metric
    ours, theirs = (np.mean([getattr(images, name) for images in side], axis=0) for side in sides)
    result = _paired_t(ours, theirs, "images")
    if metric == "accuracy" and all(len(side) == 1 for side in sides):
        result = result | {"p_value": mcnemar(ours, theirs), "test": "exact McNemar"}
    return result


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p of the exact McNemar test (McNemar 1947, with the binomial distribution).

    ours, theirs: (N,), whether each image is classified right. If both err on the same images 1.
    """
    only_ours = int(((ours == 1) & (theirs == 0)).sum())
    only_theirs = int(((ours == 0) & (theirs == 1)).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)


# ------------------------------------------------------------------------------------------- ranks


def average_ranks(scores: np.ndarray, larger_is_better: bool) -> np.ndarray:
    """Average rank of each method, (methods,), 1 is best; ties share their mean rank.

    scores: (blocks, methods), a block being a data set and network. Demšar 2006, section 3.2.2.
    """
    signed = -scores if larger_is_better else scores
    return stats.rankdata(signed, axis=1).mean(0)


def critical_difference(methods: int, blocks: int) -> float:
    """Nemenyi's critical difference of average ranks at 5 %, q sqrt(k (k + 1) / (6 N)).

    k methods, N blocks; q is the upper 5 % quantile of the studentized range of k means with
    infinite degrees of freedom, divided by sqrt(2). Demšar 2006, section 3.2.2 and table 5.
    """
    q = stats.studentized_range.ppf(0.95, methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(methods * (methods + 1) / (6 * blocks)))


def cliques(ranks: Sequence[float], difference: float) -> list[list[int]]:
    """Largest groups of two methods or more whose average ranks differ by less than `difference`.

    As positions in `ranks`, best first: what the bars of a critical-difference diagram join.
    """
    order = [int(i) for i in np.argsort(ranks, kind="stable")]
    found: list[list[int]] = []
    for start in range(len(order)):
        group = [i for i in order[start:] if ranks[i] - ranks[order[start]] < difference]
        # Groups are runs of `order`: one that ends no later than the one before lies within it.
        if len(group) > 1 and not (found and group[-1] in found[-1]):
            found.append(group)
    return found


def rank(rows: pd.DataFrame) -> pd.DataFrame:
    """Average ranks over all data sets and networks (blocks), a row for each metric and method.

    rows: as for `compare`. Only methods that every block has are ranked, by their means over the
    seeds that all of them have; several networks of a seed count as their mean. Empty if that
    leaves fewer than two methods or two blocks. Columns:
    scaling, metric, training, average_rank, blocks, friedman_chi2 and friedman_p (Friedman test,
    corrected for ties; needs three methods), critical_difference (Nemenyi, 5 %). Demšar 2006.

    The tests take blocks for independent, which two networks on one data set are not quite, and
    chi-squared is an approximation for many blocks (Demšar: more than 10, and 5 methods).
    """
    ranked = []
    for scaling, group in rows.groupby("scaling", sort=False):
        for metric in METRICS:
            seeds = group.pivot_table(index=[*BLOCK, "seed"], columns="training", values=metric)
            everywhere = seeds.groupby(BLOCK).count().all()
            scores = seeds.loc[:, everywhere].dropna().groupby(BLOCK).mean()
            blocks, methods = scores.shape
            if blocks < 2 or methods < 2:
                continue
            values = scores.to_numpy()
            chi2 = p = math.nan
            if methods > 2 and np.ptp(values, axis=1).any():
                chi2, p = stats.friedmanchisquare(*values.T)
            ranks = average_ranks(values, larger_is_better=metric == "accuracy")
            difference = critical_difference(methods, blocks)
            ranked += [
                {
                    "scaling": scaling,
                    "metric": metric,
                    "training": training,
                    "average_rank": average,
                    "blocks": blocks,
                    "friedman_chi2": chi2,
                    "friedman_p": p,
                    "critical_difference": difference,
                }
                for training, average in sorted(
                    zip(scores.columns, ranks, strict=True), key=lambda pair: pair[1]
                )
            ]
    return pd.DataFrame(ranked)


# -------------------------------------------------------------------------------- class similarity


def class_similarity(logits: Tensor, labels: Tensor) -> float:
    """How much a network's logits tell which *other* classes an image resembles; in [0, 1].

    For image i of class y let w_ij = z_ij - mean_{j' != y} z_ij' for the wrong classes j != y,
    W_y the mean of w_i over the images of class y, and c_i = z_i - mean_k z_ik. Then

        sum_i |w_i - W_y|^2 / sum_i |c_i|^2,

    the share of the logits' variation that sets an image apart from others of its class by its
    wrong classes. The rest is the class itself: its mean pattern, and how sure the network is.

    A network that gives all images of a class the same wrong-class logits has 0, whatever that
    pattern and its confidence: a student learns nothing from it that a table of K rows could not
    tell. Müller et al. 2019, section 4, show that label smoothing drives networks there, by the
    mutual information of image and logits; this share of variance is a simpler number of the same
    idea. It does not change with temperature, or with an offset of an image's logits. Variation
    by mere noise counts too. With K = 2 there is one wrong class, and the share is 0; so it is,
    by definition, if all logits of each image are equal.
    """
    kept = total = 0.0
    for label in labels.unique().tolist():
        z = logits[labels == label].double()
        wrong = torch.cat([z[:, :label], z[:, label + 1 :]], 1)
        wrong = wrong - wrong.mean(1, keepdim=True)
        kept += float((wrong - wrong.mean(0)).square().sum())
        total += float((z - z.mean(1, keepdim=True)).square().sum())
    return kept / total if total else 0.0
