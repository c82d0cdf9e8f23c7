"""Samplers of classes with known probabilities, for the losses on sampled classes.

`uniform`, `log_uniform` and `alias` make samplers. `draw` draws class ids from a sampler and returns them as `Samples`, together with their
log expected counts; the losses take `Samples`. `log_expected_count` computes the log expected counts of other ids, such as labels.

All samplers share these conventions:

- A sampler is a NamedTuple of arrays. It is a pytree and passes through `jax.jit`. `sample(key, shape)` draws independent int32 ids with
  shape [*shape] in a fixed number of steps. `log_prob(ids)` is log P(id) in nats, or NaN if an id is outside [0, classes). Any pytree with
  these two methods can be used as a sampler.
- `key` comes from `jax.random.key`. Every draw needs a key, and the same key draws the same ids.
- Classes are drawn with replacement. Among n draws, the expected count of class k is n·P(k).
- Gradient: none. The ids do not depend on anything that is learned.
- Raises: TypeError if an argument has the wrong dtype; ValueError if an argument has the wrong shape or a Python number is out of range.
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
