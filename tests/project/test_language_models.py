"""The recipes of docs/language-models.md run as printed and equal their dense forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.project import pages

TOLERANCE = 2e-5  # float32 sums over 40 tokens and 24 classes, relative to the largest component
VOCABULARY, FEATURES, BATCH, LENGTH = 24, 6, 8, 5
pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def page():
    return pages.names_of(pages.ROOT / "docs" / "language-models.md")


@pytest.fixture(autouse=True)
def standard_promotion(quick_compilation):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader has it
        yield


@pytest.fixture
def parameters(rng):
    shapes = {"embedding": (VOCABULARY, FEATURES), "kernel": (FEATURES, VOCABULARY)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def log_probs_of(parameters, tokens):
    """[…, length + 1] → log-probabilities of all classes for each next token."""
    return jax.nn.log_softmax(jnp.tanh(parameters["embedding"][tokens[..., :-1]]) @ parameters["kernel"])


def at(table, index):
    return jnp.take_along_axis(table, index[..., None], -1)[..., 0]


def mean(loss, where):
    return jnp.where(where, loss, 0).sum() / where.sum()


def equal(loss, dense, parameters, *batch):
    """Value and gradient of a loss with respect to all parameters."""
    found, expected = (jax.jit(jax.value_and_grad(f))(parameters, *batch) for f in (loss, dense))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(y).max())


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)), jnp.int32)


@pytest.fixture
def where(rng):
    return jnp.asarray(rng.uniform(size=(BATCH, LENGTH)) < 0.7)


def test_pretraining(page, parameters, tokens):
    def dense(parameters, tokens):
        logits = jnp.tanh(parameters["embedding"][tokens[:, :-1]]) @ parameters["kernel"]
        lse = jax.nn.logsumexp(logits, -1)
        return jnp.mean(lse - at(logits, tokens[:, 1:]) + 1e-4 * lse**2)

    equal(page["pretraining"], dense, parameters, tokens)


def test_fine_tuning(page, parameters, tokens, rng):
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]] * 4)
    answers = jnp.asarray(rng.uniform(size=tokens.shape) < 0.8)
    targets = np.zeros((BATCH, LENGTH), bool)
    for row, position in np.ndindex(BATCH, LENGTH):
        same = segments[row, position] == segments[row, position + 1] != 0
        targets[row, position] = same and answers[row, position + 1]
    assert 0 < targets.sum() < targets.size

    def dense(parameters, tokens, segments, answers):
        return mean(-at(log_probs_of(parameters, tokens), tokens[:, 1:]), targets)

    equal(page["fine_tuning"], dense, parameters, tokens, segments, answers)


def test_dpo(page, parameters, tokens, where, rng):
    pairs, of_pairs = tokens.reshape(2, BATCH // 2, -1), where.reshape(2, BATCH // 2, -1)
    reference = jnp.asarray(rng.normal(size=(2, BATCH // 2)) - 9, jnp.float32)

    def dense(parameters, tokens, where, reference):
        gain = jnp.where(where, at(log_probs_of(parameters, tokens), tokens[..., 1:]), 0).sum(-1) - reference
        return jnp.mean(-jax.nn.log_sigmoid(0.1 * (gain[0] - gain[1])))

    equal(page["dpo"], dense, parameters, pairs, of_pairs, reference)


def test_grpo(page, parameters, tokens, where, rng):
    rewards = jnp.asarray(rng.normal(size=BATCH), jnp.float32)
    old, reference = (at(log_probs_of(parameters, tokens), tokens[:, 1:]) + 0.3 * rng.normal(size=(BATCH, LENGTH)) for _ in range(2))

    def dense(parameters, tokens, where, rewards, old, reference):
        table = log_probs_of(parameters, tokens)
        log_prob, entropy = at(table, tokens[:, 1:]), -(jnp.exp(table) * table).sum(-1)
        advantages = ((rewards - rewards.mean()) / rewards.std(ddof=1))[:, None]
        ratio = jnp.exp(log_prob - old)
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
        divergence = jnp.exp(reference - log_prob) - (reference - log_prob) - 1
        return mean(0.04 * divergence - gain - 0.001 * entropy, where)

    equal(page["grpo"], dense, parameters, tokens, where, rewards, jnp.float32(old), jnp.float32(reference))


def test_top_k_distillation(page, parameters, tokens, where, rng):
    teacher = jax.nn.log_softmax(jnp.asarray(2 * rng.normal(size=(BATCH, LENGTH, VOCABULARY)), jnp.float32))
    log_p, ids = jax.lax.top_k(teacher, 3)

    def dense(parameters, tokens, where, ids, log_p):
        q = jnp.take_along_axis(jnp.exp(log_probs_of(parameters, tokens)), ids, -1)
        p = jnp.exp(log_p)
        tail_p, tail_q = 1 - p.sum(-1), 1 - q.sum(-1)
        return mean((p * jnp.log(p / q)).sum(-1) + tail_p * jnp.log(tail_p / tail_q), where)

    equal(page["top_k_distillation"], dense, parameters, tokens, where, ids, log_p)


def test_mixture_of_experts(page, parameters, tokens, where, rng):
    layers, experts = 2, 4
    parameters["routers"] = jnp.asarray(rng.normal(size=(layers, FEATURES, experts)), jnp.float32)

    def dense(parameters, tokens, where):
        x, counts = jnp.tanh(parameters["embedding"][tokens[:, :-1]]).reshape(-1, FEATURES), where.reshape(-1)
        penalty = 0.0
        for router in parameters["routers"]:
            z = x @ router
            p, best = jax.nn.softmax(z), jnp.argsort(-z, -1)[:, :2]
            share = jnp.where(counts[:, None], jax.nn.one_hot(best, experts).sum(1), 0).sum(0) / (2 * counts.sum())
            balance = experts * jnp.sum(share * jnp.where(counts[:, None], p, 0).sum(0) / counts.sum())
            penalty += (0.01 * balance + 1e-3 * mean(jax.nn.logsumexp(z, -1) ** 2, counts)) / layers
        return mean(-at(log_probs_of(parameters, tokens), tokens[:, 1:]), where) + penalty

    equal(page["mixture_of_experts"], dense, parameters, tokens, where)


def test_every_recipe_has_a_test_and_at_most_25_lines():
    text = (pages.ROOT / "docs" / "language-models.md").read_text()
    recipes = re.findall(r"^def (\w+)\(parameters, .*", text, re.M)
    assert {f"test_{name}" for name in recipes} - set(globals()) == {"test_features", "test_answer_log_probs"}
    _, *blocks = re.findall(r"```python\n(.*?)```", text, re.S)  # the first one is shared
    assert max(block.count("\n") for block in blocks) <= 25


def test_a_step_lowers_the_loss(page, parameters, tokens):
    step, state = page["train_step"](page["pretraining"]), page["optimizer"].init(parameters)
    values = []
    for _ in range(3):
        parameters, state, value = step(parameters, state, tokens)
        values.append(float(value))
    assert values[0] > values[1] > values[2]
