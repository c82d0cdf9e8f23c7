"""Processes that run `examples/sharded_lm.py`: they train as one device does, resume to the bit, and all end with an error if one fails."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = pytest.mark.exhaustive
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"batch": 5, "length": 16, "features": 8, "classes": 64, "characters": 20000, "steps": 3, "every": 3}
TIMEOUT = 20  # of runs that fail: how long a process may be silent. All else, compiling included, is over in a quarter of it
BOUND = 60  # a run that fails has ended by then, whatever it was waiting for

# Says when each step begins; may raise or hang there. What main returned is its last line.
PROGRAM = """
import json, sys, time
import sharded_lm

place, fault, calls = sharded_lm.place, sys.argv.pop(1), []

def watched(mesh, rows):
    step = len(calls) - 1  # the first call places the held-out rows
    calls.append(print("step", step, flush=True))
    if fault == f"raise at {step}":
        raise OSError("disk full")
    while fault == f"hang at {step}":
        time.sleep(1)
    return place(mesh, rows)

sharded_lm.place = watched
print(json.dumps(sharded_lm.main(sys.argv[1:])))
"""


def words_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def launch(tmp_path):
    """Starts some of `count` processes, together one program, and ends what is left of them after the test."""
    started = []
    # without the slow passes of the compiler a small program costs half
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # see `read_program_of_one_device` in conftest.py

    def start(count, options, which=None, fault="", **different):
        """`fault` and `different` are for the last process alone."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs = []
        for i in range(count) if which is None else which:
            last = i == count - 1
            together = {"coordinator": f"127.0.0.1:{port}", "num-processes": count, "process-id": i, "devices": 2} if count > 1 else {}
            words = words_of(TINY | options | together | (different if last else {}))
            prefix = tmp_path / f"{len(started)}"
            with open(f"{prefix}.out", "w") as out, open(f"{prefix}.err", "w") as err:
                command = [sys.executable, "-c", PROGRAM, fault if last else "", *words]
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
            runs.append((started[-1], prefix))
        return runs

    yield start
    for process in started:
        process.kill()  # by its own id; one that has ended is left alone
    for process in started:
        process.wait()


def output(run, stream="out"):
    return Path(f"{run[1]}.{stream}").read_text("utf-8")


def results(runs):
    for run in runs:
        assert run[0].wait(timeout=300) == 0, output(run, "err")
    return [json.loads(output(run).splitlines()[-1]) for run in runs]


def wait_until(condition, runs):
    limit = time.monotonic() + 300
    while not condition():
        assert all(run[0].poll() is None for run in runs), [output(run, "err") for run in runs]
        assert time.monotonic() < limit
        time.sleep(0.05)


def errors(runs):
    """What the processes wrote, each of which must end by itself, without success, within the bound."""
    limit = time.monotonic() + BOUND
    for run in runs:
        assert run[0].wait(timeout=max(0, limit - time.monotonic())) not in (0, -signal.SIGKILL)
    return [output(run, "err") for run in runs]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_sharded_lm", EXAMPLES / "sharded_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense(example):
    """Losses, perplexity and state of the same training on one device in float64: all logits, log-softmax, AdamW from its formulas."""
    rows, held_out = example.read(TINY["characters"], TINY["classes"], TINY["length"])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and Python's numbers
        initial, _ = example.initialise(jax.random.key(0), TINY["classes"], TINY["features"])
    shifts = np.stack([np.eye(TINY["length"], k=-back) for back in range(4)])

    def loss(p, rows):
        labels, real = np.maximum(rows[:, 1:], 0), rows[:, 1:] >= 0
        x = p["embed"][np.maximum(rows[:, :-1], 0)]
        past = jnp.einsum("kts,bsf->btkf", shifts, x).reshape(*x.shape[:2], -1)
        log_p = jax.nn.log_softmax((x + jax.nn.gelu(past @ p["past"])) @ p["head"])
        return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0] * real) / real.sum()

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        p = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), initial)
        m, v = jax.tree.map(jnp.zeros_like, (p, p))
        losses, derivatives = [], jax.value_and_grad(loss)
        for t, batch in enumerate(batches(rows), 1):
            value, g = derivatives(p, batch)
            losses.append(float(value))
            for name in p:
                m[name] = 0.9 * m[name] + 0.1 * g[name]
                v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
                direction = m[name] / (1 - 0.9**t) / (jnp.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
                p[name] = p[name] - 4e-3 * (t - 1) / 20 * (direction + 0.1 * p[name])
        return losses, float(np.exp(loss(p, held_out))), jax.tree.map(np.asarray, {"parameters": p, "mu": m, "nu": v})


def batches(rows):
    return [rows[np.random.default_rng((0, step)).integers(len(rows), size=TINY["batch"])] for step in range(TINY["steps"])]


def label_counts(example, parts):
    """Labels that each part of the devices gets, step by step."""
    for batch in batches(example.read(TINY["characters"], TINY["classes"], TINY["length"])[0]):
        batch = np.pad(batch, ((0, -len(batch) % parts), (0, 0)), constant_values=-1)
        yield (batch[:, 1:] >= 0).reshape(parts, -1).sum(1).tolist()


def saved(example, folder, step):
    """The state of a checkpoint, whatever mesh wrote it, on one device."""
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(lambda: example.initialise(jax.random.key(0), TINY["classes"], TINY["features"]))
    shardings = example.layout(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1]), state)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def assert_equal_to_dense(dense, state, losses=None, perplexity=None):
    """To 3e-5, 250 eps of float32: of the largest of an array, because sums over tokens are rounded to the size of their terms."""
    expected_losses, expected_perplexity, expected = dense
    if losses is not None:
        np.testing.assert_allclose(losses, expected_losses, rtol=3e-5)
    if perplexity is not None:
        np.testing.assert_allclose(perplexity, expected_perplexity, rtol=3e-5)
    for kind, found in (("parameters", state[0]), ("mu", state[1][0].mu), ("nu", state[1][0].nu)):
        for name, x in found.items():
            tolerance = 3e-5 * abs(expected[kind][name]).max()
            np.testing.assert_allclose(x, expected[kind][name], rtol=0, atol=tolerance, err_msg=f"{kind} {name}")


