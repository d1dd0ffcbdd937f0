"""How good and how sure is a network? Every metric here is a pure function of (logits, labels),
or of (logits, posterior) where the true probabilities are known.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 1.5]])
    >>> labels = torch.tensor([0, 1, 1])
    >>> expected_calibration_error(logits, labels, bins=10)   # a Python float
    >>> all_metrics(logits / fit_temperature(val_logits, val_labels), labels)

Shared by all functions, and therefore said once:

Arguments. `logits`: a torch tensor (any float type, any device) or numpy array of floats, shape
(N, K), N >= 1 images, K >= 2 classes, all finite. `labels`: integers in [0, K), shape (N,).
`bins`: an integer >= 1. Anything else is a ValueError of one line; the arguments are not changed.

Arithmetic. float64 on the CPU, whatever came in, so that a metric is the same number on every
machine (GPUs add up in a random order, and Apple's have no float64). A few rows are converted at
a time, so that a million images need not be held in float64.

Notation. p = softmax(z) for logits z, y the label, c = max_k p_k the confidence, and a = 1 if the
prediction argmax_k z_k is y, else 0. Of tied largest logits the lowest class is predicted.

Bins. Equal-width bin m of M is (m/M, (m+1)/M], m = 0..M-1, and bin 0 holds a confidence of 0 too.
So a confidence exactly on an edge lies in the bin below it, and 1.0 in the last. Over the rows of
bin B, acc(B) and conf(B) are the means of a and c. An empty bin contributes nothing.

Ties. Rows of equal confidence have no order, so where a metric sorts by confidence each of them
counts with the mean a of its tied group. This is the expectation over a random order of the ties,
and it is why no metric depends on the order of the rows (beyond the last bits of a float64 sum).

Papers: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Naeini et al., Obtaining
Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015. Kull et al., Beyond temperature
scaling, NeurIPS 2019. Nixon et al., Measuring Calibration in Deep Learning, CVPR workshops 2019.
Gupta et al., Calibration of Neural Networks using Splines, ICLR 2021. Geifman and El-Yaniv,
Selective Classification for Deep Neural Networks, NeurIPS 2017.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

Array = Tensor | np.ndarray

# Logits held in float64 at one time, 2 MiB: small next to a split, and large enough for the cost
# of starting and joining threads to be small next to the work.
CHUNK = 2**18

# fit_temperature looks here. Over this range softmax(z/T) goes from one-hot to uniform for every
# spread of logits between 1e-4 and 1e4.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6


# ------------------------------------------------------------------------------ how good


def accuracy(logits: Array, labels: Array) -> float:
    """Share of images whose largest logit is the label's, mean(a); in [0, 1], larger is better."""
    hits = sum(int(correct.sum()) for _, _, _, correct in _chunks(logits, labels))
    return hits / len(logits)


def top_k_accuracy(logits: Array, labels: Array, k: int = 5) -> float:
    """Share of images whose label is among the k largest logits; in [0, 1], larger is better.

    Of tied logits those of lower classes come first, so that k = 1 is `accuracy`. ValueError
    unless k is an integer in [1, K].
    """
    _check_integer("k", k, least=1)
    hits = 0
    for _, z, y, _ in _chunks(logits, labels):
        if k > z.shape[1]:
            raise ValueError(f"k must be at most the number of classes, {z.shape[1]}, got {k}")
        hits += int(_in_top_k(z, y, k).sum())
    return hits / len(logits)


def log_loss(logits: Array, labels: Array) -> float:
    """Negative log-likelihood, mean(-log p_y), natural log; in [0, inf), smaller is better.

    Taken from the logits and never from p, so that it stays finite where p_y underflows to 0.
    """
    total = sum(
        float(_log_losses(z, y, z.exp().sum(1)).sum()) for _, z, y, _ in _chunks(logits, labels)
    )
    return total / len(logits)


def brier_score(logits: Array, labels: Array) -> float:
    """Multi-class Brier score, mean over images of sum_k (p_k - 1[k = y])^2; in [0, 2].

    Brier, Verification of forecasts expressed in terms of probability, 1950. Smaller is better.
    For K = 2 it is twice the binary score that looks at one class only.
    """
    total = sum(_brier(_softmax(z)[0], y) for _, z, y, _ in _chunks(logits, labels))
    return total / len(logits)


