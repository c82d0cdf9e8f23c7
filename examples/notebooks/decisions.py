# %% [markdown]
# # Decisions: cross-entropy in reinforcement learning
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/xentjax/xentjax/blob/main/examples/notebooks/decisions.ipynb)
#
# An agent crosses a slippery grid to reach a goal. Three methods train the agent, and all three minimize cross-entropy:
# $\sum_i w_i \, (-\log \pi(a_i \mid s_i))$. They differ only in the actions $a_i$ and in the weights $w_i$.
#
# | method | actions $a_i$ | weights $w_i$ |
# |---|---|---|
# | behaviour cloning | the actions of an expert | 1 |
# | policy gradient | the agent's own actions | how much better the action was than expected, positive or negative |
# | cross-entropy method, in its usual form | the agent's own actions | 1 for the best attempts, 0 for the others |
#
# The grid is small, so exact values can be computed. Each method is compared with the best possible return.

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
from scipy.special import softmax

import xentjax

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2})
jax.config.update("jax_default_matmul_precision", "highest")  # full float32 products on GPU and TPU too
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"  # safe for colour-blind readers

# %% [markdown]
# ## A slippery grid
#
# The agent starts at S. Entering the goal G gives a reward of 1. Entering a pit P gives −1. Both end the episode. All other rewards
# are 0. Cells marked # are walls; they are grey in the pictures.
#
# The agent chooses up, right, down or left. It moves as intended with probability 0.8. It slips to the left of the intended direction
# with probability 0.1, and to the right with probability 0.1. A move into a wall or over the edge leaves it where it is.
#
# The return of an episode is $\sum_t \gamma^t r_t$ with the discount $\gamma = 0.95$. So a short way to the goal is worth more than a long
# way. But the shortest way here passes the pits.

# %%
KIND = np.array([list(row) for row in ("........", ".##.###.", "........", "S#.PP..G")])
SHAPE, KIND = KIND.shape, KIND.ravel()
STATES, START = KIND.size, int(np.argmax(KIND == "S"))
OVER = np.isin(KIND, ["P", "G"])
OPEN = ~OVER & (KIND != "#")  # the 23 cells in which the agent decides
REWARD = np.select([KIND == "G", KIND == "P"], [1.0, -1.0])  # for entering a cell
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left
TURNS, CHANCES = np.array([0, 1, 3]), np.array([0.8, 0.1, 0.1])  # as intended, or a quarter turn to either side
GAMMA, STEPS = 0.95, 100

place = np.stack(np.divmod(np.arange(STATES), SHAPE[1]), axis=-1)  # row and column of each cell
row, column = np.moveaxis(np.clip(place[:, None] + MOVES, 0, np.array(SHAPE) - 1), -1, 0)
NEXT = row * SHAPE[1] + column  # NEXT[s, d] is the cell that is reached from s in direction d
NEXT = np.where(KIND[NEXT] == "#", np.arange(STATES)[:, None], NEXT)

# %% [markdown]
# The transition probabilities $P(s' \mid s, a)$ follow from the table `NEXT`. They make exact answers possible, in float64 and without
# sampling. Let $P_\pi$ and $r_\pi$ be the transition matrix and the expected rewards under the policy $\pi$. Then
#
# $$v = (I - \gamma P_\pi)^{-1} r_\pi, \qquad d = (I - \gamma P_\pi^\top)^{-1} e_{\text{start}}, \qquad J(\pi) = v(\text{start}).$$
#
# Here $v(s)$ is the expected return from $s$, and $d(s)$ is the expected discounted number of visits to $s$. $J$ is the number that
# every method below tries to raise.

# %%
P = sum(chance * np.eye(STATES)[NEXT[:, (np.arange(4) + turn) % 4]] for turn, chance in zip(TURNS, CHANCES, strict=True))
P[OVER] = 0  # [state, action, next state]
R = P @ REWARD  # the expected reward of each action


def evaluate(policy):
    """v(s) and d(s) of policies [..., states, 4], each of shape [..., states]."""
    system = np.eye(STATES) - GAMMA * np.einsum("...sa,sat->...st", policy, P)
    value = np.linalg.solve(system, (policy * R).sum(-1, keepdims=True))
    visits = np.linalg.solve(system.mT, np.eye(STATES)[:, START, None])
    return value[..., 0], visits[..., 0]


