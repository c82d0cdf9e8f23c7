# %% [markdown]
# # Generating: regression, a GAN and an autoencoder
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/generating.ipynb)
#
# Cross-entropy is not only for classifiers. This notebook uses it to train three models that produce numbers and images. A regression
# model predicts how uncertain it is. A GAN draws digits. An autoencoder compresses digits to 8 numbers. In all three, the loss of a
# perfect model is not 0. You will see how large it is, and why. The notebook takes less than a minute on a CPU.

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
from sklearn.datasets import load_diabetes, load_digits

import xentjax
from xentjax import information

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # colours that colour-blind readers can tell apart

# %% [markdown]
# All models are small networks of dense layers. The following two functions create such a network and apply it.


# %%
def init(key, sizes):
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [(jax.random.normal(k, (m, n)) * np.sqrt(2 / m), jnp.zeros(n)) for k, (m, n) in zip(keys, shapes, strict=True)]


def network(params, x, activation=jax.nn.leaky_relu):
    *hidden, (w_out, b_out) = params
    for w, b in hidden:
        x = activation(x @ w + b)
    return x @ w_out + b_out


# %% [markdown]
# # 1. Regression: predict the uncertainty too
#
# ## Squared error is a cross-entropy
#
# A regression model can predict a distribution instead of a number. Let the distribution be Gaussian with mean $\mu$ and
# variance $v$. The negative log-density of a target $x$ is
#
# $$\ell = -\log q(x) = \frac{1}{2} \left( \frac{(x - \mu)^2}{v} + \log v + \log 2\pi \right).$$
#
# The mean of $\ell$ over the data is the cross-entropy between the distribution of the data and $q$. `xentjax.gaussian_nll` computes
# $\ell$. If $v$ is fixed, minimizing $\ell$ is the same as minimizing the squared error. If $v$ is one learned number, the best $v$ is
# the mean squared error $s^2$, and the loss is then $\frac{1}{2} (1 + \log 2\pi s^2)$.

# %%
residuals = 3 * jax.random.normal(jax.random.key(0), (1000,))


def mean_loss(log_variance):
    return xentjax.weighted_mean(xentjax.gaussian_nll(jnp.zeros(1000), residuals, log_variance=log_variance))


s2 = np.mean(np.asarray(residuals, np.float64) ** 2)
value, slope = jax.value_and_grad(mean_loss)(jnp.log(jnp.float32(s2)))
print(f"at v = s² = {s2:.3f}: loss {value:.5f} nats, slope {slope:.0e}")
print(f"½ (1 + log 2πs²):      {(1 + np.log(2 * np.pi * s2)) / 2:.5f} nats")
assert abs(value - (1 + np.log(2 * np.pi * s2)) / 2) < 1e-5 and abs(slope) < 1e-5

# %% [markdown]
# The loss contains the logarithm of a density. A density depends on the unit of the target, and it can be larger than 1. So a
# negative loss is not an error. Only differences between losses in the same unit are meaningful.

# %%
for unit, factor in (("metres", 1.0), ("millimetres", 1000.0), ("kilometres", 0.001)):
    in_unit = xentjax.gaussian_nll(jnp.zeros(1000), factor * residuals, variance=factor**2 * s2).mean()
    print(f"the same residuals in {unit:11}: {in_unit:7.3f} nats")
    assert abs(in_unit - value - np.log(factor)) < 1e-4

# %% [markdown]
# ## Two models of diabetes data
#
# The diabetes data set of scikit-learn has 10 numbers for each of 442 patients, such as age, blood pressure and body mass index. The
# target is a score of how far the disease progressed within one year. All columns are scaled to mean 0 and variance 1.
#
# Both models use the same type of network. It has 16 hidden units and two outputs, $\mu$ and $\log v$. The models differ in $\log v$.
#
# - **Learned variance:** both outputs depend on the patient.
# - **Constant variance:** $\log v$ is one learned number, the same for all patients.
#
# With only 442 patients, the split into training, validation and test patients matters. We train on 32 random splits, each with its own
# random initialisation. Weight decay keeps the networks from memorizing the data. We try four strengths. `jax.vmap` trains all
# 2 × 4 × 32 = 256 networks at once.

# %%
diabetes = load_diabetes()
features = jnp.asarray((diabetes.data - diabetes.data.mean(0)) / diabetes.data.std(0), jnp.float32)
center, spread = diabetes.target.mean(), diabetes.target.std()
score = jnp.asarray((diabetes.target - center) / spread, jnp.float32)


