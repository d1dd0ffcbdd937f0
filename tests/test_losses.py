"""The losses against formulas written out here in float64 numpy, one image at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.losses import (
    FACTORS,
    VARIANTS,
    class_average_logits,
    confidence_penalty_loss,
    cross_entropy_loss,
    distillation_loss,
    distillation_terms,
    focal_loss,
    instance_based_smoothing_loss,
    instance_based_targets,
    label_relaxation_loss,
    label_smoothing_loss,
)

# --- independent formulas: z and u are rows of K float64 numbers, y an int ----------------------


def softmax(z):
    e = np.exp(np.asarray(z, dtype=np.float64) - np.max(z))
    return e / e.sum()


def expected_cross_entropy(z, y):
    return -np.log(softmax(z)[y])


def expected_smoothing(z, y, eps):
    p = softmax(z)
    return sum(-((1 - eps) * (j == y) + eps / len(p)) * np.log(p[j]) for j in range(len(p)))


def expected_relaxation(z, y, alpha):
    p = softmax(z)[y]
    if p >= 1 - alpha:
        return 0.0
    return (1 - alpha) * np.log((1 - alpha) / p) + alpha * np.log(alpha / (1 - p))


def expected_focal(z, y, gamma):
    p = softmax(z)[y]
    return -((1 - p) ** gamma) * np.log(p)


def expected_penalty(z, y, beta):
    p = softmax(z)
    return -np.log(p[y]) - beta * -(p * np.log(p)).sum()


def expected_distillation(z, y, u, alpha, temperature):
    q, p = softmax(u / temperature), softmax(z / temperature)
    kl = sum(q[j] * np.log(q[j] / p[j]) for j in range(len(p)))
    return alpha * temperature**2 * kl + (1 - alpha) * expected_cross_entropy(z, y)


def expected_targets(
    u,
    y,
    variant="ils2",
    smoothing=0.1,
    temperature=1.0,
    factor="quadratic",
    shift=0.8,
    slope=2.0,
    cap=0.2,
):
    """The table of Instance-based-smoothing.py by probabilities and a loop, for moderate logits."""
    u = np.asarray(u, dtype=np.float64)
    classes = len(u)
    q_y = softmax(u)[y]
    by_factor = {
        "quadratic": min(slope * (q_y - shift) ** 2, cap),
        "proportional": smoothing * q_y,
        "complementary": smoothing * (1 - q_y),
    }[factor]
    q = softmax(u / (1.0 if variant == "class" else temperature))
    lifted = u - u.min()
    s = lifted / lifted.sum() if lifted.sum() > 0 else np.full(classes, 1 / classes)
    t = np.empty(classes)
    for j in range(classes):
        if variant == "ils2" or variant == "class":
            t[j] = 1 - smoothing if j == y else smoothing * q[j] / (1 - q[y])
        elif variant == "ils1":
            t[j] = 1 - by_factor if j == y else by_factor / (classes - 1)
        elif variant == "ils":
            t[j] = 1 - by_factor if j == y else by_factor * q[j] / (1 - q[y])
        elif variant == "scores":
            eps = smoothing * s[y]
            share = s[j] / (1 - s[y]) if s[y] < 1 else 1 / (classes - 1)
            t[j] = 1 - eps if j == y else eps * share
    return t


def expected_instance_based(z, y, u, **options):
    return -(expected_targets(u, y, **options) * np.log(softmax(z))).sum()


# --- the losses under test, each as f(logits, targets, teacher, reduction=...) ------------------

PLAIN = {
    "cross_entropy": (cross_entropy_loss, expected_cross_entropy, [{}]),
    "smoothing": (
        lambda z, y, eps, **kw: label_smoothing_loss(z, y, smoothing=eps, **kw),
        expected_smoothing,
        [{"eps": e} for e in (0, 0.05, 0.1, 0.5, 1)],
    ),
    "relaxation": (
        label_relaxation_loss,
        expected_relaxation,
        [{"alpha": a} for a in (0.01, 0.1, 0.4, 0.9)],
    ),
    "focal": (focal_loss, expected_focal, [{"gamma": g} for g in (0, 0.1, 0.5, 1, 2, 5)]),
    "penalty": (
        confidence_penalty_loss,
        expected_penalty,
        [{"beta": b} for b in (0, 0.1, 1, 8)],
    ),
}

LOSSES = {
    "cross_entropy": lambda z, y, u, **kw: cross_entropy_loss(z, y, **kw),
    "smoothing": lambda z, y, u, **kw: label_smoothing_loss(z, y, **kw),
    "relaxation": lambda z, y, u, **kw: label_relaxation_loss(z, y, **kw),
    "focal": lambda z, y, u, **kw: focal_loss(z, y, **kw),
    "focal-half": lambda z, y, u, **kw: focal_loss(z, y, gamma=0.5, **kw),
    "penalty": lambda z, y, u, **kw: confidence_penalty_loss(z, y, **kw),
    "distillation": lambda z, y, u, **kw: distillation_loss(z, y, u, **kw),
    "distillation-cold": lambda z, y, u, **kw: distillation_loss(z, y, u, temperature=1, **kw),
}
for _variant in VARIANTS:
    LOSSES[_variant] = lambda z, y, u, variant=_variant, **kw: instance_based_smoothing_loss(
        z, y, u, variant=variant, **kw
    )
TAUGHT = [name for name in LOSSES if name.startswith("distillation") or name in VARIANTS]

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def batch(n=12, classes=5, scale=2.0, seed=0, dtype=torch.float64):
    """(logits, targets, teacher logits)."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    u = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    return z.to(dtype), y, u.to(dtype)


