"""The environment that a configuration names, or that was given as an object: to train on, or to play on beside it."""

from __future__ import annotations

import json
from typing import Any

from codream.config import Config, ConfigError
from codream.envs import EnvironmentFailure, GraphEnv, HostEnv, TimeStep, UnknownEnvironment, is_graph, make_env
from codream.envs.copies import called
from codream.envs.own import own_copies, place_of
from codream.envs.workers import workers_for
from codream.guards import TimeLimit

__all__ = ["build_beside", "build_env"]

_GRAPHS: dict[str, Any] = {}
"""Environments inside JAX that were made by name, by it and its keywords."""


def build_env(config: Config, copies: int, env: Any = None) -> HostEnv | GraphEnv:
    """The environment of a configuration, or `env` given as an object.

    One by name that is part of the program is made once, so that what was compiled for it serves again. `close` of a
    host environment closes what was made here: what was given as an object is its owner's to close.

    Raises UnknownEnvironment, ModuleNotFoundError for one that is not installed, and ConfigError for one that
    cannot be built or represented.
    """
    named = f"{config.env} {json.dumps(config.env_kwargs, sort_keys=True)}" if env is None else None
    if named is not None and named in _GRAPHS:
        return _GRAPHS[named]
    workers = config.env_workers or (1 if env is not None else workers_for(copies))
    try:
        made = make_env(config.env if env is None else env, copies, env_workers=workers, **config.env_kwargs)
        if named is not None and is_graph(made):
            _GRAPHS[named] = made
        return _Lent(made, made is env) if env is not None and isinstance(made, HostEnv) else made
    except (UnknownEnvironment, ModuleNotFoundError, EnvironmentFailure):
        raise
    except Exception as err:
        if env is not None and not isinstance(err, TypeError | ValueError):
            raise  # of one's own code one wants to see where
        said = str(err) if isinstance(err, TypeError | ValueError) else f"{type(err).__name__}: {err}"
        asked = f" with {config.env_kwargs}" if config.env_kwargs else ""
        name = config.env if env is None else place_of(env) or called(env)
        raise ConfigError(f"the environment {name}{asked} cannot be used: {said}") from err


def build_beside(config: Config, copies: int, env: Any = None) -> HostEnv | GraphEnv:
    """`build_env` for playing beside training or after it, where no driver watches over a host environment: its own
    `reset` and `step` raise EnvironmentFailure after `config.env_time_limit` seconds, or as many times longer as there
    are more copies than in training. An object that steps copies of its own comes with as many as it has."""
    made = build_env(config, env.num_envs if own_copies(env) else copies, env)
    if isinstance(made, HostEnv) and config.env_time_limit:
        seconds = config.env_time_limit * max(1.0, made.num_envs / config.num_envs)
        return _Timed(made, TimeLimit(seconds, EnvironmentFailure))
    return made


class _Through:
    """A host environment as it is."""

    def __init__(self, env: HostEnv):
        self._env = env
        self.spec, self.num_envs = env.spec, env.num_envs

    def close(self) -> None:
        self._env.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of one that is being copied
            raise AttributeError(name)
        return getattr(self._env, name)

    def reset(self, seeds: Any) -> TimeStep:
        return self._env.reset(seeds)

    def step(self, actions: Any, seeds: Any) -> TimeStep:
        return self._env.step(actions, seeds)


class _Lent(_Through):
    """One that was given as an object, `whole` or as what makes its copies: only what codream made of it is closed."""

    def __init__(self, env: HostEnv, whole: bool):
        super().__init__(env)
        self._whole = whole

    def close(self) -> None:
        if not self._whole:
            self._env.close_made()  # pyright: ignore[reportAttributeAccessIssue]  # PettingZoo's: there is no other


class _Timed(_Through):
    """One whose `reset` and `step` may take only so long."""

    def __init__(self, env: HostEnv, limit: TimeLimit):
        super().__init__(env)
        self._limit = limit

    def reset(self, seeds: Any) -> TimeStep:
        with self._limit(f"reset of {self.spec.name}"):
            return self._env.reset(seeds)

    def step(self, actions: Any, seeds: Any) -> TimeStep:
        with self._limit(f"step of {self.spec.name}"):
            return self._env.step(actions, seeds)
