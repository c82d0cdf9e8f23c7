"""Sums over all paths of a lattice, and the derivative rule behind the losses of sequences.

A lattice has states, and steps t = 1, …, T. Let α_t(s) be the sum of the weights of all paths that are in state s after step t. With the
weight w_t(s′, s) of the edge from s′ to s,

    α_t(s) = Σ_{s′} α_{t−1}(s′) w_t(s′, s)        total p = Σ_s α_T(s) e(s)

where e(s) is the weight of ending in s. All numbers are stored as mantissas and exponents (`scaled`). So a sum of any size has a small
relative error, and a step needs no exponentials and no logarithms.

Lost mass. In a lattice of probabilities, the total is the probability p of the labels. If the labels are nearly certain, p ≈ 1. Then
−log p, computed as the logarithm of a sum near 1, has no correct digits. Let ℓ_t(s) be the probability that step t from state s does not
continue any path of the lattice. The total probability at the start is 1. Each part of it either reaches the end, or is lost in a step, or
is lost after the last step in a state where no path may end:

    1 − p = Σ_t Σ_s α_{t−1}(s) ℓ_t(s) + Σ_s α_T(s) (1 − e(s))

No term of this sum is negative, so the sum has a small relative error. Where p > 1/2, log p is computed as log1p(−(1 − p)).

Derivatives. The derivative of log p with respect to log α_t(s) follows from a backward recursion over the same edges. The derivative of
each state is divided among the edges that lead to the state, in proportion to their shares of the sum. If log p is computed from the total,
these derivatives are the posterior probabilities of the states. If log p is computed from the lost mass, the derivative is −1/p times the
probability that a path is in state s after step t and is lost later. For this derivative, the recursion adds the mass that is lost in each
step. In both cases all terms have the same sign, so the derivatives are as accurate as the sums.

One backward pass computes all derivatives of a sequence. It needs α of every step. The forward pass stores α only before each segment of √T
steps. The backward pass recomputes α of one segment at a time, from the α before the segment. So the memory of α is proportional to √T
instead of T. The recursion over a segment keeps the derivatives with respect to α of every step. From these, the derivatives of the weights
are computed for all steps of the segment at once. If `Lattice.segments` is False, the forward pass stores α of every step, and each step of
the backward pass computes the derivatives of its weights. The tangent is linear in the tangents of the weights, so JAX can transpose it.

Normalization. `Lattice.advance` normalizes α, either before or after the step. On CPUs, a loop of XLA has only one result. Suppose that α
is stored as two arrays and normalized after the step. Then one loop computes the mantissas, and a second loop computes the same sum again
for the exponents. So the transducer and the conditional random field normalize α before the step. Then the exponents after a step do not
depend on the sum of the mantissas. CTC and TDT pack both arrays into one (see `_recursion`), so one loop computes both, and they normalize
α after the step.

No path. The logarithm of a weight of 0 is −∞. As a `Scaled` number, 0 has a finite exponent, so no difference of infinities occurs. Any
finite logarithm belongs to a weight above 0.
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

    α is a `Scaled` [..., states], or a pytree of `Scaled` if the states have several kinds. `advance` and `retreat` get the weights as
    `Scaled`: `x` holds the weights of one step, and `shared` holds the weights that all steps share. `fixed_x` and `fixed` are like `x` and
    `shared`, but hold arrays that are not differentiated. ᾱ are the derivatives of the log-total with respect to the mantissas of α after
    a step. Let a and b be the exponents of α before and after the step. `retreat` multiplies ᾱ by the weight of an edge and by 2^(a − b).
    """

    advance: Callable  # (α, x, shared, fixed_x, fixed) → α after the step; normalizes α before or after the step
    retreat: Callable  # (ᾱ, α before, α after, x, shared, fixed_x, fixed) → ᾱ before the step, derivatives by log x and by log shared
    lost: Callable | None  # (xs, Weights.lost, fixed) → ℓ_t(s) [steps, ..., states]; None if the weights are not probabilities
    segments: bool = True  # whether α is stored only before each segment of steps, and recomputed from there in the backward pass