def test_eight_devices_train_as_one(example, dense, launch, tmp_path):
    # five rows over four parts of the devices: two, two, one and a row of padding, two rows of padding
    assert all(counts[3] == 0 < counts[2] for counts in label_counts(example, 4))
    (found,) = results(launch(1, {"devices": 8, "folder": tmp_path / "lm"}))
    assert_equal_to_dense(dense, saved(example, tmp_path / "lm", 3), found["losses"], found["after"])


def test_two_processes_train_as_one_device_and_resume_to_the_bit(example, dense, launch, tmp_path):
    assert all(len(set(counts)) == 2 for counts in label_counts(example, 2))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, second = results(launch(2, {"steps": 6, "folder": whole}))
    assert first == second and first["first"] == 0 and len(first["losses"]) == 6
    resumed.mkdir()
    shutil.copytree(whole / "3", resumed / "3")
    later, other = results(launch(2, {"steps": 6, "folder": resumed}))
    assert later == other and later["first"] == 3
    assert later["losses"] == first["losses"][3:] and later["after"] == first["after"]
    jax.tree.map(np.testing.assert_array_equal, saved(example, resumed, 6), saved(example, whole, 6))
    assert_equal_to_dense(dense, saved(example, whole, 3), first["losses"][:3], later["before"])


def test_four_processes_train_as_one_device_and_end_when_one_dies(example, dense, launch, tmp_path):
    # classes over two processes, tokens over two; after three steps the last process waits, to be killed, and all others wait for it
    runs = launch(4, {"model": 4, "folder": tmp_path / "lm", "timeout": TIMEOUT, "steps": 9}, fault="hang at 3")
    wait_until(lambda: (tmp_path / "lm" / "3").exists() and all("step 3" in output(run) for run in runs), runs)
    runs.pop()[0].kill()
    for text in errors(runs):
        assert "Connection" in text or "heartbeat" in text
    assert_equal_to_dense(dense, saved(example, tmp_path / "lm", 3))


def test_the_death_of_the_coordinator_ends_all(launch):
    runs = launch(2, {"timeout": TIMEOUT, "steps": 10**6})
    wait_until(lambda: all("step 2" in output(run) for run in runs), runs)
    runs.pop(0)[0].kill()
    (text,) = errors(runs)
    assert "Connection" in text or "Socket closed" in text


@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_a_process_that_fails_or_hangs_ends_all(launch, fault):
    first, second = errors(launch(2, {"timeout": TIMEOUT}, fault=f"{fault} at 2"))
    assert {"raise": "disk full", "hang": "Timeout"}[fault] in second
    assert "Timeout" in first or "Connection" in first or "Error" in first


def test_processes_with_different_options_are_told(launch):
    # the sums over devices have the same shapes all the same: this would train on, on what nobody meant
    first, second = errors(launch(2, {"timeout": TIMEOUT}, batch=7))
    assert "process 0 has batch=5" in first and "process 1 has batch=7" in second


def test_a_process_that_never_comes_is_not_waited_for(launch):
    (text,) = errors(launch(2, {"timeout": TIMEOUT}, which=[0]))
    assert "DEADLINE_EXCEEDED" in text
