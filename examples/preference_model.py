"""The language model of `preference.py`: a gated recurrent network (GRU) that reads a token and predicts the next one."""

import jax
import jax.numpy as jnp
from preference_data import END, LENGTH, PROMPT, SYMBOLS

import xentjax

WIDTH = 128  # of the state
Parameters = dict[str, jax.Array]
log_probs_of_tokens = xentjax.fuse_linear(xentjax.softmax_log_prob, reduction="none")  # the same call serves 100,000 tokens


def init(key: jax.Array) -> Parameters:
    shapes = {"token": (len(SYMBOLS), 3 * WIDTH), "state": (WIDTH, 3 * WIDTH), "kernel": (WIDTH, len(SYMBOLS))}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) / WIDTH**0.5 for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def read(parameters: Parameters, state: jax.Array, token: jax.Array) -> jax.Array:
    """The state [n, width] after one more token [n]."""
    x, h = (jnp.split(part, 3, axis=-1) for part in (parameters["token"][token], state @ parameters["state"]))
    reset, keep = jax.nn.sigmoid(x[0] + h[0]), jax.nn.sigmoid(x[1] + h[1])
    return keep * state + (1 - keep) * jnp.tanh(x[2] + reset * h[2])


def states(parameters: Parameters, strings: jax.Array) -> jax.Array:
    """The states [tokens, n, width] after each token of the strings [n, tokens]."""

    def step(state, token):
        state = read(parameters, state, token)
        return state, state

    return jax.lax.scan(step, jnp.zeros((len(strings), WIDTH)), strings.T)[1]


@jax.jit
def sample(parameters: Parameters, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """Strings [n, 25] that begin with the prompts [n, 6]."""

    def step(carry, key):
        state, ended = carry
        token = jnp.where(ended, END, jax.random.categorical(key, state @ parameters["kernel"]))
        return (read(parameters, state, token), ended | (token == END)), token

    start = states(parameters, prompts)[-1], jnp.zeros(len(prompts), bool)
    answers = jax.lax.scan(step, start, jax.random.split(key, LENGTH - PROMPT))[1]
    return jnp.concatenate([prompts, answers.T], axis=-1)


@jax.jit
def log_probs(parameters: Parameters, strings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token of the answers, and which tokens count, both [n, 19]."""
    answers, before = strings[:, PROMPT:], states(parameters, strings[:, :-1])[PROMPT - 1 :]
    where = jnp.cumsum(answers == END, axis=-1) - (answers == END) == 0  # up to the first end
    return log_probs_of_tokens(before.swapaxes(0, 1), parameters["kernel"], answers, where=where), where


def of_answers(parameters: Parameters, strings: jax.Array) -> jax.Array:
    """The log-probability of each answer, [n]."""
    tokens, where = log_probs(parameters, strings)
    return xentjax.weighted_sum(tokens, where=where, axis=-1).total
