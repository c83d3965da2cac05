"""Checkpoints: save a run in progress, verify and restore it. The one file that imports Orbax.

A checkpoint is `checkpoints/<steps>/`: the arrays of the runner as Orbax writes them, and `manifest.json`
with the configuration, the environment's shapes, library versions and the SHA-256 of every file. What is
not an array is rebuilt from the configuration; nothing is pickled, and reading one runs nothing that it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from codream.config import Config
from codream.envs import EnvSpec
from codream.manifest import (
    FORMAT,
    CheckpointDamaged,
    CheckpointError,
    Manifest,
    digest,
    read_manifest,
    write_manifest,
)
from codream.retention import best, delete, saved
from codream.runs import Run, library_versions

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointError",
    "Snapshot",
    "find",
    "latest_good",
    "restore",
    "snapshot",
    "while_it_goes_on",
    "write",
]

T = TypeVar("T")
TRIES = 5  # to read a checkpoint of a run that goes on


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The arrays of a runner on the host, by place, and the implementation of those that are random keys."""

    arrays: dict[str, np.ndarray]
    keys: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: every file is as it was written."""

    path: Path
    manifest: Manifest

    @property
    def steps(self) -> int:
        return self.manifest.steps

    @property
    def config(self) -> Config:
        return self.manifest.config

    @property
    def spec(self) -> EnvSpec:
        return self.manifest.spec

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by their place in the runner, e.g. `state.agents.return_scale`. Raises CheckpointDamaged."""
        wanted = {name: _orbax().RestoreArgs(restore_type=np.ndarray) for name in self.manifest.arrays}
        try:
            with _checkpointer() as checkpointer, _plain(self.path.absolute()) as place:
                found = checkpointer.restore(place / "arrays", restore_args=wanted)
            empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.manifest.empty.items()}
        except Exception as err:  # whatever Orbax makes of files that it did not write
            reason = f"its arrays cannot be read ({type(err).__name__}: {(str(err).splitlines() or [''])[0]})"
            raise CheckpointDamaged(f"checkpoint {self.path} is damaged: {reason}") from err
        return {**found, **empty}


# ------------------------------------------------------------------------------------------ writing


