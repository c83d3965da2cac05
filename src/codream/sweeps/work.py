"""One trial, in a process of its own: an ordinary run, begun or gone on with, then measured."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from codream import retention
from codream.agents import load
from codream.config import Config
from codream.envs.own import found_at
from codream.evaluation import evaluate
from codream.report import report
from codream.report.measures import latest_measures
from codream.runs import Run, RunError
from codream.trainer import train

__all__ = ["Outcome", "Task", "carry_out", "steps_done"]

TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line


@dataclasses.dataclass
class Outcome:
    """How a trial ended."""

    state: str = "unfinished"
    """`finished`, `failed` or `unfinished`."""
    failures: int = 0
    """How often it failed and was begun again, from its last checkpoint."""
    error: str | None = None
    """Of the last failure; or why it could not be measured."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A trial, as it is sent to the process that trains it."""

    path: Path
    """The run's folder."""
    config: Config
    env: Any
    """The environment as an object, or None."""
    place: str | None
    """Where Python finds it, which an object that comes from another process may no longer know."""
    episodes: int
    cache: str | None
    """Folder of compiled programs."""

    @property
    def run(self) -> Run:
        return Run(self.path)

    @property
    def begun(self) -> bool:
        return (self.path / "config.json").is_file()

    @property
    def trained(self) -> bool:
        """Whether its last checkpoint is the last that it is to have."""
        return self.begun and retention.reached(self.run.checkpoints, self.config.total_steps)

    @property
    def done(self) -> bool:
        """Trained to its end, and measured if that is wanted."""
        return self.trained and (not self.episodes or _measured(self.run, self.episodes))


def carry_out(task: Task, cpus: float, gpus: float | None) -> str | None:
    """Train the trial to its end, from its last checkpoint if there is one, and measure it. Done again, it does what is
    missing. Returns what is to be told: why it could not be measured. `cpus`, `gpus`: what it may use; gpus 0: no GPU,
    unset: whatever JAX finds.

    Raises what `train` does, and RunError where the sweep's folder is not to be seen from this machine.
    """
    _limit(cpus, gpus)
    found_at(task.env, task.place)
    if task.cache is not None:
        jax.config.update("jax_compilation_cache_dir", task.cache)
    folder = task.path.parent
    if not folder.is_dir():
        raise RunError(
            f"{folder} is not there on {platform.node()}: a sweep on several machines needs a --root that all of them "
            "share, under the same path"
        )
    if not task.begun:
        train(task.config, env=task.env, name=task.path.name, root=folder, progress=False)
    elif not task.trained:
        train(task.config, env=task.env, resume=task.run, progress=False)
    if task.episodes and not _measured(task.run, task.episodes):
        try:
            result = evaluate(load(task.run, env=task.env), episodes=task.episodes, progress=False)
            report(task.run, cross_play=result, env=task.env, progress=False)
        except Exception as err:  # everything that was trained is saved by now
            return f"not measured: {type(err).__name__}: {err}"
    return None


def steps_done(run: Run) -> int:
    """Steps of a run that may be going on elsewhere, from the last whole line of its metrics; 0 before the first."""
    try:
        with (run.path / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    with suppress(ValueError, IndexError, KeyError, TypeError):
        return int(json.loads(lines[-1])["steps"])
    return 0


def _measured(run: Run, episodes: int) -> bool:
    """Whether its last checkpoint played at least so many."""
    found = latest_measures(run)
    return found is not None and found["cross_play"]["episodes"] >= episodes


def _limit(cpus: float, gpus: float | None) -> None:
    """Before JAX looks for devices: as many threads as the trial has CPUs, its part of a GPU's memory, or no GPU."""
    os.environ["PJRT_NPROC"] = str(max(1, int(cpus)))
    if gpus == 0:
        jax.config.update("jax_platforms", "cpu")  # its variable was read when JAX was imported
    elif gpus is not None and gpus < 1 and "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 * gpus:.3f}")
