"""Router losses. A router sends each token of a mixture of experts to `top_k` of the experts.

For each expert, the load-balancing loss multiplies two means over tokens. The mean of such products over microbatches or devices is not the
product of the means. So `expert_load` returns sums over tokens. Add these sums over microbatches or devices first. Then divide them by the
number of tokens, and multiply the means.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from xentjax._core import checks, numerics, rows, statistics, values
from xentjax._reduction import WeightedSum

_PER = ("batch", "sequence")


class ExpertLoad(NamedTuple):
    """The load of each expert. Each field has shape [..., experts].

    `expert_load` returns sums over tokens. The method `mean` divides them by the number of tokens, and the fields are then shares.
    """

    assigned: Array
    """The number of tokens that are sent to the expert, divided by `top_k`. It is a constant for differentiation."""
    probability: Array
    """The sum over tokens of the probabilities that the router gives to the expert. It is differentiable."""

    @property
    def imbalance(self) -> Array:
        """The number E Σ_i f_i P_i, shape [...], for the shares f = `assigned` and P = `probability`. It is 1 if P is uniform."""
        return self.assigned.shape[-1] * jnp.sum(self.assigned * self.probability, axis=-1)


def load_balancing_loss(
    router_logits: ArrayLike,
    *,
    top_k: int,
    where: ArrayLike | None = None,
    per: str = "batch",
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Load-balancing loss of a router, shape [] for the whole batch, or [...] with one value per sequence.

    loss = E Σ_i f_i P_i. E is the number of experts, f_i is the share of the assignments that go to expert i, and P_i is the mean
    probability of expert i. f and P are computed from the tokens for which `where` is True.
    Gradient: let z_t be the router logits of token t, let p_t = softmax(z_t), and let T be the number of tokens that count. Then
    ∂loss/∂z_ti = (E/T) p_ti (f_i − Σ_j p_tj f_j). f is a constant.

    The loss is 1 if P is uniform, and at most E/`top_k`. The shares f sum to 1 for every `top_k`, as in DeepSeek. In other implementations,
    such as Mixtral's, f sums to `top_k`. To use the coefficient of such an implementation here, multiply it by `top_k`. If no token counts,
    the loss and its gradient are 0.

    For several microbatches, do not average the losses. Add the results of `xentjax.expert_load`.

    Args:
        router_logits: [..., tokens, experts], unnormalized log-probabilities.
        top_k: the number of experts of each token. Of experts with equal logits, the first is chosen.
        where: [..., tokens], True for tokens that count, False for padding.
        per: "batch" for one mean over all tokens, or "sequence" for a mean over the tokens of each sequence.
        axis_name: mesh axis over which the tokens are sharded, inside `jax.shard_map`. The sums are added over its devices.

    Returns:
        [] or [...], in [0, E/`top_k`]; float32, or float64 if `router_logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `top_k` is below 1 or above the number of experts, or `per` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]]))
        >>> print(f"{xentjax.load_balancing_loss(logits, top_k=1):.4f}")  # 2·(2/3·7/12 + 1/3·5/12)
        1.0556

    Reference:
        Fedus, Zoph and Shazeer, Switch Transformers, 2021, arXiv 2101.03961, equations 4 to 6.
    """
    load = _load("load_balancing_loss", router_logits, top_k, where, per)
    return (load if axis_name is None else load.psum(axis_name)).mean().imbalance


def expert_load(router_logits: ArrayLike, *, top_k: int, where: ArrayLike | None = None, per: str = "batch") -> WeightedSum:
    """The load of each expert as sums over tokens, a `WeightedSum` of an `ExpertLoad` of shape [experts] or [..., experts].

    The field `assigned` holds f_i, the number of tokens t for which expert i is among the `top_k`, divided by `top_k`. The field
    `probability` holds P_i = Σ_t p_ti, where p_t is the softmax of the router logits z_t of token t. The weight is the number of tokens.
    Gradient: ∂P_i/∂z_tj = p_ti ([i = j] − p_tj), and f has gradient 0.

    The sums of microbatches can be added. Let a and b be the sums of two microbatches. `(a + b).mean().imbalance` is the load-balancing
    loss of both microbatches together. To get its gradient, differentiate one function that computes a, b and this loss.

    Args:
        router_logits: [..., tokens, experts], unnormalized log-probabilities.
        top_k: the number of experts of each token. Of experts with equal logits, the first is chosen.
        where: [..., tokens], True for tokens that count.
        per: "batch" for sums over all tokens, or "sequence" for sums over the tokens of each sequence.

    Returns:
        A `WeightedSum`; float32, or float64 if `router_logits` are float64. Its `weight` has shape [1] or [..., 1].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, `top_k` is below 1 or above the number of experts, or `per` is unknown.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]]))
        >>> first, second = (xentjax.expert_load(x, top_k=1) for x in (logits[:2], logits[2:]))
        >>> print(f"{(first + second).mean().imbalance:.4f}")  # the loss of all three tokens
        1.0556

    Reference:
        Fedus, Zoph and Shazeer, Switch Transformers, 2021, arXiv 2101.03961, equations 5 and 6.
    """
    return _load("expert_load", router_logits, top_k, where, per)


