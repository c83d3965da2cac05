"""The nine training panels, from the lines of metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codream.report.charts import Line, agent_styles, chart

__all__ = ["PARTS_OF_LOSS", "Panel", "moving_average", "training_panels"]

SMOOTHED = 8  # lines of metrics in a moving average, each over all episodes that ended meanwhile

PARTS_OF_LOSS = {
    "rec": "reconstruction",
    "dyn": "dynamics (next latent)",
    "rep": "representation",
    "reward": "reward",
    "continue": "continue",
    "mask": "action mask",
    "team": "teammates",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart with what a stranger needs to read it."""

    key: str
    title: str
    sentence: str
    svg: str


def training_panels(
    metrics: Sequence[Mapping[str, float]],
    agents: Sequence[str],
    sides: Mapping[str, Sequence[int]],
    num_actions: Sequence[int] | None = None,
) -> list[Panel]:
    """SPEC's nine panels, in its order. A metric that was not logged gives a panel that says so."""
    guess = _guessing(num_actions)
    steps = "environment steps"
    everyone = lambda name, **rest: _per_agent(metrics, agents, sides, name, **rest)  # noqa: E731
    one = lambda name, label: _lines(metrics, [(name, label)])  # noqa: E731
    parts = [(f"world_model/{key}", label) for key, label in PARTS_OF_LOSS.items()]
    return [
        Panel(
            "returns",
            "Episode returns",
            "Sum of rewards in one training episode, each agent by itself: a moving average over the faint raw values. "
            "In a competitive game one side's gain is the other's loss, so read it together with the cross-play table.",
            chart(everyone("episode/return/{}", smooth=True), x_label=steps, y_label="return per episode"),
        ),
        Panel(
            "world-model",
            "World model: total loss",
            "The weighted sum of all parts that the one shared model is trained on. Falling means that it "
            "predicts better.",
            chart(one("world_model/loss", "total loss"), x_label=steps, y_label="loss (nats)"),
        ),
        Panel(
            "teammates",
            "Teammate loss",
            "How surprised an agent is by what all others do next (lower is better). The dashed line is blind "
            "guessing.",
            chart(
                one("world_model/team", "teammate loss"),
                x_label=steps,
                y_label="cross-entropy (nats)",
                marks=[("guessing", guess)] if guess else [],
            ),
        ),
        Panel(
            "parts",
            "World model: loss by part",
            "The same loss taken apart, on a logarithmic axis; a part that is exactly 0 is not drawn.",
            chart(_lines(metrics, parts), x_label=steps, y_label="loss (log scale)", log=True),
        ),
        Panel(
            "actors",
            "Actor loss",
            "The policy gradient's loss in imagination. It hovers around 0 and says little by itself; spikes "
            "mean trouble.",
            chart(everyone("agent/{}/actor_loss"), x_label=steps, y_label="loss"),
        ),
        Panel(
            "critics",
            "Critic loss",
            "How far each critic's value distribution is from the imagined returns (lower is better).",
            chart(everyone("agent/{}/critic_loss"), x_label=steps, y_label="cross-entropy (nats)"),
        ),
        Panel(
            "imagined",
            "Mean imagined reward",
            "The reward per step that each agent expects inside its own dreams; compare its trend with the "
            "real returns.",
            chart(everyone("agent/{}/imagined_reward"), x_label=steps, y_label="reward per step"),
        ),
        Panel(
            "values",
            "Mean value",
            "The discounted return that each critic expects from imagined states on.",
            chart(everyone("agent/{}/value"), x_label=steps, y_label="discounted return"),
        ),
        Panel(
            "cumulative",
            "Cumulative reward",
            "All reward that each agent has collected since training began; its slope is how well it does now.",
            chart(
                _cumulative(metrics, agents, sides),
                x_label=steps,
                y_label="reward, summed",
                empty="Nothing was logged for this yet (older runs did not log how many episodes ended).",
            ),
        ),
    ]


def moving_average(values: Sequence[float], width: int = SMOOTHED) -> list[float]:
    """Mean of each value and up to `width` − 1 before it."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return ((total[ends] - total[starts]) / (ends - starts)).tolist()


def _column(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [(row["steps"], row[name]) for row in metrics if name in row and "steps" in row]
    return [float(x) for x, _ in rows], [float(y) for _, y in rows]


def _lines(metrics: Sequence[Mapping[str, float]], wanted: Sequence[tuple[str, str]]) -> list[Line]:
    found = []
    for k, (name, label) in enumerate(wanted):
        x, y = _column(metrics, name)
        if any(y):
            found.append(Line(label, x, y, f"var(--p{k % 7})", "7 3" if k >= 4 else ""))
    return found


def _per_agent(
    metrics: Sequence[Mapping[str, float]],
    agents: Sequence[str],
    sides: Mapping[str, Sequence[int]],
    name: str,
    smooth: bool = False,
) -> list[Line]:
    columns = {i: _column(metrics, name.format(agent)) for i, agent in enumerate(agents)}
    return _agent_lines(columns, agents, sides, smooth)


def _agent_lines(
    columns: Mapping[int, Any], agents: Sequence[str], sides: Mapping[str, Sequence[int]], smooth: bool
) -> list[Line]:
    """One line for each agent; agents of one side with the same values share one."""
    styles, lines = agent_styles(sides), []
    for side, members in sides.items():
        same = len(members) > 1 and all(_equal(columns[i], columns[members[0]]) for i in members)
        for i in members[:1] if same else members:
            x, y = columns[i]
            name = f"{side} ({len(members)} agents, the same values)" if same else agents[i]
            colour, dash = styles[i]
            averaged = moving_average(y) if smooth else y
            lines.append(Line(name, x, averaged, colour, dash, faint=y if smooth else None))
    return lines


def _equal(one: tuple[list[float], list[float]], other: tuple[list[float], list[float]]) -> bool:
    return len(one[1]) > 0 and one[0] == other[0] and np.allclose(one[1], other[1], rtol=1e-6)


def _cumulative(
    metrics: Sequence[Mapping[str, float]], agents: Sequence[str], sides: Mapping[str, Sequence[int]]
) -> list[Line]:
    """Mean return × episodes, added up over the lines; none for runs that did not log how many episodes ended."""
    columns = {}
    for i, agent in enumerate(agents):
        name = f"episode/return/{agent}"
        rows = [
            (row["steps"], row[name] * row["episode/count"])
            for row in metrics
            if name in row and "episode/count" in row
        ]
        columns[i] = ([float(x) for x, _ in rows], np.cumsum([y for _, y in rows]).tolist())
    return _agent_lines(columns, agents, sides, smooth=False)


def _guessing(num_actions: Sequence[int] | None) -> float | None:
    """Cross-entropy of uniform guesses about all others, averaged over who guesses."""
    if not num_actions or len(num_actions) < 2:
        return None
    return sum(math.log(n) for n in num_actions) * (len(num_actions) - 1) / len(num_actions)
