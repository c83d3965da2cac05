"""Which checkpoints a run's folder has, and which it keeps: the latest, some for good, the best."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from codream.config import Config
from codream.manifest import CheckpointError, read_manifest

__all__ = ["best", "delete", "prune", "reached", "saved", "set_aside"]

FOR_GOOD = "kept_for_good"  # an empty file in a checkpoint that `checkpoints_nth` chose


def saved(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by steps, oldest first. None of them is looked into."""
    found = {int(path.name): path for path in folder.glob("*") if path.name.isdecimal() and path.name.isascii()}
    return dict(sorted(found.items()))


def reached(folder: Path, steps: int) -> bool:
    """Whether the latest checkpoint is of this step or a later one."""
    return max(saved(folder), default=-1) >= steps


def best(folder: Path, score: str | None = None) -> int | None:
    """Steps of the checkpoint with the highest score in cross-play (the latest of equals); None if none has one.

    `score`: as `checkpoints_best` names it; without one, the one that each checkpoint has.
    """
    found: dict[int, float] = {}
    for steps, path in saved(folder).items():
        try:
            scores = read_manifest(path).score
        except CheckpointError:
            continue
        wanted = {score} & scores.keys() if score is not None else scores
        if wanted:
            found[steps] = max(scores[name] for name in wanted)
    return max(found, key=lambda steps: (found[steps], steps), default=None)


def set_aside(folder: Path, steps: int) -> None:
    """Move checkpoints later than `steps` to `folder/set_aside`: a run that goes on from `steps` replaces
    them."""
    for later, path in saved(folder).items():
        if later > steps:
            target = folder / "set_aside" / path.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)


def prune(folder: Path, config: Config) -> None:
    """Delete all checkpoints but the `checkpoints_kept` latest, every `checkpoints_nth`, and the best."""
    every = saved(folder)
    keep = set(list(every)[-config.checkpoints_kept :]) | _for_good(every, config)
    if config.checkpoints_best is not None:
        keep.add(best(folder, config.checkpoints_best) or -1)
    for steps, path in every.items():
        if steps not in keep:
            delete(path)


def _for_good(every: dict[int, Path], config: Config) -> set[int]:
    """Those marked as kept for good, whatever the options were then, and those that now are to be: the first at or
    after each multiple of the interval, as a checkpoint waits for running episodes to end."""
    kept = {steps for steps, path in every.items() if (path / FOR_GOOD).exists()}
    interval = config.checkpoint_every * config.checkpoints_nth
    before = max(0, min(every, default=0) - config.checkpoint_every)  # where one was that is gone
    for steps, path in every.items() if interval else ():
        if steps not in kept and steps // interval > before // interval:
            (path / FOR_GOOD).touch()
            kept.add(steps)
        before = steps if steps in kept else before
    return kept


def delete(path: Path) -> None:
    """Delete a checkpoint: renamed first, so that what is left of a deletion that was cut off is no damaged one."""
    going = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    shutil.rmtree(going)
