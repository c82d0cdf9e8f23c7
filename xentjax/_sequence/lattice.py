"""Sums over all paths of a lattice, and the derivative rule behind the losses of sequences.

A lattice has states, and steps t = 1, …, T. Let α_t(s) be the sum of the weights of all paths that are in state s after step t. With the
weight w_t(s′, s) of the edge from s′ to s,

    α_t(s) = Σ_{s′} α_{t−1}(s′) w_t(s′, s)        total p = Σ_s α_T(s) e(s)

where e(s) is the weight of ending in s. All numbers are kept as logarithms, and after every step the largest of a sequence is subtracted
and added up separately. So a sum of any size keeps its digits.

Lost mass. In a lattice of probabilities, the total is the probability p of the labels. A certain sequence has p ≈ 1, and −log p as the
logarithm of a sum near 1 has no digits left. Let ℓ_t(s) be the probability that step t, taken in state s, leaves all paths of the lattice.
All paths start with probability 1, so whatever does not arrive is lost somewhere:

    1 − p = Σ_t Σ_s α_{t−1}(s) ℓ_t(s) + Σ_s α_T(s) (1 − e(s))

No term of this sum is negative, so it keeps its relative accuracy. Where p > 1/2, log p is log1p(−(1 − p)).

Derivatives. The derivative of log p with respect to log α_t(s) comes from a backward recursion over the same edges: every state divides its
derivative among the edges that lead to it, in proportion to their shares of the sum. Without lost mass, these derivatives are the posterior
probabilities of the states. With lost mass, they are minus the probability of being in the state and getting lost later, divided by p, and
each step adds what it loses itself. In both cases all terms have the same sign, so the derivatives are as accurate as the sums.
The rule makes all derivatives of one sequence in one backward pass, keeps α of every step, and gives JAX a tangent that it can transpose.

No path. A weight of 0 is the logarithm ABSENT, a large negative number, so that no difference of infinities occurs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics

ABSENT = -(2.0**100)  # the logarithm of a weight of 0
_IMPOSSIBLE = -(2.0**90)  # a sum below this has only paths with an absent edge; finite logits are far smaller


class Lattice(NamedTuple):
    """The edges of a lattice, as functions of arrays with any leading axes.

    α is a tuple of arrays [..., states]. The weights are logarithms. `x` holds those of one step and `shared` those of all steps. `fixed_x`
    and `fixed` are like `x` and `shared`, but hold arrays that are not differentiated.
    """

    advance: Callable  # (α, x, shared, fixed_x, fixed) → α after the step, with sums made by `add`
    lost: Callable | None = None  # (e^α, x) → Σ_s e^α(s) ℓ(s), shape [...]; None if weights are no probabilities


class Arguments(NamedTuple):
    """The weights of a lattice. A leaf of a field with a step axis has shape [steps, ..., n]; `...` are the axes of the sequences."""

    start: tuple[Array, ...]  # log α_0; not differentiated
    xs: Any  # with a step axis
    shared: Any
    end: tuple[Array, ...]  # log e(s), in the shape of α
    fixed_xs: Any  # with a step axis; not differentiated
    fixed: Any  # not differentiated
    live: Array  # [steps, ...], False for steps that a sequence skips


def add(*terms: Array) -> Array:
    """log Σ_i e^(x_i), elementwise, for numbers that may be ABSENT."""
    top = lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    return top + jnp.log(sum(jnp.exp(x - top) for x in terms))


def add_over(x: Array, axis: int) -> Array:
    """log Σ e^x over one axis, for numbers that may be ABSENT."""
    top = lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    return jnp.squeeze(top, axis) + jnp.log(jnp.sum(jnp.exp(x - top), axis=axis))


def present(condition: Array, like: Array) -> Array:
    """0 where `condition` is True, ABSENT elsewhere, in the dtype of `like`: a log-weight that keeps or removes an edge."""
    return jnp.where(condition, jnp.zeros((), like.dtype), jnp.asarray(ABSENT, like.dtype))


def is_impossible(log_total: Array) -> Array:
    """Whether a sum has no path."""
    return lax.stop_gradient(log_total) < _IMPOSSIBLE


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_total(lattice: Lattice, weights: Arguments) -> Array:
    """The logarithm of the sum of all paths, shape [...]; below `_IMPOSSIBLE` if there is no path."""
    carry, _ = _forward(lattice, weights, keep=False)
    return _finish(lattice, *carry, weights.end)


@log_total.defjvp
def _(lattice: Lattice, primals: tuple[Arguments], tangents: tuple[Arguments]) -> tuple[Array, Array]:
    (weights,), (moved,) = primals, tangents
    value, xs, shared, end = value_and_slopes(lattice, weights)
    first = value.ndim  # the axis after those of the sequences

    def dot(slopes: Any, dots: Any, step_axis: bool) -> list[Array]:
        axes = [(0,) * step_axis + tuple(range(first + step_axis, g.ndim)) for g in jax.tree.leaves(slopes)]
        return [jnp.sum(g * d, axis=a) for g, d, a in zip(jax.tree.leaves(slopes), jax.tree.leaves(dots), axes, strict=True)]

    parts = [*dot(xs, moved.xs, True), *dot(shared, moved.shared, False), *dot(end, moved.end, False)]
    return value, functools.reduce(jnp.add, parts)


def value_and_slopes(lattice: Lattice, weights: Arguments) -> tuple[Array, Any, Any, Any]:
    """The log-total [...], and its derivatives with respect to `xs`, `shared` and `end`."""
    (alpha, offset, lost), kept = _forward(lattice, weights, keep=True)
    value, pull = jax.vjp(lambda alpha, lost, end: _finish(lattice, alpha, offset, lost, end), alpha, lost, weights.end)
    alpha_bar, lost_bar, end_bar = pull(jnp.ones_like(value))

    def backward(carry: Any, inputs: Any) -> Any:
        alpha_bar, shared_bar = carry
        (alpha, offset), x, fixed_x, live = inputs
        _, pull = jax.vjp(lambda a, x, s: _step(lattice, a, offset, x, s, fixed_x, weights.fixed, live), alpha, x, weights.shared)
        alpha_bar, x_bar, more = pull((alpha_bar, lost_bar))
        return (alpha_bar, jax.tree.map(jnp.add, shared_bar, more)), x_bar

    start = _alike((alpha_bar, jax.tree.map(jnp.zeros_like, weights.shared)), weights)
    inputs = (kept, weights.xs, weights.fixed_xs, weights.live)
    (_, shared_bar), xs_bar = lax.scan(backward, start, inputs, reverse=True)
    return value, xs_bar, shared_bar, end_bar


def _forward(lattice: Lattice, weights: Arguments, keep: bool) -> Any:
    """(α after the last step minus an offset, the offset, the mass lost), and with `keep` the first two before every step."""

    def forward(carry: Any, inputs: Any) -> Any:
        alpha, offset, lost = carry
        x, fixed_x, live = inputs
        following, more = _step(lattice, alpha, offset, x, weights.shared, fixed_x, weights.fixed, live)
        top = functools.reduce(jnp.maximum, [jnp.max(a, axis=-1) for a in following])
        shift = lax.stop_gradient(jnp.where(top < _IMPOSSIBLE, jnp.zeros_like(top), top))
        following = tuple(jnp.maximum(a - shift[..., None], ABSENT) for a in following)
        return (following, offset + shift, lost + more), ((alpha, offset) if keep else None)

    zero = jnp.zeros(weights.start[0].shape[:-1], weights.start[0].dtype)
    return lax.scan(forward, _alike((weights.start, zero, zero), weights), (weights.xs, weights.fixed_xs, weights.live))


def _step(lattice: Lattice, alpha: Any, offset: Array, x: Any, shared: Any, fixed_x: Any, fixed: Any, live: Array) -> Any:
    """α after a step, and the mass that the step loses. A step that is not live changes nothing."""
    following = lattice.advance(alpha, x, shared, fixed_x, fixed)
    following = tuple(jnp.where(live[..., None], new, old) for new, old in zip(following, alpha, strict=True))
    if lattice.lost is None:
        return following, jnp.zeros_like(offset)
    # e^α and the offset are at most 1 where the result is used; the bound keeps sums of other weights finite
    mass = lattice.lost(tuple(jnp.exp(a) for a in alpha), x) * jnp.exp(jnp.minimum(offset, 0))
    return following, jnp.where(live, mass, jnp.zeros_like(mass))


def _finish(lattice: Lattice, alpha: tuple[Array, ...], offset: Array, lost: Array, end: tuple[Array, ...]) -> Array:
    parts = [add_over(a + e, -1) for a, e in zip(alpha, end, strict=True)]
    direct = jnp.maximum(add(*parts) + offset, ABSENT)
    if lattice.lost is None:
        return direct
    stranded = [jnp.sum(jnp.exp(a) * -jnp.expm1(e), axis=-1) for a, e in zip(alpha, end, strict=True)]
    lost += functools.reduce(jnp.add, stranded) * jnp.exp(jnp.minimum(offset, 0))
    certain = direct > -math.log(2)
    small = jnp.where(certain, jnp.minimum(lost, 0.75), jnp.zeros_like(lost))
    return jnp.where(certain, jnp.log1p(-small), direct)


def _alike(carry: Any, weights: Arguments) -> Any:
    """The carry, typed as varying over every mesh axis over which a weight varies, as `lax.scan` demands."""
    return mesh.vary(carry, mesh.axes_of(weights)) if mesh.axes_of(weights) else carry


def checked_total(log_total: Array) -> tuple[Array, Array]:
    """The log-total with derivative 0 where there is no path, and whether there is none."""
    none = is_impossible(log_total)
    return numerics.where(none, jnp.zeros_like(log_total), log_total), none
