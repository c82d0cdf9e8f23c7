"""Rare classes: losses and weights that make up for the frequencies of the classes.

Arguments and conventions are those of `softmax_cross_entropy`: `logits` [..., classes]; `labels` [...] class indices or [..., classes]
distributions, which cost Σ_k t_k·loss(k); `axis`, `axis_name`, `class_mask`, `where`. `class_counts` [classes] are the numbers of training
examples, of an integer or floating dtype; under `axis_name` those of this device's classes. With p = softmax(z), y the label, n the counts.
Half-precision logits are adjusted in float32, which takes one float32 copy of them.
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
    """Cross-entropy of logits shifted by the classes' log-frequencies, one value per example [...].

    loss = −log softmax(z + τ·log π)_y,  whose best z is the one for classes that are equally frequent; τ = 1 is balanced softmax.
    Gradient: ∂loss/∂z = softmax(z + τ·log π) − onehot y.

    Train with it, and predict with the plain logits.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        class_log_prior: [classes], log π in nats, such as log(counts/total); a constant more or less changes nothing.
        tau: τ ≥ 0, strength of the shift.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative `tau`.

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
    """Label-distribution-aware margin loss: the rarer a class, the larger the margin that it asks for, one value per example [...].

    loss = −log(e^(s(z_y − Δ_y))/(e^(s(z_y − Δ_y)) + Σ_{k≠y} e^(s·z_k))),  Δ_k = max_margin·(n_min/n_k)^(1/4).
    Gradient: with p of the logits that the formula shows, ∂loss/∂z = s·(p − onehot y).

    The paper takes cosines for logits (normalised features and kernel), hence the scale. A class without examples has the largest margin.

    Args:
        logits: [..., classes], cosines in [−1, 1], or any logits with a fitting `scale`.
        labels: [...] class indices, or [..., classes] distributions.
        class_counts: [classes], how many training examples each class has; not differentiated.
        max_margin: ≥ 0, Δ of the rarest class, in units of the logits.
        scale: s > 0, inverse temperature.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative `max_margin`, a `scale` that is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> counts, cosines = jnp.array([1600, 100]), jnp.array([[0.4, 0.0], [0.0, 0.4]])  # both lead by 0.4
        >>> xentjax.ldam_loss(cosines, jnp.array([0, 1]), class_counts=counts, scale=10.0).tolist()  # margins 0.25 and 0.5
        [0.20141..., 1.31326...]

    Reference:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, arXiv 1906.07413.
    """
    name = "ldam_loss"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    counts = _one_per_class(name, "class_counts", _counts(name, class_counts), batch)
    return _ldam(batch, counts, checks.number(name, "max_margin", max_margin), checks.positive(name, "scale", scale))


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
    """Seesaw loss: frequent labels push rare classes down less, and wrongly confident classes more, one value per example [...].

    loss = −log(e^(z_y)/(e^(z_y) + Σ_{k≠y} M_k·C_k·e^(z_k))),  M_k = min(1, (n_k/n_y)^p),  C_k = max(1, (σ_k/σ_y)^q), σ = softmax(z).
    Gradient: ∂loss/∂z = softmax of the logits that the formula shows − onehot y, for C held constant: C is not differentiated.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        class_counts: [classes], how many training examples each class has, or has had so far; counts below 1 are taken for 1.
        p: ≥ 0, exponent of mitigation, which spares rare classes.
        q: ≥ 0, exponent of compensation, which punishes confident mistakes.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative exponent.

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
    counts = _one_per_class(name, "class_counts", _counts(name, class_counts), batch)
    return _seesaw(batch, counts, checks.number(name, "p", p), checks.number(name, "q", q))


def class_balanced_weights(class_counts: ArrayLike, beta: ArrayLike = 0.999) -> Array:
    """Class weights by the effective number of examples, one per class [classes], on average 1.

    w_k ∝ (1 − β)/(1 − β^(n_k)),  Σ_k w_k = number of classes that have examples;  classes without any weigh 0.
    Gradient: none with respect to counts; ∂w/∂β by the formula.

    Give them as `class_weights`, or as `weights[labels]` to `weighted_mean`.

    Args:
        class_counts: [classes], how many training examples each class has.
        beta: β in [0, 1): 0 weighs all classes alike, β → 1 by inverse frequency.

    Returns:
        [classes], float32 (float64 for float64 counts).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: counts that are not one axis, `beta` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.class_balanced_weights(jnp.array([1000, 10]), beta=0.99).tolist()
        [0.17455..., 1.82544...]

    Reference:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, arXiv 1901.05555.
    """
    name = "class_balanced_weights"
    return _class_balanced(_vector(name, _counts(name, class_counts)), checks.fraction(name, "beta", beta))


def inverse_frequency_weights(class_counts: ArrayLike) -> Array:
    """Class weights by inverse frequency, one per class [classes], 1 on average over the training examples.

    w_k = Σ_j n_j/(K·n_k) for K classes that have examples;  classes without any weigh 0.
    Gradient: none; counts are counts.

    Args:
        class_counts: [classes], how many training examples each class has.

    Returns:
        [classes], float32 (float64 for float64 counts).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: counts that are not one axis.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.inverse_frequency_weights(jnp.array([900, 100])).tolist()
        [0.55555..., 5.0]

    Reference:
        King, Zeng, Logistic Regression in Rare Events Data, Political Analysis 9(2), 2001.
    """
    name = "inverse_frequency_weights"
    return _inverse_frequency(_vector(name, _counts(name, class_counts)))


def _counts(function: str, counts: ArrayLike) -> Array:
    array = checks.real(function, "class_counts", counts)
    values.weights(function, "class_counts", array)
    return array


def _one_per_class(function: str, name: str, x: Array, batch: rows.Examples) -> Array:
    return checks.shape(function, name, x, (batch.logits.shape[batch.axis],), "one per class")


def _vector(function: str, counts: Array) -> Array:
    if counts.ndim != 1:
        raise ValueError(f"{function}: class_counts must have shape (classes,), one count per class; got {counts.shape}.")
    return counts


@jax.jit
def _logit_adjusted(batch, class_log_prior, tau):
    r = rows.of(batch)
    if tau is not None:
        shift = jnp.asarray(tau, r.values.dtype) * numerics.finite(class_log_prior.astype(r.values.dtype))
        r = rows.adjusted(r, offset=numerics.expand_leading(shift, r.values.ndim))
    stats = statistics.of(r)
    return statistics.finish(r, stats, odds.expected(r, stats, odds.surprise))


@jax.jit
def _ldam(batch, class_counts, max_margin, scale):
    r = rows.of(batch)
    dtype = r.values.dtype
    scale = jnp.asarray(scale, dtype)
    r = rows.adjusted(r, scale)
    stats = statistics.of(r)
    counts = lax.stop_gradient(class_counts.astype(dtype))
    present = numerics.where(counts > 0, counts, jnp.inf)
    fewest = jnp.min(present)
    fewest = fewest if r.axis_name is None else lax.pmin(fewest, r.axis_name)
    fewest = numerics.where(jnp.isfinite(fewest), fewest, 1)
    share = numerics.where(counts > 0, jnp.sqrt(jnp.sqrt(fewest / present)), 1)
    margins = (0.0 if max_margin is None else jnp.asarray(max_margin, dtype)) * share
    return statistics.finish(r, stats, odds.expected(r, stats, lambda a, margin: odds.surprise(a - scale * margin), of_class=margins))


@jax.jit
def _seesaw(batch, class_counts, p, q):
    r = rows.of(batch)
    dtype = r.values.dtype
    log_counts = jnp.log(jnp.maximum(lax.stop_gradient(class_counts.astype(dtype)), 1))
    z = lax.stop_gradient(rows.finite_values(r))
    zero = jnp.zeros((), dtype)
    p, q = (zero if x is None else jnp.asarray(x, dtype) for x in (p, q))

    def loss_of_index(r):
        of_others = numerics.expand_leading(log_counts, z.ndim) - rows.at_label(r, log_counts)[..., None]
        lead = z - rows.at_label(r, z)[..., None]  # log σ_k − log σ_y
        changed = rows.adjusted(r, offset=p * jnp.minimum(of_others, 0) + q * jnp.maximum(lead, 0))
        return odds.surprise(statistics.of_label(changed).log_odds)

    stats = statistics.of_row(r)
    return statistics.finish(r, stats, odds.by_label(r, loss_of_index))


@jax.jit
def _class_balanced(class_counts, beta):
    n = class_counts.astype(numerics.accumulation_dtype(class_counts.dtype))
    beta = jnp.asarray(beta, n.dtype)
    some = n > 0
    inside = beta > 0
    log_beta = jnp.log(jnp.where(inside, beta, jnp.ones_like(beta)))
    effective = jnp.where(inside, -jnp.expm1(numerics.where(some, n, 1) * log_beta), jnp.ones_like(n))  # of (1 − β)
    w = numerics.where(some, 1 / effective, 0)
    return w * jnp.sum(some.astype(n.dtype)) / jnp.maximum(jnp.sum(w), jnp.finfo(n.dtype).tiny)


@jax.jit
def _inverse_frequency(class_counts):
    n = class_counts.astype(numerics.accumulation_dtype(class_counts.dtype))
    some = n > 0
    classes = jnp.maximum(jnp.sum(some.astype(n.dtype)), 1)
    return numerics.where(some, jnp.sum(n) / (classes * numerics.where(some, n, 1)), 0)
