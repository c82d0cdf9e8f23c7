"""The log-ratio of two softmax probabilities, accurate relative to its own size.

Let p = softmax(z) and q = softmax(y) be nearly equal. The log-ratio log p_k − log q_k could be computed as a difference of two surprises.
This difference would have the rounding errors of both surprises, which may be larger than the result. The log-ratio is instead computed in
two steps:

    δ_k = (z_k − y_k) − (lse(z) − lse(y))    from exact differences of logits
    d_k = δ_k − L                            where L corrects the constant lse(z) − lse(y)

Most of the error of δ_k is the rounding error of the constant lse(z) − lse(y). L follows from Σ q·e^d = Σ p = 1:

    L = log Σ q·e^δ = log1p(Σ q·(e^δ − 1))

The terms of the last sum are as small as the log-ratios.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import differences, mesh, numerics, rows, statistics, surprises


class Prediction(NamedTuple):
    """A row of logits, its statistics, and the surprise −log p_k of every class [..., classes]."""

    row: rows.Rows
    stats: statistics.WithoutLabel
    surprise: Array


def prediction(row: rows.Rows) -> Prediction:
    """A row of logits together with its statistics and surprises."""
    stats = statistics.of_row(row)
    return Prediction(row, stats, surprises.surprise(row, stats))


def of(p: Prediction, q: Prediction) -> Array:
    """The log-ratio log(p_k/q_k) of every class, shape [..., classes].

    The result has no derivative. A caller adds the derivative of the difference of surprises with `differences.with_slope_of`.
    """
    logits, lost = differences.exact_difference(rows.finite_values(p.row), rows.finite_values(q.row))
    reference, lost_too = differences.exact_difference(p.stats.reference, q.stats.reference)
    constant = p.stats.log_sum - q.stats.log_sum
    delta = (logits - reference[..., None]) + (lost - lost_too[..., None]) - constant[..., None]
    # The terms q·(e^δ − 1) are q·expm1(δ) for δ < 0. For δ > 0, e^δ may overflow. There q·e^δ = e^L·p, and the terms are −p·expm1(−δ) with
    # e^L rounded to 1, because L is no larger than a rounding error. Measured, this is as accurate as solving for L exactly.
    # XLA on CPUs would store the selected probabilities if they were multiplied by `change` after the selection.
    change = jnp.expm1(-jnp.abs(delta))
    terms = numerics.where(delta > 0, -jnp.exp(-p.surprise) * change, jnp.exp(-q.surprise) * change)
    error = jnp.log1p(jnp.clip(rows.class_sum(p.row, terms), -0.5, 0.5))
    return lax.stop_gradient(delta - error[..., None])


class Pair(NamedTuple):
    """Two softmax distributions, their log-ratio and their difference. Each array has shape [..., classes]. `pair` makes a `Pair`."""

    p: Array
    q: Array
    log_ratio: Array  # d = log(p/q)
    difference: Array  # p − q, accurate relative to its own size


def pair(p: rows.Rows, q: rows.Rows, temperature: Array) -> Pair:
    """The distributions of two rows whose `values` are the logits `raw` divided by `temperature` [...]. Both rows have the same masks.

    The result is computed from `raw`: the difference of two logits has a smaller error before the division. The derivative rule uses the
    tangents of `values`. It ignores the tangents of `raw` and of `temperature`, on which `values` depend. The derivatives are also accurate
    if the distributions are nearly equal, or if one class has nearly all of the probability.
    """
    return _pair(p.values, q.values, p.raw, q.raw, temperature, p.class_mask, p.where, p.axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _pair(
    p_values: Array,
    q_values: Array,
    p_raw: Array,
    q_raw: Array,
    temperature: Array,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
) -> Pair:
    dtype, T = p_values.dtype, temperature[..., None]
    of_p, of_q = (rows.Rows(raw, raw.astype(dtype), None, class_mask, where, axis_name) for raw in (p_raw, q_raw))
    logits, lost = differences.exact_difference(rows.finite_values(of_p), rows.finite_values(of_q))
    reference, lost_too = differences.exact_difference(rows.reference(of_p), rows.reference(of_q))
    (p, p_log_sum), (q, q_log_sum) = _probabilities(of_p, T), _probabilities(of_q, T)
    delta = ((logits - reference[..., None]) + (lost - lost_too[..., None])) / T - (p_log_sum - q_log_sum)[..., None]
    delta = numerics.finite(delta)  # the division of INFINITE may overflow
    near = jnp.abs(delta) < differences.NEAR
    small = numerics.where(near, delta, 0)
    change = numerics.where(near, q * (small * differences.exponential_series(small, 1)), p - q)
    error = jnp.log1p(jnp.clip(rows.class_sum(of_p, change), -0.5, 0.5))[..., None]
    return Pair(p, q, delta - error, change - q * error)


def _probabilities(r: rows.Rows, temperature: Array) -> tuple[Array, Array]:
    """The probabilities [..., classes], and log Σ_k e^((z_k − m)/T) [...] for the largest logit m."""
    x = (rows.finite_values(r) - rows.reference(r)[..., None]) / temperature
    keep = rows.full_mask(r)
    exponentials = jnp.exp(x if keep is None else numerics.where(keep, x, -jnp.inf))
    total = rows.class_sum(r, exponentials)
    total = lax.optimization_barrier(numerics.where(total == 0, 1, total))  # computed once per row, not once per class
    return exponentials / total[..., None], jnp.log(total)


@_pair.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Pair, Pair]:
    pair, class_mask, where = _pair(*primals, axis_name), *primals[5:]
    of_p, of_q = (rows.Rows(x, x, None, class_mask, where, axis_name) for x in primals[:2])
    p_moved = centred_tangent(of_p, pair.p, rows.masked(tangents[0], where, class_mask))
    q_moved = centred_tangent(of_q, pair.q, rows.masked(tangents[1], where, class_mask))
    d = p_moved - q_moved
    return pair, Pair(pair.p * p_moved, pair.q * q_moved, d, pair.p * d + pair.difference * q_moved)


def centred(r: rows.Rows, p: Array, x: Array) -> Array:
    """x_k − Σ_j p_j x_j, shape [..., classes], for the probabilities p of the row.

    The mean is subtracted twice. If one class has nearly all of the probability, its x and the first mean are nearly equal, so their
    difference is exact. After the first subtraction, the true mean is 0, so the second mean is the rounding error of the first mean. The
    second subtraction removes this error. Otherwise, the error could be larger than the result.
    """
    for _ in range(2):
        x = x - rows.as_column(r, rows.class_sum(r, p * x))
    return x


def centred_tangent(r: rows.Rows, p: Array, x: Array) -> Array:
    """`centred` of the tangent x. This function is slower, but its transpose is accurate too.

    The transpose of `centred` uses one difference in two places, in a sum and in the result. XLA may round the difference differently in
    the two places, and then the rounding errors do not cancel. So here a class that holds more than half of the probability has its own
    formula: (1 − p_*)·x_* − Σ_{j≠*} p_j x_j, where 1 − p_* is the sum of the other probabilities.
    """
    largest = lax.stop_gradient(p) > 0.5
    by_others = rows.class_sum(r, numerics.where(largest, 0, p * x))
    of_largest = rows.class_sum(r, numerics.where(largest, x, 0))
    p_of_largest, p_of_others = (rows.class_sum(r, numerics.where(largest, *pair)) for pair in ((p, 0), (0, p)))
    mean = by_others + p_of_largest * of_largest
    at_largest = p_of_others * of_largest - by_others
    return surprises.number_where(largest, rows.as_column(r, at_largest), x - rows.as_column(r, mean))
