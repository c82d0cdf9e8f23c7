# %% [markdown]
# # Large vocabularies
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/large_vocabularies.ipynb)
#
# Language models choose among many thousands of words. Recommenders choose among many thousands of items. In this notebook you will see
# what a large number of classes costs, and three ways to reduce the cost: fused losses, sampled softmax and adaptive softmax. You will
# train a model that writes Python, a model with a vocabulary of 8,192 words, and a retrieval model. The last section trains one model on
# two tasks at once. All data come with Python or scikit-learn, or are made here. The notebook takes about a minute on a CPU.

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
import collections
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import xentjax
from xentjax import metrics, samplers

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # colours that colour-blind readers can tell apart

# %% [markdown]
# # 1. What a large vocabulary costs
#
# The last layer of a language model multiplies the hidden states $H$ [tokens, features] by a kernel $W$ [classes, features]. The logits
# $Z = H W^\top$ have shape [tokens, classes]. In float32 they take
#
# $$\text{tokens} \times \text{classes} \times 4 \text{ bytes}.$$
#
# The kernel is usually much smaller. It takes features × classes × 4 bytes.

# %%
for model, tokens, classes in (("characters", 1024, 100), ("words", 1024, 8192), ("a language model of 2024", 8192, 128_256)):
    print(f"{model:25}{tokens:5} tokens × {classes:7,} classes × 4 bytes = {tokens * classes * 4 / 2**20:8,.1f} MiB")

# %% [markdown]
# `xentjax.linear_softmax_cross_entropy` takes hidden states and the kernel instead of logits. It computes the logits of one chunk of tokens
# at a time. It adds the gradients of this chunk to the gradients of the earlier chunks, and then reuses the memory. By default, all tokens
# form one chunk if their logits take at most 32 MiB. Otherwise a chunk holds a quarter of the tokens, but at least 192 tokens.
# `xentjax.plan_linear` shows the chunks. Smaller chunks take less memory. Very small chunks take more time.
#
# XLA reports how much temporary memory a compiled program needs. So we can compare the memory of
# `softmax_cross_entropy` on all logits with the memory of the fused loss, without running either.


# %%
def all_logits(hidden, kernel, labels):
    return xentjax.softmax_cross_entropy(hidden @ kernel.T, labels).mean()


def fused(hidden, kernel, labels, chunk_size=None):
    return xentjax.linear_softmax_cross_entropy(hidden, kernel, labels, classes_first=True, chunk_size=chunk_size)


def small_chunks(hidden, kernel, labels):
    return fused(hidden, kernel, labels, chunk_size=64)


def compiled(loss, tokens, classes, features=64):
    shapes = (tokens, features), (classes, features), (tokens,)
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True)]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()


vocabularies = np.array([2048, 16_384, 131_072])
functions = {"all logits": all_logits, "fused, default chunks": fused, "fused, chunks of 64 tokens": small_chunks}
memory = {
    name: [compiled(loss, 2048, int(k)).memory_analysis().temp_size_in_bytes / 2**20 for k in vocabularies]
    for name, loss in functions.items()
}

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.8))
for (name, values), color, marker in zip(memory.items(), (ORANGE, BLUE, GREEN), "so^", strict=True):
    ax.loglog(vocabularies, values, color=color, marker=marker, label=name)
ax.loglog(vocabularies, 2048 * vocabularies * 4 / 2**20, color="black", linestyle=":", linewidth=1.5, label="tokens × classes × 4 bytes")
ax.set_xticks(vocabularies, [f"{k:,}" for k in vocabularies])
ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
ax.minorticks_off()
ax.set(xlabel="classes", ylabel="temporary memory (MiB)", title="Loss and gradients of 2,048 tokens")
ax.legend()
plt.show()

shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 64), (131_072, 64))]
print("default number of chunks with 131,072 classes:", xentjax.plan_linear(*shapes, classes_first=True).chunks)
for name, values in memory.items():
    print(f"{name:27} {values[-1]:7.1f} MiB with 131,072 classes")
assert memory["fused, default chunks"][-1] < 0.6 * memory["all logits"][-1]
assert memory["fused, chunks of 64 tokens"][-1] < 0.1 * memory["all logits"][-1]

# %% [markdown]
# ## The same value, the same gradients, the same number of products
#
# A fused loss is not an approximation. It does not save arithmetic either. Both losses need three matrix products: one for the
# logits and two for the gradients. So it takes about the same time. It saves memory only.

# %%
keys = jax.random.split(jax.random.key(0), 3)
tokens, classes = 2048, 8192
hidden, kernel = jax.random.normal(keys[0], (tokens, 64)), 0.3 * jax.random.normal(keys[1], (classes, 64))
labels = jax.random.randint(keys[2], (tokens,), 0, classes)

programs = {name: compiled(loss, tokens, classes) for name, loss in list(functions.items())[:2]}
seconds, results = collections.defaultdict(list), {}
for _ in range(5):
    for name, program in programs.items():  # in turn, so that other programs on this machine slow down both
        start = time.perf_counter()
        results[name] = jax.block_until_ready(program(hidden, kernel, labels))
        seconds[name].append(time.perf_counter() - start)

