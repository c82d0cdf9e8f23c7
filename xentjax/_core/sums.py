"""Running sums that do not drift.

A running float32 sum stops growing once it is 2²⁴ times as large as its addends. It loses bits of every addend long before that. An int32
sum overflows at 2³¹. So every running sum V is stored as three numbers, its `Parts`:

    floating    V = x + r₁ + r₂                |r₁| ≤ ulp(x)/2 and |r₂| ≤ ulp(r₁)/2, up to rounding
    integer     V = x + r₁ + 2³¹·r₂           x stays at 2³¹ − 1 once it is reached; all numbers are ≥ 0

Users read x. For floating sums, x is V after rounding. For integer sums, x is min(V, 2³¹ − 1). Two numbers would not be enough. The sum of
2⁴⁰ addends needs 40 bits more than one addend. With two numbers, each addition has an error of u² (u = 2⁻²⁴), and 2⁴⁰ additions have an
error of 2⁴⁰·u² = 2⁻⁸. With three numbers, each addition has an error of u³, and 2⁴⁰ additions have an error of 2⁻³².

Derivatives: ∂V/∂x = ∂V/∂r₁ = ∂V/∂r₂ = 1 for the three numbers of every operand. In a result, only x carries a derivative. r₁ and r₂ carry
none, so nothing is counted twice. Every derivative rule below is therefore a plain sum of tangents.
"""

import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from xentjax._core import mesh, numerics

Parts = tuple[Array, Array, Array]
_MOST = 2**31 - 1
_BASE = 2.0**31


def parts_of(x: Any, dtype: Any = None) -> Parts:
    """An array or number as a running sum in `dtype`.

    If `dtype` cannot hold all digits of an integer or of a 64-bit number, r₁ and r₂ keep the remaining digits.
    """
    if not isinstance(x, Array):
        return _parts_of_numbers(np.asarray(x), dtype)
    dtype = x.dtype if dtype is None else dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(dtype)
        return x, zeros_like(x), zeros_like(x)
    whole = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    coarse = whole >> 12 << 12
    x, rest = _two_sum(coarse.astype(dtype), (whole - coarse).astype(dtype))
    return x, rest, zeros_like(x)


def _parts_of_numbers(x: np.ndarray, dtype: Any) -> Parts:
    """`parts_of` for NumPy arrays. The rounding error of x goes to r₁, and the rounding error of r₁ to r₂."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype) if dtype is None else dtype
    wide = numerics.accumulation_dtype(dtype)
    x = x.astype(np.int64) if x.dtype.kind in "bu" else x  # differences may be negative
    parts = []
    for narrow in (dtype, wide, wide):
        held = x.astype(narrow)
        parts.append(jnp.asarray(held))
        finite = np.isfinite(held)
        x = np.where(finite, x, 0) - np.where(finite, held, 0).astype(x.dtype)
    leading, first, second = parts
    return leading, first, second


def zeros_like(x: Array) -> Array:
    """Zeros for r₁ or r₂ of a sum that x holds completely.

    They have the dtype of the addition and vary over the same mesh axes as `x`.
    """
    wide = numerics.accumulation_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return mesh.vary(jnp.zeros_like(x, wide), mesh.axes_of(x))


def value(parts: Parts) -> Array:
    """The sum V, rounded to the accumulation dtype."""
    x, first, second = parts
    if _is_floating(parts):
        return x.astype(first.dtype) + (first + second)
    # Split after 12 bits, both halves are exact in float32. The result is rounded once if r₂ is 0, and otherwise twice.
    coarse, fine = ((x >> 12) + (first >> 12)).astype(jnp.float32), ((x & 4095) + (first & 4095)).astype(jnp.float32)
    return (second.astype(jnp.float32) * _BASE + coarse * 4096.0) + fine


# Named tuples of running sums -------------------------------------------------------------------------------------------


class RunningSum(tuple):
    """The base class of all running sums. They are pytrees, can be added over batches, and can be summed over devices.

    A subclass also inherits from a named tuple, which declares its fields. The pytree consists of these fields and of `rest`. `rest` holds
    r₁ and r₂ of every array in the fields. It is an attribute and not a field, so that users can build, unpack and replace the fields
    alone. If a sum is built from its fields, its `rest` is None, which stands for zeros.
    """

    _fields: ClassVar[tuple[str, ...]]
    rest: Any = None  # (r₁, r₂) with the structure of the fields, or None

    def __init_subclass__(cls) -> None:
        """Register every subclass as a pytree."""
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten)

    def __add__(self, other: Self) -> Self:
        """The running sum of `self` and `other` together."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return add(self, other)

    def __radd__(self, other: int) -> Self:
        """Let the built-in `sum` start from 0."""
        if other != 0:
            return NotImplemented
        return self

    def _refuse_product(self, other: object) -> Self:
        """TypeError: a tuple would be repeated."""
        raise TypeError(f"{type(self).__name__}: sums cannot be multiplied. Multiply the values or the weights before they are summed.")

    __mul__ = __rmul__ = _refuse_product

    def psum(self, axis_name: str | tuple[str, ...]) -> Self:
        """The sum over the devices of a mesh axis, inside `jax.shard_map` or `jax.vmap(axis_name=…)`."""
        return psum(self, axis_name)


