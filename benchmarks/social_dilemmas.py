"""Social dilemmas: WM-RND and its parts against independent PPO, one table for each game.

    python benchmarks/social_dilemmas.py [--games coin_game storm_2p] [--variants ippo ippo_common …] [--seeds 5]
                                         [--steps 200000] [--episodes 400] [--root runs] [--out FILE]

Every variant differs from preset wm_rnd in one thing, but for `original` and the two of PPO. A run that has reached
the steps is only evaluated, one that has not is resumed. Intervals are 95% bootstrap intervals of the mean over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import codream
from codream import Config, Run, preset
from codream.checkpoint import saved

GAMES: dict[str, dict[str, Any]] = {
    "coin_game": {"num_inner_steps": 50, "num_outer_steps": 1, "payoff_matrix": [[1, 1, -2], [1, 1, -2]]},
    "storm_2p": {},
}


def changed(part: str, **changes: Any) -> Callable[[], Config]:
    """Preset wm_rnd with changes in one part."""

    def make() -> Config:
        base = preset("wm_rnd")
        return dataclasses.replace(base, **{part: dataclasses.replace(getattr(base, part), **changes)})

    return make


VARIANTS: dict[str, Callable[[], Config]] = {
    "ippo": lambda: preset("ippo"),
    "ippo_common": lambda: preset("ippo_common"),
    "original": lambda: preset("original"),
    "wm_rnd": lambda: preset("wm_rnd"),  # α annealed, RND shared, joint actions
    "alpha_1": changed("projection", schedule="constant", symmetry=1.0),
    "alpha_0": changed("projection", schedule="constant", symmetry=0.0),
    "rnd_off": changed("curiosity", kind="none"),
    "rnd_individual": changed("curiosity", sharing="individual"),
    "rnd_hybrid": changed("curiosity", sharing="hybrid"),
    "actions_own": changed("projection", actions="own"),
    "actions_predicted": changed("projection", actions="predicted"),
    "view_focal": changed("projection", view="focal"),
    "coef_0.3": changed("projection", coef=0.3),
    "coef_1": changed("projection", coef=1.0),
    "coef_1_alpha_1": changed("projection", coef=1.0, schedule="constant", symmetry=1.0),
}


def trained(game: str, variant: str, seed: int, args: argparse.Namespace) -> Run:
    """The run of a variant, trained as far as asked."""
    name = f"social-{game}-{args.steps}-{variant}-seed{seed}"
    path = Path(args.root) / name
    if path.exists():
        run = Run.open(path)
        if max(saved(run.checkpoints), default=0) < args.steps:
            codream.train(resume=run)
        return run
    config = dataclasses.replace(
        VARIANTS[variant](),
        env=f"jaxmarl:{game}",
        env_kwargs=GAMES[game],
        seed=seed,
        total_steps=args.steps,
        checkpoint_every=args.steps,
    )
    return codream.train(config, name=name, root=args.root)


def interval(values: list[float | None]) -> str:
    """Mean over seeds, with its 95% bootstrap interval where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.2f}"
    draws = np.random.default_rng(0).choice(known, (10_000, len(known))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{np.mean(known):.2f} [{low:.2f}, {high:.2f}]"


def row(game: str, variant: str, args: argparse.Namespace) -> tuple[str, codream.CrossPlay]:
    """One line of a game's table, and the last evaluation behind it."""
    columns: list[list[float | None]] = [[] for _ in range(6)]
    result = None
    for seed in range(args.seeds):
        run = trained(game, variant, seed, args)
        result = codream.evaluate(run, episodes=args.episodes)
        social = result.social
        assert social is not None
        returns = list(result.rows[0].returns.values())
        cooperation = None if social.cooperation is None else social.cooperation["all"][0]
        seconds = run.metrics()[-1]["seconds"]
        found = (social.efficiency[0], *returns[:2], social.equality[0], cooperation, seconds / 60)
        for column, value in zip(columns, found, strict=True):
            column.append(value)
    assert result is not None
    return f"| {variant} | " + " | ".join(map(interval, columns)) + " |", result


def table(game: str, args: argparse.Namespace) -> str:
    """The markdown table of one game."""
    lines = [
        "| variant | efficiency | return, first | return, second | equality | cooperation | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    result = None
    for variant in args.variants:
        line, result = row(game, variant, args)
        lines.append(line)
        print(line, flush=True)
    assert result is not None
    about = (
        f"{result.environment} ({result.version}) with {GAMES[game] or 'its defaults'}, {args.steps:,} steps, "
        f"{args.seeds} seeds, mean and 95% bootstrap interval; {args.episodes} episodes a run, sampled actions, "
        f"returns per agent and episode; {result.device}."
    )
    return "\n".join([f"{game}: {about}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(GAMES), choices=list(GAMES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--root", default="runs")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    text = "\n\n".join(table(game, args) for game in args.games)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
