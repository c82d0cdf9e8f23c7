"""Negative log-likelihoods of numbers under a Gaussian, a Laplace, a Poisson distribution or a mixture of logistics.

What every function here shares:

- The first argument is of a floating dtype. Arithmetic and results are float32, or float64 if the first argument is; gradients
  come back in the dtype of each argument.
- `targets` [...] are integer or floating numbers, exactly one per result.
- Likelihoods are complete: no constant is left out, so values of different families compare.
- `where`, the shape of the result: what counts. The rest costs exactly 0 with gradient exactly 0, whatever it holds.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

import math

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
    """Negative log-density of targets under a Gaussian, one value per element [...].

    loss = ½((x − μ)²/v + log v + log 2π),  v = `variance` or e^`log_variance`; give one of the two.
    Gradient, with r = x − μ: ∂/∂μ = −r/v;  ∂/∂v = (1 − r²/v)/(2v);  ∂/∂log v = (1 − r²/v)/2.

    Args:
        mean: [...], μ.
        targets: [...], x.
        variance: scalar or [...], v > 0.
        log_variance: scalar or [...], log v: what a network predicts, exact at ±80 too.
        where: [...], which elements count.

    Returns:
        [...], nats; densities above 1 give negative values.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, none or both of `variance` and `log_variance`, a `variance` not above 0.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> spread = lambda s: xentjax.gaussian_nll(jnp.array(0.0), jnp.array(3.0), log_variance=s)
        >>> abs(float(jax.grad(spread)(jnp.log(9.0)))) < 1e-6  # the best variance is the squared error
        True

    Reference:
        Nix, Weigend, Estimating the Mean and Variance of the Target Probability Distribution, 1994.
    """
    name = "gaussian_nll"
    mu, x, counts = _elements(name, "mean", mean, targets, where)
    return _gaussian(mu, x, counts, *_spread(name, mu, counts, variance=variance, log_variance=log_variance))


def laplace_nll(
    mean: ArrayLike,
    targets: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    log_scale: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Negative log-density of targets under a Laplace distribution, one value per element [...].

    loss = |x − μ|/b + log 2b,  b = `scale` or e^`log_scale`; give one of the two.
    Gradient: ∂/∂μ = −sign(x − μ)/b, 0 at x = μ;  ∂/∂b = (1 − |x − μ|/b)/b;  ∂/∂log b = 1 − |x − μ|/b.

    Args:
        mean: [...], μ, the median.
        targets: [...], x.
        scale: scalar or [...], b > 0.
        log_scale: scalar or [...], log b.
        where: [...], which elements count.

    Returns:
        [...], nats; densities above 1 give negative values.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, none or both of `scale` and `log_scale`, a `scale` not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.laplace_nll(jnp.zeros(2), jnp.array([0.0, 10.0]), scale=0.5).tolist()  # 2·|x − μ|, for log 2b = 0
        [0.0, 20.0]

    Reference:
        Kendall, Gal, What Uncertainties Do We Need in Bayesian Deep Learning, 2017, arXiv 1703.04977.
    """
    name = "laplace_nll"
    mu, x, counts = _elements(name, "mean", mean, targets, where)
    return _laplace(mu, x, counts, *_spread(name, mu, counts, scale=scale, log_scale=log_scale))


