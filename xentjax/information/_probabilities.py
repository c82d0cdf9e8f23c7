"""Functions of probabilities; what they share is said in `xentjax.information`."""

import math

from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, values
from xentjax.information import _formulas, _joint


def self_information(p: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Information of an event of probability p, its surprise, one value per element [...].

    I = −log p, and +∞ at 0.
    Gradient: ∂I/∂p = −1/p;  0 at p = 0.

    Args:
        p: [...], probabilities.
        base: scalar > 0, not 1; the unit, nats by default.
        where: [...], which elements count.

    Returns:
        [...], float32 (float64 for float64 p).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.self_information(jnp.array([0.5, 0.125, 0.0]), base=2).tolist()  # bits
        [1.0, 3.0, inf]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "self_information"
    x = checks.floating(name, "p", p)
    counts = checks.counted(name, where, x.shape, "the shape of p")
    values.probabilities(name, "p", x, counts)
    return _formulas.self_information(x, _formulas.check_base(name, base), counts, -1, False)


def entropy(p: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Entropy of distributions, one value per example [...].

    H(p) = −Σ_k p_k log p_k.
    Gradient: ∂H/∂p_k = −log p_k − 1;  0 at p_k = 0.

    Args:
        p: [..., classes], probabilities; they need not sum to 1.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 p).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.entropy(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), base=2).tolist()
        [1.5, 0.0]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    x, counts, axis = _formulas.check_distributions("entropy", where, axis, p=p)
    return _formulas.entropy(x, _formulas.check_base("entropy", base), counts, axis, False)


def cross_entropy(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Cross-entropy of q relative to p, one value per example [...].

    H(p, q) = −Σ_k p_k log q_k, and +∞ where p_k > 0 = q_k. The least value over q is H(p), at q = p, and not 0.
    Gradient: ∂H/∂p_k = −log q_k;  ∂H/∂q_k = −p_k/q_k;  both 0 at q_k = 0.

    Args:
        p: [..., classes], true probabilities; they need not sum to 1.
        q: the shape of `p`, predicted probabilities.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 if p or q is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> weather, forecast = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> [float(xentjax.information.cross_entropy(weather, q)) for q in (forecast, weather)]
        [1.05492..., 1.02965...]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 5.4.
    """
    name = "cross_entropy"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p=p, q=q)
    return _formulas.cross_entropy(x, y, _formulas.check_base(name, base), counts, axis, False)


def kl_divergence(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Kullback–Leibler divergence D(p‖q), also called relative entropy, one value per example [...].

    D(p‖q) = Σ_k [p_k log(p_k/q_k) − p_k + q_k] ≥ 0, which is Σ_k p_k log(p_k/q_k) when both sum to the same; +∞ where p_k > 0 = q_k.
    Gradient: ∂D/∂p_k = log(p_k/q_k), 0 where p_k or q_k is 0;  ∂D/∂q_k = 1 − p_k/q_k, 0 where p_k > 0 = q_k.

    Args:
        p: [..., classes], probabilities; they need not sum to 1.
        q: the shape of `p`, probabilities; note the order, D(p‖q) is not D(q‖p).
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 if p or q is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> float(xentjax.information.kl_divergence(p, q)), float(xentjax.information.kl_divergence(q, p))
        (0.025267..., 0.025815...)

    Reference:
        Kullback, Leibler, On Information and Sufficiency, 1951.
    """
    name = "kl_divergence"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p=p, q=q)
    return _formulas.kl_divergence(x, y, _formulas.check_base(name, base), counts, axis, False)


def js_divergence(p: ArrayLike, q: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Jensen–Shannon divergence, symmetric and never infinite, one value per example [...].

    JS(p, q) = ½·Σ_k [p_k log(p_k/m_k) + q_k log(q_k/m_k)],  m = (p + q)/2;  between 0 and log 2 for distributions.
    Gradient: ∂JS/∂p_k = ½·log(p_k/m_k), 0 at p_k = 0;  likewise for q.

    Args:
        p: [..., classes], probabilities; they need not sum to 1.
        q: the shape of `p`, probabilities.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 if p or q is); its square root is a metric.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> apart = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> float(xentjax.information.js_divergence(*apart, base=2)), float(xentjax.information.kl_divergence(*apart))
        (1.0, inf)

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    name = "js_divergence"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p=p, q=q)
    return _formulas.js_divergence(x, y, _formulas.check_base(name, base), counts, axis, False)


