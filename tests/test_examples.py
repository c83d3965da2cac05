"""The README's first example runs; so does the tour, from top to bottom, and is kept without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "simple_tag.ipynb"


def compiled_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike elsewhere nets are not tiny: what the compiler saves at level 0 is lost while they learn."""
    flags = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
    monkeypatch.setenv("XLA_FLAGS", flags)


def test_outputs_are_stripped() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


# The longest of all tests, of parts that others try one by one.
@pytest.mark.slow
# Jupyter's client warns of its own event loops and sockets.
@pytest.mark.filterwarnings("default")
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_with_care(monkeypatch)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The whole takes under three minutes on two quiet cores; a cell may take longer on busy ones.
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    for part in ("What happened", "image/gif", "steps ahead", "trained for 3", "checkpoints at [1"):
        assert part in shown, part


TINY = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import codream, helpers
codream.preset = lambda name: helpers.tiny_config()
"""


# As it stands it takes a minute or two; with tiny nets all but their sizes is tried.
@pytest.mark.parametrize(
    "before", [pytest.param("", marks=pytest.mark.slow, id="whole"), pytest.param(TINY, id="tiny")]
)
def test_the_readmes_example_runs(before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not before:
        compiled_with_care(monkeypatch)
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in example.splitlines() if line.strip() and "import" not in line]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", before + example], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(-?[\d.]+, [\d.]+\)\n$", done.stdout)
    run = tmp_path / "runs" / "simple_tag-small-seed0"
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["total_steps"] == 2_000
    assert (run / "metrics.jsonl").exists()
