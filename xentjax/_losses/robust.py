"""Losses for noisy labels.

Cross-entropy is unbounded, so one wrong label with p_y near 0 can outweigh many correct labels. Some losses here are bounded. Others change
the weight of labels that the model finds unlikely, or penalize confident predictions.

All functions share the conventions of `xentjax.softmax_cross_entropy`. In the formulas, z are the logits, p = softmax(z), y is the label,
H(p) is the entropy of p, and [k = y] is 1 for the label and 0 for other classes. The loss of soft labels t is Σ_k t_k·loss(k), where
loss(k) is the loss of class index k. A label has probability 0 if its logit is −∞ or its class does not exist. In this case, a bounded loss
returns its bound instead of +∞.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, odds, rows, statistics, surprises


def generalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    q: ArrayLike = 0.7,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Generalized cross-entropy per example, shape [...].

    loss = (1 − p_y^q)/q. The loss is at most 1/q.
    Gradient: ∂loss/∂z_k = p_y^q (p_k − [k = y]).

    A larger q gives less weight to labels that the model finds unlikely. As q approaches 0, the loss approaches cross-entropy. At q = 1,
    the loss is half the absolute error Σ_k |p_k − [k = y]|.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        q: in [0, 1]. q = 0 gives cross-entropy.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `q` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[3.0, 0.0], [-3.0, 0.0], [-50.0, 0.0]])  # the last label is almost certainly wrong
        >>> xentjax.generalized_cross_entropy(logits, jnp.array([0, 0, 0])).tolist()  # never more than 1/0.7
        [0.04777..., 1.25948..., 1.42857...]

    Reference:
        Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, 2018, arXiv 1805.07836.
    """
    name = "generalized_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _generalized(batch, checks.number(name, "q", q, high=1.0))


@jax.jit
def _generalized(batch: rows.Examples, q: ArrayLike | None) -> Array:
    if q is None:  # q = 0
        return odds.loss(batch, odds.surprise)
    return odds.loss(batch, lambda a: numerics.tempered(odds.surprise(a), jnp.full_like(a, q)))


def symmetric_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    beta: ArrayLike = 1.0,
    log_zero: ArrayLike = -4.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Weighted sum of cross-entropy and reverse cross-entropy per example, shape [...].

    loss = α·(−log p_y) − β·A·(1 − p_y).
    Gradient: ∂loss/∂z_k = (α − β·A·p_y)(p_k − [k = y]).

    The reverse cross-entropy exchanges label and prediction. For a one-hot label t, it is −Σ_k p_k log t_k. Here log 0 is replaced by the
    number A, so the reverse cross-entropy is −A·(1 − p_y).

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        alpha: α ≥ 0, weight of the cross-entropy.
        beta: β ≥ 0, weight of the reverse cross-entropy.
        log_zero: A ≤ 0, the number that replaces log 0.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `alpha` or `beta` is negative, or `log_zero` is positive.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.symmetric_cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).tolist()  # 0.1·log 4 + 4·3/4
        [3.13862...]

    Reference:
        Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, 2019, arXiv 1908.06112.
    """
    name = "symmetric_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    a, b = checks.number(name, "alpha", alpha), checks.number(name, "beta", beta)
    return _symmetric(batch, a, b, checks.number(name, "log_zero", log_zero, low=-jnp.inf, high=0.0))


@jax.jit
def _symmetric(batch: rows.Examples, alpha: ArrayLike | None, beta: ArrayLike | None, log_zero: ArrayLike | None) -> Array:
    def phi(a: Array) -> Array:
        forward, reverse, bound = (0.0 if x is None else jnp.asarray(x, a.dtype) for x in (alpha, beta, log_zero))
        return numerics.weighted(forward, odds.surprise(a)) - reverse * bound * numerics.sigmoid(-a)

    return odds.loss(batch, phi)


def bootstrapped_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 0.95,
    hard: bool = False,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example with a mixture of the label and the model's prediction, shape [...].

    loss = β·(−log p_y) + (1 − β)·H(p). If `hard` is True, −log max_k p_k replaces H(p).
    Gradient: ∂loss/∂z_k = β(p_k − [k = y]) − (1 − β)·p_k·(log p_k + H(p)).
    If `hard` is True, ∂loss/∂z_k = β(p_k − [k = y]) + (1 − β)(p_k − h_k). Here h_k = 1 for the most probable class and h_k = 0 for other
    classes. If n classes share the largest probability, h_k = 1/n for each of them.

    The prediction in the mixture is differentiated too. The paper uses β = 0.95 without `hard` and β = 0.8 with `hard`.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        beta: β in [0, 1], the share of the label in the mixture.
        hard: if True, the mixture contains the most probable class instead of the distribution p.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `beta` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> confident, wrong = jnp.array([8.0, 0.0]), jnp.array(1)
        >>> [float(xentjax.bootstrapped_cross_entropy(confident, wrong, beta=b)) for b in (1.0, 0.5)]
        [8.00033..., 4.00167...]

    Reference:
        Reed et al., Training Deep Neural Networks on Noisy Labels with Bootstrapping, 2014, arXiv 1412.6596.
    """
    name = "bootstrapped_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _bootstrapped(batch, checks.fraction(name, "beta", beta), hard)


@functools.partial(jax.jit, static_argnames="hard")
def _bootstrapped(batch: rows.Examples, beta: ArrayLike, hard: bool) -> Array:
    r = rows.of(batch)
    beta = jnp.asarray(beta, r.values.dtype)
    if hard:
        loss = surprises.of_label_and_largest if r.labels_are_indices else surprises.of_soft_labels_and_largest
        return statistics.finish(r, statistics.of_row(r), loss(r, jnp.broadcast_to(beta, r.raw.shape[:-1])))
    stats = statistics.of(r)
    loss = numerics.weighted(beta, odds.expected(r, stats, odds.surprise))
    return statistics.finish(r, stats, loss + (1 - beta) * odds.label_sum(r) * surprises.entropy(r, stats))


