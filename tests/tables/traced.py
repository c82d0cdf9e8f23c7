"""Every public function of arrays once, as a function of all arguments that may be traced: inputs, labels and every parameter.

The properties that hold for each argument alike (test_hidden.py, test_debugging.py) run over these. Losses on (logits, labels)
get their parameters from the signature. Of functions with rows (functions.py), `MORE` has the parameters that their rows hold constant.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from tests.properties.test_values import rows
from tests.tables import cases
from tests.tables.rows import ROWS
from xentjax import information, metrics


@dataclasses.dataclass(frozen=True, eq=False)  # hashable by identity, for jax.jit
class Call:
    """A function of (*per_example, shared), both drawn, and of `where`."""

    name: str
    function: Callable  # (*per_example, shared, where) → arrays
    draw: Callable  # rng → (per_example: a tuple of pytrees with an axis of examples first, shared: a dict)

    def __str__(self) -> str:
        return self.name

    def where(self, arguments, counted) -> jax.Array:
        """Which examples count, in the shape that the function takes."""
        shape = jax.eval_shape(lambda *x: jax.tree.leaves(self.function(*x, where=None))[0], *arguments).shape
        return jnp.broadcast_to(counted.reshape(-1, *[1] * (len(shape) - 1)), (len(counted), *shape[1:]))

    def total(self, arguments, where) -> jax.Array:
        """The sum of all numbers of the result."""
        leaves = jax.tree.leaves(self.function(*arguments, where=where))
        return jnp.asarray(sum(jnp.sum(x, dtype=jnp.float32) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)))

    def value_and_slopes(self, arguments, where) -> tuple:
        """That sum, and its derivatives with respect to all arguments; None for indices."""
        value, found = jax.value_and_grad(self.total, allow_int=True)(arguments, where)
        return value, jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, found)


def _of_case(case, kind, examples):
    def function(z, labels, parameters, where):
        return case(z, labels, where=where, **parameters)

    def draw(rng):
        z, labels = case.draw(rng, (examples,), kind=kind)
        return (z, labels), case.parameters(z.shape[-1])

    return Call(f"{case}-{kind}", function, draw)


def _of_arguments(name, function, draw, own, masked=True):
    """A call of (*arguments); `own` are the positions of those with an entry per example."""

    def run(*arguments, where):
        *each, rest = arguments
        given = dict(zip(own, each, strict=True)) | {int(i): x for i, x in rest.items()}
        return function(*(given[i] for i in range(len(given))), **({"where": where} if masked else {}))

    def split(rng):
        arguments = draw(rng)
        return tuple(arguments[i] for i in own), {str(i): x for i, x in enumerate(arguments) if i not in own}

    return Call(name, run, split)


def losses(examples: int) -> list[Call]:
    """Every loss on (logits, labels) with every kind of labels, once for what its parameters do not say."""
    once: dict[Any, Call] = {}
    for case, kind in rows(cases.LOSSES):
        static = tuple((k, v) for k, v in case.keywords.items() if isinstance(v, bool | int))
        once.setdefault((case.name, case.field, static, kind), _of_case(case, kind, examples))
    return list(once.values())


def of_rows() -> list[Call]:
    """Every function with a row, for five examples."""
    once: dict[Any, Call] = {}
    for row in ROWS:
        drawn = row.draw(np.random.default_rng(0), (5,))
        own = tuple(i for i, x in enumerate(drawn) if np.shape(x)[:1] == (5,))
        once.setdefault(row.name, _of_arguments(row.name, row, row.arguments, own, row.masked))
    return list(once.values())


def _drawn(rng, examples):
    """Arrays by name, most of them with an entry per example."""
    return {
        "numbers": rng.normal(size=examples),
        "more_numbers": rng.normal(size=examples),
        "positive": rng.uniform(0.5, 2, examples),
        "hidden": rng.normal(size=(examples, 4)),
        "labels": rng.integers(0, 7, examples),
        "bits": rng.integers(0, 2, examples),
        "logits": rng.normal(size=(examples, 7)),
        "more_logits": rng.normal(size=(examples, 7)),
        "p": rng.dirichlet(np.ones(7), examples),
        "q": rng.dirichlet(np.ones(7), examples),
        "kernel": rng.normal(size=(4, 7)),
        "bias": rng.normal(size=7),
    }


def _of_samples(function):
    def run(h, k, y, b, expected, where):
        samples = xentjax.samplers.Samples(jnp.array([1, 5]), jnp.array([0.5, -0.5]))
        return function(h, k, y, bias=b, samples=samples, label_log_expected_count=expected, where=where)

    return run


def _linear(h, k, y, b, w, smoothing, class_weights, z_loss, cap, where):
    more = {"label_smoothing": smoothing, "class_weights": class_weights, "z_loss": z_loss, "softcap": cap}
    return xentjax.linear_softmax_cross_entropy(h, k, y, bias=b, weights=w, reduction="sum", chunk_size=2, where=where, **more)


def _fused(h, k, y, b, w, where):
    loss = xentjax.fuse_linear(xentjax.bi_tempered_cross_entropy, reduction="none", chunk_size=2)
    return loss(h, k, y, bias=b, weights=w, where=where)


_OF_SAMPLES = ("hidden", "kernel", "labels", "bias", "positive"), (0, 2, 4)
# The function, the names of its arguments in `_drawn` (a number stands for itself), and which of them have one entry per example.
_MORE = {
    "linear_softmax_cross_entropy": (_linear, ("hidden", "kernel", "labels", "bias", "positive", 0.1, cases.WEIGHTS, 0.01, 5.0), (0, 2, 4)),
    "fuse_linear": (_fused, ("hidden", "kernel", "labels", "bias", "positive"), (0, 2, 4)),
    "sampled_softmax_cross_entropy": (_of_samples(xentjax.sampled_softmax_cross_entropy), *_OF_SAMPLES),
    "noise_contrastive_estimation_loss": (_of_samples(xentjax.noise_contrastive_estimation_loss), *_OF_SAMPLES),
    "gaussian_nll": (lambda m, x, v, where: xentjax.gaussian_nll(m, x, variance=v, where=where), ("numbers", "more_numbers", 0.5), (0, 1)),
    "laplace_nll": (lambda m, x, v, where: xentjax.laplace_nll(m, x, log_scale=v, where=where), ("numbers", "more_numbers", 0.5), (0, 1)),
    "cumulative_link_loss": (  # class 2 is empty
        lambda s, y, t, where: xentjax.cumulative_link_loss(s, y, thresholds=t, where=where),
        ("numbers", "bits", (-0.5, 0.5, 0.5)),
        (0, 1),
    ),
    "weighted_sum": (lambda v, w, where: xentjax.weighted_sum(v, w, where=where), ("numbers", "positive"), (0, 1)),
    "renyi_divergence": (
        lambda p, q, alpha, base, where: information.renyi_divergence(p, q, alpha=alpha, base=base, where=where),
        ("p", "q", 0.7, 3.0),
        (0, 1),
    ),
    "js_divergence_from_logits": (
        lambda p, q, base, where: information.js_divergence_from_logits(p, q, base=base, where=where),
        ("logits", "more_logits", 3.0),
        (0, 1),
    ),
    "metrics.calibration": (
        lambda z, y, w, where: metrics.calibration(z, y, weights=w, where=where),
        ("logits", "labels", "positive"),
        (0, 1, 2),
    ),
    "metrics.ranking": (
        lambda p, y, w, where: metrics.ranking(p, y, weights=w, where=where),
        ("numbers", "bits", "positive"),
        (0, 1, 2),
    ),
}


def more(examples: int) -> list[Call]:
    """Functions of many arguments, and parameters that their rows hold constant."""

    def call(name, function, names, own):
        def draw(rng):
            known = _drawn(rng, examples)
            values = [known[n] if isinstance(n, str) else np.asarray(n) for n in names]
            return [jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32) for x in values]

        return _of_arguments(f"{name}-parameters", function, draw, own)

    return [call(name, *entry) for name, entry in _MORE.items()]
