"""Run folders: the configuration, what it ran on, and the metrics, so that a run explains itself.

runs/<name>/config.json      the exact configuration
           /run.json         library versions, device, environment
           /metrics.jsonl    one line per `log_every` steps
           /.lock            held by the process that trains
           /checkpoints/     see codream.checkpoint
           /tensorboard/     the metrics as events, see codream.live
           /report.html      see codream.report; measured.json: what it measured by playing
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are not noticed
    fcntl = None

from codream.config import Config
from codream.envs import EnvSpec
from codream.envs.own import place_of

__all__ = ["Run", "RunError", "default_name", "file_to_write", "library_versions", "replace_text"]

_LIBRARIES = (
    "codream",
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pettingzoo",
    "mpe2",
    "jaxmarl",
)
_PACKAGE_OF = {"mpe2": "mpe2", "butterfly": "pettingzoo", "jaxmarl": "jaxmarl", "socialjax": "socialjax"}


class RunError(ValueError):
    """A run folder is missing, already there, or cannot be used as asked."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on disk. `path` is its folder."""

    path: Path

    @staticmethod
    def create(
        config: Config, spec: EnvSpec, *, name: str | None, root: str | Path, env: Any = None, seeds: int = 1
    ) -> Run:
        """Make a new folder; never touches one that exists.

        `config`: resolved. `env`: the environment, if it was given as an object, so that its name alone cannot make it.
        `seeds`: how many train together. Raises RunError if `name` is given and exists; a default name
        gets a number instead.
        """
        about = {
            "versions": library_versions(),
            "device": device() + (f", shared by {seeds} seeds" if seeds > 1 else ""),
            "environment": {
                "name": spec.name,
                "version": environment_version(spec.name),
                "by_object": env is not None,
                "maker": place_of(env),
                "agents": list(spec.agents),
                "num_actions": list(spec.num_actions),
            },
        }
        if name is not None and (Path(name).name != name or name == ".."):
            raise RunError(f"a run's name is that of a folder in {root}/, got {name!r}; another place: root (--root)")
        number, wanted = 1, name or f"{default_name(config)}-seed{config.seed}"
        while True:
            run = Run(Path(root) / (wanted if number == 1 else f"{wanted}-{number}"))
            if run._free():
                try:
                    with run.locked():  # another process may want the same name
                        if run._free():
                            run.write(config, about)
                            return run
                except RunError:
                    if name is not None:
                        raise
            elif name is not None:
                raise RunError(
                    f"{run.path} already exists and is never overwritten; choose another --name, or go on with it: "
                    f"{run.to_resume()}"
                )
            number += 1

    def _free(self) -> bool:
        """Whether a run can begin here: the folder does not exist, or holds at most what a run leaves behind that was
        killed while its folder was made."""
        if not self.path.exists():
            return True
        made = re.compile(r"\.lock|run\.json|\.(run|config)\.json\..*writing")
        return self.path.is_dir() and all(made.fullmatch(file.name) for file in self.path.iterdir())

    def write(self, config: Config, about: dict[str, Any]) -> None:
        """Make the folder, or what is missing of it. config.json comes last: with it the folder is a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "run.json", json.dumps(about, indent=2) + "\n")
        replace_text(self.path / "config.json", config.to_json() + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder meanwhile. Raises RunError if one does already.

        The operating system releases the lock with the process, however that ends.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise RunError(
                        f"{self.path} is in use by {file.read() or 'another process'}; two processes cannot train in "
                        "one folder: wait for it, stop it, or choose another --name"
                    ) from None
                except OSError as err:  # some network file systems have no locks
                    warnings.warn(
                        f"{self.path} cannot be locked ({err}); see to it that no other process trains in it",
                        RuntimeWarning,
                        stacklevel=3,
                    )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    @staticmethod
    def open(run: str | Path | Run, root: str | Path = "runs") -> Run:
        """A run by its folder, or by its name under `root`. Raises RunError that lists the nearest."""
        if isinstance(run, Run):
            return run
        if not isinstance(run, str | os.PathLike):
            raise RunError(f"expected a run, by its folder, its name or as a codream.Run, got {type(run).__name__}")
        for path in (Path(run), Path(root) / run):
            if (path / "config.json").is_file():
                return Run(path)
        every = [str(path.parent) for path in sorted(Path(root).glob("*/config.json"))]
        near = difflib.get_close_matches(str(run), every, n=3, cutoff=0.3)
        what = (
            "is not a run (it has no config.json)"
            if Path(run).is_dir() or (Path(root) / run).is_dir()
            else "does not exist"
        )
        listed = ", ".join(near + [other for other in every if other not in near])
        raise RunError(f"the run {run} {what}; runs in {root}/: {listed or 'none'}")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def measured(self) -> Path:
        """What the latest report measured by playing."""
        return self.path / "measured.json"

    @property
    def config(self) -> Config:
        """The configuration it was started with or last resumed with."""
        try:
            return Config.from_json((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise RunError(f"{self.path / 'config.json'} cannot be read: {err}") from err

    @property
    def about(self) -> dict[str, Any]:
        """Versions, device and environment, from run.json."""
        try:
            about = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            if not isinstance(about, dict) or not isinstance(about["environment"]["by_object"], bool):
                raise ValueError("expected an object that tells of the environment")
            return about
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            raise RunError(f"{self.path / 'run.json'} cannot be read: {type(err).__name__}: {err}") from err

    @property
    def by_object(self) -> bool:
        """Whether its environment was given as an object, so that its name alone cannot make it."""
        return self.about["environment"]["by_object"]

    @property
    def maker(self) -> str | None:
        """MODULE:NAME of what made its environment, where it was given as an object and can be found like that. It is
        only told, never imported."""
        place = self.about["environment"].get("maker")
        # It is told as something to type, and a run may come from anywhere.
        return place if isinstance(place, str) and re.fullmatch(r"[\w.]+:[\w.]+", place) else None

    def made_by(self, env: Any) -> None:
        """Note where the environment is found that this run goes on with, if that can be said."""
        about, place = self.about, place_of(env)
        if about["environment"]["by_object"] and place not in (None, self.maker):
            about["environment"]["maker"] = place
            replace_text(self.path / "run.json", json.dumps(about, indent=2) + "\n")

    def refuse_without_its_environment(self, env: Any) -> None:
        """Raise RunError where it was trained on an object, and `env` is None."""
        if env is None and self.by_object:
            raise RunError(
                f"{self.path} was trained on an environment given as an object; pass it again: on the command line "
                f"--env-from {self.maker or 'MODULE:NAME'}, in Python env=…"
            )

    def refuse_other_environment(self, trained: EnvSpec, now: EnvSpec) -> None:
        """Raise RunError, saying what differs, where the environment is not the one that it was trained on."""
        for field in dataclasses.fields(EnvSpec):
            before, after = getattr(trained, field.name), getattr(now, field.name)
            if before != after:
                raise RunError(
                    f"{self.path} was trained on another environment: {field.name} was {before}, now it is {after}. "
                    "Use the environment and the library versions named in its run.json"
                )

    def typed(self, command: str) -> str:
        """A command on this run, e.g. `report`, as it has to be typed."""
        try:
            own = f" --env-from {self.maker or 'MODULE:NAME'}" if self.by_object else ""
        except RunError:  # its notes are damaged
            own = ""
        return f"codream {command} {shlex.quote(str(self.path))}{own}"

    def to_resume(self, *, checkpoint: int | None = None, total_steps: int | None = None) -> str:
        """What to type to go on; in Python, where the environment is an object that only a script has."""
        try:
            in_python = self.by_object and self.maker is None
        except RunError:
            in_python = False
        if not in_python:
            given = {"checkpoint": checkpoint, "total-steps": total_steps}
            options = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
            return self.typed("train --resume") + options
        config = "" if total_steps is None else f"dataclasses.replace(run.config, total_steps={total_steps}), "
        return (
            f"codream.train({config}resume={json.dumps(str(self.path), ensure_ascii=False)}, env=…"
            + ("" if checkpoint is None else f", checkpoint={checkpoint}")
            + ")"
        )

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl. A last line that was cut off in writing is left out; RunError for any other that
        cannot be read."""
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as err:
            raise RunError(f"{self.path / 'metrics.jsonl'} cannot be read: {err}") from err
        found = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                values = json.loads(line)
                if not isinstance(values, dict) or not isinstance(values.get("steps"), int | float):
                    raise ValueError("expected an object with its steps")
                found.append(values)
            except (ValueError, RecursionError) as err:
                raise RunError(
                    f"line {number} of {self.path / 'metrics.jsonl'} cannot be read ({err}); remove it to go on"
                ) from err
        return found

    def rewind(self, config: Config, steps: int) -> None:
        """Before going on from `steps`: keep `config`, and drop metrics of steps that will be taken anew, and what was
        measured after them."""
        replace_text(self.path / "config.json", config.to_json() + "\n")
        kept = [line for line in self.metrics() if line["steps"] <= steps]
        replace_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(self.measured.read_text(encoding="utf-8"))["steps"] > steps:
                self.measured.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)