T = TypeVar("T", bound=RunningSum)


def _flatten(sums: RunningSum) -> tuple[tuple, None]:
    structure = jax.tree.structure(tuple(sums))
    _, *rest = _columns(split(sums))
    return (*sums, tuple(structure.unflatten(r) for r in rest)), None


def _flatten_with_keys(sums: RunningSum) -> tuple[list[tuple[Any, Any]], None]:
    children, _ = _flatten(sums)
    return [(jax.tree_util.GetAttrKey(k), x) for k, x in zip((*sums._fields, "rest"), children, strict=True)], None


def _unflatten(cls: type[T], _: None, children: Iterable[Any]) -> T:
    *fields, rest = children
    return _made(cls, fields, rest)


def split(sums: RunningSum) -> list[Parts]:
    """The `Parts` of every array in the fields."""
    leaves, structure = jax.tree.flatten(tuple(sums))
    if sums.rest is None:
        return [_nothing_left(x) for x in leaves]
    first, second = map(structure.flatten_up_to, sums.rest)
    return list(zip(leaves, first, second, strict=True))


def join(like: T, parts: list[Parts]) -> T:
    """The inverse of `split`: a running sum with the type and structure of `like`."""
    structure = jax.tree.structure(tuple(like))
    fields, *rest = map(structure.unflatten, _columns(parts))
    return _made(type(like), fields, rest)


def collect(cls: type[T], *parts: Parts) -> T:
    """A running sum of type `cls`, whose fields are single arrays."""
    fields, *rest = _columns(parts)
    return _made(cls, fields, rest)


def _made(cls: type[T], fields: Iterable[Any], rest: Iterable[Any]) -> T:
    sums = tuple.__new__(cls, fields)
    sums.rest = tuple(rest)
    return sums


def _columns(parts: Sequence[Parts]) -> Iterable[tuple[Array, ...]]:
    return zip(*parts, strict=True) if parts else ((), (), ())


def _nothing_left(x: Any) -> tuple[Any, Any, Any]:
    if isinstance(x, Array | np.ndarray | np.generic | numbers.Number):
        x = jnp.asarray(x)
        return x, zeros_like(x), zeros_like(x)
    return x, x, x  # a description of an array, such as a PartitionSpec, also describes r₁ and r₂


@jax.jit
def add(a: T, b: T) -> T:
    """The running sum of `a` and `b` together."""
    if jax.tree.structure(tuple(a)) != jax.tree.structure(tuple(b)):
        got = " and ".join(str(jax.tree.structure(tuple(x))) for x in (a, b))
        raise ValueError(f"{type(a).__name__}: both sums must have the same pytree structure to be added; got {got}.")
    return join(a, [add_parts(x, y) for x, y in zip(split(a), split(b), strict=True)])


