"""Transformations and masks of every public function that is not a loss on (logits, labels)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.properties.test_functions import RTOL, close, each_row
from tests.tables.functions import replaced, results
from tests.tables.rows import ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")
INDEPENDENT = pytest.mark.parametrize("row", [r for r in ROWS if r.independent], ids=str)
POISON = (jnp.nan, -100), (jnp.inf, 2**31 - 1), (-jnp.inf, -1), (1e30, 7)  # for numbers and for indices
MASKED = pytest.mark.parametrize("row", [r for r in ROWS if r.masked], ids=str)


@pytest.mark.by_module
@INDEPENDENT
def test_vmap_and_jit(row, rng):
    arguments = row.arguments(rng)
    batched = row(*arguments)
    each = tuple(0 if x.shape[:1] == (5,) else None for x in arguments)
    for result in jax.jit(lambda *x: (jax.vmap(row, each)(*x), row(*x)))(*arguments):
        close(result, batched, RTOL)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.independent], ids=str)
def test_vmap_over_batches(row, rng):
    several = [row.arguments(rng) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    close(jax.jit(jax.vmap(row))(*stacked), jnp.stack([row(*arguments) for arguments in several]), RTOL)


@functools.partial(jax.jit, static_argnums=0)
def masked_derivatives(row, arguments, where):
    """Result, gradients and the product of the Hessian with ones; one program for every mask."""

    def result(*smooth):
        return row(*replaced(arguments, row.smooth, smooth), where=where)

    smooth = tuple(arguments[i] for i in row.smooth)
    if not smooth:
        return result(), (), ()
    slope = jax.grad(lambda *x: jnp.sum(result(*x)), tuple(range(len(smooth))))
    return result(*smooth), *jax.jvp(slope, smooth, tuple(map(jnp.ones_like, smooth)))


@MASKED
def test_where_hides_everything(row, rng):
    arguments = row.arguments(rng)
    each = [x.shape[:1] == (5,) for x in arguments]
    counted = tuple(x[::2] if own else x for x, own in zip(arguments, each, strict=True))
    result = row.exact(counted)
    expected = row.exact_gradient(counted) if row.smooth else ()
    where = jnp.broadcast_to(jnp.arange(5).reshape(5, *[1] * (result.ndim - 1)) % 2 == 0, (5, *result.shape[1:]))
    for number, index in POISON:

        def poisoned(x, number=number, index=index):
            hidden = (jnp.arange(5) % 2 == 1).reshape(5, *[1] * (x.ndim - 1))
            return jnp.where(hidden, jnp.asarray(number if jnp.issubdtype(x.dtype, jnp.floating) else index, x.dtype), x)

        spoilt = tuple(poisoned(x) if own else x for x, own in zip(arguments, each, strict=True))
        masked, slopes, products = masked_derivatives(row, spoilt, where)
        assert not masked[1::2].any()
        close(masked[::2], result, RTOL)
        for i, slope, formula, product in zip(row.smooth, slopes, expected, products, strict=True):
            close(slope[::2] if each[i] else slope, formula, 10 * RTOL)
            assert not each[i] or not slope[1::2].any()
            assert np.isfinite(product).all()
    assert not masked_derivatives(row, spoilt, jnp.zeros_like(where))[0].any()


@pytest.mark.by_module
@each_row
def test_export_with_gradient_for_every_platform(row, rng):
    arguments = row.arguments(rng)
    exported = export.export(jax.jit(lambda *x: results(row, x)), platforms=("cpu", "cuda", "rocm", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    close(exported.call(*arguments)[0], row.exact(arguments), RTOL)


@pytest.mark.by_module
@each_row
def test_no_nan_on_the_way(row, rng):
    arguments = row.arguments(rng)
    jax.config.update("jax_debug_nans", True)
    try:
        assert np.isfinite(row(*arguments)).all()
        if row.smooth:
            assert all(np.isfinite(x).all() for x in row.slopes(arguments))
    finally:
        jax.config.update("jax_debug_nans", False)
