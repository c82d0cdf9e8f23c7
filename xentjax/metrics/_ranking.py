"""Metrics of how well scores rank positives above negatives. Shared conventions are documented in `xentjax.metrics`."""

from __future__ import annotations

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
    """[..., points], the number of examples with label 1 at each grid point; int32, or floating sums of weights."""
    negatives: Array
    """[..., points], the number of examples with label 0 at each grid point; the dtype of `positives`."""
    invalid: Array
    """[...], the number of examples with a label other than 0 and 1, or with a NaN score; int32."""


class Ranking(sums.RunningSum, _Fields):
    """Counts of positives and of negatives on a grid of scores, each of shape [..., points].

    A positive has label 1 and a negative has label 0. Let p_g be the share of all positives at grid point g, and n_g the share of all
    negatives at g. Then

        auroc = Σ_g p_g (Σ_{h<g} n_h + n_g/2)        |auroc − exact| ≤ auroc_error = ½ Σ_g p_g n_g

    A pair of a positive and a negative at different grid points is ranked exactly. A pair at the same grid point counts as half, so its
    error is at most ½. If all scores lie on the grid, pairs at the same point are true ties, and the result is exact.

    Use `+` to add `Ranking`s of different batches, and `psum` to add them over devices. Each method returns a metric. Metrics are
    float32, or float64 for float64 counts. Metrics have the leading axes that `jax.vmap` gave the counts. If an example was invalid, all
    metrics are NaN.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> scores, labels = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
        >>> first, second = (xentjax.metrics.ranking(scores[i::2], labels[i::2]) for i in (0, 1))
        >>> float((first + second).auroc())
        0.75
    """

    def auroc(self) -> Array:
        """Area under the ROC curve of the scores rounded to the grid, shape [...]."""
        return _figures(self)[0]

    def auroc_error(self) -> Array:
        """Upper bound on the difference between `auroc` and the area under the ROC curve of the exact scores, shape [...]."""
        return _figures(self)[1]


