# %% [markdown]
# # Cross-entropy from first principles
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/first_principles.ipynb)
#
# Cross-entropy is the loss of almost every classifier and every language model. This notebook builds it from one idea, surprise. You will
# measure surprise, compress a text and count its bits, and pay the price of a wrong forecast. You will then see why the minimum of
# cross-entropy is usually not 0, why no $\varepsilon$ is needed, and why the gradient is as simple as $p - y$. Each formula comes with
# code that checks it. The lines that start with **Often wrong** name mistakes that many tutorials make, and correct them. The notebook
# runs in seconds on a CPU.

# %% [markdown]
# ## Install
#
# On Colab, the next cell installs the packages that this notebook uses. Elsewhere, the cell does nothing. In that case, run
# `pip install git+https://github.com/xentjax/xentjax optax matplotlib` once.

# %%
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q git+https://github.com/xentjax/xentjax optax matplotlib")

# %%
import codecs
import contextlib
import heapq
import io
import itertools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import xentjax
from xentjax import information

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # the truth P, the forecast Q, and a third colour that everyone can tell apart
EPS = float(jnp.finfo(jnp.float32).eps)  # 2^-23, the spacing of float32 numbers at 1

# %% [markdown]
# The example for most of the notebook is the weather. $P$ is how often each kind of weather really occurs. $Q$ is a forecast.

# %%
WEATHER = ["sunny", "cloudy", "rainy"]
P = np.array([0.5, 0.3, 0.2])
Q = np.array([0.4, 0.4, 0.2])

# %% [markdown]
# ## Self-information: the surprise at one event
#
# A rare event is a surprise. An event that is certain to occur is no surprise. The surprise at an event of probability $p$ is its
# **self-information**
#
# $$I(p) = -\log p .$$
#
# The logarithm makes surprises add up. Two independent events both occur with probability $p_1 p_2$, and
# $-\log(p_1 p_2) = I(p_1) + I(p_2)$. The base of the logarithm sets the unit. The natural logarithm gives *nats*, and base 2 gives
# *bits*. One bit is $\log 2 = 0.693$ nats.

# %%
surprise = information.self_information(jnp.array(P))
for name, p, nats, bits in zip(WEATHER, P, surprise, information.self_information(jnp.array(P), base=2), strict=True):
    print(f"{name:7} p = {p:.1f}   surprise {nats:.3f} nats = {bits:.3f} bits")
both = information.self_information(jnp.array(0.5 * 0.2))
print(f"\nsunny today, then rainy: {both:.3f} nats = {surprise[0]:.3f} + {surprise[2]:.3f}")
np.testing.assert_allclose(surprise, -np.log(P), rtol=4 * EPS)

p = jnp.linspace(0.01, 1, 200)
fig, ax = plt.subplots(figsize=(5.6, 3.2))
ax.plot(p, information.self_information(p), color=BLUE)
for name, x, y in zip(WEATHER, P, surprise, strict=True):
    ax.plot(x, y, "o", color=BLUE, markersize=8)
    ax.annotate(name, (x, y), (8, 6), textcoords="offset points", fontsize=11)
ax.set(xlabel="probability p of the event", ylabel="surprise −log p (nats)", ylim=(-0.1, 4.6), title="The rarer, the more surprising")
ax.secondary_yaxis("right", functions=(lambda n: n / np.log(2), lambda b: b * np.log(2))).set_ylabel("surprise (bits)")
plt.show()

# %% [markdown]
# ## Entropy: the mean surprise
#
# Event $k$ occurs with probability $p_k$, and its surprise is $-\log p_k$. The mean surprise is the **entropy**
#
# $$H(P) = -\sum_k p_k \log p_k .$$
#
# The picture draws each event as a rectangle of width $p_k$ and height $-\log p_k$. The entropy is the total area.


# %%
def draw_areas(ax, widths, heights, color, labels=WEATHER):
    left = np.cumsum(widths) - widths
    ax.bar(left, heights, widths, align="edge", color=color, alpha=0.55, edgecolor="white", linewidth=2)
    for x, width, height, label in zip(left, widths, heights, labels, strict=True):
        ax.text(x + width / 2, height + 0.06, label, ha="center", va="bottom", fontsize=10)
    ax.set(xlabel="probability", xlim=(0, 1))


fig, axes = plt.subplots(1, 3, figsize=(9.2, 3), sharey=True)
mixes = {"almost always sunny": np.array([0.94, 0.04, 0.02]), "the weather P": P, "all equally likely": np.full(3, 1 / 3)}
for ax, (name, mix) in zip(axes, mixes.items(), strict=True):
    entropy = information.entropy(jnp.array(mix))
    draw_areas(ax, mix, -np.log(mix), BLUE, WEATHER if mix[2] > 0.1 else ["sunny", "", ""])
    ax.set(title=f"{name}\narea = entropy = {entropy:.4f} nats", ylim=(0, 4.3))
    np.testing.assert_allclose(entropy, -np.sum(mix * np.log(mix)), rtol=8 * EPS)