def gradient(loss, z, *args, **kwargs):
    z = z.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z, *args, **kwargs).sum(), z)
    return g


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_losses_equal_their_formula(name, dtype, rtol, classes):
    loss, formula, settings = PLAIN[name]
    z, y, _ = batch(n=40, classes=classes, dtype=dtype)
    for setting in settings:
        ours = loss(z, y, reduction="none", **setting)
        theirs = [formula(row, int(k), **setting) for row, k in zip(z.numpy(), y, strict=True)]
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=rtol, atol=rtol)


def test_formula_batch_has_images_on_both_sides_of_the_credal_set():
    z, y, _ = batch(n=40, classes=3)
    true = torch.softmax(z, 1).gather(1, y[:, None])
    assert (true >= 0.9).any()
    assert (true < 0.9).any()


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("smoothing", {"eps": 0.1}),
        ("relaxation", {"alpha": 0.1}),
        ("focal", {"gamma": 1.0}),
        ("penalty", {"beta": 0.1}),
    ],
)
def test_documented_defaults(name, setting):
    z, y, u = batch(n=1)
    expected = PLAIN[name][1](z[0].numpy(), int(y), **setting)
    assert expected > 0
    assert LOSSES[name](z, y, u).item() == pytest.approx(expected)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_is_the_one_of_torch(eps, reduction):
    z, y, _ = batch(dtype=torch.float32)
    torchs = torch.nn.CrossEntropyLoss(label_smoothing=eps, reduction=reduction)(z, y)
    torch.testing.assert_close(
        label_smoothing_loss(z, y, smoothing=eps, reduction=reduction), torchs
    )


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("factor", FACTORS)
@every_variant
def test_instance_based_targets_and_loss_equal_their_formula(variant, factor, temperature, classes):
    z, y, u = batch(n=20, classes=classes)
    options = {"variant": variant, "factor": factor, "temperature": temperature, "smoothing": 0.15}
    rows = list(zip(z.numpy(), map(int, y), u.numpy(), strict=True))
    t = instance_based_targets(u, y, **options)
    np.testing.assert_allclose(
        t.numpy(), [expected_targets(b, k, **options) for _, k, b in rows], rtol=1e-10
    )
    ours = instance_based_smoothing_loss(z, y, u, reduction="none", **options)
    np.testing.assert_allclose(
        ours.numpy(), [expected_instance_based(a, k, b, **options) for a, k, b in rows], rtol=1e-10
    )


def test_instance_based_defaults_are_ils2_with_the_documented_numbers():
    z, y, u = batch()
    options = {"variant": "ils2", "smoothing": 0.1, "temperature": 1.0}
    theirs = [
        expected_instance_based(a, int(k), b, **options)
        for a, k, b in zip(z.numpy(), y, u.numpy(), strict=True)
    ]
    assert instance_based_smoothing_loss(z, y, u).item() == pytest.approx(np.mean(theirs))