(value, gradients), (fused_value, fused_gradients) = results.values()
errors = [float(jnp.abs(g - f).max() / jnp.abs(g).max()) for g, f in zip(gradients, fused_gradients, strict=True)]
print(f"loss: {value:.5f} and {fused_value:.5f} nats")
print(f"largest difference of the gradients, relative to the largest entry: {errors[0]:.0e} (hidden), {errors[1]:.0e} (kernel)")
print("median time:", ", ".join(f"{name} {1e3 * np.median(s):.0f} ms" for name, s in seconds.items()))
z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64).T
exact = np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(tokens), labels])
assert abs(value / exact - 1) < 1e-5 and abs(fused_value / exact - 1) < 1e-5 and max(errors) < 1e-4

# %% [markdown]
# # 2. A model that writes Python
#
# ## The text
#
# The text is the source code of Python's standard library. Every tenth file is held out. We cut the text into characters here, and into
# words in the next section. Four spaces count as one character, because Python code is indented by four spaces. Class 0 stands for all
# rare characters or words. The other classes are ordered by frequency, the most frequent first. We will need this order later.

# %%
sources = [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
held_out_text = "".join(sources[::10])
training_text = "".join(source for i, source in enumerate(sources) if i % 10)


def encode(pattern, classes):
    pieces, held_out_pieces = (re.findall(pattern, text) for text in (training_text, held_out_text))
    names = ["�", *(name for name, _ in collections.Counter(pieces).most_common(classes - 1))]
    index = {name: i for i, name in enumerate(names)}
    train, held_out = (np.array([index.get(piece, 0) for piece in part], np.int32) for part in (pieces, held_out_pieces))
    return names, train, held_out


characters, train_characters, held_out_characters = encode(r"(?s) {4}|.", 100)
print(f"{len(train_characters):,} characters to learn from, {len(held_out_characters):,} held out")
print("the most frequent characters:", characters[1:12])

# %% [markdown]
# ## The model
#
# The model reads the last $C$ characters. It looks up their embeddings and concatenates them. Two hidden layers follow. This is the neural
# language model of Bengio et al. (2003), with one more layer and a skip connection. A window holds the context and the next character.

# %%
CONTEXT = 16


def init(key, classes, context, features, width):
    embed, first, second, kernel = jax.random.split(key, 4)
    return {
        "embed": jax.random.normal(embed, (classes, features)),
        "first": jax.random.normal(first, (context * features, width)) * np.sqrt(2 / (context * features)),
        "second": jax.random.normal(second, (width, width)) * np.sqrt(2 / width),
        "kernel": 0.1 * jax.random.normal(kernel, (classes, width)) / np.sqrt(width),
        "bias": jnp.zeros(classes),
    }


def hidden_states(params, window):  # [batch, context + 1] -> [batch, width]
    x = jax.nn.relu(params["embed"][window[:, :-1]].reshape(len(window), -1) @ params["first"])
    return x + jax.nn.relu(x @ params["second"])


def losses(params, window, **options):
    return xentjax.linear_softmax_cross_entropy(
        hidden_states(params, window), params["kernel"], window[:, -1], bias=params["bias"], classes_first=True, **options
    )


# %% [markdown]
# ## Perplexity
#
# The perplexity is the exponential of the mean cross-entropy in nats:
#
# $$\mathrm{PPL} = \exp\Big( \frac{1}{N} \sum_{i=1}^N -\log p(x_i \mid \text{context}_i) \Big).$$
#
# A model that guesses uniformly among $K$ classes has perplexity $K$. The exponential comes after the mean over all $N$ tokens. The
# mean of the perplexities of batches is a different number. If all batches have the same size, it is too large.
#
# For one batch, `xentjax.weighted_sum` returns a pair: the sum of the losses and the number of losses. Such pairs can be added. So the
# result is exact even if the last batch is smaller.


# %%
def windows(tokens, context):
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)


@jax.jit
def batch_sum(params, window):
    return xentjax.weighted_sum(losses(params, window, reduction="none"))


def batch_sums(params, rows, size=8192, batch_sum=batch_sum):
    return [batch_sum(params, rows[i : i + size]) for i in range(0, len(rows), size)]


def unigram_perplexity(train, held_out, classes):
    counts = np.bincount(train, minlength=classes) + 1
    return np.exp(-np.log(counts / counts.sum())[held_out].mean())


test_rows = windows(held_out_characters, CONTEXT)[::10]
untrained = init(jax.random.key(0), len(characters), CONTEXT, features=16, width=384)
before = float(metrics.perplexity(sum(batch_sums(untrained, test_rows))))
unigram = unigram_perplexity(train_characters, held_out_characters, len(characters))
print(f"uniform guess {len(characters)}, untrained model {before:.1f}, character frequencies alone {unigram:.1f}")
assert abs(before / len(characters) - 1) < 0.1

# %% [markdown]
# ## Training
#
# The training loop is one `jax.lax.scan`. Each step draws 512 random windows. In the plot, the dashed line is a model that ignores the
# context. The network passes it after a few steps.


# %%
@jax.jit
def fit(params, tokens, key, steps=1600):
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(carry, key):
        params, state = carry
        start = jax.random.randint(key, (512, 1), 0, len(tokens) - CONTEXT)
        loss, gradient = jax.value_and_grad(losses)(params, tokens[start + jnp.arange(CONTEXT + 1)])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), loss = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params, loss


writer, training_loss = fit(untrained, jnp.asarray(train_characters), jax.random.key(1))
sums = batch_sums(writer, test_rows)
after = float(metrics.perplexity(sum(sums)))
of_batches = np.mean([metrics.perplexity(s) for s in sums])
print(f"held-out perplexity {before:.1f} -> {after:.3f}")
print(f"mean of the perplexities of {len(sums)} batches: {of_batches:.3f}, which is not the perplexity")