def policy_of(logits):
    return softmax(np.asarray(logits, np.float64), axis=-1)


def exact_return(logits):
    return evaluate(policy_of(logits))[0][..., START]


# %% [markdown]
# The agent itself does not know $P$. It only acts and sees what happens. A policy is a table of logits, four for each cell. One episode
# is a `lax.scan` over time. A batch of episodes is a `vmap` over random keys. An episode is cut after 100 steps. Later rewards would be
# multiplied by at most $\gamma^{100} = 0.006$.


# %%
def episode(key, logits):
    """States, actions, discounted returns from each step on, and whether the episode still ran. Each of shape [STEPS]."""
    slip_key, action_key = jax.random.split(key)
    turns = jax.random.choice(slip_key, jnp.array(TURNS), (STEPS,), p=jnp.array(CHANCES))

    def step(state, now):
        turn, key = now
        action = jax.random.categorical(key, logits[state])
        after = jnp.array(NEXT)[state, (action + turn) % 4]
        running = ~jnp.array(OVER)[state]
        reward = jnp.where(running, jnp.array(REWARD, jnp.float32)[after], 0)
        return jnp.where(running, after, state), (state, action, reward, running)

    _, (state, action, reward, running) = jax.lax.scan(step, START, (turns, jax.random.split(action_key, STEPS)))
    _, to_go = jax.lax.scan(lambda later, now: (now + GAMMA * later,) * 2, 0.0, reward, reverse=True)
    return state, action, to_go, running


def episodes(key, logits, n):
    return jax.vmap(episode, (0, None))(jax.random.split(key, n), logits)


# %% [markdown]
# The simulator and the matrix must describe the same world. As a check, a policy that chooses at random plays 20,000 episodes.

# %%
uniform = jnp.zeros((STATES, 4))
_, _, to_go, _ = jax.jit(episodes, static_argnums=2)(jax.random.key(0), uniform, 20_000)
played, error = float(to_go[:, 0].mean()), float(to_go[:, 0].std()) / np.sqrt(20_000)
exact = exact_return(uniform)
print(f"return of the uniform policy: played {played:.4f} ± {error:.4f}, exact {exact:.4f}")
at_goal, in_pit = (100 * float(jnp.mean(ends)) for ends in (to_go[:, 0] > 0, to_go[:, 0] < 0))
print(f"it reaches the goal in {at_goal:.0f} % of its episodes and falls into a pit in {in_pit:.0f} %")
assert abs(played - exact) < 5 * error

# %% [markdown]
# ## The optimal policy
#
# Value iteration finds the best policy. It repeats the update
#
# $$q(s, a) = r(s, a) + \gamma \sum_{s'} P(s' \mid s, a)\, v(s'), \qquad v(s) \leftarrow \max_a q(s, a).$$
#
# Each update multiplies the largest error by $\gamma$ or less, so the loop converges. The optimal action in $s$ is the one with the
# largest $q(s, a)$.

# %%
value, changes = np.zeros(STATES), [1.0]
while changes[-1] > 1e-12:
    q = R + GAMMA * P @ value
    changes.append(np.abs(q.max(-1) - value).max())
    value = q.max(-1)
best_action = q.argmax(-1)
optimal = np.eye(4)[best_action]
BEST = evaluate(optimal)[0][START]
print(f"{len(changes) - 1} updates; the best possible return is {BEST:.4f}, a random policy has {exact:.4f}")
assert abs(BEST - value[START]) < 1e-10
assert np.all(np.array(changes[2:]) <= GAMMA * np.array(changes[1:-1]) + 1e-15)


