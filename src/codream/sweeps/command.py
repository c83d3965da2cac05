"""`codream sweep`: the options, and what is printed."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from codream.commands import EnvFrom, EnvKwargs
from codream.config import Config
from codream.statistics import Summary
from codream.sweeps import SweepFailed, sweep
from codream.sweeps.design import assignments, listed

__all__ = ["SweepCommand", "run_sweep"]

Assignments = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Train many runs with Ray Tune (extra `sweep`): every combination with every seed; then compare them.

    All options of `codream train` are set for all runs; --grid, --ablate and --search vary some. The same command
    again goes on: finished runs are left alone, the others continue from their checkpoints.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    typed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Options of `config` that were given, which a preset that is varied does not change."""
    name: str | None = None
    """Name of the sweep's folder. Unset: made from environment and preset."""
    seeds: int = 3
    """Runs of every combination, with the seeds from --seed on."""
    grid: Assignments = ()
    """FIELD=A,B,…: all combinations of these values, e.g. agents.lr=1e-3,3e-4. Also preset=small,paper."""
    ablate: Assignments = ()
    """FIELD=A,…: the configuration as it is, and with each of these values alone, e.g. world_model.teammates=false."""
    search: Assignments = ()
    """FIELD=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,…: values drawn at random."""
    samples: int = 10
    """Draws of --search."""
    address: str = "local"
    """Ray cluster to run on: `auto` for the one that this machine belongs to. `local`: this machine alone."""
    parallel: int | None = None
    """Runs at a time, at most. Unset: as many as --cpus and --gpus allow."""
    cpus: float = 1.0
    """CPUs of each run."""
    gpus: float | None = None
    """GPUs of each run; below 1, runs share one. Unset: one for each of --devices, where there are GPUs."""
    failures: int = 3
    """How often a run that fails goes on from its last checkpoint, before it counts as failed."""
    episodes: int = 100
    """Episodes of every pairing by which each run is measured at its end; 0: none."""
    summary: Summary = "iqm"
    """How seeds become one number: `iqm`, interquartile mean and 95 % bootstrap interval; `median`, and the standard
    deviation, as the paper reports."""
    root: str = "runs"
    """Folder of all runs; on a cluster one that all machines share."""
    env_from: EnvFrom = None
    """An environment of your own instead of --env: the class or function that makes it, e.g. my_envs:Meeting."""
    env_kwargs: EnvKwargs = None
    """Keyword arguments of the environment, as JSON, e.g. '{"max_cycles": 50}'."""


def run_sweep(command: SweepCommand, config: Config, env: Any) -> None:
    """`config`, `env`: the command's, as `sweep` takes them. Raises SweepFailed if some trials failed for good."""
    jax.config.update("jax_platforms", "cpu")  # this process only checks and draws; the GPUs are the trials'
    grid, ablate, search = (
        assignments(f"--{name}", [text for texts in getattr(command, name) for text in texts])
        for name in ("grid", "ablate", "search")
    )
    result = sweep(
        config,
        env=env,
        name=command.name,
        seeds=command.seeds,
        grid={name: listed(text) for name, text in grid.items()},
        ablate={name: listed(text) for name, text in ablate.items()},
        search=search,
        samples=command.samples,
        keep=command.typed,
        address=command.address,
        parallel=command.parallel,
        cpus=command.cpus,
        gpus=command.gpus,
        failures=command.failures,
        episodes=command.episodes,
        summary=command.summary,
        root=command.root,
    )
    for table in result.tables:
        Console().print(table)
    print(f"The sweep lies in {result.path}")
    if result.page is not None:
        print(f"  see it: open {result.page}")
        own = f" --env-from {command.env_from}" if command.env_from else ""
        own += f" --summary {command.summary}" if command.summary != "iqm" else ""
        drawn = shlex.join(["compare", str(result.path), "--out", str(result.page)])
        print(f"  with matches, everyone against everyone: codream {drawn}{own}")
    if result.failed:
        raise SweepFailed(
            f"{len(result.failed)} trials failed for good; the same command tries them again:"
            + "".join(f"\n  {name}: {why}" for name, why in result.failed.items())
        )
