"""Copies of a PettingZoo environment that one process steps: what they answer, as arrays.

Imports nothing of codream, so that a process that only steps them imports no JAX either (`codream.envs.workers`).
"""

from __future__ import annotations

import copy as copying
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

__all__ = ["Copies", "CopyFailed", "Layout", "Rows", "Source", "called", "misshapen", "raised"]


class CopyFailed(RuntimeError):
    """A copy raised, or answered against its own spaces; `__cause__` is its own error, if it has one."""


def raised(name: str, call: str, copy: int, step: int, err: Exception) -> str:
    """What is said of a copy that raised."""
    return f"{name}: {call} of copy {copy} raised at step {step} of its episode: {type(err).__name__}: {err}"


_RETURNS = {"reset": ("obs", "infos"), "step": ("obs", "rewards", "terminations", "truncations", "infos")}


def misshapen(call: str, answer: Any) -> str | None:
    """What is wrong with the values that `reset` or `step` returned; None if they are as many as they should be, and
    each by agent.

    A dictionary of as many agents would be taken apart as if it were those values.
    """
    wanted = _RETURNS[call]
    if not isinstance(answer, tuple | list) or len(answer) != len(wanted):
        got = f"{len(answer)} values" if isinstance(answer, tuple | list) else type(answer).__name__
        return f"{call} must return ({', '.join(wanted)}), got {got}"
    for name, value in zip(wanted, answer, strict=True):
        if not hasattr(value, "keys"):
            return f"{call} must return {name} by agent, {{agent: …}}, got {type(value).__name__}"
    return None


def called(env: Any) -> str:
    """What a user calls an object: module:name of a class or function, without the address in memory."""
    if inspect.ismodule(env):
        return env.__name__
    if isinstance(env, functools.partial):
        return f"a partial of {called(env.func)}"
    if not hasattr(env, "__qualname__"):
        return f"an instance of {called(type(env))}"
    module = str(env.__module__)
    ours = module.startswith("codream.")  # it has got a name that tells more, see `codream.envs.own.apart`
    return env.__qualname__ if ours else f"{module}:{env.__qualname__}"


class Layout(NamedTuple):
    """What the arrays of an environment look like; see `codream.envs.EnvSpec`."""

    name: str
    obs_shape: tuple[int, ...]
    obs_dtype: np.dtype
    num_actions: tuple[int, ...]
    has_mask: bool


@dataclasses.dataclass
class Rows:
    """The arrays of one answer, filled copy by copy."""

    obs: Shaped[np.ndarray, "*copies_agents_shape"]
    mask: Bool[np.ndarray, "copies agents actions"]
    reward: Float[np.ndarray, "copies agents"]
    terminal: Bool[np.ndarray, "copies agents"]
    acting: Bool[np.ndarray, "copies agents"]
    first: Bool[np.ndarray, " copies"]
    last: Bool[np.ndarray, " copies"]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The copies of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Rows(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rows)})


