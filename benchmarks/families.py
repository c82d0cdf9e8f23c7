"""Every categorical loss compared with softmax_cross_entropy of the same logits: time and temporary memory of value and gradient.

Labels are class indices, and parameters have their defaults. Class counts fall by a factor of 100. The noise matrix moves a fifth of
every class.
"""

import functools
import inspect
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
    """A loss of (logits, labels), and the part of its work that cross-entropy does not have."""

    loss: Callable
    own: str = ""  # a normalizer of its own, excepted from the bar of 1.5
    most_classes: int = 10**9  # a matrix of classes x classes has to fit


def contenders(classes: int) -> dict[str, Contender]:
    """The losses at a number of classes: every function of the front door with the arguments of `softmax_cross_entropy`."""
    counts = 1e4 * 100.0 ** (-jnp.arange(classes) / max(1, classes - 1))
    per_class = {
        "class_counts": counts,
        "class_log_prior": jnp.log(counts / counts.sum()),
        "noise_matrix": 0.8 * jnp.eye(min(classes, _MOST)) + 0.2 / classes,
    }
    losses = {name: Contender(_with_arrays(x, per_class), *_OWN.get(name, ())) for name, x in vars(xentjax).items() if _is_loss(name, x)}
    soft = losses.pop("bootstrapped_cross_entropy")
    hard = Contender(functools.partial(xentjax.bootstrapped_cross_entropy, beta=0.8, hard=True))
    teacher = Contender(lambda z, y: xentjax.distillation_loss(z, jnp.roll(z, 1, 0)), "the teacher's normalizer")
    return losses | {
        "bootstrapped_cross_entropy, soft": soft,
        "bootstrapped_cross_entropy, hard": hard,
        "distillation_loss": teacher,
        "top_k_distillation_loss": Contender(_top_k_teacher),
    }


def _top_k_teacher(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss for a teacher of 64 classes, or of half of them, that are not neighbors. They hold 0.9 of the probability."""
    classes = logits.shape[-1]
    k = min(64, max(1, classes // 2))
    ids = (labels[:, None] + jnp.arange(k) * (classes // k)) % classes
    return xentjax.top_k_distillation_loss(logits, ids, jnp.full(ids.shape, jnp.log(0.9 / k)))


_BASELINES = {"softmax_cross_entropy", "softmax_log_prob", "row_statistics"}
_OWN = {
    "sparsemax_loss": ("a root, found by passes over classes",),
    "entmax_loss": ("a root, found by passes over classes",),
    "bi_tempered_cross_entropy": ("a root, found by at most eight passes over classes",),
    "forward_corrected_cross_entropy": ("two sums under the noise", _MOST),
    "backward_corrected_cross_entropy": ("a distribution per label", _MOST),
}


def _is_loss(name: str, x: object) -> bool:
    if name in _BASELINES or not inspect.isfunction(x):
        return False
    parameters = list(inspect.signature(x).parameters)
    if "spatial" in parameters:  # images
        return False
    return parameters[1:2] == ["labels"] and parameters[-4:] == ["axis", "axis_name", "class_mask", "where"]


def _with_arrays(loss: Callable, per_class: dict[str, jax.Array]) -> Callable:
    """The loss with the keywords that it requires."""
    required = [name for name, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return functools.partial(loss, **{name: per_class[name] for name in required})


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
                    "own normalizer": contender.own or None,
                    "milliseconds": time.milliseconds,
                    "time ratio": round(time.ratio, 2),
                    "temporary MB": memory,
                }
            )
    return found


def compiled(loss: Callable, arguments: tuple):
    """Value and gradient of the mean, compiled."""
    return jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).mean())).lower(*arguments).compile()
