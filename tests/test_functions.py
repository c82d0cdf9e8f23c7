"""The properties that every public function shares that is not a loss on (logits, labels); the rows are in `rows_*.py`."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import Row, replaced
from jax import export

EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 100 * EPS  # sums of tens of terms and two exponentials; what is more accurate than that is held where it is promised

TABLES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("rows_*.py"))
ROWS: tuple[Row, ...] = tuple(row for table in TABLES for row in importlib.import_module(table).ROWS)
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
INDEPENDENT = pytest.mark.parametrize("row", [r for r in ROWS if r.independent], ids=str)
MASKED = pytest.mark.parametrize("row", [r for r in ROWS if r.masked], ids=str)
SMOOTH = pytest.mark.parametrize("row", [r for r in ROWS if r.smooth], ids=str)
HALF = pytest.mark.parametrize("row", [r for r in ROWS if r.half], ids=str)


@pytest.fixture
def x64(x64):
    """As elsewhere, and JAX forgets what it has traced: the constants of a row would stay float64."""
    yield
    jax.clear_caches()


def close(got, expected, tolerance):
    """Relative to each number, and to the largest where terms of its size cancel."""
    expected = np.asarray(expected, np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=tolerance, atol=tolerance * finite.max(initial=0.01))


@each_row
def test_value(row, rng, x64):
    others = [(leading, jnp.float32, RTOL) for leading in ((), (2, 3), (0,)) if row.independent]
    for leading, dtype, tolerance in [((5,), jnp.float64, 1e-11), ((5,), jnp.float32, RTOL), *others]:
        arguments = row.arguments(rng, leading, dtype)
        result = row(*arguments)
        assert result.dtype == dtype
        close(result, row.exact(arguments), tolerance)


@SMOOTH
def test_gradient(row, rng, x64):
    arguments = row.arguments(rng, dtype=jnp.float64)
    smooth = tuple(arguments[i] for i in row.smooth)
    direction = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in smooth)
    tangent, slopes = jax.jit(lambda: (jax.jvp(row.total(arguments), smooth, direction)[1], row.slopes(arguments)))()
    expected = row.exact_gradient(arguments)
    for slope, formula, x in zip(slopes, expected, smooth, strict=True):
        assert slope.dtype == x.dtype
        close(slope, formula, 1e-7)
    close(tangent, sum(np.vdot(g, v) for g, v in zip(expected, direction, strict=True)), 1e-6)
    if not row.half:
        narrow = row.arguments(rng)
        for slope, formula in zip(row.slopes(narrow), row.exact_gradient(narrow), strict=True):
            assert slope.dtype == jnp.float32
            close(slope, formula, 10 * RTOL)


@SMOOTH
def test_hessian_products(row, rng, x64):
    arguments = row.arguments(rng, (3,) if row.independent else (5,), dtype=jnp.float64)
    smooth = tuple(arguments[i] for i in row.smooth)
    direction = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in smooth)

    def slope(*x):
        return jax.grad(row.total(arguments), tuple(range(len(x))))(*x)

    compiled = jax.jit(slope)

    def along(step):
        return compiled(*(x + step * v for x, v in zip(smooth, direction, strict=True)))

    def in_reverse(*x):
        return sum(jnp.vdot(g, v) for g, v in zip(slope(*x), direction, strict=True))

    positions = tuple(range(len(smooth)))
    both = jax.jit(lambda *x: (jax.jvp(slope, x, direction)[1], jax.grad(in_reverse, positions)(*x)))(*smooth)
    numeric = [(a - b) / 2e-5 for a, b in zip(along(1e-5), along(-1e-5), strict=True)]  # gradients hold already
    for products in both:
        for product, expected in zip(products, numeric, strict=True):
            close(product, expected, 1e-6)  # differences: error step²·f'''', and rounding 1e-16/step


@INDEPENDENT
def test_vmap_and_jit(row, rng):
    arguments = row.arguments(rng, (4,))
    batched = row(*arguments)
    each = tuple(0 if x.shape[:1] == (4,) else None for x in arguments)
    for result in jax.jit(lambda *x: (jax.vmap(row, each)(*x), row(*x)))(*arguments):
        close(result, batched, RTOL)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.independent], ids=str)
def test_vmap_over_batches(row, rng):
    several = [row.arguments(rng) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    close(jax.jit(jax.vmap(row))(*stacked), jnp.stack([row(*arguments) for arguments in several]), RTOL)


@HALF
def test_half_precision(row, rng):
    arguments = row.arguments(rng, dtype=jnp.bfloat16)
    result = row(*arguments)
    assert result.dtype == jnp.float32
    close(result, row.exact(arguments), RTOL)
    if row.smooth:
        for slope, formula in zip(row.slopes(arguments), row.exact_gradient(arguments), strict=True):
            assert slope.dtype == jnp.bfloat16
            close(slope, formula, float(jnp.finfo(jnp.bfloat16).eps))  # rounded once


@MASKED
def test_where_hides_everything(row, rng):
    arguments = row.arguments(rng)
    result = row(*arguments)
    where = jnp.broadcast_to(jnp.arange(5).reshape(5, *[1] * (result.ndim - 1)) % 2 == 0, result.shape)

    def poisoned(x):
        if x.shape[:1] != (5,):
            return x
        hidden = (jnp.arange(5) % 2 == 1).reshape(5, *[1] * (x.ndim - 1))
        return jnp.where(hidden, jnp.asarray(jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -100, x.dtype), x)

    spoilt = tuple(map(poisoned, arguments))
    masked = row(*spoilt, where=where)
    assert not masked[1::2].any()
    if row.independent:
        close(masked[::2], result[::2], RTOL)
    assert not row(*spoilt, where=jnp.zeros_like(where)).any()

    def total(*smooth):
        return jnp.sum(row(*replaced(spoilt, row.smooth, smooth), where=where))

    if row.smooth:
        smooth = tuple(spoilt[i] for i in row.smooth)
        for x, slope in zip(smooth, jax.grad(total, tuple(range(len(smooth))))(*smooth), strict=True):
            assert np.isfinite(slope).all()
            if x.shape[:1] == (5,):
                assert not slope[1::2].any()
        product = jax.jvp(jax.grad(total), smooth, tuple(map(jnp.ones_like, smooth)))[1]
        assert np.isfinite(product).all()


@each_row
def test_export_with_gradient_for_every_platform(row, rng):
    arguments = row.arguments(rng)
    step = jax.jit(lambda *x: (row(*x), row.slopes(x) if row.smooth else ()))
    exported = export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    close(exported.call(*arguments)[0], row.exact(arguments), RTOL)


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
