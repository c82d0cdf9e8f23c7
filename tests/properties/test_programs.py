"""How many programs there are for a loss, and what is in them."""

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from tests.tables import cases

EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: EVENTS.append(name))


def compilations(function):
    """How many programs XLA compiles while `function` runs."""
    before = len(EVENTS)
    function()
    return sum("backend_compile" in name for name in EVENTS[before:])


def test_one_program_per_shape_and_option(rng):
    z, y = cases.CLASSES[0].draw(rng, (11,), classes=13)
    bits = jnp.ones_like(z)
    sweeps = {
        "label_smoothing": lambda x: xentjax.softmax_cross_entropy(z, y, label_smoothing=x),
        "z_loss": lambda x: xentjax.softmax_cross_entropy(z, y, z_loss=x),
        "gamma": lambda x: xentjax.softmax_focal_loss(z, y, gamma=x),
        "alpha": lambda x: xentjax.sigmoid_focal_loss(z, bits, alpha=x),
        "clip": lambda x: xentjax.asymmetric_loss(z, bits, clip=x),
    }
    for keyword, loss in sweeps.items():
        values = [0.1, 0.2, 0.3, 0.9, 1.0, np.float32(0.5), np.float64(0.25)]
        loss(0.7)
        assert compilations(lambda loss=loss, values=values: [loss(x) for x in values]) == 0, keyword
        # 0 leaves the term out: one more program, once
        assert compilations(lambda loss=loss: [loss(0.0), loss(0), loss(0.0)]) <= 1, keyword
    assert compilations(lambda: xentjax.softmax_cross_entropy(z, y, label_smoothing=0.7)) == 0
    other, index = cases.CLASSES[0].draw(rng, (12,), classes=13)
    assert compilations(lambda: xentjax.softmax_cross_entropy(other, index)) == 1  # an eager call is one program


def test_nothing_of_the_own_jit_is_left_in_a_user_s(rng):
    z, y = cases.CLASSES[0].draw(rng)
    program = jax.jit(jax.value_and_grad(lambda z: xentjax.softmax_cross_entropy(z, y).mean())).lower(z).compile()
    assert " call(" not in program.as_text()
