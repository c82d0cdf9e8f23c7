"""Losses and class weights for imbalanced data.

All functions share the conventions of `xentjax.softmax_cross_entropy`. In the formulas, z are the logits, y is the label, n_k is the number
of training examples of class k, and [k = y] is 1 for the label and 0 for other classes. The loss of soft labels t is Σ_k t_k·loss(k), where
loss(k) is the loss of class index k.

`class_counts` [classes] holds the counts n_k, in an integer or floating dtype. With `axis_name`, each device passes the counts of its own
classes. Half-precision logits are adjusted in float32. With class indices, no adjusted logits are stored. With soft labels, which take as
much memory themselves, one float32 array of adjusted logits is stored.
"""

from __future__ import annotations

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
    """Cross-entropy per example, with log class frequencies added to the logits, shape [...].

    loss = −log softmax(z + τ·log π)_y, where π_k is the frequency of class k. At τ = 1, this loss is also called balanced softmax.
    Gradient: ∂loss/∂z_k = softmax(z + τ·log π)_k − [k = y].

    Consider data in which all classes are equally frequent. If softmax(z) is the true class distribution for such data, the expected loss
    at τ = 1 on the training data is minimal. Train with this loss, and predict with the logits z without the shift.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        class_log_prior: [classes], log π in nats, for example log(counts/total). Adding a constant to all entries does not change the loss.
        tau: τ ≥ 0, factor of the shift.
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
        shift = numerics.weighted(jnp.asarray(tau, r.values.dtype), class_log_prior.astype(r.values.dtype))
        r = rows.adjusted(r, jnp.add, -numerics.restore_infinity(-shift))
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
    """Label-distribution-aware margin (LDAM) loss per example, shape [...].

    loss = −log(e^(s(z_y − Δ_y))/(e^(s(z_y − Δ_y)) + Σ_{k≠y} e^(s·z_k))) with Δ_k = max_margin·(n_min/n_k)^(1/4).
    Gradient: ∂loss/∂z_k = s·(p_k − [k = y]), where p is the softmax of the numbers s·(z_k − Δ_y·[k = y]).

    Δ_k is the margin of class k, and n_min is the smallest count above 0. Rarer classes have larger margins. A class without examples has
    the largest margin, `max_margin`. In the paper, the logits are cosines between normalized features and the normalized columns of a
    kernel. Cosines are at most 1, so the paper multiplies them by the scale s.

    Args:
        logits: [..., classes], cosines in [−1, 1], or other logits with a suitable `scale`.
        labels: [...] class indices, or [..., classes] soft labels.
        class_counts: [classes], number of training examples of each class; not differentiated.
        max_margin: ≥ 0, margin Δ of the rarest class, in units of the logits.
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
    r = rows.adjusted(r, jnp.multiply, scale)
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
    """Seesaw loss per example, shape [...].

    loss = −log(e^(z_y)/(e^(z_y) + Σ_{k≠y} M_k·C_k·e^(z_k))) with M_k = min(1, (n_k/n_y)^p), C_k = max(1, (σ_k/σ_y)^q), σ = softmax(z).
    Gradient: ∂loss/∂z_k = softmax(z + log M + log C)_k − [k = y]. C is not differentiated.

    The loss protects rare classes from the gradients of the many examples with frequent labels. M_k reduces the gradient of class k if k is
    rarer than the label. C_k increases the gradient of class k if the model gives k a higher probability than the label.

    The loss of soft labels t is Σ_k t_k·loss(k), where loss(k) is the loss of class index k. The terms of this sum are
    computed one class at a time. So soft labels take about as many times longer than class indices as there are classes.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        class_counts: [classes], number of training examples of each class, either in the whole data set or seen so far; not differentiated.
            Counts below 1 are replaced by 1.
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
        ValueError: an argument has the wrong shape, or `p` or `q` is negative.

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
    m = rows.reference(r)
    lead_of_class = lax.stop_gradient(rows.relative(r, m))  # z − m
    zero = jnp.zeros((), dtype)
    p, q = (zero if x is None else jnp.asarray(x, dtype) for x in (p, q))

    def changed(z: Array, p: Array, q: Array, log_counts: Array, log_count: Array, of_label: Array) -> Array:
        rarity = jnp.minimum(log_counts, log_count) - log_count  # min(0, log n_k − log n_y)
        lead = jnp.maximum(lax.stop_gradient(z), of_label) - of_label  # max(0, log σ_k − log σ_y)
        return z + p * rarity + q * lead  # z + log M + log C

    def loss_of_index(r: rows.Rows) -> Array:
        of_label = (rows.at_label(r, x)[..., None] for x in (log_counts, lead_of_class))
        return odds.surprise(statistics.of_label(rows.adjusted(r, changed, p, q, log_counts, *of_label)).log_odds)

    stats = statistics.of_row(r)
    return statistics.finish(r, stats, odds.by_label(r, loss_of_index))


def class_balanced_weights(class_counts: ArrayLike, beta: ArrayLike = 0.999) -> Array:
    """Class weights from the effective number of examples, shape [classes].

    w_k ∝ (1 − β)/(1 − β^(n_k)) for classes that have examples, and w_k = 0 for classes without examples. The sum Σ_k w_k is the number of
    classes that have examples, so the mean weight of these classes is 1.
    Gradient: the gradient with respect to `beta` is the derivative of the formula for w_k. If `class_counts` have a floating dtype, the
    same is true of the gradient with respect to `class_counts`.

    Pass the weights as `class_weights` to a loss, or pass `weights[labels]` to `weighted_mean`.

    Args:
        class_counts: [classes], number of training examples of each class.
        beta: β in [0, 1]. β = 0 gives all classes the same weight. β = 1 gives weights proportional to 1/n_k.

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
    """Class weights in inverse proportion to the class frequencies, shape [classes].

    w_k = Σ_j n_j/(K·n_k) for the K classes that have examples, and w_k = 0 for classes without examples. The mean weight of all training
    examples is 1.
    Gradient: if `class_counts` have a floating dtype, the gradient is the derivative of the formula for w_k with respect to `class_counts`.

    Pass the weights as `class_weights` to a loss, or pass `weights[labels]` to `weighted_mean`.

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
