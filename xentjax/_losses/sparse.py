"""Losses with sparse predictions: sparsemax and entmax.

For α in (1, 2], the distribution p maximizes p·z + H_α(p) over all distributions, where H_α(p) = Σ_k (p_k − p_k^α)/(α(α − 1)) is Tsallis'
entropy. α = 2 is sparsemax, and α → 1 is softmax. With β = 1/(α − 1) and the largest logit m,

    p_k = max(η_k, 0)^β,  η_k = 1 + (α − 1)(z_k − m) − u

where u in [0, 1) makes the probabilities sum to 1. If one class has nearly all of the probability, u is small. If one class has all of the
probability, u is 0. The equation is solved for u, and not for a threshold of the logits, so that u has a small relative error.

Root. Let S(u) = Σ_k p_k. The function S^(1/β) − 1 is convex and decreasing. So Newton's method from u = 0 approaches the root from one side
and needs no bounds. For α = 2, Newton's method removes classes from the support until the support is exact. Let * be a class with the
largest logit. Then η_* = 1 − u, and S − 1 is computed as Σ_{k≠*} p_k + ((1 − u)^β − 1), where the bracket is computed by expm1. The steps
of Newton's method are not differentiated. The derivatives are the closed forms below.

Loss. For labels t of sum 1, the Fenchel–Young loss max_p (p·z + H_α(p)) − t·z − H_α(t) is a sum of terms that are never negative:

    B_k = (t_k^α − p_k^α)/(α(α − 1)) − η_k (t_k − p_k)/(α − 1)

For t_k = 0, B_k is p_k^α/α. If t_k and p_k are nearly equal, B_k is about p_k^(α − 2)(t_k − p_k)²/2. Then B_k is computed by a series.

Derivatives. Let s_k = p_k^(2 − α) on the support and 0 elsewhere. Then dp_k = s_k (dz_k − Σ_j s_j dz_j/Σ_j s_j).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import blocks, checks, mesh, numerics, rows, values

_STEPS = 32
_NEAR = 0.5  # B is computed by a series where |t − p|/p is below this number


def sparsemax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Sparsemax loss per example, shape [...].

    loss = ½ Σ_{k: p_k > 0} (z_k² − τ²) − Σ_k t_k z_k + ½ Σ_k t_k², where z are the logits, t is the label, p_k = max(z_k − τ, 0), and τ
    makes p sum to 1. For a class index y, t_k = [k = y]. If the soft labels do not sum to 1, see `entmax_loss`.
    Gradient: ∂loss/∂z = p − t.

    p is the distribution nearest to z in Euclidean distance. Many of its probabilities are exactly 0. The loss is `entmax_loss` with α = 2.
    The loss is exactly 0 if the logit of the label leads all others by 1 or more.

    Args:
        logits: [..., classes], scores z.
        labels: [...] class indices, or [..., classes] soft labels.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.sparsemax_loss(jnp.array([[0.5, 0.0], [1.0, 0.0]]), jnp.array([0, 0])).tolist()  # ¼·(1 − 0.5)², and a margin of 1
        [0.0625, 0.0]

    Reference:
        Martins and Astudillo, From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification, 2016,
        arXiv 1602.02068.
    """
    batch = checks.examples("sparsemax_loss", logits, labels, axis, axis_name, class_mask, where)
    return _sparse(batch, 2.0, 1)


def entmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 1.5,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Entmax loss per example, shape [...].

    loss = (p − t)·z + H(p) − H(t), where z are the logits, t is the label, H(p) = Σ_k (p_k − p_k^α)/(α(α − 1)) is Tsallis' entropy, and
    p_k = max((α − 1) z_k − τ, 0)^(1/(α − 1)), with τ such that p sums to 1. For a class index y, t_k = [k = y].
    Gradient: ∂loss/∂z = p − t.

    p maximizes p·z + H(p). For soft labels whose sum s is not 1, the loss is s·max_p (p·z + H(p)) − t·z − H(t), and the gradient is
    s·p − t. The loss is exactly 0 if the logit of the label leads all others by 1/(α − 1) or more. α = 2 gives `sparsemax_loss`. As α
    approaches 1, p approaches softmax(z), and the loss approaches the cross-entropy minus the entropy of the labels. For α = 1, use
    `softmax_cross_entropy`.

    Second derivatives exist except at logits where a class enters or leaves the support of p. At these logits, a one-sided derivative is
    returned.

    Args:
        logits: [..., classes], scores z.
        labels: [...] class indices, or [..., classes] soft labels.
        alpha: α in (1, 2]. The larger α is, the fewer classes have a probability above 0. The rounding errors grow like 1/(α − 1).
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `alpha` is outside (1, 2].

    Example:
        >>> import jax, jax.numpy as jnp, xentjax
        >>> logits = jnp.array([2.0, 1.0, -3.0])
        >>> loss, slope = jax.value_and_grad(xentjax.entmax_loss)(logits, jnp.array(0))
        >>> print(f"{loss:.4f}, probability of the last class {slope[2]:.1f}")
        0.0617, probability of the last class 0.0

    Reference:
        Peters, Niculae and Martins, Sparse Sequence-to-Sequence Models, 2019, arXiv 1905.05702; Blondel, Martins and Niculae, Learning with
        Fenchel-Young Losses, 2019, arXiv 1901.02324.
    """
    name = "entmax_loss"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    exponent = checks.number(name, "alpha", alpha, low=1.0, high=2.0, interval="in (1, 2]")
    if isinstance(exponent, Array):
        values.check(name, "alpha", exponent, lambda a: a == 1, "is not above 1")
        return _sparse(batch, exponent, None)
    if exponent == 1:
        raise ValueError(f"{name}: alpha must be above 1; got 1. Use xentjax.softmax_cross_entropy.")
    assert exponent is not None  # None stands for 0, which is out of range
    return _sparse(batch, exponent, 1 if exponent == 2 else 2 if exponent == 1.5 else None)


@functools.partial(jax.jit, static_argnames="beta")
def _sparse(batch: rows.Examples, alpha: ArrayLike, beta: int | None) -> Array:
    return blocks.in_blocks(functools.partial(_loss, beta=beta), (rows.of(batch),), alpha)


def _loss(r: rows.Rows, alpha: Array, *, beta: int | None) -> Array:
    fenchel_young = _of_indices if r.labels_are_indices else _of_distributions
    loss = fenchel_young(r.values, r.given_labels, alpha, r.class_mask, r.where, r.axis_name, beta)
    if r.labels_are_indices:
        loss = numerics.nan_unless(rows.in_range(r), loss)
    all_impossible = rows.largest(r) == -jnp.inf
    loss = numerics.where(all_impossible, numerics.INFINITE, loss)
    return rows.row_value(r, numerics.restore_infinity(loss))


# The distribution --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _distribution(
    values: Array, alpha: Array, class_mask: Array | None, where: Array | None, axis_name: mesh.AxisName, beta: int | None
) -> tuple[Array, Array]:
    """The numbers p and η of every class, each of shape [..., classes]."""
    r = rows.Rows(values, values, None, class_mask, where, axis_name)
    centred, largest = _centred(r, alpha)
    # Where JAX drops the rule below (see `statistics`), it differentiates the last step, whose derivative is that of the root, and no loop.
    fixed, fixed_alpha = lax.stop_gradient((centred, alpha))
    tolerance = 4 * jnp.finfo(values.dtype).eps

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        steps, u, before = state
        return (steps < _STEPS) & ~blocks.every(~(u - before > tolerance * u))

    def one_more(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        steps, u, _ = state
        return steps + 1, _newton(r, fixed, largest, fixed_alpha, beta, u), u

    start = jnp.zeros_like(rows.reference(r))
    first = one_more((jnp.zeros((), jnp.int32), start, start))
    u = _newton(r, centred, largest, alpha, beta, lax.while_loop(unfinished, one_more, first)[1])
    eta = centred - rows.as_column(r, u)
    return _powers(eta, alpha, beta)[0], eta


@_distribution.defjvp
def _(
    axis_name: mesh.AxisName, beta: int | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, alpha, class_mask, where = primals
    r = rows.Rows(values, values, None, class_mask, where, axis_name)
    p, eta = _distribution(*primals, axis_name, beta)
    slope = _powers(eta, alpha, beta)[1]
    scale = 1 / (alpha - 1)
    below = rows.relative(r, rows.reference(r))  # z − m
    moved = rows.masked(tangents[0], where, class_mask) + below * rows.as_column(r, scale * tangents[1])
    log_terms = _x_log_x(p)
    rate = scale * tangents[1]  # dp also contains −rate·p·log p
    mean = rows.class_sum(r, slope * moved) - rate * rows.class_sum(r, log_terms)
    moved = moved - rows.as_column(r, mean / rows.class_sum(r, slope))
    p_dot = slope * moved - log_terms * rows.as_column(r, rate)
    return (p, eta), (p_dot, rows.as_column(r, alpha - 1) * moved)


def _centred(r: rows.Rows, alpha: Array) -> tuple[Array, Array]:
    """1 + (α − 1)(z_k − m) [..., classes], and the mask of the classes with the largest logit."""
    below = rows.relative(r, rows.reference(r))
    largest = rows.masked(below == 0, r.where, r.class_mask)
    centred = 1 + numerics.weighted(rows.as_column(r, alpha - 1), below)
    keep = rows.full_mask(r)
    return centred if keep is None else numerics.where(keep, centred, -numerics.INFINITE), largest


def _newton(r: rows.Rows, centred: Array, largest: Array, alpha: Array, beta: int | None, u: Array) -> Array:
    """One step of Newton's method for S(u)^(1/β) = 1 from u [...]. In a row without classes, the step is 0."""
    p, slope = _powers(centred - rows.as_column(r, u), alpha, beta)
    others, ties = rows.class_sum(r, numerics.where(largest, 0, p)), rows.class_sum(r, largest.astype(p.dtype))
    of_largest = jnp.expm1(jnp.log1p(-u) / (alpha - 1))
    excess = others + (ties - 1) * (1 + of_largest) + of_largest  # S − 1
    empty = excess <= -1
    excess = numerics.where(empty, 0, excess)
    root = jnp.expm1(jnp.log1p(excess) * (alpha - 1))  # S^(1/β) − 1
    total = rows.class_sum(r, slope)
    return u + root * (1 + excess) / ((1 + root) * numerics.where(total > 0, total, 1))


