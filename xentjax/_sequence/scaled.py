"""Numbers m·2^k of any size. A sum of such numbers needs no exponential and no logarithm.

The mantissa m is a floating-point number. After `normalized`, it is 0 or at least 1 and below 2; before, it is of similar size. The
exponent k is a whole number, stored as a floating-point number. So a path of probability e^(−100,000) has as many correct digits as a
likely path. In float32, the logarithm −100,000 itself has only two digits after the decimal point. If |k| exceeds 2²⁴ in float32, k is
rounded, just as a logarithm of this size is rounded.

Derivatives. The exponent is treated as a constant, so only the mantissa has a derivative. Powers of 2 are constructed from bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

ABSENT = -(2.0**100)  # the exponent, and the logarithm, of a number that is 0
IMPOSSIBLE = -(2.0**90)  # only a sum of terms with a factor of 0 is below e^IMPOSSIBLE; the logits of a model are far smaller than 2⁹⁰
_HIGH, _LOW = 2839 / 4096, 3.1946184945309415e-05  # their sum is log 2; products of _HIGH with exponents below 4096 are exact


class Scaled(NamedTuple):
    """The numbers mantissa·2^exponent, elementwise."""

    mantissa: Array
    exponent: Array


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map` over `Scaled` numbers."""
    return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, Scaled))


def of_log(x: Array) -> Scaled:
    """e^x for numbers that are finite or ABSENT. The derivative of the mantissa is the mantissa."""
    fixed = lax.stop_gradient(x)
    k = jnp.round(fixed * 1.4426950408889634)
    # If x is so large that it has no digits after the point, the remainder has no correct digits. The bound only keeps it small.
    remainder = jnp.clip((fixed - k * _HIGH) - k * _LOW, -1, 1)
    return Scaled(jnp.exp(remainder + (x - fixed)), k)


def log(x: Scaled) -> Array:
    """The logarithm of x. If x is 0, the result is a number below IMPOSSIBLE."""
    zero = x.mantissa == 0
    m = jnp.where(zero, jnp.ones_like(x.mantissa), x.mantissa)
    return (jnp.log(m) + x.exponent * _LOW) + x.exponent * _HIGH


def add(*terms: Scaled) -> Scaled:
    """The sum, elementwise. Its mantissa is not normalized."""
    top = functools.reduce(jnp.maximum, [x.exponent for x in terms])
    return Scaled(functools.reduce(jnp.add, [x.mantissa * power(x.exponent - top) for x in terms]), top)


def add_over(x: Scaled, axis: int) -> Scaled:
    """The sum over one axis. Its mantissa is not normalized."""
    top = jnp.max(x.exponent, axis=axis, keepdims=True)
    return Scaled(jnp.sum(x.mantissa * power(x.exponent - top), axis=axis), jnp.squeeze(top, axis))


def times(x: Scaled, y: Scaled) -> Scaled:
    """The product, elementwise. Its mantissa is not normalized."""
    return Scaled(x.mantissa * y.mantissa, x.exponent + y.exponent)


def normalized(x: Scaled) -> Scaled:
    """The same number with a mantissa from 1 to 2, or 0."""
    m = lax.stop_gradient(x.mantissa)
    integer, digits, bias = (jnp.int64, 52, 1023) if m.dtype == jnp.float64 else (jnp.int32, 23, 127)
    biased = lax.bitcast_convert_type(m, integer) >> digits  # k + bias with 2^k ≤ m < 2^(k + 1); 0 for m = 0
    inverse = lax.bitcast_convert_type((2 * bias - biased) << digits, m.dtype)  # 2^−k
    return Scaled(x.mantissa * inverse, jnp.maximum(x.exponent + (biased - bias).astype(m.dtype), ABSENT))


def plain(x: Scaled) -> Array:
    """The number as one floating-point number: 0 for exponents below −126, and too small for exponents above 127."""
    return x.mantissa * power(x.exponent)


def constant(mask: Array, dtype: Any) -> Scaled:
    """1 where `mask` is True, and 0 elsewhere."""
    return Scaled(mask.astype(dtype), jnp.where(mask, jnp.zeros((), dtype), jnp.asarray(ABSENT, dtype)))


def shifted(x: Scaled, places: int) -> tuple[Scaled, ...]:
    """The numbers of the last axis, moved by 1, 2, …, `places` places, with 0 in the places that become free.

    A negative number of places moves them towards the front.
    """
    sign = 1 if places > 0 else -1
    parts = ([moved(part, sign * i, fill) for part, fill in zip(x, (0, ABSENT), strict=True)] for i in range(1, abs(places) + 1))
    return tuple(Scaled(*part) for part in parts)


def moved(x: Array, places: int, fill: float) -> Array:
    """The entries of the last axis, moved by a number of places, with `fill` in the places that become free."""
    widths = [(0, 0, 0)] * (x.ndim - 1) + [(places, -places, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), widths)


def selected(mask: Array, x: Scaled) -> Scaled:
    """`x` where `mask` is True, and 0 elsewhere."""
    return Scaled(jnp.where(mask, x.mantissa, jnp.zeros_like(x.mantissa)), jnp.where(mask, x.exponent, ABSENT))


def where(condition: Array, x: Scaled, y: Scaled) -> Scaled:
    """`x` where `condition` is True, and `y` elsewhere."""
    return Scaled(*(jnp.where(condition, a, b) for a, b in zip(x, y, strict=True)))


def power(k: Array) -> Array:
    """2^k for whole numbers k; 0 for k < −126, and 2¹²⁷ for k > 127."""
    if k.dtype == jnp.float64:
        bits = jnp.clip(k, -127, 127).astype(jnp.int64) + 1023
        return jnp.where(k < -126, jnp.zeros_like(k), lax.bitcast_convert_type(bits << 52, jnp.float64))
    bits = jnp.clip(k, -127, 127).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(bits << 23, jnp.float32)  # k = −127 gives the bits of 0
