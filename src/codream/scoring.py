"""The score by which a run keeps its best checkpoint: one number from a little cross-play."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from codream.agents import Agents
from codream.config import Config, ConfigError
from codream.envs import EnvSpec
from codream.envs.references import references_for
from codream.playing import as_host, play

__all__ = ["Scorer"]

MOST_COPIES = 20  # of the environment, played together
STREAM = 2  # of `play`: no episode that chose a checkpoint is one that `evaluate` judges it by


class Scorer:
    """`config.checkpoints_best`, SIDE:OPPONENT, as a function of a state: the mean return of one agent of SIDE in
    `checkpoints_best_episodes` episodes, always the same ones and none of `evaluate`'s, while OPPONENT plays all other
    sides.

    `make`: copies of the run's environment. Training goes on from the same state and keys as without. Raises
    ConfigError, with what there is, for a side or an opponent that does not exist.
    """

    def __init__(self, config: Config, spec: EnvSpec, make: Callable[[int], Any]):
        assert config.checkpoints_best is not None
        self._config, self._make = config, make
        self._side, _, opponent = config.checkpoints_best.rpartition(":")
        references = references_for(spec)
        others = [side for side in spec.sides if side != self._side]
        known = sorted(set.intersection(*(set(references.get(side, {})) for side in others))) if others else []
        if self._side not in spec.sides or opponent not in ("self", *known):
            raise ConfigError(
                f"checkpoints_best is SIDE:OPPONENT, with a side of {spec.name} ({', '.join(spec.sides)}) and one of "
                f"{', '.join(('self', *known))}; got {config.checkpoints_best}"
            )
        self._opponents = {side: references[side][opponent] for side in others} if opponent != "self" else {}
        self._agents: Agents | None = None  # kept, as is the environment, for what was compiled for it
        self._env: Any = None

    def __call__(self, state: Any, steps: int) -> float:
        if self._agents is None:
            self._agents = Agents(state, self._config, steps=steps, env=None, make=self._make, name="so far")
        agents, episodes = self._agents, self._config.checkpoints_best_episodes
        agents.state, agents.steps = state.for_acting(), steps
        if self._env is None:
            copies = min(episodes, MOST_COPIES)
            self._env = as_host(self._make(copies), copies)
        players = dict.fromkeys(agents.spec.sides, agents.player()) | self._opponents
        returns = play(self._env, players, episodes, seed=self._config.seed, stream=STREAM)
        return float(np.mean(returns[:, list(agents.spec.sides[self._side])]))

    def close(self) -> None:
        """Close the copies that were played on, if there were any."""
        if self._env is not None:
            self._env.close()
            self._env = None
