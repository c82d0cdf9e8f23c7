"""Metrics of classifiers: accuracy, confusion, calibration and ranking, exact over batches and devices.

All metrics work inside `jit` and `vmap`. There are three kinds:

- Per-example metrics return one value per example, shape [...]: `accuracy`, `top_k_accuracy`, `brier_score` and `negative_log_likelihood`.
  They take the arguments of the losses, including `axis_name` and `class_mask`. The metric of a batch is the mean of these values,
  `xentjax.weighted_mean`. Over batches and devices, use `xentjax.weighted_sum`: it returns a pair of sums. Add the pairs first, then
  divide. `perplexity` takes this pair.
- Sums over all examples: `confusion`, `calibration` and `ranking` return a `Confusion`, `Calibration` or `Ranking`. Add these over batches
  (`first + second`, `sum(parts)`) and over the mesh axis that shards the examples (`.psum("data")`, inside `jax.shard_map`). Each figure,
  such as `precision()`, is a method that divides these sums. Under `jax.vmap`, sums and figures get leading axes.
- One number for all examples: `auroc` and `fit_temperature`.

Shared conventions:

- `where` is True for examples that count. Any other example has the value exactly 0 and is left out of sums, whatever it contains.
- Labels are class indices. `brier_score` and `negative_log_likelihood` also take soft labels; `auroc` and `ranking` take binary labels.
- An out-of-range label or a NaN logit makes the value of its example NaN. Sums count such an example only in the field `invalid`. All
  figures are NaN if `invalid` is not 0. An example of weight 0 is never invalid.
- 0/0 is 0: the mean over no examples, the precision of a class that was never predicted, the AUROC without positives.
- Ties: if several classes share the largest logit, `accuracy` and `calibration` predict the first of them, as `jnp.argmax` does. So they
  agree with `confusion(logits.argmax(-1), labels)`. `top_k_accuracy` ranks the last of them first, as scikit-learn does.
  `RowStatistics.correct` is True if the label is any of them. It only compares the logit of the label with the largest logit, so it needs
  no second pass over the classes. Without ties, `accuracy`, `top_k_accuracy` with k = 1 and `RowStatistics.correct` agree on finite logits.
- Counts are int32. With `weights`, they are float32 sums, or float64 for float64 weights. Weights must be ≥ 0.
- Sums do not drift. A float32 field rounds, and an int32 field stops growing at 2³¹ − 1. `+` and `psum` keep the lost part in the attribute
  `rest`, in two more arrays per field. Figures use the fields and `rest`, and stay correct after 2⁴⁰ batches.
- `brier_score`, `negative_log_likelihood` and `perplexity` are smooth and have derivatives of every order. The other metrics have
  derivative 0 with respect to logits and scores: decisions and ranks are step functions, and confidences and the temperature are behind
  `stop_gradient`. With respect to `weights`, all metrics except the temperature are smooth.
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
