"""The command line: `codream` train, sweep, evaluate, report, compare, watch, inspect, envs, devices.

Every field of `Config` is an option.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from codream.accelerators import devices
from codream.agents import load
from codream.checkpoint import CheckpointError
from codream.commands import Compare, Devices, Envs, Evaluate, Inspect, Report, Train, Watch
from codream.config import Config, ConfigError
from codream.envs import EnvironmentFailure, UnknownEnvironment
from codream.envs.own import maker, raised_at
from codream.envs.registry import envs_table
from codream.evaluation import CrossPlay, evaluate
from codream.health import TrainingDiverged
from codream.hosts import FirstHostFailed, is_first, join, leave
from codream.inspection import inspect
from codream.memory import cuda_gives
from codream.playing import EndlessEpisode
from codream.presets import PRESETS, preset
from codream.reading import flat
from codream.report import compare, report, watch
from codream.runs import Run, RunError, file_to_write, replace_text
from codream.sweeps import SweepFailed
from codream.sweeps.command import SweepCommand, run_sweep
from codream.trainer import train, train_seeds

__all__ = ["main"]


_Command = Train | SweepCommand | Evaluate | Report | Compare | Watch | Inspect | Envs | Devices


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a wrong request, 1 for a failure while running."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"codream {importlib.metadata.version('codream')}")
        return 0
    try:
        command = _parse(args)
        _cache_compilations()
        cuda_gives()
        _DO[type(command)](command)
    except (ConfigError, RunError, UnknownEnvironment, CheckpointError, ModuleNotFoundError) as err:
        return _fail(err, 2)
    except (EnvironmentFailure, FirstHostFailed, TrainingDiverged, SweepFailed, OSError) as err:
        return _fail(err, 1)
    except KeyboardInterrupt as err:  # `train` has said how to go on
        return getattr(err, "status", 130)
    return 0


def _parse(args: list[str]) -> _Command:
    """Two passes: --preset and --resume decide the defaults of everything else."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option, default in (("--preset", None), ("--algo", "matwm"), ("--resume", None), ("--root", "runs")):
        first.add_argument(option, default=default)
    base = preset("small")
    if args[:1] in (["train"], ["sweep"], ["inspect"]):
        try:
            known, _ = first.parse_known_args(args)
        except argparse.ArgumentError:  # e.g. an option without its value: tyro says it better
            known = argparse.Namespace(preset="small", algo="matwm", resume=None, root="runs")
        name = known.preset or ("wm_rnd" if known.algo == "wm_rnd" else "small")
        base = Run.open(known.resume, known.root).config if known.resume else preset(name)
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(base))]
        | Annotated[SweepCommand, tyro.conf.subcommand("sweep", default=SweepCommand(base, typed=_typed(args)))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Watch, tyro.conf.subcommand("watch")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect", default=Inspect(base))]
        | Annotated[Envs, tyro.conf.subcommand("envs")]
        | Annotated[Devices, tyro.conf.subcommand("devices")]
    )
    return tyro.cli(
        commands,
        prog="codream",
        description="Teams of agents that learn inside learned models of their world. --version: which codream.",
        args=args,
    )