class Copies:
    """Environments of one kind, stepped one after the other.

    `encoders`: for each agent what makes arrays of its observations (`codream.envs.spaces.Encoder`). `start`: the
    number of the first one among all copies, for messages.
    """

    def __init__(self, envs: list[Any], encoders: list[Any], layout: Layout, start: int = 0) -> None:
        self.envs = envs
        self._encoders, self._layout, self._start = encoders, layout, start
        self._ids = list(envs[0].possible_agents)
        self._known = set(self._ids)
        self._steps = np.zeros(len(envs), int)  # steps of each copy's episode, for messages
        self._finished = np.zeros((len(envs), len(self._ids)), bool)
        self._now: Rows | None = None

    def reset(self, seeds: list[int]) -> Rows:
        """Start an episode in every copy. Raises CopyFailed."""
        rows = self._empty(len(self.envs))
        for c, seed in enumerate(seeds):
            self._reset_copy(rows, c, seed)
        return self._answer(rows)

    def step(self, actions: list[list[int]], seeds: list[int]) -> Rows:
        """Step every copy with its agents' actions as the environment counts them; one whose last answer was `last` is
        reset with its seed instead. Raises CopyFailed."""
        before = self._now
        assert before is not None  # `PettingZooEnv` has seen to it
        rows = self._empty(len(self.envs))
        for c, seed in enumerate(seeds):
            if before.last[c]:
                self._reset_copy(rows, c, seed)
            else:
                self._step_copy(rows, before, c, actions[c])
        return self._answer(rows)

    def encode(self, obs: Mapping[Any, Any], infos: Mapping[Any, Any], *, first: bool) -> Rows:
        """What a copy would have answered with these raw observations. Raises CopyFailed where it may not answer so."""
        rows = self._empty(1)
        rows.first[0] = first
        for i, agent in enumerate(self._ids):
            if agent in obs:
                rows.acting[0, i] = True
                self._write(rows, 0, i, obs[agent], infos)
        self._check_numbers(rows)
        return rows

    def close(self, first: int = 0) -> None:
        """Close the copies from `first` on; nothing else needs an environment to have a `close`."""
        for env in self.envs[first:]:
            if hasattr(env, "close"):
                env.close()

    def _empty(self, copies: int) -> Rows:
        layout = self._layout
        places = (copies, len(self._ids))
        valid = np.arange(max(layout.num_actions)) < np.asarray(layout.num_actions)[:, None]
        return Rows(
            obs=np.zeros((*places, *layout.obs_shape), layout.obs_dtype),
            mask=np.repeat(valid[None], copies, axis=0),
            reward=np.zeros(places, np.float32),
            terminal=np.zeros(places, bool),
            acting=np.zeros(places, bool),
            first=np.zeros(copies, bool),
            last=np.zeros(copies, bool),
        )

    def _answer(self, rows: Rows) -> Rows:
        self._check_numbers(rows)
        self._now = rows
        return rows

    def _check_numbers(self, rows: Rows) -> None:
        for what, values in (("observation", rows.obs), ("reward", rows.reward)):
            if not np.isfinite(values).all():
                c, i = np.argwhere(~np.isfinite(values))[0][:2]
                raise self._wrong(int(c), f"{what} of {self._ids[i]} is not finite: {values[c, i]}")

    # ------------------------------------------------------------------------------------ one copy

    def _reset_copy(self, rows: Rows, c: int, seed: int) -> None:
        self._steps[c] = 0
        self._finished[c] = False
        env = self.envs[c]
        try:
            answer = env.reset(seed=seed)
            live = set(env.agents)
        except Exception as err:
            raise self._failure("reset", c, err) from err
        if wrong := misshapen("reset", answer):
            raise self._wrong(c, wrong)
        obs, infos = answer
        rows.first[c] = True
        for i, agent in enumerate(self._ids):
            if agent in live:
                if agent not in obs:
                    raise self._wrong(c, f"no observation of {agent}, which is in env.agents")
                rows.acting[c, i] = True
                self._write(rows, c, i, obs[agent], infos)
        self._check_agents(c, live, rows)

    def _step_copy(self, rows: Rows, before: Rows, c: int, actions: list[int]) -> None:
        self._steps[c] += 1
        env = self.envs[c]
        try:
            present = set(env.agents)
            chosen = {agent: actions[i] for i, agent in enumerate(self._ids) if agent in present}
            answer = env.step(chosen)
            live = set(env.agents)
        except Exception as err:
            raise self._failure("step", c, err) from err
        if wrong := misshapen("step", answer):
            raise self._wrong(c, wrong)
        obs, rewards, terminations, truncations, infos = answer
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

    def _write(self, rows: Rows, c: int, i: int, raw: Any, infos: Mapping[Any, Any]) -> None:
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
            info = infos.get(self._ids[i]) or {}
            if not hasattr(info, "keys"):
                raise self._wrong(c, f"expected a dictionary as info of {self._ids[i]}, got {type(info).__name__}")
            mask = info.get("action_mask")
        if mask is not None and rows.acting[c, i] and not self._layout.has_mask and not np.all(mask):
            raise self._wrong(
                c,
                f"{self._ids[i]} has an action mask, but no agent had one when the first episode began, so that "
                "nothing would learn of it; give one from reset on",
            )
        if mask is not None and rows.acting[c, i]:
            n = self._layout.num_actions[i]
            mask = np.asarray(mask)
            if mask.shape != (n,):
                raise self._wrong(c, f"action mask of {self._ids[i]}: expected shape ({n},), got {mask.shape}")
            if mask.any():
                rows.mask[c, i, :n] = mask.astype(bool)

    def _check_agents(self, c: int, live: set[Any], reset: Rows | None) -> None:
        if not live <= self._known:
            raise self._wrong(c, f"agents {sorted(map(str, live - self._known))} are not in possible_agents")
        if reset is not None and not reset.acting[c].any():
            raise self._wrong(c, "no agent acts after reset (env.agents is empty)")

    def _failure(self, call: str, c: int, err: Exception) -> CopyFailed:
        return CopyFailed(raised(self._layout.name, call, self._start + c, int(self._steps[c]), err))

    def _wrong(self, c: int, what: str) -> CopyFailed:
        return CopyFailed(f"{self._layout.name}: copy {self._start + c}, step {self._steps[c]} of its episode: {what}")


# ------------------------------------------------------------------------------------------ making copies


class Source(NamedTuple):
    """Where copies come from: a class or function with its keywords, or (without `kwargs`) an instance."""

    env: Any
    kwargs: dict[str, Any] | None

    def make(self, count: int, *, original: bool = False) -> list[Any]:
        """So many, with the parallel API. `original`: an instance itself is the first.

        Raises TypeError or ValueError where there cannot be so many, or not with that API.
        """
        made = self._copied(count, original) if self.kwargs is None else self._called(count, self.kwargs)
        return [_parallel(env) for env in made]

    def _called(self, count: int, kwargs: dict[str, Any]) -> list[Any]:
        made = [self.env(**kwargs) for _ in range(count)]
        if None in made:
            raise TypeError(f"{called(self.env)} returned None; it must make an environment")
        if inspect.ismodule(made[0]):
            there = "you want its parallel_env" if hasattr(made[0], "parallel_env") else "it must make an environment"
            raise TypeError(f"{called(self.env)} returned the module {called(made[0])}; {there}")
        if len({id(one) for one in made}) < count:
            raise TypeError(f"{called(self.env)} returned the same environment twice; it must make a new one each time")
        return made

    def _copied(self, count: int, original: bool) -> list[Any]:
        made = [self.env] if original else []
        try:
            return made + [copying.deepcopy(self.env) for _ in range(count - len(made))]
        except Exception as err:
            raise TypeError(
                f"several copies of the instance {type(self.env).__name__} cannot be made, because it cannot be "
                f"deep-copied ({err}); pass its class or a function that makes one"
            ) from err


def _parallel(env: Any) -> Any:
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
    graph = hasattr(getattr(env, "spec", None), "obs_shapes") and not hasattr(env, "num_envs")
    if missing and (graph or (hasattr(env, "step_env") and hasattr(env, "get_obs"))):
        raise TypeError(
            f"{type(env).__name__} is an environment inside JAX, of which one object serves all copies: pass that, not "
            "what makes it (on the command line name it: env = Game() in my_envs.py is --env-from my_envs:env)"
        )
    if missing:
        raise TypeError(f"expected a PettingZoo ParallelEnv, got {type(env).__name__}, which lacks {missing}")
    return env