# %%
def draw(ax, policy, color, title, **scale):
    """The grid. Arrows are as long as the probabilities of the actions."""
    ax.imshow(np.where(OPEN, color, np.nan).reshape(SHAPE), cmap="Blues", **scale)
    y, x = place[OPEN].T
    for action, (down, right) in enumerate(MOVES):
        length = 0.42 * policy[OPEN, action]
        ax.quiver(x, y, right * length, down * length, angles="xy", scale_units="xy", scale=1, width=0.007, minlength=0.6)
    fills = {"#": ("0.35", ""), "P": (RED, "pit\n−1"), "G": (GREEN, "goal\n+1")}
    for s in np.flatnonzero(~OPEN):
        (row, column), (fill, word) = place[s], fills[KIND[s]]
        ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color=fill, linewidth=0))
        ax.text(column, row, word, ha="center", va="center", color="white", fontsize=10, weight="bold")
    ax.text(place[START][1] - 0.44, place[START][0] + 0.42, "S", fontsize=10, weight="bold")
    ax.set(xticks=np.arange(-0.5, SHAPE[1]), yticks=np.arange(-0.5, SHAPE[0]), title=title)
    ax.grid(color="white", alpha=1, linewidth=1)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)


fig, ax = plt.subplots(figsize=(7.5, 3.8))
draw(ax, optimal, value, "The optimal policy", vmin=0, vmax=1.6)
for s in np.flatnonzero(OPEN):
    ax.text(place[s][1] + 0.46, place[s][0] + 0.42, f"{value[s]:.2f}", ha="right", fontsize=8)
ax.set_xlabel("number in a cell: expected return from there")
plt.show()

# %% [markdown]
# The optimal policy takes the long way along the top row. Next to the pits, one slip costs more than the detour. Look at the cell to the
# left of the pits. There, the agent chooses to move into the wall again and again, until a slip moves it up one cell. That way it cannot
# fall into a pit.

# %% [markdown]
# ## Behaviour cloning: labels from an expert
#
# Tutorials often say that reinforcement learning minimizes the cross-entropy between $\pi(a \mid s)$ and the optimal action. That needs
# someone who knows the optimal action. This method is called imitation or behaviour cloning. It is ordinary classification:
#
# $$\mathcal{L} = \frac{1}{n} \sum_{i=1}^{n} -\log \pi(a^*_i \mid s_i),$$
#
# where the $s_i$ are the cells that the expert visits. An expert that visits a cell five times gives five equal examples. One example
# with weight 5 has the same effect on the loss.


# %%
def clone(key, visits):
    def loss(logits):
        return xentjax.weighted_mean(xentjax.softmax_cross_entropy(logits, jnp.array(best_action)), weights=visits)

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    optimizer = optax.adam(0.1)
    logits = 0.01 * jax.random.normal(key, (STATES, 4))
    return jax.lax.scan(step, (logits, optimizer.init(logits)), length=300)[0][0]


def visits_of(key):  # [128 demonstrations, states]
    state, _, _, running = episodes(key, jnp.log(jnp.array(optimal)), 128)
    return jax.vmap(lambda s, w: jnp.zeros(STATES).at[s].add(w))(state, running)


keys = jax.random.split(jax.random.key(1), 16)  # 16 experts
numbers = np.array([1, 2, 4, 8, 16, 32, 64, 128])
visits = jnp.cumsum(jax.jit(jax.vmap(visits_of))(keys), axis=1)[:, numbers - 1]
clones = jax.jit(jax.vmap(jax.vmap(clone, (None, 0))))(keys, visits)  # [experts, numbers, states, 4]

# %% [markdown]
# Two measures of a clone are its accuracy and its return. Accuracy is the share of the 23 cells in which the most probable action is
# optimal. Accuracy treats all cells alike. The return does not. To see this, take the optimal policy. Choose a single cell and
# replace the optimal action in this cell with the worst one. Every such policy has the same accuracy, 22/23.

# %%
accuracy = np.asarray(xentjax.metrics.accuracy(clones, jnp.broadcast_to(best_action, clones.shape[:-1])))[..., OPEN].mean(-1)
clone_return = exact_return(clones)

one_mistake = np.full(STATES, np.nan)
for s in np.flatnonzero(OPEN):
    policy = optimal.copy()
    policy[s] = np.eye(4)[q[s].argmin()]
    one_mistake[s] = evaluate(policy)[0][START]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.9), width_ratios=(1, 1.35))
for values, color, name in ((clone_return / BEST, BLUE, "return / best return"), (accuracy, ORANGE, "accuracy over cells")):
    left.semilogx(numbers, 100 * values.mean(0), marker="o", markersize=5, color=color, label=name, base=2)
    left.fill_between(numbers, 100 * values.min(0), 100 * values.max(0), color=color, alpha=0.15, linewidth=0)
