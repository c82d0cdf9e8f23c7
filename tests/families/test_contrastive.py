"""Contrastive losses: defaults of the papers, extreme arguments, memory of the compiled programs, errors."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import xentjax
from tests.families.test_contrastive_sharded import BATCH, FEATURES, mesh_of
from tests.families.test_contrastive_sharded import LOSSES as SHARDED
from tests.tables import table_contrastive as rows
from tests.tables.table_contrastive import LOSSES
from xentjax._contrastive import losses as contrastive

EPS = float(jnp.finfo(jnp.float32).eps)
SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # a smaller loss underflows to 0
each_loss = pytest.mark.parametrize("row", LOSSES, ids=str)
OF_PAIRS = contrastive.info_nce, contrastive.nt_xent, contrastive.clip_loss, contrastive.siglip_loss
of_pairs = pytest.mark.parametrize("loss", OF_PAIRS, ids=lambda f: f.__name__)
LABELS = jnp.array([0, 1, 0, 2, 2, 0, 1, 5, 0, 3, 3, 1])


def draw(rng, batch=12, features=5, dtype=None):
    """Pairs of correlated embeddings."""
    x = rng.normal(size=(batch, features))
    return jnp.asarray(x, dtype), jnp.asarray(x + rng.normal(size=x.shape), dtype)


def every_loss(**keywords):
    """Each loss as a function of two batches of embeddings and a mask. The supervised loss is applied to each batch."""

    def supervised(x, y, where=None):
        labels = jnp.resize(LABELS, len(x))
        return sum(contrastive.supervised_contrastive_loss(v, labels, where=where, **keywords) for v in (x, y))

    def named(loss):
        return lambda x, y, where=None: loss(x, y, where=where, **keywords)

    return {**{f.__name__: named(f) for f in OF_PAIRS}, "supervised": supervised}


names = pytest.mark.parametrize("name", every_loss())


def derivatives(loss, x, y):
    """The losses; the gradient and a Hessian-vector product of Σ sin(loss), so that the cotangents differ between examples."""

    def total(x, y):
        return jnp.sum(jnp.sin(loss(x, y)))

    slope = jax.grad(total, (0, 1))
    return loss(x, y), slope(x, y), jax.jvp(slope, (x, y), (y, x))[1]


def close(got, expected, tolerance):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=tolerance, atol=tolerance * (np.abs(e).max(initial=0) + 0.01))


def test_defaults_are_those_of_the_papers(rng, x64):
    x, y = draw(rng)
    labels = np.asarray(LABELS)
    close(contrastive.info_nce(x, y), rows.info_nce(x, y, 0.07), 1e-12)
    close(contrastive.nt_xent(x, y), rows.nt_xent(x, y, 0.5), 1e-12)
    close(contrastive.clip_loss(x, y), rows.clip(x, y, 1 / 0.07), 1e-12)
    close(contrastive.siglip_loss(x, y), rows.siglip(x, y, 10, -10), 1e-12)
    close(contrastive.supervised_contrastive_loss(x, labels), rows.supervised(np.asarray(x), labels, 0.1), 1e-12)


def test_without_normalization_similarities_are_products(rng, x64):
    x, y = draw(rng)
    unit_x, unit_y = (jnp.asarray(rows.unit(v)) for v in (x, y))
    for plain, cosine in zip(every_loss(normalize=False).values(), every_loss().values(), strict=True):
        close(plain(unit_x, unit_y), cosine(x, y), 1e-12)
        assert np.abs(plain(x, y) - cosine(x, y)).max() > 0.1


def test_clip_is_symmetric(rng, x64):
    x, y = draw(rng)
    close(contrastive.clip_loss(x, y), contrastive.clip_loss(y, x), 1e-14)
    both = contrastive.info_nce(x, y) + contrastive.info_nce(y, x)
    close(contrastive.clip_loss(x, y), both / 2, 1e-14)
    close(contrastive.nt_xent(x, y), contrastive.nt_xent(y, x), 1e-14)


def test_a_supervised_loss_with_one_positive_each_is_that_of_two_views(rng, x64):
    x, y = draw(rng)
    n = len(x)
    each = contrastive.supervised_contrastive_loss(jnp.concatenate([x, y]), jnp.tile(jnp.arange(n), 2), temperature=0.5)
    close((each[:n] + each[n:]) / 2, contrastive.nt_xent(x, y), 1e-13)


@pytest.mark.parametrize("loss", [contrastive.clip_loss, contrastive.siglip_loss], ids=lambda f: f.__name__)
def test_a_label_for_each_pair_is_the_loss_without_labels(loss, rng, x64):
    x, y = draw(rng)
    np.testing.assert_allclose(loss(x, y, labels=jnp.arange(12) - 5), loss(x, y), rtol=1e-12)
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: labels must have shape \(12,\).*got \(11,\)"):
        loss(x, y, labels=jnp.arange(11))
    with pytest.raises(TypeError, match=f"^{loss.__name__}: labels must have an integer dtype"):
        loss(x, y, labels=jnp.ones(12))


def test_labels_of_supervised_losses_have_any_range_and_width(rng):
    x, _ = draw(rng)
    expected = contrastive.supervised_contrastive_loss(x, LABELS)
    for dtype, shift in ((jnp.int8, -100), (jnp.uint8, 200), (jnp.int32, 2**31 - 6)):
        np.testing.assert_array_equal(
            contrastive.supervised_contrastive_loss(x, LABELS.astype(dtype) + jnp.asarray(shift, dtype)), expected
        )


@pytest.mark.exhaustive
@of_pairs
def test_a_batch_of_one_pair(loss, rng):
    x, y = draw(rng, batch=1)
    alone = float(np.sum(rows.unit(np.asarray(x)) * rows.unit(np.asarray(y))))
    expected = np.logaddexp(0, 10 - 10 * alone) if loss is contrastive.siglip_loss else 0.0
    np.testing.assert_allclose(loss(x, y), [expected], rtol=40 * EPS)  # a logit of 10 has an error of 10 eps
    slope = jax.grad(lambda x: loss(x, y).sum())(x)
    assert loss is contrastive.siglip_loss or not slope.any()


def test_one_example_without_a_positive_costs_nothing(rng):
    x, _ = draw(rng)
    value, slope = jax.value_and_grad(lambda x: contrastive.supervised_contrastive_loss(x, jnp.arange(12)).sum())(x)
    assert value == 0 and not slope.any()
    assert contrastive.supervised_contrastive_loss(x[:1], jnp.array([4])).tolist() == [0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.02])
def test_extreme_temperatures_are_exact(temperature):
    # Cosines of 0 and 1 are exact. So the loss is log1p(2·e^(−1/τ)) for a matching pair, and larger by 1/τ otherwise.
    x = jnp.eye(3)
    inverse = np.float64(1 / np.float32(temperature))
    tiny, moved = np.log1p(2 * np.exp(-inverse)), x[jnp.array([1, 0, 2])]
    rtol = (8 + min(inverse, 100)) * EPS
    wrong = [inverse + np.log1p(2 * np.exp(-inverse))] * 2 + [tiny]
    for loss in (contrastive.info_nce, lambda x, y, temperature: contrastive.clip_loss(x, y, logit_scale=1 / temperature)):
        np.testing.assert_allclose(loss(x, x, temperature=temperature), [tiny] * 3, rtol=rtol, atol=SMALLEST)
        np.testing.assert_allclose(loss(x, moved, temperature=temperature), wrong, rtol=rtol, atol=SMALLEST)
        slope = jax.grad(lambda y, loss=loss: loss(x, y, temperature=temperature).sum())(moved)
        assert np.isfinite(slope).all() and slope[:2].any()
    views = np.log1p(4 * np.exp(-inverse))
    np.testing.assert_allclose(contrastive.nt_xent(x, x, temperature=temperature), [views] * 3, rtol=rtol, atol=SMALLEST)
    twice, labels = jnp.concatenate([x, x]), jnp.tile(jnp.arange(3), 2)
    each = contrastive.supervised_contrastive_loss(twice, labels, temperature=temperature)
    np.testing.assert_allclose(each, [views] * 6, rtol=rtol, atol=SMALLEST)


def test_siglip_with_large_logits():
    x = jnp.eye(2)
    # the diagonal has logit t·s + b, all others have logit b
    np.testing.assert_allclose(
        contrastive.siglip_loss(x, x, logit_scale=100, logit_bias=-40), [np.exp(-60) + np.exp(-40)] * 2, rtol=70 * EPS
    )
    np.testing.assert_allclose(contrastive.siglip_loss(x, -x, logit_scale=1000, logit_bias=-40), [1040 + np.exp(-40)] * 2, rtol=8 * EPS)
    np.testing.assert_allclose(
        contrastive.siglip_loss(x, x, logit_scale=1, logit_bias=0), [np.log1p(np.exp(-1)) + np.log(2)] * 2, rtol=8 * EPS
    )


@pytest.mark.exhaustive
@names
def test_zero_vectors_have_cosine_and_gradient_zero(name, rng):
    loss, (x, y) = every_loss()[name], draw(rng)
    zeroed = x.at[3].set(0)
    beside = jnp.concatenate([zeroed, jnp.zeros((12, 1))], 1), jnp.concatenate([y, jnp.zeros((12, 1))], 1)
    orthogonal = beside[0].at[3, -1].set(1.0)  # cosine 0 with every other vector
    jax.config.update("jax_debug_nans", True)
    try:
        value, slope, product = derivatives(loss, zeroed, y)
    finally:
        jax.config.update("jax_debug_nans", False)
    close(value, loss(orthogonal, beside[1]), 40 * EPS)
    assert not slope[0][3].any() and not product[0][3].any()
    assert all(np.isfinite(s).all() for s in (*slope, *product))
    assert slope[1][3].any()


@pytest.mark.exhaustive
@names
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_lengths_do_not_matter(name, scale, rng):
    loss, (x, y) = every_loss()[name], draw(rng)
    value, slope, _ = derivatives(loss, x, y)
    far, far_slope, _ = derivatives(loss, x * scale, y * scale)
    np.testing.assert_array_equal(far, value)
    close(jax.tree.map(lambda s: s * scale, far_slope), slope, 40 * EPS)


@each_loss
def test_no_examples(row, rng):
    arguments = row.arguments(rng, (0,))
    assert row(*arguments).shape == (0,) and row(*arguments).dtype == jnp.float32
    assert jax.grad(row.total(arguments))(*(arguments[i] for i in row.smooth)).shape == arguments[0].shape


def test_products_of_half_precision(rng):
    x, y = draw(rng, dtype=jnp.bfloat16)

    def products(**keywords):
        text = jax.jit(lambda x, y: contrastive.info_nce(x, y, temperature=1.0, **keywords)).lower(x, y).as_text()
        return set(re.findall(r"dot_general.*?: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>", text))

    assert products(normalize=False) == {("bf16", "bf16", "f32")}
    assert products() == {("f32", "f32", "f32")}  # rounding unit vectors to bfloat16 would change a cosine by 2⁻⁸
    mixed = contrastive.info_nce(x, y.astype(jnp.float32), normalize=False, temperature=1.0)
    close(mixed, contrastive.info_nce(x, y, normalize=False, temperature=1.0), 8 * EPS)


N, D, CHUNK = 509, 8, 32
SHAPE = jax.ShapeDtypeStruct((N, D), jnp.float32)


def largest(loss, index):
    """The size of the largest array in the compiled program of the value, the gradient or the Hessian-vector product."""
    program = jax.jit(lambda x, y: derivatives(loss, x, y)[index]).lower(SHAPE, SHAPE).compile().as_text()
    shapes = re.findall(r"(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@names
@pytest.mark.parametrize("index", range(3), ids=["value", "gradient", "hvp"])
def test_no_array_of_batch_times_batch(name, index):
    # the similarities of two chunks of views may exist at the same time
    assert largest(every_loss(chunk_size=CHUNK)[name], index) <= 2 * CHUNK * 2 * N < N * N


@pytest.mark.exhaustive
def test_an_array_of_batch_times_batch_would_be_found():
    for name in every_loss():
        assert largest(every_loss()[name], 1) >= N * N


def test_large_batches_are_planned():
    x = jax.ShapeDtypeStruct((8192, 2), jnp.float32)
    program = jax.jit(contrastive.info_nce).lower(x, x).compile().as_text()
    assert "[8192,8192]" not in program and "[2048,8192]" in program


def test_half_precision_is_summed_over_devices_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(BATCH, FEATURES)), jnp.bfloat16)
    loss = functools.partial(contrastive.info_nce, normalize=False, temperature=1.0)
    mapped = jax.shard_map(functools.partial(loss, axis_name="data"), mesh=mesh_of(8), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(mapped(x, x), loss(x, x), rtol=1e-6)
    text = jax.jit(jax.grad(lambda k: mapped(x, k).sum())).lower(x).as_text()
    scattered = re.findall(r"reduce_scatter.*?-> tensor<[\dx]+x(\w+)>", text, re.DOTALL)
    assert scattered and set(scattered) == {"f32"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SHARDED)
def test_only_embeddings_are_gathered(name, rng):
    batch, features = 1024, 6
    shapes = [jax.ShapeDtypeStruct((batch, features), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((), jnp.float32)]
    rows = P("data")

    def local(x, y, value, labels):
        return SHARDED[name](x, y, value, labels, None, axis_name="data")

    mapped = jax.shard_map(local, mesh=mesh_of(8), in_specs=(rows, rows, P(), rows), out_specs=rows)
    labels = jnp.zeros(batch, jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, y, v: mapped(x, y, v, labels).sum(), (0, 1, 2)))
    program = step.lower(*shapes).compile().as_text()
    collectives = [line for line in program.splitlines() if re.search(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all)\(", line)]
    assert any("all-gather(" in line for line in collectives)
    sizes = {
        int(np.prod(list(map(int, s.split(","))))) for line in collectives for s in re.findall(r"\w\d+\[([\d,]+)\]", line.split("(")[0])
    }
    assert max(sizes) <= 2 * batch * features, sizes  # the two views of NT-Xent may be gathered together
    # no device holds the similarities of another device's examples
    held = {int(np.prod(list(map(int, s.split(","))))) for s in re.findall(r"\w\d+\[([\d,]+)\]", program)}
    assert max(held) <= 2 * batch // 8 * 2 * batch


X = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("loss", "first", "second"),
    [
        (contrastive.info_nce, "queries", "keys"),
        (contrastive.nt_xent, "first", "second"),
        (contrastive.clip_loss, "images", "texts"),
        (contrastive.siglip_loss, "images", "texts"),
    ],
)
def test_errors_of_pairs(loss, first, second):
    def raises(error, message, x=X, y=X, **keywords):
        with pytest.raises(error, match=f"^{re.escape(f'{loss.__name__}: {message}')}(\n|$)"):
            loss(x, y, **keywords)

    several = "Use jax.vmap for several batches."
    raises(TypeError, f"{first} must have a floating dtype; got int32. Use {first}.astype(jnp.float32).", X.astype(jnp.int32))
    raises(TypeError, f"{second} must have a floating dtype; got int32. Use {second}.astype(jnp.float32).", X, X.astype(jnp.int32))
    raises(ValueError, f"{first} must have shape (batch, features); got (4,). {several}", X[0])
    raises(ValueError, f"{first} must have shape (batch, features); got (1, 3, 4). {several}", X[None])
    raises(ValueError, f"{second} must have shape (3, 4), the shape of {first}; got (3, 5).", X, jnp.ones((3, 5)))
    squeeze = f"Use {second}.squeeze(0)."
    raises(ValueError, f"{second} must have shape (3, 4), the shape of {first}; got (1, 3, 4). {squeeze}", X, X[None])
    raises(ValueError, f"where must have shape (3,), one per row of {first}; got (2,).", where=jnp.ones(2, bool))
    raises(TypeError, "where must have dtype bool; got float32. Use where != 0.", where=jnp.ones(3))
    raises(ValueError, "chunk_size must be at least 1; got 0.", chunk_size=0)
    raises(TypeError, "chunk_size must be an integer, known before tracing; got float.", chunk_size=2.0)
    of = "logit_scale" if first == "images" else "temperature"
    raises(ValueError, f"{of} must be above 0; got 0.", **{of: 0.0})
    raises(ValueError, f"{of} must be a finite number at least 0; got -1.", **{of: -1.0})
    raises(ValueError, f"{of} must have shape (), a scalar; got (2,). Use jax.vmap to try several values.", **{of: jnp.ones(2)})


def test_other_errors():
    def raises(error, message, loss, *arguments, **keywords):
        with pytest.raises(error, match=f"^{re.escape(f'{loss.__name__}: {message}')}(\n|$)"):
            loss(*arguments, **keywords)

    supervised, info_nce = contrastive.supervised_contrastive_loss, contrastive.info_nce
    raises(
        ValueError, "negatives must have shape (more, 4), the features of queries; got (3, 5).", info_nce, X, X, negatives=jnp.ones((3, 5))
    )
    raises(ValueError, "negatives must have shape (more, 4), the features of queries; got (4,).", info_nce, X, X, negatives=X[0])
    integers = "labels must have an integer dtype; got float32. Use labels.astype(jnp.int32)."
    raises(TypeError, integers, supervised, X, jnp.ones(3))
    raises(
        ValueError,
        "labels must have shape (3,), one per row of embeddings; got (3, 1). Use labels.squeeze(-1).",
        supervised,
        X,
        LABELS[:3, None],
    )
    raises(TypeError, "labels must be an array or convertible to one; got str.", supervised, X, "cat")
    raises(
        ValueError, "where must have shape (3,), one per row of embeddings; got (2,).", supervised, X, LABELS[:3], where=jnp.ones(2, bool)
    )
    raises(ValueError, "temperature must be above 0; got 0.", supervised, X, LABELS[:3], temperature=0)


@pytest.mark.exhaustive
def test_value_checks_name_the_first_nan(rng):
    x, y = draw(rng)
    bad, where = x.at[2, 1].set(jnp.nan), jnp.arange(12) != 2

    def raises(message, loss, *arguments, **keywords):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            xentjax.checked(loss)(*arguments, **keywords)
        close(xentjax.checked(loss)(*arguments, **keywords, where=where), loss(*arguments, **keywords, where=where), 8 * EPS)

    raises("info_nce: keys[2, 1] = nan is NaN.", contrastive.info_nce, x, bad)
    raises("siglip_loss: images[2, 1] = nan is NaN.", contrastive.siglip_loss, bad, y)
    raises("supervised_contrastive_loss: embeddings[2, 1] = nan is NaN.", contrastive.supervised_contrastive_loss, bad, LABELS)
    with pytest.raises(ValueError, match=re.escape("info_nce: negatives[2, 1] = nan is NaN.")):
        xentjax.checked(contrastive.info_nce)(x, y, negatives=bad)
