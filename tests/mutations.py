"""Faults that the short run must find.

`python -m tests.mutations` copies the repository, makes one fault at a time, and runs the tests of the room with the fault until one fails.
It prints a table with the test that caught each fault, and exits with 1 if a fault survived. Names of faults may follow: only these are
made. The results of the last run are in `tests/mutations.md`.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROPERTIES = "tests/properties"
SHARDED = "tests/sharded"
LINEAR = "tests/linear"
FAMILIES = "tests/families"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A line of the package, what replaces it, and where a test should fail."""

    name: str
    file: str  # below `xentjax`
    old: str  # occurs once
    new: str
    tests: tuple[str, ...]


V, G, S2, M, T = (f"{PROPERTIES}/test_{n}.py" for n in ("values", "gradients", "second_derivatives", "masks", "transforms"))
ROWS = f"{PROPERTIES}/test_functions.py"
HUGE = f"{PROPERTIES}/test_huge_logits.py"
FAMILY = f"{FAMILIES}/test_families.py"
CTC, TRANSDUCER, TDT, CRF = (f"tests/sequence/test_{n}.py" for n in ("ctc", "transducer", "tdt", "crf"))
HUGE_SCORES = "tests/sequence/test_huge_scores.py"
OVERLAP = f"{FAMILIES}/test_overlap.py"
POLICY, ACCURACY = f"{FAMILIES}/test_policy.py", f"{FAMILIES}/test_preference_accuracy.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "the label is summed among the others",
        "_core/statistics.py",
        "rows.combined_mask(~rows.on_label(r), r.class_mask, r.where))",
        "rows.combined_mask(rows.on_label(r) | True, r.class_mask, r.where))",
        (V,),
    ),
    Mutation(
        "the label is summed among the others, in a value without a gradient",
        "_core/rows.py",
        "jnp.minimum(jnp.abs(distance), 1)",
        "jnp.ones_like(distance)",
        (V, f"{PROPERTIES}/test_accuracy.py"),
    ),
    Mutation(
        "label smoothing lowers every logit",
        "_core/surprises.py",
        "-rows.class_sum(r, rows.masked(tangents[0], where, class_mask))",
        "rows.class_sum(r, rows.masked(tangents[0], where, class_mask))",
        (V, G),
    ),
    Mutation(
        "a row of impossible classes keeps its gradient",
        "_core/statistics.py",
        "numerics.where(stats.all_impossible, lax.stop_gradient(loss), loss)",
        "loss",
        (M, f"{PROPERTIES}/test_hidden.py", f"{PROPERTIES}/test_accuracy.py", f"{PROPERTIES}/test_defects.py"),
    ),
    Mutation(
        "a tie is no hit",
        "_core/statistics.py",
        "(stats.gap >= 0) & ~stats.all_impossible",
        "(stats.gap > 0) & ~stats.all_impossible",
        (V, f"{FAMILIES}/test_metrics.py"),
    ),
    Mutation(
        "the count of the classes of one device",
        "_core/rows.py",
        "return self.raw.shape[-1] * mesh.size(self.axis_name)",
        "return self.raw.shape[-1]",
        (SHARDED,),
    ),
    Mutation(
        "a label below 0 is clipped",
        "_core/rows.py",
        "inside = (index >= 0) & (index < rows.classes)",
        "inside = index < rows.classes",
        (f"{PROPERTIES}/test_errors.py", V, M, f"{PROPERTIES}/test_defects.py", f"{PROPERTIES}/test_hidden.py"),
    ),
    Mutation(
        "hidden rows are not selected on the way out",
        "_core/rows.py",
        "return values if count is None else numerics.where(count, values, jnp.zeros_like(values))",
        "return values",
        (M,),
    ),
    Mutation(
        "a sum over classes without other devices",
        "_core/rows.py",
        "return mesh.psum(partial_sum, mesh.names(rows.axis_name))",
        "return partial_sum",
        (SHARDED,),
    ),
    Mutation(
        "the maximum of one device",
        "_core/rows.py",
        "return top if axis_name is None else lax.pmax(top, axis_name)",
        "return top",
        (SHARDED,),
    ),
    Mutation(
        "smoothing over masked classes",
        "_core/rows.py",
        "return jnp.maximum(class_sum(rows, rows.class_mask.astype(rows.values.dtype)), 1)",
        "return rows.classes",
        (V, M),
    ),
    Mutation(
        "arithmetic in the dtype of the logits",
        "_core/numerics.py",
        "return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)",
        "return jnp.dtype(jnp.float32)",
        (f"{PROPERTIES}/test_accuracy.py", S2),
    ),
    Mutation(
        "derivative of the sigmoid",
        "_core/numerics.py",
        "sigmoid(*primals) * sigmoid(-primals[0]) * tangents[0]))",
        "sigmoid(*primals) * tangents[0]))",
        (S2, G),
    ),
    Mutation(
        "cancelling gradient of a confident soft label",
        "_core/surprises.py",
        "total < 2))",
        "total < 0))",
        (f"{PROPERTIES}/test_accuracy.py",),
    ),
    Mutation(
        "the derivative of a likely class cancels",
        "_core/surprises.py",
        "jnp.expm1(-of_pivot) * by_pivot",
        "(jnp.exp(-of_pivot) - 1) * by_pivot",
        (f"{PROPERTIES}/test_accuracy.py",),
    ),
    Mutation(
        "smoothing without the factor of the label",
        "_core/odds.py",
        "return numerics.weighted(1 - smoothing, loss) +",
        "return loss +",
        (V,),
    ),
    Mutation(
        "focal exponent on the wrong side",
        "_core/odds.py",
        "numerics.softplus(log_odds)) * loss",
        "numerics.softplus(-log_odds)) * loss",
        (V,),
    ),
    Mutation(
        "soft labels have no derivative",
        "_core/surprises.py",
        "+ rows.class_sum(r, surprise(r, statistics.of_row(r)) * tangents[2])",
        "+ rows.class_sum(r, 0 * tangents[2])",
        (G, f"{PROPERTIES}/test_hidden.py", S2, T),
    ),
    Mutation(
        "running sums forget their rounding error",
        "_core/sums.py",
        "return s, (a - (s - of_b)) + (b - of_b)",
        "return s, jnp.zeros_like(s)",
        (f"{PROPERTIES}/test_drift.py",),
    ),
    Mutation("z-loss without the sum of the labels", "_losses/softmax.py", "* total * (stats.reference", "* (stats.reference", (V,)),
    Mutation(
        "probabilities of top-k labels are rounded",
        "_losses/softmax.py",
        "numerics.weighted(probs.astype(r.values.dtype),",
        "numerics.weighted(jnp.round(probs).astype(r.values.dtype),",
        (V,),
    ),
    Mutation(
        "the largest logit is shown for hidden rows",
        "_losses/softmax.py",
        "max_logit=rows.row_value(r, rows.largest(r))",
        "max_logit=rows.largest(r)",
        (V,),
    ),
    Mutation(
        "positive weight on both terms",
        "_losses/sigmoid.py",
        "numerics.weighted(1 - t, numerics.softplus(z)), where)",
        "numerics.weighted(1 - positive, numerics.softplus(z)), where)",
        (V,),
    ),
    Mutation(
        "smoothing of bits towards 1", "_losses/sigmoid.py", "jnp.asarray(smoothing, dtype) / 2", "jnp.asarray(smoothing, dtype)", (V,)
    ),
    Mutation(
        "hidden bits not selected on the way in",
        "_losses/sigmoid.py",
        "z, t = jnp.where(where, z, 0), jnp.where(where, t, 0)",
        "pass",
        (M,),
    ),
    Mutation("sign of the bound", "_losses/robust.py", "- reverse * bound", "+ reverse * bound", (V,)),
    Mutation(
        "soft labels sum to 1",
        "_core/surprises.py",
        "(1 - beta) * total / jnp.maximum",
        "(1 - beta) / jnp.maximum",
        (FAMILY,),
    ),
    Mutation(
        "a tie of the largest classes",
        "_core/surprises.py",
        "total / jnp.maximum(ties, 1))",
        "total)",
        (FAMILY,),
    ),
    Mutation("hard and soft bootstrapping exchanged", "_losses/robust.py", "if hard:", "if not hard:", (V,)),
    Mutation("last term of Taylor's series", "_losses/robust.py", "range(order - 1, 0, -1)", "range(order - 1, 1, -1)", (V,)),
    Mutation("noise matrix transposed", "_losses/noise.py", "_log(x).T)", "_log(x))", (V,)),
    Mutation(
        "each device takes the classes of the first",
        "_core/rows.py",
        "lax.dynamic_slice_in_dim(per_class, lax.axis_index(rows.axis_name) * size, size",
        "lax.dynamic_slice_in_dim(per_class, 0, size",
        (SHARDED,),
    ),
    Mutation(
        "p^(2 − t1) with another sign",
        "_losses/tempered.py",
        "-(1 + alpha)[..., None] * u)  # p^(2 − t1)",
        "-(1 - alpha)[..., None] * u)",
        (V,),
    ),
    Mutation("three steps of Halley's method", "_losses/tempered.py", "_STEPS = 7", "_STEPS = 3", (V, FAMILY)),
    Mutation("prior subtracted", "_losses/imbalance.py", "weighted(jnp.asarray(tau", "weighted(-jnp.asarray(tau", (V,)),
    Mutation(
        "the smallest count of one device only",
        "_losses/imbalance.py",
        "fewest = rows.class_minimum(r, present)",
        "fewest = jnp.min(present)",
        (SHARDED,),
    ),
    Mutation(
        "counts are differentiated",
        "_losses/imbalance.py",
        "jnp.maximum(lax.stop_gradient(class_counts.astype(dtype)), 1)",
        "jnp.maximum(class_counts.astype(dtype), 1)",
        (FAMILY, f"{PROPERTIES}/test_hidden.py"),
    ),
    Mutation("angle added with another sign", "_losses/margin.py", "- jnp.sin(m2) *", "+ jnp.sin(m2) *", (V,)),
    Mutation(
        "keys that do not count are negatives",
        "_contrastive/losses.py",
        "own, class_mask=counts)",
        "own)",
        (ROWS, f"{PROPERTIES}/test_functions_everywhere.py"),
    ),
    Mutation(
        "an example is its own positive",
        "_contrastive/losses.py",
        "_shares(others & _same(label, all_labels), s.dtype)",
        "_shares(_same(label, all_labels), s.dtype)",
        (ROWS,),
    ),
    Mutation(
        "embeddings are not gathered",
        "_contrastive/embeddings.py",
        "return lax.all_gather(x, options.axis_name, tiled=True)",
        "return x",
        (f"{FAMILIES}/test_contrastive_sharded.py",),
    ),
    Mutation(
        "positions of the first device",
        "_contrastive/embeddings.py",
        "lax.axis_index(options.axis_name) * x.shape[0]",
        "0",
        (f"{FAMILIES}/test_contrastive_sharded.py",),
    ),
    Mutation(
        "expected counts added",
        "_many_classes/sampled.py",
        "scores.sampled - numerics.finite(scores.log_expected)",
        "scores.sampled + numerics.finite(scores.log_expected)",
        (ROWS, f"{FAMILIES}/test_sampled.py"),
    ),
    Mutation(
        "only repeated candidates are negatives",
        "_many_classes/sampled.py",
        "(ids[:, None] != ids[None, :]) | jnp.eye",
        "(ids[:, None] == ids[None, :]) | jnp.eye",
        (ROWS, f"{FAMILIES}/test_sampled.py"),
    ),
    Mutation(
        "one cluster too far",
        "_many_classes/hierarchical.py",
        "cutoffs[0] + cluster - 1)",
        "cutoffs[0] + cluster)",
        (ROWS, f"{FAMILIES}/test_hierarchical.py"),
    ),
    Mutation("sign of a decision", "_many_classes/hierarchical.py", "numerics.softplus(-sign * z)", "numerics.softplus(sign * z)", (ROWS,)),
    Mutation(
        "alias of a class that is full",
        "_many_classes/samplers.py",
        "jnp.where(kept, hit, alias[hit])",
        "hit",
        (f"{FAMILIES}/test_samplers.py",),
    ),
    Mutation(
        "unique draws are counted as draws with replacement",
        "_many_classes/samplers.py",
        "if not unique or count == 1:",
        "if True:",
        (f"{FAMILIES}/test_samplers.py",),
    ),
    Mutation(
        "a confidence at an edge falls into the next bin",
        "metrics/_calibration.py",
        "index = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1)",
        "index = jnp.clip(jnp.floor(confidence * bins), 0, bins - 1)",
        (f"{FAMILIES}/test_metrics_calibration.py",),
    ),
    Mutation(
        "labels and predictions exchanged",
        "metrics/_confusion.py",
        "(classes, classes), labels, predictions)",
        "(classes, classes), predictions, labels)",
        (f"{FAMILIES}/test_metrics.py",),
    ),
    Mutation(
        "a tie counts as a win",
        "metrics/_ranking.py",
        "(up_to[first].astype(dtype) + up_to[after].astype(dtype)) / 2",
        "up_to[after].astype(dtype)",
        (f"{FAMILIES}/test_metrics_ranking.py", f"{FAMILIES}/test_metrics.py"),
    ),
    Mutation(
        "the last of tied classes",
        "metrics/_examples.py",
        "(index < y if first else index > y)",
        "(index > y if first else index < y)",
        (f"{FAMILIES}/test_metrics.py",),
    ),
    Mutation(
        "the square of the inverse temperature",
        "metrics/_temperature.py",
        "return _counts.figure(1 / beta, invalid)",
        "return _counts.figure(1 / beta**2, invalid)",
        (f"{FAMILIES}/test_metrics_calibration.py",),
    ),
    Mutation(
        "NaN in a result is passed on",
        "_checked.py",
        'if (place := _first_nan({"result": result})) is not None:',
        "if (place := None) is not None:",
        (f"{PROPERTIES}/test_checked.py",),
    ),
    Mutation(
        "the mixture of JS without a half",
        "information/_jensen_shannon.py",
        "(a.p + b.p) / 2",
        "(a.p + b.p)",
        (ROWS, f"{FAMILIES}/test_information.py"),
    ),
    Mutation(
        "the gradient of KL in the second distribution",
        "information/_cross_entropy.py",
        "slope = differences.with_slope_of(-jnp.expm1(finite),",
        "slope = differences.with_slope_of(jnp.expm1(finite),",
        (ROWS, f"{FAMILIES}/test_information.py"),
    ),
    Mutation(
        "the order of Renyi's power",
        "information/_renyi.py",
        "a.log + (alpha - 1) * d)  # log",
        "a.log + alpha * d)  # log",
        (ROWS, f"{FAMILIES}/test_information.py"),
    ),
    Mutation(
        "the sign of a residual over its variance",
        "_losses/likelihood.py",
        "square, log_v = r * (r / v), jnp.log(v)",
        "square, log_v = r * (r / v), -jnp.log(v)",
        (ROWS, f"{FAMILIES}/test_likelihood.py"),
    ),
    Mutation(
        "a large count without its rate",
        "_losses/likelihood.py",
        "saddle = n * differences.exponential_excess(rate - jnp.log(n))",
        "saddle = n * differences.exponential_excess(rate)",
        (ROWS, f"{FAMILIES}/test_likelihood.py"),
    ),
    Mutation(
        "gradients of closed-over arrays in their own dtype",
        "_linear/chunks.py",
        "closed_over=jax.tree.map(lambda g: g.astype(numerics.accumulation_dtype(g.dtype)), closed_over_bar)",
        "closed_over=closed_over_bar",
        (LINEAR,),
    ),
    Mutation(
        "hidden examples are not replaced by zeros",
        "_linear/inputs.py",
        "chunk._replace(hidden=zero_outside(chunk.where, chunk.hidden), args=",
        "chunk._replace(hidden=chunk.hidden, args=",
        (LINEAR,),
    ),
    Mutation(
        "the gradient of the bias counts one example", "_linear/chunks.py", "jnp.sum(logits_bar, axis=0)),", "logits_bar[0]),", (LINEAR,)
    ),
    Mutation(
        "each chunk replaces the sums",
        "_linear/chunks.py",
        "sums = jax.tree.map(jnp.add, before._replace(layer=before.layer._replace(kernel=None)), sums)",
        "pass",
        (LINEAR,),
    ),
    Mutation(
        "the sum over the devices of the examples",
        "_linear/fused.py",
        "return mesh.psum(value, options.token_axes), aux",
        "return value, aux",
        (SHARDED,),
    ),
    Mutation(
        "the mean without the weights of other devices",
        "_linear/fused.py",
        "weight = mesh.psum(jnp.sum(w), options.token_axes)",
        "weight = jnp.sum(w)",
        (SHARDED,),
    ),
    Mutation(
        "the softcap without its tanh",
        "_linear/fused.py",
        "logits = cap * jnp.tanh(logits / cap)",
        "logits = cap * (logits / cap)",
        (LINEAR,),
    ),
    Mutation(
        "the chunks in another order",
        "_linear/layout.py",
        "x = jnp.moveaxis(x.reshape(chunks, self.outer, self.chunk, *trailing), 0, 1)",
        "x = x.reshape(self.outer, chunks, self.chunk, *trailing)",
        (LINEAR,),
    ),
    Mutation(
        "a weight of 0 does not silence infinity",
        "_linear/inputs.py",
        "return w * jnp.where((w == 0) & ~jnp.isfinite(x), jnp.zeros_like(x), x)",
        "return w * x",
        (LINEAR,),
    ),
    Mutation(
        "a mean of nothing is 0/0",
        "_reduction.py",
        "divisor = jnp.where(empty, jnp.ones_like(weight), weight).astype(dtype)",
        "divisor = weight.astype(dtype)",
        (f"{FAMILIES}/test_reduction.py",),
    ),
    Mutation(
        "the last examples are in no block",
        "_core/blocks.py",
        "lax.fori_loop(0, -(-examples // size), step",
        "lax.fori_loop(0, examples // size, step",
        (f"{PROPERTIES}/test_blocks.py",),
    ),
    Mutation(
        "blocks on several devices",
        "_core/blocks.py",
        'getattr(place.axis_context, "num_devices", None) != 1',
        'getattr(place.axis_context, "num_devices", None) is None',
        (f"{PROPERTIES}/test_blocks.py",),
    ),
    Mutation(
        "log-ratios keep the rounding of the log-sums",
        "_core/log_ratio.py",
        "return Pair(p, q, delta - error, change - q * error)",
        "return Pair(p, q, delta - 0 * error, change - q * error)",
        (f"{FAMILIES}/test_distillation.py",),
    ),
    Mutation(
        "all other classes are the rest of the most likely class too",
        "_losses/tempered.py",
        "others = rows.class_sum(r, numerics.where(largest, 0, power))",
        "others = rows.class_sum(r, power)",
        (V, G),
    ),
    Mutation(
        "a mean is subtracted once, so that a confident class keeps its rounding",
        "_core/log_ratio.py",
        "return product(rest, mean, rest)",
        "return product(rest, mean)",
        (f"{FAMILIES}/test_distillation.py",),
    ),
    Mutation(
        "a mean without other devices",
        "_reduction.py",
        "(pair if axis_name is None else pair.psum(axis_name)).mean()",
        "pair.mean()",
        (f"{FAMILIES}/test_reduction.py", f"{FAMILIES}/test_metrics_merging.py"),
    ),
    Mutation(
        "mass that is stranded at the end is not lost",
        "_sequence/lattice.py",
        "lost += jnp.sum(scaled.plain(state) * (1 - scaled.plain(e)), axis=-1)",
        "lost += 0 * jnp.sum(scaled.plain(state), axis=-1)",
        (
            TRANSDUCER,
            CTC,
        ),
    ),
    Mutation(
        "frames after the end pass derivatives through their edges",
        "_sequence/lattice.py",
        "return jax.tree.map(lambda x, y: jnp.where(live[..., None], x, y), earlier, bar), of_x, of_shared",
        "return earlier, of_x, of_shared",
        (CTC,),
    ),
    Mutation(
        "the logarithm of 2 without its last digits",
        "_sequence/scaled.py",
        "(jnp.log(m) + x.exponent * _LOW) + x.exponent * _HIGH",
        "jnp.log(m) + x.exponent * _HIGH",
        (CTC,),
    ),
    Mutation(
        "equal labels need no blank between them",
        "_sequence/ctc.py",
        "y[..., 1:] != y[..., :-1]]",
        "y[..., 1:] == y[..., 1:]]",
        (CTC,),
    ),
    Mutation(
        "no derivative along the edges that skip a blank",
        "_sequence/ctc.py",
        "along(before.label, to_label, skipping, to_blank)",
        "along(before.label, to_label, to_blank)",
        (CTC,),
    ),
    Mutation(
        "the probability of all other classes without the derivative of the normalizer",
        "_sequence/frames.py",
        "of_rest = inside * by_rest - rest * by_index",
        "of_rest = by_rest",
        (
            CTC,
            TRANSDUCER,
        ),
    ),
    Mutation(
        "a repeated class is lost twice",
        "_sequence/ctc.py",
        "out = (first & ~(own[..., :1] | onward | own))",
        "out = (~(own[..., :1] | onward | own))",
        (CTC,),
    ),
    Mutation(
        "the derivative of a certain class as a difference",
        "_sequence/frames.py",
        "numerics.where(pivot, of_pivot, of_index - by_all[..., None])",
        "of_index - by_all[..., None]",
        (CTC,),
    ),
    Mutation(
        "a forbidden last tag is possible",
        "_sequence/crf.py",
        "none |= jnp.any(live, axis=-1) & (gold[2] == -jnp.inf)",
        "pass",
        (CRF,),
    ),
    Mutation(
        "infinities are replaced before the largest logit is subtracted",
        "_core/numerics.py",
        "return finite(where(x == -jnp.inf, x, lax.clamp(-most, x, most) - m))",
        "return finite(x) - m",
        (f"{PROPERTIES}/test_accuracy.py",),
    ),
    Mutation(
        "the last blank before all labels is not lost",
        "_sequence/transducer.py",
        "blank = inside & ((t < ends - 1) | (u == all_labels))",
        "blank = inside",
        (TRANSDUCER,),
    ),
    Mutation(
        "FastEmit raises the gradient of blanks too",
        "_sequence/transducer.py",
        "weights(lax.stop_gradient(blanks), None)",
        "weights(blanks, None)",
        (TRANSDUCER,),
    ),
    Mutation(
        "the sign of FastEmit",
        "_sequence/transducer.py",
        "differences.with_slope_of(loss, -labels_only)",
        "differences.with_slope_of(loss, labels_only)",
        (TRANSDUCER,),
    ),
    Mutation(
        "no derivative along the transition of the labels",
        "_sequence/crf.py",
        "return moved + by_gold, of_x",
        "return moved, of_x",
        (CRF,),
    ),
    Mutation(
        "the labels count among the other taggings",
        "_sequence/crf.py",
        "jnp.where(here, jnp.full_like(leaving, -jnp.inf), compared(here, leaving, gold[1]))",
        "compared(here, leaving, gold[1])",
        (CRF,),
    ),
    Mutation(
        "a length that is too large is the largest",
        "_sequence/arguments.py",
        "valid &= ~_outside(lengths, high)",
        "valid &= lengths >= 0",
        (
            CTC,
            TRANSDUCER,
        ),
    ),
    Mutation(
        "repeats are not merged",
        "_sequence/decoding.py",
        "(best != blank) & (best != before) & live",
        "(best != blank) & live",
        (CTC,),
    ),
    Mutation(
        "the best alignment skips blanks between equal labels",
        "_sequence/decoding.py",
        "moved[2] = jnp.where(skips, moved[2], -jnp.inf)",
        "pass",
        (CTC,),
    ),
    Mutation(
        "a path of a token-and-duration transducer ends with a label",
        "_sequence/tdt.py",
        "(d < frames_left) & (labels_left > 0))",
        "(d <= frames_left) & (labels_left > 0))",
        (TDT,),
    ),
    Mutation(
        "the blank has duration 0 in the mass that is lost",
        "_sequence/tdt.py",
        "(labels_left == 0))) & (d > 0),",
        "(labels_left == 0))),",
        (TDT,),
    ),
    Mutation(
        "the mass that σ takes is not lost",
        "_sequence/tdt.py",
        "lost * jnp.exp(-sigma) - jnp.expm1(-sigma)",
        "lost * jnp.exp(-sigma)",
        (TDT,),
    ),
    Mutation(
        "no derivative through the blanks of a token-and-duration transducer",
        "_sequence/tdt.py",
        "return (by_class[0] + by_class[1], *of_waiting)",
        "return (by_class[1], *of_waiting)",
        (TDT,),
    ),
    Mutation(
        "the product takes the tangent of another class",
        "_sequence/frames.py",
        "matrix = (local == class_index)",
        "matrix = (local == class_index + 1)",
        (CTC,),
    ),
    Mutation(
        "frames after the end count",
        "_sequence/ctc.py",
        "        live = arguments.inside(sequences.steps, live)",
        "        pass",
        (CTC,),
    ),
    Mutation(
        "labels after the end count",
        "_sequence/transducer.py",
        "(most, sequences.counts)))",
        "(most, None)))",
        (TRANSDUCER,),
    ),
    Mutation(
        "scores below −2⁹⁰ forbid a path",
        "_sequence/scaled.py",
        "zero = lax.stop_gradient(x) == -jnp.inf",
        "zero = lax.stop_gradient(x) < -(2.0**90)",
        (HUGE_SCORES,),
    ),
    Mutation(
        "differences of huge logits are bounded",
        "_sequence/frames.py",
        "lax.clamp(-most, z, most) - m[..., None]))",
        "numerics.finite(z - m[..., None])))",
        (HUGE_SCORES,),
    ),
    Mutation(
        "log-probabilities of durations are bounded",
        "_sequence/tdt.py",
        "log_q, _ = frames.probabilities(v, every)",
        "log_q = jnp.maximum(frames.probabilities(v, every)[0], -numerics.INFINITE)",
        (HUGE_SCORES,),
    ),
    Mutation(
        "of taggings with equal scores, the last comes first",
        "_sequence/tagging.py",
        "jnp.argmax(sums, axis=-1).astype(jnp.int32)",
        "(sums.shape[-1] - 1 - jnp.argmax(sums[..., ::-1], axis=-1)).astype(jnp.int32)",
        (CRF,),
    ),
    Mutation(
        "a sequence without positions has several taggings",
        "_sequence/tagging.py",
        "score.ndim - 1) > 0)",
        "score.ndim - 1) > 1)",
        (CRF,),
    ),
    Mutation(
        "the best tagging ends with positions that do not count",
        "_sequence/tagging.py",
        "return jnp.where(live[..., None, None], following, alpha), back",
        "return following, back",
        (CRF,),
    ),
    Mutation(
        "false positives and false negatives exchanged",
        "_losses/overlap.py",
        "beta * rest, alpha * p)",
        "alpha * rest, beta * p)",
        (
            ROWS,
            OVERLAP,
        ),
    ),
    Mutation(
        "a large probability minus its label, rounded",
        "_losses/overlap.py",
        "numerics.where(p > numerics.MOST, (1 - t) - rest, p - t)",
        "p - t",
        (OVERLAP,),
    ),
    Mutation(
        "the steps of the Jaccard loss for the other label",
        "_losses/overlap.py",
        "(left * (1 - t) + before * t)",
        "(left * t + before * (1 - t))",
        (
            ROWS,
            OVERLAP,
        ),
    ),
    Mutation(
        "the sign of the second derivative rule of a quotient",
        "_losses/overlap.py",
        "- share * tangents[1]) * _reciprocal",
        "+ share * tangents[1]) * _reciprocal",
        (
            ROWS,
            OVERLAP,
        ),
    ),
    Mutation(
        "hidden pixels count in the mean of the boundary loss",
        "_losses/overlap.py",
        "counted = jnp.ones(r.values.shape[:-1], bool) if r.where is None else r.where",
        "counted = jnp.ones(r.values.shape[:-1], bool)",
        (OVERLAP,),
    ),
    Mutation(
        "a class exists only if it exists at every pixel",
        "_losses/overlap.py",
        "numerics.where(jnp.any(r.class_mask, axis=axes), loss, 0)",
        "numerics.where(jnp.all(r.class_mask, axis=axes), loss, 0)",
        (OVERLAP,),
    ),
    Mutation(
        "soft labels of 0 are present",
        "_losses/overlap.py",
        "r.given_labels > 0",
        "r.given_labels >= 0",
        (OVERLAP,),
    ),
    Mutation(
        "the sign of the hinge",
        "_losses/overlap.py",
        "numerics.where(y == 1, z, -z)",
        "numerics.where(y == 1, -z, z)",
        (ROWS,),
    ),
    Mutation(
        "the gradient of the most likely class of a pixel as a difference",
        "_core/probabilities.py",
        "numerics.where(pivot, rest * moved - by_others, moved - (by_others + by_pivot))",
        "(moved - (by_others + by_pivot))",
        (OVERLAP,),
    ),
    Mutation(
        "the difference of two differences is rounded twice",
        "_core/differences.py",
        "return with_slope_of(outer + (rest + (lost - lost_too)), (a - b) - (c - d))",
        "return (a - b) - (c - d)",
        (ACCURACY,),
    ),
    Mutation(
        "the odds of a certain answer are infinite",
        "preference/_pairs.py",
        "jnp.maximum(-x, 2.0**-60)",
        "-x",
        (f"{FAMILIES}/test_preference.py",),
    ),
    Mutation(
        "the reference point of KTO is differentiated",
        "preference/_answers.py",
        "lax.stop_gradient(kl)",
        "kl",
        (f"{FAMILIES}/test_preference.py",),
    ),
    Mutation(
        "a clipped ratio overflows in the gradient",
        "policy/_losses.py",
        "jnp.exp(numerics.where(clipped, 0, d))",
        "jnp.exp(d)",
        (POLICY,),
    ),
    Mutation(
        "the old policy is differentiated",
        "policy/_losses.py",
        "lax.stop_gradient(old)",
        "old",
        (POLICY,),
    ),
    Mutation(
        "the excess of an exponential as a difference",
        "policy/_losses.py",
        "differences.exponential_excess(d)",
        "jnp.expm1(d) - d",
        (ACCURACY,),
    ),
    Mutation(
        "equal rewards differ from their rounded mean",
        "policy/_advantages.py",
        "r - lax.stop_gradient(over_group(jnp.max, r, -jnp.inf))",
        "r",
        (POLICY,),
    ),
    Mutation("a weighted infinity is a number", "_core/numerics.py", "lax.stop_gradient(sign) * INFINITE", "0 * sign", (HUGE,)),
    Mutation("a large number is infinite", "_core/numerics.py", "_LARGEST = INFINITE / 2", "_LARGEST = 2.0**80", (HUGE,)),
    Mutation(
        "adjusted logits are stored in float32",
        "_core/rows.py",
        "Adjustment(raw, m[..., None], terms, change) if rows.half else None",
        "None",
        (f"{PROPERTIES}/test_memory.py",),
    ),
    Mutation(
        "sums over classes are repeated in the backward pass",
        "_linear/chunks.py",
        "return axes <= 1 < max((x.ndim for x in operands), default=0)",
        "return False",
        (f"{LINEAR}/test_linear_programs.py",),
    ),
    Mutation(
        "a bound on rounded log-probabilities in the dtype of a block",
        "_losses/top_k_teacher.py",
        "_negative_tail(log_p, rounded_to)",
        "_negative_tail(log_p, log_p.dtype)",
        (f"{FAMILIES}/test_top_k_teacher.py",),
    ),
)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on the faulty copy; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".pytest_cache", "__pycache__", "output", "*.ipynb"))
        path = copy / "xentjax" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.name}: the line must occur once in {mutation.file}; got {text.count(mutation.old)} times.")
        path.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *mutation.tests]
        programs = ROOT / ".pytest_cache" / "d" / "programs"  # those of the code as it is are still right
        environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": str(programs)}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
    return found.group(1) if found else f"exit status {run.returncode}"


def main() -> int:
    """Makes the faults and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="faults to make; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    print("| fault | file | caught by |\n|---|---|---|")
    survived = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutation, test in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += test is None
            print(f"| {mutation.name} | {mutation.file} | {f'`{test}`' if test else '**survived**'} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} faults were caught.")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
