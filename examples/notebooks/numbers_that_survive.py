# %% [markdown]
# # Numbers that survive
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/numbers_that_survive.ipynb)
#
# Cross-entropy is one line of mathematics. Computers round, so different ways to compute it can give different results. This notebook
# compares four ways: the naive formula, clipping by ε, log-sum-exp, and `xentjax`. You will see at which logits each of them
# loses accuracy, and why. At the end, small networks learn to add modulo 31. Each network is trained three times, with a different loss
# each time. The margin is the label's logit minus the largest other logit. With two of the losses, the margins stop growing at 17 nats.
# With the third, the margins go on growing, and the test accuracy rises with them. The notebook takes about a minute on a CPU.

# %% [markdown]
# ## Install
#
# On Colab, the next cell installs the packages that this notebook uses. Elsewhere the cell does nothing. In that case, run
# `pip install git+https://github.com/xentjax/xentjax optax matplotlib` once.

# %%
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q git+https://github.com/xentjax/xentjax optax matplotlib")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import xentjax

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
EPS = float(jnp.finfo(jnp.float32).eps)  # 2^-23, the spacing of float32 numbers at 1
COLOR = {"naive": "#999999", "clipped": "#E69F00", "log_softmax": "#CC79A7", "optax": "#D55E00", "xentjax": "#0072B2"}

# %% [markdown]
# ## One plus a little is one
#
# A float32 number has 24 significant bits. Next to 1, the spacing of the numbers is $2^{-23} \approx 1.2 \cdot 10^{-7}$. Whatever is
# smaller than half of that spacing disappears when it is added to 1:
#
# $$1 + e^{-m} \;\text{ rounds to }\; 1 \quad\text{ if }\quad m > \log \frac{2}{\mathrm{eps}}.$$
#
# The table shows this limit for four dtypes.

# %%
limits = {name: float(np.log(2 / float(jnp.finfo(name).eps))) for name in ("bfloat16", "float16", "float32", "float64")}
for name, limit in limits.items():
    print(f"{name:9} eps = {float(jnp.finfo(name).eps):.1e}    1 + e^-m rounds to 1 above m = {limit:5.2f}")

one = np.float32(1)
print("float32: 1 + e^-16 =", one + np.exp(-np.float32(16)), "   1 + e^-17 =", one + np.exp(-np.float32(17)))
assert one + np.exp(-np.float32(16)) > 1 and one + np.exp(-np.float32(17)) == 1

# %% [markdown]
# The number $e^{-17} \approx 4 \cdot 10^{-8}$ itself is no problem. Float32 holds it with all 24 bits, and the smallest normal
# float32 number is about $e^{-87}$. It is lost only when it is added to 1. Keep this in mind: **float32 is poor at storing numbers near 1,
# and good at storing numbers near 0.**

# %% [markdown]
# ## Softmax overflows
#
# The textbook formula is $p_k = e^{z_k} / \sum_j e^{z_j}$ and $\ell = -\log p_y$. In float32, $e^{89}$ is infinite, and
# $\infty / \infty$ is NaN. `jax.nn.softmax` subtracts the largest logit first. This never overflows. But small probabilities
# underflow to 0, and the loss of a wrong prediction is then $-\log 0 = \infty$. Its gradient is NaN.


# %%
def pick(x, labels):  # x[..., label]
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]


def naive(logits, labels):
    e = jnp.exp(logits)
    return -jnp.log(pick(e / e.sum(-1, keepdims=True), labels))


def log_of_softmax(logits, labels):
    return -jnp.log(pick(jax.nn.softmax(logits), labels))


def log_softmax(logits, labels):
    return -pick(jax.nn.log_softmax(logits), labels)


logits = jnp.array([120.0, 0.0, 0.0])
for label in (jnp.array(0), jnp.array(1)):
    print("label", label)
    for loss in (naive, log_of_softmax, log_softmax, xentjax.softmax_cross_entropy):
        value, gradient = jax.value_and_grad(loss)(logits, label)
        print(f"    {loss.__name__:21} loss {value:5.1f}, gradient {gradient}")
