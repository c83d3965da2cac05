"""Checkpoints of earlier formats, stored beside these tests: they are read, or refused by name; and nothing is run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Toy, assert_same

from codream import CheckpointError, Run, checkpoint, make_env
from codream.checkpoint import FORMAT, CheckpointDamaged, find, latest_good, restore
from codream.manifest import read_manifest
from codream.training import driver_for

STORED = Path(__file__).parent / "data"

_events: list[str] = []
_listening = [False]
sys.addaudithook(lambda event, _: _events.append(event) if _listening[0] else None)  # for good: it cannot be taken back


def template(run: Run) -> Any:
    """What the code of today makes of a run's configuration."""
    env = make_env(Toy, num_envs=run.config.num_envs)
    return driver_for(env, run.config).template()


def test_format_1_is_restored() -> None:
    run = Run(STORED / "format_1" / "matwm")
    assert json.loads((run.checkpoints / "84" / "manifest.json").read_text())["format"] == 1
    found = find(run.path)
    assert (found.manifest.format, found.manifest.rollbacks, found.manifest.score) == (FORMAT, 0, {})
    _listening[0] = True
    try:
        runner = restore(template(run), found)
    finally:
        _listening[0] = False
    # Nothing was unpickled on the way. (Python tells audit hooks of every class that a pickle asks for.)
    assert "open" in _events
    assert "pickle.find_class" not in _events
    assert int(runner.state.steps) == 84
    assert_same(checkpoint.snapshot(runner).arrays, found.arrays())


def test_a_state_that_cannot_be_carried_over_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"has format 1, .*self-projection .*had no critic.*projection\.gradient"):
        find(STORED / "format_1" / "wm_rnd")


def copy_of_stored(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED / "format_1" / "matwm", tmp_path / "run"))


def test_a_later_format_is_not_passed_over(tmp_path: Path) -> None:
    """Going on from an older checkpoint instead would lose what a newer codream has learned."""
    path = copy_of_stored(tmp_path)
    shutil.copytree(path / "checkpoints" / "84", path / "checkpoints" / "96")
    manifest = path / "checkpoints" / "96" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99, but this version of codream reads format \d and"):
        latest_good(path, print)
    manifest.write_text("{}")
    told: list[str] = []
    assert latest_good(path, told.append).steps == 84
    assert "checkpoints/96 is damaged" in told[0]
    (path / "checkpoints" / "84" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged"):
        latest_good(path, told.append)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../../etc/passwd": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"files": 3},
        {"spec": {"name": "x", "agents": [], "obs_shapes": [], "num_actions": []}},
        {"spec": None},
        {"config": []},
        {"config": {"no_such_option": 1}},
        {"config": {"num_envs": "many"}},
        {"steps": "7"},
        {"arrays": [1, 2]},
        {"extra": 1},
    ],
)
def test_a_manifest_that_somebody_wrote_is_read_with_care(change: dict[str, Any], tmp_path: Path) -> None:
    """With a checksum that is right, as anybody can compute it."""
    from codream.manifest import _own_digest

    path = copy_of_stored(tmp_path) / "checkpoints" / "84"
    values = json.loads((path / "manifest.json").read_text()) | change
    del values["sha256"]
    (path / "manifest.json").write_text(json.dumps(values | {"sha256": _own_digest(values)}))
    with pytest.raises(CheckpointDamaged, match=r"checkpoints/84 is damaged"):
        read_manifest(path)
