"""Losses computed one block of examples after another.

Some losses have several sums over classes. For such a loss, XLA on CPUs stores many intermediate arrays. Each array has the size of the
logits. New memory is slow: the system clears each page when it is first used. The intermediate arrays of one block fit into the cache.
Each block uses the same memory as the block before it. So no new memory is needed. A block in half precision is converted to float32 first.
The float32 block also stays in the cache, and several loops can share it.

Derivatives. One sweep over the blocks computes the losses and their gradients. The loss computes exponentials, and the gradient uses the
same exponentials while they are in the cache. The loss of an example depends on that example alone. So the tangent of its loss is
Σ_k g_k·ẋ_k, where g is the gradient and ẋ is the tangent of the inputs of that example. The transpose of this sum multiplies the gradient
of each example by one number. This number is the cotangent of the loss of that example. XLA writes this product over the gradient. In half
precision, the loop stores the bits of the gradient, and the product is a new array. Second derivatives are computed without blocks.

Choice. A loop over blocks is faster on a single CPU device. On GPUs and TPUs, XLA fuses the operations, so blocks are not needed there. On
several devices, the examples may be split over the devices. A block is a slice of all examples, so each device would need examples of
other devices. So the choice is made when a program is lowered for its devices, and not when it is traced. There are no blocks if
`axis_name` is given, or if the type of the logits has a mesh. This is the case inside `jax.shard_map`, and after a mesh has been set. There
are no blocks of float16 and float8 logits either, because a small gradient would underflow in these dtypes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, core, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from xentjax._core import numerics, rows

_BYTES = 3 * 2**18  # the most bytes of a float32 array of a block, before its size is made even; a few such arrays fit into a core's cache


def in_blocks(losses: Callable[..., Array], r: Sequence[rows.Rows], *numbers: ArrayLike) -> Array:
    """losses(*rows, *numbers), shape [...], computed one block of examples after another.

    `r` holds one or several rows of logits for each example, all with the same masks. `losses` gets these rows, with `values` in one dtype,
    and the `numbers` as arrays [...] of that dtype. It must not use other arrays. Each loss must depend on its own example only.
    """
    dtype = numerics.accumulation_dtype(*(x.raw.dtype for x in r))
    axis_name, leading = r[0].axis_name, r[0].raw.shape[:-1]
    args = (
        [(x.raw, x.labels) for x in r],
        [jnp.broadcast_to(jnp.asarray(x, dtype), leading) for x in numbers],
        r[0].class_mask,
        r[0].where,
    )
    arrays, structure = jax.tree.flatten(args)

    def of_args(r: list[tuple[Array, Array | None]], numbers: list[Array], class_mask: Array | None, where: Array | None) -> Array:
        return losses(*(rows.Rows(z, z.astype(dtype), labels, class_mask, where, axis_name) for z, labels in r), *numbers)

    # In float16, a small gradient would underflow before it is multiplied by a cotangent, such as a loss scale. bfloat16 has more range.
    narrow = any(x.raw.dtype.itemsize < 4 and x.raw.dtype != jnp.bfloat16 for x in r)
    if narrow or axis_name is not None or not jax.typeof(arrays[0]).sharding.mesh.empty:
        return of_args(*args)

    def of_arrays(*arrays: Array) -> tuple[Array]:
        return (of_args(*structure.unflatten(arrays)),)

    @jax.custom_jvp
    def value(*arrays: Array) -> Array:
        (loss,) = _sweep.bind(*arrays, function=of_arrays, leading=arrays[0].ndim - 1)
        return loss

    @functools.partial(value.defjvp, symbolic_zeros=True)
    def _(primals: tuple[Array, ...], tangents: tuple[Array | SymbolicZero, ...]) -> tuple[Array, Array]:
        wanted = tuple(not isinstance(t, SymbolicZero) for t in tangents)
        loss, *gradients = _sweep.bind(*primals, function=_with_gradients(of_arrays, wanted), leading=primals[0].ndim - 1)
        total = jnp.zeros_like(loss)
        for g, t in zip(gradients, (t for t in tangents if not isinstance(t, SymbolicZero)), strict=True):
            total += g * t if g.ndim == loss.ndim else _sum_of_products.bind(g, t, dtype=loss.dtype)
        return loss, total

    return value(*arrays)


def _with_gradients(function: Callable[..., tuple[Array]], wanted: tuple[bool, ...]) -> Callable[..., tuple[Array, ...]]:
    """A function that returns the losses and their gradients.

    `wanted` has one boolean for each array. If it is True, the gradient with respect to this array is returned.
    """

    def run(*arrays: Array) -> tuple[Array, ...]:
        (loss,), pull_back = jax.vjp(_of_chosen(function, arrays, wanted), *itertools.compress(arrays, wanted))
        return loss, *pull_back((jnp.ones_like(loss),))

    return run


def _of_chosen(function: Callable[..., tuple[Array, ...]], arrays: Sequence[Array], chosen: Sequence[bool]) -> Callable:
    """`function` as a function of the chosen arrays only. The others are fixed."""

    def run(*moved: Array) -> tuple[Array, ...]:
        moving = iter(moved)
        return tuple(function(*(next(moving) if c else x for x, c in zip(arrays, chosen, strict=True))))

    return run


# The sweep over blocks ---------------------------------------------------------------------------------------------------

# function(*arrays), in blocks where possible. The results have the same leading axes as the arrays.
_sweep = Primitive("sweep_over_examples")
_sweep.multiple_results = True
_sweep.def_impl(lambda *arrays, function, leading: list(function(*arrays)))


@_sweep.def_abstract_eval
def _(*avals: core.ShapedArray, function: Callable, leading: int) -> list[core.ShapedArray]:
    results = jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals))
    return [core.ShapedArray(x.shape, x.dtype) for x in results]


def _lower_sweep(ctx: Any, *operands: Any, function: Callable, leading: int) -> Any:
    def run(*arrays: Array) -> list[Array]:
        size = _block_size(ctx, arrays, leading)
        return list(function(*arrays)) if size is None else _loop(function, arrays, leading, size)

    return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_sweep, _lower_sweep)


def _loop(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], leading: int, size: int) -> list[Array]:
    axes = arrays[0].shape[:leading]
    arrays = tuple(x.reshape(-1, *x.shape[leading:]) for x in arrays)
    examples = arrays[0].shape[0]
    shapes = jax.eval_shape(function, *arrays)

    def step(i: Array, carry: tuple[list[Array], tuple[Array, ...]]) -> tuple[list[Array], tuple[Array, ...]]:
        # Without the barrier, XLA would know that half-precision arrays never change, and would copy all their bits before the loop.
        results, arrays = carry[0], lax.optimization_barrier(carry[1])
        start = i * size  # `dynamic_slice` moves the last block back so that it fits. It may then repeat examples of the block before it
        block = (_widened(lax.dynamic_slice_in_dim(_bits(x), start, size), x.dtype) for x in arrays)
        found = (_bits(x.astype(shape.dtype)) for x, shape in zip(function(*block), shapes, strict=True))
        return [lax.dynamic_update_slice_in_dim(whole, x, start, 0) for whole, x in zip(results, found, strict=True)], arrays

    initial = [lax.empty(x.shape, jax.eval_shape(_bits, x).dtype) for x in shapes]
    swept, _ = lax.fori_loop(0, -(-examples // size), step, (initial, arrays))
    return [_of_bits(bits, x.dtype).reshape(*axes, *x.shape[1:]) for bits, x in zip(swept, shapes, strict=True)]


def _bits(x: Array) -> Array:
    """The bits of an array in half precision, as uint16. Any other array is returned unchanged.

    In a loop, XLA on CPUs would convert whole arrays of numbers in half precision to float32.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if _is_half(x) else x


