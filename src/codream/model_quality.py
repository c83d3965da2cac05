"""How good a world model is, on episodes that it was not trained on.

A world model that is subtly wrong still trains. These are the measures to look at before any policy: one-step and
many-step error against "nothing moves", predicted against real reward, teammate accuracy against the base rate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from codream import markov_quality, matwm, wm_rnd
from codream.agents import Agents
from codream.compiled import quick_jit
from codream.config import ConfigError
from codream.envs import EnvSpec, HostEnv, TimeStep
from codream.envs.answers import check_answer
from codream.foresight import Foresight, foresight
from codream.latents import two_hot_mean
from codream.linear import dense, tree_of
from codream.playing import as_host
from codream.training import common_reward
from codream.world_model import Hidden, Sequence, WorldModel

__all__ = ["ModelQuality", "Recording", "measure", "opening", "record", "sequences_of"]

PIECE = 64  # sequences that are measured at a time, at most


@dataclasses.dataclass(frozen=True)
class ModelQuality:
    """Errors are squared, in the units that the networks see (symlog for vectors), summed over an observation's
    entries and averaged over agents and steps."""

    play: str
    episodes: int
    reconstruction: float
    one_step: float
    """Error of the mean prediction."""
    one_step_sampled: float
    still: float
    """Error of "nothing moves" after one step."""
    by_horizon: tuple[float, ...]
    """Error after 1, 2, … open-loop steps: mean over sampled rollouts, told the real actions of the focal agent (and of
    the others where the model asks for everyone's)."""
    still_by_horizon: tuple[float, ...]
    reward_ratio: float
    """Predicted over real reward, summed over the steps with a large reward (a catch)."""
    reward_ratio_by_side: dict[str, float]
    elsewhere: float
    """Mean difference of predicted and real reward on the other steps."""
    elsewhere_absolute: float
    """Mean absolute difference of predicted and real reward on the other steps."""
    accuracy: float
    """Of the teammate predictor, at one of the others' actions."""
    base_rate: float
    """Accuracy of always naming each agent's most frequent action."""
    foresight: Foresight | None = None
    """The same for every pair of agents; None without a teammate predictor."""

    @property
    def one_step_ratio(self) -> float:
        return self.one_step / self.still

    @property
    def horizon_ratio(self) -> float:
        return self.by_horizon[-1] / self.still_by_horizon[-1]


def opening(context: int, steps: int) -> int:
    """Observations of an episode of so many steps that are seen before it is imagined: those of the context, if that
    leaves two thirds of it."""
    return min(context, max(steps // 3, 2))


Recording = tuple[list[TimeStep], list[Any]]


def record(env: HostEnv, player: Any, episodes: int, seed: int, limit: int | None = None) -> Recording:
    """Play `episodes` episodes at once, one in each copy; where there are fewer copies, round by round. Returns time
    steps and actions until all have ended, or until `limit` steps of each were taken."""
    rng, seeds = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
    rounds = [_round(env, player, rng, seeds, limit) for _ in range(math.ceil(episodes / env.num_envs))]
    if len(rounds) == 1 and env.num_envs == episodes:
        return rounds[0]
    longest = max(len(actions) for _, actions in rounds)
    filled = [_filled(steps, actions, longest) for steps, actions in rounds]
    beside = lambda *x: np.concatenate(x)[:episodes]  # noqa: E731
    steps, actions = (
        [jax.tree.map(beside, *at) for at in zip(*each, strict=True)] for each in zip(*filled, strict=True)
    )
    return steps, actions


def _round(
    env: HostEnv, player: Any, rng: np.random.Generator, seeds: np.random.Generator, limit: int | None
) -> Recording:
    """An episode in every copy."""
    copies = env.num_envs
    here = env.reset(seeds.integers(2**31 - 1, size=copies))
    check_answer(here, env.spec, copies, "reset")
    steps, actions, over = [here], [], np.zeros(copies, bool)
    while not over.all() and (limit is None or len(actions) < limit):
        action = player.act(here, rng)
        here = env.step(action, seeds.integers(2**31 - 1, size=copies))
        if not actions:
            check_answer(here, env.spec, copies, "step")
        over = over | np.asarray(here.last)
        actions.append(action)
        steps.append(here)
    return steps, actions


def _filled(steps: list[TimeStep], actions: list[Any], length: int) -> Recording:
    """A recording, drawn out to `length` steps: another episode begins in every copy, which nobody looks at."""
    more = length - len(actions)
    begins = dataclasses.replace(steps[0], reward=np.zeros_like(steps[0].reward))
    return steps + [begins] * more, actions + [np.zeros_like(np.asarray(actions[0]))] * more


def sequences_of(steps: list[TimeStep], actions: list[Any], agents: int, *, common: bool = False) -> Sequence:
    """Every agent's view of every copy's first episode, with axes [episodes · agents, time]. `common`: rewards are
    those of `config.common_reward`, which is what a world model that was trained with it predicts."""
    stack = jax.tree.map(lambda *x: np.stack(x, axis=1), *steps)
    if common:
        here, there = (jax.tree.map(lambda x, at=at: x[:, at], stack) for at in (slice(-1), slice(1, None)))
        paid = np.concatenate([stack.reward[:, :1], np.asarray(common_reward(here, there).reward)], axis=1)
        stack = eqx.tree_at(lambda t: t.reward, stack, paid)
    episodes, time = stack.first.shape
    action = np.pad(np.stack(actions, axis=1), ((0, 0), (0, 1), (0, 0)))
    # Copies that ended early started a second episode; it does not count.
    second = np.cumsum(stack.first, axis=1) > 1
    acting = stack.acting & ~second[..., None]
    acting[:, -1] = False  # where the recording was cut short, nothing was done in its last row
    after = lambda x: np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)  # noqa: E731
    each = lambda x: np.moveaxis(x, 2, 1).reshape(episodes * agents, time, *x.shape[3:])  # noqa: E731
    shared = lambda x: np.repeat(x, agents, axis=0)  # noqa: E731
    x = jnp.asarray
    return tree_of(  # a batch of what is annotated as one
        Sequence,
        obs=x(each(stack.obs)),
        mask=x(each(stack.mask)),
        action=x(shared(action)),
        reward=x(each(after(stack.reward))),
        terminal=x(each(after(stack.terminal))),
        acting=x(shared(acting)),
        first=x(shared(stack.first)),
        focal=x(np.tile(np.arange(agents), episodes)),
    )


def _one_step(model: WorldModel, s: Sequence, key: PRNGKeyArray) -> dict[str, Array]:
    """Per step: errors, predicted reward, teammate log-probabilities. Step t predicts row t + 1."""
    code, valid = model.representation, model.obs_valid(s.focal)
    z_key, sample_key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(s.obs, jax.random.split(z_key, len(s.obs)))
    acts = s.acting[:, s.focal]
    h, _ = model.unroll(z, s.action[:, s.focal], s.focal, s.segment, acts)
    h, now = h[:-1], z[:-1]
    prior = jax.vmap(code.prior)(h, now)
    mean = jax.vmap(code.next_mean, in_axes=(0, 0, None))(prior, now, valid)
    sample = jax.vmap(code.next, in_axes=(0, 0, None, 0))(prior, now, valid, jax.random.split(sample_key, len(h)))
    real = jax.vmap(code.observed)(s.obs)

    def error(z: Array, target: Array) -> Array:
        predicted = jax.vmap(lambda z: code.observed(code.decode(z)))(z)
        return markov_quality.squared(predicted, target, valid)

    logits, _ = jax.vmap(model.outcome)(h, mean)
    out = {
        "acts": acts[:-1],
        "reconstruction": error(now, real[:-1]),
        "one_step": error(mean, real[1:]),
        "one_step_sampled": error(dense(sample), real[1:]),
        "still": markov_quality.squared(real[:-1], real[1:], valid),
        "reward": two_hot_mean(logits, model.reward_bins),
    }
    if model.team is not None:
        out["team"], _ = model.team.full(z, s.focal, s.segment, acts)
    return out


def _open_loop(
    model: WorldModel, s: Sequence, horizon: int, samples: int, context: int, key: PRNGKeyArray
) -> tuple[Float[Array, " horizon"], Float[Array, " horizon"]]:
    """Error after 1 … `horizon` steps from the `context`-th step on, and that of "nothing moves"."""
    code, valid = model.representation, model.obs_valid(s.focal)
    time = jnp.arange(context)
    z_key, key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(s.obs[:context], jax.random.split(z_key, context))
    action = s.action[:, s.focal]
    _, cache = model.unroll(z[:-1], action[: context - 1], s.focal, s.segment[: context - 1], time[:-1] >= 0, horizon)

    def rollout(key: PRNGKeyArray) -> Array:
        def step(carry: tuple, inputs: tuple) -> tuple:
            z, hidden = carry
            a, k = inputs
            z, _, _, hidden = model.imagine(z, a, s.focal, hidden, k)
            return (z, hidden), code.observed(code.decode(z))

        hidden = Hidden(jnp.zeros(model.config.hidden), cache, None)
        actions = action[context - 1 : context - 1 + horizon]
        _, seen = jax.lax.scan(step, (z[-1], hidden), (actions, jax.random.split(key, horizon)))
        return seen

    mean = jnp.mean(jax.vmap(rollout)(jax.random.split(key, samples)), axis=0)
    real = jax.vmap(code.observed)(s.obs[context - 1 : context + horizon])
    still = jnp.broadcast_to(real[0], mean.shape)
    return markov_quality.squared(mean, real[1:], valid), markov_quality.squared(still, real[1:], valid)


def measure(
    agents: Agents,
    player: Any,
    play: str,
    *,
    large_reward: float = 0.0,
    episodes: int = 100,
    horizon: int = 12,
    samples: int = 16,
    seed: int = 0,
    played: Recording | None = None,
) -> ModelQuality:
    """Measure the agents' world model on fresh episodes of `player` (all agents), described as `play`.

    `large_reward`: a step counts as having a reward if its absolute value is above this (5 for a catch in
    `simple_tag`, where leaving the arena costs little by little). The open-loop error starts after the context that
    imagination gets; where no episode is long enough for that and the `horizon`, both are shorter. `played`: episodes
    recorded before, instead of new ones. Raises ValueError for agents without a world model.
    """
    spec = agents.spec
    model, context, one_step, open_loop = _functions(agents)
    if played is None:
        with contextlib.closing(as_host(agents.make_env(episodes), episodes)) as env:
            played = record(env, player, episodes, seed)
    else:
        episodes = len(played[0][0].first)
    s = sequences_of(*played, spec.num_agents, common=agents.config.common_reward)
    keys = jax.random.split(jax.random.key(seed), len(s.obs))
    one = agents.compiled.setdefault("one step", _of_rows(one_step))
    got = _in_pieces(one, np.arange(len(s.obs)), model, s, keys)
    acts = got["acts"]
    mean = {name: float(got[name][acts].mean()) for name in ("reconstruction", "one_step", "one_step_sampled", "still")}

    real = np.asarray(s.reward)[:, :-1]
    large = acts & (np.abs(real) > large_reward)
    off = (got["reward"] - real)[acts & ~large]
    focal = np.asarray(s.focal)

    def ratio(members: tuple[int, ...]) -> float:
        steps = large & np.isin(focal, members)[:, None]
        return (
            float((got["reward"] * np.sign(real))[steps].sum() / np.abs(real[steps]).sum()) if steps.any() else math.nan
        )

    by_horizon = still_by_horizon = (math.nan,)
    acted = np.cumprod(acts, axis=1).sum(axis=1)  # steps from the start on, of every sequence
    if not (acted >= context - 1 + horizon).any():
        typical = int(np.median(acted))
        context = opening(context, typical)
        horizon = min(horizon, typical - context + 1)
    whole = acted >= context - 1 + horizon
    if horizon > 0 and whole.any():
        loop = agents.compiled.setdefault("open loop", _of_rows(open_loop))
        errors = _in_pieces(loop, np.flatnonzero(whole), model, s, keys, horizon, samples, context)
        by_horizon, still_by_horizon = (tuple(float(x) for x in e.mean(axis=0)) for e in errors)
    seen = _foresight(got["team"], s, spec) if "team" in got else None
    accuracy, base_rate = _overall(seen, s)
    return ModelQuality(
        play=play,
        episodes=episodes,
        **mean,
        by_horizon=by_horizon,
        still_by_horizon=still_by_horizon,
        reward_ratio=ratio(tuple(range(spec.num_agents))),
        reward_ratio_by_side={side: ratio(members) for side, members in spec.sides.items()},
        elsewhere=float(off.mean()) if off.size else math.nan,
        elsewhere_absolute=float(np.abs(off).mean()) if off.size else math.nan,
        accuracy=accuracy,
        base_rate=base_rate,
        foresight=seen,
    )


def _of_rows(function: Any) -> Any:
    """`function` of a model, a sequence, settings and a key, compiled for those rows of sequences and keys."""

    def of(rows: Int[Array, " rows"], model: Any, s: Sequence, keys: Key[Array, " all"], *settings: int) -> Any:
        given = jax.tree.map(lambda x: x[rows], (s, keys))
        return jax.vmap(lambda s, key: function(model, s, *settings, key))(*given)

    return quick_jit(of)


def _in_pieces(function: Any, rows: Int[np.ndarray, " rows"], *given: Any) -> Any:
    """`function` of those rows: in pieces, so that image models need no more memory than a training batch, and all of
    one size, so that one program is compiled. The last is filled up with rows that others have."""
    pieces = -(-len(rows) // PIECE)
    filled = np.resize(rows, (pieces, -(-len(rows) // pieces)))
    out = [jax.device_get(function(jnp.asarray(piece), *given)) for piece in filled]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *out)


def _functions(agents: Agents) -> tuple[Any, int, Any, Any]:
    """The world model, the steps of context that it gets, and what measures it after one and after many steps."""
    state = agents.state
    if isinstance(state, matwm.State):
        return state.world_model, agents.config.agents.context, _one_step, _open_loop
    if not isinstance(state, wm_rnd.State):
        raise ConfigError(
            f"{agents.name}: algo={agents.config.algo} is not in codream.model_quality._functions, which knows "
            "matwm.State and wm_rnd.State: add what measures its world model there"
        )
    if state.world_model is None:
        raise ValueError(f"{agents.name} has no world model (projection.coef is 0), so there is none to measure")
    scale = state.rewards.scale
    return state.world_model, 1, lambda m, s, key: markov_quality.one_step(m, s, scale, key), markov_quality.open_loop


def _foresight(log_probs: Any, s: Sequence, spec: EnvSpec) -> Foresight:
    """For every pair of agents. `log_probs` has axes [episodes · agents, time, others, actions]."""
    n = spec.num_agents
    action, acting = np.asarray(s.action)[::n], np.asarray(s.acting)[::n]
    return foresight(spec.agents, log_probs.reshape(-1, n, *log_probs.shape[1:]), action, acting)


def _overall(seen: Foresight | None, s: Sequence) -> tuple[float, float]:
    """Accuracy over all pairs, and that of each agent's most frequent action, both over the steps at which the two of a
    pair act."""
    if seen is None:
        return math.nan, math.nan
    n = len(seen.agents)
    acting = np.asarray(s.acting)[::n]
    weights, right, frequent = [], [], []
    for i, j in itertools.permutations(range(n), 2):
        both = acting[..., i] & acting[..., j]
        if both.any():
            weights.append(both.sum())
            right.append(seen.accuracy[i][j])
            frequent.append(seen.base_rate[i][j])
    if not weights:
        return math.nan, math.nan
    return float(np.average(right, weights=weights)), float(np.average(frequent, weights=weights))
