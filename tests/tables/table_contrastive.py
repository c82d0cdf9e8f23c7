"""Contrastive losses: their definitions in the papers, and their gradients in closed form."""

import dataclasses

import numpy as np

from tests.tables.functions import Row
from xentjax._contrastive import losses as contrastive


def unit(x):
    """x/|x|."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def of_unit(x, cotangent):
    """The cotangent of x for a cotangent of x̂: its product with (I − x̂·x̂ᵀ)/|x|."""
    along = np.sum(unit(x) * cotangent, axis=-1, keepdims=True)
    return (cotangent - unit(x) * along) / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z, keep=True):
    """Softmax over the entries of each row that are in `keep`."""
    e = np.where(keep, np.exp(np.where(keep, z, -np.inf) - np.max(z, -1, keepdims=True)), 0)
    return e / e.sum(-1, keepdims=True)


def others(n):
    """True except on the diagonal [n, n]."""
    return ~np.eye(n, dtype=bool)


def info_nce(q, k, tau):
    p = softmax(unit(q) @ unit(k).T / tau)
    return -np.log(np.diag(p))


def info_nce_gradient(q, k, tau):
    s = unit(q) @ unit(k).T
    g = softmax(s / tau) - np.eye(len(q))
    return of_unit(q, g @ unit(k)) / tau, of_unit(k, g.T @ unit(q)) / tau, -np.sum(g * s) / tau**2


def with_negatives(q, k, more, tau):
    s = np.concatenate([q @ k.T, q @ more.T], axis=1) / tau
    return -np.log(np.diag(softmax(s)))


def with_negatives_gradient(q, k, more, tau):
    n = len(q)
    s = np.concatenate([q @ k.T, q @ more.T], axis=1)
    g = softmax(s / tau) - np.eye(*s.shape)
    return g @ np.concatenate([k, more]) / tau, g[:, :n].T @ q / tau, g[:, n:].T @ q / tau, -np.sum(g * s) / tau**2


def nt_xent(first, second, tau):
    x, n = unit(np.concatenate([first, second])), len(first)
    p = softmax(x @ x.T / tau, others(2 * n))
    i = np.arange(n)
    return -(np.log(p[i, n + i]) + np.log(p[n + i, i])) / 2


def nt_xent_gradient(first, second, tau):
    x, n = np.concatenate([first, second]), len(first)
    s = unit(x) @ unit(x).T
    g = (softmax(s / tau, others(2 * n)) - np.roll(np.eye(2 * n), n, axis=1)) / 2
    dx = of_unit(x, (g + g.T) @ unit(x)) / tau
    return dx[:n], dx[n:], -np.sum(g * s) / tau**2


def clip(x, y, t):
    s = t * unit(x) @ unit(y).T
    return -(np.log(np.diag(softmax(s))) + np.log(np.diag(softmax(s.T)))) / 2


def clip_gradient(x, y, t):
    s = unit(x) @ unit(y).T
    g = (softmax(t * s) + softmax(t * s.T).T) / 2 - np.eye(len(x))
    return t * of_unit(x, g @ unit(y)), t * of_unit(y, g.T @ unit(x)), np.sum(g * s)


def siglip(x, y, t, b):
    sign = 2 * np.eye(len(x)) - 1
    return np.logaddexp(0, -sign * (t * unit(x) @ unit(y).T + b)).sum(-1)


def siglip_gradient(x, y, t, b):
    s = unit(x) @ unit(y).T
    g = 1 / (1 + np.exp(-t * s - b)) - np.eye(len(x))
    return t * of_unit(x, g @ unit(y)), t * of_unit(y, g.T @ unit(x)), np.sum(g * s), np.sum(g)


def same_label(labels):
    """1 where two pairs have the same label, also on the diagonal."""
    return (labels[:, None] == labels).astype(float)


def clip_labels(x, y, labels, t):
    s, share = unit(x) @ unit(y).T, same_label(labels) / same_label(labels).sum(-1, keepdims=True)
    return -np.sum(share * (np.log(softmax(t * s)) + np.log(softmax(t * s.T))), -1) / 2


def clip_labels_gradient(x, y, labels, t):
    s, share = unit(x) @ unit(y).T, same_label(labels) / same_label(labels).sum(-1, keepdims=True)
    g = (softmax(t * s) - share + (softmax(t * s.T) - share).T) / 2
    return t * of_unit(x, g @ unit(y)), t * of_unit(y, g.T @ unit(x)), np.sum(g * s)


def siglip_labels(x, y, labels, t, b):
    z = t * unit(x) @ unit(y).T + b
    return np.sum(np.log1p(np.exp(-(2 * same_label(labels) - 1) * z)), -1)


def siglip_labels_gradient(x, y, labels, t, b):
    s = unit(x) @ unit(y).T
    g = 1 / (1 + np.exp(-(t * s + b))) - same_label(labels)
    return t * of_unit(x, g @ unit(y)), t * of_unit(y, g.T @ unit(x)), np.sum(g * s), np.sum(g)


def positives(labels):
    """1/|P_i| at the positives of i, 0 elsewhere."""
    same = (labels[:, None] == labels) & others(len(labels))
    return same / np.maximum(same.sum(-1, keepdims=True), 1)


def supervised(x, labels, tau):
    p = softmax(unit(x) @ unit(x).T / tau, others(len(x)))
    return -np.sum(positives(labels) * np.log(np.where(p == 0, 1, p)), axis=-1)


def supervised_gradient(x, labels, tau):
    s, t = unit(x) @ unit(x).T, positives(labels)
    g = softmax(s / tau, others(len(x))) * t.any(-1, keepdims=True) - t
    return of_unit(x, (g + g.T) @ unit(x)) / tau, None, -np.sum(g * s) / tau**2


def pairs(rng, leading):
    """Two batches of correlated embeddings, and a temperature."""
    x = rng.normal(size=(*leading, 4))
    return x, x + rng.normal(size=x.shape), rng.uniform(0.3, 0.6)


def _supervised(x, labels, tau, **more):
    return contrastive.supervised_contrastive_loss(x, labels, temperature=tau, **more)


INFO_NCE = Row(
    name="info_nce",
    function=lambda q, k, tau, **more: contrastive.info_nce(q, k, temperature=tau, **more),
    draw=pairs,
    value=info_nce,
    gradient=info_nce_gradient,
    smooth=(0, 1, 2),
    independent=False,
)
NT_XENT = dataclasses.replace(
    INFO_NCE,
    name="nt_xent",
    function=lambda x, y, tau, **more: contrastive.nt_xent(x, y, temperature=tau, **more),
    value=nt_xent,
    gradient=nt_xent_gradient,
)
CLIP = dataclasses.replace(
    INFO_NCE,
    name="clip_loss",
    function=lambda x, y, t, **more: contrastive.clip_loss(x, y, logit_scale=t, **more),
    draw=lambda rng, leading: (*pairs(rng, leading)[:2], rng.uniform(2, 4)),
    value=clip,
    gradient=clip_gradient,
)
SIGLIP = dataclasses.replace(
    CLIP,
    name="siglip_loss",
    function=lambda x, y, t, b, **more: contrastive.siglip_loss(x, y, logit_scale=t, logit_bias=b, **more),
    draw=lambda rng, leading: (*CLIP.draw(rng, leading), rng.uniform(-3, -1)),
    value=siglip,
    gradient=siglip_gradient,
    smooth=(0, 1, 2, 3),
)
SUPERVISED = dataclasses.replace(
    INFO_NCE,
    name="supervised_contrastive_loss",
    function=_supervised,
    draw=lambda rng, leading: (rng.normal(size=(*leading, 4)), np.resize([3, -7, 3, 9, 3], leading), rng.uniform(0.3, 0.6)),
    value=supervised,
    gradient=lambda *arguments: tuple(supervised_gradient(*arguments)[i] for i in (0, 2)),
    smooth=(0, 2),
)
LOSSES = INFO_NCE, NT_XENT, CLIP, SIGLIP, SUPERVISED


def labelled(row, **more):
    """The row of a loss with labels, some of which are equal; the labels are the third argument."""

    def function(x, y, labels, *numbers, **keywords):
        return row.function(x, y, *numbers, labels=labels, **keywords)

    def draw(rng, leading):
        x, y, *numbers = row.draw(rng, leading)
        return x, y, np.resize([3, -7, 3, 9, 3], leading), *numbers

    smooth = (0, 1, *range(3, len(row.smooth) + 1))
    return dataclasses.replace(row, label="labels", function=function, draw=draw, smooth=smooth, **more)


ROWS: tuple[Row, ...] = (
    *LOSSES,
    dataclasses.replace(
        INFO_NCE,
        label="negatives",
        function=lambda q, k, more, tau, **keywords: contrastive.info_nce(
            q, k, negatives=more, temperature=tau, normalize=False, **keywords
        ),
        draw=lambda rng, leading: (*pairs(rng, leading)[:2], rng.normal(size=(3, 4)), rng.uniform(1, 2)),
        value=with_negatives,
        gradient=with_negatives_gradient,
        smooth=(0, 1, 2, 3),
    ),
    labelled(CLIP, value=clip_labels, gradient=clip_labels_gradient, keywords={"chunk_size": 2}),
    labelled(SIGLIP, value=siglip_labels, gradient=siglip_labels_gradient),
    dataclasses.replace(NT_XENT, label="chunks", keywords={"chunk_size": 3}),
    dataclasses.replace(SUPERVISED, label="chunks", keywords={"chunk_size": 2}),
)