def router_z_loss(
    router_logits: ArrayLike,
    *,
    axis: int = -1,
    axis_name: str | tuple[str, ...] | None = None,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Router z-loss per token, shape [...].

    loss = lse(z)², where lse(z) = log Σ_i e^(z_i).
    Gradient: ∂loss/∂z_i = 2·lse(z)·p_i, where p = softmax(z).

    The paper's loss is the mean over tokens, `weighted_mean(loss, where=where)`. For several microbatches, add the results of
    `weighted_sum`.

    Args:
        router_logits: [..., experts], unnormalized log-probabilities.
        axis: expert axis of `router_logits`.
        axis_name: mesh axis over which the experts are sharded, inside `jax.shard_map`.
        class_mask: [experts] or [..., experts], True for experts that exist.
        where: [...], True for tokens that count.

    Returns:
        [...], ≥ 0; float32, or float64 if `router_logits` are float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Example:
        >>> import jax.numpy as jnp, xentjax
        >>> float(xentjax.router_z_loss(jnp.zeros(4)))  # (log 4)²
        1.92181...

    Reference:
        Zoph et al., ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022, arXiv 2202.08906, equation 5.
    """
    name, inputs = "router_z_loss", "router_logits"
    return _z_loss(checks.examples(name, router_logits, None, axis, axis_name, class_mask, where, labelled=False, inputs=inputs))


@jax.jit
def _z_loss(batch: rows.Examples) -> Array:
    r = rows.of(batch)
    stats = statistics.of_row(r)
    return statistics.finish(r, stats, numerics.where(stats.all_impossible, numerics.INFINITE, (stats.reference + stats.log_sum) ** 2))


def _load(name: str, router_logits: ArrayLike, top_k: int, where: ArrayLike | None, per: str) -> WeightedSum:
    z = checks.floating(name, "router_logits", router_logits)
    if z.ndim < 2 or z.shape[-1] == 0:
        raise ValueError(f"{name}: router_logits must have shape [..., tokens, experts], with at least one expert; got {z.shape}.")
    counts = checks.where_mask(name, where, z.shape[:-1], "the shape of router_logits without its last axis")
    if checks.count(name, "top_k", top_k) > z.shape[-1]:
        raise ValueError(f"{name}: top_k must be at most {z.shape[-1]}, the number of experts; got {top_k}.")
    checks.option(name, "per", per, _PER)
    values.logits(name, "router_logits", z, counts)
    return _sums(rows.Examples(z, None, None, counts, z.ndim - 1, None), int(top_k), per)


@functools.partial(jax.jit, static_argnames=("top_k", "per"))
def _sums(batch: rows.Examples, top_k: int, per: str) -> WeightedSum:
    r = rows.of(batch)
    z, experts = rows.finite_values(r), r.raw.shape[-1]
    _, chosen = lax.top_k(lax.stop_gradient(z), top_k)
    expert = lax.broadcasted_iota(chosen.dtype, (*chosen.shape, experts), chosen.ndim)
    assigned = jnp.sum((chosen[..., None] == expert).astype(z.dtype), axis=-2) / top_k
    tokens = jnp.ones(z.shape[:-1], z.dtype) if r.where is None else r.where.astype(z.dtype)
    axes = z.ndim - 2 if per == "sequence" else tuple(range(z.ndim - 1))
    load = ExpertLoad(rows.masked(assigned, r.where), rows.masked(statistics.softmax(r), r.where))
    return WeightedSum(jax.tree.map(functools.partial(jnp.sum, axis=axes), load), jnp.sum(tokens, axes)[..., None])
