"""What holds of the losses for any logits, any number of classes and any precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.losses import (
    BY_TRUE_CLASS,
    FACTORS,
    VARIANTS,
    class_average_logits,
    confidence_penalty_loss,
    cross_entropy_loss,
    distillation_loss,
    focal_loss,
    instance_based_smoothing_loss,
    instance_based_targets,
    label_relaxation_loss,
    label_smoothing_loss,
)

LOSSES = {
    "cross_entropy": lambda z, y, u, h, **kw: cross_entropy_loss(z, y, **kw),
    "smoothing": lambda z, y, u, h, **kw: label_smoothing_loss(z, y, smoothing=h, **kw),
    "relaxation": lambda z, y, u, h, **kw: label_relaxation_loss(z, y, alpha=h, **kw),
    "focal": lambda z, y, u, h, **kw: focal_loss(z, y, gamma=5 * h, **kw),
    "penalty": lambda z, y, u, h, **kw: confidence_penalty_loss(z, y, beta=5 * h, **kw),
    "distillation": lambda z, y, u, h, **kw: distillation_loss(
        z, y, u, alpha=h, temperature=5 * h, **kw
    ),
}
for _variant in VARIANTS:
    LOSSES[_variant] = lambda z, y, u, h, variant=_variant, **kw: instance_based_smoothing_loss(
        z, y, u, variant=variant, smoothing=h, **kw
    )

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_variant = pytest.mark.parametrize("variant", VARIANTS)
examples = settings(max_examples=30)
hyper = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31)


# What a batch is made from, so that a failing example is one short line.
batches = st.fixed_dictionaries(
    {
        "classes": st.one_of(st.integers(2, 12), st.integers(2, 1000)),
        "n": st.integers(1, 6),
        "step": st.sampled_from([0.0, 1 / 64, 1 / 8, 1.0, 64.0]),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        "seed": seeds,
        "certain": st.booleans(),
    }
)


def make(classes, n, step, dtype, seed, certain):
    """(logits, targets, teacher logits) on a grid that bfloat16 and float16 hold exactly.

    Integers of at most 127 times a power of two: adding a constant of the same grid rounds
    nothing, so invariances can be tested without excusing the input's own rounding.
    """
    g = torch.Generator().manual_seed(seed)
    z, u = step * torch.randint(-127, 128, (2, n, classes), generator=g).double()
    y = torch.randint(classes, (n,), generator=g)
    if certain:  # and right, student and teacher
        z.scatter_(1, y[:, None], 127 * step)
        u.scatter_(1, y[:, None], 127 * step)
    return z.to(dtype), y, u.to(dtype)


def tolerance(z, step):
    """Rounding of sums of terms of the size of the logits, or of T²·log K, here at most 173."""
    eps = torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps
    return {"rtol": 200 * eps, "atol": 200 * eps * (1 + 127 * step)}


@every_loss
@examples
@given(batches, hyper, st.integers(-127, 127), st.integers(-127, 127))
def test_a_constant_added_to_the_logits_changes_nothing(loss, b, h, c, d):
    z, y, u = make(**b)
    moved = loss(z + c * b["step"], y, u + d * b["step"], h, reduction="none")
    torch.testing.assert_close(moved, loss(z, y, u, h, reduction="none"), **tolerance(z, b["step"]))


@every_loss
@examples
@given(batches, hyper, seeds)
def test_the_names_of_the_classes_do_not_matter(loss, b, h, seed):
    z, y, u = make(**b)
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(seed))
    renamed = loss(z[:, order], torch.argsort(order)[y], u[:, order], h, reduction="none")
    torch.testing.assert_close(
        renamed, loss(z, y, u, h, reduction="none"), **tolerance(z, b["step"])
    )


@every_loss
@examples
@given(batches, hyper)
def test_losses_are_finite_not_negative_and_reduce_consistently(loss, b, h):
    z, y, u = make(**b)
    each = loss(z, y, u, h, reduction="none")
    assert each.shape == y.shape
    assert each.isfinite().all()
    if loss is LOSSES["penalty"]:
        floor = -5 * h * torch.log(torch.tensor(z.shape[1], dtype=torch.float64))
    else:
        floor = 0.0
    assert (each.double() >= floor - tolerance(z, b["step"])["atol"]).all()
    torch.testing.assert_close(loss(z, y, u, h, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(z, y, u, h, reduction="mean"), each.sum() / len(y))


@every_loss
@examples
@given(batches, hyper)
def test_gradients_are_finite_and_sum_to_zero(loss, b, h):
    # A constant added to the logits changes nothing, hence no gradient in that direction.
    z, y, u = make(**b)
    z = z.to(torch.promote_types(z.dtype, torch.float32)).requires_grad_()
    each = loss(z, y, u, h, reduction="none")
    (g,) = torch.autograd.grad(each.sum(), z)
    assert g.isfinite().all()
    # The focal loss rounds γ·log p_y times differences of probabilities, hence the loss here.
    size = 1 + g.abs().sum(1) + 5 * each.detach().abs()
    assert (g.sum(1).abs() <= 50 * torch.finfo(z.dtype).eps * size).all()


@every_variant
@examples
@given(
    batches,
    st.floats(0, 0.99),
    st.floats(1e-2, 1e6),
    st.sampled_from(FACTORS),
    st.floats(0, 1),
    st.floats(0, 100),
    st.floats(0, 0.99),
)
def test_targets_are_distributions(variant, b, smoothing, temperature, factor, shift, slope, cap):
    _, y, u = make(**b)
    t = instance_based_targets(
        u,
        y,
        variant=variant,
        smoothing=smoothing,
        temperature=temperature,
        factor=factor,
        shift=shift,
        slope=slope,
        cap=cap,
    )
    assert t.shape == u.shape
    assert (t >= 0).all()
    eps = torch.finfo(t.dtype).eps
    torch.testing.assert_close(
        t.double().sum(1), torch.ones(len(y), dtype=torch.float64), rtol=0, atol=8 * eps
    )
    # Nothing gives up more than its own limit.
    limit = cap if variant in BY_TRUE_CLASS and factor == "quadratic" else smoothing
    assert (1 - t.gather(1, y[:, None]) <= limit + 2 * eps).all()


@examples
@given(batches, st.floats(1e-2, 1e3))
def test_ils2_orders_the_wrong_classes_as_the_teacher_does(b, temperature):
    _, y, u = make(**b)
    t = instance_based_targets(u, y, temperature=temperature).scatter(1, y[:, None], -1.0)
    by_teacher = u.double().scatter(1, y[:, None], -torch.inf).argsort(dim=1)
    assert (t.gather(1, by_teacher).diff(dim=1) >= 0).all()


@examples
@given(st.integers(2, 20), seeds, st.sampled_from([0.0, 1.0, 100.0, 1e4]), st.floats(0.1, 100))
def test_class_averages_are_log_distributions_within_the_range_of_their_class(
    classes, seed, scale, temperature
):
    g = torch.Generator().manual_seed(seed)
    u = scale * (2 * torch.rand(3 * classes, classes, generator=g) - 1)
    y = torch.arange(classes).repeat(3)
    averages = class_average_logits(u, y, temperature)
    assert averages.isfinite().all()
    torch.testing.assert_close(averages.exp().sum(1), torch.ones(classes))
    log_q = torch.log_softmax(u.double() / temperature, dim=1).view(3, classes, classes)
    slack = 1e-6 * (1 + log_q.abs().amax(0))
    assert (averages <= log_q.amax(0) + slack).all()
    assert (averages >= log_q.amin(0) - slack).all()
