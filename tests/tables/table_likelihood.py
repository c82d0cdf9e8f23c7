"""Rows of `likelihood.py` and `ordinal.py`: densities and probabilities written from their definitions."""

import functools

import numpy as np
import scipy.special
import scipy.stats

from tests.tables.functions import Row
from xentjax._losses import likelihood, ordinal

CLASSES = 7


def gaussian(mean, targets, log_variance):
    return -scipy.stats.norm.logpdf(targets, mean, np.exp(log_variance / 2))


def laplace(mean, targets, log_scale):
    return -scipy.stats.laplace.logpdf(targets, mean, np.exp(log_scale))


def poisson(log_rate, targets):
    return np.exp(log_rate) - targets * log_rate + scipy.special.gammaln(targets + 1)


def poisson_gradient(log_rate, targets):
    return np.exp(log_rate) - targets, scipy.special.digamma(targets + 1) - log_rate


def sigmoid(x):
    return scipy.special.expit(x)


def mixture(logits, targets, means, log_scales, levels=256):
    """Naive: float64 has the digits that the difference of two sigmoids loses."""
    step = 2 / (levels - 1)
    x = np.clip(targets if targets.dtype.kind == "f" else -1 + step * targets, -1, 1)[..., None]
    above = np.where(x > 1 - step / 2, 1, sigmoid((x + step / 2 - means) * np.exp(-log_scales)))
    below = np.where(x < -1 + step / 2, 0, sigmoid((x - step / 2 - means) * np.exp(-log_scales)))
    return -np.log(np.sum(scipy.special.softmax(logits, -1) * (above - below), -1)) if x.size else np.zeros(x.shape[:-1])


def cumulative_link(scores, labels, thresholds):
    ends = np.concatenate([[-np.inf], thresholds, [np.inf]])
    return -np.log(sigmoid(ends[labels + 1] - scores) - sigmoid(ends[labels] - scores))


def coral(logits, labels):
    above = labels[..., None] > np.arange(logits.shape[-1])
    return -np.sum(np.log(np.where(above, sigmoid(logits), sigmoid(-logits))), -1)


def coral_gradient(logits, labels):
    return (sigmoid(logits) - (labels[..., None] > np.arange(logits.shape[-1])),)


def draw_real(rng, leading):
    """Residuals of one sign each, away from the kink of |x − μ|."""
    mean = rng.normal(size=leading)
    return mean, mean + rng.choice([-1, 1], leading) * rng.uniform(0.5, 3, leading), rng.normal(size=leading)


def draw_positive(rng, leading):
    mean, targets, spread = draw_real(rng, leading)
    return mean, targets, np.exp(spread)


def draw_counts(rng, leading):
    return rng.normal(size=leading) * 2, rng.uniform(0.5, 30, leading)


def draw_whole_counts(rng, leading):
    return rng.normal(size=leading) + 2, rng.integers(0, 40, leading)


def draw_mixture(rng, leading, levels=None):
    """Whole levels, the two ends among them, or values between the ends and beyond them."""
    shape = (*leading, 3)
    targets = rng.uniform(-2, 2, leading) if levels is None else rng.choice([0, 1, levels // 2, levels - 1], leading)
    return rng.normal(size=shape), targets, rng.normal(size=shape) / 2, rng.normal(size=shape) / 2 - 1.5


def draw_ordinal(rng, leading):
    thresholds = np.arange(CLASSES - 1) - 2.5 + rng.uniform(-0.3, 0.3, CLASSES - 1)
    return rng.normal(size=leading) * 2, rng.integers(0, CLASSES, leading), thresholds


def draw_coral(rng, leading):
    return rng.normal(size=(*leading, CLASSES - 1)) * 2, rng.integers(0, CLASSES, leading)


def route(function, *names):
    """`function` with the arguments after the first two as keywords of these names."""
    return lambda first, second, *rest, **keywords: function(first, second, **dict(zip(names, rest, strict=True)), **keywords)


_MIXTURE = route(likelihood.mixture_of_logistics_nll, "means", "log_scales")

ROWS: tuple[Row, ...] = (
    Row("gaussian_nll", route(likelihood.gaussian_nll, "log_variance"), draw_real, gaussian, (0, 1, 2), label="log"),
    Row(
        "gaussian_nll",
        route(likelihood.gaussian_nll, "variance"),
        draw_positive,
        lambda mean, x, v: gaussian(mean, x, np.log(v)),
        (0, 1, 2),
    ),
    Row("laplace_nll", route(likelihood.laplace_nll, "log_scale"), draw_real, laplace, (0, 1, 2), label="log"),
    Row(
        "laplace_nll",
        route(likelihood.laplace_nll, "scale"),
        draw_positive,
        lambda mean, x, b: laplace(mean, x, np.log(b)),
        (0, 1, 2),
    ),
    Row("poisson_nll", likelihood.poisson_nll, draw_counts, poisson, (0, 1), poisson_gradient),
    Row("poisson_nll", likelihood.poisson_nll, draw_whole_counts, poisson, label="whole"),
    Row("mixture_of_logistics_nll", _MIXTURE, draw_mixture, mixture, (0, 1, 2, 3)),
    Row(
        "mixture_of_logistics_nll",
        _MIXTURE,
        functools.partial(draw_mixture, levels=16),
        functools.partial(mixture, levels=16),
        (0, 2, 3),
        keywords={"levels": 16},
        label="levels",
    ),
    Row("cumulative_link_loss", route(ordinal.cumulative_link_loss, "thresholds"), draw_ordinal, cumulative_link, (0, 2)),
    Row("coral_loss", ordinal.coral_loss, draw_coral, coral, (0,), coral_gradient),
)
