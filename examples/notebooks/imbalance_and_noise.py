# %% [markdown]
# # Imbalance and noise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/imbalance_and_noise.ipynb)
#
# Real data are unbalanced, mistakes have unequal costs, and some labels are wrong. This notebook measures what helps. First, a network
# diagnoses breast cancer, and a missed tumor costs more than a false alarm. Then twenty losses train the same network on digits, once
# with rare classes and once with 40 % wrong labels. Some losses gain many points of accuracy. Most do not, and the notebook shows those
# too.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import accuracy_score, f1_score, precision_recall_curve, precision_score, recall_score
from sklearn.model_selection import StratifiedKFold

import xentjax

plt.rcParams.update({"figure.dpi": 76, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"  # safe for colour-blind readers

# %% [markdown]
# ## A diagnosis
#
# The data are 569 breast tumors with 30 measurements each. 212 tumors are malignant. The network has one hidden layer and one output. The
# output is a logit $z$, the log-odds of "malignant": $p = \sigma(z) = 1 / (1 + e^{-z})$. There is no sigmoid in the network, because the
# loss takes logits:
#
# $$\ell(z, y) = -y \log \sigma(z) - (1 - y) \log \sigma(-z).$$
#
# Five networks are trained, each on four fifths of the tumors. So each tumor is held out once. The whole procedure is repeated with five
# random splits. The features are scaled with the mean and the standard deviation of the training part alone.

# %%
tumors = load_breast_cancer()
malignant = np.int32(tumors.target == list(tumors.target_names).index("malignant"))
SPLITS, FOLDS = 5, 5

seen = np.zeros((SPLITS * FOLDS, len(malignant)), bool)  # one row per network: the tumors that it is trained on
splitters = [StratifiedKFold(FOLDS, shuffle=True, random_state=seed) for seed in range(SPLITS)]
for row, (training, _) in zip(seen, (fold for s in splitters for fold in s.split(tumors.data, malignant)), strict=True):
    row[training] = True
mean, deviation = (np.stack([f(tumors.data[row], axis=0) for row in seen])[:, None] for f in (np.mean, np.std))
features = jnp.float32((tumors.data - mean) / deviation)  # [networks, tumors, 30]

# %% [markdown]
# The mask `where=seen` selects the training examples. So the arrays have the same shape for all networks, and one `jax.vmap` trains all
# of them. The weight decay is L2 regularisation. The decay was chosen on other splits of the same tumors, so the results are slightly
# optimistic.


# %%
def predict_one(params, x):
    w1, b1, w2, b2 = params
    return jax.nn.relu(x @ w1 + b1) @ w2 + b2  # one logit per tumor: shape [tumors], not [tumors, 1]


def init_one(key):
    k1, k2 = jax.random.split(key)
    return jax.random.normal(k1, (30, 32)) / np.sqrt(30), jnp.zeros(32), jax.random.normal(k2, (32,)) / np.sqrt(32), jnp.zeros(())


# %%
def fit(pos_weight, x, seen, key):
    """Logits of all tumors, from a network that is trained on those that are seen."""

    def loss(params):
        values = xentjax.sigmoid_cross_entropy(predict_one(params, x), malignant, pos_weight=pos_weight, where=seen)
        return xentjax.weighted_mean(values, where=seen)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    optimizer = optax.chain(optax.add_decayed_weights(1e-2), optax.adam(3e-3))
    params = init_one(key)
    return predict_one(jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0], x)


pos_weights = np.float32([1, 9, 99])
over_networks = jax.vmap(fit, (None, 0, 0, 0))
logits = jax.jit(jax.vmap(over_networks, (0, None, None, None)))(
    pos_weights, features, seen, jax.random.split(jax.random.key(0), len(seen))
)
held_out = np.where(seen, 0, logits).reshape(3, SPLITS, FOLDS, -1).sum(2)  # [pos_weights, splits, tumors]

# %% [markdown]
# `xentjax.metrics.confusion` counts the four outcomes. A logit above 0 is a probability above ½. Precision is the share of malignant
# tumors among those called malignant. Recall is the share of malignant tumors that are found. F1 is their harmonic mean.


# %%
def scores(predicted):
    counts = xentjax.metrics.confusion(predicted, malignant, classes=2)
    return [float(v) for v in (counts.accuracy(), counts.precision()[1], counts.recall()[1], counts.f1()[1])]


table = np.array([scores(z > 0) for z in held_out[0]])
expected = [[f(malignant, z > 0) for f in (accuracy_score, precision_score, recall_score, f1_score)] for z in held_out[0]]
print(f"held-out tumors: {len(malignant)}, malignant: {malignant.sum()}, splits: {SPLITS}\n            median     range")
for name, column in zip(("accuracy", "precision", "recall", "F1"), 100 * table.T, strict=True):
    print(f"{name:10} {np.median(column):5.1f} %    {column.min():.1f}–{column.max():.1f} %")
print("confusion matrix of the first split:", xentjax.metrics.confusion(held_out[0, 0] > 0, malignant, classes=2).counts.tolist())
np.testing.assert_allclose(table, expected, rtol=1e-6)  # float32 against scikit-learn
assert table[:, 0].min() > 0.96 and table.min() > 0.9

# %% [markdown]
# Recall is lower than precision: there are more missed tumors than false alarms.

# %% [markdown]
# ## What a threshold costs
#
# Tutorials use only the threshold ½. It is right only if both mistakes cost the same. Suppose that a missed malignant tumor costs $c$ times
# as much as a false alarm. Calling a tumor benign then costs $c\,p$ on average, and calling it malignant costs $1 - p$. So call it
# malignant if
#
# $$c\,p > 1 - p \quad\Longleftrightarrow\quad p > \frac{1}{1 + c} \quad\Longleftrightarrow\quad z > -\log c.$$
#
# This needs a calibrated probability. So the logits are divided by a temperature $T$. `fit_temperature` finds the $T$ with the smallest
# cross-entropy. Here, $T$ is fitted on four fifths of the tumors and used on the rest. The result is below 1: the network was too cautious.


# %%
def temperature(z, y):
    pair = jnp.stack([jnp.zeros_like(z), z], axis=-1)  # two classes: the softmax of (0, z) is (σ(-z), σ(z))
    return float(xentjax.metrics.fit_temperature(pair.reshape(-1, 2), np.tile(y, len(z))))


part = np.arange(len(malignant)) % 5
temperatures = np.array([temperature(held_out[0][:, part != k], malignant[part != k]) for k in range(5)])
calibrated = held_out[0] / temperatures[part]

cuts = np.linspace(-7, 7, 281)  # thresholds on the logit
missed = np.mean((calibrated[..., None] <= cuts) & (malignant[:, None] == 1), axis=(0, 1))
alarms = np.mean((calibrated[..., None] > cuts) & (malignant[:, None] == 0), axis=(0, 1))
cost = {c: c * missed + alarms for c in (1, 9, 99)}
print("temperatures:", np.round(temperatures, 2))

# %%
precision, recall, _ = precision_recall_curve(np.tile(malignant, SPLITS), calibrated.ravel())
fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
for (c, values), color in zip(cost.items(), (BLUE, ORANGE, GREEN), strict=True):
    left.semilogy(1 / (1 + np.exp(-cuts)), values, color=color, label=f"c = {c}")
    left.axvline(1 / (1 + c), color=color, linestyle=":", linewidth=1.5)
    left.plot(1 / (1 + c), np.interp(-np.log(c), cuts, values), "o", color=color, markersize=8)
    called = calibrated > -np.log(c)
    point = np.mean(called[:, malignant == 1]), np.sum(called[:, malignant == 1]) / called.sum()
    right.plot(*(100 * np.array(point)), "o", color=color, markersize=9, label=f"threshold 1/(1 + {c}) = {1 / (1 + c):.2f}", zorder=3)
left.set(xscale="logit", xlabel="threshold on the probability (dotted: 1/(1 + c))", ylabel="cost per tumor (false alarms)")
left.set(title="A missed tumor costs c false alarms", xticks=[0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
left.set_xticklabels(["0.001", "0.01", "0.1", "0.5", "0.9", "0.99", "0.999"])
left.xaxis.set_minor_locator(plt.NullLocator())
left.legend(loc="upper left")
right.plot(100 * recall, 100 * precision, color="0.4", label="all thresholds")
right.set(xlabel="recall (%)", ylabel="precision (%)", title="Held-out tumors", xlim=(85, 100.5), ylim=(60, 101))
right.legend(loc="lower left")
plt.show()

for c, values in cost.items():
    at_rule, at_half = (np.interp(z, cuts, values) for z in (-np.log(c), 0))
    print(f"c = {c:2}: cost {at_rule:.3f} at 1/(1 + c), {at_half:.3f} at 1/2, smallest {values.min():.3f}")
assert np.interp(-np.log(99), cuts, cost[99]) < 0.5 * np.interp(0, cuts, cost[99])
assert all(np.interp(-np.log(c), cuts, values) < 1.25 * values.min() for c, values in cost.items())

# %% [markdown]
# The rule lands near the bottom of each curve, without a search. At $c = 99$, the threshold ½ costs several times as much. In the right
# plot, all thresholds are points of one curve. A lower threshold gives more recall and less precision.

# %% [markdown]
# ## `pos_weight` moves the threshold
#
# `pos_weight` $= w$ multiplies the loss of the positive label. If a fraction $\eta$ of the examples at some $x$ is positive, their mean
# loss is $-w\,\eta \log \sigma(z) - (1 - \eta) \log \sigma(-z)$. Its derivative is 0 at
#
# $$z^* = \log \frac{\eta}{1 - \eta} + \log w .$$
#
# So $w$ adds a constant to every log-odds. With the weight, the threshold ½ makes the same decisions as the threshold $1/(1 + w)$ without
# the weight. The next cell checks that the derivative is 0 there.

# %%
eta = np.linspace(0.01, 0.99, 99)
shifted = jnp.float32(np.log(eta / (1 - eta)) + np.log(9))
slope = jax.grad(lambda z: xentjax.sigmoid_cross_entropy(z, jnp.float32(eta), pos_weight=9.0).sum())(shifted)
print(f"largest derivative at z*: {jnp.abs(slope).max():.1e}")
assert jnp.abs(slope).max() < 1e-5

# %%
fig, ax = plt.subplots(figsize=(5.8, 3.9))
area = [np.median([xentjax.metrics.auroc(z, malignant) for z in of_weight]) for of_weight in held_out]
for of_weight, w, value, color in zip(held_out, pos_weights, area, (BLUE, ORANGE, GREEN), strict=True):
    precision, recall, _ = precision_recall_curve(np.tile(malignant, SPLITS), of_weight.ravel())
    ax.plot(100 * recall, 100 * precision, color=color, label=f"w = {w:.0f}: AUROC {value:.4f}")
    p, r = (100 * score(np.tile(malignant, SPLITS), of_weight.ravel() > 0) for score in (precision_score, recall_score))
    ax.plot(r, p, "o", color=color, markersize=10, markeredgecolor="white", zorder=3)
    print(f"pos_weight {w:2.0f}: precision {p:.1f} %, recall {r:.1f} % at the threshold 1/2; AUROC {value:.4f}")
ax.set(xlabel="recall (%)", ylabel="precision (%)", title="Dots: threshold ½ of each network", xlim=(85, 100.5), ylim=(60, 101))
ax.legend(loc="lower left")
plt.show()
assert np.ptp(area) < 0.01 and area[0] > 0.99
shift = np.median(held_out[1] - held_out[0])
print(f"median shift of the logit at w = 9: {shift:.2f} (log 9 = {np.log(9):.2f})")
assert 0.3 < shift < np.log(9)

# %% [markdown]
# The three curves almost coincide, and the dots move along them. The weight adds no information. A threshold can be changed after the
# training. A weight cannot. These networks are regularised, so their logits move by less than $\log 9$.

# %% [markdown]
# ## The shape mistake
#
# A tutorial passes logits (64, 10) and labels (64, 1) to its loss. Plain arithmetic broadcasts them. Each label is compared with ten
# logits, and nothing fails. The opposite mistake is worse: logits (64, 1) and labels (64,) give 64 × 64 losses. `xentjax` raises an error
# in both cases.


# %%
def naive(z, y):
    return jnp.logaddexp(0, z) - y * z


for shape, label_shape in (((64, 10), (64, 1)), ((64, 1), (64,))):
    z, y = jnp.zeros(shape), jnp.ones(label_shape)
    try:
        xentjax.sigmoid_cross_entropy(z, y)
    except ValueError as error:
        message = str(error)
    print(f"logits {shape}, labels {label_shape}\n  plain formula: losses of shape {naive(z, y).shape}\n  xentjax: {message}")
    assert str(shape) in message and str(label_shape) in message

# %% [markdown]
# ## One experiment for rare classes and wrong labels
#
# Which loss helps? To find out, twenty losses train the same network on the same batches from the same start. The data are handwritten
# digits of 8 × 8 pixels.
#
# - **Rare classes.** The training set has 100 images of one class, 60 of the next, and so on down to 1. The seed chooses the order.
# - **Wrong labels.** There are 50 images of each class. Each label is replaced by one of the other nine with probability 0.4.
#
# 500 other images are held out, 50 of each class. They have their true labels. As all classes are equally frequent there, the accuracy is
# the balanced accuracy, the mean of the recalls of the ten classes.

# %%
images, digits = load_digits(return_X_y=True)
images = np.float32(images / 16)
CLASSES, HIDDEN, BATCH, STEPS, EVERY, SEEDS = 10, 128, 32, 1500, 50, 6


class Run(NamedTuple):
    """A training set and its minibatches. Masks have shape [images]."""

    seed: np.ndarray
    labels: np.ndarray  # [images], as the training sees them
    training: np.ndarray
    held_out: np.ndarray
    validation: np.ndarray  # for wrong labels: neither trained on nor held out
    batches: np.ndarray  # [STEPS / EVERY, EVERY, BATCH], rows of `images`
    counts: np.ndarray  # [classes], training images per label
    noise: np.ndarray  # [classes, classes], the true P(label | class)


def mask(rows):
    return np.isin(np.arange(len(digits)), np.concatenate(rows))


# %%
def draw_run(largest, ratio, noise, seed):
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits))
    rows = [order[digits[order] == k] for k in range(CLASSES)]
    rank = random.permutation(CLASSES) if ratio > 1 else np.zeros(CLASSES)
    sizes = np.round(largest * ratio ** (-rank / (CLASSES - 1))).astype(int)
    training = [of_class[50 : 50 + size] for of_class, size in zip(rows, sizes, strict=True)]
    held_out, validation = ([of_class[start : start + 50] for of_class in rows] for start in (0, 100))
    other = (digits + random.integers(1, CLASSES, len(digits))) % CLASSES
    labels = np.int32(np.where(random.random(len(digits)) < noise, other, digits))
    seen = np.concatenate(training)
    epochs = -(-STEPS * BATCH // len(seen))
    batches = np.concatenate([random.permutation(seen) for _ in range(epochs)])[: STEPS * BATCH].reshape(-1, EVERY, BATCH)
    counts = np.float32(np.bincount(labels[seen], minlength=CLASSES))
    matrix = np.float32(np.where(np.eye(CLASSES, dtype=bool), 1 - noise, noise / (CLASSES - 1)))
    return Run(np.uint32(seed), labels, mask(training), mask(held_out), mask(validation), batches, counts, matrix)


# %%
rare, wrong = (
    jax.tree.map(lambda *leaves: np.stack(leaves), *[draw_run(*setting, seed) for seed in range(SEEDS)])
    for setting in ((100, 100, 0.0), (50, 1, 0.4))
)
print("rare classes, images per class:", *(np.sort(row)[::-1].astype(int) for row in rare.counts[:1]))
print("wrong labels, share of wrong ones by seed:", np.round(np.mean(wrong.labels != digits, axis=1, where=wrong.training), 2))
assert np.all(np.sort(rare.counts) == [1, 2, 3, 5, 8, 13, 22, 36, 60, 100]) and not np.any(rare.training & rare.held_out)
assert abs(np.mean(wrong.labels[wrong.training] != np.tile(digits, (SEEDS, 1))[wrong.training]) - 0.4) < 0.05

# %% [markdown]
# Here are the losses. Each takes the logits, the labels and the run, and returns one value per example. They keep their default parameters,
# except where the call says otherwise. The two corrections for noise get the true noise matrix, which is rarely known.

# %%
plain = xentjax.softmax_cross_entropy
LOSSES = {
    "cross-entropy": lambda z, y, run: plain(z, y),
    "label smoothing": lambda z, y, run: plain(z, y, label_smoothing=0.1),
    "inverse frequency": lambda z, y, run: plain(z, y, class_weights=xentjax.inverse_frequency_weights(run.counts)),
    "class-balanced": lambda z, y, run: plain(z, y, class_weights=xentjax.class_balanced_weights(run.counts)),
    "focal": lambda z, y, run: xentjax.softmax_focal_loss(z, y),
    "logit-adjusted": lambda z, y, run: xentjax.logit_adjusted_cross_entropy(z, y, class_log_prior=jnp.log(run.counts / run.counts.sum())),
    "seesaw": lambda z, y, run: xentjax.seesaw_loss(z, y, class_counts=run.counts),
    "LDAM on cosines": lambda z, y, run: xentjax.ldam_loss(z, y, class_counts=run.counts),
    "cosines alone": lambda z, y, run: xentjax.margin_cross_entropy(z, y, scale=30.0, m2=0.0),  # LDAM's scale and no margin
    "generalized": lambda z, y, run: xentjax.generalized_cross_entropy(z, y),
    "symmetric": lambda z, y, run: xentjax.symmetric_cross_entropy(z, y),
    "soft bootstrapped": lambda z, y, run: xentjax.bootstrapped_cross_entropy(z, y),
    "hard bootstrapped": lambda z, y, run: xentjax.bootstrapped_cross_entropy(z, y, beta=0.8, hard=True),
    "Taylor": lambda z, y, run: xentjax.taylor_cross_entropy(z, y),
    "poly": lambda z, y, run: xentjax.poly_cross_entropy(z, y),
    "confidence penalty": lambda z, y, run: xentjax.confidence_penalized_cross_entropy(z, y),
    "normalized": lambda z, y, run: xentjax.normalized_cross_entropy(z, y),
    "bi-tempered": lambda z, y, run: xentjax.bi_tempered_cross_entropy(z, y),
    "forward-corrected": lambda z, y, run: xentjax.forward_corrected_cross_entropy(z, y, noise_matrix=run.noise),
    "backward-corrected": lambda z, y, run: xentjax.backward_corrected_cross_entropy(z, y, noise_matrix=run.noise),
}
COSINES = np.array(["cosines" in name for name in LOSSES])

# %% [markdown]
# The network has one hidden layer of 128 units. For LDAM, its outputs are cosines between the hidden values and the columns of the last
# matrix. All losses and all seeds train together, in one compiled program. No two networks share a parameter. So the gradient of
# the sum of all losses gives each network the gradient of its own loss. The optimizer is AdamW with a weight decay of 0.1. Its learning
# rate falls from 0.01 to 0. With these settings, cross-entropy learns the wrong labels, and the differences are visible. That is why these
# settings were chosen. The choice was made on other seeds.


# %%
def init(seed):
    k1, k2 = jax.random.split(jax.random.key(seed))
    w1, w2 = jax.random.normal(k1, (64, HIDDEN)) * np.sqrt(2 / 64), jax.random.normal(k2, (HIDDEN, CLASSES)) / np.sqrt(HIDDEN)
    return w1, jnp.zeros(HIDDEN), w2


def predict(params, x, cosine):
    w1, b1, w2 = params
    hidden = jax.nn.relu(x @ w1 + b1)
    lengths = jnp.sqrt((hidden**2).sum(-1, keepdims=True) * (w2**2).sum(0) + 1e-12)
    return hidden @ w2 / jnp.where(cosine, lengths, 1.0)


def total_loss(params, rows, runs):
    """The sum of the mean losses of all networks. Parameters have leading axes [losses, runs]."""
    labels = jnp.take_along_axis(runs.labels, rows, axis=1)
    over_runs = jax.vmap(predict, (0, 0, None))
    outputs = jax.vmap(over_runs, (0, None, 0))(params, jnp.array(images)[rows], COSINES)  # [losses, runs, BATCH, classes]
    values = [jax.vmap(loss)(z, labels, runs) for loss, z in zip(LOSSES.values(), outputs, strict=True)]
    return jnp.stack(values).mean(-1).sum()


# %% [markdown]
# After every 50 steps, all networks classify all images. So the answers show what a network knew at each stage of the training.


# %%
def adamw(steps):
    return optax.adamw(lambda count: 0.5e-2 * (1 + jnp.cos(jnp.pi * count / steps)), weight_decay=0.1)


@jax.jit
def advance(carry, batches, runs, steps):
    """50 steps of all networks, and their answers [losses, runs, images]."""

    def step(carry, rows):
        params, state = carry
        updates, state = adamw(steps).update(jax.grad(total_loss)(params, rows, runs), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, carry, batches)
    over_runs = jax.vmap(predict, (0, None, None))
    return carry, jax.lax.map(lambda one: over_runs(one[0], images, one[1]).argmax(-1).astype(jnp.int8), (carry[0], COSINES))


# %%
def train(runs, steps):
    """Answers [times, losses, runs, images], and the parameters at the end."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(LOSSES)), jax.vmap(init)(runs.seed))  # every loss starts alike
    carry, answers = (params, adamw(steps).init(params)), []
    for batches in np.moveaxis(runs.batches, 0, 2)[: steps // EVERY]:  # [EVERY, runs, BATCH]
        carry, now = advance(carry, batches, runs, steps)
        answers.append(now)
    return np.array(answers), carry[0]


# %%
both = jax.tree.map(lambda a, b: np.concatenate([a, b]), rare, wrong)
answers, params = train(both, STEPS)
rare_answers, wrong_answers = np.split(answers, 2, axis=2)
print(f"trained {len(LOSSES) * 2 * SEEDS} networks for {STEPS} steps; answers have shape {answers.shape}")


def percent(hit, mask):
    """Share of hits [..., seeds, images] among the images of each seed's mask."""
    return 100 * np.sum(hit & mask, axis=-1) / mask.sum(-1)


rare_accuracy = percent(rare_answers == digits, rare.held_out)  # [times, losses, seeds]
wrong_accuracy = percent(wrong_answers == digits, wrong.held_out)
rarest = percent(rare_answers[-1] == digits, rare.held_out & (rare.counts <= 3)[:, digits])
learned = percent(wrong_answers[-1] == wrong.labels, wrong.training & (wrong.labels != digits))

shown = rare.held_out[0]
check = xentjax.metrics.confusion(rare_answers[-1, 0, 0, shown], digits[shown], classes=CLASSES).balanced_accuracy()
np.testing.assert_allclose(100 * check, rare_accuracy[-1, 0, 0], rtol=1e-6)

# %% [markdown]
# ## Rare classes: why logit adjustment works
#
# By Bayes' rule, the class probabilities in the training data are $p(y \mid x) \propto p(x \mid y)\,\pi_y$. Here $\pi_y$ is the frequency
# of class $y$. In balanced data, they would be $\propto p(x \mid y)$. The logits for training data and for balanced data differ by
# $\log \pi_y$:
#
# $$z^{\text{training}}_y = z^{\text{balanced}}_y + \log \pi_y .$$
#
# Logit adjustment puts this term into the loss, $\ell = -\log \operatorname{softmax}(z + \log \pi)_y$. The sum $z + \log \pi$ then learns
# the training data, and $z$ alone is right for balanced classes.
#
# Take two classes in one dimension, with normal densities around ±1.5 and frequencies 100:1. The exact balanced log-odds are $3x$. The next
# cell fits log-odds that are linear in $x$. It uses the whole distribution instead of samples, so there is no sampling error.

# %%
x = np.linspace(-7, 7, 1401)
prior = np.array([100, 1]) / 101
density = prior[:, None] * norm.pdf(x, loc=[[-1.5], [1.5]])  # [classes, x]
weights = jnp.float32(density / density.sum())
TOY = {
    "cross-entropy": lambda z, y: plain(z, y),
    "inverse frequency": lambda z, y: plain(z, y, class_weights=xentjax.inverse_frequency_weights(101 * prior)),
    "logit-adjusted": lambda z, y: xentjax.logit_adjusted_cross_entropy(z, y, class_log_prior=np.log(prior)),
}


# %%
def fit_line(loss):
    def objective(line):
        z = jnp.stack([jnp.zeros(x.size), line[0] * x + line[1]], axis=-1)
        return sum((weights[k] * loss(z, jnp.full(x.size, k))).sum() for k in (0, 1))

    def step(carry, _):
        line, state = carry
        updates, state = optimizer.update(jax.grad(objective)(line), state)
        return (optax.apply_updates(line, updates), state), None

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 2000))
    return jax.lax.scan(step, (jnp.zeros(2), optimizer.init(jnp.zeros(2))), length=2000)[0][0]