# ------------------------------------------------------------------------------ how sure


class CalibrationBins(NamedTuple):
    """What a reliability diagram shows. float64 tensors on the CPU, for M equal-width bins."""

    edges: Tensor  # (M + 1,): 0, 1/M, ..., 1
    count: Tensor  # (M,): rows in the bin
    confidence: Tensor  # (M,): conf(B), their mean confidence; NaN for an empty bin
    accuracy: Tensor  # (M,): acc(B), the share of them that are right; NaN for an empty bin


def calibration_bins(logits: Array, labels: Array, bins: int = 10) -> CalibrationBins:
    """Top-label confidence and accuracy in `bins` equal-width bins (rule: top of this file)."""
    edges = bin_edges(bins)
    return _calibration_bins(*top_label(logits, labels), edges)


def expected_calibration_error(logits: Array, labels: Array, bins: int = 10) -> float:
    """ECE, sum_B |B|/N |acc(B) - conf(B)|, top label, equal-width bins; in [0, 1], 0 is best.

    Naeini et al. 2015; Guo et al. 2017, eq. (3). A finite sample makes it positive even for a
    perfectly calibrated network: `calibrated_ece_by_chance` says by how much.
    """
    return _ece(calibration_bins(logits, labels, bins))


def expected_calibration_errors(logits: Array, labels: Array, bins: Sequence[int]) -> list[float]:
    """expected_calibration_error for each of several numbers of bins, from one softmax."""
    top = top_label(logits, labels)
    return [_ece(_calibration_bins(*top, bin_edges(number))) for number in bins]


def maximum_calibration_error(logits: Array, labels: Array, bins: int = 10) -> float:
    """MCE, max over non-empty bins of |acc(B) - conf(B)|, top label; in [0, 1], 0 is best.

    Guo et al. 2017, eq. (5). One row alone in its bin can decide it.
    """
    return _mce(calibration_bins(logits, labels, bins))


def root_mean_square_calibration_error(logits: Array, labels: Array, bins: int = 10) -> float:
    """RMSCE, sqrt(sum_B |B|/N (acc(B) - conf(B))^2), top label, equal-width bins; in [0, 1].

    Kumar et al., Verified Uncertainty Calibration, NeurIPS 2019 (the plug-in estimate, not
    debiased). 0 is best, and ECE <= RMSCE <= MCE.
    """
    return _rmsce(calibration_bins(logits, labels, bins))


def classwise_calibration_error(logits: Array, labels: Array, bins: int = 10) -> float:
    """Class-wise ECE, 1/K sum_k sum_B |B|/N |share of y = k in B - mean p_k in B|; in [0, 1].

    Kull et al. 2019, eq. (3). Each class against the rest: its N probabilities p_k are binned
    with the equal-width rule, then averaged over all K classes, also those no label names. 0 is
    best. Most p_k of many classes are near 0, so values are small: compare at equal K only.
    """
    edges = bin_edges(bins)
    excess = sum(
        _classwise_excess(_softmax(z)[0], y, edges) for _, z, y, _ in _chunks(logits, labels)
    )
    return _classwise(excess, len(logits))


def adaptive_calibration_error(logits: Array, labels: Array, bins: int = 10) -> float:
    """ECE with equal-mass bins, sum_B |B|/N |acc(B) - conf(B)|, top label; in [0, 1], 0 is best.

    Row i of the N rows sorted by confidence (i from 0) lies in bin floor(i M / N), so that the
    sizes of the M bins differ by one at most; with N < M every row has its own. Tied rows may
    fall on both sides of a cut, each with the mean a of the tied group. The adaptive bins are
    those of Nixon et al. 2019; their ACE takes all classes, and this the top label like ECE.
    """
    _check_integer("bins", bins, least=1)
    return _adaptive(*_by_confidence(*top_label(logits, labels)), bins)


