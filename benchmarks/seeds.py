"""Several seeds as one program (`codream train --seeds K`) beside the same seeds in turn.

    python benchmarks/seeds.py [--presets ippo wm_rnd small] [--seeds 2 4 8] [--steps 2000] [--clock cpu] [--out FILE]

Presets ippo and wm_rnd train on jaxmarl:coin_game, small on jaxmarl:MPE_simple_tag_v3. Environment steps of all seeds
per second, compiling and the steps before the first update not counted; a speed-up above 1 says that together is
faster. Both are measured in this process one after the other: read the ratio. `--clock cpu` counts the process's own
time (on one core) instead of the wall's, for busy machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

import codream
from codream import Config, preset
from codream.runs import device
from codream.together import Alone, Runs, Together
from codream.training import GraphDriver

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COIN_GAME = {"num_inner_steps": 50, "num_outer_steps": 1}
GAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ippo": ("jaxmarl:coin_game", COIN_GAME),
    "wm_rnd": ("jaxmarl:coin_game", COIN_GAME),
    "small": ("jaxmarl:MPE_simple_tag_v3", {}),
}


def rate(runs: Runs, seeds: int, steps: int, config: Config, clock: Any) -> tuple[float, float]:
    """Environment steps of all seeds per second, and the seconds of compiling and of the steps before the first
    update."""
    began = clock()
    runners = runs.join([runs.driver.start(jax.random.key(seed)) for seed in range(seeds)])
    done = -1
    while done < max(config.warmup + 100, config.num_envs * config.ppo.rollout):
        runners, _ = runs.advance(runners)
        done = min(runs.steps(runners))
    jax.block_until_ready(runners)
    before, from_, began = clock() - began, done, clock()
    while done < from_ + steps:
        runners, _ = runs.advance(runners)
        done = min(runs.steps(runners))
    jax.block_until_ready(runners)
    return seeds * (done - from_) / (clock() - began), before


def rows(name: str, args: argparse.Namespace) -> list[str]:
    game, keywords = GAMES[name]
    env: Any = codream.make_env(game, **keywords)
    config = dataclasses.replace(preset(name), env=game, env_kwargs=keywords).resolve(env.spec)
    chunk = config.ppo.rollout if config.algo == "wm_rnd" else 16
    driver, clock = GraphDriver(env, config, chunk), CLOCKS[args.clock]
    alone, before = rate(Alone(driver), 1, args.steps, config, clock)
    lines = [f"| {name} on {game} | 1 | {alone:,.0f} | 1.00 | {before:.0f} |"]
    print(lines[-1], flush=True)
    for seeds in args.seeds:
        together, before = rate(Together(driver, seeds), seeds, args.steps, config, clock)
        lines.append(f"| {name} on {game} | {seeds} | {together:,.0f} | {together / alone:.2f} | {before:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(GAMES), choices=list(GAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=2_000, help="environment steps of each seed that are timed")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [f"{device()}, jax {jax.__version__}, {args.clock} clock.", ""]
    lines += ["| preset | seeds | steps/s of all | speed-up over in turn | before, s |", "|---|---|---|---|---|"]
    for name in args.presets:
        lines += rows(name, args)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