@functools.partial(jax.jit, static_argnames="axis_name")
def psum(sums: T, axis_name: str | tuple[str, ...]) -> T:
    """The running sum over the devices of a mesh axis. Integers can be summed over at most 2¹⁴ devices."""

    def add_up(x: Array) -> Array:
        return mesh.psum(x, mesh.names(axis_name))

    def largest(x: Array) -> Array:
        return lax.pmax(x, axis_name)

    return join(sums, [_summed(parts, add_up, largest, mesh.size(axis_name)) for parts in split(sums)])


# Arrays -----------------------------------------------------------------------------------------------------------------


def add_parts(a: Parts, b: Parts) -> Parts:
    """The sum of `a` and `b`."""
    if _is_floating(a) or _is_floating(b):
        return _add_floating(_floating(a), _floating(b))
    return _add_integers(a, b)


def scaled(parts: Parts, factor: Array | float) -> Parts:
    """The exact product of a sum and `factor`, which is ± a power of two. An integer sum becomes a floating sum."""
    x, first, second = (factor * p for p in _floating(parts))
    return x, first, second


def total(parts: Parts, axis: int, keepdims: bool = False) -> Parts:
    """The sum over an axis. If the entries are integers, the axis can have at most 2¹⁴ entries."""
    add_up = functools.partial(jnp.sum, axis=axis, keepdims=keepdims)
    return _summed(parts, lambda x: add_up(x, dtype=x.dtype), functools.partial(jnp.max, axis=axis, keepdims=True), parts[0].shape[axis])


def cumulative(parts: Parts) -> Parts:
    """The cumulative sums along the last axis."""

    def add_up(x: Array) -> Array:
        return jnp.cumsum(x, axis=-1, dtype=x.dtype)

    return _summed(parts, add_up, functools.partial(jnp.max, axis=-1, keepdims=True), parts[0].shape[-1])


def only_leading(parts: Parts, tangent: Array) -> tuple[Parts, Parts]:
    """A result and its tangent. x carries the whole tangent, and the tangents of r₁ and r₂ are 0."""
    x, first, second = parts
    return parts, (tangent.astype(x.dtype), jnp.zeros_like(first), jnp.zeros_like(second))


def _is_floating(parts: Parts) -> bool:
    return jnp.issubdtype(parts[0].dtype, jnp.floating)


def _summed(parts: Parts, add_up: Callable, largest: Callable, count: int) -> Parts:
    """Running sums added by `add_up`, which adds at most `count` elements at a time; `largest` is the maximum of the same elements."""
    if parts[0].size == 0:
        return parts_of(add_up(parts[0]))
    return _summed_floating(parts, add_up, largest, count) if _is_floating(parts) else _summed_integers(parts, add_up)


