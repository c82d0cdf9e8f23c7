"""What `where` hides reaches no derivative: of inputs, of labels, of any parameter."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_values import RTOL, parametrized, rows

import xentjax
from xentjax import information, metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXAMPLES = 3
POISON = ((jnp.nan, -100), (jnp.inf, 2**31 - 1), (-jnp.inf, -1), (1e30, 7), (0.0, 2))  # for numbers and for indices


@functools.partial(jax.jit, static_argnums=0)
def slopes(function, arguments, where):
    """The gradients of Σ loss with respect to all arguments, None for indices."""
    found = jax.grad(
        lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(function(*x, where=where)) if jnp.issubdtype(y.dtype, jnp.floating)),
        allow_int=True,
    )(arguments)
    return jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, found)


def spoilt(per_example, poison):
    """Twice the examples, of which the second half holds poison."""
    number, index = poison
    return jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.full_like(x, number if jnp.issubdtype(x.dtype, jnp.floating) else index)]), per_example
    )


def check(function, per_example, shared, where):
    """All examples twice, all counted, have twice the gradients of all examples and as many hidden ones."""
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), per_example)
    everything = slopes(function, (*twice, shared), jnp.ones_like(where))
    for poison in POISON:
        *own, of_shared = slopes(function, (*spoilt(per_example, poison), shared), where)
        for got, expected in zip(jax.tree.leaves(own), jax.tree.leaves(everything[:-1]), strict=True):
            np.testing.assert_allclose(got[:EXAMPLES], expected[:EXAMPLES], rtol=RTOL, atol=RTOL)
            np.testing.assert_array_equal(got[EXAMPLES:], np.zeros_like(got[EXAMPLES:]))
        for name in of_shared:
            np.testing.assert_allclose(of_shared[name], everything[-1][name] / 2, rtol=RTOL, atol=RTOL, err_msg=name)


def once(rows):
    """A row for every function with the keywords that are not parameters, and every kind of labels."""
    return list(
        {(c.name, c.field, *((k, v) for k, v in c.keywords.items() if isinstance(v, bool)), kind): (c, kind) for c, kind in rows}.values()
    )


@parametrized(("case", "kind"), once(rows(cases.LOSSES)))
def test_losses_on_logits(case, kind, rng):
    z, labels = case.draw(rng, (EXAMPLES,), kind=kind)
    where = jnp.arange(2 * EXAMPLES) < EXAMPLES
    if case.family == "bits":
        where = jnp.broadcast_to(where[:, None], (2 * EXAMPLES, z.shape[1]))

    def function(z, labels, parameters, where):
        return case(z, labels, where=where, **parameters)

    check(function, (z, labels), case.parameters(z.shape[-1]), where)


# Functions of other arguments have rows (test_functions_everywhere.py); here are their parameters that those hold constant.


def drawn(rng):
    """Arrays by name, most of them with an entry per example."""
    return {
        "numbers": rng.normal(size=EXAMPLES),
        "more_numbers": rng.normal(size=EXAMPLES),
        "positive": rng.uniform(0.5, 2, EXAMPLES),
        "hidden": rng.normal(size=(EXAMPLES, 4)),
        "labels": rng.integers(0, 7, EXAMPLES),
        "bits": rng.integers(0, 2, EXAMPLES),
        "logits": rng.normal(size=(EXAMPLES, 7)),
        "more_logits": rng.normal(size=(EXAMPLES, 7)),
        "p": rng.dirichlet(np.ones(7), EXAMPLES),
        "q": rng.dirichlet(np.ones(7), EXAMPLES),
        "kernel": rng.normal(size=(4, 7)),
        "bias": rng.normal(size=7),
    }


SAMPLES = xentjax.Samples(jnp.array([1, 5]), jnp.array([0.5, -0.5]))
OF_SAMPLES = ("hidden", "kernel", "labels", "bias", "positive"), (0, 2, 4)


def of_samples(function):
    def run(h, k, y, b, expected, where):
        return function(h, k, y, bias=b, samples=SAMPLES, label_log_expected_count=expected, where=where)

    return run


def linear(h, k, y, b, w, smoothing, class_weights, z_loss, cap, where):
    more = {"label_smoothing": smoothing, "class_weights": class_weights, "z_loss": z_loss, "softcap": cap}
    return xentjax.linear_softmax_cross_entropy(h, k, y, bias=b, weights=w, reduction="sum", chunk_size=2, where=where, **more)


def fused(h, k, y, b, w, where):
    loss = xentjax.fuse_linear(xentjax.bi_tempered_cross_entropy, reduction="none", chunk_size=2)
    return loss(h, k, y, bias=b, weights=w, where=where)


# The function, the names of its arguments in `drawn` (a number stands for itself), and which of them have one entry per example.
MORE = {
    "linear_softmax_cross_entropy": (linear, ("hidden", "kernel", "labels", "bias", "positive", 0.1, cases.WEIGHTS, 0.01, 5.0), (0, 2, 4)),
    "fuse_linear": (fused, ("hidden", "kernel", "labels", "bias", "positive"), (0, 2, 4)),
    "sampled_softmax_cross_entropy": (of_samples(xentjax.sampled_softmax_cross_entropy), *OF_SAMPLES),
    "noise_contrastive_estimation_loss": (of_samples(xentjax.noise_contrastive_estimation_loss), *OF_SAMPLES),
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
    "calibration": (
        lambda z, y, w, where: metrics.calibration(z, y, weights=w, where=where)[:3],
        ("logits", "labels", "positive"),
        (0, 1, 2),
    ),
    "ranking": (
        lambda p, y, w, where: metrics.ranking(p, y, weights=w, where=where),
        ("numbers", "bits", "positive"),
        (0, 1, 2),
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_other_parameters(name, rng):
    function, names, own = MORE[name]
    known = drawn(rng)
    values = [known[n] if isinstance(n, str) else np.asarray(n) for n in names]
    values = [jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32) for x in values]
    per_example = tuple(values[i] for i in own)
    shared = {str(i): x for i, x in enumerate(values) if i not in own}

    def run(*arguments, where):
        *each, rest = arguments
        given = dict(zip(own, each, strict=True)) | {int(i): x for i, x in rest.items()}
        return function(*(given[i] for i in range(len(names))), where=where)

    check(run, per_example, shared, jnp.arange(2 * EXAMPLES) < EXAMPLES)
