"""Compiled programs of fused losses hold no logits of all examples, no unnecessary product and no copy of the kernel."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax

N, D, V, CHUNK = 509, 16, 311, 32
H, K, Y = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.int32)


def loss(reduction, chunk_size=CHUNK, classes_first=False):
    def value(h, k, y):
        more = {"reduction": reduction, "chunk_size": chunk_size, "classes_first": classes_first}
        return jnp.sum(jnp.sin(xentjax.linear_softmax_cross_entropy(h, k, y, **more)))  # so that the cotangents differ

    return value


def text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def largest(program):
    """The number of elements of the largest array anywhere in a compiled program."""
    shapes = re.findall(r"(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def derivatives(value):
    def slope(h, k, y):
        return jax.grad(value, (0, 1))(h, k, y)

    def forward(h, k, y):
        return jax.jvp(lambda h, k: value(h, k, y), (h, k), (h, k))

    def hessian_product(h, k, y):
        return jax.jvp(lambda h, k: slope(h, k, y), (h, k), (h, k))

    def hessian_product_in_reverse(h, k, y):
        return jax.grad(lambda h, k: sum(jnp.vdot(s, x) for s, x in zip(slope(h, k, y), (h, k), strict=True)), (0, 1))(h, k)

    return {"value": value, "gradient": slope, "jvp": forward, "hvp": hessian_product, "hvp in reverse": hessian_product_in_reverse}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["value", "gradient", "jvp", "hvp", "hvp in reverse"])
def test_no_array_of_examples_times_classes(reduction, name):
    # One array may hold the logits of two chunks, an eighth of all logits. Without jax.checkpoint this test was seen to fail.
    size = largest(text(derivatives(loss(reduction))[name], H, K, Y))
    assert size <= max(2 * CHUNK * V, N * D), size


def test_the_array_would_be_seen():
    def dense(h, k, y):
        return xentjax.softmax_cross_entropy(h @ k, y).mean()

    for function in derivatives(dense).values():
        assert largest(text(function, H, K, Y)) >= N * V


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["gradient", "hvp in reverse"])
def test_wide_accumulators_of_half_precision_hold_no_logits_either(name):
    h, k = jax.ShapeDtypeStruct(H.shape, jnp.bfloat16), jax.ShapeDtypeStruct(K.shape, jnp.bfloat16)
    for reduction in ("mean", "none"):
        assert largest(text(derivatives(loss(reduction))[name], h, k, Y)) <= max(2 * CHUNK * V, N * D)


def products(function, *arguments):
    """How many matrix products the compiled program of one chunk has."""
    return len(re.findall(r" dot\(", text(function, *arguments)))


@pytest.mark.parametrize(
    ("argnums", "expected"), [(None, 1), ((0,), 2), ((1,), 2), ((0, 1), 3), ((3,), 1), ((2,), 2)], ids="value H K HK weights bias".split()
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])  # for values of one chunk, XLA merges the two computations of the logits
def test_undifferentiated_inputs_cost_nothing(reduction, argnums, expected):
    run = xentjax.fuse_linear(xentjax.softmax_cross_entropy, reduction=reduction, chunk_size=N)

    def value(h, k, b, w, y):
        return run(h, k, y, bias=b, weights=w).sum()

    function = value if argnums is None else jax.value_and_grad(value, argnums)
    arguments = H, K, jax.ShapeDtypeStruct((V,), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.float32), Y
    # the gradient of a bias needs the gradient of the logits, but no product other than the logits
    assert products(function, *arguments) == (1 if argnums == (2,) else expected)


def test_the_gradient_of_hidden_takes_the_flops_of_two_products():
    def flops(function):
        analysis = jax.jit(function).lower(H, K, Y).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    run = loss("mean", chunk_size=N)
    product = 2 * N * D * V
    both, hidden, value = flops(jax.grad(run, (0, 1))), flops(jax.grad(run)), flops(run)
    np.testing.assert_allclose([both - hidden, hidden - value], product, rtol=0.5)  # the loss itself also takes different numbers of flops


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_number_of_products_of_a_gradient(reduction):
    # Values per example take 4 products in each of two sizes of chunks, but XLA keeps the logits of the first chunk instead of computing
    # them again. The mean takes 3 products, in one size: the first chunk repeats 3 of the 509 examples.
    count = products(jax.grad(loss(reduction), (0, 1)), H, K, Y)
    assert count == {"mean": 3, "none": 7}[reduction]


@pytest.mark.parametrize(("examples", "count"), [(512, 3), (502, 3), (501, 6)])  # 10 of 502 examples are 2 %, and 11 of 501 are more
def test_chunks_of_one_size_are_compiled_once(examples, count):
    h, y = jax.ShapeDtypeStruct((examples, D), jnp.float32), jax.ShapeDtypeStruct((examples,), jnp.int32)
    assert products(jax.grad(loss("mean", 32), (0, 1)), h, K, y) == count


def test_every_statistic_takes_the_products_of_one():
    def value(h, k, y):
        found = xentjax.fuse_linear(xentjax.row_statistics, reduction="none", chunk_size=CHUNK)(h, k, y)
        return sum(jnp.sum(jnp.sin(x)) for x in found[:-1])

    assert products(jax.grad(value, (0, 1)), H, K, Y) == 7


@pytest.mark.parametrize("every", [False, True])
def test_the_backward_pass_does_not_repeat_the_sums_over_classes(every):
    # The computations of a chunk are compiled twice, for the first chunk and for the loop. Each has one maximum and one sum, and a second
    # sum for every statistic. The backward pass of the loop would have them once more.
    def value(h, k, y):
        found = xentjax.fuse_linear(xentjax.row_statistics, reduction="none", chunk_size=CHUNK)(h, k, y)
        return jnp.sum(jnp.sin(found.log_prob) + (found.entropy * found.log_normalizer if every else 0))

    over_classes = re.findall(r" = f32\[\d+\]\S* reduce\([^\n]*dimensions=\{1\}", text(jax.grad(value, (0, 1)), H, K, Y))
    assert len(over_classes) == 2 * (3 if every else 2), over_classes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_take_the_input_dtype_and_accumulate_in_float32(dtype):
    h, k = jnp.zeros((N, D), dtype), jnp.zeros((D, V), dtype)
    lowered = jax.jit(jax.grad(loss("mean"), (0, 1))).lower(h, k, Y).as_text()
    short = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    found = re.findall(r"stablehlo\.dot_general.*?: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>", lowered)
    assert len(found) >= 3 and set(found) == {(short, short, "f32")}  # the three products of the only size of chunk


@pytest.mark.parametrize("classes_first", [False, True])
@pytest.mark.parametrize("derive", [lambda f: f, lambda f: jax.value_and_grad(f, (0, 1))])
def test_the_kernel_is_neither_transposed_nor_copied(classes_first, derive):
    shape = (V, D) if classes_first else (D, V)
    program = text(derive(loss("mean", classes_first=classes_first)), H, jax.ShapeDtypeStruct(shape, jnp.float32), Y)
    assert not re.findall(rf"= f32\[(?:{D},{V}|{V},{D})\]\S* transpose\(", program)
    # an accumulator may be copied into the loop, but not the argument
    assert not re.findall(rf"= f32\[{shape[0]},{shape[1]}\]\S* copy\([^)]*parameter", program)
    assert not re.findall(rf"= f32\[(?:{D},{V + 1}|\d+,{V},{D}|\d+,{D},{V})\]", program)  # nor padded, nor stacked


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_split_over_devices_is_not_gathered(kind, reduction):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data"))
        h = jax.device_put(jnp.asarray(np.random.default_rng(0).normal(size=(8, 24, D)), jnp.float32), split)
        y = jax.device_put(jnp.zeros((8, 24), jnp.int32), split)
        k = jax.device_put(jnp.ones((D, V)), NamedSharding(mesh, P()))
        step = jax.jit(jax.value_and_grad(loss(reduction, chunk_size=64), (0, 1)))
        program = step.lower(h, k, y).compile().as_text()
        value, slopes = step(h, k, y)
    assert "all-gather" not in program and "all-to-all" not in program and "collective-permute" not in program
    expected, expected_slopes = jax.value_and_grad(loss(reduction, chunk_size=64), (0, 1))(*map(np.asarray, (h, k, y)))
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for s, e in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(s, e, atol=2e-5 * np.abs(e).max())


def test_the_plan_by_hand():
    def plan(*shape, dtype=jnp.float32, **more):
        tokens, features, classes = shape[:-2], shape[-2], shape[-1]
        return xentjax.plan_linear(
            jax.ShapeDtypeStruct((*tokens, features), dtype), jax.ShapeDtypeStruct((features, classes), dtype), **more
        )

    small = plan(512, 64, 16_384)  # 32 MiB of logits
    assert (small.chunk_size, small.chunks, small.logits_bytes, small.gradient_bytes) == (512, 1, 2**25, 0)
    assert small.accumulator_bytes == 4 * (512 * 64 + 64 * 16_384)
    assert small.peak_bytes == small.logits_bytes + small.accumulator_bytes
    assert plan(513, 64, 16_384)[:2] == (171, 3)  # at least 192, as even as they come
    assert plan(2049, 64, 16_384)[:2] == (513, 4)  # a quarter, 510 first
    llama = plan(8192, 4096, 128_256, dtype=jnp.bfloat16)
    assert llama[:2] == (2048, 4) and llama.logits_bytes == 2048 * 128_256 * 4 and llama.gradient_bytes == 2048 * 128_256 * 2
    assert llama.peak_bytes < 4e9
    large = plan(2**20, 64, 2**18)
    assert large[:2] == (1536, 683) and large.logits_bytes == 1536 * 2**20  # 682 chunks of 1536 examples after one of 1024
    assert plan(8192, 2304, 256_000)[:2] == (1408, 6)  # six of at most 1366 examples, rounded up to a multiple of 128
    assert plan(8, 4096, 64, 16_384)[:2] == (8192, 4)  # 8 sequences of 1,024 tokens at a time
    assert plan(97, 4, 131, chunk_size=7)[:2] == (7, 14)
    assert plan(97, 4, 131, chunk_size=60)[:2] == (33, 3)  # never two
    assert plan(97, 4, 131, chunk_size=1000)[:2] == (97, 1)
    assert plan(0, 4, 131)[:2] == (0, 1) and plan(4, 131)[:2] == (1, 1)
    double = xentjax.plan_linear(np.zeros((8, 4)), np.zeros((131, 4)), classes_first=True)
    assert double.logits_bytes == 8 * 131 * 8 and double.gradient_bytes == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "features", "classes"), [(4096, 64, 8192), (2048, 64, 80_000)])  # a kernel of one block, and of two
def test_the_plan_bounds_the_compiled_program(tokens, features, classes, dtype):
    h, k = jax.ShapeDtypeStruct((tokens, features), dtype), jax.ShapeDtypeStruct((features, classes), dtype)
    y = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    plan = xentjax.plan_linear(h, k)
    assert plan.chunks == 4
    step = jax.value_and_grad(xentjax.linear_softmax_cross_entropy, (0, 1))
    memory = jax.jit(step).lower(h, k, y).compile().memory_analysis()
    beyond = memory.temp_size_in_bytes + memory.output_size_in_bytes
    slack = 1.3 if dtype == jnp.float32 else 2.2  # XLA on CPUs stores copies of half precision in float32
    assert beyond <= slack * plan.peak_bytes
    full = tokens * classes * 4
    assert memory.temp_size_in_bytes <= full / (2 if dtype == jnp.float32 else 1)


def test_value_and_gradient_take_a_third_of_the_peer_s_memory():
    optax = pytest.importorskip("optax")
    h, k = jax.ShapeDtypeStruct((2048, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32_000), jnp.float32)
    y = jax.ShapeDtypeStruct((2048,), jnp.int32)

    def temporary(value):
        return jax.jit(jax.value_and_grad(value, (0, 1))).lower(h, k, y).compile().memory_analysis().temp_size_in_bytes

    theirs = temporary(lambda h, k, y: optax.softmax_cross_entropy_with_integer_labels(h @ k, y).mean())
    assert temporary(xentjax.linear_softmax_cross_entropy) <= 0.35 * theirs


def test_values_per_example_have_one_accumulator_of_the_kernel():
    # The kernel takes 82 MB, and the logits of a chunk 15 MB. The gradient of the kernel is a result. The temporaries hold no second
    # gradient, only a block of 17 MB and the logits of three chunks.
    h, k = jax.ShapeDtypeStruct((384, 512), jnp.float32), jax.ShapeDtypeStruct((512, 40_000), jnp.float32)
    y = jax.ShapeDtypeStruct((384,), jnp.int32)
    memory = jax.jit(jax.grad(loss("none", 96), (0, 1))).lower(h, k, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 40_000 * 4
