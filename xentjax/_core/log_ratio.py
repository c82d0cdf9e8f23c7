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

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import differences, numerics, rows, statistics, surprises


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
