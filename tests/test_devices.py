"""Across devices rounding differs, and nothing else: between instruction sets of a CPU, and between CPU and GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from first_updates import LR, OPTIMISER_STEPS

PROGRAM = Path(__file__).parent / "first_updates.py"
# Without TF32, which rounds to ten bits.
OTHERS = {
    "an older CPU": {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"},
    "cuda": {"JAX_PLATFORMS": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
}


def first_updates(algo: str, out: Path, **settings: str) -> dict[str, np.ndarray]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), algo, str(out)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **settings},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["matwm", "wm_rnd"])
@pytest.mark.parametrize("other", OTHERS)
def test_first_updates_agree_across_devices(algo: str, other: str, tmp_path: Path) -> None:
    """Losses and norms to a thousandth; the agents', which hold imagined rewards, also to 0.05: what a probability is
    off by, 1e-8, times the largest bin, e¹⁵. Parameters to two learning rates a step of the optimiser, since Adam makes
    one of that size of a gradient that is nothing but rounding."""
    if other == "cuda" and shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU")
    here = first_updates(algo, tmp_path / "here.npz")
    there = first_updates(algo, tmp_path / "there.npz", **OTHERS[other])
    assert here.keys() == there.keys()
    furthest = {"metrics": 0.0, "parameters": 0.0}
    for name, value in here.items():
        metric, imagined = name.startswith("metrics"), name.startswith("metrics agent/")
        tolerance = {"rtol": 0, "atol": 2 * LR * OPTIMISER_STEPS}
        if metric:
            tolerance = {"rtol": 1e-3, "atol": 0.05 if imagined else 1e-4}
        np.testing.assert_allclose(there[name], value, err_msg=name, **tolerance)
        away = np.max(
            np.abs(there[name] - value) / (np.abs(value) + 0.1 if metric else LR * OPTIMISER_STEPS), initial=0
        )
        kind = "metrics" if metric else "parameters"
        furthest[kind] = max(furthest[kind], float(away))
    print(f"furthest apart: {furthest}")
    assert furthest["parameters"] > 0  # else it was the same device
