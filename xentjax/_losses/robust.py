"""Noisy labels: losses that a wrong label cannot dominate.

Arguments and conventions are those of `softmax_cross_entropy`: `logits` [..., classes]; `labels` [...] class indices or [..., classes]
distributions, which cost Σ_k t_k·loss(k); `axis`, `axis_name`, `class_mask`, `where`. With p = softmax(z), y the label, H(p) the entropy.
A bounded loss costs its bound where cross-entropy costs +∞: at a label whose logit is −∞ or whose class does not exist.
"""

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
    """Generalised cross-entropy, between cross-entropy (q = 0) and mean absolute error (q = 1), one value per example [...].

    loss = (1 − p_y^q)/q, at most 1/q;  its limit −log p_y at q = 0.
    Gradient: ∂loss/∂z = p_y^q·(p − onehot y).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        q: in [0, 1]; the larger, the less a label that the model finds unlikely weighs.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `q` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.array([[3.0, 0.0], [-3.0, 0.0], [-50.0, 0.0]])  # the last label is surely wrong
        >>> xentjax.generalized_cross_entropy(logits, jnp.array([0, 0, 0])).tolist()  # bounded by 1/0.7
        [0.04777..., 1.25948..., 1.42857...]

    Reference:
        Zhang, Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, 2018, arXiv 1805.07836.
    """
    name = "generalized_cross_entropy"
    return _generalized(checks.examples(name, logits, labels, axis, axis_name, class_mask, where), checks.number(name, "q", q, high=1.0))


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
    """Cross-entropy plus reverse cross-entropy, in which label and prediction change places, one value per example [...].

    loss = α·(−log p_y) + β·(−A)(1 − p_y):  the reverse term is −Σ_k p_k log t_k for a one-hot t with log 0 := A.
    Gradient: ∂loss/∂z = (α − β·A·p_y)(p − onehot y).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        alpha: α ≥ 0, weight of cross-entropy.
        beta: β ≥ 0, weight of reverse cross-entropy.
        log_zero: A ≤ 0, what stands for log 0.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative weight, a positive `log_zero`.

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
    """Cross-entropy against a mixture of the label and the model's own prediction, one value per example [...].

    loss = β·(−log p_y) + (1 − β)·H(p) (soft), or with −log max_k p_k in place of H(p) (`hard`).
    Gradient: soft β(p − onehot y) − (1 − β)·p·(log p + H(p));  hard β(p − onehot y) + (1 − β)(p − onehot argmax p), ties sharing.

    The prediction is differentiated too. The paper uses β = 0.95 for the soft form and 0.8 for the hard one.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        beta: β in [0, 1], the share of the label.
        hard: whether the model's prediction is its likeliest class instead of its distribution.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `beta` outside [0, 1].

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
    """Taylor series of cross-entropy around p_y = 1, cut after some terms, one value per example [...].

    loss = Σ_{n=1}^{order} (1 − p_y)^n/n:  order 1 is (half the) mean absolute error, order ∞ cross-entropy.
    Gradient: ∂loss/∂z = (1 − (1 − p_y)^order)·(p − onehot y).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        order: number of terms, a Python integer of at least 1.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit, an `order` that is not an integer.
        ValueError: a shape that does not fit, `order` < 1.

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
    """Poly-1 cross-entropy, whose first polynomial coefficient is turned up or down, one value per example [...].

    loss = −log p_y + ε·(1 − p_y).
    Gradient: ∂loss/∂z = (1 + ε·p_y)(p − onehot y).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        epsilon: ε ≥ −1, added to the coefficient 1 of the term 1 − p_y in cross-entropy's series.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, `epsilon` < −1.

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
    """Cross-entropy with a penalty on confident predictions, those of low entropy, one value per example [...].

    loss = −log p_y − β·H(p);  it may be negative.
    Gradient: ∂loss/∂z = p − onehot y + β·p·(log p + H(p)).

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        beta: β ≥ 0, weight of the penalty.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a negative `beta`.

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
    return _penalized(batch, checks.number(name, "beta", beta))


def normalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy as a share of what all classes would cost as labels, one value per example [...].

    loss = log p_y / Σ_j log p_j, in [0, 1];  0 where there is one class only.
    Gradient: with S = −Σ_j log p_j over K classes, ∂loss/∂z = (p − onehot y − loss·(K·p − 1))/S.

    Args:
        logits: [..., classes], unnormalised log-probabilities in nats.
        labels: [...] class indices, or [..., classes] distributions.
        axis: the class axis of `logits`.
        axis_name: mesh axis that splits the class axis, inside `jax.shard_map`.
        class_mask: [classes] or [..., classes], which classes exist.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.normalized_cross_entropy(jnp.zeros((1, 4)), jnp.array([1])).tolist()  # one of four equal shares
        [0.25]

    Reference:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, 2020, arXiv 2006.13554.
    """
    return _normalized(checks.examples("normalized_cross_entropy", logits, labels, axis, axis_name, class_mask, where))


@jax.jit
def _generalized(batch, q):
    if q is None:
        return odds.loss(batch, odds.surprise)
    return odds.loss(batch, lambda a: numerics.tempered(odds.surprise(a), jnp.full_like(a, q)))


@jax.jit
def _symmetric(batch, alpha, beta, log_zero):
    def phi(a):
        forward, reverse = (0.0 if x is None else jnp.asarray(x, a.dtype) for x in (alpha, beta))
        return forward * odds.surprise(a) - reverse * (0.0 if log_zero is None else jnp.asarray(log_zero, a.dtype)) * numerics.sigmoid(-a)

    return odds.loss(batch, phi)


@functools.partial(jax.jit, static_argnames="order")
def _taylor(batch, order):
    def phi(a):
        rest = numerics.sigmoid(-a)
        total = jnp.full_like(a, 1 / order)
        for n in range(order - 1, 0, -1):
            total = 1 / n + rest * total
        return rest * total

    return odds.loss(batch, phi)


@jax.jit
def _poly(batch, epsilon):
    extra = 0.0 if epsilon is None else epsilon
    return odds.loss(batch, lambda a: odds.surprise(a) + jnp.asarray(extra, a.dtype) * numerics.sigmoid(-a))


@functools.partial(jax.jit, static_argnames="hard")
def _bootstrapped(batch, beta, hard):
    r = rows.of(batch)
    stats = statistics.of(r)
    cost, total = odds.expected(r, stats, odds.surprise), odds.label_sum(r)
    beta = jnp.asarray(beta, cost.dtype)
    own = surprises.smallest(r, stats) if hard else surprises.entropy(r, stats)
    return statistics.finish(r, stats, beta * cost + (1 - beta) * total * own)


@jax.jit
def _penalized(batch, beta):
    r = rows.of(batch)
    stats = statistics.of(r)
    cost, total = odds.expected(r, stats, odds.surprise), odds.label_sum(r)
    if beta is not None:
        cost -= jnp.asarray(beta, cost.dtype) * total * surprises.entropy(r, stats)
    return statistics.finish(r, stats, cost)


@jax.jit
def _normalized(batch):
    r = rows.of(batch)
    stats = statistics.of(r)
    cost = odds.expected(r, stats, odds.surprise)
    everything = surprises.total(r, stats)
    alone = everything == 0
    return statistics.finish(r, stats, cost / numerics.where(alone, jnp.ones_like(everything), everything))
