"""Marginal probabilities and the best tagging of a conditional random field. Conventions are documented in `xentjax.sequence`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import mesh, numerics
from xentjax._sequence import crf, lattice, scaled


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
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The tagging with the largest score, shape [..., time], and its score, shape [...].

    The tagging y maximizes the score s(y) = a(y_1) + Σ_t z_t(y_t) + Σ_t w(y_{t−1}, y_t) + b(y_T), as in `crf_loss`.
    Gradient of the score: ∂s/∂z_t(k) = [y_t = k], and likewise for the other scores. The tags have no gradient.

    Args:
        unary: [..., time, tags], scores of the tags at every position.
        transitions: [tags, tags], scores of a tag (row) followed by another (column). −∞ forbids a transition.
        start: [tags], scores of the first tag; None: 0.
        end: [tags], scores of the last tag; None: 0.
        where: [..., time], True for positions that count. Other positions are left out.

    Returns:
        The tags [..., time], int32, which are −1 at positions that do not count, and everywhere if every tagging is forbidden; and the
        score [...], float32, or float64 if any of the scores are float64. It is −∞ if every tagging is forbidden, and 0 if no position
        counts.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> stay = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> tags, score = xentjax.sequence.crf_decode(jnp.array([[2.0, 0.0], [0.0, 0.5], [2.0, 0.0]]), stay)
        >>> tags.tolist(), float(score)
        ([0, 0, 0], 6.0)

    Reference:
        Viterbi, Error Bounds for Convolutional Codes and an Asymptotically Optimum Decoding Algorithm, 1967.
    """
    return _decode(crf.check("crf_decode", unary, transitions, start, end, where))


@jax.jit
def _decode(model: crf.Model) -> tuple[Array, Array]:
    return crf.on_each_device(_best_tagging, model)


def _best_tagging(model: crf.Model) -> tuple[Array, Array]:
    model = crf.prepared(model)
    weights = lax.stop_gradient(crf.partition(model))
    transitions = weights.shared

    def forward(alpha: Array, inputs: Any) -> tuple[Array, Array]:
        x, live = inputs
        moved = alpha[..., None] + transitions
        best, back = jnp.max(moved, axis=-2), jnp.argmax(moved, axis=-2).astype(jnp.int32)
        following = jnp.maximum(jnp.maximum(best, x.entering) + x.unary, scaled.ABSENT)
        return jnp.where(live[..., None], following, alpha), back

    start = jnp.full(weights.end.shape, scaled.ABSENT, weights.end.dtype)
    alpha, back = lax.scan(forward, mesh.vary(start, mesh.axes_of(weights)), (weights.xs, weights.live))
    some = jnp.any(weights.live, axis=0)
    last = alpha + weights.end
    tag = jnp.argmax(last, axis=-1).astype(jnp.int32)
    none = some & (jnp.max(last, axis=-1) < scaled.IMPOSSIBLE)

    def backward(tag: Array, inputs: Any) -> tuple[Array, Array]:
        back, live = inputs
        return jnp.where(live, jnp.take_along_axis(back, tag[..., None], axis=-1).squeeze(-1), tag), tag

    _, path = lax.scan(backward, tag, (back, weights.live), reverse=True)
    path = jnp.moveaxis(path, 0, -1)
    used = jnp.moveaxis(weights.live, 0, -1) & ~none[..., None]
    score = crf.score(model, jnp.where(used, path, 0))
    score = jnp.where(some, score, jnp.zeros_like(score))
    return jnp.where(used, path, -1), numerics.where(none, -jnp.inf, score)
