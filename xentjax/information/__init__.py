"""Information theory: entropies, divergences and mutual information, from probabilities or from logits.

Shared conventions:

- A distribution p has shape [..., classes], and `axis` is its class axis. A joint distribution has shape [..., x, y]; its last two axes
  are X and Y. Each function returns one value per example, an array of shape [...]. Only self-information has one value per probability.
- Arithmetic and results are float32, or float64 if an argument is float64. Each gradient has the dtype of its argument.
- A function `…_from_logits` computes the same quantity of softmax(logits). It is accurate for small and large differences between logits.
  For a joint distribution, the softmax is over both axes together. A logit of −∞ means a probability of 0. If all logits of an example are
  −∞, no class is possible. Then all probabilities of the example are 0, and its gradient is 0.
- `base` is the base of the logarithms: a positive Python number or traced scalar other than 1. The default e gives nats, 2 gives bits, and
  10 gives hartleys.
- `where` has the shape of the result, and is True for examples that count. The value and the gradient of every other example are exactly 0,
  whatever the example contains.
- Probabilities of 0 are handled exactly. No ε is added: 0·log 0 = 0 and 0·log(0/0) = 0. If a class has p > 0 and q = 0, then
  `cross_entropy` and `kl_divergence` are +∞, and so is `renyi_divergence` of order α ≥ 1.
- Gradients are finite at probabilities of 0. The true derivative may contain log p at p = 0, or p/q at q = 0. If this makes the derivative
  with respect to an entry infinite, the gradient of that entry is 0.
- Divergences of nearly equal distributions have a small relative error, because no terms of the formulas cancel.
- Probabilities need not sum to 1, and no function normalizes them. `kl_divergence` is Σ [p·log(p/q) − p + q]. The terms of this sum are
  never negative, so rounding errors of Σ p do not affect it. Negative probabilities give NaN.
"""

from xentjax.information._cross_entropy import cross_entropy as cross_entropy
from xentjax.information._cross_entropy import cross_entropy_from_logits as cross_entropy_from_logits
from xentjax.information._cross_entropy import kl_divergence as kl_divergence
from xentjax.information._cross_entropy import kl_divergence_from_logits as kl_divergence_from_logits
from xentjax.information._entropy import entropy as entropy
from xentjax.information._entropy import entropy_from_logits as entropy_from_logits
from xentjax.information._entropy import perplexity as perplexity
from xentjax.information._entropy import perplexity_from_logits as perplexity_from_logits
from xentjax.information._entropy import self_information as self_information
from xentjax.information._entropy import self_information_from_logits as self_information_from_logits
from xentjax.information._jensen_shannon import js_divergence as js_divergence
from xentjax.information._jensen_shannon import js_divergence_from_logits as js_divergence_from_logits
from xentjax.information._joint import conditional_entropy as conditional_entropy
from xentjax.information._joint import conditional_entropy_from_logits as conditional_entropy_from_logits
from xentjax.information._joint import mutual_information as mutual_information
from xentjax.information._joint import mutual_information_from_logits as mutual_information_from_logits
from xentjax.information._renyi import renyi_divergence as renyi_divergence
from xentjax.information._renyi import renyi_divergence_from_logits as renyi_divergence_from_logits
