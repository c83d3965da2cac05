"""Is a commit slower than another? Both on this machine, in turn, in one run.

    python benchmarks/compare_commits.py BEFORE [AFTER] [--presets small middling] [--rounds 3] [--out FILE]

Checks both commits out beside each other (git worktrees in a temporary folder; AFTER unset: the working tree as it is),
runs this file's probe with each in turn, so that what else the machine does meets both alike, and prints for every
preset and part the least time of either and their ratio: above 1 the later one is slower. The probe uses what every
commit has: `codream.preset`, `codream.matwm.train_world_model`, `train_agents`. Preset `middling` is `paper` at hidden
128; `paper` itself wants minutes for a round on a CPU. `--clock cpu` counts the process's own time, for busy machines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import dataclasses, json, sys, time
import equinox as eqx, jax, jax.numpy as jnp
import codream
from codream import matwm
from codream.envs import EnvSpec

preset, repeats = sys.argv[1], int(sys.argv[2])
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[3]]
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

state, key, found = filled(jax.random.key(0)), jax.random.key(1), {}
parts = {"world-model update": matwm.train_world_model, "update of all agents": matwm.train_agents}
for name, train in parts.items():
    compiled, times = eqx.filter_jit(lambda s, k, train=train: train(s, k, config)), []
    for _ in range(repeats + 1):
        began = clock()
        jax.block_until_ready(eqx.filter(compiled(state, key), eqx.is_array))
        times.append(clock() - began)
    found[name] = min(times[1:])
print(json.dumps(found))
"""


def probe(source: Path, preset: str, args: argparse.Namespace) -> dict[str, float]:
    """Least seconds of every part, by the code in `source`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, preset, str(args.repeats), args.clock],
        env={**os.environ, "PYTHONPATH": str(source / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the probe failed with {source}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--presets", nargs="+", default=["small", "middling"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of each part in a round")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    names = [args.before, args.after or "working tree"]
    lines = [
        f"Least milliseconds of {args.rounds} rounds, in turn ({args.clock} clock).",
        "",
        f"| preset | part | {names[0]} | {names[1]} | ratio |",
        "|---|---|---|---|---|",
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
                rounds = [[probe(source, preset, args) for source in sources] for _ in range(args.rounds)]
                for part in rounds[0][0]:
                    before, after = (min(one[k][part] for one in rounds) for k in (0, 1))
                    row = f"{before * 1e3:.1f} | {after * 1e3:.1f} | {after / before:.2f}"
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
