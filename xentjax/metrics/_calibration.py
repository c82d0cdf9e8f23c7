"""Calibration in confidence bins. Shared conventions are documented in `xentjax.metrics`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, statistics, sums
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts, _examples


class _Fields(NamedTuple):
    counts: Array
    """[..., bins], the number of examples, or the sum of their weights; int32, or floating with weights."""
    hits: Array
    """[..., bins], the number or the weight of the examples whose label was predicted; the dtype of `counts`."""
    confidences: Array
    """[..., bins], Σ w·confidence over the examples of the bin; floating."""
    invalid: Array
    """[...], the number of examples with an out-of-range label, a NaN logit, or no possible class; int32."""


class Calibration(sums.RunningSum, _Fields):
    """Sums for a reliability diagram, one number per confidence bin, shape [..., bins].

    There are B bins. Bin b holds the examples with a confidence in (b/B, (b + 1)/B]. A reliability diagram shows `confidence()`,
    `accuracy()` and `counts` of each bin. Use `+` to add `Calibration`s of different batches, and `psum` to add them over devices.

    Each method returns a metric. Metrics have the leading axes that `jax.vmap` gave the sums. If an example was invalid, all metrics are
    NaN. Metrics are float32, or float64 if logits or weights are float64. The exception is `accuracy()`, which is float64 only if weights
    are float64.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[9.0, 0.0], [9.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1, 0])
        >>> stats = xentjax.metrics.calibration(logits, labels, bins=5)
        >>> stats.counts.tolist(), stats.accuracy().tolist()
        ([0, 0, 0, 1, 2], [0.0, 0.0, 0.0, 1.0, 0.5])
        >>> float(stats.expected_calibration_error())  # (0.27 + 2·0.5)/3
        0.42289...
    """

    def accuracy(self) -> Array:
        """Accuracy in each bin, hits_b / counts_b, shape [..., bins]; 0 in an empty bin."""
        return _figures(self)[0]

    def confidence(self) -> Array:
        """Mean confidence in each bin, confidences_b / counts_b, shape [..., bins]; 0 in an empty bin."""
        return _figures(self)[1]

    def expected_calibration_error(self) -> Array:
        """Expected calibration error, Σ_b counts_b |accuracy_b − confidence_b| / Σ_b counts_b, shape [...]."""
        return _figures(self)[2]

    def maximum_calibration_error(self) -> Array:
        """Maximum calibration error, max_b |accuracy_b − confidence_b|, shape [...]."""
        return _figures(self)[3]


@jax.jit
def _figures(stats: Calibration) -> tuple[Array, ...]:
    counts, hits, confidences, _ = sums.split(stats)
    # Subtract the sums, not their rounded quotients: in a calibrated model both are nearly equal.
    gaps = jnp.abs(sums.value(sums.add_parts(hits, sums.scaled(confidences, -1.0))))
    each = [WeightedSum(x, sums.value(counts)).mean() for x in (sums.value(hits), sums.value(confidences), gaps)]
    expected = WeightedSum(gaps.sum(-1), sums.value(sums.total(counts, -1))).mean()
    figures = (each[0], each[1], expected, each[2].max(-1))
    return tuple(_counts.figure(x, stats.invalid) for x in figures)


def calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    bins: int = 15,
    weights: ArrayLike | None = None,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Calibration:
    """Number of examples, number of hits and sum of confidences in bins of equal width, each of shape [bins].

    An example with logits z and label y has confidence = max_k p_k, with p = softmax(z), and hit = [argmax_k z_k = y]. It belongs to bin
    b = ⌈bins·confidence⌉ − 1. Each sum includes all examples of its bin.
    Gradient: 0 with respect to `logits`, which are behind `stop_gradient`. Let w be the weight of an example in bin b. Then
    ∂counts_b/∂w = 1, ∂hits_b/∂w = hit and ∂confidences_b/∂w = confidence.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices.
        bins: number of bins, at least 1. The bins divide the interval (0, 1] into parts of equal width.
        weights: [...], w ≥ 0; None gives each example the weight 1.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        `Calibration`. The fields `counts` and `hits` are int32. With `weights`, they are float32, or float64 for float64 weights. The field
        `confidences` is float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument has the wrong dtype, or `labels` are soft labels.
        ValueError: an argument has the wrong shape, or `bins` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits, labels = jnp.array([[4.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
        >>> temperature = xentjax.metrics.fit_temperature(logits, labels)
        >>> errors = [xentjax.metrics.calibration(z, labels).expected_calibration_error() for z in (logits, logits / temperature)]
        >>> [round(float(error), 3) for error in errors]
        [0.232, 0.0]

    Reference:
        Naeini, Cooper, Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015; Guo et al., On Calibration
        of Modern Neural Networks, 2017, arXiv 1706.04599.
    """
    name = "calibration"
    batch, w = _counts.indexed_and_weighted(name, logits, labels, axis, axis_name, class_mask, where, weights)
    return _calibration(batch, w, checks.count(name, "bins", bins))


@functools.partial(jax.jit, static_argnames="bins")
def _calibration(batch: rows.Examples, weights: Array | None, bins: int) -> Calibration:
    r = rows.of(batch)
    stats = statistics.of_row(r)
    confidence = rows.row_value(r, jnp.exp(-lax.stop_gradient(stats.log_sum)))
    hit = _examples.hits(r, 1, first=True)
    valid = ~jnp.isnan(hit) & ~jnp.isnan(confidence) & ~stats.all_impossible
    amount, invalid = _counts.amounts(weights, rows.counted(r), valid)
    index = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1).astype(jnp.int32)
    share = numerics.where(amount != 0, confidence, 0) * amount.astype(confidence.dtype)
    in_bin = index.reshape(1, -1) == lax.broadcasted_iota(jnp.int32, (bins, index.size), 0)
    counts = _counts.tally(amount, (bins,), index)
    hits = _counts.tally(numerics.where(hit == 1, amount, jnp.zeros_like(amount)), (bins,), index)
    # A reduction, not a scatter: a scatter adds one number at a time, and a float32 sum beyond 2²⁴ no longer grows by 1.
    confidences = jnp.sum(jnp.where(in_bin, share.reshape(1, -1), 0), axis=-1)
    return sums.collect(Calibration, counts, hits, sums.parts_of(confidences), sums.parts_of(invalid))
