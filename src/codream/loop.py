"""The loop of training: advance the driver, log, save, go back where numbers went wrong, explain failures."""

from __future__ import annotations

import math
import time
from typing import Any

import equinox as eqx
import jax
import numpy as np

from codream import checkpoint as checkpoints
from codream.config import Config
from codream.envs import EnvironmentFailure
from codream.guards import LeaveRequests, Stopped
from codream.health import STEPS, TrainingDiverged, all_finite, faults
from codream.live import Live, live_table
from codream.mesh import placed
from codream.metrics import Metrics, add_metrics
from codream.progress import Bar
from codream.report.peek import Peek
from codream.runs import Run
from codream.saving import MetricsFile, Saver
from codream.scoring import Scorer
from codream.training import GraphDriver, HostDriver, Runner

__all__ = ["GRACE", "PATIENCE", "Loop"]

PATIENCE = 1_000
"""Steps that a due checkpoint waits for all copies to end their episodes at once, before they are cut."""

GRACE = 10.0
"""Seconds that a run which was asked to leave waits for a step from which it can be resumed exactly."""


@jax.jit
def _add(total: Metrics, more: Metrics) -> tuple[Metrics, Any]:
    """Sums of metrics, and whether all is finite."""
    total = add_metrics(total, more)
    return total, all_finite(total)


