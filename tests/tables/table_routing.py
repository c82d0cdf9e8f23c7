"""Rows of `_routing.py`: the losses of routers by their definitions in float64."""

import functools

import numpy as np
import scipy.special

import xentjax
from tests.tables.functions import Row

TOKENS, EXPERTS = 4, 5


def balance(logits, top_k):
    """E Σ f P over the tokens of each sequence."""
    assigned = np.argsort(-logits, -1, kind="stable")[..., :top_k, None] == np.arange(EXPERTS)
    f, p = assigned.sum(-2).mean(-2) / top_k, scipy.special.softmax(logits, -1).mean(-2)
    return EXPERTS * np.sum(f * p, -1)


def draw(rng, leading):
    return (2 * rng.normal(size=(*leading, TOKENS, EXPERTS)),)


def one_batch(rng, leading):
    return (2 * rng.normal(size=(TOKENS, EXPERTS)),)


def z_loss(logits):
    return scipy.special.logsumexp(logits, -1) ** 2


ROWS: tuple[Row, ...] = (
    Row(
        "load_balancing_loss",
        functools.partial(xentjax.load_balancing_loss, top_k=2, per="sequence"),
        draw,
        functools.partial(balance, top_k=2),
        masked=False,
    ),
    Row(
        "load_balancing_loss",
        functools.partial(xentjax.load_balancing_loss, top_k=1),
        one_batch,
        functools.partial(balance, top_k=1),
        masked=False,
        independent=False,
        label="batch",
    ),
    Row("router_z_loss", xentjax.router_z_loss, lambda rng, leading: (rng.normal(size=(*leading, EXPERTS)),), z_loss),
)
