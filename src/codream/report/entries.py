"""Several runs to be compared: what was logged, which of them differ in nothing but the seed, what was measured."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from codream.config import KEEPING
from codream.report.lines import metrics_of
from codream.report.measures import latest_measures
from codream.runs import Run

__all__ = [
    "FREE",
    "SHARES",
    "Entry",
    "Scores",
    "conditions",
    "entry_of",
    "measured",
    "methods",
    "runs_in",
    "told_apart",
    "units",
]

SHARES = ("equality", "cooperation")  # between 0 and 1
Scores = dict[str, dict[str, list[float]]]  # by measure and group, one number a run


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run, as far as it could be read."""

    run: Run
    name: str
    environment: str
    """Its name, with its keywords: with others it is another game."""
    agents: tuple[str, ...]
    metrics: list[dict[str, float]]
    warnings: list[str]
    device: str


def runs_in(given: str | Path | Run, root: str | Path = "runs") -> list[Run]:
    """The run, by its folder or name; or all runs of a folder, by name."""
    for folder in () if isinstance(given, Run) else (Path(given), Path(root) / given):
        if (folder / "config.json").exists():
            break
        if inner := sorted(path.parent for path in folder.glob("*/config.json")):
            return [Run(path) for path in inner]
    return [Run.open(given, root)]


def entry_of(run: Run) -> Entry:
    """Raises RunError where the folder's own files cannot be read."""
    about = run.about
    metrics, warnings = metrics_of(run)
    environment, keywords = about["environment"], run.config.env_kwargs
    game = environment["name"] + (f" {json.dumps(keywords, sort_keys=True)}" if keywords else "")
    return Entry(run, run.path.name, game, tuple(environment["agents"]), metrics, warnings, about["device"])


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """The same, with the folder's own folder in the names of those that have a name in common."""
    for name in (lambda path: path.name, lambda path: f"{path.resolve().parent.name}/{path.name}", str):
        names = [name(entry.run.path) for entry in entries]
        common = collections.Counter(names)
        if len(common) == len(names):
            break
    shared = collections.Counter(entry.name for entry in entries)
    return [
        dataclasses.replace(entry, name=named) if shared[entry.name] > 1 else entry
        for entry, named in zip(entries, names, strict=True)
    ]


FREE = ("seed", "total_steps", *KEEPING)
"""Options that do not make another method of a run."""


def methods(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Runs that differ in nothing but the seed, under a name of their own; two of one seed are no sample of seeds."""
    groups: dict[str, list[Entry]] = {}
    seen: collections.Counter[str] = collections.Counter()
    for entry in entries:
        config = dataclasses.asdict(entry.run.config)
        for free in FREE:
            config.pop(free)
        whole = json.dumps([config, entry.run.config.seed], sort_keys=True)
        groups.setdefault(json.dumps([config, seen[whole]], sort_keys=True), []).append(entry)
        seen[whole] += 1
    named: dict[str, list[Entry]] = {}
    for group in groups.values():
        name = re.sub(r"-?seed\d+(-\d+)?$", "", group[0].name) or group[0].name
        name = group[0].name if len(group) == 1 else name
        while name in named:
            name += " ′"
        named[name] = group
    return named


def measured(groups: Mapping[str, Sequence[Entry]], sides: Mapping[str, Sequence[int]]) -> Scores:
    """What earlier reports measured of the runs' latest checkpoints against the references: for each measure and group,
    one number a run."""
    found: Scores = {}
    for label, group in groups.items():
        for entry in group:
            measured = latest_measures(entry.run)
            for row in measured["cross_play"]["rows"] if measured else []:
                for side in sides:
                    who = [row["sides"][other] for other in row["sides"] if other != side]
                    if row["sides"].get(side) != "self" or "self" in who:
                        continue
                    members = measured["cross_play"]["members"][side] if measured else []
                    mean = float(np.mean([row["returns"][agent] for agent in members]))
                    line = f"{side} against {', '.join(dict.fromkeys(who))}" if who else f"{side}: return of one"
                    found.setdefault(line, {}).setdefault(label, []).append(mean)
            social = (measured["cross_play"].get("social") or {}) if measured else {}
            for name in ("efficiency", "equality", "sustainability"):
                if social.get(name) is not None:
                    found.setdefault(name, {}).setdefault(label, []).append(social[name][0])
            if social.get("cooperation"):
                found.setdefault("cooperation", {}).setdefault(label, []).append(social["cooperation"]["all"][0])
    return found


def conditions(groups: Mapping[str, Sequence[Entry]]) -> str | None:
    """How what `measured` gives was measured, and how differently where runs differ in it, as a sentence; None if
    nothing was."""
    all_of = [latest_measures(entry.run) for group in groups.values() for entry in group]
    played = [one["cross_play"] for one in all_of if one is not None]
    if not played:
        return None
    ways = sorted({"greedy" if one["greedy"] else "sampled" for one in played})
    return (
        f"{' and '.join(ways).capitalize()} actions{' (not to be compared)' if len(ways) > 1 else ''}, "
        f"{_span([one['episodes'] for one in played])} episodes of every pairing after "
        f"{_span([one['steps'] for one in played])} steps; "
        f"{', '.join(sorted({one['version'] or one['environment'] for one in played}))}; "
        f"{', '.join(sorted({one['device'] for one in played}))}."
    )


def _span(values: Sequence[int]) -> str:
    least, most = f"{min(values):,}", f"{max(values):,}"
    return least if least == most else f"{least} to {most}"


def units(scores: Scores) -> str:
    """What the lines of `measured` are, in words."""
    others = {
        "efficiency": "efficiency: the sum of all agents’",
        "equality": "equality: 1 − Gini",
        "sustainability": "sustainability: mean step of what is earned",
        "cooperation": "cooperation: share of cooperative choices",
    }
    return "; ".join(["return of one agent per episode", *(said for name, said in others.items() if name in scores)])
