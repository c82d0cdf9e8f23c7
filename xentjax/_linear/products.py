"""Matrix products of a linear layer. They are computed in the dtype of their inputs and accumulate in float32 or wider."""

import functools

import jax
from jax import Array, lax

from xentjax._core import mesh, numerics

_BLOCK_BYTES = 2**24  # On CPUs, XLA cannot add a product in place: a sum of products is computed in blocks of at most this size.


def dot(x: Array, y: Array, x_axis: int, y_axis: int, like: Array | None = None) -> Array:
    """The product of `x` and `y` over one axis of each, accumulated and returned in float32 or wider.

    On a mesh with explicit axes, the product is split in the same way as `like`.
    """
    dtype = numerics.accumulation_dtype(x.dtype, y.dtype)
    sharding = None if like is None else mesh.split_of(like)
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype, out_sharding=sharding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(hidden: Array, kernel: Array, accumulator: Array, features: int) -> Array:
    """The product H·K. `features` is the position of the feature axis in K.

    `accumulator` is K in float32, or in float64 if `hidden` is float64. The derivative rule uses the tangent
    of `accumulator`, not of `kernel`, as the tangent of K. So the gradients of the chunks are added up in the dtype of `accumulator`.
    """
    return dot(hidden, kernel, 1, features)


@product.defjvp
def _(features: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    hidden, kernel, accumulator = primals
    hidden_dot, _, kernel_dot = tangents
    # JAX transposes a product into another product, whose result has the dtype of the input. The first tangent is rounded to the dtype of
    # `hidden`, because its transpose is the gradient of `hidden`. The transpose of the second tangent is added up over chunks, so this
    # product is in float32 whatever the dtype of `hidden`.
    first = lax.dot_general(hidden_dot, kernel, (((1,), (features,)), ((), ())))
    second = dot(hidden.astype(kernel_dot.dtype), kernel_dot, 1, features)
    return product(hidden, kernel, accumulator, features), first.astype(second.dtype) + second


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def add_product(total: Array, left: Array, right: Array, classes: int) -> Array:
    """The sum total + leftᵀ·right, computed in place. `classes` is the position of the class axis in `total`."""
    return lax.platform_dependent(total, left, right, cpu=functools.partial(_add_in_blocks, classes), default=_add_at_once)


@add_product.defjvp
def _(classes: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (_, left, right), (total_dot, left_dot, right_dot) = primals, tangents
    tangent = total_dot + dot(left_dot, right, 0, 0, total_dot) + dot(left, right_dot, 0, 0, total_dot)
    return add_product(*primals, classes), tangent


def _add_at_once(total: Array, left: Array, right: Array) -> Array:
    return total + dot(left, right, 0, 0, total)


def _add_in_blocks(classes: int, total: Array, left: Array, right: Array) -> Array:
    """`_add_at_once` in blocks of classes, for CPUs.

    XLA on CPUs stores a product before it adds it. Storing the whole product would take as much time as the addition. So only one block
    is stored at a time. XLA also stores the same block of the factor with the classes. If there are many more examples than features, both
    blocks would take more memory than the whole product, which is then added at once.
    """
    size, features, examples = total.shape[classes], total.shape[1 - classes], left.shape[0]
    width = max(1, -(-size // max(1, -(-total.nbytes // _BLOCK_BYTES))))
    many = isinstance(examples, int) and (features + examples) * width >= features * size  # otherwise the number is symbolic
    if width >= size or many:
        return _add_at_once(total, left, right)

    def add(start: Array | int, width: int, total: Array) -> Array:
        block = lax.dynamic_slice_in_dim(total, start, width, classes)
        factor = lax.dynamic_slice_in_dim((left, right)[classes], start, width, 1)
        block += dot(factor, right, 0, 0, block) if classes == 0 else dot(left, factor, 0, 0, block)
        return lax.dynamic_update_slice_in_dim(total, block, start, classes)

    whole = size // width
    total = lax.fori_loop(0, whole, lambda i, total: add(i * width, width, total), total)
    return add(whole * width, size % width, total) if size % width else total
