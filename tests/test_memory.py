"""What was freed goes back to the system, with glibc."""

import ctypes
import os
import subprocess
import sys

import pytest

from codream import memory
from codream.memory import LARGE, cuda_gives, give_back

PROGRAM = """
import ctypes, runpy, sys

memory = runpy.run_path(sys.argv[2])  # alone: importing codream takes seconds
LARGE = memory["LARGE"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]})
libc.mallinfo2.restype = info
if sys.argv[1] == "ours":
    memory["give_back_large"]()
libc.free(libc.malloc(16 * LARGE))  # after which glibc keeps pieces of that size
before = libc.mallinfo2().hblks
libc.malloc(4 * LARGE)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
def test_a_large_piece_is_the_systems_own() -> None:
    def mapped(whose: str, **env: str) -> int:
        command = [sys.executable, "-c", PROGRAM, whose, str(memory.__file__)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
        return int(done.stdout)

    assert mapped("glibc's") == 0
    assert mapped("ours") == 1
    assert mapped("ours", MALLOC_MMAP_THRESHOLD_=str(16 * LARGE)) == 0  # the user's word


def test_giving_back_is_always_allowed() -> None:
    give_back()
    give_back()


def test_cuda_gives_memory_where_it_is_and_nothing_else_was_asked_for(monkeypatch, tmp_path):
    name = "XLA_PYTHON_CLIENT_ALLOCATOR"
    monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.delenv(name)
    (tmp_path / "nvidiactl").touch()
    cuda_gives(tmp_path)
    assert name not in os.environ
    (tmp_path / "nvidia0").touch()
    cuda_gives(tmp_path)
    assert os.environ[name] == "cuda_async"
    monkeypatch.setenv(name, "platform")
    cuda_gives(tmp_path)
    assert os.environ[name] == "platform"
