"""What is written to a run's folder while it trains: checkpoints, in the background, and lines of metrics.

A disk that is full or a folder that is gone must not end a run: what could not be written is kept in memory and tried
again, and the user is told.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from codream import checkpoint as checkpoints
from codream import retention
from codream.checkpoint import CheckpointError
from codream.config import Config
from codream.envs import EnvSpec
from codream.memory import give_back
from codream.runs import Run

__all__ = ["MetricsFile", "Saver"]


class MetricsFile:
    """Appends lines to metrics.jsonl. A line that cannot be written waits for the next one."""

    def __init__(self, path: Path, tell: Callable[[str], None]):
        self._path, self._tell = path, tell
        self._waiting: list[str] = []
        self._told = False

    def add(self, line: Mapping[str, float]) -> None:
        self._waiting.append(json.dumps(line) + "\n")
        self.flush()

    def flush(self) -> bool:
        """Try to write all that waits, and say whether nothing waits any more."""
        if not self._waiting:
            return True
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    data = "".join(self._waiting).encode()
                    while data:  # a disk that is nearly full takes a part
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(size)  # no half lines
                    raise
        except OSError as err:
            if not self._told:
                self._tell(f"metrics cannot be written ({err}); training goes on, and they are tried again")
            self._told = True
            return False
        self._waiting, self._told = [], False
        return True

    def rewind(self, steps: int) -> None:
        """Lines of later steps wait no longer."""
        self._waiting = [line for line in self._waiting if json.loads(line)["steps"] <= steps]

    def sync(self) -> None:
        """See to it that what was written survives a crash of the machine."""
        if self._path.exists():
            with self._path.open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())


class Saver:
    """Writes checkpoints of a run, one at a time and in the background: training waits only while the arrays are
    copied to the host, or where it is so far ahead that the checkpoint before is still being written.

    `score`: what `config.checkpoints_best` chooses by, from the runner's state and steps.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        spec: EnvSpec,
        metrics: MetricsFile,
        tell: Callable[[str], None],
        score: Callable[[Any, int], float] | None = None,
    ):
        self._run, self._config, self._spec, self._metrics = run, config, spec, metrics
        self._tell, self._score = tell, score
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._undeleted: OSError | None = None
        self._steps = -1  # of the latest one that was begun
        self._written = -1  # of the latest one that was written
        self.measured: dict[str, float] = {}  # to be logged

    def save(self, runner: Any, steps: int, rollbacks: int) -> None:
        """Begin to write a checkpoint."""
        began = time.monotonic()
        self.wait()
        extra: dict[str, Any] = {"rollbacks": rollbacks}
        if self._score is not None:
            try:
                self.measured["checkpoint/score"] = self._score(runner.state, steps)
                extra["score"] = {self._config.checkpoints_best: self.measured["checkpoint/score"]}
            except Exception as err:  # the checkpoint matters more
                self._tell(
                    f"the checkpoint of step {steps} has no score, as nothing could be played ({type(err).__name__}: "
                    f"{err})"
                )
        arrays = checkpoints.snapshot(runner)
        self._steps = steps
        self._thread = threading.Thread(target=self._write, args=(arrays, steps, extra))
        self._thread.start()
        self.measured["checkpoint/stall_seconds"] = round(time.monotonic() - began, 4)

    def _write(self, arrays: Any, steps: int, extra: dict[str, Any]) -> None:
        began = time.monotonic()
        config = self._config
        try:
            self._metrics.sync()
            checkpoints.write(arrays, self._run.checkpoints, config=config, spec=self._spec, steps=steps, **extra)
            self._written = steps
            self.measured["checkpoint/write_seconds"] = round(time.monotonic() - began, 4)
            give_back()
        except Exception as err:  # kept for the training thread
            self._error = err
            return
        try:
            retention.prune(self._run.checkpoints, config)
        except OSError as err:
            self._undeleted = err

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; say whether it was, and tell why not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._undeleted is not None:
            self._tell(f"a checkpoint that is no longer kept could not be deleted ({self._undeleted}); left alone")
            self._undeleted = None
        if self._error is None:
            return True
        self._tell(
            f"the checkpoint of step {self._steps} could not be written ({self._error}); training goes on, and the "
            "next one is tried as usual"
        )
        self._error = None
        return False

    def finish(self, steps: int) -> None:
        """Wait for the last checkpoint, of `steps`. CheckpointError where it, or metrics, could not be written."""
        self.wait()
        wrote = self._written == steps
        if not (self._metrics.flush() and wrote):
            what = "the last lines of metrics.jsonl" if wrote else f"the last checkpoint, of step {steps},"
            every = retention.saved(self._run.checkpoints)
            raise CheckpointError(
                f"training is done, but {what} could not be written. Make room, and go on from "
                + (f"step {max(every)}" if every else "the start")
                + f" with\n  {self._run.to_resume()}"
            )
