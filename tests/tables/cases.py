"""One table of everything public: how to call it, its value and its gradient from `reference.py`.

A row is a function with one setting of its keywords. The test files run properties over the rows: a new loss gets its whole
battery of tests by adding rows here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import xentjax
from tests.tables import reference as ref
from tests.tables import reference_families as families

COMMON = ("axis", "axis_name", "class_mask", "where")  # the tail of every loss
WEIGHTS = (0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 0.0)  # one per class of the default problem
# Keywords whose default is None, for a number of classes: a loss with another such keyword adds it here.
OPTIONAL = {"class_weights": lambda n: np.resize(WEIGHTS, n), "pos_weight": lambda n: 3.0, "alpha": lambda n: 0.25}


@dataclasses.dataclass(frozen=True, eq=False)  # hashable by identity, so that a program is compiled once for a case
class Case:
    """A public function with one setting of its keywords, and its formulas."""

    name: str
    function: Callable
    value: Callable  # (m, z, t, **formula) → [...]
    gradient: Callable  # (m, z, t, **formula) → the shape of z
    family: str = "classes"  # or "bits", "top_k"
    target: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords that make t out of the labels
    formula: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of the formula itself
    arrays: dict[str, Callable] = dataclasses.field(default_factory=dict)  # keywords of the formula for a number of classes
    field: str | None = None  # of a result with several
    inputs: str = "logits"  # or "cosines"
    tolerance: float = 1.0  # multiplies the accuracy bounds: how many more roundings a loss has than cross-entropy
    thorough: bool = True  # for all properties; another setting of the same function takes values, gradients and accuracy alone
    exact_at_margins: bool = True  # no term cancels another, so that a tiny loss keeps its relative accuracy
    differentiable: bool = True  # the closed form of the gradient is the whole derivative: nothing in it is held constant

    def __str__(self) -> str:
        keywords = {**self.target, **self.formula, **self.arrays} if self.target or self.formula else {}
        return "-".join([self.name, *([self.field] if self.field else []), *sorted(keywords)])

    @property
    def keywords(self) -> dict[str, Any]:
        arrays = {"class_weights", "pos_weight"}
        given = {**self.target, **self.formula}
        return {k: jnp.asarray(v, jnp.float32) if k in arrays and np.ndim(v) else v for k, v in given.items()}

    @property
    def steepness(self) -> float:
        """How fast the logits of the formula change with the input: the scale of cosines, else 1. Gradients have terms of this size."""
        if self.inputs != "cosines":
            return 1.0
        return self.formula.get("scale", inspect.signature(self.function).parameters["scale"].default)

    def of_classes(self, classes: int, first: int | None = None) -> dict[str, np.ndarray]:
        """The keywords that hold something for each class, or those of the first classes only."""
        made = {name: np.asarray(draw(classes), np.float32) for name, draw in self.arrays.items()}
        return {name: x[:first] if x.ndim == 1 else x[:first, :first] for name, x in made.items()}

    def parameters(self, classes: int) -> dict[str, jax.Array]:
        """Every keyword that may be traced, as an array: its setting here, or its default, or for None one from `OPTIONAL`."""
        given = {**self.keywords, **self.of_classes(classes)}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.annotation in (ArrayLike, ArrayLike | None) and parameter.kind is parameter.KEYWORD_ONLY and name not in COMMON:
                default = OPTIONAL[name](classes) if parameter.default is None else parameter.default
                given.setdefault(name, default)
        return {name: jnp.asarray(x, jnp.float32) for name, x in given.items() if not isinstance(x, bool | int)}

    def __call__(self, logits, labels, **more):
        labels = (labels,) if self.family != "top_k" else labels
        arrays = {k: jnp.asarray(v) for k, v in self.of_classes(logits.shape[more.get("axis", -1)]).items() if k not in more}
        result = self.function(logits, *labels, **{**self.keywords, **arrays, **more})
        return result if self.field is None else getattr(result, self.field)

    def targets(self, m, labels, classes, class_mask=None):
        if self.family == "bits":
            return ref.bits(m, labels, **self.target)
        if self.family == "top_k":
            ids, probs = (np.asarray(x, np.float64) for x in labels)
            return m.array((np.eye(classes)[ids.astype(int)] * probs[..., None]).sum(-2))
        return ref.targets(m, labels, classes, **self.target, class_mask=class_mask)

    def exact(self, m, logits, labels, class_mask=None):
        """Value and gradient by the formulas."""
        z = m.array(np.asarray(logits, np.float64))
        t = self.targets(m, labels, z.shape[-1], class_mask)
        keywords = {**self.formula, **self.of_classes(z.shape[-1])}
        return self.value(m, z, t, **keywords), self.gradient(m, z, t, **keywords)

    def draw(self, rng, leading=(5,), classes=7, dtype=jnp.float32, kind="index", scale=3.0):
        """Logits in `dtype` and labels of one kind: "index" or "distribution" ("bit" and "probability" for bits)."""
        z = rng.normal(size=(*leading, classes)) * scale
        z = jnp.asarray(0.95 * np.tanh(z / 3) if self.inputs == "cosines" else z, dtype)
        if self.family == "bits":
            labels = rng.integers(0, 2, z.shape) if kind == "index" else rng.uniform(size=z.shape)
            return z, jnp.asarray(labels, jnp.int32 if kind == "index" else jnp.float32)
        if self.family == "top_k":
            k = min(3, classes)
            ids = np.argsort(rng.uniform(size=(*leading, classes)))[..., :k]
            return z, (jnp.asarray(ids, jnp.int32), jnp.asarray(rng.dirichlet(np.ones(k), leading), jnp.float32))
        if kind == "index":
            return z, jnp.asarray(rng.integers(0, classes, leading), jnp.int32)
        return z, jnp.asarray(rng.dirichlet(np.ones(classes), leading), jnp.float32)

    @property
    def kinds(self) -> tuple[str, ...]:
        # statistics of a row do not see the label
        return ("index",) if self.family == "top_k" or self.field not in (None, "log_prob") else ("index", "distribution")


def _without_targets(formula):
    return lambda m, z, t: formula(m, z)


_SMOOTH = {"label_smoothing": 0.1}
_ALL = {"label_smoothing": 0.1, "class_weights": WEIGHTS}
_CROSS_ENTROPY = (xentjax.softmax_cross_entropy, ref.cross_entropy, ref.cross_entropy_gradient)
_FOCAL = (xentjax.softmax_focal_loss, ref.focal, ref.focal_gradient)
_BITS = (xentjax.sigmoid_cross_entropy, ref.bit_cross_entropy, ref.bit_cross_entropy_gradient)
_BIT_FOCAL = (xentjax.sigmoid_focal_loss, ref.bit_focal, ref.bit_focal_gradient)
_QUALITY = (xentjax.quality_focal_loss, ref.quality_focal, ref.quality_focal_gradient)
_VARIFOCAL = (xentjax.varifocal_loss, ref.varifocal, ref.varifocal_gradient)
_ASYMMETRIC = (xentjax.asymmetric_loss, ref.asymmetric, ref.asymmetric_gradient)

CROSS_ENTROPY = (
    Case("softmax_cross_entropy", *_CROSS_ENTROPY),
    Case("softmax_cross_entropy", *_CROSS_ENTROPY, target=_SMOOTH, thorough=False),
    Case("softmax_cross_entropy", *_CROSS_ENTROPY, target={"class_weights": WEIGHTS}, thorough=False),
    Case("softmax_cross_entropy", *_CROSS_ENTROPY, formula={"z_loss": 0.01}, thorough=False),
    Case("softmax_cross_entropy", *_CROSS_ENTROPY, target=_ALL, formula={"z_loss": 0.01}),
    Case("softmax_log_prob", xentjax.softmax_log_prob, ref.log_prob, ref.log_prob_gradient),
    Case("softmax_focal_loss", *_FOCAL, tolerance=3.0),
    Case("softmax_focal_loss", *_FOCAL, formula={"gamma": 0.5}, tolerance=3.0, thorough=False),
    Case("softmax_focal_loss", *_FOCAL, target=_ALL, formula={"gamma": 1.5}, tolerance=3.0),
)


def log_prior(classes):
    return -0.5 * np.arange(classes)


def counts(classes):
    return 5.0 * 2.0 ** np.arange(classes)  # the first is the rarest


def noise(classes):
    """A fifth of each of the first five classes goes to these five, the more the later the class; the others are labelled right."""
    noisy = np.arange(classes) < 5
    share = np.where(noisy, np.arange(1, classes + 1), 0)
    return np.where(noisy[:, None] & noisy, 0.8 * np.eye(classes) + 0.2 * share / share.sum(), np.eye(classes))


def _family(function, reference, /, **more):
    value, gradient = (getattr(families, reference + part) for part in ("", "_gradient"))
    return Case(function.__name__, function, value, gradient, **more)


_COUNTS, _NOISE = {"arrays": {"class_counts": counts}}, {"arrays": {"noise_matrix": noise}}
_ANGLES = {"inputs": "cosines", "tolerance": 8.0, "exact_at_margins": False}  # a scale of 64 multiplies the rounding of the cosines
FAMILIES = (
    _family(xentjax.generalized_cross_entropy, "generalized", tolerance=2.0),
    _family(xentjax.generalized_cross_entropy, "generalized", formula={"q": 0.2}, tolerance=2.0, thorough=False),
    _family(xentjax.symmetric_cross_entropy, "symmetric", tolerance=2.0),
    _family(xentjax.bootstrapped_cross_entropy, "bootstrapped", exact_at_margins=False),
    _family(xentjax.bootstrapped_cross_entropy, "bootstrapped", formula={"beta": 0.8, "hard": True}, exact_at_margins=False),
    _family(xentjax.taylor_cross_entropy, "taylor", tolerance=2.0),
    _family(xentjax.taylor_cross_entropy, "taylor", formula={"order": 5}, tolerance=2.0, thorough=False),
    _family(xentjax.poly_cross_entropy, "poly", tolerance=2.0),
    _family(xentjax.confidence_penalized_cross_entropy, "penalty", exact_at_margins=False),
    _family(xentjax.normalized_cross_entropy, "normalized", exact_at_margins=False),
    _family(xentjax.bi_tempered_cross_entropy, "bi_tempered", tolerance=4.0, exact_at_margins=False),
    _family(
        xentjax.bi_tempered_cross_entropy,
        "bi_tempered",
        formula={"t1": 0.2, "t2": 2.0},
        tolerance=4.0,
        exact_at_margins=False,
        thorough=False,
    ),
    _family(xentjax.sparsemax_loss, "sparsemax", tolerance=4.0, exact_at_margins=False),
    _family(xentjax.entmax_loss, "entmax", tolerance=4.0, exact_at_margins=False),
    _family(xentjax.forward_corrected_cross_entropy, "forward", **_NOISE, exact_at_margins=False),
    _family(xentjax.backward_corrected_cross_entropy, "backward", **_NOISE, tolerance=2.0, exact_at_margins=False),
    _family(xentjax.logit_adjusted_cross_entropy, "logit_adjusted", arrays={"class_log_prior": log_prior}, exact_at_margins=False),
    _family(xentjax.ldam_loss, "ldam", **_COUNTS, **_ANGLES),
    _family(xentjax.seesaw_loss, "seesaw", **_COUNTS, exact_at_margins=False, differentiable=False),
    _family(xentjax.margin_cross_entropy, "margin", **_ANGLES),
    _family(xentjax.margin_cross_entropy, "margin", formula={"scale": 10.0, "m1": 1.5, "m2": 0.1, "m3": 0.2}, **_ANGLES, thorough=False),
)
CLASSES = CROSS_ENTROPY + FAMILIES
TOP_K = (
    Case(
        "softmax_cross_entropy_with_top_k_labels",
        xentjax.softmax_cross_entropy_with_top_k_labels,
        ref.cross_entropy,
        ref.cross_entropy_gradient,
        family="top_k",
    ),
)
STATISTICS = (
    Case("row_statistics", xentjax.row_statistics, ref.log_prob, ref.log_prob_gradient, field="log_prob"),
    Case("row_statistics", xentjax.row_statistics, _without_targets(ref.entropy), _without_targets(ref.entropy_gradient), field="entropy"),
    Case("row_statistics", xentjax.row_statistics, _without_targets(ref.normalizer), _without_targets(ref.softmax), field="log_normalizer"),
    Case(
        "row_statistics",
        xentjax.row_statistics,
        _without_targets(ref.expected_logit),
        _without_targets(ref.expected_logit_gradient),
        field="expected_logit",
    ),
)
BITS = (
    Case("sigmoid_cross_entropy", *_BITS, family="bits"),
    Case("sigmoid_cross_entropy", *_BITS, family="bits", target=_SMOOTH, thorough=False),
    Case("sigmoid_cross_entropy", *_BITS, family="bits", formula={"pos_weight": 3.0}, thorough=False),
    Case("sigmoid_cross_entropy", *_BITS, family="bits", formula={"pos_weight": WEIGHTS}),
    Case("sigmoid_focal_loss", *_BIT_FOCAL, family="bits", tolerance=3.0),
    Case("sigmoid_focal_loss", *_BIT_FOCAL, family="bits", target=_SMOOTH, formula={"gamma": 0.5, "alpha": 0.25}, tolerance=3.0),
    Case("asymmetric_loss", *_ASYMMETRIC, family="bits", tolerance=3.0),
    Case(
        "asymmetric_loss", *_ASYMMETRIC, family="bits", formula={"gamma_negative": 2.0, "gamma_positive": 0.0, "clip": 0.0}, tolerance=3.0
    ),
    Case("quality_focal_loss", *_QUALITY, family="bits", tolerance=3.0),
    Case("quality_focal_loss", *_QUALITY, family="bits", formula={"beta": 0.5}, tolerance=3.0, thorough=False),
    Case("varifocal_loss", *_VARIFOCAL, family="bits", tolerance=3.0),
    Case("varifocal_loss", *_VARIFOCAL, family="bits", formula={"alpha": 0.25, "gamma": 0.5}, tolerance=3.0, thorough=False),
)
LOSSES = CLASSES + TOP_K + STATISTICS + BITS
CATEGORICAL = CLASSES + TOP_K + STATISTICS

# Public names that are not a loss on logits, and the test that holds their formulas.
ELSEWHERE = {
    "weighted_mean": "test_reduction.py",
    "weighted_sum": "test_reduction.py",
    "WeightedSum": "test_reduction.py",
    "fuse_linear": "test_linear_dense.py",
    "fuse_linear_sharded": "test_linear_sharded.py",
    "linear_softmax_cross_entropy": "test_linear_inputs.py",
    "plan_linear": "test_linear_programs.py",
    "LinearPlan": "test_linear_programs.py",
    "RowStatistics": "test_values.py",
    "checked": "test_checked.py",
    "ExpertLoad": "test_routing.py",
    "expert_load": "test_routing.py",
    "class_balanced_weights": "test_families.py",
    "inverse_frequency_weights": "test_families.py",
    "present_classes": "test_overlap.py",
    **{f"samplers.{name}": "test_samplers.py" for name in ("Samples", "Uniform", "LogUniform", "Alias")},
    **{f"samplers.{name}": "test_samplers.py" for name in ("uniform", "log_uniform", "alias", "draw", "log_expected_count")},
    **dict.fromkeys(("AdaptiveSoftmax", "BinaryTree", "init_adaptive_softmax", "huffman_tree"), "test_hierarchical.py"),
    **dict.fromkeys(("metrics.Confusion", "metrics.confusion", "metrics.perplexity"), "test_metrics.py"),
    **dict.fromkeys(("metrics.Calibration", "metrics.calibration", "metrics.fit_temperature"), "test_metrics_calibration.py"),
    **dict.fromkeys(("ctc_loss", "ctc_loss_from_log_probs", "sequence.ctc_alignment", "sequence.ctc_posteriors"), "test_ctc.py"),
    **dict.fromkeys(("sequence.ctc_greedy_decode",), "test_ctc.py"),
    **dict.fromkeys(("transducer_loss", "transducer_loss_from_log_probs", "sequence.transducer_greedy_decode"), "test_transducer.py"),
    **dict.fromkeys(("tdt_loss", "tdt_loss_from_log_probs", "sequence.tdt_greedy_decode"), "test_tdt.py"),
    **dict.fromkeys(("crf_loss", "sequence.crf_marginals", "sequence.crf_decode"), "test_crf.py"),
    **dict.fromkeys(("metrics.Ranking", "metrics.ranking", "metrics.auroc"), "test_metrics_ranking.py"),
}


def evaluate(case, logits, labels, **more):
    """The value, and the gradient of Σ loss, which is that of each example because examples are independent; one program for both."""
    return _evaluate(case, logits, labels, more)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(case, logits, labels, more):
    value, pull = jax.vjp(lambda z: case(z, labels, **more), logits)
    return value, pull(jnp.ones_like(value))[0]


def gradient(case, logits, labels, **more):
    """The gradient alone."""
    return evaluate(case, logits, labels, **more)[1]


@functools.partial(jax.jit, static_argnums=0)
def derivatives(case, logits, labels, direction, more=None):
    """Value, gradient of Σ loss, and along a direction the derivative of the value and of the gradient; one program for all."""

    def loss(z):
        return case(z, labels, **(more or {}))

    slope, product = jax.jvp(jax.grad(lambda z: loss(z).sum()), (logits,), (direction,))
    value, tangent = jax.jvp(loss, (logits,), (direction,))
    return value, slope, tangent, product