def predict(params, x, learned):
    mean, log_variance = network(params, x, jax.nn.tanh).T
    constant = params[-1][1][1]  # the bias of the second output
    return mean, jnp.where(learned, log_variance, constant)


def patient_losses(params, rows, learned):
    mean, log_variance = predict(params, features[rows], learned)
    return xentjax.gaussian_nll(mean, score[rows], log_variance=log_variance)


# %%
def train_and_test(learned, decay, key):
    split_key, init_key = jax.random.split(key)
    train, validation, test = jnp.split(jax.random.permutation(split_key, 442), [300, 371])
    params = init(init_key, (10, 16, 2))
    optimizer = optax.adamw(1e-2, weight_decay=decay, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p))  # weights, not biases

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: xentjax.weighted_mean(patient_losses(p, train, learned)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    mean, log_variance = predict(params, features[test], learned)
    losses = {name: patient_losses(params, rows, learned).mean() for name, rows in (("validation", validation), ("test", test))}
    return losses | {"mean": mean, "sigma": jnp.exp(log_variance / 2), "target": score[test]}


learned, decays, keys = jnp.array([False, True]), jnp.array([2.0, 4, 8, 16]), jax.random.split(jax.random.key(1), 32)
over_keys = jax.vmap(train_and_test, in_axes=(None, None, 0))
over_decays = jax.vmap(over_keys, in_axes=(None, 0, None))
results = jax.jit(jax.vmap(over_decays, in_axes=(0, None, None)))(learned, decays, keys)  # [model, decay, split, ...]

# %% [markdown]
# ## The gain is small, but real
#
# We select the weight decay of each model by the mean loss on the validation patients. We then compare the losses on the test patients.

# %%
best = results["validation"].mean(-1).argmin(-1)  # [model]
constant, variable = (jax.tree.map(lambda a, m=m: np.asarray(a[m, best[m]], np.float64), results) for m in (0, 1))
gain = constant["test"] - variable["test"]
error = gain.std(ddof=1) / np.sqrt(len(gain))

fig, ax = plt.subplots(figsize=(5.5, 3.3))
for m, (name, color, marker) in enumerate((("constant variance", ORANGE, "s"), ("learned variance", BLUE, "o"))):
    ax.plot(decays, results["test"][m].mean(-1), color=color, marker=marker, label=name)
ax.set(xlabel="weight decay", xscale="log", ylabel="test loss (nats per patient)", title="Mean over 32 splits")
ax.set_xticks(decays, [f"{d:.0f}" for d in decays])
ax.minorticks_off()
ax.legend()
plt.show()

print(f"selected weight decay: constant variance {decays[best[0]]:.0f}, learned variance {decays[best[1]]:.0f}")
print(f"test loss: constant variance {constant['test'].mean():.3f}, learned variance {variable['test'].mean():.3f} nats")
print(f"gain: {gain.mean():.3f} ± {error:.3f} (standard error) nats; it is positive in {np.sum(gain > 0)} of 32 splits")
assert gain.mean() > 2 * error

# %% [markdown]
# The gain is a few hundredths of a nat per patient. It is real, because it is several times its standard error. The plot shows that
# the choice of the weight decay matters more than the choice of the model.
#
# ## Prediction intervals
#
# If the model is right, 90 % of all targets lie in the interval $\mu \pm 1.645 \sqrt{v}$. The coverage is the share of the targets that
# actually lie in the interval. The picture shows the test patients of the first split, in the original unit of the score.

# %%
z90 = float(jax.scipy.stats.norm.ppf(0.95))  # 1.645


def inside(result):
    return np.abs(result["target"] - result["mean"]) <= z90 * result["sigma"]


fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True)
for ax, result, name in zip(axes, (constant, variable), ("constant variance", "learned variance"), strict=True):
    order = np.argsort(result["mean"][0])
    mean, target = (center + spread * result[key][0, order] for key in ("mean", "target"))
    bar, hit, rank = z90 * spread * result["sigma"][0, order], inside(result)[0, order], np.arange(len(order))
    ax.fill_between(rank, mean - bar, mean + bar, color="black", alpha=0.15, linewidth=0, label="90 % interval")
    ax.plot(rank, mean, color="black", linewidth=1.5, label="mean")
    ax.plot(rank[hit], target[hit], "o", color=BLUE, markersize=5, label="target inside")
    ax.plot(rank[~hit], target[~hit], "X", color=ORANGE, markersize=8, label="target outside")
    ax.set(xlabel="test patient, sorted by predicted mean", title=f"{name}: {hit.sum()} of {hit.size} inside")
