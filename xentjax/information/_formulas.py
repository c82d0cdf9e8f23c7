"""The formulas behind `xentjax.information`, the same for probabilities and for logits.

Everything is said by p, q and d = log(p/q), which is found without cancellation:

    probabilities   d = log1p((p − q)/q) where they are near: p − q is exact there
    logits          d = (z_p − z_q) − (lse_p − lse_q), then shifted by log Σ q·e^d, which rounding made differ from 0

and sums of terms of either sign are written as sums of terms that are not negative, with y = x·e^t:

    G(x, y, t) = y − x − x·t = x·t²·(1/2 + t/6 + …) ≥ 0
    KL    Σ G(p, q, −d)                 JS    Σ [G(p, m, −log(p/m)) + G(q, m, −log(q/m))]/2,  m = (p + q)/2

Derivatives. Naive ones cancel as well: with u = −log p, Σ p·u̇ = 0 for every row of logits, and only rounding of it would be
left. So a term is *declared* to have the derivative that remains, slope·ẋ, and further derivatives are those of the slope:

    entropy Σ p·u: u·ṗ      KL: d·ṗ + (1 − p/q)·q̇, or (p − q)·u̇_q for logits      JS: [log(p/m)·ṗ + log(q/m)·q̇]/2

Zeros: what is 0 gives ±FAR for its logarithm ratio, a finite number that a factor of 0 always meets, and a slope that would
be infinite is 0. A result of +∞ is added at the end to a finite one.

Rényi. With β = α − 1, w = Σ p, S = Σ p^α q^(1−α), R = log(S/w)/β: D = w·R + Σ(q − p). For nearly equal distributions let
E = Σ [p^α q^(1−α) − p − β(p − q)]/β, whose terms are not negative. Then Y = (S/w − 1)/β = (E − Σ(q − p))/w, R = log1p(βY)/β and
D = E − w(e^(βR) − 1 − βR)/β, smooth at β = 0. The terms of E are G(x, y, t) − x(e^(at) − 1 − at)/a with x = p, y = q, t = −d,
a = 1 − α, or for α < 1/2, where that cancels, α/(1 − α) times the same with x = q, y = p, t = d, a = α.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, statistics, surprises, values

FAR = 2.0**60  # |log(p/q)| where one of them is 0; its square is a float32


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
    """The distributions as arrays of one shape, `where`, and the class axis; for `axis` None the last two axes are x and y."""
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
    counts = checks.counted(function, where, leading, f"the shape of {first} {without}")
    for name, x in zip(given, arrays, strict=True):
        check = values.logits if name.endswith("logits") else values.probabilities
        check(function, name, x, counts, (-2, -1) if axis is None else axis)
    return *arrays, counts, axis


# Distributions -----------------------------------------------------------------------------------------------------------


class Distribution(NamedTuple):
    """p with the class axis last."""

    p: Array
    log: Array  # log p; 0 where p is 0, for logits with the derivative that it would have
    zero: Array  # where p is 0, not where it underflows
    row: tuple[rows.Rows, statistics.Statistics] | None  # for logits


class Pair(NamedTuple):
    """Two distributions and d = log(p/q): −FAR where p is 0, FAR where only q is."""

    p: Distribution
    q: Distribution
    log_ratio: Array


def distribution(x: Array, where: Array | None, axis: int, from_logits: bool) -> Distribution:
    """Probabilities or logits in the accumulation dtype; a row that does not count becomes one of ones."""
    x = jnp.moveaxis(x, axis, -1)
    x = x if where is None else jnp.where(where[..., None], x, jnp.ones_like(x))
    x = x.astype(numerics.accumulation_dtype(x.dtype))
    if not from_logits:
        zero = x == 0
        return Distribution(x, jnp.log(numerics.where(zero, 1, x)), zero, None)
    r = rows.of(rows.Examples(x, None, None, None, x.ndim - 1, None))
    stats = statistics.of_row(r)
    u = surprises.surprise(r, stats)
    zero = numerics.is_infinite(u)
    log = lax.stop_gradient(numerics.where(zero, u, 0)) - u
    dead = stats.dead[..., None]
    return Distribution(jnp.exp(-u), jnp.where(dead, lax.stop_gradient(log), log), zero, (r, stats))


def pair(p: Array, q: Array, where: Array | None, axis: int, from_logits: bool) -> Pair:
    """Two distributions with their log-ratio."""
    dtype = numerics.accumulation_dtype(p.dtype, q.dtype)
    a, b = (distribution(x.astype(dtype), where, axis, from_logits) for x in (p, q))
    d = log_quotient(jnp.where(a.zero | b.zero, 1, a.p), jnp.where(a.zero | b.zero, 1, b.p)) if a.row is None else _log_ratio(a, b)
    return Pair(a, b, _far(a, b, valued(d, a.log - b.log)))


def _far(a, b, d):
    return numerics.where(a.zero, -FAR, numerics.where(b.zero, FAR, d))


def log_quotient(x, y):
    """log(x/y) of positive numbers, relative to itself; no derivative."""
    x, y = lax.stop_gradient((x, y))
    near = jnp.abs(x - y) <= y / 2
    quotient = x / y
    usable = (quotient > jnp.finfo(x.dtype).tiny) & (quotient < jnp.inf)
    far = numerics.where(usable, jnp.log(numerics.where(usable, quotient, 1)), jnp.log(x) - jnp.log(y))
    return numerics.where(near, jnp.log1p(numerics.where(near, (x - y) / y, 0)), far)


def _log_ratio(a, b):
    """log(p/q) of two rows of logits. A wrong constant in it, from lse_p − lse_q, would show as Σ(p − q) ≠ 0."""
    (r, stats), (s, other) = a.row, b.row
    shift, lost_shift = _exact_difference(stats.reference, other.reference)
    z, lost = _exact_difference(rows.finite_values(r), rows.finite_values(s))
    constant = lost_shift + (stats.log_sum - other.log_sum)
    d = _far(a, b, ((z - shift[..., None]) + lost) - constant[..., None])
    excess = jnp.sum(difference(a.p, b.p, d), -1, keepdims=True)
    return d - jnp.log1p(jnp.clip(excess, -0.5, 0.5))


def _exact_difference(x, y):
    """The rounded number x − y and what was lost in rounding: rows may differ by a large constant."""
    s = x - y
    back = s - x
    return s, (x - (s - back)) - (y + back)


# Pieces ------------------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def declared(value: Array, x: Array, slope: Array) -> Array:
    """`value`, of which it is known that its derivative is slope·dx."""
    del x, slope
    return value


declared.defjvp(lambda primals, tangents: (declared(*primals), primals[2] * tangents[1]))


def valued(value: Array, formula: Array) -> Array:
    """The accurate `value` of what `formula` computes with rounding; derivatives are those of `formula`."""
    return lax.stop_gradient(value) + (formula - lax.stop_gradient(formula))


def second(t: Array) -> Array:
    """(e^t − 1 − t)/t² for |t| ≤ 1."""
    s = jnp.ones_like(t)
    for n in range(18 if t.dtype == jnp.float64 else 11, 2, -1):
        s = 1 + s * t / n
    return s / 2


def gap(x: Array, y: Array, t: Array) -> Array:
    """The number y − x − x·t ≥ 0 for y = x·e^t."""
    small = jnp.abs(t) <= 1
    s = numerics.where(small, t, 0)
    return numerics.where(small, x * s * s * second(s), (y - x) - x * t)


def difference(p: Array, q: Array, d: Array) -> Array:
    """The difference p − q for p = q·e^d."""
    above = d > 0
    up, down = numerics.where(above, d, 0), numerics.where(above, 0, d)
    return numerics.where(above, -p * jnp.expm1(-up), q * jnp.expm1(down))


def over_mixture(d: Array) -> Array:
    """log(p/m) for m = (p + q)/2 and d = log(p/q), which is −log((1 + e^(−d))/2)."""
    value = jnp.minimum(d, 0) - jnp.log1p(jnp.expm1(-jnp.abs(d)) / 2)
    return declared(value, d, numerics.sigmoid(-d))


def quotient(p: Array, q: Distribution) -> Array:
    """p/q, 0 where q is."""
    inverse = numerics.where(q.zero, 0, 1 / numerics.where(q.zero, 1, q.p))
    value = p / numerics.where(q.zero, jnp.inf, q.p)
    return declared(value, p, inverse) + declared(jnp.zeros_like(value), q.p, -value * inverse)


def _scale(value, base):
    return value if base is None else value / jnp.log(jnp.asarray(base, value.dtype))


def close(terms: Array, infinite: Array | None, base: ArrayLike | None, where: Array | None) -> Array:
    """The sum over classes, +∞ where any is `infinite`, in the unit of `base`; exactly 0 where an example does not count."""
    total = jnp.sum(terms, axis=-1)
    if infinite is not None:
        total += numerics.where(jnp.any(infinite, axis=-1), jnp.full_like(total, jnp.inf), 0)
    total = _scale(total, base)
    return total if where is None else numerics.where(where, total, 0)


# The compiled parts ------------------------------------------------------------------------------------------------------

_compiled = functools.partial(jax.jit, static_argnames=("axis", "from_logits"))


@_compiled
def self_information(p, base, where, axis, from_logits):
    if from_logits:
        rows_that_count = None if where is None else jnp.any(jnp.moveaxis(where, axis, -1), axis=-1)
        a = distribution(p, rows_that_count, axis, True)
        where = None if where is None else jnp.moveaxis(where, axis, -1)
    else:
        a = distribution(p[..., None], where, -1, False)
        where = None if where is None else where[..., None]
    u = _scale(-a.log + numerics.where(a.zero, jnp.full_like(a.p, jnp.inf), 0), base)
    u = u if where is None else numerics.where(where, u, 0)
    return jnp.moveaxis(u, -1, axis) if from_logits else u[..., 0]


def _entropy(p, where, axis, from_logits):
    a = distribution(p, where, axis, from_logits)
    slope = -a.log if from_logits else numerics.where(a.zero, 0, -a.log - 1)
    return declared(-a.p * a.log, a.p, slope)


@_compiled
def entropy(p, base, where, axis, from_logits):
    return close(_entropy(p, where, axis, from_logits), None, base, where)


@_compiled
def perplexity(p, where, axis, from_logits):
    stats = jnp.exp(close(_entropy(p, where, axis, from_logits), None, None, where))
    return stats if where is None else numerics.where(where, stats, 0)


@_compiled
def cross_entropy(p, q, base, where, axis, from_logits):
    a, b, d = pair(p, q, where, axis, from_logits)
    terms = declared(-a.p * b.log, a.p, -b.log)
    if from_logits:
        terms += declared(jnp.zeros_like(terms), -b.log, difference(a.p, b.p, d))
    else:
        terms += declared(jnp.zeros_like(terms), b.p, -quotient(a.p, b))
    return close(terms, ~a.zero & b.zero, base, where)


@_compiled
def kl_divergence(p, q, base, where, axis, from_logits):
    a, b, d = pair(p, q, where, axis, from_logits)
    infinite = ~a.zero & b.zero
    finite = numerics.where(infinite, 0, d)
    terms = declared(gap(a.p, b.p, -finite), a.p, numerics.where(a.zero, 0, finite))
    if from_logits:
        terms += declared(jnp.zeros_like(terms), -b.log, difference(a.p, b.p, d))
    else:
        slope = valued(-jnp.expm1(finite), -quotient(a.p, b))
        terms += declared(jnp.zeros_like(terms), b.p, slope)
    return close(terms, infinite, base, where)


@_compiled
def js_divergence(p, q, base, where, axis, from_logits):
    a, b, d = pair(p, q, where, axis, from_logits)
    middle, up, down = (a.p + b.p) / 2, over_mixture(d), over_mixture(-d)
    terms = declared(gap(a.p, middle, -up) / 2, a.p, numerics.where(a.zero, 0, up / 2))
    terms += declared(gap(b.p, middle, -down) / 2, b.p, numerics.where(b.zero, 0, down / 2))
    return close(terms, None, base, where)


@_compiled
def renyi_divergence(p, q, alpha, base, where, axis, from_logits):
    a, b, d = pair(p, q, where, axis, from_logits)
    alpha = jnp.asarray(alpha, d.dtype)
    outside, only_p = a.zero | b.zero, ~a.zero & b.zero
    infinite = only_p & (alpha >= 1)
    d = numerics.where(infinite, 0, d)
    # entries of 0 at which the derivative is infinite have none
    p = jnp.where(a.zero & (alpha <= 1), lax.stop_gradient(a.p), a.p)
    q = jnp.where(only_p, lax.stop_gradient(b.p), b.p)
    log_power = numerics.where(outside, -FAR, a.log + (alpha - 1) * d)  # of p^α q^(1−α)
    total = _renyi(p, q, d, log_power, alpha)
    apart = jnp.all(outside, axis=-1) & jnp.any(only_p, axis=-1)
    total = numerics.where(apart, 0, total)
    return close(total[..., None], jnp.any(infinite, axis=-1, keepdims=True) | apart[..., None], base, where)


def _renyi(p, q, d, log_power, alpha):
    """w·R + Σ(q − p), from E near S = w, from log S elsewhere."""
    beta, w = alpha - 1, jnp.sum(p, axis=-1)
    excess = jnp.sum(valued(difference(q, p, -d), q - p), axis=-1)  # d has no derivative at zeros
    w = numerics.where(w == 0, 1, w)
    top = lax.stop_gradient(jnp.max(log_power, axis=-1))
    log_sum = top + jnp.log(jnp.sum(jnp.exp(log_power - top[..., None]), axis=-1))
    # a power that exceeds e^30·w is not near: there `log_sum` is looked at
    power = jnp.exp(jnp.minimum(log_power, 30 + jnp.log(w)[..., None]))
    e = jnp.sum(_renyi_terms(p, q, d, power, alpha), axis=-1)
    y = (e - excess) / w
    near = jnp.abs(beta * y) <= 0.5
    y = numerics.where(near, y, 0)
    r = y * _log1p_over(beta * y)
    far = w * ((log_sum - jnp.log(w)) / jnp.where(near, 1, beta)) + excess
    return numerics.where(near, numerics.where(near, e, 0) - w * beta * r * r * second(beta * r), far)


def _renyi_terms(p, q, d, power, alpha):
    """[p^α q^(1−α) − p − (α − 1)(p − q)]/(α − 1) ≥ 0, given the power."""
    turned = alpha < 0.5
    x, y, t = (jnp.where(turned, v, w) for v, w in ((q, p), (p, q), (d, -d)))
    a = jnp.where(turned, alpha, 1 - alpha)
    small = jnp.abs(a * t) <= 1
    s = numerics.where(small, t, 0)
    near = gap(x, y, s) - a * (x * s * s * second(a * s))
    far = (y - x) - (power - x) / jnp.where(a == 0, 1, a)
    return numerics.where(small, near, far) * jnp.where(turned, alpha / jnp.where(turned, 1 - alpha, 1), 1)


def _log1p_over(x):
    """log(1 + x)/x for |x| ≤ 1/2."""
    small = jnp.abs(x) < 1 / 16
    z, s = numerics.where(small, 1 / 16, x), numerics.where(small, x, 0)
    series = jnp.full_like(x, 1 / 16)
    for n in range(15, 0, -1):
        series = 1 / n - s * series
    return numerics.where(small, series, jnp.log1p(z) / z)
