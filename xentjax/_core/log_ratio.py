"""The log-ratio of two softmax probabilities, accurate relative to its own size.

Let p = softmax(z) and q = softmax(y) be nearly equal. The log-ratio log p_k − log q_k could be computed as a difference of two surprises.
This difference would have the rounding errors of both surprises, which may be larger than the result. So the log-ratio is computed in two
steps:

    δ_k = (z_k − y_k) − (lse(z) − lse(y))    from exact differences of logits
    d_k = δ_k − L                            where L corrects the constant lse(z) − lse(y)

Most of the error of δ_k is the rounding error of the constant lse(z) − lse(y). L follows from Σ q·e^d = Σ p = 1:

    L = log Σ q·e^δ = log1p(Σ q·(e^δ − 1))

The terms of the last sum are as small as the log-ratios.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

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


class Operands(NamedTuple):
    """Two rows for each example, and the other inputs of `pair`. Made by `operands`.

    The rows have the same masks. `numbers` are computed from the rows, but the derivative rule does not use their tangents.
    """

    p_values: Array  # [..., classes], logits divided by the temperature
    q_values: Array
    p_raw: Array  # the logits themselves
    q_raw: Array
    temperature: Array  # [...]
    class_mask: Array | None
    where: Array | None
    numbers: _Numbers


class _Numbers(NamedTuple):
    """Numbers per row, each of shape [...]."""

    p_reference: Array  # the largest logit m
    q_reference: Array
    p_total: Array  # Σ_k e^((z_k − m)/T)
    q_total: Array
    constant: Array  # the difference of their logarithms
    error: Array  # L as in the module docstring


def operands(p: rows.Rows, q: rows.Rows, temperature: Array) -> Operands:
    """The operands for two rows whose `values` are the logits `raw` divided by `temperature` [...]."""
    zero = jnp.zeros_like(temperature)
    of_p, of_q = (r._replace(raw=lax.stop_gradient(r.raw), values=lax.stop_gradient(r.raw.astype(r.values.dtype))) for r in (p, q))
    numbers = _Numbers(rows.reference(of_p), rows.reference(of_q), zero, zero, zero, zero)
    T = lax.stop_gradient(temperature)
    p_total, q_total = (_total(r, m, T) for r, m in ((of_p, numbers.p_reference), (of_q, numbers.q_reference)))
    numbers = numbers._replace(p_total=p_total, q_total=q_total, constant=jnp.log(p_total) - jnp.log(q_total))
    given = Operands(of_p.raw, of_q.raw, of_p.raw, of_q.raw, T, p.class_mask, p.where, numbers)
    change = rows.class_sum(of_p, _before_correction(_fresh(given, p_total), p.axis_name).difference)
    error = jnp.log1p(jnp.clip(change, -0.5, 0.5))
    return Operands(p.values, q.values, p.raw, q.raw, temperature, p.class_mask, p.where, numbers._replace(error=error))


def _total(r: rows.Rows, m: Array, temperature: Array) -> Array:
    """Σ_k e^((z_k − m)/T) [...] for the largest logit m; 1 if there is no class."""
    total = rows.class_sum(r, _exponentials(r, m, temperature))
    return lax.optimization_barrier(numerics.where(total == 0, 1, total))  # computed once per row, not once per class


def _reciprocal(x: Array) -> Array:
    """1/x [...], computed once per row: a division per class takes several times as long as a product."""
    return lax.optimization_barrier(jnp.minimum(1 / x, jnp.finfo(x.dtype).max))


def _exponentials(r: rows.Rows, m: Array, temperature: Array) -> Array:
    x = rows.relative(r, m) * _reciprocal(temperature)[..., None]
    keep = rows.full_mask(r)
    return jnp.exp(x if keep is None else numerics.where(keep, x, -jnp.inf))


def pair(x: Operands, axis_name: mesh.AxisName, after: Array) -> Pair:
    """The distributions of two rows of logits.

    The result is computed from the logits `raw`: the difference of two logits has a smaller error before the division by the temperature.
    The derivative rule uses the tangents of `values`. It ignores the tangents of `raw` and of `temperature`, because the tangents of
    `values` contain them. The derivatives are also accurate if the distributions are nearly equal, or if one class has nearly all of the
    probability.

    Each sum over classes calls this function again. `after` is the result of the previous sum. On CPUs, XLA computes equal calls once. On
    GPUs and TPUs, each sum reads the logits, and no array of their size is stored (see `numerics.fresh`).
    """
    return _pair(_fresh(x, after), axis_name)


def _fresh(x: Operands, after: Array) -> Operands:
    return x._replace(p_raw=numerics.fresh(x.p_raw, after), q_raw=numerics.fresh(x.q_raw, after))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pair(x: Operands, axis_name: mesh.AxisName) -> Pair:
    p, q, delta, change = _before_correction(x, axis_name)
    error = x.numbers.error[..., None]
    return Pair(p, q, delta - error, change - q * error)


def _before_correction(x: Operands, axis_name: mesh.AxisName) -> Pair:
    """The pair with δ in place of d, and the difference q·(e^δ − 1)."""
    numbers, dtype, inverse = x.numbers, x.temperature.dtype, _reciprocal(x.temperature)[..., None]
    of_p, of_q = (rows.Rows(raw, raw.astype(dtype), None, x.class_mask, x.where, axis_name) for raw in (x.p_raw, x.q_raw))
    logits, lost = differences.exact_difference(rows.finite_values(of_p), rows.finite_values(of_q))
    reference, lost_too = differences.exact_difference(numbers.p_reference, numbers.q_reference)
    p = _exponentials(of_p, numbers.p_reference, x.temperature) * _reciprocal(numbers.p_total)[..., None]
    q = _exponentials(of_q, numbers.q_reference, x.temperature) * _reciprocal(numbers.q_total)[..., None]
    delta = ((logits - reference[..., None]) + (lost - lost_too[..., None])) * inverse - numbers.constant[..., None]
    delta = numerics.finite(delta)  # the product of INFINITE and 1/T may overflow
    near = jnp.abs(delta) < differences.NEAR
    small = numerics.where(near, delta, 0)
    return Pair(p, q, delta, numerics.where(near, q * (small * differences.exponential_series(small, 1)), p - q))


@_pair.defjvp
def _(axis_name: mesh.AxisName, primals: tuple[Operands], tangents: tuple[Operands]) -> tuple[Pair, Pair]:
    (x,), (x_dot,) = primals, tangents
    pair = _pair(x, axis_name)
    of_p, of_q = (rows.Rows(z, z, None, x.class_mask, x.where, axis_name) for z in (x.p_values, x.q_values))
    p_moved = centred_tangent(of_p, pair.p, rows.masked(x_dot.p_values, x.where, x.class_mask))
    q_moved = centred_tangent(of_q, pair.q, rows.masked(x_dot.q_values, x.where, x.class_mask))
    d = p_moved - q_moved
    return pair, Pair(pair.p * p_moved, pair.q * q_moved, d, pair.p * d + pair.difference * q_moved)


def centred(r: rows.Rows, terms: Callable[[Array], tuple[Array, Array]], after: Array) -> Array:
    """p_k·(x_k − Σ_j p_j x_j), shape [..., classes], for the probabilities p of the row and a number x_k for each class.

    `terms(after)` computes p and x (see `pair`).

    The mean is subtracted twice. If one class has nearly all of the probability, x of this class and the first mean are nearly equal, so
    their difference is exact. After the first subtraction, the true mean is 0, so the second mean is the rounding error of the first mean.
    The second subtraction removes this error. Otherwise, the error could be larger than the result.
    """

    def product(after: Array, *means: Array) -> Array:
        p, x = terms(after)
        for mean in means:
            x = x - rows.as_column(r, mean)
        return p * x

    mean = rows.class_sum(r, product(after))
    rest = rows.class_sum(r, product(mean, mean))
    return product(rest, mean, rest)


def centred_tangent(r: rows.Rows, p: Array, x: Array) -> Array:
    """The result of `centred` for a tangent x. This function is slower, but its transpose is also accurate.

    The transpose of `centred` uses one difference in two places, in a sum and in the result. XLA may round the difference differently in
    the two places, and then the rounding errors do not cancel. So here the class that holds most of the probability has its own
    formula: (1 − p_*)·x_* − Σ_{j≠*} p_j x_j, where 1 − p_* is the sum of the other probabilities.
    """
    largest = lax.stop_gradient(p) > numerics.MOST
    by_others = rows.class_sum(r, numerics.where(largest, 0, p * x))
    of_largest = rows.class_sum(r, numerics.where(largest, x, 0))
    p_of_largest, p_of_others = (rows.class_sum(r, numerics.where(largest, *pair)) for pair in ((p, 0), (0, p)))
    mean = by_others + p_of_largest * of_largest
    at_largest = p_of_others * of_largest - by_others
    return surprises.number_where(largest, rows.as_column(r, at_largest), x - rows.as_column(r, mean))
