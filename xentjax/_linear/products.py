"""Matrix products of a linear layer. They are computed in the dtype of their inputs and accumulate in float32 or wider."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from xentjax._core import mesh, numerics

# XLA on CPUs cannot add a product in place. So a sum of products is computed in blocks. More blocks need less memory. There are eight
# blocks. There are more if a block would exceed _BLOCK_BYTES, and fewer if a block would be below _SMALL_BLOCK_BYTES.
_BLOCK_BYTES, _SMALL_BLOCK_BYTES = 2**24, 2**22


def dot(x: Array, y: Array, x_axis: int, y_axis: int, like: Any = None) -> Array:
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
    # `hidden`, because its transpose is the gradient of `hidden`. The transpose of the second tangent is added up over chunks. So the
    # second product is computed in the dtype of `accumulator`, even if `hidden` is in half precision.
    first = lax.dot_general(hidden_dot, kernel, (((1,), (features,)), ((), ())))
    second = dot(hidden.astype(kernel_dot.dtype), kernel_dot, 1, features)
    return product(hidden, kernel, accumulator, features), first.astype(second.dtype) + second


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def chained_product(hidden: Array, kernel: Array, accumulator: Array, link: Array, classes: int) -> tuple[Array, Array]:
    """The product H·K, and `link`. `classes` is the position of the class axis in K.

    `accumulator` and `link` are both K in float32, or in float64 if `hidden` is float64. Each product of a chain gets the link that the
    product before it returned. Reverse mode follows the links from the last product to the first. For each product, it adds the gradient of
    K to one array in place. A second derivative uses `accumulator` as in `product`, because a loop would store the link of every step.
    """
    return product(hidden, kernel, accumulator, 1 - classes), link


def _chained_product_jvp(classes: int, primals: tuple[Array, ...], tangents: tuple[Array | SymbolicZero, ...]) -> tuple:
    (hidden, kernel, _, link), (hidden_dot, _, _, link_dot) = primals, tangents
    results = product(*primals[:3], 1 - classes), link
    if isinstance(hidden_dot, SymbolicZero):
        logits_dot = jnp.zeros_like(results[0])
    else:  # in the dtype of `hidden`, as in `product`
        logits_dot = lax.dot_general(hidden_dot, kernel, (((1,), (1 - classes,)), ((), ()))).astype(results[0].dtype)
    if isinstance(link_dot, SymbolicZero):
        return results, (logits_dot, zero_from_primal(link, symbolic_zeros=True))
    return results, tuple(_add_and_pass.bind(logits_dot, link_dot, hidden, classes=classes))


chained_product.defjvp(_chained_product_jvp, symbolic_zeros=True)


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

    XLA on CPUs stores a product before it adds the product. Storing the whole product would take as much time as the addition. So only one
    block of the product is stored at a time. For each block, XLA also stores a block of the factor that has the class axis. If there are
    many more examples than features, these two blocks would take more memory than the whole product. Then the whole product is added at
    once. All blocks have the same size, so that one loop computes them. The last block may overlap the block before it. There its factor is
    0.
    """
    size, features, examples = total.shape[classes], total.shape[1 - classes], left.shape[0]
    if not isinstance(size, int):  # a symbolic number of classes, such as the batch of a contrastive loss
        return _add_at_once(total, left, right)
    width = max(1, -(-size // _number_of_blocks(total.nbytes)))
    many = isinstance(examples, int) and (features + examples) * width >= features * size  # a symbolic number of examples is not an int
    if width >= size or many:
        return _add_at_once(total, left, right)

    def add(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * width, size - width)
        block = lax.dynamic_slice_in_dim(total, start, width, classes)
        factor = lax.dynamic_slice_in_dim((left, right)[classes], start, width, 1)
        if size % width:
            factor = numerics.where(start + jnp.arange(width)[None] < i * width, 0, factor)
        block += dot(factor, right, 0, 0, block) if classes == 0 else dot(left, factor, 0, 0, block)
        return lax.dynamic_update_slice_in_dim(total, block, start, classes)

    return lax.fori_loop(0, -(-size // width), add, total)


def _number_of_blocks(size: int) -> int:
    """The number of blocks of a sum of products of `size` bytes."""
    return max(1, min(8, size // _SMALL_BLOCK_BYTES), -(-size // _BLOCK_BYTES))


# The tangent of a product ----------------------------------------------------------------------------------------------------

# (Z, A, H) → (Z + H·A, A), linear in Z and A. Its transpose is (Z̄, Ā) → (Z̄, Ā + Hᵀ·Z̄), which `add_product` computes in place. JAX's own
# transpose would store Hᵀ·Z̄, an array of the size of the kernel, before the addition. Z̄ is cast to the dtype of H before the product.
_add_and_pass = Primitive("add_product_and_pass_factor")
_add_and_pass.multiple_results = True


def _add(z: Array, a: Array, hidden: Array, classes: int) -> Array:
    return z + _product_with(a, hidden, classes)


def _product_with(a: Array, hidden: Array, classes: int) -> Array:
    return dot(hidden.astype(a.dtype), a, 1, 1 - classes)


def _add_and_pass_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...], *, classes: int) -> tuple[list[Array], list]:
    (_, a, hidden), (z_dot, a_dot, hidden_dot) = primals, tangents
    if not isinstance(a_dot, ad.Zero):
        z_dot, a_dot = _add_and_pass.bind(ad.instantiate_zeros(z_dot), a_dot, hidden, classes=classes)
    if not isinstance(hidden_dot, ad.Zero):
        z_dot = ad.add_tangents(z_dot, _product_with(a, hidden_dot, classes))
    return _add_and_pass.bind(*primals, classes=classes), [z_dot, a_dot]


def _add_and_pass_transpose(cotangents: tuple[Any, Any], z: Any, a: Any, hidden: Array, *, classes: int) -> tuple:
    z_bar, a_bar = cotangents
    if ad.is_undefined_primal(a) and not isinstance(z_bar, ad.Zero):
        narrow = z_bar.astype(hidden.dtype)
        factors = (narrow, hidden) if classes == 0 else (hidden, narrow)
        a_bar = dot(*factors, 0, 0, a.aval) if isinstance(a_bar, ad.Zero) else add_product(a_bar, *factors, classes)
    return z_bar if ad.is_undefined_primal(z) else None, a_bar if ad.is_undefined_primal(a) else None, None


def _add_and_pass_batch(arrays: tuple[Array, ...], axes: tuple[Any, ...], *, classes: int) -> tuple[list[Array], tuple[int, Any]]:
    return [jax.vmap(lambda z, a, hidden: _add(z, a, hidden, classes), axes)(*arrays), arrays[1]], (0, axes[1])


def _add_and_pass_factor(z: Array, a: Array, hidden: Array, *, classes: int) -> list[Array]:
    return [_add(z, a, hidden, classes), a]


_add_and_pass.def_impl(_add_and_pass_factor)
_add_and_pass.def_abstract_eval(lambda z, a, hidden, *, classes: [z, a])
mlir.register_lowering(_add_and_pass, mlir.lower_fun(_add_and_pass_factor, multiple_results=True))
ad.primitive_jvps[_add_and_pass] = _add_and_pass_jvp
ad.primitive_transposes[_add_and_pass] = _add_and_pass_transpose
batching.primitive_batchers[_add_and_pass] = _add_and_pass_batch
