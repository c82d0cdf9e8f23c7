"""Eight CPU devices, strict dtype promotion and no rank promotion for every test; which tests run; how long the files took."""

import collections
import functools
import gc
import os
import pathlib
from unittest import mock

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiled programs are kept in a folder that all workers and later runs share. `pytest --cache-clear` empties it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no lines of source in programs: they took a fifteenth of the time

import hypothesis
import jax
import numpy as np
import pytest
from jax._src import compiler  # no public function sets the options of all programs, or says which ones the folder may serve
from jax._src.interpreters import mlir

from tests import drawing, selection

read_program = compiler._cache_read


def read_program_of_one_device(*arguments, **more):
    """JAX's reader of the folder of programs. It finds no program for several devices, so those are compiled.

    On CPUs, a program with collective operations can be wrong once it has been read from the folder. With `bi_tempered_cross_entropy` over
    8 devices, JAX 0.10.2 returned wrong numbers in a third of the calls, and JAX 0.12.0 did not return. A compiled one is right.
    """
    devices = arguments[4]
    return (None, None) if len(devices) > 1 else read_program(*arguments, **more)


compiler._cache_read = read_program_of_one_device
# JAX makes a context of MLIR for every program, which takes twice as long as lowering a small one. Here a module of tests shares one.
context_of_module = mlir.make_ir_context = functools.cache(mlir.make_ir_context)
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and little garbage: a fifth of the time was spent looking for it

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--device", action="store_true", help="run on JAX's default device, for tests that need only one device")
    parser.addoption("--exhaustive", action="store_true", help="run every combination of parameters")
    parser.addoption(
        "--randomize", type=int, metavar="N", help="let each hypothesis test draw N new examples; without it every run draws the same ones"
    )


def pytest_configure(config):
    if config.getoption("--device"):
        jax.config.update("jax_default_matmul_precision", "highest")  # float32 products of GPUs and TPUs are rounded otherwise
    else:
        jax.config.update("jax_platforms", "cpu")
    config.addinivalue_line("markers", "exhaustive: only under --exhaustive")
    config.addinivalue_line("markers", "by_module: one row for each module of losses in the short run, not one for each public function")
    config.addinivalue_line("markers", "every_row: every row of the table in the short run too, not one for each public function")
    drawing.number = config.getoption("--randomize")
    drawing.exhaustive = config.getoption("--exhaustive")
    hypothesis.settings.register_profile("xentjax", deadline=None, derandomize=drawing.number is None)  # a new shape compiles a program
    hypothesis.settings.load_profile("xentjax")


def pytest_collection_modifyitems(config, items):
    names = selection.short(items)
    config.stash[selection.EVERYTHING], config.stash[selection.SHORT] = [item.nodeid for item in items], names
    if config.getoption("--exhaustive") or any("::" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
    items[:] = [item for item in items if item.nodeid in names]


def pytest_collection_finish():
    gc.freeze()  # the modules and tests stay until the end, so later searches for garbage need not look at their objects


def pytest_terminal_summary(terminalreporter):
    seconds = collections.Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "duration")):
        seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files (seconds of work, summed over the workers)")
    for file, duration in seconds.most_common(10):
        terminalreporter.write_line(f"{duration:7.1f}  {file}")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65,530: without this, XLA crashes after some 1,500 tests."""
    yield
    jax.clear_caches()
    context_of_module.cache_clear()
    gc.collect()


@pytest.fixture(scope="session")
def quick_options(pytestconfig):
    """Options for the code generator that XLA used on CPUs before 2025, which takes half the time, and for one module of LLVM a program.

    Without the second option, XLA makes up to 32 modules, which take a fifth longer on one core. The exhaustive run has programs so large
    that one module takes minutes. No options if XLA no longer has them.
    """
    options = {"xla_cpu_use_fusion_emitters": False}
    if not pytestconfig.getoption("--exhaustive"):
        options["xla_cpu_parallel_codegen_split_count"] = 1
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


@pytest.fixture(scope="module")
def quick_compilation(quick_options):
    """Programs of lower quality, compiled in a third of the time, for modules about formulas and structure.

    XLA's own passes (fusion, simplification) stay. Modules about accuracy, memory and what programs look like do not ask for this.
    """

    def compile_options(*args, original=compiler.get_compile_options, **kwargs):
        options = original(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *quick_options.items()]
        return options

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.object(compiler, "get_compile_options", compile_options):
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(2026)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)