def poisson_nll(log_rate: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Negative log-probability of counts under a Poisson distribution, one value per element [...].

    loss = e^λ − k·λ + log k!,  log k! = log Γ(k + 1), so k need not be whole.
    Gradient: ∂/∂λ = e^λ − k;  ∂/∂k = digamma(k + 1) − λ.

    Large counts near their rate keep their digits, although the three terms cancel there.

    Args:
        log_rate: [...], λ, the logarithm of the expected count; −∞ is a rate of 0.
        targets: [...], k ≥ 0; a negative one makes its value and gradient NaN. log k! is exact for whole counts; for
            fractions below 10 it is that of `jax.lax.lgamma`, a few 1e-6 in float32.
        where: [...], which elements count.

    Returns:
        [...], nats, ≥ 0 for whole counts; +∞ for a positive count at rate 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts = jnp.array([0.0, 3.0, 1e6])
        >>> xentjax.poisson_nll(jnp.log(jnp.maximum(counts, 1.0)), counts).tolist()  # ½ log 2πk when the rate is right
        [1.0, 1.49592..., 7.8266...]

    Reference:
        Loader, Fast and Accurate Computation of Binomial Probabilities, 2000 (the form for large counts).
    """
    complaint = "is not a count (it is negative or NaN)"
    rate, k, counts = _elements("poisson_nll", "log_rate", log_rate, targets, where, lambda k: ~(k >= 0), complaint)
    return _poisson(rate, k, counts)


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
    """Negative log-probability of a level under a mixture of logistics that is integrated over the level's cell, [...].

    loss = −log Σ_j π_j (σ((x − μ_j + h)/s_j) − σ((x − μ_j − h)/s_j)),  π = softmax(mixture_logits), s = e^log_scales,
    h half the distance of two levels. The lowest cell begins at −∞ and the highest ends at +∞: the levels' probabilities sum to 1.
    Gradient, with responsibilities ρ_j = π_j P_j/Σ π P and a_j < b_j the arguments of the two σ: ∂/∂mixture_logits = π − ρ;
    ∂/∂μ_j = ρ_j (σ(−b_j) − σ(a_j))/s_j;  ∂/∂log s_j = ρ_j (b_j σ(−b_j) − a_j σ(a_j) + w/(e^w − 1)), w = 2h/s_j.

    Args:
        mixture_logits: [..., components], unnormalised log-weights.
        targets: [...]; an integer dtype means level indices in [0, levels), a floating one values in [low, high].
        means: [..., components], μ, in the units of `low` and `high`.
        log_scales: [..., components], log s.
        levels: number of levels, at least 2, evenly spaced from `low` to `high`.
        low: value of the lowest level; values beyond it belong to it.
        high: value of the highest level; values beyond it belong to it.
        where: [...], which examples count.

    Returns:
        [...], nats, ≥ 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, fewer than 2 levels, `low` not below `high`.

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> logits, means, log_scales = jnp.zeros((4, 2)), jnp.tile(jnp.array([-0.5, 0.3]), (4, 1)), jnp.full((4, 2), -2.0)
        >>> loss = xentjax.mixture_of_logistics_nll(logits, jnp.arange(4), means=means, log_scales=log_scales, levels=4)
        >>> float(jnp.exp(-loss).sum().round(5))
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
    counts = checks.counted(name, where, *leading)
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
def _gaussian(mean, targets, where, variance, log_variance):
    r = _residual(mean, targets, where)
    if log_variance is None:
        v = _selected(variance, where, r.dtype, 1)
        square, size = r * (r / v), jnp.log(v)
    else:
        size = _selected(log_variance, where, r.dtype, 0)
        square = jnp.square(r * jnp.exp(-size / 2))  # e^(−s) r² with neither factor out of range
    return _close((square + (size + math.log(2 * math.pi))) / 2, where)


@jax.jit
def _laplace(mean, targets, where, scale, log_scale):
    r = _residual(mean, targets, where)
    r *= jnp.sign(r)  # |r| with derivative 0 at 0
    if log_scale is None:
        b = _selected(scale, where, r.dtype, 1)
        return _close(r / b + (jnp.log(b) + math.log(2)), where)
    size = _selected(log_scale, where, r.dtype, 0)
    return _close(r * jnp.exp(-size) + (size + math.log(2)), where)


_TABLED = 10  # below it log k! of whole k comes from a table: lax.lgamma(1) is 5e-7 in float32, but k = 0 costs e^λ


def _log_factorial(k):
    table = jnp.asarray([math.lgamma(n + 1) for n in range(_TABLED)], k.dtype)
    general = lax.lgamma(k + 1)
    tabled = jnp.take(table, jnp.clip(k, 0, _TABLED - 1).astype(jnp.int32), mode="clip")
    return differences.with_slope_of(numerics.where((k == jnp.floor(k)) & (k < _TABLED), tabled, general), general)


@jax.jit
def _poisson(log_rate, targets, where):
    """For large k, k(e^d − 1 − d) + ½ log 2πk + the rest of Stirling's series, d = λ − log k: no terms of size k log k."""
    dtype = numerics.accumulation_dtype(log_rate.dtype)
    rate = numerics.finite(_selected(log_rate, where, dtype, 0))
    k = _selected(targets, where, dtype, 0)
    nothing = numerics.is_infinite(-rate)
    direct = jnp.exp(rate) - k * rate + _log_factorial(k)
    least = 3 if dtype == jnp.float32 else _TABLED  # from where on the series is exact
    large = k >= least
    n = numerics.where(large, k, least)
    stirling = (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - (1 / 1188 - 691 / 360360 / n**2) / n**2) / n**2) / n**2) / n**2) / n
    saddle = n * differences.exponential_excess(rate - jnp.log(n)) + jnp.log(2 * math.pi * n) / 2 + stirling
    loss = differences.with_slope_of(numerics.where(large, saddle, direct), direct)
    return _close(numerics.where(nothing & (k > 0), loss + jnp.inf, loss), where, k >= 0)


