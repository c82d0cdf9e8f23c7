"""Information theory: equal to mpmath with 60 digits, exact at zeros, finite gradients, errors."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from xentjax import information

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
mp = mpmath.mp.clone()
mp.dps = 60


def numbers(x):
    """float32 numbers as they are."""
    return [mp.mpf(float(v)) for v in np.asarray(x, np.float32).ravel()]


def xlogy(x, y):
    return mp.mpf(0) if x == 0 else mp.inf if y == 0 else -mp.inf if x == mp.inf else x * mp.log(y)


def softmax(z):
    e = [mp.exp(v) for v in numbers(z)]
    return [v / mp.fsum(e) for v in e]


def entropy(p):
    return -mp.fsum(xlogy(x, x) for x in p)


def cross_entropy(p, q):
    return mp.inf if any(x > 0 == y for x, y in zip(p, q, strict=True)) else -mp.fsum(xlogy(x, y) for x, y in zip(p, q, strict=True))


def kl_divergence(p, q):
    if any(x > 0 == y for x, y in zip(p, q, strict=True)):
        return mp.inf
    return mp.fsum((x * mp.log(x / y) if x else 0) - x + y for x, y in zip(p, q, strict=True))


def js_divergence(p, q):
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl_divergence(p, m) + kl_divergence(q, m)) / 2


def renyi_divergence(p, q, alpha):
    alpha = mp.mpf(float(np.float32(alpha)))
    if alpha == 1 or (alpha > 1 and kl_divergence(p, q) == mp.inf):
        return kl_divergence(p, q)
    w, s = mp.fsum(p), mp.fsum(x**alpha * y ** (1 - alpha) for x, y in zip(p, q, strict=True) if x and y)
    return w * mp.log(s / w) / (alpha - 1) - w + mp.fsum(q) if s else mp.inf


DIVERGENCES = {
    "cross_entropy": (cross_entropy, {}),
    "kl_divergence": (kl_divergence, {}),
    "js_divergence": (js_divergence, {}),
    **{f"renyi_divergence {a}": (lambda p, q, a=a: renyi_divergence(p, q, a), {"alpha": a}) for a in (0.01, 0.5, 0.9999, 1, 1.0001, 2, 20)},
}
each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def run(name, *arguments, suffix=""):
    """A divergence of rows that are stacked, so that each shape compiles once."""
    return getattr(information, name.split()[0] + suffix)(*(jnp.asarray(x, jnp.float32) for x in arguments), **DIVERGENCES[name][1])


def relative(got, expected):
    """The error of each number in eps of float32."""
    return [
        0.0 if x == float(y) else math.inf if y in (0, mp.inf) else float(abs((mp.mpf(float(x)) - y) / y)) / EPS
        for x, y in zip(np.asarray(got), expected, strict=True)
    ]


def near(p, scale, seed=0):
    return np.asarray(p, np.float32) * (1 + scale * np.random.default_rng(seed).normal(size=np.shape(p))).astype(np.float32)


BASE = np.random.default_rng(1).dirichlet(np.ones(6))
PAIRS = np.asarray(
    [
        (BASE, np.roll(BASE, 1)),
        *((BASE, near(BASE, scale)) for scale in (0.3, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)),  # the last ones differ by a few ulps
        ([0.9, 0.1, 1e-10, 1e-20, 1e-30, 1e-37], [0.1, 1e-37, 0.9, 1e-10, 1e-20, 1e-30]),
        ([1, 1e-12, 1e-13, 0, 0, 0], [1, 1e-13, 1e-12, 0, 0, 0]),
        ([1 - 2**-24, 2**-24, 0, 0, 0, 0], [1 - 2**-22, 2**-22, 0, 0, 0, 0]),
        ([0, 0, 0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4, 0, 0]),
        (3 * BASE, np.roll(5 * BASE, 2)),  # measures, not distributions
        (BASE * 1e-6, np.roll(BASE, 2)),
        ([1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
    ],
    np.float32,
)


@each_divergence
def test_probabilities_against_60_digits(name):
    expected = [DIVERGENCES[name][0](numbers(p), numbers(q)) for p, q in PAIRS]
    # a logarithm, a quotient, a series and a sum; p^α is e^(α·log p), of an exponent of up to 20·40, and α − 1 is a difference
    assert max(relative(run(name, PAIRS[:, 0], PAIRS[:, 1]), expected)) < (100 if "20" in name else 40)


PEAK = np.array([1.0, 0, 0, 0, 0, 0])
DRAWN = np.random.default_rng(2).normal(size=6)
LOGITS = np.asarray(
    [
        (DRAWN, np.roll(DRAWN, 1)),
        *((DRAWN, DRAWN + scale * np.roll(DRAWN, 2)) for scale in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)),
        *((margin * PEAK, margin * PEAK + 1e-3 * DRAWN) for margin in (5, 20)),
        (20 * PEAK + DRAWN, 30 * PEAK - DRAWN),
        (40 * PEAK, 40 * np.roll(PEAK, 1)),
        (3 * DRAWN, 1024 + DRAWN),
        (DRAWN, 2e7 + 8 * DRAWN.round()),
        (DRAWN, DRAWN),
    ],
    np.float32,
)


@each_divergence
def test_logits_against_60_digits(name):
    expected = [DIVERGENCES[name][0](softmax(p), softmax(q)) for p, q in LOGITS]
    errors = relative(run(name, LOGITS[:, 0], LOGITS[:, 1], suffix="_from_logits"), expected)
    # α·log p, and p itself, have the error of the surprise: up to 40 nats
    assert max(errors) < (200 if "20" in name else 60)


@pytest.mark.parametrize("margin", [0, 5, 20, 50, 80])
def test_entropy_of_peaked_logits(margin):
    z = np.float32([margin, 0, 0.5, -1])
    p = softmax(z)
    h, surprises = entropy(p), [-mp.log(x) for x in p]
    bound = (8 + margin) * EPS
    np.testing.assert_allclose(float(information.entropy_from_logits(z)), float(h), rtol=bound)
    np.testing.assert_allclose(information.self_information_from_logits(z), [float(u) for u in surprises], rtol=bound)
    np.testing.assert_allclose(
        jax.grad(information.entropy_from_logits)(z), [float(x * (u - h)) for x, u in zip(p, surprises, strict=True)], rtol=2 * bound
    )


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-4])
def test_gradients_near_equality(scale):
    """p(d − D) and q − p, and for probabilities log(p/q) and 1 − p/q, relative to the largest of a row."""
    z, y = np.float32(DRAWN), np.float32(DRAWN + scale * np.roll(DRAWN, 2))
    p, q = softmax(z), softmax(y)
    total = kl_divergence(p, q)
    d = [mp.log(a / b) for a, b in zip(p, q, strict=True)]
    expected = [float(a * (v - total)) for a, v in zip(p, d, strict=True)], [float(b - a) for a, b in zip(p, q, strict=True)]
    for got, right in zip(jax.grad(information.kl_divergence_from_logits, (0, 1))(z, y), expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=20 * EPS * max(map(abs, right)))
    p, q = np.float32(BASE), near(BASE, scale)
    for got, right in zip(
        jax.grad(information.kl_divergence, (0, 1))(p, q), (np.log(p / np.float64(q)), 1 - p / np.float64(q)), strict=True
    ):
        np.testing.assert_allclose(got, right, rtol=10 * EPS, atol=0)


def joint_formulas(joint):
    """H(Y|X) and I(X; Y) of a joint measure given as rows of mpmath's numbers."""
    px, py = [mp.fsum(row) for row in joint], [mp.fsum(column) for column in zip(*joint, strict=True)]
    s = mp.fsum(px)
    conditional = -mp.fsum(xlogy(j, j / a) for row, a in zip(joint, px, strict=True) for j in row if j)
    mutual = mp.fsum(xlogy(j, j * s / (a * b)) for row, a in zip(joint, px, strict=True) for j, b in zip(row, py, strict=True) if j)
    return conditional, mutual


