"""How the cost of an update grows with agents, horizon, context, batch and replay.

    python benchmarks/scaling.py [--parts agents horizon …] [--sizes tiny] [--repeats 3] [--out FILE]

Times of a world-model update, an update of all agents and their compilation; operations counted in matrix products and
the teammate predictor's share of them; memory of the state (what training holds between updates) and what the compiler
sets aside for the larger update. `--sizes tiny` (a CPU's): hidden 64, 32 starts; `paper`: the paper's. Only one thing
is varied at a time, around 4 agents, horizon 12, context 8, batch 16. Replay: drawing from a buffer of 50,000 rows
that is 2 % and 100 % full, and from a larger one. `--clock cpu` counts the process's own time, for busy machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from codream import Config, matwm, preset
from codream.cost import update_cost
from codream.envs import EnvSpec
from codream.replay import Replay, sample_recent, sample_starts, sequences
from codream.runs import device

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VARIED: dict[str, tuple[int, ...]] = {
    "agents": (2, 4, 8, 16, 20),
    "horizon": (4, 12, 24),
    "context": (4, 8, 16),
    "batch": (8, 16, 32),
}


def crowd(agents: int) -> EnvSpec:
    """As many agents, with 16 entries and 5 actions each."""
    return EnvSpec("crowd", tuple(f"agent_{i}" for i in range(agents)), ((16,),) * agents, (5,) * agents)


def configured(args: argparse.Namespace, part: str, value: int) -> tuple[EnvSpec, Config]:
    """The `paper` algorithm with one thing changed."""
    config = preset("paper")
    agents = dataclasses.replace(config.agents, starts=768, horizon=12)
    model = config.world_model
    if args.sizes == "tiny":
        model = dataclasses.replace(model, hidden=64, heads=4, units=64, groups=8, classes=8, length=32)
        model = dataclasses.replace(model, team_hidden=16, team_heads=2, team_layers=1)
        agents = dataclasses.replace(agents, units=64, starts=32)
    if part in ("horizon", "context"):
        agents = dataclasses.replace(agents, **{part: value})
    if part == "batch":
        model = dataclasses.replace(model, batch=value)
    replay = dataclasses.replace(config.replay, capacity=2048)
    spec = crowd(value if part == "agents" else 4)
    return spec, dataclasses.replace(config, world_model=model, agents=agents, replay=replay).resolve(spec)


def full(replay: Replay, rows: int) -> Replay:
    """A buffer with so many rows of episodes of 25 steps."""
    time = jnp.arange(replay.rows)
    wanted = lambda r: (r.obs, r.acting, r.first, r.filled, r.next)  # noqa: E731
    values = (
        jax.random.normal(jax.random.key(0), replay.obs.shape),
        jnp.broadcast_to((time % 26 != 25)[:, None, None], replay.acting.shape),
        jnp.broadcast_to((time % 26 == 0)[:, None], replay.first.shape),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(rows % replay.rows, jnp.int32),
    )
    return eqx.tree_at(wanted, replay, values)


def timed(function: Any, *args: Any, options: argparse.Namespace) -> tuple[float, float, float]:
    """Least seconds of a call, seconds of the compiler, and bytes that it sets aside."""
    clock = CLOCKS[options.clock]
    began = clock()
    jitted: Any = eqx.filter_jit(function)
    compiled = jitted.lower(*args).compile()
    spent, memory = clock() - began, compiled.compiled.memory_analysis()
    times = []
    for _ in range(options.repeats + 1):
        began = clock()
        jax.block_until_ready(eqx.filter(compiled(*args), eqx.is_array))
        times.append(clock() - began)
    return min(times[1:]), spent, getattr(memory, "temp_size_in_bytes", float("nan"))


def row(args: argparse.Namespace, part: str, value: int) -> str:
    spec, config = configured(args, part, value)

    def make() -> matwm.State:
        state = matwm.init(jax.random.key(0), spec, config)
        return eqx.tree_at(lambda s: s.replay, state, full(state.replay, state.replay.rows))

    state, key = eqx.filter_jit(make)(), jax.random.key(1)
    model = timed(lambda s, k: matwm.train_world_model(s, k, config), state, key, options=args)
    agents = timed(lambda s, k: matwm.train_agents(s, k, config), state, key, options=args)
    cost = update_cost(spec, config)
    share = cost["teammate predictor"].flops / cost["world model"].flops
    others = cost["context"] + cost["imagination"] + cost["actors and critics"]
    held = sum(x.nbytes for x in jax.tree.leaves(eqx.filter(state, eqx.is_array)) if hasattr(x, "nbytes"))
    return (
        f"| {part} {value} | {model[0] * 1e3:.1f} | {agents[0] * 1e3:.1f} | {cost['world model'].flops / 1e9:.2f} | "
        f"{others.flops / 1e9:.2f} | {share:.1%} | {held / 2**20:.0f} | {max(model[2], agents[2]) / 2**20:.0f} | "
        f"{model[1] + agents[1]:.0f} |"
    )


def replay_rows(args: argparse.Namespace) -> list[str]:
    """Times of drawing a world-model batch and the starts of all agents."""
    spec = crowd(4)

    @eqx.filter_jit
    def draw(replay: Replay, key: Any) -> Any:
        keys = jax.random.split(key, 4)
        age, copy = jax.vmap(lambda k: sample_recent(replay, 4, 64, 0.9998, k))(keys)
        batch = sequences(replay, age.reshape(-1), copy.reshape(-1), jnp.repeat(jnp.arange(4), 4), 64)
        starts = jax.vmap(lambda i, k: sample_starts(replay, i, 768, k))(jnp.arange(4), keys)
        return batch, starts

    lines = []
    for rows, filled in ((50_000, 1_000), (50_000, 50_000), (200_000, 200_000)):
        replay = eqx.filter_jit(lambda rows=rows, filled=filled: full(Replay.empty(spec, rows, 1), filled))()
        least, _, _ = timed(draw, replay, jax.random.key(0), options=args)
        lines.append(f"| {rows:,} | {filled:,} | {least * 1e3:.1f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*VARIED, "replay"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--sizes", choices=("tiny", "paper"), default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [f"{device()}, jax {jax.__version__}, sizes {args.sizes}, {args.clock} clock.", ""]
    lines += [
        "| | world-model update, ms | update of all agents, ms | GFLOP | GFLOP | teammate predictor, of the "
        "world-model update | state, MiB | largest update beside it, MiB | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for part in args.parts:
        for value in VARIED.get(part, ()):
            lines.append(row(args, part, value))
            print(lines[-1], flush=True)
    if "replay" in args.parts:
        lines += ["", "| rows of the buffer | filled | drawing a batch and all starts, ms |", "|---|---|---|"]
        lines += replay_rows(args)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