class Weights(NamedTuple):
    """The weights of a lattice. `xs`, `shared` and `end` are logarithms.

    In a field with a step axis, this axis is the first axis of every leaf. The axes of the sequences come next in `xs` and `lost`, and come
    first in `shared` and `end`. If α is a pytree, `start` and `end` are pytrees of the same structure.
    """

    start: Any  # whether a path may start in a state
    xs: Any  # with a step axis
    shared: Any
    end: Any  # log e(s), in the shape of α
    lost: Any  # with a step axis; what `Lattice.lost` needs besides `xs` and `fixed`
    fixed_xs: Any  # with a step axis; not differentiated
    fixed: Any  # not differentiated
    live: Array  # [steps, ...], False for steps that a sequence skips


class _Steps(NamedTuple):
    """The fields of `Weights` with a step axis, cut into segments: [segments, steps of a segment, ...]."""

    xs: Any
    lost: Any
    fixed_xs: Any
    live: Array


class _Slopes(NamedTuple):
    """The derivatives of the log-total with respect to the differentiated fields of `Weights`."""

    xs: Any
    lost: Any
    shared: Any
    end: Any


def present(condition: Array, dtype: Any) -> Array:
    """The log-weight 0 where `condition` is True, and −∞ elsewhere. So paths may start or end only where `condition` is True."""
    return jnp.where(condition, jnp.zeros((), dtype), jnp.asarray(-jnp.inf, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_total(lattice: Lattice, weights: Weights) -> Array:
    """The logarithm of the sum of the weights of all paths, shape [...]; −∞ if there is no path."""
    steps = _segments(lattice, weights)
    alpha, kept = _forward(lattice, weights, steps)
    end = jax.tree.map(scaled.of_log, weights.end)
    return _total(alpha, end, _lost(lattice, weights, steps, kept, _direct(alpha, end)))


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


def value_and_slopes(lattice: Lattice, weights: Weights) -> tuple[Array, _Slopes]:
    """The log-total [...], and its derivatives with respect to the logarithms of the weights and to `weights.lost`."""
    steps = _segments(lattice, weights)
    alpha, kept = _forward(lattice, weights, steps)
    last, exponents = _parted(alpha)
    end, end_exponents = _parted(jax.tree.map(scaled.of_log, weights.end))
    direct = _direct(alpha, _joined(end, end_exponents))

    def total(last: Any, end: Any, in_steps: Array | None) -> Array:
        return _total(_joined(last, exponents), _joined(end, end_exponents), in_steps)

    value, pull = jax.vjp(total, last, end, _lost(lattice, weights, steps, kept, direct))
    last_bar, end_bar, by_lost = pull(jnp.ones_like(value))
    xs, lost, shared = _backward(lattice, weights, steps, kept, alpha, direct, last_bar, by_lost)
    xs, lost = (jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[: weights.live.shape[0]], y) for y in (xs, lost))
    return value, _Slopes(xs, lost, shared, jax.tree.map(jnp.multiply, end_bar, end))


def _segments(lattice: Lattice, weights: Weights) -> _Steps:
    """The steps of the weights in segments of equal length. The last segment is padded with steps that are not live.

    If `lattice.segments` is False, or if the number of steps is symbolic, all steps are one segment.
    """
    steps = weights.live.shape[0]
    if not isinstance(steps, int):  # a symbolic size
        return jax.tree.map(lambda x: x[None], _Steps(weights.xs, weights.lost, weights.fixed_xs, weights.live))
    length = math.isqrt(max(steps - 1, 0)) + 1 if lattice.segments else max(steps, 1)
    count = -(-steps // length)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, count * length - steps)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, length, *x.shape[1:])

    return jax.tree.map(cut, _Steps(weights.xs, weights.lost, weights.fixed_xs, weights.live))


def _forward(lattice: Lattice, weights: Weights, steps: _Steps) -> tuple[Any, Any]:
    """α after the last step, and α before every segment. If `lattice.segments` is False, the second result is α before every step."""

    def segment(alpha: Any, steps: _Steps) -> Any:
        after, before = _advanced(lattice, weights, alpha, steps)
        return after, alpha if lattice.segments else before

    dtype = jax.tree.leaves(weights.xs)[0].dtype
    start = jax.tree.map(lambda mask: scaled.constant(mask, dtype), weights.start)
    return lax.scan(segment, _varying(start, weights), steps)


def _advanced(lattice: Lattice, weights: Weights, alpha: Any, steps: _Steps) -> tuple[Any, Any]:
    """α after the last step of a segment, and α before every step. A step that is not live is skipped."""
    shared = jax.tree.map(scaled.of_log, weights.shared)

    def forward(alpha: Any, inputs: Any) -> Any:
        x, fixed_x, live = inputs
        following = lattice.advance(alpha, x, shared, fixed_x, weights.fixed)
        return scaled.tree_map(lambda new, old: scaled.where(live[..., None], new, old), following, alpha)

    return _recursion(forward, alpha, (jax.tree.map(scaled.of_log, steps.xs), steps.fixed_xs, steps.live), _kinds(weights))


def _kinds(weights: Weights) -> int:
    """The number of kinds of states."""
    return len(jax.tree.leaves(weights.start))


def _recursion(step: Callable[[Any, Any], Any], first: Any, inputs: Any, kinds: int, reverse: bool = False) -> tuple[Any, Any]:
    """The state after the last step, and the states before all steps. `step(state, inputs of a step)` returns the next state.

    Here a state is a pytree: α or ᾱ. If `reverse` is True, the steps run from the last to the first. The loops of a step are short. XLA on
    CPUs divides them among all cores, and waking a core takes longer than such a loop. XLA does not divide a loop that writes one row of an
    array, and it runs a step of at most 8 loops on one core. So on CPUs, two arrays of a state are packed into one array of complex
    numbers. Each state is written into a row of an array, and is read from there. If there is only one kind of states (`kinds` is 1), a
    step has few loops, so a plain scan is used.
    """

    def in_scan(first: Any, inputs: Any) -> tuple[Any, Any]:
        return lax.scan(lambda state, x: (step(state, x), state), first, inputs, reverse=reverse)

    def in_rows(first: Any, inputs: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(first)
        steps = jax.tree.leaves(inputs)[0].shape[0]

        def of_step(carry: Any, inputs: Any) -> Any:
            (state, states), (place, x) = carry, inputs
            following = _packed(jax.tree.leaves(step(structure.unflatten(_unpacked(state)), x)))
            states = jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, place, 0), states, following)
            return (jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, 0, keepdims=False), states), states), None

        start = _packed(leaves)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps + 1, *x.shape)), start)
        places = lax.iota(jnp.uint32, steps)
        (last, states), _ = lax.scan(of_step, (start, states), (places if reverse else places + 1, inputs), reverse=reverse)
        before = jax.tree.map(lambda x: x[1:] if reverse else x[:-1], states)
        return structure.unflatten(_unpacked(last)), structure.unflatten(_unpacked(before))

    return in_scan(first, inputs) if kinds == 1 else lax.platform_dependent(first, inputs, cpu=in_rows, default=in_scan)


