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
