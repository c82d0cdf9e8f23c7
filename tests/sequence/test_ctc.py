"""CTC against all alignments, and everything that a batch may hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from tests.sequence import oracle
from xentjax import sequence
from xentjax._sequence import frames

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
TIME, CLASSES, LABELS = 4, 4, 2
ROUNDING = 8 + TIME  # eps: the softmax of a frame, and one product per frame
POISON = np.nan, np.inf, -np.inf, 1e30


@jax.jit
def evaluate(z, labels, frames, counts, blank=None, more=None):
    """Value and gradient of every sequence; one program."""
    loss, pull = jax.vjp(lambda z: xentjax.ctc_loss(z, labels, logit_lengths=frames, label_lengths=counts, **(more or {})), z)
    return loss, pull(jnp.ones_like(loss))[0]


def ragged(rng, dtype=jnp.float32):
    """Seven sequences: two labels, repeats that need a blank, a label alone, no label, no alignment, no frame, all of it certain."""
    z = rng.normal(size=(7, TIME, CLASSES)) * 2
    labels = np.array([[1, 2], [1, 1], [2, 9], [-5, 9], [3, 3], [3, 2], [3, 2]])
    frames, counts = np.array([4, 4, 3, 2, 2, 0, 4]), np.array([2, 2, 1, 0, 2, 1, 2])
    z[6, np.arange(TIME), [3, 0, 2, 2]] += 40
    return jnp.asarray(z, dtype), jnp.asarray(labels, jnp.int32), jnp.asarray(frames, jnp.int32), jnp.asarray(counts, jnp.int32)


def exact(z, labels, frames, counts, blank=0):
    """The loss and the gradient of each sequence by enumeration; the gradient is 0 after the end."""
    loss, slope = np.zeros(len(z)), np.zeros(z.shape)
    for i, (n, m) in enumerate(zip(np.asarray(frames), np.asarray(counts), strict=True)):
        loss[i], slope[i, :n], *_ = oracle.ctc(np.asarray(z[i, :n], np.float64).reshape(n, CLASSES), np.asarray(labels[i, :m]), blank)
    return loss, slope


def test_every_alignment(rng):
    batch = ragged(rng)
    (loss, slope), (expected, gradient) = evaluate(*batch), exact(*batch)
    assert expected[4] == expected[5] == np.inf and 0 < expected[6] < 1e-14
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope[:6], gradient[:6], atol=ROUNDING * EPS)
    assert not slope[4:6].any()
    np.testing.assert_allclose(slope[6], gradient[6], rtol=1e-4)  # the certain sequence, where p − γ would be 0
    np.testing.assert_allclose(np.sum(slope, -1), 0, atol=4 * EPS)


@pytest.mark.exhaustive
def test_every_alignment_in_float64(rng, x64):
    batch = ragged(rng, jnp.float64)
    (loss, slope), (expected, gradient) = evaluate(*batch), exact(*batch)
    assert loss.dtype == slope.dtype == jnp.float64
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    np.testing.assert_allclose(slope, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.exhaustive
def test_tangents_and_hessian_products(rng, x64):
    batch = ragged(rng, jnp.float64)
    gradient, direction = exact(*batch)[1], jnp.asarray(rng.normal(size=batch[0].shape))

    @jax.jit
    def products(z):
        _, (tangent, forward) = jax.jvp(lambda z: evaluate(z, *batch[1:]), (z,), (direction,))
        return tangent, forward, jax.grad(lambda z: jnp.vdot(evaluate(z, *batch[1:])[1], direction))(z)

    tangent, forward, reverse = products(batch[0])
    step = 1e-5
    above, below = (evaluate(batch[0] + s * direction, *batch[1:])[1] for s in (step, -step))
    np.testing.assert_allclose(forward, (above - below) / (2 * step), atol=1e-8)
    np.testing.assert_allclose(reverse, forward, atol=1e-12)
    np.testing.assert_allclose(tangent[:4], np.sum(gradient * np.asarray(direction), (1, 2))[:4], atol=1e-12)


@pytest.mark.parametrize("path", [(1, 1, 2, 2), (0, 1, 0, 1), (1, 0, 0, 2), (1, 1, 1, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("margin", [20.0, 40.0, 70.0])
def test_certain_sequences_keep_their_digits(path, margin, rng):
    z = np.asarray(rng.normal(size=(TIME, CLASSES)), np.float32)
    z[np.arange(TIME), path] += np.float32(margin)
    labels = np.asarray(oracle.collapsed(path, 0), np.int32)
    padded = np.zeros(LABELS, np.int32)
    padded[: len(labels)] = labels
    # seven times, for the program of the other tests
    batch = (np.broadcast_to(x, (7, *np.shape(x))) for x in (z, padded, np.int32(TIME), np.int32(len(labels))))
    loss, slope = evaluate(*map(jnp.asarray, batch))
    expected, gradient, *_ = oracle.ctc(z, labels)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)
    # where two alignments share nearly all, the gradient of a frame has terms of both signs; each is accurate
    np.testing.assert_allclose(slope[0], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())


def test_a_thousand_frames_in_float32(rng):
    """No digit is lost with the size of the sum: log p is −2,500 here, and eps of this number is 3e-4."""
    z, labels = jnp.asarray(rng.normal(size=(2, 1000, 5)) * 3, jnp.float32), jnp.asarray(rng.integers(1, 5, (2, 30)), jnp.int32)
    full = jnp.full(2, 1000, jnp.int32), jnp.full(2, 30, jnp.int32)
    loss, slope = evaluate(z, labels, *full)
    for i in range(2):
        expected, gradient = forward_backward(np.asarray(z[i], np.float64), np.asarray(labels[i]))
        np.testing.assert_allclose(loss[i], expected, rtol=16 * EPS)
        np.testing.assert_allclose(slope[i], gradient, atol=200 * EPS)


def forward_backward(z, labels):
    """The textbook's α and β in float64, scaled by frames; correct for sums without extreme ratios."""
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    states = np.zeros(2 * len(labels) + 1, int)
    states[1::2] = labels
    skip = np.zeros(len(states), bool)
    skip[3::2] = labels[1:] != labels[:-1]
    emit = log_p[:, states]

    def run(emit, skip):
        out, at = [], np.where(np.arange(len(states)) < 2, emit[0], -np.inf)
        out.append(at)
        for row in emit[1:]:
            one, two = np.r_[-np.inf, at[:-1]], np.where(skip, np.r_[-np.inf, -np.inf, at[:-2]], -np.inf)
            with np.errstate(invalid="ignore"):
                at = np.logaddexp(np.logaddexp(at, one), two) + row
            out.append(at)
        return np.array(out)

    back = np.r_[False, False, skip[2:]][::-1]
    back = np.r_[False, False, back[:-2]]  # an edge from s to s + 2 is one from the mirror of s + 2 to that of s
    alpha, beta = run(emit, skip), run(emit[::-1, ::-1], back)[::-1, ::-1]
    total = np.logaddexp(alpha[-1, -1], alpha[-1, -2])
    posterior = np.zeros_like(z)
    np.add.at(posterior.T, states, np.exp(alpha + beta - emit - total).T)
    return -total, np.exp(log_p) - posterior