def _packed(arrays: list[Array]) -> list[Array]:
    """Each pair of arrays as one array of complex numbers. If the number of arrays is odd, the last one is not packed."""
    pairs = zip(arrays[::2], arrays[1::2], strict=False)
    return [lax.complex(*pair) for pair in pairs] + (arrays[-1:] if len(arrays) % 2 else [])


def _unpacked(packed: list[Array]) -> list[Array]:
    """The arrays that `_packed` packed."""
    parts = ((lax.real(x), lax.imag(x)) if jnp.iscomplexobj(x) else (x,) for x in packed)
    return [part for pair in parts for part in pair]


def _before(lattice: Lattice, weights: Weights, kept: Any, steps: _Steps) -> Any:
    """α before every step of a segment."""
    return _advanced(lattice, weights, kept, steps)[1] if lattice.segments else kept


def _backward(
    lattice: Lattice, weights: Weights, steps: _Steps, kept: Any, alpha: Any, direct: Array, last_bar: Any, by_lost: Array | None
) -> tuple[Any, Any, Any]:
    """The derivatives of the log-total with respect to `weights.xs`, `weights.lost` and `weights.shared`.

    `alpha` is α after the last step. `last_bar` is the derivative with respect to the mantissas of `alpha`, and `by_lost` is the derivative
    with respect to the probability that is lost in all steps. The recursion over a segment always runs without the lost mass. If the batch
    has certain sequences (see `_certain`), the recursion also runs with the lost mass. Certain sequences take the second result.
    """
    certain, shared = _certain(direct), jax.tree.map(scaled.of_log, weights.shared)
    rounded = _rounded((kept, alpha), weights)

    def segment(carry: Any, inputs: Any) -> Any:
        last, found, sure = carry
        kept, steps = inputs
        before = _before(lattice, weights, kept, steps)
        after = jax.tree.map(lambda x, y: jnp.concatenate([x[1:], y[None]]), before, last)
        x = jax.tree.map(scaled.of_log, steps.xs)

        def retreated(carry: Any, ell: Any, retreat: Callable[..., Any] = lattice.retreat) -> Any:
            def backward(bar: Any, inputs: Any) -> Any:
                before, after, ell, x, fixed_x, live = inputs
                moved = jax.tree.map(lambda x: jnp.where(live[..., None], x, jnp.zeros_like(x)), bar)
                earlier, of_x, of_shared = retreat(moved, before, after, x, shared, fixed_x, weights.fixed)
                weight = by_lost
                if weight is not None and ell is not None:
                    of_lost = jax.tree.map(lambda ell, alpha: weight[..., None] * ell * scaled.power(alpha.exponent), ell, before)
                    earlier = jax.tree.map(jnp.add, earlier, of_lost)
                return jax.tree.map(lambda x, y: jnp.where(live[..., None], x, y), earlier, bar), of_x, of_shared

            inputs = before, after, ell, x, steps.fixed_xs, steps.live
            if lattice.segments:
                bar, bars = _recursion(lambda bar, inputs: backward(bar, inputs)[0], carry[0], inputs, _kinds(weights), reverse=True)
                _, of_x, of_shared = jax.vmap(backward)(bars, inputs)
                return (bar, jax.tree.map(lambda x, y: x + jnp.sum(y, axis=0), carry[1], of_shared)), of_x

            def with_slopes(carry: Any, inputs: Any) -> Any:
                earlier, of_x, of_shared = backward(carry[0], inputs)
                return (earlier, jax.tree.map(jnp.add, carry[1], of_shared)), of_x

            return lax.scan(with_slopes, carry, inputs, reverse=True)

        ways = (functools.partial(_retreat_by_autodiff, lattice), lattice.retreat)
        found, xs_bar = lax.cond(rounded, *(lambda way=way: _varying(retreated(found, None, way), weights) for way in ways))
        lost_bar, weight = None, by_lost
        if (lost := lattice.lost) is not None and weight is not None:

            def with_lost() -> Any:
                ell, pull = jax.vjp(lambda xs, other: lost(xs, other, weights.fixed), steps.xs, steps.lost)
                following, of_edges = retreated(sure, ell)
                counted = jnp.where(steps.live, weight, jnp.zeros_like(weight))[..., None]
                of_lost, lost_bar = pull(scaled.tree_map(lambda x: counted * scaled.plain(x), before))
                return following, _chosen(certain, 1, jax.tree.map(jnp.add, of_edges, of_lost), xs_bar), lost_bar

            nothing = jax.tree.map(jnp.zeros_like, steps.lost)
            sure, xs_bar, lost_bar = _if_certain(direct, weights, with_lost, lambda: (sure, xs_bar, nothing))
        return (jax.tree.map(lambda x: x[0], before), found, sure), (xs_bar, lost_bar)

    start = last_bar, jax.tree.map(jnp.zeros_like, _parted(shared)[0])
    (_, found, sure), (xs_bar, lost_bar) = lax.scan(segment, _varying((alpha, start, start), weights), (kept, steps), reverse=True)
    return xs_bar, lost_bar, _chosen(certain, 0, sure[1], found[1]) if by_lost is not None else found[1]


