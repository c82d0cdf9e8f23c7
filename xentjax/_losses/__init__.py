"""Losses of logits and labels. They return one value per example or per element.

The module `softmax` documents the conventions of losses over classes. The module `sigmoid` documents the conventions of binary losses.

Each public function checks its arguments and passes them to a compiled function, which is defined below it and contains the formula.
Outside `jax.jit`, a call runs one cached program, and a derivative runs a second cached program. Inside a user's `jax.jit`, XLA inlines the
compiled function.
"""
