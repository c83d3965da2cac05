"""The loop of training: advance runs, have them written down, go back where numbers went wrong, explain failures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from codream.checkpoint import CheckpointError
from codream.envs import EnvironmentFailure
from codream.guards import LeaveRequests, Stopped
from codream.health import TrainingDiverged
from codream.hosts import from_first, most, perhaps_from_first
from codream.memory import give_back, give_back_large
from codream.metrics import Sums, added
from codream.progress import Bar
from codream.recording import Tally
from codream.together import Runs
from codream.training import Runner

__all__ = ["GRACE", "PATIENCE", "Loop"]

PATIENCE = 1_000
"""Steps that a due checkpoint waits for all copies to end their episodes, before those that go on are cut."""

GRACE = 10.0
"""Seconds that a run which was asked to leave waits for a step from which it can be resumed exactly."""


@jax.jit
def _add(totals: tuple[Sums, ...], more: tuple[Sums, ...]) -> tuple[tuple[Sums, ...], Bool[Array, " runs"]]:
    """Sums of the metrics of each run, and whether all is finite there."""
    totals = jax.tree.map(added, totals, more)
    return totals, jnp.stack([jnp.all(jnp.isfinite(total.numbers)) for total in totals])


class Loop:
    """Advances `runs`, of which `records` writes one each.

    On several hosts every process goes through the same loop; what they could judge differently they agree upon.
    """

    def __init__(self, runs: Runs, records: Sequence[Tally], bar: Bar, leave: LeaveRequests):
        self.runs, self.records, self.bar, self.leave = runs, records, bar, leave
        self.driver = runs.driver
        self._fine: Any = None  # of the step before

    def go(self, begun: Sequence[Runner | None]) -> None:
        """To the end of training, from these runners, or for None from the start.

        A run that diverges does not stop those that train together with it; TrainingDiverged comes at the end.
        """
        give_back_large()
        try:
            self.bar.say("compiling: the first steps take up to a minute (less when done before)")
            self._steps(begun)
            self._finish()
        except EnvironmentFailure as err:
            raise EnvironmentFailure(
                f"{err}\nThis was after step {self._done} of the run. {self._how_to_go_on()}"
            ) from err
        except KeyboardInterrupt as err:
            self.bar.warn(f"{err or 'interrupted'} after step {self._done}. {self._how_to_go_on()}")
            raise
        finally:
            for record in self.records:
                record.wait()

    def _finish(self) -> None:
        unwritten = []
        for record in self.records:
            try:
                if record.failed is None:
                    record.finish()
            except CheckpointError as err:
                unwritten.append(str(err))
        if unwritten:
            raise CheckpointError("\n".join(unwritten))
        failed = [record.failed for record in self.records if record.failed is not None]
        if failed:
            raise TrainingDiverged("\n".join(map(str, failed))) from failed[0]

    @property
    def _done(self) -> int:
        """Steps of the run that has the furthest to go, of those that go on."""
        sound = [record for record in self.records if record.failed is None] or self.records
        return min(record.steps for record in [r for r in sound if r.open] or sound)

    def _how_to_go_on(self) -> str:
        return "\n".join(record.how_to_go_on() for record in self.records if record.open)

    def _steps(self, begun: Sequence[Runner | None]) -> None:
        runners = self.runs.join(
            [
                self._start(record) if runner is None else runner
                for runner, record in zip(begun, self.records, strict=True)
            ]
        )
        for record, steps in zip(self.records, self.runs.steps(runners), strict=True):
            record.begin(steps)
        waited, first, leave_by = 0, True, math.inf
        while any(record.open for record in self.records):
            (asked,) = most(self.leave.asked or 0)
            runners, metrics = self.runs.advance(runners)
            runners = self._taken(runners, metrics, bool(asked))
            if first:
                give_back()  # what compiling left
                self.bar.restart_clock(self._done)
                first = False
            if asked and leave_by == math.inf:
                leave_by = time.monotonic() + GRACE
            due = most(*[record.due for record in self.records])
            for run, record in enumerate(self.records):
                if not record.open or not (due[run] or asked):
                    continue
                waited += due[run]
                runner = self.runs.member(runners, run)
                whole = self.driver.whole(runner)
                # Neither held nor cut for a signal: going on would not give what the uninterrupted run gives.
                if due[run] and not whole:
                    self.driver.hold()
                if whole or waited > PATIENCE:
                    if not whole:
                        runner = self.driver.cut(runner)
                        runners = self.runs.replaced(runners, run, runner)
                    record.save(runner)
                    waited = 0
            left = [record for record in self.records if record.open]
            self.bar.update(self._done, last=not left)
            if left and asked:
                unkept, late = most(any(record.saved != record.steps for record in left), time.monotonic() > leave_by)
                if late or not unkept:
                    raise Stopped(asked)

    def _start(self, record: Tally) -> Runner:
        """A new runner, of the first host's making."""
        runner = self.driver.start(jax.random.key(record.config.seed))
        return from_first(lambda: runner, runner)

    def _taken(self, runners: Any, metrics: tuple[Sums, ...], leaving: bool) -> Any:
        """Every run's steps and metrics go to its record; `runners`, gone back where something is not finite."""
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)
        totals = tuple(none if r.totals is None else r.totals for r, none in zip(self.records, zeros, strict=True))
        totals, fine = _add(totals, metrics)
        steps = self.runs.steps(runners)
        # Who waits for this step's sums keeps the next one from overlapping; those of the step before will do, as they
        # stop at the first fault, unless something is to be written.
        writes = leaving or any(r.writes(n) for r, n in zip(self.records, steps, strict=True))
        ahead = self.driver.config.async_collect and not writes
        known = jax.device_get(self._fine if ahead and self._fine is not None else fine)
        self._fine = fine
        for run, record in enumerate(self.records):
            if not record.open:
                continue
            record.totals = totals[run]
            if known[run]:
                record.take(steps[run], lambda run=run, runners=runners: self.runs.member(runners, run))
                continue
            runner = self._rolled_back(record)
            if runner is not None:
                runners = self.runs.replaced(runners, run, runner)
        return runners

    def _rolled_back(self, record: Tally) -> Runner | None:
        """The runner of a run's last checkpoint (or a new one) with another key, if the configuration says so;
        otherwise the run has failed, and how to go on is said."""
        err, config = record.diverged(), record.config
        record.wait()
        if config.on_nan == "stop" or record.rollbacks >= config.rollbacks:
            tried = f" after {record.rollbacks} rollbacks" if record.rollbacks else ""
            record.failed = TrainingDiverged(
                f"{err}; training has stopped{tried} and nothing of this was saved. {record.how_to_go_on()}\n"
                "A lower learning rate may help: --world-model.lr, --agents.lr, --ppo.lr; --on-nan rollback goes on "
                "from the last checkpoint by itself, with other random numbers"
            )
            if len(self.records) > 1:
                self.bar.warn(f"{record.name}: {err}; it stops, the others go on")
            return None
        template = self.driver.template()
        runner = perhaps_from_first(lambda: record.earlier(template), template)
        if runner is None:
            runner = self._start(record)
        else:
            self.driver.rest()
        self._fine = None
        # Another key: with the same one the same would happen.
        runner = eqx.tree_at(lambda r: r.key, runner, jax.random.fold_in(runner.key, record.rollbacks + 1))
        record.roll_back(int(runner.state.steps))
        self.bar.warn(
            f"{err}; going on from step {record.steps} with a new key (rollback {record.rollbacks} of at most "
            f"{config.rollbacks})"
        )
        return runner
