"""The token-and-duration transducer loss against all paths, and its decoder."""

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
TIME, LABELS, CLASSES = 4, 2, 4
DURATIONS = (3, 0, 2)  # some paths come to a frame from which no duration leads to the end
ROUNDING = 3 * (8 + TIME + LABELS)  # eps: three softmaxes and three products per node
POISON = np.nan, np.inf, -np.inf, 1e30
CERTAIN = (0, 0, 3, 1), (0, 1, 0, 2), (2, 1, 2, 1), (2, 2, 0, 2)  # a path of the labels 3 and 2: frame, labels so far, class, duration


@functools.partial(jax.jit, static_argnames=("blank", "durations"))
def evaluate(z, v, labels, frames, counts, sigma=None, where=None, class_mask=None, *, blank=0, durations=DURATIONS):
    keywords = {"logit_lengths": frames, "label_lengths": counts, "where": where, "class_mask": class_mask}
    sigma = 0.0 if sigma is None else sigma
    loss, pull = jax.vjp(lambda z, v: xentjax.tdt_loss(z, v, labels, durations=durations, blank=blank, sigma=sigma, **keywords), z, v)
    return loss, *pull(jnp.ones_like(loss))


def run(z, v, labels, frames, counts, sigma=0.0, where=None):
    """`evaluate`, always as the same program."""
    return evaluate(z, v, labels, frames, counts, jnp.asarray(sigma, z.dtype), jnp.ones(len(z), bool) if where is None else where)


def ragged(rng, dtype=jnp.float32):
    """Eight sequences: two labels, a repeated label, one label, no label, three without a path or frames, all of it certain."""
    z, v = rng.normal(size=(8, TIME, LABELS + 1, CLASSES)) * 2, rng.normal(size=(8, TIME, LABELS + 1, len(DURATIONS))) * 2
    labels = np.array([[1, 2], [1, 1], [2, 9], [-5, 9], [1, 9], [1, 9], [9, 9], [3, 2]])
    frames, counts = np.array([4, 3, 4, 2, 0, 1, 0, 4]), np.array([2, 2, 1, 0, 1, 1, 0, 2])
    make_certain(z, v, 7, 40)
    return jnp.asarray(z, dtype), jnp.asarray(v, dtype), *(jnp.asarray(x, jnp.int32) for x in (labels, frames, counts))


def make_certain(z, v, i, margin):
    for t, u, k, j in CERTAIN:
        z[i, t, u, k] += margin
        v[i, t, u, j] += margin


def exact(z, v, labels, frames, counts, sigma=0.0, blank=0):
    """(losses, gradients of both logits, posteriors of classes and of durations)."""
    z, v = (np.asarray(x, np.float64) for x in (z, v))
    found = [np.zeros(len(z)), *(np.zeros(x.shape) for x in (z, v, z, v))]
    for i, (n, m) in enumerate(zip(np.asarray(frames), np.asarray(counts), strict=True)):
        part = i, slice(n), slice(m + 1)
        if n == 0:
            found[0][i] = np.inf if m else 0
            continue
        found[0][i], *rest = oracle.tdt(z[part], v[part], np.asarray(labels[i, :m]).tolist(), DURATIONS, blank, sigma)
        for x, y in zip(found[1:], rest, strict=True):
            x[part] = y
    return found


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_every_path(rng, sigma):
    batch = ragged(rng)
    (loss, *slopes), (expected, *gradients) = run(*batch, sigma), exact(*batch, np.float32(sigma))
    assert np.isinf(expected).tolist() == [False] * 4 + [True] * 2 + [False] * 2 and expected[6] == 0
    assert sigma or 0 < expected[7] < 1e-14
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    for slope, gradient in zip(slopes, gradients, strict=False):
        np.testing.assert_allclose(slope[:7], gradient[:7], atol=ROUNDING * EPS)
        np.testing.assert_allclose(np.sum(slope, axis=-1), 0, atol=ROUNDING * EPS)
        assert not slope[4:7].any()
        # components are differences of later losses; each term is accurate
        largest = np.abs(gradient[7]).max()
        np.testing.assert_allclose(slope[7], gradient[7], rtol=1e-4, atol=1e-4 * largest)
        large = np.abs(gradient[7]) > 1e-3 * largest
        np.testing.assert_allclose(slope[7][large], gradient[7][large], rtol=1e-4)


