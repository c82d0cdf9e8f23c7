"""The pages of docs/: their code runs, every row of their tables is executed, and every file and test that they name exists."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xentjax
from tests.project import pages
from tests.tables import cases
from tests.tables import reference as ref
from tests.tables import reference_families as families
from xentjax._losses import robust

pytestmark = pytest.mark.usefixtures("quick_compilation")
DOCS = pages.ROOT / "docs"
CONTRIBUTING = (pages.ROOT / "CONTRIBUTING.md").read_text()
OTHER_PAGES = [page for folder in (".", "benchmarks", "examples") for page in sorted((pages.ROOT / folder).glob("*.md"))]
EVERY_PAGE = [str(page.relative_to(pages.ROOT)) for page in pages.DOCS + OTHER_PAGES]
EPS = float(jnp.finfo(jnp.float32).eps)
RNG = np.random.default_rng(7)
GIVEN = {
    "z": jnp.asarray(RNG.normal(size=(6, 5)) * 2, jnp.float32),
    "y": jnp.array([0, 4, 2, 2, 1, 3]),
    "t": jnp.asarray(RNG.dirichlet(np.ones(5), 6), jnp.float32),
    "w": jnp.array([0.5, 1.0, 2.0, 3.0, 0.25]),
    "x": jnp.asarray(RNG.normal(size=(6, 5)) * 2, jnp.float32),
    "b": jnp.asarray(RNG.integers(0, 2, (6, 5)), jnp.float32),
    "v": jnp.array([3.0, 1.0, 0.5, 2.0, 1.0]),
    "images": jnp.asarray(RNG.normal(size=(2, 5, 3, 3)), jnp.float32),
    "pixels": jnp.asarray(RNG.integers(0, 5, (2, 3, 3)), jnp.int32),
    "K": 5,
    "eps": 0.1,
    "teacher": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32),
    "mean": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32),
    "variance": jnp.asarray(RNG.uniform(0.5, 2, (6, 5)), jnp.float32),
    "log_rate": jnp.asarray(RNG.normal(size=6), jnp.float32),
    "jax": jax,
    "jnp": jnp,
}
GIVEN |= {"log_p": jax.nn.log_softmax(GIVEN["z"])}
PADDED = GIVEN | {"y": GIVEN["y"].at[2].set(-100), "m": jnp.arange(6) != 2}
Z, Y, T, W, X, B, V = (np.asarray(GIVEN[k], np.float64 if k != "y" else np.int64) for k in "zytwxbv")
ROWS = ref.cross_entropy(ref.Double, Z, np.eye(5)[Y])
SMOOTH = ref.targets(ref.Double, Y, 5, 0.1)
FOCAL = ref.bit_focal(ref.Double, X, B)
TEACHER, MEAN, VARIANCE, LOG_RATE = (np.asarray(GIVEN[k], np.float64) for k in ("teacher", "mean", "variance", "log_rate"))
SOFT_TEACHER = np.exp(TEACHER / 2) / np.exp(TEACHER / 2).sum(-1, keepdims=True)
IMAGES = np.moveaxis(np.asarray(GIVEN["images"], np.float64), 1, -1)

# What each call of another library computes, from its documentation.
MEANING = {
    "F.cross_entropy(z, y)": ROWS.mean(),
    "F.cross_entropy(z, y, ignore_index=-100)": np.delete(ROWS, 2).mean(),
    "F.cross_entropy(z, y, weight=w)": (W[Y] * ROWS).sum() / W[Y].sum(),
    "F.cross_entropy(z, y, weight=w, label_smoothing=0.1)": ref.cross_entropy(ref.Double, Z, W * SMOOTH).sum() / W[Y].sum(),
    "F.cross_entropy(z, y, weight=w, ignore_index=-100)": np.delete(W[Y] * ROWS, 2).sum() / np.delete(W[Y], 2).sum(),
    "F.cross_entropy(z, y, weight=w, label_smoothing=0.1, ignore_index=-100)": (
        np.delete(ref.cross_entropy(ref.Double, Z, W * SMOOTH), 2).sum() / np.delete(W[Y], 2).sum()
    ),
    "F.nll_loss(log_p, y)": ROWS.mean(),
    'F.kl_div(F.log_softmax(z / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")': (
        (SOFT_TEACHER * np.log(SOFT_TEACHER)).sum(-1) + ref.cross_entropy(ref.Double, Z / 2, SOFT_TEACHER)
    ).mean(),
    "F.gaussian_nll_loss(mean, x, variance)": 0.5 * (np.log(VARIANCE) + (X - MEAN) ** 2 / VARIANCE).mean(),
    "F.poisson_nll_loss(log_rate, y)": (np.exp(LOG_RATE) - Y * LOG_RATE).mean(),
    "F.cross_entropy(z, t)": ref.cross_entropy(ref.Double, Z, T).mean(),
    "F.cross_entropy(images, pixels)": ref.cross_entropy(ref.Double, IMAGES, np.eye(5)[np.asarray(GIVEN["pixels"])]).mean(),
    "F.binary_cross_entropy_with_logits(x, b, pos_weight=v)": ref.bit_cross_entropy(ref.Double, X, B, V).mean(),
    "torchvision.ops.sigmoid_focal_loss(x, b)": ref.bit_focal(ref.Double, X, B, 2.0, 0.25),
    "SparseCategoricalCrossentropy(from_logits=True)(y, z)": ROWS.mean(),
    "CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)(t, z)": ref.cross_entropy(ref.Double, Z, 0.9 * T + 0.02).mean(),
    "class_weight": (W[Y] * ref.cross_entropy(ref.Double, Z, SMOOTH)).mean(),
    "BinaryCrossentropy(from_logits=True)(b, x)": ref.bit_cross_entropy(ref.Double, X, B).mean(),
    "BinaryFocalCrossentropy(from_logits=True)(b, x)": FOCAL.mean(),
    "label_smoothing=eps": ref.cross_entropy(ref.Double, Z, np.where(np.eye(5)[Y] == 1, 0.9, 0.1 / 4)),
}
LIBRARIES = ("PyTorch", "Keras", "optax", "Megatron")
PAGE = re.compile(r"https://github.com/xentjax/xentjax/blob/main/([\w/.-]+)#?([\w-]*)")
CODE = re.compile(r"`([^`]+)`")


def migration_rows():
    for library in LIBRARIES:
        for theirs, ours in pages.tables(DOCS / "migration.md", library, "xentjax"):
            yield library, CODE.findall(theirs)[0], CODE.findall(ours)[0]


@pytest.mark.parametrize(("library", "theirs", "ours"), list(migration_rows()))
@pytest.mark.usefixtures("standard_promotion")
def test_migration(library, theirs, ours):
    given = PADDED if "ignore_index" in theirs else GIVEN
    result = eval(ours, {**vars(xentjax), **given})
    expected = eval(theirs, {**vars(optax.losses), **given}) if library == "optax" else MEANING[theirs]
    np.testing.assert_allclose(result, expected, rtol=60 * EPS)  # float32 sums, theirs included


def test_all_migration_tables_are_read():
    assert {row[0] for row in migration_rows()} == set(LIBRARIES) and len(list(migration_rows())) == 25
    assert {row[1] for row in migration_rows() if row[0] != "optax"} == set(MEANING)


def regions(include_background=True, squared=False, over_batch=False):
    """Σ p t, Σ p and Σ t of every image and class, or of every class of the batch; with `squared`, the sums of squares."""
    z = np.asarray(REGIONS["z"], np.float64)
    p, t = np.exp(z) / np.exp(z).sum(-1, keepdims=True), np.eye(5)[np.asarray(REGIONS["y"])]
    axes, power, first = (0, 1, 2) if over_batch else (1, 2), 1 + squared, 0 if include_background else 1
    return (x.sum(axes)[..., first:] for x in (p * t, p**power, t**power))


def monai(include_background=True, squared_pred=False, jaccard=False):
    both, p, t = regions(include_background, squared_pred)
    return (1 - (2 * both + 1e-5) / ((2 * (p + t - both) if jaccard else p + t) + 1e-5)).mean()


def tversky(alpha, beta, smooth, **keywords):
    both, p, t = regions(**keywords)
    return 1 - (both + smooth) / (both + alpha * (p - both) + beta * (t - both) + smooth)


def segmentation_models(jaccard=False):
    both, p, t = regions(over_batch=True)
    score = both / np.maximum(p + t - both, 1e-7) if jaccard else 2 * both / np.maximum(p + t, 1e-7)
    return ((1 - score) * (t > 0)).mean()


REGIONS = {"z": jnp.moveaxis(GIVEN["images"], 1, -1), "y": jnp.minimum(GIVEN["pixels"], 3), "jnp": jnp}  # class 4 is absent
OF_REGIONS = {
    "DiceLoss(softmax=True, to_onehot_y=True)": monai(),
    "DiceLoss(softmax=True, to_onehot_y=True, include_background=False)": monai(include_background=False),
    "DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True)": monai(squared_pred=True),
    "DiceLoss(softmax=True, to_onehot_y=True, jaccard=True)": monai(jaccard=True),
    "TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7)": tversky(0.3, 0.7, 1e-5).mean(),
    'DiceLoss("multiclass")': segmentation_models(),
    'JaccardLoss("multiclass")': segmentation_models(jaccard=True),
    "dice_loss(z, one_hot(y))": tversky(0.5, 0.5, 1.0).mean(-1),
    "dice_loss(z, one_hot(y), ignore_background=True)": tversky(0.5, 0.5, 1.0, include_background=False).mean(-1),
}


@pytest.mark.usefixtures("standard_promotion")
def test_regions_of_other_libraries():
    rows = [
        [CODE.findall(call)[0] for call in row[1:]] for row in pages.tables(DOCS / "regions-and-boxes.md", "library", "call", "xentjax")
    ]
    assert {theirs for theirs, _ in rows} == set(OF_REGIONS)
    for theirs, ours in rows:
        np.testing.assert_allclose(eval(ours, {**vars(xentjax), **REGIONS}), OF_REGIONS[theirs], rtol=60 * EPS)


CALLS = [CODE.findall(call)[0] for _, call in pages.tables(DOCS / "choosing-a-loss.md", "task", "call")]


RANKING = "metrics.ranking("  # in test_examples_of_rankings.py


@pytest.fixture(scope="module")
def choosing():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {**vars(xentjax), **pages.names_of(DOCS / "choosing-a-loss.md")}


@pytest.mark.parametrize("call", [call for call in CALLS if RANKING not in call])
@pytest.mark.usefixtures("standard_promotion")
def test_every_call_runs(call, choosing):
    result = eval(call, choosing)
    for x in jax.tree.leaves(result):
        assert callable(x) or np.isfinite(x).all(), call
    own = CODE.findall((DOCS / "choosing-a-loss.md").read_text().split("## One class of K")[1].split("\n## ")[0])
    if call in own:
        assert result.shape == choosing["labels"].shape  # one value per example


def test_every_public_function_is_on_the_page():
    text = (DOCS / "choosing-a-loss.md").read_text()
    modules = xentjax, xentjax.metrics, xentjax.policy, xentjax.preference, xentjax.samplers
    names = [name for module in modules for name in vars(module)]
    missing = [name for name in names if not name.startswith("_") and not re.search(rf"\b{name}\b", text)]
    assert not missing, missing


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "page",
    [
        *("conventions.md", "how-it-works.md", "index.md", "regions-and-boxes.md", "when-something-is-nan.md"),
        *(pytest.param(page, marks=pytest.mark.exhaustive) for page in ("preferences-and-policies.md", "sequences.md")),
    ],
)
def test_the_examples_of_the_page_run(page):
    assert pages.names_of(DOCS / page)


@pytest.mark.usefixtures("standard_promotion")
def test_accumulated_gradients_are_those_of_the_whole_batch(rng):
    names = pages.names_of(DOCS / "migration.md")
    x, y = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32), jnp.asarray(rng.integers(0, 6, (3, 4)))
    y = y.at[0, 1:].set(-100).at[2].set(-100)  # one token, four tokens, none
    kernel = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    loss, gradient = names["accumulated"](names["loss_sum"], kernel, (x, y))
    rows, labels = np.asarray(x, np.float64)[y >= 0], np.asarray(y)[y >= 0]
    z = rows @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(loss, ref.cross_entropy(ref.Double, z, np.eye(6)[labels]).mean(), rtol=16 * EPS)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, rows.T @ (p - np.eye(6)[labels]) / len(labels), rtol=60 * EPS, atol=4 * EPS)


def test_code_of_every_page_is_executed():
    executed = {
        "choosing-a-loss.md",
        "conventions.md",
        "how-it-works.md",
        "index.md",
        "sequences.md",
        "migration.md",
        "preferences-and-policies.md",
        "regions-and-boxes.md",
        "when-something-is-nan.md",
        "metrics.md",
        "fused-linear.md",
        "devices.md",
        "language-models.md",
    }  # the last four by test_examples_of_rankings.py, test_recipes.py and test_language_models.py
    assert {page.name for page in pages.DOCS if pages.code(page)} == executed


def heading(text):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", EVERY_PAGE)
def test_every_file_and_test_that_is_named_exists(name):
    page = pages.ROOT / name
    for link in pages.links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in {heading(x) for x in re.findall(r"^#+ (.*)$", target.read_text(), re.M)}, link
    for file, test in re.findall(r"`(?:tests/)?(\w+/test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        assert f"def {test}(" in (pages.ROOT / "tests" / file).read_text() if test else (pages.ROOT / "tests" / file).exists(), (file, test)


def test_every_page_that_the_code_names_exists():
    found = {link for path in sorted((pages.ROOT / "xentjax").rglob("*.py")) for link in PAGE.findall(path.read_text())}
    assert found == {("docs/choosing-a-loss.md", ""), ("docs/conventions.md", "labels"), ("docs/when-something-is-nan.md", "")}
    for page, anchor in found:
        assert not anchor or anchor in {heading(x) for x in re.findall(r"^#+ (.*)$", (pages.ROOT / page).read_text(), re.M)}


def test_the_comparison_names_a_test_for_every_defect():
    rows = pages.tables(DOCS / "comparison.md", "defect elsewhere", "here", "test")
    assert len(rows) == 20 and all("::" in row[2] for row in rows)


def added(file):
    """The lines that the worked example of CONTRIBUTING.md adds to a file."""
    text = "\n".join(line[3:] for line in CONTRIBUTING.splitlines() if line.startswith("   "))
    (block,) = re.findall(rf"^\+\+\+ b/{file}\n(.*?)(?=^---|^```)", text, re.S | re.M)
    return "\n".join(line[1:] for line in block.splitlines() if line.startswith("+"))


def test_the_loss_that_contributing_adds_works(rng):
    added_names = {**vars(robust)}
    exec(added("xentjax/_losses/robust.py"), added_names)
    loss = added_names["asymmetric_exponential_loss"]
    formulas = {**vars(families)}
    exec(added("tests/tables/reference_families.py"), formulas)
    names = [formulas["asymmetric_exponential" + part] for part in ("", "_gradient")]
    case = cases.Case(loss.__name__, loss, *names, tolerance=2.0)
    z, labels = case.draw(rng)
    for found, expected in zip(cases.evaluate(case, z, labels), case.exact(ref.Double, z, labels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=60 * EPS, atol=EPS)
    assert 'xentjax.asymmetric_exponential_loss, "asymmetric_exponential", tolerance=2.0' in added("tests/tables/cases.py")
    assert "import asymmetric_exponential_loss as asymmetric_exponential_loss" in added("xentjax/__init__.py")
    (call,) = CODE.findall(added("docs/choosing-a-loss.md"))
    assert eval(call, {loss.__name__: loss, "logits": z, "labels": labels}).shape == labels.shape


def test_the_formula_that_contributing_shows_is_the_one_in_the_code():
    (shown,) = pages.code(pages.ROOT / "CONTRIBUTING.md")
    assert shown in (pages.ROOT / "xentjax" / "_losses" / "robust.py").read_text()


def test_the_structure_in_contributing_has_every_folder():
    picture = CONTRIBUTING.split("## Structure")[1]
    folders = {p.relative_to(pages.ROOT / "xentjax").parts[0] for p in (pages.ROOT / "xentjax").rglob("*.py")} - {"__init__.py"}
    missing = [name for name in folders if not re.search(rf"\b{name.removesuffix('.py')}\b", picture)]
    assert not missing, missing
