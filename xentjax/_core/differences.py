"""Differences computed without cancellation, and values that get the derivatives of another formula."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from xentjax._core import numerics


def exact_difference(x: Array, y: Array) -> tuple[Array, Array]:
    """The rounded difference x − y and its rounding error. The sum of the two is exactly x − y (Knuth)."""
    rounded = x - y
    of_y = rounded - x
    return rounded, (x - (rounded - of_y)) - (y + of_y)


@jax.custom_jvp
def with_slope_of(value: Array, formula: Array) -> Array:
    """`value`, with the derivatives of `formula`. `formula` computes the same number, but less accurately.

    JAX may differentiate this code instead of using the rule, because `lax.scan` drops the rules of computations that are differentiated
    twice. So the code adds a zero that has the derivative of `formula`. Where `formula` is not finite, that zero has derivative 0.
    """
    finite = numerics.where(jnp.isfinite(formula), formula, 0)
    return lax.stop_gradient(value) + (finite - lax.stop_gradient(finite))


with_slope_of.defjvp(lambda primals, tangents: (with_slope_of(*primals), tangents[1]))


def difference_of_differences(a: Array, b: Array, c: Array, d: Array) -> Array:
    """(a − b) − (c − d), rounded about once. The rounding errors of the inner differences are added back before they can be amplified."""
    (first, lost), (second, lost_too) = exact_difference(a, b), exact_difference(c, d)
    outer, rest = exact_difference(first, second)
    return with_slope_of(outer + (rest + (lost - lost_too)), (a - b) - (c - d))


@jax.custom_jvp
def exponential_excess(x: Array) -> Array:
    """The excess e^x − 1 − x ≥ 0, with a small relative error. Its derivative is e^x − 1."""
    near = jnp.abs(x) < NEAR
    small = jnp.where(near, x, 0)
    return jnp.where(near, exponential_series(small, 2) * small * small, jnp.expm1(x) - x)


exponential_excess.defjvp(lambda primals, tangents: (exponential_excess(*primals), jnp.expm1(primals[0]) * tangents[0]))

NEAR = 0.6  # up to this size of x, `exponential_series` has all digits


def exponential_series(x: Array, first: int) -> Array:
    """Σ_{n ≥ first} x^(n − first)/n! for |x| < 0.6; e^x is this series with `first` = 0."""
    series = jnp.zeros_like(x)
    for n in range(first + (8 if x.dtype == jnp.float32 else 15), first - 1, -1):
        series = series * x + 1 / math.factorial(n)
    return series


def interval_surprise(below: Array, above: Array, log_width: Array, first: Array, last: Array) -> Array:
    """−log(σ(above) − σ(below)), the surprise of an interval under the standard logistic distribution.

    `first` marks the interval that begins at −∞, and `last` marks the interval that ends at +∞. `log_width` is log(above − below). It is an
    argument because the caller knows it more accurately than the difference above − below.

    Let w = above − below > 0. The probability of the interval is the product σ(above)·σ(−below)·(1 − e^(−w)). So the surprise is a sum of
    three terms that are not negative. It is accurate at any position and any width. An interval that begins at −∞ has only the first term,
    and an interval that ends at +∞ has only the second term.
    """
    of_end = numerics.where(last, 0, numerics.softplus(-above))
    of_start = numerics.where(first, 0, numerics.softplus(below))
    return of_end + of_start + numerics.where(first | last, 0, width_surprise(log_width))


# Let w = e^u. In u, −log(1 − e^(−w)) has the derivative −r with r = w/(e^w − 1), and r has the derivative r(1 − w − r). Both are bounded,
# and so are all further derivatives in u, while the derivatives in w grow like powers of 1/w. In every dtype, r is 1 for w below e^(−40)
# and 0 for w above e^7.


@jax.custom_jvp
def width_surprise(log_width: Array) -> Array:
    """−log(1 − e^(−w)) as a function of log w. Every derivative is finite at any width."""
    w = _width(log_width)
    narrow = -log_width - jnp.log(-jnp.expm1(-w) / w)
    return jnp.where(log_width < 0, narrow, -jnp.log1p(-jnp.exp(-jnp.maximum(w, 1))))


width_surprise.defjvp(lambda primals, tangents: (width_surprise(*primals), -_width_slope(*primals) * tangents[0]))


@jax.custom_jvp
def _width_slope(log_width: Array) -> Array:
    w = _width(log_width)
    return w * jnp.exp(-w) / -jnp.expm1(-w)


@_width_slope.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    r = _width_slope(*primals)
    return r, r * (1 - _width(*primals) - r) * tangents[0]


def _width(log_width: Array) -> Array:
    return jnp.exp(jnp.clip(log_width, -40, 7))
