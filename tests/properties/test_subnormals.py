"""Losses whose probabilities are subnormal numbers, which GPUs keep and CPUs replace by 0 (`tests/tables/subnormals.py`).

A label that leads by 88 to 103 nats leaves so little for the other classes that the reciprocal of their sum overflows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.properties.test_values import every_setting
from tests.tables import functions, subnormals
from tests.tables.rows import ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = float(np.finfo(np.float32).tiny)
LEADS = (86.0, 87.5, 89.0, 95.0, 101.0, 104.0, 120.0)


def ladder(rng, classes=7):
    """Rows in which one class leads the others, which are equal or spread, and labels on that class or on another one."""
    found = []
    for lead in LEADS:
        for others in (np.zeros(classes), -30 * rng.uniform(size=classes)):
            z = others - others.max()
            z[int(rng.integers(classes))] = lead
            found += [z, z]
    z = np.float32(found)
    best = z.argmax(-1)
    return jnp.asarray(z), jnp.asarray(np.where(np.arange(len(z)) % 2 == 0, best, (best + 1) % classes), jnp.int32)


def labels_of(case, kind, y, classes, rng):
    one_hot = np.eye(classes)[np.asarray(y)]
    if case.family == "top_k":
        ids = np.argsort(-one_hot, -1)[:, :3]
        return jnp.asarray(ids, jnp.int32), jnp.asarray(rng.dirichlet(np.ones(3), len(y)), jnp.float32)
    if case.family == "bits":
        return jnp.asarray(one_hot, jnp.int32 if kind == "index" else jnp.float32)
    return y if kind == "index" else jnp.asarray(0.9 * one_hot + 0.1 * rng.dirichlet(np.ones(classes), len(y)), jnp.float32)


@every_setting()
def test_value_and_gradient_are_those_without_subnormal_numbers(case, kind, rng):
    z, y = ladder(rng)
    z = z / 120 if case.inputs == "cosines" else z
    labels = labels_of(case, kind, y, z.shape[-1], rng)

    def both(z):
        return case(z, labels), jax.grad(lambda z: jnp.sum(case(z, labels)))(z)

    kept, flushed = subnormals.evaluate(both, z), jax.jit(both)(z)
    for with_them, without in zip(kept, flushed, strict=True):
        # CPUs replace each term of a sum by 0. A gradient that is a difference is as exact as the largest component of its row.
        size = np.max(np.abs(without), -1, keepdims=True) if without.ndim > 1 else np.abs(without)
        assert (np.abs(with_them - without) <= 1e-4 * np.abs(without) + 1e-6 * size + 1e4 * TINY).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_finite_where_finite_without_subnormal_numbers(row, rng):
    def extreme(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        probabilities = bool(jnp.all((x >= 0) & (x <= 1)))
        return x * jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 == 0, 1e-4 * TINY, 1) if probabilities else 30 * x

    arguments = tuple(map(extreme, row.arguments(rng)))
    kept = subnormals.evaluate(lambda *x: functions.results.__wrapped__(row, x), *arguments)
    for with_them, without in zip(*map(jax.tree.leaves, (kept, functions.results(row, arguments))), strict=True):
        assert np.isfinite(with_them[np.isfinite(without)]).all()


def test_subnormal_numbers_are_kept():
    result = subnormals.evaluate(lambda x: (jnp.exp(x), 1 / jnp.exp(x)), jnp.float32(-95))
    assert 0 < result[0] < TINY and np.isinf(result[1])
