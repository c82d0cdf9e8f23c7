"""Every public name has rows in the table, a formula and a gradient in its docstring, and examples that run."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re

import jax
import pytest

import xentjax
from tests.properties import test_functions
from tests.tables import cases

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODULES = ("information", "metrics", "policy", "preference", "samplers", "sequence")


def public(module, prefix=""):
    return [prefix + name for name in vars(module) if not name.startswith("_") and name not in MODULES]


def thing(name):
    return functools.reduce(getattr, name.split("."), xentjax)


NAMES = sorted(public(xentjax) + [name for m in MODULES for name in public(getattr(xentjax, m), f"{m}.")])
ROWS = {row.name for row in test_functions.ROWS}
LOSSES = sorted({case.name for case in cases.LOSSES})
TAIL = {
    "classes": ["axis", "axis_name", "class_mask", "where"],
    "top_k": ["axis", "axis_name", "class_mask", "where"],
    "bits": ["where"],
}


def test_the_front_door_shows_functions_and_results_only():
    assert all(inspect.isfunction(thing(n)) or inspect.isclass(thing(n)) for n in NAMES)
    assert all(inspect.ismodule(getattr(xentjax, m)) for m in MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_has_a_row_or_a_test_of_its_own(name):
    assert (name in LOSSES) + (name in ROWS) + (name in cases.ELSEWHERE) == 1, f"{name}: add rows to cases.py or a table_*.py"


def test_no_row_without_a_public_name():
    assert {*LOSSES, *ROWS, *cases.ELSEWHERE} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    found = thing(name)
    doc = inspect.getdoc(found) or ""
    assert doc.splitlines()[0].endswith((".", ":"))
    assert re.search(r"\[([\w ,.…]*)\]", doc), "shapes"
    if inspect.isfunction(found):
        for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
            assert section in doc, section
        assert "numpy.ndarray" not in str(inspect.signature(found))  # the definition of ArrayLike would fill the screen in help()
        for parameter in inspect.signature(found).parameters:
            assert re.search(rf"^\s+{parameter}: ", doc, re.M), parameter
        assert re.search(r"[=Σ≤−]", doc), "formula"
        if name != "checked":
            assert "Gradient" in doc


@pytest.mark.parametrize("name", LOSSES)
def test_signature(name):
    family = next(case.family for case in cases.LOSSES if case.name == name)
    parameters = list(inspect.signature(getattr(xentjax, name)).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    inputs = "cosines" if name == "margin_cross_entropy" else "logits"
    assert positional == ([inputs, "label_ids", "label_probs"] if family == "top_k" else [inputs, "labels"])
    assert keywords[-len(TAIL[family]) :] == TAIL[family]
    required = {keyword for case in cases.LOSSES if case.name == name for keyword in case.arrays}
    assert all((p.default is p.empty) == (p.name in required) for p in parameters if p.kind is p.KEYWORD_ONLY)


def modules():
    return ["xentjax", *(m.name for m in pkgutil.walk_packages(xentjax.__path__, "xentjax."))]


@pytest.mark.parametrize("module", [name for name in modules() if name != "xentjax.metrics._ranking"])  # test_examples_of_rankings.py
def test_examples_run(module):
    assert failed_examples(module) == 0


def failed_examples(module):
    """How many examples of the docstrings of a module print something else."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # as a reader has it
    try:
        found = doctest.DocTestFinder().find(importlib.import_module(module))
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        for test in found:
            runner.run(test)
        return runner.failures
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")


def test_every_public_function_has_an_executed_example():
    for name in NAMES:
        assert ">>> " in (inspect.getdoc(thing(name)) or "") or inspect.isclass(thing(name)), name