def _is_half(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2


def _of_bits(bits: Array, dtype: Any) -> Array:
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _widened(bits: Array, dtype: Any) -> Array:
    return bits if bits.dtype == dtype else numerics.widen(_of_bits(bits, dtype))


def _block_size(ctx: Any, arrays: tuple[Array, ...], leading: int) -> int | None:
    """The number of examples in a block, which is the same in all blocks, or None if the examples are not cut into blocks."""
    place = ctx.module_context
    if tuple(place.platforms) != ("cpu",) or getattr(place.axis_context, "num_devices", None) != 1:
        return None
    if not all(isinstance(size, int) for size in arrays[0].shape):  # a symbol of `jax.export`
        return None
    examples, classes = math.prod(arrays[0].shape[:leading]), math.prod(arrays[0].shape[leading:])
    blocks = -(-examples // max(1, _BYTES // (4 * max(1, classes))))
    size = 2 * -(-examples // (2 * max(1, blocks)))  # even: XLA on CPUs does not vectorize some loops over an odd number of examples
    return size if blocks > 2 else None


def _jvp_of_sweep(primals: tuple[Array, ...], tangents: tuple[Any, ...], *, function: Callable, leading: int) -> tuple[list, list]:
    moves = [not isinstance(t, ad.Zero) for t in tangents]
    x, x_dot = (tuple(itertools.compress(arrays, moves)) for arrays in (primals, tangents))
    _, moved = jax.jvp(_of_chosen(function, primals, moves), x, x_dot)
    return _sweep.bind(*primals, function=function, leading=leading), list(moved)


def _batch_sweep(arrays: tuple[Array, ...], axes: tuple[Any, ...], *, function: Callable, leading: int) -> tuple[list, tuple[int, ...]]:
    if any(axis is None and x.ndim > leading for x, axis in zip(arrays, axes, strict=True)):  # blocks would need copies of it
        results = jax.vmap(function, axes)(*arrays)
    else:
        count = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        front = [
            jnp.broadcast_to(x, (count, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        results = _sweep.bind(*front, function=function, leading=leading + 1)
    return list(results), (0,) * len(results)


ad.primitive_jvps[_sweep] = _jvp_of_sweep
batching.primitive_batchers[_sweep] = _batch_sweep


# Whether an iteration may stop ----------------------------------------------------------------------------------------------

_every = Primitive("every_example")


def every(condition: Array) -> Array:
    """Whether `condition` [...] is True for every example, shape []. In a program for several devices, it is always False.

    In such a program, the examples may be split over the devices, and each device would have to wait for the others.
    """
    return _every.bind(condition)


def _lower_every(ctx: Any, operand: Any) -> Any:
    alone = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
    return mlir.lower_fun(lambda x: jnp.all(x) if alone else jnp.zeros((), bool), multiple_results=False)(ctx, operand)


_every.def_impl(lambda condition: jnp.all(condition))
_every.def_abstract_eval(lambda condition: core.ShapedArray((), condition.dtype))
mlir.register_lowering(_every, _lower_every)
batching.primitive_batchers[_every] = lambda arrays, axes: (_every.bind(*arrays), None)  # every example of every batch


# The gradient times tangents or cotangents -------------------------------------------------------------------------------

# The transpose of `_sum_of_products` is `_multiples`. The transpose of `_multiples` is `_sum_of_products` in c, and `_multiples` in x.
_sum_of_products = Primitive("sum_of_products")  # Σ_k x_k·y_k [...] of two arrays [..., classes]
_multiples = Primitive("multiples_of_rows")  # c·x [..., classes] of c [...] and x [..., classes]


def _dot(x: Array, y: Array, dtype: Any) -> Array:
    return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1)


def _multiply(c: Array, x: Array, dtype: Any) -> Array:
    wide = numerics.accumulation_dtype(c.dtype, x.dtype)
    return (c.astype(wide)[..., None] * x.astype(wide)).astype(dtype)


def _batched(primitive: Primitive, plain: Callable, arrays: tuple[Array, ...], axes: tuple[Any, ...], dtype: Any) -> tuple[Array, int]:
    if None in axes:  # an array would have to be copied
        return jax.vmap(functools.partial(plain, dtype=dtype), axes)(*arrays), 0
    return primitive.bind(*(jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True)), dtype=dtype), 0


def _product_with(primitive: Primitive, cotangent: Array, other: Array, like: Any) -> Array:
    return primitive.bind(cotangent, other, dtype=like.aval.dtype)


_sum_of_products.def_impl(_dot)
_multiples.def_impl(_multiply)
_sum_of_products.def_abstract_eval(lambda x, y, *, dtype: core.ShapedArray(x.shape[:-1], dtype))
_multiples.def_abstract_eval(lambda c, x, *, dtype: core.ShapedArray(x.shape, dtype))
batching.primitive_batchers[_sum_of_products] = functools.partial(_batched, _sum_of_products, _dot)
batching.primitive_batchers[_multiples] = functools.partial(_batched, _multiples, _multiply)
mlir.register_lowering(_sum_of_products, mlir.lower_fun(_dot, multiple_results=False))
mlir.register_lowering(_multiples, mlir.lower_fun(_multiply, multiple_results=False))
ad.defbilinear(
    _sum_of_products,
    lambda ct, x, y, *, dtype: _product_with(_multiples, ct, y, x),
    lambda ct, x, y, *, dtype: _product_with(_multiples, ct, x, y),
)
ad.defbilinear(
    _multiples,
    lambda ct, c, x, *, dtype: _product_with(_sum_of_products, ct, x, c),
    lambda ct, c, x, *, dtype: _product_with(_multiples, c, ct, x),
)
