# %% [markdown]
# # xentjax: a quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb)
#
# `xentjax` computes cross-entropy losses in JAX. This notebook goes through what you need to train a classifier with it:
# the loss and its gradient, accuracy, a training loop, label smoothing, class weights, focal loss, masks, value checks,
# and mean losses that stay correct when a batch is split. All of it runs on a CPU in well under a minute.

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
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import xentjax

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
EPS = float(jnp.finfo(jnp.float32).eps)  # 2^-23, the spacing of float32 numbers at 1

# %% [markdown]
# ## The loss
#
# A classifier gives one number per class, the logits $z \in \mathbb{R}^K$. They stand for the probabilities
# $p_k = e^{z_k} / \sum_j e^{z_j}$. The loss is the negative log-probability of the label $y$, in nats:
#
# $$\ell(z, y) = -\log p_y = \log \sum_k e^{z_k} - z_y.$$
#
# Logits of shape `[..., classes]` and labels of shape `[...]` give a loss of shape `[...]`, one value per example.
# Nothing is averaged until you ask for it.

# %%
logits = jax.random.normal(jax.random.key(0), (4, 10))  # 4 examples, 10 classes
labels = jnp.array([3, 1, 4, 1])

loss = xentjax.softmax_cross_entropy(logits, labels)
print("logits", logits.shape, "labels", labels.shape, "-> loss", loss.shape, loss.dtype)
print("loss in nats:", loss)
print("all logits equal:", xentjax.softmax_cross_entropy(jnp.zeros(10), jnp.array(3)), "= log 10 =", jnp.log(10.0))

# %% [markdown]
# Integer labels are class indices. Floating-point labels are distributions over the classes and have the shape of the logits. Their loss is
# $\ell(z, t) = -\sum_k t_k \log p_k$. A one-hot distribution gives the same loss as the index of its class.

# %%
one_hot = jax.nn.one_hot(labels, 10)
print("indices:      ", xentjax.softmax_cross_entropy(logits, labels))
print("distributions:", xentjax.softmax_cross_entropy(logits, one_hot))

# %% [markdown]
# ## The gradient
#
# The gradient of cross-entropy is the predicted distribution $p$ minus the one-hot label $e_y$:
#
# $$\frac{\partial \ell}{\partial z} = p - e_y .$$
#
# `jax.grad` works as for any function. The next cell compares its result with the closed form in float64. It prints the largest
# difference in units of float32's eps, $2^{-23} \approx 1.2 \cdot 10^{-7}$.


