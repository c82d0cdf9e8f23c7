"""Likelihoods and ordinal losses beyond the common battery: 60 digits at the extremes, sums to 1, bad labels, errors, torch."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats

import xentjax
from tests.drawing import examples
from xentjax._losses.likelihood import gaussian_nll, laplace_nll, mixture_of_logistics_nll, poisson_nll
from xentjax._losses.ordinal import coral_loss, cumulative_link_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

mpmath.mp.dps = 60
EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 20 * EPS  # a few roundings and exponentials of arguments up to 10
number = np.vectorize(lambda x: mpmath.mpf(float(x)), otypes=[object])
each_extreme = pytest.mark.parametrize("size", [-80.0, -30.0, 0.0, 30.0, 80.0])


def derivatives(function, *x):
    """Value, gradient and Hessian diagonal in every argument of a scalar function."""
    positions = tuple(range(len(x)))
    second = [jax.grad(jax.grad(function, i), i)(*x) for i in positions]
    return float(function(*x)), [float(g) for g in jax.grad(function, positions)(*x)], [float(h) for h in second]


@each_extreme
@pytest.mark.parametrize("sigmas", [0.0, 0.5, 3.0])
def test_gaussian_at_any_variance(size, sigmas):
    residual = np.float32(sigmas * np.exp(size / 2))
    value, slope, curve = derivatives(lambda mean, s: gaussian_nll(mean, jnp.float32(residual), log_variance=s), 0.0, size)
    r, s = mpmath.mpf(float(residual)), mpmath.mpf(size)
    square = r**2 * mpmath.exp(-s)
    scale = abs(s) + 3
    assert abs(value - float((square + s + mpmath.log(2 * mpmath.pi)) / 2)) <= 4 * EPS * float(scale + square)
    np.testing.assert_allclose(slope, [float(-r * mpmath.exp(-s)), float((1 - square) / 2)], rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(curve, [float(mpmath.exp(-s)), float(square / 2)], rtol=RTOL, atol=1e-37)
    np.testing.assert_allclose(gaussian_nll(0.0, residual, variance=np.exp(size)), value, rtol=RTOL, atol=RTOL)


@each_extreme
def test_laplace_at_any_scale_and_at_its_kink(size):
    for residual in (0.0, 2 * np.exp(size)):
        value, slope, _ = derivatives(lambda mean, s, r=residual: laplace_nll(mean, jnp.float32(r), log_scale=s), 0.0, size)
        ratio = residual * np.exp(-size)
        np.testing.assert_allclose(value, ratio + size + np.log(2), rtol=RTOL, atol=RTOL)
        np.testing.assert_allclose(slope, [-np.sign(residual) * np.exp(-size), 1 - ratio], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("shift", [0.0, 1e-3, -0.1, 2.0, -40.0])
def test_counts_keep_their_digits(shift):
    k = np.float32([0, 1, 2, 3, 5, 9, 10, 11, 100, 1e4, 1e6, 16777216])
    rate = np.float32(np.log(np.maximum(k, 1)) + shift)
    a, n = number(rate), number(k)
    exact = np.vectorize(lambda a, n: mpmath.exp(a) - n * a + mpmath.loggamma(n + 1), otypes=[object])(a, n)
    slope = np.vectorize(lambda a, n: mpmath.exp(a) - n, otypes=[object])(a, n)
    # one rounding of λ − log k costs its size times the slope
    allowed = 8 * EPS * np.float64([float(abs(v) + abs(s) * (abs(x) + 1)) for v, s, x in zip(exact, slope, a, strict=True)])
    assert (np.abs(np.asarray(poisson_nll(rate, k), np.float64) - exact.astype(float)) <= allowed).all()
    found = jax.grad(lambda x: poisson_nll(x, k).sum())(jnp.asarray(rate))
    assert (np.abs(np.asarray(found, np.float64) - slope.astype(float)) <= 4 * EPS * (np.exp(np.float64(rate)) + k)).all()


def test_counts_at_the_ends():
    rate, k = jnp.array([-jnp.inf, -jnp.inf, 0.0, 0.0, 60.0]), jnp.array([0.0, 3.0, -1.0, jnp.nan, 0.0])
    np.testing.assert_allclose(poisson_nll(rate, k), [0, np.inf, np.nan, np.nan, np.exp(60.0)], rtol=RTOL)
    slope, towards_k = jax.grad(lambda *x: poisson_nll(*x).sum(), (0, 1))(rate, k)
    np.testing.assert_allclose(slope, [0, -3, np.nan, np.nan, np.exp(60.0)], rtol=RTOL)
    assert np.isnan(towards_k[2:4]).all()
    np.testing.assert_allclose(poisson_nll(jnp.full(50, 2.0), jnp.arange(50)), -scipy.stats.poisson.logpmf(range(50), np.exp(2)), rtol=RTOL)


def surprise_of_interval(below, above):
    """−log(σ(above) − σ(below)) and the two tails σ(−above), σ(below); the difference is taken between the smaller tails."""
    with mpmath.workdps(1000):
        tail = [mpmath.mpf(0) if mpmath.isinf(x) else 1 / (1 + mpmath.exp(x)) for x in (above, -below)]
        if below > 0:
            upper = mpmath.mpf(1) if mpmath.isinf(below) else 1 / (1 + mpmath.exp(below))
            return -mpmath.log(upper - tail[0]), *tail
        lower = mpmath.mpf(1) if mpmath.isinf(above) else 1 / (1 + mpmath.exp(-above))
        return -mpmath.log(lower - tail[1]), *tail


THRESHOLDS = [[-1, 1], [0, 1e-6], [3, 3.0000002], [-80, 80], [0, 1e-30], [50, 90], [-1000, 1000]]


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_classes_between_thresholds(thresholds):
    theta = np.float32(thresholds)
    scores = np.float32(np.repeat([0, 1, -1, 3, 20, -20, 90, -90, 1000, -1000], 3))
    labels = np.tile(np.arange(3), 10)
    run = functools.partial(cumulative_link_loss, labels=labels)
    value = run(scores, thresholds=theta)
    slope, towards = jax.grad(lambda s, t: run(s, thresholds=t).sum(), (0, 1))(jnp.asarray(scores), jnp.asarray(theta))
    ends = [-mpmath.inf, *number(theta), mpmath.inf]
    total = np.zeros(2)
    for i, (s, y) in enumerate(zip(number(scores), labels, strict=True)):
        exact, above, below = surprise_of_interval(ends[y] - s, ends[y + 1] - s)
        tiny = float(jnp.finfo(jnp.float32).tiny)
        # an exponential of x has x roundings
        assert abs(float(exact) - float(value[i])) <= 16 * EPS * float(exact) * 6 + tiny, (s, y)
        assert abs(float(above - below) - float(slope[i])) <= 100 * EPS * float(max(above, below)) + tiny, (s, y)
        inner = 1 / mpmath.expm1(ends[2] - ends[1]) if y == 1 else 0
        total += [float(v) for v in ((-above, 0), (below - 0 + inner, -above - inner), (0, below))[y]]
    np.testing.assert_allclose(towards, total, rtol=100 * EPS)


def test_every_derivative_at_any_width():
    """Thresholds that meet and part, far from the score: differences would be 0/0 there."""

    def loss(s, low, gap):
        return cumulative_link_loss(s, jnp.array(1), thresholds=jnp.stack([low, low + gap]))

    for s in (0.0, -200.0, 200.0):
        for gap in (1e-6, 1.0, 100.0, 1e30):
            value, slope, curve = derivatives(loss, s, 0.0, gap)
            assert np.isfinite([value, *slope, *curve]).all()


@examples(50)
@hypothesis.given(st.floats(-30, 30), st.lists(st.floats(-20, 20), min_size=4, max_size=4, unique=True))
def test_ordered_classes_sum_to_one(score, thresholds):
    theta = np.sort(np.float32(thresholds))
    hypothesis.assume((np.diff(theta) > 1e-3).all())
    loss = cumulative_link_loss(jnp.full(5, score), jnp.arange(5), thresholds=theta)
    np.testing.assert_allclose(jnp.exp(-loss).sum(), 1, rtol=200 * EPS)  # surprises of 50 and more


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_labels_that_are_no_class(dtype):
    labels = jnp.array([0, 3, 4, 200, 1], jnp.int32).astype(dtype)  # 200 is −56 in int8
    bad = np.array([False, False, True, True, False])
    logits, scores, theta = jnp.ones((5, 3)), jnp.ones(5), jnp.arange(3.0)
    for run, x in ((lambda z: coral_loss(z, labels), logits), (lambda s: cumulative_link_loss(s, labels, thresholds=theta), scores)):
        np.testing.assert_array_equal(jnp.isnan(run(x)), bad)
        slope = jax.grad(lambda x, run=run: run(x).sum())(x)
        np.testing.assert_array_equal(jnp.isnan(slope).reshape(5, -1).all(-1), bad)
        assert np.isfinite(slope[~bad]).all()
    with pytest.raises(ValueError, match=re.escape("coral_loss: labels[2] = 4 is outside [0, 4).")):
        xentjax.checked(coral_loss)(logits, labels)
    with pytest.raises(ValueError, match=re.escape("cumulative_link_loss: labels[2] = 4 is outside [0, 4).")):
        xentjax.checked(cumulative_link_loss)(scores, labels, thresholds=theta)
    xentjax.checked(coral_loss)(logits, labels, where=~bad)


def test_infinite_logits():
    np.testing.assert_allclose(coral_loss(jnp.array([jnp.inf, 0.0, -jnp.inf]), jnp.array(1)), np.log(2), rtol=RTOL)
    assert coral_loss(jnp.array([0.0, -jnp.inf]), jnp.array(2)) == jnp.inf
    assert cumulative_link_loss(jnp.inf, jnp.array(0), thresholds=jnp.zeros(1)) == jnp.inf
    assert cumulative_link_loss(jnp.inf, jnp.array(1), thresholds=jnp.zeros(1)) == 0


def mixture(logits, x, means, log_scales, levels):
    """The definition with enough digits for any tail."""
    half = mpmath.mpf(1) / (levels - 1)
    weights = [mpmath.exp(z) for z in number(logits)]
    total = mpmath.mpf(0)
    for w, mu, s in zip(weights, number(means), number(log_scales), strict=True):
        below, above = ((mpmath.mpf(float(x)) + sign * half - mu) * mpmath.exp(-s) for sign in (-1, 1))
        below, above = -mpmath.inf if x == -1 else below, mpmath.inf if x == 1 else above
        total += w * mpmath.exp(-surprise_of_interval(below, above)[0])
    return -mpmath.log(total / mpmath.fsum(weights))


@pytest.mark.parametrize("size", [-40.0, -12.0, -7.0, -2.0, 0.0, 10.0, 40.0])
def test_levels_far_from_every_component(size):
    """In the cell, beside it, in tails of 1e17 widths, under scales of e^40; single exact points of the grid."""
    logits, means, log_scales = np.float32([0.3, -0.5]), np.float32([0.0, 0.25]), np.float32([size, size - 0.5])
    run = functools.partial(mixture_of_logistics_nll, logits, means=means, log_scales=log_scales, levels=129)
    for x in (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0):
        exact = float(mixture(logits, x, means, log_scales, 129))
        # arguments of e are rounded, and what is left of 1 − p is relative to itself
        np.testing.assert_allclose(float(run(targets=jnp.float32(x))), exact, rtol=40 * EPS)
        np.testing.assert_array_equal(run(targets=jnp.array(round((x + 1) * 64))), run(targets=jnp.float32(x)))


def test_values_beyond_the_ends_belong_to_the_end_levels():
    """All levels lie on one side of the end levels' inner borders, so their losses are −log σ."""
    run = functools.partial(mixture_of_logistics_nll, jnp.zeros(1), means=jnp.zeros(1), log_scales=jnp.full(1, -2.0), levels=5)
    slope = jax.jit(jax.value_and_grad(lambda x: run(targets=x)))
    expected = np.log1p(np.exp(0.75 * np.exp(2.0)))  # the border is half a step of 1/2 inside
    for x in (1.0, 1.25, 2.0, 1e30, np.inf):
        for sign in (-1, 1):
            value, derivative = slope(jnp.float32(sign * x))
            np.testing.assert_allclose(value, expected, rtol=8 * EPS)
            assert x == 1 or derivative == 0
    assert np.isnan(run(targets=jnp.float32(np.nan)))


