"""Sums over all paths of a lattice, and the derivative rule behind the losses of sequences.

A lattice has states, and steps t = 1, …, T. Let α_t(s) be the sum of the weights of all paths that are in state s after step t. With the
weight w_t(s′, s) of the edge from s′ to s,

    α_t(s) = Σ_{s′} α_{t−1}(s′) w_t(s′, s)        total p = Σ_s α_T(s) e(s)

where e(s) is the weight of ending in s. All numbers are stored as mantissas and exponents (`scaled`). So a sum of any size has a small
relative error, and a step needs no exponentials and no logarithms.

Lost mass. In a lattice of probabilities, the total is the probability p of the labels. If the labels are nearly certain, p ≈ 1. Then
−log p, computed as the logarithm of a sum near 1, has no correct digits. Let ℓ_t(s) be the probability that step t from state s does not
continue any path of the lattice. The probability is 1 at the start. What does not arrive at the end is lost in a step, or in a state where
paths do not end:

    1 − p = Σ_t Σ_s α_{t−1}(s) ℓ_t(s) + Σ_s α_T(s) (1 − e(s))

No term of this sum is negative, so the sum has a small relative error. Where p > 1/2, log p is computed as log1p(−(1 − p)).

Derivatives. The derivative of log p with respect to log α_t(s) follows from a backward recursion over the same edges. The derivative of
each state is divided among the edges that lead to the state, in proportion to their shares of the sum. If log p is computed from the total,
these derivatives are the posterior probabilities of the states. If log p is computed from the lost mass, the derivative is −1/p times the
probability that a path is in state s after step t and is lost later. In the recursion, each step then adds the mass that is lost in this
step. In both cases all terms have the same sign, so the derivatives are as accurate as the sums.

One backward pass computes all derivatives of a sequence. It needs α of every step, so the forward pass stores them. The tangent is linear
in the tangents of the weights, so JAX can transpose it.

No path. The logarithm of a weight of 0 is represented by `scaled.ABSENT`, a large negative number, so no difference of infinities occurs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import blocks, mesh, numerics
from xentjax._sequence import scaled
from xentjax._sequence.scaled import Scaled


class Lattice(NamedTuple):
    """The edges of a lattice, as functions of arrays with any leading axes.

    α is a `Scaled` [..., states], or a pytree of `Scaled` if the states have several kinds. `advance` gets the weights as `Scaled`: `x` are
    those of one step, and `shared` those of all steps. `fixed_x` and `fixed` are like `x` and `shared`, but hold arrays that are not
    differentiated. ᾱ are derivatives of the log-total by the mantissas of α after a step. α after the step is normalized, so its exponents
    say by which power of 2 the weight of an edge is divided.
    """

    advance: Callable  # (α, x, shared, fixed_x, fixed) → α after the step, not normalized
    retreat: Callable  # (ᾱ, α before, α after, x, shared, fixed_x, fixed) → ᾱ before the step, derivatives by log x and by log shared
    lost: Callable | None  # (Weights.lost, fixed) → ℓ_t(s) [steps, ..., states]; None if the weights are not probabilities


class Weights(NamedTuple):
    """The weights of a lattice as logarithms.

    A leaf of a field with a step axis has shape [steps, ..., n]; `...` are the axes of the sequences. If α is a pytree, `start` and `end`
    are pytrees of the same structure.
    """

    start: Any  # whether a path may start in a state
    xs: Any  # with a step axis
    shared: Any
    end: Any  # log e(s), in the shape of α
    lost: Any  # with a step axis; what `Lattice.lost` needs besides `fixed`
    fixed_xs: Any  # with a step axis; not differentiated
    fixed: Any  # not differentiated
    live: Array  # [steps, ...], False for steps that a sequence skips


class _Differentiable(NamedTuple):
    """The arrays with derivatives: mantissas of weights, and the input of `Lattice.lost`."""

    xs: Any
    shared: Any
    end: Any
    lost: Any


def present(condition: Array, dtype: Any) -> Array:
    """The log-weight 0 where `condition` is True, and ABSENT elsewhere. So paths may start or end only where `condition` is True."""
    return jnp.where(condition, jnp.zeros((), dtype), jnp.asarray(scaled.ABSENT, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_total(lattice: Lattice, weights: Weights) -> Array:
    """The logarithm of the sum of the weights of all paths, shape [...]; below IMPOSSIBLE if there is no path."""
    mantissas, exponents = _split(weights)
    alpha, kept = _forward(lattice, weights, mantissas, exponents, keep=lattice.lost is not None)
    end = _joined(mantissas.end, exponents.end)
    return _total(alpha, end, _lost(lattice, weights, _direct(alpha, end), kept)[1])


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
    """The log-total [...], and its derivatives with respect to the logarithms of the weights and to `weights.lost`."""
    mantissas, exponents = _split(weights)
    alpha, kept = _forward(lattice, weights, mantissas, exponents, keep=True)
    last, last_exponents = _parted(alpha)
    direct = _direct(alpha, _joined(mantissas.end, exponents.end))
    lost, in_steps = _lost(lattice, weights, direct, kept)

    def total(last: Any, end: Any, in_steps: Array | None) -> Array:
        return _total(_joined(last, last_exponents), _joined(end, exponents.end), in_steps)

    value, pull = jax.vjp(total, last, mantissas.end, in_steps)
    last_bar, end_bar, by_lost = pull(jnp.ones_like(value))

    def backward(carry: Any, inputs: Any) -> Any:
        bar, after, shared_bar = carry
        before, lost, x, x_exponent, fixed_x, live = inputs
        moved = jax.tree.map(lambda x: jnp.where(live[..., None], x, jnp.zeros_like(x)), bar)
        shared = _joined(mantissas.shared, exponents.shared)
        earlier, of_x, of_shared = lattice.retreat(moved, before, after, _joined(x, x_exponent), shared, fixed_x, weights.fixed)
        if by_lost is not None:
            of_lost = jax.tree.map(lambda ell, alpha: by_lost[..., None] * ell * scaled.power(alpha.exponent), lost, before)
            earlier = jax.tree.map(jnp.add, earlier, of_lost)
        earlier = jax.tree.map(lambda x, y: jnp.where(live[..., None], x, y), earlier, bar)
        return (earlier, before, jax.tree.map(jnp.add, shared_bar, of_shared)), of_x

    start = _varying((last_bar, alpha, jax.tree.map(jnp.zeros_like, mantissas.shared)), weights)
    inputs = (kept, lost, mantissas.xs, exponents.xs, weights.fixed_xs, weights.live)
    (_, _, shared_bar), xs_bar = lax.scan(backward, start, inputs, reverse=True)

    lost_bar = None
    if (lost_of := lattice.lost) is not None:

        def of_lost() -> Any:
            counted = jnp.where(weights.live, by_lost, jnp.zeros_like(by_lost))[..., None]
            pull = jax.vjp(lambda x: lost_of(x, weights.fixed), weights.lost)[1]
            return pull(scaled.tree_map(lambda x: counted * scaled.plain(x), kept))[0]

        lost_bar = _if_certain(direct, weights, of_lost, lambda: jax.tree.map(jnp.zeros_like, weights.lost))
    return value, _Differentiable(xs_bar, shared_bar, jax.tree.map(jnp.multiply, end_bar, mantissas.end), lost_bar)


def _lost(lattice: Lattice, weights: Weights, direct: Array, before: Any) -> tuple[Any, Array | None]:
    """The probabilities ℓ_t(s), and the probability [...] that is lost in all steps; zeros if no total of the batch is above 1/2."""
    if (lost_of := lattice.lost) is None:
        return None, None

    def found() -> tuple[Any, Array]:
        lost = lost_of(weights.lost, weights.fixed)
        of_steps = scaled.tree_map(lambda alpha, ell: jnp.sum(scaled.plain(alpha) * ell, axis=-1), before, lost)
        of_steps = functools.reduce(jnp.add, jax.tree.leaves(of_steps))
        return lost, jnp.sum(jnp.where(weights.live, of_steps, jnp.zeros_like(of_steps)), axis=0)

    return _if_certain(direct, weights, found, lambda: (jax.tree.map(jnp.zeros_like, _parted(before)[0]), jnp.zeros_like(direct)))


def _if_certain(direct: Array, weights: Weights, found: Callable[[], Any], zeros: Callable[[], Any]) -> Any:
    """`found()` if any total of the batch is above 1/2, else `zeros()`. Only certain sequences need what is lost.

    Only arrays are chosen here, and no sums of paths. So the numbers of a sequence do not depend on the others of its batch. In a program
    for several devices, the result is always `found()`, so that no device waits for the others.
    """
    return lax.cond(~blocks.every(~_certain(direct)), *(lambda f=f: _varying(f(), weights) for f in (found, zeros)))


def _forward(lattice: Lattice, weights: Weights, mantissas: _Differentiable, exponents: _Differentiable, keep: bool) -> Any:
    """α after the last step, and α before every step [steps, ..., states] if `keep` is True, otherwise None."""
    shared = _joined(mantissas.shared, exponents.shared)

    def forward(alpha: Any, inputs: Any) -> Any:
        x, x_exponent, fixed_x, live = inputs
        following = _step(lattice, alpha, _joined(x, x_exponent), shared, fixed_x, weights.fixed, live)
        return following, (alpha if keep else None)

    dtype = jax.tree.leaves(weights.xs)[0].dtype
    start = jax.tree.map(lambda mask: scaled.constant(mask, dtype), weights.start)
    return lax.scan(forward, _varying(start, weights), (mantissas.xs, exponents.xs, weights.fixed_xs, weights.live))


def _step(lattice: Lattice, alpha: Any, x: Any, shared: Any, fixed_x: Any, fixed: Any, live: Array) -> Any:
    """α after a step. A step that is not live changes nothing."""
    following = lattice.advance(alpha, x, shared, fixed_x, fixed)
    return scaled.tree_map(lambda new, old: scaled.where(live[..., None], scaled.normalized(new), old), following, alpha)


def _direct(alpha: Any, end: Any) -> Array:
    """The logarithm of the total, from α after the last step."""
    return scaled.log(scaled.add(*(scaled.add_over(scaled.times(*part), -1) for part in _pairs(alpha, end))))


def _total(alpha: Any, end: Any, lost: Array | None) -> Array:
    """The logarithm of the total, from α after the last step and from the probability [...] that was lost in all steps."""
    direct = _direct(alpha, end)
    if lost is None:
        return direct
    for state, e in _pairs(alpha, end):  # e(s) is 0 or 1
        lost += jnp.sum(scaled.plain(state) * (1 - scaled.plain(e)), axis=-1)
    certain = _certain(direct)
    small = jnp.where(certain, jnp.minimum(lost, 0.75), jnp.zeros_like(lost))
    return jnp.where(certain, jnp.log1p(-small), direct)


def _certain(direct: Array) -> Array:
    return direct > -math.log(2)


def _pairs(x: Any, y: Any) -> list[tuple[Scaled, Scaled]]:
    return list(zip(*(jax.tree.leaves(z, is_leaf=_is_scaled) for z in (x, y)), strict=True))


def checked_total(log_total: Array) -> tuple[Array, Array]:
    """The log-total, or 0 with derivative 0 if there is no path; and whether there is no path."""
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
