"""The transducer loss against all paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import xentjax
from tests.sequence import oracle
from xentjax import sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
TIME, LABELS, CLASSES = 3, 2, 4
ROUNDING = 2 * (8 + TIME + LABELS)  # eps: two softmaxes and two products per node
POISON = np.nan, np.inf, -np.inf, 1e30


@jax.jit
def evaluate(z, labels, frames, counts, more=None):
    loss, pull = jax.vjp(lambda z: xentjax.transducer_loss(z, labels, logit_lengths=frames, label_lengths=counts, **(more or {})), z)
    return loss, pull(jnp.ones_like(loss))[0]


def ragged(rng, dtype=jnp.float32):
    """Six sequences: two labels, a repeated label, one label, no label, no frame, all of it certain."""
    z = rng.normal(size=(6, TIME, LABELS + 1, CLASSES)) * 2
    labels = np.array([[1, 2], [1, 1], [2, 9], [-5, 9], [1, 9], [3, 2]])
    frames, counts = np.array([3, 2, 3, 2, 0, 3]), np.array([2, 2, 1, 0, 1, 2])
    for t, u, k in ((0, 0, 3), (0, 1, 0), (1, 1, 2), (1, 2, 0), (2, 2, 0)):
        z[5, t, u, k] += 40
    return jnp.asarray(z, dtype), *(jnp.asarray(x, jnp.int32) for x in (labels, frames, counts))


def exact(z, labels, frames, counts, blank=0):
    loss, slope, posteriors = np.zeros(len(z)), np.zeros(z.shape), np.zeros(z.shape)
    for i, (n, m) in enumerate(zip(np.asarray(frames), np.asarray(counts), strict=True)):
        if n == 0:
            loss[i] = np.inf if m else 0
            continue
        part = i, slice(n), slice(m + 1)
        loss[i], slope[part], posteriors[part] = oracle.transducer(
            np.asarray(z[part], np.float64), np.asarray(labels[i, :m]).tolist(), blank
        )
    return loss, slope, posteriors


def test_every_path(rng):
    batch = ragged(rng)
    (loss, slope), (expected, gradient, _) = evaluate(*batch), exact(*batch)
    assert expected[4] == np.inf and 0 < expected[5] < 1e-14
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope[:5], gradient[:5], atol=ROUNDING * EPS)
    assert not slope[4].any()
    # components are differences of later losses; each term is accurate
    np.testing.assert_allclose(slope[5], gradient[5], rtol=1e-4, atol=1e-4 * expected[5])
    large = np.abs(gradient[5]) > 1e-3 * np.abs(gradient[5]).max()
    np.testing.assert_allclose(slope[5][large], gradient[5][large], rtol=1e-4)


def test_derivatives_in_float64(rng, x64):
    batch = ragged(rng, jnp.float64)
    (loss, slope), (expected, gradient, _) = evaluate(*batch), exact(*batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-15)
    direction = jnp.asarray(rng.normal(size=batch[0].shape))

    @jax.jit
    def products(z):
        def slope(z):
            return evaluate(z, *batch[1:])[1]

        return jax.jvp(slope, (z,), (direction,))[1], jax.grad(lambda z: jnp.vdot(slope(z), direction))(z)

    forward, reverse = products(batch[0])
    above, below = (evaluate(batch[0] + s * direction, *batch[1:])[1] for s in (1e-5, -1e-5))
    np.testing.assert_allclose(forward, (above - below) / 2e-5, atol=1e-8)
    np.testing.assert_allclose(reverse, forward, atol=1e-12)


@pytest.mark.parametrize("margin", [20.0, 40.0, 70.0])
def test_certain_sequences_keep_their_digits(margin, rng):
    z = np.asarray(rng.normal(size=(1, TIME, LABELS + 1, CLASSES)), np.float32)
    for t, u, k in ((0, 0, 0), (1, 0, 3), (1, 1, 3), (1, 2, 0), (2, 2, 0)):
        z[0, t, u, k] += np.float32(margin)
    loss, _ = evaluate(jnp.asarray(z), jnp.array([[3, 3]], jnp.int32), jnp.array([3], jnp.int32), jnp.array([2], jnp.int32))
    np.testing.assert_allclose(loss[0], oracle.transducer(z[0], [3, 3])[0], rtol=1e-5)


def test_fastemit_scales_the_gradient_of_labels(rng):
    batch = ragged(rng)
    loss, slope = evaluate(*batch, {"fastemit": 0.5})
    expected, gradient, posteriors = exact(*batch)
    p = np.asarray(jax.nn.softmax(batch[0].astype(jnp.float32)))
    of_labels = posteriors.copy()
    of_labels[..., 0] = 0  # the blank
    extra = p * of_labels.sum(-1, keepdims=True) - of_labels
    np.testing.assert_allclose(loss, 1.5 * expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradient + 0.5 * extra, atol=ROUNDING * EPS)
    with pytest.raises(ValueError, match="fastemit must be a finite number at least 0; got -1"):
        xentjax.transducer_loss(batch[0], batch[1], fastemit=-1.0)


def test_what_lies_after_the_end_reaches_nothing(rng):
    z, labels, frames, counts = ragged(rng)
    loss, slope = evaluate(z, labels, frames, counts)
    t, u = np.arange(TIME)[:, None], np.arange(LABELS + 1)
    outside = (t >= np.asarray(frames)[:, None, None]) | (u > np.asarray(counts)[:, None, None])
    for poison, label in zip(POISON, (-1, 0, 7, 2**31 - 1), strict=True):
        bad_labels = jnp.where(np.arange(LABELS) >= np.asarray(counts)[:, None], label, labels)
        found = evaluate(jnp.where(outside[..., None], poison, z), bad_labels, frames, counts)
        np.testing.assert_array_equal(found[0], loss)
        np.testing.assert_array_equal(found[1], slope)
    assert not slope[outside].any()


def test_bad_labels_lengths_and_nan_stay_in_their_sequence(rng):
    batch = z, labels, frames, counts = ragged(rng)
    expected, gradient = evaluate(*batch)
    labels, frames = labels.at[0, 1].set(CLASSES).at[1, 0].set(0), frames.at[2].set(-1)
    loss, slope = evaluate(z.at[3, 0, 0, 1].set(jnp.nan), labels, frames, counts)
    bad = np.array([True, True, True, True, False, False])
    np.testing.assert_array_equal(np.isnan(loss), bad)
    assert np.isnan(slope[0]).all()
    np.testing.assert_array_equal(loss[~bad], expected[~bad])
    np.testing.assert_array_equal(slope[~bad], gradient[~bad])
    expected, gradient = evaluate(*batch, {"where": jnp.ones(6, bool)})  # the same program as below, so it rounds alike
    loss, slope = evaluate(z.at[:4].set(jnp.nan), labels, frames, counts, {"where": ~jnp.asarray(bad)})
    np.testing.assert_array_equal(loss, np.where(bad, 0, expected))
    np.testing.assert_array_equal(slope, np.where(bad[:, None, None, None], 0, gradient))


def test_impossible_classes_and_other_blanks(rng):
    z, labels, frames, counts = ragged(rng, jnp.bfloat16)
    z, labels = z.at[..., 0].set(-jnp.inf), jnp.where(labels == 1, 0, labels)  # label 0 is impossible, and 3 is the blank
    labels = jnp.where(labels == 3, 1, labels)
    frames = jnp.maximum(frames, 1)
    loss, slope = _with_blank(z, labels, frames, counts)
    expected, gradient, _ = exact(z, labels, frames, counts, 3)
    assert loss.dtype == jnp.float32 and slope.dtype == jnp.bfloat16 and loss[0] == np.inf and np.isfinite(loss[2])
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(np.asarray(slope, np.float32), gradient, atol=float(jnp.finfo(jnp.bfloat16).eps))


@jax.jit
def _with_blank(z, labels, frames, counts):
    mask = jnp.arange(CLASSES) != 0
    z = z.at[..., 0].set(jnp.asarray(9, z.dtype))
    loss, pull = jax.vjp(
        lambda z: xentjax.transducer_loss(z, labels, logit_lengths=frames, label_lengths=counts, blank=3, class_mask=mask), z
    )
    return loss, pull(jnp.ones_like(loss))[0]


def test_from_log_probs(rng):
    z, labels, frames, counts = ragged(rng)
    labels = jnp.where(np.arange(LABELS) < np.asarray(counts)[:, None], labels, 1)

    @jax.jit
    def run(z):
        log_p = jax.nn.log_softmax(z)
        of_labels = jnp.take_along_axis(log_p[:, :, :-1], labels[:, None, :, None], -1).squeeze(-1)

        def loss(blank, of_labels):
            return xentjax.transducer_loss_from_log_probs(blank, of_labels, logit_lengths=frames, label_lengths=counts, fastemit=0.25)

        value, pull = jax.vjp(loss, log_p[..., 0], of_labels)
        return value, *pull(jnp.ones_like(value))

    value, by_blank, by_label = run(z)
    expected, _, posteriors = exact(z, labels, frames, counts)
    np.testing.assert_allclose(value[:5], 1.25 * expected[:5], rtol=ROUNDING * EPS)
    np.testing.assert_allclose(value[5], 0, atol=16 * EPS)  # the mass of other classes is unknown
    np.testing.assert_allclose(by_blank, -posteriors[..., 0], atol=ROUNDING * EPS)
    np.testing.assert_allclose(by_label, -1.25 * posteriors[:, :, :-1, 1:].sum(-1), atol=ROUNDING * EPS)


def test_other_forms(rng):
    z, labels = (
        jnp.asarray(rng.normal(size=(2, 3, TIME, LABELS + 1, CLASSES)), jnp.float32),
        jnp.asarray(rng.integers(1, 4, (2, 3, LABELS))),
    )
    loss, one, mapped, given = jax.jit(
        lambda z, y, n: (
            xentjax.transducer_loss(z, y),
            xentjax.transducer_loss(z[0, 0], y[0, 0]),
            jax.vmap(jax.vmap(lambda z, y, n: xentjax.transducer_loss(z, y, logit_lengths=n)))(z, y, n),
            xentjax.transducer_loss(z, y, logit_lengths=n),
        )
    )(z, labels, jnp.full((2, 3), TIME).at[1, 1].set(2))
    assert loss.shape == (2, 3)
    np.testing.assert_allclose(one, loss[0, 0], rtol=4 * EPS)
    np.testing.assert_allclose(mapped, given, rtol=4 * EPS)


def test_classes_split_over_devices(rng):
    batch = ragged(rng)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split_z = P("data", None, None, "model")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split_z, *[P("data")] * 3), out_specs=(P("data"), split_z))
    def split(z, labels, frames, counts):
        def loss(z):
            return xentjax.transducer_loss(z, labels, logit_lengths=frames, label_lengths=counts, axis_name="model")

        value, pull = jax.vjp(loss, z)
        return value, pull(jnp.ones_like(value))[0]

    (loss, slope), (expected, gradient) = jax.jit(split)(*batch), evaluate(*batch)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradient, atol=ROUNDING * EPS)


def test_nothing_on_the_way_is_nan_and_export(rng):
    batch = ragged(rng)
    jax.config.update("jax_debug_nans", True)
    try:
        assert not any(np.isnan(x).any() for x in evaluate(*batch))
    finally:
        jax.config.update("jax_debug_nans", False)
    exported = export.export(evaluate, platforms=("cpu", "cuda", "rocm", "tpu"))(*batch)
    np.testing.assert_array_equal(exported.call(*batch)[0], evaluate(*batch)[0])


def test_greedy_decoding():
    """Each frame emits its classes, one after another; the predictor counts labels, and the joint network reads the count."""
    frames = jnp.array([[[3, 1, 0], [0, 0, 0], [2, 0, 0]], [[1, 1, 1], [2, 0, 0], [3, 0, 0]]])  # labels of each frame

    def predictor(label, state):
        return state, state + 1

    def joint(frame, before):
        following = jnp.take_along_axis(frame, jnp.minimum(before, 2)[..., None], -1).squeeze(-1)
        return jax.nn.one_hot(jnp.where(before < 3, following, 0), 4)

    labels, lengths = sequence.transducer_greedy_decode(joint, predictor, frames[:, :1], jnp.zeros(2, jnp.int32), max_labels=4)
    assert labels.tolist() == [[3, 1, -1, -1], [1, 1, 1, -1]] and lengths.tolist() == [2, 3]
    labels, lengths = sequence.transducer_greedy_decode(
        joint, predictor, frames[:, :1], jnp.zeros(2, jnp.int32), max_labels=4, max_labels_per_frame=1, logit_lengths=jnp.array([1, 0])
    )
    assert labels.tolist() == [[3, -1, -1, -1], [-1, -1, -1, -1]] and lengths.tolist() == [1, 0]


def test_errors():
    z, y = jnp.zeros((2, 3, 3, 4)), jnp.ones((2, 2), jnp.int32)
    for message, call in {
        r"transducer_loss: labels must have shape \(2, 2\).* got \(2, 3\)": lambda: xentjax.transducer_loss(z, jnp.ones((2, 3), jnp.int32)),
        r"transducer_loss: logits must have shape \[..., time, max_labels \+ 1, classes\]": lambda: xentjax.transducer_loss(z[0, 0], y),
        r"label_log_probs must have shape \(2, 3, 2\).* got \(2, 3, 3\)": lambda: xentjax.transducer_loss_from_log_probs(
            z[..., 0], z[..., 0]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, given in {
        r"blank must be a class, at least 0; got -1\.": {"blank": -1},
        r"blank must be a class in \[0, 4\); got 4\.": {"blank": 4},
        r"max_labels must be at least 1; got 0\.": {"max_labels": 0},
        r"max_labels_per_frame must be at least 1; got -1\.": {"max_labels_per_frame": -1},
        r"joint must return logits of shape \(2, classes\); got \(4,\)\.": {"joint": lambda frame, last: frame[0]},
    }.items():
        arguments = {"joint": lambda frame, last: frame, "predictor": lambda label, last: (label, label), "max_labels": 2, **given}
        with pytest.raises(ValueError, match=f"transducer_greedy_decode: {message}"):
            sequence.transducer_greedy_decode(encoded=z[:, :, 0], state=jnp.zeros(2, jnp.int32), **arguments)
    with pytest.raises(ValueError, match=r"transducer_loss: label_lengths\[1\] = 3 is outside \[0, 2\]"):
        xentjax.checked(xentjax.transducer_loss)(z, y, label_lengths=jnp.array([2, 3]))
