"""`train`: a configuration in, a run folder out; or a run that goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from codream import checkpoint as checkpoints
from codream.config import Config, ConfigError
from codream.envs import EnvSpec, GraphEnv, HostEnv
from codream.guards import LeaveRequests
from codream.health import TrainingDiverged
from codream.live import Live, WandbMode
from codream.loop import Loop
from codream.presets import preset
from codream.progress import Bar, to_stderr
from codream.reading import flat
from codream.report import report
from codream.report.peek import Peek
from codream.runs import Run, RunError, build_env
from codream.scoring import Scorer
from codream.training import GraphDriver, HostDriver, Runner, driver_for

__all__ = ["CHANGEABLE", "TrainingDiverged", "environment_of", "train"]

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

    SIGINT, SIGTERM and SIGHUP let it save, if an exact resume is possible within `loop.GRACE` seconds, and raise
    `Stopped` (a KeyboardInterrupt); a second one ends the process at once.

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
    made, config = environment_of(config, env)
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
                loop = Loop(run, driver, config, bar, live, leave, looks, score)
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


def environment_of(config: Config, env: Any) -> tuple[HostEnv | GraphEnv, Config]:
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
    before, after = flat(saved), flat(given)
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
