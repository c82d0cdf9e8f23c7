"""The examples of rankings run. Their running sums would take the code generator of `quick_compilation` minutes."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.project import pages, test_pages, test_public
from xentjax import metrics


def test_the_examples_of_the_docstrings_run():
    assert test_public.failed_examples("xentjax.metrics._ranking") == 0


@pytest.mark.usefixtures("standard_promotion")
def test_the_examples_of_the_page_run():
    assert pages.names_of(pages.ROOT / "docs" / "metrics.md")


def test_the_call_of_the_page_runs():
    (call,) = (call for call in test_pages.CALLS if test_pages.RANKING in call)
    assert np.isfinite(eval(call, {"metrics": metrics, "x": jnp.arange(4.0) - 2, "labels": jnp.array([1, 3, 2, 3])}))
