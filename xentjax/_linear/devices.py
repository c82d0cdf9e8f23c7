"""The mesh axes over which the inputs of a fused loss vary. How each input varies is decided before the loop over chunks.

Inside `jax.shard_map`, several devices may compute one loss together. Each of these devices then holds a part of the classes. The type of a
JAX value lists the mesh axes over which the value may vary. The two operands of an operation may vary over different axes. JAX then first
converts both operands, so that both vary over all of these axes. The transpose of this conversion is a sum over devices. If the loop over
chunks contained a conversion, devices would sum a gradient in every chunk. So all conversions and sums are outside the loop:

1. `vary_as_losses` converts `where`, `weights` and the arguments of the loss. It runs before the derivative rule.
2. `vary_alike` converts the operands of the matrix products. It runs at the start of the rule.
3. `sum_over_devices` sums the tangent over devices. It runs at the end of the rule. Each device first computes the inner product of the
   tangent and its own part of the gradient. Only these numbers are summed. The transpose of this step sums the gradient of `hidden` over
   devices once, after the loop.

Outside `jax.shard_map`, no value varies over a mesh axis, and these functions return their arguments.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVarTuple

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr

from xentjax._core import mesh, numerics
from xentjax._linear.inputs import Batch, Gradient, Layer

_NAME = "fuse_linear"
Ts = TypeVarTuple("Ts")  # arrays or None


def vary_as_losses(batch: Batch[Array], layer: Layer[Array], trace: Callable[[], ClosedJaxpr]) -> Batch[Array]:
    """The batch, in which all arrays except `hidden` vary at least over the mesh axes of the losses.

    `trace` returns the program that computes the losses of one chunk. It is called only if `hidden` or the layer varies over a mesh axis.
    """
    together = mesh.axes_of(batch.hidden, layer)
    if not together:
        return batch
    program = trace()
    axes = mesh.axes_of(program.out_avals) - _axes_used(program.effects)
    for name, x in (("where", batch.where), ("weights", batch.weights)):
        mesh.check_shared(_NAME, name, x, together - axes)
    axes |= mesh.axes_of(batch.weights)
    return Batch(batch.hidden, *(mesh.vary(x, axes) for x in batch[1:]))


def vary_alike(*arrays: *Ts) -> tuple[*Ts]:
    """The operands of matrix products, made to vary over the same mesh axes. None stays None.

    The gradients of the operands are summed over devices here. They are summed in float32 or wider and then rounded once.
    """
    axes = mesh.axes_of(arrays)
    if not axes:
        return arrays
    return jax.tree.map(lambda x: mesh.vary(x.astype(numerics.accumulation_dtype(x.dtype)), axes).astype(x.dtype), arrays)


def sum_over_devices(tangent: Array, value: Array) -> Array:
    """The tangent, summed over the devices that compute `value` together."""
    return mesh.psum(tangent, mesh.axes_of(tangent) - mesh.axes_of(value))


def check_chunk_axes(function: str, hidden: Array, kernel: Array, class_axis: int) -> None:
    """Raise ValueError if an explicit mesh splits the class axis, or the example axis that is cut into chunks."""
    for name, x, axis, meaning in (
        ("hidden", hidden, hidden.ndim - 2, "is cut into chunks"),
        ("kernel", kernel, class_axis, "holds classes"),
    ):
        if axis >= 0 and mesh.is_explicit(x) and jax.typeof(x).sharding.spec[axis] is not None:
            raise ValueError(
                f"{function}: axis {axis} of {name}, which {meaning}, must not be split over a mesh with explicit axes; got "
                f"{jax.typeof(x)}. Use fuse_linear_sharded, which takes chunks of each device's part."
            )


def check_collectives(program: ClosedJaxpr) -> None:
    """Raise ValueError if `loss_fn` uses a mesh axis that the types of arrays do not list, or over which the losses vary."""
    for axis in _axes_used(program.effects):
        if not mesh.typed(axis):
            raise ValueError(
                f"{_NAME}: a loss_fn that uses mesh axis {axis!r} needs jax.shard_map with check_vma=True, its default; got "
                "check_vma=False, jax.pmap or jax.vmap(axis_name=...). There a gradient cannot be distinguished from its sum over devices. "
                "Use check_vma=True."
            )
        if axis in mesh.axes_of(program.out_avals[0]):
            raise ValueError(
                f"{_NAME}: loss_fn must return the same losses on all devices of mesh axis {axis!r}, which it uses; got losses that may "
                "differ. Communicate over this axis before the call, or use reduction='none'."
            )


def check_closed_over(value: Array, gradients: tuple[tuple[Gradient, ...], ...]) -> None:
    """Raise ValueError if a differentiated, closed-over array does not vary over every mesh axis of the value.

    Otherwise, devices with different values would share one gradient of that array.
    """
    for gradient in jax.tree.leaves(gradients):
        if missing := mesh.axes_of(value) - mesh.axes_of(gradient):
            raise ValueError(
                f"{_NAME}: a differentiated array that loss_fn closes over must vary over mesh axes {sorted(map(str, missing))} as the "
                f"examples do; got an array of shape {gradient.shape} that does not. Call jax.lax.pcast(x, axes, to='varying') on it first."
            )


def _axes_used(effects: Iterable[Any]) -> frozenset[Hashable]:
    """The mesh axes that a program with these effects uses, in collectives or in `jax.lax.axis_index`."""
    return frozenset(effect.name for effect in effects if hasattr(effect, "name"))
