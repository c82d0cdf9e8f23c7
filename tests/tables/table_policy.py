"""Rows of `xentjax.policy`: the formulas of the papers in float64, written with minima, clips and loops over groups."""

import functools

import jax.numpy as jnp
import numpy as np

from tests.tables.functions import Row
from xentjax import policy

TOKENS = 3


def clipped(ratio, advantage, low, high):
    return -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def per_token(log_probs, old, advantages, low, high):
    return clipped(np.exp(log_probs - old), advantages if advantages.ndim == old.ndim else advantages[..., None], low, high)


def per_sequence(log_probs, old, advantages, low, high):
    return clipped(np.exp(np.mean(log_probs - old, -1)), advantages, low, high)


def k1(log_probs, reference):
    return log_probs - reference


def k2(log_probs, reference):
    return (reference - log_probs) ** 2 / 2


def k3(log_probs, reference):
    return np.exp(reference - log_probs) - 1 - (reference - log_probs)


def advantages(rewards, groups, normalize):
    result = np.zeros_like(rewards)
    for row in np.ndindex(rewards.shape[:-1]):
        for group in np.unique(groups[row]):
            here = groups[row] == group
            r = rewards[row][here]
            if normalize == "leave_one_out":
                result[row][here] = [r[i] - np.mean(np.delete(r, i)) for i in range(len(r))]
            else:
                result[row][here] = (r - r.mean()) / (r.std(ddof=1) if normalize == "std" else 1)
    return result


def draw_policy(rng, leading, per_token, level="token"):
    """Ratios within the bounds, above and below, never near a bound; both signs of the advantage."""
    tokens = (*leading, TOKENS)
    old = -rng.uniform(1, 3, tokens)
    d = np.log(rng.choice([0.5, 0.97, 1.02, 1.6], leading if level == "sequence" else tokens) * rng.uniform(0.99, 1.01))
    if level == "sequence":
        around = rng.uniform(-0.3, 0.3, tokens)
        d = d[..., None] + around - around.mean(-1, keepdims=True)
    shape = tokens if per_token else leading
    return old + d, old, rng.choice([-1, 1], shape) * rng.uniform(0.5, 2, shape), np.array(0.25), np.array(0.375)


def draw_estimate(rng, leading):
    x = -rng.uniform(1, 3, leading)
    return x, x + rng.uniform(-1, 1, leading)


def draw_rewards(rng, leading, groups):
    return rng.normal(size=(*leading, len(groups))), np.broadcast_to(np.array(groups), (*leading, len(groups)))


def _loss(log_probs, old, advantages, low, high, where=None, level="token"):
    """Where a sequence has one loss, it counts with all its tokens or not at all."""
    if where is not None and level == "sequence":
        where = jnp.broadcast_to(where[..., None], log_probs.shape)
    return policy.policy_gradient_loss(log_probs, old, advantages, clip_low=low, clip_high=high, where=where, level=level)


def _of_size(rewards, groups, **keywords):
    return policy.group_advantages(rewards, 3, **keywords)


def _of_groups(normalize, function=policy.group_advantages, groups=(4, 9, 4, 9, 9, 4, 9)):
    value = functools.partial(advantages, normalize=normalize)
    draw = functools.partial(draw_rewards, groups=groups)
    label = f"{normalize}-{'ids' if function is policy.group_advantages else 'size'}"
    return Row("policy.group_advantages", function, draw, value, keywords={"normalize": normalize}, label=label)


ROWS: tuple[Row, ...] = (
    Row("policy.policy_gradient_loss", _loss, functools.partial(draw_policy, per_token=True), per_token, (0, 2, 3, 4)),
    Row(
        "policy.policy_gradient_loss",
        _loss,
        functools.partial(draw_policy, per_token=False),
        per_token,
        (0, 2, 3, 4),
        label="one-advantage",
    ),
    Row(
        "policy.policy_gradient_loss",
        _loss,
        functools.partial(draw_policy, per_token=False, level="sequence"),
        per_sequence,
        (0, 2, 3, 4),
        keywords={"level": "sequence"},
        label="sequence",
    ),
    *(
        Row("policy.kl_estimate", policy.kl_estimate, draw_estimate, value, (0, 1), keywords={"kind": value.__name__}, label=value.__name__)
        for value in (k1, k2, k3)
    ),
    *(_of_groups(normalize) for normalize in ("std", "mean", "leave_one_out")),
    *(_of_groups(normalize, _of_size, (0, 0, 0, 1, 1, 1)) for normalize in ("std", "mean", "leave_one_out")),
)
