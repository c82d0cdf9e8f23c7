"""How well scores rank positives above negatives; the conventions stand in `xentjax.metrics`."""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, sums, values
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts


class _Fields(NamedTuple):
    positives: Array
    """[..., points], how many examples with label 1 are at a point of the grid; int32, or floating sums of weights."""
    negatives: Array
    """[..., points], the same for label 0."""
    invalid: Array
    """[...], how many examples had a label other than 0 and 1 or a NaN score; int32."""


class Ranking(sums.RunningSum, _Fields):
    """Counts of positives and negatives on a grid of scores, each [..., points]; adds over batches, sums over devices.

    With p_g and n_g the shares of positives and of negatives at grid point g,

        auroc = Σ_g p_g (Σ_{h<g} n_h + n_g/2)        |auroc − exact| ≤ auroc_error = ½ Σ_g p_g n_g

    because only pairs at one point are not told apart, and each is counted as half. Scores that lie on the grid are told apart
    as far as they differ, so the result is then exact. Figures are float32 (float64 for float64 counts), with the leading axes that
    `jax.vmap` gave the counts; all are NaN if an example was invalid.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> scores, labels = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
        >>> first, second = (xentjax.metrics.ranking(scores[i::2], labels[i::2]) for i in (0, 1))
        >>> float((first + second).auroc())
        0.75
    """

    def auroc(self) -> Array:
        """The area under the ROC curve of the scores on the grid, [...]."""
        return _figures(self)[0]

    def auroc_error(self) -> Array:
        """By how much `auroc` may differ from that of the scores themselves, [...]."""
        return _figures(self)[1]


