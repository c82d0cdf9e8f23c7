"""Losses and class weights for imbalanced data.

All functions share the conventions of `xentjax.softmax_cross_entropy`. In the formulas, z are the logits, y is the label, n_k is the number
of training examples of class k, and [k = y] is 1 for the label and 0 for other classes. The loss of soft labels t is Σ_k t_k·loss(k).

`class_counts` [classes] holds the numbers n_k, in an integer or floating dtype. Under `axis_name`, it holds the numbers of the classes on
this device. Half-precision logits are adjusted in float32, which takes one float32 copy of them.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, values


def logit_adjusted_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_log_prior: ArrayLike,
    tau: ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of logits shifted by the logarithms of the class frequencies, shape [...].

    loss = −log softmax(z + τ·log π)_y. At τ = 1 it is balanced softmax.
    Gradient: ∂loss/∂z_k = softmax(z + τ·log π)_k − [k = y].

    The expected loss is minimal if z are the correct logits for equally frequent classes. Train with this loss, and predict with the
    unshifted logits.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        class_log_prior: [classes], log π in nats, such as log(counts/total); adding a constant does not change the loss.
        tau: τ ≥ 0, multiplies the shift.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `tau` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> prior = jnp.log(jnp.array([0.9, 0.1]))
        >>> xentjax.logit_adjusted_cross_entropy(jnp.zeros((2, 2)), jnp.array([0, 1]), class_log_prior=prior).tolist()  # −log π
        [0.10536..., 2.30258...]

    Reference:
        Menon et al., Long-Tail Learning via Logit Adjustment, 2020, arXiv 2007.07314; Ren et al., Balanced Meta-Softmax for Long-Tailed
        Visual Recognition, 2020, arXiv 2007.10740.
    """
    name = "logit_adjusted_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    prior = _one_per_class(name, "class_log_prior", checks.real(name, "class_log_prior", class_log_prior), batch)
    values.logits(name, "class_log_prior", prior)
    return _logit_adjusted(batch, prior, checks.number(name, "tau", tau))


@jax.jit
def _logit_adjusted(batch: rows.Examples, class_log_prior: Array, tau: ArrayLike | None) -> Array:
    r = rows.of(batch)
    if tau is not None:
        shift = jnp.asarray(tau, r.values.dtype) * numerics.finite(class_log_prior.astype(r.values.dtype))
        r = rows.adjusted(r, offset=numerics.expand_leading(shift, r.values.ndim))
    stats = statistics.of(r)
    return statistics.finish(r, stats, odds.expected(r, stats, odds.surprise))


