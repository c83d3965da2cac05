"""A step of training beside the same of a public PyTorch implementation of MATWM, in turn, on this machine, in one run.

    git clone https://github.com/odafuta/world_model theirs
    python -m venv torch && torch/bin/pip install torch numpy matplotlib tqdm mpe2
    python benchmarks/beside_pytorch.py theirs --python torch/bin/python [--sizes middling] [--rounds 5] [--out FILE]

Both train simple_tag (mpe2) with the updates that the paper buys with every environment step, at the same widths,
batches and horizon, each in a process of its own that waits while the other works. Prints for either the time of an
environment step with everything, the median of all rounds, and the ratio within each; and the memory of both.
Their code is run as it is, in the order of the training loop of their notebook. It leaves out what costs us something:
contexts before imagination, attention over what was imagined, and any training or use of the teammate predictor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from in_turn import Asked

HERE = Path(__file__).resolve().parent

WAITING = '''
import json, resource, sys, time

def serve(step):
    """Of as many steps as are asked for: seconds of one, the mean; GiB of the process after, within and before."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    open("/proc/self/clear_refs", "w").write("5")  # from here on VmHWM is the largest of steps
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        took = (time.perf_counter() - began) / int(line)
        time.sleep(0.1)  # what a step computed with is given back by another thread
        status = dict(row.split(":", 1) for row in open("/proc/self/status").read().splitlines())
        between, within = (int(status[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
        print(json.dumps({"seconds": took, "between": between, "within": within, "largest": largest}), flush=True)
'''

THEIRS = """
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):
    from matwm_agent import MATWMAgent
    from matwm_implementation import MATWMConfig
from mpe2 import simple_tag_v3

config = MATWMConfig(**json.loads(sys.argv[1]))
env = simple_tag_v3.parallel_env(num_good=1, num_adversaries=3, num_obstacles=2, max_cycles=config.max_cycles)
obs, _ = env.reset(seed=0)
world_model, optimiser = MATWMAgent.create_shared_world_model(config, "cpu")
agents = {n: MATWMAgent(config, n, i, "cpu", shared_world_model=world_model) for i, n in enumerate(env.agents)}

def step(learn=True):
    global obs
    if not env.agents:
        obs, _ = env.reset()
    acts = {n: a.select_action(obs[n]) if learn else env.action_space(n).sample() for n, a in agents.items()}
    there, rewards, terminated, truncated, _ = env.step(acts)
    for n, a in agents.items():
        others = {k: v for k, v in acts.items() if k != n}
        a.store_experience(obs[n], acts[n], rewards[n], there[n], terminated[n] or truncated[n], others)
    obs = there
    if learn:
        assert MATWMAgent.train_world_model_shared(agents, config, "cpu", optimiser)
        for a in agents.values():
            assert a.train_agent()

for _ in range(config.warmup_steps):
    step(learn=False)
for _ in range(2):
    step()
serve(step)
"""

OURS = """
import dataclasses
from types import SimpleNamespace
import codream, jax
from codream.memory import give_back, give_back_large
from codream.training import driver_for
from update_time import configured, filled, ready

give_back_large()  # as `codream.train` does
setting = SimpleNamespace(preset="paper", precision=sys.argv[1], sizes=sys.argv[2], devices=int(sys.argv[3]))
config = configured(setting)
config = dataclasses.replace(config, agents=dataclasses.replace(config.agents, context=int(sys.argv[4])))
env = codream.make_env("simple_tag", num_envs=config.num_envs)
config = config.resolve(env.spec)
driver = driver_for(env, config)
runner = ready(driver, filled(env, config, driver)[0], setting)

def step():
    global runner
    runner, metrics = driver.advance(runner)
    jax.block_until_ready(metrics)

for _ in range(3):
    step()
give_back()
serve(step)
"""


def theirs_configured(sizes: str) -> dict[str, Any]:
    """What of their configuration is another than `paper`'s."""
    if sizes == "preset":
        return {}
    return {
        "hidden_dim": 128,
        "num_heads": 4,
        "latent_dim": 16,
        "num_classes": 16,
        "wm_batch_length": 32,
        "agent_batch_size": 128,
        "actor_hidden_dim": 128,
        "critic_hidden_dim": 128,
        "teammate_hidden_dim": 64,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path, help="folder of their checkout")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with torch and mpe2")
    parser.add_argument("--sizes", choices=("preset", "middling"), default="middling")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--devices", type=int, default=1, help="of ours, which share the cores")
    parser.add_argument("--context", type=int, default=8, help="of ours, at least 2; theirs has none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of theirs in a round; ours takes three times as many")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    theirs = Asked(WAITING + THEIRS, args.python, args.theirs, json.dumps(theirs_configured(args.sizes)))
    settings = (args.precision, args.sizes, str(args.devices), str(args.context))
    ours = Asked(WAITING + OURS, sys.executable, HERE, *settings, JAX_NUM_CPU_DEVICES=str(args.devices))
    rounds = [(theirs.ask(str(args.steps)), ours.ask(str(3 * args.steps))) for _ in range(args.rounds)]
    theirs.end()
    ours.end()
    ratios = [a["seconds"] / b["seconds"] for a, b in rounds]
    lines = [
        f"paper{', middling sizes' if args.sizes == 'middling' else ''}, simple_tag, {os.cpu_count()} cores; codream: "
        f"{args.precision}, context {args.context}, {args.devices} device{'s' if args.devices > 1 else ''}; "
        f"{args.rounds} rounds",
        "",
        "| | environment step with everything, ms | between steps, GiB | within a step, GiB | before, compiling, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, side in zip(("PyTorch", "codream"), zip(*rounds, strict=True), strict=True):
        lines.append(
            f"| {name} | {statistics.median(r['seconds'] for r in side) * 1e3:.0f} | {side[-1]['between']:.2f} | "
            f"{side[-1]['within']:.2f} | {side[-1]['largest']:.2f} |"
        )
    lines += ["", f"Times as fast, round by round: {', '.join(f'{r:.2f}' for r in ratios)}."]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
