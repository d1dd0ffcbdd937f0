"""What is minimised: every training loss of this project, as plain functions of logits.

Notation: logits z of shape (N, K), true class y, p = softmax(z), teacher logits u,
q = softmax(u), temperature T, smoothing factor ε. Logarithms are natural.

What holds for all of them:

* ``logits`` and ``teacher_logits`` are (N, K) with K >= 2, of any float type; ``targets`` is (N,)
  int64 with values in [0, K). Values on the device are never read back to be checked: that would
  make every batch wait for the GPU.
* ``reduction`` is "mean" or "sum" (a scalar), or "none" (shape (N,)).
* The arithmetic and the result are float32, for half-precision logits and under autocast too
  (float64 for float64 logits). Values and gradients are finite for logits of ±1e4.
* The teacher never receives a gradient.
* A wrong argument is a ValueError of one line: what was given and what is accepted.

Sources, by short name. ILS paper: Maher and Kull, Instance-based Label Smoothing For Better
Calibrated Classification Networks, ICMLA 2021, arXiv 2110.05355; ILS README: that of its public
code, 2020. LR paper: Lienen and Hüllermeier, From Label Smoothing to Label Relaxation, AAAI 2021.
KD: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
VARIANTS = ("ils1", "ils2", "ils", "scores", "class")
# ε_i of these is a function of the teacher's q_y, whose logits are to be calibrated.
BY_TRUE_CLASS = ("ils1", "ils")
FACTORS = ("quadratic", "proportional", "complementary")


def cross_entropy_loss(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """-log p_y, in [0, ∞)."""
    z = _checked(logits, targets)
    return _reduce(F.cross_entropy(z, targets, reduction="none"), reduction)


def label_smoothing_loss(
    logits: Tensor, targets: Tensor, smoothing: float = 0.1, *, reduction: str = "mean"
) -> Tensor:
    """-Σ_j t_j log p_j with t = (1 - ε)·onehot(y) + ε/K, in [0, ∞).

    ``smoothing`` is ε in [0, 1]; 0 is cross-entropy. Note that the true class keeps
    1 - ε + ε/K, not 1 - ε: the definition of ``torch.nn.CrossEntropyLoss(label_smoothing=ε)``.

    Source: Szegedy et al. 2016, Rethinking the Inception Architecture, section 7.
    """
    _require(0 <= smoothing <= 1, "smoothing", smoothing, "a number in [0, 1]")
    z = _checked(logits, targets)
    losses = F.cross_entropy(z, targets, label_smoothing=smoothing, reduction="none")
    return _reduce(losses, reduction)


def label_relaxation_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.1, *, reduction: str = "mean"
) -> Tensor:
    """0 if p_y >= 1 - α, else (1 - α)·log((1 - α) / p_y) + α·log(α / (1 - p_y)), in [0, ∞).

    The distance KL(t ‖ p) from p to the nearest t of the credal set {t : t_y >= 1 - α}. Value and
    gradient are exactly 0 inside the set, and the value is continuous at its border (where
    float32 rounding may leave ±1e-7). ``alpha`` is the imprecisiation degree α in (0, 1);
    α -> 0 is cross-entropy.

    Source: LR paper, eq. (5); supplement, propositions 1 and 2.
    """
    _require(0 < alpha < 1, "alpha", alpha, "a number in (0, 1)")
    log_true, log_rest = _log_true_and_rest(_checked(logits, targets), targets)
    log_alpha, log_kept = math.log(alpha), math.log1p(-alpha)
    divergence = (1 - alpha) * (log_kept - log_true) + alpha * (log_alpha - log_rest)
    # The usual α is small, so p_y is near 1 at the border: there log(1 - p_y) still has all its
    # digits, where log p_y has lost them. Hence "1 - p_y <= α" rather than "p_y >= 1 - α".
    inside = log_rest <= log_alpha
    return _reduce(torch.where(inside, 0.0, divergence), reduction)


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """-(1 - p_y)^γ · log p_y, in [0, ∞).

    ``gamma`` is γ in [0, ∞); 0 is cross-entropy.

    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, eq. (4).
    """
    _require(0 <= gamma < math.inf, "gamma", gamma, "a number in [0, inf)")
    log_true, log_rest = _log_true_and_rest(_checked(logits, targets), targets)
    # In log space, because the derivative of (1 - p_y)^γ itself is infinite at p_y = 1 for γ < 1.
    return _reduce(-torch.exp(gamma * log_rest) * log_true, reduction)


def confidence_penalty_loss(
    logits: Tensor, targets: Tensor, beta: float = 0.1, *, reduction: str = "mean"
) -> Tensor:
    """-log p_y - β·H(p) with the entropy H(p) = -Σ_j p_j log p_j, in [-β·log K, ∞).

    ``beta`` is β in [0, ∞); 0 is cross-entropy.

    Source: Pereyra et al. 2017, Regularizing Neural Networks by Penalizing Confident Output
    Distributions, section 3.
    """
    _require(0 <= beta < math.inf, "beta", beta, "a number in [0, inf)")
    log_p = F.log_softmax(_checked(logits, targets), dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return _reduce(F.nll_loss(log_p, targets, reduction="none") - beta * entropy, reduction)


def instance_based_smoothing_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    smoothing: float = 0.1,
    temperature: float = 1.0,
    variant: str = "ils2",
    *,
    reduction: str = "mean",
    **options,
) -> Tensor:
    """-Σ_j t_j log p_j, in [0, ∞), where the teacher's view of each image decides its target t.

    All but ``reduction`` is what :func:`instance_based_targets` takes, which gives t; ``options``
    are its factor, shift, slope and cap. The teacher must have seen the same augmented images as
    the student.

    Source: ILS paper; ILS README.
    """
    z = _checked(logits, targets)
    _require_same_shape(logits, teacher_logits)
    t = instance_based_targets(teacher_logits, targets, smoothing, temperature, variant, **options)
    return _reduce(F.cross_entropy(z, t.to(z.dtype), reduction="none"), reduction)


def instance_based_targets(
    teacher_logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.1,
    temperature: float = 1.0,
    variant: str = "ils2",
    *,
    factor: str = "quadratic",
    shift: float = 0.8,
    slope: float = 2.0,
    cap: float = 0.2,
) -> Tensor:
    """Target distributions t, (N, K): the true class gives up ε_i, the wrong ones share it.

    t_y = 1 - ε_i and t_j = ε_i·share_j for j ≠ y. Rows are >= 0 and sum to 1. ``variant``:

    ======  ================================  =============================================
    name    ε_i                               share_j
    ======  ================================  =============================================
    ils2    ε                                 softmax of u / T over the wrong classes
    ils1    by ``factor``, see below          1 / (K - 1)
    ils     by ``factor``                     as ils2
    class   ε                                 as ils2 at T = 1 (``temperature`` is ignored)
    scores  ε·s_y                             s_j / (1 - s_y)
    ======  ================================  =============================================

    ``factor``: "quadratic" is min(slope·(q_y - shift)², cap), where shift and slope are the
    paper's P1 and P2; "proportional" is ε·q_y; "complementary" is ε·(1 - q_y). The quadratic is
    reconstructed from the appendix's figures: its printed equation could not be read. q_y is
    never divided by T: give ils1 and ils the logits of a teacher that is already calibrated
    (the vanilla network, its logits divided by its fitted temperature).

    class: row i of ``teacher_logits`` is row y_i of :func:`class_average_logits`, which has
    already applied the temperature.

    scores: s is the teacher's logits, shifted so that the smallest is 0, as shares of their sum
    (1 / K each if all are equal; if the wrong classes have none, they share alike). It produced
    the ILS README's table.

    Ranges: ``smoothing`` ε in [0, 1), ``temperature`` T in (0, ∞), ``shift`` in [0, 1],
    ``slope`` in [0, ∞), ``cap`` in [0, 1). No gradient flows to ``teacher_logits``.

    Source: ILS paper, with its appendix (ils1, ils2, ils, class); ILS README and code (ils2,
    scores, the two linear factors).
    """
    _require(0 <= smoothing < 1, "smoothing", smoothing, "a number in [0, 1)")
    _require(0 < temperature < math.inf, "temperature", temperature, "a number in (0, inf)")
    _require_choice("variant", variant, VARIANTS)
    _require_choice("factor", factor, FACTORS)
    _require(0 <= shift <= 1, "shift", shift, "a number in [0, 1]")
    _require(0 <= slope < math.inf, "slope", slope, "a number in [0, inf)")
    _require(0 <= cap < 1, "cap", cap, "a number in [0, 1)")
    u = _checked(teacher_logits, targets, "teacher_logits").detach()
    y = targets[:, None]
    num_classes = u.shape[1]

    if variant in BY_TRUE_CLASS:
        q_true = u.softmax(dim=1).gather(1, y)
        given_up = _instance_factor(q_true, factor, smoothing, shift, slope, cap)
    elif variant == "scores":
        scores = u - u.amin(dim=1, keepdim=True)
        given_up = smoothing * _fractions(scores, otherwise=1 / num_classes).gather(1, y)
    else:
        given_up = u.new_full((len(u), 1), smoothing)

    if variant == "ils1":
        shares = torch.full_like(u, 1 / (num_classes - 1))
    elif variant == "scores":
        shares = _fractions(scores.scatter(1, y, 0.0), otherwise=1 / (num_classes - 1))
    else:
        scaled = u if variant == "class" else u / temperature
        # Leaving the true class out before the softmax, not q_j / (1 - q_y) after it, which is
        # 0 / 0 for a teacher so certain that q_y rounds to 1.
        shares = scaled.scatter(1, y, -math.inf).softmax(dim=1)

    return (given_up * shares).scatter(1, y, 1 - given_up)


def class_average_logits(
    teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """(K, K) float32: row y is the log of the mean of softmax(u / T) over the images of class y.

    For the "class" variant of :func:`instance_based_targets`, from the teacher's logits (N, K) of
    the whole training split. ``temperature`` is T in (0, ∞). Every class needs an image: a class
    without one is a ValueError that names it. Called once a run, so it may wait for the device.

    Source: ILS paper, class-based smoothing.
    """
    _require(0 < temperature < math.inf, "temperature", temperature, "a number in (0, inf)")
    u = _checked(teacher_logits, targets, "teacher_logits").detach()
    log_q = F.log_softmax(u.double() / temperature, dim=1)
    rows = []
    for label in range(u.shape[1]):
        members = log_q[targets == label]
        _require(len(members) > 0, f"number of images of class {label}", 0, "1 or more")
        rows.append(members.logsumexp(dim=0) - math.log(len(members)))
    return torch.stack(rows).float()


def distillation_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.9,
    temperature: float = 20.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    """α·T²·KL(softmax(u/T) ‖ softmax(z/T)) + (1 - α)·(-log p_y), in [0, ∞).

    ``alpha`` is α in [0, 1], the teacher's weight; ``temperature`` is T in (0, ∞).
    :func:`distillation_terms` gives the two terms apart.

    Source: KD, section 2.
    """
    _require(0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
    teacher_term, label_term = distillation_terms(
        logits, targets, teacher_logits, temperature=temperature, reduction=reduction
    )
    return alpha * teacher_term + (1 - alpha) * label_term


def distillation_terms(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    temperature: float = 20.0,
    *,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The pair T²·KL(softmax(u/T) ‖ softmax(z/T)) and -log p_y, each reduced.

    The KL is summed over the classes: averaging over them would divide its weight by K. T² makes
    up for the gradient's 1/T², so that α means the same at every T.
    ``temperature`` is T in (0, ∞).

    Source: KD, section 2.
    """
    _require(0 < temperature < math.inf, "temperature", temperature, "a number in (0, inf)")
    z = _checked(logits, targets)
    _require_same_shape(logits, teacher_logits)
    u = _checked(teacher_logits, targets, "teacher_logits").detach().to(z.dtype)
    student = F.log_softmax(z / temperature, dim=1)
    teacher = F.log_softmax(u / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
    label_term = cross_entropy_loss(logits, targets, reduction=reduction)
    return temperature**2 * _reduce(divergence, reduction), label_term


def _log_true_and_rest(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p_y, log(1 - p_y)), each (N,), the second without ever forming 1 - p_y."""
    log_p = F.log_softmax(z, dim=1)
    y = targets[:, None]
    return log_p.gather(1, y).squeeze(1), log_p.scatter(1, y, -math.inf).logsumexp(dim=1)


def _instance_factor(
    q_true: Tensor, factor: str, smoothing: float, shift: float, slope: float, cap: float
) -> Tensor:
    """ε_i of ils1 and ils as a function of the teacher's probability of the true class."""
    if factor == "proportional":
        return smoothing * q_true
    if factor == "complementary":
        return smoothing * (1 - q_true)
    return (slope * (q_true - shift) ** 2).clamp(max=cap)


def _fractions(scores: Tensor, otherwise: float) -> Tensor:
    """Each row divided by its sum; rows of zeros become ``otherwise`` everywhere."""
    total = scores.sum(dim=1, keepdim=True)
    return torch.where(total == 0, otherwise, scores / total)


def _checked(logits: Tensor, targets: Tensor, name: str = "logits") -> Tensor:
    """``logits`` in at least float32, once shapes and types are known to be right."""
    _require_tensor(logits, name)
    _require_tensor(targets, "targets")
    shape = tuple(logits.shape)
    _require(len(shape) == 2 and shape[1] >= 2, f"shape of {name}", shape, "(N, K) with K >= 2")
    _require(targets.shape == shape[:1], "shape of targets", tuple(targets.shape), f"{shape[:1]}")
    _require(targets.dtype == torch.int64, "type of targets", targets.dtype, "torch.int64")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _require_tensor(given: object, name: str) -> None:
    _require(isinstance(given, Tensor), f"type of {name}", type(given).__name__, "a tensor")


def _require_same_shape(logits: Tensor, teacher_logits: Tensor) -> None:
    _require_tensor(teacher_logits, "teacher_logits")
    given, accepted = tuple(teacher_logits.shape), tuple(logits.shape)
    _require(given == accepted, "shape of teacher_logits", given, f"that of logits, {accepted}")


def _require_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    _require(given in choices, name, given, "one of " + ", ".join(choices))


def _require(holds: bool, name: str, given: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {given!r}; accepted: {accepted}")


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    _require_choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
