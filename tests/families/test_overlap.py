"""Losses of regions beyond the common battery: masks of pixels, tiny losses, bad labels, absent classes, devices.

Values and derivatives of whole images stand in the rows of `table_regions.py`.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from tests.tables import subnormals
from tests.tables import table_regions as table

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = float(jnp.finfo(jnp.float32).eps)
RTOL = 100 * EPS  # sums of tens of terms and two exponentials, as in test_functions.py
K = 4
QUOTIENTS = (
    xentjax.dice_loss,
    functools.partial(xentjax.jaccard_loss, squared=True),
    functools.partial(xentjax.tversky_loss, alpha=0.3, beta=0.7, gamma=0.75),
)
LOSSES = (*QUOTIENTS, xentjax.lovasz_softmax_loss)


def name_of(function):
    return "-".join([getattr(function, "func", function).__name__, *getattr(function, "keywords", ())])


each_loss = pytest.mark.parametrize("loss", LOSSES, ids=name_of)
each_quotient = pytest.mark.parametrize("loss", QUOTIENTS, ids=name_of)


def draw(rng, leading=(3,), pixels=(2, 3), soft=False, dtype=jnp.float32):
    z = jnp.asarray(rng.normal(size=(*leading, *pixels, K)) * 2, dtype)
    if soft:
        return z, jnp.asarray(rng.dirichlet(np.ones(K), (*leading, *pixels)), dtype)
    return z, jnp.asarray(rng.integers(0, K, (*leading, *pixels)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(loss, z, *arguments, where=None, class_mask=None):
    """Value [..., K], gradient of its sum, and the product of the Hessian with the logits; one program for all."""

    def slope(z):
        return jax.grad(lambda z: loss(z, *arguments, where=where, class_mask=class_mask).sum())(z)

    return loss(z, *arguments, where=where, class_mask=class_mask), *jax.jvp(slope, (z,), (jnp.ones_like(z).at[..., 0].set(2),))


def close(found, expected, rtol=RTOL):
    for x, y in zip(found, expected, strict=True):
        y = np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(initial=1e-30))


# Masks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@each_loss
def test_hidden_pixels_do_not_exist(loss, soft, rng):
    """As if removed: images of one row, from which the hidden pixels are cut out."""
    z, y = draw(rng, (2,), (1, 6), soft)
    where = jnp.asarray(np.arange(6) % 3 != 1).reshape(1, 6)
    visible = np.asarray(where[0])
    expected = derivatives(loss, z[:, :, visible], y[:, :, visible])
    for number, label in ((jnp.nan, -100), (jnp.inf, 2**31 - 1), (-jnp.inf, K)):
        bad = number if soft else label
        hidden = where[..., None] if soft else where
        spoilt = jnp.where(where[..., None], z, number), jnp.where(hidden, y, jnp.asarray(bad, y.dtype))
        value, *slopes = derivatives(loss, *spoilt, where=jnp.broadcast_to(where, (2, 1, 6)))
        close((value, *(x[:, :, visible] for x in slopes)), expected)
        assert all((x[:, :, ~visible] == 0).all() for x in slopes)


def test_hidden_pixels_of_the_two_others(rng):
    z, phi = draw(rng, (2,), (1, 6))[0], jnp.asarray(rng.normal(size=(2, 1, 6, K)), jnp.float32)
    bits, where = jnp.asarray(rng.integers(0, 2, (2, 1, 6))), jnp.broadcast_to(jnp.arange(6) % 3 != 1, (2, 1, 6))
    visible = np.asarray(where[0, 0])
    for loss, x, other in ((xentjax.boundary_loss, z, phi), (xentjax.lovasz_hinge_loss, z[..., 0], bits)):

        def run(x, other, where, loss=loss):
            return loss(x, other, where=where), jax.grad(lambda x: loss(x, other, where=where).sum())(x)

        expected = run(x[:, :, visible], other[:, :, visible], None)
        keep = where[..., None] if x.ndim == 4 else where
        spoilt = jnp.where(keep, x, jnp.nan), jnp.where(keep, other, jnp.asarray(-7 if other.dtype == jnp.int32 else jnp.nan, other.dtype))
        value, slope = jax.jit(run)(*spoilt, where)
        close((value, slope[:, :, visible]), expected)
        assert (slope[:, :, ~visible] == 0).all()


@each_loss
def test_classes_that_do_not_exist(loss, rng):
    """As if their column were not there."""
    z, y = draw(rng)
    y = jnp.where(y == 2, 0, y)
    exists = jnp.arange(K) != 2
    expected = derivatives(loss, jnp.delete(z, 2, axis=-1), jnp.where(y == 3, 2, y))
    value, *slopes = derivatives(loss, z.at[..., 2].set(jnp.nan), y, class_mask=exists)
    close((jnp.delete(x, 2, axis=-1) for x in (value, *slopes)), expected)
    assert not any(x[..., 2].any() for x in (value, *slopes))
    value, _, _ = derivatives(loss, z, y.at[0].set(2), class_mask=exists)  # labels on the class: the others are false there
    assert (value[0, exists] > 0).all() and value[0, 2] == 0
    value, _, _ = derivatives(loss, z, y.at[0].set(K), class_mask=exists)
    assert np.isnan(value[0, exists]).all() and value[0, 2] == 0


def test_classes_that_do_not_exist_at_some_pixels(rng):
    """A class leaves the softmax and the sums at the pixels where it does not exist, whatever their label."""
    z, y = draw(rng)
    exists = rng.uniform(size=z.shape) < 0.7
    exists[..., 0] = True
    e = np.where(exists, np.exp(np.float64(z)), 0)
    p, t = e / e.sum(-1, keepdims=True), np.eye(K)[np.asarray(y)] * exists
    expected = 1 - 2 * (p * t).sum((1, 2)) / (p + t).sum((1, 2))
    np.testing.assert_allclose(xentjax.dice_loss(z, y, class_mask=exists), expected, rtol=RTOL, atol=RTOL)
    assert (t.sum() != y.size) and np.isfinite(expected).all()


@each_loss
def test_nothing_counts(loss, rng):
    z, y = draw(rng)
    for found in (
        derivatives(loss, z * jnp.nan, y - 100, where=jnp.zeros(y.shape, bool)),
        derivatives(loss, *draw(rng, (2,), (0, 3))),
        derivatives(loss, z, y, class_mask=jnp.zeros(K, bool)),
    ):
        assert all((x == 0).all() for x in found)
    assert loss(*draw(rng, (0,))).shape == (0, K)


# Labels ------------------------------------------------------------------------------------------------------------------


@each_loss
def test_a_label_that_is_no_class_spoils_its_image_alone(loss, rng):
    z, y = draw(rng, (4,))
    value, *slopes = derivatives(loss, z, y.at[1, 0, 0].set(K).at[3, 1, 2].set(-1))
    assert np.isnan(value[1::2]).all() and all(np.isnan(x[1::2]).all() for x in slopes)
    close((x[::2] for x in (value, *slopes)), (x[::2] for x in derivatives(loss, z, y)), EPS)


def test_a_bit_that_is_none_spoils_its_image_alone(rng):
    z, y = jnp.asarray(rng.normal(size=(3, 2, 2)), jnp.float32), jnp.asarray(rng.integers(0, 2, (3, 2, 2)))
    bad = y.at[1, 0, 1].set(2)
    value, slope = jax.value_and_grad(lambda z: xentjax.lovasz_hinge_loss(z, bad).sum())(z)
    assert np.isnan(value) and np.isnan(slope[1]).all() and np.isfinite(slope[::2]).all()
    np.testing.assert_array_equal(xentjax.lovasz_hinge_loss(z, y == 1), xentjax.lovasz_hinge_loss(z, y))


@each_loss
def test_one_hot_rows_are_indices(loss, rng):
    z, y = draw(rng)
    z = z.at[0].multiply(20.0)  # probabilities of almost 1
    close(derivatives(loss, z, jax.nn.one_hot(y, K)), derivatives(loss, z, y))


@each_loss
def test_soft_labels(loss, rng):
    z, t = draw(rng, soft=True)
    formula = {
        "dice_loss": (table.dice, table.dice_gradient),
        "jaccard_loss-squared": [functools.partial(f, squared=True) for f in (table.jaccard, table.jaccard_gradient)],
        "tversky_loss-alpha-beta-gamma": (functools.partial(table.tversky, alpha=0.3, beta=0.7, gamma=0.75, smooth=0.0), None),
        "lovasz_softmax_loss": (table.lovasz_softmax, table.lovasz_softmax_gradient),
    }[name_of(loss)]
    value, slope, _ = derivatives(loss, z, t)
    arguments = np.asarray(z, np.float64), np.asarray(t, np.float64)
    close([value], [formula[0](*arguments)])
    if formula[1]:
        close([slope], formula[1](*arguments))


@each_loss
def test_a_perfect_soft_prediction_costs_nothing(loss, rng):
    _, t = draw(rng, soft=True)
    value, slope, _ = derivatives(loss, jnp.log(t), t)
    bound = 32 * EPS if loss is not LOSSES[2] else (32 * EPS) ** 0.75  # the roundings of the logarithm, to the power of gamma
    assert (value <= bound).all() and np.isfinite(slope).all()
    even = jnp.full((1, 2, 2, K), 1 / K)  # exact in binary
    value, slope, product = derivatives(loss, jnp.zeros_like(even), even)
    assert not value.any() and not slope.any() and np.isfinite(product).all()


# Accuracy ----------------------------------------------------------------------------------------------------------------


@each_loss
def test_a_nearly_perfect_prediction_keeps_its_tiny_loss(loss, rng):
    """The definition needs 1 − p of the label, which float64 takes from the sum of the other probabilities."""
    for margin in (20.0, 40.0, 70.0):
        y = rng.integers(0, K, (2, 2, 3))
        y[0] = 1 - (y[0] > 1)
        z = np.float32(rng.uniform(-1, 1, (2, 2, 3, K)) + margin * np.eye(K)[y])
        e = np.exp(np.float64(z) - np.float64(z).max(-1, keepdims=True))
        p, rest = e / e.sum(-1, keepdims=True), (e @ (1 - np.eye(K))) / e.sum(-1, keepdims=True)
        t = np.eye(K)[y]
        wrong, size = (t * rest + (1 - t) * p).reshape(2, 6, K), t.sum((1, 2))
        over, under = ((1 - t) * p).sum((1, 2)), (t * rest).sum((1, 2))
        square, hit = (wrong**2).sum(1), (t * p).sum((1, 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = {
                "dice_loss": (over + under) / (hit * 2 + over + under),
                "jaccard_loss-squared": square / (hit + square),
                "tversky_loss-alpha-beta-gamma": ((0.3 * over + 0.7 * under) / (hit + 0.3 * over + 0.7 * under)) ** 0.75,
                "lovasz_softmax_loss": table.over_images(table.extension, wrong, t.reshape(2, 6, K))[0],
            }[name_of(loss)]
        tiny = (expected > 1e-37) & (square > 1e-37)  # smaller squares underflow in float32
        value, slope, product = derivatives(loss, jnp.asarray(z), jnp.asarray(y))
        # a logit of size m has m roundings; the square and the order of magnitude of six terms add a few
        np.testing.assert_allclose(value[tiny], expected[tiny], rtol=(40 + 4 * margin) * EPS)
        assert np.isfinite(slope).all() and np.isfinite(product).all()
        of_rows = derivatives(loss, jnp.asarray(z), jnp.asarray(t, jnp.float32))[0]
        np.testing.assert_allclose(of_rows[tiny], value[tiny], rtol=8 * EPS)
        if name_of(loss) != "jaccard_loss-squared":
            assert (value[size > 0] > 0).all() and slope.any(-1).all()
    assert (size == 0).any()


@each_quotient
def test_gradients_of_certain_predictions(loss, x64):
    """Float32 against float64, relative to each number: two pixels with a margin of 30, both right, then both wrong."""
    z = np.array([[[30.0, 0.0], [-1.0, 29.0]]])
    for y in ([[0, 1]], [[1, 0]], [[0, 0]]):
        narrow, wide = (derivatives(loss, jnp.asarray(z, d), jnp.array(y)) for d in (jnp.float32, jnp.float64))
        for a, b in zip(narrow[:2], wide[:2], strict=True):
            np.testing.assert_allclose(a, b, rtol=200 * EPS)


@each_loss
def test_extreme_logits(loss):
    z = jnp.array([[[-jnp.inf, 0.0, 0.0, 1.0], [3e4, -3e4, 0.0, 0.0], [-jnp.inf, -jnp.inf, 5.0, -jnp.inf], [-jnp.inf] * K]])[None]
    z = jnp.concatenate([z, z - 1e8, z * 0.5])
    for y in ([0, 1, 2, 3], [1, 1, 0, 0], [3, 0, 1, 2]):
        value, *slopes = derivatives(loss, z, jnp.tile(jnp.array([y]), (3, 1, 1)))
        assert np.isfinite(value).all() and all(np.isfinite(x).all() for x in slopes)


# Absent classes ----------------------------------------------------------------------------------------------------------


def test_absent_classes(rng):
    z, y = draw(rng)
    y = jnp.minimum(y, 2)
    for loss in (xentjax.dice_loss, xentjax.jaccard_loss):
        value, slope, product = derivatives(lambda *x, loss=loss, **keywords: loss(*x, **keywords)[..., 3], z, y)
        assert (value == 1).all() and not slope.any() and not product.any()  # a constant
        assert (loss(z.at[..., 3].set(-jnp.inf), y)[..., 3] == 0).all()  # 0/0
    smooth = xentjax.dice_loss(z, y, smooth=1.0)[..., 3]
    total = jax.nn.softmax(z)[..., 3].sum((1, 2))
    np.testing.assert_allclose(smooth, total / (total + 1), rtol=RTOL)
    largest = jax.nn.softmax(z)[..., 3].max((1, 2))
    np.testing.assert_allclose(xentjax.lovasz_softmax_loss(z, y)[..., 3], largest, rtol=RTOL)


def test_present_classes(rng):
    z, y = draw(rng, (5,))
    where = jnp.asarray(rng.uniform(size=y.shape) < 0.4)
    expected = np.array([[((a == k) & b).any() for k in range(K)] for a, b in zip(np.asarray(y), np.asarray(where), strict=True)])
    np.testing.assert_array_equal(xentjax.present_classes(z, y, where=where), expected)
    soft = jnp.where((y == 1)[..., None] & (jnp.arange(K) > 1).reshape(1, 1, 1, K), 0.5, 0.0)
    np.testing.assert_array_equal(xentjax.present_classes(z, soft, where=where), expected[:, [1]] & (np.arange(K) > 1))
    exists = jnp.arange(K) != 3
    np.testing.assert_array_equal(xentjax.present_classes(z, y, where=where, class_mask=exists), expected & np.asarray(exists))
    bad = jnp.full_like(y, -1).at[:, 0, 0].set(K)
    assert not xentjax.present_classes(z, bad).any()
    np.testing.assert_array_equal(xentjax.present_classes(jnp.moveaxis(z, -1, 1), y, axis=1, where=where), expected)


# Definitions -------------------------------------------------------------------------------------------------------------


def test_lovasz_is_the_largest_linear_bound(rng):
    """The extension of a submodular function is the maximum over all orders of the sum of errors times gains (Edmonds)."""
    errors, t = rng.uniform(size=5), np.array([1, 0, 1, 0, 0.0])
    sums = []
    for order in itertools.permutations(range(5)):
        gains = [table.jaccard_of_mistakes(t, order[: i + 1]) - table.jaccard_of_mistakes(t, order[:i]) for i in range(5)]
        sums.append(errors[list(order)] @ gains)
    sign = np.where(t == 1, 1, -1)
    loss = xentjax.lovasz_hinge_loss(jnp.asarray(sign * (1 - errors), jnp.float32), jnp.asarray(t, jnp.int32), spatial=1)
    np.testing.assert_allclose(loss, max(sums), rtol=RTOL)


def test_every_loss_of_a_hard_prediction_is_its_index(rng):
    """Logits of ±∞ for all predictions and labels of three pixels: sets of pixels, counted."""
    sets = np.array([*itertools.product((0, 1), repeat=3)])
    predicted, labels = (x.reshape(-1, 3) for x in np.broadcast_arrays(sets[:, None], sets[None]))
    z = jnp.where(jax.nn.one_hot(predicted, 2) > 0, 0.0, -jnp.inf)
    both, wrong = (predicted * labels).sum(-1), (predicted != labels).sum(-1)
    over = (predicted > labels).sum(-1)
    with np.errstate(invalid="ignore"):
        jaccard, dice = np.nan_to_num(wrong / (both + wrong)), np.nan_to_num(wrong / (2 * both + wrong))
        tversky = np.nan_to_num((0.3 * over + 0.7 * (wrong - over)) / (both + 0.3 * over + 0.7 * (wrong - over)))
    for loss, expected in zip(LOSSES, (dice, jaccard, tversky**0.75, jaccard), strict=True):
        np.testing.assert_allclose(loss(z, labels, spatial=1)[:, 1], expected, rtol=RTOL)
    scores = jnp.where(predicted == 1, jnp.inf, -jnp.inf)
    np.testing.assert_array_equal(xentjax.lovasz_hinge_loss(scores, labels, spatial=1) == jnp.inf, wrong > 0)


def test_two_classes_are_one_logit(rng):
    """Binary and multi-label masks: a column of zeros makes σ(z) the probability of class 1."""
    z, y = jnp.asarray(rng.normal(size=(2, 3, 2, 2)) * 2, jnp.float32), rng.integers(0, 2, (2, 3, 2, 2))
    p = np.asarray(jax.nn.sigmoid(z))
    loss = xentjax.dice_loss(jnp.stack([jnp.zeros_like(z), z], -1), y)[..., 1]
    np.testing.assert_allclose(loss, 1 - 2 * (p * y).sum((2, 3)) / (p + y).sum((2, 3)), rtol=RTOL, atol=RTOL)


@each_loss
def test_axes(loss, rng):
    z, y = draw(rng, (2,), (2, 2, 3))
    expected = loss(z.reshape(2, 1, 12, K), y.reshape(2, 1, 12))
    first = jnp.moveaxis(z, -1, 1)
    for found in (loss(z, y, spatial=3), loss(first, y, spatial=3, axis=1), jax.vmap(lambda z, y: loss(z, y, spatial=3, axis=0))(first, y)):
        np.testing.assert_allclose(found, expected, rtol=RTOL)


# Devices -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [LOSSES[2], xentjax.lovasz_softmax_loss, xentjax.boundary_loss], ids=name_of)
def test_classes_over_devices(loss, rng):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    z, y = draw(rng, (2,), (1, 4))
    second = jnp.asarray(rng.normal(size=z.shape), jnp.float32) if loss is xentjax.boundary_loss else y

    def run(z, second):
        return loss(z, second, axis_name="model")

    split, labels = P(None, None, None, "model"), P(None, None, None, "model") if second.ndim == 4 else P()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(split, labels), out_specs=P(None, "model"))
    scale = jnp.arange(1.0, K + 1)[None]
    found, slope = jax.jit(lambda z: jax.value_and_grad(lambda z: (sharded(z, second) * scale).sum())(z))(z)
    expected = jax.value_and_grad(lambda z: (loss(z, second) * scale).sum())(z)
    close((found, slope), expected)


@pytest.mark.parametrize("loss", [LOSSES[0], xentjax.lovasz_softmax_loss], ids=name_of)
def test_explicit_meshes(loss, rng):
    """Images and classes split by their types; the pixels of an image stay together."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    z, y = draw(rng, (2,), (1, 4))

    @jax.jit
    def both(z, y):
        return loss(z, y), jax.grad(lambda z: loss(z, y).sum())(z)

    with jax.set_mesh(mesh):
        split = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((z, P("data", None, None, "model")), (y, P("data"))))
        found = jax.tree.map(np.asarray, both(*split))
    close(found, both(z, y))


