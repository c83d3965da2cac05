"""In-graph environments: JaxMARL's, one copy as a pair of pure functions.

JaxMARL's own `step` resets by itself and loses an episode's last observation, so everything here goes through
`step_env`. Source of the per-family facts: JaxMARL 0.2.0 (Rutherford et al. 2024, arXiv:2311.10090).
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num, PRNGKeyArray

from codream.envs import EnvSpec, TimeStep
from codream.envs.spaces import IMAGE_SIZE, SMALLEST_IMAGE

__all__ = ["GraphState", "JaxMARLEnv", "make_jaxmarl"]

# The end of an episode is only ever a time limit in these families, so nothing there is terminal.
_TIME_LIMIT_ONLY = frozenset({"mpe", "coin_game", "storm", "overcooked", "overcooked_v2", "socialjax"})
# Agents of these families finish one by one. (A dead SMAX ally does not: it keeps the action "stop" and, so
# that a noble sacrifice pays, its share of the team's reward; its episode is over with the battle.)
_FINISH_ONE_BY_ONE = frozenset({"jaxnav"})
# Keywords of environments whose actions are continuous unless told otherwise.
_DISCRETE = {"MPE_simple_world_comm_v3": {"action_type": "Discrete"}, "jaxnav": {"act_type": "Discrete"}}


class GraphState(eqx.Module):
    """State of one copy: JaxMARL's own, and what the last answer said."""

    inner: Any
    acting: Bool[Array, " agents"]
    last: Bool[Array, ""]


@contextlib.contextmanager
def _own_output() -> Iterator[None]:
    """Import JaxMARL without its effects on our output.

    It prints which optional packages it did not find, and sets `sys.stdout` and `sys.stderr` back to the
    process's own, past any redirection.
    """
    before = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = before


def make_jaxmarl(name: str, **kwargs: Any) -> JaxMARLEnv:
    """Build a JaxMARL environment from its registered name, or `smax_<map>` against the heuristic enemy."""
    with _own_output():
        import jaxmarl
        from jaxmarl.environments.smax import map_name_to_scenario

    if name.startswith("smax_"):
        kwargs = {"scenario": map_name_to_scenario(name.removeprefix("smax_")), **kwargs}
        return JaxMARLEnv(jaxmarl.make("HeuristicEnemySMAX", **kwargs), name=f"jaxmarl:{name}")
    if name == "MPE_simple_tag_v3" and kwargs.get("num_good_agents", 1) > 1:
        raise ValueError(
            f"jaxmarl:{name} with num_good_agents={kwargs['num_good_agents']}: JaxMARL's rewards and shapes "
            "are wrong with two or more good agents; use num_good_agents=1, or mpe2:simple_tag_v3"
        )
    if name == "overcooked" and isinstance(kwargs.get("layout"), str):
        kwargs = kwargs | {"layout": _overcooked_layout(kwargs["layout"])}
    return JaxMARLEnv(jaxmarl.make(name, **_DISCRETE.get(name, {}) | kwargs), name=f"jaxmarl:{name}")


def _overcooked_layout(name: str) -> Any:
    from jaxmarl.environments.overcooked import overcooked_layouts

    if name not in overcooked_layouts:
        raise ValueError(f"overcooked has the layouts {', '.join(overcooked_layouts)}, got {name!r}")
    return overcooked_layouts[name]


