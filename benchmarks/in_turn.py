"""Processes that work only when they are asked, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Asked:
    """A process of its own, which says "ready", and then answers every line with one of JSON."""

    def __init__(self, program: str, python: str, folder: Path, *arguments: str, **environment: str):
        self._process = subprocess.Popen(
            [python, "-c", program, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (line := self._told()) != "ready":
            raise SystemExit(f"expected 'ready' from the process in {folder}, got {line!r}: see its error above")

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self._told())

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _told(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()
