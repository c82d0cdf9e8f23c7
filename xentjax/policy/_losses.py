"""The loss of a policy, and estimates of its divergence from a reference. Shared conventions are documented in `xentjax.policy`."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, differences, likelihoods, numerics, values

Level = Literal["token", "sequence"]
Estimator = Literal["k1", "k2", "k3"]


def policy_gradient_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    level: Level = "token",
    where: ArrayLike | None = None,
) -> Array:
    """Clipped policy gradient loss (PPO, GRPO, DAPO, GSPO), per token [..., tokens] or per sequence [...].

    Let A be the advantage, low = 1 − clip_low, high = 1 + clip_high, and let ρ = e^d be the ratio of the new to the old policy. Then

        loss = −min(ρ·A, clip(ρ, low, high)·A).

    For `level="token"`, each token has its own d = log_probs − old_log_probs. For `level="sequence"` (GSPO), d is the mean of these
    differences over the tokens of the sequence that count, and each sequence has one loss.

    Gradient: for a token, ∂loss/∂log_probs = −ρ·A. For a sequence of n tokens, the gradient of each token is −ρ·A/n. The gradient is 0
    where the loss is clipped, that is, where A ≥ 0 and ρ > high, or A < 0 and ρ < low.

    The old policy is a constant. So for samples of the current policy, pass `log_probs` twice. Then ρ is exactly 1, and the gradient −A
    is the plain policy gradient (REINFORCE). With `clip_low=1` and a very large `clip_high`, nothing is clipped.

    Args:
        log_probs: [..., tokens], log-probabilities of the sampled tokens or actions under the trained policy. They may also be logarithms
            of densities.
        old_log_probs: [..., tokens], log-probabilities under the policy that drew the samples. They are held constant.
        advantages: [...] for one advantage per sequence, as `group_advantages` returns them, or [..., tokens] for one per token. For
            `level="sequence"`, the shape must be [...].
        clip_low: scalar in [0, 1], how far the ratio may fall below 1 before it is clipped.
        clip_high: scalar ≥ 0, how far the ratio may rise above 1 before it is clipped. PPO and GRPO use the same number, such as 0.2, for
            `clip_low` and `clip_high`. DAPO uses 0.2 and 0.28, and GSPO uses 3e-4 and 4e-4.
        level: "token" or "sequence".
        where: [..., tokens], True for tokens that count. A sequence without such tokens has a loss of 0.

    Returns:
        [..., tokens] or [...], float32, or float64 if `log_probs` or `old_log_probs` is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, a number is out of range, or `level` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> old, advantages = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]])), jnp.array([1.0, -1.0])
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.9], [0.5, 0.9]]))  # ratios of 1 and 1.8
        >>> xentjax.policy.policy_gradient_loss(log_probs, old, advantages).round(3).tolist()
        [[-1.0, -1.2...], [1.0, 1.8...]]

    Reference:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv 1707.06347, equation 7. Shao et al., DeepSeekMath, 2024,
        arXiv 2402.03300 (GRPO). Yu et al., DAPO, 2025, arXiv 2503.14476 (`clip_high`). Zheng et al., Group Sequence Policy Optimization,
        2025, arXiv 2507.18071, equations 5 and 7 (`level="sequence"`).
    """
    name = "policy_gradient_loss"
    (x, old), counts = likelihoods.arguments(name, where, {"log_probs": log_probs, "old_log_probs": old_log_probs}, densities=True)
    checks.option(name, "level", level, get_args(Level))
    if level == "sequence" and not x.ndim:
        raise ValueError(f"{name}: log_probs must have an axis of tokens for level='sequence'; got a scalar.")
    a = checks.floating(name, "advantages", advantages)
    per_sequence = level == "sequence" or a.ndim == x.ndim - 1
    meaning = "the shape of log_probs" + " without its last axis" * per_sequence
    checks.same_shape(name, "advantages", a, x.shape[:-1] if per_sequence else x.shape, meaning)
    used = None if counts is None else jnp.any(counts, axis=-1) if per_sequence else counts
    values.finite(name, "advantages", a, used)
    high = checks.number(name, "clip_high", clip_high)
    return _policy_gradient(x, old, a, checks.fraction(name, "clip_low", clip_low), 0.0 if high is None else high, counts, level)


@functools.partial(jax.jit, static_argnames=("level",))
def _policy_gradient(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    clip_low: ArrayLike,
    clip_high: ArrayLike,
    where: Array | None,
    level: Level,
) -> Array:
    x, old = likelihoods.entered(where, log_probs, old_log_probs)
    d, a = x - lax.stop_gradient(old), advantages.astype(x.dtype)
    if level == "sequence":
        tokens = jnp.ones(d.shape, bool) if where is None else where
        where = jnp.any(tokens, axis=-1)
        d = jnp.sum(d, axis=-1) / jnp.maximum(jnp.sum(tokens, axis=-1, dtype=d.dtype), 1)
    elif a.ndim < d.ndim:
        a = jnp.broadcast_to(a[..., None], d.shape)
    if where is not None:
        a = numerics.where(where, a, 0)
    low, high = (jnp.broadcast_to(e, d.shape) for e in (1 - jnp.asarray(clip_low, d.dtype), 1 + jnp.asarray(clip_high, d.dtype)))
    gains = a >= 0
    bound = numerics.where(gains, high, low)
    clipped = numerics.where(gains, jnp.exp(d) > high, jnp.exp(d) < low)
    ratio = numerics.where(clipped, bound, jnp.exp(numerics.where(clipped, 0, d)))  # a clipped ratio may overflow
    return likelihoods.finished(-a * ratio, where)


def kl_estimate(log_probs: ArrayLike, reference: ArrayLike, *, kind: Estimator = "k3", where: ArrayLike | None = None) -> Array:
    """Estimate of the Kullback–Leibler divergence of a policy from a reference, one per sampled token, shape [...].

    Let d = reference − log_probs. Then k1 = −d, k2 = d²/2 and k3 = e^d − 1 − d. If the tokens are drawn from the policy π, the expectations
    of k1 and k3 are the divergence D(π‖reference). If the policies are close, the expectation of k2 is close to this divergence. k2 and k3
    are never negative. Their rounding errors are small relative to their values, also near d = 0.

    Gradient: ∂k1/∂log_probs = 1, ∂k2/∂log_probs = −d and ∂k3/∂log_probs = 1 − e^d. The gradient of `reference` has the opposite sign.

    The gradient of an estimate is not always an estimate of the gradient of the divergence. For samples of π, the expected gradient of k1
    is 0. The expected gradient of k2 is the gradient of D(π‖reference). The expected gradient of k3 is the gradient of D(reference‖π). So
    k1 can be subtracted from the reward, but must not be added to the loss.

    Args:
        log_probs: [...], log-probabilities of the sampled tokens or actions under the policy. They may also be logarithms of densities.
        reference: [...], log-probabilities of the same tokens or actions under the reference policy.
        kind: "k1", "k2" or "k3".
        where: [...], True for tokens that count.

    Returns:
        [...], in nats; float32, or float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or `kind` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> log_probs, reference = jnp.array([-1.0, -1.0]), jnp.array([-1.5, -1.0 - 2**-13])
        >>> xentjax.policy.kl_estimate(log_probs, reference).tolist()  # k3; the second is close to d²/2
        [0.10653..., 7.4502...e-09]

    Reference:
        Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html. Shao et al., DeepSeekMath, 2024, arXiv
        2402.03300, equation 4 (k3).
    """
    name = "kl_estimate"
    (x, y), counts = likelihoods.arguments(name, where, {"log_probs": log_probs, "reference": reference}, densities=True)
    checks.option(name, "kind", kind, get_args(Estimator))
    return _kl(x, y, counts, kind)


@functools.partial(jax.jit, static_argnames=("kind",))
def _kl(log_probs: Array, reference: Array, where: Array | None, kind: Estimator) -> Array:
    x, y = likelihoods.entered(where, log_probs, reference)
    d = y - x
    if kind == "k1":
        return likelihoods.finished(-d, where)
    return likelihoods.finished(jnp.square(d) / 2 if kind == "k2" else differences.exponential_excess(d), where)
