"""Finite logits of any size give the right loss, and only −∞ is infinite, whatever its weight."""

import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.tables import cases
from tests.tables import reference as ref

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = 2.0**-23
# The z-loss is a square, which is not representable. Cosines are at most 1.
HUGE = [c for c in cases.LOSSES if c.inputs == "logits" and "z_loss" not in c.formula]


@pytest.mark.parametrize("case", HUGE, ids=str)
def test_huge_logits(case, rng):
    for kind in case.kinds:
        z, labels = case.draw(rng, (5,), kind=kind)
        for size in (1e25, 1e30, 1e34):
            huge = jnp.asarray(np.float64(z) / 3 * size, jnp.float32)
            for found, exact in zip(cases.evaluate(case, huge, labels), case.exact(ref.Exact, huge, labels), strict=True):
                # 64 eps: a sum of seven products, each of up to eight roundings; gradients are differences of probabilities
                np.testing.assert_allclose(found, exact.astype(float), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("weight", [0.5, 1e-8, 1e-20])
def test_a_small_weight_of_an_impossible_class_costs_infinity(weight):
    z, t = jnp.array([-jnp.inf, 1.0, 1e30]), jnp.array([weight, 0.0, 1 - weight])
    w = jnp.array([weight, 1.0, 1.0])
    for loss in (
        xentjax.softmax_cross_entropy(z, t),
        xentjax.softmax_focal_loss(z, t),
        xentjax.softmax_cross_entropy(z, 0, class_weights=w),
        xentjax.softmax_cross_entropy(z, 2, label_smoothing=weight),
        xentjax.softmax_cross_entropy_with_top_k_labels(z, jnp.arange(3), t),
        xentjax.sigmoid_cross_entropy(-jnp.inf, weight),
        xentjax.sigmoid_focal_loss(-jnp.inf, weight),
    ):
        assert loss == np.inf