assert jnp.isnan(naive(logits, jnp.array(0))) and jnp.isinf(log_of_softmax(logits, label)) and log_softmax(logits, label) == 120

# %% [markdown]
# Label 1 is 120 nats below the winner, so its loss is 120. `log_softmax` and `xentjax` find it. For label 0 the true loss is
# $2 e^{-120} \approx 10^{-52}$. No float32 number is that small, so 0 is the right answer here.

# %% [markdown]
# ## Clipping by ε
#
# Many tutorials repair $\log 0$ by clipping: $\ell = -\log \operatorname{clip}(p_y, \varepsilon, 1 - \varepsilon)$.
# On JAX, Keras clips with $\varepsilon = 10^{-7}$ if the inputs of the loss are probabilities. Probabilities are the default.
# With `from_logits=True`, Keras uses log-softmax instead.
#
# The clip bounds the value. It also cuts the gradient: outside the interval the clipped loss is constant, so **its gradient is
# exactly 0**. The plot shows two classes with logits $(m, 0)$ and label 0.


# %%
def clipped(logits, labels, epsilon=1e-7):
    return -jnp.log(jnp.clip(pick(jax.nn.softmax(logits), labels), epsilon, 1 - epsilon))


margins = jnp.linspace(-30, 30, 601)
logits = jnp.stack([margins, jnp.zeros_like(margins)], axis=-1)
labels = jnp.zeros(margins.size, jnp.int32)
clipped_loss, clipped_gradient = jax.vmap(jax.value_and_grad(clipped))(logits, labels)
loss, gradient = jax.vmap(jax.value_and_grad(xentjax.softmax_cross_entropy))(logits, labels)

fig, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for ax, exact, cut in ((axes[0], loss, clipped_loss), (axes[1], -gradient[:, 0], -clipped_gradient[:, 0])):
    ax.plot(margins, exact, color=COLOR["xentjax"], linewidth=4, alpha=0.45, label="cross-entropy")
    ax.plot(margins, cut, color=COLOR["clipped"], label="clipped, ε = 1e-7")
    ax.axvspan(-30, -16.12, color=COLOR["clipped"], alpha=0.12, linewidth=0)
    ax.set(xlabel="margin m of the label (nats)", xlim=(-30, 30))
axes[0].set(ylabel="loss (nats)", title="Value: never above 16.1")
axes[1].set(ylabel="pull on the label's logit, −∂ℓ/∂z", title="Gradient: 0 where the model is most wrong")
axes[0].legend()
plt.show()

# %% [markdown]
# The shaded region is the harmful one. An example that is wrong by more than 16 nats needs the largest correction, and gets none.
# Training will not repair it, because its gradient stays 0. At the other end, above a margin of 17 nats, the gradient is 0 as well.

# %%
worst, best = margins < -17, margins > 17
print(f"wrong by more than 17 nats: true pull {-gradient[worst, 0].min():.7f}, clipped {jnp.abs(clipped_gradient[worst]).max()}")
print(f"clipped loss lies between {clipped_loss.min():.3g} and {clipped_loss.max():.3f} nats; -log ε = {-np.log(1e-7):.3f}")
assert jnp.all(clipped_gradient[worst | best] == 0) and jnp.all(gradient[worst, 0] < -0.999)

# %% [markdown]
# ## Log-sum-exp, and what it still loses
#
# The standard remedy works on logits. Let $M = \max_k z_k$. Then
#
# $$\ell = \log \sum_k e^{z_k} - z_y = M + \log \sum_k e^{z_k - M} - z_y .$$
#
# Nothing overflows, and wrong predictions get the right loss. `jax.nn.log_softmax`, optax, and PyTorch use this formula. Many texts call
# it *numerically stable*, and stop here. It is stable, but it is not accurate. If the label wins by a margin $m$, the sum is
# $1 + e^{-m} + \dots$. Above 17 nats, this sum is rounded to 1. The loss is then $\log 1 = 0$.
#
# The gradient is $p - e_y$. Its entry at the label is $p_y - 1$, and $p_y$ was rounded to 1. So this entry is 0 too.