left.set(xlabel="expert episodes", ylabel="clone (%)", title="Mean and range of 16 experts", xticks=numbers, xticklabels=numbers)
left.legend(loc="lower right")
draw(right, optimal, one_mistake, "Return after the worst action in one cell", vmin=0, vmax=0.9)
for s in np.flatnonzero(OPEN):
    right.text(place[s][1] + 0.46, place[s][0] + 0.42, f"{one_mistake[s]:.2f}", ha="right", fontsize=8)
right.set_xlabel(f"without a mistake: {BEST:.2f}")
plt.show()
for i in (0, 3, -1):
    shares = 100 * clone_return[:, i].mean() / BEST, 100 * accuracy[:, i].mean()
    print(f"{numbers[i]:3} expert episodes: return {shares[0]:.1f} % of the best, accuracy {shares[1]:.0f} %")
print(f"one mistake, accuracy always 22/23: return between {np.nanmin(one_mistake):.2f} and {np.nanmax(one_mistake):.4f}")
assert clone_return[:, -1].min() > 0.95 * BEST
assert np.nanmin(one_mistake) < 0.02 * BEST and np.nanmax(one_mistake) > 0.98 * BEST

# %% [markdown]
# A few expert episodes give a good return, although the clone guesses in cells that the expert seldom visits. The number in each
# cell on the right is the return of the policy that makes its only mistake in that cell. All these policies have the same accuracy. One
# mistake costs everything or almost nothing, depending on the cell.

# %% [markdown]
# ## The policy gradient is the gradient of a weighted cross-entropy
#
# Without an expert, the agent must learn from its own actions and from the returns that follow them. The policy gradient theorem gives the
# exact gradient of the expected return with respect to the logits $z$:
#
# $$\frac{\partial J}{\partial z_{s,a}} = d(s)\, \pi(a \mid s)\, \bigl(q(s, a) - v(s)\bigr).$$
#
# The difference $A(s, a) = q(s, a) - v(s)$ is the advantage of action $a$. Now take the cross-entropy of every action in every cell, and
# weight it with the constants $w(s, a) = d(s)\,\pi(a \mid s)\,A(s, a)$:
#
# $$\mathcal{L}(z) = \sum_{s, a} w(s, a)\, (-\log \pi_z(a \mid s)), \qquad -\nabla_z \mathcal{L} = \nabla_z J.$$
#
# Some weights are negative: an action that is worse than expected must become less likely. `weighted_mean` needs weights ≥ 0, because it
# divides by their sum. So multiply each loss by its weight yourself, and take a plain sum or mean. (`weighted_sum(loss, weights).total` is
# such a sum.)
#
# The next cell compares three gradients: finite differences of $J$, the formula of the theorem, and `jax.grad` of the weighted
# cross-entropy.

# %%
logits = 0.5 * jax.random.normal(jax.random.key(2), (STATES, 4))
pi = policy_of(logits)
v, d = evaluate(pi)
advantage = R + GAMMA * P @ v - v[:, None]
theorem = d[:, None] * pi * advantage

h, z = 1e-5, np.asarray(logits, np.float64)
bumps = h * np.eye(z.size).reshape(-1, *z.shape)
differences = ((exact_return(z + bumps) - exact_return(z - bumps)) / (2 * h)).reshape(z.shape)


def weighted_cross_entropy(logits):
    every_action = jnp.broadcast_to(jnp.arange(4), (STATES, 4))
    loss = xentjax.softmax_cross_entropy(jnp.broadcast_to(logits[:, None], (STATES, 4, 4)), every_action)
    return jnp.sum(jnp.array(theorem, jnp.float32) * loss)  # the weights are constants


gradient = -jax.grad(weighted_cross_entropy)(logits)
largest = np.abs(theorem).max()
print(f"largest entry of the gradient: {largest:.4f}; {np.sum(theorem[OPEN] < 0)} of {theorem[OPEN].size} weights are negative")
print(f"finite differences against the theorem: {np.abs(differences - theorem).max() / largest:.1e} of it")
print(f"jax.grad of weighted cross-entropy against the theorem: {np.abs(gradient - theorem).max() / largest:.1e} of it")
assert np.abs(differences - theorem).max() < 1e-7 * largest and np.abs(gradient - theorem).max() < 1e-5 * largest

