"""Sweeps: many runs of one design, on this machine or on a Ray cluster, and what came of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from codream import retention
from codream.config import Config, ConfigError
from codream.envs import GraphEnv, HostEnv, is_graph
from codream.envs.own import place_of
from codream.presets import preset, refuse_unread
from codream.reading import changes
from codream.report import compare
from codream.report.entries import FREE
from codream.runs import Run, RunError, default_name
from codream.scoring import Scorer
from codream.statistics import Summary
from codream.sweeps.design import Trial, trials_of
from codream.sweeps.results import games_of, table, write
from codream.sweeps.work import Outcome, Task
from codream.trainer import environment_of, named
from codream.training import driver_for

__all__ = ["Sweep", "SweepFailed", "sweep"]


class SweepFailed(RuntimeError):
    """Some trials of a sweep failed for good; all others are done. The command `codream sweep` ends with it; the
    function `codream.sweep` raises nothing for them and returns them as `Sweep.failed`."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep on disk, after it ended."""

    path: Path
    """Its folder; `sweep.json` in it has the table's numbers."""
    runs: tuple[Run, ...]
    """Of all trials that were begun."""
    failed: dict[str, str]
    """Trials that failed for good, with the reason."""
    page: Path | None
    """The comparison of its runs; None where there are fewer than two."""
    tables: tuple[Table, ...]
    """One per environment, to print."""


