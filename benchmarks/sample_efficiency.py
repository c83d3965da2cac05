"""What a preset has learned after 10k, 25k and 50k environment steps, judged by cross-play.

    python benchmarks/sample_efficiency.py [--preset small] [--seeds 3] [--marks 10000 25000 50000] [--out FILE]

Trains each seed into its own run (a run that is there already is only evaluated, or resumed), then plays every mark's
checkpoint against the fixed references. Seeds are trained one after the other, or `--jobs` at a time. Options of
the preset can be changed with `--set path=value`, e.g. `--set partners.random_share=0`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import codream
from codream.config import KEEPING
from codream.evaluation import CrossPlay
from codream.reading import changes
from codream.retention import reached

FREE = (*KEEPING, "total_steps")  # may differ from those of a run that is there already
# Columns of the table: (heading, whose return, line-up).
COLUMNS = (
    ("predators vs random prey", "adversary", {"adversary": "self", "agent": "random"}),
    ("vs fleeing prey", "adversary", {"adversary": "self", "agent": "flee"}),
    ("prey vs random predators", "agent", {"adversary": "random", "agent": "self"}),
    ("prey vs chasing predators", "agent", {"adversary": "chase", "agent": "self"}),
    ("self-play, predators", "adversary", {"adversary": "self", "agent": "self"}),
)


def with_changes(config: Any, changes: list[str]) -> Any:
    """`config` with `path=value` changes, values in JSON."""
    for change in changes:
        path, _, text = change.partition("=")
        config = _changed(config, path.split("."), json.loads(text))
    return config


def _changed(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _changed(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


def train(args: argparse.Namespace, seed: int) -> None:
    config = with_changes(codream.preset(args.preset), args.set)
    config = dataclasses.replace(
        config,
        env=args.env,
        seed=seed,
        total_steps=max(args.marks),
        checkpoints_kept=1_000,
        checkpoint_every=args.every,
    )
    name = f"{args.label}-{args.preset}-seed{seed}"
    path = Path(args.root) / name
    if not path.exists():
        codream.train(config, name=name, root=args.root)
        return
    saved = codream.Run.open(path).config
    changed = changes(saved, config.resolve(codream.make_env(config.env, **config.env_kwargs).spec), FREE)
    if changed:
        raise SystemExit(f"{path} was trained with other options ({changed}: before, now); give another --label")
    if not reached(path / "checkpoints", max(args.marks)):
        codream.train(dataclasses.replace(saved, total_steps=max(args.marks)), resume=path)


def mean_and_interval(values: list[float]) -> str:
    """Mean over seeds, with a 95% bootstrap interval where there are several."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--env", default="simple_tag")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--marks", type=int, nargs="+", default=[10_000, 25_000, 50_000])
    parser.add_argument("--every", type=int, default=5_000, help="steps between checkpoints; marks must fall on them")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE")
    parser.add_argument("--label", default="efficiency", help="first part of the runs' names")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at the same time")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only is not None:
        train(args, args.only)
        return

    seeds = list(range(args.seeds))
    for group in (seeds[i : i + args.jobs] for i in range(0, len(seeds), args.jobs)):
        started = [subprocess.Popen([sys.executable, *sys.argv, "--only", str(s)], env=os.environ) for s in group]
        if any([process.wait() for process in started]):
            raise SystemExit("a training run failed; see above")

    table = [
        "| steps | " + " | ".join(heading for heading, _, _ in COLUMNS) + " | minutes |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    example: CrossPlay | None = None
    for mark in args.marks:
        results, minutes = [], []
        for seed in seeds:
            run = Path(args.root) / f"{args.label}-{args.preset}-seed{seed}"
            steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
            at = min(steps, key=lambda s: abs(s - mark))
            example = codream.evaluate(run, episodes=args.episodes, greedy=args.greedy, checkpoint=at)
            results.append(example)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            minutes.append(max(line["seconds"] for line in lines if line["steps"] <= at) / 60)
        cells = [mean_and_interval([r.mean(side, **line_up)[0] for r in results]) for _, side, line_up in COLUMNS]
        table.append(f"| {mark:,} | " + " | ".join(cells) + f" | {np.mean(minutes):.1f} |")
    assert example is not None
    text = "\n".join(
        [
            f"preset {args.preset}{' with ' + ', '.join(args.set) if args.set else ''} on {example.environment} "
            f"({example.version}), {args.seeds} seeds, mean and 95% bootstrap interval; {args.episodes} episodes, "
            f"{'greedy' if args.greedy else 'sampled'} actions, return of one agent per episode; {example.device}, "
            f"{args.jobs} at a time.",
            "",
            *table,
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