# %% [markdown]
# ## REINFORCE: the same loss from samples
#
# The agent knows neither $d$ nor $q$. But its own episodes contain samples: visited cells for $d$, and returns for $q$. REINFORCE
# replaces the sum over all cells and actions by a mean over $n$ episodes. It replaces $q(s_t, a_t)$ by the return from step $t$ on,
# $G_t = r_t + \gamma r_{t+1} + \gamma^2 r_{t+2} + \dots$:
#
# $$\mathcal{L} = \frac{1}{n} \sum_{\text{episodes}} \sum_t \gamma^t \, \bigl(G_t - b(s_t)\bigr) \, (-\log \pi(a_t \mid s_t)).$$
#
# Any baseline $b(s)$ leaves the expected gradient unchanged. The choice $b \approx v$ reduces the variance of the estimate. The factor
# $\gamma^t$ comes from the discounted visits $d(s)$. Many programs omit it (Nota and Thomas, 2020,
# [arXiv 1906.07073](https://arxiv.org/abs/1906.07073)).
#
# The plot shows the angle between the estimate and the exact gradient of the same policy as above.


# %%
def gradients(key):
    state, action, to_go, running = episodes(key, logits, 256)
    discount, baseline = GAMMA ** jnp.arange(STEPS), jnp.array(v, jnp.float32)[state]

    def loss(logits, weights):
        return jnp.sum(weights * xentjax.softmax_cross_entropy(logits[state], action, where=running)) / 256

    weights = jnp.stack([discount * to_go, discount * (to_go - baseline), to_go - baseline])
    return -jax.vmap(jax.grad(loss), (None, 0))(logits, weights)


batches = np.asarray(jax.jit(lambda keys: jax.lax.map(gradients, keys))(jax.random.split(jax.random.key(3), 128)), np.float64)
n = np.arange(1, 129)
estimate = np.cumsum(batches, axis=0).reshape(128, 3, -1) / n[:, None, None]
cosine = estimate @ theorem.ravel() / np.linalg.norm(estimate, axis=-1) / np.linalg.norm(theorem)
angle = np.degrees(np.arccos(cosine))

# %%
names = ("no baseline", "baseline v(s)", "baseline v(s), without γᵗ")
fig, ax = plt.subplots(figsize=(6.5, 3.8))
for values, color, name in zip(angle.T, (ORANGE, BLUE, RED), names, strict=True):
    ax.loglog(256 * n, values, color=color, label=f"{name}: {values[-1]:.1f}° at the end")
ax.set(xlabel="episodes", ylabel="angle to the exact gradient (degrees)", ylim=(0.5, 90), title="Estimates of the policy gradient")
ax.set_yticks([1, 3, 10, 30, 90], labels=["1°", "3°", "10°", "30°", "90°"])
ax.legend(loc="lower left", fontsize=9)
plt.show()
print("angle at the end:", ", ".join(f"{name} {values:.1f}°" for name, values in zip(names, angle[-1], strict=True)))
spread = np.linalg.norm(batches.std(0).reshape(3, -1), axis=-1)
print(f"the baseline divides the standard deviation of the estimate by {spread[0] / spread[1]:.1f}")
assert angle[-1, 0] < 6 and angle[-1, 1] < 4 and angle[-1, 2] > 15 and spread[1] < 0.8 * spread[0]

# %% [markdown]
# With $\gamma^t$, the estimates approach the exact gradient. Without it, the estimate converges to a different direction. More episodes
# do not help. A program without $\gamma^t$ may still learn well, but it does not follow the gradient of $J$.

# %% [markdown]
# ## Training, and what an entropy bonus does
#
# The baseline is learned too. It is a table that is fitted to the returns with `gaussian_nll`. At variance 1, this is half the squared
# error plus a constant.
#
# Often the loss has one more term, $-\beta H(\pi(\cdot \mid s))$. This term is a bonus for entropy. It keeps the policy from becoming
# certain too early. One call of `row_statistics` returns both $\log \pi(a \mid s)$ and $H$. (`confidence_penalized_cross_entropy`
# includes this bonus in the loss of each example. Do not use it here: the advantage would multiply the bonus too.)


