"""What an update of WM-RND costs, against the number of imagined steps and of agents; and what training costs beside
the bare environment and independent PPO.

    python benchmarks/wm_rnd_cost.py [--parts operations times speed] [--repeats 5] [--clock cpu] [--out FILE]
    python benchmarks/wm_rnd_cost.py --parts speed --env socialjax:coin_game --copies 16 --rollout 64 \
        --imagination-steps 32

`operations`: counted in matrix products, without running anything. `times`: one update of everything on a full rollout.
`speed`: environment steps per second on `--env`. Agents' numbers are varied on a toy whose observations do not grow
with them. Machines are noisy: times are medians, with the fastest beside; `--clock cpu` counts the process's own time
(on one core) instead of the wall's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import codream
from codream import Config, preset, wm_rnd
from codream.envs import EnvSpec, TimeStep
from codream.flops import count_flops
from codream.projection import draw_starts, imagine
from codream.training import GraphDriver

STEPS, AGENTS = (8, 16, 32, 64), (2, 4, 8)
KEYWORDS = {"jaxmarl:coin_game": {"num_inner_steps": 50, "num_outer_steps": 1}}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Crowd:
    """N agents that see 36 random numbers and have 5 actions; each is paid when it does as most others do."""

    def __init__(self, agents: int) -> None:
        self.spec = EnvSpec("crowd", tuple(f"agent_{i}" for i in range(agents)), ((36,),) * agents, (5,) * agents)

    def _answer(self, key: PRNGKeyArray, reward: Array, first: bool) -> TimeStep:
        n, no = self.spec.num_agents, jnp.zeros((), bool)
        return TimeStep(
            obs=jax.random.normal(key, (n, 36)),
            mask=jnp.ones((n, 5), bool),
            reward=reward,
            terminal=jnp.zeros(n, bool),
            acting=jnp.ones(n, bool),
            first=no | first,
            last=no,
        )

    def reset(self, key: PRNGKeyArray) -> tuple[Array, TimeStep]:
        return jnp.zeros(()), self._answer(key, jnp.zeros(self.spec.num_agents), True)

    def step(self, key: PRNGKeyArray, state: Array, actions: Array) -> tuple[Array, TimeStep]:
        most = jnp.argmax(jnp.sum(jax.nn.one_hot(actions, 5), axis=0))
        return state, self._answer(key, (actions == most).astype(jnp.float32), False)


def configured(env: Any, view: str = "each", **projection: Any) -> Config:
    """Preset wm_rnd, with changes of its projection."""
    base = preset("wm_rnd")
    return dataclasses.replace(base, projection=dataclasses.replace(base.projection, view=view, **projection)).resolve(
        env.spec
    )


def state_of(env: Any, config: Config) -> wm_rnd.State:
    """A state whose rollout is full, of zeros: what is computed does not depend on it."""
    state = wm_rnd.init(jax.random.key(0), env.spec, config)
    full = eqx.tree_at(lambda r: (r.filled, r.acting), state.rollout, (jnp.int32(32), state.rollout.acting | True))
    return eqx.tree_at(lambda s: s.rollout, state, full)


def counted(env: Any, config: Config) -> tuple[float, float]:
    """Operations of one update of everything (world model, agents, curiosity), and of the agents' part, in 1e9."""
    shapes = eqx.filter_eval_shape(state_of, env, config)
    everything = lambda state, key: wm_rnd.learn(state, key, config)  # noqa: E731
    batch = eqx.filter_eval_shape(lambda state: wm_rnd._judged(state, config)[1], shapes)

    def imagined(state: wm_rnd.State, key: PRNGKeyArray) -> Any:
        starts = draw_starts(state.rollout, state.spec, key, config)
        return imagine(state.learners, wm_rnd.imagined_world(state, config), starts, key, config)[0]

    trained = lambda state, key, batch, data: wm_rnd.train_agents(state, key, batch, data, config)  # noqa: E731
    key = jax.random.key(0)
    data = eqx.filter_eval_shape(imagined, shapes, key)
    passes = config.ppo.epochs * count_flops(trained, shapes, key, batch, data)
    return count_flops(everything, shapes, key) / 1e9, (count_flops(imagined, shapes, key) + passes) / 1e9


