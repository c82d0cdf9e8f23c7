"""The short run leaves out no test function, no public function and no value of an option, and each listed fault can be made."""

import re
from pathlib import Path

from tests import mutations, selection
from tests.tables import cases
from tests.tables.rows import ROWS

ROOT = Path(__file__).parents[2]
TABLES = {case.name for case in cases.LOSSES} | {row.name for row in ROWS}


class Marked:
    """A test as pytest collects it, as far as the selection looks at it."""

    def __init__(self, name, params, *marks):
        self.nodeid, self.marks = f"{name}[{'-'.join(map(str, params.values()))}]", marks
        self.callspec = type("CallSpec", (), {"params": params})

    def get_closest_marker(self, name):
        return name if name in self.marks else None


class Row:
    """A row of a table. Each module has two functions."""

    def __init__(self, name, label):
        self.name, self.label = name, label
        self.function = type("Function", (), {"__module__": "abcdef".index(name) // 2})

    def __str__(self):
        return f"{self.name}-{self.label}"


LOSSES = [Row(name, label) for name in "abcdef" for label in "xy"]
PRODUCT = [(row, shards, kind) for row in LOSSES for shards in (1, 2, 4) for kind in ("auto", "explicit")]


def chosen(*marks):
    items = [Marked("test", {"row": row, "shards": shards, "kind": kind}, *marks) for row, shards, kind in PRODUCT]
    names = selection.short(items)
    return [item.callspec.params for item in items if item.nodeid in names]


def test_every_function_and_every_option_once():
    params = chosen()
    assert sorted(p["row"].name for p in params) == list("abcdef")  # one test for each function, not one for each row
    assert {(p["shards"], p["kind"]) for p in params} == {(s, k) for s in (1, 2, 4) for k in ("auto", "explicit")}  # and every pair


def test_every_row_where_it_is_asked_for():
    assert {str(p["row"]) for p in chosen("every_row")} == set(map(str, LOSSES))


def test_one_function_of_each_module_where_it_is_asked_for():
    params = chosen("by_module")
    assert {p["row"].function.__module__ for p in params} == {0, 1, 2}
    assert len(params) == 6  # as many as the pairs of shards and kind need


def test_nothing_that_is_exhaustive():
    assert not chosen("exhaustive")


def test_no_test_function_is_left_out(pytestconfig):
    """Of all that this run collected: whole files and test functions are left out only by the mark `exhaustive`."""
    kept = {name.split("[")[0] for name in pytestconfig.stash[selection.SHORT]}
    left_out = {name.split("[")[0] for name in pytestconfig.stash[selection.EVERYTHING]} - kept
    marked = {name for name in left_out if is_marked(name)}
    assert left_out == marked


def is_marked(name, mark="exhaustive"):
    """Whether the source marks a test function, or its whole file."""
    file, *_, function = name.split("::")
    text = (ROOT / file).read_text()
    decorators = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {function}\(", text, re.M)
    return f"pytestmark = pytest.mark.{mark}" in text or (decorators is not None and f"@pytest.mark.{mark}" in decorators.group(1))


def test_every_public_function_meets_every_property(pytestconfig):
    """A property is a test function over a table. The functions that it names in the exhaustive run are named in the short run.

    Only tests with the mark `by_module` may leave functions out.
    """
    short, everything = (subjects(pytestconfig.stash[key]) for key in (selection.SHORT, selection.EVERYTHING))
    missing = {test: names - short[test] for test, names in everything.items() if test in short and names - short[test]}
    assert [test for test in missing if not is_marked(test, "by_module")] == []


def subjects(names):
    found = {}
    for name in names:
        test, _, parameters = name.partition("[")
        if subject := re.split(r"[-\]]", parameters)[0]:
            found.setdefault(test, set()).update({subject} & TABLES)
    return found


def test_the_line_of_each_fault_occurs_once():
    """So `python -m tests.mutations`, which runs seldom, finds each line that it replaces."""
    counts = {m.name: (mutations.ROOT / "xentjax" / m.file).read_text().count(m.old) for m in mutations.MUTATIONS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