# %%
def reinforce_loss(params, beta, state, action, to_go, running):
    logits, baseline = params
    stats = xentjax.row_statistics(logits[state], action, where=running)
    advantage = jax.lax.stop_gradient(to_go - baseline[state])
    policy_loss = -jnp.sum(GAMMA ** jnp.arange(STEPS) * advantage * stats.log_prob, axis=1).mean()
    bonus = jnp.sum(GAMMA ** jnp.arange(STEPS) * stats.entropy, axis=1).mean()
    baseline_loss = xentjax.gaussian_nll(baseline[state], to_go, variance=1.0, where=running).sum(1).mean()
    return policy_loss - beta * bonus + baseline_loss, policy_loss


def reinforce(key, betas):
    def update(carry, now):
        params, state = carry
        key, beta = now
        batch = episodes(key, params[0], 64)
        gradient, loss = jax.grad(reinforce_loss, has_aux=True)(params, beta, *batch)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), (params[0], loss)

    optimizer, params = optax.adam(0.05), (uniform, jnp.zeros(STATES))
    return jax.lax.scan(update, (params, optimizer.init(params)), (jax.random.split(key, betas.size), betas))[1]


# %%
betas = jnp.stack([jnp.full(300, 0.0), jnp.full(300, 0.01), jnp.full(300, 0.03), 0.03 * jnp.linspace(1, 0, 300)])
keys = jax.random.split(jax.random.key(4), 3)
history, losses = jax.jit(jax.vmap(jax.vmap(reinforce, (0, None)), (None, 0)))(keys, betas)  # [betas, seeds, updates, ...]

# %%
shown = np.arange(0, 300, 6)
curves = exact_return(history[:, :, shown])
names = ("no bonus", "β = 0.01", "β = 0.03", "β from 0.03 to 0")

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
left.axhline(BEST, color="black", linestyle="--", linewidth=1.5, label="best possible")
for runs, color, name in zip(curves, (ORANGE, BLUE, RED, GREEN), names, strict=True):
    left.plot(shown, runs.mean(0), color=color, label=name)
    left.fill_between(shown, runs.min(0), runs.max(0), color=color, alpha=0.2, linewidth=0)
left.set(xlabel="update", ylabel="expected return", title="Mean and range of 3 runs")
left.legend(loc="lower right", fontsize=9)
right.plot(losses[0, 0], color=ORANGE, linewidth=1, label="policy loss, no bonus, first run")
right.axhline(0, color="black", linewidth=1)
right.set(xlabel="update", ylabel="weighted cross-entropy", title="The value of the loss shows no progress")
right.legend(loc="lower right", fontsize=9)
plt.show()
for name, runs in zip(names, curves[:, :, -1], strict=True):
    print(f"{name:18} return {runs.mean():.3f}, {100 * runs.mean() / BEST:.0f} % of the best")
assert curves[0, :, -1].min() > 0.95 * BEST and curves[3, :, -1].min() > 0.9 * BEST
assert curves[2, :, -1].max() < 0.8 * BEST
assert losses[0, 0, 0] < -2 and abs(losses[0, 0, -50:].mean()) < 0.2

# %% [markdown]
# On the left, a constant bonus lowers the return. It rewards the agent for random moves. So the policy that is best with the bonus is not
# the policy with the best return. If the bonus decays to 0, the agent regains most of the lost return. This grid is easy to explore and
# needs no bonus.
#
# On the right, the loss starts near −4 and ends near 0: it rises while the return rises. The gradient of this loss is meaningful, but the
# value of the loss does not measure progress. Watch the return instead.

# %% [markdown]
# ## The cross-entropy method: imitate the best attempts
#
# The cross-entropy method (CEM) needs no gradient of the return. It repeats three steps: draw attempts from a distribution, keep the best
# tenth (the elite), and fit the distribution to the elite. The fit is maximum likelihood, which is the same as minimizing cross-entropy:
#
# $$\min_\pi \; \frac{1}{n} \sum_{i \in \text{elite}} -\log \pi(a_i \mid s_i).$$
#
# For a table, the minimum is known: $\pi(a \mid s)$ is the share of action $a$ among the elite's actions in $s$. The code adds 20
# imaginary visits to each cell. The actions of these visits are distributed as in the old policy. So the policy does not change in a cell
# that the elite did not visit.