z = np.asarray(jax.jit(hidden_states)(writer, test_rows), np.float64) @ np.asarray(writer["kernel"], np.float64).T + writer["bias"]
exact = np.exp(np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), test_rows[:, -1]]))
assert abs(after / exact - 1) < 1e-4 and after < 10 < unigram / 2

# %%
smooth = np.exp(np.asarray(training_loss).reshape(-1, 20).mean(1))
fig, ax = plt.subplots(figsize=(6, 3.4))
ax.semilogy(10 + 20 * np.arange(len(smooth)), smooth, color=BLUE, label="training batches")
lines = (len(characters), "uniform guess", "black", ":"), (unigram, "character frequencies", "black", "--")
for value, name, color, style in (*lines, (after, "held out, at the end", ORANGE, "-")):
    ax.axhline(value, color=color, linestyle=style, linewidth=1.5, label=f"{name}: {value:.1f}")
ax.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
ax.minorticks_off()
ax.set(xlabel="step", ylabel="perplexity", title="Characters", xlim=(0, 1600), ylim=(4.5, 130))
ax.legend(fontsize=9, loc="center right", bbox_to_anchor=(1, 0.42))
plt.show()

# %% [markdown]
# ## A sample
#
# The model writes one character at a time. Each character is drawn from the softmax at temperature 0.6. Many words do not exist, but
# the indentation, the brackets and the keywords look like Python.


# %%
@jax.jit
def write(params, context, keys):
    def draw(context, key):
        hidden = hidden_states(params, jnp.append(context, 0)[None])[0]  # the last entry of a window is not read
        character = jax.random.categorical(key, (params["kernel"] @ hidden + params["bias"]) / 0.6).astype(context.dtype)
        return jnp.append(context[1:], character), character

    return jax.lax.scan(draw, context, keys)[1]


start = re.findall(r"(?s) {4}|.", "\n\n    def __init__(")[-CONTEXT:]
context = jnp.array([characters.index(c) for c in start], jnp.int32)
sample = write(writer, context, jax.random.split(jax.random.key(2), 500))
print("".join(start) + "".join(characters[i] for i in sample.tolist()))

# %% [markdown]
# # 3. 8,192 words, and three losses
#
# Tutorials often say that the full softmax is too expensive for many classes, and that negative sampling is the solution. We train
# a word model with three losses and measure whether this is true. The model predicts the next word from the last 6 words.

# %%
WORDS, WORD_CONTEXT, WIDTH, SAMPLES = 8192, 6, 64, 256
words, train_words, held_out_words = encode(r" ?\w+| ?[^\w\s]+|\s+", WORDS)  # words with their space, signs, white space
train_rows, word_rows = windows(train_words, WORD_CONTEXT), windows(held_out_words, WORD_CONTEXT)[::7]
word_unigram = unigram_perplexity(train_words, word_rows[:, -1], WORDS)
print(f"{len(train_words):,} words to learn from; {100 * np.mean(train_words == 0):.0f} % of them are rare and become class 0")
print("the most frequent words:", words[1:12])
print(f"perplexity of the word frequencies: {word_unigram:.0f}")

# %% [markdown]
# ## The losses
#
# **Fused softmax** is the loss of section 1, in chunks of 128 tokens.
#
# **Sampled softmax** computes only the logits of the label $y$ and of $n$ sampled classes $k_1, \dots, k_n$. Class $k$ is drawn $Q_k$ times
# on average. Dividing by $Q_k$ makes the sum an unbiased estimate of $\sum_k e^{z_k}$:
#
# $$\ell = \log \Big( e^{z_y} + \sum_{j:\, k_j \neq y} \frac{e^{z_{k_j}}}{Q_{k_j}} \Big) - z_y .$$
#
# The division is called the log-Q correction, because it subtracts $\log Q_k$ from the logit. Word frequencies roughly follow Zipf's law.
# So we draw with `samplers.log_uniform`, which draws frequent classes more often. It expects classes ordered by frequency.
#
# **Adaptive softmax** divides the rarer words into two clusters. Its first softmax has one entry for each of the 512 most frequent words
# and one entry for each cluster. Each cluster has its own softmax over its words. The cluster of the rarest words uses fewer features than
# the other cluster. Adaptive softmax is a different model, not an approximation. Its probabilities are exact.

# %%
word_sampler = samplers.log_uniform(WORDS)


def fused_loss(params, window, key):
    return losses(params, window, chunk_size=128)


def sampled_loss(params, window, key, corrected=True):
    samples = samplers.draw(key, word_sampler, SAMPLES)
    if not corrected:
        samples = samples._replace(log_expected_count=jnp.zeros(SAMPLES))
    hidden, labels = hidden_states(params, window), window[:, -1]
    return xentjax.sampled_softmax_cross_entropy(
        hidden, params["kernel"], labels, samples=samples, bias=params["bias"], classes_first=True
    ).mean()


def uncorrected_loss(params, window, key):
    return sampled_loss(params, window, key, corrected=False)


# %%
def adaptive_losses(params, window):
    return xentjax.adaptive_softmax_cross_entropy(hidden_states(params, window), params["adaptive"], window[:, -1], chunk_size=128)


def adaptive_loss(params, window, key):
    return adaptive_losses(params, window).mean()


# %% [markdown]
# ## Training, one step of each in turn
#
# We train all models in one loop and measure the time of each step. "5 × steps" is sampled softmax with 1,200 steps instead of 240.


