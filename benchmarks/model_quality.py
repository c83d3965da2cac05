"""How well a run's world model predicts held-out episodes. The first thing to look at when learning disappoints.

    python benchmarks/model_quality.py RUN [--episodes 100] [--out FILE]

Prints one-step and 12-step error against "nothing moves", predicted against real reward, and teammate accuracy
against the base rate, on play of the trained agents, of scripted ones where the game has them, and at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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


def lines(results: list[ModelQuality]) -> list[str]:
    out = [
        "| play | one step / still | sampled / still | 12 steps / still | catches, predicted / real | by side "
        "| elsewhere, bias per step | elsewhere, absolute | teammate accuracy | base rate | reconstruction |",
        "|---" * 11 + "|",
    ]
    for q in results:
        sides = ", ".join(f"{side} {ratio:.2f}" for side, ratio in q.reward_ratio_by_side.items())
        out.append(
            f"| {q.play} | {q.one_step_ratio:.2f} | {q.one_step_sampled / q.still:.2f} | {q.horizon_ratio:.2f} | "
            f"{q.reward_ratio:.2f} | {sides} | {q.elsewhere:+.3f} | {q.elsewhere_absolute:.3f} | {q.accuracy:.1%} | "
            f"{q.base_rate:.1%} | {q.reconstruction:.3f} |"
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--large-reward", type=float, default=5.0, help="what counts as a catch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    agents = codream.load(args.run)
    results = [
        measure(agents, player, play, large_reward=args.large_reward, episodes=args.episodes, seed=args.seed)
        for play, player in players(agents).items()
    ]
    q = results[0]
    text = "\n".join(
        [
            f"{args.run}: {agents.spec.name}, {agents.steps:,} steps, "
            f"{args.episodes} held-out episodes, seed {args.seed}",
            "",
            *lines(results),
            "",
            "error by horizon on "
            + q.play
            + ", share of nothing moves: "
            + " ".join(f"{a / b:.2f}" for a, b in zip(q.by_horizon, q.still_by_horizon, strict=True)),
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