def sweep(
    config: Config | str | None = None,
    *,
    env: Any = None,
    name: str | None = None,
    seeds: int = 3,
    grid: Mapping[str, Sequence[Any]] | None = None,
    ablate: Mapping[str, Sequence[Any]] | None = None,
    search: Mapping[str, str] | None = None,
    samples: int = 10,
    keep: Collection[str] = (),
    address: str = "local",
    parallel: int | None = None,
    cpus: float = 1.0,
    gpus: float | None = None,
    failures: int = 3,
    episodes: int = 100,
    summary: Summary = "iqm",
    root: str | Path = "runs",
    progress: bool = True,
) -> Sweep:
    """Train every combination with every seed, each an ordinary run in `root/name`, with Ray Tune; then compare them.

    `config`, `env`: as in `train`. `seeds`: how many, from `config.seed` on. `grid` ({"agents.lr": [1e-3, 3e-4]}): all
    combinations. `ablate` (the same form): `config` as it is, and with each value alone. `search`
    ({"agents.entropy": "log:1e-4:1e-2"}; also uniform, int, choice:A,B): ranges from which `samples` are drawn. Where
    `preset` is varied, each starts from that preset, with the environment of `config`, the fields in which `config`
    differs from its own preset, and those in `keep`.
    `address`: of a Ray cluster, whose machines must see `root` under the same path; `local`: this machine. `parallel`:
    trials at a time, at most (unset: as many as fit). `cpus`, `gpus`: of one trial; gpus unset: one for each of
    `config.devices` where there are GPUs. `failures`: how often a trial is begun again, from its last checkpoint, when
    it fails. `episodes`: of every pairing by which each trial is measured at its end; 0: none. `summary`: how seeds
    become one number, `iqm` (interquartile mean, 95 % bootstrap interval) or `median` (and standard deviation).

    The same sweep again does what is missing: finished trials are left alone, unfinished ones go on as if they had
    never stopped. Before anything starts, every combination is checked, also against the environment. Trials that
    failed for good are in `Sweep.failed`.

    Raises ConfigError, UnknownEnvironment, RunError (the sweep is in use, or a trial of that name was trained with
    other options), ModuleNotFoundError without Ray.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError('Ray is not installed; type: pip install "codream[sweep]"')
    config, env = named(config or preset("small"), env)
    _check_numbers(parallel=parallel, cpus=cpus, gpus=gpus, failures=failures, episodes=episodes)
    if env is not None:  # names are made of what it is called
        one, _ = environment_of(config, env)
        config = dataclasses.replace(config, env=one.spec.name)
        if isinstance(one, HostEnv):
            one.close()
    made = trials_of(config, seeds=seeds, grid=grid, ablate=ablate, search=search, samples=samples, keep=keep)
    trials = _resolved(made, env)
    folder = Path(root).absolute() / (name or f"{default_name(config)}-sweep")
    if (folder / "config.json").exists():
        raise RunError(f"{folder} is a run; choose another --name for the sweep")
    for trial in trials:
        _refuse_changes(Run(folder / trial.name), trial.config)
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    tasks = {t.name: Task(folder / t.name, t.config, env, place_of(env), episodes, cache) for t in trials}
    outcomes = {name: Outcome("finished" if task.done else "unfinished") for name, task in tasks.items()}
    with Run(folder).locked():
        if not all(task.done for task in tasks.values()):
            os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died")  # read by Ray; we say so ourselves
            # Ray takes a while to import, and is an extra.
            from codream.sweeps.cluster import Wanted, carry_out_all

            devices = max(trial.config.devices for trial in trials)
            wanted = Wanted(address, cpus, gpus, devices, parallel, failures)
            carry_out_all(tasks, outcomes, folder, wanted, progress)
        return _results(folder, trials, tasks, outcomes, summary)


def _check_numbers(**numbers: float | None) -> None:
    gpus = numbers["gpus"]
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ConfigError(f"gpus must be a part of one or a whole number, got {gpus:g}")
    for name, value in numbers.items():
        least = 1 if name == "parallel" else 0
        if value is not None and (value < least or (name == "cpus" and not value)):
            raise ConfigError(f"{name} must be {'above 0' if name == 'cpus' else f'at least {least}'}, got {value:g}")


def _resolved(trials: Sequence[Trial], env: Any) -> list[Trial]:
    """The trials with their configurations resolved against the environment, which is made once for all that share it.

    Raises ConfigError that names the first trial which does not fit.
    """
    made: dict[str, HostEnv | GraphEnv] = {}
    found = []
    if env is not None and len({trial.config.env for trial in trials}) > 1:
        raise ConfigError("env is varied, but an environment was given as an object, which all trials would train on")
    try:
        for trial in trials:
            config = trial.config
            try:
                key = f"{config.env} {config.num_envs} {sorted(config.env_kwargs.items())}"
                if key not in made:
                    made[key], _ = environment_of(config, env)
                spec = made[key].spec
                if env is not None:
                    config = dataclasses.replace(config, env=spec.name)
                refuse_unread(config)
                if config.checkpoints_best is not None:
                    Scorer(config, spec, lambda n: None)
                config = config.resolve(spec)
                if is_graph(made[key]):  # which refuse some options; asking of others would start a device
                    driver_for(made[key], config)
                found.append(dataclasses.replace(trial, config=config))
            except ConfigError as err:
                raise ConfigError(f"{trial.name}: {err}") from err
    finally:
        for one in made.values():
            if isinstance(one, HostEnv):
                one.close()
    return found


def _refuse_changes(run: Run, wanted: Config) -> None:
    """What was trained under this name before must be what is wanted now."""
    if not (run.path / "config.json").is_file():
        return
    changed = changes(run.config, wanted, FREE)
    if changed:
        raise RunError(
            f"{run.path} was trained with other options ("
            + "; ".join(f"{name} was {old!r}, wanted is {new!r}" for name, (old, new) in changed.items())
            + "); choose another --name for this sweep"
        )
    if run.config.total_steps > wanted.total_steps and retention.reached(run.checkpoints, wanted.total_steps):
        raise RunError(
            f"{run.path} is to be trained for {run.config.total_steps} steps and has come further than the "
            f"{wanted.total_steps} that are wanted now; choose another --name for this sweep"
        )


def _results(
    folder: Path,
    trials: Sequence[Trial],
    tasks: Mapping[str, Task],
    outcomes: Mapping[str, Outcome],
    summary: Summary,
) -> Sweep:
    runs = tuple(task.run for task in tasks.values() if task.begun)
    games = games_of([task.run for name, task in tasks.items() if outcomes[name].state == "finished"])
    page = folder / "compare.html"
    write(folder, trials, outcomes, games, summary)
    return Sweep(
        folder,
        runs,
        {name: outcome.error or "" for name, outcome in outcomes.items() if outcome.state != "finished"},
        compare(runs, out=page, quick=True, summary=summary, progress=False) if len(runs) > 1 else None,
        tuple(table(game, summary) for game in games),
    )
