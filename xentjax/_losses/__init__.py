"""Losses of logits and labels, one value per example or per element.

`softmax` documents the conventions of losses over classes, and `sigmoid` those of binary losses.

Each public function checks its arguments and passes them to the compiled function below it, which contains the formula. Outside `jax.jit`,
a call runs one cached program, and its derivative runs another. Inside a user's `jax.jit`, XLA inlines the compiled function.
"""
