"""What the README says runs: its code, its commands' files, and every row of its migration tables."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xentjax
from tests.tables import reference as ref

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
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
}
PADDED = GIVEN | {"y": GIVEN["y"].at[2].set(-100)}
Z, Y, T, W, X, B, V = (np.asarray(GIVEN[k], np.float64 if k != "y" else np.int64) for k in "zytwxbv")
ROWS = ref.cross_entropy(ref.Double, Z, np.eye(5)[Y])
SMOOTH = ref.targets(ref.Double, Y, 5, 0.1)
FOCAL = ref.bit_focal(ref.Double, X, B)
IMAGES = np.moveaxis(np.asarray(GIVEN["images"], np.float64), 1, -1)

# What each call of another library computes, from its documentation.
MEANING = {
    "F.cross_entropy(z, y)": ROWS.mean(),
    "F.cross_entropy(z, y, ignore_index=-100)": np.delete(ROWS, 2).mean(),
    "F.cross_entropy(z, y, weight=w)": (W[Y] * ROWS).sum() / W[Y].sum(),
    "F.cross_entropy(z, y, weight=w, label_smoothing=0.1)": ref.cross_entropy(ref.Double, Z, W * SMOOTH).sum() / W[Y].sum(),
    "F.cross_entropy(z, t)": ref.cross_entropy(ref.Double, Z, T).mean(),
    "F.cross_entropy(images, pixels)": ref.cross_entropy(ref.Double, IMAGES, np.eye(5)[np.asarray(GIVEN["pixels"])]).mean(),
    "F.binary_cross_entropy_with_logits(x, b, pos_weight=v)": ref.bit_cross_entropy(ref.Double, X, B, V).mean(),
    "torchvision.ops.sigmoid_focal_loss(x, b)": ref.bit_focal(ref.Double, X, B, 2.0, 0.25),
    "SparseCategoricalCrossentropy(from_logits=True)(y, z)": ROWS.mean(),
    "CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)(t, z)": ref.cross_entropy(ref.Double, Z, 0.9 * T + 0.02).mean(),
    "class_weight": (W[Y] * ref.cross_entropy(ref.Double, Z, SMOOTH)).mean(),
    "BinaryCrossentropy(from_logits=True)(b, x)": ref.bit_cross_entropy(ref.Double, X, B).mean(),
    "BinaryFocalCrossentropy(from_logits=True)(b, x)": FOCAL.mean(),
}


@pytest.fixture
def lenient():
    """JAX as a reader has it, and as optax needs it."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def migration_rows():
    for table in re.findall(r"^\| (PyTorch|Keras|optax) \| xentjax \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT, re.M):
        for line in table[1].splitlines():
            theirs, ours = re.findall(r"`([^`]+)`", line)[:1] + re.findall(r"`([^`]+)` \|$", line)
            yield table[0], theirs, ours


@pytest.mark.parametrize(("library", "theirs", "ours"), list(migration_rows()))
def test_migration(library, theirs, ours, lenient):
    given = PADDED if "ignore_index" in theirs else GIVEN
    result = eval(ours, {**vars(xentjax), **given})
    expected = eval(theirs, {**vars(optax.losses), **given}) if library == "optax" else MEANING[theirs]
    np.testing.assert_allclose(result, expected, rtol=60 * EPS)  # float32 sums, theirs included


def test_all_tables_are_read():
    assert {row[0] for row in migration_rows()} == {"PyTorch", "Keras", "optax"}
    assert len(list(migration_rows())) == 18
    assert {row[1] for row in migration_rows() if row[0] != "optax"} == set(MEANING)


def test_megatron_smoothing():
    K, eps = 5, 0.1
    t = np.where(np.eye(K)[Y] == 1, 1 - eps, eps / (K - 1))
    ours = xentjax.softmax_cross_entropy(GIVEN["z"], GIVEN["y"], label_smoothing=eps * K / (K - 1))
    np.testing.assert_allclose(ours, ref.cross_entropy(ref.Double, Z, t), rtol=60 * EPS)


def test_the_code_runs(lenient):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {}
    exec(code, names)
    assert names["value"] < np.log(3) and names["gradients"].shape == (3, 3)


def test_commands_are_one_line_each_and_ci_runs_the_second():
    commands = re.findall(r"```sh\n(.*?)\n```", TEXT, re.S)
    assert commands == ['pip install -e ".[examples]" && python examples/digits_cnn.py', 'pip install -e ".[test]" && python -m pytest']
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_every_file_and_test_that_is_named_exists():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT):
        assert f"def {test}" in (ROOT / "tests" / file).read_text() if test else (ROOT / "tests" / file).exists(), (file, test)


def test_every_public_function_is_in_the_table():
    for name in vars(xentjax):
        assert name.startswith("_") or name == "RowStatistics" or f"`{name}`" in TEXT, name