# %%
class Run:
    def __init__(self, loss, steps=240):
        params = init(jax.random.key(3), WORDS, WORD_CONTEXT, features=64, width=WIDTH) | {
            "adaptive": xentjax.init_adaptive_softmax(jax.random.key(4), WIDTH, [512, 2048, WORDS])
        }
        unused = ["kernel", "bias"] if loss is adaptive_loss else ["adaptive"]
        self.params = {name: value for name, value in params.items() if name not in unused}
        self.optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
        self.state, self.loss, self.steps, self.seconds, self.training_loss = self.optimizer.init(self.params), loss, steps, [], []
        arguments = self.params, self.state, train_rows[:512], jax.random.key(0)
        self.program = jax.jit(self.update, donate_argnums=(0, 1)).lower(*arguments).compile()

    def update(self, params, state, window, key):
        loss, gradient = jax.value_and_grad(self.loss)(params, window, key)
        updates, state = self.optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    def step(self, window, key):
        start = time.perf_counter()
        self.params, self.state, loss = jax.block_until_ready(self.program(self.params, self.state, window, key))
        self.seconds.append(time.perf_counter() - start)
        self.training_loss.append(float(loss))


# %%
runs = {
    "fused softmax": Run(fused_loss),
    "adaptive softmax": Run(adaptive_loss),
    "sampled softmax": Run(sampled_loss),
    "sampled, 5 × steps": Run(sampled_loss, steps=1200),
    "sampled, no correction": Run(uncorrected_loss),
}
rng = np.random.default_rng(0)
for i, key in enumerate(jax.random.split(jax.random.key(5), 1200)):
    rows = train_rows[rng.integers(len(train_rows), size=512)]
    for run in runs.values():
        if i < run.steps:
            run.step(rows, key)

# %% [markdown]
# ## What it costs, and how well it predicts
#
# The held-out perplexity of the sampled models is computed with the full softmax. Sampling gives no normalized probability, so evaluation
# costs as much as without sampling. The adaptive model uses its own exact loss. These perplexities are per word. They cannot be compared
# with perplexities per character.


# %%
@jax.jit
def adaptive_sum(params, window):
    return xentjax.weighted_sum(adaptive_losses(params, window))


