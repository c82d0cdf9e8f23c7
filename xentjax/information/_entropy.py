"""Self-information, entropy and perplexity. Shared conventions are documented in `xentjax.information`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, values
from xentjax.information import _distributions


def self_information(p: ArrayLike, *, base: ArrayLike = math.e, where: ArrayLike | None = None) -> Array:
    """Self-information of events with probabilities p, one value per element, shape [...].

    I = −log p. It is +∞ at p = 0.
    Gradient: ∂I/∂p = −1/p, or 0 at p = 0.

    Args:
        p: [...], probabilities.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        where: [...], True for elements that count.

    Returns:
        [...], float32, or float64 if `p` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.self_information(jnp.array([0.5, 0.125, 0.0]), base=2).tolist()  # bits
        [1.0, 3.0, inf]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "self_information"
    x = checks.floating(name, "p", p)
    counts = checks.where_mask(name, where, x.shape, "the shape of p")
    values.probabilities(name, "p", x, counts)
    return _self_information(x, _distributions.check_base(name, base), counts)


@jax.jit
def _self_information(p: Array, base: ArrayLike | None, where: Array | None) -> Array:
    event = _distributions.distribution(p[..., None], where, -1, False)
    return _information(event, base, None if where is None else where[..., None])[..., 0]


def self_information_from_logits(logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`self_information` of every class of softmax(logits), shape [..., classes].

    u_k = −log p_k = lse(z) − z_k ≥ 0, where z are the logits, p = softmax(z) and lse(z) = log Σ_k e^(z_k).
    Gradient: ∂u_k/∂z_j = p_j − [j = k].

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `logits`.
        where: [..., classes], True for classes that count. Every other class has value 0, but its logit remains part of the softmax.

    Returns:
        [..., classes], with the shape of `logits`; float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.self_information_from_logits(jnp.array([40.0, 0.0, -jnp.inf])).tolist()
        [4.24835...e-18, 40.0, inf]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "self_information_from_logits"
    z, _, axis = _distributions.check_distributions(name, None, axis, logits=logits)
    counts = checks.where_mask(name, where, z.shape, "the shape of logits")
    return _self_information_from_logits(z, _distributions.check_base(name, base), counts, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _self_information_from_logits(logits: Array, base: ArrayLike | None, where: Array | None, axis: int) -> Array:
    where = None if where is None else jnp.moveaxis(where, axis, -1)
    classes = _distributions.distribution(logits, None if where is None else jnp.any(where, axis=-1), axis, True)
    return jnp.moveaxis(_information(classes, base, where), -1, axis)


def _information(classes: _distributions.Distribution, base: ArrayLike | None, where: Array | None) -> Array:
    """−log p of every class in the unit of `base`, +∞ where p is 0."""
    u = -classes.log + numerics.where(classes.zero, jnp.full_like(classes.p, jnp.inf), 0)
    return numerics.nan_or_zero(_distributions.in_unit(u, base), None, where)


def entropy(p: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Entropy of a distribution per example, shape [...].

    H(p) = −Σ_k p_k log p_k.
    Gradient: ∂H/∂p_k = −log p_k − 1, or 0 at p_k = 0.

    Args:
        p: [..., classes], probabilities, which need not sum to 1.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `p`.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `p` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.entropy(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), base=2).tolist()
        [1.5, 0.0]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    x, counts, axis = _distributions.check_distributions("entropy", where, axis, p=p)
    return _entropy(x, _distributions.check_base("entropy", base), counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _entropy(p: Array, base: ArrayLike | None, where: Array | None, axis: int, from_logits: bool) -> Array:
    return _distributions.finish(_entropy_terms(p, where, axis, from_logits), None, base, where)


def _entropy_terms(p: Array, where: Array | None, axis: int, from_logits: bool) -> Array:
    a = _distributions.distribution(p, where, axis, from_logits)
    slope = -a.log if from_logits else numerics.where(a.zero, 0, -a.log - 1)
    return _distributions.with_slope(-a.p * a.log, a.p, slope)


def entropy_from_logits(logits: ArrayLike, *, base: ArrayLike = math.e, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`entropy` of softmax(logits) per example, shape [...].

    H = Σ_k p_k u_k with u_k = −log p_k.
    Gradient: ∂H/∂z_k = p_k (u_k − H), where z are the logits.

    If the largest logit exceeds the others by a large margin, the entropy is about margin·e^(−margin). It does not round to 0.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        base: base of the logarithms, a positive scalar other than 1. The default e gives nats, and 2 gives bits.
        axis: class axis of `logits`.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `base` is 0, 1 or negative.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.entropy_from_logits(jnp.array([[0.0, 0.0], [40.0, 0.0]])).tolist()
        [0.69314..., 1.74182...e-16]

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    name = "entropy_from_logits"
    z, counts, axis = _distributions.check_distributions(name, where, axis, logits=logits)
    return _entropy(z, _distributions.check_base(name, base), counts, axis, True)


def perplexity(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Perplexity of a distribution per example, shape [...].

    perplexity = e^H(p) with H(p) in nats, or 2^H(p) with H(p) in bits. If p sums to 1, the perplexity is between 1 and the number of
    classes.
    Gradient: ∂perplexity/∂p_k = −e^H (log p_k + 1), or 0 at p_k = 0.

    If the perplexity is n, the entropy is the same as for n equally likely classes. The perplexity does not depend on the unit of the
    entropy.

    Args:
        p: [..., classes], probabilities, which need not sum to 1.
        axis: class axis of `p`.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `p` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.information.perplexity(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])).tolist()
        [4.0, 1.0]

    Reference:
        Jelinek et al., Perplexity, a Measure of the Difficulty of Speech Recognition Tasks, 1977.
    """
    x, counts, axis = _distributions.check_distributions("perplexity", where, axis, p=p)
    return _perplexity(x, counts, axis, False)


@functools.partial(jax.jit, static_argnames=("axis", "from_logits"))
def _perplexity(p: Array, where: Array | None, axis: int, from_logits: bool) -> Array:
    entropy = _distributions.finish(_entropy_terms(p, where, axis, from_logits), None, None, where)
    return numerics.nan_or_zero(jnp.exp(entropy), None, where)


def perplexity_from_logits(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """`perplexity` of softmax(logits) per example, shape [...].

    perplexity = e^H, where H is the entropy in nats. It is between 1 and the number of classes.
    Gradient: ∂perplexity/∂z_k = e^H p_k (u_k − H) with logits z and u_k = −log p_k.

    Args:
        logits: [..., classes], unnormalized log-probabilities.
        axis: class axis of `logits`.
        where: [...], True for examples that count.

    Returns:
        [...], float32, or float64 if `logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.information.perplexity_from_logits(jnp.array([5.0, 5.0, -jnp.inf])))  # two classes are possible
        2.0

    Reference:
        Jelinek et al., Perplexity, a Measure of the Difficulty of Speech Recognition Tasks, 1977.
    """
    z, counts, axis = _distributions.check_distributions("perplexity_from_logits", where, axis, logits=logits)
    return _perplexity(z, counts, axis, True)