# %%
def softmax_float64(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


logits = 3 * jax.random.normal(jax.random.key(1), (1000, 10))
labels = jax.random.randint(jax.random.key(2), (1000,), 0, 10)

gradient = jax.grad(lambda z: xentjax.softmax_cross_entropy(z, labels).sum())(logits)
closed_form = softmax_float64(logits) - np.eye(10)[np.asarray(labels)]
difference = np.max(np.abs(gradient - closed_form)) / EPS
print(f"jax.grad against p - e_y over {gradient.size} entries: largest difference {difference:.2f} eps")
assert difference < 4

# %% [markdown]
# ## Accuracy at large margins
#
# Suppose that nine logits are equal, and that the label's logit exceeds them by the margin $m$. The exact loss is $\log(1 + 9 e^{-m})$.
# The usual way, `-log_softmax(z)[y]`, adds the small terms $e^{-m}$ to 1 in float32. Past a margin of about 17 nats, rounding removes
# these terms. The loss is then exactly 0. `xentjax` never adds these terms to 1. So its loss stays accurate until $e^{-m}$ itself leaves
# float32's normal range, at a margin of 87 nats.
#
# If the margin changes by $\delta$, a small loss changes by the factor $e^{-\delta}$. In general, float32 logits are rounded. Their margin
# is then known only up to the spacing of float32 numbers at $m$. So for such logits, the relative error of any float32 computation may be
# as large as this spacing. The dotted line in the right plot shows the spacing. The error of `xentjax` stays below this line.

# %%
margins = np.linspace(0, 85, 341, dtype=np.float32)
logits = jnp.zeros((margins.size, 10)).at[:, 0].set(margins)
labels = jnp.zeros(margins.size, jnp.int32)

naive = -np.asarray(jax.nn.log_softmax(logits)[:, 0])
ours = np.asarray(xentjax.softmax_cross_entropy(logits, labels))
exact = np.log1p(9 * np.exp(-margins.astype(np.float64)))
last_digit = np.spacing(np.maximum(margins, 1))
naive_error, our_error = (np.abs(found - exact) / exact for found in (naive, ours))

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.semilogy(margins, exact, color="black", linewidth=5, alpha=0.25, label="exact (float64)")
left.semilogy(margins, ours, color="C0", label="xentjax (float32)")
left.semilogy(margins[naive > 0], naive[naive > 0], color="C3", label="log_softmax (float32), 0 beyond")
left.set(xlabel="margin of the label's logit (nats)", ylabel="loss (nats)", title="Value")
left.legend(loc="lower left")
right.semilogy(margins, naive_error, ".", markersize=4, color="C3", label="log_softmax (float32)")
right.semilogy(margins, our_error, ".", markersize=4, color="C0", label="xentjax (float32)")
right.semilogy(margins, last_digit, color="black", linestyle=":", linewidth=1.5, label="last digit of the margin")
right.set(xlabel="margin of the label's logit (nats)", ylabel="relative error of the loss", title="Error", ylim=(3e-10, 10))
right.legend(loc="center right", bbox_to_anchor=(1, 0.66))
plt.show()

print(f"relative error of xentjax: at most {our_error.max():.1e}, or {(our_error / last_digit).max():.2f} of the dotted line")
print(f"log_softmax gives exactly 0 from a margin of {margins[naive == 0][0]} nats")
assert np.all(our_error <= last_digit)

# %% [markdown]
# ## Training with optax
#
# The data are handwritten digits of 8 × 8 pixels from scikit-learn. The network has one hidden layer and is written in plain JAX. The
# optimizer is Adam from optax. The objective is the mean of the per-example losses, `xentjax.weighted_mean(loss)`. Without weights, this
# mean is $\frac{1}{n} \sum_i \ell_i$. `jax.jit` and `jax.value_and_grad` work as usual.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.data[order] / 16, jnp.float32)
targets = jnp.asarray(digits.target[order], jnp.int32)
train_x, train_y, test_x, test_y = images[:1024], targets[:1024], images[1024:], targets[1024:]


def init(key, sizes=(64, 32, 10)):
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [(jax.random.normal(k, (m, n)) * np.sqrt(2 / m), jnp.zeros(n)) for k, (m, n) in zip(keys, shapes, strict=True)]


def predict(params, x):
    *hidden, (w_out, b_out) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ w_out + b_out


def objective(params, x, y):
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(predict(params, x), y))


optimizer = optax.adam(1e-2)


@jax.jit
def step(params, state, x, y):
    loss, gradient = jax.value_and_grad(objective)(params, x, y)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


params = init(jax.random.key(3))
state = optimizer.init(params)
train_loss, test_loss = [], []
for _ in range(20):
    epoch = []
    for x, y in zip(train_x.reshape(8, 128, 64), train_y.reshape(8, 128), strict=True):
        params, state, loss = step(params, state, x, y)
        epoch.append(float(loss))
    train_loss.append(np.mean(epoch))
    test_loss.append(float(objective(params, test_x, test_y)))

accuracy = jnp.mean(predict(params, test_x).argmax(-1) == test_y)
print(f"test accuracy {accuracy:.3f}, test loss {test_loss[-1]:.3f} nats (guessing costs log 10 = {np.log(10):.3f})")

fig, ax = plt.subplots(figsize=(5.5, 3.4))
ax.semilogy(range(1, 21), train_loss, marker="o", markersize=4, label="training")
ax.semilogy(range(1, 21), test_loss, marker="o", markersize=4, label="test")
ax.set(xlabel="epoch", ylabel="mean loss (nats)", xticks=range(0, 21, 5), title="Digits")
ax.legend()
plt.show()

# %% [markdown]
# ## One gradient per example with `jax.vmap`
#
# The norm $\lVert \nabla_\theta\, \ell_i \rVert$ measures how strongly example $i$ influences the parameters $\theta$. Gradient
# clipping per example and data selection use this norm. Write the loss of one example, with logits `[classes]` and a scalar label.
# Then `jax.vmap(jax.grad(...))` gives the gradients of all examples. For a few digits, the norm is far larger than for the rest.


# %%
def gradient_norm(x, y):
    gradient = jax.grad(lambda p: xentjax.softmax_cross_entropy(predict(p, x), y))(params)
    return jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))


norms = jax.jit(jax.vmap(gradient_norm))(test_x, test_y)
hardest = np.argsort(-norms)[:8]
guess = predict(params, test_x).argmax(-1)
print(f"norm of the gradient: median {jnp.median(norms):.1e}, largest {norms.max():.1f}")

fig, axes = plt.subplots(1, 8, figsize=(11, 1.9))
for ax, i in zip(axes, hardest, strict=True):
    ax.imshow(test_x[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(
        f"{test_y[i]} taken for {guess[i]}\nnorm {norms[i]:.0f}" if guess[i] != test_y[i] else f"{test_y[i]}\nnorm {norms[i]:.0f}",
        fontsize=9,
    )
    ax.set_axis_off()
fig.suptitle("The eight test digits with the largest gradients")
plt.show()

# %% [markdown]
# ## Label smoothing
#
# `label_smoothing` $= \varepsilon$ moves a share of each label evenly to all classes: $t_k = (1 - \varepsilon)\,[k = y] + \varepsilon / K$.
# The loss is then smallest at a finite margin. So training does not push the model towards ever higher confidence. In the next cell, the
# networks learn from only 128 digits. Without smoothing, they become overconfident: the mean of their confidence $\max_k p_k$ is above
# their accuracy. The plot has one line for the mean confidence and one for the accuracy. Mean confidence and accuracy are equal where these
# lines cross. With more smoothing, the networks are less confident than they are accurate.
#
# $\varepsilon$ may be an array, so `jax.vmap` trains all networks at once: 7 values of $\varepsilon$ times 4 initialisations.


# %%
def minimise(loss, params, steps, rate=1e-2):
    optimizer = optax.adam(rate)

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), length=steps)
    return params


def confidence_and_accuracy(epsilon, key):
    x, y = train_x[:128], train_y[:128]
    fitted = minimise(
        lambda p: xentjax.weighted_mean(xentjax.softmax_cross_entropy(predict(p, x), y, label_smoothing=epsilon)), init(key), steps=300
    )
    z = predict(fitted, test_x)
    return jax.nn.softmax(z).max(-1).mean(), jnp.mean(z.argmax(-1) == test_y)