def test_a_certain_level_keeps_its_surprise():
    """The true level's own tails: 1 − p is 1e-12, where log Σ π p rounds to 0."""
    loss = mixture_of_logistics_nll(
        jnp.zeros(2), jnp.array(64), means=jnp.zeros(2), log_scales=jnp.full(2, np.log(1 / 128 / 28)), levels=129
    )
    np.testing.assert_allclose(loss, 2 / (1 + np.exp(28.0)), rtol=60 * EPS)


@pytest.mark.parametrize(("levels", "low", "high"), [(2, -1.0, 1.0), (16, 0.0, 1.0), (256, -1.0, 1.0), (256, 0.0, 255.0)])
def test_levels_sum_to_one(levels, low, high, rng, x64):
    z, means, log_scales = rng.normal(size=(3, 5)), low + (high - low) * rng.uniform(-0.2, 1.2, (3, 5)), rng.normal(size=(3, 5)) - 3
    log_scales += np.log((high - low) / 2)
    every = [jnp.broadcast_to(x, (levels, *x.shape)) for x in (z, means, log_scales)]
    index = jnp.broadcast_to(jnp.arange(levels)[:, None], (levels, 3))
    values = low + (high - low) / (levels - 1) * index.astype(float)
    for targets in (index, values):
        loss = mixture_of_logistics_nll(every[0], targets, means=every[1], log_scales=every[2], levels=levels, low=low, high=high)
        np.testing.assert_allclose(jnp.exp(-loss).sum(0), np.ones(3), rtol=1e-11)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [-80.0, -30.0, 0.0, 30.0, 80.0])
