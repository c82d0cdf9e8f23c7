"""Losses of dense object detectors: the quality of a box, and the distance to its sides.

`quality_focal_loss` and `varifocal_loss` take one logit per predicted box and class. A label is a number in [0, 1]. For the class of the
true box, it is the overlap of the predicted box and the true box. For all other classes, and for boxes without an object, it is 0.
`distribution_focal_loss` takes one row of logits per side of a box. All functions here share these conventions:

- `logits` have a floating dtype. Arithmetic and results are float32, or float64 if `logits` are float64. The gradient with respect to
  `logits` has the dtype of `logits`.
- `where` has the shape of the result, and is True for elements that count. The loss and the gradient of every other element are exactly 0,
  whatever the element contains.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
- The papers of detectors divide the sum of these losses by the number of objects, and not by the number of elements.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, surprises, values


def quality_focal_loss(logits: ArrayLike, labels: ArrayLike, *, beta: ArrayLike = 2.0, where: ArrayLike | None = None) -> Array:
    """Quality focal loss per element, shape [...].

    loss = |y − p|^β·(y·(−log p) + (1 − y)·(−log(1 − p))) with p = σ(z) and y = labels.
    Gradient: with d = p − y and the cross-entropy H, ∂loss/∂z = |d|^β·(d + β·H·p(1 − p)/d), and 0 at d = 0.

    The label is the quality of a box, for example its overlap with the true box. For labels 0 and 1, this is `sigmoid_focal_loss` with
    γ = β. The loss and its gradient are finite for every β ≥ 0 and all finite logits. If β > 0, the loss is 0 at d = 0, although the
    cross-entropy H is above 0 for a label between 0 and 1. If 0 < β < 1, the gradient near d = 0 is unbounded for such a label.

    Args:
        logits: [...], the log-odds z.
        labels: [...], y in [0, 1]; booleans, integers or floating numbers.
        beta: β ≥ 0, the focusing exponent.
        where: [...], True for elements that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `beta` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.quality_focal_loss(jnp.array([0.0, 0.0, -80.0]), jnp.array([0.5, 1.0, 0.8])).tolist()  # the first quality is right
        [0.0, 0.17328..., 40.96...]

    Reference:
        Li et al., Generalized Focal Loss, 2020, arXiv 2006.04388.
    """
    name = "quality_focal_loss"
    z, y, counts = checks.elements(name, logits, labels, where)
    return _quality(z, y, counts, checks.number(name, "beta", beta))


@jax.jit
def _quality(logits: Array, labels: Array, where: Array | None, beta: ArrayLike | None) -> Array:
    z, y = _finite(logits, labels, where)
    loss = _cross_entropy(z, y)
    if beta is not None:
        loss = numerics.weighted(_distance_power(z, y, jnp.asarray(beta, z.dtype)), loss)
    return numerics.nan_or_zero(numerics.restore_infinity(loss), None, where)


def varifocal_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: ArrayLike = 0.75, gamma: ArrayLike = 2.0, where: ArrayLike | None = None
) -> Array:
    """Varifocal loss per element, shape [...].

    loss = y·(y·(−log p) + (1 − y)·(−log(1 − p))) for y > 0, and α·p^γ·(−log(1 − p)) for y = 0, with p = σ(z) and y = labels.
    Gradient: ∂loss/∂z = y·(p − y) for y > 0, and α·p^γ·(p − γ·(1 − p)·log(1 − p)) for y = 0.

    The label is the quality of a box, for example its overlap with the true box. Boxes of high quality get more weight, and easy negative
    boxes get less weight. The loss and all its derivatives are finite for every γ ≥ 0 and all finite logits.

    Args:
        logits: [...], the log-odds z.
        labels: [...], y in [0, 1]; booleans, integers or floating numbers.
        alpha: α in [0, 1], weight of negative elements, which have y = 0.
        gamma: γ ≥ 0, the focusing exponent of negative elements.
        where: [...], True for elements that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `alpha` is outside [0, 1], or `gamma` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.varifocal_loss(jnp.array([0.0, 0.0, -4.0]), jnp.array([0.8, 0.0, 0.0])).tolist()  # the last box is an easy negative
        [0.55451..., 0.12996..., 4.40...e-06]

    Reference:
        Zhang et al., VarifocalNet: An IoU-aware Dense Object Detector, 2020, arXiv 2008.13367.
    """
    name = "varifocal_loss"
    z, y, counts = checks.elements(name, logits, labels, where)
    return _varifocal(z, y, counts, checks.fraction(name, "alpha", alpha), checks.number(name, "gamma", gamma))


@jax.jit
def _varifocal(logits: Array, labels: Array, where: Array | None, alpha: ArrayLike, gamma: ArrayLike | None) -> Array:
    z, y = _finite(logits, labels, where)
    positive = numerics.weighted(y, _cross_entropy(z, y))
    negative = numerics.weighted(jnp.asarray(alpha, z.dtype), odds.focal(-z, gamma))
    return numerics.nan_or_zero(numerics.restore_infinity(numerics.where(y == 0, negative, positive)), None, where)


def distribution_focal_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Distribution focal loss per example, shape [...].

    loss = (i + 1 − y)·(−log p_i) + (y − i)·(−log p_{i+1}) with i = ⌊y⌋, or i = y − 1 at the last bin, and p = softmax(z).
    Gradient: ∂loss/∂z_k = p_k − t_k with t_i = i + 1 − y, t_{i+1} = y − i and t_k = 0 elsewhere. ∂loss/∂y = log p_i − log p_{i+1}.

    The distance from a point to one side of its box is modelled as a distribution over the bins 0, 1, …, classes − 1. The numbers t_k above
    are a distribution over the two bins next to y, with mean y. The loss is the cross-entropy of p and t. At its minimum, p also has the
    mean Σ_k k·p_k = y.

    Args:
        logits: [..., classes], unnormalized log-probabilities of the bins.
        targets: [...], the distances y in [0, classes − 1], in units of a bin. If a target is outside this range, the value and the
            gradient of its example are NaN.
        axis: axis of the bins of `logits`.
        axis_name: mesh axis over which the bins are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for bins that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.6, 0.1]))
        >>> float(xentjax.distribution_focal_loss(logits, 1.75))  # −0.25 log 0.2 − 0.75 log 0.6
        0.78547...

    Reference:
        Li et al., Generalized Focal Loss, 2020, arXiv 2006.04388.
    """
    name = "distribution_focal_loss"
    batch = checks.examples(name, logits, None, axis, axis_name, class_mask, where, labelled=False)
    shape = batch.logits.shape[: batch.axis] + batch.logits.shape[batch.axis + 1 :]
    y = checks.same_shape(name, "targets", checks.real(name, "targets", targets), shape, "the shape of logits without its class axis")
    highest = batch.classes - 1
    values.check(name, "targets", y, lambda v: ~((v >= 0) & (v <= highest)), f"is outside [0, {highest}]", batch.where)
    return _distribution(batch, y)


