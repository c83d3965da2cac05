"""Which devices there are, which one computes, and with what software."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from codream.runs import device, library_versions

__all__ = ["Device", "Devices", "devices"]


@dataclasses.dataclass(frozen=True)
class Device:
    """One device that JAX can use. Memory in bytes; None where the backend does not tell."""

    number: int
    platform: str
    kind: str
    used: bool
    """Whether codream computes on it."""
    memory: int | None
    in_use: int | None


@dataclasses.dataclass(frozen=True)
class Devices:
    """All devices and versions."""

    devices: tuple[Device, ...]
    versions: dict[str, str]
    message: str
    """In one sentence: where it computes, and why not elsewhere."""

    def __rich__(self) -> Group:
        table = Table(title="Devices", title_justify="left")
        for column in ("", "platform", "kind", "memory", "in use", "computes"):
            table.add_column(column)
        for d in self.devices:
            table.add_row(
                str(d.number), d.platform, escape(d.kind), _gib(d.memory), _gib(d.in_use), "yes" if d.used else "no"
            )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return Group(table, Text(self.message), Text(versions))


def devices() -> Devices:
    """Every accelerator that JAX sees (and the CPU), the one in use, memory, versions of JAX, driver and CUDA."""
    default = jax.devices()[0]
    found = []
    for backend in _backends():
        for d in jax.devices(backend):
            stats = _stats(d)
            found.append(
                Device(
                    number=d.id,
                    platform=d.platform,
                    kind=device() if d.platform == "cpu" else d.device_kind,
                    used=d == default,
                    memory=stats.get("bytes_limit", _ram() if d.platform == "cpu" else None),
                    in_use=stats.get("bytes_in_use", _own_memory() if d.platform == "cpu" else None),
                )
            )
    nvidia = _nvidia()
    known = library_versions()
    versions = {"python": platform.python_version(), "jax": known["jax"], "jaxlib": known["jaxlib"]}
    if nvidia:
        versions["driver"] = nvidia[0][1]
    if default.platform != "cpu":
        versions |= _backend_versions(str(default.client.platform_version))
    return Devices(tuple(found), versions, _message(default.platform, nvidia))


def _backend_versions(text: str) -> dict[str, str]:
    """From what a backend says of itself, e.g. "PJRT C API\\ncuda 13000": CUDA counts 1000 × major + 10 × minor."""
    found = re.search(r"\bcuda (\d+)", text)
    if found is None:
        return {"backend": " ".join(text.split())}
    number = int(found[1])
    return {"cuda": f"{number // 1000}.{number % 1000 // 10}"}


def _message(used: str, nvidia: list[tuple[str, str]]) -> str:
    if used != "cpu":
        return f"codream computes on the first {used} device."
    if nvidia:
        return (
            f"codream falls back to the CPU: there is an NVIDIA GPU ({nvidia[0][0]}), but this JAX cannot use it. "
            'Install the CUDA build: pip install "codream[cuda]", and check that JAX_PLATFORMS is not set to cpu.'
        )
    return "codream computes on the CPU: no accelerator was found. The preset small is made for it."


def _backends() -> list[str]:
    """Platforms that JAX can use here, the default first."""
    found = list(dict.fromkeys(d.platform for d in jax.devices()))
    try:
        jax.devices("cpu")
    except RuntimeError:
        return found
    return list(dict.fromkeys([*found, "cpu"]))


def _stats(d: Any) -> dict[str, int]:
    try:
        return d.memory_stats() or {}
    except (RuntimeError, jax.errors.JaxRuntimeError):
        return {}


def _ram() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _own_memory() -> int | None:
    """What this process holds of the machine's memory; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _nvidia() -> list[tuple[str, str]]:
    """(name, driver version) of every NVIDIA GPU that the driver sees, whether or not JAX can use it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    return [(row[0].strip(), row[1].strip()) for row in rows] if done.returncode == 0 else []


def _gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB"
