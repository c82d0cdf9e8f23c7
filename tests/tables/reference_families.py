"""The formulas of the families, as `reference.py` has those of cross-entropy: from the papers, for NumPy and mpmath, never from xentjax."""

import numpy as np

from tests.tables import reference as ref


def of_probability(phi):
    """Value and gradient of Σ_k t_k φ(p_k), where `phi(m, log p, p, 1 − p, **keywords)` gives φ and p·dφ/dp."""

    def parts(m, z, keywords):
        log_p = z - ref.log_sum_exp(m, z)
        p = m.exp(log_p)
        return p, *phi(m, log_p, p, ref._rest(m, p), **{k: m.array(v) for k, v in keywords.items()})

    def value(m, z, t, **keywords):
        return (t * parts(m, z, keywords)[1]).sum(-1)

    def gradient(m, z, t, **keywords):
        p, _, slope = parts(m, z, keywords)
        return t * slope - p * (t * slope).sum(-1, keepdims=True)

    return value, gradient


generalized, generalized_gradient = of_probability(lambda m, log_p, p, rest, q=0.7: ((1 - p**q) / q if q else -log_p, -(p**q)))


def _symmetric(m, log_p, p, rest, alpha=0.1, beta=1.0, log_zero=-4.0):
    alpha, beta, log_zero = (m.array(x) for x in (alpha, beta, log_zero))
    return -alpha * log_p - beta * log_zero * rest, -alpha + beta * log_zero * p


symmetric, symmetric_gradient = of_probability(_symmetric)


def _taylor(m, log_p, p, rest, order=2):
    terms = range(1, int(order) + 1)
    return sum(rest**n / n for n in terms), -p * sum(rest ** (n - 1) for n in terms)


taylor, taylor_gradient = of_probability(_taylor)
poly, poly_gradient = of_probability(lambda m, log_p, p, rest, epsilon=1.0: (-log_p + epsilon * rest, -1 - epsilon * p))


def bootstrapped(m, z, t, beta=0.95, hard=False):
    beta, s = m.array(beta), t.sum(-1)
    own = ref.log_sum_exp(m, z)[..., 0] - z.max(-1) if hard else ref.entropy(m, z)
    return beta * ref.cross_entropy(m, z, t) + (1 - beta) * s * own


def bootstrapped_gradient(m, z, t, beta=0.95, hard=False):
    beta, s, p = m.array(beta), t.sum(-1, keepdims=True), ref.softmax(m, z)
    top = np.where(z == z.max(-1, keepdims=True), m.array(1.0), m.array(0.0))
    own = p - top / top.sum(-1, keepdims=True) if hard else ref.entropy_gradient(m, z)
    return beta * (s * p - t) + (1 - beta) * s * own


def penalty(m, z, t, beta=0.1):
    return ref.cross_entropy(m, z, t) - m.array(beta) * t.sum(-1) * ref.entropy(m, z)


def penalty_gradient(m, z, t, beta=0.1):
    return ref.cross_entropy_gradient(m, z, t) - m.array(beta) * t.sum(-1, keepdims=True) * ref.entropy_gradient(m, z)


def normalized(m, z, t):
    everything = ref.cross_entropy(m, z, np.ones_like(z))
    return ref.cross_entropy(m, z, t) / everything if z.shape[-1] > 1 else 0 * everything


def normalized_gradient(m, z, t):
    one = np.ones_like(z)
    everything = ref.cross_entropy(m, z, one)[..., None]
    slope = ref.cross_entropy_gradient(m, z, t) - normalized(m, z, t)[..., None] * ref.cross_entropy_gradient(m, z, one)
    return slope / everything if z.shape[-1] > 1 else 0 * z


def logit_adjusted(m, z, t, class_log_prior, tau=1.0):
    return ref.cross_entropy(m, z + m.array(tau) * m.array(class_log_prior), t)


def logit_adjusted_gradient(m, z, t, class_log_prior, tau=1.0):
    return ref.cross_entropy_gradient(m, z + m.array(tau) * m.array(class_log_prior), t)


# Losses whose logits depend on the label: Σ_k t_k of the cross-entropy of label k on its own logits --------------------------


def of_label(logits):
    """Value and gradient, where `logits(m, z, k, **keywords)` gives the logits for label k and their derivative by z, class by class."""

    def each(m, z, t, keywords):
        for k in range(z.shape[-1]):
            one = m.array(np.broadcast_to(np.arange(z.shape[-1]) == k, z.shape))
            yield t[..., k], one, *logits(m, z, k, **keywords)

    def value(m, z, t, **keywords):
        return sum(share * ref.cross_entropy(m, moved, one) for share, one, moved, _ in each(m, z, t, keywords))

    def gradient(m, z, t, **keywords):
        return sum(share[..., None] * slope * (ref.softmax(m, moved) - one) for share, one, moved, slope in each(m, z, t, keywords))

    return value, gradient


def _ldam(m, z, k, class_counts, max_margin=0.5, scale=30.0):
    counts = np.asarray(class_counts, np.float64)
    margin = m.array(max_margin) * m.sqrt(m.sqrt(m.array(counts.min()) / m.array(counts[k])))
    here = m.array(np.arange(z.shape[-1]) == k)
    return m.array(scale) * (z - margin * here), m.array(scale) * np.ones_like(z)


