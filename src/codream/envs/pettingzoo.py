"""Host environments: any PettingZoo parallel environment, several copies stepped together.

Source of the interface: PettingZoo's parallel API (Terry et al. 2021, arXiv:2009.14471).
"""

from __future__ import annotations

import copy as copying
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from codream.envs import EnvironmentFailure, EnvSpec, TimeStep
from codream.envs.spaces import Encoder, discrete

if TYPE_CHECKING:
    from pettingzoo import ParallelEnv

__all__ = ["PettingZooEnv"]


@dataclasses.dataclass
class _Rows:
    """The arrays of one answer, filled copy by copy."""

    obs: Shaped[np.ndarray, "*copies_agents_shape"]
    mask: Bool[np.ndarray, "copies agents actions"]
    reward: Float[np.ndarray, "copies agents"]
    terminal: Bool[np.ndarray, "copies agents"]
    acting: Bool[np.ndarray, "copies agents"]
    first: Bool[np.ndarray, " copies"]
    last: Bool[np.ndarray, " copies"]


class PettingZooEnv:
    """Copies of a PettingZoo environment behind the `HostEnv` protocol.

    `env` is a parallel environment, or a class, function or module that makes one (then `kwargs` are its
    keywords); AEC environments are converted by PettingZoo's own `aec_to_parallel`. Several copies need a
    maker, or an instance that can be deep-copied.

    Observations: vectors and anything that Gymnasium can flatten become float32 vectors (Discrete: one-hot);
    arrays of at least 16 × 16 that hold uint8, or floats within 0…1, are images, resized to 64 × 64 uint8
    with channels last. Action masks are taken from a Dict observation with the keys `observation` and
    `action_mask`, or from `infos[agent]["action_mask"]`; an agent that must act and whose mask is empty may
    take every action that it has.

    An agent that has finished, or that is not there yet, has `acting` False, a zero observation, reward 0 and
    an all-True mask; the row of the step that finished it still holds its last observation and reward.

    Raises `ValueError` or `TypeError` for spaces and objects that are not supported, and `EnvironmentFailure`
    where the environment itself raises or answers against its own spaces (wrong shape, NaN, missing agent).
    """

    spec: EnvSpec
    num_envs: int

    def __init__(
        self,
        env: Any,
        num_envs: int = 1,
        *,
        name: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self._envs = _copies(env, num_envs, dict(kwargs or {}))
        one = self._envs[0]
        self._name = name or str(
            getattr(one, "metadata", {}).get("name") or type(getattr(one, "unwrapped", one)).__name__
        )
        self._ids = list(one.possible_agents)
        self._known = set(self._ids)
        agents = tuple(str(agent) for agent in self._ids)
        self._encoders = [Encoder(f"{self._name}: {a}", one.observation_space(a)) for a in self._ids]
        shapes = {e.shape for e in self._encoders}
        if len({len(shape) for shape in shapes}) > 1 or (len(next(iter(shapes))) == 3 and len(shapes) > 1):
            got = {agent: e.shape for agent, e in zip(agents, self._encoders, strict=True)}
            raise ValueError(
                f"{self._name}: expected all observations to be vectors, or all to be images with the same "
                f"channels; got (after resizing) {got}"
            )
        actions = [discrete(f"{self._name}: {a}", one.action_space(a)) for a in self._ids]
        self._starts = np.asarray([int(space.start) for space in actions])
        self._steps = np.zeros(num_envs, int)  # steps of each copy's episode, for messages
        self._finished = np.zeros((num_envs, len(agents)), bool)
        self._now: _Rows | None = None
        self.spec = EnvSpec(
            name=self._name,
            agents=agents,
            obs_shapes=tuple(e.shape for e in self._encoders),
            num_actions=tuple(int(space.n) for space in actions),
            has_mask=any(e.has_mask for e in self._encoders) or self._infos_have_mask(),
        )
        self._valid = self.spec.action_valid

    def __repr__(self) -> str:
        return f"PettingZooEnv({self._name!r}, num_envs={self.num_envs})"

    def picture(self) -> Any:
        """What the first copy's own `render` gives, an RGB array; None where it gives none."""
        return self._envs[0].render()

    def reset(self, seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        """Start an episode in every copy, each with its own seed."""
        rows = self._empty()
        for c, seed in enumerate(self._checked_seeds(seeds)):
            self._reset_copy(rows, c, seed)
        return self._answer(rows)

    def step(self, actions: Int[np.ndarray, "copies agents"], seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        """Step every copy; one whose last answer was `last` is reset with its seed instead."""
        before = self._now
        if before is None:
            raise ValueError(f"{self._name}: call reset before step")
        actions = np.asarray(actions)
        if actions.shape != before.acting.shape:
            raise ValueError(f"expected actions of shape {before.acting.shape} (copies, agents), got {actions.shape}")
        wrong = before.acting & ((actions < 0) | (actions >= np.asarray(self.spec.num_actions)))
        if wrong.any():
            c, i = np.argwhere(wrong)[0]
            raise ValueError(
                f"{self._name}: {self.spec.agents[i]} of copy {c} has the actions "
                f"0…{self.spec.num_actions[i] - 1}, got {actions[c, i]}"
            )
        # A finished agent's row may hold anything; an environment that still reads it gets a valid action.
        own = (np.where(before.acting, actions, 0) + self._starts).tolist()
        rows = self._empty()
        for c, seed in enumerate(self._checked_seeds(seeds)):
            if before.last[c]:
                self._reset_copy(rows, c, seed)
            else:
                self._step_copy(rows, before, c, own[c])
        return self._answer(rows)

    def close(self) -> None:
        """Close every copy."""
        for env in self._envs:
            env.close()

    def encode(
        self, obs: Mapping[Any, Any], infos: Mapping[Any, Any] | None = None, *, first: bool = False
    ) -> TimeStep:
        """What `step` would answer for one copy with these raw observations: [1 copy, agents, …].

        Agents that are missing in `obs` do not act. Raises `ValueError` for an agent that the environment
        does not have, `EnvironmentFailure` for an observation that is not in its agent's space.
        """
        if not set(obs) <= self._known:
            raise ValueError(
                f"{self._name} has the agents {', '.join(map(str, self._ids))}; got an observation of "
                f"{', '.join(sorted(map(str, set(obs) - self._known)))}"
            )
        rows = self._empty(1)
        rows.first[0] = first
        for i, agent in enumerate(self._ids):
            if agent in obs:
                rows.acting[0, i] = True
                self._write(rows, 0, i, obs[agent], infos or {})
        return TimeStep(**vars(rows))

    # ------------------------------------------------------------------------------------ one copy

    def _reset_copy(self, rows: _Rows, c: int, seed: int) -> None:
        self._steps[c] = 0
        self._finished[c] = False
        env = self._envs[c]
        try:
            obs, infos = env.reset(seed=seed)
            live = set(env.agents)
        except Exception as err:
            raise self._failure("reset", c, err) from err
        rows.first[c] = True
        for i, agent in enumerate(self._ids):
            if agent in live:
                if agent not in obs:
                    raise self._wrong(c, f"no observation of {agent}, which is in env.agents")
                rows.acting[c, i] = True
                self._write(rows, c, i, obs[agent], infos)
        self._check_agents(c, live, rows)

    def _step_copy(self, rows: _Rows, before: _Rows, c: int, actions: list[int]) -> None:
        self._steps[c] += 1
        env = self._envs[c]
        try:
            present = set(env.agents)
            chosen = {agent: actions[i] for i, agent in enumerate(self._ids) if agent in present}
            obs, rewards, terminations, truncations, infos = env.step(chosen)
            live = set(env.agents)
        except Exception as err:
            raise self._failure("step", c, err) from err
        for i, agent in enumerate(self._ids):
            acted = bool(before.acting[c, i])
            if not acted and (self._finished[c, i] or agent not in live):
                continue  # gone, or not there yet
            ended = bool(terminations.get(agent, False))
            stays = agent in live and not ended and not truncations.get(agent, False)
            rows.acting[c, i] = stays
            self._finished[c, i] = not stays
            if acted:
                rows.terminal[c, i] = ended
                if agent not in rewards:
                    raise self._wrong(c, f"no reward for {agent}, which acted")
                try:
                    rows.reward[c, i] = rewards[agent]
                except (TypeError, ValueError) as err:
                    raise self._wrong(c, f"expected a number as reward of {agent}, got {rewards[agent]!r}") from err
            if agent in obs:
                self._write(rows, c, i, obs[agent], infos)
            elif stays:
                raise self._wrong(c, f"no observation of {agent}, which is in env.agents")
            else:
                rows.obs[c, i] = before.obs[c, i]
        self._check_agents(c, live, None)
        rows.last[c] = not rows.acting[c].any()

    def _write(self, rows: _Rows, c: int, i: int, raw: Any, infos: Mapping[Any, Any]) -> None:
        """Encode one agent's observation and mask into their rows."""
        encoder = self._encoders[i]
        mask = None
        try:
            if encoder.has_mask:
                raw, mask = raw["observation"], raw["action_mask"]
            if encoder.is_image:
                rows.obs[c, i] = encoder(raw)
            else:
                rows.obs[c, i, : encoder.shape[0]] = encoder(raw)
        except Exception as err:
            raise self._wrong(c, f"observation of {self._ids[i]}: {err}") from err
        if mask is None:
            mask = infos.get(self._ids[i], {}).get("action_mask")
        if mask is not None and rows.acting[c, i]:
            n = self.spec.num_actions[i]
            mask = np.asarray(mask)
            if mask.shape != (n,):
                raise self._wrong(c, f"action mask of {self._ids[i]}: expected shape ({n},), got {mask.shape}")
            if mask.any():
                rows.mask[c, i, :n] = mask.astype(bool)

    # ------------------------------------------------------------------------------------ all copies

    def _empty(self, copies: int | None = None) -> _Rows:
        spec, copies = self.spec, copies or self.num_envs
        places = (copies, spec.num_agents)
        return _Rows(
            obs=np.zeros((*places, *spec.obs_shape), spec.obs_dtype),
            mask=np.repeat(self._valid[None], copies, axis=0),
            reward=np.zeros(places, np.float32),
            terminal=np.zeros(places, bool),
            acting=np.zeros(places, bool),
            first=np.zeros(copies, bool),
            last=np.zeros(copies, bool),
        )

    def _answer(self, rows: _Rows) -> TimeStep:
        for what, values in (("observation", rows.obs), ("reward", rows.reward)):
            if not np.isfinite(values).all():
                c, i = np.argwhere(~np.isfinite(values))[0][:2]
                raise self._wrong(int(c), f"{what} of {self._ids[i]} is not finite: {values[c, i]}")
        self._now = rows
        return TimeStep(**{field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)})

    def _checked_seeds(self, seeds: Int[np.ndarray, " copies"]) -> list[int]:
        seeds = np.asarray(seeds)
        if seeds.shape != (self.num_envs,):
            raise ValueError(f"expected one seed for each of the {self.num_envs} copies, got shape {seeds.shape}")
        return seeds.tolist()

    def _check_agents(self, c: int, live: set[Any], reset: _Rows | None) -> None:
        if not live <= self._known:
            raise self._wrong(c, f"agents {sorted(map(str, live - self._known))} are not in possible_agents")
        if reset is not None and not reset.acting[c].any():
            raise self._wrong(c, "no agent acts after reset (env.agents is empty)")

    def _infos_have_mask(self) -> bool:
        """Whether `infos` carry action masks: only an episode's start can tell."""
        try:
            _, infos = self._envs[0].reset(seed=0)
        except Exception as err:
            raise self._failure("reset", 0, err) from err
        return any("action_mask" in info for info in infos.values())

    def _failure(self, call: str, c: int, err: Exception) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"{self._name}: {call} of copy {c} raised at step {self._steps[c]} of its episode: "
            f"{type(err).__name__}: {err}"
        )

    def _wrong(self, c: int, what: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self._name}: copy {c}, step {self._steps[c]} of its episode: {what}")


# ------------------------------------------------------------------------------------------ making copies


def _copies(env: Any, num_envs: int, kwargs: dict[str, Any]) -> list[ParallelEnv]:
    if hasattr(env, "parallel_env"):  # a module like mpe2.simple_tag_v3
        env = env.parallel_env
    if not isinstance(env, type) and hasattr(env, "step") and hasattr(env, "reset"):
        if kwargs:
            raise TypeError(f"keywords {sorted(kwargs)} need a maker, but {type(env).__name__} is an instance")
        made = [env]
        try:
            made += [copying.deepcopy(env) for _ in range(num_envs - 1)]
        except Exception as err:
            raise TypeError(
                f"num_envs={num_envs} copies of the instance {type(env).__name__} cannot be made, because it "
                f"cannot be deep-copied ({err}); pass its class or a function that makes one"
            ) from err
    elif callable(env):
        made = [env(**kwargs) for _ in range(num_envs)]
        if len({id(one) for one in made}) < num_envs:
            raise TypeError(f"{env!r} returned the same environment twice; it must make a new one at every call")
    else:
        raise TypeError(
            "expected an environment's name, a PettingZoo environment, or a class or function that makes "
            f"one; got {type(env).__name__}"
        )
    return [_parallel(one) for one in made]


def _parallel(env: Any) -> ParallelEnv:
    from pettingzoo.utils.conversions import aec_to_parallel
    from pettingzoo.utils.env import AECEnv

    if isinstance(env, AECEnv):
        if not env.metadata.get("is_parallelizable", False):
            raise ValueError(
                f"{env} is a turn-based (AEC) environment, and its metadata do not say `is_parallelizable`; "
                "only environments in which all agents act at once are supported"
            )
        env = aec_to_parallel(env)
    missing = [m for m in ("possible_agents", "observation_space", "action_space", "step") if not hasattr(env, m)]
    if missing:
        raise TypeError(f"expected a PettingZoo ParallelEnv, got {type(env).__name__}, which lacks {missing}")
    return env