axes[0].text(0.93, 3.2, "cloudy\nand rainy", ha="right", va="center", fontsize=10)
axes[0].set_ylabel("surprise −log p (nats)")
plt.show()
assert math.isclose(information.entropy(jnp.array(P)), 1.0297, abs_tol=5e-5)

# %% [markdown]
# The entropy of nearly constant weather is small. The entropy is largest if all $K$ events are equally likely. It is then $\log K$,
# here $\log 3 = 1.0986$ nats.
#
# ## Entropy counts bits
#
# Surprise is also a length. Give each symbol a code word of bits, such that a string of words can be decoded without separators.
# Shannon proved in 1948 that the mean length of a word is then at least the entropy in bits.
#
# You can check this on a text. The next cell builds a Huffman code, the best code with one word per letter. It starts with one group
# per letter, and merges the two rarest groups until one group is left. Each merge puts a 0 before the words of one group, and a 1
# before the words of the other.


# %%
def huffman_code(counts):
    groups = [(n, i, {letter: ""}) for i, (letter, n) in enumerate(sorted(counts.items()))]
    heapq.heapify(groups)
    for i in itertools.count(len(groups)):
        n0, _, rarest = heapq.heappop(groups)
        n1, _, second = heapq.heappop(groups)
        merged = {a: "0" + word for a, word in rarest.items()} | {a: "1" + word for a, word in second.items()}
        if not groups:
            return merged
        heapq.heappush(groups, (n0 + n1, i, merged))


# %% [markdown]
# The text is the Zen of Python, which every Python installation includes. Only its letters and spaces are kept.

# %%
with contextlib.redirect_stdout(io.StringIO()):  # `import this` prints the text; the module holds it in rot13
    import this
text = " ".join(re.findall("[a-z]+", codecs.decode(this.s, "rot13").lower()))
counts = Counter(text)
code = huffman_code(counts)
sent = "".join(code[letter] for letter in text)

letters = {word: letter for letter, word in code.items()}
received, word = "", ""
for bit in sent:  # no separators are needed: no word is the beginning of another
    word += bit
    if word in letters:
        received, word = received + letters[word], ""
assert received == text
print(f"{text[:46]!r}...\n{sent[:100]}...")

# %% [markdown]
# Decoding the bits gives the original text. Now count the bits.

# %%
frequency = np.array([n for _, n in counts.most_common()]) / len(text)
length = np.array([len(code[letter]) for letter, _ in counts.most_common()])
entropy_bits = float(information.entropy(jnp.array(frequency), base=2))
bits_per_letter = len(sent) / len(text)
print(f"a fixed number of bits per letter: {math.ceil(math.log2(len(counts)))}.000")
print(f"Huffman code: {len(sent)} bits / {len(text)} letters = {bits_per_letter:.3f}")
print(f"entropy, the limit:                {entropy_bits:.3f}")
exact = -np.sum(frequency * np.log2(frequency))
tree = xentjax.huffman_tree(frequency)  # the library's tree is as good
assert abs(entropy_bits - exact) < 1e-5 and exact <= bits_per_letter < exact + 0.1
assert math.isclose(frequency @ np.abs(tree.signs).sum(1), bits_per_letter, rel_tol=1e-9)

fig, ax = plt.subplots(figsize=(9.2, 3.2))
ax.bar(range(len(counts)), length, width=0.75, color=ORANGE, alpha=0.45, label="length of the letter's code word")
ax.plot(-np.log2(frequency), "o", color=BLUE, markersize=7, label="surprise −log₂ p of the letter")
ax.set_xticks(range(len(counts)), ["␣" if a == " " else a for a, _ in counts.most_common()])
ax.set(
    xlabel="letters of the Zen of Python, the most common first (␣ is the space)",
    ylabel="bits",
    title="A letter of probability p gets about −log₂ p bits",
)
ax.grid(axis="x", visible=False)
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# Each bar ends near its dot. The code cannot follow the dots exactly, because a word has a whole number of bits. This is why the code is
# slightly longer than the entropy.
#
# **Often wrong:** a comparison of a loss in nats with an entropy in bits. Textbooks use bits, and training libraries use nats. 1.0297
# nats and 1.4855 bits are the same entropy. Always write the unit.
#
# ## Cross-entropy: the mean surprise of a forecast
#
# Someone believes the forecast $Q$. Event $k$ then surprises them by $-\log q_k$. But it still occurs with the true probability $p_k$.
# Their mean surprise is the **cross-entropy**
#
# $$H(P, Q) = -\sum_k p_k \log q_k .$$
#
# The part beyond the entropy is the **Kullback–Leibler divergence**, the price of the wrong belief:
#
# $$H(P, Q) = H(P) + D(P \,\|\, Q), \qquad D(P \,\|\, Q) = \sum_k p_k \log \frac{p_k}{q_k} \ge 0 .$$

