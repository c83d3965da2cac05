"""The tour runs from top to bottom, and is kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "simple_tag.ipynb"


def test_outputs_are_stripped() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


# Jupyter's client warns of its own event loops and sockets.
@pytest.mark.filterwarnings("default")
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    # Unlike elsewhere nets are not tiny: what the compiler saves at level 0 is lost while they learn.
    flags = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The whole takes under three minutes on two quiet cores; a cell may take longer on busy ones.
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    for part in ("What happened", "image/gif", "steps ahead", "trained for 3", "checkpoints at [1"):
        assert part in shown, part
