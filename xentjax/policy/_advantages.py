"""Advantages from the rewards of a group of samples. Shared conventions are documented in `xentjax.policy`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, mesh, numerics, values

Normalizer = Literal["std", "mean", "leave_one_out"]


def group_advantages(
    rewards: ArrayLike, groups: int | ArrayLike, *, normalize: Normalizer = "std", where: ArrayLike | None = None
) -> Array:
    """Advantages of samples relative to the other samples of their group, shape [..., samples].

    A group holds the samples of one prompt. Let r be the rewards of a group of n samples, and let m be their mean. The advantage of
    sample i depends on `normalize`:

    - "std" (GRPO): A_i = (r_i − m)/s, where s is the standard deviation, s² = Σ_j (r_j − m)²/(n − 1).
    - "mean" (Dr. GRPO): A_i = r_i − m.
    - "leave_one_out" (RLOO): A_i = r_i − Σ_(j ≠ i) r_j/(n − 1), so the baseline is the mean of the other samples.

    If all rewards of a group are equal, its advantages are exactly 0. For "std", their derivatives are then also exactly 0. In a group of
    one sample, the advantage and its derivative are exactly 0 for every `normalize`. No ε is added to s.

    Gradient: let δ_ij = [i = j]. Then ∂A_i/∂r_j = δ_ij − 1/n for "mean", (n·δ_ij − 1)/(n − 1) for "leave_one_out", and
    (δ_ij − 1/n − A_i·A_j/(n − 1))/s for "std".

    Args:
        rewards: [..., samples], floating-point numbers or integers.
        groups: a Python integer n if each group is n consecutive samples on the last axis. Otherwise [..., samples], integers that are
            equal for samples of the same group. Samples in different rows never belong to the same group.
        normalize: "std", "mean" or "leave_one_out".
        where: [..., samples], True for samples that count. All others have advantage 0, and their rewards are not used.

    Returns:
        [..., samples], float32, or float64 if `rewards` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, the size of a group does not divide the number of samples, or `normalize` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> rewards = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # two prompts with three samples each
        >>> xentjax.policy.group_advantages(rewards, 3, normalize="leave_one_out").tolist()
        [1.0, -0.5, -0.5, 0.0, 0.0, 0.0]
        >>> prompts = jnp.array([7, 7, 7, 3, 3, 3])
        >>> xentjax.policy.group_advantages(rewards, prompts).round(3).tolist()
        [1.155..., -0.577..., -0.577..., 0.0, 0.0, 0.0]

    Reference:
        Shao et al., DeepSeekMath, 2024, arXiv 2402.03300 ("std"; the paper does not say whether to divide by n or n − 1). Liu et al.,
        Understanding R1-Zero-Like Training, 2025, arXiv 2503.20783 ("mean"). Ahmadian et al., Back to Basics, 2024, arXiv 2402.14740
        ("leave_one_out").
    """
    name = "group_advantages"
    r = checks.real(name, "rewards", rewards)
    if not r.ndim:
        raise ValueError(f"{name}: rewards must have an axis of samples; got a scalar.")
    size, ids = 1, None
    if isinstance(groups, int | np.integer):
        size = checks.count(name, "groups", groups if isinstance(groups, int) else int(groups))
        if r.shape[-1] % size:
            raise ValueError(
                f"{name}: groups must divide {r.shape[-1]}, the last axis of rewards; got {size}. "
                "For groups of different sizes, pass the group of each sample as an array of integers."
            )
    else:
        ids = checks.same_shape(name, "groups", checks.identifiers(name, "groups", groups), r.shape, "one group per sample of rewards")
    checks.option(name, "normalize", normalize, get_args(Normalizer))
    counts = checks.where_mask(name, where, r.shape, "the shape of rewards")
    values.finite(name, "rewards", r, counts)
    return _advantages(r, ids, counts, size, normalize)


@functools.partial(jax.jit, static_argnames=("size", "normalize"))
def _advantages(rewards: Array, ids: Array | None, where: Array | None, size: int, normalize: Normalizer) -> Array:
    r = mesh.gather_last_axis(rewards).astype(numerics.accumulation_dtype(rewards.dtype))
    groups = size if ids is None else mesh.gather_last_axis(ids)
    counts = jnp.ones(r.shape, bool) if where is None else mesh.gather_last_axis(where)
    return mesh.split_as(rewards, _within_groups(r, groups, counts, normalize))


def _within_groups(r: Array, groups: int | Array, counts: Array, normalize: Normalizer) -> Array:
    def over_group(reduce: Callable[..., Array], x: Array, fill: float) -> Array:
        """A reduction over the samples that count in the group of each sample. `fill` stands for all other samples."""
        x = numerics.where(counts, x, fill)
        if not isinstance(groups, Array):
            grouped = x.reshape(*x.shape[:-1], x.shape[-1] // groups, groups)
            return jnp.broadcast_to(reduce(grouped, axis=-1, keepdims=True, initial=fill), grouped.shape).reshape(x.shape)
        same = groups[..., :, None] == groups[..., None, :]
        return reduce(numerics.where(same, jnp.broadcast_to(x[..., None, :], same.shape), fill), axis=-1, initial=fill)

    # The largest reward of the group is subtracted from every reward. Then equal rewards are exactly 0, and so are their deviations.
    r = numerics.where(counts, r, 0)
    r = numerics.where(counts, r - lax.stop_gradient(over_group(jnp.max, r, -jnp.inf)), 0)
    n = over_group(jnp.sum, jnp.ones_like(r), 0)
    deviation = numerics.where(counts, n * r - over_group(jnp.sum, r, 0), 0)  # n times the deviation from the mean
    if normalize == "mean":
        return deviation / jnp.maximum(n, 1)
    others = jnp.maximum(n - 1, 1)
    if normalize == "leave_one_out":
        return deviation / others
    # The result does not depend on the scale of the rewards. So deviations are divided by the largest deviation. Then no square overflows,
    # and the sum of the squares does not underflow.
    scale = lax.stop_gradient(over_group(jnp.max, jnp.abs(deviation), 0))
    equal = numerics.underflows(scale)
    deviation = numerics.where(equal, 0, deviation / numerics.where(equal, 1, scale))
    variance = over_group(jnp.sum, jnp.square(deviation), 0) / others
    return deviation / jnp.sqrt(numerics.where(equal, 1, variance))
