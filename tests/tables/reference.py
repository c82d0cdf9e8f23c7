"""The formulas, written from their definitions, for NumPy and (60 digits) for mpmath. Nothing here imports xentjax.

Every function takes a namespace `m` first: `Double` works on float64 arrays, `Exact` on object arrays of mpmath numbers.
Classes lie on the last axis; z are logits, t the (smoothed, weighted) distribution that the label stands for.
"""

import math

import mpmath
import numpy as np

mpmath.mp.dps = 60


class Double:
    exp, log, log1p, expm1, sqrt = np.exp, np.log, np.log1p, np.expm1, np.sqrt
    cos, sin, arccos = np.cos, np.sin, np.arccos

    @staticmethod
    def array(x):
        return np.asarray(x, np.float64)


class Exact:
    exp = np.vectorize(mpmath.exp, otypes=[object])
    log = np.vectorize(mpmath.log, otypes=[object])
    log1p = np.vectorize(mpmath.log1p, otypes=[object])
    expm1 = np.vectorize(mpmath.expm1, otypes=[object])
    sqrt = np.vectorize(mpmath.sqrt, otypes=[object])
    cos = np.vectorize(mpmath.cos, otypes=[object])
    sin = np.vectorize(mpmath.sin, otypes=[object])
    arccos = np.vectorize(mpmath.acos, otypes=[object])

    @staticmethod
    def array(x):
        return np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])(np.asarray(x, np.float64))


def targets(m, labels, classes, label_smoothing=0.0, class_weights=None, class_mask=None):
    """t_k = w_k((1 − ε)·labels_k + ε/K) over the classes that exist."""
    labels = np.asarray(labels)
    one_hot = np.eye(classes)[labels] if labels.dtype.kind in "iu" else labels
    exists = np.ones(classes) if class_mask is None else np.asarray(class_mask, np.float64)
    smoothing = m.array(label_smoothing)
    t = (1 - smoothing) * m.array(one_hot) + smoothing * m.array(exists) / m.array(exists.sum(-1, keepdims=True))
    return t if class_weights is None else t * m.array(class_weights)


def bits(m, labels, label_smoothing=0.0):
    """t = (1 − ε)·labels + ε/2."""
    smoothing = m.array(label_smoothing)
    return (1 - smoothing) * m.array(np.asarray(labels, np.float64)) + smoothing / 2


def log_sum_exp(m, z):
    top = z.max(axis=-1, keepdims=True)
    return top + m.log(m.exp(z - top).sum(axis=-1, keepdims=True))


def softmax(m, z):
    return m.exp(z - log_sum_exp(m, z))


# One class of K ---------------------------------------------------------------------------------------------------------


def cross_entropy(m, z, t, z_loss=0.0):
    lse = log_sum_exp(m, z)
    return (t * (lse - z)).sum(-1) + m.array(z_loss) * t.sum(-1) * lse[..., 0] ** 2


def cross_entropy_gradient(m, z, t, z_loss=0.0):
    lse, p, s = log_sum_exp(m, z), softmax(m, z), t.sum(-1, keepdims=True)
    return s * p - t + 2 * m.array(z_loss) * s * lse * p


def log_prob(m, z, t):
    return -cross_entropy(m, z, t)


def log_prob_gradient(m, z, t):
    return -cross_entropy_gradient(m, z, t)


def focal(m, z, t, gamma=2.0):
    log_p = z - log_sum_exp(m, z)
    return -(t * _rest(m, m.exp(log_p)) ** m.array(gamma) * log_p).sum(-1)


def focal_gradient(m, z, t, gamma=2.0):
    gamma = m.array(gamma)
    log_p = z - log_sum_exp(m, z)
    p = m.exp(log_p)
    rest = _rest(m, p)
    slope = np.where(rest > 0, rest, 1) ** (gamma - 1) * p * log_p  # log p = 0 where nothing is left
    g = t * (gamma * slope - rest**gamma)
    return g - p * g.sum(-1, keepdims=True)


def _rest(m, p):
    """1 − p_k as Σ_{j≠k} p_j; with 60 digits the difference is as good."""
    return p.sum(-1, keepdims=True) - p if m is Exact else p @ (1 - np.eye(p.shape[-1]))


def entropy(m, z):
    p, log_p = softmax(m, z), z - log_sum_exp(m, z)
    return -(p * log_p).sum(-1)


def entropy_gradient(m, z):
    p, log_p = softmax(m, z), z - log_sum_exp(m, z)
    return -p * (log_p + entropy(m, z)[..., None])


def normalizer(m, z):
    return log_sum_exp(m, z)[..., 0]