def test_targets_by_hand():
    u = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    y = torch.tensor([0])

    def t(**options):
        return instance_based_targets(u, y, **options)[0].tolist()

    assert t(variant="ils2") == pytest.approx([0.9, 0.1 * 2 / 3, 0.1 / 3])
    # 2·(0.7 - 0.8)² = 0.02
    assert t(variant="ils1") == pytest.approx([0.98, 0.01, 0.01])
    assert t(variant="ils") == pytest.approx([0.98, 0.02 * 2 / 3, 0.02 / 3])
    assert t(variant="ils1", factor="proportional") == pytest.approx([0.93, 0.035, 0.035])
    assert t(variant="ils1", factor="complementary") == pytest.approx([0.97, 0.015, 0.015])
    # log 7 and log 2 above the smallest logit
    s_y = math.log(7) / (math.log(7) + math.log(2))
    assert t(variant="scores") == pytest.approx([1 - 0.1 * s_y, 0.1 * s_y, 0.0])


def test_quadratic_factor_is_capped_and_takes_shift_and_slope():
    q = torch.tensor([0.05, 0.6, 0.8, 0.95])
    u = torch.stack([q, 1 - q], dim=1).log()
    y = torch.zeros(4, dtype=torch.int64)
    given_up = 1 - instance_based_targets(u, y, variant="ils1")[:, 0]
    assert given_up.tolist() == pytest.approx([0.2, 0.08, 0.0, 0.045], abs=1e-6)
    given_up = 1 - instance_based_targets(u, y, variant="ils", shift=0.6, slope=1.0, cap=0.1)[:, 0]
    assert given_up.tolist() == pytest.approx([0.1, 0.0, 0.04, 0.1], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_distillation_equals_its_formula_and_torch(alpha, temperature):
    z, y, u = batch(n=20)
    options = {"alpha": alpha, "temperature": temperature}
    ours = distillation_loss(z, y, u, reduction="none", **options)
    theirs = [
        expected_distillation(a, int(k), b, **options)
        for a, k, b in zip(z.numpy(), y, u.numpy(), strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)

    log_p, log_q = F.log_softmax(z / temperature, 1), F.log_softmax(u / temperature, 1)
    torchs_kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    teacher_term, label_term = distillation_terms(z, y, u, temperature=temperature)
    torch.testing.assert_close(teacher_term, temperature**2 * torchs_kl)
    torch.testing.assert_close(label_term, F.cross_entropy(z, y))


def test_distillation_defaults_are_those_of_the_reference():
    z, y, u = batch(n=1)
    expected = expected_distillation(z[0].numpy(), int(y), u[0].numpy(), 0.9, 20.0)
    assert distillation_loss(z, y, u).item() == pytest.approx(expected)
    assert distillation_terms(z, y, u)[0].item() == pytest.approx(
        expected_distillation(z[0].numpy(), int(y), u[0].numpy(), 1.0, 20.0)
    )


def test_distillation_gradient_keeps_its_size_as_temperature_grows():
    # KD eq. (4): for T far above the logits the gradient of the KL is (z - u) / (K T²), both
    # with zero mean. Without the factor T² it would vanish, with another it would explode.
    z, y, u = batch(n=6)
    centred = (z - z.mean(1, keepdim=True)) - (u - u.mean(1, keepdim=True))
    for temperature in (1e3, 1e4):
        g = gradient(
            distillation_loss, z, y, u, alpha=1.0, temperature=temperature, reduction="sum"
        )
        torch.testing.assert_close(g, centred / z.shape[1], rtol=0.02, atol=1e-3)


def test_distillation_of_a_student_that_equals_its_teacher():
    z, y, _ = batch()
    assert distillation_loss(z, y, z.clone(), alpha=1.0).item() == 0
    g = gradient(distillation_loss, z, y, z.clone(), alpha=1.0)
    assert g.abs().max() < 1e-14


# --- gradients ---------------------------------------------------------------------------------


@every_loss
def test_gradcheck(loss):
    z, y, u = batch(n=4, classes=4, scale=1.0, seed=3)
    # LR has a kink in its second derivative where p_y = 1 - α = 0.9.
    assert ((torch.softmax(z, 1).gather(1, y[:, None]) - 0.9).abs() > 0.01).all()
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: loss(a, y, u, reduction="none"), (z,))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.05, 0.3), (0.3, 2.0)])
def test_gradcheck_of_other_hyper_parameters(alpha, gamma):
    z, y, _ = batch(n=6, classes=3, scale=3.0)
    assert ((torch.softmax(z, 1).gather(1, y[:, None]) - 1 + alpha).abs() > 1e-3).all()
    z.requires_grad_()
    for loss in (
        lambda a: label_relaxation_loss(a, y, alpha=alpha, reduction="none"),
        lambda a: focal_loss(a, y, gamma=gamma, reduction="none"),
        lambda a: confidence_penalty_loss(a, y, beta=gamma, reduction="none"),
    ):
        assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("name", TAUGHT)