lines = {name: np.asarray(jax.jit(fit_line, static_argnums=0)(loss), np.float64) for name, loss in TOY.items()}
boundary = {name: -offset / slope for name, (slope, offset) in lines.items()}
for name, cut in boundary.items():
    recalls = norm.cdf([cut + 1.5, 1.5 - cut])
    print(f"{name:18} boundary {cut:+.3f}, recall {100 * recalls[0]:.1f} % and {100 * recalls[1]:.1f} %, mean {100 * recalls.mean():.1f} %")
assert abs(boundary["cross-entropy"] - np.log(100) / 3) < 0.02
assert max(abs(boundary[name]) for name in ("inverse frequency", "logit-adjusted")) < 0.02

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
for values, color, name in zip(density, (BLUE, ORANGE), ("common class", "rare class"), strict=True):
    ax.fill_between(x, 1e-6, values, color=color, alpha=0.25, linewidth=0)
    ax.semilogy(x, values, color=color, label=name)
ax.axvline(boundary["cross-entropy"], color="black", label="boundary of cross-entropy")
ax.axvline(boundary["logit-adjusted"], color="black", linestyle="--", label="boundary, weighted or adjusted")
ax.set(xlabel="x", ylabel="frequency × density", ylim=(1e-5, 1), xlim=(-5, 5))
fig.legend(loc="outside upper center", fontsize=10, ncols=2)
plt.show()