axes[0].set_ylabel("score after one year")
axes[0].legend(loc="upper left", fontsize=9)
plt.show()

# %% [markdown]
# Over all splits, both models cover slightly less than 90 % of the test patients. But they differ in the patients that they miss. We sort
# the test patients of each split by the learned $\sqrt{v}$, from the smallest to the largest, and form three groups. The intervals of the
# model with constant variance contain too many targets of the first group and too few of the last. The model with learned variance comes
# close to 90 % in both groups. In the middle group, both models cover about the same share.

# %%
order = np.argsort(variable["sigma"], axis=1)
parts = np.array_split(order, 3, axis=1)
thirds = [np.stack([np.take_along_axis(inside(r), part, axis=1).mean() for part in parts]) for r in (constant, variable)]

fig, ax = plt.subplots(figsize=(5.5, 3.3))
for share, name, color, marker in ((thirds[0], "constant variance", ORANGE, "s"), (thirds[1], "learned variance", BLUE, "o")):
    ax.plot(range(3), 100 * share, color=color, marker=marker, markersize=8, label=name)
ax.axhline(90, color="black", linestyle=":", label="aim: 90 %")
ax.set(ylim=(70, 100), ylabel="coverage of test patients (%)", xlim=(-0.3, 2.3), xlabel="learned standard deviation")
ax.set_xticks(range(3), ["smallest third", "middle third", "largest third"])
ax.legend(loc="lower left")
plt.show()

covered = [inside(r).mean() for r in (constant, variable)]
print(f"coverage over all: constant variance {100 * covered[0]:.1f} %, learned variance {100 * covered[1]:.1f} %")
assert all(0.84 < share < 0.94 for share in covered)
assert np.ptp(thirds[1]) < np.ptp(thirds[0]) - 0.03

# %% [markdown]
# # 2. A GAN: cross-entropy between two networks
#
# ## The best loss of the discriminator is log 4 − 2 JS
#
# A generative adversarial network has two networks. The generator turns random numbers into images. The discriminator distinguishes real
# images (label 1) from generated images (label 0). It outputs a logit $z$, and $D = \sigma(z)$ is the probability that an image is real.
# Its loss is the sum of two cross-entropies:
#
# $$L_D = \mathbb{E}_\text{real}[-\log D] + \mathbb{E}_\text{generated}[-\log (1 - D)].$$
#
# For densities $p$ of real and $q$ of generated images, the best discriminator has the logit $z = \log p - \log q$. Then
# $L_D = \log 4 - 2\,\mathrm{JS}(p, q)$, where JS is the Jensen–Shannon divergence. If $p = q$, then $D = \frac{1}{2}$ everywhere and
# $L_D = \log 4$. So a good generator does not drive the discriminator's loss to 0. It drives the loss up to
# $\log 4 \approx 1.386$.
#
# The plot checks this for two normal distributions, with `sigmoid_cross_entropy` and `information.js_divergence`.

# %%
x = np.linspace(-12, 18, 3001)
distances = np.linspace(0, 6, 25)
normal = np.exp(-0.5 * (x - distances[:, None]) ** 2)
p, q = (jnp.asarray(a / a.sum(-1, keepdims=True), jnp.float32) for a in (np.broadcast_to(normal[0], normal.shape), normal))
best_logit = jnp.asarray(0.5 * (x - distances[:, None]) ** 2 - 0.5 * x**2, jnp.float32)  # log p − log q

on_real = xentjax.sigmoid_cross_entropy(best_logit, jnp.ones_like(best_logit))
on_generated = xentjax.sigmoid_cross_entropy(best_logit, jnp.zeros_like(best_logit))
loss = jnp.sum(p * on_real + q * on_generated, axis=-1)
formula = np.log(4) - 2 * information.js_divergence(p, q)
assert np.max(np.abs(loss - formula)) < 1e-5

