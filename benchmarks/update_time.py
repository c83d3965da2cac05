"""Time of every part of training, for a preset on this machine.

    python benchmarks/update_time.py [--preset small] [--repeats 5] [--out FILE]

Prints the time per world-model update, per update of all agents, per acting step and per environment step with
everything that it buys; imagined steps per second; operations counted in matrix products, and the share of the
device's measured matrix rate. Machines are noisy: times are medians, with the fastest beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import codream
from codream import matwm
from codream.flops import count_flops, matrix_rate
from codream.training import driver_for


def timed(function: Callable[..., Any], *args: Any, repeats: int) -> tuple[float, float]:
    """Median and least seconds of a compiled call."""
    compiled = eqx.filter_jit(function)

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(eqx.filter(compiled(*args), eqx.is_array))
        return time.perf_counter() - began

    once()
    times = [once() for _ in range(repeats)]
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--env", default="simple_tag")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    config = codream.preset(args.preset)
    env = codream.make_env(args.env, num_envs=config.num_envs)
    config = config.resolve(env.spec)
    driver = driver_for(env, config)
    runner = driver.start(jax.random.key(0))

    # Fill the replay at random until updates are due.
    need = max(config.warmup, 2 * config.world_model.length * config.world_model.batch)
    observe = eqx.filter_jit(lambda step, state: matwm.observe(state, *step), donate="all-except-first")
    state, here, rng = runner.state, runner.here, np.random.default_rng(0)
    while int(state.steps) < need:
        actions = rng.integers(0, env.spec.num_actions, size=(config.num_envs, env.spec.num_agents))
        there = env.step(actions, rng.integers(2**31 - 1, size=config.num_envs))
        state = observe((here, actions, there), state)
        here = there

    key = jax.random.key(1)
    began = time.perf_counter()
    for _ in range(20):
        env.step(actions, rng.integers(2**31 - 1, size=config.num_envs))
    host = (time.perf_counter() - began) / 20

    model = lambda state, key: matwm.train_world_model(state, key, config)  # noqa: E731
    agents = lambda state, key: matwm.train_agents(state, key, config)  # noqa: E731
    act = lambda state, memory, here, key: matwm.act(state, memory, here, key, config)[0]  # noqa: E731
    rate = matrix_rate()
    rows = []
    for name, function, inputs in (
        ("world-model update", model, (state, key)),
        ("update of all agents", agents, (state, key)),
        ("acting, all copies", act, (state, runner.memory, runner.here, key)),
    ):
        median, least = timed(function, *inputs, repeats=args.repeats)
        rows.append((name, median, least, count_flops(function, *inputs)))
    (model_time, agents_time, act_time) = (row[1] for row in rows)
    step_time = (
        model_time / config.world_model_every + agents_time / config.agents_every + (act_time + host) / config.num_envs
    )
    starts, horizon = config.agents.starts or 0, config.agents.horizon or 0
    imagined = env.spec.num_agents * starts * horizon
    text = "\n".join(
        [
            f"preset {args.preset}, {env.spec.name}, {jax.devices()[0].device_kind}, jax {jax.__version__}; "
            f"measured float32 matrix rate {rate / 1e9:.0f} GFLOP/s",
            "",
            "| part | median ms | least ms | GFLOP | share of the matrix rate |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {median * 1e3:.1f} | {least * 1e3:.1f} | {flops / 1e9:.2f} | {flops / least / rate:.0%} |"
                for name, median, least, flops in rows
            ),
            f"| environment, {config.num_envs} copies | {host * 1e3:.1f} | | | |",
            f"| **environment step with all that it buys** | **{step_time * 1e3:.2f}** | | | |",
            "",
            f"{imagined:,} imagined steps per update of all agents, {imagined / agents_time:,.0f} a second; "
            f"{config.total_steps:,} environment steps would take {config.total_steps * step_time / 60:.1f} minutes.",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