class Loop:
    """Advances the driver; logs, checkpoints, goes back where numbers went wrong, and explains failures."""

    def __init__(
        self,
        run: Run,
        driver: HostDriver | GraphDriver,
        config: Config,
        bar: Bar,
        live: Live,
        leave: LeaveRequests,
        peek: Peek | None = None,
        score: Scorer | None = None,
    ):
        self.run, self.driver, self.config, self.bar, self.live, self.peek = run, driver, config, bar, live, peek
        self.leave, self.about = leave, run.about
        self.metrics = MetricsFile(run.path / "metrics.jsonl", bar.warn)
        self.saver = Saver(run, config, driver.spec, self.metrics, bar.warn, score)
        self.steps = 0  # done
        self.logged = 0  # steps at the last line of metrics
        self.saved = 0  # steps at the last checkpoint
        self.rollbacks = 0
        self.totals: Metrics | None = None  # since the last line
        last = run.metrics()[-1:]
        self.before = last[0]["seconds"] if last else 0.0  # spent before this process
        self.began = self.line_began = time.monotonic()

    def go(self, runner: Runner | None, rollbacks: int = 0) -> None:
        """To the end of training."""
        self.rollbacks = rollbacks
        try:
            self.bar.say("compiling: the first steps take up to a minute (less when done before)")
            if runner is None:
                runner = self.driver.start(jax.random.key(self.config.seed))
            runner = placed(runner, self.config.devices)
            self._from(runner)
            while True:
                try:
                    self._steps(runner)
                    break
                except TrainingDiverged as err:
                    runner = self._rolled_back(err)
            self.saver.finish(self.steps)
        except EnvironmentFailure as err:
            raise EnvironmentFailure(
                f"{err}\nThis was after step {self.steps} of the run. {self._how_to_go_on()}"
            ) from err
        except KeyboardInterrupt as err:
            self.bar.warn(f"{err or 'interrupted'} after step {self.steps}. {self._how_to_go_on()}")
            raise
        finally:
            self.saver.wait()

    def _from(self, runner: Runner) -> None:
        self.steps = self.logged = self.saved = int(runner.state.steps)
        self.totals, self.line_began = None, time.monotonic()

    def _steps(self, runner: Runner) -> None:
        waited, first, leave_by = 0, True, math.inf
        while True:
            runner, metrics = self.driver.advance(runner)
            if self.totals is None:
                self.totals = jax.tree.map(lambda x: np.zeros((), x.dtype), metrics)
            self.totals, fine = _add(self.totals, metrics)
            self.steps, fine = map(int, jax.device_get((runner.state.steps, fine)))
            if not fine:
                self._diverged()
            if first:
                self.bar.restart_clock(self.steps)
                first = False
            done = self.steps >= self.config.total_steps
            if self._passed(self.config.log_every, self.logged):
                self._log()
                self._look(runner)
            if self.leave.asked and leave_by == math.inf:
                leave_by = time.monotonic() + GRACE
            due = done or self._passed(self.config.checkpoint_every, self.saved)
            if due or self.leave.asked:
                waited += due
                whole = self.driver.whole(runner)
                # No cut for a signal: going on would not give what the uninterrupted run gives.
                if whole or waited > PATIENCE:
                    runner = runner if whole else self.driver.cut(runner)
                    self._save(runner)
                    waited = 0
                    if done:
                        self.bar.update(self.steps, last=True)
                        return
                if self.leave.asked and (self.saved == self.steps or time.monotonic() > leave_by):
                    raise Stopped(self.leave.asked)
            self.bar.update(self.steps)

    def _look(self, runner: Runner) -> None:
        """Show how it plays so far; what goes wrong with that must not stop training."""
        if self.peek is None or not self.peek.due(time.monotonic() - self.began):
            return
        began = time.monotonic()
        try:
            self.bar.note("playing, for TensorBoard")
            self.bar.update(self.steps)
            self.peek.look(runner.state, self.steps)
        except Exception as err:
            self.bar.say(f"no more looks at this run while it trains: {type(err).__name__}: {err}")
            self.peek = None
        self.line_began += time.monotonic() - began  # it says how fast training is

    def _passed(self, every: int, since: int) -> bool:
        return self.steps // every > since // every

    def _log(self) -> None:
        """Write a line of means."""
        if self.totals is None:
            return
        totals = jax.device_get(self.totals)
        now = time.monotonic()
        speed = (self.steps - self.logged) / max(now - self.line_began, 1e-9)
        means = {name: float(total) / float(count) for name, (total, count) in totals.items() if count > 0}
        # Sums over episodes, such as the reward collected so far, need their number.
        ended = totals[f"episode/return/{self.driver.spec.agents[0]}"][1]
        measured, self.saver.measured = self.saver.measured, {}
        line = {
            "steps": self.steps,
            "seconds": round(self.before + now - self.began, 3),
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
        self.bar.below(live_table(means, self.driver.spec))
        returns = []
        for side, members in self.driver.spec.sides.items():
            names = [f"episode/return/{self.driver.spec.agents[i]}" for i in members]
            if all(name in means for name in names):
                returns.append(f"{side} {np.mean([means[name] for name in names]):.1f}")
        if returns:
            self.bar.note("returns: " + ", ".join(returns))
        self.totals, self.logged, self.line_began = None, self.steps, now

    def _diverged(self) -> None:
        totals = jax.device_get(self.totals)
        at = self.logged + int(totals[STEPS][0])
        raise TrainingDiverged(f"{faults(totals)} at step {at}")

    def _rolled_back(self, err: TrainingDiverged) -> Runner:
        """The runner of the last checkpoint (or a new one) with another key, if the configuration says so; otherwise
        raise, and say how to go on."""
        self.saver.wait()
        if self.config.on_nan == "stop" or self.rollbacks >= self.config.rollbacks:
            tried = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise TrainingDiverged(
                f"{err}; training has stopped{tried} and nothing of this was saved. {self._how_to_go_on()}\n"
                "A lower learning rate may help: --world-model.lr, --agents.lr, --ppo.lr; --on-nan rollback goes on "
                "from the last checkpoint by itself, with other random numbers"
            ) from err
        self.rollbacks += 1
        if checkpoints.saved(self.run.checkpoints):
            found = checkpoints.latest_good(self.run.path, self.bar.warn)
            runner = checkpoints.restore(self.driver.template(), found)
            self.driver.rest()
        else:
            runner = self.driver.start(jax.random.key(self.config.seed))
        # Another key: with the same one the same would happen.
        runner = eqx.tree_at(lambda r: r.key, runner, jax.random.fold_in(runner.key, self.rollbacks))
        runner = placed(runner, self.config.devices)
        self._from(runner)
        checkpoints.set_aside(self.run.checkpoints, self.steps)
        self.run.rewind(self.config, self.steps)
        self.live.rewind(self.steps)
        self.bar.warn(
            f"{err}; going on from step {self.steps} with a new key (rollback {self.rollbacks} of at most "
            f"{self.config.rollbacks})"
        )
        return runner

    def _save(self, runner: Runner) -> None:
        self._log()
        if self.metrics.flush():
            self.saver.save(runner, self.steps, self.rollbacks)
            self.bar.note(f"checkpoint {self.steps:,} (waited {self.saver.measured['checkpoint/stall_seconds']:.2f} s)")
        self.saved = self.steps

    def _recreate(self) -> None:
        """Make the folder anew if someone has removed it."""
        if not (self.run.path / "config.json").exists():
            self.run.write(self.config, self.about)
            self.saved = -1  # a checkpoint is due
            self.bar.warn(f"{self.run.path} was removed; made anew, without what it held")

    def _how_to_go_on(self) -> str:
        self.saver.wait()
        every = checkpoints.saved(self.run.checkpoints)
        where = f"The last checkpoint is {every[max(every)]}" if every else "There is no checkpoint yet"
        return f"{where}; {'go on' if every else 'start over'} with\n  codream train --resume {self.run.path}"
