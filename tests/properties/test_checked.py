"""`checked`: value errors with the loss, the first offending position and its value; nothing of it without."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax

pytestmark = pytest.mark.usefixtures("quick_compilation")
Z, Y = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], np.float32), np.array([0, 2], np.int32)
cross_entropy = xentjax.softmax_cross_entropy
top_k = xentjax.softmax_cross_entropy_with_top_k_labels
INDICES = (cross_entropy, xentjax.softmax_focal_loss, xentjax.softmax_log_prob, xentjax.row_statistics)
EPS = float(jnp.finfo(jnp.float32).eps)
BITS = (xentjax.sigmoid_cross_entropy, xentjax.sigmoid_focal_loss, xentjax.asymmetric_loss)


def raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}(\n|$)")  # JAX appends a note about its traceback


def name_of(x):
    return getattr(x, "__name__", None)


def put(x, position, value):
    x = np.array(x)
    x[position] = value
    return x


def checked_jit(function):
    """One program to compile in place of one for each operation."""
    return xentjax.checked(jax.jit(function, static_argnames="axis" if function in INDICES else None))


@jax.jit
def step(z, y):
    return cross_entropy(z, y).sum()


def step_of_batch(batch):
    return step(**batch)


def two_losses(z, y):
    return cross_entropy(z, y).sum() + xentjax.softmax_focal_loss(z, y + 1).sum()


def scanned(z, y):
    return jax.lax.scan(lambda total, row: (total + cross_entropy(*row), None), jnp.zeros(()), (z, y))[0]


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (jnp.array(3), "labels = 3"),
        (jnp.array(-1), "labels = -1"),
        (jnp.array([0, 7]), "labels[1] = 7"),
        (jnp.array([-100, 7]), "labels[0] = -100"),
        (jnp.array([[0, 1], [2, -5], [9, 9]]), "labels[1, 1] = -5"),
        (jnp.array([0, 200], jnp.uint8), "labels[1] = 200"),
        (jnp.array([-128, 0], jnp.int8), "labels[0] = -128"),
    ],
    ids=["rank0", "negative", "rank1", "first", "rank2", "uint8", "int8"],
)
@pytest.mark.parametrize("function", INDICES, ids=name_of)
def test_labels_out_of_range(function, labels, complaint):
    with raises(f"{function.__name__}: {complaint} is outside [0, 3)."):
        checked_jit(function)(jnp.zeros((*labels.shape, 3)), labels)


@pytest.mark.parametrize("function", (*INDICES, *BITS), ids=name_of)
def test_nan_logits(function):
    labels = Y if function in INDICES else Z * 0
    with raises(f"{function.__name__}: logits[0, 2] = nan is NaN."):
        checked_jit(function)(put(put(Z, (0, 2), np.nan), (1, 0), np.nan), labels)
    # infinite logits are classes with probability 0, not mistakes
    checked_jit(function)(put(Z, (0, 1), -np.inf), labels)


@pytest.mark.parametrize("function", INDICES, ids=name_of)
@pytest.mark.parametrize("bad", [-0.25, np.nan])
def test_labels_that_are_no_distribution(function, bad):
    labels = np.array([[1.0, 0.0, 0.0], [0.5, bad, 0.5]], np.float32)
    with raises(f"{function.__name__}: labels[1, 1] = {bad} is not a probability (it is negative or NaN)."):
        checked_jit(function)(Z, labels)
    # they need not sum to 1
    checked_jit(function)(Z, np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], np.float32))


def test_top_k_labels():
    ids, probs = np.array([[0, 1], [2, 1]], np.int32), np.array([[0.5, 0.5], [0.75, 0.25]], np.float32)
    checked = checked_jit(top_k)
    with raises(f"{top_k.__name__}: label_ids[1, 1] = 3 is outside [0, 3)."):
        checked(Z, put(ids, (1, 1), 3), probs)
    with raises(f"{top_k.__name__}: label_ids[0, 0] = -1 is outside [0, 3)."):
        checked(Z, put(ids, (0, 0), -1), probs)
    for bad in (-0.5, np.nan):
        with raises(f"{top_k.__name__}: label_probs[0, 1] = {bad} is not a probability (it is negative or NaN)."):
            checked(Z, ids, put(probs, (0, 1), bad))
    where = np.array([True, False])
    np.testing.assert_array_equal(checked(Z, put(ids, 1, -7), put(probs, 1, np.nan), where=where)[0], top_k(Z, ids, probs)[0])


@pytest.mark.parametrize("function", BITS, ids=name_of)
def test_bits_outside_the_unit_interval(function):
    checked, labels = checked_jit(function), np.array([[0.0, 1.0, 0.5], [0.25, 0.0, 1.0]], np.float32)
    for bad in (1.5, -0.5, np.nan):
        with raises(f"{function.__name__}: labels[1, 1] = {bad} is outside [0, 1]."):
            checked(Z, put(labels, (1, 1), bad))
    with raises(f"{function.__name__}: labels[0, 2] = 2 is outside [0, 1]."):
        checked(Z, jnp.array([[0, 1, 2], [0, 0, -1]]))
    where = put(np.ones((2, 3), bool), (1, 1), False)
    hidden = checked(put(Z, (1, 1), np.nan), put(labels, (1, 1), 1.5), where=where)
    np.testing.assert_array_equal(hidden, function(Z, labels, where=where))


def test_boolean_bits_are_in_range():
    np.testing.assert_array_equal(checked_jit(BITS[0])(Z, Z > 0.5), BITS[0](Z, Z > 0.5))


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", INDICES[:2], ids=name_of)
def test_what_is_masked_is_not_checked(function):
    where = np.array([True, False])
    checked = checked_jit(function)
    for labels in (put(Y, 1, -100), put(np.eye(3, dtype=np.float32)[Y], 1, -1)):
        value = checked(put(Z, 1, np.nan), labels, where=where)
        np.testing.assert_array_equal(value, function(Z, labels, where=where))
    mask = np.array([True, False, True])
    for exists in (mask, np.stack([mask, mask])):
        value = checked(put(Z, np.s_[:, 1], np.nan), Y, class_mask=exists)
        np.testing.assert_array_equal(value, function(Z, Y, class_mask=exists))
    value = checked(put(Z.T, 1, np.nan), Y, axis=0, class_mask=mask)
    np.testing.assert_array_equal(value, function(Z.T, Y, axis=0, class_mask=mask))
    with raises(f"{function.__name__}: logits[2, 1] = nan is NaN."):
        checked(put(Z.T, (2, 1), np.nan), Y, axis=0, class_mask=mask)


@pytest.mark.exhaustive
def test_good_arguments_give_the_same_bits():
    for function in INDICES:
        checked = checked_jit(function)
        for labels in (Y, np.abs(Z)):
            jax.tree.map(np.testing.assert_array_equal, checked(Z, labels), function(Z, labels))
    np.testing.assert_array_equal(xentjax.checked(cross_entropy)(Z, Y), cross_entropy(Z, Y))
    for function in (step, jax.jit(jax.grad(step)), jax.jit(jax.vmap(cross_entropy)), jax.jit(scanned), jax.jit(two_losses)):
        labels = np.array([0, 1], np.int32)
        np.testing.assert_array_equal(xentjax.checked(function)(Z, labels), function(Z, labels))
    assert xentjax.checked(cross_entropy)(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)).shape == (0,)


def test_a_function_compiled_before_is_checked_and_stays_free_after():
    counted = []

    @jax.jit
    def train(z, y):
        counted.append(None)
        return cross_entropy(z, y).sum()

    bad = put(Y, 1, 7)
    assert np.isnan(train(Z, bad)) and len(counted) == 1
    for _ in range(2):
        with raises("softmax_cross_entropy: labels[1] = 7 is outside [0, 3)."):
            xentjax.checked(train)(Z, bad)
    traced = len(counted)
    assert np.isnan(train(Z, bad)) and len(counted) == traced  # the first program, neither traced anew nor checked
    assert "check" not in str(jax.make_jaxpr(train)(Z, Y))
    np.testing.assert_array_equal(xentjax.checked(train)(Z, Y), train(Z, Y))


def test_after_an_error_the_next_call_is_free():
    with raises("softmax_cross_entropy: labels[0] = -1 is outside [0, 3)."):
        xentjax.checked(cross_entropy)(Z, jnp.array([-1, 0]))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        xentjax.checked(cross_entropy)(Z, Y[:, None])
    assert np.isnan(cross_entropy(Z, jnp.array([-1, 0]))[0])
    assert "check" not in str(jax.make_jaxpr(cross_entropy)(Z, Y))


@pytest.mark.parametrize("function", (*INDICES, *BITS), ids=name_of)
def test_checks_cost_nothing_without(function):
    labels = Y if function in INDICES else Z * 0
    assert "check" not in str(jax.make_jaxpr(lambda z: jax.tree.leaves(function(z, labels)))(Z))
    assert "check" not in str(jax.make_jaxpr(jax.jit(jax.grad(lambda z: jax.tree.leaves(function(z, labels))[0].sum())))(Z))


BAD = np.array([0, 7], np.int32)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (step, "softmax_cross_entropy: labels[1] = 7"),
        (jax.jit(jax.grad(step)), "softmax_cross_entropy: labels[1] = 7"),
        (jax.jit(jax.value_and_grad(step)), "softmax_cross_entropy: labels[1] = 7"),
        (jax.jit(jax.hessian(step)), "softmax_cross_entropy: labels[1] = 7"),
        (jax.jit(jax.grad(jax.checkpoint(step))), "softmax_cross_entropy: labels[1] = 7"),
        (lambda z, y: jax.lax.cond(z.sum() > 0, cross_entropy, lambda z, y: z[:, 0], z, y), "softmax_cross_entropy: labels[1] = 7"),
        (lambda z, y: step(z, y - 5) if z.ndim == 1 else step(z, y), "softmax_cross_entropy: labels[1] = 7"),
        (jax.jit(scanned), "softmax_cross_entropy: labels = 7"),  # one row at a time: it has no position
        (jax.vmap(cross_entropy), "softmax_cross_entropy: labels = 7"),
    ],
    ids=["jit", "grad", "value_and_grad", "hessian", "checkpoint", "cond", "nested", "scan", "vmap"],
)
def test_any_transform_of_a_loss(function, complaint):
    with raises(f"{complaint} is outside [0, 3)."):
        xentjax.checked(function)(Z, BAD)


def test_the_loss_at_fault_is_named():
    with raises("softmax_focal_loss: labels[1] = 3 is outside [0, 3)."):
        checked_jit(two_losses)(Z, Y)
    with raises("softmax_cross_entropy: labels[1] = 7 is outside [0, 3)."):
        checked_jit(two_losses)(Z, BAD)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda z, y: f(z, y).sum()), jax.make_jaxpr], ids=["jit", "vmap", "grad", "jaxpr"]
)
def test_inside_a_trace_it_says_to_go_outside(transform):
    remedy = "Put checked outside: checked(jax.jit(softmax_cross_entropy))."
    for labels in (Y, BAD):
        with pytest.raises(ValueError, match=f"^checked: .*{re.escape(remedy)}(\n|$)"):
            transform(xentjax.checked(cross_entropy))(Z, labels)


def test_name_and_documentation_stay():
    checked = xentjax.checked(cross_entropy)
    assert (checked.__name__, checked.__doc__, checked.__wrapped__) == (cross_entropy.__name__, cross_entropy.__doc__, cross_entropy)
    assert xentjax.checked(step).__name__ == "step"


def mapped(z, y):
    return jax.lax.map(lambda row: cross_entropy(*row), (z, y)).sum()


@pytest.mark.parametrize("loop", [scanned, mapped, jax.checkpoint(scanned)], ids=["scan", "map", "checkpoint"])
def test_a_loop_differentiated_from_outside_is_never_silent(loop):
    checked = xentjax.checked(jax.jit(jax.value_and_grad(loop)))
    with pytest.raises(ValueError, match=r"^(scanned|mapped): result\[0\] is NaN. No check found .* use checked on one step"):
        checked(Z, BAD)
    with pytest.raises(ValueError, match=r"^(scanned|mapped): result\[0\] is NaN. The argument z\[1, 2\] is NaN too."):
        checked(put(Z, (1, 2), np.nan), Y)
    value, slope = checked(Z, Y)
    np.testing.assert_allclose(value, cross_entropy(Z, Y).sum(), rtol=4 * EPS)  # added in another order
    np.testing.assert_allclose(slope, jax.grad(step)(Z, Y), rtol=4 * EPS)


def test_every_nan_in_a_result_raises():
    for result, place in (((Y, Z), "result[1][0, 1]"), ({"a": {"b": Z}}, "result['a']['b'][0, 1]"), (Z[0], "result[1]")):
        spoilt = jax.tree.map(lambda x: put(x, (0, 1)[-x.ndim :], np.nan) if x.dtype == np.float32 else x, result)
        with pytest.raises(ValueError, match=f"^passed_on: {re.escape(place)} is NaN. The argument x"):
            xentjax.checked(passed_on)(spoilt)
        jax.tree.map(np.testing.assert_array_equal, xentjax.checked(passed_on)(result), result)
    xentjax.checked(passed_on)(jax.random.key(0))


def passed_on(x):
    return jax.tree.map(lambda leaf: leaf, x)


def test_infinite_results_of_finite_arguments_are_values_like_others():
    label = np.array([1, 0], np.int32)
    for function in (cross_entropy, xentjax.softmax_focal_loss):
        assert np.isposinf(checked_jit(function)(put(Z, (0, 1), -np.inf), label)).tolist() == [True, False]
        assert np.isposinf(checked_jit(function)(Z, label, class_mask=np.array([True, False, True]))).tolist() == [True, False]
    assert np.isposinf(xentjax.checked(xentjax.information.self_information)(np.zeros(1, np.float32))).all()
    samples = xentjax.checked(lambda key: xentjax.samplers.draw(key, xentjax.samplers.uniform(2), 8, unique=True))(jax.random.key(0))
    assert np.isposinf(samples.log_expected_count).any()


@pytest.mark.parametrize("function", (*INDICES, *BITS), ids=name_of)
def test_infinite_logits(function):
    for large in (np.inf, 2.0**121):  # which losses treat alike
        with raises(f"{function.__name__}: logits[1, 0] = {np.float32(large)} is infinite (values above 2**119 count as infinite)."):
            checked_jit(function)(put(Z, (1, 0), large), Y if function in INDICES else Z * 0)


HIDDEN, KERNEL = np.ones((2, 4), np.float32), np.full((4, 3), 0.5, np.float32)
linear = xentjax.linear_softmax_cross_entropy


def test_the_function_that_was_called_is_named_each_time():
    nan = put(HIDDEN, (1, 3), np.nan)
    for _ in range(2):  # one of them is traced first, and JAX keeps what they share
        with raises("linear_softmax_cross_entropy: hidden[1, 3] = nan is NaN."):
            xentjax.checked(linear)(nan, KERNEL, Y)
        with raises("softmax_cross_entropy: logits[1, 0] = nan is NaN."):
            xentjax.checked(cross_entropy)(put(Z, (1, 0), np.nan), Y)
    # finite arguments whose products are not: what is inside of the loss has no name of its own
    huge = np.float32(2.0**70) * HIDDEN
    with pytest.raises(ValueError, match=r"^linear_softmax_cross_entropy: result is NaN"):
        xentjax.checked(linear)(huge, huge[0, :, None] * KERNEL, Y)


@pytest.mark.exhaustive
def test_what_does_not_count_is_not_checked_in_linear_losses_and_metrics():
    mask, where = np.array([True, False, True]), np.array([True, False])
    spoilt = put(KERNEL, np.s_[:, 1], np.nan)
    xentjax.checked(linear)(HIDDEN, spoilt, Y, class_mask=mask)
    turned = np.ascontiguousarray(spoilt.T)
    xentjax.checked(linear)(put(HIDDEN, 1, np.nan), turned, put(Y, 1, 9), class_mask=mask, where=where, classes_first=True)
    ranks = xentjax.checked(xentjax.metrics.auroc)
    for hide in ({"where": np.array([True, True, False])}, {"weights": np.array([1.0, 1.0, 0.0], np.float32)}):
        assert ranks(np.array([1.0, 0.0, np.nan], np.float32), np.array([1, 0, 7]), **hide) == 1
        found = xentjax.checked(lambda y: xentjax.metrics.confusion(y, y, classes=2, **hide))(np.array([0, 1, 7]))  # noqa: B023  # called at once
        assert found.invalid == 0


def test_integers_that_a_transformation_would_truncate():
    wide = np.array([0, 2**32 + 1])
    with raises("softmax_cross_entropy: labels[1] = 2147483647 is outside [0, 3)."):
        xentjax.checked(cross_entropy)(Z, wide)
    for function in (jax.jit(cross_entropy), jax.vmap(cross_entropy), lambda logits, labels: jax.jit(cross_entropy)(logits, labels)):
        with pytest.raises(
            ValueError, match=r": labels\[1\] = 4294967297 is outside \[-2147483648, 2147483647\], and JAX would truncate it"
        ):
            xentjax.checked(function)(Z, wide)
    with pytest.raises(ValueError, match=r"^step_of_batch: batch\['y'\]\[1\] = 4294967297 is outside"):
        xentjax.checked(step_of_batch)(batch={"z": Z, "y": wide})


def test_positions_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 3), ("data", "model"), devices=jax.devices()[:6], axis_types=(AxisType.Explicit,) * 2)
    checked = xentjax.checked(jax.jit(cross_entropy))
    with jax.set_mesh(mesh):
        z, y = jax.device_put(Z, NamedSharding(mesh, P("data", "model"))), jax.device_put(Y, NamedSharding(mesh, P("data")))
        np.testing.assert_allclose(checked(z, y), cross_entropy(Z, Y), rtol=4 * EPS)  # added in another order
        with raises("softmax_cross_entropy: logits[1, 2] = nan is NaN."):
            checked(jax.device_put(put(Z, (1, 2), np.nan), z.sharding), y)
        with raises("softmax_cross_entropy: labels[1] = 7 is outside [0, 3)."):
            checked(z, jax.device_put(BAD, y.sharding))


def test_models_of_flax_are_left_whole():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def loss(model, z, y):
        model.bias[...] = model.bias[...] + 1
        return cross_entropy(model(z), y).sum()

    before = jax.tree.map(np.asarray, nnx.state(model))
    for function in (nnx.jit(loss), loss, lambda *arguments: nnx.jit(loss)(*arguments)):
        with pytest.raises(
            TypeError, match=r"^checked: .* a function of arrays; got flax.nnx.jit or a model .* checked\(jax.jit\(step\)\)\(state"
        ):
            xentjax.checked(function)(model, Z, Y)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, nnx.state(model)), before)
    graph, state = nnx.split(model)
    split = xentjax.checked(jax.jit(lambda state, z, y: loss(nnx.merge(graph, state), z, y)))
    np.testing.assert_array_equal(split(state, Z, Y), jax.jit(loss)(model, Z, Y))
    with raises("softmax_cross_entropy: labels[1] = 7 is outside [0, 3)."):
        split(state, Z, BAD)