def test_no_gradient_reaches_the_teacher(name):
    z, y, u = batch()
    z.requires_grad_()
    u.requires_grad_()
    LOSSES[name](z, y, u).backward()
    assert u.grad is None
    assert z.grad.abs().sum() > 0


def test_targets_and_class_averages_are_detached():
    _, y, u = batch(n=60)
    u.requires_grad_()
    assert not instance_based_targets(u, y).requires_grad
    assert not class_average_logits(u, y).requires_grad


@every_variant
def test_instance_based_gradient_is_prediction_minus_target(variant):
    z, y, u = batch()
    t = [expected_targets(b, int(k), variant=variant) for k, b in zip(y, u.numpy(), strict=True)]
    p = [softmax(row) for row in z.numpy()]
    g = gradient(instance_based_smoothing_loss, z, y, u, variant=variant, reduction="sum")
    np.testing.assert_allclose(g.numpy(), np.array(p) - np.array(t), atol=1e-12)


def test_ils2_is_minimised_by_its_target():
    z, y, u = batch(n=4, classes=4, scale=1.0)
    z.requires_grad_()
    for _ in range(2000):
        instance_based_smoothing_loss(z, y, u, reduction="sum").backward()
        with torch.no_grad():
            z -= 2.0 * z.grad
            z.grad = None
    t = [expected_targets(b, int(k)) for k, b in zip(y, u.numpy(), strict=True)]
    np.testing.assert_allclose(torch.softmax(z, 1).detach().numpy(), t, atol=1e-4)


# --- label relaxation: the credal set ----------------------------------------------------------


def two_class_logits(p_true, dtype=torch.float64):
    """Logits (N, 2) whose class 0 has the given probabilities, and the targets 0."""
    p = torch.tensor(p_true, dtype=torch.float64)
    z = torch.stack([p.log() - torch.log1p(-p), torch.zeros_like(p)], dim=1)
    return z.to(dtype), torch.zeros(len(p_true), dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4])
def test_relaxation_is_exactly_zero_inside_and_positive_outside(alpha, dtype):
    inside, y = two_class_logits([1 - alpha * s for s in (0.999, 0.5, 1e-3, 1e-9)], dtype)
    assert (label_relaxation_loss(inside, y, alpha=alpha, reduction="none") == 0).all()
    assert (gradient(label_relaxation_loss, inside, y, alpha=alpha) == 0).all()
    outside, y = two_class_logits([(1 - alpha) * s for s in (0.99, 0.5, 1e-3, 1e-9)], dtype)
    assert (label_relaxation_loss(outside, y, alpha=alpha, reduction="none") > 0).all()
    g = gradient(label_relaxation_loss, outside, y, alpha=alpha)
    assert (g[:, 0] < 0).all()
    assert (g[:, 1] > 0).all()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4])
def test_relaxation_and_its_gradient_are_continuous_at_the_border(alpha):
    step = 1e-5 * alpha
    z, y = two_class_logits([1 - alpha - step, 1 - alpha + step])
    values = label_relaxation_loss(z, y, alpha=alpha, reduction="none")
    # KL(1-α ‖ 1-α-step) = step² / (2α(1-α)) to leading order
    assert values[0].item() == pytest.approx(step**2 / (2 * alpha * (1 - alpha)), rel=1e-3)
    assert values[1] == 0
    assert gradient(label_relaxation_loss, z, y, alpha=alpha).abs().max() < 2 * step


