"""Marginal probabilities and the best tagging of a conditional random field. Conventions are documented in `xentjax.sequence`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics
from xentjax._sequence import crf, lattice


def crf_marginals(
    unary: ArrayLike,
    transitions: ArrayLike,
    *,
    start: ArrayLike | None = None,
    end: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Probability of every tag at every position under a linear-chain conditional random field, shape [..., time, tags].

    P(y_t = k) = (1/Z)·Σ_y [y_t = k]·e^(s(y)), where s(y) is the score of tagging y as in `crf_loss`, and Z = Σ_y e^(s(y)).
    Gradient: the derivative of P(y_t = k) with respect to the score of tag j at position i is P(y_t = k, y_i = j) − P(y_t = k)·P(y_i = j).

    Args:
        unary: [..., time, tags], scores of the tags at every position.
        transitions: [tags, tags], scores of a tag (row) followed by another (column). −∞ forbids a transition.
        start: [tags], scores of the first tag; None: 0.
        end: [tags], scores of the last tag; None: 0.
        where: [..., time], True for positions that count. Other positions are left out, and their result is 0.

    Returns:
        [..., time, tags], float32, or float64 if any of the scores are float64. 0 if every tagging is forbidden.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> forbidden = jnp.array([[0.0, 0.0], [-jnp.inf, 0.0]])  # tag 1 is never followed by tag 0: 00, 01, 11
        >>> xentjax.sequence.crf_marginals(jnp.zeros((2, 2)), forbidden).tolist()
        [[0.666..., 0.333...], [0.333..., 0.666...]]

    Reference:
        Lafferty et al., Conditional Random Fields: Probabilistic Models for Segmenting and Labeling Sequence Data, 2001.
    """
    return _marginals(crf.check("crf_marginals", unary, transitions, start, end, where))


@jax.jit
def _marginals(model: crf.Model) -> Array:
    return crf.on_each_device(_of_positions, model)


def _of_positions(model: crf.Model) -> Array:
    total, slopes = lattice.value_and_slopes(crf.CHAIN, crf.partition(crf.prepared(model)))
    found = jnp.moveaxis(slopes.xs.unary, 0, -2)
    return numerics.where(jnp.broadcast_to(lattice.checked_total(total)[1][..., None, None], found.shape), 0, found)


