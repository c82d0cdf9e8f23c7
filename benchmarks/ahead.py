"""Memory and memory traffic of losses on an NVIDIA H200. The programs are compiled on a machine without a GPU.

Value and gradient of the mean at 8,192 x 32,000. `temporary MB`: memory beside arguments and results, as the compiler reports it.
`GB moved`: the sum of the bytes that each kernel reads and writes, as if no data stayed in a cache. The time of a large loss is about this
number divided by the memory bandwidth. The programs are compiled but not run, so no GPU is needed. JAX's plugin for CUDA 12 is needed:
install the extra `gpu-compiler`.
"""

import argparse
import math
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

import xentjax
from benchmarks import families, measure, published, report

SIZE = (8_192, 32_000)
# The description of an NVIDIA H200. The compiler uses its rates to decide which operations to fuse.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H200"
"""
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_OPERATION = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", re.M)
_KERNELS = ("fusion", "custom-call", "copy", "reduce", "convert", "transpose", "sort")


def moved(program: str) -> int:
    """Bytes that the kernels of a compiled program read and write. Kernels inside loops are not counted."""
    sizes: dict[str, int] = {}
    total = 0
    for name, result, operation, operands in _OPERATION.findall(program[program.index("ENTRY") :]):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        sizes[name] = sum(_BYTES.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
        if operation in _KERNELS:
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
    return total


def losses() -> dict[str, tuple[Callable, str]]:
    """Functions of (logits, other argument), and what the other argument is."""
    found: dict[str, tuple[Callable, str]] = {"softmax_cross_entropy": (xentjax.softmax_cross_entropy, "index")}
    of_index = {name: c.loss for name, c in families.contenders(SIZE[1]).items() if SIZE[1] <= c.most_classes}
    found |= {name: (loss, "index") for name, loss in of_index.items() if name != "distillation_loss"}
    for name in ("softmax_cross_entropy", "softmax_focal_loss", "generalized_cross_entropy"):
        found[f"{name}, soft labels"] = (getattr(xentjax, name), "distribution")
    for divergence, plain in published.DIVERGENCES.items():
        found[f"distillation_loss, {divergence}"] = (partial(xentjax.distillation_loss, divergence=divergence), "logits")
        found[f"plain formula, {divergence}"] = (partial(_wide, plain), "logits")
    return found


def _wide(formula: Callable, *logits: jax.Array) -> jax.Array:
    return formula(*(x.astype(jnp.float32) for x in logits))


def rows_of(dtype: str, place: jax.sharding.Sharding) -> report.Rows:
    """A row for each loss."""
    logits = jax.ShapeDtypeStruct(SIZE, dtype, sharding=place)
    others = {
        "index": jax.ShapeDtypeStruct(SIZE[:1], jnp.int32, sharding=place),
        "distribution": jax.ShapeDtypeStruct(SIZE, jnp.float32, sharding=place),
        "logits": logits,
    }
    rows = []
    for name, (loss, kind) in tqdm(losses().items(), desc=dtype, unit="loss"):
        step = jax.jit(jax.value_and_grad(lambda z, y, loss=loss: loss(z, y).mean()))
        program = step.lower(logits, others[kind]).compile()
        memory = round(measure.temporary_bytes(program) / 1e6, 1)
        rows.append({"loss": name, "dtype": dtype, "temporary MB": memory, "GB moved": round(moved(program.as_text() or "") / 1e9, 2)})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=0)


def run(arguments: argparse.Namespace) -> None:
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=TARGET).devices
    except Exception as error:
        raise SystemExit(f'JAX cannot compile for CUDA here: {error}\nInstall it: pip install "xentjax[gpu-compiler]"') from error
    place = jax.sharding.SingleDeviceSharding(devices[0])
    rows = [row for dtype in ("bfloat16", "float32") for row in rows_of(dtype, place)]
    print(f"jax {jax.__version__}, compiled for {devices[0].device_kind}\n{report.table(rows)}")
    report.write(arguments.json, {"benchmark": "ahead", "jax": jax.__version__, "device": devices[0].device_kind, "rows": rows})