X, Y = np.random.default_rng(3).dirichlet(np.ones(3)), np.random.default_rng(4).dirichlet(np.ones(4))
NOISE = np.random.default_rng(5).normal(size=(3, 4))
JOINTS = np.asarray(
    [
        NOISE**2,
        *(np.outer(X, Y) * (1 + scale * NOISE) for scale in (0.1, 1e-2, 1e-3, 1e-4)),
        np.eye(3, 4) / 3 + 1e-12,
        np.diag([1, 1e-20, 1e-25, 0])[:3],  # p(x)·p(y) underflows
        [[1, 1e-10, 1e-12, 0], [1e-20, 0, 0, 1e-28], [0, 0, 0, 0]],
    ],
    np.float32,
)


def test_joint_probabilities_against_60_digits():
    exact = [joint_formulas([numbers(row) for row in joint]) for joint in JOINTS]
    assert max(relative(information.conditional_entropy(JOINTS), [h for h, _ in exact])) < 20
    assert max(relative(information.mutual_information(JOINTS), [i for _, i in exact])) < 20


def test_joint_logits_against_60_digits():
    additive = DRAWN[:3, None] + 2 * DRAWN[2:]
    z = np.asarray(
        [
            3 * NOISE,
            *(additive + scale * NOISE for scale in (0.1, 1e-2, 1e-3, 1e-4, 1e-5)),
            1024 + additive + 0.1 * NOISE,
            30 * np.eye(3, 4) + NOISE,
        ],
        np.float32,
    )
    exact = [joint_formulas(np.reshape(softmax(v), (3, 4)).tolist()) for v in z]
    assert max(relative(information.conditional_entropy_from_logits(z), [h for h, _ in exact])) < 20
    assert max(relative(information.mutual_information_from_logits(z), [i for _, i in exact])) < 20


def test_the_weather():
    p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
    h, crossed, divergence = information.entropy(p), information.cross_entropy(p, q), information.kl_divergence(p, q)
    assert [round(float(x), 4) for x in (crossed, h, divergence)] == [1.0549, 1.0297, 0.0253]
    assert float(crossed) == pytest.approx(float(h + divergence), rel=4 * EPS)
    assert float(information.kl_divergence(q, p)) == pytest.approx(0.4 * math.log(0.8) + 0.4 * math.log(4 / 3), rel=1e-5)
    others = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), 1000), jnp.float32)
    everywhere = information.cross_entropy(jnp.broadcast_to(p, others.shape), others)
    assert float(information.cross_entropy(p, p)) == float(h) < float(everywhere.min())  # the minimum is H(p), not 0