def ldam_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_counts: ArrayLike,
    max_margin: ArrayLike = 0.5,
    scale: ArrayLike = 30.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Label-distribution-aware margin loss, with larger margins for rarer classes, shape [...].

    loss = −log(e^(s(z_y − Δ_y))/(e^(s(z_y − Δ_y)) + Σ_{k≠y} e^(s·z_k))) with Δ_k = max_margin·(n_min/n_k)^(1/4).
    Gradient: ∂loss/∂z_k = s·(p_k − [k = y]), where p is the softmax of the logits s(z_y − Δ_y) for the label and s·z_k for k ≠ y.

    In the paper, the logits are cosines of normalized features and a normalized kernel, so they need the scale s. A class without examples
    has the largest margin.

    Args:
        logits: [..., classes], cosines in [−1, 1], or other logits with a suitable `scale`.
        labels: [...] class indices, or [..., classes] soft labels.
        class_counts: [classes], number of training examples of each class; not differentiated.
        max_margin: ≥ 0, Δ of the rarest class, in units of the logits.
        scale: s > 0, inverse temperature.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `max_margin` is negative, or `scale` is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts, cosines = jnp.array([1600, 100]), jnp.array([[0.4, 0.0], [0.0, 0.4]])  # both labels lead by 0.4
        >>> xentjax.ldam_loss(cosines, jnp.array([0, 1]), class_counts=counts, scale=10.0).tolist()  # margins 0.25 and 0.5
        [0.20141..., 1.31326...]

    Reference:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, arXiv 1906.07413.
    """
    name = "ldam_loss"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    counts = _one_per_class(name, "class_counts", checks.weights(name, "class_counts", class_counts), batch)
    return _ldam(batch, counts, checks.number(name, "max_margin", max_margin), checks.positive(name, "scale", scale))


@jax.jit
def _ldam(batch: rows.Examples, class_counts: Array, max_margin: ArrayLike | None, scale: ArrayLike) -> Array:
    r = rows.of(batch)
    dtype = r.values.dtype
    scale = jnp.asarray(scale, dtype)
    r = rows.adjusted(r, scale)
    stats = statistics.of(r)
    counts = lax.stop_gradient(class_counts.astype(dtype))
    present = numerics.where(counts > 0, counts, jnp.inf)
    fewest = rows.class_minimum(r, present)
    fewest = numerics.where(jnp.isfinite(fewest), fewest, 1)
    share = numerics.where(counts > 0, jnp.sqrt(jnp.sqrt(fewest / present)), 1)
    margins = (0.0 if max_margin is None else jnp.asarray(max_margin, dtype)) * share
    return statistics.finish(r, stats, odds.expected(r, stats, lambda a, margin: odds.surprise(a - scale * margin), of_class=margins))


def seesaw_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_counts: ArrayLike,
    p: ArrayLike = 0.8,
    q: ArrayLike = 2.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Seesaw loss, which protects rare classes from the gradients of frequent labels, shape [...].

    loss = −log(e^(z_y)/(e^(z_y) + Σ_{k≠y} M_k·C_k·e^(z_k))) with M_k = min(1, (n_k/n_y)^p), C_k = max(1, (σ_k/σ_y)^q), σ = softmax(z).
    Gradient: ∂loss/∂z_k = softmax(z + log M + log C)_k − [k = y]. C is not differentiated.

    M reduces the gradient of classes that are rarer than the label. C increases the gradient of classes that the model finds more probable
    than the label.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        class_counts: [classes], number of training examples of each class, in total or seen so far; not differentiated. Counts below 1 are
            treated as 1.
        p: ≥ 0, exponent of the mitigation factor M.
        q: ≥ 0, exponent of the compensation factor C.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or an exponent is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts = jnp.array([10_000, 1])
        >>> xentjax.seesaw_loss(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=counts, p=0.5).tolist()  # log(1 + 1/100), log 2
        [0.00995..., 0.69314...]

    Reference:
        Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, 2020, arXiv 2008.10032.
    """
    name = "seesaw_loss"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    counts = _one_per_class(name, "class_counts", checks.weights(name, "class_counts", class_counts), batch)
    return _seesaw(batch, counts, checks.number(name, "p", p), checks.number(name, "q", q))


@jax.jit
def _seesaw(batch: rows.Examples, class_counts: Array, p: ArrayLike | None, q: ArrayLike | None) -> Array:
    r = rows.of(batch)
    dtype = r.values.dtype
    log_counts = jnp.log(jnp.maximum(lax.stop_gradient(class_counts.astype(dtype)), 1))
    z = lax.stop_gradient(rows.finite_values(r))
    zero = jnp.zeros((), dtype)
    p, q = (zero if x is None else jnp.asarray(x, dtype) for x in (p, q))

    def loss_of_index(r: rows.Rows) -> Array:
        rarity = numerics.expand_leading(log_counts, z.ndim) - rows.at_label(r, log_counts)[..., None]  # log n_k − log n_y
        lead = z - rows.at_label(r, z)[..., None]  # log σ_k − log σ_y
        adjusted = rows.adjusted(r, offset=p * jnp.minimum(rarity, 0) + q * jnp.maximum(lead, 0))  # z + log M + log C
        return odds.surprise(statistics.of_label(adjusted).log_odds)

    stats = statistics.of_row(r)
    return statistics.finish(r, stats, odds.by_label(r, loss_of_index))