def _floating(parts: Parts) -> Parts:
    """The same sum in floating point; an integer sum becomes float32."""
    if _is_floating(parts):
        return parts
    x, first, second = (parts_of(p, jnp.float32) for p in parts)
    return _add_floating(_add_floating(scaled(second, _BASE), first), x)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its exact rounding error (Knuth, The Art of Computer Programming, volume 2, section 4.2.2).

    XLA does not reassociate additions. If XLA contracts a product into an addition, the result changes by a rounding error of the product,
    not of the sum.
    """
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def _leading_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """`_two_sum` for a sum that may be infinite or NaN. Its rounding error is then 0, so ∞ does not become NaN."""
    s, lost = _two_sum(a, b)
    return s, numerics.where(jnp.isfinite(s), lost, 0)


def _normal(x: Array, first: Array, second: Array, dtype: Any) -> Parts:
    """The sum of three numbers as `Parts`: x is rounded to `dtype`, r₁ is the rounding error of x, and r₂ is the rounding error of r₁."""
    x, first = _leading_sum(x, first)
    if x.dtype != dtype:  # half precision: r₁ and r₂ are float32 and keep the bits that x lacks
        info = jnp.finfo(dtype)
        # not a cast and a cast back, because XLA may remove both
        narrow = lax.reduce_precision(x, info.nexp, info.nmant)
        first, lost = _two_sum(numerics.where(jnp.isfinite(narrow), x - narrow, 0), first)
        x, second = narrow.astype(dtype), second + lost
    return x, *_two_sum(first, second)


def _wide(parts: Parts, dtype: Any) -> Parts:
    """The three numbers cast to the accumulation dtype of `dtype`."""
    x, first, second = (p.astype(numerics.accumulation_dtype(dtype)) for p in parts)
    return x, first, second


@jax.custom_jvp
def _add_floating(a: Parts, b: Parts) -> Parts:
    dtype = jnp.result_type(a[0], b[0])
    (x, x1, x2), (y, y1, y2) = _wide(a, dtype), _wide(b, dtype)
    leading, lost = _leading_sum(x, y)
    first, lost1 = _two_sum(x1, y1)
    first, lost2 = _two_sum(first, lost)
    return _normal(leading, first, x2 + y2 + lost1 + lost2, dtype)


@_add_floating.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Parts, Parts]:
    dtype = jnp.result_type(primals[0][0], primals[1][0])
    (x, x1, x2), (y, y1, y2) = (_wide(t, dtype) for t in tangents)
    return only_leading(_add_floating(*primals), (x + y) + (x1 + y1 + x2 + y2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _summed_floating(parts: Parts, add_up: Callable, largest: Callable, count: int) -> Parts:
    """Each x is split into a multiple of a common unit and a remainder. The multiples add up exactly.

    The remainders and all r₁ and r₂ are small enough for plain sums.

    Let σ ≥ count·max|x| be a power of two. Then (σ + x) − σ is x rounded to a multiple of uσ, and no sum of these exceeds σ (Rump, Ogita,
    Oishi, Accurate floating-point summation, 2008, algorithm 3.2). The remainder is less than count·u times the largest x.
    """
    x, first, second = _wide(parts, parts[0].dtype)
    size = lax.stop_gradient(largest(lax.stop_gradient(jnp.abs(x))))
    # σ: the power of two nearest to the size is at least 2/3 of the size. If σ overflows, x is not split.
    sigma = lax.reduce_precision(size, jnp.finfo(x.dtype).nexp, 0) * 2.0 ** (count.bit_length() + 1)
    coarse = jnp.where(jnp.isfinite(sigma) & jnp.isfinite(x), (sigma + x) - sigma, x)
    fine, finer = _two_sum(numerics.where(jnp.isfinite(x), x - coarse, 0), first)
    return _normal(add_up(coarse), add_up(fine), add_up(finer + second), parts[0].dtype)


@_summed_floating.defjvp
def _(add_up: Callable, largest: Callable, count: int, primals: tuple, tangents: tuple) -> tuple[Parts, Parts]:
    x, first, second = _wide(tangents[0], primals[0][0].dtype)
    return only_leading(_summed_floating(*primals, add_up, largest, count), add_up(x + (first + second)))


def _carried(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum of two numbers ≥ 0 modulo 2³¹, and the carry."""
    s = a + b  # an int32 that overflows wraps to a negative number, so its sign bit is the carry
    return s & _MOST, lax.shift_right_logical(s, lax.full_like(s, 31))


def _saturated(low: Array, high: Array) -> Parts:
    """The number low + 2³¹·high as `Parts`."""
    full = high > 0
    rest, carry = _carried(low, jnp.ones_like(low))  # what exceeds x = 2³¹ − 1
    nothing = jnp.zeros_like(low)
    return numerics.where(full, _MOST, low), jnp.where(full, rest, nothing), jnp.where(full, high - 1 + carry, nothing)


def _add_integers(a: Parts, b: Parts) -> Parts:
    x, rest, high = _saturated(*_carried(a[0], b[0]))
    for low, more in (a[1:], b[1:]):
        rest, carry = _carried(rest, low)
        high = high + more + carry
    return x, rest, high


def _summed_integers(parts: Parts, add_up: Callable) -> Parts:
    """The low and the high 16 bits are summed separately. 31 bits hold the sum of 2¹⁵ such halves: x and r₁ of 2¹⁴ running sums."""
    x, first, second = parts
    low, high = add_up((x & 0xFFFF) + (first & 0xFFFF)), add_up((x >> 16) + (first >> 16))
    low, carry = _carried(low, (high & 0x7FFF) << 16)
    x, first, more = _saturated(low, (high >> 15) + carry)
    return x, first, more + add_up(second)
