"""Policy optimization: PPO, GRPO, DAPO, GSPO, Dr. GRPO and RLOO as functions of log-probabilities and rewards.

    group_advantages        rewards of several samples per prompt → advantages
    policy_gradient_loss    log-probabilities and advantages → the clipped loss per token or per sequence
    kl_estimate             log-probabilities under two policies → estimates of the divergence per token

The log-probabilities of tokens come from `xentjax.softmax_log_prob`, or without stored logits from
`xentjax.fuse_linear(xentjax.softmax_log_prob, reduction="none")`.

No function here averages losses over tokens, sequences or devices. Use `xentjax.weighted_mean`. Let `loss` and `mask` have shape
[sequences, tokens]. Tokens outside the mask have a loss of 0. The papers use different means:

    weighted_mean(loss, where=mask)                                            equal weight for every token of the batch (DAPO)
    weighted_mean(loss, mask / jnp.maximum(mask.sum(-1, keepdims=True), 1))    equal weight for every sequence (GRPO)
    weighted_mean(loss)                                                        the sum, divided by the constant sequences·tokens (Dr. GRPO)
    weighted_mean(loss_of_sequences, where=mask.any(-1))                       equal weight for every sequence, level="sequence" (GSPO)

For an entropy bonus, subtract `coefficient * entropy` from the loss of each token before the mean. `xentjax.row_statistics` returns the
entropy of each token together with its log-probability. For a divergence penalty, add `coefficient * kl_estimate(…)` to the loss of each
token before the mean.

Shared conventions:

- Arithmetic and results are float32, or float64 if the log-probabilities or rewards are float64. Each gradient has the dtype of its
  argument.
- Results are differentiable to every order, except that `old_log_probs` are held constant. If advantages depend on parameters, for example
  on the parameters of a critic, apply `jax.lax.stop_gradient` to them. Hyper-parameters that are numbers may be traced.
- `where` is True for tokens or samples that count. All other tokens or samples may contain anything. Their results and all their
  derivatives are exactly 0.
- A log-probability of −∞ means an impossible token. If both log-probabilities of a difference are −∞, the difference counts as 0, so the
  ratio is 1. If the ratio of the new policy to the old policy exceeds the range of the dtype and is not clipped, the ratio is +∞.
- Log-probabilities may be logarithms of densities, for continuous actions. So `xentjax.checked` reports NaN and +∞, but not numbers above
  0.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax.policy._advantages import group_advantages as group_advantages
from xentjax.policy._losses import kl_estimate as kl_estimate
from xentjax.policy._losses import policy_gradient_loss as policy_gradient_loss
