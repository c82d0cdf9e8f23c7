"""Losses on pairs of a chosen and a rejected answer. Shared conventions are documented in `xentjax.preference`."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xentjax._core import checks, differences, likelihoods, numerics

Kind = Literal["sigmoid", "hinge", "ipo"]


def dpo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    kind: Kind = "sigmoid",
    where: ArrayLike | None = None,
) -> Array:
    """Direct preference optimization (DPO), one loss per pair, shape [...].

    Let h = (chosen − reference_chosen) − (rejected − reference_rejected), and let ε = `label_smoothing`. Then

        loss = (1 − ε)·φ(h) + ε·φ(−h),

    where φ depends on `kind`. For "sigmoid" (DPO), φ(h) = log(1 + e^(−βh)). For "hinge" (the hinge of SLiC), φ(h) = max(0, 1 − βh). For
    "ipo" (IPO), φ(h) = (h − 1/(2β))². The differences are computed so that they do not lose digits by cancellation.

    Gradient: let g = (1 − ε)·φ′(h) − ε·φ′(−h). Then ∂loss/∂chosen = ∂loss/∂reference_rejected = g, and
    ∂loss/∂rejected = ∂loss/∂reference_chosen = −g. For "sigmoid", φ′(h) = −β·σ(−βh). For "hinge", φ′(h) = −β if βh < 1, and 0 otherwise.
    For "ipo", φ′(h) = 2h − 1/β.

    Args:
        chosen: [...], log-probabilities of the chosen answers under the trained model, summed over tokens.
        rejected: [...], log-probabilities of the rejected answers under the trained model, summed over tokens.
        reference_chosen: [...], log-probabilities of the chosen answers under the reference model, summed over tokens.
        reference_rejected: [...], log-probabilities of the rejected answers under the reference model, summed over tokens.
        beta: scalar β > 0. The larger it is, the closer the trained model stays to the reference model.
        label_smoothing: scalar ε in [0, 1], the probability that a pair is in the wrong order (conservative DPO).
        kind: "sigmoid", "hinge" or "ipo".
        where: [...], True for pairs that count.

    Returns:
        [...], ≥ 0; float32, or float64 if an argument is float64. The unit is nats for "sigmoid".

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `beta` is not above 0, `label_smoothing` is outside [0, 1], or `kind` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> chosen, rejected = jnp.array([-50.0, -40.0]), jnp.array([-60.0, -30.0])
        >>> xentjax.preference.dpo_loss(chosen, rejected, chosen, rejected).tolist()  # log 2 for a model that equals its reference
        [0.69314..., 0.69314...]
        >>> xentjax.preference.dpo_loss(chosen, rejected, chosen - 20, rejected + 20, beta=0.5).tolist()  # a margin of 20 nats
        [2.0611...e-09, 2.0611...e-09]

    Reference:
        Rafailov et al., Direct Preference Optimization, 2023, arXiv 2305.18290, equation 7. "hinge": Zhao et al., SLiC-HF, 2023, arXiv
        2305.10425, with the reference model of Liu et al., 2023, arXiv 2309.06657. "ipo": Azar et al., A General Theoretical Paradigm to
        Understand Learning from Human Preferences, 2023, arXiv 2310.12036, equation 17. `label_smoothing`: Mitchell, A note on DPO with
        noisy preferences and relationship to IPO, 2023.
    """
    name = "dpo_loss"
    reference = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    arrays, counts = likelihoods.arguments(name, where, {"chosen": chosen, "rejected": rejected, **reference})
    checks.option(name, "kind", kind, get_args(Kind))
    smoothing = checks.number(name, "label_smoothing", label_smoothing, high=1.0)
    return _dpo(*arrays, checks.positive(name, "beta", beta), smoothing, counts, kind)


@functools.partial(jax.jit, static_argnames=("kind",))
def _dpo(
    chosen: Array,
    rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
    beta: ArrayLike,
    label_smoothing: ArrayLike | None,
    where: Array | None,
    kind: Kind,
) -> Array:
    c, r, of_c, of_r = likelihoods.entered(where, chosen, rejected, reference_chosen, reference_rejected)
    h = differences.difference_of_differences(c, of_c, r, of_r)
    beta = jnp.asarray(beta, h.dtype)

    def phi(h: Array) -> Array:
        if kind == "sigmoid":
            return numerics.softplus(-numerics.weighted(beta, h))
        if kind == "hinge":
            missing = 1 - numerics.weighted(beta, h)
            return numerics.where(missing > 0, missing, 0)
        return jnp.square(h - 1 / (2 * beta))

    if label_smoothing is None:
        return likelihoods.finished(phi(h), where)
    epsilon = jnp.asarray(label_smoothing, h.dtype)
    return likelihoods.finished(numerics.weighted(1 - epsilon, phi(h)) + numerics.weighted(epsilon, phi(-h)), where)


def cpo_loss(
    chosen: ArrayLike, rejected: ArrayLike, *, beta: ArrayLike = 0.1, alpha: ArrayLike = 1.0, where: ArrayLike | None = None
) -> Array:
    """Contrastive preference optimization (CPO), one loss per pair, shape [...].

    loss = log(1 + e^(−βh)) − α·chosen, where h = chosen − rejected. CPO needs no reference model. The second term is the negative
    log-likelihood of the chosen answer, which keeps the trained model close to the data.
    Gradient: ∂loss/∂chosen = −β·σ(−βh) − α and ∂loss/∂rejected = β·σ(−βh).

    Args:
        chosen: [...], log-probabilities of the chosen answers, summed over tokens.
        rejected: [...], log-probabilities of the rejected answers, summed over tokens.
        beta: scalar β > 0.
        alpha: scalar α ≥ 0, the weight of the negative log-likelihood.
        where: [...], True for pairs that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `beta` is not above 0, or `alpha` is below 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> xentjax.preference.cpo_loss(jnp.array(-3.0), jnp.array(-3.0)).tolist()  # log 2 + 3
        3.69314...

    Reference:
        Xu et al., Contrastive Preference Optimization, 2024, arXiv 2401.08417 (the sum of L_prefer and L_NLL, which is the case α = 1).
    """
    name = "cpo_loss"
    (c, r), counts = likelihoods.arguments(name, where, {"chosen": chosen, "rejected": rejected})
    return _cpo(c, r, checks.positive(name, "beta", beta), checks.number(name, "alpha", alpha), counts)


@jax.jit
def _cpo(chosen: Array, rejected: Array, beta: ArrayLike, alpha: ArrayLike | None, where: Array | None) -> Array:
    c, r = likelihoods.entered(where, chosen, rejected)
    loss = numerics.softplus(-numerics.weighted(jnp.asarray(beta, c.dtype), c - r))
    return likelihoods.finished(loss if alpha is None else loss - numerics.weighted(jnp.asarray(alpha, c.dtype), c), where)


def simpo_loss(
    mean_chosen: ArrayLike, mean_rejected: ArrayLike, *, beta: ArrayLike = 2.0, gamma: ArrayLike = 1.0, where: ArrayLike | None = None
) -> Array:
    """Simple preference optimization (SimPO), one loss per pair, shape [...].

    loss = log(1 + e^(γ − βh)), where h = mean_chosen − mean_rejected is the difference of the mean log-probabilities per token. SimPO needs
    no reference model.
    Gradient: ∂loss/∂mean_chosen = −β·σ(γ − βh) and ∂loss/∂mean_rejected = β·σ(γ − βh).

    Args:
        mean_chosen: [...], log-probabilities of the chosen answers, each divided by the number of tokens of the answer.
        mean_rejected: [...], log-probabilities of the rejected answers, each divided by the number of tokens of the answer.
        beta: scalar β > 0.
        gamma: scalar γ ≥ 0, the target for the margin βh.
        where: [...], True for pairs that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `beta` is not above 0, or `gamma` is below 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> log_probs, mask = jnp.array([-1.0, -2.0, -3.0, jnp.nan]), jnp.array([True, True, True, False])
        >>> mean_chosen = xentjax.weighted_mean(log_probs, where=mask)  # −2
        >>> xentjax.preference.simpo_loss(mean_chosen, jnp.array(-2.5)).tolist()  # log 2, because h = 1/2 = γ/β
        0.69314...

    Reference:
        Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, arXiv 2405.14734, equation 6.
    """
    name = "simpo_loss"
    (c, r), counts = likelihoods.arguments(name, where, {"mean_chosen": mean_chosen, "mean_rejected": mean_rejected})
    return _simpo(c, r, checks.positive(name, "beta", beta), checks.number(name, "gamma", gamma), counts)


@jax.jit
def _simpo(mean_chosen: Array, mean_rejected: Array, beta: ArrayLike, gamma: ArrayLike | None, where: Array | None) -> Array:
    c, r = likelihoods.entered(where, mean_chosen, mean_rejected)
    margin = numerics.weighted(jnp.asarray(beta, c.dtype), c - r)
    return likelihoods.finished(numerics.softplus(-margin if gamma is None else jnp.asarray(gamma, c.dtype) - margin), where)


def orpo_loss(mean_chosen: ArrayLike, mean_rejected: ArrayLike, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None) -> Array:
    """Odds-ratio preference optimization (ORPO), one loss per pair, shape [...].

    loss = −mean_chosen + β·log(1 + e^(−h)), where h = a_c − a_r is the difference of the log-odds a = log(p/(1 − p)) of both answers, and
    log p is the mean log-probability per token. The log-odds are accurate for p near 0 and for p near 1.
    Gradient: ∂loss/∂mean_chosen = −1 − β·σ(−h)/(1 − p_c) and ∂loss/∂mean_rejected = β·σ(−h)/(1 − p_r).

    At p = 1, the odds are infinite. So a mean log-probability above −2⁻⁶⁰ counts as −2⁻⁶⁰ in the odds.

    Args:
        mean_chosen: [...], log-probabilities of the chosen answers, each divided by the number of tokens of the answer.
        mean_rejected: [...], log-probabilities of the rejected answers, each divided by the number of tokens of the answer.
        beta: scalar β ≥ 0, the weight of the odds ratio, which is λ in the paper.
        where: [...], True for pairs that count.

    Returns:
        [...], in nats, ≥ 0; float32, or float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `beta` is below 0.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> chosen, rejected = jnp.log(jnp.array(0.75)), jnp.log(jnp.array(0.5))  # odds of 3 and 1
        >>> float(xentjax.preference.orpo_loss(chosen, rejected, beta=1.0))  # −log 0.75 + log(1 + 1/3)
        0.57536...

    Reference:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, arXiv 2403.07691, equations 6 and 7.
    """
    name = "orpo_loss"
    (c, r), counts = likelihoods.arguments(name, where, {"mean_chosen": mean_chosen, "mean_rejected": mean_rejected})
    return _orpo(c, r, checks.number(name, "beta", beta), counts)


@jax.jit
def _orpo(mean_chosen: Array, mean_rejected: Array, beta: ArrayLike | None, where: Array | None) -> Array:
    c, r = likelihoods.entered(where, mean_chosen, mean_rejected)
    if beta is None:
        return likelihoods.finished(-c, where)
    u, v = (differences.with_slope_of(jnp.maximum(-x, 2.0**-60), -x) for x in (c, r))
    return likelihoods.finished(numerics.weighted(jnp.asarray(beta, c.dtype), _surprise_of_odds(u, v)) - c, where)


def _surprise_of_odds(u: Array, v: Array) -> Array:
    """log(1 + q), where q = (e^u − 1)/(e^v − 1) is the odds of the rejected answer divided by the odds of the chosen answer.

    u and v are the negative mean log-probabilities of the chosen and of the rejected answer. Let `least` be the smaller and `most` the
    larger of u and v, and let z be the smaller of q and 1/q. Then z = e^(least − most)·(1 − e^(−least))/(1 − e^(−most)). The result is
    log(1 + z) for q ≤ 1, and log(1 + z) − log z for q > 1. The log-odds are not computed, because their derivatives are very large near
    u = 0. The terms of second derivatives would lose digits by cancellation.
    """
    unlikely = u > v
    least, most = numerics.where(unlikely, v, u), numerics.where(unlikely, u, v)
    share = jnp.expm1(-least) / jnp.expm1(-most)
    of_unlikely = (most - least) - jnp.log(numerics.where(unlikely, share, 1))
    return jnp.log1p(jnp.exp(least - most) * share) + numerics.where(unlikely, of_unlikely, 0)