# %%
p, q = jnp.array(P), jnp.array(Q)
H, H_pq, KL = information.entropy(p), information.cross_entropy(p, q), information.kl_divergence(p, q)
print(f"H(P) = {H:.4f},   H(P, Q) = {H_pq:.4f},   D(P‖Q) = {KL:.4f} nats")
assert [round(float(x), 4) for x in (H, H_pq, KL)] == [1.0297, 1.0549, 0.0253]
np.testing.assert_allclose(H_pq, -np.sum(P * np.log(Q)), rtol=8 * EPS)
np.testing.assert_allclose(KL, np.sum(P * np.log(P / Q)), rtol=64 * EPS)
assert abs(H + KL - H_pq) < 4 * EPS

true_height, believed = -np.log(P), -np.log(Q)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4), sharey=True)
draw_areas(left, P, true_height, BLUE)
left.set(ylabel="surprise (nats)", ylim=(0, 2), title=f"height −log p: area = H(P) = {H:.4f}")
draw_areas(right, P, np.minimum(true_height, believed), BLUE, ["", "", "rainy"])
right.bar(0, believed[0] - true_height[0], 0.5, bottom=true_height[0], align="edge", color=ORANGE, edgecolor="white", linewidth=2)
right.bar(0.5, true_height[1] - believed[1], 0.3, bottom=believed[1], align="edge", color="none", edgecolor=GREEN, hatch="///")
right.text(0.25, believed[0] + 0.05, "sunny: 0.1116 more", ha="center", fontsize=10)
right.text(0.65, true_height[1] + 0.05, "cloudy:\n0.0863 less", ha="center", fontsize=10)
right.set_title(f"height −log q: area = H(P, Q) = {H_pq:.4f}")
plt.show()

# %% [markdown]
# The forecast gives "sunny" too small a probability, so sunny days surprise more (orange). It gives "cloudy" too large a probability,
# so cloudy days surprise less (hatched). The added surprise is never less than the saved surprise. The difference is
# $0.1116 - 0.0863 = 0.0253$ nats, the divergence.
#
# ## A wrong code costs the divergence
#
# The cost of a wrong code can also be counted in bits. The code words 0, 10 and 11 have lengths 1, 2 and 2. They fit the probabilities
# ½, ¼, ¼ exactly, because each length is $-\log_2 p$. If the last event is the common one instead, the same words are too long on average.

# %%
true, believed = jnp.array([0.25, 0.25, 0.5]), jnp.array([0.5, 0.25, 0.25])
lengths = np.array([1, 2, 2])  # 0, 10, 11, made for `believed`
needed = np.array([2, 2, 1])  # 10, 11, 0, made for `true`
print(f"bits per event with the right code: {true @ needed:.2f} = H(P)    = {information.entropy(true, base=2):.2f}")
print(f"bits per event with the wrong code: {true @ lengths:.2f} = H(P, Q) = {information.cross_entropy(true, believed, base=2):.2f}")
price = information.kl_divergence(true, believed, base=2)
print(f"price of the wrong code:            {true @ (lengths - needed):.2f} = D(P‖Q)  = {price:.2f}")
assert float(true @ lengths) == 1.75 and abs(information.cross_entropy(true, believed, base=2) - 1.75) < 4 * EPS

# %% [markdown]
# Not all probabilities of the weather are powers of ½, so words with a whole number of bits cannot fit them exactly. A code for
# several days at once fits better. Below, each code word stands for a block of $n$ days, so there are $3^n$ words. One code is made for
# $P$, and one for the forecast $Q$. Both are used on the true weather.


# %%
def block(distribution, days):  # probabilities of all sequences of `days` independent days
    return np.array([math.prod(sequence) for sequence in itertools.product(distribution, repeat=days)])


def bits_per_day(forecast, days):
    lengths = np.abs(xentjax.huffman_tree(block(forecast, days)).signs).sum(axis=1)
    return block(P, days) @ lengths / days


# %%
days = np.arange(1, 10)
right_code, wrong_code = (np.array([bits_per_day(forecast, n) for n in days]) for forecast in (P, Q))
low, high = (float(x) / math.log(2) for x in (H, H_pq))  # from nats to bits
print(f"9 days at once: {right_code[-1]:.4f} bits per day with the code for P, limit H(P) = {low:.4f}")
print(f"                {wrong_code[-1]:.4f} bits per day with the code for Q, limit H(P, Q) = {high:.4f}")
assert np.all(right_code >= low) and np.all(right_code < low + 1 / days) and abs(wrong_code[-1] - high) < 0.02

fig, ax = plt.subplots(figsize=(6.6, 3.3))
for values, limit, color, name in ((wrong_code, high, ORANGE, "Q"), (right_code, low, BLUE, "P")):
    ax.plot(days, values, "o-", color=color, label=f"code made for {name}")
    ax.axhline(limit, color=color, linestyle="--", linewidth=1.5, label="limit H(P, Q)" if name == "Q" else "limit H(P)")
