"""Contrastive losses and their derivatives do not depend on the order of examples, on chunks, or on examples that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.families import test_contrastive
from tests.families.test_contrastive import LABELS, close, derivatives, draw, every_loss, names
from tests.tables import table_contrastive as rows
from xentjax._contrastive import losses as contrastive

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.exhaustive
@names
def test_permuted_examples_have_permuted_losses(name, rng, x64, monkeypatch):
    loss, (x, y) = every_loss()[name], draw(rng)

    def run(x, y):
        return jax.jit(lambda x, y: derivatives(loss, x, y)[:2])(
            x, y
        )  # a new program each time, because LABELS are constants of the program

    value, slope = run(x, y)
    order = rng.permutation(len(x))
    monkeypatch.setattr(test_contrastive, "LABELS", LABELS[order])
    close(run(x[order], y[order]), (value[order], tuple(s[order] for s in slope)), 1e-12)


@pytest.mark.exhaustive
@names
def test_chunks_equal_the_whole(name, rng, x64):
    pairs = draw(rng)
    where = jnp.arange(12) % 5 != 2

    def of(chunk_size):
        loss = every_loss(chunk_size=chunk_size)[name]
        return jax.jit(lambda x, y: derivatives(lambda x, y: loss(x, y, where), x, y))(*pairs)

    whole = of(None)
    for chunk_size in (1, 5):
        close(of(chunk_size), whole, 1e-12)


@pytest.mark.exhaustive
@names
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_examples_that_do_not_count_have_no_effect(name, chunk_size, rng, x64, monkeypatch):
    loss, (x, y) = every_loss(chunk_size=chunk_size)[name], draw(rng)
    where = jnp.asarray(rng.permutation(12) < 8).at[0].set(False)
    kept = np.flatnonzero(where)
    bad = jnp.where(where[:, None], x, jnp.nan), jnp.where(where[:, None], y, -jnp.inf)
    run = jax.jit(lambda x, y, where: derivatives(lambda x, y: loss(x, y, where), x, y)[:2])
    found = run(*bad, where)
    monkeypatch.setattr(test_contrastive, "LABELS", LABELS[kept])
    alone = jax.jit(lambda x, y: derivatives(loss, x, y)[:2])(x[kept], y[kept])
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        close(got[kept], expected, 1e-12)
        assert not np.delete(got, kept, axis=0).any()
    assert not any(np.any(v) for v in jax.tree.leaves(run(*bad, jnp.zeros_like(where))))


@pytest.mark.exhaustive
def test_additional_negatives(rng, x64):
    x, y = draw(rng)
    more, _ = draw(rng, batch=7)
    where = jnp.arange(12) != 4
    for chunk_size in (None, 3):

        def loss(more, x=x, where=where, chunk_size=chunk_size):
            return contrastive.info_nce(x, y, negatives=more, where=where, chunk_size=chunk_size, temperature=0.5)

        close(loss(more, where=None), rows.with_negatives(*(rows.unit(np.asarray(v)) for v in (x, y, more)), 0.5), 1e-12)
        spoilt = x.at[4].set(jnp.nan)
        kept = np.flatnonzero(where)
        expected = rows.with_negatives(*(rows.unit(np.asarray(v)) for v in (x[kept], y[kept], more)), 0.5)
        close(loss(more, x=spoilt)[kept], expected, 1e-12)
        assert jax.grad(lambda m, loss=loss, x=spoilt: loss(m, x=x).sum())(more).all()
    close(contrastive.info_nce(x, y, negatives=more[:0]), contrastive.info_nce(x, y), 1e-14)