def test_certain_sequences_keep_their_digits(rng):
    margins = np.arange(10.0, 90.0, 10.0)
    z, v = (rng.normal(size=(8, TIME, LABELS + 1, n)).astype(np.float32) for n in (CLASSES, len(DURATIONS)))
    for i, margin in enumerate(margins):
        make_certain(z, v, i, np.float32(margin))
    args = *map(jnp.asarray, (z, v)), jnp.full((8, 2), 2, jnp.int32).at[:, 0].set(3), jnp.full(8, TIME), jnp.full(8, LABELS)
    for sigma in (0.0, 1e-9):
        loss, expected = run(*args, sigma)[0], exact(*args, np.float32(sigma))[0]
        np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("durations", [(1, 0), pytest.param((0, 1, 2, 3, 4), marks=pytest.mark.exhaustive)])
def test_long_sequences_and_derivatives_in_float64(rng, x64, durations):
    time, most, lengths = 25, 6, ((25, 4), (17, 6))
    labels = rng.integers(1, 5, (2, most))
    point = (*(rng.normal(size=(2, time, most + 1, n)) * 3 for n in (5, len(durations))), np.float64(0.05))
    direction = tuple(rng.normal(size=x.shape) for x in point)

    def slopes(*point):
        def loss(z, v, sigma):
            return evaluate(z, v, jnp.asarray(labels), *jnp.array(lengths).T, sigma, durations=durations)[0]

        value, pull = jax.vjp(loss, *point)
        return value, *pull(jnp.ones_like(value))

    @jax.jit
    def derivatives(*point):
        found, tangents = jax.jvp(slopes, point, direction)
        product = jax.grad(lambda *point: sum(map(jnp.vdot, slopes(*point)[1:], direction)), (0, 1, 2))(*point)
        return found[:3], tangents, product

    def scan(step):
        z, v, sigma = (x + step * d for x, d in zip(point, direction, strict=True))
        found = [np.zeros(2), np.zeros(z.shape), np.zeros(v.shape)]
        for i, (n, m) in enumerate(lengths):
            part = i, slice(n), slice(m + 1)
            found[0][i], *slopes = oracle.tdt_scan(z[part], v[part], labels[i, :m], durations, sigma=sigma)
            found[1][part], found[2][part] = slopes
        return found

    found, tangents, product = derivatives(*map(jnp.asarray, point))
    for x, expected in zip(found, scan(0), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-13)
    for x, above, below in zip(tangents[:3], scan(1e-5), scan(-1e-5), strict=True):
        np.testing.assert_allclose(x, (above - below) / 2e-5, rtol=1e-8, atol=1e-8)
    for x, expected in zip(product, tangents[1:], strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-11)


