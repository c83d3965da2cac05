"""What a training process has to expect from outside: signals that ask it to leave, and environments that hang."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

__all__ = ["LeaveRequests", "Stopped", "TimeLimit"]

DEBOUNCE = 0.25  # seconds in which a second signal is an echo of the first: launchers pass on what the terminal sent
GRACE = 10.0  # seconds that a hung environment has to notice its time limit, before the process leaves


class Stopped(KeyboardInterrupt):
    """Training left because a signal asked it to; `status` is the exit status that says so."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class LeaveRequests:
    """Within this context SIGINT, SIGTERM and SIGHUP set `asked`; a second one ends the process at once.

    At once means even while the compiler runs: a thread reads what the signal handler in C writes to a pipe. Signals
    that the process ignores stay ignored. Outside of the main thread nothing is changed.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.asked: int | None = None
        self._tell = tell
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __enter__(self) -> LeaveRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        if os.name == "nt":  # no such pipes there: a second signal waits for the step, as the first does
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            os.close(self._pipe[1])  # ends the thread, which closes the other end
            self._pipe = None

    def _note(self, number: int, _: Any) -> None:
        self.asked = self.asked or number

    def _watch(self, pipe: int) -> None:
        first: float | None = None
        while received := os.read(pipe, 1):
            number = received[0]
            if number not in self._before:
                continue
            if first is None:
                first = time.monotonic()
                self.asked = self.asked or number
                name = signal.Signals(number).name
                self._tell(f"{name}: saving as soon as a step is done, then leaving. Once more to leave at once.")
            elif time.monotonic() - first > DEBOUNCE:
                os._exit(128 + number)
        os.close(pipe)


class TimeLimit:
    """Raises in the main thread where a call takes longer than `seconds` (0: no limit; other threads have none).

    Code that runs in Python, sleeps or waits for the network is interrupted by a signal. Code that does not come back
    from C cannot be: then, after GRACE seconds more, the whole process says so and leaves with status 1.
    """

    def __init__(self, seconds: float, error: Callable[[str], Exception]):
        self._seconds, self._error = seconds, error
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._what = ""
        self._fired = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        main = threading.current_thread() is threading.main_thread()
        if not self._seconds or not main or not hasattr(signal, "SIGALRM"):
            yield
            return
        before = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL

        def interrupt(number: int, frame: Any) -> None:
            if self._fired:
                raise self._error(f"{what} did not answer within {self._seconds:g} seconds (--env-time-limit)")
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGALRM, interrupt)
        with self._lock:
            self._fired, self._what, self._deadline = False, what, time.monotonic() + self._seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:  # from here on the thread sends no signal
                self._deadline = None
            signal.signal(signal.SIGALRM, before)

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(min(0.5, self._seconds / 4))
            with self._lock:
                idle = idle + 1 if self._deadline is None else 0
                if idle > 100:  # nobody is watched any more; the next call starts another thread
                    self._thread = None
                    return
                late = -1.0 if self._deadline is None else time.monotonic() - self._deadline
                if late >= 0 and not self._fired:
                    self._fired = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            if late > GRACE:
                print(f"codream: {self._what} hangs and cannot be interrupted; leaving", file=sys.stderr, flush=True)
                os._exit(1)
