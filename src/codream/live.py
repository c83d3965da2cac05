"""What one can watch while a run goes on: TensorBoard events, Weights & Biases, and a small table in the terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.markup import escape
from rich.table import Table

from codream.config import Config, ConfigError
from codream.envs import EnvSpec

__all__ = ["EVENTS", "Live", "WandbMode", "live_table", "publish"]

EVENTS = "tensorboard"
"""Folder of the event files within a run's."""

FLUSHED = 5.0  # seconds between two writes to the disk

WandbMode = Literal["off", "offline", "online"]


class Live:
    """Scalars of one run, to its TensorBoard events and, if asked for, to Weights & Biases.

    Raises ConfigError for a mode that does not exist, ModuleNotFoundError with the command to type where wandb is not
    installed. Where events cannot be written (disk full, folder removed) that is told once, and tried again at the next
    line: curves must not stop a run.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        begun: int = 0,
        wandb: WandbMode = "off",
        tell: Callable[[str], None] = print,
    ):
        self.check(wandb)
        self._wandb = _start_wandb(folder, config, wandb) if wandb != "off" else None
        self._folder = folder
        self._tell = tell
        self._events: _Events | None = None
        self._broken = False
        self.rewind(begun)

    @staticmethod
    def check(wandb: str) -> None:
        """Raise what `Live` would, before there is a run's folder."""
        if wandb not in get_args(WandbMode):
            raise ConfigError(f"wandb must be one of {', '.join(get_args(WandbMode))}, got {wandb!r}")
        if wandb != "off" and importlib.util.find_spec("wandb") is None:
            raise ModuleNotFoundError('Weights & Biases is not installed; type: pip install "codream[wandb]"')

    def scalars(self, line: Mapping[str, float]) -> None:
        """One line of metrics, at its `steps`."""
        steps = int(line["steps"])
        self._try(lambda events: events.scalars(line, steps))
        if self._wandb is not None:
            self._wandb.log(dict(line), step=steps)

    def pictures(self, steps: int, table: str, gif: bytes) -> None:
        """A cross-play table (Markdown) and an episode beside its dream (an animated GIF)."""
        self._try(lambda _: publish(self._folder, steps, table, gif))
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            video = wandb.Video(io.BytesIO(gif), format="gif")
            self._wandb.log(
                {"real beside imagined": video, "cross-play": wandb.Html(f"<pre>{table}</pre>")}, step=steps
            )

    def rewind(self, begun: int) -> None:
        """Begin another file of events; what a run that goes on from `begun` will write again is dropped from the
        curves."""
        if self._events is not None:
            self._try(lambda events: events.close())
            self._events = None
        self._try(lambda _: None, purge=begun + 1)

    def _try(self, write: Callable[[_Events], None], purge: int | None = None) -> None:
        try:
            if self._events is not None and not self._events.file.exists():  # the folder was removed
                self._events.close()
                self._events = None
            if self._events is None:
                self._events = _Events(self._folder, purge)
            write(self._events)
            self._broken = False
        except OSError as err:
            if self._events is not None:
                with suppress(OSError):
                    self._events.close()
                self._events = None
            if not self._broken:
                self._tell(f"TensorBoard events cannot be written ({err}); training goes on without them")
            self._broken = True

    def close(self) -> None:
        """Write out what is still held back."""
        self._try(lambda events: events.close())
        if self._wandb is not None:
            self._wandb.finish()


def publish(folder: Path, steps: int, table: str, gif: bytes | None) -> None:
    """Add a cross-play table (Markdown) and an episode beside its dream (an animated GIF) to a run's events."""
    from tensorboardX.proto import summary_pb2

    message: Any = summary_pb2  # protocol buffers make their classes when they are imported
    from tensorboardX import summary as summaries

    events = _Events(folder)
    events.add(summaries.text("cross-play", table), steps)
    if gif is not None:
        width, height = (int.from_bytes(gif[at : at + 2], "little") for at in (6, 8))
        image = message.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = message.Summary(value=[message.Summary.Value(tag="real beside imagined", image=image)])
        events.add(summary, steps)
    events.close()


class _Events:
    """One file of TensorBoard events. Written in this thread: tensorboardX's own one never returns from `add_scalar`
    once the disk was full. Raises OSError."""

    def __init__(self, folder: Path, purge: int | None = None):
        # TensorBoard's protocol buffers take a moment to import.
        from tensorboardX.event_file_writer import EventsWriter

        where = folder / EVENTS
        where.mkdir(exist_ok=True)
        # File names tell seconds only, so that a second writer might overwrite the first one's file.
        self._writer = EventsWriter(str(where / "events"), f".{time.time_ns()}")
        self.file = Path(self._writer._file_name)
        self._flushed = -math.inf
        if purge is not None:
            self._write(step=purge, file_version="brain.Event:2")
            self._write(step=purge, session_log={"status": 1})  # START

    def _write(self, **what: Any) -> None:
        from tensorboardX.proto import event_pb2

        message: Any = event_pb2  # protocol buffers make their classes when they are imported
        self._writer.write_event(message.Event(wall_time=time.time(), **what))

    def add(self, summary: Any, steps: int) -> None:
        self._write(step=steps, summary=summary)

    def scalars(self, line: Mapping[str, float], steps: int) -> None:
        from tensorboardX import summary

        for name, value in line.items():
            if name != "steps":
                self.add(summary.scalar(name, value), steps)
        if time.monotonic() - self._flushed > FLUSHED:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _start_wandb(folder: Path, config: Config, mode: Literal["offline", "online"]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb.init(
        project="codream",
        name=folder.name,
        dir=str(folder),
        mode=mode,
        config=json.loads(config.to_json()),
        settings=wandb.Settings(silent=True),
    )


@dataclasses.dataclass(frozen=True)
class _Column:
    title: str
    metric: str
    digits: int


_COLUMNS = (
    _Column("return", "episode/return/{}", 1),
    _Column("value", "agent/{}/value", 1),
    _Column("imagined reward", "agent/{}/imagined_reward", 2),
    _Column("entropy", "agent/{}/entropy", 2),
    _Column("critic loss", "agent/{}/critic_loss", 2),
)


def live_table(means: Mapping[str, float], spec: EnvSpec) -> Table:
    """The latest metrics, one row a side (mean over its agents), and the world model's in the caption."""
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", caption_justify="left")
    table.add_column("side")
    for column in _COLUMNS:
        table.add_column(column.title, justify="right")
    for side, members in spec.sides.items():
        cells = []
        for column in _COLUMNS:
            values = [means.get(column.metric.format(spec.agents[i]), math.nan) for i in members]
            mean = float(np.mean(values))
            cells.append(f"{mean:.{column.digits}f}" if math.isfinite(mean) else "–")
        table.add_row(escape(side), *cells)
    parts = [
        f"{name} {means[f'world_model/{key}']:.3g}"
        for key, name in (("loss", "loss"), ("dyn", "dynamics"), ("reward", "reward"), ("team", "teammates"))
        if f"world_model/{key}" in means
    ]
    if "world_model/team_accuracy" in means:
        parts.append(f"foresees {means['world_model/team_accuracy']:.0%} of the others' actions")
    if parts:
        table.caption = "world model: " + ", ".join(parts)
    return table