def test_what_lies_after_the_end_reaches_nothing(rng):
    z, labels, frames, counts = ragged(rng)
    loss, slope = evaluate(z, labels, frames, counts)
    outside = np.arange(TIME) >= np.asarray(frames)[:, None]
    for poison, label in zip(POISON, (-1, 0, 7, 2**31 - 1), strict=True):
        bad_labels = jnp.where(np.arange(LABELS) >= np.asarray(counts)[:, None], label, labels)
        found = evaluate(jnp.where(outside[..., None], poison, z), bad_labels, frames, counts)
        np.testing.assert_array_equal(found[0], loss)
        np.testing.assert_array_equal(found[1], slope)
    assert not slope[outside].any()


def test_bad_labels_and_lengths_are_nan_in_their_sequence(rng):
    z, labels, frames, counts = ragged(rng)
    expected, gradient = evaluate(z, labels, frames, counts)
    labels = labels.at[0, 1].set(CLASSES).at[1, 0].set(0).at[2, 0].set(-1)  # no class, the blank, no class
    frames, counts = frames.at[3].set(TIME + 1), counts.at[6].set(-1)
    loss, slope = evaluate(z, labels, frames, counts)
    bad = np.array([True, True, True, True, False, False, True])
    np.testing.assert_array_equal(np.isnan(loss), bad)
    assert np.isnan(slope[bad][np.arange(TIME) < np.asarray(frames)[bad, None]]).all()
    np.testing.assert_array_equal(loss[~bad], expected[~bad])
    np.testing.assert_array_equal(slope[~bad], gradient[~bad])