def test_relaxation_finds_the_border_of_a_tiny_credal_set_in_float32():
    # 1 - 1e-9 is 1 in float32: comparing p_y with 1 - α would call all of these the same.
    z = torch.tensor([[19.0, 0.0], [22.0, 0.0]])  # 1 - p_y is 5.6e-9 and 2.8e-10
    y = torch.tensor([0, 0])
    g = gradient(label_relaxation_loss, z, y, alpha=1e-9, reduction="none")
    assert g[0, 1].item() == pytest.approx(5.6e-9 - 1e-9, rel=0.01)
    assert (g[1] == 0).all()


# --- limits and degenerate cases ---------------------------------------------------------------


def test_limits_that_are_exactly_cross_entropy():
    z, y, u = batch()
    ce = F.cross_entropy(z, y)
    g_ce = gradient(F.cross_entropy, z, y)
    for loss, args, setting in [
        (label_smoothing_loss, (), {"smoothing": 0.0}),
        (focal_loss, (), {"gamma": 0.0}),
        (confidence_penalty_loss, (), {"beta": 0.0}),
        (distillation_loss, (u,), {"alpha": 0.0}),
        (instance_based_smoothing_loss, (u,), {"smoothing": 0.0, "variant": "ils2"}),
        (instance_based_smoothing_loss, (u,), {"smoothing": 0.0, "variant": "class"}),
        (instance_based_smoothing_loss, (u,), {"smoothing": 0.0, "variant": "scores"}),
        (instance_based_smoothing_loss, (u,), {"slope": 0.0, "variant": "ils"}),
        (instance_based_smoothing_loss, (u,), {"cap": 0.0, "variant": "ils1"}),
    ]:
        torch.testing.assert_close(loss(z, y, *args, **setting), ce, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient(loss, z, y, *args, **setting), g_ce, rtol=0, atol=1e-14)


