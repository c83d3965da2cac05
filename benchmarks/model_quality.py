"""How well a run's world model predicts held-out episodes. The first thing to look at when learning disappoints.

    python benchmarks/model_quality.py RUN [RUN …] [--episodes 100] [--out FILE]

Prints one-step and 12-step error against "nothing moves", predicted against real reward, and teammate accuracy
against the base rate, on play of the trained agents, of scripted ones where the game has them, and at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import codream
from codream.envs.references import references_for
from codream.model_quality import ModelQuality, measure


class Sides:
    """One policy for each side, as one player."""

    def __init__(self, spec: codream.EnvSpec, policies: dict):
        self.spec, self.policies = spec, policies

    def act(self, timestep, rng):
        answers = {side: policy.act(timestep, rng) for side, policy in self.policies.items()}
        out = next(iter(answers.values())).copy()
        for side, members in self.spec.sides.items():
            out[:, list(members)] = answers[side][:, list(members)]
        return out


def players(agents: codream.Agents) -> dict:
    """Who plays the held-out episodes."""
    references = references_for(agents.spec)
    found = {
        "trained play": agents.player(),
        "random play": Sides(agents.spec, {side: r["random"] for side, r in references.items()}),
    }
    if "chase" in references.get("adversary", {}):
        found["chase and flee"] = Sides(
            agents.spec, {"adversary": references["adversary"]["chase"], "agent": references["agent"]["flee"]}
        )
    return found


COLUMNS: dict[str, tuple[str, Callable[[ModelQuality], float]]] = {
    "one step / still": (".3f", lambda q: q.one_step_ratio),
    "sampled / still": (".2f", lambda q: q.one_step_sampled / q.still),
    "12 steps / still": (".2f", lambda q: q.horizon_ratio),
    "catches, predicted / real": (".2f", lambda q: q.reward_ratio),
    "elsewhere, bias per step": ("+.3f", lambda q: q.elsewhere),
    "elsewhere, absolute": (".3f", lambda q: q.elsewhere_absolute),
    "teammate accuracy": (".1%", lambda q: q.accuracy),
    "base rate": (".1%", lambda q: q.base_rate),
    "reconstruction": (".3f", lambda q: q.reconstruction),
}


def table(results: dict[str, list[ModelQuality]]) -> list[str]:
    """A line for each play and run, and their mean where there are several runs."""

    def line(play: str, run: str, values: Iterable[float]) -> str:
        cells = (f"{value:{form}}" for value, (form, _) in zip(values, COLUMNS.values(), strict=True))
        return f"| {play} | {run} | " + " | ".join(cells) + " |"

    out = ["| play | run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for which in zip(*results.values(), strict=True):
        values = [[column(q) for _, column in COLUMNS.values()] for q in which]
        out += [line(which[0].play, run, row) for run, row in zip(results, values, strict=True)]
        if len(which) > 1:
            out.append(line(which[0].play, "mean", np.mean(values, axis=0)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--large-reward", type=float, default=5.0, help="what counts as a catch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results, about = {}, []
    for run in args.runs:
        agents = codream.load(run)
        name = Path(run).name if Path(run).name not in results else run
        results[name] = [
            measure(agents, player, play, large_reward=args.large_reward, episodes=args.episodes, seed=args.seed)
            for play, player in players(agents).items()
        ]
        q = results[name][0]
        ratios = " ".join(f"{a / b:.2f}" for a, b in zip(q.by_horizon, q.still_by_horizon, strict=True))
        about.append(f"{name}: {agents.spec.name}, {agents.steps:,} steps; error by horizon on {q.play}: {ratios}")
    held_out = f"{args.episodes} held-out episodes of each kind of play, seed {args.seed}"
    text = "\n".join([held_out, "", *table(results), "", *about])
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