def test_where_hides_sequences(rng):
    z, labels, frames, counts = ragged(rng)
    expected, gradient = evaluate(z, labels, frames, counts)
    where = jnp.arange(7) % 2 == 0
    z, labels = jnp.where(where[:, None, None], z, jnp.nan), jnp.where(where[:, None], labels, -100)
    loss, slope = evaluate(z, labels, frames, jnp.where(where, counts, 99), None, {"where": where})
    np.testing.assert_array_equal(loss, np.where(where, expected, 0))
    np.testing.assert_array_equal(slope, np.where(where[:, None, None], gradient, 0))


def test_a_nan_stays_in_its_sequence(rng):
    z, *rest = ragged(rng)
    expected, _ = evaluate(z, *rest)
    loss, slope = evaluate(z.at[1, 2, 3].set(jnp.nan), *rest)
    assert np.isnan(loss[1]) and np.isnan(slope[1]).any()
    np.testing.assert_array_equal(np.delete(loss, 1), np.delete(expected, 1))


@pytest.mark.parametrize("shape", [(CLASSES,), pytest.param((7, TIME, CLASSES), marks=pytest.mark.exhaustive)])
def test_impossible_classes(shape, rng):
    """Logits of −∞, and classes that do not exist: the same numbers, and +∞ where a label is one of them."""
    z, labels, frames, counts = ragged(rng)
    z, labels = z.at[..., 3].set(-jnp.inf), labels.at[5:].set(jnp.array([1, 2]))
    (loss, slope), (expected, gradient) = evaluate(z, labels, frames, counts), exact(z, labels, frames, counts)
    assert loss[4] == np.inf and np.isfinite(expected[:4]).all() and np.isfinite(loss[6])
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradient, atol=ROUNDING * EPS)
    mask = jnp.broadcast_to(jnp.arange(CLASSES) < 3, shape)
    masked, gone = evaluate(z.at[..., 3].set(50.0), labels, frames, counts, None, {"class_mask": mask})
    np.testing.assert_allclose(masked, loss, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(gone, slope, atol=ROUNDING * EPS)
    assert not gone[..., 3].any()
    loss, slope = evaluate(jnp.full_like(z, -jnp.inf), labels, frames, counts)
    assert (loss == np.inf).all() and not slope.any()


@pytest.mark.parametrize("shift", [-1e4, 1e8])
def test_shifted_logits(shift, rng):
    z, *rest = ragged(rng)
    z = (z + shift) - shift  # rounded as the shifted ones are
    expected, gradient = evaluate(z, *rest)
    loss, slope = evaluate(z + shift, *rest)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradient, atol=ROUNDING * EPS)


def test_half_precision_and_other_blanks(rng):
    z, labels, frames, counts = ragged(rng, jnp.bfloat16)
    loss, pull = jax.jit(
        lambda z: jax.vjp(lambda z: xentjax.ctc_loss(z, labels - 1, logit_lengths=frames, label_lengths=counts, blank=CLASSES - 1), z)
    )(z)
    expected, gradient = exact(z, np.asarray(labels) - 1, frames, counts, CLASSES - 1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    slope = pull(jnp.ones_like(loss))[0]
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(slope, np.float32), gradient, atol=float(jnp.finfo(jnp.bfloat16).eps))


def test_leading_axes_vmap_and_full_lengths(rng):
    z, labels = jnp.asarray(rng.normal(size=(2, 3, TIME, CLASSES)), jnp.float32), jnp.asarray(rng.integers(1, CLASSES, (2, 3, LABELS)))
    loss, one, mapped, given = jax.jit(
        lambda z, y, n: (
            xentjax.ctc_loss(z, y),
            xentjax.ctc_loss(z[0, 0], y[0, 0]),
            jax.vmap(jax.vmap(lambda z, y, n: xentjax.ctc_loss(z, y, logit_lengths=n)))(z, y, n),
            xentjax.ctc_loss(z, y, logit_lengths=n),
        )
    )(z, labels, jnp.full((2, 3), TIME).at[1, 1].set(3))
    assert loss.shape == (2, 3) and one.shape == ()
    np.testing.assert_allclose(one, loss[0, 0], rtol=4 * EPS)
    np.testing.assert_allclose(mapped, given, rtol=4 * EPS)
    assert xentjax.ctc_loss(jnp.zeros((2, 0, 3)), jnp.zeros((2, 0), jnp.int32)).tolist() == [0.0, 0.0]


