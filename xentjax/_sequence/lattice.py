"""Sums over all paths of a lattice, and the derivative rule behind the losses of sequences.

A lattice has states, and steps t = 1, …, T. Let α_t(s) be the sum of the weights of all paths that are in state s after step t. With the
weight w_t(s′, s) of the edge from s′ to s,

    α_t(s) = Σ_{s′} α_{t−1}(s′) w_t(s′, s)        total p = Σ_s α_T(s) e(s)

where e(s) is the weight of ending in s. All numbers are kept as mantissas and exponents (`scaled`). So a sum of any size keeps its digits,
and a step needs no exponentials and no logarithms.

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

No path. A weight of 0 is the logarithm `scaled.ABSENT`, a large negative number, so that no difference of infinities occurs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import mesh, numerics
from xentjax._sequence import scaled
from xentjax._sequence.scaled import Scaled


class Lattice(NamedTuple):
    """The edges of a lattice, as functions of arrays with any leading axes.

    α is a `Scaled` [..., states]. `advance` gets the weights as `Scaled`: `x` are those of one step, and `shared` those of all steps.
    `fixed_x` and `fixed` are like `x` and `shared`, but hold arrays that are not differentiated. ᾱ are derivatives of the log-total by the
    mantissas of α after a step, and k are the exponents of α after that step: the weight of an edge is multiplied by 2^−k when α is
    normalized.
    """

    advance: Callable  # (α, x, shared, fixed_x, fixed) → α after the step, not normalized
    retreat: Callable  # (ᾱ, α, k, x, shared, fixed_x, fixed) → ᾱ before the step, derivatives by the logarithms of `shared`, notes
    slopes: Callable  # (ᾱ of all steps, α before them, α after them, xs, notes) → derivatives by the logarithms of xs
    normalized: bool  # whether the weights are probabilities, so that `Weights.lost` says what they lose


class Weights(NamedTuple):
    """The weights of a lattice as logarithms.

    A leaf of a field with a step axis has shape [steps, ..., n]; `...` are the axes of the sequences.
    """

    start: Array  # whether a path may start in a state
    xs: Any  # with a step axis
    shared: Any
    end: Array  # log e(s), in the shape of α
    lost: Array | None  # ℓ_t(s), probabilities and not logarithms; [steps, ..., states]
    fixed_xs: Any  # with a step axis; not differentiated
    fixed: Any  # not differentiated
    live: Array  # [steps, ...], False for steps that a sequence skips


class _Differentiable(NamedTuple):
    """The arrays with derivatives: mantissas of weights, and lost probabilities."""

    xs: Any
    shared: Any
    end: Any
    lost: Any


def present(condition: Array, dtype: Any) -> Array:
    """The log-weight 0 where `condition` is True, and ABSENT elsewhere: it keeps or removes an edge."""
    return jnp.where(condition, jnp.zeros((), dtype), jnp.asarray(scaled.ABSENT, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_total(lattice: Lattice, weights: Weights) -> Array:
    """The logarithm of the sum of all paths, shape [...]; below IMPOSSIBLE if there is no path."""
    mantissas, exponents = _split(weights)
    alpha, kept = _forward(lattice, weights, mantissas, exponents, keep=lattice.normalized)
    return _finish(lattice, weights.live, alpha.mantissa, alpha.exponent, kept, mantissas, exponents)


@log_total.defjvp
def _(lattice: Lattice, primals: tuple[Weights], tangents: tuple[Weights]) -> tuple[Array, Array]:
    (weights,), (moved,) = primals, tangents
    value, slopes = value_and_slopes(lattice, weights)
    parts = []
    for field, step_axis in (("xs", 1), ("lost", 1), ("shared", 0), ("end", 0)):
        for slope, dot in zip(*(jax.tree.leaves(getattr(x, field)) for x in (slopes, moved)), strict=True):
            axes = (0,) * step_axis + tuple(range(value.ndim + step_axis, slope.ndim))
            parts.append(jnp.sum(slope * dot, axis=axes))
    return value, functools.reduce(jnp.add, parts)


def value_and_slopes(lattice: Lattice, weights: Weights) -> tuple[Array, _Differentiable]:
    """The log-total [...], and its derivatives with respect to the logarithms of the weights and to the lost probabilities."""
    mantissas, exponents = _split(weights)
    alpha, kept = _forward(lattice, weights, mantissas, exponents, keep=True)

    def finish(last: Array, before: Array, lost: Array | None, end: Array) -> Array:
        given = mantissas._replace(lost=lost, end=end)
        return _finish(lattice, weights.live, last, alpha.exponent, Scaled(before, kept.exponent), given, exponents)

    value, pull = jax.vjp(finish, alpha.mantissa, kept.mantissa, mantissas.lost, mantissas.end)
    last_bar, before_bar, lost_bar, end_bar = pull(jnp.ones_like(value))

    def backward(carry: Any, inputs: Any) -> Any:
        bar, shared_bar = carry
        before, k, more, x, x_exponent, fixed_x, live = inputs
        moved = jnp.where(live[..., None], bar, jnp.zeros_like(bar))
        shared = _joined(mantissas.shared, exponents.shared)
        earlier, of_shared, notes = lattice.retreat(moved, before, k, _joined(x, x_exponent), shared, fixed_x, weights.fixed)
        earlier = jnp.where(live[..., None], earlier, bar)
        return (earlier if more is None else earlier + more, jax.tree.map(jnp.add, shared_bar, of_shared)), (moved, notes)

    start = _varying((last_bar, jax.tree.map(jnp.zeros_like, mantissas.shared)), weights)
    after = Scaled(*(jnp.concatenate([x[1:], y[None]]) for x, y in zip(kept, alpha, strict=True)))
    more = before_bar if lattice.normalized else None
    inputs = (kept, after.exponent, more, mantissas.xs, exponents.xs, weights.fixed_xs, weights.live)
    (_, shared_bar), (bars, notes) = lax.scan(backward, start, inputs, reverse=True)
    xs_bar = lattice.slopes(bars, kept, after, _joined(mantissas.xs, exponents.xs), notes)
    return value, _Differentiable(xs_bar, shared_bar, end_bar * mantissas.end, lost_bar)


def _forward(lattice: Lattice, weights: Weights, mantissas: _Differentiable, exponents: _Differentiable, keep: bool) -> Any:
    """α after the last step; and with `keep`, α before every step [steps, ..., states]."""
    shared = _joined(mantissas.shared, exponents.shared)

    def forward(alpha: Scaled, inputs: Any) -> Any:
        x, x_exponent, fixed_x, live = inputs
        following = _step(lattice, alpha, _joined(x, x_exponent), shared, fixed_x, weights.fixed, live)
        return following, (alpha if keep else None)

    start = scaled.constant(weights.start, jax.tree.leaves(weights.xs)[0].dtype)
    return lax.scan(forward, _varying(start, weights), (mantissas.xs, exponents.xs, weights.fixed_xs, weights.live))


def _step(lattice: Lattice, alpha: Scaled, x: Any, shared: Any, fixed_x: Any, fixed: Any, live: Array) -> Scaled:
    """α after a step. A step that is not live changes nothing."""
    return scaled.where(live[..., None], scaled.normalized(lattice.advance(alpha, x, shared, fixed_x, fixed)), alpha)


def _finish(
    lattice: Lattice,
    live: Array,
    last: Array,
    exponent: Array,
    before: Scaled,
    mantissas: _Differentiable,
    exponents: _Differentiable,
) -> Array:
    """The logarithm of the total, from α after the last step and before every step."""
    alpha, end = Scaled(last, exponent), Scaled(mantissas.end, exponents.end)
    direct = scaled.log(scaled.add_over(scaled.times(alpha, end), -1))
    if not lattice.normalized:
        return direct
    stranded = jnp.sum(scaled.plain(alpha) * (1 - scaled.plain(end)), axis=-1)  # e(s) is 0 or 1
    of_steps = jnp.sum(scaled.plain(before) * mantissas.lost, axis=-1)
    lost = stranded + jnp.sum(jnp.where(live, of_steps, jnp.zeros_like(of_steps)), axis=0)
    certain = direct > -math.log(2)
    small = jnp.where(certain, jnp.minimum(lost, 0.75), jnp.zeros_like(lost))
    return jnp.where(certain, jnp.log1p(-small), direct)


def checked_total(log_total: Array) -> tuple[Array, Array]:
    """The log-total, but 0 with derivative 0 where there is no path; and whether there is none."""
    none = lax.stop_gradient(log_total) < scaled.IMPOSSIBLE
    return numerics.where(none, jnp.zeros_like(log_total), log_total), none


def _split(weights: Weights) -> tuple[_Differentiable, _Differentiable]:
    """The weights as mantissas, which are differentiable, and as exponents."""
    xs, shared, end = (_parted(jax.tree.map(scaled.of_log, x)) for x in (weights.xs, weights.shared, weights.end))
    return _Differentiable(xs[0], shared[0], end[0], weights.lost), _Differentiable(xs[1], shared[1], end[1], None)


def _is_scaled(x: Any) -> bool:
    return isinstance(x, Scaled)


def _parted(numbers: Any) -> tuple[Any, Any]:
    """A pytree of `Scaled` as two pytrees: mantissas and exponents."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], numbers, is_leaf=_is_scaled) for i in range(2))  # type: ignore[return-value]


def _joined(mantissas: Any, exponents: Any) -> Any:
    return jax.tree.map(Scaled, mantissas, exponents)


def _varying(carry: Any, weights: Weights) -> Any:
    """The carry, typed as varying over every mesh axis over which a weight varies, as `lax.scan` demands."""
    return mesh.vary(carry, mesh.axes_of(weights))
