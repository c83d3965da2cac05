"""Memory: what was freed goes back to the system (glibc would keep it), and a GPU's is CUDA's to give."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["cuda_gives", "give_back", "give_back_large"]

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


def cuda_gives(devices: Path = Path("/dev")) -> None:
    """On an NVIDIA GPU, memory comes from CUDA's own pool. To be called before JAX computes.

    XLA's allocator gives a program other places for the same temporary numbers from step to step, and a graph of a
    thousand kernels is then told all addresses anew. XLA_PYTHON_CLIENT_ALLOCATOR in the environment comes first.
    """
    if any(devices.glob("nvidia[0-9]*")):
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