epsilons = jnp.array([0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
keys = jax.random.split(jax.random.key(4), 4)
over_keys = jax.vmap(confidence_and_accuracy, in_axes=(None, 0))
confidence, accuracy = jax.jit(jax.vmap(over_keys, in_axes=(0, None)))(epsilons, keys)

fig, ax = plt.subplots(figsize=(5.5, 3.6))
for values, name in ((confidence, "mean confidence"), (accuracy, "accuracy")):
    (line,) = ax.plot(epsilons, 100 * values.mean(1), marker="o", markersize=4, label=name)
    ax.fill_between(epsilons, 100 * values.min(1), 100 * values.max(1), color=line.get_color(), alpha=0.2)
ax.set(xlabel="label smoothing ε", ylabel="on test digits (%)", title="Trained on 128 digits; bands: 4 initialisations")
ax.legend(loc="lower left")
plt.show()
for i in (0, 2, 5):
    print(f"ε = {epsilons[i]:.2f}: mean confidence {100 * confidence[i].mean():.1f} %, accuracy {100 * accuracy[i].mean():.1f} %")

# %% [markdown]
# ## Class weights
#
# With 950 examples of one class and 50 of the other, a model does well by ignoring the rare one. `class_weights` $= w$
# multiplies each class's term, $\ell = -w_y \log p_y$. An example with weight 19 counts as 19 copies of it. A larger weight
# for the rare class moves the decision boundary towards the common class. To divide by $\sum_i w_{y_i}$ instead of $n$ in the mean,
# leave out `class_weights` and write `weighted_mean(loss, weights=w[y])`.

# %%
rng = np.random.default_rng(1)
y = np.repeat([0, 1], [950, 50])
x = rng.normal(size=(1000, 2)) + np.array([[-0.8, -0.4], [0.8, 0.4]])[y]
x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)


def fit_linear(rare_weight):
    weights = jnp.stack([jnp.ones_like(rare_weight), rare_weight])

    def loss(p):
        return xentjax.weighted_mean(xentjax.softmax_cross_entropy(x @ p[0] + p[1], y, class_weights=weights))

    return minimise(loss, (jnp.zeros((2, 2)), jnp.zeros(2)), steps=300, rate=1e-1)


rare_weights = 19 ** jnp.linspace(0, 1.5, 13)  # 1, ..., 19, ..., 83
w, b = jax.jit(jax.vmap(fit_linear))(rare_weights)
predicted = (jnp.einsum("nd,wdk->wnk", x, w) + b[:, None]).argmax(-1)
recall = jnp.stack([jnp.mean(predicted[:, y == k] == k, axis=1) for k in (0, 1)])

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for k, name in ((0, "common class (950)"), (1, "rare class (50)")):
    left.scatter(*x[y == k].T, s=10, alpha=0.35 if k == 0 else 0.9, color=f"C{k}", label=name, linewidths=0)
    right.semilogx(rare_weights, 100 * recall[k], marker="o", markersize=4, color=f"C{k}", label=name)
across = np.array([-5.0, 5.0])
for i, style in ((0, "--"), (8, "-")):
    slope, offset = w[i, :, 1] - w[i, :, 0], b[i, 1] - b[i, 0]
    left.plot(across, -(offset + slope[0] * across) / slope[1], style, color="black", label=f"boundary, weight {rare_weights[i]:.0f}")
left.set(xlabel="first feature", ylabel="second feature", xlim=(-4.5, 4.5), ylim=(-4, 5.5), title="Where the boundary lies")
left.legend(loc="upper right", fontsize=9)
right.axvline(19, color="black", linewidth=1, linestyle=":", label="950/50 = 19")
right.set(xlabel="weight of the rare class", ylabel="recall (%)", title="Share of each class that is found")
right.legend(loc="lower right")
plt.show()
for i in (0, 8):
    print(
        f"weight {rare_weights[i]:.0f}: recall {100 * recall[0, i]:.0f} % of the common class, {100 * recall[1, i]:.0f} % of the rare one"
    )

# %% [markdown]
# ## Focal loss
#
# Focal loss gives less weight to examples whose label already has a high probability, so that the hard examples dominate:
#
# $$\ell_\gamma = (1 - p_y)^\gamma \, (-\log p_y), \qquad \gamma = 0 \text{ is cross-entropy.}$$
#
# The right plot shows the size of the gradient with respect to the label's logit, $|\partial \ell_\gamma / \partial z_y|$, from
# `jax.grad`. For larger $\gamma$, it vanishes faster as $p_y \to 1$. For yes-or-no decisions there is `xentjax.sigmoid_focal_loss`.

# %%
p = jnp.linspace(0.005, 0.995, 199)
z = jnp.log(p / (1 - p))  # with logits (z, 0) the first class has probability p
label = jnp.array(0)

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for gamma in (0.0, 1.0, 2.0, 5.0):

    def focal(z, gamma=gamma):
        return xentjax.softmax_focal_loss(jnp.stack([z, jnp.zeros_like(z)]), label, gamma=gamma)

    name = f"γ = {gamma:.0f}" + (" (cross-entropy)" if gamma == 0 else "")
    left.plot(p, jax.vmap(focal)(z), label=name)
    right.plot(p, jnp.abs(jax.vmap(jax.grad(focal))(z)), label=name)
left.set(xlabel="probability of the label", ylabel="loss (nats)", title="Loss")
right.set(xlabel="probability of the label", ylabel="|∂loss/∂logit|", title="Gradient")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## Masks
#
# Sentences differ in length, so batches contain padding. The model's outputs at padding may have any value, even NaN. Multiplying
# by a mask does not help, since $0 \cdot \text{NaN} = \text{NaN}$; `jnp.where` on the loss repairs the value but not the
# gradient. Pass the mask as `where`. Where the mask is False, the loss and its gradient are exactly 0, whatever the position holds.
# `weighted_mean` takes the same `where` and divides by the number of positions where it is True.

# %%
lengths = jnp.array([6, 3, 1])
tokens = jax.random.randint(jax.random.key(5), (3, 6), 0, 5)
real = jnp.arange(6) < lengths[:, None]  # [sentence, position]
tokens = jnp.where(real, tokens, -100)  # a usual label for padding
logits = jnp.where(real[..., None], jax.random.normal(jax.random.key(6), (3, 6, 5)), jnp.nan)


def masked_after(z):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(z), jnp.where(real, tokens, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(real, -log_p, 0)) / real.sum()


def masked_inside(z):
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(z, tokens, where=real), where=real)


