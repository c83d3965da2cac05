"""Across devices rounding differs, and nothing else. Needs an accelerator: elsewhere it is skipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from first_updates import LR, UPDATES

PROGRAM = Path(__file__).parent / "first_updates.py"


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("algo", ["matwm", "wm_rnd"])
def test_first_updates_agree_across_devices(algo: str, tmp_path: Path) -> None:
    """Losses and norms to a thousandth; parameters to two learning rates an update, since Adam makes a step of that
    size of a gradient that is nothing but rounding."""
    found = {}
    for platform in ("cpu", "cuda"):
        # Without TF32, which rounds to ten bits.
        env = {**os.environ, "JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        out = tmp_path / f"{platform}.npz"
        done = subprocess.run(
            [sys.executable, str(PROGRAM), algo, str(out)], env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        found[platform] = dict(np.load(out))
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, value in found["cpu"].items():
        tolerance = (
            {"rtol": 1e-3, "atol": 1e-4} if name.startswith("metrics") else {"rtol": 0, "atol": 2 * LR * UPDATES}
        )
        np.testing.assert_allclose(found["cuda"][name], value, err_msg=name, **tolerance)