def _typed(args: list[str]) -> tuple[str, ...]:
    """The fields of a configuration whose options are among the arguments, e.g. world_model.lr for --world-model.lr."""
    given = [arg.removeprefix("--").partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")]
    return tuple(sorted({name.replace(".no_", ".").removeprefix("no_") for name in given} & flat(Config()).keys()))


def _train(command: Train) -> None:
    config = _config(command)
    if command.episodes < 0:
        raise ConfigError(f"--episodes must be 0 (no table) or more, got {command.episodes}")
    if command.coordinator is not None:
        join(command.coordinator, command.processes, command.process)
    elif command.processes is not None or command.process is not None:
        raise ConfigError("--processes and --process need --coordinator HOST:PORT, where the first process is found")
    env = _env(command)
    where = {
        "env": env,
        "name": command.name,
        "resume": command.resume,
        "root": command.root,
        "peek": command.peek,
    }
    if command.seeds == 1:
        runs = [train(config, checkpoint=command.checkpoint, wandb=command.wandb, **where)]
    elif command.checkpoint is not None or command.wandb != "off":
        raise ConfigError("--checkpoint and --wandb are for one run; with them leave --seeds at 1")
    else:
        runs = train_seeds(config, seeds=command.seeds, **where)
    leave()
    if not is_first():
        return
    try:
        for run in runs if command.episodes else ():
            try:
                result = evaluate(load(run, env=env), episodes=command.episodes)
            except EndlessEpisode as err:
                print(f"codream: no table, as {err}", file=sys.stderr)
                continue
            Console().print(result.table())
            _report_after(run, result, env)
    finally:  # it is trained, whatever goes wrong with playing
        for run in runs:
            print(f"The run lies in {run.path}")
            print(f"  see what it learned: open {shlex.quote(str(run.path / 'report.html'))}")
    if len(runs) > 1:
        print(f"See them side by side: codream compare {shlex.join(str(run.path) for run in runs)}")
    else:
        print(f"  evaluate it more precisely: {runs[0].typed('evaluate')}")


def _sweep(command: SweepCommand) -> None:
    run_sweep(command, _config(command), _env(command))


def _evaluate(command: Evaluate) -> None:
    file = None if command.json is None else file_to_write(command.json)
    result = evaluate(
        Run.open(command.run, command.root),
        episodes=command.episodes,
        seeds=command.seeds,
        greedy=command.greedy,
        against=command.against,
        checkpoint=command.checkpoint,
        env=_env(command),
        env_kwargs=_keywords(command),
        root=command.root,
    )
    Console().print(result.table())
    if file is not None:
        replace_text(file, json.dumps(result.to_json(), indent=2) + "\n")
        print(f"Written to {file}")


def _report_after(run: Run, result: CrossPlay, env: Any) -> None:
    """Everything is saved by now, so whatever goes wrong here is only told."""
    try:
        report(run, cross_play=result, env=env)
    except Exception as err:
        print(
            f"codream: the report could not be drawn in full ({type(err).__name__}: {err}); the run is complete. "
            f"Try again: {run.typed('report')}",
            file=sys.stderr,
        )


def _report(command: Report) -> None:
    options = {"quick": command.quick, "episodes": command.episodes, "root": command.root, "env": _env(command)}
    path = report(command.run, **options)
    print(f"Written to {path}")


def _compare(command: Compare) -> None:
    options = {"out": command.out, "quick": command.quick, "episodes": command.episodes, "root": command.root}
    print(f"Written to {compare(command.runs, summary=command.summary, env=_env(command), **options)}")


def _watch(command: Watch) -> None:
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    options = {name: value for name, value in given.items() if name not in ("run", "env_from", "env_kwargs")}
    print(f"Written to {watch(command.run, env=_env(command), env_kwargs=_keywords(command), **options)}")


def _inspect(command: Inspect) -> None:
    config = _config(command)
    if command.run is not None and config != preset("small"):
        raise ConfigError(f"--run {command.run} is shown as it was trained; give no other options with it")
    Console().print(inspect(config if command.run is None else command.run, env=_env(command), root=command.root))


def _envs(command: Envs) -> None:
    del command
    Console().print(envs_table())


def _devices(command: Devices) -> None:
    del command
    Console().print(devices())


_DO: dict[type, Any] = {
    Train: _train,
    SweepCommand: _sweep,
    Evaluate: _evaluate,
    Report: _report,
    Compare: _compare,
    Watch: _watch,
    Inspect: _inspect,
    Envs: _envs,
    Devices: _devices,
}


def _config(command: Train | SweepCommand | Inspect) -> Config:
    config = command.config
    started = PRESETS.get(config.preset)
    if started is not None and started.algo != config.algo:
        fitting = [name for name, one in PRESETS.items() if one.algo == config.algo]
        raise ConfigError(
            f"preset {config.preset} is one of algo={started.algo}; for algo={config.algo} use {' or '.join(fitting)}"
        )
    keywords = _keywords(command)
    return config if keywords is None else dataclasses.replace(config, env_kwargs=keywords)


def _env(command: Train | SweepCommand | Evaluate | Report | Compare | Watch | Inspect) -> Any:
    return None if command.env_from is None else maker(command.env_from)


def _keywords(command: Train | SweepCommand | Evaluate | Watch | Inspect) -> dict[str, Any] | None:
    text = command.env_kwargs
    if text is None:
        return None
    wanted = f"--env-kwargs expects a JSON object, e.g. '{{\"max_cycles\": 50}}', got {text!r}"
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
    if isinstance(err, EnvironmentFailure | ConfigError | ModuleNotFoundError) and (place := raised_at(err)):
        print(f"  raised at {place}", file=sys.stderr)
    return status