perplexity, milliseconds, mebibytes = {}, {}, {}
print(f"{'':24}perplexity   training loss   ms per step   MiB")
for name, run in runs.items():
    sums = batch_sums(run.params, word_rows, batch_sum=adaptive_sum if "adaptive" in run.params else batch_sum)
    perplexity[name] = float(metrics.perplexity(sum(sums)))
    milliseconds[name] = 1e3 * np.median(run.seconds[:240])  # all runs take part in these steps
    mebibytes[name] = run.program.memory_analysis().temp_size_in_bytes / 2**20
    last = np.mean(run.training_loss[-30:])
    print(f"{name:24}{perplexity[name]:10.1f}{last:12.2f} nats{milliseconds[name]:14.1f}{mebibytes[name]:6.1f}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
measures = (
    ("held-out perplexity", perplexity, ".0f"),
    ("time per step (ms)", milliseconds, ".1f"),
    ("temporary memory (MiB)", mebibytes, ".1f"),
)
for ax, (label, values, form) in zip(axes, measures, strict=True):
    bars = ax.barh(list(values), list(values.values()), color=[BLUE, GREEN, ORANGE, ORANGE, PINK])
    ax.bar_label(bars, fmt=f"{{:{form}}}", padding=3)
    ax.set(xlabel=label, xlim=(0, 1.22 * max(values.values())))
    ax.grid(axis="y", visible=False)
    ax.locator_params(axis="x", nbins=5)
axes[0].axvline(word_unigram, color="black", linestyle=":", linewidth=1.5)
axes[0].text(word_unigram + 8, 0.5, "word\nfrequencies", va="center", fontsize=9)
axes[0].invert_yaxis()
plt.show()

best = perplexity["fused softmax"]
assert best < 0.5 * word_unigram and perplexity["adaptive softmax"] < 1.25 * best
assert 0.95 * best < perplexity["sampled softmax"] < 1.5 * best < perplexity["sampled, no correction"]
assert perplexity["sampled, no correction"] > word_unigram > 2 * perplexity["sampled, 5 × steps"]
assert runs["sampled, no correction"].training_loss[-1] < runs["fused softmax"].training_loss[-1]
assert milliseconds["sampled softmax"] < 0.6 * milliseconds["fused softmax"]
print(f"sampled softmax computes {WORDS / (SAMPLES + 1):.0f} times fewer logits per token", end="; ")
print(f"its step is {milliseconds['fused softmax'] / milliseconds['sampled softmax']:.1f} times shorter")
print(
    f"240 fused steps take {0.24 * milliseconds['fused softmax']:.1f} s, 1,200 sampled steps {1.2 * milliseconds['sampled softmax']:.1f} s"
)
assert perplexity["sampled, 5 × steps"] < best

# %% [markdown]
# Sampling does save time, because it computes fewer logits. The rest of the step, such as the optimizer, costs the same as before. With the
# same number of steps, sampled softmax predicts slightly worse than the full softmax. In the time saved, it can take more steps, and then
# it predicts better. Adaptive softmax saves time too and needs no samples.
#
# Look at the last row. Of the models with 240 steps, it has the lowest training loss. Of all models, it has the highest perplexity. So a
# sampled loss must not be compared with a full loss.
#
# ## Without correction, the model learns $\log p - \log Q$
#
# Without the correction, the best logits are $z_k = \log p_k - \log Q_k$ plus a constant. A frequent word is drawn often, so its
# logit is pushed down often. If this is true, adding $\log Q_k$ to the trained biases must repair the model.
#
# Negative sampling, as in word2vec, has no correction either. Its best logits are also $\log p_k - \log Q_k$. It gives good word vectors,
# but no language model.

# %%
uncorrected = runs["sampled, no correction"].params
log_q = samplers.log_expected_count(word_sampler, jnp.arange(WORDS), SAMPLES)
repaired = float(metrics.perplexity(sum(batch_sums(uncorrected | {"bias": uncorrected["bias"] + log_q}, word_rows))))
print(f"perplexity without correction {perplexity['sampled, no correction']:.0f}, after adding log Q to the biases {repaired:.0f}")
assert repaired < 1.5 * best < perplexity["sampled, no correction"] / 2

# %% [markdown]
# ## The sampled loss is too small
#
# With the correction, the sum inside the logarithm is unbiased. Its logarithm is not. By Jensen's inequality,
# $\mathbb{E} \log \hat{Z} \le \log \mathbb{E} \hat{Z} = \log Z$. So the expected sampled loss is at most the true loss. We take one trained
# model and estimate its loss with more and more samples.

# %%
model, part = runs["fused softmax"].params, jnp.asarray(word_rows[::19][:1024])
true_loss = float(losses(model, part))
counts = np.array([4, 32, 256, 2048])


def estimates(sampler, count):
    def estimate(key):
        return xentjax.sampled_softmax_cross_entropy(
            hidden_states(model, part),
            model["kernel"],
            part[:, -1],
            samples=samplers.draw(key, sampler, count),
            bias=model["bias"],
            classes_first=True,
        ).mean()

    return jax.lax.map(estimate, jax.random.split(jax.random.key(6), 4))


estimated = {
    name: np.array([jax.jit(estimates, static_argnums=1)(sampler, int(n)) for n in counts]).mean(1)
    for name, sampler in (("log-uniform samples", word_sampler), ("uniform samples", samplers.uniform(WORDS)))
}

# %%
fig, ax = plt.subplots(figsize=(6, 3.4))
for (name, values), color, marker in zip(estimated.items(), (BLUE, ORANGE), "os", strict=True):
    ax.semilogx(counts, values, color=color, marker=marker, label=name)
ax.axhline(true_loss, color="black", linestyle=":", linewidth=1.5, label="true loss (all classes)")
ax.set_xticks(counts, [f"{n:,}" for n in counts])
ax.minorticks_off()
ax.set(xlabel="number of samples", ylabel="loss (nats)", title="One model, its loss estimated from samples")
ax.legend()
plt.show()

print("true loss", round(true_loss, 3), *(f"| {name}: {v[0]:.2f} with 4 samples, {v[-1]:.2f} with 2,048" for name, v in estimated.items()))
assert all(np.all(v < true_loss + 0.02) and v[0] < true_loss - 0.3 for v in estimated.values())
assert np.all(estimated["uniform samples"][:-1] < estimated["log-uniform samples"][:-1])
assert abs(estimated["log-uniform samples"][-1] - true_loss) < 0.05

# %% [markdown]
# The bias shrinks as the number of samples grows. With log-uniform sampling, far fewer samples suffice, because they contain the
# classes that matter. Report the full loss, and use the sampled loss only for training.
#
# ## What sampling does not give
#
# A probability needs the sum over all classes. Sampled softmax never computes it. The next cell shows that $\log \sum_k e^{z_k}$ differs
# from context to context. So the logits cannot be normalized by subtracting one constant. The adaptive softmax gives log-probabilities that
# are normalized by construction.

# %%
sampled_model = runs["sampled softmax"].params
z = hidden_states(sampled_model, part) @ sampled_model["kernel"].T + sampled_model["bias"]
log_z = np.asarray(jax.nn.logsumexp(z, axis=-1))
print(f"sampled softmax: log Σ exp(z) is {log_z.mean():.1f} ± {log_z.std():.1f} (mean and standard deviation over contexts)")

adaptive_model = runs["adaptive softmax"].params
log_probs = xentjax.adaptive_softmax_log_prob(hidden_states(adaptive_model, part), adaptive_model["adaptive"])
totals = np.exp(np.asarray(log_probs, np.float64)).sum(-1)
print(f"adaptive softmax: the probabilities sum to 1, within {abs(totals - 1).max():.0e}")
assert abs(totals - 1).max() < 1e-4 and log_z.std() > 0.1

# %% [markdown]
# # 4. Two-tower retrieval
#
# ## Made-up users and items
#
# A recommender must find a few good items among many. The **two towers** are two functions that turn a user and an item into vectors. The
# score is their dot product.
#
# We make 1,000 items whose popularity follows Zipf's law. Each user and each item has a hidden vector of 8 tastes. User $u$ picks item $i$
# with probability $p(i \mid u) \propto \text{popularity}_i \cdot e^{\,\text{match}(u, i)}$. The match is large if the tastes agree. There
# are 4,000 users for training, with 25 picks each. For testing, there are 1,000 new users with 5 picks each. We made the data, so we know
# the best possible model.

# %%
ITEMS, USERS, NEW, TASTES = 1000, 5000, 1000, 8
keys = jax.random.split(jax.random.key(7), 3)
tastes = jax.random.normal(keys[0], (USERS, TASTES))
match = 1.5 * tastes @ jax.random.normal(keys[1], (ITEMS, TASTES)).T / np.sqrt(TASTES)
true_log_p = jax.nn.log_softmax(match - jnp.log(jnp.arange(1, ITEMS + 1)), axis=-1)  # item 0 is the most popular
picks = jax.vmap(jnp.searchsorted)(jnp.cumsum(jnp.exp(true_log_p), -1), jax.random.uniform(keys[2], (USERS, 25)))
picks = jnp.minimum(picks, ITEMS - 1)  # the last sum may be rounded to slightly less than 1
test_picks, training_picks = picks[:NEW, :5], picks[NEW:]

popularity = jnp.bincount(training_picks.reshape(-1), length=ITEMS) + 1.0
log_q_items = jnp.log(popularity / popularity.sum())
print(f"{training_picks.size:,} training picks; {100 * popularity[:100].sum() / popularity.sum():.0f} % of them are of the first 100 items")

# %% [markdown]
# ## Negatives from the batch
#
# A batch holds pairs of a user and the picked item. The items of the other pairs serve as negatives, at no extra cost. This is again a
# sampled softmax. The samples come from the data, so $Q$ is the popularity of the items. A popular item is often a negative.
# `candidate_log_prob` subtracts $\log Q$, as in section 3:
#
# $$\ell_i = -\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}, \qquad s_{ij} = \text{user}_i \cdot \text{item}_j - c \log Q_j,$$
#
# with $c = 1$ for the corrected loss and $c = 0$ for the uncorrected loss. An item may occur twice in a batch. We keep such repeats. The
# best scores are then exactly $\log p(i \mid u)$ plus a constant. We train 4 models of each kind at once with `jax.vmap`.


# %%
def user_tower(params, tastes):
    return jax.nn.relu(tastes @ params["first"] + params["bias"]) @ params["second"]


def fit_towers(c, key, steps=800, vector=16):
    k = jax.random.split(key, 4)
    first, second = jax.random.normal(k[0], (TASTES, 64)) / np.sqrt(TASTES), jax.random.normal(k[1], (64, vector)) / 8
    params = {"first": first, "bias": jnp.zeros(64), "second": second, "items": 0.1 * jax.random.normal(k[2], (ITEMS, vector))}
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, state = carry
        user, turn = (jax.random.randint(k, (256,), 0, n) for k, n in zip(jax.random.split(key), training_picks.shape, strict=True))
        item = training_picks[user, turn]

        def loss(params):
            vectors = user_tower(params, tastes[NEW + user]), params["items"][item]
            return xentjax.in_batch_softmax_cross_entropy(*vectors, candidate_log_prob=c * log_q_items[item]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(k[3], steps))
    return user_tower(params, tastes[:NEW]) @ params["items"].T


# %%
over_keys = jax.vmap(fit_towers, in_axes=(None, 0))
scores = jax.jit(jax.vmap(over_keys, in_axes=(0, None)))(jnp.array([1.0, 0.0]), jax.random.split(jax.random.key(8), 4))

# %% [markdown]
# ## Recall
#
# Recall@k is the share of the new users' picks that are among the $k$ items with the highest scores. The simplest baseline recommends
# the most popular items to everyone. The best possible ranking is by the true probabilities.

# %%
cutoffs = (1, 2, 5, 10, 20, 50, 100)


@jax.jit
@jax.vmap
def hits(scores):  # [users, items] -> [k, picks, users], 1 if the pick is among the k highest scores
    return jnp.stack([jax.vmap(lambda item, k=k: metrics.top_k_accuracy(scores, item, k=k), 1)(test_picks) for k in cutoffs])


all_scores = {
    "true probabilities": true_log_p[None, :NEW],
    "with log-Q correction": scores[0],
    "most popular items": jnp.broadcast_to(log_q_items, (1, NEW, ITEMS)),
    "without correction": scores[1],
}
found = {name: hits(s) for name, s in all_scores.items()}  # [seed, k, picks, users]
recall = {name: np.asarray(h.mean((2, 3))) for name, h in found.items()}  # [seed, k]
rare = jnp.broadcast_to(test_picks.T >= 100, found["true probabilities"].shape[2:])
rare_recall = {name: float(xentjax.weighted_mean(h[:, cutoffs.index(10)].mean(0), where=rare)) for name, h in found.items()}

# %%
ten = {name: 100 * r[:, cutoffs.index(10)] for name, r in recall.items()}
print("recall@10 in %           all picks   (4 models)     picks of items after the first 100")
for name, r in ten.items():
    print(f"{name:22}{r.mean():10.1f}    {r.min():.1f} to {r.max():.1f}{100 * rare_recall[name]:15.1f}")
assert ten["with log-Q correction"].min() > 0.9 * ten["true probabilities"][0] > ten["most popular items"][0]
assert ten["without correction"].max() < 0.8 * ten["most popular items"][0]
assert rare_recall["without correction"] > rare_recall["with log-Q correction"]

# %% [markdown]
# ## Why: the score lacks $\log Q$
#
# The right plot shows by how much the score of each item differs from $\log p(i \mid u)$, as a mean over users. The mean over all items is
# subtracted.
# Without correction, the difference is close to $-\log Q_i$, except for the rarest items, which have few picks. This is the result of
# section 3 again. The score then ranks the items by $p(i \mid u) / Q_i$. Compared with the mean over all items, the scores of the most
# popular items are about 5 nats too low.

# %%
styles = {"with log-Q correction": (BLUE, "o", "-"), "without correction": (ORANGE, "s", "-")}
styles |= {"true probabilities": ("black", None, ":"), "most popular items": ("black", None, "--")}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for name, r in recall.items():
    color, marker, line = styles[name]
    left.semilogx(cutoffs, 100 * r.mean(0), color=color, marker=marker, linestyle=line, label=name, zorder=3 if line == ":" else 2)
left.set_xticks(cutoffs, [f"{k}" for k in cutoffs])
left.minorticks_off()
left.set(xlabel="k (number of recommended items)", ylabel="recall@k (%)", title="New users")
left.legend()

slopes = {}
for name in ("with log-Q correction", "without correction"):
    error = np.asarray((all_scores[name] - true_log_p[:NEW]).mean((0, 1)))
    error = error - error.mean()
    slopes[name] = np.polyfit(log_q_items, error, 1)[0]
    right.plot(log_q_items, error, ".", color=styles[name][0], markersize=4, label=f"{name}: slope {slopes[name]:.2f}")
right.plot(log_q_items, log_q_items.mean() - log_q_items, color="black", linestyle=":", linewidth=1.5, label="−log Q")
right.set(xlabel="log Q (log of the popularity of the item)", ylabel="score − log p (nats)", title="Mean error of the score of each item")
right.legend()
plt.show()
assert abs(slopes["with log-Q correction"]) < 0.15 and abs(slopes["without correction"] + 1) < 0.15

# %% [markdown]
# With the correction, the model is nearly as good as the true probabilities. Without the correction, it is worse than a list of the most
# popular items, which knows nothing about the user. The model without correction finds rare items more often. If this is what you want,
# choose it on purpose: train with the correction, and subtract a part of $\log Q$ from the scores when you recommend.

# %% [markdown]
# # 5. One model, two tasks
#
# ## Two heads on one trunk
#
# A multi-task model has one trunk and one head per task. The loss is a weighted sum, with a weight $\lambda$ for the second task:
#
# $$\ell = \ell_{\text{class}} + \lambda\, \ell_{\text{second}} .$$
#
# Task one is to classify scikit-learn's digits. We try two choices of the second task: the **parity** of the digit (even or odd), and the
# amount of **ink** in four bins. $\lambda = 0$ is the single-task model. Tutorials often promise that a second task helps. There are 600
# training images. We test the promise with the class labels of all 600 images, and with the class labels of only 60 of them. The second
# task always has all 600 labels.
#
# In the second test, the other 540 images have no class label. Their entry in `labels` is −100. The mask `where=labels != -100` leaves
# these images out of the first loss. They still count in the second loss.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, digit = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order], jnp.int32)
ink, WIDTH = images.sum(1), 64
second_labels = {"parity": (digit % 2, 2), "ink": (jnp.searchsorted(jnp.quantile(ink, jnp.array([0.25, 0.5, 0.75])), ink), 4)}
train_images, test_images = images[:600], images[600:]


# %%
def init_trunk(key):
    first, second = jax.random.split(key)
    return [(jax.random.normal(k, (m, WIDTH)) * np.sqrt(2 / m), jnp.zeros(WIDTH)) for k, m in ((first, 64), (second, WIDTH))]


def trunk(layers, x):
    for w, b in layers:
        x = jax.nn.relu(x @ w + b)
    return x


def mean_loss(logits, labels):
    where = labels != -100
    return xentjax.weighted_mean(xentjax.softmax_cross_entropy(logits, labels, where=where), where=where)


def minimise(loss, params, steps, rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


# %%
def two_tasks(labelled, weight, key, second, bins):
    k = jax.random.split(key, 4)
    keep = jax.random.permutation(k[0], 600) < labelled  # a random choice of the labelled images
    labels = jnp.where(keep, digit[:600], -100)
    params = {"trunk": init_trunk(k[1]), "class": jnp.zeros((WIDTH, 10)), "second": jnp.zeros((WIDTH, bins))}

    def loss(params):
        hidden = trunk(params["trunk"], train_images)
        return mean_loss(hidden @ params["class"], labels) + weight * mean_loss(hidden @ params["second"], second[:600])

    params = minimise(loss, params, steps=100, rate=1e-2)
    hidden = trunk(params["trunk"], test_images)
    heads = (("class", digit), ("second", second))
    return {name: metrics.accuracy(hidden @ params[name], y[600:]).mean() for name, y in heads}


settings = {n: i for i, n in enumerate([(600, 0.0), (600, 0.5), (600, 2.0), (60, 0.0), (60, 0.5), (60, 2.0), (0, 1.0)])}
labelled, weights = map(jnp.array, zip(*settings, strict=True))
keys = jax.random.split(jax.random.key(9), 8)
accuracy = {}
for name, (second, bins) in second_labels.items():
    over_keys = jax.vmap(lambda n, w, k, s=second, b=bins: two_tasks(n, w, k, s, b), in_axes=(None, None, 0))
    result = jax.jit(jax.vmap(over_keys, in_axes=(0, 0, None)))(labelled, weights, keys)
    accuracy[name] = {head: 100 * np.asarray(a) for head, a in result.items()}  # [setting, seed]

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.5))
gain = {}
for ax, n in zip(axes, (600, 60), strict=True):
    single = settings[n, 0.0]
    for (name, a), color, marker in zip(accuracy.items(), (BLUE, ORANGE), "os", strict=True):
        change = a["class"][single : single + 3] - a["class"][single]  # the same initialisation and the same labels
        mean, error = change.mean(-1), change.std(-1, ddof=1) / np.sqrt(len(keys))
        ax.errorbar([0, 0.5, 2], mean, 2 * error, color=color, marker=marker, capsize=4, label=f"second task: {name}")
        gain[name, n] = mean[2], error[2]
    ax.axhline(0, color="black", linestyle=":", linewidth=1.5)
    ax.set(xlabel="weight λ of the second task", xticks=[0, 0.5, 1, 1.5, 2], ylabel="change of the accuracy (points)")
    ax.set_title(f"{n} class labels; single task: {accuracy['ink']['class'][single].mean():.1f} %")
    ax.legend(loc="best")
