"""Compiled functions of trees give what the functions give, and remember the leaves of what they gave."""

import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream import compiled
from codream.compiled import Compiled


class Pair(eqx.Module):
    a: jax.Array
    b: tuple[jax.Array, ...]
    name: str = eqx.field(static=True, default="pair")


def pair(size: int = 2) -> Pair:
    return Pair(jnp.ones(size), (jnp.zeros(()), jnp.arange(3)))


def doubled(given: dict[str, jax.Array], old: Pair) -> tuple[Pair, dict[str, jax.Array]]:
    new = eqx.tree_at(lambda p: (p.a, p.b[0]), old, (2 * old.a, old.b[0] + given["by"]))
    return new, {"sum": jnp.sum(new.a)}


def test_it_gives_what_the_function_gives() -> None:
    program, by = Compiled(doubled), {"by": jnp.ones(())}
    expected, found = doubled(by, pair()), program(by, pair())
    for _ in range(3):
        assert eqx.tree_equal(expected, found)
        expected, found = doubled(by, expected[0]), program(by, found[0])


def test_what_it_gave_is_not_taken_apart_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program, by = Compiled(doubled, donate=(1,)), {"by": jnp.ones(())}
    latest, _ = program(by, pair())
    taken, flatten = [], jax.tree.flatten
    monkeypatch.setattr(jax.tree, "flatten", lambda tree: (taken.append(type(tree)), flatten(tree))[1])
    for _ in range(3):
        latest, metrics = program(by, latest)
    assert taken == [dict] * 3
    np.testing.assert_array_equal(latest.a, [16, 16])
    assert metrics["sum"] == 32


def test_a_changed_module_is_another_one() -> None:
    program, by = Compiled(doubled), {"by": jnp.ones(())}
    given, _ = program(by, pair())
    changed = eqx.tree_at(lambda p: p.a, given, jnp.full(2, 5.0))
    np.testing.assert_array_equal(program(by, changed)[0].a, [10, 10])
    np.testing.assert_array_equal(program(by, given)[0].a, [4, 4])


def test_other_shapes_and_structures_are_compiled_anew() -> None:
    program, by = Compiled(doubled), {"by": jnp.ones(())}
    for start in (pair(), pair(4), Pair(jnp.ones(2), (jnp.zeros(()),), "other"), pair()):
        new, _ = program(by, start)
        assert eqx.tree_equal(new, doubled(by, start)[0])
        assert new.name == start.name


def test_nothing_is_remembered_of_what_is_gone() -> None:
    program, by = Compiled(doubled), {"by": jnp.ones(())}
    gc.collect()
    before = len(compiled._APART)
    kept = [program(by, pair())[0] for _ in range(5)]
    assert len(compiled._APART) == before + 5
    del kept
    gc.collect()
    assert len(compiled._APART) == before


def test_options_that_the_compiler_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_QUICK", {"xla_backend_optimization_level": 1, "xla_cpu_of_next_year": True})
    monkeypatch.setenv("XLA_FLAGS", "")
    compiled._options.cache_clear()
    try:
        assert compiled._options() == {"xla_backend_optimization_level": 1}
        assert compiled.quick_jit(lambda x: x + 1)(1) == 2
        monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
        compiled._options.cache_clear()
        assert compiled._options() == {}
    finally:
        compiled._options.cache_clear()
