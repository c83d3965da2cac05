"""From flat observations back to a grid of cells with things in them, for the grid worlds whose layout is known."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from codream.envs import EnvSpec

__all__ = ["Grid", "Thing", "grids"]


@dataclasses.dataclass(frozen=True)
class Thing:
    """What one channel of the grid marks. `agent`: the number of the agent that it is, or that it belongs to."""

    kind: Literal["agent", "coin"]
    agent: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one agent's flat observation is laid out: [height, width, things], 1 where a thing is."""

    focal: int
    height: int
    width: int
    things: tuple[Thing, ...]

    def cells(self, obs: Shaped[np.ndarray, "*b size"]) -> Float[np.ndarray, "*b cells things"]:
        """How sure it is that a thing is in a cell, 0 to 1; row by row."""
        size = self.height * self.width * len(self.things)
        cells = np.asarray(obs, float)[..., :size].reshape(*obs.shape[:-1], self.height * self.width, len(self.things))
        return np.clip(cells, 0.0, 1.0)


def grids(spec: EnvSpec) -> tuple[Grid, ...] | None:
    """The grid that every agent sees; None for environments whose layout is not known here."""
    if spec.name == "jaxmarl:coin_game" and spec.obs_shapes == ((36,), (36,)):
        # Each sees where it is itself, then the other, its own coin, the other's coin.
        return tuple(
            Grid(i, 3, 3, (Thing("agent", i), Thing("agent", 1 - i), Thing("coin", i), Thing("coin", 1 - i)))
            for i in range(2)
        )
    return None
