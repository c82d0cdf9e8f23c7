"""Samplers of classes with known probabilities, for the losses on sampled classes.

`uniform`, `log_uniform` and `alias` make samplers. `draw` draws class ids from a sampler. It returns `Samples`, which hold the ids and
their log expected counts. Pass these `Samples` to a loss. `log_expected_count` computes the log expected counts of other ids, such as
labels.

All samplers share these conventions:

- A sampler is a NamedTuple of arrays. It is a pytree and can be an argument of a function under `jax.jit`. `sample(key, shape)` draws
  independent int32 ids of shape [*shape] in a fixed number of steps. `log_prob(ids)` is log P(id) in nats, or NaN if an id is outside
  [0, classes). Any pytree with these two methods can be used as a sampler.
- `key` comes from `jax.random.key`. Every draw needs a key. The same key draws the same ids.
- Classes are drawn with replacement. Among n draws, the expected count of class k is n·P(k).
- There is no gradient. The ids do not depend on learned parameters.
- A wrong dtype raises TypeError. A wrong shape, or a Python number out of range, raises ValueError.
"""

from xentjax._many_classes.samplers import Alias as Alias
from xentjax._many_classes.samplers import LogUniform as LogUniform
from xentjax._many_classes.samplers import Samples as Samples
from xentjax._many_classes.samplers import Uniform as Uniform
from xentjax._many_classes.samplers import alias as alias
from xentjax._many_classes.samplers import draw as draw
from xentjax._many_classes.samplers import log_expected_count as log_expected_count
from xentjax._many_classes.samplers import log_uniform as log_uniform
from xentjax._many_classes.samplers import uniform as uniform
