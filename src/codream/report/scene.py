"""From observations back to the plane: where the agents and landmarks of an MPE game are, as one agent sees them.

An observation of MPE holds positions relative to its owner. Where it also holds the owner's own position the picture is
that of the arena; otherwise the owner stands in the middle.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from jaxtyping import Float, Shaped

from codream.envs import EnvSpec

__all__ = ["Layout", "layouts"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things lie in one agent's observation."""

    focal: int
    own: int | None
    """Index of its own position; None if it is not told."""
    landmarks: tuple[int, ...]
    """Index of each landmark's relative position."""
    others: dict[int, int]
    """Index of each other agent's relative position."""

    def agents(self, obs: Shaped[np.ndarray, "*b size"], count: int) -> Float[np.ndarray, "*b agents 2"]:
        """Positions of all agents, in their order."""
        own = self._own(obs)
        seen = {j: own + self._pair(obs, at) for j, at in self.others.items()}
        return np.stack([own if j == self.focal else seen[j] for j in range(count)], axis=-2)

    def places(self, obs: Shaped[np.ndarray, "*b size"]) -> Float[np.ndarray, "*b landmarks 2"]:
        """Positions of the landmarks."""
        own = self._own(obs)
        found = [own + self._pair(obs, at) for at in self.landmarks]
        return np.stack(found, axis=-2) if found else np.zeros((*obs.shape[:-1], 0, 2))

    def _own(self, obs: Shaped[np.ndarray, "*b size"]) -> Float[np.ndarray, "*b 2"]:
        return np.zeros((*obs.shape[:-1], 2)) if self.own is None else self._pair(obs, self.own)

    def _pair(self, obs: Shaped[np.ndarray, "*b size"], at: int) -> Float[np.ndarray, "*b 2"]:
        return np.asarray(obs[..., at : at + 2], float)


def layouts(spec: EnvSpec) -> tuple[Layout, ...] | None:
    """The layout of every agent's observation, for simple, simple_spread, simple_tag and simple_adversary as everyone
    sees all others; None for any other environment, or where the lengths do not fit."""
    name = re.sub(r"_v\d+$", "", spec.name.rpartition(":")[2].removeprefix("MPE_"))
    if spec.is_image or name not in _GAMES:
        return None
    found = tuple(_GAMES[name](spec, i, spec.obs_shapes[i][0]) for i in range(spec.num_agents))
    return None if any(one is None for one in found) else found  # type: ignore[return-value]


def _layout(spec: EnvSpec, i: int, own: int | None, at: int, room: int) -> Layout | None:
    """Landmarks fill what the `room` from `at` on leaves beside the other agents."""
    others = 2 * (spec.num_agents - 1)
    marks = (room - others) // 2
    if room < others or (room - others) % 2:
        return None
    end = at + 2 * marks
    rest = [j for j in range(spec.num_agents) if j != i]
    return Layout(i, own, tuple(range(at, end, 2)), {j: end + 2 * k for k, j in enumerate(rest)})


def _simple(spec: EnvSpec, i: int, size: int) -> Layout | None:
    return _layout(spec, i, None, 2, size - 2)


def _spread(spec: EnvSpec, i: int, size: int) -> Layout | None:
    said = 2 * (spec.num_agents - 1)  # two numbers of communication from each other agent
    return _layout(spec, i, 2, 4, size - 4 - said)


def _tag(spec: EnvSpec, i: int, size: int) -> Layout | None:
    prey = spec.sides.get("agent", ())
    velocities = 2 * len([j for j in prey if j != i])
    return _layout(spec, i, 2, 4, size - 4 - velocities)


def _adversary(spec: EnvSpec, i: int, size: int) -> Layout | None:
    goal = 0 if i in spec.sides.get("adversary", ()) else 2
    return _layout(spec, i, None, goal, size - goal)


_GAMES = {"simple": _simple, "simple_spread": _spread, "simple_tag": _tag, "simple_adversary": _adversary}
