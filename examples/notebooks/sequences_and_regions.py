# %% [markdown]
# # Sequences and regions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/sequences_and_regions.ipynb)
#
# Cross-entropy compares each prediction with its label separately. Some problems have a structure that cross-entropy does not use:
#
# | problem | structure | loss |
# |---|---|---|
# | speech: a few labels for many frames | it is not known which frame belongs to which label | `ctc_loss` |
# | tagging: one tag for each position | a tag depends on the tag before it | `crf_loss` |
# | segmentation: one class for each pixel | a small region is as important as a large one | `dice_loss` |
#
# For each problem, this notebook trains a small model. The data is generated here, or comes with scikit-learn.

# %% [markdown]
# ## Install
#
# On Colab, the next cell installs the packages that this notebook uses. Elsewhere the cell does nothing. In that case, run
# `pip install git+https://github.com/xentjax/xentjax optax matplotlib scikit-learn` once.

# %%
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q git+https://github.com/xentjax/xentjax optax matplotlib scikit-learn")

# %%
from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import xentjax
from xentjax import sequence

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
rng = np.random.default_rng(0)


# %% [markdown]
# The same loop trains all models. A model is a list of arrays.


# %%
def train(loss, parameters, batches, rate=3e-3):
    """The parameters after one Adam step for each batch, and the losses."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(parameters, state, batch):
        value, slopes = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(parameters, updates), state, value

    state, losses = optimizer.init(parameters), []
    for batch in batches:
        parameters, state, value = step(parameters, state, batch)
        losses.append(value)
    return parameters, np.array(losses)


def kernels(*shapes):
    """Random kernels. All axes but the last one are summed over."""
    return [jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32) for shape in shapes]


def convolve(x, kernel):
    """Convolutions over one or two axes of space or time. The channels are on the last axis."""
    axes = "WH"[: kernel.ndim - 2]
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(axes), "SAME", dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"))


# %% [markdown]
# ## Speech: labels without an alignment
#
# There are six sounds, and each has a spectrum of 20 numbers. A recording has five sounds. Each sound lasts 2 to 5 frames, and there are
# pauses and noise. The labels give the order of the sounds, but not their times.
#
# CTC adds one class, the blank, for frames without a label. Its loss is $-\log \sum_\pi \prod_t p_t(\pi_t)$. The sum runs over all
# alignments $\pi$ of the labels. An alignment has one class for each frame. If repeats are merged and then blanks are removed, the result
# is the labels.

# %%
SOUNDS, FRAMES, SAID = 6, 40, 5
SPECTRA = rng.uniform(size=(SOUNDS + 1, 20)) * (np.arange(SOUNDS + 1) > 0)[:, None]  # class 0 is silence


def recordings(n):
    """Spectrograms [n, frames, 20], labels [n, 5], and the class that is heard in each frame [n, frames]."""
    labels, heard = rng.integers(1, SOUNDS + 1, (n, SAID)), np.zeros((n, FRAMES), int)
    for i in range(n):
        t = rng.integers(1, 4)
        for label in labels[i]:
            length = rng.integers(2, 6)
            heard[i, t : t + length] = label
            t += length + rng.integers(1, 4)
    return np.float32(SPECTRA[heard] + 0.35 * rng.normal(size=(n, FRAMES, 20))), np.int32(labels), heard


def speech_model(parameters, x):
    first, second, last = parameters
    return convolve(jax.nn.relu(convolve(jax.nn.relu(convolve(x, first)), second)), last)


def speech_loss(parameters, x, labels):
    return xentjax.weighted_mean(xentjax.ctc_loss(speech_model(parameters, x), labels))


start = kernels((5, 20, 48), (5, 48, 48), (1, 48, SOUNDS + 1))
speech, losses = train(speech_loss, start, (recordings(32)[:2] for _ in range(300)))
print(f"loss: {losses[0]:.1f} nats per recording at the start, {losses[-20:].mean():.2f} at the end")

# %% [markdown]
# `ctc_greedy_decode` takes the best class of each frame, merges repeats, and removes blanks. The label error rate is the smallest number of
# insertions, deletions and substitutions that change the result into the labels, divided by the number of labels.


# %%
def edits(a, b):
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        row, before = np.full_like(row, i), row
        for j, y in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
    return row[-1]


def label_error(parameters, x, labels):
    ids, counts = map(np.asarray, sequence.ctc_greedy_decode(speech_model(parameters, x)))
    return sum(edits(ids[i, : counts[i]], labels[i]) for i in range(len(x))) / labels.size


x, labels, heard = recordings(200)
before, after = label_error(start, x, labels), label_error(speech, x, labels)
print(f"label error rate on new recordings: {100 * before:.0f} % at the start, {100 * after:.1f} % at the end")
assert after < 0.05

# %% [markdown]
# The model has learned the times of the sounds, although the labels do not contain times. The posterior probabilities show this.
# `ctc_posteriors` returns the probability that a frame belongs to a label, under the condition that the labels are right.

# %%
logits = speech_model(speech, x[:1])[0]
posteriors = np.asarray(sequence.ctc_posteriors(logits, labels[0]))
fig, axes = plt.subplots(3, 1, figsize=(7.5, 5.2), sharex=True, height_ratios=(2, 2, 1))
axes[0].imshow(x[0].T, aspect="auto", cmap="magma", origin="lower")
axes[0].set(title="A recording", ylabel="spectrum", yticks=[])
axes[1].imshow(posteriors[:, 1:].T, aspect="auto", cmap="Blues", vmin=0, vmax=1)
axes[1].set(title="Probability that a frame belongs to a label", ylabel="label", yticks=range(SAID), yticklabels=labels[0])
axes[2].imshow(heard[:1], aspect="auto", cmap="tab10", vmin=0, vmax=9)
axes[2].set(title="What was said, which the model never saw", xlabel="frame", yticks=[])
for t in np.flatnonzero(np.diff(heard[0], prepend=0) * heard[0]):
    axes[2].text(t + 0.5, 0, heard[0, t], color="white", va="center", weight="bold")
plt.show()

# %% [markdown]
# ### When the model is certain
#
# The usual algorithm computes the probability $p$ of the labels, and then $-\log p$. If $p$ is near 1, the result consists mostly of
# rounding errors. `ctc_loss` adds up the probability of everything else instead, so a small loss has a small relative error. The next cell
# compares both results with the exact loss, which it computes with 60 decimal digits. The margin of the right classes grows.


# %%
def forward(p, labels, zero):
    """The probability of the labels, from the probabilities p [frames, classes], in the arithmetic of `p`."""
    path = [0, *(k for label in labels for k in (label, 0))]
    alpha = [p[0][k] if i < 2 else zero for i, k in enumerate(path)]
    for row in p[1:]:
        earlier = [zero, *alpha], [zero, zero, *alpha]
        skips = [i > 1 and k not in (0, path[i - 2]) for i, k in enumerate(path)]
        alpha = [(alpha[i] + earlier[0][i] + (earlier[1][i] if skips[i] else zero)) * row[k] for i, k in enumerate(path)]
    return alpha[-1] + alpha[-2]


getcontext().prec = 60
said, spoken = [1, 2, 2, 3], np.array([0, 1, 1, 0, 2, 0, 2, 2, 0, 3])
margins, errors = np.array([2, 4, 8, 12, 16, 20, 30, 40]), []
for margin in margins:
    z = np.float32(margin * np.eye(4)[spoken])
    powers = [[Decimal(float(v)).exp() for v in row] for row in z]
    exact = -forward([[v / sum(row) for v in row] for row in powers], said, Decimal(0)).ln()
    usual = -np.log(forward(np.asarray(jax.nn.softmax(z)), said, np.float32(0)))
    found = [float(x) for x in (usual, xentjax.ctc_loss(z, np.array(said)))]
    errors.append([float(abs((Decimal(x) - exact) / exact)) for x in found])
errors = np.array(errors)
fig, ax = plt.subplots(figsize=(6, 3))
ax.semilogy(margins, np.maximum(errors[:, 0], 1e-8), "o-", color="#D55E00", label="usual algorithm")
ax.semilogy(margins, np.maximum(errors[:, 1], 1e-8), "o-", color="#0072B2", label="xentjax.ctc_loss")
ax.set(xlabel="margin of the right class in every frame, in nats", ylabel="relative error", title="CTC loss in float32")
ax.grid(alpha=0.3)
ax.legend()
plt.show()
assert errors[:, 1].max() < 1e-5 and errors[-1, 0] > 0.5

# %% [markdown]
# ## Tags that depend on their neighbors
#
# Each word has a tag: O for a word outside of every name, B for the first word of a name, and I for all other words of a name. After O, the
# tag I is impossible. A classifier that predicts each tag separately cannot use this rule.
#
# A conditional random field adds a score for each pair of neighboring tags. Its loss is $-\log \big( e^{s(y)} / \sum_v e^{s(v)} \big)$,
# where $s(y)$ is the sum of the scores of tagging $y$, and $v$ runs over all taggings.

# %%
TAGS, WORDS = ("O", "B", "I"), 24
CHANCES = np.array([[0.75, 0.25, 0.0], [0.2, 0.1, 0.7], [0.3, 0.1, 0.6]])  # of a tag (row) to be followed by another (column)


def sentences(n):
    """Evidence [n, words, 3] about the tag of each word, and the tags [n, words]."""
    tags = np.zeros((n, WORDS), int)
    for i in range(n):
        for t in range(WORDS):
            tags[i, t] = rng.choice(3, p=CHANCES[tags[i, t - 1]] if t else CHANCES[0])
    return np.float32(np.eye(3)[tags] + 0.8 * rng.normal(size=(n, WORDS, 3))), tags


def alone(parameters, x, tags):
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(x @ parameters[0], tags))


def chain(parameters, x, tags):
    return xentjax.weighted_mean(xentjax.crf_loss(x @ parameters[0], tags, parameters[1])) / WORDS


batches = [sentences(32) for _ in range(200)]
by_word, _ = train(alone, [jnp.zeros((3, 3))], batches, rate=0.05)
by_chain, _ = train(chain, [jnp.zeros((3, 3)), jnp.zeros((3, 3))], batches, rate=0.05)

x, tags = sentences(500)
guesses = {
    "each word alone": np.argmax(x @ by_word[0], axis=-1),
    "conditional random field": np.asarray(sequence.crf_decode(x @ by_chain[0], by_chain[1])[0]),
}
accuracy = {}
for name, guess in guesses.items():
    accuracy[name], impossible = (guess == tags).mean(), ((guess[:, 1:] == 2) & (guess[:, :-1] == 0)).sum()
    print(f"{name}: {100 * accuracy[name]:.1f} % of the tags are right, {impossible} times I after O")
assert accuracy["conditional random field"] > accuracy["each word alone"] + 0.05

# %% [markdown]
# The learned scores of neighboring tags agree with the probabilities that generated the data. For example, I never follows O.

# %%
fig, axes = plt.subplots(1, 2, figsize=(6, 2.8))
learned = np.asarray(by_chain[1])
for ax, table, title in ((axes[0], CHANCES, "Chances in the data"), (axes[1], learned - learned.max(-1, keepdims=True), "Learned scores")):
    ax.imshow(table, cmap="Blues")
    for i in range(3):
        for j in range(3):
            ax.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 1})
    ax.set(title=title, xticks=range(3), yticks=range(3), xticklabels=TAGS, yticklabels=TAGS, xlabel="next tag", ylabel="tag")
plt.show()

# %% [markdown]
# ## Regions in pictures
#
# A scene has three handwritten digits. For each pixel, the model predicts which digit covers it, or that the pixel is background. Most
# pixels are background, so cross-entropy is small even if the model misses a digit. The Dice loss compares regions. For each image and
# class, it is $1 - 2\sum_n p_n t_n / (\sum_n p_n + \sum_n t_n)$. The second model is trained with the sum of cross-entropy and the Dice
# loss.

# %%
DIGITS = load_digits()
SIDE, CLASSES = 28, 11  # class 0 is background, class d + 1 is the digit d


def scenes(n, first, last):
    """Pictures [n, 28, 28, 1] and the class of each pixel [n, 28, 28], from the digits `first` to `last` of the data set."""
    pictures, classes = np.zeros((n, SIDE, SIDE), np.float32), np.zeros((n, SIDE, SIDE), int)
    for i in range(n):
        for _ in range(3):
            k, (row, column) = rng.integers(first, last), rng.integers(0, SIDE - 8, 2)
            ink = DIGITS.images[k] / 16
            place = np.s_[i, row : row + 8, column : column + 8]
            pictures[place] = np.maximum(pictures[place], ink)
            classes[place] = np.where(ink > 0.4, DIGITS.target[k] + 1, classes[place])
    return pictures[..., None] + np.float32(0.1 * rng.normal(size=(n, SIDE, SIDE, 1))), classes


def segment(parameters, pictures):
    x = pictures
    for kernel in parameters[:-1]:
        x = jax.nn.relu(convolve(x, kernel))
    return convolve(x, parameters[-1])


def pixels(parameters, pictures, classes):
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(segment(parameters, pictures), classes))


def pixels_and_regions(parameters, pictures, classes):
    logits = segment(parameters, pictures)
    present = xentjax.present_classes(logits, classes)
    dice = xentjax.weighted_mean(xentjax.dice_loss(logits, classes), where=present)
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(logits, classes)) + dice


begin = kernels((5, 5, 1, 24), (5, 5, 24, 24), (5, 5, 24, 24), (5, 5, 24, 24), (1, 1, 24, CLASSES))
batches = [scenes(12, 0, 1400) for _ in range(600)]
models = {"cross-entropy": train(pixels, begin, batches)[0], "cross-entropy + Dice": train(pixels_and_regions, begin, batches)[0]}

# %% [markdown]
# The intersection over union of the predicted and the labelled region is the number of pixels that are in both regions, divided by the
# number of pixels that are in at least one of them. It is measured for each digit on new scenes. The models have not seen the images of
# these digits.

# %%
pictures, classes = scenes(200, 1400, len(DIGITS.images))
found = {name: np.argmax(jax.jit(segment)(parameters, pictures), axis=-1) for name, parameters in models.items()}
overlap = {}
for name, guess in found.items():
    both, either = (np.array([f(guess == k, classes == k).sum() for k in range(1, CLASSES)]) for f in (np.logical_and, np.logical_or))
    overlap[name] = (both / either).mean()
    print(f"{name}: mean intersection over union {100 * overlap[name]:.1f} %")
assert overlap["cross-entropy + Dice"] > overlap["cross-entropy"] + 0.03

fig, axes = plt.subplots(3, 4, figsize=(7.5, 5.6))
shown = np.ma.masked_equal(np.stack([classes[:3], *(guess[:3] for guess in found.values())], axis=1), 0)
for i in range(3):
    axes[i, 0].imshow(pictures[i, ..., 0], cmap="gray_r")
    for j in range(3):
        axes[i, j + 1].imshow(shown[i, j], cmap="tab10", vmin=1, vmax=10, interpolation="nearest")
for ax, title in zip(axes[0], ("scene", "digits", *found), strict=True):
    ax.set_title(title, fontsize=10)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What to take away
#
# - `ctc_loss` needs no alignment, and the model learns one. The same is true of `transducer_loss`, for models that also read the previous
#   labels.
# - With `crf_loss`, a model learns which tags follow each other. `sequence.crf_decode` finds the best tagging.
# - `dice_loss` and most other losses of regions return one value for each image and class. With `present_classes` and `weighted_mean`, the
#   mean is computed over the classes that are present.
# - The losses `ctc_loss`, `transducer_loss`, `crf_loss` and `dice_loss` have accurate gradients, also if the model is nearly certain.
#
# The pages *Sequences* and *Regions and boxes* of the documentation have the details.