def test_what_lies_after_the_end_reaches_nothing(rng):
    z, v, labels, frames, counts = ragged(rng)
    found = run(z, v, labels, frames, counts)
    t, u = np.arange(TIME)[:, None], np.arange(LABELS + 1)
    outside = (t >= np.asarray(frames)[:, None, None]) | (u > np.asarray(counts)[:, None, None])
    for poison, label in zip(POISON, (-1, 0, 7, 2**31 - 1), strict=True):
        bad_labels = jnp.where(np.arange(LABELS) >= np.asarray(counts)[:, None], label, labels)
        bad = (jnp.where(outside[..., None], poison, x) for x in (z, v))
        for x, y in zip(run(*bad, bad_labels, frames, counts), found, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not found[1][outside].any() and not found[2][outside].any()


def test_bad_labels_lengths_and_nan_stay_in_their_sequence(rng):
    z, v, labels, frames, counts = ragged(rng)
    expected = run(z, v, labels, frames, counts)
    labels, frames = labels.at[0, 1].set(CLASSES).at[1, 0].set(0), frames.at[2].set(TIME + 1).at[6].set(-1)
    bad = np.array([True, True, True, True, False, False, True, False])
    found = run(z, v.at[3, 0, 0, 1].set(jnp.nan), labels, frames, counts)
    np.testing.assert_array_equal(np.isnan(found[0]), bad)
    assert np.isnan(found[1][0]).all() and np.isnan(found[2][0]).all()
    masked = run(z.at[:4].set(jnp.nan), v.at[:4].set(jnp.inf), labels, frames, counts, where=~jnp.asarray(bad))
    for x, y, under in zip(found, expected, masked, strict=True):
        np.testing.assert_array_equal(x[~bad], y[~bad])
        np.testing.assert_array_equal(under, np.where(bad.reshape(-1, *[1] * (y.ndim - 1)), 0, y))


def test_impossible_classes_and_durations_and_other_blanks_in_half_precision(rng):
    z, v, labels, frames, counts = ragged(rng, jnp.bfloat16)
    labels = jnp.where(labels == 1, 0, labels)  # label 0 is masked, and 3 is the blank
    labels, z = jnp.where(labels == 3, 1, labels), z.at[..., 0].set(9)
    v = v.at[2, :, :, 1].set(-jnp.inf).at[3].set(-jnp.inf)
    loss, *slopes = evaluate(z, v, labels, frames, counts, class_mask=jnp.arange(CLASSES) != 0, blank=3)
    expected, *gradients = exact(z.at[..., 0].set(-jnp.inf), v, labels, frames, counts, blank=3)
    assert loss.dtype == jnp.float32 and slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
    assert loss[0] == loss[1] == loss[3] == np.inf and np.isfinite(loss[2])
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    for slope, gradient in zip(slopes, gradients, strict=False):
        np.testing.assert_allclose(np.asarray(slope, np.float32), gradient, atol=float(jnp.finfo(jnp.bfloat16).eps))


def test_from_log_probs(rng):
    z, v, labels, frames, counts = ragged(rng)
    labels = jnp.where(np.arange(LABELS) < np.asarray(counts)[:, None], labels, 1)

    @jax.jit
    def run(z, v):
        log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(v)
        of_labels = jnp.take_along_axis(log_p[:, :, :-1], labels[:, None, :, None], -1).squeeze(-1)
        keywords = {"durations": DURATIONS, "logit_lengths": frames, "label_lengths": counts}
        value, pull = jax.vjp(lambda *log_p: xentjax.tdt_loss_from_log_probs(*log_p, **keywords), log_p[..., 0], of_labels, log_q)
        return value, *pull(jnp.ones_like(value))

    value, by_blank, by_label, by_duration = run(z, v)
    expected, _, _, of_classes, of_durations = exact(z, v, labels, frames, counts)
    np.testing.assert_allclose(value[:7], expected[:7], rtol=ROUNDING * EPS)
    np.testing.assert_allclose(value[7], 0, atol=16 * EPS)  # the mass of other classes is unknown
    np.testing.assert_allclose(by_blank, -of_classes[..., 0], atol=ROUNDING * EPS)
    np.testing.assert_allclose(by_label, -of_classes[:, :, :-1, 1:].sum(-1), atol=ROUNDING * EPS)
    np.testing.assert_allclose(by_duration, -of_durations, atol=ROUNDING * EPS)


def test_other_forms(rng):
    z, v, labels, frames, counts = ragged(rng)

    @jax.vmap
    def each(z, v, labels, frames, counts):
        return xentjax.tdt_loss(z, v, labels, durations=DURATIONS, logit_lengths=frames, label_lengths=counts)

    expected = run(z, v, labels, frames, counts)[0]
    np.testing.assert_allclose(jax.jit(each)(z, v, labels, frames, counts), expected, rtol=4 * EPS)
    folded = (x.reshape(2, 4, *x.shape[1:]) for x in (z, v, labels))
    assert jax.eval_shape(functools.partial(xentjax.tdt_loss, durations=DURATIONS), *folded).shape == (2, 4)


@pytest.mark.exhaustive
def test_classes_split_over_devices(rng):
    batch = ragged(rng)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split_z = P("data", None, None, "model")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split_z, *[P("data")] * 4), out_specs=(P("data"), split_z, P("data")))
    def split(z, v, labels, frames, counts):
        def loss(z, v):
            keywords = {"durations": DURATIONS, "logit_lengths": frames, "label_lengths": counts, "axis_name": "model"}
            return xentjax.tdt_loss(z, v, labels, **keywords)

        value, pull = jax.vjp(loss, z, v)
        return value, *pull(jnp.ones_like(value))

    loss, *slopes = jax.jit(split)(*batch)
    expected, *gradients = run(*batch)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDING * EPS)
    for slope, gradient in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(slope, gradient, atol=ROUNDING * EPS)


def test_nothing_on_the_way_is_nan_and_export(rng):
    batch = ragged(rng)
    jax.config.update("jax_debug_nans", True)
    try:
        found = run(*batch)
        assert not any(np.isnan(x).any() for x in found)
    finally:
        jax.config.update("jax_debug_nans", False)
    arguments = *batch, jnp.float32(0), jnp.ones(8, bool)
    exported = export.export(evaluate, platforms=("cpu", "cuda", "rocm", "tpu"))(*arguments)
    np.testing.assert_array_equal(exported.call(*arguments)[0], found[0])


