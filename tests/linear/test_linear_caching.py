"""`fuse_linear` in a loop compiles once for each function and its settings, and keeps no function alive."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.properties.test_programs import compilations
from xentjax._linear import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")
HIDDEN, KERNEL, LABELS = jnp.ones((2, 3)), jnp.eye(3, 4), jnp.array([0, 3])
GAMMA = functools.partial(xentjax.softmax_focal_loss, gamma=1.5)


def on_a_mesh(loss_fn):
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    return xentjax.fuse_linear_sharded(loss_fn, mesh=mesh, tokens=P("data"), axis_name="model")


def own(logits, labels):
    return xentjax.softmax_cross_entropy(logits, labels)


@jax.jit
def own_jitted(logits, labels):
    return xentjax.softmax_cross_entropy(logits, labels)


@pytest.mark.parametrize("fuse", [xentjax.fuse_linear, on_a_mesh])
@pytest.mark.parametrize(
    "made",
    [
        lambda: own,
        lambda: own_jitted,
        lambda: functools.partial(xentjax.softmax_focal_loss, gamma=1.5),
        lambda: functools.partial(functools.partial(xentjax.softmax_focal_loss, gamma=1.5), axis_name=None),
    ],
    ids=["function", "jitted", "partial", "nested"],
)
def test_one_compilation(fuse, made):
    def step():
        return jax.block_until_ready(jax.value_and_grad(fuse(made()))(HIDDEN, KERNEL, LABELS))

    step()
    assert compilations(step) == 0


def test_one_program_for_each_setting():
    def value(loss_fn, **options):
        return float(jnp.sum(xentjax.fuse_linear(loss_fn, **options)(HIDDEN, KERNEL, LABELS)))

    def exact(gamma):
        p = np.exp([1.0, 0.0]) / (3 * np.e + 1)
        return (-((1 - p) ** gamma) * np.log(p)).mean()

    focal = functools.partial(functools.partial, xentjax.softmax_focal_loss)
    for gamma in (1, 2, 1.5, 1, True, "1.5"):
        if isinstance(gamma, str):  # must raise, and not use the program of another setting
            with pytest.raises((TypeError, ValueError), match="gamma"):
                value(focal(gamma=gamma))
        else:
            np.testing.assert_allclose(value(focal(gamma=gamma)), exact(gamma), rtol=1e-6)
    np.testing.assert_allclose(value(focal(gamma=2), reduction="sum"), 2 * exact(2), rtol=1e-6)
    np.testing.assert_allclose(value(focal(gamma=jnp.float32(2))), exact(2), rtol=1e-6)  # an array, not a number: compiled again
    np.testing.assert_allclose(value(focal(gamma=2), has_aux=False, chunk_size=1), exact(2), rtol=1e-6)


def test_a_callable_whose_state_changes():
    class Loss:
        gamma = 0.0

        def __call__(self, logits, labels):
            return xentjax.softmax_focal_loss(logits, labels, gamma=self.gamma)

    loss, values = Loss(), []
    for loss.gamma in (0.0, 3.0):
        values.append(xentjax.fuse_linear(loss)(HIDDEN, KERNEL, LABELS))
        values.append(xentjax.fuse_linear(loss.__call__)(HIDDEN, KERNEL, LABELS))
    assert values[0] == values[1] > values[2] == values[3]


@pytest.mark.parametrize("fuse", [xentjax.fuse_linear, on_a_mesh])
def test_no_function_is_kept_alive(fuse):
    large = jnp.ones(3)

    def loss_fn(logits, labels, axis_name=None):
        return xentjax.softmax_cross_entropy(logits, labels, axis_name=axis_name) * large[0]

    fuse(loss_fn)(HIDDEN, KERNEL, LABELS)
    fused, alive, kept = fuse(loss_fn), weakref.ref(loss_fn), len(programs._of_function)
    del loss_fn
    gc.collect()
    fused(HIDDEN[:1], KERNEL, LABELS[:1])  # holds what it needs
    del fused
    gc.collect()
    assert alive() is None and len(programs._of_function) == kept - 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_program_outlives_its_function(reduction):
    def traced():
        fused = xentjax.fuse_linear(lambda z, y: xentjax.softmax_cross_entropy(z, y), reduction=reduction)
        return jax.make_jaxpr(lambda hidden: fused(hidden, KERNEL, LABELS).mean())(HIDDEN)

    program = traced()
    gc.collect()
    slope = jax.grad(lambda hidden: jax.core.eval_jaxpr(program.jaxpr, program.consts, hidden)[0])(HIDDEN)
    p = np.exp([1.0, 1, 1, 0]) / (3 * np.e + 1)
    np.testing.assert_allclose(slope, ((p - np.eye(4)[[0, 3]]) @ np.eye(4, 3)) / 2, rtol=1e-6)


def test_settings_are_forgotten_after_a_while():
    def loss_fn(logits, labels, weight):
        return xentjax.softmax_cross_entropy(logits, labels) * weight

    for i in range(programs._SETTINGS + 3):
        xentjax.fuse_linear(functools.partial(loss_fn, weight=i))
    assert programs._of_function[loss_fn].cache_info().currsize == programs._SETTINGS


def test_value_checks_have_programs_of_their_own():
    bad = jnp.array([0, 4])
    for _ in range(2):
        assert np.isnan(xentjax.fuse_linear(own)(HIDDEN, KERNEL, bad))
        with pytest.raises(ValueError, match=r"softmax_cross_entropy: labels\[1\] = 4"):
            xentjax.checked(lambda h: xentjax.fuse_linear(own)(h, KERNEL, bad))(HIDDEN)