@jax.jit
def _figures(ranking: Ranking) -> tuple[Array, Array]:
    positives, negatives, _ = sums.split(ranking)
    half = sums.scaled(negatives, 0.5)
    below_and_half = sums.value(sums.add_parts(sums.cumulative(negatives), sums.scaled(half, -1.0)))
    p, half = sums.value(positives), sums.value(half)
    all_p, all_n = (sums.value(sums.total(x, -1)) for x in (positives, negatives))

    def over_pairs(x: Array) -> Array:
        """Σ_g p_g x_g divided by the number of pairs; NaN if an example was invalid."""
        each = WeightedSum(x, jnp.broadcast_to(all_n[..., None], x.shape)).mean()
        return _counts.figure(WeightedSum((p * each).sum(-1), all_p).mean(), ranking.invalid)

    return over_pairs(below_and_half), over_pairs(half)


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
    """Two histograms, of the scores of positives and of the scores of negatives, each of shape [points].

    The grid points are low + g·(high − low)/(points − 1) for g = 0, …, points − 1. Each score is counted at the nearest grid point. A score
    outside [low, high] is counted at the nearer end. Results can be added over batches and devices. `Ranking` then computes the AUROC.
    Gradient: 0 with respect to `scores`. Let w be the weight of an example. The count at the grid point of this example
    has derivative 1 with respect to w.

    Args:
        scores: [...], probabilities or other numbers that should be larger for positives. For logits, set `low` and `high` to their range.
        labels: [...], booleans, or the integers 0 and 1.
        low: first grid point, a Python number.
        high: last grid point, a Python number above `low`.
        points: number of grid points, at least 2.
        weights: [...], w ≥ 0; None gives each example the weight 1.
        where: [...], True for examples that count.

    Returns:
        `Ranking`. Its counts are int32. With `weights`, they are float32, or float64 for float64 weights.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `low` is not below `high`, or `points` is below 2.

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


@functools.partial(jax.jit, static_argnames="points")
def _ranking(scores: Array, labels: Array, weights: Array | None, where: Array | None, low: float, high: float, points: int) -> Ranking:
    positive, negative, invalid = _amounts(scores, labels, weights, where)
    s = scores.astype(numerics.accumulation_dtype(scores.dtype))
    s = jnp.where(positive + negative != 0, jnp.clip(s, low, high), low)
    index = jnp.round((s - low) * ((points - 1) / (high - low)))
    counts = [_counts.tally(x, (points,), index) for x in (positive, negative)]
    return sums.collect(Ranking, *counts, sums.parts_of(invalid))


def auroc(scores: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Array:
    """Area under the ROC curve over all examples, shape [].

    auroc = Σ_{i: y_i=1} Σ_{j: y_j=0} w_i w_j ([s_i > s_j] + ½ [s_i = s_j]) / (Σ_{i: y_i=1} w_i · Σ_{j: y_j=0} w_j).
    Gradient: 0 with respect to `scores`.

    Here s_i are the scores, y_i are the labels and w_i are the weights. The AUROC is the probability that a random positive (label 1) has a
    larger score than a random negative (label 0). A tie counts as half. The AUROC equals scikit-learn's `roc_auc_score`. If there are no
    positives or no negatives, the AUROC is 0.

    `auroc` sorts all scores, so one device must hold all examples. For several batches or devices, use `ranking`, whose results can be
    added. To compute one AUROC per class, use `jax.vmap(auroc, in_axes=-1)(scores, one_hot)`.

    Args:
        scores: [...], logits, probabilities or other numbers that should be larger for positives.
        labels: [...], booleans, or the integers 0 and 1.
        weights: [...], w ≥ 0; None gives each example the weight 1.
        where: [...], True for examples that count.

    Returns:
        [], float32, or float64 if `scores` or `weights` are float64. NaN for a label other than 0 and 1, or for a NaN score.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.metrics.auroc(jnp.array([0.1, 0.4, 0.35, 0.4]), jnp.array([0, 0, 1, 1])))  # 2½ of 4 pairs
        0.625

    Reference:
        Hanley, McNeil, The meaning and use of the area under a receiver operating characteristic (ROC) curve, 1982.
    """
    return _auroc(*_check("auroc", scores, labels, weights, where))


@jax.jit
def _auroc(scores: Array, labels: Array, weights: Array | None, where: Array | None) -> Array:
    positive, negative, invalid = _amounts(scores, labels, weights, where)
    # NaN scores are sorted to the end. They tie with nothing and add nothing.
    ranked = lax.sort((lax.stop_gradient(scores).reshape(-1), positive.reshape(-1), negative.reshape(-1)), num_keys=1)
    s, positive, negative = ranked
    place, differs = lax.iota(jnp.int32, s.size), s[1:] != s[:-1]
    edge = jnp.ones_like(s[:1], bool)
    # For each example: the place of the first example with the same score, and the place after the last one.
    first = lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0))
    after = lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place + 1, s.size), reverse=True)
    up_to = jnp.concatenate([jnp.zeros(1, negative.dtype), jnp.cumsum(negative, dtype=negative.dtype)])
    dtype = numerics.accumulation_dtype(scores.dtype, positive.dtype)
    below = (up_to[first].astype(dtype) + up_to[after].astype(dtype)) / 2
    p, all_p, all_n = (x.astype(dtype) for x in (positive, positive.sum(), up_to[-1]))
    share = WeightedSum(below, jnp.full_like(below, all_n)).mean()  # 0 where there are no negatives
    return _counts.figure(WeightedSum((p * share).sum(), all_p).mean(), invalid)


def _check(
    function: str, scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None
) -> tuple[Array, Array, Array | None, Array | None]:
    s = checks.floating(function, "scores", scores)
    y = _counts.classes(function, "labels", labels, "Use labels > 0.5 for bits.")
    checks.same_shape(function, "labels", y, s.shape, "the shape of scores")
    w, counts = checks.example_weights(function, weights, where, s.shape, "the shape of scores")
    present = _counts.must_be_valid(w, counts)
    values.not_nan(function, "scores", s, present)
    values.check(function, "labels", y, lambda y: (y != 0) & (y != 1), "is neither 0 nor 1", present)
    return s, y, w, counts


def _amounts(scores: Array, labels: Array, weights: Array | None, where: Array | None) -> tuple[Array, Array, Array]:
    """How much each example adds to the positives and to the negatives, and the number of invalid examples."""
    valid = ((labels == 0) | (labels == 1)) & ~jnp.isnan(scores)
    amount, invalid = _counts.amounts(weights, where, valid)
    nothing = jnp.zeros_like(amount)
    return numerics.where(labels == 1, amount, nothing), numerics.where(labels == 0, amount, nothing), invalid
