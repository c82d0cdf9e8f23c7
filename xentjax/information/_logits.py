"""The same functions of logits; what they share is said in `xentjax.information`. p = softmax(logits), u_k = −log p_k = lse − z_k."""

import math

from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks
from xentjax.information import _formulas, _joint


def self_information_from_logits(logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`self_information` of every class of softmax(logits), one value per logit [..., classes].

    u_k = −log p_k = lse(z) − z_k ≥ 0.
    Gradient: ∂u_k/∂z_j = p_j − [j = k].

    Args:
        logits: [..., classes], in nats.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [..., classes], which of the values count; every logit of their row takes part in them.

    Returns:
        [..., classes], the shape of `logits`, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.self_information_from_logits(jnp.array([40.0, 0.0, -jnp.inf])).tolist()
        [4.24835...e-18, 40.0, inf]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "self_information_from_logits"
    z, _, axis = _formulas.check_distributions(name, None, axis, logits=logits)
    counts = checks.counted(name, where, z.shape, "the shape of logits")
    return _formulas.self_information(z, _formulas.check_base(name, base), counts, axis, True)


def entropy_from_logits(logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`entropy` of softmax(logits), one value per example [...].

    H = Σ_k p_k u_k, about margin·e^(−margin) where one class leads.
    Gradient: ∂H/∂z_k = p_k(u_k − H).

    Args:
        logits: [..., classes], in nats.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.entropy_from_logits(jnp.array([[0.0, 0.0], [40.0, 0.0]])).tolist()  # not 0
        [0.69314..., 1.74182...e-16]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "entropy_from_logits"
    z, counts, axis = _formulas.check_distributions(name, where, axis, logits=logits)
    return _formulas.entropy(z, _formulas.check_base(name, base), counts, axis, True)


def cross_entropy_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`cross_entropy` of softmax(q_logits) relative to softmax(p_logits), one value per example [...].

    H(p, q) = Σ_k p_k v_k with v = −log q; the least value over q is H(p).
    Gradient: with z and y the logits of p and q, ∂H/∂z_k = p_k(v_k − H(p, q));  ∂H/∂y_k = q_k − p_k.

    Args:
        p_logits: [..., classes], of the true distribution, in nats.
        q_logits: the shape of `p_logits`, of the prediction.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 if either is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> teacher = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> float(xentjax.information.cross_entropy_from_logits(teacher, jnp.zeros(3)))  # log 3: a student that knows nothing
        1.09861...

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 5.4.
    """
    name = "cross_entropy_from_logits"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _formulas.cross_entropy(x, y, _formulas.check_base(name, base), counts, axis, True)


def kl_divergence_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`kl_divergence` D(p‖q) of softmax(p_logits) and softmax(q_logits), one value per example [...].

    D(p‖q) = Σ_k p_k d_k with d = log(p/q).
    Gradient: with z and y the logits of p and q, ∂D/∂z_k = p_k(d_k − D);  ∂D/∂y_k = q_k − p_k.

    Args:
        p_logits: [..., classes], in nats.
        q_logits: the shape of `p_logits`.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 if either is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> near = jnp.array([0.0, 2e-5]), jnp.array([0.0, 0.0])
        >>> float(xentjax.information.kl_divergence_from_logits(*near))  # (2e-5)²/8, far below the rounding of each logarithm
        4.99999...e-11

    Reference:
        Kullback, Leibler, On Information and Sufficiency, 1951.
    """
    name = "kl_divergence_from_logits"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _formulas.kl_divergence(x, y, _formulas.check_base(name, base), counts, axis, True)


def js_divergence_from_logits(
    p_logits: ArrayLike, q_logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """`js_divergence` of softmax(p_logits) and softmax(q_logits), one value per example [...].

    JS(p, q) = ½·D(p‖m) + ½·D(q‖m),  m = (p + q)/2.
    Gradient: with z the logits of p, ∂JS/∂z_k = ½·p_k(log(p_k/m_k) − D(p‖m));  likewise for q.

    Args:
        p_logits: [..., classes], in nats.
        q_logits: the shape of `p_logits`.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], between 0 and log 2, float32 (float64 if either is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> near = jnp.array([0.0, 1e-3]), jnp.array([0.0, 0.0])
        >>> float(xentjax.information.js_divergence_from_logits(*near))  # (1e-3)²/32
        3.12...e-08

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    name = "js_divergence_from_logits"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    return _formulas.js_divergence(x, y, _formulas.check_base(name, base), counts, axis, True)


def renyi_divergence_from_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    alpha: ArrayLike,
    base: ArrayLike = math.e,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """`renyi_divergence` of order α of softmax(p_logits) and softmax(q_logits), one value per example [...].

    D_α = log(Σ_k p_k^α q_k^(1−α))/(α − 1), and D(p‖q) at α = 1.
    Gradient: with r = p^α q^(1−α)/Σ p^α q^(1−α) and z, y the logits of p, q, ∂D/∂z = α(r − p)/(α − 1);  ∂D/∂y = q − r.

    Args:
        p_logits: [..., classes], in nats.
        q_logits: the shape of `p_logits`.
        alpha: scalar α > 0, the order; traced ones may be 1 or near it.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 if either is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, an `alpha` that is not above 0, a `base` that is not or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> apart = jnp.array([60.0, 0.0]), jnp.array([0.0, 60.0])
        >>> [float(xentjax.information.renyi_divergence_from_logits(*apart, alpha=a)) for a in (0.5, 1.0, 2.0)]
        [58.61370..., 60.0, 60.0]

    Reference:
        Van Erven, Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014, arXiv 1206.2459.
    """
    name = "renyi_divergence_from_logits"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p_logits=p_logits, q_logits=q_logits)
    order = checks.positive(name, "alpha", alpha)
    return _formulas.renyi_divergence(x, y, order, _formulas.check_base(name, base), counts, axis, True)


def conditional_entropy_from_logits(joint_logits: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """`conditional_entropy` H(Y|X) of a softmax over pairs (x, y), one value per example [...].

    H(Y|X) = Σ_xy p(x, y)·v(x, y) with v = −log p(y|x) = lse_y(z) − z.
    Gradient: ∂H/∂z(x, y) = p(x, y)(v(x, y) − H).

    Args:
        joint_logits: [..., x, y], in nats, of a distribution over both axes together.
        base: scalar > 0, not 1; the unit, nats by default.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.conditional_entropy_from_logits(jnp.zeros((2, 8))))  # log 8: X says nothing of Y
        2.07944...

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.2.
    """
    name = "conditional_entropy_from_logits"
    z, counts, _ = _formulas.check_distributions(name, where, None, joint_logits=joint_logits)
    return _joint.conditional_entropy(z, _formulas.check_base(name, base), counts, True)


def mutual_information_from_logits(joint_logits: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """`mutual_information` I(X; Y) of a softmax over pairs (x, y), one value per example [...].

    I(X; Y) = Σ_xy p(x, y)·d(x, y) with d = log(p(x, y)/(p(x)·p(y))).
    Gradient: ∂I/∂z(x, y) = p(x, y)(d(x, y) − I).

    Args:
        joint_logits: [..., x, y], in nats, of a distribution over both axes together.
        base: scalar > 0, not 1; the unit, nats by default.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.mutual_information_from_logits(30.0 * jnp.eye(4), base=2))  # X tells Y
        2.0

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    name = "mutual_information_from_logits"
    z, counts, _ = _formulas.check_distributions(name, where, None, joint_logits=joint_logits)
    return _joint.mutual_information(z, _formulas.check_base(name, base), counts, True)


def perplexity_from_logits(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`perplexity` of softmax(logits), one value per example [...].

    perplexity = e^H, the same in every unit, between 1 and the number of classes.
    Gradient: ∂/∂z_k = e^H·p_k(u_k − H).

    Args:
        logits: [..., classes], in nats.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.perplexity_from_logits(jnp.array([5.0, 5.0, -jnp.inf])))  # two classes are left
        2.0

    Reference:
        Jelinek et al., Perplexity, a Measure of the Difficulty of Speech Recognition Tasks, 1977.
    """
    z, counts, axis = _formulas.check_distributions("perplexity_from_logits", where, axis, logits=logits)
    return _formulas.perplexity(z, counts, axis, True)