# %%
logits, label = jnp.array([20.0, 0.0, 0.0]), jnp.array(0)
rest = 2 * np.exp(-20.0)  # float64
exact = np.array([-rest, rest / 2, rest / 2]) / (1 + rest)
print(f"{'exact':8} loss {np.log1p(rest):.3e}   gradient {exact}   sum of its entries {exact.sum():.1e}")
for name, function in (("optax", optax.softmax_cross_entropy_with_integer_labels), ("xentjax", xentjax.softmax_cross_entropy)):
    value, gradient = jax.value_and_grad(function)(logits, label)
    print(f"{name:8} loss {value:.3e}   gradient {gradient}   sum of its entries {gradient.sum():.1e}")
    if name == "optax":
        assert value == 0 and gradient[0] == 0 and jnp.all(gradient[1:] > 0)
    else:
        assert abs(value / np.log1p(rest) - 1) < 28 * EPS and np.allclose(gradient, exact, rtol=28 * EPS, atol=0)

# %% [markdown]
# Look at the gradient of optax. The other classes still have the right gradient, because their probabilities are small numbers near 0.
# Only the label's entry is lost. So the gradient is not all zero: **it points in the wrong direction.** The entries of a softmax gradient
# must add up to 0, and these do not. The training runs below show the consequences.
#
# Float64 moves the limit from 17 to 37 nats. It does not remove it.

# %% [markdown]
# ## How `xentjax` computes the loss
#
# The label's own term is $e^{z_y - z_y} = e^0 = 1$. `xentjax` never adds this 1 to the small terms of the other classes. It adds up the
# *other* classes only:
#
# $$R = \sum_{k \ne y} e^{z_k - z_y}, \qquad \ell = \log(1 + R), \qquad \frac{\partial \ell}{\partial z_y} = -\frac{R}{1 + R}.$$
#
# The function `log1p(R)` computes $\log(1 + R)$ without forming $1 + R$. For $R = 10^{-9}$, it returns $10^{-9}$.
# The number $-\log R$ is the *log-odds* of the label, $a = \log \frac{p_y}{1 - p_y}$. With it, the loss is
# $\operatorname{softplus}(-a)$. You can write this in three lines of plain JAX.


# %%
def by_log_odds(logits, labels):
    others = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], -jnp.inf, logits)
    log_odds = pick(logits, labels) - jax.nn.logsumexp(others, axis=-1)
    return jax.nn.softplus(-log_odds)


value, gradient = jax.value_and_grad(by_log_odds)(logits, label)
print("three lines:", value, gradient)
print("xentjax:    ", *jax.value_and_grad(xentjax.softmax_cross_entropy)(logits, label))
assert abs(value / np.log1p(rest) - 1) < 28 * EPS and np.allclose(gradient, exact, rtol=28 * EPS, atol=0)

# %% [markdown]
# The library computes the loss in the same way. It also supports soft labels, masks, infinities, and classes that are spread over
# devices. It reads half-precision logits without storing a float32 copy of them.
#
# `log1p` has a partner, `expm1`. Suppose that you have the loss, and want the probability of an error, $1 - p_y = 1 - e^{-\ell}$.
# Do not subtract from 1. Write $-\operatorname{expm1}(-\ell)$.

# %%
loss = xentjax.softmax_cross_entropy(logits, label)
print(f"exact 1 - p_y {rest / (1 + rest):.6e}    1 - exp(-loss) {1 - jnp.exp(-loss):.6e}    -expm1(-loss) {-jnp.expm1(-loss):.6e}")
assert 1 - jnp.exp(-loss) == 0 and abs(-jnp.expm1(-loss) * (1 + rest) / rest - 1) < 28 * EPS

