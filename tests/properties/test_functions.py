"""Values and derivatives of every public function that is not a loss on (logits, labels); the rows are in `table_*.py`.

What else these functions share stands in `test_functions_everywhere.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tables.functions import replaced, results
from tests.tables.rows import ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 100 * EPS  # sums of tens of terms and two exponentials; what is more accurate than that is held where it is promised

each_row = pytest.mark.parametrize("row", ROWS, ids=str)
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
def test_value(row, rng):
    several = [row.arguments(rng, leading) for leading in (((), (2, 3), (0,)) if row.independent else ((5,),))]
    for arguments, result in zip(several, jax.jit(lambda several: [row(*x) for x in several])(several), strict=True):
        assert result.dtype == jnp.float32
        close(result, row.exact(arguments), RTOL)


@pytest.mark.exhaustive
@each_row
def test_value_in_float64(row, rng, x64):
    narrow = row.arguments(rng)
    assert jax.eval_shape(row, *narrow).dtype == jnp.float32  # nothing on the way widens it
    if not row.smooth:  # for the others test_derivatives has it, in the program of the derivatives
        arguments = row.arguments(rng, dtype=jnp.float64)
        check_float64(row, arguments, row(*arguments))


def check_float64(row, arguments, result):
    assert result.dtype == jnp.float64
    close(result, row.exact(arguments), 1e-11)


@SMOOTH
def test_derivatives(row, rng, x64):
    """Gradient, tangent and both products with the Hessian, in float64; one program, also for the gradients of the differences."""
    arguments = row.arguments(rng, dtype=jnp.float64)
    smooth = tuple(arguments[i] for i in row.smooth)
    direction = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in smooth)
    positions = tuple(range(len(smooth)))

    @jax.jit
    def everything(*x):
        def slope(*x):
            return jax.grad(row.total(arguments), positions)(*x)

        def along(*x):
            return sum(jnp.vdot(g, v) for g, v in zip(slope(*x), direction, strict=True))

        result, tangent = jax.jvp(lambda *x: row(*replaced(arguments, row.smooth, x)), x, direction)
        return result, tangent.sum(), *jax.jvp(slope, x, direction), jax.grad(along, positions)(*x)

    result, tangent, slopes, forward, reverse = everything(*smooth)
    check_float64(row, arguments, result)
    expected = row.exact_gradient(arguments)
    for slope, formula, x in zip(slopes, expected, smooth, strict=True):
        assert slope.dtype == x.dtype
        close(slope, formula, 1e-7)
    close(tangent, sum(np.vdot(g, v) for g, v in zip(expected, direction, strict=True)), 1e-6)
    above, below = (everything(*(x + step * v for x, v in zip(smooth, direction, strict=True)))[2] for step in (1e-5, -1e-5))
    for products in (forward, reverse):
        for product, a, b in zip(products, above, below, strict=True):
            close(product, (a - b) / 2e-5, 1e-6)  # differences: error step²·f'''', and rounding 1e-16/step


@pytest.mark.parametrize("row", [r for r in ROWS if r.smooth and not r.half], ids=str)  # for the others test_half_precision has it
def test_gradient_in_float32(row, rng):
    arguments = row.arguments(rng)
    for slope, formula in zip(row.slopes(arguments), row.exact_gradient(arguments), strict=True):
        assert slope.dtype == jnp.float32
        close(slope, formula, 10 * RTOL)


@pytest.mark.by_module
@HALF
def test_half_precision(row, rng):
    arguments = row.arguments(rng, dtype=jnp.bfloat16)
    result, slopes = results(row, arguments)
    assert result.dtype == jnp.float32
    close(result, row.exact(arguments), RTOL)
    for slope, formula in zip(slopes, row.exact_gradient(arguments) if row.smooth else (), strict=True):
        assert slope.dtype == jnp.bfloat16
        close(slope, formula, float(jnp.finfo(jnp.bfloat16).eps))  # rounded once
