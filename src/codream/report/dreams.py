"""An episode that was really played, and what each agent imagines from the same start on.

The dream follows the focal agent's *real* actions (and the others', where the model asks for everyone's), so that
whatever differs is the model's doing: what it does not know of the world, and of what the others will do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped

from codream import matwm, wm_rnd
from codream.actor_critic import Actor, Critic
from codream.agents import Agents, loaded
from codream.compiled import quick_jit
from codream.config import ConfigError
from codream.envs import EnvSpec
from codream.linear import dense
from codream.markov_quality import imagine_along, squared, was_there
from codream.model_quality import Recording, opening, record, sequences_of
from codream.playing import as_host
from codream.runs import Run
from codream.world_model import Sequence, WorldModel

__all__ = ["MOST_STEPS", "Dreamed", "Episode", "dream", "dreams_of", "played_only", "recorded", "typical_episodes"]

MOST_STEPS = 48  # of an episode that are drawn
DREAMS = 8  # imagined from one start, so that one sees where the model is unsure
LOOKED = 4  # steps that are shown as seen before a model without memory dreams


@dataclasses.dataclass(frozen=True)
class Dreamed:
    """What one focal agent saw, foresaw and imagined along an episode of T steps, from step `start` on.

    Before `start` it sees the real observation at every step (that is its context); from then on only its own
    imagination. Row t of `obs` is what it has before its t-th action; `reward` is what it expects for that action.
    """

    focal: int
    obs: Shaped[np.ndarray, "dreams steps_1 *shape"] | None
    """Decoded observations, T + 1 of them, in the environment's units; None without a world model."""
    others: Float[np.ndarray, "steps others actions"] | None
    """Distribution of each other agent's action, in the first dream: predicted, or with mirrored partners what the
    focal agent would do in its place. None without either."""
    policy: Float[np.ndarray, "steps actions"]
    """The focal agent's own action probabilities, in the first dream."""
    reward: Float[np.ndarray, " steps"] | None
    """Expected reward, mean over dreams."""
    value: Float[np.ndarray, " steps"]
    """Expected discounted return, mean over dreams."""
    gap: Float[np.ndarray, " steps_1"] | None
    """Squared error of symlog observations (pixels −0.5 to 0.5), summed over entries, mean over dreams; 0 up to
    `start`."""
    still: Float[np.ndarray, " steps_1"] | None
    """The same if nothing moved after `start`."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """A real episode of T steps, and every agent's dream of it."""

    label: str
    start: int
    """The step from which on it is imagined."""
    obs: Shaped[np.ndarray, "steps_1 agents *shape"]
    """Of agents with fewer entries than others the first `spec.obs_shapes[i]`; zeros follow."""
    action: Int[np.ndarray, "steps agents"]
    reward: Float[np.ndarray, "steps agents"]
    """As training pays it: with `common_reward` everyone the sum of all."""
    acting: Bool[np.ndarray, "steps agents"]
    """Who was there to act. Elsewhere an agent has ended or has not come yet, and its `action` and `reward` are
    filler; so are its `obs`, but for the one that its last action led to. What it dreams there means nothing."""
    dreams: tuple[Dreamed, ...]


