"""Losses of two distributions and the bi-tempered loss, compared with the formulas that people write from the papers.

Value and gradient of the mean. The divergences use two `log_softmax`, or two `softmax` for total variation. The bi-tempered formula has the
normalizer of the paper with five fixed-point iterations, and the gradient of the paper.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import xentjax
from benchmarks import measure
from benchmarks.shapes import Shape

SIZES = ((4_000, 1_000), (500, 32_000))
DEFAULT = tuple(Shape(rows, None, classes, dtype) for dtype in ("float32", "bfloat16") for rows, classes in SIZES)
TEMPERED_SIZES = ((50_000, 10), (8_000, 1_000), (1_000, 32_000))
TEMPERED = tuple(Shape(rows, None, classes, dtype) for dtype in ("float32", "bfloat16") for rows, classes in TEMPERED_SIZES)


def relative_entropy(p_logits: Array, q_logits: Array) -> Array:
    """D(p‖q)."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def jensen_shannon(p_logits: Array, q_logits: Array) -> Array:
    """½·D(p‖m) + ½·D(q‖m)."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    log_m = jnp.logaddexp(log_p, log_q) - np.float32(np.log(2)).astype(log_p.dtype)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), -1) / 2


def total_variation(p_logits: Array, q_logits: Array) -> Array:
    """½ Σ |p − q|."""
    return jnp.sum(jnp.abs(jax.nn.softmax(p_logits) - jax.nn.softmax(q_logits)), -1) / 2


DIVERGENCES: dict[str, Callable] = {
    "forward": lambda student, teacher: relative_entropy(teacher, student),
    "reverse": relative_entropy,
    "js": jensen_shannon,
    "tv": total_variation,
}


def bi_tempered(logits: Array, labels: Array, t1: float = 0.8, t2: float = 1.2) -> Array:
    """The loss of Amid et al. 2019 (arXiv 1906.03361) for t1 < 1 < t2, of class indices or of distributions."""
    logits = logits.astype(jnp.float32)
    y = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim < logits.ndim else labels

    def log_t(u, t):
        return (u ** (1 - t) - 1) / (1 - t)

    def exp_t(u):
        return jnp.maximum(1 + (1 - t2) * u, 0) ** (1 / (1 - t2))

    def probabilities(a):
        top = jnp.max(a, -1, keepdims=True)
        shifted = scaled = a - top
        for _ in range(5):
            scaled = shifted * jnp.sum(exp_t(scaled), -1, keepdims=True) ** (1 - t2)
        return exp_t(a - top + log_t(1 / jnp.sum(exp_t(scaled), -1, keepdims=True), t2))

    @jax.custom_vjp
    def loss(a):
        return forward(a)[0]

    def forward(a):
        p = probabilities(a)
        return jnp.sum(y * (log_t(y + 1e-10, t1) - log_t(p, t1)) - (y ** (2 - t1) - p ** (2 - t1)) / (2 - t1), -1), p

    def backward(p, cotangent):
        slope = (p - y) * p ** (t2 - t1)
        escort = p**t2
        escort = escort / jnp.sum(escort, -1, keepdims=True)
        return (cotangent[..., None] * (slope - escort * jnp.sum(slope, -1, keepdims=True)),)

    loss.defvjp(forward, backward)
    return loss(logits)


def rows_of(cases: tuple[Shape, ...], rounds: int) -> list[dict]:
    """One row for each divergence, side that is differentiated, and shape; then one for each kind of label of the bi-tempered loss."""
    found = []
    for case in tqdm(cases or DEFAULT, desc="divergences", unit="shape"):
        arguments = tuple(_logits(case, seed) for seed in range(2))
        for divergence, theirs in DIVERGENCES.items():
            ours = partial(xentjax.distillation_loss, divergence=divergence)
            for side, of in (("student", 0), ("both", (0, 1))):
                found.append({"loss": divergence, "of": side} | _row(ours, theirs, arguments, of, case, rounds))
    for case in tqdm(cases or TEMPERED, desc="bi-tempered", unit="shape"):
        logits, rng = _logits(case, 0), np.random.default_rng(0)
        soft = rng.dirichlet(np.ones(min(case.classes, 50)), case.tokens)
        soft = np.pad(soft, ((0, 0), (0, case.classes - soft.shape[1])))
        for kind, labels in (("index", rng.integers(0, case.classes, case.tokens, np.int32)), ("soft labels", np.float32(soft))):
            row = _row(xentjax.bi_tempered_cross_entropy, bi_tempered, (logits, jnp.asarray(labels)), 0, case, rounds)
            found.append({"loss": "bi-tempered", "of": kind} | row)
    return found


def _logits(case: Shape, seed: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(case.tokens, case.classes)), case.dtype)


def _row(ours: Callable, theirs: Callable, arguments: tuple, of: int | tuple[int, ...], case: Shape, rounds: int) -> dict:
    programs = [jax.jit(jax.value_and_grad(lambda x, y, f=f: f(x, y).mean(), of)).lower(*arguments).compile() for f in (ours, theirs)]
    time = measure.interleaved(programs[0], programs[1], arguments, rounds)
    memory = [measure.temporary_bytes(program) for program in programs]
    return {
        "shape": f"{case.tokens} x {case.classes}",
        "dtype": case.dtype,
        "milliseconds": time.milliseconds,
        "time ratio": round(time.ratio, 2),
        "temporary MB": [round(m / 1e6, 1) for m in memory],
        "memory ratio": round(memory[0] / memory[1], 2),
    }


def summary(rows: list[dict]) -> list[dict]:
    """Median and largest time ratio, and largest memory ratio, of each loss and dtype."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["of"], row["dtype"]), []).append(row)
    return [
        {
            "loss": loss,
            "of": of,
            "dtype": dtype,
            "median time": round(float(np.median([r["time ratio"] for r in group])), 2),
            "largest time": max(r["time ratio"] for r in group),
            "largest memory": max(r["memory ratio"] for r in group),
        }
        for (loss, of, dtype), group in groups.items()
    ]