with np.printoptions(precision=2, suppress=True):
    print("loss in nats, a sentence a row:", np.asarray(xentjax.softmax_cross_entropy(logits, tokens, where=real)), sep="\n")
for name, function in (("jnp.where afterwards", masked_after), ("where=real", masked_inside)):
    value, gradient = jax.value_and_grad(function)(logits)
    print(f"{name:20}  mean loss {value:.4f} nats, {jnp.isnan(gradient).sum()} of {gradient.size} gradient entries are NaN")
assert jnp.all(jnp.where(real[..., None], gradient != 0, gradient == 0))

# %% [markdown]
# ## Checks on values
#
# Inside `jax.jit` no error can be raised for a bad label, so an index out of range gives NaN rather than a plausible number.
# To find it, wrap the function in `xentjax.checked`: the first bad value is then named in a `ValueError`. `checked` also
# works on a whole jitted training step: `checked(jax.jit(step))`. Without `checked`, these checks do not
# run, and cost nothing.

# %%
logits = jnp.zeros((3, 10))
labels = jnp.array([3, 10, 7])  # ten classes: 0 to 9
print("without checks:", xentjax.softmax_cross_entropy(logits, labels))
try:
    xentjax.checked(jax.jit(xentjax.softmax_cross_entropy))(logits, labels)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Gradient accumulation
#
# A batch too large for memory is split into parts whose gradients are added. If the parts hold different numbers of real tokens,
# the mean of the parts' means is not the mean over the batch:
#
# $$\frac{\sum_j S_j}{\sum_j W_j} \neq \frac{1}{J} \sum_j \frac{S_j}{W_j}, \qquad
# S_j = \sum_{i \in j} w_i \ell_i, \quad W_j = \sum_{i \in j} w_i .$$
#
# `xentjax.weighted_sum` returns the pair $(S, W)$ as a `WeightedSum`. You can add such pairs with `+`, and `.mean()` divides once at the
# end. Gradients follow the same rule: add $\nabla S_j$ over the parts and divide by $\sum_j W_j$.

# %%
n, length = 32, 20
x = jax.random.normal(jax.random.key(7), (n, length, 16))
y = jax.random.randint(jax.random.key(8), (n, length), 0, 10)
lengths = jnp.concatenate([jnp.full(8, 20), jnp.full(8, 10), jnp.full(8, 4), jnp.full(8, 1)])
real = jnp.arange(length) < lengths[:, None]
w = jax.random.normal(jax.random.key(9), (16, 10))


def part_sum(w, x, y, real):
    return xentjax.weighted_sum(xentjax.softmax_cross_entropy(x @ w, y, where=real), where=real)


def total_and_weight(w, *part):
    sums = part_sum(w, *part)
    return sums.total, sums


full_loss, full_gradient = jax.value_and_grad(lambda w: part_sum(w, x, y, real).mean())(w)

parts = [(x[i : i + 8], y[i : i + 8], real[i : i + 8]) for i in range(0, n, 8)]
sums = xentjax.WeightedSum(jnp.zeros(()), jnp.zeros(()))
gradient = jnp.zeros_like(w)
part_step = jax.jit(jax.grad(total_and_weight, has_aux=True))
for part in parts:
    part_gradient, s = part_step(w, *part)
    sums, gradient = sums + s, gradient + part_gradient
gradient /= sums.weight

mean_of_means = jax.jit(jax.value_and_grad(lambda w: jnp.stack([part_sum(w, *part).mean() for part in parts]).mean()))(w)
print("real tokens per part:", [int(part[2].sum()) for part in parts])
for name, (value, found) in (("WeightedSum", (sums.mean(), gradient)), ("mean of means", mean_of_means)):
    off = jnp.linalg.norm(found - full_gradient) / jnp.linalg.norm(full_gradient)
    print(f"{name:14} loss {value:.6f} nats (whole batch {full_loss:.6f}), gradient off by {off:.1e} of its norm")
assert jnp.max(jnp.abs(gradient - full_gradient)) < 8 * EPS

# %% [markdown]
# The same rule holds across devices. Inside `jax.shard_map`, use `sums.psum("batch").mean()` or
# `weighted_mean(..., axis_name="batch")`. Both add up $S$ and $W$ over the mesh before they divide.
#
# That is all you need to train a classifier. The docstrings hold the formula, gradient, shapes, dtypes and an example for every function:
# `help(xentjax.softmax_cross_entropy)`.
