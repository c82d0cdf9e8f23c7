"""Rows of `xentjax.preference`: the losses written from their papers, in float64 without regard for rounding."""

import functools

import numpy as np
import scipy.special

from tests.tables.functions import Row
from tests.tables.table_likelihood import route
from xentjax import preference


def log_odds(log_p):
    return log_p - np.log(1 - np.exp(log_p))


def minus_log_sigmoid(x):
    return np.logaddexp(0, -x)


def flipped(loss):
    """The expected loss if a pair is in the wrong order with probability `smoothing`."""

    def value(chosen, rejected, reference_chosen, reference_rejected, beta, smoothing):
        h = (chosen - rejected) - (reference_chosen - reference_rejected)
        return (1 - smoothing) * loss(h, beta) + smoothing * loss(-h, beta)

    return value


LOSSES = {
    "sigmoid": flipped(lambda h, beta: minus_log_sigmoid(beta * h)),
    "hinge": flipped(lambda h, beta: np.maximum(0, 1 - beta * h)),
    "ipo": flipped(lambda h, beta: (h - 1 / (2 * beta)) ** 2),
}


def cpo(chosen, rejected, beta, alpha):
    return minus_log_sigmoid(beta * chosen - beta * rejected) - alpha * chosen


def simpo(chosen, rejected, beta, gamma):
    return minus_log_sigmoid(beta * chosen - beta * rejected - gamma)


def orpo(chosen, rejected, beta):
    return -chosen + beta * minus_log_sigmoid(log_odds(chosen) - log_odds(rejected))


def kto(log_probs, reference, desirable, kl, beta, of_desirable, of_undesirable):
    """λ_y − v of equation 8, where v = λ_y σ(±β(r − z))."""
    gain = beta * (log_probs - reference - kl)
    weight = np.where(desirable, of_desirable, of_undesirable)
    return weight - weight * scipy.special.expit(np.where(desirable, gain, -gain))


def kto_gradient(log_probs, reference, desirable, kl, beta, of_desirable, of_undesirable):
    """With respect to all arguments except `kl`, which the loss holds constant."""
    gain = log_probs - reference - kl
    s = scipy.special.expit(np.where(desirable, -beta * gain, beta * gain))
    weight = np.where(desirable, of_desirable, of_undesirable)
    steep = np.where(desirable, -1, 1) * weight * s * (1 - s)
    return beta * steep, -beta * steep, np.sum(gain * steep), np.sum(np.where(desirable, s, 0)), np.sum(np.where(desirable, 0, s))


def rewards(log_probs, reference, beta):
    return beta * (log_probs - reference)


def draw_pairs(rng, leading, beta, smoothing=0.125):
    """Answers of some −50 nats, whose margins are some nats and not near the kinks of the hinge at ±1/β."""
    chosen, rejected, of_chosen = (rng.uniform(-60, -40, leading) for _ in range(3))
    h = rng.choice([-1, 1], leading) * rng.choice([0.5, 2], leading) * rng.uniform(0.8, 1.2, leading) / beta
    return chosen, rejected, of_chosen, rejected - (chosen - of_chosen) + h, np.array(beta), np.array(smoothing)


def draw_means(rng, leading, *more):
    return (*(-rng.uniform(0.05, 3, leading) for _ in range(2)), *map(np.array, more))


def draw_sums(rng, leading, *more):
    return (*(-rng.uniform(5, 15, leading) for _ in range(2)), *map(np.array, more))


def draw_answers(rng, leading, kl_shape=None):
    x, y = draw_sums(rng, leading)
    kl = rng.uniform(0, 3, leading if kl_shape is None else kl_shape)
    return x, y, rng.integers(0, 2, leading), kl, np.array(0.25), np.array(1.5), np.array(0.75)


def _kto(log_probs, reference, desirable, kl, beta, of_desirable, of_undesirable, **keywords):
    weights = {"desirable_weight": of_desirable, "undesirable_weight": of_undesirable}
    return preference.kto_loss(log_probs, reference, desirable == 1, kl=kl, beta=beta, **weights, **keywords)


def _dpo(*arguments, **keywords):
    *log_probs, beta, smoothing = arguments
    return preference.dpo_loss(*log_probs, beta=beta, label_smoothing=smoothing, **keywords)


def _of_dpo(kind, beta):
    draw = functools.partial(draw_pairs, beta=beta)
    return Row("preference.dpo_loss", _dpo, draw, LOSSES[kind], tuple(range(6)), keywords={"kind": kind}, label=kind)


ROWS: tuple[Row, ...] = (
    _of_dpo("sigmoid", 0.5),
    _of_dpo("hinge", 0.25),
    _of_dpo("ipo", 0.25),
    Row(
        "preference.cpo_loss",
        route(preference.cpo_loss, "beta", "alpha"),
        lambda rng, leading: draw_sums(rng, leading, 0.25, 0.5),
        cpo,
        (0, 1, 2, 3),
    ),
    Row(
        "preference.simpo_loss",
        route(preference.simpo_loss, "beta", "gamma"),
        lambda rng, leading: draw_means(rng, leading, 2.5, 1.25),
        simpo,
        (0, 1, 2, 3),
    ),
    Row("preference.orpo_loss", route(preference.orpo_loss, "beta"), lambda rng, leading: draw_means(rng, leading, 0.75), orpo, (0, 1, 2)),
    Row("preference.kto_loss", _kto, draw_answers, kto, (0, 1, 4, 5, 6), kto_gradient),
    Row("preference.kto_loss", _kto, functools.partial(draw_answers, kl_shape=()), kto, (0, 1, 4, 5, 6), kto_gradient, label="scalar"),
    Row(
        "preference.implicit_rewards",
        route(preference.implicit_rewards, "beta"),
        lambda rng, leading: draw_sums(rng, leading, 0.25),
        rewards,
        (0, 1, 2),
    ),
)
