"""Rows of `overlap.py` and `detection.py`: sums over the pixels of small images, written from the definitions of the papers."""

import functools

import jax.numpy as jnp
import numpy as np
import scipy.special

from tests.tables.functions import Row
from xentjax._losses import detection, overlap

CLASSES = 4
PIXELS = (2, 3)


def draw(rng, leading, soft=False, rest=()):
    """The last image has class 0 alone."""
    z = rng.normal(size=(*leading, *PIXELS, CLASSES)) * 2
    labels = rng.dirichlet(np.ones(CLASSES), (*leading, *PIXELS)) if soft else rng.integers(0, CLASSES, (*leading, *PIXELS))
    if leading and leading[0] and not soft:
        labels[-1] = 0
    return z, labels, *map(np.asarray, rest)


def given(logits, labels):
    """p and t [..., pixels, classes], both of all pixels in a row."""
    p = scipy.special.softmax(logits, -1)
    t = labels if labels.dtype.kind == "f" else np.eye(CLASSES)[labels]
    shape = (*p.shape[:-3], PIXELS[0] * PIXELS[1], CLASSES)
    return p.reshape(shape), t.reshape(shape)


def counts(p, t, squared=False):
    """The intersection, the size of the prediction, and the size of the label. For soft labels, the intersection is Σ min(p, t)."""
    if squared:
        return (p * t).sum(-2), (p**2).sum(-2), (t**2).sum(-2)
    return np.minimum(p, t).sum(-2), p.sum(-2), t.sum(-2)


def slopes(p, t, squared=False):
    """The derivatives of the first two counts in p."""
    return (t, 2 * p) if squared else (np.where(p < t, 1.0, 0.0), np.ones_like(p))


def in_logits(p, slope, like):
    """The gradient by the logits of Σ loss, from the derivative of each loss by its own probabilities."""
    return (p * (slope - (p * slope).sum(-1, keepdims=True))).reshape(like.shape)


def one_minus(top, bottom):
    return 1 - top / bottom


def quotient_slope(top, bottom, d_top, d_bottom):
    """The derivative of 1 − top/bottom."""
    top, bottom = top[..., None, :], bottom[..., None, :]
    return (top * d_bottom - d_top * bottom) / bottom**2


def dice(logits, labels, smooth=0.0, squared=False):
    both, prediction, label = counts(*given(logits, labels), squared)
    return one_minus(2 * both + smooth, prediction + label + smooth)


def dice_gradient(logits, labels, smooth=0.0, squared=False):
    p, t = given(logits, labels)
    both, prediction, label = counts(p, t, squared)
    d_both, d_prediction = slopes(p, t, squared)
    slope = quotient_slope(2 * both + smooth, prediction + label + smooth, 2 * d_both, d_prediction)
    return (in_logits(p, slope, logits),)


def jaccard(logits, labels, smooth=0.0, squared=False):
    both, prediction, label = counts(*given(logits, labels), squared)
    return one_minus(both + smooth, prediction + label - both + smooth)


def jaccard_gradient(logits, labels, smooth=0.0, squared=False):
    p, t = given(logits, labels)
    both, prediction, label = counts(p, t, squared)
    d_both, d_prediction = slopes(p, t, squared)
    slope = quotient_slope(both + smooth, prediction + label - both + smooth, d_both, d_prediction - d_both)
    return (in_logits(p, slope, logits),)


def tversky(logits, labels, alpha, beta, gamma, smooth):
    both, prediction, label = counts(*given(logits, labels))
    return one_minus(both + smooth, both + alpha * (prediction - both) + beta * (label - both) + smooth) ** gamma


def jaccard_of_mistakes(t, mistakes):
    """The Jaccard loss of a hard prediction that is wrong in the given pixels; pixels of soft labels belong to the class in part."""
    hit, union = sum(t) - sum(t[i] for i in mistakes), sum(t) + sum(1 - t[i] for i in mistakes)
    return 1 - hit / union if union else 0.0