# %%
POPULATION, ELITE = 3200, 320


def cem_episodes(key):
    def update(policy, key):
        logits = jnp.log(policy)
        state, action, to_go, running = episodes(key, logits, POPULATION)
        elite = jax.lax.top_k(to_go[:, 0], ELITE)[1]
        counts = jnp.zeros((STATES, 4)).at[state[elite], action[elite]].add(running[elite])
        smoothed = counts + 20 * policy
        return smoothed / smoothed.sum(-1, keepdims=True), (logits, counts)

    return jax.lax.scan(update, jnp.full((STATES, 4), 0.25), jax.random.split(key, 30))[1]


episode_logits, counts = jax.jit(cem_episodes)(jax.random.key(5))

seen = counts[0].sum(-1) > 0  # the first elite: is the share of each action really the minimum of cross-entropy?
share = counts[0] / jnp.maximum(counts[0].sum(-1, keepdims=True), 1)
slope = jax.grad(lambda z: xentjax.softmax_cross_entropy(z, share, where=seen).sum())(jnp.log(share + 1e-9))
print(f"largest gradient of cross-entropy at the shares: {jnp.abs(slope).max():.1e}")
assert jnp.abs(slope).max() < 1e-5

# %% [markdown]
# This is the form of CEM in many courses. It has a flaw: in a random world, the best episodes are also the luckiest. So we also use a
# second form of CEM, which draws whole policies. Each logit has a normal distribution with its own mean and standard deviation. A policy
# is scored by its mean return over 16 episodes. Luck averages out. The fit to the elite is again maximum likelihood, so it minimizes the
# mean `gaussian_nll`. The minimum is at the mean and the standard deviation of the elite. The code adds 0.3 to the standard deviation. This
# extra noise keeps the search from narrowing too early.