def test_from_log_probs(rng):
    z, labels, frames, counts = ragged(rng)
    z, labels = z.at[6].set(z[0]), jnp.where(np.arange(LABELS) < np.asarray(counts)[:, None], labels, 1)

    @jax.jit
    def both(z):
        log_p = jax.nn.log_softmax(z)
        of_labels = jnp.take_along_axis(log_p, labels[:, None], -1)

        def loss(blank, of_labels):
            return xentjax.ctc_loss_from_log_probs(blank, of_labels, labels, logit_lengths=frames, label_lengths=counts)

        value, pull = jax.vjp(loss, log_p[..., 0], of_labels)
        return (
            value,
            pull(jnp.ones_like(value)),
            jax.vjp(lambda z: sequence.ctc_posteriors(z, labels, logit_lengths=frames, label_lengths=counts), z)[0],
        )

    value, (by_blank, by_label), posteriors = both(z)
    np.testing.assert_allclose(value, exact(z, labels, frames, counts)[0], rtol=ROUNDING * EPS)
    np.testing.assert_allclose(np.concatenate([by_blank[..., None], by_label], -1), -posteriors, atol=ROUNDING * EPS)
    for i in (0, 1):
        of_classes = oracle.ctc(np.asarray(z[i], np.float64), np.asarray(labels[i]))[2]
        np.testing.assert_allclose(posteriors[i, :, 0], of_classes[:, 0], atol=ROUNDING * EPS)
        np.testing.assert_allclose(posteriors[i].sum(-1), 1, atol=ROUNDING * EPS)


def test_alignment_and_greedy_decoding(rng):
    z, labels, frames, counts = ragged(rng)
    (path, log_prob), pull = jax.vjp(lambda z: sequence.ctc_alignment(z, labels, logit_lengths=frames, label_lengths=counts), z)
    slope = pull((np.zeros(path.shape, jax.dtypes.float0), jnp.ones_like(log_prob)))[0]
    for i, (n, m) in enumerate(zip(frames.tolist(), counts.tolist(), strict=True)):
        *_, best, expected = oracle.ctc(np.asarray(z[i, :n], np.float64).reshape(n, CLASSES), np.asarray(labels[i, :m]))
        np.testing.assert_allclose(log_prob[i], expected, rtol=1e-4)
        if best is None:
            assert log_prob[i] == -np.inf and (path[i] == -1).all() and not slope[i].any()
        else:
            assert path[i].tolist() == [*best, *[-1] * (TIME - n)]
            p = np.exp(np.asarray(jax.nn.log_softmax(z[i, :n])))
            np.testing.assert_allclose(slope[i, :n], np.eye(CLASSES)[list(best)] - p, atol=ROUNDING * EPS)
    found, lengths = sequence.ctc_greedy_decode(z, logit_lengths=frames)
    for i, n in enumerate(frames.tolist()):
        expected = oracle.collapsed(np.asarray(z[i, :n]).argmax(-1), 0)
        assert found[i].tolist() == [*expected, *[-1] * (TIME - len(expected))] and lengths[i] == len(expected)
    assert np.isnan(sequence.ctc_alignment(z, labels.at[0, 0].set(9), label_lengths=counts)[1][0])


def test_classes_split_over_devices(rng):
    batch = ragged(rng)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)

    def even(arrays):
        return [jnp.concatenate([x, x[:1]]) for x in arrays]

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data", None, "model"), *[P("data")] * 3), out_specs=(P("data"), P("data", None, "model"))
    )
    def split(z, labels, frames, counts):
        def loss(z):
            return xentjax.ctc_loss(z, labels, logit_lengths=frames, label_lengths=counts, axis_name="model")

        value, pull = jax.vjp(loss, z)
        return value, pull(jnp.ones_like(value))[0]

    (loss, slope), (expected, gradient) = jax.jit(split)(*even(batch)), even(evaluate(*batch))
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    np.testing.assert_allclose(slope, gradient, atol=ROUNDING * EPS)
    np.testing.assert_allclose(slope[6], gradient[6], rtol=1e-4)


