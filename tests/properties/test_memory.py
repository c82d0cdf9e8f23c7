"""What the compiled program keeps: no float32 copy of half-precision logits, no one-hot labels, no more than the peer."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import xentjax
from xentjax._core import blocks

ROWS, CLASSES = 512, 2048


def compiled(function, dtype, labels=None):
    z = jax.ShapeDtypeStruct((ROWS, CLASSES), dtype)
    y = jax.ShapeDtypeStruct((ROWS,), jnp.int32) if labels is None else labels
    return jax.jit(function).lower(z, y).compile()


def buffers(program, dtype):
    """How often an array of the size of the logits in `dtype` stands outside the fused loops, where it takes memory."""
    entry = program.as_text().split("ENTRY")[1]
    return len(re.findall(rf"= {dtype}\[{ROWS},{CLASSES}\]\S* (?!parameter|bitcast)", entry))


def mean(loss):
    return lambda z, y: loss(z, y).mean()


LOSSES = [
    xentjax.softmax_cross_entropy,
    xentjax.softmax_log_prob,
    xentjax.softmax_focal_loss,
    lambda z, y: xentjax.softmax_cross_entropy(z, y, z_loss=0.1),
    lambda z, y: xentjax.softmax_cross_entropy(z, y, label_smoothing=0.1),
    lambda z, y: xentjax.softmax_cross_entropy(z, y, where=y >= 0),
]
PER_CLASS = jnp.arange(1.0, CLASSES + 1)
ADJUSTED = [  # losses of logits that are first shifted or scaled
    functools.partial(xentjax.logit_adjusted_cross_entropy, class_log_prior=-PER_CLASS),
    functools.partial(xentjax.ldam_loss, class_counts=PER_CLASS),
    functools.partial(xentjax.seesaw_loss, class_counts=PER_CLASS),
    xentjax.margin_cross_entropy,
    lambda z, y: xentjax.ldam_loss(z, y, class_counts=PER_CLASS, where=y >= 0, class_mask=PER_CLASS > 2),
]


@pytest.mark.parametrize("loss", LOSSES + ADJUSTED)
@pytest.mark.parametrize("derive", [jax.value_and_grad, lambda f: f])
def test_no_wide_copy_of_bfloat16_logits(loss, derive):
    program = compiled(derive(mean(loss)), jnp.bfloat16)
    assert buffers(program, "f32") == 0
    # beside the gradient nothing larger than a masked copy in the logits' own dtype
    assert program.memory_analysis().temp_size_in_bytes <= ROWS * CLASSES * 2 + 64 * ROWS


def test_the_wide_copy_would_be_seen():
    assert buffers(compiled(lambda z, y: z.astype(jnp.float32) * 2, jnp.bfloat16), "f32") == 1
    assert buffers(compiled(lambda z, y: jnp.sin(z) / jnp.cos(z).sum(1, keepdims=True), jnp.float32), "f32") >= 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_more_than_optax(loss, dtype):
    ours = compiled(jax.value_and_grad(mean(loss)), dtype).memory_analysis().temp_size_in_bytes
    theirs = compiled(jax.value_and_grad(mean(optax.softmax_cross_entropy_with_integer_labels)), dtype).memory_analysis().temp_size_in_bytes
    assert ours <= theirs + 64 * ROWS  # a few more numbers per row


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loss", LOSSES[:-1])  # with a mask, masked logits are replaced in a copy
def test_a_value_alone_stores_a_few_numbers_per_row(loss, dtype):
    assert compiled(mean(loss), dtype).memory_analysis().temp_size_in_bytes <= 64 * ROWS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_residuals_between_passes_are_no_wider_than_the_logits(dtype):
    # Outside jit the forward pass is a program of its own, and what it hands to the backward pass is stored.
    z = jnp.zeros((ROWS, CLASSES), dtype)
    y = jnp.zeros(ROWS, jnp.int32)
    _, pull = jax.vjp(lambda z: xentjax.softmax_cross_entropy(z, y), z)
    widest = max(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert widest <= z.nbytes


def test_top_k_labels_are_never_dense():
    ids = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32)

    def loss(z, ids):
        return xentjax.softmax_cross_entropy_with_top_k_labels(z, ids, jnp.full(ids.shape, 0.25)).mean()

    text = compiled(loss, jnp.float32, ids).as_text()
    assert f"[{ROWS},4,{CLASSES}]" not in text


def test_indices_are_never_one_hot():
    text = compiled(jax.value_and_grad(mean(xentjax.softmax_cross_entropy)), jnp.float32).as_text()
    entry = text.split("ENTRY")[1]
    assert not re.search(rf"= (pred|s32)\[{ROWS},{CLASSES}\]", entry)


IN_BLOCKS = {kind: functools.partial(xentjax.distillation_loss, divergence=kind) for kind in ("forward", "reverse", "js", "tv")}
IN_BLOCKS["tempered"] = functools.partial(xentjax.bi_tempered_cross_entropy, t1=0.3, t2=1.3)
SHORT = ("js", "tempered")  # in the short run; the other divergences run the same code as js


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.exhaustive) for n in IN_BLOCKS])
def test_blocks_store_no_logits(name):
    """An array of the logits has 8 MB here. The gradient of the loss is made in the memory of the result."""
    z = jax.ShapeDtypeStruct((2000, 1000), jnp.float32)
    run = jax.value_and_grad(lambda x, y: IN_BLOCKS[name](x, y).mean(), (0, 1))
    assert jax.jit(run).lower(z, z).compile().memory_analysis().temp_size_in_bytes < 16 * blocks._BYTES  # some arrays of a block


@pytest.mark.parametrize("loss", ["forward", "top_k"])
def test_blocks_copy_no_half_precision_logits(loss):
    """Only the value is computed. The logits take 4 MB here, and a copy of their bits would take 4 MB more."""
    z = jax.ShapeDtypeStruct((2000, 1000), jnp.bfloat16)
    ids = jnp.zeros((2000, 1), jnp.int32)
    run = IN_BLOCKS[loss] if loss in IN_BLOCKS else lambda x, y: xentjax.top_k_distillation_loss(x, ids, y[:, :1])
    assert jax.jit(run).lower(z, z).compile().memory_analysis().temp_size_in_bytes < 4 * blocks._BYTES


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("hard", [False, True])
def test_labels_of_half_precision_logits_store_one_gradient(hard, dtype):
    loss = functools.partial(xentjax.bootstrapped_cross_entropy, hard=True) if hard else xentjax.softmax_cross_entropy
    z = jax.ShapeDtypeStruct((4000, 1000), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct(z.shape[:1] if dtype == jnp.int32 else z.shape, dtype)
    value, both = (jax.jit(f).lower(z, labels).compile() for f in (mean(loss), jax.value_and_grad(mean(loss))))
    assert value.memory_analysis().temp_size_in_bytes < 6 * blocks._BYTES  # some float32 arrays of a block
    assert both.memory_analysis().temp_size_in_bytes < 2 * z.size + 6 * blocks._BYTES
