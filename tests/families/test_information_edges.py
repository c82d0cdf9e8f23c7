"""Information theory at zeros, at rows without a class, over axes, under masks, with traced parameters; errors."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentjax import information

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAIRS = ("cross_entropy", "kl_divergence", "js_divergence", "renyi_divergence")
ROWS = ("entropy", "perplexity", *PAIRS)
JOINT = ("conditional_entropy", "mutual_information")
ALL = [f"{name}{suffix}" for name in ("self_information", *ROWS, *JOINT) for suffix in ("", "_from_logits")]
ALPHAS = (0.5, 1.0, 2.0)


def call(name, *arguments, alpha=0.7, **keywords):
    if name.startswith("renyi"):
        keywords["alpha"] = alpha
    return getattr(information, name)(*arguments, **keywords)


def with_zeros(values):
    return jnp.array(values), jnp.log(jnp.array(values))  # log 0 is −∞, an impossible class


def both(name, *rows):
    """Of probabilities and of their logarithms as logits."""
    return call(name, *(with_zeros(x)[0] for x in rows)), call(f"{name}_from_logits", *(with_zeros(x)[1] for x in rows))


ONE, OTHER, SPREAD = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]
EDGES = [
    ("entropy", (ONE,), 0.0),
    ("entropy", (SPREAD,), np.log(2)),
    ("perplexity", (SPREAD,), 2.0),
    ("cross_entropy", (ONE, ONE), 0.0),
    ("cross_entropy", (ONE, SPREAD), np.log(2)),
    ("cross_entropy", (SPREAD, ONE), np.inf),
    ("kl_divergence", (SPREAD, SPREAD), 0.0),
    ("kl_divergence", (ONE, SPREAD), np.log(2)),
    ("kl_divergence", (SPREAD, ONE), np.inf),
    ("js_divergence", (ONE, OTHER), np.log(2)),
    ("js_divergence", (ONE, ONE), 0.0),
    ("conditional_entropy", ([SPREAD, ONE, [0.0, 0.0, 0.0]],), None),
    ("mutual_information", ([ONE, OTHER, [0.0, 0.0, 0.0]],), None),
]


@pytest.mark.parametrize(("name", "rows", "expected"), EDGES, ids=lambda x: x if isinstance(x, str) else "")
def test_zeros_are_exact_and_gradients_finite(name, rows, expected):
    rows = [np.divide(x, np.sum(x)).tolist() for x in rows]
    if expected is None:
        expected = np.log(2) / (1 if name == "mutual_information" else 2)
    for value, suffix, part in zip(both(name, *rows), ("", "_from_logits"), (0, 1), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=0)
        arguments = tuple(with_zeros(x)[part] for x in rows)
        for slope in jax.grad(lambda *x, n=name + suffix: call(n, *x), tuple(range(len(rows))))(*arguments):
            assert np.isfinite(slope).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("alpha", ALPHAS)
def test_renyi_at_zeros(alpha):
    for suffix, part in (("", 0), ("_from_logits", 1)):
        one, other, spread = (with_zeros(x)[part] for x in (ONE, OTHER, SPREAD))
        function = f"renyi_divergence{suffix}"
        assert call(function, one, other, alpha=alpha) == np.inf  # no class in common
        np.testing.assert_allclose(call(function, one, spread, alpha=alpha), np.log(2), rtol=1e-6)
        np.testing.assert_allclose(
            call(function, spread, one, alpha=alpha), np.inf if alpha >= 1 else alpha / (1 - alpha) * np.log(2), rtol=1e-6
        )
        for p in (one, other, spread):
            slopes = jax.grad(lambda p, q, a, f=function: call(f, p, q, alpha=a), (0, 1, 2))(p, spread, alpha)
            assert all(np.isfinite(x).all() for x in slopes)
    slope = jax.grad(lambda p: information.renyi_divergence(p, with_zeros(SPREAD)[0], alpha=alpha))(with_zeros(ONE)[0])
    assert slope[1] == (np.log(np.float32(2)) - 2 if alpha > 1 else 0)  # α = 2: log(S/w) − 1/(α − 1) − 1, S = 2


def test_gradients_at_zeros_are_zero_where_they_would_be_infinite():
    p, q = jnp.array([0.0, 0.5, 0.5, 0.0]), jnp.array([0.5, 0.0, 0.5, 0.0])
    for name, expected in {
        "cross_entropy": ([np.log(2), 0, np.log(2), 0], [0, 0, -1, 0]),
        "kl_divergence": ([0, 0, 0, 0], [1, 0, 0, 1]),
        "js_divergence": ([0, np.log(2) / 2, 0, 0], [np.log(2) / 2, 0, 0, 0]),
    }.items():
        for got, right in zip(jax.grad(getattr(information, name), (0, 1))(p, q), expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-6, atol=0)
    np.testing.assert_allclose(jax.grad(information.entropy)(p), [0, np.log(2) - 1, np.log(2) - 1, 0], rtol=1e-6)
    assert information.self_information(0.0) == np.inf
    assert jax.grad(information.self_information)(0.0) == 0


def test_curvature_of_tiny_probabilities_does_not_overflow():
    """1/p at 1e-25, whose square is beyond float32."""
    p, q = jnp.array([1e-25, 1.0]), jnp.array([2e-25, 1.0])
    for f, expected in (
        (information.entropy, [-1e25, -1]),
        (lambda p: information.kl_divergence(p, q), [1e25, 1]),
        (lambda q: information.kl_divergence(p, q), [0.25e25, 1]),
        (lambda q: information.cross_entropy(p, q), [0.25e25, 1]),
    ):
        x = q if f.__code__.co_varnames[:1] == ("q",) else p
        np.testing.assert_allclose(jnp.diagonal(jax.hessian(f)(x)), expected, rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n in ALL if n.endswith("from_logits") and not n.startswith("self")])
def test_a_row_without_a_class_has_no_gradient(name):
    shape = (2, 2) if name.removesuffix("_from_logits") in JOINT else (4,)
    nothing, something = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    several = 2 if name.removesuffix("_from_logits") in PAIRS else 1
    for arguments in [(nothing,)] if several == 1 else [(nothing, something), (something, nothing), (nothing, nothing)]:
        assert not np.isnan(call(name, *arguments))
        slopes = jax.grad(lambda *x: call(name, *x), tuple(range(several)))(*arguments)
        for slope, x in zip(slopes, arguments, strict=True):
            assert np.isfinite(slope).all()
            assert x is something or not slope.any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n in ALL if "axis" in inspect.signature(getattr(information, n)).parameters])
def test_axis(name, rng):
    several = 2 if name.removesuffix("_from_logits") in PAIRS else 1
    x = tuple(jnp.asarray(rng.uniform(0.1, 1, (2, 3, 4)), jnp.float32) for _ in range(several))
    last = call(name, *x)
    moved = call(name, *(jnp.moveaxis(v, -1, 0) for v in x), axis=0)
    np.testing.assert_allclose(jnp.moveaxis(moved, 0, -1) if name.startswith("self") else moved, last, rtol=1e-6)


def test_where_of_single_values():
    z = jnp.array([[0.0, 0.0], [jnp.nan, 0.0]])
    where = jnp.array([[True, False], [False, False]])
    assert information.self_information_from_logits(z, where=where).tolist() == [[pytest.approx(np.log(2)), 0], [0, 0]]
    slope = jax.grad(lambda z: jnp.sum(information.self_information_from_logits(z, where=where)))(z)
    np.testing.assert_allclose(slope, [[-0.5, 0.5], [0, 0]], rtol=1e-6)


@pytest.mark.exhaustive
def test_traced_parameters(rng):
    p, q = (jnp.asarray(rng.dirichlet(np.ones(5)), jnp.float32) for _ in range(2))
    orders = jnp.array([0.3, 0.999, 1.0, 1.0 + 1e-7, 1.001, 3.0])
    each = jax.vmap(lambda a: information.renyi_divergence(p, q, alpha=a))(orders)
    np.testing.assert_allclose(each, [information.renyi_divergence(p, q, alpha=float(a)) for a in orders], rtol=1e-6)
    np.testing.assert_allclose(each[2:4], information.kl_divergence(p, q), rtol=1e-6)
    # the slope at 1 is half the variance of log(p/q) under p, and it is smooth there
    d = np.log(np.float64(p) / np.float64(q))
    variance = np.sum(p * d**2) - np.sum(p * d) ** 2
    slopes = jax.vmap(jax.grad(lambda a: information.renyi_divergence(p, q, alpha=a)))(orders[1:5])
    np.testing.assert_allclose(slopes, variance / 2, rtol=5e-3)
    np.testing.assert_allclose(slopes[1:3], variance / 2, rtol=1e-5)
    bits = jax.jit(lambda base: information.entropy(p, base=base))(2.0)
    np.testing.assert_allclose(bits, information.entropy(p) / np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_errors(name):
    joint = name.removesuffix("_from_logits") in JOINT
    several = 2 if name.removesuffix("_from_logits") in PAIRS else 1
    function, x = getattr(information, name), jnp.ones((2, 3, 4))
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(TypeError, match=f"^{name}: {first} must have a floating dtype; got int32. Use {first}.astype"):
        call(name, *[x.astype(jnp.int32)] * several)
    with pytest.raises(TypeError, match=f"^{name}: where must have dtype bool; got float32. Use where != 0."):
        call(name, *[x] * several, where=x)
    with pytest.raises(ValueError, match=rf"^{name}: where must have shape \(2,.*, the shape of {first}.*; got \(7,\)"):
        call(name, *[x] * several, where=jnp.ones(7, bool))
    if several == 2:
        second = list(inspect.signature(function).parameters)[1]
        with pytest.raises(ValueError, match=re.escape(f"{name}: {second} must have shape (2, 3, 4), the shape of {first}; got (3, 4).")):
            call(name, x, x[0])
    if "axis" in inspect.signature(function).parameters:
        with pytest.raises(ValueError, match=re.escape(f"{name}: axis must be in [-3, 3) for {first} of shape (2, 3, 4); got 3.")):
            call(name, *[x] * several, axis=3)
        with pytest.raises(ValueError, match=f"^{name}: {first} must have a class axis; got a scalar."):
            call(name, *[x[0, 0, 0]] * several)
        with pytest.raises(ValueError, match=f"^{name}: {first} must have at least one class on axis 2"):
            call(name, *[x[..., :0]] * several)
    if joint:
        with pytest.raises(ValueError, match=rf"^{name}: {first} must have shape \(..., x, y\) .*; got \(4,\)."):
            call(name, x[0, 0])
    if "base" in inspect.signature(function).parameters:
        for base, complaint in ((0, "be above 0; got 0"), (-2.0, "be a finite number at least 0; got -2"), (1, "not be 1")):
            with pytest.raises(ValueError, match=f"^{name}: base must {complaint}"):
                call(name, *[x] * several, base=base)
    if "alpha" in inspect.signature(function).parameters:
        with pytest.raises(ValueError, match=f"^{name}: alpha must be above 0; got 0."):
            call(name, *[x] * several, alpha=0)
