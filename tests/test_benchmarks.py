"""Every benchmark runs, as little of it as it can do, and writes its table. Not `beside_pytorch.py`, which needs
another's program, not `gpu_kernels.py`, which needs CUDA's compiler, and not `chaos.py` and `fuzz_readers.py`, whose
faults `test_faults.py` and `test_inputs.py` try."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from codream import Run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

TABLES = {
    "attention.py": "--trajectories 4 --repeats 1",
    "compare_commits.py": "HEAD --presets small --rounds 2",
    "env_workers.py": "--copies 4 --workers 2 --steps 2 --rounds 1",
    "model_quality.py": "RUN --episodes 2",
    "prediction_floor.py": "RUN --episodes 2 --redraws 2",
    "projection_gradient.py": "--marks 4000 --lengths 4 --batches 2",
    "sample_efficiency.py": "--seeds 2 --marks 1000 --every 500 --episodes 4 --set agents.starts=8 agents.horizon=3",
    "scaling.py": "--parts context replay --repeats 1",
    "seeds.py": "--presets ippo --seeds 2 --steps 100",
    "social_dilemmas.py": "--games coin_game --variants ippo --seeds 2 --steps 4000 --episodes 4 --results . --plots .",
    "update_time.py": "--preset small --repeats 1",
    "wm_rnd_cost.py": "--parts operations speed --repeats 1 --copies 8 --rollout 8",
}


def run(script: str, arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=1_200)


@pytest.mark.parametrize("script", TABLES)
def test_a_table_is_written(script: str, host_run: Run, tmp_path: Path) -> None:
    done = run(script, f"{TABLES[script]} --out table.md".replace("RUN", str(host_run.path)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|---|" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_soak_is_measured_and_must_be_long_enough_for_its_table(tmp_path: Path) -> None:
    done = run("soak.py", "--driver graph --tiny --minutes 1 --out soak", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "soak" / "soak-graph.csv").read_text(encoding="utf-8").splitlines()) > 1
    done = run("soak.py", "--out soak", tmp_path)
    assert done.returncode == 1
    assert "run it for longer" in done.stderr


PROGRAM = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %one = (f32[4]{0}, s32[]) fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4]{0}) tuple(%one, %x)
}

%each (q: f32[4]) -> f32[4] {
  ROOT %custom-call.2 = f32[4]{0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton"
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %copy-start.1 = (f32[4]{0}, f32[4]{0}, u32[]) copy-start(%a)
  %copy-done.1 = f32[4]{0} copy-done(%copy-start.1)
  %while.1 = (s32[], f32[4]{0}) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  ROOT %call.1 = f32[4]{0} call(%copy-done.1), to_apply=%each
}
"""


def test_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("gpu_kernels")
    assert counted.in_loops(PROGRAM) == [(12, 1)]
    assert counted.total(PROGRAM) == 1 + 12 + 1
