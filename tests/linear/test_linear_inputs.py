"""Inputs of fused losses: arguments, closures, aux, transformations, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.linear.test_linear import FIRST, SECOND, close, exact_loss, in_float64, problem
from tests.properties.test_programs import compilations

pytestmark = pytest.mark.usefixtures("quick_compilation")
REDUCTIONS = ("mean", "sum", "none")


def distillation(run):
    """Cross-entropy to a teacher. The loss closes over class weights, the kernel of the teacher and a temperature."""

    def value(hidden, kernel, teacher_hidden, teacher_kernel, class_weights, log_temperature):
        def loss(z, teacher):
            t = jnp.exp(log_temperature)
            soft = jax.nn.softmax(teacher @ teacher_kernel / t)
            return run.loss(z / t, soft, class_weights)

        return run(loss, hidden, kernel, teacher_hidden)

    return value


class Fused:
    def __init__(self, reduction):
        self.reduction = reduction

    loss = staticmethod(lambda z, soft, w: xentjax.softmax_cross_entropy(z, soft, class_weights=w))

    def __call__(self, loss, hidden, kernel, *args):
        return xentjax.fuse_linear(loss, reduction=self.reduction, chunk_size=5)(hidden, kernel, *args).sum()


class Dense(Fused):
    loss = staticmethod(lambda z, soft, w: jnp.sum(soft * w[None] * (jax.nn.logsumexp(z, -1, keepdims=True) - z), -1))

    def __call__(self, loss, hidden, kernel, *args):
        each = loss(hidden @ kernel, *args)
        return each.mean() if self.reduction == "mean" else each.sum()


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_arguments_and_closures_are_differentiated(rng, reduction):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = (draw(23, 6), draw(6, 17), draw(23, 4), draw(4, 17), jnp.exp(draw(17)), jnp.asarray(0.3, jnp.float32))
    t = jax.tree.map(lambda v: draw(*v.shape), x)

    def derivatives(kind):
        value = distillation(kind(reduction))

        def run(x, t):
            slope = jax.grad(lambda x: value(*x))
            return (value(*x), slope(x), jax.jvp(lambda x: value(*x), (x,), (t,))[1]), jax.jvp(slope, (x,), (t,))[1]

        return run

    first, second = jax.jit(derivatives(Fused))(x, t)
    expected = in_float64(derivatives(Dense), x, t)
    close(first, expected[0], FIRST)
    close(second, expected[1], SECOND)


def test_arguments_may_be_pytrees(rng):
    (hidden, kernel, *_), labels, _ = problem(rng, (12,))
    labels = jnp.maximum(labels, 0)
    old = jnp.asarray(rng.normal(size=12), jnp.float32)

    def loss(z, batch, extra):
        (scale,) = extra
        return jnp.exp(-xentjax.softmax_cross_entropy(z, batch["labels"]) - batch["old"]) * scale

    run = xentjax.fuse_linear(loss, chunk_size=5)

    def value(hidden, old, scale):
        return run(hidden, kernel, {"labels": labels, "old": old}, (scale,))

    def expected(hidden, old, scale):
        return jnp.mean(jnp.exp(-exact_loss(hidden @ kernel, labels) - old) * scale)

    x = hidden, old, jnp.ones(12)
    close(jax.grad(value, (0, 1, 2))(*x), jax.grad(expected, (0, 1, 2))(*x), FIRST)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_aux_comes_back_with_the_leading_axes(rng, reduction):
    (hidden, kernel, *_), labels, where = problem(rng, (3, 11))

    def loss(z, y):
        found = xentjax.row_statistics(z, y)
        return xentjax.softmax_cross_entropy(z, y), {"hit": found.correct, "entropy": found.entropy, "top": jax.lax.top_k(z, 2)[1]}

    def value(hidden):
        return xentjax.fuse_linear(loss, reduction=reduction, chunk_size=6, has_aux=True)(hidden, kernel, labels, where=where)

    plain = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction=reduction, chunk_size=6)

    @jax.jit
    def results(hidden):
        slope, expected = (jax.grad(lambda h, f=f: f(h).sum())(hidden) for f in (lambda h: value(h)[0], without_aux))
        return value(hidden), slope, expected, jax.grad(lambda h: value(h)[1]["entropy"].sum())(hidden)

    def without_aux(h):
        return plain(h, kernel, labels, where=where)

    (value_, aux), slope, expected, stopped = results(hidden)
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    close(aux["entropy"], np.where(where, -(p * np.log(p)).sum(-1), 0), FIRST)
    np.testing.assert_array_equal(aux["hit"], np.where(where, z.argmax(-1) == labels, False))
    np.testing.assert_array_equal(aux["top"], np.where(where[..., None], np.argsort(-z, -1)[..., :2], 0))
    assert aux["hit"].dtype == bool and aux["top"].dtype == jnp.int32
    assert value_.shape == ((3, 11) if reduction == "none" else ())
    close(slope, expected, 1e-6)
    assert (stopped == 0).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transformations(rng, reduction):
    (hidden, kernel, bias, weights, _), labels, _ = problem(rng, (4, 10))
    labels = jnp.maximum(labels, 0)
    run = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction=reduction, chunk_size=3)

    def value(hidden, kernel, weights, labels):
        return run(hidden, kernel, labels, bias=bias, weights=weights)

    def both(*a):
        return value(*a), jax.grad(lambda *a: value(*a).sum(), (0, 1, 2))(*a)

    arguments = hidden, jnp.stack([kernel * s for s in (1.0, 0.5, 2.0, -1.0)]), weights, labels
    compiled = jax.jit(both)
    values, slopes = jax.tree.map(lambda *s: jnp.stack(s), *[compiled(*jax.tree.map(lambda x, i=i: x[i], arguments)) for i in range(4)])
    close(jax.vmap(value)(*arguments), values, 1e-6)

    def of_first(h):
        return value(h, kernel, weights[0], labels[0])

    @jax.jit
    def transformed(arguments):
        in_a_loop = jax.lax.scan(lambda _, a: (None, both(*a)), None, arguments)[1]
        again = jax.vmap(jax.grad(jax.checkpoint(lambda *a: value(*a).sum()), (0, 1, 2)))(*arguments)
        hidden = arguments[0]
        # the tangents of several directions, and a pull-back used twice
        tangents = jax.vmap(lambda d: jax.jvp(of_first, (hidden[0],), (d,))[1])(hidden)
        linear = jax.linearize(of_first, hidden[0])[1]
        result, pull = jax.vjp(of_first, hidden[0])
        ct = jnp.ones_like(result)
        return jax.vmap(both)(*arguments), in_a_loop, again, tangents, jax.lax.map(linear, hidden), pull(2 * ct)[0], 2 * pull(ct)[0]

    mapped, in_a_loop, again, tangents, one_by_one, doubled, twice = transformed(arguments)
    close(mapped, (values, slopes), 1e-6)
    close(in_a_loop, (values, slopes), 1e-6)
    close(again, slopes, 1e-6)
    close(tangents, one_by_one, 1e-6)
    close(doubled, twice, 1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_third_derivatives(rng, reduction, x64):
    hidden, kernel = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=(3, 5)))
    labels, direction = jnp.arange(9) % 5, jnp.asarray(rng.normal(size=(9, 3)))

    def along(function):
        def at(s):
            return function(hidden + s * direction)

        return jax.jvp(jax.grad(jax.grad(at)), (0.0,), (1.0,))[1], jax.grad(jax.grad(jax.grad(at)))(0.0)

    def fused(h):
        return xentjax.linear_softmax_cross_entropy(h, kernel, labels, reduction=reduction, chunk_size=3).sum()

    def exact(h):
        return exact_loss(h @ kernel, labels).sum() / (9 if reduction == "mean" else 1)

    got, expected = jax.jit(lambda: (along(fused), along(exact)))()
    close(got, expected, 1e-10)


def test_no_intermediate_nan(rng):
    (hidden, kernel, *_), labels, where = problem(rng, (11,))
    kernel = kernel.at[:, 3].set(0)
    jax.config.update("jax_debug_nans", True)
    try:
        run = xentjax.fuse_linear(xentjax.softmax_cross_entropy, chunk_size=4)
        value, slopes = jax.value_and_grad(run, (0, 1))(hidden, kernel, labels, where=where)
        assert np.isfinite(value) and all(np.isfinite(s).all() for s in slopes)
    finally:
        jax.config.update("jax_debug_nans", False)


def test_eager_calls_are_compiled_once(rng):
    (hidden, kernel, *_), labels, _ = problem(rng, (11,))
    labels = jnp.maximum(labels, 0)
    run = xentjax.fuse_linear(xentjax.softmax_cross_entropy, chunk_size=4)
    for call in (
        lambda s: run(hidden * s, kernel, labels),
        lambda s: jax.value_and_grad(run, (0, 1))(hidden * s, kernel, labels),
        lambda s: xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, label_smoothing=s, z_loss=s, softcap=10 * s),
    ):
        call(0.5)
        assert compilations(lambda call=call: [call(s) for s in (0.25, 0.75)]) == 0


@pytest.mark.exhaustive
def test_export_for_every_platform(rng):
    (hidden, kernel, *_), labels, _ = problem(rng, (11,), dtype=jnp.bfloat16)
    labels = jnp.maximum(labels, 0)
    for reduction in REDUCTIONS:

        def loss(h, k, y, reduction=reduction):
            return xentjax.linear_softmax_cross_entropy(h, k, y, reduction=reduction, chunk_size=4).sum()

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        exported = jax.export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(hidden, kernel, labels)
        np.testing.assert_allclose(exported.call(hidden, kernel, labels)[0], step(hidden, kernel, labels)[0], rtol=1e-6)


def test_options_of_the_main_loss(rng):
    (hidden, kernel, bias, weights, _), labels, where = problem(rng, (29,))
    class_weights = jnp.asarray(rng.uniform(0.5, 2, 131), jnp.float32)
    class_mask = jnp.arange(131) < 120
    labels = jnp.minimum(labels, 119)

    def fused(h, k, b, cap):
        return xentjax.linear_softmax_cross_entropy(
            h, k, labels, bias=b, where=where, weights=weights, label_smoothing=0.1, class_weights=class_weights, z_loss=0.01,
            softcap=cap, class_mask=class_mask, chunk_size=6,
        )  # fmt: skip

    def dense(h, k, b, cap):
        z = cap * jnp.tanh((h @ k + b[None]) / cap)
        lse = jax.nn.logsumexp(jnp.where(class_mask[None], z, -jnp.inf), -1)
        t = 0.9 * jax.nn.one_hot(labels, 131) + 0.1 * class_mask[None].astype(jnp.float32) / 120
        t = t * class_weights[None]
        loss = jnp.sum(t * (lse[:, None] - z), -1) + 0.01 * t.sum(-1) * lse**2
        w = jnp.where(where, weights, 0)
        return jnp.sum(w * loss) / w.sum()

    x = hidden, kernel, bias, jnp.asarray(5.0)
    close(fused(*x), dense(*x), FIRST)
    close(jax.grad(fused, (0, 1, 2, 3))(*x), jax.grad(dense, (0, 1, 2, 3))(*x), FIRST)
    close(fused(*x[:3], 5.0), dense(*x), FIRST)


def test_value_checks_name_the_label():
    hidden, kernel, labels = jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.array([[0, 1, 2], [3, 9, -100]])
    step = jax.jit(jax.grad(lambda h: xentjax.linear_softmax_cross_entropy(h, kernel, labels, where=labels != -100)))
    with pytest.raises(ValueError, match=re.escape("linear_softmax_cross_entropy: labels[1, 1] = 9 is outside [0, 5).")):
        xentjax.checked(step)(hidden)
    with pytest.raises(ValueError, match=r"softmax_focal_loss: labels\[\d\] = 9 is outside"):
        xentjax.checked(jax.jit(xentjax.fuse_linear(xentjax.softmax_focal_loss, chunk_size=2)))(hidden, kernel, jnp.maximum(labels, 0))


H, K, Y = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32)
cross_entropy = xentjax.softmax_cross_entropy
linear, fused = xentjax.linear_softmax_cross_entropy, xentjax.fuse_linear


def mean(z, y):
    return cross_entropy(z, y).mean()


KERNEL = "kernel must have shape (3, classes) for hidden of shape (4, 3); got"
LEADING = "must have shape (4,), the shape of hidden without its feature axis; got"
SOFT = "labels must have shape (4, 5), the shape of logits, because floating labels are soft labels; got"
ARGS = "must have shape (4, ...), the leading axes of hidden first; got"
CLOSE = "If it does not belong to examples, let loss_fn close over it."
RESULT = "the result of loss_fn must have shape (4,), one value per example for logits of shape (4, 5); got"
REDUCTIONS_ARE = 'reduction must be "mean", "sum" or "none"; got'


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(H, K.T, Y), f"{KERNEL} (5, 3). Use classes_first=True."),
        (lambda: linear(H, K, Y, classes_first=True), "kernel must have shape (classes, 3) for hidden of shape (4, 3); got (3, 5)."),
        (lambda: linear(H, K[:2], Y), f"{KERNEL} (2, 5)."),
        (lambda: linear(H, K[:, :0], Y), "kernel must have at least one class; got shape (3, 0)."),
        (lambda: linear(H[0, 0], K, Y), "hidden must have a feature axis; got shape ()."),
        (lambda: linear(H, K, Y[:3]), f"labels {LEADING} (3,)."),
        (lambda: linear(H, K, Y[:, None]), f"labels {LEADING} (4, 1). Use labels.squeeze(-1)."),
        (lambda: linear(H, K, jnp.zeros(4)), f"{SOFT} (4,). For class indices, use labels.astype(jnp.int32)."),
        (lambda: linear(H, K, Y, weights=jnp.zeros((4, 1))), f"weights {LEADING} (4, 1). Use weights.squeeze(-1)."),
        (lambda: linear(H, K, Y, where=Y[:3] > 0), f"where {LEADING} (3,)."),
        (lambda: linear(H, K, Y, bias=jnp.zeros(3)), "bias must have shape (5,), one per class; got (3,)."),
        (lambda: linear(H, K, Y, class_mask=jnp.ones(4, bool)), "class_mask must have shape (5,), one per class; got (4,)."),
        (lambda: linear(H, K, Y, class_weights=jnp.ones(4)), "class_weights must have shape (5,), one per class; got (4,)."),
        (lambda: linear(H, K, Y, chunk_size=0), "chunk_size must be at least 1; got 0."),
        (lambda: linear(H, K, Y, reduction="avg"), f"{REDUCTIONS_ARE} 'avg'."),
        (lambda: linear(H, K, Y, softcap=0), "softcap must be above 0; got 0."),
        (lambda: linear(H, K, Y, label_smoothing=2), "label_smoothing must be a finite number in [0, 1]; got 2."),
        (lambda: xentjax.fuse_linear(cross_entropy, reduction=None), f"{REDUCTIONS_ARE} None."),
        (lambda: xentjax.fuse_linear(cross_entropy, chunk_size=-1), "chunk_size must be at least 1; got -1."),
        (lambda: fused(cross_entropy)(H, K, Y[:3]), f"args[0] {ARGS} (3,). {CLOSE}"),
        (lambda: fused(cross_entropy)(H, K, {"y": Y, "t": 1.0}), f"args[0]['t'] {ARGS} (). {CLOSE}"),
        (lambda: fused(mean)(H, K, Y), f"{RESULT} (). Do not reduce inside loss_fn: reduction='mean' does it."),
        (lambda: fused(lambda z, y: z)(H, K, Y), f"{RESULT} (4, 5)."),
        (lambda: fused(cross_entropy, has_aux=True)(H, K, Y), "with has_aux=True loss_fn must return a pair (loss, aux); got"),
        (
            lambda: fused(lambda z, y: (cross_entropy(z, y), {"top": z.max()}), has_aux=True)(H, K, Y),
            "aux['top'] must have shape (4, ...), one entry per example for logits of shape (4, 5); got ().",
        ),
        (lambda: xentjax.plan_linear(H, K.T), f"{KERNEL} (5, 3). Use classes_first=True."),
        (lambda: xentjax.plan_linear(H, K, chunk_size=0), "chunk_size must be at least 1; got 0."),
    ],
)
def test_errors_of_shapes_and_ranges(call, message):
    with pytest.raises(ValueError, match=rf"^(linear_softmax_cross_entropy|fuse_linear|plan_linear): {re.escape(message)}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(H.astype(int), K, Y), "hidden must have a floating dtype; got int32. Use hidden.astype(jnp.float32)."),
        (lambda: linear(H, K, Y, where=Y), "where must have dtype bool; got int32. Use where != 0."),
        (lambda: linear(H, K, Y, chunk_size=2.0), "chunk_size must be an integer, known before tracing; got float."),
        (lambda: fused("loss"), "loss_fn must be a function of (logits, *args); got str."),
        (lambda: fused(lambda z, y: y)(H, K, Y), "the result of loss_fn must have a floating dtype; got int32."),
    ],
)
def test_errors_of_dtypes(call, message):
    with pytest.raises(TypeError, match=rf"^(linear_softmax_cross_entropy|fuse_linear): {re.escape(message)}"):
        call()
