"""Differences of exponentials and of sigmoids that do not cancel; imports jax only.

The probability of an interval, σ(b) − σ(a) with w = b − a > 0, is the product σ(b)·σ(−a)·(1 − e^(−w)). So its surprise is a sum of
three terms that are not negative, softplus(−b) + softplus(a) + `width_surprise`, right at any distance and any width.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def exponential_excess(x: Array) -> Array:
    """e^x − 1 − x ≥ 0, accurate relative to its value, with derivative e^x − 1."""
    terms = 8 if x.dtype == jnp.float32 else 14  # of the series, for |x| < 1/2
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0)
    series = jnp.zeros_like(x)
    for n in range(terms + 1, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return jnp.where(near, series * small * small, jnp.expm1(x) - x)


exponential_excess.defjvp(lambda primals, tangents: (exponential_excess(*primals), jnp.expm1(primals[0]) * tangents[0]))


# With w = e^u, −log(1 − e^(−w)) has the derivative −r in u, r = w/(e^w − 1), and r the derivative r(1 − w − r): bounded to every
# order, where the derivatives in w grow like powers of 1/w. Below e^(−40) and beyond e^7 r is 1 and 0 in every dtype.


@jax.custom_jvp
def width_surprise(log_width: Array) -> Array:
    """−log(1 − e^(−w)), given log w; every derivative is finite at any width."""
    w = _width(log_width)
    narrow = -log_width - jnp.log(-jnp.expm1(-w) / w)
    return jnp.where(log_width < 0, narrow, -jnp.log1p(-jnp.exp(-jnp.maximum(w, 1))))


width_surprise.defjvp(lambda primals, tangents: (width_surprise(*primals), -_width_slope(*primals) * tangents[0]))


@jax.custom_jvp
def _width_slope(log_width):
    w = _width(log_width)
    return w * jnp.exp(-w) / -jnp.expm1(-w)


@_width_slope.defjvp
def _(primals, tangents):
    r = _width_slope(*primals)
    return r, r * (1 - _width(*primals) - r) * tangents[0]


def _width(log_width):
    return jnp.exp(jnp.clip(log_width, -40, 7))


@jax.custom_jvp
def with_slope_of(value: Array, formula: Array) -> Array:
    """`value`, with the derivatives of a formula for the same number that is right to differentiate but loses digits."""
    return value


with_slope_of.defjvp(lambda primals, tangents: (with_slope_of(*primals), tangents[1]))
