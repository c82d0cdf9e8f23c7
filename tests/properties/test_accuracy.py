"""Relative accuracy against 60 digits, in eps of float32: the promise of a right answer at any margin.

Bounds (CONTRACT 5): with margin = how far the label's logit leads the others (0 if it does not), a loss is within (8 + margin) eps, 8
more above 10,000 classes; a component of the gradient within (8 + margin + |z_k − lse|) eps; focal losses within three times that. For
labels that are distributions a component is judged by the larger of (s − t_k)·p_k and t_k·(1 − p_k). What lies below the smallest normal
number has no relative accuracy to keep: XLA flushes it to zero, in a sum of exponentials term by term, hence the absolute floor of
classes × tiny.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax
from tests.tables import cases
from tests.tables import reference as ref

EPS = 2.0**-23
TINY = float(np.finfo(np.float32).tiny)
MARGINS = (1e-3, 0.1, 1.0, 5.0, 10.0, 17.0, 20.0, 35.0, 50.0, 65.0, 80.0, 86.0, 90.0)


def margins(z, y):
    """How far the label's logit leads the others, 0 if it does not."""
    others = np.where(np.arange(z.shape[-1]) == np.asarray(y)[..., None], -np.inf, np.asarray(z, np.float64))
    lead = np.take_along_axis(np.asarray(z, np.float64), np.asarray(y)[..., None], -1)[..., 0] - others.max(-1)
    return np.maximum(lead, 0)


def ladder(rng, classes):
    """Rows at every margin, won and lost, with the other classes equal, spread, or two competing."""
    rows, labels = [], []
    for margin in MARGINS:
        for others in (np.zeros(classes), rng.normal(size=classes) * 3, rng.normal(size=classes) * 30):
            for sign in (1, -1):
                z = others - others.max()
                y = int(rng.integers(classes))
                z[y] = -np.inf
                z -= z.max() if classes > 1 else 0
                z[y] = sign * margin
                rows.append(z + rng.choice([0.0, 3.7, -12.25]))
                labels.append(y)
    return jnp.asarray(np.float32(rows)), jnp.asarray(np.int32(labels))


def errors(result, exact, floor):
    """|result − exact|/|exact| in eps, after the floor below which float32 has no relative accuracy."""
    gap = np.array([[abs(float(e - float(r))) for r, e in zip(rs, es, strict=True)] for rs, es in zip(result, exact, strict=True)])
    size = np.array([[abs(float(e)) for e in es] for es in exact])
    return np.maximum(gap - floor, 0) / np.maximum(size, TINY) / EPS


def log_sum_exp(z):
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    return top + np.log(np.exp(z - top).sum(-1, keepdims=True))


LADDERS = [
    pytest.param(c, n, id=f"{c}-{n}")
    for c in cases.CLASSES
    for n in (1, 2, 3, 10, 100, 2000)
    if not c.target and c.formula.get("z_loss") is None and c.exact_at_margins and (c not in cases.FAMILIES or n in (2, 100))
]


@pytest.mark.parametrize(("case", "classes"), LADDERS)
def test_every_margin(case, classes, rng):
    z, y = ladder(rng, classes)
    if classes == 2000:
        z, y = z[::5], y[::5]  # 60 digits take their time
    value, slope = case.exact(ref.Exact, z, y)
    margin = margins(z, y)[:, None] if classes > 1 else np.zeros((len(y), 1))
    floor = classes * TINY
    result, derivative = cases.evaluate(case, z, y)
    error = errors(np.asarray(result)[:, None], value[:, None], floor)
    assert (error <= case.tolerance * (8 + margin)).all(), (error - case.tolerance * (8 + margin)).max()
    error = errors(np.asarray(derivative), slope, floor)
    surprise = np.abs(np.asarray(z, np.float64) - log_sum_exp(z))
    bound = case.tolerance * (8 + margin + surprise)
    if case in cases.FAMILIES:  # a factor such as p_y^q, whose exponent has the rounding of log p_y
        bound = bound + case.tolerance * np.take_along_axis(surprise, np.asarray(y)[:, None], -1)
    assert (error <= bound).all(), (error - bound).max()