plt.show()

for (name, n), (mean, error) in gain.items():
    print(f"{n:3} class labels, λ = 2: {name:6} changes the class accuracy by {mean:+.1f} ± {error:.1f} points")
for name, a in accuracy.items():
    both, alone = (a["second"][settings[key]].mean() for key in ((600, 2.0), (0, 1.0)))  # without class labels, the first loss is 0
    print(f"accuracy of {name}: with both tasks {both:.1f} %, alone {alone:.1f} %")
assert gain["parity", 60][0] > 1 and gain["ink", 60][0] < 0.5
assert max(gain[name, 600][0] for name in accuracy) < 1 and both < alone + 1

# %% [markdown]
# The error bars show two standard errors over 8 pairs of networks. With all 600 class labels, neither second task helps. With 60 class
# labels, parity helps: its 600 labels carry information about the class. For example, they separate 8 from 9. The amount of ink carries
# little information about the class, and this second task hurts. The second tasks themselves gain nothing from the class labels. So a
# second task does not always help. It helps the first task if its labels carry information that the labels of the first task lack.
#
# ## Transfer: a trunk trained on other classes
#
# In transfer learning, the trunk is trained on one task and kept fixed. Then a linear head is trained on another task with few labels. Our
# trunk learns the digits 0 to 4. The head learns the digits 5 to 9. We compare with a linear head on a random trunk, and with a linear head
# on the pixels.


