"""Nonsense for everything that reads a run: configurations, run.json, metrics, manifests, checkpoints.

    python benchmarks/fuzz_readers.py [--minutes 10] [--seed 0]

Takes the files of a small run, spoils them (bits flipped, cut, swapped, deleted; values of JSON replaced, with the
checksums of the manifest and of the arrays made right again, as somebody would who means it), and reads. Whatever comes
must be a value or one of codream's named errors. Reading happens in a child process, so that a crash of native code is
noticed, and with an audit hook, so that anything that is unpickled is noticed too. Prints a table of what was read ×
outcome.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing as mp
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import codream
from codream import checkpoint, retention
from codream.checkpoint import CheckpointError
from codream.envs import EnvSpec
from codream.manifest import _own_digest, digest

SPEC = EnvSpec("two", ("cat_0", "mouse_0"), ((3,), (2,)), (2, 5))
NAMED = (codream.ConfigError, codream.RunError, CheckpointError)
LARGEST = 2**20  # bytes of nonsense that is put in


def state() -> dict[str, Any]:
    """Something to save: floats, integers, flags, a key, and an array without entries."""
    return {
        "weights": jnp.arange(600.0).reshape(20, 30),
        "count": jnp.asarray(7, jnp.int32),
        "flags": jnp.asarray([True, False]),
        "key": jax.random.key(0),
        "empty": jnp.zeros((3, 0)),
    }


def make(folder: Path) -> codream.Run:
    """A run as training leaves it behind."""
    config = dataclasses.replace(codream.preset("small"), checkpoint_every=40)
    run = codream.Run.create(config, SPEC, name="run", root=folder)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps({"steps": i, "a": 0.5}) + "\n" for i in range(20)))
    checkpoint.write(checkpoint.snapshot(state()), run.checkpoints, config=config, spec=SPEC, steps=40)
    return run


def nonsense(rng: random.Random) -> Any:
    """A JSON value."""
    kind = rng.randrange(9)
    if kind < 7:
        values = [None, True, -1, 2**70, 1e308, float("nan"), "", "../../x", "\x00", "é", [], {}, rng.random()]
        return rng.choice([*values, rng.randrange(-9, 99), "x" * rng.choice([1, 10_000])])
    return [nonsense(rng) for _ in range(rng.randrange(3))] if kind == 7 else {"a": nonsense(rng)}


def spoil_json(value: Any, rng: random.Random) -> Any:
    """The value with one place, somewhere in it, replaced, removed, or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name, value = rng.choice(list(value)), dict(value)
        action = rng.randrange(8)
        if action == 0:
            del value[name]
        elif action == 1:
            value[rng.choice(["x", name + "x", "../" + name])] = value[name]
        else:
            value[name] = spoil_json(value[name], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        place, value = rng.randrange(len(value)), list(value)
        value[place] = spoil_json(value[place], rng)
        return value
    return nonsense(rng)


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    action, new = rng.randrange(6), bytearray(data)
    place = rng.randrange(len(data)) if data else 0
    if action == 0 and data:
        new[place] ^= 1 << rng.randrange(8)
    elif action == 1:
        del new[place:]
    elif action == 2:
        del new[place : place + rng.randrange(1, 50)]
    elif action == 3:
        new[place:place] = rng.randbytes(rng.choice([1, 10, 1_000]))
    elif action == 4:
        new[place : place + 8] = rng.randbytes(8)
    else:
        new = bytearray(rng.randbytes(rng.randrange(LARGEST // 1_000)))
    return bytes(new)


def sign(folder: Path) -> None:
    """Make the checksums of a checkpoint right, if its manifest can still be read."""
    file = folder / "manifest.json"
    try:
        values = json.loads(file.read_text())
        if isinstance(values.get("files"), dict):
            values["files"] = {name: digest(folder / name) for name in values["files"] if (folder / name).is_file()}
        values.pop("sha256", None)
        file.write_text(json.dumps(values | {"sha256": _own_digest(values)}))
    except (ValueError, AttributeError, OSError):
        return


def spoil(run: Path, rng: random.Random) -> str:
    """Spoil something; says what kind of thing."""
    what = rng.choice(["config.json", "run.json", "metrics.jsonl", "manifest.json", "checkpoint", "forged checkpoint"])
    folder = run / "checkpoints" / "40"
    file = folder / what if what == "manifest.json" else run / what
    if what.endswith("checkpoint"):
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        for _ in range(rng.randrange(1, 3)):
            file = rng.choice(files)
            action = rng.randrange(10)
            if action == 0:
                file.unlink(missing_ok=True)
            elif action == 1:
                shutil.copy(rng.choice([f for f in files if f.exists()] or [Path(__file__)]), run / "other")
                shutil.move(run / "other", file)
            elif file.exists():
                file.write_bytes(spoil_bytes(file.read_bytes(), rng))
        if what == "forged checkpoint":
            sign(folder)
        return what
    if what == "manifest.json" or (what != "metrics.jsonl" and rng.random() < 0.7):
        values = json.loads(file.read_text())
        for _ in range(rng.randrange(1, 3)):
            values = spoil_json(values, rng)
        file.write_text(json.dumps(values))
        if what == "manifest.json":
            sign(folder)
    else:
        file.write_bytes(spoil_bytes(file.read_bytes(), rng))
    return what


def read(run: Path, template: Any) -> None:
    """Read all of it, as `codream train --resume` and `codream evaluate` do."""
    errors: list[Exception] = []

    def attempt(function: Callable[[], Any]) -> None:
        try:
            function()
        except NAMED as err:
            errors.append(err)

    opened = codream.Run(run)
    attempt(lambda: opened.config)
    attempt(lambda: opened.about)
    attempt(lambda: opened.metrics())
    attempt(lambda: checkpoint.restore(template, checkpoint.latest_good(run, lambda _: None)))
    attempt(lambda: retention.best(run / "checkpoints"))
    if errors:
        raise errors[0]


_unpickled: list[str] = []


def work(source: Path, seed: int, until: float, answers: Any) -> None:
    """Spoil and read until the time is over; tell what is about to be read, and then how it went."""
    sys.addaudithook(lambda event, args: _unpickled.append(str(args)) if event == "pickle.find_class" else None)
    template, number = eqx.filter_eval_shape(state), seed
    target = Path(tempfile.mkdtemp(prefix="fuzz-"))
    while time.monotonic() < until:
        shutil.rmtree(target / "run", ignore_errors=True)
        shutil.copytree(source, target / "run")
        what = spoil(target / "run", random.Random(number))
        answers.put((number, what, None))
        _unpickled.clear()
        try:
            read(target / "run", template)
            how = "read"
        except NAMED:
            how = "refused by name"
        except BaseException as err:
            how = f"{type(err).__name__}: {err}"[:300]
        if _unpickled:
            how = f"unpickled {_unpickled[0]}"
        answers.put((number, what, how))
        number += 1
    shutil.rmtree(target, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder)).path
        until, number = time.monotonic() + 60 * args.minutes, args.seed
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        bad: list[str] = []
        spawn = mp.get_context("spawn")
        while time.monotonic() < until:
            answers = spawn.Queue()
            child = spawn.Process(target=work, args=(source, number, until, answers))
            child.start()
            last: tuple[int, str, str | None] | None = None
            while child.is_alive() or not answers.empty():
                try:
                    number, what, how = last = answers.get(timeout=1.0)
                except Exception:
                    continue
                if how is not None:
                    good = how in ("read", "refused by name")
                    counts[what][how if good else "NOT NAMED"] += 1
                    if not good:
                        bad.append(f"seed {number}, {what}: {how}")
            child.join()
            if child.exitcode and last is not None:
                counts[last[1]]["CRASHED"] += 1
                bad.append(f"seed {last[0]}, {last[1]}: the process ended with {child.exitcode}")
            number += 1
    columns = ("read", "refused by name", "NOT NAMED", "CRASHED")
    print(f"| {args.minutes:g} minutes | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for what, found in sorted(counts.items()):
        print(f"| {what} | {' | '.join(str(found[name]) for name in columns)} |")
    print(f"| **all** | {' | '.join(str(sum(found[name] for found in counts.values())) for name in columns)} |")
    for line in bad[:20]:
        print(line)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