fig, ax = plt.subplots(figsize=(5.5, 3.3))
ax.plot(distances, formula, color=BLUE, label="log 4 − 2 JS(p, q)")
ax.plot(distances, loss, "o", color=ORANGE, markersize=5, label="loss of the best discriminator")
ax.axhline(np.log(4), color="black", linestyle=":", label="log 4")
ax.set(xlabel="distance of the means (standard deviations)", ylabel="loss (nats)", title="Two normal distributions", ylim=(-0.05, 1.55))
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Why the generator does not minimize log(1 − D)
#
# Many texts describe a game: the discriminator maximizes $\log(1 - D)$ on generated images, and the generator minimizes it. In
# practice, the generator minimizes $-\log D$, the cross-entropy with label 1. Both losses push $D$ up. Their gradients differ:
#
# $$\frac{\partial}{\partial z} \log(1 - D) = -D, \qquad \frac{\partial}{\partial z} (-\log D) = -(1 - D).$$
#
# At first, the generated images look like noise. The discriminator recognizes them easily, so $D \approx 0$ on them. Then the first
# gradient vanishes, and the second does not. The left plot shows both gradients. For the right plot, a discriminator trains alone against
# an untrained generator. At each step, we compute the gradients of both losses with respect to the parameters of the generator.

# %%
digits = load_digits()
shuffled = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.data[shuffled] / 16, jnp.float32)  # [image, pixel], from 0 (white) to 1 (black)
classes = jnp.asarray(digits.target[shuffled], jnp.int32)
train, test = images[:1400], images[1400:]


# %%
def generate(generator, noise):
    return jax.nn.sigmoid(network(generator, noise))


def bce(discriminator, x, label):
    z = network(discriminator, x)[:, 0]
    return xentjax.weighted_mean(xentjax.sigmoid_cross_entropy(z, jnp.full_like(z, label)))


def discriminator_loss(discriminator, real, generated):
    return bce(discriminator, real, 1) + bce(discriminator, generated, 0)


def generator_loss(generator, discriminator, noise):
    return bce(discriminator, generate(generator, noise), 1)  # −log D


def minimax_loss(generator, discriminator, noise):
    return -bce(discriminator, generate(generator, noise), 0)  # log(1 − D)


# %%
LATENT, BATCH = 16, 64
adam = optax.adam(1e-3, b1=0.5, b2=0.99)


def draw(key):  # a batch of real images and the noise for a batch of generated ones
    real_key, noise_key = jax.random.split(key)
    return train[jax.random.randint(real_key, (BATCH,), 0, len(train))], jax.random.normal(noise_key, (BATCH, LATENT))


def update(optimizer, loss, params, state, *args):
    value, gradient = jax.value_and_grad(loss)(params, *args)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


def alone(carry, key):
    real, noise = draw(key)
    discriminator, state, _ = update(adam, discriminator_loss, *carry, real, generate(generator, noise))
    norms = [optax.tree.norm(jax.grad(f)(generator, discriminator, noise)) for f in (generator_loss, minimax_loss)]
    return (discriminator, state), norms


# %%
generator = init(jax.random.key(2), (LATENT, 128, 128, 64))
discriminator = init(jax.random.key(3), (64, 128, 128, 1))
start = (discriminator, adam.init(discriminator))
(ahead, _), (norm, minimax_norm) = jax.lax.scan(alone, start, jax.random.split(jax.random.key(4), 300))

# %%
z = jnp.linspace(-12, 4, 200)
slope = jax.vmap(jax.grad(lambda z: xentjax.sigmoid_cross_entropy(z, 1.0)))(z)
minimax_slope = jax.vmap(jax.grad(lambda z: -xentjax.sigmoid_cross_entropy(z, 0.0)))(z)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
left.semilogy(z, -minimax_slope, color=ORANGE, label="log(1 − D)")
left.semilogy(z, -slope, color=BLUE, label="−log D")
left.set(xlabel="logit z of a generated image", ylabel="size of the gradient", title="Gradient with respect to the logit")
left.legend(loc="lower right")
right.semilogy(range(1, 301), minimax_norm, color=ORANGE, label="log(1 − D)")
right.semilogy(range(1, 301), norm, color=BLUE, label="−log D")
right.set(xlabel="steps of the discriminator alone", ylabel="norm of the gradient", title="Gradient with respect to the generator")
right.legend(loc="center right")
plt.show()

print(f"after 300 steps: −log D {norm[-1]:.2g}, log(1 − D) {minimax_norm[-1]:.2g}, ratio {norm[-1] / minimax_norm[-1]:.0f}")
z64 = np.asarray(z, np.float64)
assert np.allclose(minimax_slope, -1 / (1 + np.exp(-z64)), rtol=1e-5) and np.allclose(slope, -1 / (1 + np.exp(z64)), rtol=1e-5)
assert norm[-1] > 30 * minimax_norm[-1]

