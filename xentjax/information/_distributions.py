"""Parts that the functions of `xentjax.information` share: argument checks, distributions, log-ratios, and sums over classes.

Log-ratios d = log(p/q) are computed without cancellation:

    probabilities   d = log1p((p − q)/q) if p and q are close, because p − q is then exact
    logits          `_core.log_ratio`

If the terms of a sum have both signs, they may cancel. Such a sum is rewritten as a sum of terms that are never negative, with
G(x, y, t) = y − x − x·t for y = x·e^t (`kl_term`):

    KL    Σ G(p, q, −d)                 JS    Σ [G(p, m, −log(p/m)) + G(q, m, −log(q/m))]/2,  m = (p + q)/2

Derivatives from the chain rule also have terms that cancel. A dot denotes a derivative. Let u = −log p. The derivative of Σ p·u is
Σ u·ṗ + Σ p·u̇. For logits, the second sum is exactly 0, but its rounding errors would remain in the result. So `with_slope` gives each
term only the part of the derivative that does not cancel. Higher derivatives are the derivatives of this part.
Each quantity has this part:

    entropy Σ p·u    u·ṗ
    KL               d·ṗ + (1 − p/q)·q̇ for probabilities, d·ṗ + (p − q)·v̇ with v = −log q for logits
    JS               [log(p/m)·ṗ + log(q/m)·q̇]/2

Zeros. If p or q is 0, the log-ratio is set to FAR or −FAR. FAR is finite. A log-ratio of ±FAR is always multiplied by 0. A slope that
would be infinite is set to 0. If a result is +∞, the code first computes a finite sum, and adds +∞ to it at the end.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, log_ratio, numerics, rows, values

FAR = 2.0**60  # |log(p/q)| if p or q is 0; its square is finite in float32


# Checks ------------------------------------------------------------------------------------------------------------------


def check_base(function: str, base: ArrayLike) -> ArrayLike | None:
    """The base of the logarithms; None for nats."""
    if isinstance(base, float) and base == math.e:
        return None
    checked = checks.positive(function, "base", base)
    if isinstance(checked, float) and checked == 1:
        raise ValueError(f"{function}: base must not be 1. Use base=2 for bits.")
    return checked


def check_distributions(function: str, where: ArrayLike | None, axis: int | None = -1, /, **given: ArrayLike) -> tuple[Any, ...]:
    """The distributions as arrays of one shape, `where`, and the class axis. If `axis` is None, the last two axes are x and y."""
    arrays = [checks.floating(function, name, x) for name, x in given.items()]
    (first, *_), shape = given, arrays[0].shape
    for name, x in zip(given, arrays, strict=True):
        checks.same_shape(function, name, x, shape, f"the shape of {first}")
    if axis is None:
        if len(shape) < 2 or 0 in shape[-2:]:
            raise ValueError(f"{function}: {first} must have shape (..., x, y) with at least one x and one y; got {shape}.")
        leading, without = shape[:-2], "without its last two axes"
    else:
        axis = checks.class_axis(function, first, shape, axis)
        leading, without = shape[:axis] + shape[axis + 1 :], "without its class axis"
    counts = checks.where_mask(function, where, leading, f"the shape of {first} {without}")
    for name, x in zip(given, arrays, strict=True):
        check = values.logits if name.endswith("logits") else values.probabilities
        check(function, name, x, counts, (-2, -1) if axis is None else axis)
    return *arrays, counts, axis


# Distributions -----------------------------------------------------------------------------------------------------------


class Distribution(NamedTuple):
    """A distribution p, class axis last."""

    p: Array
    log: Array  # log p; 0 if p is 0, and for logits with the derivative that log p would have
    zero: Array  # whether p is exactly 0, which an underflow is not
    prediction: log_ratio.Prediction | None  # for logits


class Pair(NamedTuple):
    """Two distributions and d = log(p/q), which is −FAR where p is 0, and FAR where only q is 0."""

    p: Distribution
    q: Distribution
    log_ratio: Array


def distribution(x: Array, where: Array | None, axis: int, from_logits: bool) -> Distribution:
    """A distribution from probabilities or logits, in the accumulation dtype. All entries of an example that does not count become 1."""
    x = jnp.moveaxis(x, axis, -1)
    x = x if where is None else jnp.where(where[..., None], x, jnp.ones_like(x))
    x = x.astype(numerics.accumulation_dtype(x.dtype))
    if not from_logits:
        zero = x == 0
        return Distribution(x, jnp.log(numerics.where(zero, 1, x)), zero, None)
    prediction = log_ratio.prediction(rows.of(rows.Examples(x, None, None, None, x.ndim - 1, None)))
    u = prediction.surprise
    zero = numerics.is_infinite(u)
    log = lax.stop_gradient(numerics.where(zero, u, 0)) - u
    impossible = prediction.stats.all_impossible[..., None]
    return Distribution(jnp.exp(-u), jnp.where(impossible, lax.stop_gradient(log), log), zero, prediction)


def pair(p: Array, q: Array, where: Array | None, axis: int, from_logits: bool) -> Pair:
    """Two distributions with their log-ratio."""
    dtype = numerics.accumulation_dtype(p.dtype, q.dtype)
    a, b = (distribution(x.astype(dtype), where, axis, from_logits) for x in (p, q))
    if a.prediction is None or b.prediction is None:
        d = log_quotient(jnp.where(a.zero | b.zero, 1, a.p), jnp.where(a.zero | b.zero, 1, b.p))
    else:
        d = log_ratio.of(a.prediction, b.prediction)
    d = differences.with_slope_of(d, a.log - b.log)
    return Pair(a, b, numerics.where(a.zero, -FAR, numerics.where(b.zero, FAR, d)))


def log_quotient(x: Array, y: Array) -> Array:
    """log(x/y) of positive numbers, with a small relative error. The result has no derivative."""
    x, y = lax.stop_gradient((x, y))
    near = jnp.abs(x - y) <= y / 2
    ratio = x / y
    usable = (ratio > jnp.finfo(x.dtype).tiny) & (ratio < jnp.inf)
    far = numerics.where(usable, jnp.log(numerics.where(usable, ratio, 1)), jnp.log(x) - jnp.log(y))
    return numerics.where(near, jnp.log1p(numerics.where(near, (x - y) / y, 0)), far)


# Terms of a sum over classes ---------------------------------------------------------------------------------------------


@jax.custom_jvp
def with_slope(value: Array, x: Array, slope: Array) -> Array:
    """`value`, a function of x, with the derivative slope·dx."""
    del x, slope
    return value


with_slope.defjvp(lambda primals, tangents: (with_slope(*primals), primals[2] * tangents[1]))


def kl_term(x: Array, y: Array, t: Array) -> Array:
    """G(x, y, t) = y − x − x·t ≥ 0 for y = x·e^t: the term x·log(x/y) − x + y of a KL divergence."""
    small = jnp.abs(t) <= 1
    s = numerics.where(small, t, 0)
    return numerics.where(small, x * s * s * relative_excess(s), (y - x) - x * t)


def relative_excess(t: Array) -> Array:
    """(e^t − 1 − t)/t² for |t| ≤ 1, by its series."""
    s = jnp.ones_like(t)
    for n in range(18 if t.dtype == jnp.float64 else 11, 2, -1):
        s = 1 + s * t / n
    return s / 2


def difference(p: Array, q: Array, d: Array) -> Array:
    """The difference p − q for p = q·e^d."""
    above = d > 0
    up, down = numerics.where(above, d, 0), numerics.where(above, 0, d)
    return numerics.where(above, -p * jnp.expm1(-up), q * jnp.expm1(down))


def quotient(p: Array, q: Distribution) -> Array:
    """The quotient p/q, 0 where q is 0."""
    inverse = numerics.where(q.zero, 0, 1 / numerics.where(q.zero, 1, q.p))
    value = p / numerics.where(q.zero, jnp.inf, q.p)
    return with_slope(value, p, inverse) + with_slope(jnp.zeros_like(value), q.p, -value * inverse)


# Results -----------------------------------------------------------------------------------------------------------------


def in_unit(value: Array, base: ArrayLike | None) -> Array:
    """A value in nats, converted to the unit of `base`."""
    return value if base is None else value / jnp.log(jnp.asarray(base, value.dtype))


def finish(terms: Array, infinite: Array | None, base: ArrayLike | None, where: Array | None) -> Array:
    """The sum over classes in the unit of `base`: +∞ if any class is `infinite`, exactly 0 if an example does not count."""
    total = jnp.sum(terms, axis=-1)
    if infinite is not None:
        total += numerics.where(jnp.any(infinite, axis=-1), jnp.full_like(total, jnp.inf), 0)
    return numerics.nan_or_zero(in_unit(total, base), None, where)
