"""Is a commit slower than another? Both on this machine, in turn, in one run.

    python benchmarks/compare_commits.py BEFORE [AFTER] [--presets small middling] [--rounds 15] [--out FILE]

Checks both commits out beside each other (git worktrees in a temporary folder; AFTER unset: the working tree as it is),
lets a process with either run every part in turn, so that what else the machine does meets both alike, and prints for
every preset and part the median time of either, and of the ratios within each round the median and the middle half:
above 1 the later one is slower. What runs uses what every commit has: `codream.preset`,
`codream.matwm.train_world_model`, `train_agents`. Preset `middling` is `paper` at hidden 128; `paper` itself takes half
a minute for a round on two cores. `--clock cpu` counts the process's own time, for busy machines.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from in_turn import Asked

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import dataclasses, json, sys, time
import equinox as eqx, jax, jax.numpy as jnp
import codream
from codream import matwm
from codream.envs import EnvSpec

preset = sys.argv[1]
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[2]]
agents = tuple(f"adversary_{i}" for i in range(3)) + ("agent_0",)
spec = EnvSpec("simple_tag", agents, ((16,), (16,), (16,), (14,)), (5,) * 4)
config = codream.preset("paper" if preset == "middling" else preset)
if preset == "middling":
    config = dataclasses.replace(
        config,
        world_model=dataclasses.replace(
            config.world_model, hidden=128, heads=4, units=128, groups=16, classes=16, length=32, team_hidden=64,
            team_layers=1,
        ),
        agents=dataclasses.replace(config.agents, units=128, starts=128),
    )
config = dataclasses.replace(config, replay=dataclasses.replace(config.replay, capacity=4096)).resolve(spec)

@eqx.filter_jit
def filled(key):
    state = matwm.init(key, spec, config)
    replay, rows = state.replay, jnp.arange(state.replay.rows)
    wanted = lambda r: (r.obs, r.acting, r.first, r.filled)
    replay = eqx.tree_at(wanted, replay, (
        jax.random.normal(key, replay.obs.shape),
        jnp.broadcast_to((rows % 26 != 25)[:, None, None], replay.acting.shape),
        jnp.broadcast_to((rows % 26 == 0)[:, None], replay.first.shape),
        jnp.asarray(replay.rows, jnp.int32),
    ))
    return eqx.tree_at(lambda s: (s.replay, s.steps), state, (replay, jnp.asarray(replay.rows, jnp.int32)))

state, key = filled(jax.random.key(0)), jax.random.key(1)
parts = {"world-model update": matwm.train_world_model, "update of all agents": matwm.train_agents}
parts = {n: eqx.filter_jit(lambda s, k, train=train: train(s, k, config)) for n, train in parts.items()}

def seconds(part):
    began = clock()
    jax.block_until_ready(eqx.filter(part(state, key), eqx.is_array))
    return clock() - began

for part in (*parts.values(), *parts.values()):  # compiled, and once more
    seconds(part)
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps({name: seconds(part) for name, part in parts.items()}), flush=True)
"""


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--presets", nargs="+", default=["small", "middling"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, for an interval; got {args.rounds}")

    names = [args.before, args.after or "working tree"]
    lines = [
        f"Median milliseconds of {args.rounds} rounds, in turn ({args.clock} clock).",
        "",
        f"| preset | part | {names[0]} | {names[1]} | ratio | middle half |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        try:
            for k, commit in enumerate((args.before, args.after)):
                source = Path(folder) / str(k) if commit else ROOT
                if commit:
                    git("worktree", "add", "--detach", str(source), commit)
                sources.append(source)
            for preset in args.presets:
                sides = [
                    Asked(PROBE, sys.executable, source, preset, args.clock, PYTHONPATH=str(source / "src"))
                    for source in sources
                ]
                # Each as often first as second.
                rounds = [{k: sides[k].ask("") for k in (n % 2, 1 - n % 2)} for n in range(args.rounds)]
                for side in sides:
                    side.end()
                for part in rounds[0][0]:
                    before, after = (statistics.median(one[k][part] for one in rounds) for k in (0, 1))
                    low, ratio, high = statistics.quantiles((one[1][part] / one[0][part] for one in rounds), n=4)
                    row = f"{before * 1e3:.1f} | {after * 1e3:.1f} | {ratio:.2f} | {low:.2f} to {high:.2f}"
                    lines.append(f"| {preset} | {part} | {row} |")
                    print(lines[-1], flush=True)
        finally:
            for source in sources:
                if source != ROOT:
                    git("worktree", "remove", "--force", str(source))
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
