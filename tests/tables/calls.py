"""One valid call of every public function that computes with arrays: each argument by its name, for properties of single arguments.

The table of cases says how losses on (logits, labels) are called. The values mean little; `table_*.py` and `cases.py` hold the formulas.
`test_arguments.py` walks over the leaves of these arguments.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import xentjax
from tests.tables import cases
from xentjax import information, metrics, policy, preference, samplers, sequence

N, K, F = 3, 4, 2  # examples, classes, features
RNG = np.random.default_rng(7)

# Numbers for which an integer dtype is as good as a floating one: hyper-parameters, scalar or not.
NUMBERS = {"class_weights", "pos_weight", "class_counts", "noise_matrix", "class_log_prior", "thresholds", "variance", "log_variance"}
NUMBERS |= {"scale", "log_scale"}
# Integers that are only compared with each other.
IDENTIFIERS = {
    "ctc_loss_from_log_probs.labels",
    "candidate_ids",
    "supervised_contrastive_loss.labels",
    "clip_loss.labels",
    "siglip_loss.labels",
    "policy.group_advantages.groups",
}
QUANTITIES = {"poisson_nll.targets", "sigmoid_cross_entropy.labels", "sigmoid_focal_loss.labels", "asymmetric_loss.labels"}
QUANTITIES |= {"quality_focal_loss.labels", "varifocal_loss.labels"}
NOT_NEGATIVE = {"p", "q", "joint", "class_weights", "class_counts", "pos_weight", "noise_matrix", "variance", "label_probs", "weights"}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A public function, arrays for it, hyper-parameters that may be traced, and what must be known before tracing."""

    name: str  # as users write it behind `xentjax.`
    function: Callable
    arrays: dict[str, Any]  # pytrees of NumPy arrays
    static: dict[str, Any]
    settings: dict[str, float]

    def __str__(self) -> str:
        return self.name

    def __call__(self, arrays, settings=None):
        return self.function(**arrays, **(self.settings if settings is None else settings), **self.static)

    def leaves(self, kind):
        """(path, name, array) of every array of a kind of dtype."""
        for path, x in jax.tree_util.tree_leaves_with_path(self.arrays):
            if np.issubdtype(x.dtype, kind):
                yield path, path[0].key + jax.tree_util.keystr(path[1:]), x

    def replaced(self, path, x):
        """The arrays with another at this path."""
        return jax.tree_util.tree_map_with_path(lambda p, old: x if p == path else old, self.arrays)


def _float(*shape):
    return RNG.uniform(0.1, 0.9, shape).astype(np.float32)


def _indices(*shape):
    return (np.arange(int(np.prod(shape))) % K).reshape(shape).astype(np.int32)


HIDDEN = {"hidden": _float(N, F), "kernel": _float(F, K), "labels": _indices(N)}
SAMPLES = samplers.Samples(np.array([3, 1], np.int32), _float(2))
CLASSES = {"logits": _float(N, K), "labels": _indices(N)}
BITS = {"logits": _float(N, K), "labels": (_indices(N, K) % 2).astype(np.int32)}
WEIGHTS = {"class_weights": _float(K)}
COUNTS = {"class_counts": np.arange(1, K + 1, dtype=np.float32)}
SIMPLEX = np.full((N, K), 1 / K, np.float32)
PAIR, LOGITS = {"p": SIMPLEX, "q": SIMPLEX}, {"p_logits": _float(N, K), "q_logits": _float(N, K)}
VIEWS = _float(N, F), _float(N, F)
IMAGES, VALUES = {"images": VIEWS[0], "texts": VIEWS[1]}, {"values": _float(N), "weights": _float(N)}
SCORES = {"scores": _float(N), "labels": np.array([0, 1, 0], np.int32), "weights": _float(N)}
ADAPTIVE = xentjax.AdaptiveSoftmax(_float(F, 3), (_float(F, 1),), (_float(1, 2),))
TREE = jax.tree.map(np.asarray, xentjax.huffman_tree([5, 1, 2, 1]))
TREE = TREE._replace(nodes=TREE.nodes.astype(np.int32))

REGIONS = ("dice_loss", "tversky_loss", "jaccard_loss", "lovasz_softmax_loss", "present_classes")
FRAMES, WANTED = _float(N, 3, K), {"labels": np.array([[1, 2], [3, 1], [2, 2]], np.int32)}
LENGTHS = {"logit_lengths": np.array([3, 2, 3], np.int32), "label_lengths": np.array([2, 2, 2], np.int32)}
ANSWERS, MEANS = {"log_probs": -_float(N), "reference": -_float(N)}, {"mean_chosen": -_float(N), "mean_rejected": -_float(N)}
CHAIN = {"unary": FRAMES, "transitions": _float(K, K), "start": _float(K), "end": _float(K)}

