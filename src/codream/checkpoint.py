"""Checkpoints: save a run in progress, verify and restore it. The one file that imports Orbax.

A checkpoint is `checkpoints/<steps>/`: the arrays of the runner as Orbax writes them, and `manifest.json`
with the configuration, the environment's shapes, library versions and the SHA-256 of every file. What is
not an array is rebuilt from the configuration; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from codream.config import Config
from codream.envs import EnvSpec
from codream.runs import library_versions

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointError",
    "find",
    "restore",
    "save",
    "saved",
    "set_aside",
    "while_it_goes_on",
]

T = TypeVar("T")
TRIES = 5  # to read a checkpoint of a run that goes on
FORMAT = 1  # raised whenever what a checkpoint holds changes


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another version, or does not fit the code; the message says
    which."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: every file is as it was written."""

    path: Path
    steps: int
    config: Config
    spec: EnvSpec
    manifest: dict[str, Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by their place in the runner, e.g. `state.agents.return_scale`."""
        ocp = _orbax()
        names = self.manifest["arrays"]
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore((self.path / "arrays").absolute(), restore_args=wanted)
        empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.manifest["empty"].items()}
        return {**found, **empty}


def save(runner: Any, folder: Path, *, config: Config, spec: EnvSpec, steps: int, kept: int) -> Path:
    """Write `folder/<steps>` under a temporary name, rename it, and delete all but the `kept` latest."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".writing-*"):  # left by a run that was killed while it wrote
        shutil.rmtree(old)
    final, writing = folder / str(steps), folder / f".writing-{steps}"
    arrays, keys = _flat_arrays(runner)
    # Orbax refuses arrays without entries.
    empty = {name: (list(x.shape), x.dtype.name) for name, x in arrays.items() if x.size == 0}
    full = {name: x for name, x in arrays.items() if x.size}
    writing.mkdir()
    with _orbax().PyTreeCheckpointer() as checkpointer:
        checkpointer.save((writing / "arrays").absolute(), full)
    manifest = {
        "format": FORMAT,
        "steps": steps,
        "config": json.loads(config.to_json()),
        "spec": dataclasses.asdict(spec),
        "versions": library_versions(),
        "arrays": sorted(full),
        "empty": empty,
        "keys": keys,
        "files": {str(f.relative_to(writing)): _sha256(f) for f in _files(writing)},
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    (writing / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.rename(writing, final)
    for old in list(saved(folder).values())[:-kept]:
        shutil.rmtree(old)
    return final


def saved(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by steps, oldest first. None of them is looked into."""
    found = {int(path.name): path for path in folder.glob("*") if path.name.isdigit()}
    return dict(sorted(found.items()))


def set_aside(folder: Path, steps: int) -> None:
    """Move checkpoints later than `steps` to `folder/set_aside`: a run that goes on from `steps` replaces
    them."""
    for later, path in saved(folder).items():
        if later > steps:
            target = folder / "set_aside" / path.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)


def find(run: Path, steps: int | None = None) -> Checkpoint:
    """The latest checkpoint of a run, or the one at `steps`, verified.

    Raises CheckpointError if there is none, or if it is damaged or of another version; the message then
    names the newest earlier checkpoint that is good, and the command that uses it.
    """
    every = saved(run / "checkpoints")
    if not every:
        raise CheckpointError(f"{run} has no checkpoint yet")
    if steps is None:
        steps = max(every)
    if steps not in every:
        raise CheckpointError(f"{run} has no checkpoint at step {steps}; it has {', '.join(map(str, every))}")
    try:
        return _verified(every[steps])
    except CheckpointError as err:
        raise CheckpointError(f"{err}\n{_offer(run, every, steps)}") from err


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
            f"  codream train --resume {run} --checkpoint {earlier}"
        )
    return f"No earlier checkpoint of {run} can be used; the run has to start again."


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
        value = jnp.array(values[place])  # a copy: the driver donates its buffers
        if place in checkpoint.manifest["keys"]:
            value = jax.random.wrap_key_data(value, impl=checkpoint.manifest["keys"][place])
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise _misfit(
                checkpoint,
                f"{place} should be {leaf.dtype}{list(leaf.shape)} but is {value.dtype}{list(value.shape)}",
            )
        return value

    return jax.tree.unflatten(tree, [one(path, leaf) for path, leaf in leaves])


def _misfit(checkpoint: Checkpoint, what: str) -> CheckpointError:
    then = checkpoint.manifest["versions"].get("codream")
    return CheckpointError(
        f"checkpoint {checkpoint.path} does not fit this code: {what}. It was written by codream "
        f"{then} with the environment {checkpoint.spec.name}; use the same versions (see run.json beside it)"
    )


def _verified(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises CheckpointError with the path and the reason."""

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {path} is damaged: {why}")

    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError:
        raise damaged("manifest.json is missing") from None
    except (ValueError, KeyError, TypeError) as err:
        raise damaged(f"manifest.json cannot be read ({type(err).__name__}: {err})") from err
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, but this version of codream reads format {FORMAT}; "
            f"it was written by codream {manifest.get('versions', {}).get('codream', 'unknown')}"
        )
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise damaged("manifest.json does not have the contents that were written")
    present = {str(file.relative_to(path)) for file in _files(path)} - {"manifest.json"}
    for name, digest in manifest["files"].items():
        if name not in present:
            raise damaged(f"{name} is missing")
        if _sha256(path / name) != digest:
            raise damaged(f"{name} does not have the contents that were written (its SHA-256 differs)")
    spec = manifest["spec"]
    return Checkpoint(
        path=path,
        steps=manifest["steps"],
        config=Config.from_json(json.dumps(manifest["config"])),
        spec=EnvSpec(
            name=spec["name"],
            agents=tuple(spec["agents"]),
            obs_shapes=tuple(tuple(shape) for shape in spec["obs_shapes"]),
            num_actions=tuple(spec["num_actions"]),
            has_mask=spec["has_mask"],
        ),
        manifest=manifest,
    )


# ------------------------------------------------------------------------------------------ arrays and files


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _flat_arrays(runner: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays by place, and the implementation of those that are random keys."""
    arrays: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(eqx.filter(runner, eqx.is_array))[0]:
        place = _place(path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys[place] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[place] = np.asarray(leaf)
    return arrays, keys


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _orbax() -> Any:
    """Orbax takes a second to import and logs every step it makes."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp
