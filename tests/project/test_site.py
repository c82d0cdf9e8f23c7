"""Formulas of docstrings on the site. CI builds the whole site, where every warning is an error."""

import inspect
import re
import sys

import pytest

from tests.project import pages
from tests.project.test_public import NAMES, thing

sys.path.insert(0, str(pages.ROOT / "docs" / "_ext"))
import formulas


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("−Σ_k p_k log p_k", r"-\sum _k p_k \log p_k"),
        ("e^(z_k − m)", r"e^{z_k - m}"),
        ("(T⁻¹)_yj", r"(T^{-1})_{yj}"),
        ("½·lse(z)²", r"\tfrac12 \cdot \operatorname{lse}(z)^{2}"),
        ("(1 − p)^γ₊", r"(1 - p)^{\gamma _+}"),
        ("P_i = {k: labels_k = labels_i}", r"P_i = \{k: \mathrm{labels}_k = \mathrm{labels}_i\}"),
        ("exp_t2(z_k)", r"\exp _{t2}(z_k)"),
    ],
)
def test_translation(formula, expected):
    assert formulas.tex(formula) == expected


def test_words_and_links_stay():
    line = "At γ = 0, it is cross-entropy. Pass α as `class_weights`, and a = θ_y − s; [...], *args and 32 MiB."
    rendered = formulas.render(line, lambda name: f"<{name}>")
    assert rendered == (
        r"At :math:`\gamma = 0`, it is cross-entropy. Pass α as <class_weights>, and :math:`a = \theta _y - s`; [...], \*args and 32 MiB."
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_formula_becomes_mathematics(name):
    docstring = inspect.cleandoc(thing(name).__doc__)
    rendered = "\n".join(formulas.restructured(docstring.splitlines(), lambda name: f"``{name}``"))
    for formula in re.findall(r":math:`([^`]*)`", rendered):
        bare = formula.replace(r"\{", "").replace(r"\}", "")
        assert bare.isascii() and bare.count("{") == bare.count("}"), formula
    prose = re.sub(r":math:`[^`]*`|``[^`]*``", "", rendered.split("\nExample")[0])
    assert not re.search("[Σ∂^]", prose), re.findall("[^\n]*[Σ∂^][^\n]*", prose)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_sentences(name):
    # Sphinx reads a word and a colon at the beginning of a result as its type, and cannot link it.
    docstring = inspect.cleandoc(thing(name).__doc__)
    results = re.findall(r"^Returns:\n((?:    .*\n)+)", docstring, re.M)
    assert not any(re.search(r"^    \w+: ", text, re.M) for text in results)