ax.annotate("", (9.4, low), (9.4, high), arrowprops={"arrowstyle": "<->", "color": GREEN, "shrinkA": 0, "shrinkB": 0, "linewidth": 2})
ax.text(9.55, (low + high) / 2, f"D(P‖Q)\n{high - low:.4f} bits", color=GREEN, va="center", fontsize=11)
ax.set(xlabel="days per code word", ylabel="bits per day", xlim=(0.7, 11.2), xticks=days, title="The true weather P, sent with two codes")
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# Both codes come close to their limits. The gap between the limits is the divergence, 0.0365 bits or 0.0253 nats. It is
# the price of the wrong forecast, to be paid every day.
#
# ## The divergence is not a distance
#
# **Often wrong:** "the Kullback–Leibler divergence is a distance". A distance from $P$ to $Q$ equals the distance from $Q$ to $P$. The
# divergence does not have this property. For the forecast above, the two directions are 0.0253 and 0.0258 nats. The difference grows as
# the forecast $Q$ moves toward "always sunny". On the way, $D(P \,\|\, Q)$ grows without bound, because $Q$ gives cloudy and rainy days a
# probability that goes to 0, but such days still occur. The other direction stays finite.
#
# The **Jensen–Shannon divergence** is symmetric. It compares $P$ and $Q$ with their mean $M = (P + Q)/2$, and is never above $\log 2$:
#
# $$\mathrm{JS}(P, Q) = \tfrac12 D(P \,\|\, M) + \tfrac12 D(Q \,\|\, M).$$

# %%
reverse, JS = information.kl_divergence(q, p), information.js_divergence(p, q)
print(f"D(P‖Q) = {KL:.6f}, D(Q‖P) = {reverse:.6f}, JS(P, Q) = {JS:.6f} = JS(Q, P) = {information.js_divergence(q, p):.6f} nats")
M = (P + Q) / 2
np.testing.assert_allclose(reverse, np.sum(Q * np.log(Q / P)), rtol=64 * EPS)
np.testing.assert_allclose(JS, (np.sum(P * np.log(P / M)) + np.sum(Q * np.log(Q / M))) / 2, rtol=64 * EPS)

# %%
share = jnp.linspace(0, 1, 401)[:, None]
forecasts = (1 - share) * p + share * jnp.array([1.0, 0.0, 0.0])  # from P to "always sunny"
truth = jnp.broadcast_to(p, forecasts.shape)
fig, ax = plt.subplots(figsize=(5.6, 3.2))
ax.plot(share, information.kl_divergence(truth, forecasts), color=BLUE, label="D(P‖Q), no bound")
ax.plot(share, information.kl_divergence(forecasts, truth), color=ORANGE, linestyle="--", label="D(Q‖P), ends at log 2")
ax.plot(share, information.js_divergence(truth, forecasts), color=GREEN, linestyle="-.", label="JS(P, Q)")
ax.set(
    xlabel="share of “always sunny” in Q (at 0, Q = P)",
    ylabel="nats",
    ylim=(-0.03, 1.6),
    title="Three divergences",
)
ax.legend(loc="upper left")
plt.show()
last = [float(f(a, b)) for f, a, b in ((information.kl_divergence, p, forecasts[-1]), (information.kl_divergence, forecasts[-1], p))]
print(f"Q = always sunny: D(P‖Q) = {last[0]}, D(Q‖P) = {last[1]:.4f} nats")
assert last[0] == math.inf and abs(last[1] - math.log(2)) < 8 * EPS

# %% [markdown]
# ## The minimum is the entropy, not 0
#
# **Often wrong:** "a perfect model has cross-entropy 0". This holds only if the truth itself is certain, as with a one-hot label.
# Since $D(P \,\|\, Q) \ge 0$, and $D = 0$ only at $Q = P$,
#
# $$\min_Q H(P, Q) = H(P), \quad \text{reached only at } Q = P .$$
#
# The first picture has only two kinds of weather, and $p$ is the true probability of the first. Each curve has its lowest point at
# $q = p$. All lowest points lie on the edge of the grey area. This edge is the entropy.

# %%
fig, ax = plt.subplots(figsize=(5.8, 3.4))
x = jnp.linspace(0.005, 0.995, 199)
coin = jnp.stack([x, 1 - x], axis=-1)
for true_p, color, style in ((1.0, "black", ":"), (0.9, BLUE, "-"), (0.7, GREEN, "--"), (0.5, ORANGE, "-.")):
    pair = jnp.array([true_p, 1 - true_p])
    ax.plot(x, information.cross_entropy(jnp.broadcast_to(pair, coin.shape), coin), style, color=color, label=f"p = {true_p:.1f}")
    ax.plot(true_p, information.entropy(pair), "o", color=color, markersize=8, zorder=3, clip_on=False)
