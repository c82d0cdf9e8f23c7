"""Losses φ of the log-odds of a label, taken over indices and distributions alike.

With a = log(p/(1 − p)): −log p = softplus(−a), 1 − p = σ(−a). An index costs φ(a_y), a distribution Σ_k t_k φ(a_k).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import numerics, rows, statistics, surprises


def surprise(log_odds: Array) -> Array:
    """−log p."""
    return numerics.softplus(-log_odds)


def focal(log_odds: Array, gamma: ArrayLike | None) -> Array:
    """(1 − p)^γ (−log p); as an exponential it has every derivative for every γ ≥ 0."""
    loss = surprise(log_odds)
    if gamma is None:
        return loss
    return jnp.exp(-jnp.asarray(gamma, loss.dtype) * numerics.softplus(log_odds)) * loss


def loss(batch: rows.Examples, phi: Callable[[Array], Array]) -> Array:
    """The loss Σ_k t_k φ(a_k) of every example [...], finished."""
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
) -> Array:
    """Σ_k t_k φ(a_k) [...]. With `of_class` [classes], or [..., classes] for soft labels, φ also gets the number of each class.

    An index needs only the log-odds of its own class. With label smoothing, a sum over all classes is added.
    """
    own = () if of_class is None else (of_class,)

    def sum_over_classes(t: Array) -> Array:
        t = _weighted(r, t, class_weights)
        if phi is not surprise:
            per_class = (jnp.broadcast_to(numerics.expand_leading(x, t.ndim), t.shape) for x in own)
            return rows.class_sum(r, t * phi(surprises.class_log_odds(r), *per_class))
        if isinstance(stats, statistics.WithLabel):
            return rows.class_sum(r, t * surprises.surprise(r, stats))
        return surprises.expected(r, t)

    if not isinstance(stats, statistics.WithLabel):
        return sum_over_classes(_soft_labels(r, smoothing))
    loss = phi(stats.log_odds, *(rows.at_label(r, x) for x in own))
    if class_weights is not None:
        loss *= rows.at_label(r, class_weights.astype(r.values.dtype))
    if smoothing is None:
        return loss
    if phi is surprise and class_weights is None:
        spread = surprises.total(r, stats) / jnp.asarray(rows.class_count(r), r.values.dtype)
    else:
        spread = sum_over_classes(_uniform(r))
    smoothing = jnp.asarray(smoothing, r.values.dtype)
    return (1 - smoothing) * loss + smoothing * spread


def label_sum(r: rows.Rows, smoothing: ArrayLike | None = None, class_weights: Array | None = None) -> Array | float:
    """Σ_k t_k [...], which is 1 for an index without class weights."""
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
    """Labels that are distributions, smoothed."""
    assert r.labels is not None
    if smoothing is None:
        return r.labels
    smoothing = jnp.asarray(smoothing, r.values.dtype)
    return (1 - smoothing) * r.labels + rows.masked(smoothing * _uniform(r), r.where)


def _uniform(r: rows.Rows) -> Array:
    """The uniform distribution over the classes that exist [..., classes]."""
    count = jnp.asarray(rows.class_count(r), r.values.dtype)
    return rows.masked(jnp.broadcast_to((1 / count)[..., None], r.values.shape), None, r.class_mask)


def _weighted(r: rows.Rows, t: Array, class_weights: Array | None) -> Array:
    return t if class_weights is None else t * numerics.expand_leading(class_weights.astype(r.values.dtype), t.ndim)


def by_label(r: rows.Rows, loss_of_index: Callable[[rows.Rows], Array]) -> Array:
    """A loss that is defined for indices, for any labels: a distribution costs Σ_k t_k loss(k), one class after another."""
    if r.labels_are_indices:
        return loss_of_index(r)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(k):
        index = jnp.broadcast_to(k, r.values.shape[:-1])  # not full_like, which would vary over devices as the logits do
        return rows.label_share(r, k) * loss_of_index(r._replace(labels=index))

    return jnp.sum(lax.map(term, jnp.arange(r.classes, dtype=jnp.int32)), axis=0)
