"""Losses that are a function φ of the log-odds a = log(p/(1 − p)) of the label.

With log-odds, −log p = softplus(−a) and 1 − p = σ(−a). The loss of a class index y is φ(a_y). The loss of soft labels t is Σ_k t_k φ(a_k).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import numerics, rows, statistics, surprises


def surprise(log_odds: Array) -> Array:
    """The surprise −log p, with the shape of `log_odds`."""
    return numerics.softplus(-log_odds)


def focal(log_odds: Array, gamma: ArrayLike | None) -> Array:
    """The focal loss (1 − p)^γ (−log p), with the shape of `log_odds`. It is −log p if `gamma` is None.

    The power is computed as an exponential, which has derivatives of any order for every γ ≥ 0.
    """
    loss = surprise(log_odds)
    if gamma is None:
        return loss
    return jnp.exp(-jnp.asarray(gamma, loss.dtype) * numerics.softplus(log_odds)) * loss


def loss(batch: rows.Examples, phi: Callable[[Array], Array]) -> Array:
    """The final loss Σ_k t_k φ(a_k) of every example, shape [...]."""
    r = rows.of(batch)
    stats = statistics.of(r)
    return statistics.finish(r, stats, expected(r, stats, phi))


def expected(
    r: rows.Rows,
    stats: statistics.Statistics,
    phi: Callable[..., Array],
    smoothing: ArrayLike | None = None,
    class_weights: Array | None = None,
    of_class: Array | None = None,
    whole: bool = False,
) -> Array:
    """Σ_k t_k φ(a_k) of every row, shape [...], before `statistics.finish`.

    If the labels are class indices, only the log-odds of the label are needed. Label smoothing adds a sum over all classes.

    Args:
        r: the rows.
        stats: the statistics of the rows.
        phi: φ, a function of log-odds. If `of_class` is given, φ also takes the parameters of the same classes.
        smoothing: the share of the label that is spread evenly over the classes that exist; None means 0.
        class_weights: [classes], the weight of each class's term; None means 1.
        of_class: [classes], or [..., classes] for soft labels; one parameter of φ per class.
        whole: whether the result is the whole loss (see `surprises.expected`).
    """
    parameters = () if of_class is None else (of_class,)

    def sum_over_classes(t: Array) -> Array:
        t = _weighted(r, t, class_weights)
        if phi is not surprise:
            per_class = (jnp.broadcast_to(numerics.expand_leading(x, t.ndim), t.shape) for x in parameters)
            return rows.class_sum(r, numerics.weighted(t, phi(surprises.class_log_odds(r), *per_class)))
        if isinstance(stats, statistics.WithLabel):
            return rows.class_sum(r, numerics.weighted(t, surprises.surprise(r, stats)))
        return surprises.expected(r._replace(labels=t), whole)

    if not isinstance(stats, statistics.WithLabel):
        if phi is surprise and smoothing is None and class_weights is None:
            return surprises.expected(r, whole)
        return sum_over_classes(_soft_labels(r, smoothing))
    loss = stats.surprise if phi is surprise else phi(stats.log_odds, *(rows.at_label(r, x) for x in parameters))
    if class_weights is not None:
        loss = numerics.weighted(rows.at_label(r, class_weights.astype(r.values.dtype)), loss)
    if smoothing is None:
        return loss
    if phi is surprise and class_weights is None:
        spread = numerics.weighted(1 / jnp.asarray(rows.class_count(r), r.values.dtype), surprises.total(r, stats))
    else:
        spread = sum_over_classes(_uniform(r))
    smoothing = jnp.asarray(smoothing, r.values.dtype)
    return numerics.weighted(1 - smoothing, loss) + numerics.weighted(smoothing, spread)


def label_sum(r: rows.Rows, smoothing: ArrayLike | None = None, class_weights: Array | None = None) -> Array | float:
    """Σ_k t_k of every row, shape [...]. It is the number 1 for class indices without class weights."""
    if not r.labels_are_indices:
        return rows.class_sum(r, _weighted(r, _soft_labels(r, smoothing), class_weights))
    if class_weights is None:
        return 1.0
    own = rows.at_label(r, class_weights.astype(r.values.dtype))
    if smoothing is None:
        return own
    smoothing = jnp.asarray(smoothing, r.values.dtype)
    return (1 - smoothing) * own + smoothing * rows.class_sum(r, _weighted(r, _uniform(r), class_weights))


def _soft_labels(r: rows.Rows, smoothing: ArrayLike | None) -> Array:
    """Soft labels after label smoothing, shape [..., classes]."""
    if smoothing is None:
        return r.given_labels
    smoothing = jnp.asarray(smoothing, r.values.dtype)
    return (1 - smoothing) * r.given_labels + rows.masked(smoothing * _uniform(r), r.where)


def _uniform(r: rows.Rows) -> Array:
    """The uniform distribution over the classes that exist, shape [..., classes]."""
    count = jnp.asarray(rows.class_count(r), r.values.dtype)
    return rows.masked(jnp.broadcast_to((1 / count)[..., None], r.values.shape), None, r.class_mask)


def _weighted(r: rows.Rows, t: Array, class_weights: Array | None) -> Array:
    """Soft labels times class weights, shape [..., classes]."""
    return t if class_weights is None else t * numerics.expand_leading(class_weights.astype(r.values.dtype), t.ndim)


def by_label(r: rows.Rows, loss_of_index: Callable[[rows.Rows], Array]) -> Array:
    """The loss `loss_of_index` for labels that are class indices or soft labels, shape [...].

    For soft labels t, it is Σ_k t_k loss(k), computed one class at a time.
    """
    if r.labels_are_indices:
        return loss_of_index(r)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(k: Array) -> Array:
        index = jnp.broadcast_to(k, r.values.shape[:-1])  # not full_like, whose result would vary over the same devices as the logits
        return numerics.weighted(rows.label_share(r, k), loss_of_index(r._replace(labels=index)))

    return jnp.sum(lax.map(term, jnp.arange(r.classes, dtype=jnp.int32)), axis=0)
