"""Processes that step copies of a PettingZoo environment beside this one.

This file is both ends. Its other end runs as a program of its own that imports neither codream nor JAX, and nothing of
the script that started it: no `if __name__ == "__main__"` is needed, and a notebook's classes will do (`cloudpickle`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codream.envs.copies import Layout, Rows, Source

__all__ = ["Worker", "cores", "packed", "workers_for"]

PER_WORKER = 4
"""Copies that are worth a process."""
MOST = 8
"""Processes that are begun unasked: each takes memory, and not every container says how many cores it may use."""
PATIENCE = 2.0
"""Seconds that a process has to leave."""


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(os.environ.get("PJRT_NPROC") or allowed)))  # JAX's own limit, see `codream.sweeps`


def workers_for(copies: int) -> int:
    """Processes for so many copies, this one among them: one for each 4, up to 8, and no more than there are cores."""
    return max(1, min(cores(), MOST, copies // PER_WORKER))


def packed(source: Source, what: str) -> bytes:
    """`source` as it is sent to other processes. Raises TypeError where it cannot be."""
    import cloudpickle

    try:
        return cloudpickle.dumps(tuple(source))
    except Exception as err:
        raise TypeError(
            f"{what} cannot be sent to another process ({type(err).__name__}: {err}); pass its class or a function "
            "that makes one, or step all copies in this process (env_workers=1)"
        ) from err


class Worker:
    """A process that has some of the copies. `source`: where they come from, as `packed`.

    Every `send` is followed by a `receive`; in between both processes work.
    """

    def __init__(self, source: bytes, layout: Layout, share: slice) -> None:
        start, count = share.start, share.stop - share.start
        self._copies = f"copy {start}" if count == 1 else f"copies {start} to {share.stop - 1}"
        self._name = layout.name
        # -P: this file's folder has modules with the names of libraries.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # an environment that uses JAX leaves the GPU to training
        )
        self.stop = weakref.finalize(self, _stop, self._process)
        self._write(sys.path, source, tuple(layout), start, count)

    def send(self, call: str, *args: Any) -> None:
        """Let it call this method of its `Copies`."""
        self._write(call, *args)

    def receive(self) -> Rows:
        """The answer. Raises CopyFailed: for what its copies raised, and where the process has ended."""
        from codream.envs.copies import CopyFailed, Rows

        _, inbox = _ends(self._process)
        try:
            rows, message, cause, trace = pickle.load(inbox)
        except (EOFError, OSError, pickle.UnpicklingError) as err:
            raise CopyFailed(
                f"{self._name}: the process that steps {self._copies} has ended ({self._status()}); its own messages, "
                "if it had any, are on stderr. Try again with all copies in this process: --env-workers 1"
            ) from err
        if rows is not None:
            return Rows(**rows)
        error = CopyFailed(message)
        if cause is not None:
            cause = pickle.loads(cause)
            cause.add_note(f"In the process that steps {self._copies}:\n{trace}")
        raise error from cause

    def _write(self, *message: Any) -> None:
        outbox, _ = _ends(self._process)
        # One that has ended cannot be written to; `receive` says so.
        with contextlib.suppress(OSError, ValueError):
            pickle.dump(message, outbox, pickle.HIGHEST_PROTOCOL)
            outbox.flush()

    def _status(self) -> str:
        try:
            return f"exit status {self._process.wait(PATIENCE)}"
        except subprocess.TimeoutExpired:
            return "its answer could not be read"


def _ends(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _stop(process: subprocess.Popen[bytes]) -> None:
    """A process leaves when nothing more can come, or its answer is not wanted."""
    for end in _ends(process):
        with contextlib.suppress(OSError):  # the unsent rest of a message to one that has ended
            end.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------ the other end


def _module(name: str) -> Any:
    """A module beside this file, without the package around it, which would import JAX."""
    spec = importlib.util.spec_from_file_location(f"_codream_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _failed(error: BaseException) -> tuple[None, str, bytes | None, str]:
    """What `Worker.receive` raises again."""
    cause = error.__cause__
    trace = "".join(traceback.format_exception(cause or error))
    sent: bytes | None = None
    if cause is not None:
        try:
            sent = pickle.dumps(cause)
            pickle.loads(sent)
        except Exception:  # not every error can be sent
            sent = pickle.dumps(RuntimeError(f"{type(cause).__name__}: {cause}"))
    return None, str(error), sent, trace


def _serve(inbox: IO[bytes], outbox: IO[bytes]) -> None:
    """Make the copies, then answer one call after the other until no more can come."""

    def read() -> Any:
        return pickle.load(inbox)

    def answer(message: Any) -> None:
        pickle.dump(message, outbox, pickle.HIGHEST_PROTOCOL)
        outbox.flush()

    sys.path[:], source, layout, start, count = read()
    copies, spaces = _module("copies"), _module("spaces")
    layout, held, broken = copies.Layout(*layout), None, None
    try:
        envs = copies.Source(*pickle.loads(source)).make(count)
        one = envs[0]
        asked = {a: one.observation_space(a) for a in one.possible_agents}
        encoders = [spaces.Encoder(f"{layout.name}: {a}", space, warns=False) for a, space in asked.items()]
        held = copies.Copies(envs, encoders, layout, start)
    except Exception as err:
        broken = RuntimeError(f"{layout.name}: copy {start} could not be made: {type(err).__name__}: {err}")
        broken.__cause__ = err
    while True:
        try:
            call, *args = read()
        except EOFError:
            break
        if held is None:
            assert broken is not None
            answer(_failed(broken))
            continue
        try:
            rows = getattr(held, call)(*args)
        except Exception as err:
            answer(_failed(err))
        else:
            answer((vars(rows), "", None, ""))
    if held is not None:
        held.close()


def _main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the process that trains is told too, and says when to leave
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what an environment prints must not come between answers
    with contextlib.suppress(BrokenPipeError):
        _serve(inbox, outbox)


if __name__ == "__main__":
    _main()