# %% [markdown]
# ## The error at every margin
#
# Now all methods at once. The label's logit is $m$ and the other logits are $0, -1, -2.5$. The exact values come from the formula for $R$
# in float64. Each dot is the relative error at one margin. An error of 1 means that the number is lost completely. Errors above 10 are
# drawn at 10. Where several methods have the same error, their dots overlap. The smaller dots are drawn on top of the larger dots.

# %%
margins = np.linspace(0.5, 84, 335, dtype=np.float32)
others = np.array([0, -1, -2.5], np.float32)
logits = jnp.concatenate([margins[:, None], jnp.tile(others, (margins.size, 1))], axis=1)
labels = jnp.zeros(margins.size, jnp.int32)
rest = np.exp(np.float64(others)[None] - np.float64(margins)[:, None]).sum(1)
exact = {"loss": np.log1p(rest), "gradient at the label": -rest / (1 + rest)}

losses = {
    "naive": naive,
    "clipped": clipped,
    "log_softmax": log_softmax,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "xentjax": xentjax.softmax_cross_entropy,
}
errors = {}
for name, function in losses.items():
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(function)))(logits, labels)
    found = zip((value, gradient[:, 0]), exact.values(), strict=True)
    errors[name] = [np.abs(np.asarray(x, np.float64) / e - 1) for x, e in found]

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
for i, (ax, quantity) in enumerate(zip(axes, exact, strict=True)):
    for name, marker, size in (("naive", "s", 8), ("clipped", "o", 6), ("optax", "o", 4), ("log_softmax", "o", 2), ("xentjax", "o", 3)):
        ax.semilogy(margins, np.clip(errors[name][i], 2e-9, 10), marker, markersize=size, color=COLOR[name], label=name)
    ax.semilogy(margins, (8 + margins) * EPS, color="black", linewidth=1.2, label="bound of xentjax, (8 + m) eps")
    ax.axvline(limits["float32"], color="black", linestyle=":", linewidth=1.5)
    ax.text(18, 3e-5, "1 + e⁻ᵐ = 1\nfrom here on", fontsize=10)
    ax.set(xlabel="margin m of the label (nats)", title=f"Relative error of the {quantity}", ylim=(1.5e-9, 30))
axes[0].set(ylabel="relative error, cut at 2e-9 and 10")
axes[1].legend(loc="center right", bbox_to_anchor=(1, 0.62), fontsize=9)
plt.show()

far = margins > 17.5
for name in losses:
    print(f"{name:12} largest relative error: loss {errors[name][0].max():9.1e}, gradient {errors[name][1].max():9.1e}")
assert all(np.all(e <= (8 + margins) * EPS) for e in errors["xentjax"])
assert all(np.all(e[far] == 1) for name in ("log_softmax", "optax") for e in errors[name])

# %% [markdown]
# Below 17 nats, the standard formulas lose one digit after another. Optax 0.2.8 loses the value at a slightly
# smaller margin than log-softmax does. The reason is that optax adds the largest logit back before it subtracts the label's logit.
#
# `xentjax` stays below its documented bound, $(8 + m)$ eps. That bound is close to the best that any program can reach. The margin itself
# is rounded to float32, and a rounding error $\delta$ of the margin changes the loss by the factor $e^{-\delta}$.
#
# The clipped loss has errors far above 1. It returns $1.2 \cdot 10^{-7}$ where the truth is $10^{-30}$.

# %% [markdown]
# ## bfloat16
#
# In bfloat16, eps is $2^{-7}$. If the loss is computed in bfloat16, all its digits are lost at a margin of 5.5 nats, or already at a
# smaller margin. Trained models often have margins that large. The logits are not the problem: float32 holds every bfloat16 number exactly.
# `xentjax` reads bfloat16 logits, computes in float32, and returns float32. The exact values in the table use the same bfloat16 logits.

