"""Metrics of classifiers: accuracy, confusion, calibration, ranking. Exact over batches and devices, inside `jit` and `vmap`.

There are two kinds of function, and a ratio is formed once, at the very end, by both:

- One value per example [...], for metrics that are plain means: `accuracy`, `top_k_accuracy`, `brier_score`,
  `negative_log_likelihood`. Hand the values to `xentjax.weighted_mean`, or to `xentjax.weighted_sum` for a pair that adds over
  batches and devices (`perplexity` takes that pair). They have the arguments of the losses, `axis_name` and `class_mask` included.
- Sums over all examples, for everything else: `confusion`, `calibration` and `ranking` return `Confusion`, `Calibration` and
  `Ranking`. These add (`first + second`, `sum(parts)`), are summed over the mesh axis that splits the examples
  (`.psum("data")`, inside `jax.shard_map`), and have a method per figure. Under `jax.vmap` they get leading axes, and so do the figures.

What every function here shares:

- `where`: which examples count. Values of the others are exactly 0; sums leave them out, whatever they hold.
- Labels are class indices (for `auroc` and `ranking` bits). An index out of range, like a NaN logit, makes the value of its example
  NaN. Sums count such an example in no class but in the field `invalid`, and as long as that is not 0 all figures are NaN. An
  example of weight 0 is never invalid.
- Nothing to divide by is 0: means of no examples, precision of a class that was never predicted, AUROC without positives.
- Counts are int32; with `weights` they are sums in float32 (float64 for float64 weights). Weights are ≥ 0.
- Sums do not drift. `+` and `psum` keep what a field cannot hold in the attribute `rest`, two more arrays per field: what a float32
  rounds off, and by how much a count exceeds 2³¹ − 1, where its field stays. Figures use both, and are right after 2⁴⁰ batches.
- `brier_score`, `negative_log_likelihood` and `perplexity` are smooth, with every derivative. The others have the derivative 0 by logits
  and scores: decisions and ranks are steps, confidences and the temperature are behind `stop_gradient`. By `weights` all are smooth
  but the temperature.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
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
