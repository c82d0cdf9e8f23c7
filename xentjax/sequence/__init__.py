"""Sequences: decoders, alignments and posterior probabilities for CTC, transducers and conditional random fields.

The losses are `xentjax.ctc_loss`, `xentjax.ctc_loss_from_log_probs`, `xentjax.transducer_loss`, `xentjax.transducer_loss_from_log_probs`
and `xentjax.crf_loss`.

Conventions that the losses and the functions here share:

- Every function treats each sequence alone. The leading axes `...` are the axes of the sequences, and losses have shape [...].
- `logit_lengths` and `label_lengths` [...] are the numbers of frames and of labels of each sequence. Frames and labels after the end may
  hold anything, also NaN. Their gradient is exactly 0.
- `where` [...] is True for sequences that count. All other sequences cost 0 with gradient 0. In the functions of conditional random fields,
  `where` [..., time] is True for positions that count, in any pattern.
- A label within its sequence that is no class, or the blank, makes the loss and the gradient of its sequence NaN, and so does a length that
  is below 0 or too large.
- If no alignment, path or tagging has a positive probability, the loss is +∞ and its gradient is exactly 0.
- Logits of −∞ are classes of probability 0.
- Arithmetic and results are float32, or float64 if an argument is float64. Each gradient has the dtype of its argument.
- Losses are accurate for sequences that are recognized with certainty. A loss of 1e-15 keeps its digits in float32. It is computed from the
  probability of everything that does not give the labels. The functions `…_from_log_probs` do not know this probability.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax._sequence.decoding import ctc_alignment as ctc_alignment
from xentjax._sequence.decoding import ctc_greedy_decode as ctc_greedy_decode
from xentjax._sequence.decoding import ctc_posteriors as ctc_posteriors
from xentjax._sequence.decoding import transducer_greedy_decode as transducer_greedy_decode
from xentjax._sequence.tagging import crf_decode as crf_decode
from xentjax._sequence.tagging import crf_marginals as crf_marginals
