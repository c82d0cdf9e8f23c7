"""Losses φ of the log-odds of a label, taken over indices and distributions alike.

With a = log(p/(1 − p)): −log p = softplus(−a), 1 − p = σ(−a). An index costs φ(a_y), a distribution Σ_k t_k φ(a_k).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics, rows, statistics, surprises


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
    """The whole of a loss that is a φ of the log-odds and nothing else."""
    r = rows.of(batch)
    found = statistics.of(r)
    return statistics.close(r, found, expected(r, found, phi)[0])


def expected(
    r: rows.Rows,
    found: statistics.Statistics,
    phi: Callable[..., Array],
    smoothing: ArrayLike | None = None,
    class_weights: Array | None = None,
    of_class: Array | None = None,
) -> tuple[Array, Array]:
    """Σ_k t_k φ(a_k) and s = Σ_k t_k; with `of_class` [classes], φ also gets each class's own number.

    An index needs only its own class's log-odds; its smoothing is a sum over all classes, added to that.
    """
    w = None if class_weights is None else class_weights.astype(r.values.dtype)

    def sums(t):
        t = t if w is None else t * numerics.expand_leading(w, t.ndim)
        if phi is surprise:  # −log p_k needs no log-odds
            if found.log_odds is None:
                return surprises.expected(r, t), rows.class_sum(r, t)
            per_class = surprises.surprise(r, found)
        else:
            more = () if of_class is None else (jnp.broadcast_to(numerics.expand_leading(of_class, t.ndim), t.shape),)
            per_class = phi(surprises.class_log_odds(r), *more)
        return rows.class_sum(r, t * per_class), rows.class_sum(r, t)

    if smoothing is not None:
        smoothing = jnp.asarray(smoothing, r.values.dtype)
        count = jnp.asarray(rows.class_count(r), r.values.dtype)
        share = rows.masked(jnp.broadcast_to((1 / count)[..., None], r.values.shape), None, r.class_mask)
    if found.log_odds is None:
        assert r.labels is not None
        return sums(r.labels if smoothing is None else (1 - smoothing) * r.labels + rows.masked(smoothing * share, r.where))
    s = jnp.ones_like(found.log_odds) if w is None else rows.at_label(r, w)
    loss = s * phi(found.log_odds, *(() if of_class is None else (rows.at_label(r, of_class),)))
    if smoothing is None:
        return loss, s
    spread, total = (total_surprise(r, found) / count, jnp.ones_like(s)) if phi is surprise and w is None else sums(share)
    return (1 - smoothing) * loss + smoothing * spread, (1 - smoothing) * s + smoothing * total


def by_label(r: rows.Rows, loss_of_index: Callable[[rows.Rows], Array]) -> Array:
    """A loss that is defined for indices, for any labels: a distribution costs Σ_k t_k loss(k), one class after another."""
    if r.hard:
        return loss_of_index(r)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(k):
        index = jnp.broadcast_to(k, r.values.shape[:-1])  # not full_like, which would vary over devices as the logits do
        return rows.label_share(r, k) * loss_of_index(r._replace(labels=index))

    return jnp.sum(lax.map(term, jnp.arange(r.classes, dtype=jnp.int32)), axis=0)


def entropy(r: rows.Rows, found: statistics.Statistics) -> Array:
    """H(p) = −Σ_k p_k log p_k of every row, as c + Σ_k p_k(m − z_k): neither term is ever negative."""
    return _entropy(r.values, found.reference, found.log_sum, r.class_mask, r.where, r.axis_name)


def total_surprise(r: rows.Rows, found: statistics.Statistics) -> Array:
    """Σ_k −log p_k over the classes that exist, as K·c + Σ_k (m − z_k)."""
    below = rows.class_sum(r, rows.masked(found.reference[..., None] - r.values, r.where, r.class_mask))
    return rows.class_count(r) * found.log_sum + numerics.where(below == jnp.inf, numerics.INFINITE, below)


# A rule, so that the gradient is one loop over the logits, with exponentials of its own: what it shared with a sum would be stored.


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _entropy(z, m, c, class_mask, where, axis_name):
    x = z - m[..., None]
    x = rows.masked(numerics.where(x == -jnp.inf, -numerics.INFINITE, x), where, class_mask)
    terms = jnp.exp(x - c[..., None]) * x
    # The selection keeps XLA on CPUs from storing c and m at every class for its reduction; it stores the terms instead.
    return c - _sum(numerics.where(x > -numerics.INFINITE, terms, 0), axis_name)


@_entropy.defjvp
def _(axis_name, primals, tangents):
    z, m, c, class_mask, where = primals
    h = _entropy(z, m, c, class_mask, where, axis_name)
    log_p = rows.masked(jnp.maximum(z + (-m)[..., None], -numerics.INFINITE), where, class_mask) - c[..., None]
    slope = rows.masked(-jnp.exp(log_p) * (log_p + h[..., None]), where, class_mask)  # that of c, lse − m, is in it
    return h, _sum(slope * tangents[0], axis_name)


def _sum(x, axis_name):
    return mesh.psum(jnp.sum(x, axis=-1), mesh.names(axis_name))