def test_relaxation_tends_to_cross_entropy():
    z, y, _ = batch()
    gaps = [
        abs(label_relaxation_loss(z, y, alpha=a).item() - F.cross_entropy(z, y).item())
        for a in (1e-2, 1e-4, 1e-6, 1e-8)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6


@pytest.mark.parametrize("variant", ["ils2", "ils"])
def test_infinite_temperature_shares_out_uniformly(variant):
    _, y, u = batch(classes=5)
    t = instance_based_targets(u, y, variant=variant, temperature=1e9)
    wrong = t.scatter(1, y[:, None], math.nan)
    wrong = wrong[~wrong.isnan()].view(-1, 4)
    torch.testing.assert_close(wrong, wrong.mean(1, keepdim=True).expand(-1, 4), rtol=1e-7, atol=0)
    true = t.gather(1, y[:, None])
    torch.testing.assert_close(
        true, instance_based_targets(u, y, variant=variant).gather(1, y[:, None])
    )


def test_low_temperature_gives_everything_to_the_best_wrong_class():
    u, y = torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([0])
    t = instance_based_targets(u, y, temperature=1e-3)
    torch.testing.assert_close(t, torch.tensor([[0.9, 0.0, 0.1]]))


@every_variant
def test_two_classes_leave_one_place_to_go(variant):
    _, y, u = batch(classes=2)
    t = instance_based_targets(u, y, variant=variant)
    given_up = [
        1 - expected_targets(b, int(k), variant)[k] for k, b in zip(y, u.numpy(), strict=True)
    ]
    np.testing.assert_allclose(t.gather(1, 1 - y[:, None]).squeeze(1).numpy(), given_up, atol=1e-12)


TEACHERS = {
    "random": [[0.3, -1.2, 2.0, 0.4]],
    "certain": [[200.0, 1.0, 3.0, 2.0]],
    "certain and wrong": [[0.0, 200.0, 3.0, 2.0]],
    "all equal": [[1.5, 1.5, 1.5, 1.5]],
    "all zero": [[0.0, 0.0, 0.0, 0.0]],
    "wrong classes equal": [[7.0, 1.0, 1.0, 1.0]],
    "huge": [[1e4, -1e4, -1e4, 1e4]],
    "huge and right": [[1e4, -1e4, -1e4, -1e4]],
    "huge and wrong": [[-1e4, 1e4, -1e4, -1e4]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS.keys())
@pytest.mark.parametrize("factor", FACTORS)
@every_variant
def test_targets_are_distributions(variant, factor, teacher, dtype):
    u, y = torch.tensor(teacher, dtype=dtype), torch.tensor([0])
    for temperature in (1.0, 0.1, 20.0):
        t = instance_based_targets(u, y, variant=variant, factor=factor, temperature=temperature)
        assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (t >= 0).all()
        assert t.double().sum().item() == pytest.approx(1, abs=3e-7)
        assert t[0, 0] >= 0.8 - 1e-6  # neither ε = 0.1 nor cap = 0.2 take more


def test_shares_of_a_teacher_that_is_certain():
    u, y = torch.tensor([[200.0, 1.0, 3.0, 2.0]]), torch.tensor([0])
    assert u.softmax(1)[0, 0] == 1  # what makes q_j / (1 - q_y) fail
    shares = softmax([1.0, 3.0, 2.0])
    t = instance_based_targets(u, y)[0].numpy()
    np.testing.assert_allclose(t, [0.9, *(0.1 * shares)], rtol=1e-6)
    # ils: 2·(1 - 0.8)² = 0.08
    t = instance_based_targets(u, y, variant="ils")[0].numpy()
    np.testing.assert_allclose(t, [0.92, *(0.08 * shares)], rtol=1e-6)


def test_scores_where_the_definition_divides_by_zero():
    y = torch.tensor([0])
    equal = instance_based_targets(torch.full((1, 4), 3.0), y, variant="scores")
    torch.testing.assert_close(equal, torch.tensor([[1 - 0.025, *[0.025 / 3] * 3]]))
    alone = instance_based_targets(torch.tensor([[7.0, 1.0, 1.0, 1.0]]), y, variant="scores")
    torch.testing.assert_close(alone, torch.tensor([[0.9, *[0.1 / 3] * 3]]))
    last = instance_based_targets(torch.tensor([[1.0, 7.0, 1.0, 2.0]]), y, variant="scores")
    torch.testing.assert_close(last, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_scores_do_not_depend_on_shift_or_scale():
    _, y, u = batch()
    t = instance_based_targets(u, y, variant="scores")
    for other in (u + 100, 1000 * u, 0.001 * u - 3):
        torch.testing.assert_close(instance_based_targets(other, y, variant="scores"), t)


def test_a_broken_teacher_is_not_hidden():
    u, y = torch.full((1, 3), math.nan), torch.tensor([0])
    for variant in ("ils2", "ils", "scores", "class"):
        assert instance_based_targets(u, y, variant=variant).isnan().any()


# --- class-based smoothing ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_averages_and_their_loss_equal_the_formula(temperature):
    z, y, u = batch(n=60, classes=4)
    ours = class_average_logits(u, y, temperature)
    q = np.array([softmax(row / temperature) for row in u.numpy()])
    mean_q = np.array([q[y.numpy() == k].mean(axis=0) for k in range(4)])
    assert ours.shape == (4, 4)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.exp().numpy(), mean_q, rtol=1e-5)

    t = 0.1 * mean_q / (1 - mean_q.diagonal()[:, None])
    np.fill_diagonal(t, 0.9)
    losses = instance_based_smoothing_loss(
        z, y, ours[y], variant="class", temperature=77.0, reduction="none"
    )
    theirs = [-(t[k] * np.log(softmax(a))).sum() for a, k in zip(z.numpy(), y, strict=True)]
    np.testing.assert_allclose(losses.numpy(), theirs, rtol=1e-5)


def test_class_averages_keep_what_probabilities_lose():
    # Both images of class 0 are so certain that their wrong probabilities are 0 in float64 too.
    u = torch.tensor([[1e4, 2.0, 1.0], [1e4, 2.0, 1.0], [0.0, 1e4, 0.0], [0.0, 0.0, 1e4]])
    averages = class_average_logits(u, torch.tensor([0, 0, 1, 2]))
    assert averages.isfinite().all()
    t = instance_based_targets(averages[:1], torch.tensor([0]), variant="class")
    np.testing.assert_allclose(t[0, 1:].numpy(), 0.1 * softmax([2.0, 1.0]), rtol=1e-3)


# --- numerics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_loss
def test_huge_logits_are_finite_in_value_and_gradient(loss, dtype):
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [-1e4, 0.0, 1.0]]
    pairs = [(a, b) for a in rows for b in rows]
    z = torch.tensor([a for a, _ in pairs], dtype=dtype)
    u = torch.tensor([b for _, b in pairs], dtype=dtype)
    for label in range(3):
        y = torch.full((len(pairs),), label)
        assert loss(z, y, u, reduction="none").isfinite().all()
        assert gradient(loss, z, y, u).isfinite().all()


def test_huge_logits_have_the_right_value():
    z, y = torch.tensor([[-1e4, 1e4]]), torch.tensor([0])
    assert cross_entropy_loss(z, y).item() == 2e4
    assert label_smoothing_loss(z, y).item() == pytest.approx(0.95 * 2e4)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert label_relaxation_loss(z, y).item() == pytest.approx(0.9 * 2e4 - entropy)
    assert focal_loss(z, y).item() == 2e4
    assert confidence_penalty_loss(z, y).item() == 2e4
    assert instance_based_smoothing_loss(z, y, -z).item() == pytest.approx(0.9 * 2e4)
    # at T = 20 the logits differ by 1000: T²·KL = 400·1000, and CE = 2e4
    assert distillation_loss(z, y, -z).item() == pytest.approx(0.9 * 400 * 1000 + 0.1 * 2e4)


def test_focal_gradient_is_finite_at_certainty():
    z, y = torch.tensor([[100.0, 0.0], [17.0, 0.0]]), torch.tensor([0, 0])
    for gamma in (0.01, 0.1, 0.5, 1.0):
        assert gradient(focal_loss, z, y, gamma=gamma).isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@every_loss
def test_half_precision_computes_in_float32(loss, half):
    z, y, u = batch(dtype=half)
    full = loss(z.float(), y, u.float(), reduction="none")
    ours = loss(z, y, u, reduction="none")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, full)
    assert gradient(loss, z, y, u).dtype == half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@every_loss