def snapshot(runner: Any) -> Snapshot:
    """A copy of all arrays on the host, by place; what happens to the runner's own no longer matters."""
    found = jax.tree_util.tree_flatten_with_path(eqx.filter(runner, eqx.is_array))[0]
    keys = {
        _place(path): str(jax.random.key_impl(leaf))
        for path, leaf in found
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    data = {_place(path): jax.random.key_data(x) if _place(path) in keys else x for path, x in found}
    # A copy: on the CPU what `device_get` gives shares the buffer, which is used again.
    return Snapshot({place: np.array(x) for place, x in jax.device_get(data).items()}, keys)


def write(
    taken: Snapshot,
    folder: Path,
    *,
    config: Config,
    spec: EnvSpec,
    steps: int,
    rollbacks: int = 0,
    score: dict[str, float] | None = None,
) -> Path:
    """Write `folder/<steps>` under a temporary name, and rename it once all of it is on the disk.

    Raises OSError, and leaves nothing behind, where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob(".writing-*"), *folder.glob(".deleting-*")]:  # of a run that was killed meanwhile
        shutil.rmtree(old, ignore_errors=True)  # a reader elsewhere may hold what is being deleted
    final, writing = folder / str(steps), folder / f".writing-{steps}"
    # Orbax refuses arrays without entries.
    full = {name: x for name, x in taken.arrays.items() if x.size}
    empty = {name: (list(x.shape), x.dtype.name) for name, x in taken.arrays.items() if x.size == 0}
    try:
        writing.mkdir()
        with _checkpointer() as checkpointer, _plain(writing.absolute()) as place:
            checkpointer.save(place / "arrays", full)
        if not (writing / "arrays" / "manifest.ocdbt").exists():  # what its arrays are found by
            raise OSError(f"Orbax left no list of arrays in {writing}, so that they could not be read again")
        manifest = Manifest(
            format=FORMAT,
            steps=steps,
            config=config,
            spec=spec,
            versions=library_versions(),
            arrays=tuple(sorted(full)),
            empty=empty,
            keys=taken.keys,
            files={str(f.relative_to(writing)): digest(f) for f in _files(writing)},
            rollbacks=rollbacks,
            score=score or {},
        )
        write_manifest(writing, manifest)
        for path in [*writing.rglob("*"), writing]:
            _sync(path)
    except BaseException as err:
        shutil.rmtree(writing, ignore_errors=True)
        if isinstance(err, ValueError):  # as which Orbax tells of a full disk
            raise OSError(str(err).splitlines()[0]) from err
        raise
    if final.exists():
        delete(final)
    os.rename(writing, final)
    _sync(folder)
    return final


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """The folder by a path of ordinary letters: Orbax looks for what it wrote with `glob`, for which [1] in a name
    stands for 1, and to TensorStore a backslash is a slash."""
    if glob.escape(str(folder)) == str(folder) and (os.name == "nt" or "\\" not in str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="codream-") as aside:
        link = Path(aside) / "checkpoint"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# ------------------------------------------------------------------------------------------ finding


def find(run: Path, steps: SupportsIndex | str | None = None) -> Checkpoint:
    """The latest checkpoint of a run, the one at `steps`, or the `best` in cross-play, verified.

    Raises CheckpointError if there is none, or if it is damaged or of another version; the message then
    names the newest earlier checkpoint that is good, and the command that uses it.
    """
    every = saved(run / "checkpoints")
    if not every:
        raise CheckpointError(f"{run} has no checkpoint yet")
    if steps == "best":
        steps = best(run / "checkpoints", Run(run).config.checkpoints_best)
        if steps is None:  # of the score that it has now; another may have been asked for before
            steps = best(run / "checkpoints")
        if steps is None:
            raise CheckpointError(f"no checkpoint of {run} has a score; train with --checkpoints-best SIDE:OPPONENT")
    if steps is None:
        steps = max(every)
    try:
        steps = operator.index(steps)  # pyright: ignore[reportArgumentType]  # NumPy's integers too
    except TypeError:
        raise CheckpointError(f"expected a checkpoint by its step, a whole number, or best; got {steps!r}") from None
    if steps not in every:
        raise CheckpointError(f"{run} has no checkpoint at step {steps}; it has {', '.join(map(str, every))}")
    try:
        return _verified(every[steps])
    except CheckpointError as err:
        raise CheckpointError(f"{err}\n{_offer(run, every, steps)}") from err


def latest_good(run: Path, tell: Callable[[str], None]) -> Checkpoint:
    """The latest checkpoint that is not damaged; of those that are it is told, and why.

    Raises CheckpointError if there is none, or if the latest good one is of a format that cannot be read.
    """
    every = saved(run / "checkpoints")
    for steps in sorted(every, reverse=True):
        try:
            return _verified(every[steps])
        except CheckpointDamaged as err:
            tell(f"{err}. Going on from the checkpoint before it")
    if every:
        raise CheckpointError(f"every checkpoint of {run} is damaged; the run has to start again, under another name")
    raise CheckpointError(f"{run} has no checkpoint yet")


def while_it_goes_on(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the checkpoints in `folder`; read again where training has meanwhile written a new one, and
    deleted the one that was being read."""
    for _ in range(TRIES):
        before = list(saved(folder))
        try:
            return read()
        except (CheckpointError, OSError, ValueError):
            if list(saved(folder)) == before:
                raise
    return read()


def _offer(run: Path, every: dict[int, Path], steps: int) -> str:
    for earlier in sorted((s for s in every if s < steps), reverse=True):
        try:
            _verified(every[earlier])
        except CheckpointError:
            continue
        return (
            f"The checkpoint before it, of step {earlier}, is good; go on from there with\n"
            f"  {Run(run).to_resume(checkpoint=earlier)}"
        )
    return f"No earlier checkpoint of {run} can be used; the run has to start again."


def _verified(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises CheckpointError with the path and the reason."""
    manifest = read_manifest(path)
    present = {str(file.relative_to(path)) for file in _files(path)} - {"manifest.json"}
    for name, wanted in manifest.files.items():
        if name not in present:
            raise CheckpointDamaged(f"checkpoint {path} is damaged: {name} is missing")
        try:
            same = digest(path / name) == wanted
        except OSError as err:
            raise CheckpointDamaged(f"checkpoint {path} is damaged: {name} cannot be read ({err})") from err
        if not same:
            raise CheckpointDamaged(
                f"checkpoint {path} is damaged: {name} does not have the contents that were written (its SHA-256 "
                "differs)"
            )
    return Checkpoint(path, manifest)


# ------------------------------------------------------------------------------------------ restoring


def restore(template: Any, checkpoint: Checkpoint) -> Any:
    """A runner with the arrays of `checkpoint` and everything else from `template` (whose arrays may be
    abstract).

    Raises CheckpointError, naming the first place, if the arrays are not those that `template` has.
    """
    values = checkpoint.arrays()
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    wanted = {_place(path): leaf for path, leaf in leaves if _is_array(leaf)}
    for place in sorted(wanted.keys() ^ values.keys()):
        where = "in the checkpoint only" if place in values else "not in the checkpoint"
        raise _misfit(checkpoint, f"{place} is {where}")

    def one(path: Any, leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        place = _place(path)
        try:
            value = jnp.array(values[place])  # a copy: the driver donates its buffers
            if place in checkpoint.manifest.keys:
                value = jax.random.wrap_key_data(value, impl=checkpoint.manifest.keys[place])
        except (TypeError, ValueError) as err:
            raise _misfit(
                checkpoint, f"{place} should be {leaf.dtype}{list(leaf.shape)} but cannot be ({err})"
            ) from err
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise _misfit(
                checkpoint,
                f"{place} should be {leaf.dtype}{list(leaf.shape)} but is {value.dtype}{list(value.shape)}",
            )
        return value

    return jax.tree.unflatten(tree, [one(path, leaf) for path, leaf in leaves])


def _misfit(checkpoint: Checkpoint, what: str) -> CheckpointError:
    then = checkpoint.manifest.versions.get("codream")
    return CheckpointError(
        f"checkpoint {checkpoint.path} does not fit this code: {what}. It was written by codream "
        f"{then} with the environment {checkpoint.spec.name}; use the same versions (see run.json beside it)"
    )


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _checkpointer() -> Any:
    """Orbax's, of this process alone: on several hosts it would wait for the others to come too."""
    ocp, this = _orbax(), jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _orbax() -> Any:
    """Orbax takes a second to import and logs every step it makes."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp
