"""Time of every part of training beside its floor, for a preset or a middling configuration on this machine.

    python benchmarks/update_time.py [--preset paper] [--sizes middling] [--repeats 5] [--seconds 300] [--out FILE]
        [--steps-only]

Prints the time per world-model update, imagination, update of all agents, acting step, and environment step with
everything that it buys; beside each what the device's measured matrix rate and memory bandwidth allow at best
(docs/performance.md); an environment step of training itself; imagined steps per second; memory.
`--sizes middling`: the preset with hidden 128, 2 layers, 4 heads, latent 16 × 16, world-model batch 16 × 32, 128 starts
× 12 steps.
`--steps-only`: nothing but an environment step of training itself.
Machines are noisy: times are medians, with the fastest beside, `--clock cpu` counts the process's own time
(on one core) instead of the wall's; no part is repeated for longer than its share of `--seconds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import codream
from codream import Config, matwm
from codream.compiled import Compiled
from codream.cost import Cost, update_cost
from codream.flops import count_flops, matrix_rate, memory_rate
from codream.memory import cuda_gives, give_back
from codream.mesh import placed
from codream.runs import device
from codream.training import HostDriver, driver_for

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Part:
    """A part of training, compiled: `function(*inputs)` gives a tuple. With `learns` its first is the first input,
    changed, in the same buffers, as in training."""

    def __init__(self, function: Callable[..., tuple[Any, ...]], *inputs: Any, learns: bool = False):
        self.function, self.learns = function, learns
        self.inputs: tuple[Any, ...] = inputs
        self._program = Compiled(function, donate=(0,) if learns else ())
        self.first = 0.0

    def begin(self, clock: Callable[[], float]) -> None:
        """Compile, and measure the seconds of the first call."""
        if self.learns:
            self.inputs = (copied(self.inputs[0]), *self.inputs[1:])
        self.first = self._once(clock)

    def timed(self, repeats: int, seconds: float, clock: Callable[[], float]) -> tuple[float, float, float]:
        """Median and least seconds of a call, and those of the first; then forget everything."""
        times = [self._once(clock)]
        while len(times) < repeats and sum(times) < seconds:
            times.append(self._once(clock))
        self.inputs, self._program = (), Compiled(self.function)
        return statistics.median(times), min(times), self.first

    def _once(self, clock: Callable[[], float]) -> float:
        began = clock()
        found: Any = jax.block_until_ready(self._program(*self.inputs))
        took = clock() - began
        if self.learns:
            self.inputs = (found[0], *self.inputs[1:])
        return took


def copied(tree: Any) -> Any:
    """With buffers of its own."""
    return jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, tree)


def configured(args: argparse.Namespace) -> Config:
    config = dataclasses.replace(codream.preset(args.preset), precision=args.precision, devices=args.devices)
    if args.sizes == "middling":
        model = dataclasses.replace(config.world_model, hidden=128, layers=2, heads=4, units=128, groups=16, classes=16)
        model = dataclasses.replace(model, batch=16, length=32, team_hidden=64, team_layers=1, team_heads=4)
        agents = dataclasses.replace(config.agents, units=128, starts=128, horizon=12)
        config = dataclasses.replace(config, world_model=model, agents=agents)
    return config


def filled(env: Any, config: Config, driver: Any) -> tuple[Any, float]:
    """A runner whose replay holds enough of random play for updates, and the seconds of a step of the environment."""
    runner = driver.start(jax.random.key(0))
    rows = max(config.warmup, 2 * config.world_model.length * config.world_model.batch)
    add = eqx.filter_jit(lambda step, replay: replay.add(*step), donate="all-except-first")
    replay, here, rng = runner.state.replay, runner.here, np.random.default_rng(0)

    def drawn() -> Any:
        return rng.integers(0, env.spec.num_actions, size=(config.num_envs, env.spec.num_agents))

    for _ in range(rows):
        actions = drawn()
        there = env.step(actions, rng.integers(2**31 - 1, size=config.num_envs))
        replay = add((here, actions, there), replay)
        here = there
    began = time.perf_counter()
    for _ in range(20):
        env.step(drawn(), rng.integers(2**31 - 1, size=config.num_envs))
    host = (time.perf_counter() - began) / 20
    steps = jnp.full_like(runner.state.steps, rows * config.num_envs)
    return eqx.tree_at(lambda r: (r.state.replay, r.state.steps), runner, (replay, steps)), host


def ready(driver: Any, runner: Any, args: argparse.Namespace) -> Any:
    """A runner of its own with which `driver` can go on: a first step of all copies, and no update owed."""
    here = driver.start(jax.random.key(2)).here
    runner = eqx.tree_at(lambda r: (r.here, r.state.due_from), runner, (here, runner.state.steps))
    return placed(copied(runner), args.devices)


def in_training(driver: Any, runner: Any, args: argparse.Namespace, ahead: bool) -> float:
    """Seconds per environment step of training as it is: acting, stepping, storing, updating. `ahead`: with
    `--async-collect`."""
    clock = CLOCKS[args.clock]
    driver.config = dataclasses.replace(driver.config, async_collect=ahead)
    runner = ready(driver, runner, args)
    # A step that resets may be a program of its own.
    for _ in range(27 if getattr(driver, "counts_updates", False) else 1):
        runner, _ = driver.advance(runner)
    before, began, rounds = int(runner.state.steps), clock(), 0
    # Episodes of 25 steps and a reset, whatever is bought every so many steps.
    while rounds < 26 * args.repeats and clock() - began < args.seconds / 4:
        runner, _ = driver.advance(runner)
        rounds += 1
    jax.block_until_ready(runner)
    took = (clock() - began) / (int(runner.state.steps) - before)
    if args.trace:
        with jax.profiler.trace(str(args.trace / ("ahead" if ahead else "in turn"))):
            for _ in range(3):
                runner, _ = driver.advance(runner)
            jax.block_until_ready(runner)
    return took


def memory() -> str:
    """Of this process: the largest so far, and what it holds now."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    give_back()
    status = Path("/proc/self/status")
    if not status.exists():
        return f"largest of the process {largest:.2f} GiB"
    now = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]
    return f"largest of the process {largest:.2f} GiB, compiling included, and {int(now) / 2**20:.2f} GiB between steps"


def floors(env: Any, config: Config, counted: dict[str, int]) -> dict[str, Cost]:
    """What each part costs at least; where it is not derived, the operations counted."""
    found = {name: Cost(flops, 0) for name, flops in counted.items()}
    try:
        cost = update_cost(env.spec, config)
    except ValueError:
        return found
    imagined = cost["context"] + cost["imagination"]
    return found | {
        "world-model update": cost["world model"],
        "imagination of all agents": imagined,
        "update of all agents": imagined + cost["actors and critics"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sizes", choices=("preset", "middling"), default="preset")
    parser.add_argument("--devices", type=int, default=1, help="on a CPU with JAX_NUM_CPU_DEVICES set to as many")
    parser.add_argument("--env", default="simple_tag")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300, help="about as long in all, compiling apart")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps-only", action="store_true", help="only environment steps of training itself")
    parser.add_argument("--trace", type=Path, help="folder for a trace of three steps of training (jax.profiler)")
    args = parser.parse_args()
    cuda_gives()

    config = configured(args)
    env: Any = codream.make_env(args.env, num_envs=config.num_envs)
    config = config.resolve(env.spec)
    driver = driver_for(env, config)
    runner, host = filled(env, config, driver)
    runner = placed(runner, args.devices)
    lines: list[str] = []

    def say(line: str) -> None:
        """At once, so that what was measured is known even where time ends."""
        print(line, flush=True)
        lines.append(line)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    times = {}
    if args.steps_only:
        say(f"{setting(args)}\n\n| part | mean ms | | | | | | |\n|---|---|---|---|---|---|---|---|")
    else:
        times = parts_of_a_step(args, env, config, driver, runner, host, say)
    real = math.nan
    for ahead in (False, True) if isinstance(driver, HostDriver) else (False,):
        real = in_training(driver, runner, args, ahead)
        which = ", `--async-collect`" if ahead else ""
        say(f"| **environment step of training itself{which}** | **{real * 1e3:.2f}** | | | | | | |")
    imagined = env.spec.num_agents * (config.agents.starts or 0) * (config.agents.horizon or 0)
    speed = "" if args.steps_only else f", {imagined / times['update of all agents'][0]:,.0f} a second"
    say(
        f"\n{imagined:,} imagined steps per update of all agents{speed}; {config.total_steps:,} environment steps take "
        f"{config.total_steps * real / 60:.1f} minutes. Memory: {memory()}{held()}."
    )


def parts_of_a_step(
    args: argparse.Namespace,
    env: Any,
    config: Config,
    driver: Any,
    runner: Any,
    host: float,
    say: Callable[[str], None],
) -> dict[str, tuple[float, float, float]]:
    """Median, least and first seconds of every part by itself, written as a table."""
    key = jax.random.key(1)
    parts = {
        "world-model update": Part(lambda s, k: matwm.train_world_model(s, k, config), runner.state, key, learns=True),
        "imagination of all agents": Part(lambda s, k: (matwm.imagine_for_agents(s, k, config),), runner.state, key),
        "update of all agents": Part(lambda s, k: matwm.train_agents(s, k, config), runner.state, key, learns=True),
        "acting, all copies": Part(
            lambda s, m, here, k: matwm.act(s, m, here, k, config), runner.state, runner.memory, runner.here, key
        ),
    }
    counted = {name: count_flops(part.function, *part.inputs) for name, part in parts.items()}
    floor = floors(env, config, counted)
    clock = CLOCKS[args.clock]
    options = {"repeats": args.repeats, "seconds": args.seconds / len(parts), "clock": clock}
    # Side by side where a device, and not the cores that compile, does the work.
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else len(parts) + 1) as pool:
        pending = [pool.submit(part.begin, clock) for part in parts.values()]
        pending.append(pool.submit(driver.advance, ready(driver, runner, args)))
        jax.block_until_ready([future.result() for future in pending])
        del pending
    rates = [(matrix_rate(dtype=args.precision, clock=clock), memory_rate(clock=clock))]
    times = {name: part.timed(**options) for name, part in parts.items()}
    rates.append((matrix_rate(dtype=args.precision, clock=clock), memory_rate(clock=clock)))
    rate, bandwidth = (max(pair) for pair in zip(*rates, strict=True))
    del parts
    say(table(args, config, times, floor, (rate, bandwidth), host))
    return times