@jax.jit
def _distribution(batch: rows.Examples, targets: Array) -> Array:
    r = rows.of(batch)
    y = targets.astype(r.values.dtype)
    y = y if r.where is None else numerics.where(r.where, y, 0)
    low = lax.stop_gradient(jnp.clip(jnp.floor(y), 0, max(r.classes - 2, 0)))
    share, place = rows.as_column(r, y - low), rows.class_index(r, y.dtype) - rows.as_column(r, low)
    share = jnp.broadcast_to(share, place.shape)
    weight = numerics.where(place == 0, 1 - share, numerics.where(place == 1, share, 0))
    loss = statistics.finish(r, statistics.of_row(r), surprises.expected(r._replace(labels=rows.masked(weight, r.where))))
    return numerics.nan_or_zero(loss, (y >= 0) & (y <= r.classes - 1), r.where)


def _finite(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
    """Finite logits, and labels, in the accumulation dtype; both are 0 in elements that do not count."""
    dtype = numerics.accumulation_dtype(logits.dtype)
    z, y = numerics.finite(logits.astype(dtype)), labels.astype(dtype)
    return (z, y) if where is None else (numerics.where(where, z, 0), numerics.where(where, y, 0))


def _cross_entropy(z: Array, y: Array) -> Array:
    """The cross-entropy of σ(z) and the label y, with the shape of `z`."""
    return numerics.weighted(y, numerics.softplus(-z)) + numerics.weighted(1 - y, numerics.softplus(z))


# |σ(z) − y|^β ----------------------------------------------------------------------------------------------------------------
#
# Since σ(z) − y = −(σ(−z) − (1 − y)), only σ(z) > y needs a formula. With h = e^(−z)·y/(1 − y), which is at most 1,
#
#     σ(z) − y = σ(z)·(1 − y)·(1 − h).
#
# Nothing cancels in the first two factors. The power of σ(z) is an exponential of softplus, which has finite derivatives of every order.


def _distance_power(z: Array, y: Array, beta: Array) -> Array:
    """|σ(z) − y|^β, with the shape of `z`. For labels 0 and 1, all derivatives are finite at every logit."""
    above = (numerics.sigmoid(z) > y) | (y == 0)  # so the label 1 becomes 0, and 1 − y is never 0
    z, y, rest = numerics.where(above, z, -z), numerics.where(above, y, 1 - y), numerics.where(above, 1 - y, y)
    return jnp.exp(-beta * numerics.softplus(-z)) * _power(rest, beta) * _power(_gap(z, y, rest), beta)


@jax.custom_jvp
def _gap(z: Array, y: Array, rest: Array) -> Array:
    """1 − h with h = e^(−z)·y/rest, where `rest` is 1 − y.

    The derivative rule ignores the tangent of `rest`, because it is minus the tangent of y. The bound on e^(−z) in the rule matters only
    where σ(z)^β is below e^(−80β).
    """
    some = y > 0
    return numerics.where(some, -jnp.expm1(jnp.log(numerics.where(some, y, 1)) - jnp.log(rest) - z), 1)


@_gap.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    z, _, rest = primals
    gap = _gap(*primals)
    return gap, (1 - gap) * tangents[0] - jnp.exp(-jnp.maximum(z, -80)) / (rest * rest) * tangents[1]


@jax.custom_jvp
def _power(x: Array, exponent: Array) -> Array:
    """|x|^exponent, and 1 for the exponent 0; at x = 0, it is 0 for every other exponent."""
    none = x == 0
    power = jnp.exp(exponent * jnp.log(numerics.where(none, 1, jnp.abs(x))))
    return numerics.where(none & (exponent != 0), 0, power)


@jax.custom_jvp
def _signed_power(x: Array, exponent: Array) -> Array:
    """sign(x)·|x|^exponent, and 0 at x = 0."""
    return jnp.sign(x) * _power(x, exponent)


def _power_rule(power: Callable, derivative: Callable) -> Callable:
    """The rule of `power`, whose derivative in x is exponent·derivative(x, exponent − 1)."""

    def rule(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        x, exponent = primals
        value, log = power(x, exponent), jnp.log(numerics.where(x == 0, 1, jnp.abs(x)))
        return value, exponent * derivative(x, exponent - 1) * tangents[0] + value * log * tangents[1]

    return rule


_power.defjvp(_power_rule(_power, _signed_power))
_signed_power.defjvp(_power_rule(_signed_power, _power))
