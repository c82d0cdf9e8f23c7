"""Metrics of classifiers: accuracy, confusion, calibration and ranking, with exact results over batches and devices.

All metrics work inside `jit` and `vmap`. There are three kinds:

- Per-example metrics: `accuracy`, `top_k_accuracy`, `brier_score` and `negative_log_likelihood` return one value per example, shape [...].
  They take the arguments of the losses, including `axis_name` and `class_mask`. `xentjax.weighted_mean` averages these values over one
  batch. For several batches or devices, call `xentjax.weighted_sum`. It returns a `WeightedSum`, the pair (Σ w·v, Σ w). Add these pairs
  first, then call `.mean()`. `perplexity` also takes a `WeightedSum`.
- Sums over all examples: `confusion`, `calibration` and `ranking` return a `Confusion`, a `Calibration` or a `Ranking`. To add results over
  batches, write `first + second` or `sum(parts)`. To add results over devices, call `.psum("data")` inside `jax.shard_map`, where "data" is
  the mesh axis that shards the examples. The methods of these classes, such as `precision()`, compute metrics from the sums. Under
  `jax.vmap`, sums and metrics get leading axes.
- Single numbers: `auroc` and `fit_temperature` return one number for all examples.

Shared conventions:

- `where` is True for examples that count. For every other example, a per-example metric is exactly 0. Sums ignore these examples, whatever
  they contain.
- Labels are class indices. `brier_score` and `negative_log_likelihood` also take soft labels. `auroc` and `ranking` take binary labels.
- An example is invalid if its label is out of range or one of its logits is NaN. A per-example metric of an invalid example is NaN. Sums
  count an invalid example only in the field `invalid`. If `invalid` is not 0, all metrics of the sums are NaN. An example of weight 0 is
  never invalid.
- 0/0 is 0. This rule applies, for instance, to the mean over no examples, the precision of a class that was never predicted, and the AUROC
  without positives.
- Ties are classes that share the largest logit. `accuracy` and `calibration` predict the first of these classes, as `jnp.argmax` does. So
  they agree with `confusion(logits.argmax(-1), labels)`. `top_k_accuracy` ranks the last of these classes first, as scikit-learn does.
  `RowStatistics.correct` is True if the label is any of these classes. It only compares the logit of the label with the largest logit, so
  it needs no second pass over the classes. Without ties, `accuracy`, `top_k_accuracy` with k = 1 and `RowStatistics.correct` agree on
  finite logits.
- Counts are int32. With `weights`, counts are sums of weights: float32, or float64 for float64 weights. Weights must be ≥ 0.
- Sums do not drift. A plain float32 sum loses digits by rounding, and an int32 field stays at 2³¹ − 1 once it has reached this number. So
  `+` and `psum` store the lost part in the attribute `rest`. `rest` holds two arrays for each field. Metrics use the fields and `rest`,
  and stay correct after 2⁴⁰ batches.
- `brier_score`, `negative_log_likelihood` and `perplexity` are smooth and have derivatives of every order. All other metrics have
  derivative 0 with respect to logits and scores: decisions and ranks are step functions, and confidences and the temperature are behind
  `stop_gradient`. All metrics except the temperature are differentiable with respect to `weights`.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax.metrics._calibration import Calibration as Calibration
from xentjax.metrics._calibration import calibration as calibration
from xentjax.metrics._confusion import Confusion as Confusion
from xentjax.metrics._confusion import confusion as confusion
from xentjax.metrics._examples import accuracy as accuracy
from xentjax.metrics._examples import brier_score as brier_score
from xentjax.metrics._examples import negative_log_likelihood as negative_log_likelihood
from xentjax.metrics._examples import perplexity as perplexity
from xentjax.metrics._examples import top_k_accuracy as top_k_accuracy
from xentjax.metrics._ranking import Ranking as Ranking
from xentjax.metrics._ranking import auroc as auroc
from xentjax.metrics._ranking import ranking as ranking
from xentjax.metrics._temperature import fit_temperature as fit_temperature
