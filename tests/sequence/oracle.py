"""Sequences by enumeration, in 60 digits: every alignment, path or tagging, its probability, and which of them give the labels."""

import itertools

import mpmath
import numpy as np

DIGITS = 60


def numbers(x):
    """An array of mpmath numbers."""
    return np.vectorize(lambda v: mpmath.mpf(float(v)) if np.isfinite(v) else mpmath.mpf("-inf"), otypes=[object])(np.asarray(x))


def softmax(z):
    """The softmax of a row, exact; a row of −∞ has no class."""
    e = [mpmath.exp(v) if v != -mpmath.inf else mpmath.mpf(0) for v in z]
    total = sum(e)
    return [v / total if total else v for v in e]


def collapsed(path, blank):
    """The labels of an alignment: repeats merged, blanks removed."""
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


def ctc(logits, labels, blank=0):
    """(loss, gradient, posteriors, best alignment, its log-probability) of one sequence, from all alignments."""
    with mpmath.workdps(DIGITS):
        z = numbers(logits)
        time, classes = z.shape
        p = [softmax(row) for row in z]
        total, posterior, best = mpmath.mpf(0), np.full(z.shape, mpmath.mpf(0), object), (mpmath.mpf(0), None)
        for path in itertools.product(range(classes), repeat=time):
            if collapsed(path, blank) != tuple(labels):
                continue
            weight = mpmath.fprod(p[t][k] for t, k in enumerate(path))
            total += weight
            best = max(best, (weight, path), key=lambda pair: pair[0])
            for t, k in enumerate(path):
                posterior[t, k] += weight
        if not total:
            return np.inf, np.zeros(z.shape), np.zeros(z.shape), None, -np.inf
        posterior = posterior / total
        gradient = np.array(p, object).reshape(z.shape) - posterior
        return _number(-mpmath.log(total)), floats(gradient), floats(posterior), best[1], _number(mpmath.log(best[0]))


def transducer(logits, labels, blank=0):
    """(loss, gradient, posterior of each arc) of one sequence: logits [time, labels + 1, classes]."""
    with mpmath.workdps(DIGITS):
        z = numbers(logits)
        time, width, _ = z.shape
        p = [[softmax(z[t, u]) for u in range(width)] for t in range(time)]
        posterior = np.full(z.shape, mpmath.mpf(0), object)
        total = mpmath.mpf(0)
        # a path is an order of time − 1 blanks and all labels, and the last blank
        for places in itertools.combinations(range(time - 1 + len(labels)), len(labels)):
            t = u = 0
            weight, arcs = mpmath.mpf(1), []
            for i in range(time + len(labels)):
                k = labels[u] if i in places else blank
                weight *= p[t][u][k]
                arcs.append((t, u, k))
                t, u = (t, u + 1) if i in places else (t + 1, u)
            total += weight
            for arc in arcs:
                posterior[arc] += weight
        if not total:
            return np.inf, np.zeros(z.shape), np.zeros(z.shape)
        posterior = posterior / total
        node = posterior.sum(-1, keepdims=True)
        gradient = np.array(p, object).reshape(z.shape) * node - posterior
        return _number(-mpmath.log(total)), floats(gradient), floats(posterior)


def tdt(logits, duration_logits, labels, durations, blank=0, sigma=0.0):
    """(loss, gradient, gradient of the duration logits, posteriors of classes and of durations) of one sequence, from all paths.

    The logits are [time, labels + 1, classes] and [time, labels + 1, durations].
    """
    with mpmath.workdps(DIGITS):
        z, v = numbers(logits), numbers(duration_logits)
        time, width, _ = z.shape
        p, q = ([[softmax(x[t, u]) for u in range(width)] for t in range(time)] for x in (z, v))
        under = mpmath.exp(-mpmath.mpf(float(sigma)))
        posteriors = [np.full(x.shape, mpmath.mpf(0), object) for x in (z, v)]
        total = mpmath.mpf(0)

        def paths(t, u):
            """Every list of moves from t and u to the end. A move is (t, u, class, duration)."""
            for j, d in enumerate(durations):
                if d > 0 and t + d == time and u == len(labels):
                    yield ((t, u, blank, j),)
                for k, step in ((blank, 0), *(((labels[u], 1),) if u < len(labels) else ())):
                    if t + d < time and (d > 0 or step):
                        yield from (((t, u, k, j), *rest) for rest in paths(t + d, u + step))

        for path in paths(0, 0):
            weight = mpmath.fprod(under * p[t][u][k] * q[t][u][j] for t, u, k, j in path)
            total += weight
            for t, u, k, j in path:
                posteriors[0][t, u, k] += weight
                posteriors[1][t, u, j] += weight
        if not total:
            return np.inf, *(np.zeros(x.shape) for x in (z, v, z, v))
        posteriors = [x / total for x in posteriors]
        gradients = [np.array(x, object).reshape(y.shape) * y.sum(-1, keepdims=True) - y for x, y in zip((p, q), posteriors, strict=True)]
        return _number(-mpmath.log(total)), *map(floats, gradients + posteriors)


