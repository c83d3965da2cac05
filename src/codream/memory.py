"""Memory that was freed goes back to the system. For glibc, which keeps it otherwise; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

__all__ = ["give_back", "give_back_large"]

LARGE = 2**20
"""Bytes from which a piece of memory is the system's own, and goes back to it when it is freed."""

_M_MMAP_THRESHOLD = -3  # of malloc.h


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return what is free within the process: compiling leaves about half a gigabyte of it."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def give_back_large() -> None:
    """From now on, return large pieces as soon as they are freed.

    By itself glibc raises the size from which it does so up to 32 MiB, whenever a piece of that size is freed; then
    checkpoints and looks at the run scatter theirs among lasting ones, and what the process holds grows for hours.
    MALLOC_MMAP_THRESHOLD_ in the environment comes first.
    """
    option = _of_glibc("mallopt")
    if option is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        option(_M_MMAP_THRESHOLD, LARGE)