# %%
for margin in (2, 4, 5, 6, 8, 17, 40):
    logits, label = jnp.array([margin, 0, 0], jnp.bfloat16), jnp.array(0)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    ours = xentjax.softmax_cross_entropy(logits, label)
    exact = np.log1p(2 * np.exp(-float(margin)))
    print(f"margin {margin:2}   exact {exact:.4e}   optax {float(theirs):.4e} ({theirs.dtype})   xentjax {float(ours):.4e} ({ours.dtype})")
    assert abs(float(ours) / exact - 1) < (8 + margin) * EPS and (margin < 7 or theirs == 0)

# %% [markdown]
# The loss of optax 0.2.8 is already 0 at 5 nats, and it is 13 % off at 4 nats. Convert the logits with `logits.astype(jnp.float32)` before
# you call such a loss. Then the limit is 17 nats.

# %% [markdown]
# ## Logits of −∞ and masks
#
# A logit of $-\infty$ says that a class is impossible. Examples are an illegal move in a game, and the padding of a vocabulary. The
# probability of such a class is 0. With soft labels or one-hot labels, the usual sum $-\sum_k t_k \log p_k$ contains $0 \cdot (-\infty)$,
# which is NaN. (`optax.safe_softmax_cross_entropy` avoids this.)

# %%
logits = jnp.array([2.0, -jnp.inf, 0.0])
one_hot = jnp.array([1.0, 0.0, 0.0])
exact = np.log1p(np.exp(-2.0))
for name, function in (("optax", optax.softmax_cross_entropy), ("xentjax", xentjax.softmax_cross_entropy)):
    value, gradient = jax.value_and_grad(function)(logits, one_hot)
    print(f"{name:8} loss {value:.6f} (exact {exact:.6f})   gradient {gradient}")
assert abs(value / exact - 1) < 8 * EPS and gradient[1] == 0

value, gradient = jax.value_and_grad(xentjax.softmax_cross_entropy)(logits, jnp.array(1))
print(f"impossible label: loss {value}, gradient {gradient}")
assert value == jnp.inf and jnp.all(jnp.isfinite(gradient))

# %% [markdown]
# The loss of an impossible label is $+\infty$. This is the correct value. The gradient stays finite. You can also mask the impossible
# classes: `class_mask` is True for the possible classes, and False for the others. Then the logits of the masked classes may hold
# anything, even NaN. The argument `where` does the same for whole examples.

# %%
logits = jnp.array([[2.0, jnp.nan, 0.0], [jnp.nan, jnp.inf, 0.0]])
classes, examples = jnp.array([True, False, True]), jnp.array([True, False])


def masked(z):
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(z, jnp.array([0, -100]), class_mask=classes, where=examples), where=examples)


value, gradient = jax.value_and_grad(masked)(logits)
print(f"mean loss {value:.6f} (exact {exact:.6f})", "gradient", gradient, sep="\n")
assert abs(value / exact - 1) < 8 * EPS and jnp.all(jnp.isfinite(gradient)) and jnp.all(gradient[1] == 0)

# %% [markdown]
# ## A large common shift
#
# Adding the same number $c$ to all logits does not change the exact loss. In float32 it changes two things. First, the logits
# themselves are rounded: the spacing of float32 numbers at $10^8$ is 8 nats. No loss can repair that. Second, $\log \sum_k e^{z_k}$
# is a number near $c$, and is rounded to the same spacing before $z_y$ is subtracted. This second error is avoidable: subtract first.
# In optax 0.2.8, `optax.softmax_cross_entropy_with_integer_labels` first computes $\log \sum_k e^{z_k}$ and then subtracts $z_y$. A fix is
# [proposed](https://github.com/google-deepmind/optax/pull/1792).
#
# With ten equal logits, the first error is absent, and the loss is $\log 10$ for every $c$.

