"""Losses of boxes beyond the common battery: the point where the quality is right, bins at the ends, bad targets, devices."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import table_regions as table

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = float(jnp.finfo(jnp.float32).eps)
mpmath.mp.dps = 60


def quality(z, y, beta):
    """The definition with 60 digits."""
    p = 1 / (1 + mpmath.exp(-z))
    return abs(y - p) ** beta * -(y * mpmath.log(p) + (1 - y) * mpmath.log(1 - p))


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.5])
def test_quality_at_any_distance(beta):
    """Values, gradients and second derivatives for labels inside (0, 1), at margins and next to the right quality."""
    labels = np.array([1e-6, 0.25, 0.5, 0.9, 1 - 1e-6], np.float32)
    right = np.log(labels / (1 - labels))
    z = np.concatenate([right + d for d in (-60, -3, -1e-3, 1e-2, 2, 60)]).astype(np.float32)
    y = np.tile(labels, 6)

    @jax.jit
    def everything(z):
        def slope(z):
            return jax.grad(lambda z: xentjax.quality_focal_loss(z, y, beta=beta).sum())(z)

        return xentjax.quality_focal_loss(z, y, beta=beta), *jax.jvp(slope, (z,), (jnp.ones_like(z),))

    found = [np.asarray(x, np.float64) for x in everything(jnp.asarray(z))]
    for i, (logit, label) in enumerate(zip(z, y, strict=True)):
        run = functools.partial(quality, y=mpmath.mpf(float(label)), beta=mpmath.mpf(beta))
        exact = [float(mpmath.diff(run, mpmath.mpf(float(logit)), n)) for n in range(3)]
        distance = abs(float(logit) - float(mpmath.log(mpmath.mpf(float(label)) / (1 - mpmath.mpf(float(label))))))
        # the logarithm of the odds of the label has an error of its own size, next to the distance from it; a power multiplies it
        allowed = 4 * EPS * (8 + abs(float(logit)) + (1 + beta) * 16 / min(distance, 1))
        for order in range(3):
            scale = abs(exact[order]) if order < 2 else abs(exact[2]) + abs(exact[1]) + abs(exact[0])
            assert abs(found[order][i] - exact[order]) <= allowed * scale + 1e-37, (order, logit, label)


def test_the_right_quality():
    """At p = y = 1/2, the loss and its gradient are 0, and the second derivative is that of d²·log 2 with d = z/4."""

    def loss(z):
        return xentjax.quality_focal_loss(z, jnp.float32(0.5))

    assert loss(0.0) == 0 and jax.grad(loss)(0.0) == 0
    np.testing.assert_allclose(jax.hessian(loss)(0.0), 2 * np.log(2) / 16, rtol=8 * EPS)


def test_quality_of_certain_boxes_is_the_focal_loss(rng):
    z, y = jnp.asarray(rng.normal(size=40) * 20, jnp.float32), jnp.asarray(rng.integers(0, 2, 40))
    for beta in (0.0, 0.5, 2.0):
        ours, theirs = (
            jax.value_and_grad(lambda z, f=f: f(z).sum())(z)
            for f in (
                lambda z, beta=beta: xentjax.quality_focal_loss(z, y, beta=beta),
                lambda z, beta=beta: xentjax.sigmoid_focal_loss(z, y, gamma=beta),
            )
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=8 * EPS), ours, theirs)


@pytest.mark.parametrize("loss", [xentjax.quality_focal_loss, xentjax.varifocal_loss], ids=lambda f: f.__name__)
def test_derivatives_by_the_label(loss, x64):
    z, y, step = jnp.linspace(-3, 3, 8), jnp.linspace(0.1, 0.9, 8), 1e-6
    slope = jax.grad(lambda y: loss(z, y).sum())(y)
    np.testing.assert_allclose(slope, (loss(z, y + step) - loss(z, y - step)) / (2 * step), rtol=1e-7, atol=1e-8)


def test_bins_at_the_ends():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    y = jnp.array([0.0, 5.0, 2.0, 4.999999, 1e-6])
    value, (slope, by_target) = jax.value_and_grad(lambda *x: xentjax.distribution_focal_loss(*x).sum(), (0, 1))(z, y)
    exact = table.distribution_focal(np.float64(z), np.float64(y))
    np.testing.assert_allclose(value, exact.sum(), rtol=8 * EPS)
    weight = np.maximum(1 - np.abs(np.arange(6) - np.asarray(y, np.float64)[:, None]), 0)
    np.testing.assert_allclose(slope, np.asarray(jax.nn.softmax(z)) - weight, rtol=20 * EPS, atol=8 * EPS)
    log_p = np.array(jax.nn.log_softmax(z))
    low = np.array([0, 4, 2, 4, 0])
    np.testing.assert_allclose(by_target, log_p[np.arange(5), low] - log_p[np.arange(5), low + 1], rtol=20 * EPS)
    assert xentjax.distribution_focal_loss(jnp.ones((1, 1)), jnp.zeros(1)) == 0  # one bin
    sure = jnp.zeros((1, 6)).at[0, 3].set(60.0)  # a tiny loss
    np.testing.assert_allclose(xentjax.distribution_focal_loss(sure, jnp.array([3.0])), 5 * np.exp(-60.0), rtol=100 * EPS)


def test_targets_that_are_no_distance():
    z, y = jnp.ones((5, 4)), jnp.array([-0.5, 3.5, jnp.nan, 1.5, jnp.inf])
    value, slope = xentjax.distribution_focal_loss(z, y), jax.grad(lambda z: xentjax.distribution_focal_loss(z, y).sum())(z)
    good = np.array([False, False, False, True, False])
    np.testing.assert_array_equal(np.isfinite(value), good)
    np.testing.assert_array_equal(np.isfinite(slope).all(-1), good)
    assert np.isnan(slope[~good]).all()
    masked = jax.grad(lambda z: xentjax.distribution_focal_loss(z, y, where=jnp.zeros(5, bool)).sum())(z * jnp.nan)
    assert not masked.any()
    with pytest.raises(ValueError, match=r"^distribution_focal_loss: targets\[0\] = -0.5 is outside \[0, 3\]"):
        xentjax.checked(xentjax.distribution_focal_loss)(z, y)


def test_bins_that_do_not_exist(rng):
    z, y = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), jnp.array([0.5, 2.5, 3.5])
    loss = xentjax.distribution_focal_loss(z.at[:, 4:].set(jnp.nan), y, class_mask=jnp.arange(6) < 4)
    np.testing.assert_allclose(loss[:2], xentjax.distribution_focal_loss(z[:2, :4], y[:2]), rtol=8 * EPS)
    assert loss[2] == jnp.inf  # half of its weight lies on a bin that does not exist
    np.testing.assert_array_equal(xentjax.distribution_focal_loss(z.T, y, axis=0), xentjax.distribution_focal_loss(z, y))


def test_bins_over_devices(rng):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    z, y = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), jnp.array([0.5, 2.5, 4.75])
    run = jax.shard_map(
        functools.partial(xentjax.distribution_focal_loss, axis_name="model"), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P()
    )
    found, expected = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: f(*x).sum(), (0, 1)))(z, y) for f in (run, xentjax.distribution_focal_loss)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=20 * EPS), found, expected)