def timed(env: Any, config: Config, args: argparse.Namespace) -> tuple[float, float]:
    """Median and least seconds of one update of everything."""
    state, key = eqx.filter_jit(state_of)(env, config), jax.random.key(1)
    learn = eqx.filter_jit(lambda state, key: wm_rnd.learn(state, key, config))

    clock = CLOCKS[args.clock]

    def once() -> float:
        began = clock()
        jax.block_until_ready(eqx.filter(learn(state, key), eqx.is_array))
        return clock() - began

    once()
    times = [once() for _ in range(args.repeats)]
    return statistics.median(times), min(times)


def cost_table(args: argparse.Namespace) -> str:
    """Operations and times against imagined steps (two agents) and against agents (16 imagined steps)."""
    lines = [
        "| agents | imagined steps | view | operations, 1e9 | of which agents | seconds, median | least |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(2, steps, "each") for steps in STEPS]
    cases += [(n, 16, view) for view in ("each", "focal") for n in AGENTS]
    for agents, steps, view in dict.fromkeys(cases):
        env = Crowd(agents)
        config = configured(env, view, imagination_steps=steps)
        everything, part = counted(env, config)
        measured = "unmeasured | "
        if "times" in args.parts:
            median, least = timed(env, config, args)
            measured = f"{median:.3f} | {least:.3f}"
        lines.append(f"| {agents} | {steps} | {view} | {everything:.1f} | {part:.1f} | {measured} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def rate(run: Any, steps: int, repeats: int, clock: Any) -> float:
    """Environment steps per second of the fastest of some calls, the first (which compiles) apart."""
    run()
    times = []
    for _ in range(repeats):
        began = clock()
        run()
        times.append(clock() - began)
    return steps / min(times)


def speed_table(args: argparse.Namespace) -> str:
    """Environment steps per second: random actions, ippo, wm_rnd, original."""
    env: Any = codream.make_env(args.env, **KEYWORDS.get(args.env, {}))
    copies, rows, clock = args.copies, args.rollout, CLOCKS[args.clock]

    @jax.jit
    def bare(key: PRNGKeyArray) -> Array:
        state, _ = jax.vmap(env.reset)(jax.random.split(key, copies))

        def body(state: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
            actions = jax.random.randint(key, (copies, env.spec.num_agents), 0, env.spec.max_actions)
            state, there = jax.vmap(env.step)(jax.random.split(key, copies), state, actions)
            return state, there.reward.sum()

        return jax.lax.scan(body, state, jax.random.split(key, 10 * rows))[1].sum()

    found = {"random actions": rate(lambda: bare(jax.random.key(0)).block_until_ready(), 10 * rows * copies, 3, clock)}
    for name in ("ippo", "wm_rnd", "original"):
        config = dataclasses.replace(preset(name), num_envs=copies)
        config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, rollout=rows))
        if args.imagination_steps is not None:
            projection = dataclasses.replace(config.projection, imagination_steps=args.imagination_steps)
            config = dataclasses.replace(config, projection=projection)
        driver = GraphDriver(env, config.resolve(env.spec), chunk=rows)
        runner = driver.start(jax.random.key(0))

        def run(driver: GraphDriver = driver) -> None:
            nonlocal runner
            runner, metrics = driver.advance(runner)
            jax.block_until_ready(metrics)

        found[name] = rate(run, rows * copies, args.repeats, clock)
        print(f"{name}: {found[name]:,.0f}", flush=True)
    lines = [f"| {args.env}, {copies} copies × {rows} steps | environment steps per second |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:,.0f} |" for name, value in found.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["operations", "times", "speed"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--env", default="jaxmarl:coin_game")
    parser.add_argument("--copies", type=int, default=64)
    parser.add_argument("--rollout", type=int, default=32)
    parser.add_argument("--imagination-steps", type=int, help="of those that imagine; the presets' own if not given")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tables = [f"{jax.devices()[0].device_kind}, jax {jax.__version__}; preset wm_rnd, {args.clock} clock."]
    if {"operations", "times"} & set(args.parts):
        tables.append(cost_table(args))
    if "speed" in args.parts:
        tables.append(speed_table(args))
        print(tables[-1])
    if args.out:
        args.out.write_text("\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
