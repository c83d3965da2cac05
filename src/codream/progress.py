"""What a person sees while something runs: a live bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar", "clock", "to_stderr"]

_PLAIN_SECONDS = 10.0  # between two plain lines
_LIVE_SECONDS = 0.25  # between two updates of the live bar


class _Progress(Progress):
    """A progress bar with something below it."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class Bar:
    """A progress bar from `start` to `total`, with a note beside it.

    On a terminal: bar, steps per second, elapsed and remaining time. Otherwise a plain line every ten
    seconds. `overall`: the speed since the beginning instead of that of late.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, unit: str = "steps", show: bool = True, overall: bool = False
    ):
        self.console = Console(stderr=False)
        self._title, self._total, self._start, self._unit, self._show = title, total, start, unit, show
        self._overall = overall
        self._note = ""
        self._began = self._shown = time.monotonic()
        self._recent = (self._began, start)
        self._speed = 0.0
        self._live: _Progress | None = None
        self._task = TaskID(0)
        if show and self.console.is_terminal:
            self._live = _Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                refresh_per_second=4,
                speed_estimate_period=60,
            )
            self._task = self._live.add_task(title, total=total, completed=start, speed="", note="")

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._show:
            (self._live.console if self._live else self.console).print(
                text, markup=False, highlight=False, soft_wrap=True
            )

    def warn(self, text: str) -> None:
        """A line that must be seen: without a bar it goes to the standard error."""
        if self._show:
            self.say(text)
        else:
            to_stderr(text)

    def note(self, text: str) -> None:
        """Replace what stands beside the bar."""
        self._note = text

    def below(self, table: RenderableType) -> None:
        """Replace what stands below the bar; nothing on plain lines, which have the note."""
        if self._live:
            self._live.below = table

    def restart_clock(self, done: int) -> None:
        """Forget the time so far: what took it (compiling) will not happen again."""
        self._began = self._shown = time.monotonic()
        self._recent = (self._began, done)

    def update(self, done: int, *, last: bool = False) -> None:
        """Tell how far it is. Cheap: it shows something only a few times a second."""
        if not self._show:
            return
        now = time.monotonic()
        if now - self._shown < (_LIVE_SECONDS if self._live else _PLAIN_SECONDS) and not last:
            return
        self._shown = now
        then, before = self._recent
        if now - then > 5 or not self._speed:
            self._speed = (done - before) / max(now - then, 1e-9)
            self._recent = (then, before) if self._overall else (now, done)
        speed = f"{self._speed:,.{0 if self._speed >= 10 else 2}f} {self._unit}/s"
        if self._live:
            self._live.update(self._task, completed=min(done, self._total), speed=speed, note=self._note)
            return
        left = f", {clock(max(self._total - done, 0) / self._speed)} left" if self._speed else ""
        self.say(
            f"{self._title}: {done:,}/{self._total:,} {self._unit}, {speed}, "
            f"{clock(now - self._began)} elapsed{left}" + (f", {self._note}" if self._note else "")
        )


def to_stderr(text: str) -> None:
    """A line for whoever started the program."""
    print(f"codream: {text}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, e.g. `9:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