def _rounded(alphas: Any, weights: Weights) -> Array:
    """Whether an exponent of the batch may be so large that sums of exponents are rounded, shape [].

    `Lattice.retreat` adds exponents in another order than `Lattice.advance`. That is exact for all numbers that occur in a normal model.
    """
    scores = [jnp.abs(jnp.where(x == -jnp.inf, 0, x)) for x in jax.tree.leaves((weights.xs, weights.shared, weights.end))]
    scores += [jnp.abs(scaled.log(x)) for x in jax.tree.leaves(alphas, is_leaf=_is_scaled)]
    most = 2.0 ** (jnp.finfo(scores[0].dtype).nmant - 3)
    return ~blocks.every(functools.reduce(jnp.logical_and, [jnp.all((x < most) | (x == jnp.inf)) for x in scores]))


def _retreat_by_autodiff(
    lattice: Lattice, bar: Any, before: Any, after: Any, x: Any, shared: Any, fixed_x: Any, fixed: Any
) -> tuple[Any, Any, Any]:
    """What `lattice.retreat` returns, as the derivative of `lattice.advance`. So both use the same rounded exponents.

    Then the shares of the edges that lead to a state have the sum 1, even if the exponents have no correct digits.
    """
    # The caller sums over devices. Without this, the derivative of `shared` would be summed over devices here as well.
    parts = [_parted(mesh.vary(numbers, mesh.axes_of(bar, before, x))) for numbers in (before, x, shared)]

    def advanced(alpha: Any, x: Any, shared: Any) -> Any:
        alpha, x, shared = (_joined(m, exponents) for m, (_, exponents) in zip((alpha, x, shared), parts, strict=True))
        return _parted(lattice.advance(alpha, x, shared, fixed_x, fixed))[0]

    earlier, of_x, of_shared = jax.vjp(advanced, *(mantissas for mantissas, _ in parts))[1](bar)
    of_x, of_shared = (jax.tree.map(jnp.multiply, bar, part[0]) for bar, part in zip((of_x, of_shared), parts[1:], strict=True))
    return earlier, of_x, of_shared


