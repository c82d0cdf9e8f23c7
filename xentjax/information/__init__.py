"""Information theory: entropies, divergences and mutual information, from probabilities and from logits.

Shared conventions:

- A distribution p has shape [..., classes], with the class axis at `axis`. A joint distribution has shape [..., x, y], on the last two
  axes. Each function returns one value per example [...]. Arithmetic and results are float32, or float64 if an argument is float64.
  Gradients have the dtype of their argument.
- A function `…_from_logits` computes the same quantity of softmax(logits), accurately at any margin. For a joint distribution, the softmax
  is over both axes together. A logit of −∞ means a probability of 0. A row of only −∞ has no possible class: its probabilities are all
  0, and its gradient is 0.
- `base` is the base of the logarithms. The default e gives nats, 2 gives bits, 10 gives hartleys. It is a Python number or a traced scalar,
  above 0 and not 1.
- `where` has the shape of the result, and is True for examples that count. The others have a value of exactly 0 and a gradient of exactly
  0, whatever they hold.
- Zeros are exact, without an ε: 0·log 0 = 0 and 0·log(0/0) = 0. If p > 0 = q for some class, `cross_entropy`, `kl_divergence` and
  `renyi_divergence` of order α ≥ 1 are +∞.
- Gradients are finite at zeros. If the true derivative with respect to an entry is infinite (log p at p = 0, p/q at q = 0), the gradient is
  0 there.
- Nothing cancels: divergences of nearly equal distributions are accurate relative to their own size.
- Probabilities need not sum to 1. The formulas are not normalized. `kl_divergence` is Σ [p·log(p/q) − p + q], whose terms are never
  negative, so that rounding errors of Σ p do not affect it. Negative probabilities give NaN.
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