# %%
shifts = np.float32(10.0) ** np.arange(9)
logits = jnp.tile(jnp.array(shifts)[:, None], (1, 10))
labels = jnp.zeros(shifts.size, jnp.int32)


def lse_minus_logit(logits, labels):
    return jax.nn.logsumexp(logits, axis=-1) - pick(logits, labels)


print("spacing of float32 numbers at 1e8:", np.spacing(np.float32(1e8)), "  log 10 =", np.log(10))
for name, function in (("logsumexp(z) - z[y]", lse_minus_logit), ("log_softmax", log_softmax), ("xentjax", xentjax.softmax_cross_entropy)):
    print(f"{name:20}", "  ".join(f"c = 1e{k}: {function(logits, labels)[k]:.6f}" for k in (0, 2, 4, 6, 8)))
assert lse_minus_logit(logits, labels)[8] == 0
assert jnp.all(jnp.abs(xentjax.softmax_cross_entropy(logits, labels) / np.log(10) - 1) < 8 * EPS)

# %% [markdown]
# ## Does any of this matter for training?
#
# Usually not. In a linear model that is trained by gradient descent, the margin grows like the logarithm of the number of steps
# ([Soudry et al. 2018](https://arxiv.org/abs/1710.10345)). So it takes very many steps to reach 17 nats. With weight decay, label
# smoothing or early stopping, a model never gets there.
#
# But some tasks need an accurate loss at large margins. A network that learns to add modulo a prime first memorises its examples, and
# finds the rule much later. Prieto et al. ([2025](https://arxiv.org/abs/2501.04697)) showed that without weight decay, the network often
# does not find the rule at all, because rounding in float32 stops the learning first. They call it *softmax collapse*. Let us look at it.
#
# The task is $a + b \bmod 31$. Of all $31^2 = 961$ pairs, 768 are for training. The network has one hidden layer, and is started with
# small weights.

# %%
P, HIDDEN = 31, 128
a, b = np.divmod(np.arange(P * P), P)
x = jnp.concatenate([jax.nn.one_hot(a, P), jax.nn.one_hot(b, P)], axis=1)  # [pair, 2 P]
y = jnp.asarray((a + b) % P)
order = np.random.default_rng(0).permutation(P * P)
train, test = order[:768], order[768:]


def init(key):
    first, second = jax.random.split(key)
    return {
        "in": 0.07 * jax.random.normal(first, (2 * P, HIDDEN)),
        "out": 0.1 / np.sqrt(HIDDEN) * jax.random.normal(second, (HIDDEN, P)),
    }


def predict(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


# %% [markdown]
# The gradient shrinks with the loss. So the steps of ordinary gradient descent become very short well before the margin reaches 17 nats.
# Adam does not help. It divides the gradient by the size of the gradient plus $10^{-8}$. Here all entries of the gradient become smaller
# than $10^{-8}$. So we first divide the gradient by its largest entry, and give the result to Adam. Theory recommends such normalised steps
# for separable data ([Nacson et al. 2019](https://arxiv.org/abs/1803.01905)). All losses get the same optimizer, the same initial
# weights, and the same data.


# %%
def largest(tree):
    return jax.tree.reduce(jnp.maximum, jax.tree.map(lambda g: jnp.abs(g).max(), tree))


def normalised(gradient, _):
    size = jnp.maximum(largest(gradient), 1e-37)  # a gradient of exactly 0 stays 0
    return jax.tree.map(lambda g: g / size, gradient)


def fit(loss, optimizer, blocks, key):  # one block is 50 steps on all training examples
    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: loss(predict(p, x[train]), y[train]).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), largest(gradient)

    def block(carry, _):
        carry, sizes = jax.lax.scan(step, carry, length=50)
        squared_norm = sum(jnp.vdot(x, x) for x in jax.tree.leaves(carry[0]))
        return carry, (predict(carry[0], x), sizes[-1], squared_norm)

    params = init(key)
    return jax.lax.scan(block, (params, optimizer.init(params)), length=blocks)[1]