ax.fill_between(x, information.entropy(coin), color="gray", alpha=0.25, linewidth=0, label="entropy of (q, 1 − q)")
ax.set(xlabel="forecast q", ylabel="cross-entropy (nats)", xlim=(0, 1), ylim=(0, 2.2), title="The lowest points are the entropies")
ax.legend(loc="upper center")
plt.show()

# %% [markdown]
# Only the dotted curve, for $p = 1$, reaches 0. The next picture shows all forecasts for three kinds of weather. Each point of the
# triangle is one forecast. A corner gives one kind of weather the probability 1, and the centre gives each kind ⅓.


# %%
CORNERS = np.array([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]])  # the point of forecast q is q @ CORNERS


def draw_triangle(fig, ax, target):
    n = 90  # all forecasts (i, j, k)/n, moved a little away from the edges, where the loss is infinite
    grid = (np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) + 0.1) / (n + 0.3)
    loss = information.cross_entropy(jnp.broadcast_to(target, grid.shape), jnp.array(grid))
    shades = ax.tricontourf(*(grid @ CORNERS).T, loss, levels=np.linspace(1, 2.6, 9), cmap="Blues", vmin=0.9, vmax=3, extend="max")
    ax.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", linewidth=1.5)
    for name, (x, y), side in zip(WEATHER, CORNERS, ("top", "top", "bottom"), strict=True):
        ax.text(x, y + (0.03 if side == "bottom" else -0.03), name, ha="center", va=side, fontsize=11)
    ax.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.1, 0.97))
    ax.set_axis_off()
    fig.colorbar(shades, ax=ax, label="H(P, Q) (nats)", shrink=0.8, ticks=[1, 1.4, 1.8, 2.2, 2.6])


# %%
fig, ax = plt.subplots(figsize=(6.2, 3.6))
draw_triangle(fig, ax, p)
for point, color, name in ((P, BLUE, "Q = P"), (Q, ORANGE, "forecast Q"), (np.full(3, 1 / 3), "black", "centre")):
    loss = information.cross_entropy(p, jnp.array(point))
    ax.plot(*(point @ CORNERS), "o", color=color, markersize=9, markeredgecolor="white", label=f"{name}: {loss:.4f} nats")
ax.legend(loc="upper left", bbox_to_anchor=(-0.25, 1.0))
ax.set_title("The loss of every forecast for the weather P")
plt.show()

# %% [markdown]
# No forecast has a loss below 1.0297 nats. A language model has the same kind of limit. Its mean loss on new text
# cannot fall below the entropy of the language, however large the model.
#
# ## Probabilities of 0 need no ε
#
# **Often wrong:** "add a small $\varepsilon$, so that $\log 0$ cannot occur". The $\varepsilon$ changes the answer. It also removes the
# gradient where the model is most wrong. The definition itself has no problem at 0. By $\lim_{p \to 0} p \log p = 0$, an event that never
# occurs contributes 0. A forecast that calls a real event impossible costs $\infty$.


# %%
def definition(p, q):  # Python floats are float64
    return math.fsum(-a * math.log(b) if b > 0 else math.inf for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def without_care(p, q):
    return -jnp.sum(p * jnp.log(q))


def clipped(p, q):
    return -jnp.sum(p * jnp.log(jnp.clip(q, 1e-7, 1 - 1e-7)))


# %%
cases = {
    "certain and right": ([1.0, 0.0], [1.0, 0.0]),
    "an event that never occurs": ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]),
    "almost certain and wrong": ([1.0, 0.0], [1e-20, 1.0]),
    "certain and wrong": ([1.0, 0.0], [0.0, 1.0]),
}
print(f"{'':28}{'definition':>12}{'p·log q':>12}{'clip 1e-7':>12}{'xentjax':>12}")
for name, (a, b) in cases.items():
    a, b = jnp.array(a), jnp.array(b)
    values = [float(f(a, b)) for f in (definition, without_care, clipped, information.cross_entropy)]
    print(f"{name:28}" + "".join(f"{v:12.5g}" for v in values))
    np.testing.assert_allclose(values[3], values[0], rtol=4 * EPS)
a, b = (jnp.array(x) for x in cases["almost certain and wrong"])
slopes = [float(jax.grad(f, argnums=1)(a, b)[0]) for f in (clipped, information.cross_entropy)]
exact = -1 / float(b[0])
print(f"\nalmost certain and wrong, slope of the loss in q: clip {abs(slopes[0]):.0f}, xentjax {slopes[1]:.3g}, exact {exact:.3g}")
assert slopes[0] == 0 and math.isclose(slopes[1], exact, rel_tol=4 * EPS)