class JaxMARLEnv:
    """One copy of a JaxMARL environment, as the `GraphEnv` protocol has it.

    Observations are flattened to float32 vectors and zero-padded; rank-3 ones of at least 16 × 16 with 1, 3
    or 4 channels are images, resized to 64 × 64. Corrected: MPE episodes have `max_steps` steps (JaxMARL's
    have one more) and simple_tag's landmarks start within ±0.9, both as in mpe2; rewards are float32. A time
    limit is `last` and not `terminal`. coin_game and storm begin anew within their own last step, so there the last
    observation is the next board's, and the last reward 0. Agents that JaxMARL calls 0, 1, … are `agent_0`,
    `agent_1`, … Of an environment that is none of JaxMARL's the time limit is known where its state has `step` and it
    has `max_steps`; any other end is a `terminal`, of all agents at once.

    Raises `ValueError` for continuous actions and for observations that EnvSpec cannot hold.
    """

    spec: EnvSpec

    def __init__(self, env: Any, name: str | None = None) -> None:
        self._env = env
        self._ids = list(env.agents)
        self._family = _family(env)
        name = name or f"jaxmarl:{getattr(env, 'name', type(env).__name__)}"
        if self._family == "mpe" and type(env).__name__ == "SimpleTagMPE" and env.num_good_agents > 1:
            raise ValueError(f"{name}: JaxMARL's rewards and shapes are wrong with two or more good agents")
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        obs, inner = jax.eval_shape(self._reset_inner, key)
        agents = tuple(f"agent_{agent}" if str(agent).isdigit() else str(agent) for agent in self._ids)
        num_actions = tuple(_num_actions(env, a, name) for a in self._ids)
        self._has_mask = self._find_mask(inner, num_actions)
        # Shapes of what really comes out: the declared spaces are sometimes wrong.
        self.spec = EnvSpec(
            name=name,
            agents=agents,
            obs_shapes=tuple(map(_obs_shape, obs)),
            num_actions=num_actions,
            has_mask=self._has_mask,
        )
        # Of images, before they are resized.
        self._raw_shapes = [jax.tree.leaves(one)[0].shape for one in obs] if self.spec.is_image else []
        self._image_scale = 255.0 if self.spec.is_image and _unit_interval(env, self._ids[0]) else 1.0
        # Some resets return Python scalars or other dtypes than steps do; branches must agree.
        stepped, _ = jax.eval_shape(self._transition, key, self._wrap(inner), jnp.zeros(len(agents), jnp.int32))
        self._dtypes = jax.tree.map(lambda x: x.dtype, stepped.inner)

    def __repr__(self) -> str:
        return f"JaxMARLEnv({self.spec.name!r})"

    def reset(self, key: PRNGKeyArray) -> tuple[GraphState, TimeStep]:
        """Start an episode."""
        obs, inner = self._reset_inner(key)
        inner = jax.tree.map(_as, inner, self._dtypes)
        state = self._wrap(inner)
        num_agents = self.spec.num_agents
        return state, TimeStep(
            obs=self._observe(obs),
            mask=self._mask(inner, state.acting),
            reward=jnp.zeros(num_agents, jnp.float32),
            terminal=jnp.zeros(num_agents, bool),
            acting=state.acting,
            first=jnp.asarray(True),
            last=jnp.asarray(False),
        )

    def step(self, key: PRNGKeyArray, state: GraphState, actions: Int[Array, " agents"]) -> tuple[GraphState, TimeStep]:
        """Step, or start the next episode if the state's last answer was `last`."""
        return jax.lax.cond(
            state.last,
            lambda: self.reset(key),
            lambda: self._transition(key, state, actions),
        )

    def encode(self, obs: Any, infos: Mapping[Any, Any] | None = None, *, first: bool = False) -> TimeStep:
        """What `step` would answer for one copy that gave these raw observations: [1 copy, agents, …].

        `obs`: {agent: observation}, or however the environment puts them. Agents that are missing do not act;
        `infos[agent]["action_mask"]` may hold masks. Raises `ValueError` for an agent that the environment does not
        have, and for an observation or a mask of another shape, or one that is not finite.
        """
        spec, obs = self.spec, self._by_agent(obs)
        if unknown := [str(agent) for agent in obs if agent not in self._ids]:
            raise ValueError(
                f"{spec.name} has the agents {', '.join(map(str, self._ids))}; got an observation of "
                f"{', '.join(unknown)}"
            )
        rows = np.zeros((spec.num_agents, *spec.obs_shape), spec.obs_dtype)
        mask = spec.action_valid.copy()
        for i, agent in enumerate(self._ids):
            if agent not in obs:
                continue
            if spec.is_image:
                image = np.asarray(obs[agent])
                self._check_raw(agent, "observation", image, self._raw_shapes[i])
                rows[i] = _resize(jnp.asarray(image), self._image_scale)
            else:
                row = np.asarray(_flatten(jax.tree.map(jnp.asarray, obs[agent])))
                self._check_raw(agent, "observation", row, spec.obs_shapes[i])
                rows[i, : row.size] = row
            legal = (infos or {}).get(agent, {}).get("action_mask")
            if legal is not None:
                legal = np.asarray(legal, bool)
                self._check_raw(agent, "action mask", legal, (spec.num_actions[i],))
                if legal.any():
                    mask[i, : spec.num_actions[i]] = legal
        acting = np.asarray([agent in obs for agent in self._ids])
        nothing = np.zeros((1, spec.num_agents))
        return TimeStep(
            obs=rows[None],
            mask=mask[None],
            reward=nothing.astype(np.float32),
            terminal=nothing.astype(bool),
            acting=acting[None],
            first=np.asarray([first]),
            last=np.asarray([False]),
        )

    def decode(self, actions: Int[np.ndarray, " agents"], obs: Any) -> dict[Any, int]:
        """The actions of the agents in these raw observations, by the environment's own names."""
        own = dict(zip(self._ids, actions.tolist(), strict=True))
        return {agent: own[agent] for agent in self._by_agent(obs)}

    # ------------------------------------------------------------------------------------ parts

    def _check_raw(self, agent: Any, what: str, given: np.ndarray, shape: tuple[int, ...]) -> None:
        """Raise ValueError for what would else be padded, broadcast or acted upon in silence."""
        if given.shape != shape:
            raise ValueError(
                f"{self.spec.name}: expected the {what} of {agent} in the shape {shape}, got {given.shape}; give it "
                "as the environment's own reset and step do"
            )
        if not np.isfinite(given).all():
            raise ValueError(f"{self.spec.name}: the {what} of {agent} is not finite: {given[~np.isfinite(given)][0]}")

    def _by_agent(self, obs: Any) -> dict[Any, Any]:
        """{agent: observation} of what `reset` and `step` give, without what is no agent's (`world_state`)."""
        if _is_storm(obs):
            obs = _per_agent(obs, self._ids)
        by_agent = obs if isinstance(obs, Mapping) else dict(enumerate(obs))
        return {agent: one for agent, one in by_agent.items() if agent != "world_state"}

    def _wrap(self, inner: Any) -> GraphState:
        return GraphState(inner, jnp.ones(len(self._ids), bool), jnp.asarray(False))

    def _reset_inner(self, key: PRNGKeyArray) -> tuple[list[Any], Any]:
        """Observations in the agents' order, and JaxMARL's state."""
        obs, inner = self._env.reset(key)
        if self._family == "mpe" and type(self._env).__name__ == "SimpleTagMPE":
            # mpe2 draws landmarks within ±0.9, JaxMARL within ±1.
            inner = inner.replace(p_pos=inner.p_pos.at[self._env.num_agents :].multiply(0.9))
            obs = self._env.get_obs(inner)
        return _per_agent(obs, self._ids), inner

    def _transition(
        self, key: PRNGKeyArray, state: GraphState, actions: Int[Array, " agents"]
    ) -> tuple[GraphState, TimeStep]:
        env, ids, was = self._env, self._ids, state.acting
        # Environments whose agents are 0, 1, … read actions by position.
        by_agent = list(actions) if isinstance(ids[0], int) else dict(zip(ids, actions, strict=True))
        obs, inner, rewards, dones, _ = env.step_env(key, state.inner, by_agent)
        last = jnp.asarray(dones["__all__"], bool)
        if self._family == "mpe":
            last = last | (inner.step >= env.max_steps)  # JaxMARL compares the step before, and so plays one more
        if self._family in _FINISH_ONE_BY_ONE:
            finished = jnp.stack([jnp.asarray(dones[a], bool) for a in ids])
        else:
            finished = jnp.broadcast_to(last, was.shape)
        terminal = was & finished & self._true_end(state.inner, inner, actions)
        acting = was & ~finished & ~last
        reward = jnp.stack([jnp.asarray(rewards[a], jnp.float32) for a in ids])
        rows = self._observe(_per_agent(obs, ids))
        rows = jnp.where(was.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros_like(rows))
        return GraphState(inner, acting, last), TimeStep(
            obs=rows,
            mask=self._mask(inner, acting),
            reward=jnp.where(was, reward, 0.0),
            terminal=terminal,
            acting=acting,
            first=jnp.asarray(False),
            last=last,
        )

    def _true_end(self, before: Any, after: Any, actions: Int[Array, " agents"]) -> Bool[Array, "*agents"]:
        """Given that an agent's episode is over: was it the game that ended it (and not the clock)?"""
        env = self._env
        if self._family in _TIME_LIMIT_ONLY:
            return jnp.asarray(False)
        if self._family == "smax":
            game = after if hasattr(after, "unit_alive") else after.state
            allies, enemies = game.unit_alive[: env.num_allies], game.unit_alive[env.num_allies :]
            return ~jnp.any(allies) | ~jnp.any(enemies)
        if self._family == "switch_riddle":
            return actions[before.agent_in_room] == env.game_actions["TELL"]
        if self._family == "jaxnav":
            return after.goal_reached | after.move_term
        if hasattr(after, "step") and hasattr(env, "max_steps"):
            return after.step < env.max_steps
        return jnp.asarray(True)

    def _observe(self, obs: list[Any]) -> Num[Array, "agents ..."]:
        spec = self.spec
        if spec.is_image:
            return jnp.stack([_resize(one, self._image_scale) for one in obs])
        rows = [_flatten(one) for one in obs]
        return jnp.stack([jnp.pad(row, (0, spec.obs_size - row.size)) for row in rows])

    def _legal(self, inner: Any) -> Any:
        # Hanabi has the same thing by another name.
        legal = getattr(self._env, "get_legal_moves", None) or self._env.get_avail_actions
        return legal(inner)

    def _find_mask(self, inner: Any, num_actions: tuple[int, ...]) -> bool:
        if not hasattr(self._env, "get_legal_moves") and not hasattr(self._env, "get_avail_actions"):
            return False
        try:
            legal = jax.eval_shape(self._legal, inner)
        except NotImplementedError:
            return False
        # jaxnav answers with two entries, whatever its action space.
        return all(legal[a].shape == (n,) for a, n in zip(self._ids, num_actions, strict=True))

    def _mask(self, inner: Any, acting: Bool[Array, " agents"]) -> Bool[Array, "agents actions"]:
        valid = jnp.asarray(self.spec.action_valid)
        if not self._has_mask:
            return valid
        legal = self._legal(inner)
        most = self.spec.max_actions
        rows = [jnp.asarray(legal[a], bool) for a in self._ids]
        mask = jnp.stack([jnp.pad(row, (0, most - row.size)) for row in rows]) & valid
        usable = jnp.any(mask, axis=-1) & acting
        return jnp.where(usable[:, None], mask, valid)


