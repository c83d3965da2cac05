"""`train`: a configuration in, a run folder out; or a run that goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from codream import checkpoint as checkpoints
from codream.config import Config, ConfigError
from codream.envs import EnvironmentFailure, EnvSpec, GraphEnv, HostEnv
from codream.guards import LeaveRequests, Stopped
from codream.health import STEPS, TrainingDiverged, all_finite, faults
from codream.live import Live, WandbMode, live_table
from codream.mesh import placed
from codream.metrics import Metrics, add_metrics
from codream.presets import preset
from codream.progress import Bar, to_stderr
from codream.report import report
from codream.report.peek import Peek
from codream.runs import Run, RunError, build_env
from codream.saving import MetricsFile, Saver
from codream.scoring import Scorer
from codream.training import GraphDriver, HostDriver, Runner, driver_for

__all__ = ["CHANGEABLE", "TrainingDiverged", "train"]

CHANGEABLE = (
    "total_steps",
    "world_model_every",
    "agents_every",
    "checkpoint_every",
    "checkpoints_kept",
    "checkpoints_nth",
    "checkpoints_best",
    "checkpoints_best_episodes",
    "on_nan",
    "rollbacks",
    "env_time_limit",
    "log_every",
    "devices",
    "world_model.lr",
    "world_model.outcome_lr",
    "agents.lr",
    "ppo.lr",
    "curiosity.lr",
)
"""Options that may differ when a run is resumed."""

PATIENCE = 1_000
"""Steps that a due checkpoint waits for all copies to end their episodes at once, before they are cut."""

GRACE = 10.0
"""Seconds that a run which was asked to leave waits for a step from which it can be resumed exactly."""


def train(
    config: Config | None = None,
    *,
    env: Any = None,
    name: str | None = None,
    resume: str | Path | Run | None = None,
    checkpoint: int | None = None,
    root: str | Path = "runs",
    progress: bool = True,
    wandb: WandbMode = "off",
    peek: bool = False,
) -> Run:
    """Train in a new folder `root/name`, or go on with the run `resume`. Returns the run.

    `config`: preset `small` if not given; when resuming, the run's own, and only the options in `CHANGEABLE`
    may differ from it. `env`: an environment as an object (see `make_env`), instead of the one that
    `config.env` names. `name`: made from environment, preset and seed if not given. `checkpoint`: resume
    from the checkpoint at this step instead of the latest; later ones are set aside. `wandb`: `offline` or
    `online` also logs to Weights & Biases. `peek`: now and then, in at most 3 % of the time, play a little and
    show the cross-play so far and an episode beside its dream in TensorBoard; what is learned is the same. At the
    end the run's report is drawn, of what training logged; `codream.report(run)` adds what only playing can show.

    Training ends when `config.total_steps` environment steps (over all copies) are done and every copy of a
    host environment has finished its episode. A resumed run then equals, number by number on the CPU, one
    that never stopped.

    SIGINT, SIGTERM and SIGHUP let it save, if an exact resume is possible within GRACE seconds, and raise `Stopped` (a
    KeyboardInterrupt); a second one ends the process at once.

    Raises ConfigError, RunError (folder exists or is in use; change not allowed; nothing left to do), CheckpointError,
    EnvironmentFailure with the environment's own error and the last checkpoint (also where it hangs, see
    `config.env_time_limit`), TrainingDiverged where something is not finite (see `config.on_nan`).
    """
    Live.check(wandb)
    run = None
    if resume is None:
        config = config or preset("small")
    else:
        run = Run.open(resume, root)
        config = config or run.config
        if run.about["environment"]["by_object"] and env is None:
            raise RunError(f"{run.path} was trained on an environment given as an object; pass it again: env=…")
    made, config = _environment(config, env)
    driver = driver_for(made, config)
    try:
        copies = lambda n: build_env(config, n, env)  # noqa: E731
        score = Scorer(config, made.spec, copies) if config.checkpoints_best is not None else None
        if run is None:
            run = Run.create(config, made.spec, name=name, root=root, by_object=env is not None)
        with run.locked():
            runner, rollbacks = (None, 0) if resume is None else _resumed(run, driver, config, checkpoint)
            begun = int(runner.state.steps) if runner is not None else 0
            with Bar("train", config.total_steps, start=begun, show=progress) as bar, LeaveRequests(bar.warn) as leave:
                live = Live(run.path, config, begun=begun, wandb=wandb, tell=bar.warn)
                looks = Peek(str(run.path), config, live, copies) if peek else None
                loop = _Loop(run, driver, config, bar, live, leave, looks, score)
                try:
                    loop.go(runner, rollbacks)
                finally:
                    live.close()
    finally:
        if env is None and isinstance(made, HostEnv):
            made.close()
    _draw(run)
    return run


def _draw(run: Run) -> None:
    """Drawing comes after everything is saved, and must not spoil it."""
    try:
        report(run, quick=True, progress=False)
    except Exception as err:
        warnings.warn(
            f"the report of {run.path} could not be drawn ({type(err).__name__}: {err}); the run itself is complete. "
            f"Try again with: codream report {run.path}",
            RuntimeWarning,
            stacklevel=3,
        )


def _environment(config: Config, env: Any) -> tuple[HostEnv | GraphEnv, Config]:
    """The environment, and the configuration resolved for it."""
    made = build_env(config, config.num_envs, env)
    if env is not None:
        config = dataclasses.replace(config, env=made.spec.name)
    if isinstance(made, HostEnv) and made.num_envs != config.num_envs:
        raise ConfigError(f"num_envs is {config.num_envs}, but the given environment has {made.num_envs} copies")
    return made, config.resolve(made.spec)


def _resumed(
    run: Run, driver: HostDriver | GraphDriver, config: Config, steps: int | None
) -> tuple[Runner | None, int]:
    """The runner to go on with, and how often the run was rolled back; None where no checkpoint was written yet, so
    that the run starts over."""
    if steps is None and not checkpoints.saved(run.checkpoints):
        _refuse_changes(run, run.config, config)
        run.rewind(config, 0)
        return None, 0
    found = checkpoints.find(run.path, steps) if steps is not None else checkpoints.latest_good(run.path, to_stderr)
    _refuse_changes(run, found.config, config)
    _refuse_other_spec(run, found.spec, driver.spec)
    if found.steps >= config.total_steps:
        raise RunError(
            f"{run.path} has reached its total of {config.total_steps} steps (its checkpoint is of step "
            f"{found.steps}); to go on, give a larger one: "
            f"codream train --resume {run.path} --total-steps {2 * found.steps}"
        )
    runner = checkpoints.restore(driver.template(), found)
    checkpoints.set_aside(run.checkpoints, found.steps)
    run.rewind(config, found.steps)
    return runner, found.manifest.rollbacks


def _refuse_changes(run: Run, saved: Config, given: Config) -> None:
    before, after = _flat(saved), _flat(given)
    changed = [name for name in before if before[name] != after[name] and name not in CHANGEABLE]
    if changed:
        raise RunError(
            f"{run.path} cannot go on with other options: "
            + "; ".join(f"{name} was {before[name]!r}, given is {after[name]!r}" for name in changed)
            + f". When resuming, only these may change: {', '.join(CHANGEABLE)}"
        )


def _refuse_other_spec(run: Run, saved: EnvSpec, now: EnvSpec) -> None:
    for field in dataclasses.fields(EnvSpec):
        before, after = getattr(saved, field.name), getattr(now, field.name)
        if before != after:
            raise RunError(
                f"{run.path} was trained on another environment: {field.name} was {before}, now it is "
                f"{after}. Use the environment and the library versions named in its run.json"
            )


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            flat[field.name] = value
    return flat


# ------------------------------------------------------------------------------------------ the loop


@jax.jit
def _add(total: Metrics, more: Metrics) -> tuple[Metrics, Any]:
    """Sums of metrics, and whether all is finite."""
    total = add_metrics(total, more)
    return total, all_finite(total)


class _Loop:
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
