"""Equal to a peer where one has the same loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xentjax

RTOL = 100 * float(jnp.finfo(jnp.float32).eps)  # both in float32, a hundred roundings at most


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def draw(rng):
    z, other = (jnp.asarray(rng.normal(size=(20, 7)) * 2, jnp.float32) for _ in range(2))
    return z, other, jnp.asarray(rng.integers(0, 7, 20), jnp.int32)


@pytest.mark.parametrize("epsilon", [1.0, 2.0, -0.5])
def test_poly_loss(epsilon, rng):
    z, _, y = draw(rng)
    theirs = optax.losses.poly_loss_cross_entropy(z, jax.nn.one_hot(y, 7), epsilon=epsilon)
    np.testing.assert_allclose(xentjax.poly_cross_entropy(z, y, epsilon=epsilon), theirs, rtol=RTOL)


def test_divergences(rng):
    z, other, _ = draw(rng)
    p, q = jax.nn.softmax(z), jax.nn.softmax(other)
    theirs = optax.losses.kl_divergence(jnp.log(q), p)
    np.testing.assert_allclose(xentjax.information.kl_divergence(p, q), theirs, rtol=RTOL)
    np.testing.assert_allclose(xentjax.information.kl_divergence_from_logits(z, other), theirs, rtol=RTOL)
    np.testing.assert_allclose(xentjax.distillation_loss(other, z), theirs, rtol=RTOL)
    half = [optax.losses.kl_divergence(jnp.log((p + q) / 2), x) for x in (p, q)]
    np.testing.assert_allclose(xentjax.distillation_loss(other, z, divergence="js"), sum(half) / 2, rtol=RTOL)


@pytest.mark.exhaustive
def test_nt_xent_is_that_of_labelled_pairs(rng):
    first, second = (jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(2))
    theirs = optax.losses.ntxent(jnp.concatenate([first, second]), jnp.tile(jnp.arange(6), 2), temperature=0.5)
    np.testing.assert_allclose(xentjax.nt_xent(first, second).mean(), theirs, rtol=RTOL)


@pytest.mark.exhaustive
@pytest.mark.parametrize("direction", [jax.value_and_grad, functools.partial(jax.value_and_grad, argnums=1)])
def test_gradients_of_a_divergence(direction, rng):
    z, other, _ = draw(rng)

    def theirs(student, teacher):
        return optax.losses.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher)).sum()

    ours = direction(lambda s, t: xentjax.distillation_loss(s, t).sum())(other, z)
    for mine, expected in zip(ours, direction(theirs)(other, z), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=10 * RTOL, atol=1e-5)  # theirs cancels where p and q are close