def kolmogorov_smirnov_calibration_error(logits: Array, labels: Array) -> float:
    """KS error, max_n |1/N sum_{i <= n} (a_i - c_i)|, rows sorted by confidence; in [0, 1].

    Gupta et al. 2021, section 3, for the top label: the largest gap between the cumulative
    accuracy and the cumulative confidence. Needs no bins. 0 is best.
    """
    return _ks(*_by_confidence(*top_label(logits, labels)))


def area_under_risk_coverage(logits: Array, labels: Array) -> float:
    """AURC, 1/N sum_n (share of errors among the n most confident rows); in [0, 1], 0 is best.

    The risk-coverage curve of Geifman and El-Yaniv 2017 with zero-one risk, averaged over the
    coverages 1/N, 2/N, ..., 1. Judges the order of the confidences, not their values.
    """
    return _aurc(*_by_confidence(*top_label(logits, labels)))


def calibrated_ece_by_chance(
    logits: Array, bins: int = 10, draws: int = 100, seed: int = 0
) -> float:
    """The ECE that a perfectly calibrated network with these confidences would show by chance.

    Mean ECE over `draws` >= 1 samples in which row i is right with probability c_i, as it is when
    confidences are calibrated (as in the consistency resampling of Bröcker and Smith, Increasing
    the Reliability of Reliability Diagrams, 2007, but with the confidences kept). An ECE near this
    value is no sign of miscalibration. The same `seed` gives the same value. In [0, 1].
    """
    _check_integer("draws", draws, least=1)
    _check_integer("seed", seed, least=0)
    edges = bin_edges(bins)
    confidence, _ = top_label(logits, _no_labels(logits))
    index = bin_index(confidence, edges)
    expected = torch.bincount(index, confidence, minlength=bins)
    generator = torch.Generator().manual_seed(int(seed))
    total = 0.0
    for _ in range(draws):
        uniform = torch.rand(len(confidence), dtype=torch.float64, generator=generator)
        hits = torch.bincount(index[uniform < confidence], minlength=bins)
        total += float((hits - expected).abs().sum())
    return total / (draws * len(confidence))


# ------------------------------------------------------------------------------ against the truth


def true_calibration_error(logits: Array, posterior: Array, bins: int = 10) -> float:
    """sum_B |B|/N |mean over B of P(y = prediction | x) - conf(B)|; in [0, 1], 0 is best.

    `posterior`: the true probabilities P(y = k | x), (N, K), which only synthetic data has. It is
    the ECE with each hit or miss replaced by its probability, so that the chance of the labels,
    which makes an ECE positive, is gone. Like an ECE it asks whether confidence is deserved on
    average over all images of about this confidence: the binned form of E |P(correct | c) - c|, the
    true calibration error of Roelofs et al., Mitigating Bias in Calibration Error Estimation,
    AISTATS 2022, which it does not exceed: over- and underconfidence within a bin cancel.
    """
    return _ece(_calibration_bins(*_top_label_truth(logits, posterior), bin_edges(bins)))


def pointwise_calibration_error(logits: Array, posterior: Array) -> float:
    """mean |P(y = prediction | x) - c|: is confidence deserved for each image? In [0, 1].

    `posterior` as in `true_calibration_error`, which this is never below: over- and
    underconfidence at equal confidence do not cancel. 0 is best.
    """
    confidence, truth = _top_label_truth(logits, posterior)
    return float((truth - confidence).abs().mean())


def divergence_from_truth(logits: Array, posterior: Array) -> float:
    """mean KL(P(. | x) || p), natural log; in [0, inf), and 0 only for p = P(. | x).

    `posterior` as in `true_calibration_error`. It is the expected log loss less the least possible
    one, which the true probabilities have.
    """
    posterior = _checked_posterior(posterior, logits)
    total = 0.0
    for rows, z, _, _ in _chunks(logits, _no_labels(logits)):
        total += float(F.kl_div(z.log_softmax(1), posterior[rows], reduction="sum"))
    return max(0.0, total / len(logits))  # rounding may leave -1e-17


# ------------------------------------------------------------------------------ both


