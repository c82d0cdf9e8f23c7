"""Preference losses: DPO, IPO, SimPO, ORPO, CPO and KTO as functions of log-probabilities.

The log-probabilities of tokens come from `xentjax.softmax_log_prob`, or without stored logits from
`xentjax.fuse_linear(xentjax.softmax_log_prob, reduction="none")`. Let `token_log_probs` and `mask` have shape [..., tokens].

    xentjax.weighted_sum(token_log_probs, where=mask, axis=-1).total   the log-probability of each answer, for DPO, IPO, CPO and KTO
    xentjax.weighted_mean(token_log_probs, where=mask, axis=-1)        the mean per token, for SimPO and ORPO

Shared conventions:

- Each loss returns one value per pair or per answer. All log-probabilities have the shape [...] of the result, and a floating dtype. They
  are not broadcast. `xentjax.weighted_mean` averages the losses.
- Arithmetic and results are float32, or float64 if a log-probability is float64. Each gradient has the dtype of its argument.
- All losses have derivatives of every order with respect to log-probabilities and hyper-parameters. Hyper-parameters may be traced. To
  train only one of two models, apply `jax.lax.stop_gradient` to the log-probabilities of the other.
- Losses and gradients are finite and accurate at any margin. If a model is certain, its small loss keeps a small relative error.
- `where` has the shape of the result, and is True for pairs or answers that count. All other pairs or answers may contain anything. Their
  values and all their derivatives are exactly 0.
- A log-probability of −∞ means an impossible answer. If the chosen answer is impossible, the loss is +∞, and its gradient is finite.
  `kto_loss` is bounded. For an impossible desirable answer, it is `desirable_weight`. If both log-probabilities of a difference are −∞,
  the difference counts as 0.
- Inside `xentjax.checked`, a log-probability that is above 0 or NaN raises an error. The error gives the position of the number.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax.preference._answers import implicit_rewards as implicit_rewards
from xentjax.preference._answers import kto_loss as kto_loss
from xentjax.preference._pairs import cpo_loss as cpo_loss
from xentjax.preference._pairs import dpo_loss as dpo_loss
from xentjax.preference._pairs import orpo_loss as orpo_loss
from xentjax.preference._pairs import simpo_loss as simpo_loss
