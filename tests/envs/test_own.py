"""Environments of one's own, by the place where Python finds them."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from helpers import tiny_config
from toys import FaultyToy, Toy

from codream import Config, ConfigError, make_env
from codream.building import build_beside, build_env
from codream.envs import EnvironmentFailure, HostEnv, UnknownEnvironment
from codream.envs.own import maker, place_of, raised_at


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine_to_find.py").write_text(
        "class Arena:\n    class Small: pass\n\ndef small(size=3): return Arena()\n\n"
        "shorter = lambda: Arena()\none = Arena()\n"
    )
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("mine_to_find", None)


def test_a_place_is_found_from_the_current_folder_and_found_again(folder: Path) -> None:
    for place in ("mine_to_find:Arena", "mine_to_find:small", "mine_to_find:Arena.Small"):
        found = maker(place)
        assert found.__name__ == place.rpartition(":")[2].rpartition(".")[2]
        assert place_of(found) == place
    assert sys.path.count(str(folder)) == 1
    assert place_of(Toy) == "toys:Toy"
    for place in ("mine_to_find:shorter", "mine_to_find:one", "mine_to_find:Arena"):  # as it was typed
        assert place_of(maker(place)) == place


def test_what_cannot_be_found_again_has_no_place(folder: Path) -> None:
    class Inside(Toy):
        pass

    for env in (Inside, Toy(), lambda: Toy(), None):
        assert place_of(env) is None
    script = type("Script", (), {"__module__": "__main__"})
    assert place_of(script) is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine_to_find", r"expected MODULE:NAME, e\.g\. my_envs:Meeting .*got 'mine_to_find'"),
        ("mine_to_find.py:Arena", r"expected MODULE:NAME"),
        (":Arena", r"expected MODULE:NAME"),
        ("mine_to_fin:Arena", r"finds no module mine_to_fin; it looks in /"),
        ("mine_to_find.deeper:Arena", r"finds no module mine_to_find\.deeper"),
        ("mine_to_find:Arenas", r"mine_to_find\.py has no Arenas; the nearest: Arena"),
        ("mine_to_find:Arena.Large", r"has no Arena\.Large"),
    ],
)
def test_places_that_are_none(place: str, message: str, folder: Path) -> None:
    with pytest.raises(UnknownEnvironment, match=message):
        maker(place)


def test_what_the_module_itself_raises_passes(folder: Path) -> None:
    (folder / "mine_that_lacks.py").write_text("import a_package_that_nobody_has")
    (folder / "mine_that_fails.py").write_text("1 / 0")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        maker("mine_that_lacks:Arena")
    with pytest.raises(ZeroDivisionError):
        maker("mine_that_fails:Arena")


class Counted(Toy):
    """Notes which of them were closed."""

    closed: ClassVar[list[Toy]] = []

    def close(self) -> None:
        self.closed.append(self)


def test_only_what_was_made_is_closed() -> None:
    Counted.closed.clear()
    given, ready = Counted(), make_env(Counted, 2)
    for env, made in ((Counted, 2), (lambda: Counted(), 2), (given, 1), (ready, 0)):
        for build in (build_env, build_beside):
            Counted.closed.clear()
            build(Config(), 2, env).close()  # type: ignore[union-attr]
            assert len(Counted.closed) == made, env
            assert given not in Counted.closed
    ready.close()  # type: ignore[union-attr]
    assert len(Counted.closed) == 2


def test_where_an_error_of_ones_own_code_began(folder: Path) -> None:
    (folder / "mine_that_lacks.py").write_text("\nimport a_package_that_nobody_has\n")
    with pytest.raises(ModuleNotFoundError) as lacks:
        maker("mine_that_lacks:Arena")
    place = f"{folder / 'mine_that_lacks.py'}:2, in <module>: import a_package_that_nobody_has"
    assert (raised_at(lacks.value) or "").endswith(place)
    for workers in (1, 2):  # here, and in another process
        env = make_env(FaultyToy, 2, env_workers=workers)
        assert isinstance(env, HostEnv)
        seeds = np.zeros(2, int)
        env.reset(seeds)
        env.step(np.zeros((2, 2), int), seeds)
        env._copies.envs[0].fault = "" if workers == 2 else "step"  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(EnvironmentFailure) as failed:
            env.step(np.zeros((2, 2), int), seeds)
        place = raised_at(failed.value) or ""
        assert "toys.py:" in place
        assert place.endswith('in step: raise ZeroDivisionError("the engine stalled")')
        env.close()
    with pytest.raises(ConfigError) as built:
        build_env(tiny_config(), 1, Refusing)
    assert "the environment test_own:Refusing cannot be used: no display" in str(built.value)
    assert (raised_at(built.value) or "").endswith('in __init__: raise ValueError("no display")')


def test_what_codream_refuses_was_raised_nowhere_else() -> None:
    for env, wanted in ((Toy, {"sizes": 3}), (np, {})):
        with pytest.raises(ConfigError) as refused:
            build_env(tiny_config(env_kwargs=wanted), 1, env)
        assert raised_at(refused.value) is None


class Refusing(Toy):
    def __init__(self) -> None:
        raise ValueError("no display")