_ARRAYS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ctc_loss", "sequence.ctc_alignment", "sequence.ctc_posteriors"), {"logits": FRAMES} | WANTED | LENGTHS),
    "sequence.ctc_greedy_decode": {"logits": FRAMES, "logit_lengths": LENGTHS["logit_lengths"]},
    "ctc_loss_from_log_probs": {
        "blank_log_probs": _float(5),
        "label_log_probs": _float(5, 3),
        "labels": np.array([3, 1, 9], np.int32),
        "logit_lengths": np.array(5, np.int32),
        "label_lengths": np.array(3, np.int32),
    },
    "transducer_loss": {"logits": _float(N, 3, 3, K)} | WANTED | LENGTHS,
    "transducer_loss_from_log_probs": {"blank_log_probs": _float(N, 3, 3), "label_log_probs": _float(N, 3, 2)} | LENGTHS,
    "tdt_loss": {"logits": _float(N, 3, 3, K), "duration_logits": _float(N, 3, 3, 5)} | WANTED | LENGTHS,
    "tdt_loss_from_log_probs": {
        "blank_log_probs": _float(N, 3, 3),
        "label_log_probs": _float(N, 3, 2),
        "duration_log_probs": _float(N, 3, 3, 5),
    }
    | LENGTHS,
    "crf_loss": CHAIN | {"labels": _indices(N, 3)},
    **dict.fromkeys(("sequence.crf_marginals", "sequence.crf_decode"), CHAIN),
    **{case.name: CLASSES | case.of_classes(K) for case in cases.CLASSES + cases.STATISTICS},
    **dict.fromkeys((case.name for case in cases.BITS), BITS),
    "softmax_cross_entropy": CLASSES | WEIGHTS,
    "softmax_focal_loss": CLASSES | WEIGHTS,
    "softmax_cross_entropy_with_top_k_labels": {"logits": _float(N, K), "label_ids": _indices(N, 2), "label_probs": _float(N, 2)},
    **dict.fromkeys(("class_balanced_weights", "inverse_frequency_weights"), COUNTS),
    "margin_cross_entropy": {"cosines": _float(N, K), "labels": _indices(N)},
    "sigmoid_cross_entropy": BITS | {"pos_weight": _float(K)},
    "distillation_loss": {"student_logits": _float(N, K), "teacher_logits": _float(N, K)},
    "top_k_distillation_loss": {
        "student_logits": _float(N, K),
        "teacher_ids": np.array([[0, 1], [3, 2], [1, 3]], np.int32),
        "teacher_log_probs": _float(N, 2) - 1.9,
    },
    **{key: {"router_logits": _float(N, K)} for key in ("load_balancing_loss", "expert_load", "router_z_loss")},
    "gaussian_nll": {"mean": _float(N), "targets": _float(N), "variance": _float(N)},
    "laplace_nll": {"mean": _float(N), "targets": _float(N), "log_scale": _float(N)},
    "poisson_nll": {"log_rate": _float(N), "targets": _indices(N)},
    "mixture_of_logistics_nll": {
        "mixture_logits": _float(N, 2),
        "targets": _indices(N),
        "means": _float(N, 2),
        "log_scales": _float(N, 2),
    },
    "cumulative_link_loss": {"scores": _float(N), "labels": _indices(N), "thresholds": np.array([-1.0, 0.0, 2.0], np.float32)},
    "coral_loss": {"logits": _float(N, K - 1), "labels": _indices(N)},
    **dict.fromkeys(REGIONS, CLASSES),
    "boundary_loss": {"logits": _float(N, K), "distances": _float(N, K)},
    "lovasz_hinge_loss": {"logits": _float(N), "labels": np.array([0, 1, 0], np.int32)},
    "distribution_focal_loss": {"logits": _float(N, K), "targets": _float(N)},
    "linear_softmax_cross_entropy": HIDDEN | WEIGHTS | {"bias": _float(K), "weights": _float(N)},
    "sampled_softmax_cross_entropy": HIDDEN | {"samples": SAMPLES, "bias": _float(K)},
    "noise_contrastive_estimation_loss": HIDDEN | {"samples": SAMPLES, "label_log_expected_count": _float(N)},
    "negative_sampling_loss": HIDDEN | {"samples": SAMPLES},
    "in_batch_softmax_cross_entropy": {
        "queries": _float(N, F),
        "candidates": _float(N, F),
        "candidate_log_prob": _float(N),
        "candidate_ids": _indices(N),
    },
    "adaptive_softmax_cross_entropy": {"hidden": _float(N, F), "parameters": ADAPTIVE, "labels": _indices(N)},
    "adaptive_softmax_log_prob": {"hidden": _float(N, F), "parameters": ADAPTIVE},
    "hierarchical_softmax_cross_entropy": HIDDEN | {"kernel": _float(F, K - 1), "tree": TREE},
    "samplers.log_expected_count": {"ids": _indices(N)},
    "info_nce": {"queries": VIEWS[0], "keys": VIEWS[1], "negatives": _float(2, F)},
    "nt_xent": {"first": VIEWS[0], "second": VIEWS[1]},
    **dict.fromkeys(("clip_loss", "siglip_loss"), IMAGES | {"labels": np.array([0, 1, 0], np.int32)}),
    "supervised_contrastive_loss": {"embeddings": VIEWS[0], "labels": np.array([0, 1, 0], np.int32)},
    **dict.fromkeys(("weighted_mean", "weighted_sum"), VALUES),
    **dict.fromkeys(("metrics.accuracy", "metrics.top_k_accuracy", "metrics.brier_score", "metrics.negative_log_likelihood"), CLASSES),
    **dict.fromkeys(("metrics.calibration", "metrics.fit_temperature"), CLASSES | {"weights": _float(N)}),
    **dict.fromkeys(("metrics.auroc", "metrics.ranking"), SCORES),
    "metrics.confusion": {"predictions": _indices(N), "labels": _indices(N), "weights": _float(N)},
    **{f"information.{n}": {"p": SIMPLEX} for n in ("self_information", "entropy", "perplexity")},
    **{f"information.{n}_from_logits": {"logits": _float(N, K)} for n in ("self_information", "entropy", "perplexity")},
    **{f"information.{n}": PAIR for n in ("cross_entropy", "kl_divergence", "js_divergence", "renyi_divergence")},
    **{f"information.{n}_from_logits": LOGITS for n in ("cross_entropy", "kl_divergence", "js_divergence", "renyi_divergence")},
    **{f"information.{n}": {"joint": SIMPLEX} for n in ("conditional_entropy", "mutual_information")},
    **{f"information.{n}_from_logits": {"joint_logits": _float(N, K)} for n in ("conditional_entropy", "mutual_information")},
}
_ARRAYS |= {
    "preference.dpo_loss": {name: -_float(N) for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")},
    "preference.cpo_loss": {"chosen": -_float(N), "rejected": -_float(N)},
    **dict.fromkeys(("preference.simpo_loss", "preference.orpo_loss"), MEANS),
    "preference.kto_loss": ANSWERS | {"desirable": np.array([True, False, True]), "kl": _float(N)},
    **dict.fromkeys(("preference.implicit_rewards", "policy.kl_estimate"), ANSWERS),
    "policy.policy_gradient_loss": {"log_probs": -_float(N, 2), "old_log_probs": -_float(N, 2), "advantages": _float(N)},
    "policy.group_advantages": {"rewards": _float(N), "groups": np.array([3, 3, 9], np.int32)},
}
_STATIC: dict[str, dict[str, Any]] = {
    **{name: {"spatial": 1} for name in (*REGIONS, "boundary_loss", "lovasz_hinge_loss")},
    "linear_softmax_cross_entropy": {"reduction": "none"},
    "mixture_of_logistics_nll": {"levels": 4},
    "samplers.log_expected_count": {"sampler": samplers.uniform(K), "count": 3},
    **{key: {"top_k": 2} for key in ("load_balancing_loss", "expert_load")},
    "metrics.confusion": {"classes": K},
    "metrics.top_k_accuracy": {"k": 2},
    "metrics.fit_temperature": {"steps": 3},
}
_SETTINGS = {  # of those whose default is None, or that have none
    "sigmoid_focal_loss": {"alpha": 0.5},
    "linear_softmax_cross_entropy": {"softcap": 3.0},
    "information.renyi_divergence": {"alpha": 0.5},
    "information.renyi_divergence_from_logits": {"alpha": 0.5},
}
# Public functions without arrays, or that pass them on to a function of the caller.
WITHOUT = {"checked", "fuse_linear", "fuse_linear_sharded", "plan_linear", "metrics.perplexity", "huffman_tree"}
WITHOUT |= {
    "sequence.tdt_greedy_decode",
    "sequence.transducer_greedy_decode",
    "init_adaptive_softmax",
    *(f"samplers.{name}" for name in ("uniform", "log_uniform", "alias", "draw")),
}


def public():
    """Every public function by its name."""
    rooms = {"": xentjax, "metrics.": metrics, "information.": information, "samplers.": samplers, "sequence.": sequence}
    rooms |= {"policy.": policy, "preference.": preference}
    for prefix, module in rooms.items():
        for name, x in vars(module).items():
            if inspect.isfunction(x) and not name.startswith("_"):
                yield prefix + name, x


def _call(name, function):
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: float(p.default) for p in parameters if type(p.default) in (int, float) and "ArrayLike" in str(p.annotation)}
    return Call(name, function, _ARRAYS[name], _STATIC.get(name, {}), defaults | _SETTINGS.get(name, {}))


CALLS = tuple(_call(name, function) for name, function in public() if name in _ARRAYS)
