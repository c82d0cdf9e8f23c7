"""Second derivatives of losses of regions, against central differences of their closed gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax

pytestmark = pytest.mark.usefixtures("quick_compilation")

PIXELS, CLASSES, STEP = 5, 3, 1e-5
DISTANCES = np.linspace(-2, 3, PIXELS * CLASSES).reshape(PIXELS, CLASSES)


def _of_sums(numerator, denominator, slopes):
    """Value N/D per class, and its derivative by p, from the derivatives of N and D."""
    return (slopes[0] * denominator - numerator * slopes[1]) / denominator**2


def dice(p, t):
    e, both = np.abs(p - t).sum(0), (p * t).sum(0)
    return _of_sums(e, 2 * both + e + 0.5, (1 - 2 * t, np.ones_like(p)))


def jaccard(p, t):
    e, both = np.abs(p - t).sum(0), (p * t).sum(0)
    return _of_sums(e, both + e, (1 - 2 * t, 1 - t))


def tversky(p, t):
    a, b, gamma = 0.3, 0.7, 0.75
    e, both, slope = (a * p * (1 - t) + b * (1 - p) * t).sum(0), (p * t).sum(0), a * (1 - t) - b * t
    return gamma * (e / (both + e + 0.5)) ** (gamma - 1) * _of_sums(e, both + e + 0.5, (slope, slope + t))


def lovasz(p, t):
    slopes = np.zeros_like(p)
    for k in range(p.shape[1]):
        order = np.argsort(-np.abs(p - t)[:, k])
        wrong = np.array([i / (t[:, k].sum() + (1 - t[order[:i], k]).sum()) if i else 0 for i in range(len(p) + 1)])
        slopes[order, k] = np.diff(wrong) * np.where(t[order, k] > 0, -1, 1)
    return slopes


CASES = {
    "dice": (lambda z, y: xentjax.dice_loss(z, y, smooth=0.5, spatial=1), dice),
    "jaccard": (lambda z, y: xentjax.jaccard_loss(z, y, spatial=1), jaccard),
    "tversky": (lambda z, y: xentjax.tversky_loss(z, y, alpha=0.3, beta=0.7, gamma=0.75, smooth=0.5, spatial=1), tversky),
    "lovasz_softmax": (lambda z, y: xentjax.lovasz_softmax_loss(z, y, spatial=1), lovasz),
    "boundary": (lambda z, y: xentjax.boundary_loss(z, DISTANCES, spatial=1), lambda p, t: DISTANCES / PIXELS),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, x64):
    rng = np.random.default_rng(3)
    loss, closed = CASES[name]
    z, y = rng.normal(size=(PIXELS, CLASSES)), np.array([0, 1, 2, 1, 0])
    t, weights, direction = np.eye(CLASSES)[y], np.array([1.0, 2.0, -0.5]), rng.normal(size=z.shape)

    def gradient(z):
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        by_p = closed(p, t) * weights
        return p * (by_p - (p * by_p).sum(-1, keepdims=True))

    def total(z):
        return jnp.vdot(loss(z, y), weights)

    first, reverse_hessian, forward_hessian, product, tangent = jax.jit(
        lambda z: (
            jax.grad(total)(z),
            jax.jacrev(jax.grad(total))(z),
            jax.jacfwd(jax.jacfwd(total))(z),
            jax.jvp(jax.grad(total), (z,), (direction,))[1],
            jax.jvp(total, (z,), (direction,))[1],
        )
    )(jnp.asarray(z))
    np.testing.assert_allclose(first, gradient(z), atol=1e-14)
    np.testing.assert_allclose(tangent, np.vdot(gradient(z), direction), atol=1e-13)

    def difference(d):
        return (gradient(z + STEP * d) - gradient(z - STEP * d)) / (2 * STEP)

    tolerance = 1e-9  # of the central difference: STEP² times a third derivative of size 1, and rounding 1e-16/STEP
    np.testing.assert_allclose(product, difference(direction), atol=tolerance)
    expected = np.stack([difference(d.reshape(z.shape)) for d in np.eye(z.size)]).reshape(*z.shape, *z.shape)
    np.testing.assert_allclose(reverse_hessian, expected, atol=tolerance)
    np.testing.assert_allclose(forward_hessian, expected, atol=tolerance)
