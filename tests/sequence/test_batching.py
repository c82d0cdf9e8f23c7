"""Sequences one at a time, in a batch, and under vmap over lengths and over the scores of a conditional random field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.sequence import oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
TIME, MOST, CLASSES = 4, 2, 3
STEPS, COUNTS = np.array([4, 3, 2, 4]), np.array([2, 1, 0, 0])
LABELS = np.array([1, 2])
REORDERED = 32  # eps: of sums of about 12 terms, in another order


def _tdt(z, y, **lengths):
    return xentjax.tdt_loss(z[..., :CLASSES], z[..., CLASSES:], y, durations=(0, 1, 2), **lengths)


LOSSES = {
    "ctc": (xentjax.ctc_loss, (TIME, CLASSES), lambda z, t, u: z[:t]),
    "transducer": (xentjax.transducer_loss, (TIME, MOST + 1, CLASSES), lambda z, t, u: z[:t, : u + 1]),
    "tdt": (_tdt, (TIME, MOST + 1, CLASSES + 3), lambda z, t, u: z[:t, : u + 1]),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LOSSES)
def test_lengths_under_vmap(name, rng):
    """One array of logits with several lengths: traced lengths under vmap equal the batch, and each sequence cut to its length."""
    loss, shape, cut = LOSSES[name]
    z = jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch = [jnp.broadcast_to(x, (len(STEPS), *x.shape)) for x in (z, jnp.asarray(LABELS))]

    def of_lengths(t, u):
        return jax.value_and_grad(lambda z: loss(z, LABELS, logit_lengths=t, label_lengths=u))(z)

    value, slope = jax.jit(jax.vmap(of_lengths))(STEPS, COUNTS)
    together = jax.jit(lambda z, t, u: loss(z, batch[1], logit_lengths=t, label_lengths=u))(batch[0], STEPS, COUNTS)
    np.testing.assert_allclose(value, together, rtol=REORDERED * EPS)
    for i, (t, u) in enumerate(zip(STEPS.tolist(), COUNTS.tolist(), strict=True)):
        alone, of_alone = jax.value_and_grad(lambda z, u=u: loss(z, LABELS[:u]))(cut(z, t, u))
        np.testing.assert_allclose(value[i], alone, rtol=REORDERED * EPS)
        np.testing.assert_allclose(cut(slope[i], t, u), of_alone, atol=REORDERED * EPS)
        np.testing.assert_allclose(np.abs(slope[i]).sum(), np.abs(of_alone).sum(), rtol=REORDERED * EPS)  # 0 after the end


def test_scores_of_a_conditional_random_field_under_vmap(rng):
    unary, y = jnp.asarray(rng.normal(size=(TIME, CLASSES)), jnp.float32), np.array([0, 2, 1, 1])
    scores = tuple(jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32) for shape in ((CLASSES, CLASSES), (CLASSES,), (CLASSES,)))

    def of_scores(w, start, end):
        return jax.value_and_grad(lambda *x: xentjax.crf_loss(unary, y, x[0], start=x[1], end=x[2]), (0, 1, 2))(w, start, end)

    values, slopes = jax.jit(jax.vmap(of_scores))(*scores)
    of_end, _ = jax.jit(jax.vmap(of_scores, in_axes=(None, None, 0)))(scores[0][0], scores[1][0], scores[2])
    for i in range(3):
        loss, gradients, *_ = oracle.crf(unary, y, *(np.asarray(x[i]) for x in scores))
        np.testing.assert_allclose(values[i], loss, rtol=REORDERED * EPS)
        for x, gradient in zip(slopes, gradients[1:], strict=True):
            np.testing.assert_allclose(x[i], gradient, atol=REORDERED * EPS)
        np.testing.assert_allclose(of_end[i], oracle.crf(unary, y, scores[0][0], scores[1][0], scores[2][i])[0], rtol=REORDERED * EPS)