def renyi_divergence(
    p: ArrayLike, q: ArrayLike, *, alpha: ArrayLike, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Rényi divergence of order α, one value per example [...].

    D_α(p‖q) = log(Σ_k p_k^α q_k^(1−α))/(α − 1);  in general, with w = Σ p, w·log(Σ_k p_k^α q_k^(1−α)/w)/(α − 1) − w + Σ q ≥ 0, which is
    nondecreasing in α. At α = 1, and smoothly around it, `kl_divergence`; +∞ for α ≥ 1 where p_k > 0 = q_k, and without common classes.
    Gradient: with S = Σ p^α q^(1−α), ∂D/∂p_k = log(S/w)/(α − 1) + (α·w·(p_k/q_k)^(α−1)/S − 1)/(α − 1) − 1;
    ∂D/∂q_k = 1 − w·(p_k/q_k)^α/S;  0 where that is infinite.

    Args:
        p: [..., classes], probabilities; they need not sum to 1.
        q: the shape of `p`, probabilities.
        alpha: scalar α > 0, the order; traced ones may be 1 or near it.
        base: scalar > 0, not 1; the unit, nats by default.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 if p or q is).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, an `alpha` that is not above 0, a `base` that is not or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.4, 0.4, 0.2])
        >>> [float(xentjax.information.renyi_divergence(p, q, alpha=a)) for a in (0.5, 1.0, 2.0)]  # the middle one is D(p‖q)
        [0.012793..., 0.025267..., 0.048790...]

    Reference:
        Van Erven, Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014, arXiv 1206.2459.
    """
    name = "renyi_divergence"
    x, y, counts, axis = _formulas.check_distributions(name, where, axis, p=p, q=q)
    order = checks.positive(name, "alpha", alpha)
    return _formulas.renyi_divergence(x, y, order, _formulas.check_base(name, base), counts, axis, False)


def conditional_entropy(joint: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Entropy of Y given X, H(Y|X), of joint distributions, one value per example [...].

    H(Y|X) = −Σ_xy p(x, y) log p(y|x) = H(X, Y) − H(X),  p(y|x) = p(x, y)/Σ_y p(x, y).
    Gradient: ∂H/∂p(x, y) = −log p(y|x);  0 at p(x, y) = 0.

    Args:
        joint: [..., x, y], probabilities; they need not sum to 1. H(X|Y) is that of `jnp.swapaxes(joint, -1, -2)`.
        base: scalar > 0, not 1; the unit, nats by default.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 for float64 joint).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> copied, tossed = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.full((2, 2), 0.25)
        >>> [float(xentjax.information.conditional_entropy(joint, base=2)) for joint in (copied, tossed)]
        [0.0, 1.0]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.2.
    """
    x, counts, _ = _formulas.check_distributions("conditional_entropy", where, None, joint=joint)
    return _joint.conditional_entropy(x, _formulas.check_base("conditional_entropy", base), counts, False)


def mutual_information(joint: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Mutual information I(X; Y) of joint distributions, one value per example [...].

    I(X; Y) = Σ_xy p(x, y) log(p(x, y)·s/(p(x)·p(y))) = D(p(x, y)‖p(x)·p(y)/s) ≥ 0,  s = Σ p, which is 1 for distributions.
    Gradient: ∂I/∂p(x, y) = log(p(x, y)·s/(p(x)·p(y)));  0 at p(x, y) = 0.

    Args:
        joint: [..., x, y], probabilities; they need not sum to 1.
        base: scalar > 0, not 1; the unit, nats by default.
        where: [...], which examples count.

    Returns:
        [...], ≥ 0, float32 (float64 for float64 joint).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, a `base` that is not above 0 or is 1.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> copied, tossed = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.full((2, 2), 0.25)
        >>> [float(xentjax.information.mutual_information(joint, base=2)) for joint in (copied, tossed)]
        [1.0, 0.0]

    Reference:
        Cover, Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    x, counts, _ = _formulas.check_distributions("mutual_information", where, None, joint=joint)
    return _joint.mutual_information(x, _formulas.check_base("mutual_information", base), counts, False)


def perplexity(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Perplexity of distributions, the number of equally likely classes of the same entropy, one value per example [...].

    perplexity = e^H(p) = 2^(H in bits), the same in every unit, between 1 and the number of classes.
    Gradient: ∂/∂p_k = −e^H·(log p_k + 1);  0 at p_k = 0.

    Args:
        p: [..., classes], probabilities; they need not sum to 1.
        axis: the class axis.
        where: [...], which examples count.

    Returns:
        [...], float32 (float64 for float64 p).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.perplexity(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])).tolist()
        [4.0, 1.0]

    Reference:
        Jelinek et al., Perplexity, a Measure of the Difficulty of Speech Recognition Tasks, 1977.
    """
    x, counts, axis = _formulas.check_distributions("perplexity", where, axis, p=p)
    return _formulas.perplexity(x, counts, axis, False)
