"""Losses for many classes: their definitions in the papers, with fixed samples and the logits of all classes."""

import functools

import jax.numpy as jnp
import numpy as np

from tests.tables.functions import Row
from xentjax import samplers
from xentjax._many_classes import hierarchical, sampled

FEATURES, CLASSES = 6, 9
# Pairs (class, expected count); class 3 is sampled twice, class 7 is left out.
COUNTED = [(8, 0.5), (1, 2.0), (3, 1.5), (3, 1.5), (0, 3.0), (7, np.inf)]
SHARED = samplers.Samples(np.array([k for k, _ in COUNTED], np.int32), np.log([q for _, q in COUNTED]))
EXPECTED = np.linspace(0.3, 2.0, CLASSES)  # expected count of each class as a label
PATHS = np.array(  # 0 | (((1 2) (3 (4 5))) ((6 7) 8)); entries after the end of a path are arbitrary
    [[0, 9, 9, 9, 9], *[[0, 1, 2, 3, -1]] * 2, [0, 1, 2, 4, 0], *[[0, 1, 2, 4, 5]] * 2, *[[0, 1, 6, 7, 0]] * 2, [0, 1, 6, 0, 0]]
)
SIGNS = np.array(
    [
        [1, 0, 0, 0, 0],
        [-1, 1, 1, 1, 0],
        [-1, 1, 1, -1, 0],
        [-1, 1, -1, 1, 0],
        [-1, 1, -1, -1, 1],
        [-1, 1, -1, -1, -1],
        [-1, -1, 1, 1, 0],
        [-1, -1, 1, -1, 0],
        [-1, -1, -1, 0, 0],
    ]
)


def layer(rng, leading, columns=CLASSES, classes_first=False):
    """Hidden, kernel, bias and labels with logits of order 1."""
    kernel = rng.normal(size=(FEATURES, columns)) / 2
    return (
        rng.normal(size=(*leading, FEATURES)),
        kernel.T if classes_first else kernel,
        rng.normal(size=columns),
        rng.integers(0, CLASSES, leading),
    )


def softplus(z):
    return np.logaddexp(0, z)


def log_softmax(z):
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def over_samples(h, kernel, bias, labels, term, remove, classes_first=False):
    """The logit of the label, and Σ_j term(z_{k_j}, log Q_{k_j}) over samples that count."""
    z = h @ (kernel.T if classes_first else kernel) + bias
    total = np.zeros(labels.shape)
    for k, count in COUNTED:
        if count < np.inf:
            total = total + np.where(remove & (labels == k), 0, term(z[..., k], np.log(count)))
    return np.take_along_axis(z, labels[..., None], -1)[..., 0], total


def sampled_softmax(h, kernel, bias, labels, corrected=False, remove=True, classes_first=False):
    z, rest = over_samples(h, kernel, bias, labels, lambda s, q: np.exp(s - q), remove, classes_first)
    z = z - np.log(EXPECTED[labels]) if corrected else z
    return np.log(np.exp(z) + rest) - z


def noise_contrastive(h, kernel, bias, labels):
    z, rest = over_samples(h, kernel, bias, labels, lambda s, q: softplus(s - q), False)
    return softplus(np.log(EXPECTED[labels]) - z) + rest


def negative_sampling(h, kernel, bias, labels, remove):
    z, rest = over_samples(h, kernel, bias, labels, lambda s, q: softplus(s), remove)
    return softplus(-z) + rest


def own_samples(rng, leading):
    """A layer, and three samples for each example."""
    return *layer(rng, leading), rng.integers(0, CLASSES, (*leading, 3)), rng.normal(size=(*leading, 3))


def own_sampled_softmax(h, kernel, bias, labels, ids, log_expected):
    z = h @ kernel + bias
    label = np.take_along_axis(z, labels[..., None], -1)
    s = np.take_along_axis(z, ids, -1) - log_expected
    return np.log(np.exp(label[..., 0]) + np.sum(np.where(ids == labels[..., None], 0, np.exp(s)), -1)) - label[..., 0]


def in_batch(q, c, log_prob, tau, ids):
    s = q @ c.T / tau - log_prob
    keep = (ids[:, None] != ids[None, :]) | np.eye(len(ids), dtype=bool)
    return np.log(np.sum(np.where(keep, np.exp(s), 0), 1)) - np.diag(s)


def pairs(rng, leading):
    return *rng.normal(size=(2, 5, FEATURES)), rng.normal(size=5), np.array(0.7), ITEMS


def adaptive_log_probs(h, head, first_projection, second_projection, first, second):
    log_head = log_softmax(h @ head)
    of_clusters = [log_softmax(h @ p @ k) for p, k in ((first_projection, first), (second_projection, second))]
    everything = [log_head[..., :3], log_head[..., 3:4] + of_clusters[0], log_head[..., 4:5] + of_clusters[1]]
    return np.concatenate(everything, -1)


def adaptive(*arguments):
    *parameters, labels = arguments
    return -np.take_along_axis(adaptive_log_probs(*parameters), labels[..., None], -1)[..., 0]