# %% [markdown]
# The slope of the clipped loss is 0 at the model's worst mistake, so the model cannot learn from this mistake. In training, pass
# logits to `softmax_cross_entropy`, and the question of $\log 0$ does not arise.
#
# ## Cross-entropy is maximum likelihood
#
# You see $n$ days $x_1, \dots, x_n$. A model gives day $i$ the probability $q_{x_i}$. The likelihood of the model is the product
# of these probabilities. Take the negative logarithm, and divide by $n$:
#
# $$-\frac1n \log \prod_{i=1}^n q_{x_i} = \frac1n \sum_{i=1}^n -\log q_{x_i} = -\sum_k \hat p_k \log q_k = H(\hat P, Q).$$
#
# $\hat p_k$ is the observed frequency of weather $k$. So the mean loss over the data is a cross-entropy, and the model of maximum
# likelihood is the model of minimum cross-entropy. As shown above, it is $Q = \hat P$.

# %%
sky = jax.random.categorical(jax.random.key(0), jnp.log(p), shape=(1000,))
observed = jnp.bincount(sky, length=3) / 1000
logits = jnp.broadcast_to(jnp.log(q), (1000, 3))
mean_loss = xentjax.weighted_mean(xentjax.softmax_cross_entropy(logits, sky))
print(f"mean loss of Q over 1000 days {mean_loss:.5f} = H(observed, Q) = {information.cross_entropy(observed, q):.5f} nats")
assert abs(mean_loss + np.mean(np.log(Q)[np.asarray(sky)])) < 1e-5

# %% [markdown]
# Now train a forecast on the 1000 days. Its only parameters are three logits.


# %%
def step(carry, _):
    z, state = carry
    loss, gradient = jax.value_and_grad(lambda z: xentjax.softmax_cross_entropy(jnp.broadcast_to(z, (1000, 3)), sky).mean())(z)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(z, updates), state), loss


optimizer = optax.sgd(1.0)
(z, _), losses = jax.lax.scan(step, (jnp.zeros(3), optimizer.init(jnp.zeros(3))), length=200)
with np.printoptions(precision=4, suppress=True):
    print("trained forecast  ", np.asarray(jax.nn.softmax(z)), f"loss {losses[-1]:.5f} nats")
    print("observed frequency", np.asarray(observed), f"entropy {information.entropy(observed):.5f} nats")
assert np.max(np.abs(jax.nn.softmax(z) - observed)) < 1e-4 and abs(losses[-1] - information.entropy(observed)) < 1e-5

# %% [markdown]
# Training found the observed frequencies. The last loss is the entropy of these frequencies. The picture compares the likelihood and
# the cross-entropy for 10 days, of which 3 are rainy. The likelihood $q^3 (1 - q)^7$ is largest where the cross-entropy is smallest,
# at $q = 0.3$.

# %%
rain = jnp.linspace(0.01, 0.99, 197)
likelihood = rain**3 * (1 - rain) ** 7
loss = information.cross_entropy(jnp.broadcast_to(jnp.array([0.3, 0.7]), (197, 2)), jnp.stack([rain, 1 - rain], axis=-1))
np.testing.assert_allclose(loss, -np.log(np.asarray(likelihood, np.float64)) / 10, rtol=1e-5)
assert abs(rain[jnp.argmax(likelihood)] - 0.3) < 1e-6 and jnp.argmax(likelihood) == jnp.argmin(loss)

fig, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.9))
left.plot(rain, 1000 * likelihood, color=BLUE)
left.set(ylabel="likelihood × 1000", title="Likelihood: take the maximum")
right.plot(rain, loss, color=ORANGE)
right.set(ylabel="mean loss (nats per day)", ylim=(0.4, 2), title="Cross-entropy: take the minimum")
for ax in (left, right):
    ax.axvline(0.3, color="black", linestyle=":", linewidth=1.5)
    ax.set_xlabel("forecast q of rain")
plt.show()

# %% [markdown]
# ## The gradient: two classes
#
# Let $p$ be the predicted probability of "yes" and $y$ the label, 1 or 0. From here on, $p$ is the prediction, as in most papers.
# The loss is $\ell = -y \log p - (1 - y) \log(1 - p)$. Its derivative with respect to the probability is
#
# $$\frac{\partial \ell}{\partial p} = -\frac{y}{p} + \frac{1 - y}{1 - p} = \frac{p - y}{p(1 - p)} .$$
#
# A network computes a logit $z$, and $p = \sigma(z) = 1/(1 + e^{-z})$ has the derivative $\partial p/\partial z = p(1 - p)$. By the
# chain rule, the denominator cancels:
#
# $$\frac{\partial \ell}{\partial z} = \frac{p - y}{p(1 - p)} \cdot p(1 - p) = p - y .$$
#
# In the next two plots, the dots are computed by `jax.grad`, and the lines are the formulas.


# %%
def loss_of_probability(p, y):
    return information.cross_entropy(jnp.stack([y, 1 - y]), jnp.stack([p, 1 - p]))


