"""Log-probabilities as arguments of losses: checks, and the replacement of infinities before a formula and in its result.

In a formula, −INFINITE (see `numerics`) replaces a log-probability of −∞. So the difference of two log-probabilities of −∞ is 0. If both
models say that an answer is impossible, the ratio of its probabilities counts as 1.
"""

from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values

_SUM = "Sum over the tokens of each answer first: xentjax.weighted_sum(log_probs, where=mask, axis=-1).total."


def arguments(
    function: str, where: ArrayLike | None, given: dict[str, ArrayLike], *, densities: bool = False
) -> tuple[tuple[Array, ...], Array | None]:
    """The log-probabilities as arrays of one shape, and `where` of the same shape or None.

    If `densities` is False, each number belongs to a whole answer, and is at most 0. If `densities` is True, each number belongs to a token
    or an action, and may be the logarithm of a density. So it may be above 0.
    """
    arrays = tuple(checks.floating(function, name, x) for name, x in given.items())
    (first, *_), shape = given, arrays[0].shape
    for name, x in zip(given, arrays, strict=True):
        if not densities and _differ_in_tokens(x.shape, shape):
            checks.shape(function, name, x, shape, f"the shape of {first}", _SUM)
        checks.same_shape(function, name, x, shape, f"the shape of {first}")
    counts = checks.where_mask(function, where, shape, f"the shape of {first}")
    for name, x in zip(given, arrays, strict=True):
        if densities:
            values.logits(function, name, x, counts)
        else:
            values.check(function, name, x, lambda p: ~(p <= 0), "is not a log-probability (it is above 0 or NaN)", counts)
    return arrays, counts


def _differ_in_tokens(got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether the shapes differ only in the last axis. Log-probabilities of tokens differ in this way if the answers differ in length."""
    return len(got) == len(expected) > 1 and got[:-1] == expected[:-1] and got[-1] != expected[-1]


def entered(where: Array | None, *log_probs: Array) -> list[Array]:
    """The log-probabilities in the accumulation dtype, with finite numbers for ±∞, and −1 where an element does not count.

    So for elements that do not count, all differences are 0, no probability is 0 or 1, and every formula has finite derivatives.
    """
    dtype = numerics.accumulation_dtype(*(x.dtype for x in log_probs))
    wide = [numerics.finite(x.astype(dtype)) for x in log_probs]
    return wide if where is None else [numerics.where(where, x, -1) for x in wide]


def finished(x: Array, where: Array | None) -> Array:
    """The result, with ±∞ in place of the finite numbers that represent ±∞, and exactly 0 where an element does not count."""
    return numerics.nan_or_zero(-numerics.restore_infinity(-numerics.restore_infinity(x)), None, where)
