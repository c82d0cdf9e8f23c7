"""What `where` hides reaches no derivative: of inputs, of labels, of any parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.properties.test_values import RTOL
from tests.tables import traced

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXAMPLES = 3
POISON = ((jnp.nan, -100), (jnp.inf, 2**31 - 1), (-jnp.inf, -1), (1e30, 7), (0.0, 2))  # for numbers and for indices


@functools.partial(jax.jit, static_argnums=0)
def slopes(call, arguments, where):
    return call.value_and_slopes(arguments, where)[1]


def spoilt(per_example, poison):
    """Twice the examples, of which the second half holds poison."""
    number, index = poison
    return jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.full_like(x, number if jnp.issubdtype(x.dtype, jnp.floating) else index)]), per_example
    )


# Functions with rows have the same test in test_functions_everywhere.py, in the program that they are compiled to there.
@pytest.mark.parametrize("call", traced.losses(EXAMPLES) + traced.more(EXAMPLES), ids=str)
def test_hidden_examples_reach_no_derivative(call, rng):
    # All examples twice, all counted, have twice the gradients of all examples and as many hidden ones: so one program does.
    per_example, shared = call.draw(rng)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), per_example)
    where = call.where((*twice, shared), jnp.arange(2 * EXAMPLES) < EXAMPLES)
    *own_expected, shared_expected = slopes(call, (*twice, shared), jnp.ones_like(where))
    for poison in POISON:
        *own, of_shared = slopes(call, (*spoilt(per_example, poison), shared), where)
        for got, expected in zip(jax.tree.leaves(own), jax.tree.leaves(own_expected), strict=True):
            np.testing.assert_allclose(got[:EXAMPLES], expected[:EXAMPLES], rtol=RTOL, atol=RTOL)
            np.testing.assert_array_equal(got[EXAMPLES:], np.zeros_like(got[EXAMPLES:]))
        for name in of_shared:
            np.testing.assert_allclose(of_shared[name], shared_expected[name] / 2, rtol=RTOL, atol=RTOL, err_msg=name)
