"""Values and gradients equal those of MONAI and optax, with the calls of `docs/regions-and-boxes.md`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xentjax

SHAPES = (2, 4, 5, 3), (1, 8, 8, 4), (3, 3, 2, 6)
ROUNDED = 1e-13  # sums of up to 64 terms in float64
SQUARED = 1e-7  # MONAI rounds the norm of the labels to float32

# the loss of MONAI, its keywords, the loss of xentjax, and the relative tolerance
MONAI = {
    "dice": ("DiceLoss", {}, lambda z, y: xentjax.dice_loss(z, y, smooth=1e-5).mean(), ROUNDED),
    "no background": (
        "DiceLoss",
        {"include_background": False},
        lambda z, y: xentjax.dice_loss(z, y, smooth=1e-5)[..., 1:].mean(),
        ROUNDED,
    ),
    "squared": ("DiceLoss", {"squared_pred": True}, lambda z, y: xentjax.dice_loss(z, y, smooth=1e-5, squared=True).mean(), SQUARED),
    "jaccard": ("DiceLoss", {"jaccard": True}, lambda z, y: xentjax.jaccard_loss(z, y, smooth=0.5e-5).mean(), ROUNDED),
    "tversky": (
        "TverskyLoss",
        {"alpha": 0.3, "beta": 0.7},
        lambda z, y: xentjax.tversky_loss(z, y, alpha=0.3, beta=0.7, smooth=1e-5).mean(),
        ROUNDED,
    ),
}


def draw(rng, shape):
    """The last class is absent from the labels."""
    return rng.normal(size=shape) * 2, rng.integers(0, shape[-1] - 1, shape[:-1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MONAI)
def test_monai(name, rng, x64):
    torch, losses = pytest.importorskip("torch"), pytest.importorskip("monai.losses")
    theirs, keywords, ours, tolerance = MONAI[name]
    for shape in SHAPES:
        z, y = draw(rng, shape)
        logits = torch.tensor(np.moveaxis(z, -1, 1).copy(), requires_grad=True)
        expected = getattr(losses, theirs)(softmax=True, to_onehot_y=True, **keywords)(logits, torch.tensor(y)[:, None])
        expected.backward()
        found, slope = jax.value_and_grad(ours)(jnp.asarray(z), jnp.asarray(y))
        gradient = np.moveaxis(logits.grad.numpy(), 1, -1)
        np.testing.assert_allclose(found, expected.item(), rtol=tolerance)
        np.testing.assert_allclose(slope, gradient, atol=tolerance * np.abs(gradient).max())


@pytest.mark.parametrize("background", [True, False])
def test_optax(background, rng, x64):
    def theirs(z, y):
        return optax.losses.dice_loss(z, jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype), ignore_background=not background)

    def ours(z, y):
        return xentjax.tversky_loss(z, y, smooth=1.0)[..., 0 if background else 1 :].mean(-1)

    z, y = map(jnp.asarray, draw(rng, SHAPES[0]))
    for loss in (ours, lambda z, y: xentjax.dice_loss(z, y, smooth=2.0)[..., 0 if background else 1 :].mean(-1)):
        np.testing.assert_allclose(loss(z, y), theirs(z, y), rtol=ROUNDED)
        expected = jax.grad(lambda z: theirs(z, y).sum())(z)
        np.testing.assert_allclose(jax.grad(lambda z, loss=loss: loss(z, y).sum())(z), expected, atol=ROUNDED * np.abs(expected).max())