def _powers(eta: Array, alpha: Array, beta: int | None) -> tuple[Array, Array]:
    """η^β and η^(β − 1) of the positive entries of η [..., classes], 0 for all others. `beta` is given if it is 1 or 2."""
    inside = eta > 0
    if beta == 2:
        slope = numerics.where(inside, eta, 0)
    elif beta == 1:
        slope = inside.astype(eta.dtype)
    else:
        power = (2 - alpha) / (alpha - 1)
        slope = numerics.where(inside, jnp.exp(power[..., None] * jnp.log(numerics.where(inside, eta, 1))), 0)
    return numerics.where(inside, eta, 0) * slope, slope


def _x_log_x(x: Array) -> Array:
    some = x > 0
    return numerics.where(some, x * jnp.log(numerics.where(some, x, 1)), 0)


# The loss of class indices -----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _of_indices(
    values: Array,
    labels: Array,
    alpha: Array,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
    beta: int | None,
) -> Array:
    r = rows.Rows(values, values, labels, class_mask, where, axis_name)
    p, eta = _distribution(values, alpha, class_mask, where, axis_name, beta)
    label = rows.on_label(r)
    others = rows.class_sum(r, numerics.where(label, 0, p))
    powers = rows.class_sum(r, numerics.where(label, 0, p * jnp.maximum(eta, 0)))
    p, eta = (rows.class_sum(r, numerics.where(label, x, 0)) for x in (p, eta))
    return powers / alpha + _terms(jnp.ones_like(p), p, eta, others, alpha)