def extension(errors, t):
    """The Lovász extension of `jaccard_of_mistakes`, and its derivative by each error. Both are [pixels]."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    slope = np.zeros(len(errors))
    for i, pixel in enumerate(order):
        slope[pixel] = jaccard_of_mistakes(t, order[: i + 1]) - jaccard_of_mistakes(t, order[:i])
    return errors @ slope, slope


def over_images(run, errors, t):
    """`run` for every image and class: its results [..., classes] and [..., pixels, classes]."""
    value, slope = np.zeros(errors.shape[:-2] + errors.shape[-1:]), np.zeros(errors.shape)
    for *image, k in np.ndindex(value.shape):
        value[*image, k], slope[*image, :, k] = run(errors[*image, :, k], t[*image, :, k])
    return value, slope


def lovasz_softmax(logits, labels):
    p, t = given(logits, labels)
    return over_images(extension, np.abs(p - t), t)[0]


def lovasz_softmax_gradient(logits, labels):
    p, t = given(logits, labels)
    return (in_logits(p, over_images(extension, np.abs(p - t), t)[1] * np.sign(p - t), logits),)


def hinge(logits, labels):
    """The extension of the hinge errors, its derivative by each error, and the signs, all with one class."""
    shape = (*logits.shape[:-2], PIXELS[0] * PIXELS[1], 1)
    sign = np.where(labels == 1, 1.0, -1.0)
    errors = np.maximum(1 - sign * logits, 0).reshape(shape)
    return *over_images(extension, errors, (labels == 1).reshape(shape) * 1.0), sign.reshape(shape)


def lovasz_hinge(logits, labels):
    return hinge(logits, labels)[0][..., 0]


def lovasz_hinge_gradient(logits, labels):
    _, slope, sign = hinge(logits, labels)
    inside = sign.reshape(logits.shape) * logits < 1
    return (np.where(inside, -(slope * sign).reshape(logits.shape), 0),)


def draw_hinge(rng, leading):
    return rng.normal(size=(*leading, *PIXELS)) * 2, rng.integers(0, 2, (*leading, *PIXELS))


def boundary(logits, distances):
    return np.mean(scipy.special.softmax(logits, -1) * distances, axis=(-3, -2))


def boundary_gradient(logits, distances):
    p, pixels = scipy.special.softmax(logits, -1), PIXELS[0] * PIXELS[1]
    return p * (distances - (p * distances).sum(-1, keepdims=True)) / pixels, p / pixels


def draw_boundary(rng, leading):
    return tuple(rng.normal(size=(*leading, *PIXELS, CLASSES)) * 2 for _ in range(2))


BINS = 6


def distribution_focal(logits, targets):
    log_p = scipy.special.log_softmax(logits, -1)
    low = np.minimum(np.floor(targets).astype(int), BINS - 2)
    left, right = (np.take_along_axis(log_p, (low + i)[..., None], -1)[..., 0] for i in (0, 1))
    return -((low + 1 - targets) * left + (targets - low) * right)


def distribution_focal_gradient(logits, targets):
    log_p = scipy.special.log_softmax(logits, -1)
    low = np.floor(targets).astype(int)
    t = (low + 1 - targets)[..., None] * np.eye(BINS)[low] + (targets - low)[..., None] * np.eye(BINS)[low + 1]
    in_targets = [np.take_along_axis(log_p, (low + i)[..., None], -1)[..., 0] for i in (0, 1)]
    return np.exp(log_p) - t, in_targets[0] - in_targets[1]


def draw_distances(rng, leading):
    return rng.normal(size=(*leading, BINS)) * 2, rng.uniform(0, BINS - 1, leading)


def of_images(function, *names, classes=True):
    """`function` with the arguments after the first two as keywords of these names, and with a mask of the shape of its result.

    The mask has whole images. `test_overlap.py` has masks of pixels.
    """

    def run(logits, other, *rest, where=None, **keywords):
        if where is not None:
            images = where[..., 0] if classes else where
            where = jnp.broadcast_to(images[..., None, None], (*images.shape, *PIXELS))
        return function(logits, other, **dict(zip(names, rest, strict=True)), where=where, **keywords)

    return run


def of(name, value, gradient, label="", soft=False, positions=(0,), **keywords):
    """A row of a loss of regions."""
    return Row(
        name,
        of_images(getattr(overlap, name)),
        functools.partial(draw, soft=soft),
        functools.partial(value, **keywords),
        positions,
        gradient and functools.partial(gradient, **keywords),
        keywords=keywords,
        label=label,
    )


ROWS: tuple[Row, ...] = (
    of("dice_loss", dice, dice_gradient),
    of("dice_loss", dice, None, "soft", soft=True, positions=(0, 1), smooth=0.5),
    of("dice_loss", dice, dice_gradient, "squared", squared=True, smooth=1.5),
    of("jaccard_loss", jaccard, jaccard_gradient),
    of("jaccard_loss", jaccard, jaccard_gradient, "soft", soft=True),
    of("jaccard_loss", jaccard, None, "soft-squared", soft=True, positions=(0, 1), squared=True),
    Row(
        "tversky_loss",
        of_images(overlap.tversky_loss, "alpha", "beta", "gamma", "smooth"),
        functools.partial(draw, rest=(0.3, 0.7, 0.75, 0.5)),
        tversky,
        (0, 2, 3, 4, 5),
    ),
    of("lovasz_softmax_loss", lovasz_softmax, lovasz_softmax_gradient),
    of("lovasz_softmax_loss", lovasz_softmax, lovasz_softmax_gradient, "soft", soft=True),
    Row("lovasz_hinge_loss", of_images(overlap.lovasz_hinge_loss, classes=False), draw_hinge, lovasz_hinge, (0,), lovasz_hinge_gradient),
    Row("boundary_loss", of_images(overlap.boundary_loss), draw_boundary, boundary, (0, 1), boundary_gradient),
    Row(
        "distribution_focal_loss",
        detection.distribution_focal_loss,
        draw_distances,
        distribution_focal,
        (0, 1),
        distribution_focal_gradient,
    ),
)
