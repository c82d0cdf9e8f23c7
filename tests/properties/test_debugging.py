"""JAX's own debugging tools find nothing to complain about in valid data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from tests.tables import traced

pytestmark = pytest.mark.usefixtures("quick_compilation")
LOSSES, ROWS, MORE = traced.losses(5), traced.of_rows(), traced.more(5)
each_call = pytest.mark.parametrize("call", LOSSES + ROWS + MORE, ids=str)


def masked(call, rng):
    """Arguments whose second example is hidden, with a label of -100 if it has indices."""
    per_example, shared = call.draw(rng)
    per_example = jax.tree.map(lambda x: x.at[1].set(-100) if jnp.issubdtype(x.dtype, jnp.integer) else x, per_example)
    counted = jnp.arange(len(jax.tree.leaves(per_example)[0])) != 1
    return (*per_example, shared), call.where((*per_example, shared), counted)


# Their labels are looked up class by class. JAX's checkify fails in the derivative by these labels, whatever they hold, and a lookup that
# it accepts would gather all classes over devices.
ONE_CLASS_AFTER_ANOTHER = ("bi_tempered_cross_entropy", "forward_corrected_cross_entropy", "seesaw_loss")


@pytest.mark.exhaustive
@each_call
def test_no_operation_makes_nan_or_looks_beyond_an_array(call, rng, debug_nans, monkeypatch):
    arguments, where = masked(call, rng)
    # One operation after another, so that debug_nans sees each. Without jax.checkpoint, into which checkify sees only if it is compiled.
    monkeypatch.setattr(jax, "checkpoint", lambda function=None, **_: function or (lambda f: f))
    run = call.value_and_slopes
    if call.name.endswith("-distribution") and call.name.startswith(ONE_CLASS_AFTER_ANOTHER):
        *arguments, held = arguments[0], arguments[2], arguments[1]

        def run(given, where):
            return jax.value_and_grad(lambda x: call.total((x[0], held, x[1]), where))(given)

    with jax.disable_jit():
        error, result = checkify.checkify(run, errors=checkify.index_checks)(arguments, where)
    error.throw()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))


def test_checkify_sees_into_the_loop_over_classes(rng):
    """Compiled, with a lookup under jax.checkpoint."""
    (call,) = (c for c in LOSSES if c.name.startswith("forward") and c.name.endswith("-distribution"))
    (z, labels, shared), where = masked(call, rng)
    run = jax.jit(jax.grad(lambda z: call.total((z, labels, shared), where)))
    checkify.checkify(run, errors=checkify.index_checks)(z)[0].throw()


# The losses whose derivative rules keep functions beyond a trace. All calls would take minutes: each trace is searched for references.
@pytest.mark.exhaustive
@pytest.mark.parametrize("call", [c for c in MORE if "linear" in c.name], ids=str)
def test_no_tracer_outlives_its_trace(call, rng):
    arguments, where = masked(call, rng)
    with jax.checking_leaks():
        jax.jit(lambda *x: call.total(*x)).trace(arguments, where)


@pytest.mark.exhaustive
@each_call
def test_float32_stays_float32_with_x64(call, rng, x64):
    arguments, where = masked(call, rng)
    result = jax.eval_shape(lambda *x: call.function(*x, where=where), *arguments)
    slopes = jax.eval_shape(call.value_and_slopes, arguments, where)[1]
    for x in jax.tree.leaves((result, slopes)):
        assert x.dtype == jnp.float32 or not jnp.issubdtype(x.dtype, jnp.floating)
