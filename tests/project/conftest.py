"""JAX as a reader has it, for the code that readers copy."""

import jax
import pytest


@pytest.fixture
def standard_promotion():
    """The default promotion of dtypes and ranks, which examples and optax need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