# %%
def transfer(n, key):
    k = jax.random.split(key, 2)
    chosen = jax.random.permutation(k[0], 600)
    x, y = train_images[chosen], digit[chosen]
    start = {"trunk": init_trunk(k[1]), "head": jnp.zeros((WIDTH, 5))}
    low, high = jnp.where(y < 5, y, -100), jnp.where(y >= 5, y - 5, -100)
    learned = minimise(lambda p: mean_loss(trunk(p["trunk"], x) @ p["head"], low), start, 100, 1e-2)["trunk"]
    earlier = jnp.cumsum(jax.nn.one_hot(y, 10, dtype=jnp.int32), 0)[jnp.arange(600), y]  # 1 for the first image of its class, ...
    few, is_high, result = jnp.where(earlier <= n, high, -100), digit[600:] >= 5, {}
    for name, layers in (("pixels", []), ("random trunk", start["trunk"]), ("trunk of 0 to 4", learned)):
        hidden, test_hidden = trunk(layers, x), trunk(layers, test_images)
        scale = jnp.sqrt(jnp.mean(hidden**2))
        head = minimise(lambda w, h=hidden / scale: mean_loss(h @ w, few), jnp.zeros((hidden.shape[1], 5)), 100, 1e-1)
        right = metrics.accuracy(test_hidden @ head, digit[600:] - 5, where=is_high)
        result[name] = xentjax.weighted_mean(right, where=is_high)
    return result


