"""Host environments: any PettingZoo parallel environment, several copies stepped together.

Source of the interface: PettingZoo's parallel API (Terry et al. 2021, arXiv:2009.14471).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from codream.envs import EnvironmentFailure, EnvSpec, TimeStep
from codream.envs.copies import Copies, CopyFailed, Layout, Rows, Source, misshapen, raised
from codream.envs.spaces import Encoder, discrete
from codream.envs.workers import Worker, packed

if TYPE_CHECKING:
    from pettingzoo import ParallelEnv

__all__ = ["Again", "PettingZooEnv"]


class PettingZooEnv:
    """Copies of a PettingZoo environment behind the `HostEnv` protocol.

    `env` is a parallel environment, or a class, function or module that makes one (then `kwargs` are its
    keywords); AEC environments are converted by PettingZoo's own `aec_to_parallel`. Several copies need a
    maker, or an instance that can be deep-copied. With several `workers` the copies are stepped by as many
    processes, this one among them; what they answer does not depend on it.

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
        workers: int = 1,
    ) -> None:
        self.num_envs = num_envs
        self._shares = _shared_out(num_envs, workers)
        self._source = source = _source(env, dict(kwargs or {}))
        envs = source.make(self._shares[0].stop, original=True)
        one = envs[0]
        self._name = name or str(
            getattr(one, "metadata", {}).get("name") or type(getattr(one, "unwrapped", one)).__name__
        )
        self._ids = list(one.possible_agents)
        if not self._ids:
            raise ValueError(f"{self._name}: possible_agents is empty; it must name all agents before the first reset")
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
        self._now: Rows | None = None
        self.spec = EnvSpec(
            name=self._name,
            agents=agents,
            obs_shapes=tuple(e.shape for e in self._encoders),
            num_actions=tuple(int(space.n) for space in actions),
            has_mask=any(e.has_mask for e in self._encoders) or self._infos_have_mask(one),
        )
        self._layout = Layout(
            self._name, self.spec.obs_shape, self.spec.obs_dtype, self.spec.num_actions, self.spec.has_mask
        )
        self._copies = Copies(envs, self._encoders, self._layout)
        self._sent = packed(source, self._name) if len(self._shares) > 1 else b""
        self._workers: list[Worker] = []  # of all shares but the first; begun by the first `reset`

    def __repr__(self) -> str:
        return f"PettingZooEnv({self._name!r}, num_envs={self.num_envs})"

    def picture(self) -> Any:
        """What the first copy's own `render` gives, an RGB array; None where it gives none."""
        return self._copies.envs[0].render()

    def reset(self, seeds: Int[np.ndarray, " copies"]) -> TimeStep:
        """Start an episode in every copy, each with its own seed."""
        return self._all("reset", self._checked_seeds(seeds))

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
        return self._all("step", own, self._checked_seeds(seeds))

    def close(self) -> None:
        """Close every copy, and the processes that step some."""
        self._stop()
        self._copies.close()

    def close_made(self) -> None:
        """`close`, but an instance that was given, the first copy, stays open: whoever made it closes it."""
        self._stop()
        self._copies.close(first=int(self._source.kwargs is None))

    def encode(
        self, obs: Mapping[Any, Any], infos: Mapping[Any, Any] | None = None, *, first: bool = False
    ) -> TimeStep:
        """What `step` would answer for one copy with these raw observations: [1 copy, agents, …].

        Agents that are missing in `obs` do not act. Raises `ValueError` for an agent that the environment
        does not have, and without the infos in which it gives action masks; `EnvironmentFailure` for an
        observation that is not in its agent's space or not finite, and for an action mask of another length.
        """
        if not set(obs) <= set(self._ids):
            raise ValueError(
                f"{self._name} has the agents {', '.join(map(str, self._ids))}; got an observation of "
                f"{', '.join(sorted(map(str, set(obs) - set(self._ids))))}"
            )
        if infos is None and self.spec.has_mask and not any(encoder.has_mask for encoder in self._encoders):
            raise ValueError(
                f"{self._name} gives action masks in infos, without which agents would take what is not allowed: "
                "agents.act(obs, infos), with the infos of the same reset or step"
            )
        try:
            return TimeStep(**vars(self._copies.encode(obs, infos or {}, first=first)))
        except CopyFailed as err:
            raise EnvironmentFailure(str(err)) from err.__cause__

    def decode(self, actions: Int[np.ndarray, " agents"], obs: Mapping[Any, Any]) -> dict[Any, int]:
        """The actions of the agents in these raw observations as the environment's own `step` takes them."""
        own = dict(zip(self._ids, (actions + self._starts).tolist(), strict=True))
        return {agent: own[agent] for agent in obs}

    # ------------------------------------------------------------------------------------ all copies

    def _all(self, call: str, *each: list[Any]) -> TimeStep:
        """Every process does it with its copies at the same time, this one with the first. `each`: lists by copy."""
        here, *elsewhere = ([one[share] for one in each] for share in self._shares)
        try:
            if not self._workers:
                self._workers = [Worker(self._sent, self._layout, share) for share in self._shares[1:]]
            for worker, share in zip(self._workers, elsewhere, strict=True):
                worker.send(call, *share)
            parts = [getattr(self._copies, call)(*here)]
            parts += [worker.receive() for worker in self._workers]
        except BaseException as err:
            self._stop()  # what they would answer next is not known; `reset` starts others
            if isinstance(err, CopyFailed):
                raise EnvironmentFailure(str(err)) from err.__cause__
            raise
        self._now = Rows.joined(parts)
        return TimeStep(**vars(self._now))

    def _stop(self) -> None:
        self._now = None
        while self._workers:
            self._workers.pop().stop()

    def _checked_seeds(self, seeds: Int[np.ndarray, " copies"]) -> list[int]:
        seeds = np.asarray(seeds)
        if seeds.shape != (self.num_envs,):
            raise ValueError(f"expected one seed for each of the {self.num_envs} copies, got shape {seeds.shape}")
        return seeds.tolist()

    def _infos_have_mask(self, env: ParallelEnv) -> bool:
        """Whether `infos` carry action masks: only an episode's start can tell."""
        try:
            answer = env.reset(seed=0)
        except Exception as err:
            raise EnvironmentFailure(raised(self._name, "reset", 0, 0, err)) from err
        if wrong := misshapen("reset", answer):
            raise EnvironmentFailure(f"{self._name}: {wrong}")
        return any("action_mask" in (info or {}) for info in answer[1].values())


