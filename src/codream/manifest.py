"""The manifest of a checkpoint: its format, what it must hold, and how those of earlier formats are read.

Reading is checked throughout: whatever a file holds, the answer is a manifest or a CheckpointError, and nothing in it
is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from codream.config import Config
from codream.envs import EnvSpec
from codream.reading import build

__all__ = ["FORMAT", "CheckpointDamaged", "CheckpointError", "Manifest", "digest", "read_manifest", "write_manifest"]

FORMAT = 2
"""Raised whenever what a checkpoint holds changes; `_MIGRATIONS` then gets the step from the one before."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another version, or does not fit the code; the message says which."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is not as it was written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says of a checkpoint, besides its own checksum."""

    format: int
    steps: int
    config: Config
    spec: EnvSpec
    versions: dict[str, str]
    arrays: tuple[str, ...]
    """Places of the arrays that Orbax holds."""
    empty: dict[str, tuple[Any, ...]]
    """Shape and dtype of the arrays without entries, which Orbax refuses."""
    keys: dict[str, str]
    """Places of random keys, and their implementation."""
    files: dict[str, str]
    """SHA-256 of every file."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because something was not finite."""
    score: dict[str, float] = dataclasses.field(default_factory=dict)
    """In cross-play, by `checkpoints_best`."""


def _from_1(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Format 2 adds `rollbacks` and `score`, and the configuration the options of checkpoints and health. Of wm_rnd
    there is one state that cannot be carried over."""
    config = values["config"]
    projection = config.get("projection", {})
    if config.get("algo") == "wm_rnd" and projection.get("coef", 0) > 0 and "gradient" not in projection:
        raise CheckpointError(
            f"checkpoint {path} has format 1, of a codream whose self-projection (wm_rnd with projection.coef > 0) had "
            f"no critic of its own: its loss was another one, so that this codream (format {FORMAT}) cannot go on with "
            f"it. It was written by codream {_writer(values)}, before projection.gradient existed; train anew"
        )
    return {**values, "rollbacks": 0, "score": {}}


_MIGRATIONS: dict[int, Callable[[dict[str, Any], Path], dict[str, Any]]] = {1: _from_1}
"""Step from each earlier format to the one after it. Gets a manifest that was checked, without its checksum."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, with its own checksum."""
    values = dataclasses.asdict(manifest)
    values["sha256"] = _own_digest(values)
    (folder / "manifest.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in folder `path`, brought to the present format.

    Raises CheckpointDamaged where it is not as it was written, CheckpointError for a format that cannot be read.
    """

    def damaged(why: str) -> CheckpointDamaged:
        return CheckpointDamaged(f"checkpoint {path} is damaged: {why}")

    try:
        values = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version = values["format"]
    except FileNotFoundError:
        raise damaged("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise damaged(f"manifest.json cannot be read ({type(err).__name__}: {err})") from err
    if version != FORMAT and (not isinstance(version, int) or version not in _MIGRATIONS):
        raise CheckpointError(
            f"checkpoint {path} has format {version}, but this version of codream reads format {FORMAT} and the "
            f"earlier {', '.join(map(str, _MIGRATIONS))}; it was written by codream {_writer(values)}"
        )
    if values.pop("sha256", None) != _own_digest(values):
        raise damaged("manifest.json does not have the contents that were written")
    try:
        while version != FORMAT:
            values = _MIGRATIONS[version](values, path)
            version += 1
        found = build(Manifest, {**values, "format": FORMAT})
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise damaged(f"manifest.json does not hold what it should ({err})") from err
    for name in found.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise damaged(f"{name!r} is not a file within it")
    return found


def _writer(values: Any) -> str:
    versions = values.get("versions") if isinstance(values, dict) else None
    return str(versions.get("codream", "unknown")) if isinstance(versions, dict) else "unknown"


def _own_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
