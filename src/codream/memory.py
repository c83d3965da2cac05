"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Return what is free within the process: compiling leaves about half a gigabyte of it, and writing checkpoints
    scatters more over the heaps of several threads. glibc alone keeps it; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