@jax.jit
def _mixture(batch, targets, means, log_scales, levels, low, high):
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
    first, last, spread = (jnp.broadcast_to(v[..., None], means.shape) for v in (first, last, x))
    size = rows.masked(log_scales.astype(dtype), r.where)
    offset, inverse = rows.masked(spread - means.astype(dtype), r.where), jnp.exp(-size)
    below, above = (offset - step / 2) * inverse, (offset + step / 2) * inverse
    terms = (
        (last, numerics.softplus(-above)),
        (first, numerics.softplus(below)),
        (first | last, differences.width_surprise(jnp.log(step) - size)),
    )
    surprise = sum(numerics.where(missing, 0, term) for missing, term in terms)
    weight = surprises.surprise(r, stats)
    # what is missing to a probability of 1; the sum of logarithms would lose what is below eps
    missing = rows.class_sum(r, jnp.exp(-weight) * -jnp.expm1(-surprise))
    joint = weight + surprise
    least = lax.stop_gradient(jnp.min(joint, axis=-1))
    loss = least - jnp.log(jnp.sum(jnp.exp(least[..., None] - joint), axis=-1))
    loss = numerics.where(missing < 0.5, -jnp.log1p(-jnp.minimum(missing, 0.5)), loss)
    loss = numerics.where(stats.dead, lax.stop_gradient(loss) + jnp.inf, loss)
    return _close(loss, r.where, valid)


# Arguments -----------------------------------------------------------------------------------------------------------------


def _elements(function, name, prediction, targets, where, bad=jnp.isnan, complaint="is NaN"):
    """What each element has, checked; `bad` says which targets are not possible."""
    x, t = checks.floating(function, name, prediction), _numbers(function, "targets", checks.quantities(function, "targets", targets))
    checks.same_shape(function, "targets", t, x.shape, f"the shape of {name}")
    counts = checks.counted(function, where, x.shape, f"the shape of {name}")
    values.not_nan(function, name, x, counts)
    values.check(function, "targets", t, bad, complaint, counts)
    return x, t, counts


def _numbers(function, name, x):
    return x if jnp.issubdtype(x.dtype, jnp.integer) else checks.floating(function, name, x)


def _spread(function, mean, where, **given):
    """Both parameters of spread, one of them None; the other a number, or an array of the shape of `mean`."""
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


# Inside the compiled parts -------------------------------------------------------------------------------------------------


def _residual(mean, targets, where):
    dtype = numerics.accumulation_dtype(mean.dtype)
    r = targets.astype(dtype) - mean.astype(dtype)
    return r if where is None else jnp.where(where, r, 0)


def _selected(x, where, dtype, fill):
    """`x` in `dtype`, and `fill` where it does not count."""
    x = jnp.asarray(x, dtype)
    return x if where is None or x.ndim == 0 else jnp.where(where, x, fill)


def _close(loss, where, valid=None):
    """0 where an element does not count, NaN where its target is no target: a factor, for the derivative to be NaN as well."""
    if valid is not None:
        valid = valid if where is None else valid | ~where
        loss = numerics.nan_unless(valid, loss)
    return loss if where is None else jnp.where(where, loss, jnp.zeros_like(loss))