# ------------------------------------------------------------------------------------ one environment's facts


def _family(env: Any) -> str:
    """Folder of JaxMARL that the environment, or its nearest ancestor there, lives in: `mpe`, `smax`, …; or what the
    environment says itself."""
    if isinstance(given := getattr(env, "family", None), str):
        return given
    for kind in type(env).__mro__:
        parts = kind.__module__.split(".")
        if parts[:2] == ["jaxmarl", "environments"] and len(parts) > 3:
            return parts[2]
    return ""


def _num_actions(env: Any, agent: Any, name: str) -> int:
    space = env.action_space(agent)
    if type(space).__name__ != "Discrete":
        raise ValueError(
            f"{name}: {agent} has the action space {type(space).__name__}, but only Discrete is supported; "
            'look for a keyword of the environment that makes actions discrete (e.g. act_type="Discrete")'
        )
    return int(space.n)


def _is_storm(obs: Any) -> bool:
    return isinstance(obs, dict) and set(obs) == {"observations", "inventory"}


def _per_agent(obs: Any, ids: list[Any]) -> list[Any]:
    """Observations in the agents' order; entries for others than agents (`world_state`) are left out."""
    if _is_storm(obs):
        # storm: one table [own coins 2, may interact, shown coins 2; agents] for all. An agent gets
        # its own column first, and of the others only what they show.
        table = [jnp.roll(obs["inventory"], -i, axis=1) for i in range(len(ids))]
        return [(obs["observations"][i], rows[:2, 0], rows[2:]) for i, rows in enumerate(table)]
    return [obs[a] for a in ids]


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape[:2]) >= SMALLEST_IMAGE and shape[2] in (1, 3, 4)


def _obs_shape(obs: Any) -> tuple[int, ...]:
    shapes = [leaf.shape for leaf in jax.tree.leaves(obs)]
    if len(shapes) == 1 and _is_image(shapes[0]):
        return (IMAGE_SIZE, IMAGE_SIZE, shapes[0][2])
    if any(_is_image(shape) for shape in shapes):
        raise ValueError(
            "expected an observation that is an image alone, or parts that can be flattened; "
            f"got parts of the shapes {shapes}"
        )
    return (int(sum(np.prod(shape, dtype=int) for shape in shapes)),)


def _unit_interval(env: Any, agent: Any) -> bool:
    high = getattr(env.observation_space(agent), "high", None)
    return high is not None and bool(np.all(np.asarray(high) <= 1))


def _as(x: Any, dtype: Any) -> Any:
    return x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)


def _flatten(obs: Any) -> Num[Array, " size"]:
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(obs)])


def _resize(obs: Any, scale: float) -> Num[Array, "height width channels"]:
    (image,) = jax.tree.leaves(obs)
    image = image.astype(jnp.float32) * scale
    image = jax.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE, image.shape[-1]), "linear")
    return jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)