def test_derivatives_of_a_mixture_are_finite(size):
    def loss(z, mu, s, x):
        return mixture_of_logistics_nll(jnp.stack([z, -z]), x, means=jnp.stack([mu, -mu]), log_scales=jnp.stack([s, s + 1]))

    for x in (-1.0, -0.2, 0.1, 1.0):
        first = jax.grad(loss, (0, 1, 2))(0.4, 0.3, size, jnp.float32(x))
        second = jax.hessian(loss, (0, 1, 2))(0.4, 0.3, size, jnp.float32(x))
        assert np.isfinite(jax.tree.leaves((first, second))).all()


def test_levels_that_are_none_and_components_that_are_impossible():
    parameters = {"means": jnp.zeros((4, 2)), "log_scales": jnp.zeros((4, 2)), "levels": 8}
    z = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, -jnp.inf], [-jnp.inf, -jnp.inf]])
    loss, slope = jax.value_and_grad(lambda z: mixture_of_logistics_nll(z, jnp.array([3, 8, 3, 3]), **parameters).sum())(z)
    found = mixture_of_logistics_nll(z, jnp.array([3, 8, 3, 3]), **parameters)
    np.testing.assert_array_equal(np.isnan(found), [False, True, False, False])
    np.testing.assert_allclose(found[2], found[0], rtol=RTOL)  # equal components
    assert found[3] == jnp.inf and np.isnan(slope[1]).all() and not slope[3].any() and np.isfinite(slope[2]).all() and np.isnan(loss)