def class_balanced_weights(class_counts: ArrayLike, beta: ArrayLike = 0.999) -> Array:
    """Class weights from the effective number of examples, 1 on average over the classes with examples, shape [classes].

    w_k ∝ (1 − β)/(1 − β^(n_k)) for classes that have examples, and w_k = 0 for other classes. The sum Σ_k w_k is the number of classes that
    have examples.
    Gradient: the derivative of the formula, with respect to `beta` and to floating `class_counts`.

    Pass the weights as `class_weights` to a loss, or pass `weights[labels]` to `weighted_mean`.

    Args:
        class_counts: [classes], number of training examples of each class.
        beta: β in [0, 1]; β = 0 gives all classes the same weight, and β = 1 gives weights by inverse frequency.

    Returns:
        [classes], float32, or float64 if `class_counts` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: `class_counts` does not have exactly one axis, or `beta` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.class_balanced_weights(jnp.array([1000, 10]), beta=0.99).tolist()
        [0.17455..., 1.82544...]

    Reference:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, arXiv 1901.05555.
    """
    name = "class_balanced_weights"
    return _class_balanced(_vector(name, checks.weights(name, "class_counts", class_counts)), checks.fraction(name, "beta", beta))


@jax.jit
def _class_balanced(class_counts: Array, beta: ArrayLike) -> Array:
    n = class_counts.astype(numerics.accumulation_dtype(class_counts.dtype))
    beta = jnp.asarray(beta, n.dtype)
    some = n > 0
    inside = beta > 0
    log_beta = jnp.log(jnp.where(inside, beta, jnp.ones_like(beta)))
    examples = numerics.where(some, n, 1)
    effective = jnp.where(inside, -jnp.expm1(examples * log_beta), jnp.ones_like(n))  # 1 − β^n
    effective = jnp.where(beta == 1, examples, effective)  # the limit β → 1 of (1 − β^n)/(1 − β); the factor 1/(1 − β) is common to all
    w = numerics.where(some, 1 / effective, 0)
    return w * jnp.sum(some.astype(n.dtype)) / jnp.maximum(jnp.sum(w), jnp.finfo(n.dtype).tiny)


def inverse_frequency_weights(class_counts: ArrayLike) -> Array:
    """Class weights by inverse frequency, 1 on average over the training examples, shape [classes].

    w_k = Σ_j n_j/(K·n_k) for the K classes that have examples, and w_k = 0 for other classes.
    Gradient: the derivative of the formula, with respect to floating `class_counts`.

    Args:
        class_counts: [classes], number of training examples of each class.

    Returns:
        [classes], float32, or float64 if `class_counts` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: `class_counts` does not have exactly one axis.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.inverse_frequency_weights(jnp.array([900, 100])).tolist()
        [0.55555..., 5.0]

    Reference:
        King and Zeng, Logistic Regression in Rare Events Data, Political Analysis 9(2), 2001.
    """
    name = "inverse_frequency_weights"
    return _inverse_frequency(_vector(name, checks.weights(name, "class_counts", class_counts)))


@jax.jit
def _inverse_frequency(class_counts: Array) -> Array:
    n = class_counts.astype(numerics.accumulation_dtype(class_counts.dtype))
    some = n > 0
    classes = jnp.maximum(jnp.sum(some.astype(n.dtype)), 1)
    return numerics.where(some, jnp.sum(n) / (classes * numerics.where(some, n, 1)), 0)


def _one_per_class(function: str, name: str, x: Array, batch: rows.Examples) -> Array:
    return checks.shape(function, name, x, (batch.logits.shape[batch.axis],), "one per class")


def _vector(function: str, counts: Array) -> Array:
    if counts.ndim != 1:
        raise ValueError(f"{function}: class_counts must have shape (classes,), one count per class; got {counts.shape}.")
    return counts
