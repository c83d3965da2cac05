"""A run goes on: from which checkpoint, and with which options."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from codream import checkpoint as checkpoints
from codream import retention
from codream.checkpoint import Checkpoint
from codream.config import KEEPING, Config
from codream.envs import EnvSpec
from codream.hosts import most, perhaps_from_first
from codream.progress import to_stderr
from codream.projection import symmetry_ratio
from codream.reading import changes
from codream.runs import Run, RunError
from codream.training import GraphDriver, HostDriver, Runner

__all__ = ["CHANGEABLE", "restored"]

CHANGEABLE = (
    "total_steps",
    "world_model_every",
    "agents_every",
    *KEEPING,
    "devices",
    "world_model.lr",
    "world_model.outcome_lr",
    "agents.lr",
    "ppo.lr",
    "curiosity.lr",
)
"""Options that may differ when a run is resumed."""


def restored(
    run: Run, driver: HostDriver | GraphDriver, config: Config, steps: int | None, env: Any
) -> tuple[Runner | None, int]:
    """The runner to go on with, from the checkpoint at `steps` or the latest, and how often the run was rolled back;
    None where no checkpoint was written yet, so that it starts. What was written later is set aside.

    Raises RunError where the run cannot go on as `config` asks, CheckpointError where it has no such checkpoint.
    """
    template, rollbacks = driver.template(), 0

    def read() -> Runner | None:
        nonlocal rollbacks
        found = _found(run, driver.spec, config, steps, env)
        if found is None:
            run.rewind(config, 0)
            return None
        rollbacks = found.manifest.rollbacks
        runner = checkpoints.restore(template, found)
        retention.set_aside(run.checkpoints, found.steps)
        run.rewind(config, found.steps)
        return runner

    runner = perhaps_from_first(read, template)
    return runner, most(rollbacks)[0]


def _found(run: Run, spec: EnvSpec, config: Config, steps: int | None, env: Any) -> Checkpoint | None:
    """The checkpoint to go on from, if what is asked for can go on from it."""
    if steps is None and not retention.saved(run.checkpoints):
        _refuse_changes(run, run.config, config)
        run.made_by(env)
        return None
    found = checkpoints.find(run.path, steps) if steps is not None else checkpoints.latest_good(run.path, to_stderr)
    _refuse_changes(run, found.config, config)
    run.refuse_other_environment(found.spec, spec)
    run.made_by(env)  # before anything tells how to go on
    if found.steps >= config.total_steps:
        raise RunError(
            f"{run.path} has reached its total of {config.total_steps} steps (its checkpoint is of step "
            f"{found.steps}); to go on, give a larger one: "
            f"{run.to_resume(total_steps=2 * found.steps)}"
        )
    if told := _jump(found.config, config, found.steps):
        to_stderr(f"{run.path}: {told}")
    return found


def _jump(saved: Config, given: Config, steps: int) -> str | None:
    """What is to be told where the symmetry ratio does not go on from where it was: its schedule is over all steps."""
    if given.algo != "wm_rnd" or given.projection.coef == 0:
        return None
    before, after = (float(symmetry_ratio(jnp.asarray(steps), config)) for config in (saved, given))
    if abs(before - after) < 1e-6:
        return None
    return (
        f"projection.schedule={given.projection.schedule} is over total_steps, so with {given.total_steps:,} of them "
        f"instead of {saved.total_steps:,} the symmetry ratio jumps from {before:.3f} to {after:.3f} at step "
        f"{steps:,}; for one without a jump train anew"
    )


def _refuse_changes(run: Run, saved: Config, given: Config) -> None:
    changed = changes(saved, given, CHANGEABLE)
    if changed:
        raise RunError(
            f"{run.path} cannot go on with other options: "
            + "; ".join(f"{name} was {old!r}, given is {new!r}" for name, (old, new) in changed.items())
            + f". When resuming, only these may change: {', '.join(CHANGEABLE)}"
        )
