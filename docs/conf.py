"""The site: `sphinx-build -W docs docs/_build/html`."""

import inspect
import pathlib
import posixpath
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import formulas  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402

import xentjax  # noqa: E402

project, author, copyright = "xentjax", "the authors of xentjax", "2026, the authors of xentjax"
REPOSITORY = "https://github.com/xentjax/xentjax"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_ext", "_build", "**/.ipynb_checkpoints"]
nitpicky = True
templates_path = ["_templates"]
html_theme = "sphinx_book_theme"
html_title = "xentjax"
html_sidebars = {"**": ["navbar-logo.html", "icon-links.html", "sbt-sidebar-nav.html"]}  # the search field is at the top
html_static_path = ["_static"]
html_css_files = ["xentjax.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}
nb_execution_mode = "off"  # the notebooks are stored with their outputs
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
autosummary_generate = True
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which types cannot
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Reference", "notes_style")]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


MODULES = ("information", "metrics", "policy", "preference", "samplers", "sequence")
COPIES = {  # pages that are stored elsewhere in the repository, and their names on the site
    "benchmarks/README.md": "benchmarks",
    "benchmarks/NOTES.md": "benchmark-notes",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "examples/README.md": "examples",
}


def public() -> set[str]:
    """The public names as users write them behind `xentjax.`."""
    rooms = {"": xentjax, **{f"{name}.": getattr(xentjax, name) for name in MODULES}}
    names = {f"{prefix}{name}" for prefix, room in rooms.items() for name in dir(room) if not name.startswith("_")}
    return names - set(MODULES)  # a module has no page of its own


PUBLIC = public()


def link(text: str, here: str = "") -> str:
    """A link to a public name, or a literal."""
    name = text.removeprefix("xentjax.")
    for candidate in (f"{here}{name}", name):
        if candidate in PUBLIC:
            return f":py:obj:`{text} <xentjax.{candidate}>`"
    return f"``{text}``"


def docstring(app, what, name, obj, options, lines):
    room = name.split(".")[1] if name.count(".") > 1 else ""
    here = f"{room}." if room in MODULES else ""
    lines[:] = formulas.restructured(lines, lambda text: link(text, here))


def see_also(app, what, name, obj, options, lines):
    """Below a docstring: the other functions of its group, and the pages and notebooks that use the function."""
    name = name.removeprefix("xentjax.")
    if name not in PUBLIC:
        return
    (others,) = (names for names in GROUPS.values() if name in names)
    found = [f":doc:`/{page}`" for page, text in MENTIONS.items() if re.search(rf"(?<![\w.]){re.escape(name)}\b(?!_)", text)]
    rows = [[f":py:obj:`~xentjax.{other}`" for other in others if other != name], found]
    lines += ["", ".. seealso::", ""] * any(rows) + [line for row in rows if row for line in ("   " + ", ".join(row), "")]


def links_in_page(app, doctree):
    """A link to its API page behind each public name, and each call of one, that a guide or a notebook prints as code."""
    if app.env.docname.startswith(("api", "changelog", "contributing", "design", "benchmark")):
        return
    for node in list(doctree.findall(nodes.literal)):
        found = re.fullmatch(r"(?:xentjax\.)?([\w.]+)(\(.*)?", node.astext(), re.DOTALL)
        if found and found[1] in PUBLIC and not isinstance(node.parent, nodes.reference | nodes.title):
            target = {"refdomain": "py", "reftype": "obj", "reftarget": f"xentjax.{found[1]}", "refwarn": True}
            node.replace_self(addnodes.pending_xref("", node.deepcopy(), **target))


def pages(app, docname, source):
    """Links from a page to other files of the repository: to the page that shows the file, or to the repository."""
    if docname.startswith("notebooks/"):
        return
    stored = {page: path for path, page in COPIES.items()}.get(docname, f"docs/{docname}.md")

    def target(match):
        path, _, anchor = match[1].partition("#")
        if not path or "://" in path:
            return match[0]
        anchor = f"#{anchor}" if anchor else ""
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(stored), path))
        if whole in COPIES:
            return f"]({COPIES[whole]}.md{anchor})"
        if whole.startswith("docs/"):
            return f"]({whole.removeprefix('docs/')}{anchor})"
        if whole.startswith("examples/notebooks/") and whole.endswith(".ipynb"):
            return f"]({whole.removeprefix('examples/')})"
        return f"]({REPOSITORY}/blob/main/{whole}{anchor})"

    source[0] = re.sub(r"\]\(([^)\s]+)\)", target, source[0])


