"""Sequences: decoders, alignments and posterior probabilities of CTC, transducers and conditional random fields.

The losses are `xentjax.ctc_loss`, `xentjax.ctc_loss_from_log_probs`, `xentjax.transducer_loss`, `xentjax.transducer_loss_from_log_probs`,
`xentjax.tdt_loss`, `xentjax.tdt_loss_from_log_probs` and `xentjax.crf_loss`.

Conventions that the losses and the functions here share:

- The leading axes `...` are the axes of the batch. Losses have shape [...], one value per sequence. The result of a sequence does not
  depend on the other sequences of the batch.
- `logit_lengths` and `label_lengths` [...] are the numbers of frames and of labels of each sequence. Frames and labels after the end may
  hold anything, also NaN. The gradient of these frames is exactly 0.
- `where` [...] is True for sequences that count. The loss and the gradient of all other sequences are 0. In the functions of conditional
  random fields, `where` [..., time] is True for positions that count, in any pattern.
- Labels before the end must be classes other than the blank, and lengths must be between 0 and the size of the axis. Otherwise the loss and
  the gradient of the sequence are NaN.
- If no alignment, path or tagging has a positive probability, the loss is +∞ and its gradient is exactly 0.
- A logit of −∞ gives its class the probability 0.
- Arithmetic and results are float32, or float64 if an argument is float64. Each gradient has the dtype of its argument.
- Losses are also accurate for sequences that are recognized with certainty: even a loss of 1e-15 has a small relative error in float32.
  Such a loss is computed from the probability of all other outcomes. The functions `…_from_log_probs` do not get this probability, so their
  small losses have only a small absolute error.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax._sequence.decoding import ctc_alignment as ctc_alignment
from xentjax._sequence.decoding import ctc_greedy_decode as ctc_greedy_decode
from xentjax._sequence.decoding import ctc_posteriors as ctc_posteriors
from xentjax._sequence.decoding import tdt_greedy_decode as tdt_greedy_decode
from xentjax._sequence.decoding import transducer_greedy_decode as transducer_greedy_decode
from xentjax._sequence.tagging import crf_decode as crf_decode
from xentjax._sequence.tagging import crf_marginals as crf_marginals
