"""Accuracy of functions of log-probabilities in float32, against mpmath on the same float32 numbers."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from xentjax import policy, preference

EPS = float(jnp.finfo(jnp.float32).eps)
TINY = float(jnp.finfo(jnp.float32).tiny)


def exact(*arrays):
    """The entries of float32 arrays as numbers of mpmath, one tuple for each position."""
    return zip(*(map(mpmath.mpf, map(float, np.ravel(x))) for x in arrays), strict=True)


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def assert_close(found, expected, tolerance):
    """Relative to each number; a number below the smallest normal one may be 0."""
    for got, value, bound in zip(np.ravel(found), expected, tolerance, strict=True):
        assert abs(float(got) - value) <= bound * EPS * abs(value) + TINY, (float(got), value, float(abs(got / value - 1) / EPS))


def draw_answers(rng, count):
    """Long answers: log-probabilities of −1 to −1,000 nats whose differences are small, and margins from 1e-3 to 1e4 nats."""
    chosen, rejected, of_chosen = (-rng.uniform(1, 1000, count) for _ in range(3))
    h = rng.choice([-1, 1], count) * 10 ** rng.uniform(-3, 4, count)
    return tuple(jnp.asarray(x, jnp.float32) for x in (chosen, rejected, of_chosen, rejected - (chosen - of_chosen) + h))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_margins_lose_nothing(kind, rng):
    """h is rounded once and multiplied by β, so that the exponent has an error of |βh|·eps."""
    mpmath.mp.dps = 60
    arguments, beta = draw_answers(rng, 400), jnp.float32(0.1)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda *x: preference.dpo_loss(*x, beta=beta, kind=kind))))(*arguments)
    b, rows = mpmath.mpf(float(beta)), []
    for c, r, of_c, of_r in exact(*arguments):
        h = (c - of_c) - (r - of_r)
        if kind == "sigmoid":
            rows.append((softplus(-b * h), -b * sigmoid(-b * h), 8 + abs(b * h)))
        elif kind == "hinge":  # 1 − βh cancels near βh = 1
            left = max(1 - b * h, 0)
            rows.append((left, -b if left else 0, 8 * (1 + abs(b * h)) / left if left else 8))
        else:  # so does h − 1/(2β) near its optimum; each of the two factors of the square has its error
            left = h - 1 / (2 * b)
            rows.append((left**2, 2 * left, 8 * (abs(h) + 1 / (2 * b)) / abs(left)))
    expected, slopes, bounds = zip(*rows, strict=True)
    assert_close(value, expected, bounds)
    assert_close(slope, slopes, bounds)


@pytest.mark.exhaustive
def test_log_odds_lose_nothing(rng):
    """Probabilities per token near 0 and near 1. The exponents of the odds have the size of the surprises."""
    mpmath.mp.dps = 60
    chosen, rejected = (jnp.asarray(-(10 ** rng.uniform(-12, 2, 300)), jnp.float32) for _ in range(2))

    def loss(*pair):
        return preference.orpo_loss(*pair, beta=1.0)

    @jax.jit
    @jax.vmap
    def everything(*pair):
        value, slopes = jax.value_and_grad(loss, (0, 1))(*pair)
        return value, slopes, jax.grad(jax.grad(loss))(*pair)

    value, slopes, curvature = everything(chosen, rejected)
    expected, of_chosen, of_rejected, bounds = [], [], [], []
    for c, r in exact(chosen, rejected):
        a, other = (x - mpmath.log(-mpmath.expm1(x)) for x in (c, r))
        expected.append(softplus(other - a) - c)
        of_chosen.append(-1 - sigmoid(other - a) / -mpmath.expm1(c))
        of_rejected.append(sigmoid(other - a) / -mpmath.expm1(r))
        bounds.append(8 + abs(c - r))
    assert_close(value, expected, bounds)
    assert_close(slopes[0], of_chosen, bounds)
    assert_close(slopes[1], of_rejected, bounds)
    # The second derivative is t − t², where t = O·e^u/(1 + O·(e^u − 1)) is minus the first one of log(1 + e^(−h)), O are the odds of the
    # rejected answer, and u = −c. The error is judged by these two terms.
    for got, (c, r) in zip(map(float, curvature), exact(chosen, rejected), strict=True):
        odds = 1 / mpmath.expm1(-r)
        t = odds * mpmath.exp(-c) / (1 + odds * mpmath.expm1(-c))
        assert abs(got - (t - t**2)) <= (8 + abs(c - r)) * EPS * (t + t**2) + TINY, (got, c, r)


def test_small_divergences_keep_their_digits(rng):
    """k3 is about d²/2 near d = 0, where e^d − 1 − d would be 0."""
    mpmath.mp.dps = 60
    d = rng.choice([-1, 1], 300) * 10 ** rng.uniform(-15, 1.5, 300)
    log_probs, reference = jnp.asarray(d / 2, jnp.float32), jnp.asarray(-d / 2, jnp.float32)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(policy.kl_estimate)))(log_probs, reference)
    differences = [y - x for x, y in exact(log_probs, reference)]
    bounds = [8 + abs(x) for x in differences]  # the exponent is rounded once
    assert_close(value, [mpmath.expm1(x) - x for x in differences], bounds)
    assert_close(slope, [-mpmath.expm1(x) for x in differences], bounds)
