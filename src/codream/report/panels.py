"""The training panels, from the lines of metrics.jsonl: nine of MATWM, and those of WM-RND."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codream.algorithms import of_learner
from codream.report.charts import Line, agent_styles, chart

__all__ = ["PARTS_OF_LOSS", "Panel", "moving_average", "training_panels"]

WIDE = 100.0  # times from the smallest to the largest loss beyond which its axis is logarithmic
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
    algo: str = "matwm",
) -> list[Panel]:
    """What training logged, as charts. MATWM: SPEC's nine panels, in its order; a metric that was not logged gives a
    panel that says so. WM-RND: its own, as far as the run has those parts."""
    panels_of = {"matwm": _matwm_panels, "wm_rnd": _wm_rnd_panels}
    draw = of_learner(panels_of, algo, "codream.report.panels.training_panels")
    panels = draw(_Logged(metrics, agents, sides), num_actions)
    if algo == "matwm" and any(f"agent/{agents[0]}/intrinsic_reward" in line for line in metrics):
        panels.append(_curiosity(_Logged(metrics, agents, sides)))
    return panels


STEPS = "environment steps"


@dataclasses.dataclass(frozen=True)
class _Logged:
    """The metrics of a run, and the lines that can be drawn of them."""

    metrics: Sequence[Mapping[str, float]]
    agents: Sequence[str]
    sides: Mapping[str, Sequence[int]]

    def each(self, name: str, smooth: bool = False) -> list[Line]:
        """One line for every agent; `{}` stands for its name."""
        return _per_agent(self.metrics, self.agents, self.sides, name, smooth)

    def one(self, name: str, label: str) -> list[Line]:
        return _lines(self.metrics, [(name, label)])

    def has(self, name: str) -> bool:
        return any(name.format(self.agents[0]) in line for line in self.metrics)

    def returns(self, sentence: str) -> Panel:
        return Panel(
            "returns",
            "Episode returns",
            "Sum of rewards in one training episode in which all play as they have learned so far, each agent by "
            "itself: a moving average over the faint raw values. " + sentence,
            chart(self.each("episode/return/{}", smooth=True), x_label=STEPS, y_label="return per episode"),
        )

    def model_loss(self) -> Panel:
        lines = self.one("world_model/loss", "total loss")
        values = [y for line in lines for y in line.y if math.isfinite(y)]
        # Images begin at tens of thousands, beside which all that follows is a flat line.
        log = bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
        return Panel(
            "world-model",
            "World model: total loss",
            "The weighted sum of all parts that the one shared model is trained on"
            + (", on a logarithmic axis" if log else "")
            + ". Falling means that it predicts better.",
            chart(lines, x_label=STEPS, y_label="loss (log scale)" if log else "loss (nats)", log=log),
        )

    def model_parts(self) -> Panel:
        parts = [(f"world_model/{key}", label) for key, label in PARTS_OF_LOSS.items()]
        return Panel(
            "parts",
            "World model: loss by part",
            "The same loss taken apart, on a logarithmic axis; a part that is exactly 0 is not drawn.",
            chart(_lines(self.metrics, parts), x_label=STEPS, y_label="loss (log scale)", log=True),
        )

    def teammates(self, guess: float | None) -> Panel:
        return Panel(
            "teammates",
            "Teammate loss",
            "How surprised an agent is by what all others do next (lower is better)."
            + (" The dashed line is blind guessing." if guess else ""),
            chart(
                self.one("world_model/team", "teammate loss"),
                x_label=STEPS,
                y_label="cross-entropy (nats)",
                marks=[("guessing", guess)] if guess else [],
            ),
        )

    def cumulative(self) -> Panel:
        return Panel(
            "cumulative",
            "Cumulative reward",
            "What each agent has earned in the episodes of the first panel, summed since training began; its slope is "
            "how well it does now.",
            chart(
                _cumulative(self.metrics, self.agents, self.sides),
                x_label=STEPS,
                y_label="reward, summed",
                empty="Nothing was logged for this yet (older runs did not log how many episodes ended).",
            ),
        )


def _curiosity(log: _Logged) -> Panel:
    return Panel(
        "curiosity",
        "Curiosity: intrinsic reward",
        "Mean bonus per step for observations that are new (random network distillation), before its weight. It falls "
        "as the world becomes familiar, and rises where an agent reaches something new.",
        chart(log.each("agent/{}/intrinsic_reward"), x_label=STEPS, y_label="bonus per step"),
    )


def _matwm_panels(log: _Logged, num_actions: Sequence[int] | None) -> list[Panel]:
    steps, everyone = STEPS, log.each
    return [
        log.returns(
            "In a competitive game one side's gain is the other's loss, so read it together with the cross-play table."
            if len(log.sides) > 1
            else "All agents are of one side, so these lines can simply be read."
        ),
        log.model_loss(),
        log.teammates(_guessing(num_actions)),
        log.model_parts(),
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
        log.cumulative(),
    ]


def _wm_rnd_panels(log: _Logged, num_actions: Sequence[int] | None) -> list[Panel]:
    everyone = log.each
    panels = [
        log.returns("In a social dilemma also look at the sum over all agents: who gains at whose cost?"),
        log.cumulative(),
        Panel(
            "actors",
            "Policy loss (PPO)",
            "The clipped objective on real steps, for each agent. It hovers around 0 and says little by itself.",
            chart(everyone("agent/{}/actor_loss"), x_label=STEPS, y_label="loss"),
        ),
        Panel(
            "critics",
            "Critic loss",
            "Squared error of each critic's value, in units of the agent's own return scale (lower is better).",
            chart(everyone("agent/{}/critic_loss"), x_label=STEPS, y_label="squared error"),
        ),
        Panel(
            "values",
            "Mean value",
            "The discounted return that each critic expects, in units of the agent's own return scale.",
            chart(everyone("agent/{}/value"), x_label=STEPS, y_label="value"),
        ),
        Panel(
            "entropy",
            "Entropy of the policies",
            "How undecided each agent is. "
            + ("The dashed line is acting at random. " if num_actions else "")
            + "A sudden fall to 0 means that it has stopped trying things out.",
            chart(
                everyone("agent/{}/entropy"),
                x_label=STEPS,
                y_label="entropy (nats)",
                marks=[("at random", math.log(max(num_actions)))] if num_actions else [],
            ),
        ),
        Panel(
            "kl",
            "Size of the policy steps",
            "How far one round of updates moves each policy (KL divergence). Spikes mean that steps are too large: "
            "lower ppo.lr or the number of epochs.",
            chart(everyone("agent/{}/kl"), x_label=STEPS, y_label="KL (nats)"),
        ),
    ]
    if log.has("agent/{}/imagined_return"):
        panels += [
            Panel(
                "imagined",
                "What if everyone acted as I do?",
                "Imagined return if all others followed the same policy, paid partly by what all get (in units of each "
                "agent's return scale). Its gradient is what self-projection adds to PPO.",
                chart(everyone("agent/{}/imagined_return"), x_label=STEPS, y_label="imagined return"),
            ),
            Panel(
                "symmetry",
                "Symmetry ratio α",
                "How much of the imagined reward is what all agents get on average: 1 is all, 0 is only one's own.",
                chart(log.one("symmetry_ratio", "α"), x_label=STEPS, y_label="α", y_range=(0.0, 1.05)),
            ),
        ]
    if log.has("world_model/loss"):
        panels += [
            log.model_loss(),
            log.model_parts(),
            Panel(
                "code",
                "Has the code collapsed?",
                "Spread of the latent code over a batch. Near 0 all observations look the same to the world model, and "
                "imagination is worthless: raise world_model.rec_weight.",
                chart(
                    log.one("world_model/latent_std", "spread"), x_label=STEPS, y_label="standard deviation", zero=True
                ),
            ),
            Panel(
                "rank",
                "Effective rank of the code",
                "In how many independent directions the latent code varies over a batch; 1 would be a collapsed code.",
                chart(log.one("world_model/latent_rank", "rank"), x_label=STEPS, y_label="directions", zero=True),
            ),
        ]
        if log.has("world_model/team"):
            panels.append(log.teammates(_guessing(num_actions)))
    if log.has("agent/{}/intrinsic_reward"):
        panels.append(_curiosity(log))
    return panels


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
        if any(y) or (y and len(wanted) == 1):
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