# %% [markdown]
# Cross-entropy draws its boundary where the two curves cross. This is best for the accuracy on the training data, but it misses half of
# the rare class. Weights and logit adjustment have the same optimum here, half-way between the classes.
#
# This changes in a network that fits every training image. In such a network, weights lose much of their effect: an example whose loss
# is near 0 has a gradient near 0, and no weight changes that. The shift $\log \pi_y$ acts as a margin: the logit of a rare class must
# exceed the logits of more common classes by the difference of the shifts.

# %% [markdown]
# ## Rare classes: the measurement
#
# | loss | formula |
# |---|---|
# | inverse frequency | $-w_y \log p_y$ with $w_k \propto 1 / n_k$, where $n_k$ is the number of training images |
# | class-balanced | the same with $w_k \propto (1 - \beta) / (1 - \beta^{n_k})$, $\beta = 0.999$ |
# | focal | $-(1 - p_y)^\gamma \log p_y$ with $\gamma = 2$ |
# | LDAM | cross-entropy of $30\,(z - \Delta_y e_y)$ with $\Delta_k = 0.5\,(n_{\min} / n_k)^{1/4}$ and cosines $z$ |
# | logit-adjusted | $-\log \operatorname{softmax}(z + \log \pi)_y$ |
# | seesaw | cross-entropy in which a class that is rarer than the label gets a smaller gradient |
#
# The gain is the median difference from plain cross-entropy with the same seed. "Better" is the number of seeds with a gain.


