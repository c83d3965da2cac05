"""Reports: one self-contained HTML file per run, and one that compares several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codream.agents import load
from codream.checkpoint import CheckpointError
from codream.evaluation import CrossPlay
from codream.report.html import run_page
from codream.report.measures import measure_run, saved_measures
from codream.report.panels import training_panels
from codream.runs import Run

__all__ = ["report"]


def report(
    run: str | Path | Run,
    *,
    quick: bool = False,
    episodes: int | None = None,
    cross_play: CrossPlay | None = None,
    env: Any = None,
    root: str | Path = "runs",
    progress: bool = True,
) -> Path:
    """Write `report.html` in the run's folder, also while the run goes on. Returns its path.

    It plays a few dozen episodes to measure the agents and the world model; the result is kept, so that `quick`, which
    plays nothing, still shows what an earlier report measured. `episodes`: of every pairing (default 40). `cross_play`:
    an evaluation of the same agents, if there is one already. `env`: the environment, where the run was trained on one
    given as an object.

    Whatever is missing (no metrics yet, a line cut off in writing, no checkpoint yet) is said in the report; only a
    folder that is no run at all raises RunError.
    """
    run = Run.open(run, root)
    config, about = run.config, run.about
    metrics, warnings = _metrics(run)
    measured = saved_measures(run)
    if not quick:
        try:
            agents = load(run, env=env)
        except CheckpointError as err:
            warnings.append(f"Nothing could be played: {err}")
        else:
            more = {} if episodes is None else {"episodes": episodes}
            measured = measure_run(run, agents, cross_play=cross_play, progress=progress, **more)
    names: list[str] = about["environment"]["agents"]
    sides = _sides(names)
    panels = training_panels(metrics, names, sides, measured and measured["num_actions"])
    text = run_page(run.path.name, config, about, metrics, panels, measured, sides, warnings)
    path = run.path / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _metrics(run: Run) -> tuple[list[dict[str, float]], list[str]]:
    """The lines that can be read, and what to say about the others."""
    try:
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return [], ["This run has logged no metrics yet (there is no metrics.jsonl)."]
    found, broken = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict) and "steps" in row:
            found.append(row)
    warnings = []
    if broken:
        warnings.append(
            f"{broken} line(s) of metrics.jsonl could not be read (cut off while it was written?); left out."
        )
    if not found:
        warnings.append("This run has logged no metrics yet (metrics.jsonl is empty).")
    return found, warnings


def _sides(agents: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """As `EnvSpec.sides`, from the names alone."""
    groups: dict[str, list[int]] = {}
    for i, agent in enumerate(agents):
        groups.setdefault(agent.rpartition("_")[0] or agent, []).append(i)
    return {side: tuple(members) for side, members in groups.items()}
