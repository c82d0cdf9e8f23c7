"""Who is measured: functions that return a contender, and import its package only when called.

A contender is a function (hidden, kernel, labels) → (value, (gradient of hidden, gradient of kernel)) of the mean cross-entropy of a linear
layer, with the kernel in the layout that it asks for, [features, classes] or [classes, features]. Every contender runs with its
package's own defaults. `ImportError` means that a peer is absent here; it is named and skipped.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import xentjax
from benchmarks import measure
from benchmarks.problem import Problem, Result


class Contender(NamedTuple):
    """A function of (hidden, kernel, labels), and whether its kernel is [classes, features]."""

    function: Callable
    classes_first: bool = False


class Program(NamedTuple):
    """A contender made ready for one problem."""

    run: Callable[[], Any]
    result: Callable[[Any], Result]
    """What `run` returned, in NumPy, the kernel's gradient as [features, classes]."""
    temporary_bytes: int | None
    """Memory beside arguments and results, as the compiler reports it; None: not reported."""
    first_run: Callable[[], int | None]
    """Runs once and returns the memory in use at the peak beyond the arguments, where the device tells."""


def _differentiated(loss: Callable, classes_first: bool = False) -> Contender:
    return Contender(jax.value_and_grad(loss, (0, 1)), classes_first)


def limit() -> Contender:
    """The three matrix products that every way of computing the gradients contains, and nothing else."""

    def products(hidden, kernel, labels):
        del labels
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        slope = logits.astype(hidden.dtype)
        return logits[0, 0], (slope @ kernel.T, hidden.T @ slope)

    return Contender(products)


def ours() -> Contender:
    """`xentjax.linear_softmax_cross_entropy` with its planned chunks."""
    return _differentiated(xentjax.linear_softmax_cross_entropy)


def ours_per_example() -> Contender:
    """The same with one loss per example, which a function outside averages. It needs a fourth product: the logits a second time."""

    def loss(hidden, kernel, labels):
        return xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none").mean()

    return _differentiated(loss)


def ours_every_statistic() -> Contender:
    """The same from every statistic of `row_statistics`: H − lse + Σ p·z is 0, and so are its derivatives, but XLA cannot know that."""

    def loss(hidden, kernel, labels):
        s = xentjax.fuse_linear(xentjax.row_statistics, reduction="none")(hidden, kernel, labels)
        zero = s.entropy - jnp.maximum(s.log_normalizer, s.max_logit) + s.expected_logit + jnp.minimum(s.correct.astype(s.entropy.dtype), 0)
        return (zero - s.log_prob).mean()

    return _differentiated(loss)


def _optax_sum(hidden, kernel, labels):
    # Cast after the product: a product with float32 results would have float32 gradient products too, at a fraction of the speed.
    logits = (hidden @ kernel).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def materialised() -> Contender:
    """Logits in memory, cast to float32, and optax."""
    return _differentiated(lambda hidden, kernel, labels: _optax_sum(hidden, kernel, labels) / labels.size)


def checkpoint_scan() -> Contender:
    """What users write by hand: `jax.checkpoint` around optax in a `lax.scan` over equal chunks, as large as xentjax's or smaller."""

    def loss(hidden, kernel, labels):
        tokens = labels.size
        planned = xentjax.plan_linear(hidden, kernel).chunks
        chunks = next(count for count in range(planned, tokens + 1) if tokens % count == 0)

        @jax.checkpoint
        def step(total, chunk):
            return total + _optax_sum(chunk[0], kernel, chunk[1]), None

        batch = hidden.reshape(chunks, tokens // chunks, -1), labels.reshape(chunks, -1)
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), batch)[0] / tokens

    return _differentiated(loss)


def tokamax(implementation: str) -> Contender:
    """One of the implementations of tokamax, of which not every release has all."""
    function = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    importlib.import_module("absl.flags").FLAGS(["benchmarks"])  # or tokamax reads this program's command line as its own
    settings = {"reduction": "mean", "implementation": implementation}
    return _differentiated(lambda hidden, kernel, labels: function(hidden, labels, kernel, **settings))


def jax_cce() -> Contender:
    """jax-cce, chunks of 4,096 classes."""
    function = importlib.import_module("jax_cce").linear_cross_entropy
    return _differentiated(function, classes_first=True)


def ejkernel() -> Contender:
    """The fused linear mode of ejkernel, chunks of tokens."""
    function = importlib.import_module("ejkernel.modules.operations.fused_cross_entropy").fused_cross_entropy
    return _differentiated(lambda hidden, kernel, labels: function(targets=labels, hidden=hidden, lm_head_weight=kernel).loss)


