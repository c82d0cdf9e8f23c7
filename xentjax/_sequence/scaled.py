"""Numbers m·2^k of any size. A sum of such numbers needs no exponential and no logarithm.

The mantissa m is a floating-point number. After `normalized`, it is 0 or at least 1 and below 2; before, it is of similar size. The
exponent k is a whole number. So a path of probability e^(−100,000) has as many correct digits as a likely path. In float32, the logarithm
−100,000 itself has only two digits after the decimal point. If |k| exceeds 2²⁴ in float32, k is rounded, just as a logarithm of this size
is rounded.

Range. `Scaled.exponent` is the floating-point number k·2⁻³². So the sum of a million exponents does not overflow, even if all logarithms
are near ±3e38, the largest numbers of float32. Exponents are only added, subtracted and compared, and `power` undoes the factor. The number
0 has mantissa 0, and an exponent below those of all other numbers. Its logarithm is −∞.

Derivatives. The exponent is treated as a constant, so only the mantissa has a derivative. Powers of 2 are constructed from bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_UNIT = 2.0**-32  # of exponents
_HIGH, _LOW = 2839 / 4096 / _UNIT, 3.1946184945309415e-05 / _UNIT  # their sum is log 2; products with |k| < 4096 and _HIGH are exact


def _absent(dtype: Any) -> float:
    """The exponent of the number 0: −2¹²⁰ in float32, where e^(−3e38) has exponent −2⁹⁷."""
    return -(2.0 ** (jnp.finfo(dtype).maxexp - 8))


class Scaled(NamedTuple):
    """The numbers mantissa·2^k, elementwise, with exponent = k·2⁻³²."""

    mantissa: Array
    exponent: Array


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map` over `Scaled` numbers."""
    return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, Scaled))


def of_log(x: Array) -> Scaled:
    """e^x for numbers that are finite or −∞. The derivative of the mantissa is the mantissa."""
    zero = lax.stop_gradient(x) == -jnp.inf
    x = jnp.where(zero, jnp.zeros_like(x), x)
    fixed = lax.stop_gradient(x)
    exponent = fixed * (1.4426950408889634 * _UNIT)
    # Larger exponents are whole numbers. The first operand is then a placeholder, which may be infinite.
    exponent = jnp.where(jnp.abs(exponent) < 1, jnp.round(exponent / _UNIT) * _UNIT, exponent)
    # If x is so large that it has no digits after the point, the remainder has no correct digits. The bound only keeps it small.
    remainder = jnp.clip((fixed - exponent * _HIGH) - exponent * _LOW, -1, 1)
    return selected(~zero, Scaled(jnp.exp(remainder + (x - fixed)), exponent))


def log(x: Scaled) -> Array:
    """The logarithm of x. If x is 0, the result is −∞ with derivative 0."""
    zero = x.mantissa == 0
    m = jnp.where(zero, jnp.ones_like(x.mantissa), x.mantissa)
    return jnp.where(zero, -jnp.inf, (jnp.log(m) + x.exponent * _LOW) + x.exponent * _HIGH)


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
    return Scaled(x.mantissa * inverse, jnp.maximum(x.exponent + (biased - bias).astype(m.dtype) * _UNIT, _absent(m.dtype)))


def plain(x: Scaled) -> Array:
    """The number as one floating-point number: 0 for exponents below −126, and too small for exponents above 127."""
    return x.mantissa * power(x.exponent)


def constant(mask: Array, dtype: Any) -> Scaled:
    """1 where `mask` is True, and 0 elsewhere."""
    return Scaled(mask.astype(dtype), jnp.where(mask, jnp.zeros((), dtype), jnp.asarray(_absent(dtype), dtype)))


def shifted(x: Scaled, places: int) -> tuple[Scaled, ...]:
    """The numbers of the last axis, moved by 1, 2, …, `places` places, with 0 in the places that become free.

    A negative number of places moves them towards the front.
    """
    sign = 1 if places > 0 else -1
    parts = (
        [moved(part, sign * i, fill) for part, fill in zip(x, (0, _absent(x.exponent.dtype)), strict=True)]
        for i in range(1, abs(places) + 1)
    )
    return tuple(Scaled(*part) for part in parts)


def moved(x: Array, places: int, fill: float) -> Array:
    """The entries of the last axis, moved by a number of places, with `fill` in the places that become free."""
    widths = [(0, 0, 0)] * (x.ndim - 1) + [(places, -places, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), widths)


def selected(mask: Array, x: Scaled) -> Scaled:
    """`x` where `mask` is True, and 0 elsewhere."""
    return Scaled(jnp.where(mask, x.mantissa, jnp.zeros_like(x.mantissa)), jnp.where(mask, x.exponent, _absent(x.exponent.dtype)))


def where(condition: Array, x: Scaled, y: Scaled) -> Scaled:
    """`x` where `condition` is True, and `y` elsewhere."""
    return Scaled(*(jnp.where(condition, a, b) for a, b in zip(x, y, strict=True)))


def power(exponent: Array) -> Array:
    """2^k for exponent = k·2⁻³² with a whole number k; 0 for k < −126, and 2¹²⁷ for k > 127.

    The sum of k, the bias and 1.5·2^digits has k + bias in its last bits. A conversion to integers would take longer, since XLA adds
    instructions for NaN and for overflow.
    """
    integer, digits, bias = (jnp.int64, 52, 1023) if exponent.dtype == jnp.float64 else (jnp.int32, 23, 127)
    k = jnp.clip(exponent, -127 * _UNIT, 127 * _UNIT) / _UNIT  # in float32, k = −127 gives the bits of 0
    found = lax.bitcast_convert_type(lax.bitcast_convert_type(k + (1.5 * 2.0**digits + bias), integer) << digits, exponent.dtype)
    return found if exponent.dtype == jnp.float32 else jnp.where(exponent < -126 * _UNIT, jnp.zeros_like(exponent), found)
