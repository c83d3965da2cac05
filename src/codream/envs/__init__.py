"""Environments: what codream needs to know of one, and the one shape in which all of them answer.

Two families stand behind one protocol. A *host* environment runs in Python and steps several copies at
once; a *graph* environment is a pair of pure JAX functions for one copy, which the driver maps over copies.
Both reset themselves in the step *after* an episode's last one, so that the last observation is never lost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.envs.registry import UnknownEnvironment, available_envs, make_named

__all__ = [
    "EnvSpec",
    "EnvironmentFailure",
    "GraphEnv",
    "HostEnv",
    "TimeStep",
    "UnknownEnvironment",
    "available_envs",
    "is_graph",
    "make_env",
]


class EnvironmentFailure(RuntimeError):
    """An environment raised in `reset` or `step`; `__cause__` is its own error."""


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """The shapes of one environment, with agents in a fixed order.

    Observations are either all vectors (of any lengths: they are zero-padded to the longest) or all
    images of one shape [height, width, channels] with entries in 0…255.
    """

    name: str
    agents: tuple[str, ...]
    obs_shapes: tuple[tuple[int, ...], ...]
    num_actions: tuple[int, ...]
    has_mask: bool = False

    def __post_init__(self) -> None:
        if not len(self.agents) == len(self.obs_shapes) == len(self.num_actions) > 0:
            raise ValueError(
                f"{self.name}: expected one observation shape and one action count for each of the agents "
                f"{self.agents}, got {self.obs_shapes} and {self.num_actions}"
            )
        if twice := sorted({agent for agent in self.agents if self.agents.count(agent) > 1}):
            raise ValueError(f"{self.name}: expected agents of different names, got {', '.join(twice)} more than once")
        if min(self.num_actions) < 1:
            counts = dict(zip(self.agents, self.num_actions, strict=True))
            raise ValueError(f"{self.name}: expected at least one action for each agent, got {counts}")
        ranks = {len(shape) for shape in self.obs_shapes}
        if ranks not in ({1}, {3}) or (ranks == {3} and len(set(self.obs_shapes)) > 1):
            raise ValueError(
                f"{self.name}: expected all observations to be vectors, or all to be images of one shape; "
                f"got {dict(zip(self.agents, self.obs_shapes, strict=True))}"
            )

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    @property
    def is_image(self) -> bool:
        return len(self.obs_shapes[0]) == 3

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of one agent's observation after padding."""
        return self.obs_shapes[0] if self.is_image else (max(shape[0] for shape in self.obs_shapes),)

    @property
    def obs_size(self) -> int:
        return math.prod(self.obs_shape)

    @property
    def obs_dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.is_image else np.float32)

    @property
    def max_actions(self) -> int:
        return max(self.num_actions)

    @property
    def action_offsets(self) -> tuple[int, ...]:
        """Number of actions of all agents before each one: ã = a + offset (scaled actions)."""
        return tuple(int(x) for x in np.cumsum((0, *self.num_actions[:-1])))

    @property
    def obs_valid(self) -> Bool[np.ndarray, "agents size"]:
        """True where an entry of the padded, flattened observation is real."""
        lengths = np.asarray([math.prod(shape) for shape in self.obs_shapes])
        return np.arange(self.obs_size) < lengths[:, None]

    @property
    def action_valid(self) -> Bool[np.ndarray, "agents actions"]:
        """True for the actions that an agent has, before any mask of the environment."""
        return np.arange(self.max_actions) < np.asarray(self.num_actions)[:, None]

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """Agents grouped by name up to the last underscore, e.g. `adversary` → (0, 1, 2)."""
        groups: dict[str, list[int]] = {}
        for i, agent in enumerate(self.agents):
            groups.setdefault(agent.rpartition("_")[0] or agent, []).append(i)
        return {side: tuple(members) for side, members in groups.items()}


class TimeStep(eqx.Module):
    """What an environment answers, with any leading axes (copies of the environment) before the agents.

    `reward` and `terminal` belong to the step that led here; `first` and `last` mark the ends of an episode.
    After `last` the next step resets, whatever the action. A time limit is `last` without `terminal`. An agent may
    begin to act later than others and stop earlier, but does not begin twice in one episode.
    """

    obs: Shaped[Array | np.ndarray, "*b_agents_shape"]  # [*b, agents, *obs_shape]
    mask: Bool[Array | np.ndarray, "*b agents actions"]  # actions that may be taken now
    reward: Float[Array | np.ndarray, "*b agents"]
    terminal: Bool[Array | np.ndarray, "*b agents"]  # a true end of this agent's episode, never a time limit
    acting: Bool[Array | np.ndarray, "*b agents"]  # takes an action here: present, not finished, not `last`
    first: Bool[Array | np.ndarray, "*b"]
    last: Bool[Array | np.ndarray, "*b"]

    @staticmethod
    def blank(spec: EnvSpec, copies: int) -> TimeStep:
        """In every copy nothing is there: what stands where no environment has answered yet."""
        places = (copies, spec.num_agents)
        return TimeStep(
            obs=jnp.zeros((*places, *spec.obs_shape), spec.obs_dtype),
            mask=jnp.zeros((*places, spec.max_actions), bool),
            reward=jnp.zeros(places),
            terminal=jnp.zeros(places, bool),
            acting=jnp.zeros(places, bool),
            first=jnp.zeros(copies, bool),
            last=jnp.zeros(copies, bool),
        )