def step_time(seconds: dict[str, float], config: Config, host: float) -> float:
    """Of one environment step with all that it buys."""
    updates = (
        seconds["world-model update"] / config.world_model_every + seconds["update of all agents"] / config.agents_every
    )
    return updates + (seconds["acting, all copies"] + host) / config.num_envs


def held() -> str:
    """What an accelerator held at most."""
    stats = jax.devices()[0].memory_stats() or {}
    return f", of the device {stats['peak_bytes_in_use'] / 2**30:.2f} GiB" if "peak_bytes_in_use" in stats else ""


def setting(args: argparse.Namespace) -> str:
    """What is measured, where and how."""
    return (
        f"{args.preset}{', middling sizes' if args.sizes == 'middling' else ''}, {args.env}, {args.precision}, "
        f"{device()}, {f'on {args.devices} devices, ' if args.devices > 1 else ''}jax {jax.__version__}; "
        f"{args.clock} clock"
    )


def table(
    args: argparse.Namespace,
    config: Config,
    times: dict[str, tuple[float, float, float]],
    floor: dict[str, Cost],
    rates: tuple[float, float],
    host: float,
) -> str:
    lines = [
        f"{setting(args)}; measured matrix rate {rates[0] / 1e9:.0f} GFLOP/s, memory {rates[1] / 1e9:.1f} GB/s",
        "",
        "| part | median ms | least ms | floor ms | share of the matrix rate | GFLOP | GB | first call, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (median, least, first) in times.items():
        cost = floor[name]
        lines.append(
            f"| {name} | {median * 1e3:.1f} | {least * 1e3:.1f} | {cost.floor(*rates) * 1e3:.1f} | "
            f"{cost.flops / least / rates[0]:.0%} | {cost.flops / 1e9:.2f} | "
            f"{f'{cost.bytes / 1e9:.2f}' if cost.bytes else '–'} | {first:.0f} |"
        )
    medians, least = ({name: row[i] for name, row in times.items()} for i in (0, 1))
    bound = {name: cost.floor(*rates) for name, cost in floor.items()}
    lines += [
        f"| environment, {config.num_envs} copies | {host * 1e3:.1f} | | | | | | |",
        f"| **environment step with all that it buys** | **{step_time(medians, config, host) * 1e3:.2f}** | "
        f"{step_time(least, config, host) * 1e3:.2f} | {step_time(bound, config, 0) * 1e3:.2f} | | | | |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