def tdt_scan(logits, duration_logits, labels, durations, blank=0, sigma=0.0):
    """(loss, gradient, gradient of the duration logits) as in `tdt`, in float64, by a loop over all nodes forwards and backwards."""
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (np.asarray(logits), np.asarray(duration_logits)))
    (time, width, _), most = log_p.shape, len(labels)
    edges = []  # (t, u, class, duration, t after, u after, log-probability)
    for t, u in np.ndindex(time, width):
        for j, d in enumerate(durations):
            for k, step in ((blank, 0), *(((labels[u], 1),) if u < most else ())):
                if (d > 0 or step) and (t + d < time or (t + d == time and not step and u == most)):
                    edges.append((t, u, k, j, t + d, u + step, log_p[t, u, k] - sigma + log_q[t, u, j]))
    alpha, beta = np.full((2, time + 1, width), -np.inf)
    alpha[0, 0] = beta[time, most] = 0
    for t, u, _, _, s, v, weight in sorted(edges):
        alpha[s, v] = np.logaddexp(alpha[s, v], alpha[t, u] + weight)
    for t, u, _, _, s, v, weight in sorted(edges, reverse=True):
        beta[t, u] = np.logaddexp(beta[t, u], weight + beta[s, v])
    posteriors = np.zeros(log_p.shape), np.zeros(log_q.shape)
    for t, u, k, j, s, v, weight in edges:
        share = np.exp(alpha[t, u] + weight + beta[s, v] - alpha[time, most])
        posteriors[0][t, u, k] += share
        posteriors[1][t, u, j] += share
    gradients = (np.exp(x) * y.sum(-1, keepdims=True) - y for x, y in zip((log_p, log_q), posteriors, strict=True))
    return -alpha[time, most], *gradients


def crf(unary, labels, transitions, start=None, end=None):
    """(loss, gradients of unary, transitions, start, end, marginals, taggings with scores) of one sequence, from all taggings."""
    with mpmath.workdps(DIGITS):
        u, w = numbers(unary), numbers(transitions)
        time, tags = u.shape
        s, e = (numbers(np.zeros(tags) if x is None else x) for x in (start, end))
        scores = {}
        for path in itertools.product(range(tags), repeat=time):
            score = sum((u[t, k] for t, k in enumerate(path)), mpmath.mpf(0)) + sum(
                (w[a, b] for a, b in itertools.pairwise(path)), mpmath.mpf(0)
            )
            scores[path] = score + (s[path[0]] + e[path[-1]] if time else 0)
        weights = {path: mpmath.exp(v) for path, v in scores.items() if v != -mpmath.inf}
        total = sum(weights.values())
        grads = [np.full(x.shape, mpmath.mpf(0), object) for x in (u, w, s, e)]
        marginals = np.full(u.shape, mpmath.mpf(0), object)
        gold = tuple(labels)
        for path, weight in weights.items():
            share = weight / total
            for t, k in enumerate(path):
                marginals[t, k] += share
            if path == gold:
                continue
            for sign, way in ((1, path), (-1, gold)):
                for t, k in enumerate(way):
                    grads[0][t, k] += sign * share
                for a, b in itertools.pairwise(way):
                    grads[1][a, b] += sign * share
                grads[2][way[0]] += sign * share
                grads[3][way[-1]] += sign * share
        loss = -mpmath.log(weights[gold] / total) if gold in weights else mpmath.inf
        return _number(loss), [floats(g) for g in grads], floats(marginals), {k: float(v) for k, v in scores.items()}


def _number(x):
    return float(x)


def floats(x):
    return np.vectorize(float, otypes=[float])(x)