def test_autocast_changes_nothing(loss, dtype):
    z, y, u = batch(dtype=dtype)
    outside, g_outside = loss(z, y, u), gradient(loss, z, y, u)
    with torch.autocast("cpu", torch.bfloat16):
        inside, g_inside = loss(z, y, u), gradient(loss, z, y, u)
    assert inside.dtype == outside.dtype
    assert torch.equal(inside, outside)
    assert torch.equal(g_inside, g_outside)


@pytest.mark.parametrize("name", TAUGHT)
def test_teacher_precision_does_not_change_the_result_type(name):
    z, y, u = batch(dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert LOSSES[name](z, y, u.to(dtype)).dtype == torch.float32


@every_loss
def test_reductions_agree(loss):
    z, y, u = batch(n=7)
    each = loss(z, y, u, reduction="none")
    assert each.shape == (7,)
    torch.testing.assert_close(loss(z, y, u, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(z, y, u, reduction="mean"), each.sum() / 7)
    torch.testing.assert_close(loss(z, y, u), each.sum() / 7)


@every_loss
def test_inputs_are_left_alone(loss):
    z, y, u = batch(dtype=torch.float32)
    copies = z.clone(), y.clone(), u.clone()
    loss(z, y, u)
    assert all(torch.equal(a, b) for a, b in zip((z, y, u), copies, strict=True))


# --- errors ------------------------------------------------------------------------------------

Z, Y, U = batch(n=3, classes=4)

ERRORS = {
    "smoothing above 1": (lambda: label_smoothing_loss(Z, Y, smoothing=1.5), "1.5", "[0, 1]"),
    "smoothing below 0": (lambda: label_smoothing_loss(Z, Y, smoothing=-0.1), "-0.1", "[0, 1]"),
    "smoothing nan": (lambda: label_smoothing_loss(Z, Y, smoothing=math.nan), "nan", "[0, 1]"),
    "LR alpha 0": (lambda: label_relaxation_loss(Z, Y, alpha=0.0), "0.0", "(0, 1)"),
    "LR alpha 1": (lambda: label_relaxation_loss(Z, Y, alpha=1.0), "1.0", "(0, 1)"),
    "gamma": (lambda: focal_loss(Z, Y, gamma=-2.0), "-2.0", "[0, inf)"),
    "gamma infinite": (lambda: focal_loss(Z, Y, gamma=math.inf), "inf", "[0, inf)"),
    "beta": (lambda: confidence_penalty_loss(Z, Y, beta=-3.0), "-3.0", "[0, inf)"),
    "KD alpha": (lambda: distillation_loss(Z, Y, U, alpha=1.25), "1.25", "[0, 1]"),
    "KD temperature": (
        lambda: distillation_loss(Z, Y, U, temperature=0.0),
        "0.0",
        "(0, inf)",
    ),
    "ILS smoothing": (lambda: instance_based_targets(U, Y, smoothing=1.0), "1.0", "[0, 1)"),
    "ILS temperature": (
        lambda: instance_based_targets(U, Y, temperature=-4.0),
        "-4.0",
        "(0, inf)",
    ),
    "ILS cap": (lambda: instance_based_targets(U, Y, cap=1.0), "1.0", "[0, 1)"),
    "ILS slope": (lambda: instance_based_targets(U, Y, slope=-7.0), "-7.0", "[0, inf)"),
    "ILS shift": (lambda: instance_based_targets(U, Y, shift=1.75), "1.75", "[0, 1]"),
    "ILS variant": (
        lambda: instance_based_targets(U, Y, variant="ils3"),
        "'ils3'",
        "ils1, ils2, ils, scores, class",
    ),
    "ILS factor": (
        lambda: instance_based_smoothing_loss(Z, Y, U, factor="cubic"),
        "'cubic'",
        "quadratic, proportional, complementary",
    ),
    "one class": (lambda: cross_entropy_loss(Z[:, :1], Y), "(3, 1)", "K >= 2"),
    "flat logits": (lambda: focal_loss(Z[0], Y), "(4,)", "(N, K)"),
    "targets too short": (lambda: label_relaxation_loss(Z, Y[:2]), "(2,)", "(3,)"),
    "float targets": (lambda: cross_entropy_loss(Z, Y.double()), "float64", "torch.int64"),
    "teacher of other classes": (
        lambda: instance_based_smoothing_loss(Z, Y, U[:, :3]),
        "(3, 3)",
        "(3, 4)",
    ),
    "teacher of other images": (
        lambda: distillation_loss(Z, Y, U[:2]),
        "(2, 4)",
        "(3, 4)",
    ),
    "an array": (lambda: label_smoothing_loss(Z.numpy(), Y), "ndarray", "a tensor"),
    "labels in an array": (lambda: label_smoothing_loss(Z, Y.numpy()), "ndarray", "a tensor"),
    "a teacher in an array": (lambda: distillation_loss(Z, Y, U.numpy()), "ndarray", "a tensor"),
    "a teacher in a list": (
        lambda: instance_based_smoothing_loss(Z, Y, U.tolist()),
        "list",
        "a tensor",
    ),
    "targets of a teacher in an array": (
        lambda: instance_based_targets(U.numpy(), Y),
        "ndarray",
        "a tensor",
    ),
    "class averages of an array": (
        lambda: class_average_logits(U.numpy(), Y),
        "ndarray",
        "a tensor",
    ),
    "targets of another teacher": (lambda: instance_based_targets(U[:2], Y), "(3,)", "(2,)"),
    "class without images": (
        lambda: class_average_logits(U, torch.tensor([0, 1, 3])),
        "class 2",
        "1 or more",
    ),
    "class averages temperature": (
        lambda: class_average_logits(U, Y, temperature=0.0),
        "0.0",
        "(0, inf)",
    ),
}


@pytest.mark.parametrize(("call", "given", "accepted"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_was_given_and_what_is_accepted(call, given, accepted):
    with pytest.raises(ValueError, match=r"^\S.* is .*; accepted: .+$") as error:
        call()
    message = str(error.value)
    before, after = message.split("; accepted: ")
    assert given in before
    assert accepted in after
    assert "\n" not in message


@every_loss
def test_unknown_reduction(loss):
    with pytest.raises(
        ValueError, match="reduction is 'batchmean'; accepted: one of mean, sum, none"
    ):
        loss(Z, Y, U, reduction="batchmean")


@pytest.mark.cuda
@every_loss
def test_on_the_gpu_nothing_waits_for_the_device_and_values_agree(loss):
    z, y, u = batch(dtype=torch.float32)
    on_cpu, g_cpu = loss(z, y, u), gradient(loss, z, y, u)
    z, y, u = z.cuda().requires_grad_(), y.cuda(), u.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.float16):
            on_gpu = loss(z, y, u)
        on_gpu.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)
    torch.testing.assert_close(z.grad.cpu(), g_cpu)
