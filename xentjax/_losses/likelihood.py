"""Negative log-likelihoods of numbers under Gaussian, Laplace and Poisson distributions, and under mixtures of logistic distributions.

All functions here share these conventions:

- The first argument has a floating dtype. Arithmetic and results are float32, or float64 if the first argument is float64. Each gradient
  has the dtype of its argument.
- `targets` [...] have the shape of the result, and an integer or floating dtype. They are not broadcast.
- Each loss includes all constant terms of the log-likelihood. So losses of different distributions can be compared.
- `where` has the shape of the result, and is True for elements or examples that count. The loss and the gradient of every other element or
  example are exactly 0, whatever it contains.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, numerics, rows, statistics, surprises, values


def gaussian_nll(
    mean: ArrayLike,
    targets: ArrayLike,
    *,
    variance: ArrayLike | None = None,
    log_variance: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-density of each target under a Gaussian distribution, shape [...].

    loss = ½((x − μ)²/v + log v + log 2π), where the variance is v = `variance` or v = e^`log_variance`.
    Gradient, with r = x − μ: ∂loss/∂μ = −r/v;  ∂loss/∂v = (1 − r²/v)/(2v);  ∂loss/∂log v = (1 − r²/v)/2.

    Pass exactly one of `variance` and `log_variance`.

    Args:
        mean: [...], μ.
        targets: [...], x.
        variance: scalar or [...], v > 0.
        log_variance: scalar or [...], log v, for example the output of a network. The loss is accurate even if |log v| is as large as 80.
        where: [...], True for elements that count.

    Returns:
        [...], in nats, below 0 where the density is above 1; float32, or float64 if `mean` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `variance` is not above 0, or `variance` and `log_variance` are both given or
            both missing.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> loss = lambda log_variance: xentjax.gaussian_nll(jnp.array(0.0), jnp.array(3.0), log_variance=log_variance)
        >>> abs(float(jax.grad(loss)(jnp.log(9.0)))) < 1e-6  # the best variance is the squared error
        True

    Reference:
        Nix and Weigend, Estimating the Mean and Variance of the Target Probability Distribution, 1994.
    """
    name = "gaussian_nll"
    mu, x, counts = _elements(name, "mean", mean, targets, where)
    return _gaussian(mu, x, counts, *_one_of(name, mu, counts, variance=variance, log_variance=log_variance))


@jax.jit
def _gaussian(mean: Array, targets: Array, where: Array | None, variance: ArrayLike | None, log_variance: ArrayLike | None) -> Array:
    r = _residual(mean, targets, where)
    if log_variance is None:
        v = _selected(variance, where, r.dtype, 1)
        square, log_v = r * (r / v), jnp.log(v)
    else:
        log_v = _selected(log_variance, where, r.dtype, 0)
        square = jnp.square(r * jnp.exp(-log_v / 2))  # r²/v; r² or 1/v alone could overflow
    return numerics.nan_or_zero((square + (log_v + math.log(2 * math.pi))) / 2, None, where)


