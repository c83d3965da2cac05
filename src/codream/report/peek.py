"""Looking at a run while it trains: now and then cross-play and a dream beside reality, for its TensorBoard events."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

from codream.agents import Agents
from codream.config import Config
from codream.evaluation import evaluate
from codream.live import Live
from codream.memory import give_back
from codream.model_quality import record
from codream.playing import stage
from codream.report.film import film
from codream.report.measures import scenes_of
from codream.report.sections import standing_markdown

__all__ = ["Peek"]

SHARE = 0.03  # of the wall-clock, at most
GUESS = 6.0  # seconds that a first look takes
EPISODES = 10  # of every pairing
LIMIT = 200  # steps of the episode that is shown


class Peek:
    """Plays a little with the current policies. Training goes on from the same state and keys as without.

    `make`: copies of the run's environment.
    """

    def __init__(self, name: str, config: Config, live: Live, make: Callable[[int], Any]):
        self._name, self._config, self._live, self._make = name, config, live, make
        self._agents: Agents | None = None  # kept, for what was compiled for it
        self.spent, self._cost = 0.0, GUESS

    def due(self, elapsed: float) -> bool:
        """Whether another look keeps all of them within SHARE of the time since training began."""
        return self.spent + self._cost <= SHARE * elapsed

    def look(self, state: Any, steps: int) -> None:
        """Play, and publish the cross-play table and one episode beside its dream."""
        began = time.monotonic()
        if self._agents is None:
            self._agents = Agents(
                state, self._config, steps=steps, env=None, make=self._make, name=f"{self._name} so far"
            )
        agents = self._agents
        agents.state, agents.steps = state.for_acting(), steps
        result = evaluate(agents, episodes=EPISODES, progress=False)
        table = standing_markdown({"cross_play": dataclasses.asdict(result) | {"conditions": result.conditions()}})
        with contextlib.closing(stage(agents, 1)) as env:
            played = record(env, agents.player(), 1, seed=1, limit=LIMIT)
        scenes = scenes_of(agents, played, [("so far", 0)])
        self._live.pictures(steps, table, film(scenes[0], 0, agents.spec.sides))
        del result, played, scenes
        gc.collect()  # figures are large, and go in circles
        give_back()
        self._cost = time.monotonic() - began
        self.spent += self._cost