# %%
probability = jnp.linspace(0.04, 0.96, 24)
z = jnp.linspace(-6, 6, 25)
exact_p = np.linspace(0.03, 0.97, 200)
exact_z = np.linspace(-6, 6, 200)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for y, color, style in ((1.0, BLUE, "-"), (0.3, GREEN, "--"), (0.0, ORANGE, "-.")):
    label = jnp.full_like(probability, y), jnp.full_like(z, y)
    in_p = jax.vmap(jax.grad(loss_of_probability))(probability, label[0])
    in_z = jax.vmap(jax.grad(xentjax.sigmoid_cross_entropy))(z, label[1])
    left.plot(exact_p, (exact_p - y) / (exact_p * (1 - exact_p)), style, color=color, label=f"y = {y:g}")
    right.plot(exact_z, 1 / (1 + np.exp(-exact_z)) - y, style, color=color, label=f"y = {y:g}")
    left.plot(probability, in_p, "o", color=color, markersize=5)
    right.plot(z, in_z, "o", color=color, markersize=5)
    p64, z64 = np.asarray(probability, np.float64), np.asarray(z, np.float64)
    assert np.max(np.abs(in_p - (p64 - y) / (p64 * (1 - p64))) * p64 * (1 - p64)) < 4 * EPS
    assert np.max(np.abs(in_z - (1 / (1 + np.exp(-z64)) - y))) < 2 * EPS
left.set(xlabel="predicted probability p", ylabel="∂loss/∂p", ylim=(-16, 16), title="For a probability: (p − y)/(p(1 − p))")
right.set(xlabel="logit z", ylabel="∂loss/∂z", title="For a logit: p − y")
for ax in (left, right):
    ax.axhline(0, color="black", linewidth=1)
    ax.legend()
plt.show()

# %% [markdown]
# The left gradient has no bound. The right one stays between −1 and 1. The label $y = 0.3$ is a soft label. Its gradient is 0 at
# $p = 0.3$, where the loss is the entropy.
#
# **Often wrong:** code that computes the two factors one after the other. On paper they cancel. In float32, $\sigma(20)$ rounds to 1.
# The second factor is then 0. The first factor is $0/0$ for $y = 1$, and $\infty$ for $y = 0$.

# %%
z = jnp.array(20.0)
for y in (1.0, 0.0):
    p = jax.nn.sigmoid(z)
    product = (p - y) / (p * (1 - p)) * (p * (1 - p))
    gradient = jax.grad(xentjax.sigmoid_cross_entropy)(z, jnp.array(y))
    exact = -1 / (1 + math.exp(20)) if y == 1 else 1 / (1 + math.exp(-20))
    print(f"z = 20, y = {y:.0f}: two factors {product:.5g}, gradient from the logit {gradient:.5g}, exact {exact:.5g}")
    assert math.isnan(product) and math.isclose(gradient, exact, rel_tol=32 * EPS)

# %% [markdown]
# ## The gradient and the Hessian: K classes
#
# Let $t$ be the label as a distribution, one-hot or soft, and $p = \mathrm{softmax}(z)$. The loss is
# $\ell = \log \sum_k e^{z_k} - \sum_k t_k z_k$, because $\log p_k = z_k - \log \sum_j e^{z_j}$ and $\sum_k t_k = 1$. Differentiate
# once, and then once more:
#
# $$\frac{\partial \ell}{\partial z_k} = \frac{e^{z_k}}{\sum_j e^{z_j}} - t_k = p_k - t_k, \qquad
# \frac{\partial^2 \ell}{\partial z_j \, \partial z_k} = \frac{\partial p_k}{\partial z_j} = p_k ([j = k] - p_j),
# \qquad \nabla^2 \ell = \mathrm{diag}(p) - p p^\top .$$
#
# Here, $[j = k]$ is 1 if $j = k$, and 0 otherwise.

# %%
z, label = jnp.log(q), jnp.array(0)  # the forecast Q = (0.4, 0.4, 0.2), and the day is sunny
gradient = jax.grad(xentjax.softmax_cross_entropy)(z, label)
hessian = jax.hessian(xentjax.softmax_cross_entropy)(z, label)
with np.printoptions(precision=4, suppress=True):
    print("gradient p − t:   ", np.asarray(gradient))
    print("Hessian diag(p) − p pᵀ:", np.asarray(hessian), sep="\n")
    print("its eigenvalues:  ", np.abs(np.linalg.eigvalsh(np.asarray(hessian, np.float64))))
assert np.max(np.abs(gradient - (Q - [1, 0, 0]))) < 4 * EPS
assert np.max(np.abs(hessian - (np.diag(Q) - np.outer(Q, Q)))) < 4 * EPS

# %% [markdown]
# `jax.vmap` checks the formula at 500 random points with 10 classes.