def copied():
    """Pages and notebooks that are stored elsewhere in the repository."""
    docs = ROOT / "docs"
    (docs / "notebooks").mkdir(exist_ok=True)
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copy(path, docs / "notebooks" / path.name)
    for path, page in COPIES.items():
        shutil.copy(ROOT / path, docs / f"{page}.md")


ROOMS = {  # the file that defines a name, and the title of its group
    "_losses.softmax": "Categorical cross-entropy",
    "_losses.sigmoid": "Binary cross-entropy",
    "_losses.robust": "Robust losses",
    "_losses.tempered": "Robust losses",
    "_losses.sparse": "Sparse distributions",
    "_losses.noise": "Noisy labels with a known noise matrix",
    "_losses.imbalance": "Rare classes",
    "_losses.margin": "Embeddings",
    "_losses.distillation": "Distillation",
    "_losses.top_k_teacher": "Distillation from the most probable classes of a teacher",
    "_losses.likelihood": "Real numbers, counts and levels",
    "_losses.ordinal": "Ordered classes",
    "_losses.overlap": "Regions",
    "_losses.detection": "Boxes",
    "_routing": "Mixtures of experts",
    "_linear.fused": "Fused linear layers",
    "_linear.sharded": "Fused linear layers",
    "_linear.plan": "Fused linear layers",
    "_contrastive.losses": "Embeddings",
    "_many_classes.sampled": "Sampled softmax",
    "_many_classes.hierarchical": "Adaptive and hierarchical softmax",
    "_sequence.ctc": "Sequences",
    "_sequence.transducer": "Sequences",
    "_sequence.tdt": "Sequences",
    "_sequence.crf": "Sequences",
    "sequence": "Decoders of sequences: xentjax.sequence",
    "preference": "Preferences: xentjax.preference",
    "policy": "Policies: xentjax.policy",
    "samplers": "Samplers of classes: xentjax.samplers",
    "_reduction": "Weighted sums and means",
    "_checked": "Value checks",
    "information": "Information theory: xentjax.information",
    "metrics": "Metrics: xentjax.metrics",
}


def groups() -> dict[str, list[str]]:
    """The public names under the title of their group."""
    found = {title: [] for title in ROOMS.values()}
    for name in sorted(PUBLIC):
        room, _, last = name.rpartition(".")
        thing = getattr(getattr(xentjax, room) if room else xentjax, last)
        found[ROOMS[room or thing.__module__.removeprefix("xentjax.")]].append(name)  # a new file needs a title
    return found


GROUPS = groups()


def mentions() -> dict[str, str]:
    """The pages and notebooks that explain functions, with what they say. Pages that list every function are left out."""
    docs = ROOT / "docs"
    guides = (
        "fused-linear",
        "devices",
        "metrics",
        "regions-and-boxes",
        "language-models",
        "preferences-and-policies",
        "sequences",
        "migration",
        "conventions",
        "when-something-is-nan",
        "how-it-works",
    )
    paths = {page: docs / f"{page}.md" for page in guides}
    paths |= {f"notebooks/{path.stem}": path.with_suffix(".py") for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))}
    return {page: path.read_text().replace("xentjax.", "") for page, path in paths.items()}


MENTIONS = mentions()


def api():
    """The list of all public functions, grouped; autosummary makes a page for each of them."""
    text = ["API", "===", "", "Every public function, with its formula, gradient, shapes, an example and a reference.", ""]
    for title, names in GROUPS.items():
        text += [title, "-" * len(title), "", ".. autosummary::", "   :toctree: api", "   :nosignatures:", ""]
        text += [f"   xentjax.{name}" for name in names] + [""]
    (ROOT / "docs" / "api.rst").write_text("\n".join(text))


def linkcode_resolve(domain, info):
    """The lines of a function in the repository."""
    found = sys.modules.get(info["module"])
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    try:
        found = inspect.unwrap(found)
        path = pathlib.Path(inspect.getsourcefile(found)).relative_to(ROOT)
        code, start = inspect.getsourcelines(found)
    except (TypeError, ValueError, OSError, AttributeError):
        return None
    return f"{REPOSITORY}/blob/main/{path}#L{start}-L{start + len(code) - 1}"


def setup(app):
    copied()  # before Sphinx looks for pages
    api()
    app.connect("source-read", pages)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before Napoleon, at 500
    app.connect("autodoc-process-docstring", see_also, priority=600)
    app.connect("doctree-read", links_in_page)
