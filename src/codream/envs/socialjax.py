"""SocialJax's environments behind JaxMARL's interface, so that one adapter serves both.

SocialJax (Guo et al. 2025, arXiv:2503.14576) differs: agents are integers, observations and rewards are arrays with an
agent axis, actions are a list, and `step` resets by itself, so that the observation after an episode's last step is
already the next episode's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from codream.envs.jaxmarl import JaxMARLEnv

__all__ = ["SocialJaxEnv", "make_socialjax"]


def make_socialjax(name: str, **kwargs: Any) -> SocialJaxEnv:
    """Build a SocialJax environment from its registered name."""
    socialjax = importlib.import_module("socialjax")  # which this module is named after
    return SocialJaxEnv(socialjax.make(name, **kwargs), name=f"socialjax:{name}")


class SocialJaxEnv(JaxMARLEnv):
    """One copy of a SocialJax environment, as the `GraphEnv` protocol has it.

    Every episode ends by a time limit, so nothing is terminal. Grids are flattened; `float32`, whatever is declared.
    """

    def __init__(self, env: Any, name: str | None = None) -> None:
        super().__init__(_ByName(env), name=name or f"socialjax:{type(env).__name__}")

    def encode(self, obs: Any, infos: Mapping[Any, Any] | None = None, *, first: bool = False) -> Any:
        """As JaxMARL's; `obs` may be SocialJax's own array with an agent axis."""
        return super().encode({str(agent): one for agent, one in self._by_agent(obs).items()}, infos, first=first)

    def decode(self, actions: Int[np.ndarray, " agents"], obs: Any) -> dict[Any, int]:
        """The actions of the agents in these raw observations, by the names that these have."""
        return {agent: int(actions[int(agent)]) for agent in self._by_agent(obs)}


class _ByName:
    """A SocialJax environment whose agents are called "0", "1", …, each with its own entry in dictionaries."""

    family = "socialjax"

    def __init__(self, env: Any) -> None:
        self._env = env
        self.agents = [str(agent) for agent in env.agents]
        self.num_agents = len(self.agents)

    def _split(self, x: Any) -> dict[str, Any]:
        rows = jnp.asarray(x)
        rows = rows.reshape(self.num_agents, *rows.shape[1:])  # rewards of a single agent come without an axis
        return {agent: rows[i] for i, agent in enumerate(self.agents)}

    def reset(self, key: Any) -> tuple[dict[str, Any], Any]:
        obs, state = self._env.reset(key)
        return self._split(obs), state

    def step_env(self, key: Any, state: Any, actions: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        obs, state, reward, done, info = self._env.step(key, state, list(actions.values()))
        return self._split(obs), state, self._split(reward), done, info

    def action_space(self, agent: str) -> Any:
        """One space for all; some environments want the agent's number."""
        wants_agent = any(
            p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
            for p in inspect.signature(self._env.action_space).parameters.values()
        )
        return self._env.action_space(int(agent)) if wants_agent else self._env.action_space()