# %%
def print_table(accuracy, detail, detail_name):
    print(f"{'':20} median   lowest–highest   gain  better  {detail_name}")
    for i in np.argsort(-np.median(accuracy, axis=1), kind="stable"):
        gains = accuracy[i] - accuracy[0]
        gain = f"{np.median(gains):+6.1f}   {np.sum(gains > 0)}/{SEEDS}" if i else " " * 12
        low, middle, high = np.quantile(accuracy[i], [0, 0.5, 1])
        print(f"{names[i]:20} {middle:5.1f}      {low:.1f}–{high:.1f}    {gain}    {np.median(detail[i]):5.1f}")


# %%
def draw_dots(accuracy, detail, detail_name, title):
    order = np.argsort(np.median(accuracy, axis=1), kind="stable")
    _, axes = plt.subplots(1, 2, figsize=(9.2, 5.2), sharey=True, width_ratios=(1.5, 1))
    for ax, values in zip(axes, (accuracy, detail), strict=True):
        ax.grid(axis="y", visible=False)
        ax.axvline(np.median(values[0]), color="black", linestyle="--", linewidth=1)
        for height, i in enumerate(order):
            gain = np.median(accuracy[i] - accuracy[0])
            color = "black" if i == 0 else BLUE if gain >= 1 else RED if gain <= -1 else "0.6"
            ax.plot(values[i], [height] * SEEDS, "o", color=color, markersize=3.5, markeredgewidth=0)
            ax.plot([np.median(values[i])] * 2, [height - 0.35, height + 0.35], color=color, linewidth=3)
    axes[0].set_yticks(range(len(order)), [names[i] for i in order])
    axes[0].set(xlabel="held-out balanced accuracy (%)", title=title)
    axes[1].set(xlabel=detail_name, title="dots: seeds, bars: medians")
    plt.show()


