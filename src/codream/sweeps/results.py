"""What came of a sweep: a table over its combinations, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from codream.report.entries import SHARES, Entry, Scores, conditions, entry_of, measured, methods, units
from codream.report.lines import sides_of
from codream.runs import Run, RunError, replace_text
from codream.statistics import SAID, Summary, summarised
from codream.sweeps.design import Trial
from codream.sweeps.work import Outcome

__all__ = ["FILE", "Game", "games_of", "table", "write"]

FILE = "sweep.json"
FORMAT = 1
LONGEST = 24  # characters of a combination's name that are kept on one line
LAST = 0.1  # of the steps, whose training returns are a run's score where nobody played


@dataclasses.dataclass(frozen=True)
class Game:
    """The trials on one environment."""

    environment: str
    groups: dict[str, list[Entry]]
    """Runs that differ in nothing but the seed, by their combination's name."""
    scores: Scores
    """By measure and combination, one number a run."""

    @property
    def conditions(self) -> str:
        """How they were measured."""
        return conditions(self.groups) or f"Training episodes, over the last {LAST:.0%} of the steps."


def games_of(runs: Sequence[Run]) -> list[Game]:
    """The runs that can be read, by game: cross-play as it was measured, else the returns at the end of training."""
    entries = []
    for run in runs:
        try:
            entries.append(entry_of(run))
        except RunError:  # it says so itself when it is asked for
            continue
    found = []
    for environment, agents in dict.fromkeys((entry.environment, entry.agents) for entry in entries):
        groups = methods([entry for entry in entries if (entry.environment, entry.agents) == (environment, agents)])
        sides = sides_of(agents)
        found.append(Game(environment, groups, measured(groups, sides) or _returns(groups, sides)))
    return found


def _returns(groups: Mapping[str, Sequence[Entry]], sides: Mapping[str, Sequence[int]]) -> Scores:
    """The return of one agent of each side in training episodes, over the last tenth of the steps."""
    scores: Scores = {}
    for label, group in groups.items():
        for entry in group:
            end = max((row["steps"] for row in entry.metrics), default=0)
            late = [row for row in entry.metrics if row["steps"] >= (1 - LAST) * end]
            for side, members in sides.items():
                names = [f"episode/return/{entry.agents[i]}" for i in members]
                values = [row[name] for row in late for name in names if name in row]
                if values:
                    line = f"{side}: return at the end of training"
                    scores.setdefault(line, {}).setdefault(label, []).append(float(np.mean(values)))
    return scores


def table(game: Game, summary: Summary = "iqm") -> Table:
    """A row per combination, a column per measure; the best of each column is bold."""
    shown = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    shown.title = escape(f"{game.environment}: {units(game.scores)}")
    shown.caption = escape(f"{SAID[summary].capitalize()}. Bold: the best of its column. {game.conditions}")
    shown.caption_justify = "left"
    shown.add_column("combination", overflow="fold", min_width=min(LONGEST, max(map(len, game.groups))))
    for line in game.scores:
        shown.add_column(escape(line.replace(" against ", "\nagainst ")), justify="right")
    middles = {
        line: {label: _summary(values, summary)["middle"] for label, values in scores.items()}
        for line, scores in game.scores.items()
    }
    for label, group in game.groups.items():
        cells = []
        for line, scores in game.scores.items():
            if label not in scores:
                cells.append("–")
                continue
            best = len(middles[line]) > 1 and middles[line][label] == max(middles[line].values())
            cell = _cell(_summary(scores[label], summary), 2 if line in SHARES else 1, best, summary)
            few = f"\n[dim]of {len(scores[label])}[/dim]" if len(scores[label]) < len(group) else ""
            cells.append(cell + few)
        seeds = "1 seed" if len(group) == 1 else f"{len(group)} seeds"
        shown.add_row(f"{escape(label)}\n[dim]{seeds}[/dim]", *cells, end_section=True)
    return shown


def _cell(found: Mapping[str, Any], digits: int, best: bool, summary: Summary) -> str:
    middle = f"{found['middle']:.{digits}f}"
    text = f"[bold]{middle}[/bold]" if best else middle
    if len(found["runs"]) == 1:
        return text
    if summary == "median":
        return f"{text}\n± {found['high'] - found['middle']:.{digits}f}"
    return f"{text}\n\\[{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _summary(values: Sequence[float], summary: Summary) -> dict[str, Any]:
    middle, low, high = (float(x[0]) for x in summarised(np.asarray(values)[:, None], summary))
    return {"middle": middle, "low": low, "high": high, "runs": list(values)}


def write(
    folder: Path,
    trials: Sequence[Trial],
    outcomes: Mapping[str, Outcome],
    games: Sequence[Game],
    summary: Summary = "iqm",
) -> Path:
    """`sweep.json`: every trial with what it sets and how it ended, and every measure by combination."""
    found = {
        "format": FORMAT,
        "summary": SAID[summary],
        "trials": [
            {"name": trial.name, "values": trial.values, "seed": trial.config.seed}
            | dataclasses.asdict(outcomes[trial.name])
            for trial in trials
        ],
        "games": [
            {
                "environment": game.environment,
                "conditions": game.conditions,
                "scores": {
                    line: {label: _summary(values, summary) for label, values in scores.items()}
                    for line, scores in game.scores.items()
                },
            }
            for game in games
        ],
    }
    path = folder / FILE
    replace_text(path, json.dumps(found, indent=2) + "\n")
    return path
