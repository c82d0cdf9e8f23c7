"""Float32 arithmetic with subnormal numbers, as on GPUs.

XLA on CPUs replaces a subnormal number by 0. GPUs keep subnormal numbers. The reciprocal of a subnormal number may overflow to ∞, and 0·∞
is NaN. `evaluate` runs the operations of a function one after another in float64. It rounds each result to float32 with NumPy, which keeps
subnormal numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

NESTED = ("jaxpr", "call_jaxpr")  # parameters that hold the program of an operation
LOOPS = ("while", "cond")
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before JAX 0.8


def evaluate(function, *arguments):
    """function(*arguments), where the float32 result of each operation is rounded as on GPUs."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    with np.errstate(all="ignore"):
        results = _run(program, [np.asarray(x) for x in jax.tree.leaves(arguments)])
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _run(program: ClosedJaxpr, arguments):
    values = dict(zip((*program.jaxpr.constvars, *program.jaxpr.invars), (*map(np.asarray, program.consts), *arguments), strict=True))

    def read(variable):
        return np.asarray(variable.val) if isinstance(variable, Literal) else values[variable]

    for eqn in program.jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        inner = next((eqn.params[name] for name in NESTED if name in eqn.params), None)
        if eqn.primitive.name == "scan":
            outputs = _scan(eqn.params, inputs)
        elif inner is None or eqn.primitive.name in LOOPS:
            outputs = _operation(eqn, inputs)
        else:
            outputs = _run(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, program.jaxpr.outvars))


def _scan(params, inputs):
    """The results of `lax.scan`, one step after another."""
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, xs = inputs[:first], inputs[first:last], inputs[last:]
    shapes = [(params["length"], *x.shape) for x in params["jaxpr"].out_avals[last - first :]]
    ys = [np.zeros(shape, x.dtype) for shape, x in zip(shapes, params["jaxpr"].out_avals[last - first :], strict=True)]
    for i in sorted(range(params["length"]), reverse=params["reverse"]):
        results = _run(params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = results[: last - first]
        for y, result in zip(ys, results[last - first :], strict=True):
            y[i] = result
    return [*carry, *ys]


def _operation(eqn, inputs):
    """The results of one operation. A loop, or an operation that cannot run in float64, runs in float32 without subnormal numbers."""
    if eqn.primitive.name == "bitcast_convert_type" and len({inputs[0].dtype.itemsize, np.dtype(eqn.params["new_dtype"]).itemsize}) == 1:
        return [inputs[0].view(eqn.params["new_dtype"])]
    params = {name: jnp.dtype(jnp.float64) if _is_float32(x) else x for name, x in eqn.params.items()}
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    try:
        with enable_x64(True):
            outputs = eqn.primitive.bind(*map(jnp.asarray, wide), **params)
            jax.block_until_ready(outputs)
    except Exception:
        outputs = eqn.primitive.bind(*map(jnp.asarray, inputs), **eqn.params)
    outputs = outputs if eqn.primitive.multiple_results else [outputs]
    return [np.asarray(x).astype(v.aval.dtype) for x, v in zip(outputs, eqn.outvars, strict=True)]


def _is_float32(x):
    return isinstance(x, np.dtype | type) and x == np.float32
