"""Rows of `xentjax.information`: every function of probabilities with its definition, and its twin of logits as that of the softmax."""

import functools

import numpy as np

from tests.tables.functions import Row
from xentjax import information


def softmax(z, axes=(-1,)):
    e = np.exp(z - np.max(z, axes, keepdims=True, initial=-np.inf))
    return e / e.sum(axes, keepdims=True)


def entropy(p):
    return -np.sum(p * np.log(p), -1)


def cross_entropy(p, q):
    return -np.sum(p * np.log(q), -1)


def kl_divergence(p, q):
    return np.sum(p * np.log(p / q) - p + q, -1)


def js_divergence(p, q):
    m = (p + q) / 2
    return np.sum(p * np.log(p / m) + q * np.log(q / m), -1) / 2


def renyi_divergence(p, q, alpha):
    if alpha == 1:
        return kl_divergence(p, q)
    w = p.sum(-1)
    return w * np.log(np.sum(p**alpha * q ** (1 - alpha), -1) / w) / (alpha - 1) - w + q.sum(-1)


def conditional_entropy(joint):
    return -np.sum(joint * np.log(joint / joint.sum(-1, keepdims=True)), (-1, -2))


def mutual_information(joint):
    product = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    return np.sum(joint * np.log(joint * joint.sum((-1, -2), keepdims=True) / product), (-1, -2))


def probabilities(rng, leading, several=1, shape=(4,)):
    """Sums between 1 and 1.5: the formulas are those of measures."""
    axes = tuple(range(-len(shape), 0))
    drawn = (rng.uniform(0.2, 1, (*leading, *shape)) for _ in range(several))
    return tuple(rng.uniform(1, 1.5, (*leading, *(1,) * len(shape))) * x / x.sum(axes, keepdims=True) for x in drawn)


def logits(rng, leading, several=1, shape=(4,)):
    return tuple(rng.normal(size=(*leading, *shape)) for _ in range(several))


def self_information(p):
    return -np.log(p)


def per_class(rng, leading):
    return (rng.uniform(0.05, 0.6, leading),)


def twins(name, value, several=1, shape=(4,), draw=None, label="", **keywords):
    """The row of probabilities and that of logits; `base` belongs to both, and what else there is to `value` too."""
    more = {k: v for k, v in keywords.items() if k != "base"}
    unit, axes = np.log(keywords.get("base", np.e)), tuple(range(-len(shape), 0))

    def of_probabilities(*p):
        return value(*p, **more) / unit

    def of_logits(*z):
        return of_probabilities(*(softmax(x, axes) for x in z))

    parts = {"several": several, "shape": shape}
    common = {"smooth": tuple(range(several)), "keywords": keywords, "label": label}
    other = f"{name}_from_logits"
    draw = draw or functools.partial(probabilities, **parts)
    return (
        Row(f"information.{name}", getattr(information, name), draw, of_probabilities, **common),
        Row(f"information.{other}", getattr(information, other), functools.partial(logits, **parts), of_logits, **common),
    )


ROWS: tuple[Row, ...] = (
    *twins("self_information", self_information, draw=per_class),
    *twins("entropy", entropy),
    *twins("entropy", entropy, base=2, label="bits"),
    *twins("cross_entropy", cross_entropy, 2),
    *twins("kl_divergence", kl_divergence, 2),
    *twins("js_divergence", js_divergence, 2),
    *twins("renyi_divergence", renyi_divergence, 2, alpha=0.3, label="0.3"),
    *twins("renyi_divergence", renyi_divergence, 2, alpha=1.0, label="1"),
    *twins("renyi_divergence", renyi_divergence, 2, alpha=2.5, base=10.0, label="2.5-hartleys"),
    *twins("conditional_entropy", conditional_entropy, shape=(2, 3)),
    *twins("mutual_information", mutual_information, shape=(2, 3)),
    *twins("perplexity", lambda p: np.exp(entropy(p))),
)