def all_metrics(logits: Array, labels: Array, bins: int = 10) -> dict[str, float]:
    """Every metric of this file in one pass, in this order:

    accuracy, top5_accuracy (only if K > 5), log_loss, brier, ece, classwise_ece, adaptive_ece,
    mce, rmsce, ks, aurc. Each equals the function of the full name with these arguments.
    """
    edges = bin_edges(bins)
    logits = _checked_logits(logits)
    confidence = torch.empty(len(logits), dtype=torch.float64)
    correct = torch.empty(len(logits), dtype=torch.bool)
    top5 = total_log_loss = total_brier = excess = 0
    for rows, z, y, right in _chunks(logits, labels):
        p, normaliser = _softmax(z)
        confidence[rows], correct[rows] = 1 / normaliser, right
        top5 += int(_in_top_k(z, y, 5).sum())
        total_log_loss += float(_log_losses(z, y, normaliser).sum())
        excess += _classwise_excess(p, y, edges)
        total_brier += _brier(p, y)  # last, as it overwrites p
    n, classes = logits.shape
    binned = _calibration_bins(confidence, correct, edges)
    ranked = _by_confidence(confidence, correct)
    return {
        "accuracy": int(correct.sum()) / n,
        **({"top5_accuracy": top5 / n} if classes > 5 else {}),
        "log_loss": total_log_loss / n,
        "brier": total_brier / n,
        "ece": _ece(binned),
        "classwise_ece": _classwise(excess, n),
        "adaptive_ece": _adaptive(*ranked, bins),
        "mce": _mce(binned),
        "rmsce": _rmsce(binned),
        "ks": _ks(*ranked),
        "aurc": _aurc(*ranked),
    }


def fit_temperature(logits: Array, labels: Array) -> float:
    """The temperature T > 0 at which the log loss of logits / T is least (Guo et al. 2017, 4.2).

    In b = 1/T the log loss is convex, with derivative g(b) = mean(sum_k p_k z_k - z_y) where
    p = softmax(b z). g never falls, so its root is the minimum, and bisection-like search
    (Brent's method, on log b) cannot miss it. Where the range [1e-6, 1e6] of T holds no root:

    - g >= 0 already at T = 1e6: the logits say nothing about the labels, or mislead, and the
      best prediction is the uniform one. Returns 1e6.
    - Every label has the largest logit of its row, alone or tied: the log loss never rises towards
      T = 0, so there is no one minimum. Returns 1.0 and warns: infinite certainty would be an
      artefact of a finite sample.
    - g < 0 still at T = 1e-6, for logits of next to no spread. Returns 1e-6.
    """
    # _chunks subtracts each row's largest logit: a label that has it is left with 0.
    if all(float(z.gather(1, y[:, None]).min()) == 0 for _, z, y, _ in _chunks(logits, labels)):
        warnings.warn(
            "fit_temperature: every label has the largest logit, so the log loss has no one "
            "minimum (it never rises towards T = 0); returning T = 1.0",
            stacklevel=2,
        )
        return 1.0

    def slope(log_b: float) -> float:
        total = 0.0
        for _, z, y, _ in _chunks(logits, labels):
            weight = (z * math.exp(log_b)).exp_()
            mean = (weight * z).sum(1) / weight.sum(1)
            total += float((mean - z.gather(1, y[:, None]).squeeze(1)).sum())
        return total / len(logits)

    low, high = -math.log(HIGHEST_TEMPERATURE), -math.log(LOWEST_TEMPERATURE)
    if slope(low) >= 0:
        return HIGHEST_TEMPERATURE
    if slope(high) <= 0:
        return LOWEST_TEMPERATURE
    return math.exp(-brentq(slope, low, high, xtol=1e-12))


# ------------------------------------------------------------------------------ input


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        # torch takes no negative strides and warns at read-only memory (a memory-mapped file).
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        kind = type(values).__name__
        raise ValueError(f"{name} must be a tensor or a numeric array, got {kind}") from error


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _checked_logits(logits: Array) -> Tensor:
    logits = _tensor("logits", logits)
    shape = tuple(logits.shape)
    if logits.ndim != 2 or shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"logits must have shape (N, K) with N >= 1 and K >= 2, got {shape}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point numbers, got {logits.dtype}")
    return logits