# Two shapes, so that each is compiled with its own limit.
@pytest.mark.parametrize(("time", "limit"), [pytest.param(13, 0, marks=pytest.mark.exhaustive), (14, 256)])
def test_tangents_of_many_labels_by_lookup_and_by_product(time, limit, rng, monkeypatch):
    """The derivative of a label's logit, on one device and with the classes split over two."""
    monkeypatch.setattr(frames, "_PRODUCT", limit)
    z, labels = jnp.asarray(rng.normal(size=(2, time, 6)), jnp.float32), jnp.asarray(rng.integers(1, 6, (2, 5)), jnp.int32)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def gradient(z, axis_name=None):
        loss, pull = jax.vjp(lambda z: xentjax.ctc_loss(z, labels, axis_name=axis_name), z)
        return pull(jnp.ones_like(loss))[0]

    split = jax.shard_map(
        functools.partial(gradient, axis_name="model"), mesh=mesh, in_specs=P(None, None, "model"), out_specs=P(None, None, "model")
    )
    for found in (jax.jit(gradient)(z), jax.jit(split)(z)):
        for i in range(2):
            expected = forward_backward(np.asarray(z[i], np.float64), np.asarray(labels[i]))[1]
            np.testing.assert_allclose(found[i], expected, atol=(8 + time) * EPS)


def test_nothing_on_the_way_is_nan(rng):
    batch = ragged(rng)
    jax.config.update("jax_debug_nans", True)
    try:
        assert not any(np.isnan(x).any() for x in evaluate(batch[0].at[0, 0, 1].set(-jnp.inf), *batch[1:]))
    finally:
        jax.config.update("jax_debug_nans", False)


def test_export_for_every_platform(rng):
    batch = ragged(rng)
    exported = export.export(evaluate, platforms=("cpu", "cuda", "rocm", "tpu"))(*batch)
    np.testing.assert_array_equal(exported.call(*batch)[0], evaluate(*batch)[0])


