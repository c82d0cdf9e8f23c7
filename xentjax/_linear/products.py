"""The matrix products of a linear layer: in the dtype of its inputs, accumulated and added up in float32 or wider."""

import functools

import jax
from jax import lax

from xentjax._core import mesh, numerics

_BLOCK_BYTES = 2**24  # of a sum of products on CPUs, where XLA cannot add a product in place


def dot(x, y, x_axis, y_axis, like=None):
    """The product over one axis of each, accumulated and returned in float32 or wider; split over an explicit mesh as `like` is."""
    dtype = numerics.accumulation_dtype(x.dtype, y.dtype)
    sharding = None if like is None else mesh.split_of(like)
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype, out_sharding=sharding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(hidden, kernel, accumulator, features):
    """H·K whose derivative with respect to K goes to `accumulator`, K in float32: there the chunks' gradients are added up."""
    return dot(hidden, kernel, 1, features)


@product.defjvp
def _(features, primals, tangents):
    hidden, kernel, accumulator = primals
    hidden_dot, _, kernel_dot = tangents
    # JAX transposes a product into one that has the dtype of its result. So the first is rounded to that of `hidden`, in which its
    # transpose ends; the second, whose transpose is added up, is a product in float32 at any dtype.
    first = lax.dot_general(hidden_dot, kernel, (((1,), (features,)), ((), ())))
    second = dot(hidden.astype(kernel_dot.dtype), kernel_dot, 1, features)
    return product(hidden, kernel, accumulator, features), first.astype(second.dtype) + second


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def add_product(total, left, right, classes):
    """The sum total + leftᵀ·right, in place; `classes` is the axis of the result that holds classes."""
    return lax.platform_dependent(total, left, right, cpu=functools.partial(_add_in_blocks, classes), default=_add_at_once)


@add_product.defjvp
def _(classes, primals, tangents):
    (_, left, right), (total_dot, left_dot, right_dot) = primals, tangents
    tangent = total_dot + dot(left_dot, right, 0, 0, total_dot) + dot(left, right_dot, 0, 0, total_dot)
    return add_product(*primals, classes), tangent


def _add_at_once(total, left, right):
    return total + dot(left, right, 0, 0, total)


def _add_in_blocks(classes, total, left, right):
    """XLA on CPUs stores a product before it adds it, and a store of that size costs as much time as the sum: so by blocks of classes."""
    size = total.shape[classes]
    width = max(1, -(-size // max(1, -(-total.nbytes // _BLOCK_BYTES))))
    if width >= size:
        return _add_at_once(total, left, right)

    def add(start, width, total):
        block = lax.dynamic_slice_in_dim(total, start, width, classes)
        factor = lax.dynamic_slice_in_dim((left, right)[classes], start, width, 1)
        block += dot(factor, right, 0, 0, block) if classes == 0 else dot(left, factor, 0, 0, block)
        return lax.dynamic_update_slice_in_dim(total, block, start, classes)

    whole = size // width
    total = lax.fori_loop(0, whole, lambda i, total: add(i * width, width, total), total)
    return add(whole * width, size % width, total) if size % width else total
