"""The command line: `codream train`, `codream evaluate`. Every field of `Config` is an option."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from codream.agents import load
from codream.checkpoint import CheckpointError
from codream.config import Config, ConfigError, preset
from codream.envs import EnvironmentFailure, UnknownEnvironment
from codream.evaluation import evaluate
from codream.runs import Run, RunError
from codream.trainer import TrainingDiverged, train

__all__ = ["main"]


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
    """Run to go on with, by its folder or name. Steps in total, learning rates and intervals may change."""
    checkpoint: int | None = None
    """With --resume: go on from the checkpoint at this step instead of the latest."""
    root: str = "runs"
    """Folder of all runs."""
    env_kwargs: str | None = None
    """Keyword arguments of the environment, as JSON, e.g. '{"max_cycles": 50}'."""
    episodes: int = 100
    """Episodes of every pairing in the table at the end; 0 for no table."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Cross-play of a run's agents: every side against references, other runs, and itself."""

    run: tyro.conf.Positional[str]
    """The run, by its folder or its name."""
    episodes: int = 400
    """Episodes of every pairing, for each seed."""
    seeds: int = 1
    """Seeds."""
    greedy: bool = False
    """Take the most probable action instead of a sampled one."""
    against: tuple[str, ...] | None = None
    """Opponents: names of references (random, still, chase, flee), and run folders. Unset: all references."""
    checkpoint: int | None = None
    """Evaluate the checkpoint at this step instead of the latest."""
    json: Path | None = None
    """File to write the result to."""
    root: str = "runs"
    """Folder of all runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a wrong request, 1 for a failure while running."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"codream {importlib.metadata.version('codream')}")
        return 0
    try:
        command = _parse(args)
        _cache_compilations()
        if isinstance(command, Train):
            _train(command)
        else:
            _evaluate(command)
    except (ConfigError, RunError, UnknownEnvironment, CheckpointError, ModuleNotFoundError) as err:
        return _fail(err, 2)
    except (EnvironmentFailure, TrainingDiverged) as err:
        return _fail(err, 1)
    except KeyboardInterrupt:  # `train` has said how to go on
        return 130
    return 0


def _parse(args: list[str]) -> Train | Evaluate:
    """Two passes: --preset and --resume decide the defaults of everything else."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option, default in (("--preset", None), ("--algo", "matwm"), ("--resume", None), ("--root", "runs")):
        first.add_argument(option, default=default)
    base = preset("small")
    if args[:1] == ["train"]:
        try:
            known, _ = first.parse_known_args(args)
        except argparse.ArgumentError:  # e.g. an option without its value: tyro says it better
            known = argparse.Namespace(preset="small", algo="matwm", resume=None, root="runs")
        name = known.preset or ("wm_rnd" if known.algo == "wm_rnd" else "small")
        base = Run.open(known.resume, known.root).config if known.resume else preset(name)
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(base))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    )
    return tyro.cli(
        commands,
        prog="codream",
        description="Teams of agents that learn inside learned models of their world. --version: which codream.",
        args=args,
    )


def _train(command: Train) -> None:
    config = command.config
    if command.env_kwargs is not None:
        config = dataclasses.replace(config, env_kwargs=_json_object("--env-kwargs", command.env_kwargs))
    if command.checkpoint is not None and command.resume is None:
        raise ConfigError("--checkpoint needs --resume RUN: it says from which of the run's checkpoints to go on")
    if command.name is not None and command.resume is not None:
        raise ConfigError("--name is for a new run; --resume goes on in the folder of the run")
    run = train(config, name=command.name, resume=command.resume, checkpoint=command.checkpoint, root=command.root)
    if command.episodes:
        Console().print(evaluate(load(run), episodes=command.episodes).table())
    print(f"The run lies in {run.path}")
    print(f"  evaluate it more precisely: codream evaluate {run.path}")


def _evaluate(command: Evaluate) -> None:
    result = evaluate(
        Run.open(command.run, command.root),
        episodes=command.episodes,
        seeds=command.seeds,
        greedy=command.greedy,
        against=command.against,
        checkpoint=command.checkpoint,
    )
    Console().print(result.table())
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        print(f"Written to {command.json}")


def _json_object(option: str, text: str) -> dict[str, Any]:
    wanted = f"{option} expects a JSON object, e.g. '{{\"max_cycles\": 50}}', got {text!r}"
    try:
        value = json.loads(text)
    except ValueError as err:
        raise ConfigError(f"{wanted} ({err})") from err
    if not isinstance(value, dict):
        raise ConfigError(wanted)
    return value


def _cache_compilations() -> None:
    """Compiled programs are kept between runs, so that only the first one waits for the compiler."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "codream" / "jax"))


def _fail(err: Exception, status: int) -> int:
    print(f"codream: {err}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
