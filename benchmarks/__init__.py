"""Measurements: `python -m benchmarks NAME`. Times are ratios taken in one process, because machines differ and are shared."""

import os

# Before JAX starts: on a GPU it would take three quarters of the memory at once and leave torch, in the same process, the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
