"""Whether confidence is what it says, in bins; the conventions stand in `xentjax.metrics`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, statistics, sums
from xentjax._reduction import WeightedSum
from xentjax.metrics import _counts


class _Fields(NamedTuple):
    counts: Array
    """[..., bins], examples or their weights; int32, or floating with weights."""
    hits: Array
    """[..., bins], the same of those whose label was predicted."""
    confidences: Array
    """[..., bins], Σ w·confidence; floating."""
    invalid: Array
    """[...], how many examples had a label out of range, a NaN logit, or no possible class; int32."""


class Calibration(sums.RunningSum, _Fields):
    """Sums of a reliability diagram per bin of confidence, each [..., bins]; adds over batches, sums over devices, has methods for figures.

    Bin b of B holds the examples with confidence in (b/B, (b + 1)/B]. The data of the diagram are `confidence()`, `accuracy()` and
    `counts`. Figures are float32 (float64 for float64 logits), with the leading axes that `jax.vmap` gave the sums; all are NaN if
    an example was invalid.

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
        """hits_b / counts_b, [..., bins]; 0 in an empty bin."""
        return _figures(self)[0]

    def confidence(self) -> Array:
        """confidences_b / counts_b, [..., bins]; 0 in an empty bin."""
        return _figures(self)[1]

    def expected_calibration_error(self) -> Array:
        """Σ_b counts_b |accuracy_b − confidence_b| / Σ_b counts_b, [...]."""
        return _figures(self)[2]

    def maximum_calibration_error(self) -> Array:
        """max_b |accuracy_b − confidence_b|, [...]."""
        return _figures(self)[3]


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
    """Confidence against accuracy in bins of equal width, `Calibration` with sums [bins] over all examples.

    confidence = max_k p_k with p = softmax(z), hit = [argmax_k z_k = y];  an example is in bin ⌈bins·confidence⌉.
    Gradient: none by the logits, from which the figures are behind `stop_gradient`; a weight has those of its bin.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...], class indices.
        bins: how many bins divide (0, 1].
        weights: [...], w ≥ 0; None counts each example once.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        `Calibration`; counts are int32 without `weights`, the other sums float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit; labels that are distributions.
        ValueError: a shape that does not fit, `bins` below 1.

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
    batch = _counts.indexed(name, logits, labels, axis, axis_name, class_mask, where)
    assert batch.labels is not None
    w, _ = _counts.per_example(name, weights, batch.where, batch.labels.shape, "the shape of logits without its class axis")
    return _calibration(batch, w, checks.count(name, "bins", bins))


@functools.partial(jax.jit, static_argnames="bins")
def _calibration(batch, weights, bins):
    r = rows.of(batch)
    stats = statistics.of_row(r)
    confidence = rows.row_value(r, jnp.exp(-lax.stop_gradient(stats.log_sum)))
    hit = _counts.hits(r, 1, first=True)
    valid = ~jnp.isnan(hit) & ~jnp.isnan(confidence) & ~stats.dead
    amount, invalid = _counts.amounts(weights, rows.counted(r), valid)
    index = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1).astype(jnp.int32)
    share = numerics.where(amount != 0, confidence, 0) * amount.astype(confidence.dtype)
    in_bin = index.reshape(1, -1) == lax.broadcasted_iota(jnp.int32, (bins, index.size), 0)
    counts = _counts.tally(amount, (bins,), index)
    hits = _counts.tally(numerics.where(hit == 1, amount, jnp.zeros_like(amount)), (bins,), index)
    # a reduction, not a scatter: that adds one by one, and a float32 beyond 2²⁴ no longer changes by 1
    confidences = jnp.sum(jnp.where(in_bin, share.reshape(1, -1), 0), axis=-1)
    return sums.collect(Calibration, counts, hits, sums.parts_of(confidences), sums.parts_of(invalid))


@jax.jit
def _figures(stats):
    counts, hits, confidences, _ = sums.split(stats)
    # the difference of the sums, not of their rounded quotients, because both are nearly equal in a calibrated model
    gaps = jnp.abs(sums.value(sums.add_parts(hits, sums.scaled(confidences, -1.0))))
    each = [WeightedSum(x, sums.value(counts)).mean() for x in (sums.value(hits), sums.value(confidences), gaps)]
    expected = WeightedSum(gaps.sum(-1), sums.value(sums.total(counts, -1))).mean()
    figures = (each[0], each[1], expected, each[2].max(-1))
    return tuple(_counts.figure(x, stats.invalid) for x in figures)