# %%
z = 3 * jax.random.normal(jax.random.key(1), (500, 10))
hessians = jax.vmap(jax.hessian(xentjax.softmax_cross_entropy))(z, jnp.arange(500) % 10)
e = np.exp(np.asarray(z, np.float64))
p64 = e / e.sum(axis=1, keepdims=True)
closed_form = p64[:, :, None] * np.eye(10) - p64[:, :, None] * p64[:, None, :]
difference = np.max(np.abs(hessians - closed_form)) / EPS
print(f"500 Hessians of 10 × 10: largest difference from the formula {difference:.1f} eps")
eigenvalues = np.linalg.eigvalsh(closed_form)
print(f"eigenvalues of all of them: smallest {abs(eigenvalues.min()):.1f}, largest {eigenvalues.max():.3f}")
assert difference < 8 and eigenvalues.min() > -1e-15 and eigenvalues.max() <= 0.5

# %% [markdown]
# No eigenvalue is negative, so the loss is convex in the logits, and gradient descent on the logits cannot get stuck in a bad minimum.
# One eigenvalue is always 0, because the same number added to all logits does not change the probabilities. No eigenvalue exceeds ½,
# so a step with a learning rate below 4 never raises the loss. The label does not occur in the Hessian. All this holds for the logits.
# The loss of a network is not convex in its weights.
#
# **Often wrong:** code that builds the Jacobian matrix of softmax, and multiplies it by $-t/p$. It gives NaN where $p = 0$. The product is
# $p - t$, which needs no matrix and no division.
#
# ## The gradient field
#
# The soft label is now the true weather $P$, and every point of the triangle is a prediction. On the left is the negative gradient,
# $t - p$. Each arrow points straight from the prediction to the label, and its length is proportional to the error. On the right,
# gradient descent runs on the logits from 24 starts near the edge. Consecutive dots are 8 steps apart.


# %%
def loss_at(z):
    return xentjax.softmax_cross_entropy(z, jnp.array(P))


optimizer = optax.sgd(0.25)


@jax.vmap
def path(z):
    def step(carry, _):
        z, state = carry
        updates, state = optimizer.update(jax.grad(loss_at)(z), state)
        return (optax.apply_updates(z, updates), state), z

    return jax.nn.softmax(jax.lax.scan(step, (z, optimizer.init(z)), length=800)[1])


edge = np.array([((8 - i) / 8, i / 8, 0) for i in range(8)])
starts = 0.91 * np.concatenate([np.roll(edge, k, axis=1) for k in range(3)]) + 0.03
paths = np.asarray(path(jnp.log(jnp.array(starts))))
lattice = (np.array([(i, j, 10 - i - j) for i in range(11) for j in range(11 - i)]) + 0.4) / 11.2
arrows = -jax.vmap(jax.grad(loss_at))(jnp.log(jnp.array(lattice)))
assert np.max(np.abs(arrows - (P - lattice))) < 8 * EPS and np.max(np.abs(paths[:, -1] - P)) < 1e-5

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.7))
for ax, title in ((left, "Negative gradient t − p"), (right, "Gradient descent on the logits")):
    draw_triangle(fig, ax, jnp.array(P))
    ax.set_title(title)
left.quiver(*(lattice @ CORNERS).T, *(arrows @ CORNERS).T, angles="xy", scale_units="xy", scale=6, color="black", width=0.005)
for points in paths @ CORNERS:
    right.plot(*points.T, ".-", markevery=8, color=ORANGE, linewidth=1, markersize=4)
for ax in (left, right):
    ax.plot(*(P @ CORNERS), "*", color="white", markeredgecolor="black", markersize=15, zorder=3)
plt.show()
ends = jax.vmap(loss_at)(jnp.log(paths[:, -1]))
print(f"loss at the ends of the 24 paths: {ends.min():.4f} to {ends.max():.4f} nats, H(P) = {H:.4f} nats")
assert np.max(np.abs(ends - H)) < 1e-5

# %% [markdown]
# All paths end at the star, with the loss $H(P)$. The paths are not straight, although the arrows are. The arrows show how the *logits*
# move. The probabilities move by the Hessian times the arrow, $(\mathrm{diag}(p) - p p^\top)(t - p)$, to first order.
#
# ## What to remember
#
# - Cross-entropy is the mean surprise of a forecast: $H(P, Q) = H(P) + D(P \,\|\, Q)$.
# - Its minimum is $H(P)$, at $Q = P$. It is 0 only if the truth is certain.
# - Minimum cross-entropy is maximum likelihood. A code made for $Q$ is longer than a code made for $P$, by $D(P \,\|\, Q)$ per symbol.
# - For logits, the gradient is $p - t$ and the Hessian is $\mathrm{diag}(p) - p p^\top$.
# - No $\varepsilon$ is needed. Pass logits to the loss, not probabilities.
#
# Where to go next: the
# [quickstart](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb) trains a classifier.
# [Choosing a loss](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md) lists all functions.
# [Conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md) has the rules for labels, masks and numbers. The
# [README](https://github.com/xentjax/xentjax) has the measurements. `help(information.cross_entropy)` has the formulas.