def test_present_classes_over_devices(rng):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    z, y = draw(rng, (2,), (1, 2))
    run = functools.partial(xentjax.present_classes, axis_name="model")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P(None, None, None, "model"), P()), out_specs=P(None, "model"))
    np.testing.assert_array_equal(sharded(z, y), xentjax.present_classes(z, y))


# Errors ------------------------------------------------------------------------------------------------------------------

Z, Y = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "message"),
    [
        (
            xentjax.dice_loss,
            (Z[0], Y[0]),
            {},
            ValueError,
            "dice_loss: logits must have spatial axes (2 of them) and a class axis; got shape (3, 4). Use spatial=1.",
        ),
        (xentjax.dice_loss, (Z, Y), {"smooth": -1.0}, ValueError, "dice_loss: smooth must be a finite number at least 0; got -1."),
        (xentjax.jaccard_loss, (Z, Y), {"spatial": 0}, ValueError, "jaccard_loss: spatial must be at least 1; got 0."),
        (xentjax.tversky_loss, (Z, Y), {"gamma": 0.0}, ValueError, "tversky_loss: gamma must be above 0; got 0."),
        (xentjax.tversky_loss, (Z, Y), {"alpha": -0.5}, ValueError, "tversky_loss: alpha must be a finite number at least 0; got -0.5."),
        (
            xentjax.lovasz_softmax_loss,
            (Z, Y[0]),
            {},
            ValueError,
            "lovasz_softmax_loss: labels must have shape (2, 3), the shape of logits without its class axis; got (3,).",
        ),
        (
            xentjax.lovasz_hinge_loss,
            (Z[..., 0], np.float32(Y)),
            {},
            TypeError,
            "lovasz_hinge_loss: labels must have an integer dtype; got float32. Use labels.astype(jnp.int32).",
        ),
        (
            xentjax.lovasz_hinge_loss,
            (Z[0, :, 0], Y[0]),
            {},
            ValueError,
            "lovasz_hinge_loss: logits must have 2 spatial axes; got shape (3,). Use spatial=1.",
        ),
        (xentjax.boundary_loss, (Z, Z[0]), {}, ValueError, "boundary_loss: distances must have shape (2, 3, 4), the shape of logits; got"),
        (
            xentjax.distribution_focal_loss,
            (Z, Z),
            {},
            ValueError,
            "distribution_focal_loss: targets must have shape (2, 3), the shape of logits without its class axis; got (2, 3, 4).",
        ),
        (xentjax.quality_focal_loss, (Z, Z), {"beta": -1.0}, ValueError, "quality_focal_loss: beta must be a finite number at least 0;"),
        (xentjax.varifocal_loss, (Z, Z), {"alpha": 2.0}, ValueError, "varifocal_loss: alpha must be a finite number in [0, 1]; got 2."),
    ],
)
def test_errors(function, arguments, keywords, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        function(*arguments, **keywords)


@pytest.mark.parametrize("loss", [xentjax.dice_loss, functools.partial(xentjax.tversky_loss, gamma=0.75), xentjax.jaccard_loss])
def test_an_absent_class_whose_probabilities_are_subnormal_numbers(loss):
    # GPUs keep such numbers, and the reciprocal of their sum overflows.
    logits = jnp.array([[[0.0, 0.0, -95.0], [5.0, 0.0, -95.0]], [[1.0, 0.0, -95.0], [92.0, 0.0, -95.0]]])
    slope = jax.grad(lambda z: jnp.sum(loss(z, jnp.array([[0, 1], [1, 0]]))))
    kept, flushed = subnormals.evaluate(slope, logits), slope(logits)
    np.testing.assert_allclose(kept, flushed, atol=1e-6)  # some eps of gradients below 1
