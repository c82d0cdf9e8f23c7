"""Every public name has rows in the table, a formula and a gradient in its docstring, and examples that run."""

import doctest
import importlib
import inspect
import pkgutil
import re

import cases
import jax
import pytest

import xentjax

NAMES = sorted(name for name in vars(xentjax) if not name.startswith("_"))
LOSSES = sorted({case.name for case in cases.LOSSES})
TAIL = {
    "classes": ["axis", "axis_name", "class_mask", "where"],
    "top_k": ["axis", "axis_name", "class_mask", "where"],
    "bits": ["where"],
}


def test_the_front_door_shows_functions_and_results_only():
    assert all(inspect.isfunction(getattr(xentjax, n)) or inspect.isclass(getattr(xentjax, n)) for n in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_has_a_row_or_a_test_of_its_own(name):
    assert (name in LOSSES) != (name in cases.ELSEWHERE), f"{name}: add rows to cases.py"


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    thing = getattr(xentjax, name)
    doc = inspect.getdoc(thing) or ""
    assert doc.splitlines()[0].endswith((".", ":"))
    assert "[...]" in doc or "[]" in doc, "shapes"
    if inspect.isfunction(thing):
        for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
            assert section in doc, section
        for parameter in inspect.signature(thing).parameters:
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
    assert positional == (["logits", "label_ids", "label_probs"] if family == "top_k" else ["logits", "labels"])
    assert keywords[-len(TAIL[family]) :] == TAIL[family]
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def modules():
    return ["xentjax", *(m.name for m in pkgutil.walk_packages(xentjax.__path__, "xentjax."))]


@pytest.mark.parametrize("module", modules())
def test_examples_run(module):
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # as a reader has it
    try:
        found = doctest.DocTestFinder().find(importlib.import_module(module))
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        for test in found:
            runner.run(test)
        assert runner.failures == 0
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")


def test_every_public_function_has_an_executed_example():
    for name in NAMES:
        assert ">>> " in (inspect.getdoc(getattr(xentjax, name)) or "") or name in ("RowStatistics", "LinearPlan"), name
