"""The recipes of docs/fused-linear.md and docs/devices.md run as printed and equal their dense forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.project import pages

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 2e-5  # float32 sums over 40 tokens and 23 classes, relative to the largest component
V, D, B, T = 23, 6, 4, 10


@pytest.fixture(scope="module")
def recipes():
    return pages.names_of(pages.ROOT / "docs" / "fused-linear.md")


@pytest.fixture(scope="module")
def devices():
    return pages.names_of(pages.ROOT / "docs" / "devices.md")


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(7)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    where = jnp.asarray(rng.uniform(size=(B, T)) < 0.7)
    ids = jnp.asarray(np.argsort(rng.uniform(size=(B, T, V)))[..., :3], jnp.int32)
    return {
        "hidden": draw(B, T, D),
        "kernel": draw(D, V),
        "labels": jnp.where(where, labels, -100),
        "where": where,
        "ids": ids,
        "probs": jnp.asarray(rng.dirichlet(np.ones(3), (B, T)), jnp.float32),
        "teacher_hidden": draw(B, T, 4),
        "teacher_kernel": draw(4, V),
        "old": draw(B, T) - 3,
        "reference": draw(B, T) - 3,
        "advantages": draw(B, T),
    }


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader has it
        yield


def log_probs(hidden, kernel):
    return jax.nn.log_softmax(hidden @ kernel)


def at(table, index):
    return jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], -1)[..., 0]


def mean(loss, where):
    return jnp.where(where, loss, 0).sum() / where.sum()


def close(got, expected):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


def equal(fused, dense, *arguments):
    """Values, and gradients of the sum with respect to the first two arguments."""
    for got, expected in (
        (fused(*arguments), dense(*arguments)),
        (jax.grad(lambda *a: jnp.sum(fused(*a)), (0, 1))(*arguments), jax.grad(lambda *a: jnp.sum(dense(*a)), (0, 1))(*arguments)),
    ):
        close(got, expected)


def test_step(recipes, given):
    h, k, y, where = (given[n] for n in ("hidden", "kernel", "labels", "where"))
    close(recipes["step"](h, k, y), jax.value_and_grad(lambda h, k: mean(-at(log_probs(h, k), y), where), (0, 1))(h, k))


@pytest.mark.exhaustive
def test_multi_token_prediction(recipes, given):
    """Head 0 predicts the next token, head 1 the token after it; each head is averaged over its own tokens."""
    k, y, where = (given[n] for n in ("kernel", "labels", "where"))
    h = jnp.stack([given["hidden"], given["hidden"][::-1]])

    def dense(h, k):
        return (
            mean(-at(log_probs(h[0, :, :-1], k), y[:, 1:]), where[:, 1:]) + mean(-at(log_probs(h[1, :, :-2], k), y[:, 2:]), where[:, 2:])
        ) / 2

    equal(lambda h, k: recipes["multi_token_prediction"](h, k, y, where), dense, h, k)


@pytest.mark.exhaustive
def test_draft(recipes, given):
    h, k, where = (given[n] for n in ("hidden", "kernel", "where"))
    target, ids = given["teacher_hidden"] @ given["teacher_kernel"], jnp.arange(0, V, 2)
    counts = where & (target.argmax(-1) % 2 == 0)
    assert 0 < counts.sum() < where.sum()

    def dense(h, k):
        return mean(-(jax.nn.softmax(target[..., ::2]) * log_probs(h, k)).sum(-1), counts)

    equal(lambda h, k: recipes["draft"](h, k, target, ids, where), dense, h, k[:, ::2])


@pytest.mark.exhaustive
def test_token_statistics(recipes, given):
    h, k, y, where = (given[n] for n in ("hidden", "kernel", "labels", "where"))

    def dense(h, k):
        return jnp.where(where, at(log_probs(h, k), y), 0)

    equal(lambda h, k: recipes["token_statistics"](h, k, y, where).log_prob, dense, h, k)
    found = recipes["token_statistics"](h, k, y, where)
    table = log_probs(h, k)
    np.testing.assert_allclose(found.entropy, jnp.where(where, -(jnp.exp(table) * table).sum(-1), 0), rtol=TOLERANCE)
    np.testing.assert_array_equal(found.correct, where & (table.argmax(-1) == y))


@pytest.mark.exhaustive
def test_loss_with_entropy_bonus(recipes, given):
    h, k, y, where = (given[n] for n in ("hidden", "kernel", "labels", "where"))

    def dense(h, k):
        table = log_probs(h, k)
        return mean(-at(table, y) + 0.01 * (jnp.exp(table) * table).sum(-1), where)

    equal(lambda h, k: recipes["loss_with_entropy_bonus"](h, k, y, where), dense, h, k)


@pytest.mark.exhaustive
def test_distillation(recipes, given):
    def dense(h, k, th, tk):
        teacher = jax.nn.softmax(th @ tk / 2)
        return -4 * (teacher * jax.nn.log_softmax(h @ k / 2)).sum(-1).mean()

    arguments = [given[n] for n in ("hidden", "kernel", "teacher_hidden", "teacher_kernel")]
    equal(recipes["distillation"], dense, *arguments)
    slope = jax.grad(recipes["distillation"], (2, 3))(*arguments)  # the teacher's side as well, unless it is stopped
    for s, e in zip(slope, jax.grad(dense, (2, 3))(*arguments), strict=True):
        np.testing.assert_allclose(s, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


@pytest.mark.exhaustive
def test_focal(recipes, given):
    y, where = given["labels"], given["where"]

    def dense(h, k):
        log_prob = at(log_probs(h, k), y)
        return mean(-((1 - jnp.exp(log_prob)) ** 2) * log_prob, where)

    equal(lambda h, k: recipes["focal"](h, k, y, where), dense, given["hidden"], given["kernel"])


@pytest.mark.exhaustive
def test_accumulated(recipes, given):
    h, k, y, where = (given[n] for n in ("hidden", "kernel", "labels", "where"))
    y, where = jnp.maximum(y, 0), where.at[1].set(False).at[2].set(True)  # parts of very different weight, one of none
    value, slope = recipes["accumulated"](k, list(zip(h, y, where, strict=True)))
    full = jax.value_and_grad(lambda k: mean(-at(log_probs(h, k), y), where))(k)
    for s, e in zip((value, slope), full, strict=True):
        np.testing.assert_allclose(s, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


def test_every_recipe_has_a_test(recipes):
    functions = re.findall(r"^def (\w+)\(", (pages.ROOT / "docs" / "fused-linear.md").read_text(), re.M)
    assert all(f"test_{name}" in globals() for name in functions), functions


# devices.md ----------------------------------------------------------------------------------------------------------------


def mean_and_slopes(given, *, gamma=0.0, temperature=1.0):
    def mean(hidden, kernel, temperature):
        p = at(log_probs(hidden, kernel / temperature), given["labels"])
        return jnp.where(given["where"], -((1 - jnp.exp(p)) ** gamma) * p, 0).sum() / given["where"].sum()

    return jax.value_and_grad(mean, (0, 1, 2))(given["hidden"], given["kernel"], temperature)


def padded(given):
    return jnp.pad(given["kernel"], ((0, 0), (0, 1)), constant_values=3.0)


@pytest.mark.exhaustive
def test_a_head_over_devices(devices, given):
    kernel = given["kernel"][:, :20]
    labels = jnp.where(given["where"], given["labels"] % 20, -100)
    value, slopes = mean_and_slopes({**given, "kernel": kernel, "labels": labels})
    close(devices["step"](given["hidden"], kernel, labels), (value, slopes[:2]))
    total = jax.jit(devices["total"])(given["hidden"], kernel, jnp.maximum(labels, 0))
    close(total, -at(log_probs(given["hidden"], kernel), jnp.maximum(labels, 0)).sum())


def test_a_padded_head_over_devices(devices, given):
    value, (of_hidden, of_kernel) = devices["step_with_padding"](given["hidden"], padded(given), given["labels"], V)
    expected, slopes = mean_and_slopes(given)
    close((value, of_hidden, of_kernel[:, :V]), (expected, *slopes[:2]))
    assert (of_kernel[:, V] == 0).all()


def test_a_loss_of_one_s_own_over_devices(devices, given):
    kernel, labels = given["kernel"][:, :20], given["labels"] % 20
    got = jax.value_and_grad(devices["focal"], 3)(given["hidden"], kernel, labels, jnp.float32(1.5))
    every = {**given, "kernel": kernel, "labels": labels, "where": jnp.ones_like(given["where"])}
    value, slopes = mean_and_slopes(every, gamma=2.0, temperature=jnp.float32(1.5))
    close(got, (value, slopes[2]))