def dream(
    run: Agents | str | Path | Run,
    *,
    episodes: int = 3,
    samples: int = DREAMS,
    greedy: bool = False,
    seed: int = 0,
    checkpoint: int | str | None = None,
    env: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | Path = "runs",
) -> list[Episode]:
    """Play evaluation episodes, and have every agent imagine each of them `samples` times, as arrays.

    An agent watches the first steps, its context, and then follows the actions that were really taken with its eyes
    closed. Of long games the first 48 steps. `greedy`, `checkpoint`, `env`, `env_kwargs`: as in `watch`, which makes
    pictures of it.

    Raises RunError and CheckpointError as `load` does, ConfigError for less than one episode or dream.
    """
    for name, value in (("episodes", episodes), ("samples", samples)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    agents = loaded(run, checkpoint=checkpoint, env=env, env_kwargs=env_kwargs, root=root)
    played = recorded(agents, episodes, greedy=greedy, seed=seed, limit=MOST_STEPS)
    return dreams_of(agents, played, [(f"episode {k + 1}", k) for k in range(episodes)], samples=samples, seed=seed)


def recorded(agents: Agents, episodes: int, *, greedy: bool = False, seed: int = 0, limit: int | None) -> Recording:
    """Episodes of the agents, each in a copy of its own; see `record`."""
    with contextlib.closing(as_host(agents.make_env(episodes), episodes)) as env:
        return record(env, agents.player(greedy=greedy), episodes, seed=seed, limit=limit)


def typical_episodes(played: Recording, count: int) -> list[tuple[str, int]]:
    """Which of the recorded episodes to show: by their total absolute reward the median one, then the most eventful and
    the quietest."""
    rewards = np.stack([np.abs(step.reward) for step in played[0][1:]], axis=1)
    firsts = np.stack([step.first for step in played[0]], axis=1)
    rewards = np.where((np.cumsum(firsts, axis=1)[:, 1:] > 1)[..., None], 0.0, rewards)
    order = np.argsort(rewards.sum(axis=(1, 2)), kind="stable")
    chosen = [
        ("a median episode", order[len(order) // 2]),
        ("the most eventful", order[-1]),
        ("the quietest", order[0]),
    ]
    picked: dict[int, str] = {}
    for label, episode in chosen[:count]:
        picked.setdefault(int(episode), label)
    return [(label, episode) for episode, label in picked.items()]


def dreams_of(
    agents: Agents, played: Recording, chosen: list[tuple[str, int]], *, samples: int = DREAMS, seed: int = 0
) -> list[Episode]:
    """Every agent's dream of the chosen episodes of a recording. `chosen`: label and number of each."""
    n = agents.spec.num_agents
    one = [jax.tree.map(lambda x, e=episode: np.asarray(x)[[e]], played) for _, episode in chosen]
    lengths = [_length(steps) for steps, _ in one]
    longest = max(lengths)
    dream, context = _dreamer(agents)
    start = opening(context, longest) - 1
    found = []
    run = agents.compiled.setdefault("dream", quick_jit(dream))
    for k, ((label, _), (steps, actions), length) in enumerate(zip(chosen, one, lengths, strict=True)):
        s = sequences_of(steps, actions, n, common=agents.config.common_reward)
        s = jax.tree.map(lambda x, n=longest + 1: _stretch(x, n), s, is_leaf=eqx.is_array)
        keys = jax.random.split(jax.random.key(seed + k), samples)
        out = jax.device_get(run(agents.state, s, start, keys))
        real = np.asarray(s.obs)[:, : length + 1]
        found.append(
            Episode(
                label=label,
                start=min(start, length),
                obs=np.swapaxes(real, 0, 1),
                action=np.asarray(s.action)[0, :length],
                reward=np.asarray(s.reward).T[:length],
                acting=np.asarray(s.acting)[0, :length],
                dreams=tuple(_dreamed(out, i, length) for i in range(n)),
            )
        )
    return found


def played_only(
    spec: EnvSpec, played: Recording, chosen: list[tuple[str, int]], most: int, *, common: bool = False
) -> list[Episode]:
    """The chosen episodes of a recording, at most `most` steps of each, and no dreams of them. `common`: see
    `sequences_of`."""
    found = []
    for label, episode in chosen:
        steps, actions = jax.tree.map(lambda x, e=episode: np.asarray(x)[[e]], played)
        length = _length(steps, most)
        s = sequences_of(steps, actions, spec.num_agents, common=common)
        nothing = np.zeros((length, spec.max_actions))
        found.append(
            Episode(
                label=label,
                start=length,
                obs=np.swapaxes(np.asarray(s.obs)[:, : length + 1], 0, 1),
                action=np.asarray(s.action)[0, :length],
                reward=np.asarray(s.reward).T[:length],
                acting=np.asarray(s.acting)[0, :length],
                dreams=tuple(
                    Dreamed(i, None, None, nothing, None, nothing[:, 0], None, None) for i in range(spec.num_agents)
                ),
            )
        )
    return found


def _dreamer(agents: Agents) -> tuple[Any, int]:
    """What imagines along an episode with all agents, and after how many steps it may begin."""
    spec = agents.spec

    def matwm_dreams(state: Any, s: Sequence, start: Any, keys: Key[Array, " dreams"]) -> dict[str, Array]:
        memory = min(len(s.obs[0]), agents.config.world_model.length)  # as agents have it that act
        return _all_agents(state.world_model, state.agents.actor, state.agents.critic, s, start, keys, memory)

    def markov_dreams(state: Any, s: Sequence, start: Any, keys: Key[Array, " dreams"]) -> dict[str, Array]:
        scales = (state.rewards.scale, state.returns.scale)
        mirrored = state.world_model is not None and agents.config.imagined_partners == "mirrored"
        return imagine_along(state.world_model, spec, state.learners, s, start, *scales, keys, mirrored=mirrored)

    if isinstance(agents.state, matwm.State):
        return matwm_dreams, agents.config.agents.context
    if isinstance(agents.state, wm_rnd.State):
        return markov_dreams, LOOKED
    raise ConfigError(
        f"{agents.name}: algo={agents.config.algo} is not in codream.report.dreams._dreamer, which knows matwm.State "
        "and wm_rnd.State: add what imagines along an episode with it there"
    )


def _length(steps: list[Any], most: int = MOST_STEPS) -> int:
    """Steps of the first episode, at most `most`."""
    last = [bool(step.last[0]) for step in steps]
    return min(last.index(True) if True in last else len(steps) - 1, most)


def _stretch(x: Array, rows: int) -> Array:
    """Cut or pad the time axis, so that episodes of all lengths share one compiled program."""
    if x.ndim < 2:
        return x
    x = x[:, :rows]
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _all_agents(
    model: WorldModel,
    actors: Actor,
    critics: Critic,
    s: Sequence,
    start: Int[Array, ""] | int,
    keys: Key[Array, " dreams"],
    memory: int,
) -> dict[str, Array]:
    """Axes [agents, dreams, time]. `memory`: steps that the model remembers."""

    def of_one(actor: Actor, critic: Critic, s: Sequence) -> dict[str, Array]:
        return jax.vmap(lambda key: _imagine_along(model, actor, critic, s, start, key, memory))(keys)

    return eqx.filter_vmap(of_one)(actors, critics, s)


def _imagine_along(
    model: WorldModel,
    actor: Actor,
    critic: Critic,
    s: Sequence,
    start: Int[Array, ""] | int,
    key: PRNGKeyArray,
    memory: int,
) -> dict[str, Array]:
    """Step through an episode; up to `start` every latent is that of the real observation, then the imagined one. Where
    the agent is not there, it remembers nothing, as in play, and nothing is compared."""
    code, focal, valid = model.representation, s.focal, model.obs_valid(s.focal)
    exists, acts = jnp.asarray(model.spec.action_valid)[focal], s.acting[:, focal]
    keys = jax.random.split(key, (len(s.obs), 2))
    real, _ = jax.vmap(code.posterior)(s.obs, keys[:, 0])

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, dict[str, Array]]:
        imagined, hidden = carry
        t, seen, action, allowed, here, key = inputs
        z = jnp.where(t <= start, seen, imagined)
        features, hidden = model.features(z, focal, hidden)
        imagined_mask = exists if model.mask is None else model.mask(z) > 0
        may = jnp.where(t <= start, allowed, imagined_mask) & exists
        may = jnp.where(jnp.any(may), may, exists)
        out = {"z": z, "policy": jnp.exp(actor(features, may)), "value": critic.value(features)}
        if model.team is not None:
            out["others"] = dense(features)[-model.team.size :].reshape(-1, model.team.actions)
        z_next, out["reward"], _, hidden = model.imagine(z, action, focal, hidden, key)
        return (z_next, hidden.cleared(~here)), out

    time = jnp.arange(len(s.obs))
    begin = (real[0], model.empty(memory))
    _, out = jax.lax.scan(step, begin, (time, real, s.action[:, focal], s.mask, acts, keys[:, 1]))
    out["obs"] = jax.vmap(code.decode)(out.pop("z"))
    target = jax.vmap(code.observed)(s.obs)
    error = lambda x: squared(x, target, valid)  # noqa: E731
    compared = (time > start) & was_there(acts)
    out["gap"] = jnp.where(compared, error(jax.vmap(code.observed)(out["obs"])), 0.0)
    out["still"] = jnp.where(compared, error(jnp.broadcast_to(target[start], target.shape)), 0.0)
    return out


def _dreamed(out: dict[str, np.ndarray], i: int, length: int) -> Dreamed:
    def first(name: str, rows: int) -> np.ndarray | None:
        return out[name][i, 0, :rows] if name in out else None

    def mean(name: str, rows: int) -> np.ndarray | None:
        return out[name][i].mean(axis=0)[:rows] if name in out else None

    return Dreamed(
        focal=i,
        obs=out["obs"][i][:, : length + 1] if "obs" in out else None,
        others=first("others", length),
        policy=out["policy"][i, 0, :length],
        reward=mean("reward", length),
        value=out["value"][i].mean(axis=0)[:length],
        gap=mean("gap", length + 1),
        still=first("still", length + 1),
    )
