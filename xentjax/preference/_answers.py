"""The loss and the reward of single answers. Shared conventions are documented in `xentjax.preference`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, likelihoods, numerics, values


def kto_loss(
    log_probs: ArrayLike,
    reference: ArrayLike,
    desirable: ArrayLike,
    *,
    kl: ArrayLike,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Kahneman-Tversky optimization (KTO), one loss per answer, shape [...].

    Let r = log_probs − reference be the log-ratio of the trained model and the reference model, and let z be the reference point `kl`. Then
    loss = λ_D·σ(β(z − r)) for desirable answers, and loss = λ_U·σ(β(r − z)) for undesirable answers. KTO needs no pairs of answers.
    Gradient: let s = σ(β(z − r)). Then ∂loss/∂log_probs = −λ_D·β·s(1 − s) for desirable and λ_U·β·s(1 − s) for undesirable answers.
    ∂loss/∂reference has the opposite sign.

    The reference point is an estimate of the Kullback–Leibler divergence of the trained model from the reference model. The paper pairs
    each prompt of the batch with the answer to another prompt. Its estimate is the mean of the log-ratios of these answers, or 0 if the
    mean is negative: `jnp.maximum(xentjax.weighted_mean(log_probs_of_others - reference_of_others), 0)`. As in the paper, z is a constant
    and has no gradient.

    Args:
        log_probs: [...], log-probabilities of the answers under the trained model, summed over tokens.
        reference: [...], log-probabilities of the same answers under the reference model.
        desirable: [...], bool, True for desirable and False for undesirable answers.
        kl: scalar or [...], the reference point z ≥ 0. It is held constant.
        beta: scalar β > 0.
        desirable_weight: scalar λ_D ≥ 0, the weight of desirable answers.
        undesirable_weight: scalar λ_U ≥ 0, the weight of undesirable answers.
        where: [...], True for answers that count.

    Returns:
        [...], at least 0, and at most λ_D for desirable and λ_U for undesirable answers; float32, or float64 if `log_probs` or `reference`
        is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `beta` is not above 0, or a weight is below 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> log_probs, reference = jnp.array([-20.0, -20.0]), jnp.array([-50.0, -50.0])
        >>> xentjax.preference.kto_loss(log_probs, reference, jnp.array([True, False]), kl=10.0).tolist()  # σ(−2) and σ(2)
        [0.11920..., 0.88079...]

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024, arXiv 2402.01306, equation 8 (λ_y − v).
    """
    name = "kto_loss"
    (x, y), counts = likelihoods.arguments(name, where, {"log_probs": log_probs, "reference": reference})
    liked = checks.same_shape(name, "desirable", checks.boolean(name, "desirable", desirable), x.shape, "the shape of log_probs")
    z = checks.real(name, "kl", kl)
    if z.ndim:
        checks.same_shape(name, "kl", z, x.shape, "a scalar or the shape of log_probs")
    values.finite(name, "kl", z, counts if z.ndim else None)
    weights = (
        checks.number(name, f"{kind}_weight", w) for kind, w in (("desirable", desirable_weight), ("undesirable", undesirable_weight))
    )
    return _kto(x, y, liked, z, checks.positive(name, "beta", beta), *(0.0 if w is None else w for w in weights), counts)


@jax.jit
def _kto(
    log_probs: Array,
    reference: Array,
    desirable: Array,
    kl: Array,
    beta: ArrayLike,
    desirable_weight: ArrayLike | None,
    undesirable_weight: ArrayLike | None,
    where: Array | None,
) -> Array:
    x, y = likelihoods.entered(where, log_probs, reference)
    z = jnp.broadcast_to(lax.stop_gradient(kl).astype(x.dtype), x.shape)
    z = z if where is None else numerics.where(where, z, 0)
    gain = differences.difference_of_differences(x, y, z, jnp.zeros_like(z))
    weights = (jnp.asarray(0 if w is None else w, x.dtype) for w in (desirable_weight, undesirable_weight))
    weight = numerics.where(desirable, *(jnp.broadcast_to(w, x.shape) for w in weights))
    loss = weight * numerics.sigmoid(jnp.asarray(beta, x.dtype) * numerics.where(desirable, -gain, gain))
    return likelihoods.finished(loss, where)


def implicit_rewards(log_probs: ArrayLike, reference: ArrayLike, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None) -> Array:
    """The rewards that a model trained with DPO or KTO implicitly gives to answers, shape [...].

    reward = β·(log_probs − reference). The difference of the rewards of two answers to one prompt is the margin βh of `dpo_loss`.
    Gradient: ∂reward/∂log_probs = β and ∂reward/∂reference = −β.

    Args:
        log_probs: [...], log-probabilities of answers under the trained model, summed over tokens.
        reference: [...], log-probabilities of the same answers under the reference model.
        beta: scalar β > 0, as in the loss.
        where: [...], True for answers that count. The rewards of all others are 0.

    Returns:
        [...], float32, or float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `beta` is not above 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> from xentjax.preference import implicit_rewards
        >>> chosen = implicit_rewards(jnp.array([-50.0, -40.0]), jnp.array([-54.0, -38.0]), beta=0.5)
        >>> rejected = implicit_rewards(jnp.array([-60.0, -70.0]), jnp.array([-60.0, -71.0]), beta=0.5)
        >>> (chosen - rejected).tolist()  # margins
        [2.0, -1.5]
        >>> float(xentjax.weighted_mean((chosen > rejected).astype(float)))  # accuracy
        0.5

    Reference:
        Rafailov et al., Direct Preference Optimization, 2023, arXiv 2305.18290, section 4.
    """
    name = "implicit_rewards"
    (x, y), counts = likelihoods.arguments(name, where, {"log_probs": log_probs, "reference": reference})
    return _rewards(x, y, checks.positive(name, "beta", beta), counts)


@jax.jit
def _rewards(log_probs: Array, reference: Array, beta: ArrayLike, where: Array | None) -> Array:
    x, y = likelihoods.entered(where, log_probs, reference)
    return likelihoods.finished(numerics.weighted(jnp.asarray(beta, x.dtype), x - y), where)