def test_equal_to_torch(rng):
    torch = pytest.importorskip("torch")
    mean, x, spread = rng.normal(size=(3, 20)).astype(np.float32)
    t = torch.nn.functional
    expected = t.gaussian_nll_loss(*map(torch.tensor, (mean, x, np.exp(spread))), full=True, reduction="none")
    np.testing.assert_allclose(gaussian_nll(mean, x, log_variance=spread), expected.numpy(), rtol=RTOL, atol=RTOL)
    counts = rng.integers(0, 20, 20).astype(np.float32)
    partial = t.poisson_nll_loss(torch.tensor(mean), torch.tensor(counts), log_input=True, full=False, reduction="none").numpy()
    np.testing.assert_allclose(poisson_nll(mean, counts), partial + torch.lgamma(torch.tensor(counts) + 1).numpy(), rtol=RTOL, atol=RTOL)


M = jnp.zeros((2, 3))
NEED = "exactly one of variance and log_variance must be given; got"
ERRORS = [
    (gaussian_nll, (M, M), {}, ValueError, f"gaussian_nll: {NEED} neither. Use variance=1.0 for a constant."),
    (gaussian_nll, (M, M), {"variance": 1.0, "log_variance": M}, ValueError, f"gaussian_nll: {NEED} both."),
    (gaussian_nll, (M, M), {"variance": 0.0}, ValueError, "gaussian_nll: variance must be above 0; got 0."),
    (laplace_nll, (M, M), {"scale": -1}, ValueError, "laplace_nll: scale must be a finite number at least 0; got -1."),
    (
        gaussian_nll,
        (M, M),
        {"variance": M[0]},
        ValueError,
        "variance must have shape (2, 3), the shape of mean; got (3,). Use jnp.broadcast",
    ),
    (gaussian_nll, (M, M[:, :1]), {"variance": 1.0}, ValueError, "targets must have shape (2, 3), the shape of mean; got (2, 1)."),
    (gaussian_nll, (M, M), {"variance": 1.0, "where": M}, TypeError, "where must have dtype bool; got float32. Use where != 0."),
    (gaussian_nll, (M.astype(int), M), {"variance": 1.0}, TypeError, "mean must have a floating dtype; got int32."),
    (poisson_nll, (M, M == 0), {}, TypeError, "poisson_nll: targets must have a floating dtype; got bool."),
    (coral_loss, (M, M[:, 0]), {}, TypeError, "coral_loss: labels must have an integer dtype; got float32. Use labels.astype(jnp.int32)."),
    (coral_loss, (M[:, :0], jnp.arange(2)), {}, ValueError, "coral_loss: logits must have at least one threshold on the last axis"),
    (coral_loss, (M, jnp.arange(3)), {}, ValueError, "labels must have shape (2,), the shape of logits without its threshold axis"),
    (cumulative_link_loss, (M, M.astype(int)), {"thresholds": M}, ValueError, "thresholds must have shape (classes - 1,), at least one"),
    (
        mixture_of_logistics_nll,
        (M, M[:, 0]),
        {"means": M, "log_scales": M[0]},
        ValueError,
        "log_scales must have shape (2, 3), the shape of",
    ),
    (mixture_of_logistics_nll, (M, M), {"means": M, "log_scales": M}, ValueError, "without its component axis; got (2, 3)."),
    (mixture_of_logistics_nll, (M, M[:, 0]), {"means": M, "log_scales": M, "levels": 1}, ValueError, "levels must be at least 2"),
]


@pytest.mark.parametrize(("function", "arguments", "keywords", "error", "message"), ERRORS, ids=lambda x: None)
def test_errors(function, arguments, keywords, error, message):
    for call in (function, lambda *x, **k: jax.jit(lambda *x: function(*x, **k))(*x)):
        with pytest.raises(error, match=re.escape(message)):
            call(*arguments, **keywords)