@pytest.mark.parametrize("per_frame", [None, 2])
def test_greedy_decoding_against_a_loop(rng, per_frame):
    """The joint network is a table of random logits, and the predictor counts labels and remembers the last one."""
    durations, sequences, time, most, classes = (2, 0, 1, 3), 6, 9, 7, 4
    of_classes, of_durations = (rng.normal(size=(time, 3, classes, n)).astype(np.float32) for n in (classes, len(durations)))
    of_durations[..., 1] += 1.5  # several labels in one frame
    frames, lengths = rng.integers(0, time, (sequences, time, 1)), np.array([9, 9, 9, 5, 1, 0])

    def predictor(label, count):
        return (count, label), (count + 1) % 3

    def joint(frame, prediction):
        at = frame[..., 0], *prediction
        return jnp.asarray(of_classes)[at], jnp.asarray(of_durations)[at]

    found, counts = sequence.tdt_greedy_decode(
        joint,
        predictor,
        jnp.asarray(frames),
        jnp.zeros(sequences, jnp.int32),
        durations=durations,
        max_labels=most,
        max_labels_per_frame=per_frame,
        logit_lengths=jnp.asarray(lengths),
    )
    for i in range(sequences):
        t, in_frame, labels = 0, 0, []
        while t < lengths[i] and len(labels) < most:
            at = frames[i, t, 0], len(labels) % 3, labels[-1] if labels else 0
            k = int(np.argmax(of_classes[at]))
            d = durations[np.argmax(of_durations[at])]
            in_frame += k > 0
            labels += [k] * (k > 0)
            if d == 0 and (k == 0 or in_frame == per_frame):
                d = 1
            t, in_frame = t + d, in_frame if d == 0 else 0
        assert counts[i] == len(labels) and found[i].tolist() == labels + [-1] * (most - len(labels))


def test_errors():
    z, v, y = jnp.zeros((2, 3, 3, 4)), jnp.zeros((2, 3, 3, 5)), jnp.ones((2, 2), jnp.int32)
    for message, call in {
        r"tdt_loss: labels must have shape \(2, 2\).* got \(2, 3\)": lambda: xentjax.tdt_loss(z, v, jnp.ones((2, 3), jnp.int32)),
        r"tdt_loss: duration_logits must have shape \(2, 3, 3, 3\), one logit per duration .* got \(2, 3, 3, 5\)": lambda: xentjax.tdt_loss(
            z, v, y, durations=(0, 1, 2)
        ),
        r"tdt_loss: durations must be different numbers of frames, .* got \(0,\)": lambda: xentjax.tdt_loss(z, v, y, durations=(0,)),
        r"got \(1, 1\)": lambda: xentjax.tdt_loss(z, v, y, durations=(1, 1)),
        r"got \(-1, 1\)": lambda: xentjax.tdt_loss(z, v, y, durations=(-1, 1)),
        r"tdt_loss: sigma must be a finite number at least 0; got -1": lambda: xentjax.tdt_loss(z, v, y, sigma=-1.0),
        r"duration_log_probs must have shape \(2, 3, 3, 5\).* got \(2, 3, 3, 4\)": lambda: xentjax.tdt_loss_from_log_probs(
            z[..., 0], z[:, :, 1:, 0], z
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"tdt_greedy_decode: joint must return one duration logit for each of \(0, 1\); got shape \(3,\)"):
        sequence.tdt_greedy_decode(
            lambda frame, _: (frame, frame), lambda y, s: (y, s), z[0, 0, :, :3], y[0, 0], max_labels=1, durations=(0, 1)
        )
    with pytest.raises(TypeError, match=r"tdt_loss: durations must be Python integers, known before tracing; got \(0.5, 1\)"):
        xentjax.tdt_loss(z, v, y, durations=(0.5, 1))


@pytest.mark.exhaustive
def test_values_are_checked(rng):
    z, v, labels, frames, counts = ragged(rng)

    def loss(v):
        return xentjax.tdt_loss(z, v, labels, durations=DURATIONS, logit_lengths=frames, label_lengths=counts)

    xentjax.checked(loss)(v.at[2, :, 2].set(jnp.nan).at[1, 3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"tdt_loss: duration_logits\[1, 0, 0, 2\] = nan"):
        xentjax.checked(loss)(v.at[1, 0, 0, 2].set(jnp.nan))
