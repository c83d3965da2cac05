"""Playing whole episodes: policies on copies of an environment, whether it steps them itself or is inside JAX."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from codream.agents import Agents, Player
from codream.config import ConfigError
from codream.envs import EnvSpec, GraphEnv, HostEnv, TimeStep
from codream.envs.answers import check_answer
from codream.envs.cooperation import cooperation_counter
from codream.social import Outcomes

__all__ = ["EndlessEpisode", "GraphCopies", "as_host", "play", "stage"]

LONGEST = 20_000  # steps of an episode: one that still goes on then may never end


class EndlessEpisode(ConfigError):
    """An episode goes on for so long that it may never end, so that it has no return."""


def play(
    env: HostEnv,
    players: dict[str, Any],
    episodes: int,
    seed: int = 0,
    tell: Any = None,
    outcomes: Outcomes | None = None,
    *,
    stream: int = 0,
) -> Float[np.ndarray, "episodes agents"]:
    """Returns of every agent in exactly `episodes` episodes, over all copies of a host environment.

    `players`: for each side an object with `act(timestep, rng) -> actions [copies, agents]`. How many
    episodes each copy plays is fixed beforehand, so that short episodes do not count more than long ones.
    `outcomes` also sees every step of those episodes. `stream`: another one gives other episodes for the same seed (0:
    those of `evaluate`, 1: those of `model_quality.record`).

    Raises EndlessEpisode where one is longer than LONGEST, EnvironmentFailure where the first answers are not of the
    shapes that the environment's spec says.
    """
    copies, sides = env.num_envs, env.spec.sides
    quota = np.full(copies, episodes // copies) + (np.arange(copies) < episodes % copies)
    rng = np.random.default_rng([seed, 2 * stream])
    seeds = np.random.default_rng([seed, 2 * stream + 1])
    draw = lambda: seeds.integers(2**31 - 1, size=copies)  # noqa: E731
    returns: list[Float[np.ndarray, " agents"]] = []
    total = np.zeros((copies, env.spec.num_agents))
    length = np.zeros(copies, int)
    played = np.zeros(copies, int)
    here = env.reset(draw())
    check_answer(here, env.spec, copies, "reset")
    if outcomes is not None:
        outcomes.begin()
    distinct = {id(player): _fresh(player) for player in players.values()}
    while (played < quota).any():
        answers = {key: player.act(here, rng) for key, player in distinct.items()}
        actions = np.zeros(here.acting.shape, int)
        for side, members in sides.items():
            columns = list(members)
            actions[:, columns] = answers[id(players[side])][:, columns]
        before, here = here, env.step(actions, draw())
        if not length.any():  # the first step
            check_answer(here, env.spec, copies, "step")
        total = np.where(np.asarray(before.last)[:, None], 0.0, total) + np.asarray(here.reward)
        length = np.where(before.last, 0, length + 1)
        if length.max() > LONGEST:
            raise EndlessEpisode(
                f"an episode of {env.spec.name} has not ended after {LONGEST:,} steps, so its return cannot be told; "
                "it needs a time limit"
            )
        if outcomes is not None:
            outcomes.step(np.asarray(here.reward), np.asarray(before.last), getattr(env, "choices", None))
        for c in np.flatnonzero(np.asarray(here.last) & (played < quota)):
            returns.append(total[c].copy())
            if outcomes is not None:
                outcomes.finish(int(c))
            played[c] += 1
        if tell is not None:
            tell(len(returns))
    return np.stack(returns)


def _fresh(player: Any) -> Any:
    """A learned player remembers episodes; every match starts with none."""
    return Player(player.agents, player.greedy) if isinstance(player, Player) else player


def as_host(env: HostEnv | GraphEnv, copies: int) -> HostEnv:
    """A host environment as it is, an in-graph one as `copies` of it behind the same interface."""
    return env if isinstance(env, HostEnv) else GraphCopies(env, copies)


def stage(agents: Agents, copies: int) -> HostEnv:
    """Copies of the agents' environment behind the interface of a host environment. An in-graph one is kept with them:
    what is compiled for it stays in memory."""
    name = f"stage of {copies}"
    if name in agents.compiled:
        return agents.compiled[name]
    env = agents.make_env(copies)
    host = as_host(env, copies)
    if host is not env:
        agents.compiled[name] = host
    return host


class GraphCopies:
    """Copies of an in-graph environment behind the interface of a host environment.

    `choices`: [copies, agents, 2], cooperative choices in the last step and all, where the environment defines them.
    """

    spec: EnvSpec
    num_envs: int
    choices: Float[np.ndarray, "copies agents 2"] | None

    def __init__(self, env: GraphEnv, copies: int):
        self.spec, self.num_envs = env.spec, copies
        self.choices = None
        self._keys = jax.jit(jax.vmap(jax.random.key))
        self._reset, self._step = jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))
        counter = cooperation_counter(env)
        self._count = None if counter is None else jax.jit(jax.vmap(counter))
        self._state: Any = None

    def reset(self, seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        self._state, here = self._reset(self._keys(seeds))
        return jax.device_get(here)

    def step(self, actions: Int[np.ndarray, "copies agents"], seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        before = self._state
        self._state, here = self._step(self._keys(seeds), before, actions)
        if self._count is not None:
            self.choices = np.asarray(self._count(before, self._state))
        return jax.device_get(here)

    def close(self) -> None:
        self._state = None