@runtime_checkable
class HostEnv(Protocol):
    """Copies of a Python environment, stepped together. Arrays are NumPy's, copies are the leading axis."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        """Start an episode in every copy."""
        ...

    def step(self, actions: Int[np.ndarray, "copies agents"], seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        """Step every copy; one whose last answer was `last` is reset with its seed instead."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class GraphEnv(Protocol):
    """One copy of an environment as pure functions; `jax.vmap` them for more.

    The object must not change once it is made: programs that were compiled for it are kept by its identity, and would
    go on with what it was. For other settings make another one.
    """

    spec: EnvSpec

    def reset(self, key: PRNGKeyArray) -> tuple[Any, TimeStep]: ...

    def step(self, key: PRNGKeyArray, state: Any, actions: Int[Array, " agents"]) -> tuple[Any, TimeStep]:
        """Step, or reset if the state's last answer was `last`."""
        ...


def is_graph(env: Any) -> bool:
    """True for an in-graph environment (pure functions of one copy), False for a host environment.

    A host environment also has the attributes of `GraphEnv`, so `isinstance(env, GraphEnv)` does not tell.
    """
    return _is_ours(env) and not isinstance(env, HostEnv)


def _is_ours(env: Any) -> bool:
    # PettingZoo's and Gymnasium's environments have a `spec` too, of their own kind.
    return isinstance(env, GraphEnv) and isinstance(env.spec, EnvSpec)


def make_env(env: Any, num_envs: int = 1, *, env_workers: int = 1, **kwargs: Any) -> HostEnv | GraphEnv:
    """Build an environment from a name or an object.

    `env` is one of

    - a name from `available_envs()`: `mpe2:simple_tag_v3`, `butterfly:cooperative_pong_v6`,
      `jaxmarl:MPE_simple_tag_v3`, `jaxmarl:smax_3m`, `socialjax:coin_game`. The family and the version may be left
      out: a bare name is looked up in mpe2, then in butterfly, jaxmarl and socialjax, so `simple_tag` is mpe2's;
    - a PettingZoo environment (parallel, or AEC where PettingZoo can convert it), or a class, function or
      module that makes one: with `num_envs > 1` copies are needed, so give the maker;
    - a JaxMARL environment, or anything that already is a `HostEnv` or a `GraphEnv` (returned as it is).

    `num_envs` is the number of copies of a host environment; one of the graph is a single copy to `jax.vmap`.
    `env_workers`: processes that step the copies of a PettingZoo environment, this one among them; they are started by
    the first `reset` and leave with `close`. Other keywords go to the environment's own constructor.

    Raises `UnknownEnvironment` for a name that does not exist, `ModuleNotFoundError` with the command to type
    for a family that is not installed, `ValueError` or `TypeError` for an environment that codream cannot
    represent (continuous actions, images mixed with vectors, …), naming the agent and what is supported.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
    if isinstance(env, str):
        return make_named(env, num_envs, env_workers, kwargs)
    if _is_ours(env):
        _refuse_keywords(env, kwargs)
        if env_workers > 1:
            raise ValueError(
                f"env_workers={env_workers} processes were asked for, but {env.spec.name} is already made and has its "
                "copies; pass its class, a function that makes it, or its name"
            )
        if isinstance(env, HostEnv) and num_envs not in (1, env.num_envs):
            raise ValueError(
                f"{env.spec.name} has {env.num_envs} copies, but num_envs={num_envs} was asked for; leave num_envs out "
                "to have it as it is, or pass what was made with so many copies"
            )
        return env
    if hasattr(env, "step_env") and hasattr(env, "get_obs") and not isinstance(env, type):
        from codream.envs.jaxmarl import JaxMARLEnv

        _refuse_keywords(env, kwargs)
        return JaxMARLEnv(env)
    from codream.envs.pettingzoo import Again, PettingZooEnv

    if isinstance(env, Again):
        return env(num_envs, env_workers, kwargs)
    return PettingZooEnv(env, num_envs, kwargs=kwargs, workers=env_workers)


def _refuse_keywords(env: Any, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(
            f"keywords {sorted(kwargs)} go to an environment's constructor, but {type(env).__name__} is "
            "already made; pass its class, a function that makes it, or its name"
        )
