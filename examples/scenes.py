"""Segmentation and detection of handwritten digits in small scenes, with several losses.

Scenes of 24 × 24 pixels hold up to four of scikit-learn's digits, and noise. A segmentation network finds the class of each pixel:
background, or one of ten digits, which cover few pixels each. A dense detector predicts, at each point of a 12 × 12 grid, a score per class
and the distances to the four sides of a box. The scenes of the report have other digits than the scenes of the training.

Run:      pip install "xentjax[examples]" && python examples/scenes.py
Takes:    65 s on two CPU cores (measured)
Prints:   two tables, and picture in examples/output/scenes.png (measured, jax 0.10, CPU, one seed: a point or two mean little)
              mean IoU of ten digits: 59.3 % (cross-entropy)   69.2 % (+ Dice)   69.1 % (+ Lovász)
              precision, recall of boxes at IoU ≥ 0.5: 93.1, 92.4 % (focal)   94.1, 94.0 % (quality focal)   94.2, 95.0 % (varifocal)
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scenes_data import GRID, SIZE, grid_targets, load_scenes
from scenes_report import BINS, detections, draw, precision_and_recall, read, region_overlap
from tqdm import tqdm

import xentjax

BATCH = 16


class Network(nnx.Module):
    """Four convolutions, each normalized; the second halves the resolution."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        sizes = ((1, 16, 3, 1), (16, 32, 4, 2), (32, 64, 3, 1), (64, 64, 3, 1))
        self.layers = nnx.List(nnx.Conv(a, b, (k, k), strides=s, rngs=rngs) for a, b, k, s in sizes)
        self.norms = nnx.List(nnx.LayerNorm(b, rngs=rngs) for _, b, _, _ in sizes)
        self.output = nnx.Linear(64, outputs, rngs=rngs)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Outputs [n, 12, 12, outputs] of pictures [n, 24, 24]."""
        values = pictures[..., None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            values = nnx.relu(norm(layer(values)))
        return self.output(values)


def train(outputs: int, loss: Callable, data: tuple, steps: int, bar: tqdm) -> Callable:
    """The function from pictures to outputs that minimizes `loss(outputs, *data)`; the first of `data` are the pictures."""
    graph, parameters = nnx.split(Network(outputs, nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    @jax.jit
    def step(parameters, state, pictures, *rest):
        value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p)(pictures), *rest))(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, rng = optimizer.init(parameters), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(data[0]), BATCH)
        parameters, state, value = step(parameters, state, *(x[rows] for x in data))
        bar.update()
    bar.set_postfix(loss=f"{value:.3f}")
    return jax.jit(lambda pictures: nnx.merge(graph, parameters)(pictures))


def pixels(outputs: jax.Array) -> jax.Array:
    """Logits [n, 24, 24, 11] from four pixels per point of the grid."""
    blocks = outputs.reshape(-1, GRID, GRID, 2, 2, 11)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 11)


def of_regions(loss: Callable) -> Callable:
    """Cross-entropy plus the mean of a loss of regions over the digits that each scene has."""

    def run(outputs, labels):
        logits = pixels(outputs)
        present = xentjax.present_classes(logits, labels).at[:, 0].set(False)  # without the background
        return xentjax.softmax_cross_entropy(logits, labels).mean() + xentjax.weighted_mean(loss(logits, labels), where=present)

    return run


SEGMENTATION = {
    "cross-entropy": lambda outputs, labels: xentjax.softmax_cross_entropy(pixels(outputs), labels).mean(),
    "+ Dice": of_regions(xentjax.dice_loss),
    "+ Lovász": of_regions(xentjax.lovasz_softmax_loss),
}


def of_boxes(loss: Callable, quality: bool) -> Callable:
    """The loss of the scores, with labels 1 or the overlap of the boxes, plus the loss of the distances, per positive point."""

    def run(outputs, kinds, targets):
        scores, sides, found = read(outputs)
        low, high = jnp.minimum(found, targets), jnp.maximum(found, targets)  # the boxes share a point, so their sides are compared
        both = (low[..., 0] + low[..., 2]) * (low[..., 1] + low[..., 3])
        areas = sum((x[..., 0] + x[..., 2]) * (x[..., 1] + x[..., 3]) for x in (found, targets))
        value = jax.lax.stop_gradient(both / (areas - both)) if quality else jnp.ones_like(both)
        positive = kinds >= 0
        labels = jax.nn.one_hot(kinds, 10) * value[..., None]
        distances = xentjax.distribution_focal_loss(sides, targets, where=jnp.broadcast_to(positive[..., None], high.shape))
        return (loss(scores, labels).sum() + distances.sum() / 4) / positive.sum()

    return run


DETECTION = {
    "focal": of_boxes(lambda z, y: xentjax.sigmoid_focal_loss(z, y, alpha=0.25), quality=False),
    "quality focal": of_boxes(xentjax.quality_focal_loss, quality=True),
    "varifocal": of_boxes(xentjax.varifocal_loss, quality=True),
}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, prints both tables and saves the picture; returns the mean overlap or the average precision of each loss."""
    parser = argparse.ArgumentParser(description="Segmentation and detection of digits in small scenes.")
    parser.add_argument("--steps", type=int, default=800, help="of each of the six networks, default 800")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "scenes.png", help="where the picture goes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    seen, unseen = load_scenes(3000, 300, seed=0)
    pictures, truth, masks, found, figures = np.float32(seen.pictures), unseen.labels, {}, {}, {}
    with tqdm(total=6 * options.steps, unit="batch", disable=options.quiet) as bar:
        for name, loss in SEGMENTATION.items():
            run = train(4 * 11, loss, (pictures, seen.labels), options.steps, bar)
            masks[name] = np.asarray(pixels(run(np.float32(unseen.pictures))).argmax(-1))
        kinds, sides = grid_targets(seen)
        for name, loss in DETECTION.items():
            run = train(10 + 4 * BINS, loss, (pictures, kinds, np.float32(sides)), options.steps, bar)
            found[name] = detections(run(np.float32(unseen.pictures)))
    print("segmentation     mean IoU of ten digits   worst digit")
    for name, mask in masks.items():
        of_digits = region_overlap(mask, truth, 11)[1:]
        figures[name] = float(of_digits.mean())
        print(f"{name:16s} {of_digits.mean():22.1%} {of_digits.min():13.1%}")
    print("detection (IoU ≥ 0.5)    precision   recall   average precision")
    for name, boxes in found.items():
        precision, recall, figures[name] = precision_and_recall(boxes, unseen.boxes, unseen.kinds, 0.5)
        print(f"{name:24s} {precision:9.1%} {recall:8.1%} {figures[name]:19.1%}")
    draw(options.output, unseen.pictures, {"labels": truth, **masks}, found)
    print(f"picture in {options.output}")
    return figures


if __name__ == "__main__":
    main()