def default_name(config: Config) -> str:
    """Environment and preset, as a folder's name."""
    env = re.sub(r"_v\d+$", "", config.env.removeprefix("mpe2:"))
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', env)}-{config.preset}"


def file_to_write(path: str | Path) -> Path:
    """The path of a file that will be written once much has been done for it; its folder is made now. Raises RunError
    where it cannot be."""
    file = Path(path)
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RunError(f"expected a file that can be written, got {path}: {err}") from err
    return file


def replace_text(file: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it, or finds it after a crash, has the old or the new one.

    A link or what is no file, such as /dev/stdout, is written through and stays what it is.
    """
    if file.is_symlink() or (file.exists() and not file.is_file()):
        file.write_text(text, encoding="utf-8")
        return
    # Others may write it at the same time.
    writing = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.writing")
    try:
        with writing.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(writing, file)
    finally:
        writing.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ what it ran on


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment_version(name: str) -> str | None:
    """Library and version behind an environment's name, e.g. `mpe2 1.1.1`; None for one given as an
    object."""
    package = _PACKAGE_OF.get(name.partition(":")[0])
    if package is None:
        return None
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return f"{package} {getattr(importlib.import_module(package), '__version__', 'of unknown version')}"


def device() -> str:
    """The device that computes, e.g. `cpu (x86_64, 2 cores)` or `gpu (NVIDIA H100)`."""
    import jax

    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    return f"{first.platform} ({first.device_kind})"