names = list(LOSSES)
at = names.index
print_table(rare_accuracy[-1], rarest, "rarest 3")

# %%
draw_dots(rare_accuracy[-1], rarest, "accuracy, three rarest classes (%)", "Blue: gain of a point or more; red: loss")

# %%
gain = np.median(rare_accuracy[-1] - rare_accuracy[-1, 0], axis=1)
assert gain[at("logit-adjusted")] == gain.max() > 3
assert np.all(gain[[at("inverse frequency"), at("class-balanced"), at("seesaw")]] > 0.5)
assert gain[at("focal")] < 0.5 and gain[at("Taylor")] < -3

# %% [markdown]
# Logit adjustment gains most. Weights, seesaw, LDAM and label smoothing gain a few points. Focal loss does not
# help: it is often recommended for imbalance, but it changes the weight of easy examples, not of rare classes.
#
# The shift can also be made after the training. Subtract $\log \pi$ from the logits of the network that was trained with plain
# cross-entropy.

# %%
z = jax.vmap(predict, (0, None, None))([leaf[0, :SEEDS] for leaf in params], images, False)  # [seeds, images, classes]
moved = np.argmax(z - np.log(rare.counts / rare.counts.sum(-1, keepdims=True))[:, None], axis=-1)
afterwards = percent(moved == digits, rare.held_out)
adjusted = rare_accuracy[-1, at("logit-adjusted")]
for name, values in (("cross-entropy", rare_accuracy[-1, 0]), ("adjusted in the loss", adjusted), ("adjusted afterwards", afterwards)):
    print(f"{name:21} median {np.median(values):.1f} %, range {values.min():.1f}–{values.max():.1f} %")
