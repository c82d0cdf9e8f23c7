"""Losses of preferences: impossible answers, certain answers, identities between the losses, the fused form, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from xentjax import preference

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = float(jnp.finfo(jnp.float32).eps)
INF = jnp.inf
KINDS = ("sigmoid", "hinge", "ipo")


@functools.partial(jax.jit, static_argnums=0)
def derivatives(loss, arguments):
    """The value, the gradient, and the product of the Hessian with ones."""
    slope = jax.grad(lambda *x: jnp.sum(loss(*x)), tuple(range(len(arguments))))
    return loss(*arguments), *jax.jvp(slope, arguments, tuple(map(jnp.ones_like, arguments)))


def impossible(loss, **shared):
    """Pairs whose log-probabilities are −∞: the chosen one, the rejected one, both."""
    pairs = jnp.array([-INF, -3.0, -INF]), jnp.array([-3.0, -INF, -INF])
    return derivatives(loss, (*pairs, *map(jnp.float32, shared.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_answers(kind):
    def dpo(chosen, rejected, beta, smoothing):
        reference = jnp.full_like(chosen, -3.0)
        return preference.dpo_loss(chosen, rejected, reference, reference, beta=beta, kind=kind, label_smoothing=smoothing)

    value, slopes, _ = impossible(dpo, beta=0.5, smoothing=0.25)
    assert value[:2].tolist() == [INF, INF]  # with smoothing, each order has a positive probability
    assert all(np.isfinite(x).all() for x in slopes[:2])
    value, slopes, products = impossible(functools.partial(dpo, smoothing=0.0), beta=0.5)
    both = {"sigmoid": np.log(2), "hinge": 1.0, "ipo": 1.0}[kind]  # h = 0
    np.testing.assert_allclose(value, [INF, INF if kind == "ipo" else 0, both], rtol=4 * EPS)
    assert all(np.isfinite(x).all() for x in slopes)
    if kind != "ipo":  # the second derivative of a square with respect to β is that large
        assert all(np.isfinite(x).all() for x in products)
        np.testing.assert_allclose(slopes[0], [-0.5, 0, -0.25 if kind == "sigmoid" else -0.5], rtol=4 * EPS)


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        (lambda c, r, beta: preference.cpo_loss(c, r, beta=beta), [INF, 3, INF], [-1.5, -1, -1.25]),
        (lambda c, r, beta: preference.simpo_loss(c, r, beta=beta, gamma=0), [INF, 0, np.log(2)], [-0.5, 0, -0.25]),
        (lambda c, r, beta: preference.orpo_loss(c, r, beta=beta), [INF, 3, INF], [-1.5, -1, -1.25]),
    ],
    ids=["cpo", "simpo", "orpo"],
)
def test_impossible_answers_without_a_reference(loss, value, slope):
    found, slopes, products = impossible(loss, beta=0.5)
    np.testing.assert_allclose(found, value, rtol=4 * EPS)
    np.testing.assert_allclose(slopes[0], slope, rtol=4 * EPS)
    assert all(np.isfinite(x).all() for x in (*slopes, *products))


def test_certain_answers_have_finite_odds():
    """p = 1: the derivative with respect to the chosen answer goes to −1 − β·p_r/(1 − p_r)."""
    value, (of_chosen, of_rejected), products = derivatives(preference.orpo_loss, (jnp.zeros(2), jnp.array([-np.log(2), -50.0])))
    np.testing.assert_allclose(value, [0, 0], atol=2.0**-60)
    np.testing.assert_allclose(of_chosen, [-1.1, -1], rtol=8 * EPS)
    np.testing.assert_allclose(of_rejected, [0, 0], atol=2.0**-60)
    assert all(np.isfinite(x).all() for x in products)
    # a rejected answer of probability 1 has infinite odds, which count as 2⁶⁰
    value, slopes, _ = derivatives(preference.orpo_loss, (jnp.array([-1.0, 0.0]), jnp.zeros(2)))
    np.testing.assert_allclose(value, [1 + 0.1 * (np.log(np.e - 1) + 60 * np.log(2)), 0.1 * np.log(2)], rtol=8 * EPS)
    assert all(np.isfinite(x).all() for x in slopes)


@pytest.mark.exhaustive
def test_rewards_of_impossible_answers():
    value, slopes, _ = derivatives(preference.implicit_rewards, (jnp.array([-INF, -3.0, -INF]), jnp.array([-3.0, -INF, -INF])))
    np.testing.assert_array_equal(value, [-INF, INF, 0])
    np.testing.assert_allclose(slopes[0], [0.1, 0.1, 0.1], rtol=EPS)


def test_kto_at_large_gains():
    log_probs, reference = jnp.array([0.0, 0.0, -1e4, -1e4, -INF, -INF]), jnp.array([-1e4, -1e4, 0.0, 0.0, -3.0, -3.0])
    desirable = jnp.array([True, False] * 3)

    def loss(x, y, beta):
        return preference.kto_loss(x, y, desirable, kl=3.0, beta=beta, undesirable_weight=2.0)

    value, slopes, products = derivatives(loss, (log_probs, reference, jnp.float32(0.5)))
    assert value.tolist() == [0, 2, 1, 0, 1, 0]
    assert all(np.isfinite(x).all() for x in (*slopes, *products))


def test_kto_holds_the_reference_point_constant():
    x, y = jnp.array([-20.0, -30.0]), jnp.array([-25.0, -28.0])

    def loss(x, kl):
        return preference.kto_loss(x, y, jnp.array([True, False]), kl=kl).sum()

    assert jax.grad(loss, 1)(x, jnp.float32(2.0)) == 0
    # ... also where the caller forgets it
    through = jax.grad(lambda x: loss(x, jnp.maximum(xentjax.weighted_mean(x - y), 0)))(x)
    np.testing.assert_array_equal(through, jax.grad(loss)(x, jnp.float32(1.5)))


@pytest.mark.exhaustive
def test_losses_coincide(rng):
    chosen, rejected, zero = (*(jnp.asarray(-rng.uniform(1, 9, 6), jnp.float32) for _ in range(2)), jnp.zeros(6))
    tolerance = {"rtol": 8 * EPS}
    dpo = preference.dpo_loss(chosen, rejected, zero, zero, beta=0.5)
    np.testing.assert_allclose(preference.cpo_loss(chosen, rejected, beta=0.5, alpha=0), dpo, **tolerance)
    np.testing.assert_allclose(preference.simpo_loss(chosen, rejected, beta=0.5, gamma=0), dpo, **tolerance)
    exchanged = preference.dpo_loss(rejected, chosen, zero, zero, beta=0.5, label_smoothing=1.0)
    np.testing.assert_allclose(exchanged, dpo, **tolerance)
    margin = preference.implicit_rewards(chosen, zero, beta=0.5) - preference.implicit_rewards(rejected, zero, beta=0.5)
    np.testing.assert_allclose(xentjax.sigmoid_cross_entropy(margin, jnp.ones_like(margin)), dpo, rtol=32 * EPS)  # rewards are rounded
    odds = xentjax.softmax_cross_entropy(jnp.stack([jnp.zeros(6), 0.5 * (rejected - chosen)], -1), jnp.zeros(6, jnp.int32))
    np.testing.assert_allclose(odds, dpo, rtol=16 * EPS)
    # σ of the log-odds is the probability: −log σ(a_c − a_r) is the cross-entropy of one bit of log-odds a_c − a_r
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (chosen, rejected))
    expected = -np.log(p) + np.log1p(q * (1 - p) / (p * (1 - q)))
    np.testing.assert_allclose(preference.orpo_loss(chosen, rejected, beta=1), expected, rtol=32 * EPS)


@pytest.mark.exhaustive
def test_half_precision_loses_only_the_rounding_of_its_inputs(rng):
    pairs = [jnp.asarray(-rng.uniform(100, 900, 5), jnp.bfloat16) for _ in range(4)]
    wide = [x.astype(jnp.float32) for x in pairs]
    found = preference.dpo_loss(*pairs)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, preference.dpo_loss(*wide))


@pytest.mark.exhaustive
def test_float64_of_one_argument_is_enough(x64):
    x = jnp.zeros(3, jnp.float32)
    assert preference.dpo_loss(x, x, x, x.astype(jnp.float64)).dtype == jnp.float64
    assert preference.dpo_loss(x, x, x, x, beta=jnp.float64(0.5)).dtype == jnp.float32
    jax.clear_caches()


B, T, V, F = 2, 5, 11, 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_fused_and_dense(loss, rng):
    """From the hidden states of [2, pairs, tokens], chosen answers first."""
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, B, T, F), (F, V)))
    tokens = jnp.asarray(rng.integers(0, V, (2, B, T)), jnp.int32)
    where = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (2, B, 1)))

    def fused(hidden, kernel):
        log_probs = xentjax.fuse_linear(xentjax.softmax_log_prob, reduction="none", chunk_size=3)(hidden, kernel, tokens, where=where)
        if loss == "orpo":
            return preference.orpo_loss(*xentjax.weighted_mean(log_probs, where=where, axis=-1), beta=0.5).sum()
        chosen, rejected = xentjax.weighted_sum(log_probs, where=where, axis=-1).total
        return preference.dpo_loss(chosen, rejected, chosen - 1, rejected + 1, beta=0.5).sum()

    def dense(hidden, kernel):
        table = jax.nn.log_softmax(jnp.einsum("...f,fv->...v", hidden, kernel))
        log_probs = jnp.where(where, jnp.take_along_axis(table, tokens[..., None], -1)[..., 0], 0).sum(-1)
        if loss == "dpo":
            return -jax.nn.log_sigmoid(0.5 * (log_probs[0] - log_probs[1] - (log_probs[0] - 1) + (log_probs[1] + 1))).sum()
        c, r = log_probs / where.sum(-1).astype(jnp.float32)
        return -(c + 0.5 * jax.nn.log_sigmoid(c - jnp.log(1 - jnp.exp(c)) - r + jnp.log(1 - jnp.exp(r)))).sum()

    for got, expected in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(hidden, kernel)) for f in (fused, dense)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * max(np.abs(expected).max(), 1e-3))


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")


def test_errors():
    x = -jnp.ones(3)
    dpo, kto = preference.dpo_loss, preference.kto_loss
    squeezed = "Use reference_rejected.squeeze(-1)."
    tokens = "Sum over the tokens of each answer first: xentjax.weighted_sum(log_probs, where=mask, axis=-1).total."
    with raises(ValueError, "dpo_loss: rejected must have shape (3,), the shape of chosen; got (2,)."):
        dpo(x, x[:2], x, x)
    with raises(ValueError, f"dpo_loss: rejected must have shape (3, 2), the shape of chosen; got (3, 4). {tokens}"):
        dpo(-jnp.ones((3, 2)), -jnp.ones((3, 4)), x, x)
    with raises(ValueError, f"dpo_loss: reference_rejected must have shape (3,), the shape of chosen; got (3, 1). {squeezed}"):
        dpo(x, x, x, x[:, None])
    with raises(ValueError, "dpo_loss: kind must be one of 'sigmoid', 'hinge', 'ipo'; got 'kto'."):
        dpo(x, x, x, x, kind="kto")
    for beta in (0, -1.0):
        with pytest.raises(ValueError, match=r"^dpo_loss: beta must be (above 0|a finite number at least 0); got"):
            dpo(x, x, x, x, beta=beta)
    with raises(TypeError, "kto_loss: desirable must have dtype bool; got float32. Use desirable != 0."):
        kto(x, x, jnp.ones(3), kl=0.0)
    with raises(ValueError, "kto_loss: kl must have shape (3,), a scalar or the shape of log_probs; got (2,)."):
        kto(x, x, x < 0, kl=jnp.ones(2))
    with raises(TypeError, "orpo_loss: mean_chosen must have a floating dtype; got int32. Use mean_chosen.astype(jnp.float32)."):
        preference.orpo_loss(jnp.array([-1]), x[:1])


def test_checked_names_the_pair():
    x = -jnp.ones(3)
    checked = xentjax.checked(jax.jit(preference.dpo_loss))
    with raises(ValueError, "dpo_loss: rejected[1] = 0.5 is not a log-probability (it is above 0 or NaN)."):
        checked(x, x.at[1].set(0.5), x, x)
    where = jnp.array([True, False, True])
    np.testing.assert_array_equal(checked(x, x.at[1].set(0.5), x, x, where=where), preference.dpo_loss(x, x, x, x, where=where))
    np.testing.assert_array_equal(checked(x, x.at[1].set(-INF), x, x)[1], 0)  # not an error
