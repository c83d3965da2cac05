"""What one can watch while a run goes on: TensorBoard events, Weights & Biases, and a small table in the terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.table import Table

from codream.config import Config, ConfigError
from codream.envs import EnvSpec

__all__ = ["EVENTS", "Live", "WandbMode", "live_table", "publish"]

EVENTS = "tensorboard"
"""Folder of the event files within a run's."""

WandbMode = Literal["off", "offline", "online"]


class Live:
    """Scalars of one run, to its TensorBoard events and, if asked for, to Weights & Biases.

    Raises ConfigError for a mode that does not exist, ModuleNotFoundError with the command to type where wandb is not
    installed.
    """

    def __init__(self, folder: Path, config: Config, *, begun: int = 0, wandb: WandbMode = "off"):
        self.check(wandb)
        # What a resumed run will write again is dropped from the curves.
        self._events = _writer(folder, purge=begun + 1 if begun else None)
        self._wandb = _start_wandb(folder, config, wandb) if wandb != "off" else None
        self._folder = folder

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
        for name, value in line.items():
            if name != "steps":
                self._events.add_scalar(name, value, steps)
        if self._wandb is not None:
            self._wandb.log(dict(line), step=steps)

    def pictures(self, steps: int, table: str, gif: bytes) -> None:
        """A cross-play table (Markdown) and an episode beside its dream (an animated GIF)."""
        publish(self._folder, steps, table, gif)
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            video = wandb.Video(io.BytesIO(gif), format="gif")
            self._wandb.log(
                {"real beside imagined": video, "cross-play": wandb.Html(f"<pre>{table}</pre>")}, step=steps
            )

    def close(self) -> None:
        """Write out what is still held back."""
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def publish(folder: Path, steps: int, table: str, gif: bytes | None) -> None:
    """Add a cross-play table (Markdown) and an episode beside its dream (an animated GIF) to a run's events."""
    from tensorboardX.proto import summary_pb2

    message: Any = summary_pb2  # protocol buffers make their classes when they are imported
    events = _writer(folder, purge=None)
    events.add_text("cross-play", table, steps)
    if gif is not None:
        width, height = (int.from_bytes(gif[at : at + 2], "little") for at in (6, 8))
        image = message.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = message.Summary(value=[message.Summary.Value(tag="real beside imagined", image=image)])
        events._get_file_writer().add_summary(summary, steps)
    events.close()


def _writer(folder: Path, purge: int | None) -> Any:
    """TensorBoard's protocol buffers take a moment to import."""
    from tensorboardX import SummaryWriter

    # Its file names tell seconds only, so that a second writer might overwrite the first one's file.
    return SummaryWriter(str(folder / EVENTS), purge_step=purge, filename_suffix=f".{time.time_ns()}")


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
        table.add_row(side, *cells)
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