def _chosen(mask: Array, step_axes: int, x: Any, y: Any) -> Any:
    """The arrays of `x` in the sequences where `mask` [...] is True, and those of `y` elsewhere."""

    def chosen(x: Array, y: Array) -> Array:
        shape = (1,) * step_axes + mask.shape + (1,) * (x.ndim - step_axes - mask.ndim)
        return jnp.where(mask.reshape(shape), x, y)

    return jax.tree.map(chosen, x, y)


def _lost(lattice: Lattice, weights: Weights, steps: _Steps, kept: Any, direct: Array) -> Array | None:
    """The probability [...] that is lost in all steps together.

    On one device, the result is 0 if no total of the batch is above 1/2. It is None if the weights are not probabilities.
    """
    if (lost := lattice.lost) is None:
        return None

    def segment(total: Array, inputs: Any) -> Any:
        kept, steps = inputs
        before, ell = _before(lattice, weights, kept, steps), lost(steps.xs, steps.lost, weights.fixed)
        of_steps = scaled.tree_map(lambda alpha, ell: jnp.sum(scaled.plain(alpha) * ell, axis=-1), before, ell)
        of_steps = functools.reduce(jnp.add, jax.tree.leaves(of_steps))
        return total + jnp.sum(jnp.where(steps.live, of_steps, jnp.zeros_like(of_steps)), axis=0), None

    nothing = _varying(jnp.zeros_like(direct), weights)
    return _if_certain(direct, weights, lambda: lax.scan(segment, nothing, (kept, steps))[0], lambda: nothing)


def _if_certain(direct: Array, weights: Weights, found: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`found()` if any total of the batch is above 1/2, else `otherwise()`. Only certain sequences need the lost mass.

    Sequences that are not certain get the same loss and gradient from `found()` and from `otherwise()`. So the loss of a sequence does not
    depend on the other sequences of its batch. In a program for several devices, the result is always `found()`, so that no device waits
    for the others.
    """
    return lax.cond(~blocks.every(~_certain(direct)), *(lambda f=f: _varying(f(), weights) for f in (found, otherwise)))


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
    """Whether the total is above 1/2, from its logarithm. The log-total is then computed from the lost mass."""
    return direct > -math.log(2)


def _pairs(x: Any, y: Any) -> list[tuple[Scaled, Scaled]]:
    return list(zip(*(jax.tree.leaves(z, is_leaf=_is_scaled) for z in (x, y)), strict=True))


def checked_total(log_total: Array) -> tuple[Array, Array]:
    """The log-total, or 0 with derivative 0 if there is no path; and whether there is no path."""
    none = lax.stop_gradient(log_total) == -jnp.inf
    return numerics.where(none, jnp.zeros_like(log_total), log_total), none


def _is_scaled(x: Any) -> bool:
    return isinstance(x, Scaled)


def _parted(numbers: Any) -> tuple[Any, Any]:
    """A pytree of `Scaled` as two pytrees: mantissas and exponents."""
    mantissas, exponents = (jax.tree.map(lambda x, i=i: x[i], numbers, is_leaf=_is_scaled) for i in range(2))
    return mantissas, exponents


def _joined(mantissas: Any, exponents: Any) -> Any:
    return jax.tree.map(Scaled, mantissas, exponents)


def _varying(carry: Any, weights: Weights) -> Any:
    """The carry, typed as varying over every mesh axis over which a weight varies, as `lax.scan` demands."""
    return mesh.vary(carry, mesh.axes_of(weights))
