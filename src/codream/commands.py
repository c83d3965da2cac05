"""The options of every command but `sweep` (`codream.sweeps.command`). Every field of `Config` is one too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from codream.config import Config
from codream.live import WandbMode
from codream.statistics import Summary

__all__ = ["Compare", "Devices", "EnvFrom", "EnvKwargs", "Envs", "Evaluate", "Inspect", "Report", "Train", "Watch"]

OneRun = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
EnvFrom = Annotated[str | None, tyro.conf.arg(metavar="MODULE:NAME")]
EnvKwargs = Annotated[str | None, tyro.conf.arg(metavar="JSON")]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train agents, or go on with a run.

    `--preset` (small, paper, summary; wm_rnd, original, ippo, ippo_common) sets the defaults of all other options;
    with `--resume` the run's own configuration does. `--algo wm_rnd` alone means the preset of that name. At the end
    every side plays against fixed references.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    name: str | None = None
    """Name of the run's folder. Unset: made from environment, preset and seed."""
    resume: str | None = None
    """Run to go on with, by its folder or name. Steps in total, learning rates, intervals, devices and how the run is
    kept may change."""
    checkpoint: int | None = None
    """With --resume: go on from the checkpoint at this step instead of the latest."""
    root: str = "runs"
    """Folder of all runs."""
    seeds: int = 1
    """Train this many seeds, from --seed on, as one program, each as a run of its own (environments inside JAX)."""
    env_from: EnvFrom = None
    """An environment of your own instead of --env: the class or function that makes it, e.g. my_envs:Meeting for what
    my_envs.py in this folder, or on PYTHONPATH, calls Meeting."""
    env_kwargs: EnvKwargs = None
    """Keyword arguments of the environment, as JSON, e.g. '{"max_cycles": 50}'."""
    episodes: int = 100
    """Episodes of every pairing in the table at the end; 0 for no table, and a report without playing."""
    wandb: WandbMode = "off"
    """Also log to Weights & Biases."""
    coordinator: str | None = None
    """Train on several hosts, with this command on each: HOST:PORT of the first; `auto` where Slurm, Open MPI,
    Kubernetes or a TPU says."""
    processes: int | None = None
    """With --coordinator HOST:PORT: how many processes there are."""
    process: int | None = None
    """With --coordinator HOST:PORT: which one this is, from 0."""
    peek: bool = True
    """Now and then, in at most 3 % of the time, play a little: cross-play so far and a dream in TensorBoard."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Cross-play of a run's agents: every side against references, other runs, and itself."""

    run: OneRun
    """The run, by its folder or its name."""
    episodes: int = 400
    """Episodes of every pairing, for each seed."""
    seeds: int = 1
    """Seeds, each with episodes of its own."""
    greedy: bool = False
    """Take the most probable action instead of a sampled one."""
    against: tuple[str, ...] | None = None
    """Opponents: names of references (random, still, chase, flee), and runs. Unset: all references."""
    checkpoint: int | Literal["best"] | None = None
    """Evaluate the checkpoint at this step, or the best one (see --checkpoints-best), instead of the latest."""
    env_from: EnvFrom = None
    """What makes its environment, where that is one of your own."""
    env_kwargs: EnvKwargs = None
    """Keywords of the environment other than in training, as JSON, e.g. '{"max_cycles": 100}' for longer episodes."""
    json: Path | None = None
    """File to write the result to."""
    root: str = "runs"
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw a run as one HTML file, `report.html` in its folder; also while the run goes on."""

    run: OneRun
    """The run, by its folder or its name."""
    quick: bool = False
    """Play nothing: only what training logged, and what an earlier report measured."""
    episodes: int | None = None
    """Episodes of every pairing, and for the world model (images: 4 at most). Unset: 40, fewer where the environment is
    slow."""
    env_from: EnvFrom = None
    """What makes its environment, where that is one of your own."""
    root: str = "runs"
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Several runs in one HTML file: curves with intervals over seeds, and everyone against everyone."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN RUN …")]
    """Two runs or more, by their folders or names; a sweep's folder stands for all runs in it."""
    out: Path = Path("compare.html")
    """File to write."""
    quick: bool = False
    """Play no matches."""
    episodes: int = 20
    """Episodes of each match."""
    summary: Summary = "iqm"
    """How seeds become one number: `iqm`, interquartile mean and 95 % bootstrap interval; `median`, and the standard
    deviation, as the paper reports."""
    env_from: EnvFrom = None
    """What makes the environment, of runs on one of your own."""
    root: str = "runs"
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """Evaluation episodes as a GIF or MP4, beside what one agent imagined."""

    run: OneRun
    """The run, by its folder or its name."""
    out: Path | None = None
    """File to write, .gif or .mp4. Unset: watch.gif in the run's folder."""
    episodes: int = 3
    """Episodes."""
    dream: bool = True
    """Beside each episode, what an agent imagined from its start on; not where the environment's own pictures are
    shown."""
    agent: str | None = None
    """Whose dream. Unset: the first agent's."""
    greedy: bool = False
    """Take the most probable action instead of a sampled one."""
    seed: int = 0
    """Which episodes."""
    fps: float = 4.0
    """Steps per second."""
    checkpoint: int | Literal["best"] | None = None
    """Of the checkpoint at this step, or the best in cross-play, instead of the latest."""
    env_from: EnvFrom = None
    """What makes its environment, where that is one of your own."""
    env_kwargs: EnvKwargs = None
    """Keywords of the environment other than in training, as JSON, e.g. '{"max_cycles": 100}'."""
    root: str = "runs"
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Take a configuration or a run apart: shapes, modules, parameters, operations, memory."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: str | None = None
    """A run, by its folder or its name, instead of a configuration."""
    env_from: EnvFrom = None
    """An environment of your own: the class or function that makes it."""
    env_kwargs: EnvKwargs = None
    """Keyword arguments of the environment, as JSON."""
    root: str = "runs"
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Envs:
    """List every environment that has a name, and what to install for those that are missing."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """List every accelerator, which one computes, its memory, and the versions of JAX and driver."""
