"""Information theory: entropy, cross-entropy, divergences, mutual information, of probabilities and of logits.

What every function here shares:

- A distribution is p [..., classes], the class axis at `axis`; a joint one is [..., x, y] on the last two axes. Each gives one value
  per example [...]. Arithmetic and results are float32, or float64 for float64 arguments; gradients come back in the dtype of
  the argument.
- `_from_logits`: the same of softmax(logits), of a joint distribution over both axes together, accurate at any margin. A logit
  of −∞ is a class of probability 0. A row of only −∞ has no class: its probabilities are all 0, and it has gradient 0.
- `base`: the unit. Nats without it, bits with `base=2`, hartleys with `base=10`; above 0 and not 1, a Python number or traced.
- `where`, the shape of the result: which examples count. The others give exactly 0 with gradient exactly 0, whatever they hold.
- Zeros are exact, without an ε: 0·log 0 = 0, 0·log(0/0) = 0. What is infinite is +∞: `cross_entropy`, `kl_divergence` and Rényi's of order
  α ≥ 1 where p > 0 = q.
- Gradients are finite there: where the true derivative with respect to an entry is infinite (log p at p = 0, p/q at q = 0), it is 0.
- Nothing cancels: divergences of nearly equal distributions are accurate relative to themselves.
- Probabilities need not sum to 1; each formula is then used as it stands. `kl_divergence` is Σ [p·log(p/q) − p + q], whose terms
  are never negative, so that rounding of Σ p does not show in it. Negative probabilities give NaN.
- Raises: TypeError for dtypes; ValueError for shapes and for Python numbers out of range.
"""

from xentjax.information._logits import conditional_entropy_from_logits as conditional_entropy_from_logits
from xentjax.information._logits import cross_entropy_from_logits as cross_entropy_from_logits
from xentjax.information._logits import entropy_from_logits as entropy_from_logits
from xentjax.information._logits import js_divergence_from_logits as js_divergence_from_logits
from xentjax.information._logits import kl_divergence_from_logits as kl_divergence_from_logits
from xentjax.information._logits import mutual_information_from_logits as mutual_information_from_logits
from xentjax.information._logits import perplexity_from_logits as perplexity_from_logits
from xentjax.information._logits import renyi_divergence_from_logits as renyi_divergence_from_logits
from xentjax.information._logits import self_information_from_logits as self_information_from_logits
from xentjax.information._probabilities import conditional_entropy as conditional_entropy
from xentjax.information._probabilities import cross_entropy as cross_entropy
from xentjax.information._probabilities import entropy as entropy
from xentjax.information._probabilities import js_divergence as js_divergence
from xentjax.information._probabilities import kl_divergence as kl_divergence
from xentjax.information._probabilities import mutual_information as mutual_information
from xentjax.information._probabilities import perplexity as perplexity
from xentjax.information._probabilities import renyi_divergence as renyi_divergence
from xentjax.information._probabilities import self_information as self_information