assert np.median(afterwards - rare_accuracy[-1, 0]) > 3

# %% [markdown]
# The shift after the training costs one line of code and needs no new training. It gains about as much as the shift in the loss. Here the
# weight decay keeps the logits small. A network with very large logits would hardly notice the shift.

# %% [markdown]
# ## Wrong labels: how hard does a loss pull?
#
# A network learns easy patterns first. At that time, a wrong label has a small probability $p_y$. What happens next depends on the size of
# the gradient for such labels: how hard the loss pulls on them. For many losses, the gradient is the gradient of cross-entropy times a
# weight:
#
# $$\frac{\partial \ell}{\partial z} = w(p_y)\,(p - e_y).$$
#
# | loss | formula | $w(p_y)$ |
# |---|---|---|
# | cross-entropy | $-\log p_y$ | $1$ |
# | focal, $\gamma = 2$ | $-(1 - p_y)^\gamma \log p_y$ | $(1 - p_y)^{\gamma - 1} (1 - p_y - \gamma\, p_y \log p_y)$ |
# | symmetric | $-0.1 \log p_y + 4\,(1 - p_y)$ | $0.1 + 4\,p_y$ |
# | generalized, $q = 0.7$ | $(1 - p_y^q) / q$ | $p_y^q$ |
# | Taylor, order 2 | $(1 - p_y) + (1 - p_y)^2 / 2$ | $p_y\,(2 - p_y)$ |
#
# Others do not have this form. Forward correction multiplies the predicted probabilities by the noise matrix $T$: the loss is
# $-\log \sum_i p_i T_{iy}$. Backward correction uses the inverse of $T$: the loss is $-\sum_j (T^{-1})_{yj} \log p_j$. Bootstrapping mixes
# the label with the network's own prediction. The bi-tempered loss replaces $\log$ by a bounded function and $\exp$ by one with heavier
# tails.
#
# The next cell measures $w$ with `jax.grad`. The nine other classes share the remaining probability. Each curve is divided by its maximum,
# because Adam does not depend on the scale of a loss.

