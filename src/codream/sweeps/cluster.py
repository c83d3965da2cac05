"""The trials of a sweep on Ray Tune: where they run, what happens when one fails, and what is shown meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import tune  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]

from codream.config import ConfigError
from codream.envs import UnknownEnvironment
from codream.guards import Stopped
from codream.progress import Bar
from codream.sweeps.work import Outcome, Task, carry_out, steps_done

__all__ = ["Wanted", "carry_out_all"]

LOOKED = 1.0  # seconds between two looks at how far the trials are
MEMORY = 100_000_000  # bytes of Ray's object store, which here holds next to nothing


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Where a sweep runs, and what each of its trials needs."""

    address: str
    cpus: float
    gpus: float | None
    devices: int
    parallel: int | None
    failures: int

    def resources(self) -> tuple[float, float | None]:
        """CPUs and GPUs of a trial; where GPUs are not given, and there are any, as many as it has `devices`.

        Raises ConfigError for more than any machine has: such a trial would wait for ever.
        """
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = {kind: max(machine.get(kind, 0.0) for machine in machines) for kind in ("CPU", "GPU")}
        gpus = float(self.devices) if self.gpus is None and most["GPU"] else self.gpus
        for kind, wanted in (("CPU", self.cpus), ("GPU", gpus or 0.0)):
            if wanted > most[kind]:
                raise ConfigError(f"a trial wants {wanted:g} {kind}s, but no machine has more than {most[kind]:g}")
        return self.cpus, gpus


def carry_out_all(
    tasks: Mapping[str, Task], outcomes: dict[str, Outcome], folder: Path, wanted: Wanted, progress: bool
) -> None:
    """Run the tasks that are not done, and note in `outcomes` how they end. Ray's own notes lie in `folder/.tune`.

    Raises ConfigError where Ray cannot be reached, or where there is too little for a trial.
    """
    total = sum(task.config.total_steps for task in tasks.values())
    begun = sum(min(steps_done(task.run), task.config.total_steps) for task in tasks.values())
    with Bar("sweep", total, start=begun, show=progress, overall=True) as bar:
        bar.say(f"{len(tasks)} trials in {folder}; starting Ray")
        try:
            with _connected(wanted.address), _signals_interrupt():
                cpus, gpus = wanted.resources()
                _fit(tasks, outcomes, folder, wanted, bar, cpus, gpus)
            _show(bar, tasks, outcomes, 0, last=True)
        except KeyboardInterrupt:
            bar.warn("stopped: the same command goes on, with every trial from its last checkpoint")
            raise


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray on this machine (`local`) for as long as the context lasts, or the cluster at `address`. One that the caller
    has connected to is used as it is, and stays. Raises ConfigError where no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing about a sweep leaves the machine
        options |= {"object_store_memory": MEMORY, "include_dashboard": False}
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "/" not in host:  # where nobody answers, Ray tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        with warnings.catch_warnings():
            # JAX warns of forks; Ray's become other programs at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(address, **options)
    except (OSError, ValueError, RuntimeError) as err:  # ConnectionError is an OSError
        if address == "local":
            raise
        raise ConfigError(
            f"Ray cannot be reached at {address!r} ({err}); start it with `ray start --head` and, on the other "
            "machines, `ray start --address=…`, or leave --address out for this machine alone"
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does; Ray's own handlers would abort the process."""

    def leave(number: int, _: Any) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: Ray's


def _fit(
    tasks: Mapping[str, Task],
    outcomes: dict[str, Outcome],
    folder: Path,
    wanted: Wanted,
    bar: Bar,
    cpus: float,
    gpus: float | None,
) -> None:
    os.environ.update(  # read by Tune: no files of its own beside the runs, no second table, Ctrl-C is ours
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        RAY_AIR_NEW_OUTPUT="0",
        RAY_CHDIR_TO_TRIAL_DIR="0",
    )
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    todo = {name: task for name, task in tasks.items() if not task.done}
    carrier = tune.with_parameters(_Carrier, tasks=todo, cpus=cpus, gpus=gpus)
    tuner = tune.Tuner(
        tune.with_resources(carrier, {"cpu": cpus, "gpu": gpus or 0}),
        param_space={"trial": tune.grid_search(list(todo))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=wanted.parallel,
            reuse_actors=False,  # a fresh process for every trial
            trial_name_creator=_named,
            trial_dirname_creator=_named,
        ),
        run_config=tune.RunConfig(
            name=".tune",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=wanted.failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Watch(tasks, outcomes, bar, wanted.failures)],
            verbose=0,
        ),
    )
    tuner.fit()