def _checked_labels(labels: Array, rows: int, classes: int) -> Tensor:
    labels = _tensor("labels", labels)
    if labels.shape != (rows,):
        raise ValueError(
            f"labels must have shape ({rows},), one for each row of the logits, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"labels must be in [0, {classes}), a class for each column of the logits, "
            f"got {int(labels[row])} in row {row}"
        )
    return labels


def _checked_posterior(posterior: Array, logits: Array) -> Tensor:
    posterior = _tensor("posterior", posterior).double()
    shape = tuple(_checked_logits(logits).shape)
    if posterior.shape != shape:
        raise ValueError(
            f"posterior must have the shape of the logits, {shape}, got {tuple(posterior.shape)}"
        )
    off = (posterior.sum(1) - 1).abs() > 1e-6
    bad = (off | (posterior < 0).any(1) | ~posterior.isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(f"posterior must hold probabilities, and row {int(bad[0])} does not")
    return posterior


def _no_labels(logits: Array) -> Tensor:
    """For what looks at predictions alone."""
    return torch.zeros(len(_checked_logits(logits)), dtype=torch.int64)


def _chunks(logits: Array, labels: Array) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Check the arguments and yield them a few rows at a time, as (rows, z, y, correct):

    rows, where in the whole they lie. z (n, K), float64, a copy with each row's largest logit
    subtracted: the same softmax, safe for exp, and blind to an offset; free to be overwritten,
    as the next chunk will. y (n,), int64. correct (n,), bool.
    """
    logits = _checked_logits(logits)
    labels = _checked_labels(labels, *logits.shape)
    size = max(1, CHUNK // logits.shape[1])
    buffer = torch.empty(min(size, len(logits)), logits.shape[1], dtype=torch.float64)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        y = labels[rows]
        z = buffer[: len(y)].copy_(logits[rows])
        # A sum is finite only if all its terms are; the reverse fails for terms near 1e308, so
        # only a sum that is not finite is worth a look at each row.
        if not math.isfinite(float(z.sum())):
            bad = (~z.isfinite().all(1)).nonzero()
            if len(bad):
                row = int(bad[0])
                value = float(z[row][~z[row].isfinite()][0])
                raise ValueError(f"logits must be finite, got {value} in row {start + row}")
        largest, prediction = z.max(1, keepdim=True)
        yield rows, z.sub_(largest), y, prediction.squeeze(1) == y


# ------------------------------------------------------------------------------ for a chunk


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """p (n, K), and its normaliser (n,), whose inverse is the confidence as the top z is 0."""
    p = z.exp()
    normaliser = p.sum(1)
    return p.div_(normaliser[:, None]), normaliser


def _in_top_k(z: Tensor, y: Tensor, k: int) -> Tensor:
    true = z.gather(1, y[:, None])
    tied_before = (z == true) & (torch.arange(z.shape[1]) < y[:, None])
    return ((z > true) | tied_before).sum(1) < k


def _log_losses(z: Tensor, y: Tensor, normaliser: Tensor) -> Tensor:
    return normaliser.log() - z.gather(1, y[:, None]).squeeze(1)


def _brier(p: Tensor, y: Tensor) -> float:
    """Sum over rows; overwrites p. Expanding the square would cancel where p_y is near 1."""
    p[torch.arange(len(y)), y] -= 1
    return float(p.square_().sum())


def _classwise_excess(p: Tensor, y: Tensor, edges: Tensor) -> Tensor:
    """(K, bins): in each bin of each class, the sum of p_k less the number of labels k."""
    classes, bins = p.shape[1], len(edges) - 1
    cell = bin_index(p, edges) + bins * torch.arange(classes)
    predicted = torch.bincount(cell.view(-1), p.view(-1), minlength=classes * bins)
    observed = torch.bincount(cell.gather(1, y[:, None]).squeeze(1), minlength=classes * bins)
    return (predicted - observed).view(classes, bins)


# ------------------------------------------------------------------------------ for all rows


def top_label(logits: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Confidence (N,), float64, and whether the prediction is right (N,), bool."""
    logits = _checked_logits(logits)
    # Filled in place: small tensors kept from each chunk would break up the memory that the
    # chunks are to reuse, and the process would grow by the size of the split.
    confidence = torch.empty(len(logits), dtype=torch.float64)
    correct = torch.empty(len(logits), dtype=torch.bool)
    for rows, z, _, right in _chunks(logits, labels):
        confidence[rows], correct[rows] = 1 / z.exp_().sum(1), right
    return confidence, correct


def _top_label_truth(logits: Array, posterior: Array) -> tuple[Tensor, Tensor]:
    """Confidence and true probability of the prediction, each (N,), float64."""
    posterior = _checked_posterior(posterior, logits)
    confidence, _ = top_label(logits, _no_labels(logits))
    prediction = torch.cat([z.max(1).indices for _, z, _, _ in _chunks(logits, _no_labels(logits))])
    return confidence, posterior.gather(1, prediction[:, None]).squeeze(1)


def bin_edges(bins: int) -> Tensor:
    """(bins + 1,), float64: 0, 1/bins, ..., 1. Raises ValueError unless bins is at least 1."""
    _check_integer("bins", bins, least=1)
    # A division rounds k/bins to the nearest float64, just as 1 / normaliser does: a confidence
    # that is k/bins on paper and exact in float64 meets its edge exactly. linspace may not.
    return torch.arange(bins + 1, dtype=torch.float64) / bins


def bin_index(confidence: Tensor, edges: Tensor) -> Tensor:
    """The bin (lo, hi] of each confidence, counted from 0."""
    # Inner edges only: then 0 falls into the first bin and 1 into the last with no special case.
    return torch.bucketize(confidence, edges[1:-1], right=False)


def _calibration_bins(confidence: Tensor, correct: Tensor, edges: Tensor) -> CalibrationBins:
    index, bins = bin_index(confidence, edges), len(edges) - 1
    count = torch.bincount(index, minlength=bins).double()
    return CalibrationBins(
        edges,
        count,
        torch.bincount(index, confidence, minlength=bins) / count,
        torch.bincount(index, correct.double(), minlength=bins) / count,
    )


def _gaps(binned: CalibrationBins) -> tuple[Tensor, Tensor]:
    """|acc(B) - conf(B)| and |B|/N of the non-empty bins."""
    filled = binned.count > 0
    gap = (binned.accuracy - binned.confidence).abs()[filled]
    return gap, (binned.count / binned.count.sum())[filled]


def _ece(binned: CalibrationBins) -> float:
    gap, share = _gaps(binned)
    return float((share * gap).sum())


def _mce(binned: CalibrationBins) -> float:
    gap, _ = _gaps(binned)
    return float(gap.max())


def _rmsce(binned: CalibrationBins) -> float:
    gap, share = _gaps(binned)
    return math.sqrt(float((share * gap.square()).sum()))


def _classwise(excess: Tensor, n: int) -> float:
    # |B|/N |mean - mean| is 1/N |sum - sum|: the size of a bin cancels.
    return float(excess.abs().sum()) / (len(excess) * n)


def _by_confidence(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (N,), least sure first, and the mean correctness of each row's tied group."""
    confidence, order = confidence.sort()
    _, group, size = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    mean = torch.bincount(group, correct[order].double()) / size
    return confidence, mean[group]


def _adaptive(confidence: Tensor, correct: Tensor, bins: int) -> float:
    index = torch.arange(len(confidence)) * bins // len(confidence)
    return float(torch.bincount(index, confidence - correct).abs().sum()) / len(confidence)


def _ks(confidence: Tensor, correct: Tensor) -> float:
    # Within a tied group all terms are equal, so the sum is largest at the group's ends: the
    # curve is looked at between groups only, as it should be.
    return float((correct - confidence).cumsum(0).abs().max()) / len(confidence)


def _aurc(confidence: Tensor, correct: Tensor) -> float:
    errors = (1 - correct).flip(0).cumsum(0)
    return float((errors / torch.arange(1, len(errors) + 1)).mean())
