"""Measurements: `python -m benchmarks NAME`. Times are ratios taken in one process, because machines differ and are shared."""
