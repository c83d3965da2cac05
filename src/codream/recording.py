"""What becomes of a run's steps: lines of metrics, checkpoints, looks at how it plays; and whether it is done."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from codream import checkpoint as checkpoints
from codream import retention
from codream.config import Config
from codream.envs import EnvSpec
from codream.health import STEPS, TrainingDiverged, faults
from codream.live import Live, live_table
from codream.metrics import Sums
from codream.progress import Bar
from codream.report.peek import Peek
from codream.runs import Run
from codream.saving import MetricsFile, Saver
from codream.scoring import Scorer
from codream.training import Runner

__all__ = ["Record", "Tally"]


class Tally:
    """What of a run is done, and what is due: all that a process knows which does not keep it (`codream.hosts`)."""

    def __init__(self, config: Config, rollbacks: int = 0):
        self.config, self.rollbacks = config, rollbacks
        self.totals: Sums | None = None  # since the last line
        self.done = False
        self.failed: TrainingDiverged | None = None
        self.begin(0)

    def begin(self, steps: int) -> None:
        """Metrics and checkpoints are counted from `steps`."""
        self.steps = self._logged = self.saved = steps
        self.totals = None

    @property
    def name(self) -> str:
        return f"seed {self.config.seed}"

    @property
    def open(self) -> bool:
        """Whether it still trains."""
        return not self.done and self.failed is None

    @property
    def complete(self) -> bool:
        return self.steps >= self.config.total_steps

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.complete or _passed(self.config.checkpoint_every, self.saved, self.steps)

    def writes(self, steps: int) -> bool:
        """Whether there will be something to write once so many steps are done."""
        since = ((self.config.log_every, self._logged), (self.config.checkpoint_every, self.saved))
        return steps >= self.config.total_steps or any(_passed(every, before, steps) for every, before in since)

    def take(self, steps: int, runner: Callable[[], Runner]) -> None:
        """Steps have been taken: log and look at them if it is time to."""
        self.steps = steps
        if _passed(self.config.log_every, self._logged, self.steps):
            self._log()
            self._look(runner)

    def save(self, runner: Runner) -> None:
        """Keep the run as it is now."""
        self._log()
        self._keep(runner)
        self.saved, self.done = self.steps, self.complete

    def diverged(self) -> TrainingDiverged:
        """What is not finite, and since which step."""
        totals = jax.device_get(self.totals)
        return TrainingDiverged(f"{faults(totals)} at step {self._logged + int(totals[STEPS][0])}")

    def earlier(self, template: Runner) -> Runner | None:
        """The runner of the last checkpoint; None where there is none yet, or none that this process knows of."""
        return None

    def roll_back(self, steps: int) -> None:
        """Forget what came after `steps`."""
        self.rollbacks += 1
        self.begin(steps)

    def how_to_go_on(self) -> str:
        return "The first process says how to go on."

    def wait(self) -> None:
        """Until nothing is being written."""

    def finish(self) -> None:
        """At the end of training: see to it that all is written."""

    def _log(self) -> None:
        self.totals, self._logged = None, self.steps

    def _look(self, runner: Callable[[], Runner]) -> None: ...

    def _keep(self, runner: Runner) -> None: ...


class Record(Tally):
    """Writes down one run while it trains.

    `bar`: shared with the runs that train together; `shown`: whether this one's metrics stand beside and below it.
    """

    def __init__(
        self,
        run: Run,
        spec: EnvSpec,
        config: Config,
        bar: Bar,
        live: Live,
        *,
        peek: Peek | None = None,
        score: Scorer | None = None,
        rollbacks: int = 0,
        shown: bool = True,
    ):
        self.run, self.spec, self.bar, self.live, self.peek = run, spec, bar, live, peek
        self.shown, self._about = shown, run.about
        self.metrics = MetricsFile(run.path / "metrics.jsonl", bar.warn)
        self.saver = Saver(run, config, spec, self.metrics, bar.warn, score)
        last = run.metrics()[-1:]
        self._before = last[0]["seconds"] if last else 0.0  # spent before this process
        self._began = time.monotonic()
        super().__init__(config, rollbacks)

    @property
    def name(self) -> str:
        return self.run.path.name

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._line_began = time.monotonic()

    def _keep(self, runner: Runner) -> None:
        if self.metrics.flush():
            self.saver.save(runner, self.steps, self.rollbacks)
            self._note(f"checkpoint {self.steps:,} (waited {self.saver.measured['checkpoint/stall_seconds']:.2f} s)")

    def earlier(self, template: Runner) -> Runner | None:
        self.wait()
        if not retention.saved(self.run.checkpoints):
            return None
        return checkpoints.restore(template, checkpoints.latest_good(self.run.path, self.bar.warn))

    def roll_back(self, steps: int) -> None:
        super().roll_back(steps)
        retention.set_aside(self.run.checkpoints, steps)
        self.metrics.rewind(steps)
        self.run.rewind(self.config, steps)
        self.live.rewind(steps)

    def wait(self) -> None:
        self.saver.wait()

    def finish(self) -> None:
        self.saver.finish(self.steps)

    def how_to_go_on(self) -> str:
        self.wait()
        every = retention.saved(self.run.checkpoints)
        where = f"The last checkpoint is {every[max(every)]}" if every else "There is no checkpoint yet"
        return f"{where}; {'go on' if every else 'start over'} with\n  {self.run.to_resume()}"

    def _log(self) -> None:
        """Write a line of means."""
        if self.totals is None:
            return
        totals = jax.device_get(self.totals)
        now = time.monotonic()
        speed = (self.steps - self._logged) / max(now - self._line_began, 1e-9)
        means = {name: float(total) / float(count) for name, (total, count) in totals.items() if count > 0}
        # Sums over episodes, such as the reward collected so far, need their number.
        ended = totals[f"episode/return/{self.spec.agents[0]}"][1]
        measured, self.saver.measured = self.saver.measured, {}
        line = {
            "steps": self.steps,
            "seconds": round(self._before + now - self._began, 3),
            "steps_per_second": round(speed, 2),
            "episode/count": int(ended),
            **means,
            **measured,
        }
        if self.rollbacks:
            line["rollbacks"] = self.rollbacks
        self._recreate()
        self.metrics.add(line)
        self.live.scalars(line)
        self._show(means)
        self._line_began = now
        super()._log()

    def _show(self, means: dict[str, float]) -> None:
        returns = []
        for side, members in self.spec.sides.items():
            names = [f"episode/return/{self.spec.agents[i]}" for i in members]
            if all(name in means for name in names):
                returns.append(f"{side} {np.mean([means[name] for name in names]):.1f}")
        if returns:
            self._note("returns: " + ", ".join(returns))
        if self.shown:
            self.bar.below(live_table(means, self.spec))

    def _note(self, text: str) -> None:
        if self.shown:
            self.bar.note(text)

    def _look(self, runner: Callable[[], Runner]) -> None:
        """Show how it plays so far; what goes wrong with that must not stop training."""
        if self.peek is None or not self.peek.due(time.monotonic() - self._began):
            return
        began = time.monotonic()
        try:
            self._note("playing, for TensorBoard")
            self.bar.update(self.steps)
            self.peek.look(runner().state, self.steps)
        except Exception as err:
            self.bar.say(f"no more looks at this run while it trains: {type(err).__name__}: {err}")
            self.peek = None
        self._line_began += time.monotonic() - began  # it says how fast training is

    def _recreate(self) -> None:
        """Make the folder anew if someone has removed it."""
        if not (self.run.path / "config.json").exists():
            self.run.write(self.config, self._about)
            self.saved = -1  # a checkpoint is due
            self.bar.warn(f"{self.run.path} was removed; made anew, without what it held")


def _passed(every: int, since: int, steps: int) -> bool:
    return steps // every > since // every