ldam, ldam_gradient = of_label(_ldam)


def _seesaw(m, z, k, class_counts, p=0.8, q=2.0):
    log_counts = m.log(m.array(class_counts))
    mitigation = m.array(p) * np.minimum(log_counts - log_counts[k], 0)
    return z + mitigation + m.array(q) * np.maximum(z - z[..., k : k + 1], 0), np.ones_like(z)


seesaw, seesaw_gradient = of_label(_seesaw)


def _margin(m, z, k, scale=64.0, m1=1.0, m2=0.5, m3=0.0):
    scale, m1, m2, m3 = (m.array(x) for x in (scale, m1, m2, m3))
    angle = m.arccos(z)
    here = np.arange(z.shape[-1]) == k
    moved = np.where(here, m.cos(m1 * angle + m2) - m3, z)
    return scale * moved, scale * np.where(here, m1 * m.sin(m1 * angle + m2) / m.sin(angle), np.ones_like(z))


margin, margin_gradient = of_label(_margin)

# The noise matrix ---------------------------------------------------------------------------------------------------------


def forward(m, z, t, noise_matrix):
    return -(t * m.log(ref.softmax(m, z) @ m.array(noise_matrix))).sum(-1)


def forward_gradient(m, z, t, noise_matrix):
    p, noise = ref.softmax(m, z), m.array(noise_matrix)
    return t.sum(-1, keepdims=True) * p - p * ((t / (p @ noise)) @ noise.T)


def backward(m, z, t, noise_matrix):
    return ref.cross_entropy(m, z, t @ m.array(np.linalg.inv(np.float64(noise_matrix))))


def backward_gradient(m, z, t, noise_matrix):
    return ref.cross_entropy_gradient(m, z, t @ m.array(np.linalg.inv(np.float64(noise_matrix))))


# Bi-tempered --------------------------------------------------------------------------------------------------------------


def tempered_softmax(m, z, t2):
    """p = exp_t2(z − λ) with λ by bisection, as many halvings as the digits need."""
    t2 = m.array(t2)
    if t2 == 1:
        return ref.softmax(m, z)
    z = z - z.max(-1, keepdims=True)

    def p(of):
        return (1 + (1 - t2) * (z - of)) ** (1 / (1 - t2))

    low = 0 * z[..., :1]
    # at this λ even the largest class has a probability below 1/K
    high = low + (m.array(2.0 * z.shape[-1]) ** (t2 - 1) - 1) / (t2 - 1)
    for _ in range(60 if m is ref.Double else 200):
        middle = (low + high) / 2
        above = p(middle).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return p(high)


def bi_tempered(m, z, t, t1=0.8, t2=1.2):
    p, t1 = tempered_softmax(m, z, t2), m.array(t1)
    log_p = (p ** (1 - t1) - 1) / (1 - t1) if t1 != 1 else m.log(p)
    own = -(t * log_p).sum(-1)
    return own - t.sum(-1) * (1 - (p ** (2 - t1)).sum(-1)) / (2 - t1)


def bi_tempered_gradient(m, z, t, t1=0.8, t2=1.2):
    p, t1, t2 = tempered_softmax(m, z, t2), m.array(t1), m.array(t2)
    escort = p**t2 / (p**t2).sum(-1, keepdims=True)
    g = p ** (t2 - t1) * (t.sum(-1, keepdims=True) * p - t)
    return g - escort * g.sum(-1, keepdims=True)


# Sparse distributions ---------------------------------------------------------------------------------------------------


def _entmax(m, z, alpha):
    """The distribution for α = 2 (Martins and Astudillo, algorithm 1) or α = 1.5 (Peters et al., algorithm 2), by sorting."""
    y = (z - z.max(-1, keepdims=True)) * (m.array(alpha) - 1)
    count = m.array(np.arange(1, z.shape[-1] + 1))
    falling = np.sort(y, -1)[..., ::-1]
    mean = np.cumsum(falling, -1) / count
    if alpha == 2:
        threshold = mean - 1 / count
    else:
        left = (1 - np.cumsum(falling**2, -1) + count * mean**2) / count
        threshold = mean - m.sqrt(np.where(left > 0, left, 0 * left))
    size = (threshold <= falling).sum(-1, keepdims=True)
    above = y - np.take_along_axis(threshold, size - 1, -1)
    return np.where(above > 0, above, 0 * above) ** {2: 1, 1.5: 2}[alpha]


def entmax(m, z, t, alpha=1.5):
    """s·max_p (p·z + H(p)) − t·z − H(t) with Tsallis' entropy H."""

    def entropy(x):
        return (x - x ** m.array(alpha)).sum(-1) / (m.array(alpha) * (m.array(alpha) - 1))

    p = _entmax(m, z, alpha)
    z = z - z.max(-1, keepdims=True)
    return t.sum(-1) * ((p * z).sum(-1) + entropy(p)) - (t * z).sum(-1) - entropy(t)


def entmax_gradient(m, z, t, alpha=1.5):
    return t.sum(-1, keepdims=True) * _entmax(m, z, alpha) - t


def sparsemax(m, z, t):
    return entmax(m, z, t, alpha=2)


def sparsemax_gradient(m, z, t):
    return entmax_gradient(m, z, t, alpha=2)
