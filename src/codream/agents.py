"""Trained agents, loaded from a run: they act on raw observations, or as players in many copies at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from codream import checkpoint as checkpoints
from codream.algorithms import State, algorithm
from codream.building import build_beside
from codream.compiled import quick_jit
from codream.config import Config, ConfigError
from codream.envs import EnvSpec, TimeStep
from codream.envs.own import apart
from codream.runs import Run
from codream.training import driver_for

__all__ = ["Agents", "Player", "load", "loaded"]


def load(
    run: str | Path | Run,
    *,
    checkpoint: int | str | None = None,
    env: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | Path = "runs",
) -> Agents:
    """The agents of a run, as its latest checkpoint (or the one at step `checkpoint`, or the `best`) has them.

    `env`: the environment, where the run was trained on one given as an object. `env_kwargs`: keywords with which it is
    made now, besides those of training or instead of them, e.g. `{"max_cycles": 100}`: how do they play where episodes
    are longer? Agents, observations and actions must stay as they were.

    Raises RunError if there is no such run, or where the environment is another now; CheckpointError if its checkpoint
    is missing, damaged or of another version; ConfigError where there is no environment with such keywords.
    """
    run = Run.open(run, root)
    found = checkpoints.while_it_goes_on(run.checkpoints, lambda: checkpoints.find(run.path, checkpoint))
    run.refuse_without_its_environment(env)
    with contextlib.suppress(TypeError):  # what cannot be copied is played on itself
        env = apart(env)

    config = _with_keywords(found.config, env_kwargs or {})

    def make(copies: int, **options: Any) -> Any:
        return build_beside(_with_keywords(config, options), copies, env)

    one = make(1)
    run.refuse_other_environment(found.spec, one.spec)
    template = driver_for(one, config).template()

    def restored() -> Any:
        found = checkpoints.find(run.path, checkpoint)
        return found, checkpoints.restore(template, found)

    found, runner = checkpoints.while_it_goes_on(run.checkpoints, restored)
    return Agents(runner.state, config, steps=found.steps, env=one, make=make, name=str(run.path))


def loaded(
    agents: Agents | str | Path | Run,
    *,
    checkpoint: int | str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    **where: Any,
) -> Agents:
    """`load`, unless they are loaded already. Raises ConfigError where they are, and another checkpoint or other
    keywords of their environment are asked for."""
    if not isinstance(agents, Agents):
        return load(agents, checkpoint=checkpoint, env_kwargs=env_kwargs, **where)
    for what, asked in {"checkpoint": checkpoint, "env_kwargs": env_kwargs}.items():
        if asked is not None:
            raise ConfigError(f"{what} is of a run; these agents are loaded already: codream.load(run, {what}=…)")
    return agents


def _with_keywords(config: Config, keywords: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, env_kwargs={**config.env_kwargs, **keywords})


@lru_cache(maxsize=8)
def _acting(config: Config, greedy: bool, backend: str) -> Callable[..., Any]:
    """How agents act, compiled; kept, so that those of other runs or checkpoints need not compile it anew."""
    learner = algorithm(config)
    return quick_jit(
        lambda state, memory, here, key: learner.act(state, memory, here, key, config, collect=False, greedy=greedy)
    )


class Agents:
    """Trained agents of one environment.

    `act` plays one episode at a time from raw observations; `player` plays many copies at once.
    """

    config: Config
    """That of their training, but for the keywords of the environment that `load` was given."""
    spec: EnvSpec
    steps: int
    """Environment steps that they were trained for."""
    name: str
    """What results call them: the run's folder."""
    state: Any
    """What they learned, and act with, without what only training needs, such as replay. For `algo=matwm` it has
    `world_model` and `agents` (actors and critics, stacked on a leading agent axis), for `wm_rnd` `world_model` and
    `learners`."""
    make_env: Callable[..., Any]
    """`make_env(copies, **keywords)`: their environment once more, a host environment with so many copies (one that was
    given as an object that steps its own copies: with those that it has) or one inside JAX."""

    def __init__(
        self,
        state: State,
        config: Config,
        *,
        steps: int,
        env: Any,
        make: Callable[..., Any],
        name: str,
    ):
        self.config, self.spec, self.steps, self.name = config, state.spec, steps, name
        self.state = state.for_acting()
        self.make_env = make
        self._env = env
        self._seed = 0
        self._episode: Player | None = None
        self._rng = np.random.default_rng(0)
        self.compiled: dict[str, Any] = {}  # functions of others that depend on these agents
        self._act = {greedy: _acting(config.for_programs(), greedy, jax.default_backend()) for greedy in (False, True)}

    def __repr__(self) -> str:
        return f"Agents({self.spec.name!r}, steps={self.steps}, agents={list(self.spec.agents)})"

    def player(self, *, greedy: bool = False) -> Player:
        """All agents as one policy for any number of copies, with the interface of a reference policy."""
        return Player(self, greedy)

    def reset(self, seed: int | None = None) -> None:
        """The next `act` starts an episode. With `seed`, its sampled actions can be repeated."""
        self._episode = None
        if seed is not None:
            self._rng = np.random.default_rng(seed)

    def act(self, obs: Any, infos: Mapping[Any, Any] | None = None, *, greedy: bool = False) -> dict[Any, int]:
        """Actions for one step of one environment as its own `step` takes them, remembering the episode since `reset`.

        `obs`: what the environment gives, {agent: observation}; agents that are not in it get no action. PettingZoo's
        `step` also gives the last observations of agents that have just ended: `{a: obs[a] for a in env.agents}`.
        Action masks are read from the observations, or from `infos` as PettingZoo's `reset` and `step`
        return them.

        Raises ValueError for an agent that the environment does not have, and without `infos` where the masks are in
        there; for an observation or a mask of another shape, or one that is not finite, EnvironmentFailure on a host
        environment and ValueError on one inside JAX; TypeError where the environment was given as an object that has
        codream's own interface.
        """
        if not hasattr(self._env, "encode"):
            raise TypeError(
                f"{self.spec.name} answers in codream's own TimeStep, so there is nothing to read raw observations "
                "with; `agents.player().act(timestep, rng)` acts on what it answers"
            )
        first = self._episode is None
        if self._episode is None:
            self._episode = self.player(greedy=greedy)
        self._episode.greedy = greedy
        here = self._env.encode(obs, infos, first=first)
        actions = self._episode.act(here, self._rng)
        return self._env.decode(actions[0], obs)


class Player:
    """The current policies of trained agents in some copies of their environment. Remembers each copy's
    episode."""

    def __init__(self, agents: Agents, greedy: bool):
        self.agents, self.greedy = agents, greedy
        self._memory: Any = None

    def act(self, timestep: TimeStep, rng: np.random.Generator) -> Int[np.ndarray, "copies agents"]:
        """Actions of all agents; must be asked at every step of an episode, from its first."""
        owner = self.agents
        if self._memory is None:
            self._memory = algorithm(owner.config).init_memory(owner.state, len(timestep.first), owner.config)
        key = jax.random.key(int(rng.integers(2**31)))
        here = jax.tree.map(jnp.asarray, timestep)
        actions, self._memory = owner._act[self.greedy](owner.state, self._memory, here, key)
        return np.asarray(actions)