# ------------------------------------------------------------------------------------------ making copies


class Again(NamedTuple):
    """What makes more copies of the same environment, by the same name."""

    env: PettingZooEnv

    def __call__(self, num_envs: int, workers: int, kwargs: dict[str, Any]) -> PettingZooEnv:
        source = self.env._source
        if source.kwargs is None:  # an instance, which is the other's first copy
            maker, given = (lambda **more: _refused(more, source.env) or source.make(1)[0]), kwargs
        else:
            maker, given = source.env, source.kwargs | kwargs
        return PettingZooEnv(maker, num_envs, name=self.env._name, kwargs=given, workers=workers)


def _shared_out(copies: int, workers: int) -> list[slice]:
    """Which copies each process has."""
    if workers < 1:
        raise ValueError(f"env_workers: expected at least 1, got {workers}")
    workers = min(workers, copies)
    return [slice(k * copies // workers, (k + 1) * copies // workers) for k in range(workers)]


def _refused(kwargs: dict[str, Any], instance: Any) -> None:
    """Raise TypeError for keywords of what is already made."""
    if kwargs:
        raise TypeError(f"keywords {sorted(kwargs)} need a maker, but {type(instance).__name__} is an instance")


def _source(env: Any, kwargs: dict[str, Any]) -> Source:
    """Where copies come from. Raises TypeError for what makes none."""
    if hasattr(env, "parallel_env"):  # a module like mpe2.simple_tag_v3
        env = env.parallel_env
    if not isinstance(env, type) and hasattr(env, "step") and hasattr(env, "reset"):
        _refused(kwargs, env)
        return Source(env, None)
    if callable(env):
        return Source(env, kwargs)
    raise TypeError(
        "expected an environment's name, a PettingZoo environment, or a class or function that makes "
        f"one; got {type(env).__name__}"
    )