def expected_logit(m, z):
    return (softmax(m, z) * z).sum(-1)


def expected_logit_gradient(m, z):
    return softmax(m, z) * (1 + z - expected_logit(m, z)[..., None])


# Yes or no --------------------------------------------------------------------------------------------------------------


def sigmoid(m, z):
    return 1 / (1 + m.exp(-z))


def minus_log_sigmoid(m, z):
    """−log σ(z) = log(1 + e^(−z))."""
    return m.log1p(m.exp(-z))


def bit_cross_entropy(m, z, t, pos_weight=1.0):
    return m.array(pos_weight) * t * minus_log_sigmoid(m, z) + (1 - t) * minus_log_sigmoid(m, -z)


def bit_cross_entropy_gradient(m, z, t, pos_weight=1.0):
    return (1 - t) * sigmoid(m, z) - m.array(pos_weight) * t * sigmoid(m, -z)


def _bit_focal(m, z, gamma):
    """(1 − p)^γ (−log p) and its derivative, p = σ(z)."""
    gamma, p, q = m.array(gamma), sigmoid(m, z), sigmoid(m, -z)
    surprise = minus_log_sigmoid(m, z)
    return q**gamma * surprise, -(q**gamma) * (gamma * p * surprise + q)


def bit_focal(m, z, t, gamma=2.0, alpha=None):
    positive, negative = (1, 1) if alpha is None else (m.array(alpha), 1 - m.array(alpha))
    return positive * t * _bit_focal(m, z, gamma)[0] + negative * (1 - t) * _bit_focal(m, -z, gamma)[0]


def bit_focal_gradient(m, z, t, gamma=2.0, alpha=None):
    positive, negative = (1, 1) if alpha is None else (m.array(alpha), 1 - m.array(alpha))
    return positive * t * _bit_focal(m, z, gamma)[1] - negative * (1 - t) * _bit_focal(m, -z, gamma)[1]


def _asymmetric_negative(m, z, gamma, clip):
    """q^γ (−log(1 − q)) and its derivative in z, q = max(σ(z) − clip, 0)."""
    gamma, p = m.array(gamma), sigmoid(m, z)
    q = p - m.array(clip)
    above = q > 0
    q = np.where(above, q, m.array(np.full(z.shape, 0.5)))
    rest = np.where(above, sigmoid(m, -z) + m.array(clip), q)  # 1 − q
    value = -(q**gamma) * m.log(rest)
    slope = p * sigmoid(m, -z) * (q**gamma / rest - gamma * q ** (gamma - 1) * m.log(rest))
    return np.where(above, value, 0 * value), np.where(above, slope, 0 * slope)


def asymmetric(m, z, t, gamma_negative=4.0, gamma_positive=1.0, clip=0.05):
    return t * _bit_focal(m, z, gamma_positive)[0] + (1 - t) * _asymmetric_negative(m, z, gamma_negative, clip)[0]


def asymmetric_gradient(m, z, t, gamma_negative=4.0, gamma_positive=1.0, clip=0.05):
    return t * _bit_focal(m, z, gamma_positive)[1] + (1 - t) * _asymmetric_negative(m, z, gamma_negative, clip)[1]


def _distance(m, z, t):
    """p − t as p(1 − t) − t(1 − p), and the cross-entropy, p = σ(z)."""
    return sigmoid(m, z) * (1 - t) - t * sigmoid(m, -z), t * minus_log_sigmoid(m, z) + (1 - t) * minus_log_sigmoid(m, -z)


def quality_focal(m, z, t, beta=2.0):
    distance, surprise = _distance(m, z, t)
    return np.abs(distance) ** m.array(beta) * surprise


def quality_focal_gradient(m, z, t, beta=2.0):
    distance, surprise = _distance(m, z, t)
    beta = m.array(beta)
    return np.abs(distance) ** beta * (distance + beta * surprise * sigmoid(m, z) * sigmoid(m, -z) / distance)


def varifocal(m, z, t, alpha=0.75, gamma=2.0):
    return np.where(t > 0, t * _distance(m, z, t)[1], m.array(alpha) * _bit_focal(m, -z, gamma)[0])


def varifocal_gradient(m, z, t, alpha=0.75, gamma=2.0):
    return np.where(t > 0, t * _distance(m, z, t)[0], -m.array(alpha) * _bit_focal(m, -z, gamma)[1])


# Sums -------------------------------------------------------------------------------------------------------------------


def weighted_mean(values, weights):
    total = math.fsum(np.ravel(weights))
    return math.fsum(np.ravel(values * weights)) / total if total else 0.0