# %%
p = np.geomspace(1e-3, 0.999, 400)
z = jnp.zeros((p.size, CLASSES)).at[:, 0].set(np.log(9 * p / (1 - p)))
truth = 0.6 * p / (0.6 * p + 0.4 / 9 * (1 - p))  # the posterior probability that the label is right, for the forward correction
CURVES = {
    "cross-entropy": ("black", np.ones_like(p)),
    "focal": (RED, (1 - p) * (1 - p - 2 * p * np.log(p))),
    "forward-corrected": (PURPLE, (truth - p) / (1 - p)),
    "symmetric": (GREEN, 0.1 + 4 * p),
    "generalized": (ORANGE, p**0.7),
    "Taylor": (BLUE, p * (2 - p)),
}

# %%
fig, ax = plt.subplots(figsize=(7.4, 3.7))
one_run = jax.tree.map(lambda leaf: leaf[0], wrong)
for name, (color, closed_form) in CURVES.items():
    gradient = jax.grad(lambda z, name=name: LOSSES[name](z, jnp.zeros(p.size, jnp.int32), one_run).sum())(z)
    measured = -np.asarray(gradient[:, 0], np.float64) / (1 - p)
    np.testing.assert_allclose(measured, closed_form, rtol=1e-3)
    ax.loglog(p, measured / measured.max(), color=color, label=name, linestyle="--" if name == "focal" else "-")
ax.set(
    xlabel="probability of the label, $p_y$",
    ylabel="weight, relative to its maximum",
    title="How hard each loss pulls on a label",
    ylim=(1e-3, 2),
)
for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_formatter("{x:g}")
ax.legend(loc="center left", fontsize=9, bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Cross-entropy pulls on every label with the same weight. Focal loss pulls most on unlikely labels, right or wrong. For the other four
# losses, a smaller $p_y$ gives a smaller weight: these losses pull less on labels that the network finds unlikely. The weight of the
# symmetric loss has a floor, so this loss still learns more of the unlikely labels than the generalized and Taylor losses.
#
# This has a price. The label of a rare class is also unlikely at first. A loss that ignores unlikely labels also ignores rare classes.
# This is why the Taylor loss was last in the table of rare classes.

# %% [markdown]
# ## Wrong labels: the measurement
#
# "Learned" is the share of the wrong training labels that the network gives as its answer at the end.

# %%
print_table(wrong_accuracy[-1], learned, "learned")

# %%
draw_dots(wrong_accuracy[-1], learned, "wrong labels learned (%)", "Blue: gain of a point or more; red: loss")

# %%
gain = np.median(wrong_accuracy[-1] - wrong_accuracy[-1, 0], axis=1)
share = np.median(learned, axis=1)
for name in ("cross-entropy", "symmetric", "generalized", "Taylor"):
    print(f"{name:14} learns {share[at(name)]:.0f} % of the wrong labels")
assert min(gain[at("Taylor")], gain[at("generalized")]) > 8 and gain[at("symmetric")] > 4 and gain[at("forward-corrected")] > 2
assert share[0] > 85 and share[at("Taylor")] < 40

# %% [markdown]
# Cross-entropy learns nearly all wrong labels, and its accuracy falls to about 70 %. The four best losses are among the losses plotted
# above. The less a loss pulls on unlikely labels, the fewer wrong labels it learns. Taylor gains most, but its range is wide. The two
# corrections gain less, although they know the true noise. Smoothing, bootstrapping, class weights and the bi-tempered loss at its
# defaults change little.

# %% [markdown]
# ## Stop early
#
# The answers were recorded during the training. They show when the wrong labels are learned.

# %%
times = np.arange(EVERY, STEPS + 1, EVERY)
learned_so_far = percent(wrong_answers == wrong.labels, wrong.training & (wrong.labels != digits))
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.4))
for name, color in (("cross-entropy", "black"), ("symmetric", GREEN), ("Taylor", BLUE)):
    for ax, values in zip(axes, (wrong_accuracy[:, at(name)], learned_so_far[:, at(name)]), strict=True):
        ax.plot(times, np.median(values, axis=1), color=color, label=name)
        ax.fill_between(times, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
axes[0].set(xlabel="step", ylabel="held-out accuracy (%)", title="What is known about digits")
axes[1].set(xlabel="step", ylabel="wrong labels learned (%)", title="What is memorized")
axes[1].legend(loc="upper left", fontsize=9)
plt.show()
peak = np.median(wrong_accuracy[:, 0], axis=1)
print(f"cross-entropy: best median accuracy {peak.max():.1f} % after {times[peak.argmax()]} steps, {peak[-1]:.1f} % at the end")
assert peak.max() > peak[-1] + 8 and times[peak.argmax()] <= 300

# %% [markdown]
# All three losses first learn the digits, then wrong labels. Lines are medians, and bands show all six seeds.
#
# When should the training stop? A validation set with wrong labels is enough to decide this. If a share $a$ of the answers is right, then
# an expected share of $0.6\,a + 0.4\,(1 - a) / 9$ agrees with the validation labels. This share grows with $a$. So both shares peak at
# about the same time. The next cell uses 500 validation images. Their labels are wrong as often as the training labels.
#
# If the number of steps is known in advance, the learning rate can fall to 0 by the last step. The second training run has only 150
# steps.

# %%
validation = percent(wrong_answers == wrong.labels, wrong.validation)
stop = validation.argmax(0)  # [losses, seeds]
stopped = np.take_along_axis(wrong_accuracy, stop[None], axis=0)[0]
short_answers = train(both, 150)[0][-1]
short_rare, short_wrong = (
    percent(part == digits, run.held_out) for part, run in zip(np.split(short_answers, 2, axis=1), (rare, wrong), strict=True)
)

print("median accuracy (%)   1500 steps   stopped by wrong validation labels   150 steps")
for name in ("cross-entropy", "forward-corrected", "symmetric", "generalized", "Taylor"):
    end, early, short = (np.median(values[at(name)]) for values in (wrong_accuracy[-1], stopped, short_wrong))
    print(f"{name:21} {end:8.1f} {early:18.1f} after {np.median(times[stop[at(name)]]):3.0f} steps {short:18.1f}")
best_at_end = np.median(wrong_accuracy[-1], axis=1).max()
print(f"the best loss after {STEPS} steps has {best_at_end:.1f} %")
assert np.median(stopped[0]) > np.median(wrong_accuracy[-1, 0]) + 10
assert np.median(short_wrong[0]) > best_at_end
assert np.median(short_wrong[at("symmetric")]) > np.median(short_wrong[0])

# %% [markdown]
# Plain cross-entropy with 150 steps is better than every loss with 1500 steps. If cross-entropy is stopped by validation labels, it comes
# close to the best loss with 1500 steps. Early stopping and a robust loss together are best, by a small margin.

# %% [markdown]
# ## What does not help
#
# The last picture shows all losses in both settings. A ring is the median after 150 steps, and a dot the median after 1500 steps.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.4, 5.2), sharey=True)
order = np.argsort(np.median(rare_accuracy[-1], axis=1), kind="stable")
panels = (("Rare classes, 100 : 1", short_rare, rare_accuracy[-1]), ("40 % wrong labels", short_wrong, wrong_accuracy[-1]))
for ax, (title, short, long) in zip(axes, panels, strict=True):
    start, end = (np.median(values, axis=1)[order] for values in (short, long))
    heights = np.arange(len(order))
    ax.hlines(heights, start, end, color="0.7", linewidth=2, zorder=1)
    ax.scatter(start, heights, s=45, facecolor="white", edgecolor=ORANGE, linewidth=2, label="150 steps", zorder=2)
    ax.scatter(end, heights, s=45, color=BLUE, label="1500 steps", zorder=2)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="held-out balanced accuracy (%)", title=title)
