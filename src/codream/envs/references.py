"""Fixed opponents to measure against: random, still, and scripted ones for simple_tag.

Self-play return says little in a competitive game, so trained agents play against these, which never change.
Every reference is one object with `act(timestep, rng) -> actions` for all agents at once, with any leading
axes before the agents (copies, seeds, …) and no loop over them. It works on NumPy arrays with a
`numpy.random.Generator` and, inside compiled programs, on JAX arrays with a JAX key.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.envs import EnvSpec, TimeStep
from codream.envs.actions import idle_action

__all__ = ["Chase", "Flee", "Random", "Reference", "Still", "references_for"]

_Array = Array | np.ndarray

CHASE_LEAD = 0.3  # seconds of relative motion by which a predator aims ahead
WALL_PUSH = 4.3  # strength of the walls against 1/d² predators; fitted to the published figures of `flee`


@runtime_checkable
class Reference(Protocol):
    """A policy that does not learn, for every agent of an environment."""

    def act(self, timestep: TimeStep, rng: np.random.Generator | PRNGKeyArray) -> Int[_Array, "*b agents"]:
        """Actions of all agents, allowed by `timestep.mask`; callers use the columns of their own side."""
        ...


class Random:
    """Uniform over the allowed actions."""

    def act(self, timestep: TimeStep, rng: np.random.Generator | PRNGKeyArray) -> Int[_Array, "*b agents"]:
        mask = timestep.mask
        xp = _library(mask)
        noise = rng.random(mask.shape) if isinstance(rng, np.random.Generator) else jax.random.uniform(rng, mask.shape)
        return xp.argmax(xp.where(mask, noise, -1.0), axis=-1).astype(xp.int32)


@dataclasses.dataclass(frozen=True)
class Still:
    """Always the same action, that which does nothing; or the first allowed one."""

    action: int = 0

    def act(self, timestep: TimeStep, rng: np.random.Generator | PRNGKeyArray) -> Int[_Array, "*b agents"]:
        del rng
        mask = timestep.mask
        xp = _library(mask)
        return _allowed(mask, xp.full(mask.shape[:-1], min(self.action, mask.shape[-1] - 1), xp.int32))


@dataclasses.dataclass(frozen=True)
class _TagLayout:
    """Where things lie in the observations of simple_tag.

    Everyone sees [own velocity 2, own position 2, landmarks 2 each, other agents 2 each], the last two
    relative to itself; then the velocities of the good agents (other than itself).
    """

    predators: tuple[int, ...]
    prey: tuple[int, ...]
    landmarks: int

    @classmethod
    def of(cls, spec: EnvSpec) -> _TagLayout | None:
        """None if this is not simple_tag, or not as everyone sees all others (partial observability)."""
        sides = spec.sides
        if "simple_tag" not in spec.name or set(sides) != {"adversary", "agent"} or spec.is_image:
            return None
        predators, prey = sides["adversary"], sides["agent"]
        if predators + prey != tuple(range(spec.num_agents)):
            return None
        rest = spec.obs_shapes[0][0] - 4 - 2 * (spec.num_agents - 1) - 2 * len(prey)
        layout = cls(predators, prey, landmarks=rest // 2)
        good = 4 + rest + 2 * (spec.num_agents - 1) + 2 * (len(prey) - 1)
        return layout if rest >= 0 and spec.obs_shapes[prey[0]] == (good,) else None

    @property
    def others(self) -> int:
        """Where the positions of the others begin."""
        return 4 + 2 * self.landmarks

    @property
    def velocities(self) -> int:
        """Where the velocities of the good agents begin."""
        return self.others + 2 * (len(self.predators) + len(self.prey) - 1)


@dataclasses.dataclass(frozen=True)
class Chase:
    """Predators of simple_tag: one step along the larger axis of x + 0.3 v.

    x is the position and v the velocity of the nearest prey, both relative to the predator. The other side
    stands still.
    """

    layout: _TagLayout

    def act(self, timestep: TimeStep, rng: np.random.Generator | PRNGKeyArray) -> Int[_Array, "*b agents"]:
        del rng
        lay, xp = self.layout, _library(timestep.obs)
        obs = timestep.obs[..., : len(lay.predators), :]
        # The others come in the agents' order without oneself, so a predator sees the other predators first.
        start = lay.others + 2 * (len(lay.predators) - 1)
        prey = _pairs(obs[..., start : start + 2 * len(lay.prey)])
        motion = _pairs(obs[..., lay.velocities : lay.velocities + 2 * len(lay.prey)]) - obs[..., None, :2]
        nearest = xp.argmin((prey**2).sum(-1), axis=-1)[..., None, None]
        aim = xp.take_along_axis(prey + CHASE_LEAD * motion, nearest, axis=-2)[..., 0, :]
        return _allowed(timestep.mask, _place(timestep, slice(0, len(lay.predators)), _toward(aim)))


@dataclasses.dataclass(frozen=True)
class Flee:
    """Prey of simple_tag: one step along the larger axis of − Σ_i x_i / d_i² − 4.3 p³.

    x_i is the position of predator i relative to the prey and d_i its distance, so the nearest count most;
    p is the prey's own position, whose cube (per axis) turns it back near the walls at ±1. Close predators
    outweigh the walls. The other side stands still.
    """

    layout: _TagLayout

    def act(self, timestep: TimeStep, rng: np.random.Generator | PRNGKeyArray) -> Int[_Array, "*b agents"]:
        del rng
        lay = self.layout
        obs = timestep.obs[..., len(lay.predators) :, :]
        predators = _pairs(obs[..., lay.others : lay.others + 2 * len(lay.predators)])
        weight = 1.0 / ((predators**2).sum(-1, keepdims=True) + 1e-6)
        aim = -(weight * predators).sum(-2) - WALL_PUSH * obs[..., 2:4] ** 3
        return _allowed(timestep.mask, _place(timestep, slice(len(lay.predators), None), _toward(aim)))


def references_for(spec: EnvSpec) -> dict[str, dict[str, Reference]]:
    """The references that each side of an environment can be measured against, by name.

    `random` and `still` exist for every side; simple_tag (of either family) adds `chase` for the adversaries
    and `flee` for the good agents.
    """
    still = Still(idle_action(spec))
    found: dict[str, dict[str, Reference]] = {side: {"random": Random(), "still": still} for side in spec.sides}
    layout = _TagLayout.of(spec)
    if layout is not None:
        found["adversary"]["chase"] = Chase(layout)
        found["agent"]["flee"] = Flee(layout)
    return found


# ---------------------------------------------------------------------------------- arrays of either library


def _library(array: Any) -> ModuleType:
    return jnp if isinstance(array, jax.Array) else np


def _first_allowed(mask: Bool[_Array, "*b agents actions"]) -> Int[_Array, "*b agents"]:
    xp = _library(mask)
    return xp.argmax(mask, axis=-1).astype(xp.int32)


def _allowed(mask: Bool[_Array, "*b agents actions"], actions: Int[_Array, "*b agents"]) -> Int[_Array, "*b agents"]:
    xp = _library(mask)
    fine = xp.take_along_axis(mask, actions[..., None], axis=-1)[..., 0]
    return xp.where(fine, actions, _first_allowed(mask))


def _pairs(flat: Float[_Array, "*b twice"]) -> Float[_Array, "*b things 2"]:
    return flat.reshape(*flat.shape[:-1], -1, 2)


def _toward(aim: Float[_Array, "*b 2"]) -> Int[_Array, "*b"]:
    """The move along the larger axis: 1 is −x, 2 is +x, 3 is −y, 4 is +y."""
    xp = _library(aim)
    x, y = aim[..., 0], aim[..., 1]
    return xp.where(abs(x) >= abs(y), xp.where(x > 0, 2, 1), xp.where(y > 0, 4, 3)).astype(xp.int32)


def _place(timestep: TimeStep, columns: slice, actions: Int[_Array, "*b some"]) -> Int[_Array, "*b agents"]:
    """Actions of some agents among zeros for the others."""
    xp = _library(actions)
    count = timestep.mask.shape[-2]
    first, stop, _ = columns.indices(count)
    widths = [(0, 0)] * (actions.ndim - 1) + [(first, count - stop)]
    return xp.pad(actions, widths)
