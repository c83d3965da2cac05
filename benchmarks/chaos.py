"""What can happen to a training process, many times; after each, the run goes on and must end as it would have.

    python benchmarks/chaos.py [--kills 100] [--each 4] [--driver host|graph] [--env-workers 2] [--seed 0] [--out FILE]

A small run (a toy game, tiny networks, a checkpoint every 40 steps; two of three by PPO with curiosity, the third by
MATWM) is disturbed in both drivers: killed at random moments, asked to leave, its disk filled, its files damaged, its
environment broken. Then it is resumed, without any repair by hand, until it is done. It has survived if its final state
equals the uninterrupted run's leaf by leaf and bit by bit, and if nothing older than the last complete checkpoint was
lost on the way, nor a process that steps its environment left behind. Prints a table of fault × times tried × survived.
Trials are forked from this process, which computes nothing itself. Needs Linux; a full disk needs root, for a small
tmpfs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orbax.checkpoint  # noqa: F401  (what every trial would import otherwise)
import tensorboardX  # noqa: F401
from gymnasium import spaces
from tiny import tiny

import codream
import codream.envs.pettingzoo
from codream import checkpoint, cli, retention, saving, trainer
from codream.envs import EnvSpec, TimeStep
from codream.training import GraphDriver, HostDriver

STEPS, EVERY = 240, 40
ALGORITHMS = ("wm_rnd", "matwm")
PHASES = ("starting", "compiling", "training", "writing a checkpoint", "drawing the report")
START, COMPILE, TRAIN, WRITE, REPORT = range(5)
NOTHING, RAISE, HANG, SHAPE, NAN_OBS, NAN_REWARD = range(6)

_fork = mp.get_context("fork")
phase = _fork.Value("i", START)  # of the trial that runs
fault_file = tempfile.NamedTemporaryFile(prefix="chaos-fault-")  # noqa: SIM115  (as long as this process)
fault = np.memmap(fault_file.name, np.int32, "w+", shape=1)  # that the host environment commits, in every process


class Toy:
    """A host environment of two agents, which are paid for moving alike or not; commits the `fault` of the moment."""

    metadata: ClassVar[dict[str, Any]] = {"name": "toy"}
    possible_agents: ClassVar[list[str]] = ["cat_0", "mouse_0"]
    unwrapped = property(lambda self: self)

    def __init__(self, fault_file: str) -> None:
        self.agents: list[str] = []
        self.fault = np.memmap(fault_file, np.int32, "r")

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(3)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        self.rng, self.taken = np.random.default_rng(seed), 0
        self.agents = list(self.possible_agents)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        if self.fault[0] == RAISE:
            raise ZeroDivisionError("an accident")
        if self.fault[0] == HANG:
            time.sleep(1e6)
        self.taken += 1
        everyone, over = list(self.agents), self.taken == 6
        same = float(actions["cat_0"] == actions["mouse_0"])
        if over:
            self.agents = []
        reward = float("nan") if self.fault[0] == NAN_REWARD else same
        return (
            self._observe(),
            {"cat_0": reward, "mouse_0": -same},
            dict.fromkeys(everyone, False),
            dict.fromkeys(everyone, over),
            {agent: {} for agent in everyone},
        )

    def _observe(self) -> dict[str, np.ndarray]:
        size = 3 if self.fault[0] == SHAPE else 2
        seen = {agent: self.rng.normal(size=size).astype(np.float32) for agent in self.possible_agents}
        if self.fault[0] == NAN_OBS:
            seen["cat_0"][0] = np.nan
        return seen

    def close(self) -> None:
        pass


class GraphToy:
    """The same game inside JAX. `broken`: from its 80th step on a copy answers NaN, as observation or reward."""

    spec = EnvSpec("toy", ("cat_0", "mouse_0"), ((2,), (2,)), (3, 3))

    def __init__(self, broken: str = ""):
        self.broken = broken

    def reset(self, key: Any) -> tuple[Any, TimeStep]:
        import jax.numpy as jnp

        return self._answer(key, jnp.asarray(0), jnp.asarray(0), jnp.zeros(2), True)

    def step(self, key: Any, state: Any, actions: Any) -> tuple[Any, TimeStep]:
        import jax
        import jax.numpy as jnp

        (taken, total), paid = state, jnp.where(actions[0] == actions[1], jnp.array([1.0, -1.0]), 0.0)

        def again() -> Any:
            return self._answer(key, jnp.asarray(0), total, jnp.zeros(2), True)

        return jax.lax.cond(taken == 6, again, lambda: self._answer(key, taken + 1, total + 1, paid, False))

    def _answer(self, key: Any, taken: Any, total: Any, reward: Any, first: bool) -> tuple[Any, TimeStep]:
        import jax
        import jax.numpy as jnp

        last, bad = taken == 6, total >= 80
        obs = jax.random.normal(key, (2, 2))
        if self.broken == "observation":
            obs = jnp.where(bad, jnp.nan, obs)
        if self.broken == "reward":
            reward = jnp.where(bad, jnp.nan, reward)
        every = jnp.ones(2, bool)
        answer = TimeStep(
            obs, jnp.ones((2, 3), bool), reward, ~every, every & ~last, jnp.asarray(first), jnp.asarray(last)
        )
        return (taken, total), answer


def configuration(algo: str, env_workers: int) -> codream.Config:
    """A run of a few seconds."""
    common: dict[str, Any] = {
        "num_envs": 2,
        "env_workers": env_workers,
        "total_steps": STEPS,
        "checkpoint_every": EVERY,
        "log_every": 20,
        "env_time_limit": 10.0,
    }
    if algo == "wm_rnd":  # PPO with curiosity
        base = codream.preset("ippo")
        ppo = dataclasses.replace(base.ppo, units=16, layers=1, rollout=8, epochs=1, minibatches=2)
        curiosity = dataclasses.replace(base.curiosity, kind="rnd", sharing="hybrid", units=8, layers=1, features=4)
        return dataclasses.replace(base, ppo=ppo, curiosity=curiosity, **common)
    return tiny(200, warmup=40, world_model_every=10, agents_every=10, **common)


# ------------------------------------------------------------------------------------------ one trial, in a child


def tell_phases() -> None:
    """Let this process tell what it is doing."""
    write, advances = checkpoint.write, {Driver: Driver.advance for Driver in (HostDriver, GraphDriver)}
    report = trainer._draw

    def writing(*args: Any, **kwargs: Any) -> Any:
        phase.value = WRITE
        try:
            return write(*args, **kwargs)
        finally:
            phase.value = TRAIN

    def drawing(run: Any) -> None:
        phase.value = REPORT
        report(run)

    for Driver, advance in advances.items():

        def first(self: Any, runner: Any, advance: Any = advance) -> Any:
            phase.value = COMPILE if phase.value == START else phase.value
            answer = advance(self, runner)
            phase.value = TRAIN if phase.value == COMPILE else phase.value
            return answer

        setattr(Driver, "advance", first)  # noqa: B010
    saving.checkpoints.write, trainer._draw = writing, drawing


def work(
    driver: str,
    algo: str,
    path: Path,
    env_workers: int,
    *,
    fresh: bool = False,
    broken: str = "",
    jumps: bool = False,
) -> int:
    """Train the run in `path`, or go on with it. Returns the exit status that `codream train` would have."""
    import jax

    if fresh:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="chaos-jax-"))
    else:
        jax.config.update("jax_compilation_cache_dir", str(path.parent / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if jumps:
        clock, rng = time.time, random.Random(0)
        time.time = lambda: clock() + rng.choice([-1e6, 0.0, 1e6])
    tell_phases()
    env: Any = functools.partial(Toy, fault_file.name) if driver == "host" else GraphToy(broken)
    resume = path if (path / "config.json").exists() else None
    options: dict[str, Any] = {"resume": resume} if resume else {"name": path.name, "root": path.parent}

    def train(*_: Any, **__: Any) -> Any:
        codream.train(configuration(algo, env_workers), env=env, progress=False, **options)
        raise SystemExit(0)

    cli.train = train
    return cli.main(["train"])


def in_child(function: Callable[[], int], log: Path) -> Any:
    """Start `function` in a forked process; its exit status is what it returns."""

    def run() -> None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 70
        try:
            status = function()
        except SystemExit as err:
            status = err.code if isinstance(err.code, int) else 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    phase.value = START
    child = _fork.Process(target=run)
    child.start()
    return child


# ------------------------------------------------------------------------------------------ faults, from outside


def stepping_for(child: Any) -> list[int]:
    """The processes that step copies of the environment for the trial."""
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    with contextlib.suppress(OSError):
        pids = [int(pid) for pid in children.read_text().split()]
        return [pid for pid in pids if b"workers.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return []


def gone(pids: list[int], within: float = 10.0) -> bool:
    until = time.monotonic() + within
    while any(runs(pid) for pid in pids):
        if time.monotonic() > until:
            print(f"still there: {pids}", flush=True)
            return False
        time.sleep(0.02)
    return True


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


class Chaos:
    def __init__(self, driver: str, algos: list[str], env_workers: int, rng: random.Random, root: Path):
        self.driver, self.env_workers, self.rng, self.root = driver, env_workers, rng, root
        self.log = root / "log.txt"
        self.tried: collections.Counter[str] = collections.Counter()
        self.survived: collections.Counter[str] = collections.Counter()
        self.number = 0
        self.keep: Callable[[], None] = lambda: None
        self.algo, self.algos, self.durations = "", algos, {}
        for self.algo in algos:
            if self.complete(self.reference) < STEPS:
                self.undisturbed()  # compiles
            self.durations[self.algo] = seconds = self.undisturbed()
            print(f"{driver}, {self.algo}: an uninterrupted run takes {seconds:.1f} s", flush=True)

    def undisturbed(self) -> float:
        """The run that the others are compared with; its seconds."""
        self.delete(self.reference)
        began = time.monotonic()
        assert self.status(self.start(self.reference), 3_600) == 0, self.log.read_text()
        return time.monotonic() - began

    @property
    def reference(self) -> Path:
        return self.root / f"reference-{self.algo}"

    @property
    def duration(self) -> float:
        return self.durations[self.algo]

    def start(self, path: Path, **options: Any) -> Any:
        return in_child(lambda: work(self.driver, self.algo, path, self.env_workers, **options), self.log)

    def status(self, child: Any, within: float = 600.0) -> int | None:
        child.join(within)
        return child.exitcode

    def delete(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def new(self) -> Path:
        """The folder of another run; every third one is of the last algorithm."""
        self.number += 1
        self.algo = self.algos[-1 if self.number % 3 == 0 else 0]
        self.delete(self.root / f"run-{self.number}")
        return self.root / f"run-{self.number}"

    def complete(self, path: Path) -> int:
        """Steps of the latest complete checkpoint."""
        return max(retention.saved(path / "checkpoints"), default=0)

    def wait_for(self, child: Any, wanted: int) -> None:
        while phase.value != wanted and child.exitcode is None and (phase.value < wanted or wanted == WRITE):
            time.sleep(0.002)
            child.join(0)

    def moment(self, child: Any, aim: int | None) -> str:
        """Wait for a random moment, `aim`ed at a phase or not; the phase in which it falls."""
        if aim is None:
            child.join(self.rng.uniform(0, self.duration))
        else:
            self.wait_for(child, aim)
            spans = {START: 1.0, COMPILE: 10.0, TRAIN: self.duration / 3, WRITE: 0.08, REPORT: 0.3}
            child.join(self.rng.uniform(0, spans[aim]))
        return PHASES[phase.value]

    def same(self, path: Path) -> bool:
        """Whether the run has come to the reference's end, leaf by leaf and bit by bit."""

        def compare() -> int:
            one, other = (checkpoint.find(run).arrays() for run in (self.reference, path))
            same = one.keys() == other.keys() and all(
                one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name], equal_nan=True)
                for name in one
            )
            if not same:
                differing = [n for n in one if n not in other or not np.array_equal(one[n], other[n])]
                print(f"DIFFERS: {path}", differing, flush=True)
            return 0 if same else 1

        return self.status(in_child(compare, self.log)) == 0

    def finish(self, path: Path) -> bool:
        """Go on until the run is done: nothing may stand in the way, and no step before the last checkpoint be done
        again."""
        before = self.complete(path)
        if before < STEPS and self.status(self.start(path)) != 0:
            print("could not go on:", *self.log.read_text().splitlines()[-5:], sep="\n  ", flush=True)
            return False
        lines = codream.Run(path).metrics()
        steps = [line["steps"] for line in lines]
        if steps != sorted(set(steps)):
            print(f"metrics of {path} are out of order: {steps}", flush=True)
            return False
        return self.same(path)

    def count(self, what: str, good: bool, times: int = 1) -> None:
        self.tried[what] += times
        self.survived[what] += times if good else 0
        self.keep()
        print(f"{self.driver}: {what}: {'survived' if good else 'LOST'}", flush=True)

    # ---------------------------------------------------------------------------------- kinds

    def kills(self, total: int, chain: int = 5) -> None:
        """`kill -9`, several times in the life of one run."""
        while total > 0:
            path, phases = self.new(), []
            good = True
            for _ in range(min(chain, total)):
                aim = self.rng.choice([None, None, None, COMPILE, TRAIN, WRITE, WRITE, REPORT])
                if self.complete(path) >= STEPS:
                    break
                before = self.complete(path)
                child = self.start(path, fresh=aim == COMPILE)
                phases.append(self.moment(child, aim))
                stepping = stepping_for(child)
                child.kill()
                child.join()
                # A later checkpoint may have come, none may have gone.
                good = good and self.complete(path) >= before and gone(stepping)
            total -= len(phases)
            good = self.finish(path) and good
            for name in phases:
                self.count(f"kill -9 while {name}", good)
            self.delete(path)

    def signals(self, name: str, twice: bool = False) -> None:
        path, number = self.new(), getattr(signal, name)
        child = self.start(path, fresh=twice)
        self.wait_for(child, COMPILE if twice else TRAIN)
        time.sleep(self.rng.uniform(0.5, 3) if twice else self.rng.uniform(0, self.duration / 4))
        os.kill(child.pid, number)
        if twice:
            time.sleep(0.5)
            os.kill(child.pid, number)
            began = time.monotonic()
            good = self.status(child, 5) == 128 + number and time.monotonic() - began < 2
            child.kill()
            what = f"{name} twice while {PHASES[phase.value]}: leaves at once"
        else:
            status = self.status(child)
            good = status == 128 + number or (status == 0 and self.complete(path) >= STEPS)
            what = f"{name}: saves and leaves with {128 + number}"
        good = self.finish(path) and good
        self.count(what, good)
        self.delete(path)

    def damage(self, how: str) -> None:
        """A file of the latest checkpoint is not what was written."""
        path = self.new()
        child = self.start(path)
        while self.complete(path) < 4 * EVERY and child.exitcode is None:
            child.join(0.01)
        child.kill()
        child.join()
        latest = retention.saved(path / "checkpoints")[self.complete(path)]
        files = [f for f in latest.rglob("*") if f.is_file() and f.stat().st_size]
        file = self.rng.choice(files)
        data = bytearray(file.read_bytes())
        if how == "bit flipped":
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        else:
            del data[self.rng.randrange(len(data)) :]
        file.write_bytes(data)
        size = self.log.stat().st_size
        good = self.finish(path)
        said = "is damaged" in self.log.read_text()[size:]
        self.count(f"a checkpoint's file is {how}", good and said)
        self.delete(path)

    def full_disk(self, lasting: bool) -> None:
        disk = self.root / "disk"
        disk.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
            print("no tmpfs may be mounted here: a full disk is not tried", flush=True)
            return
        try:
            path = disk / "run"
            shutil.copytree(self.root / "jax", disk / "jax") if (self.root / "jax").exists() else None
            child = self.start(path)
            self.wait_for(child, TRAIN)
            child.join(self.rng.uniform(0, self.duration / 3))
            filler, size = disk / "filler", self.log.stat().st_size
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(b"x" * 4096)
                    file.flush()
            if lasting:
                status = self.status(child)
                good = status == 2 or (status == 0 and self.complete(path) >= STEPS)
                filler.unlink()
            else:
                while child.exitcode is None and "be written" not in self.log.read_text()[size:]:
                    child.join(0.01)
                filler.unlink()
                status = self.status(child)
                # What ends within the moment cannot keep its end, and says so.
                good = status == (2 if "training is done, but" in self.log.read_text()[size:] else 0)
            good = self.finish(path) and good
            self.count(f"disk full {'until the end' if lasting else 'for a moment'}", good)
        finally:
            subprocess.run(["umount", disk], check=False)

    def removed(self) -> None:
        path = self.new()
        child = self.start(path)
        self.wait_for(child, TRAIN)
        child.join(self.rng.uniform(0, self.duration / 3))
        self.delete(path)
        good = self.status(child) == 0
        self.count("run folder removed while training", self.finish(path) and good)
        self.delete(path)

    def second(self) -> None:
        path = self.new()
        child = self.start(path)
        self.wait_for(child, TRAIN)
        good = self.status(self.start(path)) == 2 and "is in use by process" in self.log.read_text()
        good = self.status(child) == 0 and good
        self.count("a second process on one folder: refused", self.finish(path) and good)
        self.delete(path)

    def environment(self, kind: int, what: str) -> None:
        path = self.new()
        child = self.start(path)
        self.wait_for(child, TRAIN)
        child.join(self.rng.uniform(0, self.duration / 3))
        fault[0] = kind
        status = self.status(child)
        fault[0] = NOTHING
        good = status == 1 or (status == 0 and self.complete(path) >= STEPS)
        self.count(f"environment {what}", self.finish(path) and good)
        self.delete(path)

    def helper_killed(self) -> None:
        path = self.new()
        child = self.start(path)
        self.wait_for(child, TRAIN)
        child.join(self.rng.uniform(0, self.duration / 3))
        stepping = stepping_for(child)
        for pid in stepping:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = self.status(child)
        good = status == 1 or (status == 0 and self.complete(path) >= STEPS)
        self.count("kill -9 of a process that steps copies", self.finish(path) and good)
        self.delete(path)

    def broken_graph(self, what: str) -> None:
        path = self.new()
        size = self.log.stat().st_size
        good = self.status(self.start(path, broken=what)) == 1
        said = f"environment/cat_0/{what} became nan" in self.log.read_text()[size:]
        self.count(f"environment answers NaN as {what}", self.finish(path) and good and said)
        self.delete(path)

    def clocks(self) -> None:
        path = self.new()
        good = self.status(self.start(path, jumps=True)) == 0
        seconds = [line["seconds"] for line in codream.Run(path).metrics()]
        good = good and seconds == sorted(seconds) and 0 <= seconds[-1] < 3600
        self.count("the clock jumps by days", self.finish(path) and good)
        self.delete(path)

    def everything(self, kills: int, each: int) -> None:
        for _ in range(each):
            for name in ("SIGTERM", "SIGINT"):
                self.signals(name)
            for how in ("bit flipped", "truncated"):
                self.damage(how)
            self.full_disk(lasting=False)
            self.full_disk(lasting=True)
            self.removed()
            self.second()
            if self.driver == "host":
                self.environment(RAISE, "raises")
                self.environment(HANG, "hangs")
                self.environment(SHAPE, "answers with a wrong shape")
                self.environment(NAN_OBS, "answers NaN as observation")
                self.environment(NAN_REWARD, "answers NaN as reward")
                if self.env_workers > 1:
                    self.helper_killed()
        if each:
            self.signals("SIGTERM", twice=True)
            self.signals("SIGINT", twice=True)
            self.clocks()
            if self.driver == "graph":
                self.broken_graph("observation")
                self.broken_graph("reward")
        self.kills(kills)