def crf_decode(
    unary: ArrayLike,
    transitions: ArrayLike,
    *,
    start: ArrayLike | None = None,
    end: ArrayLike | None = None,
    best: int | None = None,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The tagging with the largest score, shape [..., time], and its score, shape [...]; with `best`, several taggings and their scores.

    The tagging y maximizes the score s(y) = a(y_1) + Σ_t z_t(y_t) + Σ_t w(y_{t−1}, y_t) + b(y_T), as in `crf_loss`.
    Gradient of the score: ∂s/∂z_t(k) = [y_t = k], and likewise for the other scores. The tags have no gradient.

    With `best`, the taggings are ordered from the largest score to the smallest. Two taggings with the same score are ordered by their tags
    at the last position where they differ: the tagging with the smaller tag comes first.

    Args:
        unary: [..., time, tags], scores of the tags at every position.
        transitions: [tags, tags], scores of a tag (row) followed by another (column). −∞ forbids a transition.
        start: [tags], scores of the first tag; None: 0.
        end: [tags], scores of the last tag; None: 0.
        best: number of taggings; None: one tagging, without an axis for it.
        where: [..., time], True for positions that count. Other positions are left out.

    Returns:
        The tags [..., time], or [..., best, time], int32; and the score [...], or [..., best], float32, or float64 if any of the scores
        are float64. The tags are −1 at positions that do not count. If fewer than `best` taggings are allowed, the tags of the remaining
        entries are −1, and their scores are −∞. A sequence without positions that count has one tagging, with score 0.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `best` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> unary, stay = jnp.array([[2.0, 0.0], [0.0, 0.5], [2.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> tags, score = xentjax.sequence.crf_decode(unary, stay)
        >>> tags.tolist(), float(score)
        ([0, 0, 0], 6.0)
        >>> tags, scores = xentjax.sequence.crf_decode(unary, stay, best=2)
        >>> tags.tolist(), scores.tolist()
        ([[0, 0, 0], [0, 1, 0]], [6.0, 4.5])

    Reference:
        Viterbi, Error Bounds for Convolutional Codes and an Asymptotically Optimum Decoding Algorithm, 1967; Seshadri and Sundberg, List
        Viterbi Decoding Algorithms with Applications, 1994.
    """
    name = "crf_decode"
    model = crf.check(name, unary, transitions, start, end, where)
    if best is None:
        tags, score = _decode(model, 1)
        return tags.squeeze(-2), score.squeeze(-1)
    return _decode(model, checks.count(name, "best", best))


@functools.partial(jax.jit, static_argnames="best")
def _decode(model: crf.Model, best: int) -> tuple[Array, Array]:
    return crf.on_each_device(functools.partial(_best_taggings, best=best), model)


def _best_taggings(model: crf.Model, best: int) -> tuple[Array, Array]:
    """The tags [..., best, time] and the scores [..., best].

    α [..., tags, best] has the scores of the best taggings that end with a tag, sorted. Entry r of tag k has index k·best + r.
    """
    model = crf.prepared(model)
    weights = lax.stop_gradient(crf.partition(model))
    xs, shared, end = jax.tree.map(lambda x: x * 2.0**-32, (weights.xs, weights.shared, weights.end))  # so that no sum overflows
    weights = weights._replace(xs=xs, shared=shared, end=end)
    flat = (*weights.end.shape[:-1], -1)

    def forward(alpha: Array, inputs: Any) -> tuple[Array, Array]:
        x, live = inputs
        following, back = _merged(alpha, jnp.swapaxes(weights.shared, -1, -2))
        following = following.at[..., 0].max(x.entering)
        following = following + x.unary[..., None]
        return jnp.where(live[..., None, None], following, alpha), back.reshape(flat)

    start = jnp.full((*weights.end.shape, best), -jnp.inf, weights.end.dtype)
    alpha, back = lax.scan(forward, mesh.vary(start, mesh.axes_of(weights)), (weights.xs, weights.live))
    some = jnp.any(weights.live, axis=0)[..., None]
    score, index = (x.squeeze(-2) for x in _merged(alpha, weights.end[..., None, :]))
    none = jnp.where(some, score == -jnp.inf, lax.broadcasted_iota(jnp.int32, score.shape, score.ndim - 1) > 0)

    def backward(index: Array, inputs: Any) -> tuple[Array, Array]:
        back, live = inputs
        return jnp.where(live[..., None], jnp.take_along_axis(back, index, axis=-1), index), index

    _, path = lax.scan(backward, index, (back, weights.live), reverse=True)
    tags = jnp.moveaxis(path, 0, -1) // best
    used = jnp.moveaxis(weights.live, 0, -1)[..., None, :] & ~none[..., None]
    score = jax.vmap(functools.partial(crf.score, model), -2, -1)(jnp.where(used, tags, 0))
    score = numerics.where(none, -jnp.inf, jnp.where(some, score, jnp.zeros_like(score)))
    order = jnp.argsort(-lax.stop_gradient(score), axis=-1, stable=True)  # the sums in α were rounded in another order
    tags = jnp.take_along_axis(jnp.where(used, tags, -1), order[..., None], axis=-2)
    return tags, jnp.take_along_axis(score, order, axis=-1)


def _merged(alpha: Array, added: Array) -> tuple[Array, Array]:
    """The largest sums of α_k [..., tags, best] and of a number [..., to, tags] for tag k, and their indices, each [..., to, best].

    α_k is sorted for each tag. So the next largest sum is that of the first remaining entry of some tag. Of equal sums, the one with the
    smaller index comes first.
    """
    best = alpha.shape[-1]
    ended = jnp.concatenate([alpha, jnp.full_like(alpha[..., :1], -jnp.inf)], axis=-1).reshape(*alpha.shape[:-2], -1)
    tag = lax.broadcasted_iota(jnp.int32, added.shape, added.ndim - 1)

    def following(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        sums, used = carry  # of the first remaining entry of every tag [..., to, tags], and the number of used entries
        value, k = jnp.max(sums, axis=-1), jnp.argmax(sums, axis=-1).astype(jnp.int32)
        chosen = tag == k[..., None]
        rank = jnp.sum(jnp.where(chosen, used, 0), axis=-1)
        after = jnp.take_along_axis(ended, k * (best + 1) + rank + 1, axis=-1)
        return (jnp.where(chosen, after[..., None] + added, sums), jnp.where(chosen, used + 1, used)), (value, k * best + rank)

    first = alpha[..., None, :, 0] + added
    carry = mesh.vary((first, jnp.zeros_like(tag)), mesh.axes_of(first))
    _, found = lax.scan(following, carry, length=best)
    return tuple(jnp.moveaxis(x, 0, -1) for x in found)  # type: ignore[return-value]  # `found` is a pair