@_of_indices.defjvp
def _(axis_name: mesh.AxisName, beta: int | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, labels, alpha, class_mask, where = primals
    r = rows.Rows(values, values, labels, class_mask, where, axis_name)
    p, _ = _distribution(values, alpha, class_mask, where, axis_name, beta)
    label = rows.on_label(r)
    others = rows.class_sum(r, numerics.where(label, 0, p))  # 1 − p_y
    slope = numerics.where(label, -jnp.broadcast_to(rows.as_column(r, others), p.shape), p)
    in_z = rows.class_sum(r, slope * rows.masked(tangents[0], where, class_mask))
    in_alpha = -rows.class_sum(r, _entropy_slope(p, rows.as_column(r, alpha)))
    return _of_indices(*primals, axis_name, beta), in_z + in_alpha * tangents[2]


# The loss of soft labels -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _of_distributions(
    values: Array,
    t: Array,
    alpha: Array,
    class_mask: Array | None,
    where: Array | None,
    axis_name: mesh.AxisName,
    beta: int | None,
) -> Array:
    r = rows.Rows(values, values, t, class_mask, where, axis_name)
    p, eta = _distribution(values, alpha, class_mask, where, axis_name, beta)
    pivot = p > numerics.MOST
    rest = rows.as_column(r, rows.class_sum(r, numerics.where(pivot, 0, p)))
    difference = numerics.where(pivot, rest - (1 - t), t - p)
    total, powers = rows.class_sum(r, t), rows.class_sum(r, p * jnp.maximum(eta, 0))
    loss = rows.class_sum(r, _terms(t, p, eta, difference, rows.as_column(r, alpha))) + (total - 1) * powers / alpha
    return numerics.where(total == 0, 0, loss)


@_of_distributions.defjvp
def _(axis_name: mesh.AxisName, beta: int | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, t, alpha, class_mask, where = primals
    r = rows.Rows(values, values, t, class_mask, where, axis_name)
    p, eta = _distribution(values, alpha, class_mask, where, axis_name, beta)
    pivot = lax.stop_gradient(p) > numerics.MOST
    rest, others, total = (rows.class_sum(r, x) for x in (numerics.where(pivot, 0, p), numerics.where(pivot, 0, t), t))
    rest, others, total, column = (rows.as_column(r, x) for x in (rest, others, total, alpha))
    slope = numerics.where(pivot, p * others - t * rest, total * p - t)  # s·p − t
    in_z = rows.class_sum(r, slope * rows.masked(tangents[0], where, class_mask))
    powers = rows.class_sum(r, p * jnp.maximum(eta, 0)) / alpha
    of_label = rows.as_column(r, powers) + (_power(t, column - 1) - eta) / (column - 1)
    in_t = rows.class_sum(r, of_label * tangents[1])
    in_alpha = rows.class_sum(r, _entropy_slope(t, column)) - rows.class_sum(r, t) * rows.class_sum(r, _entropy_slope(p, column))
    return _of_distributions(*primals, axis_name, beta), in_z + in_t + in_alpha * tangents[2]


# One class ---------------------------------------------------------------------------------------------------------------


def _terms(t: Array, p: Array, eta: Array, difference: Array, alpha: Array) -> Array:
    """B_k of the module docstring, which is never negative, for `difference` = t − p."""
    of_p = p * jnp.maximum(eta, 0)  # p^α
    some = p > 0
    ratio = difference / numerics.where(some, p, 1)
    near = some & (jnp.abs(ratio) < _NEAR)
    x = numerics.where(near, ratio, 0)
    series, coefficient = jnp.zeros_like(x), [0.5 * jnp.ones_like(alpha)]
    for n in range(1, 44 if x.dtype == jnp.float64 else 20):  # ((1 + x)^α − 1 − αx)/(α(α − 1)x²), by the binomial theorem
        coefficient.append(coefficient[-1] * (alpha - n - 1) / (n + 2))
    for c in reversed(coefficient):
        series = series * x + c
    direct = (_power(t, alpha) - of_p) / (alpha * (alpha - 1)) - numerics.weighted(difference, eta) / (alpha - 1)
    return numerics.where(near, of_p * (x * x * series), numerics.where(t == 0, of_p / alpha, direct))


def _power(x: Array, exponent: Array) -> Array:
    """x^exponent for x ≥ 0 and an exponent above 0; 0 with derivative 0 at x = 0."""
    some = x > 0
    return numerics.where(some, jnp.exp(exponent * jnp.log(numerics.where(some, x, 1))), 0)


def _entropy_slope(x: Array, alpha: Array) -> Array:
    """The derivative with respect to α of (x^α − x)/(α(α − 1))."""
    some = x > 0
    safe = numerics.where(some, x, 1)
    scale = alpha * (alpha - 1)
    power = jnp.exp(alpha * jnp.log(safe))
    return numerics.where(some, (power * jnp.log(safe) - (power - safe) * (2 * alpha - 1) / scale) / scale, 0)