# %% [markdown]
# ## Training both networks
#
# The discriminator and the generator take turns, one step each. In theory, the equilibrium is $D = \frac{1}{2}$. There, the
# discriminator's loss is $\log 4$, and the generator's loss is $\log 2$. After every 50 steps, we record
# these two losses and three other things:
#
# - the loss of the discriminator when the real images are test digits,
# - some samples,
# - the mean distance of 100 samples from their nearest training digits.


# %%
def nearest(x, others):  # the Euclidean distance of each image from the nearest of the others
    return jax.vmap(lambda a: jnp.sqrt(jnp.sum((others - a) ** 2, axis=-1)).min())(x)


# %%
def train_gan(optimizer, g_objective, generator, discriminator, blocks):
    def step(carry, key):
        generator, g_state, discriminator, d_state = carry
        (real, noise), (_, new_noise) = map(draw, jax.random.split(key))
        images = generate(generator, noise)
        discriminator, d_state, d_loss = update(optimizer, discriminator_loss, discriminator, d_state, real, images)
        generator, g_state, g_loss = update(optimizer, g_objective, generator, g_state, discriminator, new_noise)
        return (generator, g_state, discriminator, d_state), (d_loss, g_loss)

    def block(carry, keys):
        carry, (d_loss, g_loss) = jax.lax.scan(step, carry, keys)
        samples = generate(carry[0], fixed_noise)
        record = {"discriminator": d_loss.mean(), "generator": g_loss.mean(), "test": discriminator_loss(carry[2], test, samples)}
        return carry, record | {"samples": samples[:14], "distance": nearest(samples, train).mean()}

    start = (generator, optimizer.init(generator), discriminator, optimizer.init(discriminator))
    (generator, *_), history = jax.lax.scan(block, start, jax.random.split(jax.random.key(6), (blocks, 50)))
    return generator, history


fixed_noise = jax.random.normal(jax.random.key(5), (100, LATENT))
trained_generator, history = train_gan(adam, generator_loss, generator, discriminator, 70)

# %%
steps = 50 * np.arange(1, 71)
between_real = nearest(test, train).mean()
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
left.plot(steps, history["test"], color=GREEN, label="discriminator, test digits")
left.plot(steps, history["discriminator"], color=ORANGE, label="discriminator, training digits")
left.plot(steps, history["generator"], color=BLUE, label="generator")
left.axhline(np.log(4), color=ORANGE, linestyle=":", label="log 4 (discriminator)")
left.axhline(np.log(2), color=BLUE, linestyle=":", label="log 2 (generator)")
left.set(xlabel="step", ylabel="loss (nats)", title="Losses; dotted: the equilibrium of theory", ylim=(0.5, 2.75))
left.legend(loc="upper right", fontsize=8, ncols=2, columnspacing=0.8, handlelength=1.5)
right.plot(steps, history["distance"], color=BLUE, label="samples")
right.axhline(between_real, color="black", linestyle=":", label="real test digits")
right.set(xlabel="step", ylabel="Euclidean distance", title="Distance from the nearest training digit", ylim=(0.8, None))
right.legend()
plt.show()
d_loss, g_loss, test_loss = (float(history[name][-10:].mean()) for name in ("discriminator", "generator", "test"))
print(f"last 500 steps: discriminator {d_loss:.2f} nats (test digits {test_loss:.2f}), generator {g_loss:.2f} nats")
assert d_loss < np.log(4) - 0.1 and d_loss < test_loss and g_loss > np.log(2) + 0.1
assert between_real < history["distance"][-1] < 0.75 * history["distance"][0]

# %% [markdown]
# The losses do not show that the samples improve. From step 1,000 on, the distance on the right falls, but the losses move slowly away from
# the equilibrium. One reason is that the discriminator memorizes its 1,400 training digits. This is visible in the left plot: the loss of
# the discriminator is higher on test digits than on training digits. So do not judge a GAN by its losses. Look at the samples, and measure
# them in another way. The samples are not copies of training digits: their mean distance stays above that of real test digits.


# %%
def show_rows(rows, title):
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 0.3 + 0.6 * len(rows)))
    for ax, (name, row) in zip(axes, rows.items(), strict=True):
        sheet = np.pad(np.asarray(row).reshape(-1, 8, 8), ((0, 0), (0, 0), (1, 1)))  # a white column on each side
        ax.imshow(np.concatenate(sheet, axis=1), cmap="gray_r", vmin=0, vmax=1)
        ax.text(-0.01, 0.5, name, transform=ax.transAxes, ha="right", va="center")
        ax.set_axis_off()
    fig.suptitle(title)
    plt.show()