# %%
BLOCKS = 48
keys = jax.random.split(jax.random.key(0), 3)  # three initialisations
optimizer = optax.chain(optax.stateless(normalised), optax.adam(1e-3))
runs = {}
for name in ("clipped", "optax", "xentjax"):
    runs[name] = jax.jit(jax.vmap(lambda key, loss=losses[name]: fit(loss, optimizer, BLOCKS, key)))(keys)

# %% [markdown]
# The losses, margins and accuracies below are computed in float64 from the logits. They do not use the loss that trained the network. The
# gradient is an exception: it is the gradient of the training loss. The margin of an example is the label's logit minus the largest other
# logit.


# %%
def judge(run):
    logits, size, squared_norm = (np.asarray(x, np.float64) for x in run)  # logits: [key, block, pair, class]
    label = np.take_along_axis(logits, np.asarray(y)[None, None, :, None], axis=-1)
    others = np.where(np.arange(P) == np.asarray(y)[:, None], -np.inf, logits - label)
    margin = -others.max(-1)
    loss = np.log1p(np.exp(others[:, :, train]).sum(-1)).mean(-1)
    smallest = margin[:, :, train].min(-1)
    accuracy = 100 * (margin[:, :, test] > 0).mean(-1)
    return {"loss": loss, "gradient": size, "margin": smallest, "relative": smallest / squared_norm, "accuracy": accuracy}


curves = {name: judge(run) for name, run in runs.items()}
steps = 50 * np.arange(1, BLOCKS + 1)
for name, curve in curves.items():
    last = {key: np.median(x[:, -1]) for key, x in curve.items()}
    print(f"{name:8} loss {last['loss']:.1e}   largest gradient entry {last['gradient']:.1e}   smallest margin {last['margin']:5.1f} nats")
    print(f"{'':8} test accuracy of the three networks: {np.round(curve['accuracy'][:, -1])} %")


# %%
def draw(ax, key, title, ylabel, **limits):
    for name, curve in curves.items():
        shown = np.where(curve[key] == 0, np.nan, curve[key])  # a logarithmic axis has no 0
        ax.plot(steps, np.median(shown, axis=0), color=COLOR[name], linewidth=5 if name == "clipped" else 2, label=name)
        ax.fill_between(steps, shown.min(0), shown.max(0), color=COLOR[name], alpha=0.2, linewidth=0)
    ax.set(title=title, ylabel=ylabel, xlim=(0, steps[-1]), **limits)


fig, axes = plt.subplots(2, 2, figsize=(11, 7.2), sharex=True)
draw(axes[0, 0], "loss", "Training loss, computed exactly", "nats", yscale="log", ylim=(1e-38, 100))
draw(axes[0, 1], "gradient", "Largest gradient entry (no line: exactly 0)", "nats per unit of weight", yscale="log", ylim=(1e-38, 100))
draw(axes[1, 0], "margin", "Smallest margin of the training examples", "nats", ylim=(-3, 90))
draw(axes[1, 1], "accuracy", "Test accuracy", "%", ylim=(0, 100))
for y_limit, name in ((limits["float32"], "1 + e⁻ᵐ = 1"), (87, "e⁻ᵐ leaves float32")):
    axes[1, 0].axhline(y_limit, color="black", linestyle=":", linewidth=1.5)
    axes[1, 0].text(50, y_limit - 1, name, va="top")
for ax in axes[1]:
    ax.set(xlabel="training step")
axes[0, 0].legend(loc="lower left", title="median and range of three networks")
plt.show()

# %%
final = {name: {key: x[:, -1] for key, x in curve.items()} for name, curve in curves.items()}
assert np.all(final["clipped"]["gradient"] == 0) and np.all(final["clipped"]["margin"] < 20)
assert np.all(final["optax"]["gradient"] > 0) and np.all(final["optax"]["margin"] < 20)
assert np.all(final["xentjax"]["margin"] > 60)
for name in ("clipped", "optax"):
    assert np.all(final["xentjax"]["accuracy"] > 8 + curves[name]["accuracy"].max(1))  # better than their best step

