"""Errors about arguments: raised at once, in or out of a trace, naming function, argument, expected, got and remedy."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.tables import cases
from tests.tables.calls import CALLS

Z, Y = jnp.zeros((2, 3)), jnp.array([0, 1])
BITS = jnp.zeros((64, 10))
IDS, PROBS = jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2))

cross_entropy = xentjax.softmax_cross_entropy
focal = xentjax.softmax_focal_loss
top_k = xentjax.softmax_cross_entropy_with_top_k_labels
bits = xentjax.sigmoid_cross_entropy


def raises(error, message):
    """The whole message, nothing before or after it."""
    return pytest.raises(error, match=f"^{re.escape(message)}(\n|$)")  # JAX appends a note about its traceback on a line of its own


LABELS = {"classes": (Y,), "top_k": (IDS, PROBS), "bits": (Z,)}


def complete(case):
    """The function with whatever it needs to know of three classes."""
    arrays = {name: jnp.asarray(x) for name, x in case.of_classes(3).items()}
    return functools.wraps(case.function)(functools.partial(case.function, **arrays))


every_loss = pytest.mark.parametrize(
    ("function", "family"), {c.name: pytest.param(complete(c), c.family, id=c.name) for c in cases.LOSSES}.values()
)


INDICES = "labels must have shape (2,), the shape of logits without its class axis; got"
ROWS = "labels must have shape (2, 3), the shape of logits, because floating labels are soft labels; got"
KINDS = "labels must have an integer dtype (class indices) or a floating dtype (soft labels); got"
RULES = "Rules for labels: https://github.com/xentjax/xentjax/blob/main/docs/conventions.md#labels"
INT = f"For class indices, use labels.astype(jnp.int32). {RULES}"
ONE_HOT = (
    "For one-hot integers, use labels.argmax(1), or labels.astype(float) for soft labels. "
    "For one binary label per logit, put zeros and the logits on a class axis, or use a sigmoid loss."
)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (Y[:, None], ValueError, f"{INDICES} (2, 1). Use labels.squeeze(-1)."),
        (Y[None], ValueError, f"{INDICES} (1, 2). Use labels.squeeze(0)."),
        (jnp.array(0), ValueError, f"{INDICES} ()."),
        (jnp.zeros(3, jnp.int32), ValueError, f"{INDICES} (3,). If the classes are on axis 0, pass axis=0."),
        (jnp.zeros(4, jnp.int32), ValueError, f"{INDICES} (4,)."),
        (jnp.zeros((2, 3), jnp.int32), ValueError, f"{INDICES} (2, 3). {ONE_HOT}"),
        (Y.astype(jnp.float32), ValueError, f"{ROWS} (2,). {INT}"),
        (jnp.ones((2, 4)), ValueError, f"{ROWS} (2, 4). {RULES}"),
        (Y == 0, TypeError, f"{KINDS} bool. {INT}"),
        (jnp.zeros((2, 3), bool), TypeError, f"{KINDS} bool. For one-hot labels, use labels.argmax(1). {RULES}"),
        (Y.astype(jnp.complex64), TypeError, f"{KINDS} complex64. {INT}"),
        ({}, TypeError, "labels must be an array or convertible to one; got dict."),
        ("cat", TypeError, "labels must be an array or convertible to one; got str."),
    ],
    ids=lambda x: None,
)
def test_labels_of_the_softmax_family(labels, error, message):
    for function in (cross_entropy, focal, xentjax.softmax_log_prob, xentjax.row_statistics):
        with raises(error, f"{function.__name__}: {message}"):
            function(Z, labels)


def test_labels_may_not_be_missing():
    for function in (cross_entropy, focal, xentjax.softmax_log_prob, xentjax.row_statistics, bits):
        with pytest.raises(TypeError, match=f"^{function.__name__}: labels must be an array .*; got NoneType"):
            function(Z, None)


SCALAR = "logits must have a class axis; got a scalar. For one logit per decision use the sigmoid losses."
WHERE = "where must have shape (2,), the shape of logits without its class axis; got"
CLASS_MASK = "class_mask must have shape (3,), one per class, or (2, 3), the shape of logits; got (2,)."


@pytest.mark.parametrize(
    ("logits", "keywords", "error", "message"),
    [
        (Z.astype(jnp.int32), {}, TypeError, "logits must have a floating dtype; got int32. Use logits.astype(jnp.float32)."),
        (Z, {"axis": 2}, ValueError, "axis must be in [-2, 2) for logits of shape (2, 3); got 2."),
        (Z, {"axis": -3}, ValueError, "axis must be in [-2, 2) for logits of shape (2, 3); got -3."),
        (Z[:, :0], {}, ValueError, "logits must have at least one class on axis 1; got shape (2, 0)."),
        (Z[:0], {"axis": 0}, ValueError, "logits must have at least one class on axis 0; got shape (0, 3)."),
        (Z[0, 0], {}, ValueError, SCALAR),
        (Z, {"where": jnp.ones(2)}, TypeError, "where must have dtype bool; got float32. Use where != 0."),
        (Z, {"where": jnp.ones((2, 1), bool)}, ValueError, f"{WHERE} (2, 1). Use where.squeeze(-1)."),
        (Z, {"where": True}, ValueError, f"{WHERE} (). Use jnp.broadcast_to(where, (2,)) to broadcast it explicitly."),
        (Z, {"class_mask": jnp.ones(3)}, TypeError, "class_mask must have dtype bool; got float32. Use class_mask != 0."),
        (Z, {"class_mask": jnp.ones(2, bool)}, ValueError, CLASS_MASK),
    ],
    ids=lambda x: None,
)
def test_what_the_categorical_losses_share(logits, keywords, error, message):
    for function in (cross_entropy, focal, xentjax.softmax_log_prob, xentjax.row_statistics):
        with raises(error, f"{function.__name__}: {message}"):
            function(logits, Y, **keywords)
    with raises(error, f"{top_k.__name__}: {message}"):
        top_k(logits, IDS, PROBS, **keywords)


TOP_K_SHAPE = "label_ids must have shape (2, k), the shape of logits without its class axis, followed by k classes per example; got"


@pytest.mark.parametrize(
    ("ids", "probs", "error", "message"),
    [
        (jnp.zeros((2, 2)), PROBS, TypeError, "label_ids must have an integer dtype; got float32. Use label_ids.astype(jnp.int32)."),
        (jnp.zeros((3, 2), jnp.int32), PROBS, ValueError, f"{TOP_K_SHAPE} (3, 2)."),
        (Y, PROBS, ValueError, f"{TOP_K_SHAPE} (2,)."),
        (IDS, jnp.zeros((2, 3)), ValueError, "label_probs must have shape (2, 2), the shape of label_ids; got (2, 3)."),
        (IDS, IDS, TypeError, "label_probs must have a floating dtype; got int32. Use label_probs.astype(jnp.float32)."),
    ],
    ids=lambda x: None,
)
def test_top_k_labels(ids, probs, error, message):
    with raises(error, f"{top_k.__name__}: {message}"):
        top_k(Z, ids, probs)


def labels_of(function):
    return Y if function in (cross_entropy, focal) else Z


WRONG_HYPER_PARAMETERS = [
    *((f, "label_smoothing", x, f"in [0, 1]; got {x:g}") for f in (cross_entropy, focal, bits) for x in (1.5, -0.1, np.nan, np.inf)),
    (cross_entropy, "label_smoothing", np.float32(1.5), "in [0, 1]; got 1.5"),
    (cross_entropy, "label_smoothing", np.array(-1), "in [0, 1]; got -1"),
    *((f, n, x, f"at least 0; got {x:g}") for f, n in ((cross_entropy, "z_loss"), (focal, "gamma")) for x in (-0.5, np.inf, np.nan)),
    *((f, n, -2, "at least 0; got -2") for f, n in ((bits, "pos_weight"), (xentjax.sigmoid_focal_loss, "gamma"))),
    *((xentjax.sigmoid_focal_loss, "alpha", x, f"in [0, 1]; got {x:g}") for x in (1.25, -0.25)),
    *((xentjax.asymmetric_loss, f"gamma_{sign}", -1.0, "at least 0; got -1") for sign in ("negative", "positive")),
    *((xentjax.asymmetric_loss, "clip", x, f"in [0, 1]; got {x:g}") for x in (1.05, -0.05, np.nan)),
]


@pytest.mark.parametrize(("function", "name", "value", "complaint"), WRONG_HYPER_PARAMETERS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_python_numbers_out_of_range(function, name, value, complaint):
    message, labels = f"{function.__name__}: {name} must be a finite number {complaint}.", labels_of(function)
    with raises(ValueError, message):
        function(Z, labels, **{name: value})
    with raises(ValueError, message):
        jax.jit(lambda z: function(z, labels, **{name: value}))(Z)


@pytest.mark.parametrize(
    ("function", "name"), sorted({(f, name) for f, name, *_ in WRONG_HYPER_PARAMETERS}, key=str), ids=lambda x: getattr(x, "__name__", x)
)
def test_hyper_parameters_are_scalars_and_traced_ones_are_not_judged(function, name):
    labels = labels_of(function)
    if name != "pos_weight":
        with raises(ValueError, f"{function.__name__}: {name} must have shape (), a scalar; got (3,). Use jax.vmap to try several values."):
            function(Z, labels, **{name: jnp.ones(3)})
    with raises(TypeError, f"{function.__name__}: {name} must have a floating dtype; got bool. Use {name}.astype(jnp.float32)."):
        function(Z, labels, **{name: jnp.array(True)})
    with raises(TypeError, f"{function.__name__}: {name} must be an array or convertible to one; got str."):
        function(Z, labels, **{name: "0.1"})
    assert jax.jit(lambda x: function(Z, labels, **{name: x}))(-0.5).shape == labels.shape


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (jnp.ones(2), ValueError, "have shape (3,), one weight per class; got (2,)."),
        (Z, ValueError, "have shape (3,), one weight per class; got (2, 3)."),
        ([True, True, False], TypeError, "have a floating dtype; got bool. Use class_weights.astype(jnp.float32)."),
    ],
    ids=["length", "rank", "dtype"],
)
def test_class_weights(weights, error, message):
    for function in (cross_entropy, focal):
        with raises(error, f"{function.__name__}: class_weights must {message}"):
            function(Z, Y, class_weights=weights)


BIT = "the shape of logits, one label per logit; got"
BIT_REMEDY = "If each example has one class of several, use softmax_cross_entropy. For one decision per class, use jax.nn.one_hot."


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (BITS, jnp.zeros((64, 1)), f"labels must have shape (64, 10), {BIT} (64, 1). {BIT_REMEDY}"),
        (BITS, jnp.zeros(64, jnp.int32), f"labels must have shape (64, 10), {BIT} (64,). {BIT_REMEDY}"),
        (BITS, jnp.zeros(10), f"labels must have shape (64, 10), {BIT} (10,)."),
        (BITS, 0, f"labels must have shape (64, 10), {BIT} ()."),
        (BITS[:, 0], jnp.zeros((64, 1)), f"labels must have shape (64,), {BIT} (64, 1). Use labels.squeeze(-1)."),
        (BITS[:, :1], jnp.zeros(64), f"labels must have shape (64, 1), {BIT} (64,). Use jnp.expand_dims(labels, 1)."),
    ],
    ids=["column", "indices", "row", "scalar", "squeeze", "expand"],
)
def test_bits_are_never_broadcast(logits, labels, message):
    for function in (bits, xentjax.sigmoid_focal_loss, xentjax.asymmetric_loss):
        with raises(ValueError, f"{function.__name__}: {message}"):
            function(logits, labels)


def test_other_arguments_of_bits():
    with raises(TypeError, "sigmoid_cross_entropy: labels must have a boolean, integer or floating dtype; got complex64."):
        bits(BITS, BITS.astype(jnp.complex64))
    with raises(
        ValueError,
        "sigmoid_cross_entropy: where must have shape (64, 10), the shape of logits; got (64, 1). "
        "Use jnp.broadcast_to(where, (64, 10)) to broadcast it explicitly.",
    ):
        bits(BITS, BITS, where=jnp.ones((64, 1), bool))
    with raises(
        ValueError, f"{bits.__name__}: pos_weight must have shape (10,), one weight per class along the last axis of logits; got (3,)."
    ):
        bits(BITS, BITS, pos_weight=jnp.ones(3))
    expected = f"{bits.__name__}: pos_weight must have shape (10,), one weight per class along the last axis of logits; got"
    for wrong, remedy in (((64,), "Use pos_weight.reshape(64, 1) for axis 0."), ((64, 3), "")):
        with raises(ValueError, f"{expected} {wrong}. {remedy}".rstrip()):
            bits(BITS, BITS, pos_weight=jnp.ones(wrong))
    with pytest.raises(ValueError, match=re.escape("got (4, 1). Use pos_weight.reshape(1, 4, 1) to broadcast it explicitly.")):
        bits(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 3)), pos_weight=jnp.ones((4, 1)))
    with pytest.raises(TypeError, match=r"^sigmoid_cross_entropy: pos_weight must have a floating dtype; got bool"):
        bits(BITS, BITS, pos_weight=np.ones(10, np.bool_))


@pytest.mark.parametrize("function", [xentjax.weighted_mean, xentjax.weighted_sum], ids=lambda f: f.__name__)
def test_sums_are_never_broadcast(function):
    name = function.__name__
    with raises(TypeError, f"{name}: values must have a floating dtype; got bool. Use values.astype(jnp.float32)."):
        function(Z == 0)
    with raises(TypeError, f"{name}: weights must have a floating dtype; got int32. Use weights.astype(jnp.float32)."):
        function(Z, Z.astype(jnp.int32))
    with raises(TypeError, f"{name}: where must have dtype bool; got float32. Use where != 0."):
        function(Z, where=Z)
    for argument, dtype in (("weights", jnp.float32), ("where", jnp.bool_)):
        for shape in ((2, 1), (3,), ()):
            message = f"{name}: {argument} must have shape (2, 3), the shape of values; got {shape}."
            with raises(ValueError, f"{message} Use jnp.broadcast_to({argument}, (2, 3)) to broadcast it explicitly."):
                function(Z, **{argument: jnp.ones(shape, dtype)})
    # (N, 1) against (N,) cannot be broadcast, so nobody is told to
    with pytest.raises(ValueError, match=re.escape(f"{name}: weights must have shape (3, 1), the shape of values; got (3,).")) as caught:
        function(jnp.ones((3, 1)), jnp.ones(3))
    assert "broadcast_to" not in str(caught.value)


@every_loss
def test_every_loss_judges_dtypes_and_where(function, family):
    name, labels = function.__name__, LABELS[family]
    inputs = "cosines" if name == "margin_cross_entropy" else "logits"
    swapped = " If these are the labels, swap the first two arguments." * (family == "bits")  # only these labels are floating
    with raises(TypeError, f"{name}: {inputs} must have a floating dtype; got int32. Use {inputs}.astype(jnp.float32).{swapped}"):
        function(Z.astype(jnp.int32), *labels)
    with raises(TypeError, f"{name}: {inputs} must be an array or convertible to one; got str."):
        function("logits", *labels)
    right = (2, 3) if family == "bits" else (2,)
    for wrong in ((4,), (2, 3, 1)):
        with pytest.raises(ValueError, match=re.escape(f"{name}: where must have shape {right}, ") + ".*" + re.escape(f"; got {wrong}.")):
            function(Z, *labels, where=jnp.ones(wrong, bool))
    with raises(TypeError, f"{name}: where must have dtype bool; got int32. Use where != 0."):
        function(Z, *labels, where=jnp.ones(right, jnp.int32))


@every_loss
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, jax.make_jaxpr], ids=lambda f: f.__name__)
def test_errors_raise_while_tracing(function, family, transform):
    broken = (jnp.zeros((5, 2), jnp.int32), *LABELS[family][1:])
    traced = transform(lambda z: jnp.sum(jax.tree.leaves(function(z, *broken))[0]))
    with pytest.raises(ValueError, match=rf"^{function.__name__}: label(s|_ids) must have shape .*; got \(5, 2\)"):
        traced(jnp.zeros((2, 2, 3)) if transform is jax.vmap else Z)


# The sums reduce over any axes; theirs is not a class axis.
WITH_AXIS = [c for c in CALLS if "axis" in inspect.signature(c.function).parameters and not str(c).startswith("weighted")]


@pytest.mark.parametrize("call", WITH_AXIS, ids=str)
def test_the_class_axis_is_one_integer(call):
    name, of = call.function.__name__, next(iter(call.arrays))
    remedy = f"Use jnp.moveaxis and reshape to put all classes of {of} on one axis."
    with raises(TypeError, f"{name}: axis must be an integer; got (0, 1). {remedy}"):
        call.function(**call.arrays, **call.settings, **call.static, axis=(0, 1))
    with raises(TypeError, f"{name}: axis must be an integer; got 1.0."):
        call.function(**call.arrays, **call.settings, **call.static, axis=1.0)
    for axis in (np.int64(1), np.array(1), jnp.array(1)):  # traced alone
        jax.eval_shape(lambda arrays: call.function(**arrays, **call.settings, **call.static, axis=axis), call.arrays)  # noqa: B023  # traced at once


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_must_be_given_may_not_be_none(call):
    function = call.name if call.name.startswith("samplers.") else call.function.__name__
    for name, p in inspect.signature(call.function).parameters.items():
        if name in call.arrays and p.default is p.empty and isinstance(call.arrays[name], np.ndarray):
            with raises(TypeError, f"{function}: {name} must be an array or convertible to one; got NoneType."):
                call({**call.arrays, name: None})


H, K = jnp.zeros((2, 4)), jnp.zeros((4, 3))
FRAMES = jnp.zeros((6, 2, 3))  # the time comes first, as in PyTorch
SWAPPED = r"got int32. Use logits.astype\(jnp.float32\). If these are the labels, swap the first two arguments."


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy(Y, Z), TypeError, f"softmax_cross_entropy: logits must have a floating dtype; {SWAPPED}"),
        (lambda: bits(Y, jnp.zeros(2)), TypeError, f"sigmoid_cross_entropy: logits must have a floating dtype; {SWAPPED}"),
        (
            lambda: cross_entropy(Z, [[0], [0, 1]]),
            TypeError,
            "softmax_cross_entropy: labels .* got list. Pad its lists to the same length.",
        ),
        (
            lambda: cross_entropy(Z, ["cat", "dog"]),
            TypeError,
            "softmax_cross_entropy: labels .* got list. Replace each string by an integer.",
        ),
        (lambda: xentjax.ctc_loss(FRAMES, Y[:, None]), ValueError, r"ctc_loss: .* got \(2, 1\). If .* axis 0 of logits, use jnp.swapaxes"),
        (
            lambda: xentjax.ctc_loss(FRAMES, jnp.ones((6, 1), int), logit_lengths=jnp.ones((6, 2), bool)),
            ValueError,
            r"ctc_loss: logit_lengths must have shape \(6,\), .* got \(6, 2\). If it is a mask .*, use its sum\(-1\).",
        ),
        (lambda: xentjax.transducer_loss(FRAMES, Y), ValueError, r"transducer_loss: .* max_labels \+ 1 = 2 rows per frame; got \(2,\)"),
        (lambda: xentjax.lovasz_hinge_loss(Z[..., None], Z > 0), ValueError, r"lovasz_hinge_loss: .* Use logits.squeeze\(-1\)."),
        (lambda: xentjax.plan_linear((2, 4), K), TypeError, "plan_linear: hidden must be .* jax.ShapeDtypeStruct.*; got tuple."),
        (lambda: xentjax.checked(1.0), TypeError, "checked: function must be a function; got float."),
        (
            lambda: xentjax.sampled_softmax_cross_entropy(H, K, Y, samples=Y),
            TypeError,
            "sampled_softmax_cross_entropy: samples must be the result of samplers.draw; got ",
        ),
        (
            lambda: xentjax.adaptive_softmax_cross_entropy(H, K, Y),
            TypeError,
            "adaptive_softmax_cross_entropy: parameters must be .* xentjax.init_adaptive_softmax; got ",
        ),
        (
            lambda: xentjax.init_adaptive_softmax(jax.random.key(0), 4, 9),
            TypeError,
            r"init_.*: cutoffs .* got 9. Use \[shortlist, ..., 9\]",
        ),
        (
            lambda: xentjax.hierarchical_softmax_cross_entropy(H, K, Y, tree=Y),
            TypeError,
            "hierarchical_softmax_cross_entropy: tree must be a BinaryTree, such as xentjax.huffman_tree",
        ),
        (lambda: xentjax.samplers.draw(jax.random.key(0), 3, 2), TypeError, "samplers.draw: sampler must be .*; got int."),
        (lambda: xentjax.samplers.log_expected_count(3, Y, 2), TypeError, "samplers.log_expected_count: sampler must be .*; got int."),
        (
            lambda: xentjax.sequence.transducer_greedy_decode(lambda x, _: x, lambda y, s: s, FRAMES, jnp.zeros(6), max_labels=1),
            TypeError,
            "transducer_greedy_decode: predictor must return a pair .*; got ",
        ),
        (
            lambda: xentjax.sequence.tdt_greedy_decode(lambda x, _: x, lambda y, s: (y, s), FRAMES, jnp.zeros(6), max_labels=1),
            TypeError,
            "tdt_greedy_decode: joint must return a pair .*; got ",
        ),
    ],
    ids=lambda x: None,
)
def test_usual_mistakes(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
