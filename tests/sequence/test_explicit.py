"""Batches of sequences, and their classes, that a mesh with explicit axes splits over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax
from benchmarks.collectives import collectives
from xentjax import sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(jnp.finfo(jnp.float32).eps)
BATCH, TIME, LABELS, CLASSES = 4, 3, 2, 6
DATA = P("data")


def last_label(label, state):
    return label + state, state + 1


def joint(frame, prediction):
    return jnp.sin(frame + prediction[..., None].astype(frame.dtype))


def ctc(function):
    """A function of logits and four arrays of the batch."""

    def run(z, labels, frames, counts, *where):
        masks = {"where": where[0]} if where else {}
        return function(z, labels, logit_lengths=frames, label_lengths=counts, **masks)

    return run


def of_log_probs(z, labels, frames, counts, where):
    return xentjax.ctc_loss_from_log_probs(z[..., 0], z[..., 1:3], labels, logit_lengths=frames, label_lengths=counts, where=where)


def transducer_of_log_probs(z, frames, counts, where):
    given = {"logit_lengths": frames, "label_lengths": counts, "where": where}
    return xentjax.transducer_loss_from_log_probs(z[..., 0], z[..., :LABELS, 1], **given)


def transducer(z, labels, frames, counts, where):
    given = {"logit_lengths": frames, "label_lengths": counts, "where": where}
    return xentjax.transducer_loss(z, labels, fastemit=0.1, class_mask=np.arange(CLASSES) != 5, **given)


def greedy_tdt(z, frames):
    def scores(frame, prediction):
        return joint(frame, prediction), frame[..., :2]

    return sequence.tdt_greedy_decode(scores, last_label, z, jnp.zeros_like(frames), max_labels=4, durations=(1, 2), logit_lengths=frames)


def greedy_transducer(z, frames):
    start = jnp.zeros_like(frames)
    return sequence.transducer_greedy_decode(joint, last_label, z, start, max_labels=4, logit_lengths=frames, blank=1)


ARGUMENTS = {
    "z": lambda rng: rng.normal(size=(BATCH, TIME, CLASSES)).astype(np.float32),
    "nodes": lambda rng: rng.normal(size=(BATCH, TIME, LABELS + 1, CLASSES)).astype(np.float32),
    "labels": lambda rng: rng.integers(1, CLASSES - 1, (BATCH, LABELS)).astype(np.int32),
    "frames": lambda rng: np.array([3, 2, 3, 3], np.int32),
    "counts": lambda rng: np.array([2, 1, 2, 0], np.int32),
    "where": lambda rng: np.array([True, True, False, True]),
    "tags": lambda rng: rng.integers(0, CLASSES, (BATCH, TIME)).astype(np.int32),
    "positions": lambda rng: np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]], bool),
    "scores": lambda rng: rng.normal(size=(CLASSES, CLASSES)).astype(np.float32),  # the same on all devices
}
PATHS = ("labels", "frames", "counts", "where")
ROWS = {
    "ctc_loss": (ctc(xentjax.ctc_loss), ("z", *PATHS)),
    "ctc_loss_from_log_probs": (of_log_probs, ("z", *PATHS)),
    "transducer_loss": (transducer, ("nodes", *PATHS)),
    "transducer_loss_from_log_probs": (transducer_of_log_probs, ("nodes", *PATHS[1:])),
    "crf_loss": (
        lambda z, w, y, where: xentjax.crf_loss(z, y, w, start=w[0], end=w[1], where=where),
        ("z", "scores", "tags", "positions"),
    ),
    "ctc_greedy_decode": (lambda z, frames: sequence.ctc_greedy_decode(z, logit_lengths=frames), ("z", "frames")),
    "ctc_alignment": (ctc(sequence.ctc_alignment), ("z", *PATHS[:3])),
    "ctc_posteriors": (ctc(sequence.ctc_posteriors), ("z", *PATHS[:3])),
    "transducer_greedy_decode": (greedy_transducer, ("z", "frames")),
    "tdt_greedy_decode": (greedy_tdt, ("z", "frames")),
    "tdt_loss": (
        lambda z, y, where: xentjax.tdt_loss(z, z[..., :3], y, durations=(0, 1, 2), where=where),
        ("nodes", "labels", "where"),
    ),
    "tdt_loss_from_log_probs": (
        lambda z, where: xentjax.tdt_loss_from_log_probs(z[..., 0], z[..., :LABELS, 1], z[..., 2:4], durations=(0, 1), where=where),
        ("nodes", "where"),
    ),
    "crf_marginals": (lambda z, w, where: sequence.crf_marginals(z, w, where=where), ("z", "scores", "positions")),
    "crf_decode, the two best": (lambda z, w, where: sequence.crf_decode(z, w, where=where, best=2), ("z", "scores", "positions")),
    "crf_decode": (lambda z, w, where: sequence.crf_decode(z, w, end=w[0], where=where), ("z", "scores", "positions")),
}
SPLIT_CLASSES = ("ctc_loss", "transducer_loss", "ctc_alignment", "ctc_posteriors")


def test_all_functions():
    losses = {n for n in dir(xentjax) if n.startswith(("ctc", "transducer", "tdt", "crf"))}
    public = losses | {n for n in dir(sequence) if not n.startswith("_")}
    assert public - set(ROWS) <= {"sequence"}


def evaluate(function):
    """The results, and the gradients of the first two arguments with floating numbers."""

    def run(*arguments):
        floating = tuple(i for i, x in enumerate(arguments[:2]) if jnp.issubdtype(x.dtype, jnp.floating))

        def total(*arguments):
            results = function(*arguments)
            parts = [jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(parts, jnp.zeros((), jnp.float32)), results

        slopes, results = jax.grad(total, floating, has_aux=True)(*arguments)
        return results, slopes

    return run


def check(name, rng, spec, only_first=False):
    function, arguments = ROWS[name]
    given = [jnp.asarray(ARGUMENTS[a](rng)) for a in arguments]
    expected = jax.jit(evaluate(function))(*given)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = [spec if i == 0 else P() if only_first or a == "scores" else DATA for i, a in enumerate(arguments)]
        split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(given, specs, strict=True)]
        compiled = jax.jit(evaluate(function)).lower(*split).compile()
        found = compiled(*split)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Both programs do the same steps, compiled apart. The gradients are differences of numbers up to 1.
        np.testing.assert_allclose(x, y, rtol=16 * EPS, atol=0 if x.ndim == 1 else 16 * EPS)
    assert all(jax.typeof(x).sharding.spec[0] == "data" for x in jax.tree.leaves(found[0]))
    return {c.kind for c in collectives(compiled.as_text())}


SHORT = ("ctc_loss", "crf_decode", "transducer_greedy_decode")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.exhaustive) for n in ROWS])
def test_batches(name, rng):
    """Devices exchange only sums: of the gradient of shared scores, and of whether a decoder still runs."""
    shared = name.startswith("crf") or name in ("transducer_greedy_decode", "tdt_greedy_decode")
    assert check(name, rng, DATA) <= ({"all-reduce"} if shared else set())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SPLIT_CLASSES)
def test_batches_and_classes(name, rng):
    kind = len(ARGUMENTS[ROWS[name][1][0]](rng).shape)
    assert check(name, rng, P("data", *[None] * (kind - 2), "model")) <= {"all-reduce"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["ctc_loss", "transducer_loss", "crf_loss"])
def test_only_the_logits_are_split(name, rng):
    shared = name == "crf_loss"
    assert check(name, rng, DATA, only_first=True) <= ({"all-reduce"} if shared else set())