# %%
def cem_policies(key):
    def update(normal, key):
        mean, deviation = normal
        draw_key, play_key = jax.random.split(key)
        candidates = mean + deviation * jax.random.normal(draw_key, (POPULATION // 16, STATES, 4))
        keys = jax.random.split(play_key, POPULATION // 16)
        scores = jax.vmap(lambda key, z: episodes(key, z, 16)[2][:, 0].mean())(keys, candidates)
        elite = candidates[jax.lax.top_k(scores, ELITE // 16)[1]]
        return (elite.mean(0), elite.std(0) + 0.3), (mean, elite)

    return jax.lax.scan(update, (uniform, jnp.full((STATES, 4), 2.0)), jax.random.split(key, 30))[1]


means, elites = jax.jit(cem_policies)(jax.random.key(6))


def normal_cross_entropy(mean, log_variance):
    mean, log_variance = (jnp.broadcast_to(x, elites[0].shape) for x in (mean, log_variance))
    return xentjax.weighted_mean(xentjax.gaussian_nll(mean, elites[0], log_variance=log_variance))


slope = jax.grad(normal_cross_entropy, (0, 1))(elites[0].mean(0), jnp.log(elites[0].var(0)))
print(f"largest gradient at the mean and variance of the elite: {max(jnp.abs(s).max() for s in slope):.1e}")
assert max(jnp.abs(s).max() for s in slope) < 1e-6

# %%
episode_curve, policy_curve = exact_return(episode_logits), exact_return(means)
learned = {"elite episodes": episode_logits[-1], "elite policies": means[-1]}
play = jax.jit(lambda z: jnp.sort(episodes(jax.random.key(7), z, 10_000)[2][:, 0], descending=True))
played = {name: np.asarray(play(z), np.float64) for name, z in learned.items()}

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
left.axhline(BEST, color="black", linestyle="--", linewidth=1.5, label="best possible")
left.plot(policy_curve, color=GREEN, label="elite policies (mean of 16 episodes)")
left.plot(episode_curve, color=PURPLE, label="elite episodes")
left.set(xlabel="update", ylabel="expected return", title="The cross-entropy method")
left.legend(loc="lower right", fontsize=9)
share = np.linspace(0, 100, 10_000)
for (name, returns), color in zip(played.items(), (PURPLE, GREEN), strict=True):
    right.plot(share, returns, color=color, label=f"{name}: mean {returns.mean():.2f}")
right.axvspan(0, 10, color="0.5", alpha=0.2, linewidth=0)
right.text(12, -0.85, "grey: the best tenth,\nall that the elite sees", fontsize=9)
right.set(
    xlabel="share of episodes (%), best first",
    ylabel="return of the episode",
    ylim=(-0.95, 0.75),
    title="The learned policies, 10,000 episodes each",
)
right.legend(loc=(0.18, 0.4), fontsize=9)
plt.show()
for name, returns in played.items():
    fallen = 100 * np.mean(returns < 0)
    print(f"{name}: mean return {returns.mean():.3f}, best tenth {returns[:1000].mean():.3f}, {fallen:.0f} % of the episodes end in a pit")
assert played["elite episodes"][:1000].mean() > played["elite policies"][:1000].mean() + 0.02
assert policy_curve[-1] > 0.95 * BEST and episode_curve[0] + 0.3 < episode_curve[-1] < 0.8 * BEST

# %% [markdown]
# The policy that is fitted to elite episodes prefers the short way along the pits. An episode that reaches the goal on the short way
# usually has a larger return than one on the long way. Episodes that fall into a pit are not in the elite. The form of CEM that
# selects elite policies finds the safe way.

# %% [markdown]
# ## All policies, before and after
#
# A darker cell is visited more often. The arrows are as long as the probabilities of the actions. In cells that a method hardly visits,
# it has learned little, and its arrows are arbitrary.

# %%
results = {
    "before: random": policy_of(uniform),
    "optimal (value iteration)": optimal,
    "behaviour cloning, 128 episodes": policy_of(clones[0, -1]),
    "policy gradient": policy_of(history[0, 0, -1]),
    "CEM, elite episodes": policy_of(learned["elite episodes"]),
    "CEM, elite policies": policy_of(learned["elite policies"]),
}
final = {name: evaluate(policy)[0][START] for name, policy in results.items()}
fig, axes = plt.subplots(3, 2, figsize=(11.5, 9.6))
for ax, (name, policy) in zip(axes.flat, results.items(), strict=True):
    draw(ax, policy, np.minimum(evaluate(policy)[1], 1.5), f"{name}: return {final[name]:.2f}", vmin=0, vmax=2.5)
plt.show()

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.2))
colors = ("0.6", "0.2", BLUE, ORANGE, PURPLE, GREEN)
bars = ax.barh(list(final), list(final.values()), color=colors)
ax.bar_label(bars, [f"{value:.3f}" for value in final.values()], padding=12, fontsize=10)
ax.axvline(BEST, color="black", linestyle="--", linewidth=1.5)
ax.axvline(0, color="black", linewidth=1)
ax.set(xlabel="expected return (dashed: best possible)", xlim=(-0.27, 0.56))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
plt.show()
for name, value in final.items():
    print(f"{name:32} {value:+.3f}  {100 * value / BEST:4.0f} % of the best")
assert all(final[name] > 0.95 * BEST for name in ("behaviour cloning, 128 episodes", "policy gradient", "CEM, elite policies"))

# %% [markdown]
# ## What to remember
#
# - Cloning, policy gradient and the cross-entropy method minimize the same weighted cross-entropy. They differ in actions and weights.
# - Only cloning uses the optimal action as the label. The accuracy of a clone does not determine its return. The return depends
#   on the cells in which the clone makes mistakes.
# - Weight each cross-entropy by the advantage of the action. The policy gradient is minus the `jax.grad` of this loss. Weights may
#   be negative, so multiply each loss by its weight yourself. The value of this loss does not measure progress.
# - Without the factor $\gamma^t$, the sampled gradient converges to a direction that is not the gradient of the discounted return.
# - An elite of single episodes rewards luck. Score policies by their mean return.
#
# More:
#
# - [Quickstart](https://github.com/xentjax/xentjax/blob/main/examples/notebooks/quickstart.ipynb)
# - [Choosing a loss](https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md)
# - [Policy losses of language models, fused with the linear layer](https://github.com/xentjax/xentjax/blob/main/docs/fused-linear.md)
# - [Conventions](https://github.com/xentjax/xentjax/blob/main/docs/conventions.md)