def laplace_nll(
    mean: ArrayLike,
    targets: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    log_scale: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-density of each target under a Laplace distribution, shape [...].

    loss = |x − μ|/b + log 2b, where the scale is b = `scale` or b = e^`log_scale`.
    Gradient: ∂loss/∂μ = −sign(x − μ)/b, which is 0 at x = μ;  ∂loss/∂b = (1 − |x − μ|/b)/b;  ∂loss/∂log b = 1 − |x − μ|/b.

    Pass exactly one of `scale` and `log_scale`.

    Args:
        mean: [...], μ, which is the mean and the median of the distribution.
        targets: [...], x.
        scale: scalar or [...], b > 0.
        log_scale: scalar or [...], log b.
        where: [...], True for elements that count.

    Returns:
        [...], in nats, below 0 where the density is above 1; float32, or float64 if `mean` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `scale` is not above 0, or `scale` and `log_scale` are both given or both missing.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.laplace_nll(jnp.zeros(2), jnp.array([0.0, 10.0]), scale=0.5).tolist()  # 2·|x − μ|, because log 2b = 0
        [0.0, 20.0]

    Reference:
        Kendall and Gal, What Uncertainties Do We Need in Bayesian Deep Learning, 2017, arXiv 1703.04977.
    """
    name = "laplace_nll"
    mu, x, counts = _elements(name, "mean", mean, targets, where)
    return _laplace(mu, x, counts, *_one_of(name, mu, counts, scale=scale, log_scale=log_scale))


@jax.jit
def _laplace(mean: Array, targets: Array, where: Array | None, scale: ArrayLike | None, log_scale: ArrayLike | None) -> Array:
    r = _residual(mean, targets, where)
    r *= jnp.sign(r)  # |r|, with derivative 0 at 0
    if log_scale is None:
        b = _selected(scale, where, r.dtype, 1)
        return numerics.nan_or_zero(r / b + (jnp.log(b) + math.log(2)), None, where)
    log_b = _selected(log_scale, where, r.dtype, 0)
    return numerics.nan_or_zero(r * jnp.exp(-log_b) + (log_b + math.log(2)), None, where)


def poisson_nll(log_rate: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Negative log-probability of each count under a Poisson distribution, shape [...].

    loss = e^λ − k·λ + log k!, where log k! = log Γ(k + 1). The count k may be any number ≥ 0 and need not be whole.
    Gradient: ∂loss/∂λ = e^λ − k;  ∂loss/∂k = digamma(k + 1) − λ.

    If a count is large and close to the rate e^λ, the three terms nearly cancel. The loss is accurate even then.

    Args:
        log_rate: [...], λ, the logarithm of the expected count. λ = −∞ means that the rate is 0.
        targets: [...], k ≥ 0. If k is negative, the value and the gradient of its element are NaN. If k is whole, log k! is exact up to
            rounding. If k is not whole and is below 3 in float32 (below 10 in float64), log k! comes from `jax.lax.lgamma`. The error of
            `jax.lax.lgamma` in float32 is a few times 1e-6.
        where: [...], True for elements that count.

    Returns:
        [...], in nats, ≥ 0 for whole counts, and +∞ for a positive count at rate 0; float32, or float64 if `log_rate` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts = jnp.array([0.0, 3.0, 1e6])
        >>> xentjax.poisson_nll(jnp.log(jnp.maximum(counts, 1.0)), counts).tolist()  # about ½ log 2πk if the rate is k
        [1.0, 1.49592..., 7.8266...]

    Reference:
        Loader, Fast and Accurate Computation of Binomial Probabilities, 2000 (the form for large counts).
    """
    complaint = "is not a count (it is negative or NaN)"
    rate, k, counts = _elements("poisson_nll", "log_rate", log_rate, targets, where, lambda k: ~(k >= 0), complaint)
    return _poisson(rate, k, counts)


_TABLED = 10  # log k! of whole k < 10 comes from a table: in float32, lax.lgamma(1) is 5e-7, but the loss of k = 0 may be as small as e^λ


@jax.jit
def _poisson(log_rate: Array, targets: Array, where: Array | None) -> Array:
    """For large k, k(e^d − 1 − d) + ½ log 2πk + the rest of Stirling's series, d = λ − log k. No term has the size of k log k."""
    dtype = numerics.accumulation_dtype(log_rate.dtype)
    rate = numerics.finite(_selected(log_rate, where, dtype, 0))
    k = _selected(targets, where, dtype, 0)
    zero_rate = numerics.is_infinite(-rate)
    direct = jnp.exp(rate) - k * rate + _log_factorial(k)
    least = 3 if dtype == jnp.float32 else _TABLED  # from here on, the truncated series is exact to rounding
    large = k >= least
    n = numerics.where(large, k, least)
    stirling = (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - (1 / 1188 - 691 / 360360 / n**2) / n**2) / n**2) / n**2) / n**2) / n
    saddle = n * differences.exponential_excess(rate - jnp.log(n)) + jnp.log(2 * math.pi * n) / 2 + stirling
    loss = differences.with_slope_of(numerics.where(large, saddle, direct), direct)
    return numerics.nan_or_zero(numerics.where(zero_rate & (k > 0), loss + jnp.inf, loss), k >= 0, where)


def _log_factorial(k: Array) -> Array:
    table = jnp.asarray([math.lgamma(n + 1) for n in range(_TABLED)], k.dtype)
    general = lax.lgamma(k + 1)
    tabled = jnp.take(table, jnp.clip(k, 0, _TABLED - 1).astype(jnp.int32), mode="clip")
    return differences.with_slope_of(numerics.where((k == jnp.floor(k)) & (k < _TABLED), tabled, general), general)


