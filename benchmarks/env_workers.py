"""Copies of a host environment stepped by one process and by several, in turn.

    python benchmarks/env_workers.py [--env simple_tag] [--copies 16 100] [--workers 2] [--rounds 5] [--out FILE]

Random actions; environment steps a second over all copies, the median of the rounds, and how many times as fast as one
process it is in each round. What is answered is compared as well: it must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from codream.envs import HostEnv, make_env
from codream.envs.workers import cores
from codream.runs import device


def timed(env: HostEnv, steps: int) -> tuple[float, float]:
    """Environment steps a second, and a sum over everything that was answered. The first `reset` is not timed."""
    rng, seeds = np.random.default_rng(0), np.arange(env.num_envs)
    most = np.asarray(env.spec.num_actions)
    here = env.reset(seeds)
    began, total = time.perf_counter(), 0.0
    for _ in range(steps):
        here = env.step(rng.integers(most, size=(env.num_envs, len(most))), seeds)
        total += float(np.sum(here.obs, dtype=np.float64) + np.sum(here.reward, dtype=np.float64))
    return steps * env.num_envs / (time.perf_counter() - began), total


def rows(name: str, copies: int, workers: list[int], steps: int, rounds: int) -> list[str]:
    """One row of the table for each number of processes."""
    envs = {n: make_env(name, copies, env_workers=n) for n in (1, *workers)}
    speeds: dict[int, list[float]] = {n: [] for n in envs}
    for _ in range(rounds):
        answers = set()
        for n, env in envs.items():
            assert isinstance(env, HostEnv)
            speed, answered = timed(env, steps)
            speeds[n].append(speed)
            answers.add(answered)
        assert len(answers) == 1, f"{name}: what is answered depends on the number of processes"
    found = []
    for n, env in envs.items():
        assert isinstance(env, HostEnv)
        env.close()
        ratios = "" if n == 1 else ", ".join(f"{a / b:.2f}" for a, b in zip(speeds[n], speeds[1], strict=True))
        found.append(f"| {env.spec.name}, {copies} copies | {n} | {statistics.median(speeds[n]):,.0f} | {ratios} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["simple_tag"])
    parser.add_argument("--copies", type=int, nargs="+", default=[16, 100])
    parser.add_argument("--workers", type=int, nargs="+", default=[cores()])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        device(),
        "",
        "| | processes | environment steps a second | times as fast, round by round |",
        "|---|---|---|---|",
    ]
    for name in args.env:
        for copies in args.copies:
            lines += rows(name, copies, args.workers, args.steps, args.rounds)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