def taylor_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    order: int = 2,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Truncated Taylor series of cross-entropy around p_y = 1, one value per example, shape [...].

    loss = Σ_{n=1}^{order} (1 − p_y)^n/n.
    Gradient: ∂loss/∂z_k = (1 − (1 − p_y)^order)(p_k − [k = y]).

    At order 1, the loss is half the absolute error Σ_k |p_k − [k = y]|. As the order grows, the loss approaches cross-entropy.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        order: number of terms, a Python integer ≥ 1.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype, or `order` is not an integer.
        ValueError: an argument has the wrong shape, or `order` is below 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.taylor_cross_entropy(jnp.zeros(2), jnp.array(0), order=2).tolist()  # 1/2 + (1/2)²/2
        0.625

    Reference:
        Feng et al., Can Cross Entropy Loss Be Robust to Label Noise?, IJCAI 2020.
    """
    name = "taylor_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _taylor(batch, checks.count(name, "order", order))


@functools.partial(jax.jit, static_argnames="order")
def _taylor(batch: rows.Examples, order: int) -> Array:
    def phi(a: Array) -> Array:
        rest = numerics.sigmoid(-a)  # 1 − p
        total = jnp.full_like(a, 1 / order)
        for n in range(order - 1, 0, -1):
            total = 1 / n + rest * total
        return rest * total

    return odds.loss(batch, phi)


def poly_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Poly-1 loss per example, shape [...].

    loss = −log p_y + ε·(1 − p_y).
    Gradient: ∂loss/∂z_k = (1 + ε·p_y)(p_k − [k = y]).

    Cross-entropy is the series −log p_y = Σ_n (1 − p_y)^n/n. Its first term 1 − p_y has the coefficient 1. The Poly-1 loss changes this
    coefficient to 1 + ε.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        epsilon: ε ≥ −1, added to the coefficient of the first term of the series.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `epsilon` is below −1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.poly_cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), epsilon=2.0).tolist()  # log 2 + 2·(1/2)
        [1.69314...]

    Reference:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, 2022, arXiv 2204.12511.
    """
    name = "poly_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _poly(batch, checks.number(name, "epsilon", epsilon, low=-1.0))


@jax.jit
def _poly(batch: rows.Examples, epsilon: ArrayLike | None) -> Array:
    extra = 0.0 if epsilon is None else epsilon
    return odds.loss(batch, lambda a: odds.surprise(a) + jnp.asarray(extra, a.dtype) * numerics.sigmoid(-a))


def confidence_penalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example with a penalty on confident predictions, shape [...].

    loss = −log p_y − β·H(p), where H(p) = −Σ_k p_k log p_k. The loss may be negative.
    Gradient: ∂loss/∂z_k = p_k − [k = y] + β·p_k·(log p_k + H(p)).

    A confident prediction has low entropy, so the term −β·H(p) penalizes it.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        beta: β ≥ 0, weight of the penalty.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], in nats; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `beta` is negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> loss = xentjax.confidence_penalized_cross_entropy(jnp.zeros((1, 4)), jnp.array([0]), beta=0.25)
        >>> loss.tolist()  # (1 − β)·log 4
        [1.03972...]

    Reference:
        Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017, arXiv 1701.06548.
    """
    name = "confidence_penalized_cross_entropy"
    batch = checks.examples(name, logits, labels, axis, axis_name, class_mask, where)
    return _confidence_penalized(batch, checks.number(name, "beta", beta))


@jax.jit
def _confidence_penalized(batch: rows.Examples, beta: ArrayLike | None) -> Array:
    r = rows.of(batch)
    stats = statistics.of(r)
    loss, total = odds.expected(r, stats, odds.surprise), odds.label_sum(r)
    if beta is not None:
        loss -= jnp.asarray(beta, loss.dtype) * total * surprises.entropy(r, stats)
    return statistics.finish(r, stats, loss)


def normalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy per example, divided by the sum of the cross-entropies of all classes, shape [...].

    loss = log p_y/Σ_j log p_j. The loss is in [0, 1]. If only one class exists, the loss is 0.
    Gradient: ∂loss/∂z_k = (p_k − [k = y] − loss·(K·p_k − 1))/S, where S = −Σ_j log p_j and K is the number of classes.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        labels: [...] class indices, or [..., classes] soft labels.
        axis: class axis of `logits`.
        axis_name: mesh axis over which the classes are sharded, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], True for classes that exist.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.normalized_cross_entropy(jnp.zeros((1, 4)), jnp.array([1])).tolist()  # four classes with equal cross-entropies
        [0.25]

    Reference:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, 2020, arXiv 2006.13554.
    """
    return _normalized(checks.examples("normalized_cross_entropy", logits, labels, axis, axis_name, class_mask, where))


@jax.jit
def _normalized(batch: rows.Examples) -> Array:
    r = rows.of(batch)
    stats = statistics.of(r)
    loss = numerics.finite(odds.expected(r, stats, odds.surprise))
    total = surprises.total(r, stats)
    # At 0, a single class exists. If only the label is impossible, the quotient stays infinite.
    undivided = (total == 0) | (numerics.is_infinite(loss) & ~numerics.is_infinite(total))
    return statistics.finish(r, stats, loss / numerics.where(undivided, jnp.ones_like(total), total))