def mixture_of_logistics_nll(
    mixture_logits: ArrayLike,
    targets: ArrayLike,
    *,
    means: ArrayLike,
    log_scales: ArrayLike,
    levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-probability of a discrete level under a mixture of logistics, one value per example, shape [...].

    The probability of a level is the integral of the mixture's density over the cell around the level:

        loss = −log Σ_j π_j (σ((x − μ_j + h)/s_j) − σ((x − μ_j − h)/s_j)),  π = softmax(mixture_logits), s = e^log_scales,

    where x is the value of the level, and h is half the distance between neighboring levels. The cell of the lowest level begins at −∞. The
    cell of the highest level ends at +∞. So the probabilities of all levels sum to 1.

    Gradient: for component j, let a_j = (x − μ_j − h)/s_j and b_j = (x − μ_j + h)/s_j, P_j = σ(b_j) − σ(a_j) and w_j = 2h/s_j. Let
    ρ_j = π_j P_j/Σ_i π_i P_i be the responsibility of component j. Then ∂loss/∂mixture_logits = π − ρ;
    ∂loss/∂μ_j = ρ_j (σ(−b_j) − σ(a_j))/s_j;  ∂loss/∂log s_j = ρ_j (b_j σ(−b_j) − a_j σ(a_j) + w_j/(e^(w_j) − 1)).

    Args:
        mixture_logits: [..., components], unnormalized log-weights.
        targets: [...], level indices in [0, levels) if the dtype is an integer dtype, or values in [low, high] if it is floating.
        means: [..., components], μ, in the units of `low` and `high`.
        log_scales: [..., components], log s.
        levels: number of levels, at least 2. The levels are evenly spaced from `low` to `high`.
        low: value of the lowest level. Floating targets below `low` count as the lowest level.
        high: value of the highest level. Floating targets above `high` count as the highest level.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if `mixture_logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `levels` is below 2, or `low` is not below `high`.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> logits, means, log_scales = jnp.zeros((4, 2)), jnp.tile(jnp.array([-0.5, 0.3]), (4, 1)), jnp.full((4, 2), -2.0)
        >>> loss = xentjax.mixture_of_logistics_nll(logits, jnp.arange(4), means=means, log_scales=log_scales, levels=4)
        >>> float(jnp.exp(-loss).sum().round(5))  # the probabilities of the four levels
        1.0

    Reference:
        Salimans et al., PixelCNN++, 2017, arXiv 1701.05517.
    """
    name = "mixture_of_logistics_nll"
    z = checks.floating(name, "mixture_logits", mixture_logits)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name}: mixture_logits must have at least one component on the last axis; got shape {z.shape}.")
    mu, s = checks.floating(name, "means", means), checks.floating(name, "log_scales", log_scales)
    for other, x in (("means", mu), ("log_scales", s)):
        checks.same_shape(name, other, x, z.shape, "the shape of mixture_logits")
    leading = (z.shape[:-1], "the shape of mixture_logits without its component axis")
    x = checks.same_shape(name, "targets", _numbers(name, "targets", checks.asarray(name, "targets", targets)), *leading)
    counts = checks.where_mask(name, where, *leading)
    if checks.count(name, "levels", levels) < 2 or not -math.inf < low < high < math.inf:
        raise ValueError(f"{name}: levels must be at least 2 and low below high; got levels={levels}, low={low}, high={high}.")
    for argument, y in (("mixture_logits", z), ("means", mu), ("log_scales", s)):
        values.logits(name, argument, y, counts)
    if jnp.issubdtype(x.dtype, jnp.integer):
        values.indices(name, "targets", x, levels, counts)
    else:
        values.not_nan(name, "targets", x, counts)
    return _mixture(rows.Examples(z, None, None, counts, z.ndim - 1, None), x, mu, s, levels, low, high)


@jax.jit
def _mixture(
    batch: rows.Examples, targets: Array, means: Array, log_scales: Array, levels: ArrayLike, low: ArrayLike, high: ArrayLike
) -> Array:
    r = rows.of(batch)
    stats = statistics.of_row(r)
    dtype = r.values.dtype
    step = (jnp.asarray(high, dtype) - jnp.asarray(low, dtype)) / jnp.asarray(levels - 1, dtype)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        index = targets.astype(numerics.index_dtype(targets))
        first, last, valid = index <= 0, index >= levels - 1, (index >= 0) & (index < levels)
        x = low + step * index.astype(dtype)
    else:
        x = _selected(targets, r.where, dtype, 0)
        x = jnp.where(x < low, low, jnp.where(x > high, high, x))
        first, last, valid = x < low + step / 2, x > high - step / 2, ~jnp.isnan(x)
    first, last, x = (jnp.broadcast_to(v[..., None], means.shape) for v in (first, last, x))
    log_scale = rows.masked(log_scales.astype(dtype), r.where)
    offset, inverse = rows.masked(x - means.astype(dtype), r.where), jnp.exp(-log_scale)
    below, above = (offset - step / 2) * inverse, (offset + step / 2) * inverse
    surprise = differences.interval_surprise(below, above, jnp.log(step) - log_scale, first, last)
    weight = surprises.surprise(r, stats)  # −log π
    # 1 minus the probability, for probabilities near 1, where the logarithm of the sum would lose everything below eps
    missing = rows.class_sum(r, jnp.exp(-weight) * -jnp.expm1(-surprise))
    joint = weight + surprise
    least = lax.stop_gradient(jnp.min(joint, axis=-1))
    loss = least - jnp.log(jnp.sum(jnp.exp(least[..., None] - joint), axis=-1))
    loss = numerics.where(missing < 0.5, -jnp.log1p(-jnp.minimum(missing, 0.5)), loss)
    loss = numerics.where(stats.all_impossible, lax.stop_gradient(loss) + jnp.inf, loss)
    return numerics.nan_or_zero(loss, valid, r.where)


# Arguments -----------------------------------------------------------------------------------------------------------------


def _elements(
    function: str,
    name: str,
    prediction: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    bad: Callable[[Array], Array] = jnp.isnan,
    complaint: str = "is NaN",
) -> tuple[Array, Array, Array | None]:
    """The checked prediction, targets and `where`, all of one shape; `bad` finds targets that are impossible."""
    x, t = checks.floating(function, name, prediction), _numbers(function, "targets", checks.quantities(function, "targets", targets))
    checks.same_shape(function, "targets", t, x.shape, f"the shape of {name}")
    counts = checks.where_mask(function, where, x.shape, f"the shape of {name}")
    values.not_nan(function, name, x, counts)
    values.check(function, "targets", t, bad, complaint, counts)
    return x, t, counts


def _numbers(function: str, name: str, x: Array) -> Array:
    return x if jnp.issubdtype(x.dtype, jnp.integer) else checks.floating(function, name, x)


def _one_of(function: str, mean: Array, where: Array | None, **given: ArrayLike | None) -> tuple[ArrayLike | None, ArrayLike | None]:
    """A checked parameter and its logarithm, of which one is None and the other a number or an array of the shape of `mean`."""
    plain, log = given
    if (given[plain] is None) == (given[log] is None):
        count = "neither" if given[log] is None else "both"
        raise ValueError(f"{function}: exactly one of {plain} and {log} must be given; got {count}. Use {plain}=1.0 for a constant.")
    for name, x in given.items():
        if x is not None and np.ndim(x):
            given[name] = x = checks.same_shape(function, name, checks.real(function, name, x), mean.shape, "the shape of mean")
            if name == plain:
                values.check(function, name, x, lambda v: ~(v > 0), "is not above 0", where)
            else:
                values.not_nan(function, name, x, where)
        elif x is not None:
            number = checks.positive(function, name, x) if name == plain else checks.number(function, name, x, low=-math.inf)
            given[name] = 0.0 if number is None else number
    return given[plain], given[log]


# Arrays with elements that do not count ------------------------------------------------------------------------------------


def _residual(mean: Array, targets: Array, where: Array | None) -> Array:
    """The residual x − μ, 0 where an element does not count."""
    dtype = numerics.accumulation_dtype(mean.dtype)
    r = targets.astype(dtype) - mean.astype(dtype)
    return r if where is None else jnp.where(where, r, 0)


def _selected(x: ArrayLike | None, where: Array | None, dtype: jnp.dtype, fill: float) -> Array:
    """`x` in `dtype`, replaced by `fill` where an element does not count."""
    x = jnp.asarray(x, dtype)
    return x if where is None or x.ndim == 0 else jnp.where(where, x, fill)
