"""A long run in each driver: does memory stay flat, does the time of a step, do metrics grow as expected?

    python benchmarks/soak.py --driver host --minutes 60 --out DIR
    python benchmarks/soak.py --driver graph --minutes 60 --out DIR
    python benchmarks/soak.py --out DIR                  # the table and the picture of what was measured

Trains preset `small` on simple_tag (host: mpe2's, graph: JaxMARL's) as `codream train` does, with looks at the run for
TensorBoard, and with a checkpoint every 1,000 steps, until the time is over; then sends itself SIGTERM. Twice a minute:
resident memory, bytes of all live arrays on the device, sizes of the run's files. What compiling takes at the start is
left out: the first sixth of the time, and the first tenth of the steps.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from tiny import tiny as tiny_config

import codream

ENVS = {"host": "mpe2:simple_tag_v3", "graph": "jaxmarl:MPE_simple_tag_v3"}
EVERY = 30.0  # seconds between two samples
COLUMNS = ("seconds", "steps", "resident", "device", "metrics_bytes", "events_bytes", "checkpoints_bytes")


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device() -> int:
    """Bytes in use on the device; on the CPU, which does not tell, those of all live arrays."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else sum(x.nbytes for x in jax.live_arrays())


def steps_of(file: Path) -> int:
    """Steps in the last whole line; without reading the others, which would take memory of its own."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - 20_000))
        lines = opened.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["steps"]) if lines else 0


def size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # a checkpoint that was just deleted
            continue
    return total


def configuration(driver: str, tiny: bool) -> codream.Config:
    """Preset `small`, or with tiny networks, without an end."""
    base = tiny_config(5_000, world_model_every=16, agents_every=50, log_every=200) if tiny else codream.preset("small")
    return dataclasses.replace(base, env=ENVS[driver], total_steps=2**31 - 1, checkpoint_every=1_000)


def soak(driver: str, minutes: float, tiny: bool, out: Path) -> None:
    """Train for `minutes`, and write the samples to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = configuration(driver, tiny)
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    run = root / "run"
    began = time.monotonic()

    def watch() -> None:
        with (out / f"soak-{driver}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            while (now := time.monotonic() - began) < 60 * minutes:
                steps = steps_of(run / "metrics.jsonl")
                sizes = [size(run / name) for name in ("metrics.jsonl", "tensorboard", "checkpoints")]
                rows.writerow([round(now, 1), steps, resident(), device(), *sizes])
                file.flush()
                time.sleep(EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        codream.train(config, name="run", root=root, peek=True)
    except KeyboardInterrupt as err:
        print(f"stopped by {err}, exit status {getattr(err, 'status', None)}")
    lines = codream.Run(run).metrics()
    stalls = [line["checkpoint/stall_seconds"] for line in lines if "checkpoint/stall_seconds" in line]
    writes = [line["checkpoint/write_seconds"] for line in lines if "checkpoint/write_seconds" in line]
    np.savez(
        out / f"soak-{driver}.npz",
        stalls=stalls,
        writes=writes,
        steps=[line["steps"] for line in lines],
        step_ms=[1e3 / line["steps_per_second"] for line in lines],
        seconds=[line["seconds"] for line in lines],
    )
    print(f"the run lies in {run}")


def per_hour(seconds: np.ndarray, values: np.ndarray) -> float:
    """Slope of a straight line through the samples, per hour."""
    return float(np.polyfit(seconds / 3600, values, 1)[0])


def table(out: Path) -> str:
    """What `soak` measured, one column a driver."""
    rows: dict[str, list[str]] = {}
    found = [driver for driver in ENVS if (out / f"soak-{driver}.npz").exists()]
    for driver in found:
        data = np.genfromtxt(out / f"soak-{driver}.csv", delimiter=",", names=True)
        log = np.load(out / f"soak-{driver}.npz")
        whole = data["seconds"][-1]
        late = (data["seconds"] > whole / 6) & (data["steps"] > data["steps"].max() / 10)
        if late.sum() < 5:
            raise SystemExit(
                f"expected at least 5 samples after the start in {out / f'soak-{driver}.csv'}, got {late.sum()}: "
                f"run it for longer; a sample is taken every {EVERY:.0f} seconds"
            )
        seconds, steps = data["seconds"][late], data["steps"][late]
        logged = (log["seconds"] > whole / 6) & (log["steps"] > data["steps"].max() / 10)
        ms, at = log["step_ms"][logged], log["seconds"][logged]
        thirds, fifths = np.array_split(ms, 3), np.array_split(data["resident"][late], 5)
        lines = np.searchsorted(log["steps"], steps, side="right")

        def flat(name: str, data=data, late=late, seconds=seconds) -> str:
            values = data[name][late] / 2**20
            return f"{np.median(values):,.0f} MiB, {per_hour(seconds, values):+.1f} MiB per hour, "

        cells = {
            "time": f"{whole / 60:.0f} minutes",
            "environment steps": f"{data['steps'][-1]:,.0f}",
            "resident memory": flat("resident") + f"largest {data['resident'].max() / 2**20:,.0f}",
            "its medians by fifths": " / ".join(f"{np.median(part) / 2**20:,.0f}" for part in fifths) + " MiB",
            "arrays on the device": flat("device") + f"largest {data['device'].max() / 2**20:,.0f}",
            "time of a step, median by thirds": " / ".join(f"{np.median(third):.2f}" for third in thirds)
            + f" ms ({per_hour(at, ms):+.2f} ms per hour)",
            "bytes of metrics.jsonl per line": f"{np.polyfit(lines, data['metrics_bytes'][late], 1)[0]:,.0f}",
            "metrics.jsonl at the end": f"{data['metrics_bytes'][-1] / 2**20:.2f} MiB in {len(log['steps']):,} lines",
            "TensorBoard events at the end": f"{data['events_bytes'][-1] / 2**20:.2f} MiB",
            "checkpoints on the disk": f"{np.median(data['checkpoints_bytes'][late]) / 2**20:.0f} MiB, largest "
            f"{data['checkpoints_bytes'].max() / 2**20:.0f}",
            "checkpoints written": f"{len(log['stalls'])}",
            "training waited for a checkpoint": f"median {np.median(log['stalls']) * 1e3:.0f} ms, longest "
            f"{log['stalls'].max() * 1e3:.0f}",
            "writing it took": f"median {np.median(log['writes']) * 1e3:.0f} ms, longest "
            f"{log['writes'].max() * 1e3:.0f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    head = [f"| | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    return "\n".join(head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def picture(out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    for driver in ENVS:
        if not (out / f"soak-{driver}.npz").exists():
            continue
        data = np.genfromtxt(out / f"soak-{driver}.csv", delimiter=",", names=True)
        log = np.load(out / f"soak-{driver}.npz")
        axes[0].plot(data["seconds"] / 60, data["resident"] / 2**20, label=driver)
        axes[1].plot(log["seconds"] / 60, log["step_ms"], label=driver, linewidth=0.6)
        axes[2].plot(data["seconds"] / 60, data["metrics_bytes"] / 2**20, label=driver)
    for ax, title in zip(axes, ("resident memory, MiB", "time of a step, ms", "metrics.jsonl, MiB"), strict=True):
        ax.set(title=title, xlabel="minutes", ylim=(0, None))
        ax.legend()
    axes[1].set_yscale("linear")
    figure.savefig(out / "soak.png", dpi=110)
    return out / "soak.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=list(ENVS))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true", help="tiny networks: many more steps, lines and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("soak"))
    args = parser.parse_args()
    if args.driver:
        soak(args.driver, args.minutes, args.tiny, args.out)
        return
    text = table(args.out)
    print(text)
    (args.out / "soak.md").write_text(text + "\n")
    print(f"picture: {picture(args.out)}")


if __name__ == "__main__":
    main()
