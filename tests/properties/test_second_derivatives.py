"""Second derivatives, in every mode and through loops, equal differences of the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.properties.test_values import each_kind
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")
DIFFERENTIABLE = [case for case in cases.LOSSES if case.differentiable]  # the others' gradients hold something constant


def steepness(case):
    """What multiplies the error of differences: a scale of 30 or 64 enters it with its fourth power."""
    return case.tolerance**4 if case.inputs == "cosines" else 1


@pytest.mark.by_module
@each_kind(DIFFERENTIABLE)
def test_hessian_against_differences_of_the_closed_form(case, kind, rng, x64):
    z, labels = case.draw(rng, (), dtype=jnp.float64, kind=kind)
    step = 1e-5
    base = np.asarray(z)

    def slope(x):
        return case.exact(ref.Double, x, labels)[1]

    numeric = np.stack([(slope(base + step * e) - slope(base - step * e)) / (2 * step) for e in np.eye(z.size)])

    def total(z):
        return case(z, labels).sum()

    v = jnp.asarray(rng.normal(size=z.shape))

    @jax.jit
    def everything(z):
        forward_over_reverse = jax.jvp(jax.grad(total), (z,), (v,))[1]
        reverse_over_reverse = jax.grad(lambda z: jnp.vdot(jax.grad(total)(z), v))(z)
        reverse_over_forward = jax.grad(lambda z: jax.jvp(total, (z,), (v,))[1])(z)
        return jax.hessian(total)(z), (forward_over_reverse, reverse_over_reverse, reverse_over_forward)

    hessian, products = everything(z)
    # central differences: error step²·f''''/6 ≈ 1e-10 · O(10), and rounding eps/step ≈ 1e-11
    steep = steepness(case)
    np.testing.assert_allclose(hessian, numeric, rtol=1e-7, atol=steep * 2e-8)
    for product in products:
        np.testing.assert_allclose(product, numeric @ np.asarray(v), rtol=1e-7, atol=steep * 2e-7)


def inside_scan(case, labels):
    """Σ of the losses of examples [3, 4, ...], taken one after another in a loop."""

    def step(total, example):
        return total + case(*example).sum(), None

    return lambda z: jax.lax.scan(step, jnp.zeros((), jax.eval_shape(lambda *x: case(*x), z, labels).dtype), (z, labels))[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(c, k, id=f"{c}-{k}")
        for c in DIFFERENTIABLE
        for k in c.kinds
        if c.thorough and (c not in cases.FAMILIES or k == "index")
    ],
)
def test_second_derivatives_through_a_scan(case, kind, rng, x64):
    # jax.lax.scan differentiates the code of a rule's function where it was to use the rule: that code must be right as well
    z, labels = case.draw(rng, (3, 4), dtype=jnp.float64, kind=kind)
    direction = jnp.asarray(rng.normal(size=z.shape))
    step = 1e-5

    def slope(x):
        return case.exact(ref.Double, x, labels)[1]

    numeric = (slope(np.asarray(z + step * direction)) - slope(np.asarray(z - step * direction))) / (2 * step)
    looped = inside_scan(case, labels)

    @jax.jit
    def products(z):
        forward = jax.jvp(jax.grad(looped), (z,), (direction,))[1]
        if case in cases.FAMILIES:
            return (forward,)
        return forward, jax.grad(lambda z: jnp.vdot(jax.grad(looped)(z), direction))(z)

    for product in products(z):
        np.testing.assert_allclose(
            product, numeric, rtol=1e-7, atol=steepness(case) * 1e-7
        )  # differences in float64, several directions at once


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "kind"),
    [pytest.param(c, c.kinds[i % len(c.kinds)], id=str(c)) for i, c in enumerate(DIFFERENTIABLE) if c.thorough and c.inputs == "logits"],
)
def test_second_derivatives_of_half_precision_through_a_scan(case, kind, rng):
    # The code behind a rule works on the bits of half precision, which have no derivative of their own.
    z, labels = case.draw(rng, (3, 4), dtype=jnp.bfloat16, kind=kind)
    direction = jnp.ones_like(z).at[..., 0].set(-1)
    step = 1e-5

    def slope(x):
        return case.exact(ref.Double, x, labels)[1]

    exact, along = np.asarray(z, np.float64), np.asarray(direction, np.float64)
    numeric = (slope(exact + step * along) - slope(exact - step * along)) / (2 * step)
    looped = inside_scan(case, labels)
    product = jax.jit(lambda z: jax.jvp(jax.grad(looped), (z,), (direction,))[1])(z)
    # Products and their sum are rounded to half precision a few times, relative to the largest of a row.
    np.testing.assert_allclose(np.asarray(product, np.float64), numeric, rtol=2**-6, atol=2**-6 * np.abs(numeric).max())
