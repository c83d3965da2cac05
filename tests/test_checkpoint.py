"""Checkpoints: what is saved comes back, and what was damaged is refused by name."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import copy_until, tiny_config
from jaxtyping import Array

from codream import CheckpointError, EnvSpec, Run, checkpoint
from codream.checkpoint import find, restore, snapshot, while_it_goes_on, write
from codream.retention import prune, saved

SPEC = EnvSpec("two", ("cat_0", "mouse_0"), ((3,), (2,)), (2, 5), has_mask=True)


class Thing(eqx.Module):
    weight: Array
    empty: Array
    flags: Array
    key: Array
    nested: dict[str, tuple[Array, None]]
    act: Callable = eqx.field(static=True)
    name: str = "thing"


def thing(scale: float = 1.0) -> Thing:
    return Thing(
        weight=scale * jnp.arange(6.0).reshape(2, 3),
        empty=jnp.zeros((3, 0), bool),
        flags=jnp.asarray([True, False]),
        key=jax.random.split(jax.random.key(3), 2),
        nested={"a/b": (jnp.asarray(7, jnp.uint8), None)},
        act=jax.nn.silu,
    )


def keep(value: Any, run: Path, steps: int, kept: int = 3) -> Path:
    config, folder = tiny_config(checkpoints_kept=kept), run / "checkpoints"
    path = write(snapshot(value), folder, config=config, spec=SPEC, steps=steps)
    prune(folder, config)
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    keep(thing(), tmp_path, 10)
    found = find(tmp_path)
    assert (found.steps, found.spec, found.config) == (10, SPEC, tiny_config())
    back = restore(eqx.filter_eval_shape(thing, 5.0), found)
    assert eqx.tree_equal(back, thing())
    assert find(tmp_path, np.int64(10)).steps == 10
    with pytest.raises(CheckpointError, match="expected a checkpoint by its step, a whole number, or best; got '10'"):
        find(tmp_path, "10")
    assert jax.random.key_impl(back.key) == jax.random.key_impl(thing().key)


@pytest.mark.parametrize("name", ["proj [2024]", "a\\b", "**", "a b é"])
def test_a_folder_may_have_a_name_that_looks_like_a_pattern(name: str, tmp_path: Path) -> None:
    keep(thing(), tmp_path / name, 10)
    assert eqx.tree_equal(restore(eqx.filter_eval_shape(thing, 5.0), find(tmp_path / name)), thing())
    assert [file.name for file in (tmp_path / name / "checkpoints").iterdir()] == ["10"]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_plain", contextlib.nullcontext)
    with pytest.raises(OSError, match="could not be read again"):
        keep(thing(), tmp_path / "lr[1e-3]", 10)
    assert not saved(tmp_path / "lr[1e-3]" / "checkpoints")


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    for steps in (5, 10, 15, 100):
        keep(thing(steps), tmp_path, steps, kept=2)
    assert list(saved(tmp_path / "checkpoints")) == [15, 100]
    assert find(tmp_path).steps == 100
    np.testing.assert_array_equal(find(tmp_path, 15).arrays()["weight"], thing(15).weight)
    keep(thing(-1), tmp_path, 100)  # again at the same step
    np.testing.assert_array_equal(find(tmp_path).arrays()["weight"], thing(-1).weight)


def test_what_is_kept_for_good_stays_whatever_the_interval_becomes(tmp_path: Path) -> None:
    """Every second of what is due every 10 steps, some of it late; then of what is due every 35; then none."""
    folder = tmp_path / "checkpoints"

    def come(*steps: int, **options: int) -> list[int]:
        for step in steps:
            (folder / str(step)).mkdir(parents=True)
            prune(folder, tiny_config(checkpoints_kept=1, **options))
        return list(saved(folder))

    assert come(10, 20, 30, 43, 50, 61, checkpoint_every=10, checkpoints_nth=2) == [20, 43, 61]
    assert come(96, 131, 166, checkpoint_every=35, checkpoints_nth=2) == [20, 43, 61, 96, 166]
    assert come(170, 180) == [20, 43, 61, 96, 166, 180]


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(thing(), tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", lambda _: 1 / 0)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # as if killed: nothing is tidied up
        with pytest.raises(ZeroDivisionError):
            keep(thing(), tmp_path, 20)
    assert (tmp_path / "checkpoints" / ".writing-20").exists()
    assert find(tmp_path).steps == 10
    keep(thing(), tmp_path, 30)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "30"]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find(tmp_path)
    keep(thing(), tmp_path, 10)
    with pytest.raises(CheckpointError, match="no checkpoint at step 11; it has 10"):
        find(tmp_path, 11)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(largest(path / "arrays")), r"damaged: arrays/.* \(its SHA-256 differs\)"),
        (lambda path: largest(path / "arrays").unlink(), r"damaged: arrays/.* is missing"),
        (lambda path: flip(path / "manifest.json"), r"damaged: manifest\.json"),
        (lambda path: (path / "manifest.json").unlink(), r"damaged: manifest\.json is missing"),
        (
            lambda path: (path / "manifest.json").write_text('{"format"'),
            r"damaged: manifest\.json cannot be read",
        ),
        (lambda path: other_format(path), r"has format 99, but this version of codream reads format 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    keep(thing(), tmp_path, 10)
    damage(keep(thing(), tmp_path, 20))
    with pytest.raises(CheckpointError, match=rf"checkpoint .*/checkpoints/20 (is )?{reason}") as err:
        find(tmp_path)
    assert f"codream train --resume {tmp_path} --checkpoint 10" in str(err.value)
    assert find(tmp_path, 10).steps == 10
    damage(tmp_path / "checkpoints" / "10")
    with pytest.raises(CheckpointError, match="No earlier checkpoint"):
        find(tmp_path)


def other_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def test_arrays_that_do_not_fit_are_named(tmp_path: Path) -> None:
    keep(thing(), tmp_path, 10)
    found = find(tmp_path)
    wide = eqx.tree_at(lambda t: t.weight, thing(), jnp.zeros((2, 4)))
    with pytest.raises(CheckpointError, match=r"weight should be float32\[2, 4\] but is float32\[2, 3\]"):
        restore(wide, found)
    more = eqx.tree_at(
        lambda t: t.nested,
        thing(),
        {"a/b": (jnp.asarray(7, jnp.uint8), jnp.ones(2))},
        is_leaf=lambda x: x is None,
    )
    with pytest.raises(CheckpointError, match=r"nested\['a/b'\]\[1\] is not in the checkpoint"):
        restore(more, found)


def test_a_run_with_a_damaged_checkpoint(host_run: Run, tmp_path: Path) -> None:
    run = copy_until(host_run, 400, tmp_path / "run")
    flip(largest(run.checkpoints / "400" / "arrays"))
    with pytest.raises(CheckpointError, match="--checkpoint 200"):
        find(run.path)
    shutil.rmtree(run.checkpoints / "400")
    assert find(run.path).steps == 200


def test_a_checkpoint_deleted_while_it_is_read(tmp_path: Path) -> None:
    """Training goes on meanwhile: it writes a new checkpoint and deletes the one that was being read."""
    (tmp_path / "100").mkdir()
    tried = []

    def read() -> int:
        latest = max(saved(tmp_path))
        tried.append(latest)
        if latest == 100:
            (tmp_path / "200").mkdir()
            shutil.rmtree(tmp_path / "100")
            raise FileNotFoundError("arrays not found")
        return latest

    assert while_it_goes_on(tmp_path, read) == 200
    assert tried == [100, 200]

    def broken() -> int:
        tried.append(0)
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        while_it_goes_on(tmp_path, broken)
    assert tried[2:] == [0]  # nothing has changed, so it is read once
