"""Shared by all tests: JAX on the CPU with compiled programs kept between runs, annotations checked at run time.

Tests run in two processes (`pytest -n 0`: in one), a module's in the same one.
"""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is the compiler's, which then takes about a quarter of it.
# The second flag is none any more from jaxlib 0.11.1 on.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0"]
    + ["--xla_cpu_use_fusion_emitters=false"] * (tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1))
    + [os.environ.get("XLA_FLAGS", "")]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "codream-tests-jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from jaxtyping import install_import_hook

# Every shape in a signature is held to. Before codream is imported for the first time.
install_import_hook("codream", "strict.check")

import jax  # noqa: E402
import pytest  # noqa: E402
from helpers import tiny_config  # noqa: E402

from codream import Run, train, training  # noqa: E402

# Tracing makes millions of objects that stay; looking through them for garbage every 700 new ones takes long.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# A module's tests take turns with more configurations than most users have in one process.
for programs in ("_host_programs", "_graph_programs"):
    setattr(training, programs, lru_cache(maxsize=16)(getattr(training, programs).__wrapped__))

LONG = ("test_examples", "test_readme", "test_training", "test_resume", "test_wm_rnd", "test_probes", "test_cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long begin first, so that at the end no process waits long for the other."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process may have some 65,000; then it crashes. 20,000 are
    some 3 GiB. Until then modules share what they compile."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs for the whole session."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def host_run(runs: Path) -> Run:
    """400 steps of simple_tag (mpe2), with checkpoints at 200 and 400. Tests must not change it."""
    return train(tiny_config(), name="host", root=runs, progress=False)
