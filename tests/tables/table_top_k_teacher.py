"""Rows of `top_k_teacher.py`: divergences between k listed classes, by their definitions in float64."""

import functools

import numpy as np
import scipy.special

from tests.tables.functions import Row
from xentjax._losses import top_k_teacher

CLASSES, K = 6, 3


def divergence(kind, outside, student, ids, log_probs, beta=0.5):
    p, q = np.exp(log_probs), np.take_along_axis(scipy.special.softmax(student, -1), ids, -1)
    if outside == "tail":
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    if outside == "renormalize":
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    m = beta * p + (1 - beta) * q

    def relative(a, b):
        return np.sum(scipy.special.kl_div(a, b), -1)  # a log(a/b) − a + b

    if kind == "forward":
        return relative(p, q)
    if kind == "reverse":
        return relative(q, p)
    if kind == "tv":
        return np.sum(np.abs(p - q), -1) / 2
    return beta * relative(p, m) + (1 - beta) * relative(q, m)


def loss(kind, outside="tail"):
    def run(student, ids, log_probs, beta=0.5, **keywords):
        return top_k_teacher.top_k_distillation_loss(student, ids, log_probs, beta=beta, divergence=kind, outside=outside, **keywords)

    return run


def draw(rng, leading, shared=()):
    ids = np.argsort(rng.uniform(size=(*leading, CLASSES)), -1)[..., :K]
    teacher = scipy.special.log_softmax(rng.normal(size=(*leading, CLASSES)) * 2, -1)
    return rng.normal(size=(*leading, CLASSES)) * 2, ids, np.take_along_axis(teacher, ids, -1), *shared


def row(kind, outside, shared=()):
    function, value = loss(kind, outside), functools.partial(divergence, kind, outside)
    smooth = (0, 2, 3)[: 2 + len(shared)]
    label = "-".join([kind, outside])
    return Row("top_k_distillation_loss", function, functools.partial(draw, shared=shared), value, smooth, label=label)


ROWS: tuple[Row, ...] = (
    row("forward", "tail"),
    row("reverse", "tail"),
    row("tv", "tail"),
    row("js", "tail", (np.asarray(0.125),)),
    row("forward", "renormalize"),
    row("forward", "ignore"),
    row("reverse", "ignore"),
    row("js", "ignore", (np.asarray(0.125),)),
)
