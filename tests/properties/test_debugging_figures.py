"""What is computed from sums of metrics makes no NaN and no float64. `quick_compilation` takes a minute for the area under a curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from xentjax import metrics


def figures():
    """What is computed from sums and fitted, with one example hidden."""
    z, y = jnp.asarray(np.random.default_rng(1).normal(size=(5, 7)), jnp.float32), jnp.array([0, -100, 2, 1, 0])
    where, bits = y >= 0, jnp.clip(y, -100, 1)
    bins = metrics.calibration(z, y, where=where, bins=4)
    yield from (bins.accuracy(), bins.confidence(), bins.expected_calibration_error(), bins.maximum_calibration_error())
    counts = metrics.confusion(z.argmax(-1), y, classes=7, where=where)
    yield from (counts.accuracy(), counts.balanced_accuracy(), counts.precision(), counts.recall(), counts.f1())
    yield metrics.ranking(jax.nn.sigmoid(z[:, 0]), bits, where=where).auroc()
    yield metrics.auroc(z[:, 0], bits, where=where)
    yield metrics.fit_temperature(z, y, where=where)
    yield metrics.perplexity(xentjax.weighted_sum(z, where=z > 9))
    yield xentjax.weighted_mean(z, where=z > 9)
    yield from (xentjax.class_balanced_weights(jnp.array([3, 0])), xentjax.inverse_frequency_weights(jnp.array([3, 0])))


@pytest.mark.exhaustive
def test_figures_make_no_nan(debug_nans):
    assert all(np.isfinite(x).all() for x in figures())


@pytest.mark.exhaustive
def test_figures_of_float32_with_x64(x64):
    assert all(x.dtype == jnp.float32 for x in figures())
