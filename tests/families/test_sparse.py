"""Sparsemax and entmax losses: margins, exponents between 1 and 2, and their limits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import xentjax

mpmath.mp.dps = 60
EPS = float(jnp.finfo(jnp.float32).eps)
LOSSES = {2.0: xentjax.sparsemax_loss, 1.5: xentjax.entmax_loss, 1.25: functools.partial(xentjax.entmax_loss, alpha=1.25)}


def two_classes(alpha, margin):
    """Loss and p of the second class, if the label leads by `margin`, with 60 digits: the root of p^(α−1) = (1−p)^(α−1) − (α−1)·margin."""
    a, d = mpmath.mpf(alpha), mpmath.mpf(float(margin))
    if (a - 1) * d >= 1:
        return 0.0, 0.0
    low, high = mpmath.mpf(0), mpmath.mpf(1)
    for _ in range(300):
        p = (low + high) / 2
        low, high = (p, high) if p ** (a - 1) < (1 - p) ** (a - 1) - (a - 1) * d else (low, p)
    entropy = (1 - p**a - (1 - p) ** a) / (a * (a - 1))
    return float(entropy - p * d), float(p)


@pytest.mark.parametrize("alpha", LOSSES)
def test_small_losses_keep_their_digits(alpha, quick_compilation):
    """Below the margin 1/(α − 1) by h, p is of size h^β. h is exact for these margins, so the relative errors are a few β·eps."""
    edge = 1 / (alpha - 1)
    margins = np.array([edge - 2.0**-12, edge - 2.0**-7, edge - 0.25, 0.25, 0.0, -0.5, -3 * edge, edge, 2 * edge, 1e4], np.float32)
    logits = jnp.stack([jnp.asarray(margins), jnp.zeros(len(margins))], -1)

    def both(labels):
        value, pull = jax.vjp(lambda z: LOSSES[alpha](z, labels), logits)
        return value, pull(jnp.ones_like(value))[0]

    of_index, of_row = jax.jit(both)(jnp.zeros(len(margins), jnp.int32)), jax.jit(both)(jnp.tile(jnp.eye(2)[0], (len(margins), 1)))
    value, p = np.transpose([two_classes(alpha, d) for d in margins])
    for found, slope in (of_index, of_row):
        np.testing.assert_allclose(found, value, rtol=20 * edge * EPS)
        np.testing.assert_allclose(slope, np.stack([-p, p], -1), rtol=10 * edge * EPS)
    assert np.all(of_index[0][7:] == 0) and np.all(of_index[1][7:] == 0)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.75])
def test_the_conditions_of_the_maximum(alpha, rng, quick_compilation):
    """Off the support no class has a larger marginal than on it: z_k + H'(p_k) is one number on the support, and more than z_k off it."""
    logits = jnp.asarray(rng.normal(size=(4, 50)) * 3, jnp.float32)
    soft = jnp.asarray(rng.dirichlet(np.ones(50), 4), jnp.float32)
    loss = functools.partial(xentjax.entmax_loss, alpha=alpha)
    slope = jax.grad(lambda z: loss(z, jnp.zeros(4, jnp.int32)).sum())(logits)  # p, minus 1 at class 0
    p, z, t = (np.asarray(x, np.float64) for x in (jnp.maximum(slope.at[:, 0].add(1), 0), logits, soft))
    a = alpha
    np.testing.assert_allclose(p.sum(-1), 1, rtol=20 * EPS / (a - 1))
    marginal = (z - p ** (a - 1) / (a - 1))[:, 1:]
    for row, inside in zip(marginal, p[:, 1:] > 0, strict=True):
        assert np.ptp(row[inside]) < 100 * EPS / (a - 1)
        assert np.all(row[~inside] <= row[inside].max() + 100 * EPS / (a - 1))

    def entropy(x):
        return np.sum(x - x**a, -1) / (a * (a - 1))

    np.testing.assert_allclose(loss(logits, soft), np.sum((p - t) * z, -1) + entropy(p) - entropy(t), rtol=100 * EPS / (a - 1))


def test_one_is_softmax_and_two_is_sparsemax(rng, quick_compilation):
    z, y = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.array([0, 1, 2, 3, 0])
    np.testing.assert_array_equal(xentjax.entmax_loss(z, y, alpha=2.0), xentjax.sparsemax_loss(z, y))
    near, limit = xentjax.entmax_loss(z, y, alpha=1.0 + 2.0**-7), xentjax.softmax_cross_entropy(z, y)
    np.testing.assert_allclose(near, limit, rtol=0.05)  # of first order in α − 1
    for alpha, message in (
        (1, "above 1; got 1. Use xentjax.softmax_cross_entropy"),
        (1.0, "above 1; got 1. Use xentjax.softmax_cross_entropy"),
        (0.5, r"in \(1, 2\]; got 0.5"),
        (2.5, r"in \(1, 2\]; got 2.5"),
    ):
        with pytest.raises(ValueError, match=f"entmax_loss: alpha must be .*{message}"):
            xentjax.entmax_loss(z, y, alpha=alpha)


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.25])
def test_hard_rows_need_no_more_steps_than_there_are(alpha):
    """Newton's method drops few classes in each step if the logits fall geometrically."""
    z = -jnp.asarray(np.concatenate([2.0 ** -np.arange(23), np.linspace(0, 1, 1000), 3 * np.ones(9000)]), jnp.float32)
    p = jax.grad(functools.partial(xentjax.entmax_loss, alpha=alpha))(z, jnp.array(5)).at[5].add(1)
    np.testing.assert_allclose(np.sum(np.float64(p)), 1, rtol=100 * EPS)


@pytest.mark.parametrize("alpha", [1.05, 1.1, 1.2, 1.25, 1.3, 1.4, 1.5, 1.7])
def test_two_equal_largest_logits(alpha, quick_compilation):
    """Both probabilities are 1/2, and may be rounded upwards: the row of a label costs what its index costs."""
    loss = jax.value_and_grad(lambda z, labels: xentjax.entmax_loss(z, labels, alpha=alpha).sum())
    (value, slope), (of_row, slope_of_row) = (loss(jnp.zeros((1, 2)), labels) for labels in (jnp.array([0]), jnp.array([[1.0, 0.0]])))
    np.testing.assert_allclose(of_row, value, rtol=64 * EPS)  # of α = 1.05, whose probabilities are powers of 20
    np.testing.assert_allclose(slope_of_row, slope, rtol=64 * EPS)
