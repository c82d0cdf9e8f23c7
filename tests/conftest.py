"""Eight CPU devices, strict dtype promotion and no rank promotion for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

from tests import drawing

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--randomize", type=int, metavar="N", help="let each hypothesis test draw N new examples; without it every run draws the same ones"
    )


def pytest_configure(config):
    drawing.number = config.getoption("--randomize")
    hypothesis.settings.register_profile("xentjax", deadline=None, derandomize=drawing.number is None)  # a new shape compiles a program
    hypothesis.settings.load_profile("xentjax")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65,530: without this, XLA crashes after some 1,500 tests."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """LLVM without its optimisations, in half the time, for modules about formulas and structure.

    XLA's own passes (fusion, simplification) stay. Modules about accuracy, memory and what programs look like do not ask for this.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(2026)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
