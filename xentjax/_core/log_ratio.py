"""The log-ratio of two softmax probabilities, accurate relative to its own size.

Let p = softmax(z) and q = softmax(y) be nearly equal. The difference of their surprises, log p_k − log q_k, has the rounding errors of
both surprises, which may be larger than the result. The log-ratio is instead computed in two steps:

    δ_k = (z_k − y_k) − (lse(z) − lse(y))    from exact differences of logits; only the constant lse(z) − lse(y) has a rounding error
    d_k = δ_k − L                            L corrects that constant

L follows from Σ q·e^d = Σ p = 1: it is L = log Σ q·e^δ = log1p(Σ q·(e^δ − 1)). The terms of this sum have the size of the log-ratios.
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
    """The statistics and surprises of a row of logits."""
    stats = statistics.of_row(row)
    return Prediction(row, stats, surprises.surprise(row, stats))


def of(p: Prediction, q: Prediction) -> Array:
    """log(p_k/q_k) of every class [..., classes]; no derivative, for which `differences.with_slope_of` takes that of the surprises."""
    logits, lost = differences.exact_difference(rows.finite_values(p.row), rows.finite_values(q.row))
    reference, lost_too = differences.exact_difference(p.stats.reference, q.stats.reference)
    constant = p.stats.log_sum - q.stats.log_sum
    delta = (logits - reference[..., None]) + (lost - lost_too[..., None]) - constant[..., None]
    # q·(e^δ − 1) is q·expm1(δ) for δ < 0. For δ > 0, where e^δ may overflow, it is −e^L·p·expm1(−δ), because q·e^δ = e^L·p.
    change, above = jnp.expm1(-jnp.abs(delta)), delta > 0
    falling = rows.class_sum(p.row, numerics.where(above, 0, jnp.exp(-q.surprise) * change))
    rising = rows.class_sum(p.row, numerics.where(above, -jnp.exp(-p.surprise) * change, 0))
    # So e^L − 1 = falling + e^L·rising = (falling + rising)/(1 − rising). If rising > 1/2, some d_k are so large that they do not
    # need an exact L.
    error = jnp.log1p(jnp.clip((falling + rising) / jnp.maximum(1 - rising, 0.5), -0.5, 0.5))
    return lax.stop_gradient(delta - error[..., None])