def _torch(gpu_only: bool = False) -> Any:
    torch = importlib.import_module("torch")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise ImportError("this torch cannot use the GPU that JAX runs on")
    if gpu_only and not on_gpu:
        raise ImportError("measured on a GPU only")
    return torch


def torch_materialised(gpu_only: bool = False) -> Contender:
    """`F.cross_entropy` of logits in memory, cast to float32."""
    functional = _torch(gpu_only).nn.functional

    def loss(hidden, kernel, labels):
        return functional.cross_entropy(functional.linear(hidden, kernel).float(), labels)

    return Contender(loss, classes_first=True)


def torch_linear(chunks: int | None = None) -> Contender:
    """`F.linear_cross_entropy` in chunks as torch chooses them, often of a few examples, or in so many; without `options` it is `torch`."""
    torch = _torch()
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")

    def loss(hidden, kernel, labels):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunks and -(-len(labels) // chunks))
        return torch.nn.functional.linear_cross_entropy(hidden, kernel, labels, options=options)

    return Contender(loss, classes_first=True)


def torch_compiled() -> Contender:
    """`torch.compile` of linear layer and cross-entropy."""
    return Contender(_torch(gpu_only=True).compile(torch_materialised().function), classes_first=True)


def liger() -> Contender:
    """Liger's fused linear cross-entropy, Triton."""
    _torch(gpu_only=True)
    return Contender(importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy, classes_first=True)


def cut_cross_entropy() -> Contender:
    """Apple's cut-cross-entropy, Triton; skips gradients that it finds too small."""
    _torch(gpu_only=True)
    return Contender(importlib.import_module("cut_cross_entropy").linear_cross_entropy, classes_first=True)


JAX: dict[str, Callable[[], Contender]] = {
    "limit": limit,
    "xentjax": ours,
    "xentjax-none": ours_per_example,
    "xentjax-statistics": ours_every_statistic,
    "optax": materialised,
    "checkpoint-scan": checkpoint_scan,
    "tokamax": functools.partial(tokamax, "xla"),
    "tokamax-chunked": functools.partial(tokamax, "chunked_xla"),
    "jax-cce": jax_cce,
    "ejkernel": ejkernel,
}
TORCH: dict[str, Callable[[], Contender]] = {
    "torch": torch_materialised,
    "torch-linear": torch_linear,
    "torch-linear-4": functools.partial(torch_linear, 4),
    "torch-compile": torch_compiled,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
NAMES = (*JAX, *TORCH)


def _jax_program(contender: Contender, problem: Problem) -> Program:
    arguments = problem.on_device_classes_first if contender.classes_first else problem.on_device
    program = jax.jit(contender.function).lower(*arguments).compile()
    run = functools.partial(program, *arguments)

    def result(returned):
        value, gradients = returned
        hidden, kernel = map(np.asarray, gradients)
        return Result(np.asarray(value), hidden, kernel.T if contender.classes_first else kernel)

    return Program(run, result, measure.temporary_bytes(program), functools.partial(measure.peak_bytes, run))


def _torch_program(contender: Contender, problem: Problem) -> Program:
    torch = _torch()
    cuda = torch.cuda if jax.default_backend() == "gpu" else None

    def tensor(array):
        if array.dtype == jnp.bfloat16:  # which NumPy's bridge to torch does not know
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    arrays = problem.hidden, problem.kernel_classes_first, problem.labels.astype(np.int64)
    hidden, kernel, labels = (tensor(a).to("cuda" if cuda else "cpu") for a in arrays)
    hidden.requires_grad_()
    kernel.requires_grad_()

    def run():
        value = contender.function(hidden, kernel, labels)
        gradients = torch.autograd.grad(value, (hidden, kernel))
        if cuda:
            cuda.synchronize()
        return value.detach(), gradients

    def result(returned):
        value, gradients = returned
        arrays = [x.float().cpu().numpy() for x in (value, *gradients)]
        return Result(arrays[0], arrays[1], arrays[2].T)

    def first_run():
        if cuda:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated() if cuda else 0
        run()
        return cuda.max_memory_allocated() - before if cuda else None

    return Program(run, result, None, first_run)


def program(name: str, problem: Problem) -> Program:
    """The contender of this name, compiled for the problem; `ImportError` where it is absent."""
    return _jax_program(JAX[name](), problem) if name in JAX else _torch_program(TORCH[name](), problem)


def reason(error: Exception) -> str:
    """Why a contender has no figures, on one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:160]}"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of the packages behind the contenders."""
    packages = {
        "tokamax-chunked": "tokamax",
        "torch-linear": "torch",
        "torch-linear-4": "torch",
        "torch-compile": "torch",
        "liger": "liger-kernel",
    }
    found = {}
    for package in dict.fromkeys(["jax", "xentjax", "optax", *(packages.get(name, name) for name in names)]):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
