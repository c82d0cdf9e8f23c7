"""A language model over devices and processes: classes of the head over one mesh axis, tokens over another. The training can be resumed.

Shows `fuse_linear_sharded` with optax and orbax. No device holds the whole head, and the loss is exact for any distribution of padding.
The processes also fail together: if one dies, stops, hangs or was started with different arguments, all end with an error within --timeout
seconds. So each step, with its compilation, must take less time than that.
The model, one layer over the last words (Bengio et al., A Neural Probabilistic Language Model, 2003), learns Python's standard library.
    python examples/sharded_lm.py --devices 8 --model 4 --folder saved     39 s on two cores: perplexity 4105.87, after 200 steps 71.54
    for i in 0 1; do python examples/sharded_lm.py --devices 4 --coordinator localhost:9911 --num-processes 2 --process-id $i & done; wait
"""

import argparse
import collections
import faulthandler
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import NamedSharding, P
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from tqdm import tqdm

import xentjax

CONTEXT = 4  # how many words the model sees
PADDING = -1
OPTIMIZER = optax.adamw(optax.warmup_constant_schedule(0.0, 4e-3, 20), weight_decay=0.1)
SPLIT = {"embed": P("model"), "head": P(None, "model")}  # by class; every device has all of the rest


def join(options):
    """Meets the other processes. From then on, one that is silent for `timeout` seconds is dead, and the death of one ends all."""
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator:
        limits = dict.fromkeys(("initialization_timeout", "heartbeat_timeout_seconds"), options.timeout)
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id, **limits)
        faulthandler.dump_traceback_later(options.timeout, exit=True)


def agree(**values):
    """Raises in every process unless all have the same. Different programs would wait for each other, or add what is not of a kind."""
    texts = np.array([f"{name}={value}" for name, value in values.items()])
    hashes = multihost_utils.process_allgather(np.array([zlib.crc32(text.encode()) for text in texts], np.uint32))
    if (mine := texts[(hashes != hashes[0]).any(axis=0)]).size:
        raise ValueError(f"sharded_lm: all processes must get the same; process {jax.process_index()} has {', '.join(mine)}")


def read(characters, classes, length):
    """Rows [length + 1] of the sources, in two parts: indices of words by frequency, 0 for rare ones; the end of a block is padded."""
    text = "".join(path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("*.py")))[:characters]
    blocks = [re.findall(r"\w+|[^\w\s]|\n *", block) for block in re.split(r"\n(?=\S)", text)]
    parts = [block[i : i + length + 1] for block in blocks for i in range(0, len(block) - 1, length)]  # each label once
    cut = len(parts) * 19 // 20
    words = collections.Counter(word for part in parts[:cut] for word in part).most_common(classes - 1)
    index = {word: i for i, (word, _) in enumerate(words, 1)}
    rows = np.array([[index.get(word, 0) for word in part] + [PADDING] * (length + 1 - len(part)) for part in parts], np.int32)
    return rows[:cut], rows[cut:]


def place(mesh, rows):
    """A global array, its rows over "data", with padding on the last devices. A process looks up only what its devices hold."""
    rows = np.pad(rows, ((0, -len(rows) % mesh.shape["data"]), (0, 0)), constant_values=PADDING)
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, P("data")), rows.__getitem__)


def initialise(key, classes, features):
    """Parameters, and the optimizer's state with arrays of the same names."""
    wide = CONTEXT * features
    shapes = {"embed": (1, (classes, features)), "past": (wide**-0.5, (wide, features)), "head": (1 / features, (features, classes))}
    keys = jax.random.split(key, len(shapes))
    parameters = {name: scale * jax.random.normal(k, shape) for k, (name, (scale, shape)) in zip(keys, shapes.items(), strict=True)}
    return parameters, OPTIMIZER.init(parameters)


def layout(mesh, state):
    return jax.tree.map_with_path(lambda path, _: NamedSharding(mesh, SPLIT.get(getattr(path[-1], "key", ""), P())), state)


def hidden_values(parameters, tokens):
    """[batch, length, features]: what the model makes of each token and those before it."""
    x = parameters["embed"][tokens]
    shifted = [jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]] for back in range(CONTEXT)]
    return x + jax.nn.gelu(jnp.concatenate(shifted, axis=-1) @ parameters["past"])


def make_functions(mesh):
    fused = xentjax.fuse_linear_sharded(xentjax.softmax_cross_entropy, mesh=mesh, tokens=P("data"), axis_name="model")

    def loss(parameters, rows):
        labels = rows[:, 1:]
        return fused(hidden_values(parameters, rows[:, :-1]), parameters["head"], labels, where=labels != PADDING)

    def step(state, rows):
        value, gradient = jax.value_and_grad(loss)(state[0], rows)
        updates, memory = OPTIMIZER.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), memory), value

    return jax.jit(step, donate_argnums=0), jax.jit(lambda parameters, rows: jnp.exp(loss(parameters, rows)))


def main(argv: list[str] | None = None) -> dict:
    """Trains and prints held-out perplexities; returns them and the loss of every step."""
    parser = argparse.ArgumentParser(description="A language model over devices and processes learns Python's standard library.")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; without it there is one process")
    parser.add_argument("--folder", type=Path, help="for checkpoints, seen by all processes; a run resumes from the last one in it")
    numbers = {"num-processes": 1, "process-id": 0, "devices": 0, "model": 2, "timeout": 60, "steps": 200, "every": 50, "seed": 0}
    numbers |= {"batch": 64, "length": 64, "features": 64, "classes": 4096, "characters": 1_000_000}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    options = parser.parse_args(argv)
    join(options)
    rows, held_out = read(options.characters, options.classes, options.length)
    agree(data=zlib.crc32(rows.tobytes()), **{name: value for name, value in vars(options).items() if name != "process_id"})
    mesh = jax.make_mesh((jax.device_count() // options.model, options.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    given = jax.random.key(options.seed), options.classes, options.features
    shardings = layout(mesh, jax.eval_shape(lambda: initialise(*given)))
    state = jax.jit(initialise, static_argnums=(1, 2), out_shardings=shardings)(*given)
    checkpoints = options.folder and ocp.CheckpointManager(options.folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = (checkpoints and checkpoints.latest_step()) or 0
    agree(first=first)
    state = checkpoints.restore(first, args=ocp.args.StandardRestore(state)) if first else state
    (step, perplexity), held_out, losses = make_functions(mesh), place(mesh, held_out), []
    before = float(perplexity(state[0], held_out))
    for number in (bar := tqdm(range(first, options.steps), unit="step", disable=jax.process_index() > 0)):
        if options.coordinator:  # a sum over devices waits forever for a process that hangs: this ends it unless called again in time
            faulthandler.dump_traceback_later(options.timeout, exit=True)
        batch = np.random.default_rng((options.seed, number)).choice(rows, options.batch)  # by its number: the same in a resumed run
        state, value = step(state, place(mesh, batch))
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if checkpoints and (number + 1) % options.every == 0:
            checkpoints.save(number + 1, args=ocp.args.StandardSave(state))
    if checkpoints:
        checkpoints.close()
    after = float(perplexity(state[0], held_out))
    faulthandler.cancel_dump_traceback_later()
    if jax.process_index() == 0:
        print(f"{dict(mesh.shape)}: held-out perplexity after {first} steps {before:.2f}, after {options.steps} steps {after:.2f}")
    return {"before": before, "after": after, "losses": losses, "first": first}


if __name__ == "__main__":
    main()