def adaptive_parameters(rng, leading):
    shapes = (FEATURES, 5), (FEATURES, 2), (FEATURES, 1), (2, 2), (1, CLASSES - 5)
    h, _, _, labels = layer(rng, leading)
    return h, *(rng.normal(size=s) / 2 for s in shapes), labels


def tree_loss(h, kernel, bias, labels):
    z = h @ kernel + bias
    path, sign = PATHS[labels], SIGNS[labels]
    each = softplus(-sign * np.take_along_axis(z, np.where(sign == 0, 0, path), -1))
    return np.sum(np.where(sign == 0, 0, each), -1)


def label_count(labels):
    """log Q of labels; out-of-range labels get log Q of the nearest class."""
    return jnp.log(jnp.asarray(EXPECTED)[jnp.clip(labels, 0, CLASSES - 1)])


def call(function, **fixed):
    """`function` with `bias` as a positional argument after `kernel`, so that it can be differentiated."""

    def run(hidden, kernel, bias, labels, **keywords):
        more = {"label_log_expected_count": label_count(labels)} if fixed.get("corrected") else {}
        keep = {k: v for k, v in fixed.items() if k != "corrected"}
        return function(hidden, kernel, labels, bias=bias, **keep, **more, **keywords)

    return run


def own_call(hidden, kernel, bias, labels, ids, log_expected, **keywords):
    own = samplers.Samples(ids, log_expected)
    return sampled.sampled_softmax_cross_entropy(hidden, kernel, labels, bias=bias, samples=own, **keywords)


def in_batch_call(q, c, log_prob, tau, ids=None, **keywords):
    return sampled.in_batch_softmax_cross_entropy(q, c, candidate_log_prob=log_prob, candidate_ids=ids, temperature=tau, **keywords)


def adaptive_call(h, head, first_projection, second_projection, first, second, *labels, **keywords):
    parameters = hierarchical.AdaptiveSoftmax(head, (first_projection, second_projection), (first, second))
    function = hierarchical.adaptive_softmax_cross_entropy if labels else hierarchical.adaptive_softmax_log_prob
    return function(h, parameters, *labels, **keywords)


SOFTMAX, NOISE, NEGATIVE = (
    sampled.sampled_softmax_cross_entropy,
    sampled.noise_contrastive_estimation_loss,
    sampled.negative_sampling_loss,
)
ITEMS = np.array([4, 4, 1, 0, 4], np.int32)

ROWS = (
    Row("sampled_softmax_cross_entropy", call(SOFTMAX, samples=SHARED), layer, sampled_softmax, (0, 1, 2)),
    Row(
        "sampled_softmax_cross_entropy",
        call(SOFTMAX, samples=SHARED, classes_first=True, remove_accidental_hits=False, corrected=True),
        functools.partial(layer, classes_first=True),
        functools.partial(sampled_softmax, corrected=True, remove=False, classes_first=True),
        (0, 1, 2),
        label="corrected label, classes first, hits kept",
    ),
    Row("sampled_softmax_cross_entropy", own_call, own_samples, own_sampled_softmax, (0, 1, 2, 5), label="own samples"),
    Row("noise_contrastive_estimation_loss", call(NOISE, samples=SHARED, corrected=True), layer, noise_contrastive, (0, 1, 2)),
    Row("negative_sampling_loss", call(NEGATIVE, samples=SHARED), layer, functools.partial(negative_sampling, remove=False), (0, 1, 2)),
    Row(
        "negative_sampling_loss",
        call(NEGATIVE, samples=SHARED, remove_accidental_hits=True),
        layer,
        functools.partial(negative_sampling, remove=True),
        (0, 1, 2),
        label="hits removed",
    ),
    Row(
        "in_batch_softmax_cross_entropy",
        in_batch_call,
        pairs,
        in_batch,
        (0, 1, 2, 3),
        independent=False,
    ),
    Row(
        "in_batch_softmax_cross_entropy",
        in_batch_call,
        lambda rng, leading: pairs(rng, leading)[:4],
        lambda q, c, log_prob, tau: in_batch(q, c, log_prob, tau, np.arange(len(q))),
        (0, 1, 2, 3),
        independent=False,
        label="no ids",
    ),
    # half precision is tested in test_hierarchical.py, because the projected features are rounded
    Row("adaptive_softmax_cross_entropy", adaptive_call, adaptive_parameters, adaptive, (0, 1, 2, 3, 4, 5), half=False),
    Row(
        "adaptive_softmax_log_prob",
        adaptive_call,
        lambda rng, leading: adaptive_parameters(rng, leading)[:-1],
        adaptive_log_probs,
        (0, 1, 2, 3, 4, 5),
        masked=False,  # `where` has one entry per example, the result one per class
        half=False,
    ),
    Row(
        "hierarchical_softmax_cross_entropy",
        call(hierarchical.hierarchical_softmax_cross_entropy, tree=hierarchical.BinaryTree(PATHS, SIGNS)),
        functools.partial(layer, columns=CLASSES - 1),
        tree_loss,
        (0, 1, 2),
    ),
)