# %%
numbers = jnp.array([1, 2, 5, 10, 20])
over_numbers = jax.vmap(transfer, in_axes=(0, None))
transferred = jax.jit(jax.vmap(over_numbers, in_axes=(None, 0)))(numbers, jax.random.split(jax.random.key(10), 8))

fig, ax = plt.subplots(figsize=(6, 3.4))
for (name, a), color, marker in zip(transferred.items(), (GREEN, ORANGE, BLUE), "^so", strict=True):
    ax.semilogx(numbers, 100 * a.mean(0), color=color, marker=marker, label=name)
    print(f"linear head on {name:16}", "  ".join(f"{n:2} per class: {100 * v:.0f} %" for n, v in zip(numbers, a.mean(0), strict=True)))
ax.set_xticks(numbers, [f"{n}" for n in numbers])
ax.minorticks_off()
ax.set(xlabel="labelled images per class", ylabel="accuracy on digits 5 to 9 (%)", title="Linear head on fixed features")
ax.legend()
plt.show()
assert np.all(transferred["pixels"].mean(0) > transferred["trunk of 0 to 4"].mean(0))

# %% [markdown]
# Transfer is not always a gain. Here the trunk hurts. It was trained to tell five digits apart. A likely reason is that it discards
# information that it does not need for this. A random trunk discards less, and the pixels still contain everything. So compare with a head
# on the plain inputs before you trust a pretrained trunk.

# %% [markdown]
# ## What to remember
#
# - Logits take tokens × classes × 4 bytes. A fused loss computes the same value and gradients in chunks. It saves memory, not time.
# - Sampled softmax saves time. Without the log-Q correction, it learns $\log p - \log Q$. Its loss is too small, and it gives no
#   probabilities. Compare models by the full loss.
# - Adaptive softmax saves time and gives exact probabilities. It is a different model.
# - In-batch negatives are samples too. Without the log-Q correction, popular items are pushed down by $\log Q$.
# - Perplexity is the exponential of the mean loss over all tokens. Add sums over batches, divide once, then take the exponential.
# - A second task helps if its labels carry information that the labels of the first task lack. Measure whether it helps. Do the same for
#   transfer.
#
# More: [quickstart](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb) ·
# [fused linear layers](https://github.com/xentjax/xentjax/blob/main/docs/fused-linear.md) ·
# [all losses by data and task](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md) ·
# [conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md)