def test_errors():
    z, y = jnp.zeros((2, 3, 4)), jnp.ones((2, 2), jnp.int32)
    for message, call in {
        r"ctc_loss: labels must have shape \(2, max_labels\).* got \(2,\)\. Pad": lambda: xentjax.ctc_loss(z, y[:, 0]),
        r"ctc_loss: labels must have shape \(2, max_labels\).* got \(3, 2\)": lambda: xentjax.ctc_loss(z, jnp.ones((3, 2), jnp.int32)),
        r"ctc_loss: logit_lengths must have shape \(2,\).* got \(2, 1\)": lambda: xentjax.ctc_loss(z, y, logit_lengths=y[:, :1]),
        r"ctc_loss: blank must be a class in \[0, 4\); got -1\. Use blank=3": lambda: xentjax.ctc_loss(z, y, blank=-1),
        r"ctc_loss: logits must have shape \[..., time, classes\]; got \(4,\)": lambda: xentjax.ctc_loss(z[0, 0], y[0]),
        r"ctc_loss: where must have shape \(2,\)": lambda: xentjax.ctc_loss(z, y, where=jnp.ones((2, 3), bool)),
        r"label_log_probs must have shape \(2, 3, 2\)": lambda: xentjax.ctc_loss_from_log_probs(z[..., 0], z, y),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, call in {
        r"ctc_loss: labels must have an integer dtype; got float32": lambda: xentjax.ctc_loss(z, y.astype(jnp.float32)),
        r"ctc_loss: blank must be a Python integer": lambda: xentjax.ctc_loss(z, y, blank=jnp.ones(2)),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


def test_checked(rng):
    z, y, frames, counts = jnp.zeros((2, 3, 4)), jnp.ones((2, 2), jnp.int32), jnp.array([2, 3]), jnp.array([1, 2])
    checked = xentjax.checked(jax.jit(lambda z, y, frames, counts: xentjax.ctc_loss(z, y, logit_lengths=frames, label_lengths=counts)))
    with pytest.raises(ValueError, match=r"ctc_loss: labels\[1, 0\] = 0 is outside \[0, 4\) or the blank \(0\)"):
        checked(z, y.at[1, 0].set(0), frames, counts)
    with pytest.raises(ValueError, match=r"ctc_loss: logit_lengths\[0\] = 4 is outside \[0, 3\]"):
        checked(z, y, frames.at[0].set(4), counts)
    checked(z.at[0, 2].set(jnp.nan), y.at[0, 1].set(9), frames, counts)


def test_a_lost_class_that_is_repeated(rng):
    """At the last frames, nearly all lost probability is that of label 1, which stands twice among the labels."""
    z = rng.normal(size=(5, CLASSES))
    z[np.arange(5), [1, 0, 1, 2, 2]] += 40
    z[3:, 1] += 20
    loss, slope = jax.value_and_grad(xentjax.ctc_loss)(jnp.asarray(z, jnp.float32), jnp.array([1, 1, 2]))
    expected, gradient, *_ = oracle.ctc(np.float32(z), [1, 1, 2])
    assert expected < 1e-6
    np.testing.assert_allclose(loss, expected, rtol=1e-4)  # exponents up to 40 are rounded
    np.testing.assert_allclose(slope, gradient, atol=1e-4 * expected)


def test_gradient_of_a_certain_path(rng):
    """The component of the class of a frame is 1 − p, which is the sum of the other probabilities."""
    z, path = rng.normal(size=(4, CLASSES)), [1, 0, 2, 2]
    z[np.arange(4), path] += 40
    slope = jax.grad(lambda z: sequence.ctc_alignment(z, jnp.array([1, 2]))[1])(jnp.asarray(z, jnp.float32))
    e = np.exp(np.float64(np.float32(z)))
    p = e / e.sum(-1, keepdims=True)
    others = np.where(np.eye(CLASSES)[path] == 1, 0, p)
    # The exponents up to 45 are rounded.
    np.testing.assert_allclose(slope, np.where(np.eye(CLASSES)[path] == 1, others.sum(-1, keepdims=True), -p), rtol=100 * EPS)


def test_torch(rng, x64):
    """torch differentiates through its log-softmax. The first four sequences have an alignment."""
    torch = pytest.importorskip("torch")
    z, labels, frames, counts = (np.array(x)[:4] for x in ragged(rng, jnp.float64))
    logits = torch.from_numpy(z).requires_grad_()
    found = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.from_numpy(np.clip(labels, 1, 3)),
        torch.from_numpy(frames),
        torch.from_numpy(counts),
        reduction="none",
    )
    found.sum().backward()
    loss, slope = evaluate(*map(jnp.asarray, (z, labels, frames, counts)))
    np.testing.assert_allclose(loss, found.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(slope, logits.grad.numpy(), atol=1e-9)


def test_batches_split_over_devices(rng):
    # Whether any sequence is certain is not asked over devices. The last sequence is certain.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    labels = jnp.asarray(rng.integers(1, 5, (8, 2)), jnp.int32)
    z = jnp.asarray(rng.normal(size=(8, 5, 5)), jnp.float32)
    z = z.at[7].set(40 * jax.nn.one_hot(jnp.array([labels[7, 0], 0, 0, labels[7, 1], 0]), 5))

    def losses_and_slopes(z, labels):
        return xentjax.ctc_loss(z, labels), jax.grad(lambda z: xentjax.ctc_loss(z, labels).sum())(z)

    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (z, labels)]
    compiled = jax.jit(losses_and_slopes).lower(*split).compile()
    assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "collective-permute", "all-to-all"))
    for found, expected in zip(compiled(*split), losses_and_slopes(z, labels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 if expected.ndim > 1 else 0)  # gradients are differences


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 2), (0, 0, 0)])
def test_no_sequences_and_no_frames(shape):
    batch, time, most = shape
    z, y = jnp.zeros((batch, time, 4)), jnp.ones((batch, most), jnp.int32)
    loss, gradient = jax.value_and_grad(lambda z: jnp.sum(xentjax.ctc_loss(z, y)))(z)
    assert loss == (np.inf if batch else 0)  # no alignment of two labels in no frames
    assert gradient.shape == z.shape
    assert xentjax.sequence.ctc_posteriors(z, y).shape == (batch, time, 1 + most)