axes[0].set_yticks(heights, [names[i] for i in order])
axes[0].legend(loc="upper left")
plt.show()

# %%
runs = {"rare, 150": short_rare, "rare, 1500": rare_accuracy[-1], "wrong, 150": short_wrong, "wrong, 1500": wrong_accuracy[-1]}
gains = {setting: np.median(accuracy - accuracy[0], axis=1) for setting, accuracy in runs.items()}
print("median gain (points) " + "".join(f"{setting:>13}" for setting in gains))
for i in order[::-1]:
    print(f"{names[i]:21}" + "".join(f"{values[i]:+13.1f}" for values in gains.values()))

in_both = np.minimum(gains["rare, 1500"], gains["wrong, 1500"])
print(f"\nafter 1500 steps, no loss gains more than {in_both.max():.1f} points in both settings")
assert in_both.max() < 3
assert gains["rare, 150"][at("inverse frequency")] > gains["rare, 1500"][at("inverse frequency")] > 0
assert max(gains["rare, 150"][at("generalized")], gains["rare, 150"][at("Taylor")]) < -10
idle = [at(name) for name in ("label smoothing", "soft bootstrapped", "hard bootstrapped", "poly", "confidence penalty", "bi-tempered")]
assert np.abs(gains["wrong, 1500"][idle]).max() < 3
assert np.all(np.median(wrong_accuracy[-1], axis=1) < np.median(short_wrong, axis=1))

# %% [markdown]
# - **Rare classes.** Class weights lose half of their gain in the longer training. Focal and bi-tempered losses do not help. After 150
#   steps, the generalized and Taylor losses have hardly begun to learn the rare classes.
# - **Wrong labels.** Label smoothing, bootstrapping, poly, the confidence penalty and the bi-tempered loss at its defaults stay within
#   about one point of cross-entropy. Cross-entropy on cosines with a large scale is worse. The margins of LDAM do not help.
# - **Both.** No loss gains much in both settings.
# - **Longer training.** With wrong labels, every loss is worse after 1500 steps than after 150. With rare classes, plain cross-entropy
#   gains from the longer training.
#
# These are medians of six seeds, of one small network on one small data set. A difference of one point is noise. Other settings matter too.
# A separate measurement had 600 images, 40 % wrong labels and 1000 batches of 64. The accuracy of cross-entropy was 65.5, 70.6 and 77.7 %
# with weight decays of 0, 0.1 and 0.3. So measure on your own data, with several seeds.

# %% [markdown]
# ## What to remember
#
# - If a missed positive costs $c$ false alarms and the probability is calibrated, the best threshold is $1 / (1 + c)$. `pos_weight` moves
#   the threshold and adds no information.
# - With rare classes, shift the logits by $\log \pi$, in the loss or after the training. Class weights help less in a network that fits
#   its training data.
# - With wrong labels, stop early. A validation set with wrong labels is enough to choose the time. A bounded loss gains a little more. If
#   the training is long, it gains a lot.
# - A loss that ignores unlikely labels also ignores rare classes. No loss here is good for both.
#
# More:
#
# - [Choosing a loss](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md)
# - [Quickstart](https://github.com/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb), with label smoothing and class weights
# - [Numbers that survive](https://github.com/xentjax/xentjax/blob/main/examples/notebooks/numbers_that_survive.ipynb)
# - [Conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md)
