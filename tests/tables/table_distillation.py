"""Rows of `distillation.py`: divergences by their definitions, in float64."""

import functools

import numpy as np
import scipy.special

from tests.tables.functions import Row
from xentjax._losses import distillation

CLASSES = 6


def divergence(kind, student, teacher, temperature, beta=0.5):
    p, q = (scipy.special.softmax(z / temperature, -1) for z in (teacher, student))
    m = beta * p + (1 - beta) * q

    def relative(a, b):
        return np.sum(scipy.special.rel_entr(a, b), -1)

    if kind == "forward":
        return relative(p, q)
    if kind == "reverse":
        return relative(q, p)
    if kind == "tv":
        return np.sum(np.abs(p - q), -1) / 2
    return beta * relative(p, m) + (1 - beta) * relative(q, m)


def loss(kind):
    def run(student, teacher, temperature, beta=0.5, **keywords):
        return distillation.distillation_loss(student, teacher, temperature=temperature, beta=beta, divergence=kind, **keywords)

    return run


def draw(rng, leading, shared=()):
    shape = (*leading, CLASSES)
    return rng.normal(size=shape) * 2, rng.normal(size=shape) * 2, np.asarray(1.75), *shared


def row(kind, shared=(), label=""):
    smooth = (0, 1, 2, 3)[: 3 + len(shared)]
    function, value = loss(kind), functools.partial(divergence, kind)
    return Row("distillation_loss", function, functools.partial(draw, shared=shared), value, smooth, label=label or kind)


ROWS: tuple[Row, ...] = (row("forward"), row("reverse"), row("tv"), row("js"), row("js", (np.asarray(0.125),), "js-beta"))