rows = {"real": test[:14]} | {f"step {steps[i]}": history["samples"][i] for i in (0, 3, 15, 69)}
show_rows(rows, "Real digits, and samples from the same 14 random inputs at four steps")

# %% [markdown]
# ## Do the samples look like digits?
#
# We train a classifier on the real training digits with `softmax_cross_entropy`. We then apply it to three sets of images: test digits,
# samples, and images of scrambled pixels. To scramble the pixels, we shuffle the values at each position among all test digits,
# independently of the other positions. We measure three numbers.
#
# - **Distance:** the mean distance from the nearest training digit.
# - **Confidence:** the classifier's largest probability, averaged over the images.
# - **Diversity:** $e^I$, where $I$ is the mutual information of image and class. It lies between 1 and 10. It is near 10 if the
#   classifier is certain about each image and all ten classes occur equally often. If the classifier is the network Inception, this
#   number is called the inception score.


# %%
def fit_classifier(params, x, y, steps=200):
    optimizer = optax.adamw(1e-2, weight_decay=1.0)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: xentjax.weighted_mean(xentjax.softmax_cross_entropy(network(p, x), y)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


classifier = fit_classifier(init(jax.random.key(7), (64, 64, 10)), train, classes[:1400])
accuracy = xentjax.metrics.accuracy(network(classifier, test), classes[1400:]).mean()
samples = generate(trained_generator, jax.random.normal(jax.random.key(8), (len(test), LATENT)))
scrambled = jax.random.permutation(jax.random.key(9), test, axis=0, independent=True)

quality = {}
print(f"accuracy of the classifier on test digits: {100 * accuracy:.1f} %\n\n{'':18} distance  confidence  diversity")
for name, x in (("test digits", test), ("samples", samples), ("scrambled pixels", scrambled)):
    p = jax.nn.softmax(network(classifier, x))
    diversity = jnp.exp(information.mutual_information(p / len(x)))  # p / n is the joint distribution of image and class
    quality[name] = np.array([nearest(x, train).mean(), p.max(-1).mean(), diversity])
    print(f"{name:18} {quality[name][0]:8.2f}  {quality[name][1]:10.2f}  {quality[name][2]:9.1f}")

# %% [markdown]
# By each of the three numbers, the samples lie between the two other sets, and they are closer to the test digits. Most of the samples
# look like digits, but they are not as clear or as diverse as real ones.

# %%
position = (quality["samples"] - quality["scrambled pixels"]) / (quality["test digits"] - quality["scrambled pixels"])
print("position of the samples (0: scrambled pixels, 1: test digits):", position.round(2))
assert accuracy > 0.95 and np.all(position > 0.3)

# %% [markdown]
# ## How much does the vanishing gradient matter?
#
# The vanishing gradient matters when the discriminator is ahead. We start from the untrained generator and the discriminator that trained
# alone for 300 steps. We train once with each of the two losses of the generator. We do this with SGD and then with Adam. `jax.vmap`
# trains with both losses in parallel.


# %%
def distances_of_samples(optimizer, share):  # share 1: log(1 − D), share 0: −log D
    def objective(*args):
        return share * minimax_loss(*args) + (1 - share) * generator_loss(*args)

    return train_gan(optimizer, objective, generator, ahead, 16)[1]["distance"]


optimizers = {"SGD": optax.sgd(0.1), "Adam": adam}
runs = {name: jax.vmap(lambda share, o=o: distances_of_samples(o, share))(jnp.array([1.0, 0.0])) for name, o in optimizers.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, (name, run) in zip(axes, runs.items(), strict=True):
    for curve, loss_name, color in zip(run, ("log(1 − D)", "−log D"), (ORANGE, BLUE), strict=True):
        ax.plot(50 * np.arange(1, 17), curve, color=color, label=f"generator minimizes {loss_name}")
    ax.axhline(between_real, color="black", linestyle=":", label="real test digits")
    ax.set(xlabel="step", title=name, ylim=(0.8, None))
axes[0].set_ylabel("distance of the samples")
axes[0].legend(fontsize=9, loc="center right")
plt.show()
assert runs["SGD"][0, 4] > 1.2 * runs["SGD"][1, 4]

# %% [markdown]
# With SGD, the generator that minimizes $\log(1 - D)$ does not improve during the 800 steps. The generator that minimizes $-\log D$
# learns at once. With Adam, both generators learn. Adam divides each gradient by its recent size, so even tiny gradients move the
# parameters. Which of the two Adam curves is lower depends on the random keys.

# %% [markdown]
# # 3. An autoencoder: cross-entropy of grey pixels
#
# ## The smallest loss is the entropy, not 0
#
# Each digit was scanned as an image of 32 × 32 black or white dots. Each pixel of the 8 × 8 image stands for a block of 16 dots. Its
# original value is the number $k$ of black dots in the block. So the scaled pixel value $t = k / 16$ is the share of black dots. A model
# predicts the probability $\sigma(z)$ of a black dot. The mean negative log-probability per dot is the cross-entropy with the soft label
# $t$:
#
# $$\ell = -t \log \sigma(z) - (1 - t) \log (1 - \sigma(z)) = H(t) + \mathrm{KL}(t \,\|\, \sigma(z)).$$
#
# The loss is smallest at $\sigma(z) = t$. Its value there is the entropy $H(t) = -t \log t - (1 - t) \log (1 - t)$. It is 0 only for a
# white or a black pixel. The left plot shows one pixel with $t = 5/16$.

# %%
z = jnp.linspace(-8, 8, 321)
t = jnp.full_like(z, 5 / 16)
functions = {
    "cross-entropy": lambda z, t: xentjax.sigmoid_cross_entropy(z, t),
    "squared error": lambda z, t: (jax.nn.sigmoid(z) - t) ** 2,
}
floor = -(5 / 16) * np.log(5 / 16) - (11 / 16) * np.log(11 / 16)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
for (name, function), color in zip(functions.items(), (BLUE, ORANGE), strict=True):
    left.plot(z, function(z, t), color=color, label=name)
    right.plot(z, jax.vmap(jax.grad(function))(z, t), color=color, label=name)
left.axhline(floor, color=BLUE, linestyle=":", label=f"entropy H(5/16) = {floor:.3f}")
left.set(xlabel="logit z", ylabel="loss of one pixel", title="Loss: cross-entropy in nats", ylim=(-0.1, 3.4))
right.set(xlabel="logit z", ylabel="∂loss/∂z", title="Gradient")
for ax in (left, right):
    ax.axvline(np.log(5 / 11), color="black", linewidth=1, linestyle="--", label="σ(z) = 5/16")
left.legend(loc="upper center", fontsize=9)
right.legend(loc="upper left")
plt.show()
at_minimum = xentjax.sigmoid_cross_entropy(np.float32(np.log(5 / 11)), np.float32(5 / 16))
assert abs(at_minimum - floor) < 1e-6

# %% [markdown]
# The right plot shows the gradient. It is $\sigma(z) - t$ for cross-entropy. For squared error it is
# $2\,(\sigma(z) - t)\,\sigma(z)\,(1 - \sigma(z))$, which vanishes at large $|z|$ even if the prediction is wrong.
#
# Now the same for whole images. The entropy of an image is the sum over its 64 pixels.

# %%
entropy = information.entropy(jnp.stack([test, 1 - test], axis=-1))  # [image, pixel], in nats
t64 = np.asarray(test, np.float64)
inner = np.where((t64 > 0) & (t64 < 1), t64, 0.5)
by_definition = np.where((t64 > 0) & (t64 < 1), -inner * np.log(inner) - (1 - inner) * np.log1p(-inner), 0)
floor = by_definition.sum(-1).mean()
perfect = xentjax.sigmoid_cross_entropy(jnp.log(test) - jnp.log1p(-test), test)  # σ(z) = t exactly; z = ±∞ at white and black pixels
print(f"mean entropy of a test digit: {floor:.3f} nats; loss of a perfect reconstruction: {perfect.sum(-1).mean():.3f} nats")
assert np.max(np.abs(entropy - by_definition)) < 1e-6 and abs(perfect.sum(-1).mean() - floor) < 1e-4

fig, axes = plt.subplots(2, 8, figsize=(9, 2.6))
for (top, bottom), image, h in zip(axes.T, test, entropy, strict=False):
    top.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    shown = bottom.imshow(h.reshape(8, 8), cmap="viridis", vmin=0, vmax=np.log(2))
    bottom.set_title(f"{h.sum():.1f} nats", fontsize=10)
    top.set_axis_off()
    bottom.set_axis_off()
fig.colorbar(shown, ax=axes, label="entropy (nats)")
fig.suptitle("Test digits, and the entropy of their pixels")
plt.show()

# %% [markdown]
# ## Training with both losses
#
# The autoencoder squeezes each digit into 8 numbers and rebuilds the 64 pixels from them. We train one model with cross-entropy and
# another with squared error. Each model is trained from 4 initialisations, which are the same for both losses. After every 50 steps, we
# measure both losses of both models on the test digits.


# %%
def reconstruct(params, x):  # the logits of the pixels
    encoder, decoder = params
    code = network(encoder, x)  # [image, 8]
    return network(decoder, code)


def image_loss(function, params, x):  # the sum over the pixels, the mean over the images
    return xentjax.weighted_mean(function(reconstruct(params, x), x).sum(-1))


# %%
def train_autoencoder(function, key):
    encoder_key, decoder_key, batch_key = jax.random.split(key, 3)
    params = init(encoder_key, (64, 64, 8)), init(decoder_key, (8, 64, 64))
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, state = carry
        x = train[jax.random.randint(key, (64,), 0, len(train))]
        updates, state = optimizer.update(jax.grad(lambda p: image_loss(function, p, x))(params), state)
        return (optax.apply_updates(params, updates), state), None

    def block(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, {name: image_loss(f, carry[0], test) for name, f in functions.items()}

    (params, _), curves = jax.lax.scan(block, (params, optimizer.init(params)), jax.random.split(batch_key, (24, 50)))
    return params, curves


keys = jax.random.split(jax.random.key(10), 4)
trained = {name: jax.jit(jax.vmap(lambda key, f=f: train_autoencoder(f, key)))(keys) for name, f in functions.items()}

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for name, color in zip(functions, (BLUE, ORANGE), strict=True):
    curve = trained[name][1]["cross-entropy"]  # [network, record]
    ax.plot(50 * np.arange(1, 25), curve.mean(0), color=color, label=f"trained with {name}")
    ax.fill_between(50 * np.arange(1, 25), curve.min(0), curve.max(0), color=color, alpha=0.2, linewidth=0)
ax.axhline(floor, color="black", linestyle=":", label=f"entropy of the pixels, {floor:.1f} nats")
ax.set(xlabel="step", ylabel="nats per test digit", title="Cross-entropy; bands: 4 initialisations", ylim=(13, 25))
ax.legend()
plt.show()

final = {(name, measure): float(trained[name][1][measure][:, -1].mean()) for name in functions for measure in functions}
for name in functions:
    print(f"trained with {name}: {final[name, 'cross-entropy']:.2f} nats, squared error {final[name, 'squared error']:.3f}")
excess = final["cross-entropy", "cross-entropy"] - floor
print(f"{floor:.1f} of {floor + excess:.1f} nats are entropy, and {excess:.1f} nats are the error of the model")
assert 0 < excess < 4
assert np.all(trained["cross-entropy"][1]["cross-entropy"] > floor)
assert final["squared error", "cross-entropy"] - final["cross-entropy", "cross-entropy"] > 0.1
assert abs(final["squared error", "squared error"] / final["cross-entropy", "squared error"] - 1) < 0.15

# %% [markdown]
# Compared with 0, the loss looks large. But most of it is entropy (the dotted line), which no model can remove. The two models reach
# nearly the same squared error. The model trained with squared error has a slightly larger cross-entropy. So on these digits,
# cross-entropy is the better loss, but the gain is small.
#
# ## Reconstructions
#
# The first row shows test digits. Each of the other rows shows their reconstructions by one model. We use the network from the first of the
# 4 initialisations.

# %%
rows = {"original": test[:14]}
for name in functions:
    first_network = jax.tree.map(lambda a: a[0], trained[name][0])
    rows[name] = jax.nn.sigmoid(reconstruct(first_network, test[:14]))
show_rows(rows, "Test digits, and their reconstructions")

# %% [markdown]
# ## What to remember
#
# - Cross-entropy works for any model that predicts a distribution. Squared error is the special case of a Gaussian with fixed variance.
# - Predict `log_variance` with a second output, and regularise the network. The intervals then widen where the targets are harder to
#   predict.
# - The best discriminator's loss is $\log 4 - 2\,\mathrm{JS}$. At equilibrium, the losses of a GAN are $\log 4$ and
#   $\log 2$, not 0. Its losses do not measure the quality of the samples.
# - Train the generator with $-\log D$. The gradient of $\log(1 - D)$ vanishes when the discriminator is ahead. With
#   Adam, the generator learns even from this tiny gradient.
# - With soft labels, the smallest cross-entropy is the entropy of the labels. Draw this entropy as a line in the plot of the loss.
#
# More: [quickstart](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb) ·
# [all losses by data and task](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md) ·
# [conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md)