# %% [markdown]
# Up to a margin of 15 nats, training gives the same network with all three losses. After that:
#
# - **clipped:** the gradient becomes exactly 0. Training stops.
# - **optax** (log-sum-exp): the gradient does *not* become 0. The entries at the other classes remain, and the entries at the labels
#   are lost or rounded. The network keeps moving, but in the wrong direction. Its margin and loss stay where they are, its weights
#   grow, and its test accuracy rises a little and then falls.
# - **xentjax:** the loss goes on falling, from $10^{-7}$ to $10^{-35}$. It stops falling when the gradient becomes too small for float32.
#   At a margin of 80 nats, the gradient of the mean over 768 examples has terms near $e^{-80} / 768 \approx 2 \cdot 10^{-38}$. The
#   smallest normal float32 number is about as small, $1.2 \cdot 10^{-38}$.
#
# Why does the test accuracy still rise when the loss is already $10^{-10}$? Nobody needs a loss as small as that. But its gradient still
# has a *direction*. Gradient descent on this loss moves towards weights with a larger margin *relative to their norm*
# ([Lyu and Li 2020](https://arxiv.org/abs/1906.05890)). The next plot shows that training with xentjax increases this relative margin. In
# this task, weights with a larger relative margin also follow the rule better.

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.8))
draw(ax, "relative", "Margin relative to the weights", "smallest margin / ‖weights‖² (nats)", ylim=(0, 2.8e-3), xlabel="training step")
ax.legend(loc="upper left")
plt.show()
assert np.all(final["xentjax"]["relative"] > 1.1 * final["clipped"]["relative"])
assert np.all(final["optax"]["relative"] < 0.7 * final["clipped"]["relative"])

# %% [markdown]
# ## When it does not matter
#
# The usual remedy is weight decay. AdamW trains the same network on the same data. It holds the margin near 4 nats. There, all losses
# are accurate, and the choice makes no difference.

# %%
adamw = optax.adamw(1e-2, weight_decay=1.0)
for name in ("optax", "xentjax"):
    decayed = judge(jax.jit(jax.vmap(lambda key, loss=losses[name]: fit(loss, adamw, 16, key)))(keys))
    margin, accuracy = decayed["margin"][:, -1], decayed["accuracy"][:, -1]
    print(f"{name:8} with weight decay, 800 steps: smallest margins {np.round(margin, 1)} nats, test accuracy {np.round(accuracy)} %")
    assert np.all(margin < 10) and np.all(accuracy > 85)

# %% [markdown]
# With weight decay, the network also finds the rule much sooner. So this notebook is no argument against regularisation. It says that
# rounding in the loss should not decide when training ends.
#
# ## What to remember
#
# - Float32 is poor near 1 and good near 0. Compute with the small number: $1 - p_y$, not $p_y$.
# - Clipping by ε sets the gradient of the most wrong examples to 0. Pass logits to the loss, not probabilities.
# - Log-sum-exp never overflows. But above 17 nats (5.5 nats in bfloat16), the loss and the label's entry of the gradient are lost. The
#   other entries remain, so the gradient points in the wrong direction.
# - Three things keep the loss accurate up to 87 nats: the sum over only the *other* classes, `log1p`, and `expm1`. `xentjax` computes
#   its losses this way.
# - The accuracy of the loss matters for training without regularisation and for bfloat16. With weight decay, margins stay small.
#
# More: [quickstart](https://github.com/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb),
# [choosing a loss](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md),
# [conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md) for masks and infinities,
# [comparison with other libraries](https://github.com/xentjax/xentjax/blob/main/docs/comparison.md),
# [design decisions](https://github.com/xentjax/xentjax/blob/main/docs/design.md).