def test_many_rows(rng, classes=10):
    # More than 512 rows, for which the same loss is computed by another formula.
    case, (z, y) = cases.CLASSES[0], ladder(rng, classes)
    value, slope = case.exact(ref.Exact, z, y)
    copies = 1 + 512 // len(y)
    many_z, many_y = jnp.tile(z, (copies, 1)), jnp.tile(y, copies)

    @jax.jit
    def results(z):
        loss, pull_back = jax.vjp(lambda z: xentjax.softmax_cross_entropy(z, many_y), z)
        return loss, pull_back(jnp.ones_like(loss))[0], xentjax.row_statistics(z, many_y).log_normalizer

    loss, derivative, lse = (np.asarray(x)[-len(y) :] for x in results(many_z))
    margin, floor = margins(z, y)[:, None], classes * TINY
    assert (errors(loss[:, None], value[:, None], floor) <= 8 + margin).all()
    assert (errors(derivative, slope, floor) <= 8 + margin + np.abs(np.asarray(z, np.float64) - log_sum_exp(z))).all()
    np.testing.assert_allclose(lse, log_sum_exp(z)[:, 0], rtol=8 * EPS, atol=8 * EPS * 30)


@pytest.mark.exhaustive
@pytest.mark.parametrize("keywords", [{"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 1e-4}])
@pytest.mark.parametrize("classes", [2, 10, 300])
def test_smoothing_and_z_loss(keywords, classes, rng):
    # With these the loss is no longer tiny where the margin is large: its largest term sets the scale, and for z-loss the size of lse.
    z, y = ladder(rng, classes)
    smoothing = {k: v for k, v in keywords.items() if k == "label_smoothing"}
    formula = {k: v for k, v in keywords.items() if k == "z_loss"}
    t = ref.targets(ref.Exact, y, classes, **smoothing)
    value = ref.cross_entropy(ref.Exact, ref.Exact.array(z), t, **formula)
    slope = ref.cross_entropy_gradient(ref.Exact, ref.Exact.array(z), t, **formula)
    loss = functools.partial(xentjax.softmax_cross_entropy, **keywords)
    lse = np.abs(log_sum_exp(z))
    wide = np.abs(np.asarray(z, np.float64)).max(-1) if formula else 0  # lse² is relative to the logits that make lse
    error = np.abs(np.asarray(loss(z, y), np.float64) - value.astype(float)) / EPS
    assert (error <= (8 + margins(z, y)) * value.astype(float) + 0.04 * (1 + wide) ** 2 * bool(formula) + 1e-30).all()
    error = np.abs(np.asarray(jax.grad(lambda z: loss(z, y).sum())(z), np.float64) - slope.astype(float)) / EPS
    size = np.maximum(ref.softmax(ref.Double, np.asarray(z, np.float64)), t.astype(float))
    size = size * (1 + 0.02 * (lse + np.abs(np.asarray(z, np.float64)).max(-1, keepdims=True)) * bool(formula))
    assert (error <= (8 + margins(z, y)[:, None] + np.abs(np.asarray(z) - log_sum_exp(z))) * size + 4 * TINY / EPS).all()


SOFT = ("spread", "one-hot", "nearly one-hot")


def soft_labels(rng, y, classes, kind):
    """Distributions over classes: spread at random, all on y, or all but a little of every size from 1e-4 to 1e-12 on y."""
    spread, one_hot = rng.dirichlet(np.ones(classes) * 0.3, len(y)), np.eye(classes)[np.asarray(y)]
    share = {"spread": np.ones(len(y)), "one-hot": np.zeros(len(y)), "nearly one-hot": 10.0 ** -rng.uniform(4, 12, len(y))}[kind][:, None]
    return jnp.asarray(share * spread + (1 - share) * one_hot, jnp.float32)


def as_labels(case, distributions):
    """Distributions as a case takes them; the top-k form gets all classes, in an order of its own."""
    if case.family != "top_k":
        return distributions
    ids = np.argsort(-np.asarray(distributions), -1)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(np.take_along_axis(np.asarray(distributions), ids, -1))


@pytest.mark.parametrize("case", [c for c in cases.CLASSES + cases.TOP_K if c.exact_at_margins], ids=str)
@pytest.mark.parametrize("kind", SOFT)
def test_distributions(case, kind, rng, classes=7):
    z, y = ladder(rng, classes)
    labels = as_labels(case, soft_labels(rng, y, classes, kind))
    value, slope = case.exact(ref.Exact, z, labels)
    t, p = case.targets(ref.Exact, labels, classes), ref.softmax(ref.Exact, ref.Exact.array(z))
    lse = log_sum_exp(z)
    penalty = 0.04 * (1 + np.abs(np.asarray(z)).max(-1)) ** 2 * ("z_loss" in case.formula)
    result, derivative = cases.evaluate(case, z, labels)
    error = np.abs(np.asarray(result, np.float64) - value.astype(float)) / EPS
    lead = np.maximum(np.sort(np.asarray(z, np.float64))[:, -1] - np.sort(np.asarray(z, np.float64))[:, -2], 0)
    assert (error <= case.tolerance * (8 + lead) * np.abs(value.astype(float)) + penalty + 10 * classes * TINY / EPS).all()
    # A component is p_k·Σ_{j≠k} w_j t_j − w_k t_k·(1 − p_k), judged by the larger of its two terms. For focal losses the factor w_j is
    # (1 − p_j)^γ·(1 + γ·p_j·(−log p_j)/(1 − p_j)), at most 1 − log p_j; for the others it is about 1. The z-loss adds 2ζ·lse·s·p_k.
    surprise = np.abs(np.asarray(z, np.float64) - lse)
    w = t * (1 + surprise if "focal" in case.name else 1)
    size = np.maximum((w.sum(-1, keepdims=True) - w) * p, w * (1 - p)).astype(float)
    size += 0.02 * np.abs(lse) * (t.sum(-1, keepdims=True) * p).astype(float) * ("z_loss" in case.formula)
    error = np.abs(np.asarray(derivative, np.float64) - slope.astype(float)) / EPS
    bound = case.tolerance * (8 + lead[:, None] + surprise) * size + 10 * classes * TINY / EPS
    assert (error <= bound).all(), (error / bound).max()


# Subtracting more, an entropy or smoothing, may cancel by right.
ONE_TERM = [
    c
    for c in cases.CLASSES
    if c.inputs == "logits" and c.name != "confidence_penalized_cross_entropy" and "label_smoothing" not in c.target
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ONE_TERM, ids=str)
def test_one_hot_rows_have_the_gradient_of_their_index(case, rng, classes=7):
    z, y = ladder(rng, classes)
    index, one_hot = cases.evaluate(case, z, y), cases.evaluate(case, z, jnp.asarray(np.eye(classes)[np.asarray(y)], jnp.float32))
    surprise = np.abs(np.asarray(z, np.float64) - log_sum_exp(z))
    for of_index, of_row, more in zip(index, one_hot, (0, surprise), strict=True):
        of_index, of_row = (np.asarray(x, np.float64).reshape(len(y), -1) for x in (of_index, of_row))
        size = np.abs(of_index)
        if not case.exact_at_margins:  # a component may be a difference of two sums over classes, which the two programs add differently
            size = size.max(-1, keepdims=True)
        bound = 2 * case.tolerance * (8 + margins(z, y)[:, None] + more) * size + 10 * classes * TINY / EPS
        assert (np.abs(of_row - of_index) / EPS <= bound).all()


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("kind", ["index", *SOFT])
def test_logits_that_the_same_program_makes(classes, kind, rng):
    # XLA makes logits that are a product anew in every loop that reads them, and rounds a product and a difference once instead of twice:
    # the largest logit less the maximum is then not 0.
    z, y = ladder(rng, classes)
    factor = jnp.float32(1.1)
    labels = y if kind == "index" else soft_labels(rng, y, classes, kind)
    dense = soft_labels(rng, y, classes, "one-hot") if kind == "index" else labels
    found = jax.jit(lambda z: (xentjax.softmax_cross_entropy(z * factor, labels), xentjax.row_statistics(z * factor, labels)))(z)
    slope = jax.jit(jax.grad(lambda z: xentjax.softmax_cross_entropy(z * factor, labels).sum()))(z)
    made = np.asarray(z * factor)
    t = ref.targets(ref.Exact, labels, classes)
    value, exact = ref.cross_entropy(ref.Exact, ref.Exact.array(made), t), ref.cross_entropy_gradient(ref.Exact, ref.Exact.array(made), t)
    # A logit may be taken before or after its rounding, half an ulp of it: that much of each probability.
    error = 1 + np.abs(made).max(-1)
    lead = np.max(np.abs(made - made.max(-1, keepdims=True)), -1)
    bound = (8 + lead + 2 * error) * EPS * np.abs(value.astype(float)) + 10 * classes * TINY
    every = jax.jit(
        lambda z: xentjax.softmax_cross_entropy_with_top_k_labels(z * factor, jnp.tile(jnp.arange(classes), (len(y), 1)), dense)
    )(z)
    for result in (found[0], -np.asarray(found[1].log_prob), every):
        assert (np.abs(np.asarray(result, np.float64) - value.astype(float)) <= bound).all()
    p = ref.softmax(ref.Exact, ref.Exact.array(made))
    s = t.sum(-1, keepdims=True)
    size = 1.1 * np.maximum((s - t) * p, t * (1 - p)).astype(float)
    bound = (10 + lead + 2 * error)[:, None] * EPS * size * 2 + 10 * classes * TINY
    assert (np.abs(np.asarray(slope, np.float64) - 1.1 * exact.astype(float)) <= bound + EPS * np.abs(exact.astype(float))).all()
    np.testing.assert_allclose(found[1].log_normalizer, log_sum_exp(made)[:, 0], rtol=8 * EPS, atol=8 * EPS * error.max())


@pytest.mark.parametrize("case", [c for c in cases.BITS if np.ndim(c.formula.get("pos_weight", 0)) == 0], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_bits(case, label):
    z = np.float32(np.concatenate([[m, -m] for m in (*MARGINS, 1e-30, 0.0)]))
    labels = np.full(z.shape, label, np.int32)
    value, slope = case.exact(ref.Exact, z, labels)
    bound = case.tolerance * (8 + np.abs(z)[:, None])
    # σ(−z) below TINY is flushed before the asymmetric loss multiplies it by up to 1/clip + γ·log(1/clip) = 32
    assert (errors(np.asarray(case(z, labels))[:, None], value[:, None], TINY) <= bound).all()
    assert (errors(np.asarray(cases.gradient(case, jnp.asarray(z), labels))[:, None], slope[:, None], 32 * TINY) <= bound).all()


def cross_entropy_from_others(z, t):
    """Loss and gradient in double precision without the cancellation of lse − z_y: from the sum over the other classes."""
    z_y = z[t][:, None]
    rest = np.where(t, 0, np.exp(z - z_y)).sum(-1, keepdims=True)
    return np.log1p(rest)[:, 0], np.where(t, -rest / (1 + rest), np.exp(z - z_y) / (1 + rest))


@pytest.mark.parametrize("classes", [20_000, 128_000])
def test_many_classes(classes, rng):
    # Double precision is exact enough here: its own error is 1e-9 of the bound.
    z = jnp.asarray(np.concatenate([rng.normal(size=(6, classes)) * s for s in (0, 1, 5)]), jnp.float32)
    y = jnp.asarray(rng.integers(0, classes, len(z)), jnp.int32).at[::2].set(jnp.argmax(z[::2], -1).astype(jnp.int32))
    z = z.at[::3, 0].add(25.0)
    t = np.arange(classes) == np.asarray(y)[:, None]
    value, slope = cross_entropy_from_others(np.asarray(z, np.float64), t)
    error = np.abs(np.asarray(xentjax.softmax_cross_entropy(z, y)) / value - 1) / EPS
    assert (error <= 16 + margins(z, y)).all()
    log_p = np.asarray(z, np.float64) - log_sum_exp(z)
    error = np.abs(np.asarray(cases.gradient(cases.CLASSES[0], z, y), np.float64) - slope) / EPS
    assert (error <= (16 + margins(z, y)[:, None] + np.abs(log_p)) * np.abs(slope) + TINY).all()


HALF = [pytest.param(c, d, id=f"{c}-{d.__name__}") for c in cases.CATEGORICAL + cases.BITS for d in (jnp.bfloat16, jnp.float16)]


@pytest.mark.parametrize(("case", "dtype"), [row for row in HALF if row.values[0] not in cases.FAMILIES or row.values[1] == jnp.bfloat16])
def test_half_precision_is_no_worse_than_the_naive_formula(case, dtype, rng):
    # Arithmetic in float32 on half-precision logits: the value is that of float32, not only as good as a formula in half precision.
    z, labels = case.draw(rng, (200,), dtype=dtype, scale=4.0)
    value, slope = case.exact(ref.Double, z, labels)
    result, derivative = cases.evaluate(case, z, labels)
    np.testing.assert_allclose(result, value, rtol=60 * case.tolerance * EPS, atol=60 * case.tolerance * EPS)
    assert derivative.dtype == dtype
    # one rounding to the dtype of the input, half an eps, beside the rounding of float32
    half = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(derivative, np.float64), slope, rtol=0.51 * half, atol=60 * case.tolerance * EPS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_confident_losses(dtype, rng):
    z, y = ladder(rng, 10)
    z = z.astype(dtype)
    value, _ = cases.CLASSES[0].exact(ref.Exact, z, y)
    error = errors(np.asarray(xentjax.softmax_cross_entropy(z, y))[:, None], value[:, None], 10 * TINY)
    assert (error <= 8 + margins(z.astype(jnp.float32), y)[:, None]).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [c for c in cases.CLASSES + cases.TOP_K if "z_loss" not in c.formula and c.inputs == "logits"], ids=str)
@pytest.mark.parametrize("shift", [1e4, -1e4, 2.0**26, -(2.0**26), 1e8])
def test_shift_invariance(case, shift, rng):
    # Logits that are multiples of 8 are exact after the shift, so nothing may change. (z-loss penalises the shift: not here.)
    z, labels = case.draw(rng, (20,))
    z = jnp.round(z) * 8
    for shifted, plain in zip(cases.evaluate(case, z + shift, labels), cases.evaluate(case, z, labels), strict=True):
        np.testing.assert_array_equal(shifted, plain)


SHIFTED = [c for c in cases.CLASSES + cases.STATISTICS if "z_loss" not in c.formula and c.inputs == "logits"]


@pytest.mark.exhaustive  # `test_equal_logits_near_the_largest_number` is in the short run
@pytest.mark.parametrize("case", SHIFTED, ids=str)
def test_logits_near_the_largest_number(case, rng):
    """Rows of equal logits, some of them −∞. Only log-normalizers and expected logits change with a shift: by the shift."""
    kind = case.kinds[0]
    _, labels = case.draw(rng, (3,), kind=kind)
    possible = np.ones((3, 7), bool)
    possible[1, 1:3] = possible[2, :5] = False
    if kind == "index":
        labels = jnp.array([1, 5, 6], jnp.int32)
    moves = case.field in ("log_normalizer", "expected_logit")
    for dtype in (jnp.float32, jnp.bfloat16):
        plain, slope = cases.evaluate(case, jnp.where(possible, jnp.zeros((), dtype), -jnp.inf), labels)
        for size in (3.2e38, -3.2e38, -1e37):
            shift = jnp.asarray(size, dtype)
            found, slope_there = cases.evaluate(case, jnp.where(possible, shift, -jnp.inf), labels)
            expected = plain + shift.astype(jnp.float32) if moves else plain
            np.testing.assert_allclose(found, expected, rtol=8 * EPS)  # a sum of seven products; other results are equal
            # The expected logit of equal logits has the gradient p_k, from terms that cancel.
            np.testing.assert_allclose(np.float32(slope_there), np.float32(slope), atol=8 * EPS)


def test_equal_logits_near_the_largest_number():
    for size in (3.2e38, -3.2e38):
        loss, slope = jax.value_and_grad(xentjax.softmax_cross_entropy)(jnp.full(7, size, jnp.float32), 1)
        np.testing.assert_allclose(loss, np.log(7), rtol=4 * EPS)
        np.testing.assert_allclose(slope, 1 / 7 - np.eye(7)[1], rtol=8 * EPS)


@pytest.mark.exhaustive
def test_float64(x64, rng):
    for case in cases.LOSSES:
        for kind in case.kinds:
            z, labels = case.draw(rng, (9,), dtype=jnp.float64, kind=kind)
            value, slope = case.exact(ref.Exact, z, labels)
            result, derivative = cases.evaluate(case, z, labels)
            assert result.dtype == jnp.float64
            # keywords and float32 labels are exact in float64; 40 eps of float64
            scale = case.tolerance
            np.testing.assert_allclose(result, value.astype(float), rtol=scale * 1e-14, atol=scale * 1e-14, err_msg=str(case))
            np.testing.assert_allclose(derivative, slope.astype(float), rtol=scale * 1e-13, atol=scale * 1e-14, err_msg=str(case))
