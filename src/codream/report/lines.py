"""Reading a run's metrics and agents, whatever state its folder is in."""

from __future__ import annotations

import json
from collections.abc import Sequence

from codream.runs import Run

__all__ = ["metrics_of", "sides_of"]


def metrics_of(run: Run) -> tuple[list[dict[str, float]], list[str]]:
    """The lines that can be read, and what to say about the others."""
    try:
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
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


def sides_of(agents: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """As `EnvSpec.sides`, from the names alone."""
    groups: dict[str, list[int]] = {}
    for i, agent in enumerate(agents):
        groups.setdefault(agent.rpartition("_")[0] or agent, []).append(i)
    return {side: tuple(members) for side, members in groups.items()}
