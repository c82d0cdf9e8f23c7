"""Every categorical loss beside softmax_cross_entropy on the same logits: time and temporary memory of value and gradient.

Labels are indices, parameters their defaults; class counts fall by a factor of 100, the noise matrix moves a fifth of every class.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

import xentjax
from benchmarks import measure
from benchmarks.shapes import Shape

SIZES = ((50_000, 10), (8_000, 1_000), (1_000, 32_000))
_MOST = 1_000  # classes of a noise matrix
DEFAULT = tuple(Shape(tokens, None, classes) for tokens, classes in SIZES)


class Contender(NamedTuple):
    """A loss of (logits, labels), and what of it is not the common pass over a row."""

    loss: Callable
    own: str = ""  # its own normaliser, which the bar of 1.5 excepts
    most_classes: int = 10**9  # a matrix of classes x classes has to fit


def contenders(classes: int) -> dict[str, Contender]:
    """The losses at a number of classes."""
    counts = 1e4 * 100.0 ** (-jnp.arange(classes) / max(1, classes - 1))
    log_prior = jnp.log(counts / counts.sum())
    noise = 0.8 * jnp.eye(min(classes, _MOST)) + 0.2 / classes
    return {
        "generalized_cross_entropy": Contender(xentjax.generalized_cross_entropy),
        "symmetric_cross_entropy": Contender(xentjax.symmetric_cross_entropy),
        "bootstrapped_cross_entropy, soft": Contender(xentjax.bootstrapped_cross_entropy),
        "bootstrapped_cross_entropy, hard": Contender(lambda z, y: xentjax.bootstrapped_cross_entropy(z, y, beta=0.8, hard=True)),
        "taylor_cross_entropy": Contender(xentjax.taylor_cross_entropy),
        "poly_cross_entropy": Contender(xentjax.poly_cross_entropy),
        "confidence_penalized_cross_entropy": Contender(xentjax.confidence_penalized_cross_entropy),
        "normalized_cross_entropy": Contender(xentjax.normalized_cross_entropy),
        "logit_adjusted_cross_entropy": Contender(lambda z, y: xentjax.logit_adjusted_cross_entropy(z, y, class_log_prior=log_prior)),
        "ldam_loss": Contender(lambda z, y: xentjax.ldam_loss(z, y, class_counts=counts)),
        "seesaw_loss": Contender(lambda z, y: xentjax.seesaw_loss(z, y, class_counts=counts)),
        "margin_cross_entropy": Contender(lambda z, y: xentjax.margin_cross_entropy(z, y)),
        "softmax_focal_loss": Contender(xentjax.softmax_focal_loss),
        "bi_tempered_cross_entropy": Contender(xentjax.bi_tempered_cross_entropy, "a root by Newton's method"),
        "forward_corrected_cross_entropy": Contender(
            lambda z, y: xentjax.forward_corrected_cross_entropy(z, y, noise_matrix=noise), "two sums under the noise", _MOST
        ),
        "backward_corrected_cross_entropy": Contender(
            lambda z, y: xentjax.backward_corrected_cross_entropy(z, y, noise_matrix=noise), "a distribution per label", _MOST
        ),
        "distillation_loss": Contender(lambda z, y: xentjax.distillation_loss(z, jnp.roll(z, 1, 0)), "the teacher's normaliser"),
    }


def rows(shapes: tuple[Shape, ...], problem: Callable, rounds: int) -> list[dict]:
    """One row per loss and shape: milliseconds, ratio of times, temporary memory of both."""
    found = []
    for shape in shapes:
        arguments = problem((shape.tokens, shape.classes), shape.dtype)
        plain = compiled(xentjax.softmax_cross_entropy, arguments)
        fitting = {n: c for n, c in contenders(shape.classes).items() if shape.classes <= c.most_classes}
        for name, contender in tqdm(fitting.items(), desc=str(shape), unit="loss"):
            program = compiled(contender.loss, arguments)
            time = measure.interleaved(program, plain, arguments, rounds)
            memory = [round(measure.temporary_bytes(p) / 1e6, 1) for p in (program, plain)]
            found.append(
                {
                    "shape": str(shape),
                    "dtype": shape.dtype,
                    "loss": name,
                    "own normaliser": contender.own or None,
                    "milliseconds": time.milliseconds,
                    "time ratio": round(time.ratio, 2),
                    "temporary MB": memory,
                }
            )
    return found


def compiled(loss: Callable, arguments: tuple):
    """Value and gradient of the mean, compiled."""
    return jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).mean())).lower(*arguments).compile()