def _named(trial: Any) -> str:
    return trial.config["trial"]


class _Carrier(tune.Trainable):
    """What Ray runs, in the main thread of a process of its own, so that signals and time limits work as they do in
    `codream train`."""

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        self._task: Task = given["tasks"][config["trial"]]
        self._cpus, self._gpus = given["cpus"], given["gpus"]

    def step(self) -> dict[str, Any]:
        """All of the training. What trying again cannot mend is no failure to Ray, which would try."""
        try:
            return {"done": True, "told": carry_out(self._task, self._cpus, self._gpus)}
        except (ConfigError, UnknownEnvironment, ModuleNotFoundError) as err:
            return {"done": True, "refused": f"{type(err).__name__}: {err}"}
        except KeyboardInterrupt as err:  # a signal; it has saved
            raise RuntimeError(f"stopped by {err or 'an interrupt'}") from err


class _Watch(tune.Callback):
    """Keeps the bar and the outcomes up to date."""

    def __init__(self, tasks: Mapping[str, Task], outcomes: dict[str, Outcome], bar: Bar, failures: int):
        self._tasks, self._outcomes, self._bar, self._failures = tasks, outcomes, bar, failures
        self._looked = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes a copy to the disk, for ways to go on that are not ours."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called several times a second."""
        if time.monotonic() - self._looked < LOOKED:
            return
        running = sum(trial.status == "RUNNING" for trial in trials)
        _show(self._bar, self._tasks, self._outcomes, running)
        self._looked = time.monotonic()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        why = self._failed(trial)
        again = f"try {self._outcomes[_named(trial)].failures + 1} of {self._failures + 1}"
        self._bar.say(f"{_named(trial)} failed: {why}; {again} goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        why = self._failed(trial)
        self._outcomes[_named(trial)].state = "failed"
        self._bar.warn(f"{_named(trial)} failed for good: {why}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        outcome, result = self._outcomes[_named(trial)], trial.last_result
        outcome.state = "failed" if result.get("refused") else "finished"
        if said := result.get("refused") or result.get("told"):
            outcome.error = said
            self._bar.warn(f"{_named(trial)}: {said}")

    def _failed(self, trial: Any) -> str:
        outcome = self._outcomes[_named(trial)]
        outcome.failures += 1
        outcome.error = _why(trial)
        return outcome.error


def _show(
    bar: Bar, tasks: Mapping[str, Task], outcomes: Mapping[str, Outcome], running: int, *, last: bool = False
) -> None:
    """How far all trials are together."""
    done = 0
    for name, task in tasks.items():
        total = task.config.total_steps
        done += total if outcomes[name].state == "finished" else min(steps_done(task.run), total)
    states = [outcome.state for outcome in outcomes.values()]
    failed = states.count("failed")
    bar.note(
        f"{states.count('finished')} of {len(states)} trials done, {running} running"
        + (f", {failed} failed" if failed else "")
    )
    bar.update(done, last=last)


def _why(trial: Any) -> str:
    """The last failure of a trial in a line."""
    try:
        with Path(trial.pickled_error_file).open("rb") as file:
            err = pickle.load(file)  # written by Ray in this process
    except Exception as unread:
        return f"unknown ({unread})"
    err = getattr(err, "cause", None) or err
    if isinstance(err, RayActorError):
        return "its process died (killed, crashed, or its machine was lost)"
    text = str(err).strip().splitlines()
    return f"{type(err).__name__}: {text[0] if text else ''}"