def ranking(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    low: float = 0.0,
    high: float = 1.0,
    points: int = 1001,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Ranking:
    """Histograms of the scores of positives and of negatives, `Ranking` with counts [points]: an AUROC that adds over batches and devices.

    A score is counted at the nearest of the points low + g·(high − low)/(points − 1), outside [low, high] at the end.
    Gradient: 0 by the scores; 1 by a weight on its point.

    Args:
        scores: [...], larger for positives; probabilities, or with `low` and `high` of their size logits.
        labels: [...], bits: boolean, or integer 0 and 1.
        low: the first point of the grid, a Python number.
        high: the last one, above `low`.
        points: how many points the grid has, at least 2.
        weights: [...], w ≥ 0; None counts each example once.
        where: [...], which examples count.

    Returns:
        `Ranking`, counts int32, or float32 (float64 for float64 weights) with `weights`.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `low` not below `high`, `points` below 2.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([-2.3, 0.2, 1.9, 0.6]), jnp.array([0, 0, 1, 1])
        >>> coarse = xentjax.metrics.ranking(logits, labels, low=-4.0, high=4.0, points=5)  # 0.2 and 0.6 share the point 0
        >>> float(coarse.auroc()), float(coarse.auroc_error()), float(xentjax.metrics.auroc(logits, labels))
        (0.875, 0.125, 1.0)

    Reference:
        Fawcett, An introduction to ROC analysis, 2006.
    """
    name = "ranking"
    s, y, w, counted = _check(name, scores, labels, weights, where)
    if checks.count(name, "points", points) < 2:
        raise ValueError(f"{name}: points must be at least 2; got {points}.")
    for end, x in (("low", low), ("high", high)):
        if not isinstance(x, numbers.Real) or not math.isfinite(x):
            raise ValueError(f"{name}: {end} must be a finite Python number; got {x!r}.")
    if not low < high:
        raise ValueError(f"{name}: low must be below high; got {low:g} and {high:g}.")
    return _ranking(s, y, w, counted, float(low), float(high), int(points))


def auroc(scores: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Array:
    """The area under the ROC curve over all examples, []: the probability that a positive scores above a negative, ties counted half.

    auroc = Σ_{i: y_i=1} Σ_{j: y_j=0} w_i w_j ([s_i > s_j] + ½ [s_i = s_j]) / (Σ_{y_i=1} w_i · Σ_{y_j=0} w_j), by sorting; 0 if there are
    no positives or no negatives. Equal to scikit-learn's `roc_auc_score`. Gradient by the scores: 0.

    It needs all examples in one place; `ranking` is the form that adds. One figure per class is
    `jax.vmap(auroc, in_axes=-1)(scores, one_hot)`.

    Args:
        scores: [...], larger for positives: logits, probabilities, or anything else that ranks.
        labels: [...], bits: boolean, or integer 0 and 1.
        weights: [...], w ≥ 0; None weighs each example 1.
        where: [...], which examples count.

    Returns:
        [], float32 (float64 for float64 scores); NaN for a bad label or a NaN score.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.metrics.auroc(jnp.array([0.1, 0.4, 0.35, 0.4]), jnp.array([0, 0, 1, 1])))  # 2½ of 4 pairs
        0.625

    Reference:
        Hanley, McNeil, The meaning and use of the area under a receiver operating characteristic (ROC) curve, 1982.
    """
    return _auroc(*_check("auroc", scores, labels, weights, where))


def _check(function, scores, labels, weights, where):
    s = checks.floating(function, "scores", scores)
    y = _counts.classes(function, "labels", labels, "Use labels > 0.5 for bits.")
    checks.same_shape(function, "labels", y, s.shape, "the shape of scores")
    w, counts = _counts.per_example(function, weights, where, s.shape, "the shape of scores")
    present = _counts.taking_part(w, counts)
    values.not_nan(function, "scores", s, present)
    values.check(function, "labels", y, lambda y: (y != 0) & (y != 1), "is neither 0 nor 1", present)
    return s, y, w, counts


def _amounts(scores, labels, weights, where):
    """What each example adds to the positives and to the negatives, and how many are invalid."""
    valid = ((labels == 0) | (labels == 1)) & ~jnp.isnan(scores)
    amount, invalid = _counts.amounts(weights, where, valid)
    nothing = jnp.zeros_like(amount)
    return numerics.where(labels == 1, amount, nothing), numerics.where(labels == 0, amount, nothing), invalid


@functools.partial(jax.jit, static_argnames="points")
def _ranking(scores, labels, weights, where, low, high, points):
    positive, negative, invalid = _amounts(scores, labels, weights, where)
    s = scores.astype(numerics.accumulation_dtype(scores.dtype))
    s = jnp.where(positive + negative != 0, jnp.clip(s, low, high), low)
    index = jnp.round((s - low) * ((points - 1) / (high - low)))
    counts = [_counts.tally(x, (points,), index) for x in (positive, negative)]
    return sums.collect(Ranking, *counts, sums.parts_of(invalid))


@jax.jit
def _figures(ranking):
    positives, negatives, _ = sums.split(ranking)
    half = sums.scaled(negatives, 0.5)
    below_and_half = sums.value(sums.add_parts(sums.cumulative(negatives), sums.scaled(half, -1.0)))
    p, half = sums.value(positives), sums.value(half)
    all_p, all_n = (sums.value(sums.total(x, -1)) for x in (positives, negatives))

    def over_pairs(x):
        each = WeightedSum(x, jnp.broadcast_to(all_n[..., None], x.shape)).mean()
        return _counts.figure(WeightedSum((p * each).sum(-1), all_p).mean(), ranking.invalid)

    return over_pairs(below_and_half), over_pairs(half)


@jax.jit
def _auroc(scores, labels, weights, where):
    positive, negative, invalid = _amounts(scores, labels, weights, where)
    # a NaN, which adds nothing, goes to the end and ties with nothing
    ranked = lax.sort((lax.stop_gradient(scores).reshape(-1), positive.reshape(-1), negative.reshape(-1)), num_keys=1)
    s, positive, negative = ranked
    place, differs = lax.iota(jnp.int32, s.size), s[1:] != s[:-1]
    edge = jnp.ones_like(s[:1], bool)
    # the places of the first of an example's ties, and of the first after them
    first = lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0))
    after = lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place + 1, s.size), reverse=True)
    up_to = jnp.concatenate([jnp.zeros(1, negative.dtype), jnp.cumsum(negative, dtype=negative.dtype)])
    dtype = numerics.accumulation_dtype(scores.dtype, positive.dtype)
    below = (up_to[first].astype(dtype) + up_to[after].astype(dtype)) / 2
    p, all_p, all_n = (x.astype(dtype) for x in (positive, positive.sum(), up_to[-1]))
    share = WeightedSum(below, jnp.full_like(below, all_n)).mean()  # 0 where there are no negatives
    return _counts.figure(WeightedSum((p * share).sum(), all_p).mean(), invalid)