def table(results: dict[str, tuple[dict[str, int], dict[str, int]]]) -> str:
    names = dict.fromkeys(name for tried, _ in results.values() for name in tried)
    lines = [
        "| fault | " + " | ".join(f"{driver}: tried | survived" for driver in results) + " |",
        "|---|" + "---|---|" * len(results),
    ]
    for name in sorted(names, key=lambda name: (not name.startswith("kill"), name)):
        cells = [f"{tried.get(name, 0)} | {survived.get(name, 0)}" for tried, survived in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [f"**{sum(tried.values())}** | **{sum(survived.values())}**" for tried, survived in results.values()]
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kill -9, over both drivers")
    parser.add_argument("--each", type=int, default=4, help="times of every other fault in each driver")
    parser.add_argument("--driver", choices=("host", "graph"))
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--env-workers", type=int, default=1, help="processes that step the copies of the host driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="folder that keeps what was compiled, and the reference runs")
    parser.add_argument("--out", type=Path, help="JSON file of the counts, added to if it exists")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would pass on that it is ignored
    drivers = [args.driver] if args.driver else ["host", "graph"]
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for driver in drivers:
        root = args.root / driver if args.root else Path(tempfile.mkdtemp(prefix=f"chaos-{driver}-"))
        root.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(driver, args.algos, args.env_workers if driver == "host" else 0, random.Random(args.seed), root)
        if driver in results:
            chaos.tried, chaos.survived = map(collections.Counter, results[driver])

        def keep(chaos: Chaos = chaos) -> None:
            results[chaos.driver] = (dict(chaos.tried), dict(chaos.survived))
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))

        chaos.keep = keep
        chaos.everything(args.kills // len(drivers), args.each)
        if not args.root:
            shutil.rmtree(root, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()
