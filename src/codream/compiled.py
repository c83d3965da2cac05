"""Compiled functions of trees, which do not take apart again what they put together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import equinox as eqx
import jax

__all__ = ["Compiled", "quick_jit"]

_APART: dict[int, tuple[weakref.ref, list[Any], Any]] = {}
"""Leaves and structure of the modules that compiled functions gave and somebody still holds, by `id`."""

_LEVEL = "xla_backend_optimization_level"
_QUICK = {_LEVEL: 1, "xla_cpu_use_fusion_emitters": False}


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`eqx.filter_jit` with less care, for what does not learn: the compiler takes two fifths of the time, for the same
    numbers. A level set in XLA_FLAGS stays."""
    compiled = cache(lambda: eqx.filter_jit(function, compiler_options=_options()))  # pyright: ignore[reportCallIssue]
    return lambda *given: compiled()(*given)


@cache
def _options() -> dict[str, Any]:
    """Those that the compiler has: XLA drops some of its options in time (the older emitters in jaxlib 0.11.1)."""
    return {} if _LEVEL in os.environ.get("XLA_FLAGS", "") else {k: v for k, v in _QUICK.items() if _known(k, v)}


def _known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Compiled:
    """`function` of trees of arrays, which gives a tuple of such trees, compiled.

    A runner is some three hundred modules, and `eqx.filter_jit` takes it apart several times a call, to part arrays
    from what is none: some 5 ms of Python, while a GPU has nothing to do. Here the leaves of a module that one of these
    functions gave are remembered as long as the module lives.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], donate: tuple[int, ...] = ()):
        """`donate`: places of the arguments whose buffers are reused for the result."""
        self._function, self._donate = function, donate
        self._programs: list[tuple[list[Any], Any, list[Any]]] = []  # (structures taken, program, structures given)

    def __call__(self, *trees: Any) -> tuple[Any, ...]:
        leaves, structures = zip(*map(_taken_apart, trees), strict=True)
        program, given = self._program(structures)
        return tuple(map(_put_together, program(*leaves), given))

    def _program(self, structures: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        for taken, program, given in self._programs:
            if all(a is b or a == b for a, b in zip(taken, structures, strict=True)):
                return program, given
        given: list[Any] = []

        def of_leaves(*leaves: list[Any]) -> tuple[list[Any], ...]:
            parts = self._function(*map(jax.tree.unflatten, structures, leaves))
            apart, given[:] = zip(*map(jax.tree.flatten, parts), strict=True)
            return apart

        self._programs.append((list(structures), jax.jit(of_leaves, donate_argnums=self._donate), given))
        return self._programs[-1][1:]


def _taken_apart(tree: Any) -> tuple[list[Any], Any]:
    known = _APART.get(id(tree))
    return known[1:] if known is not None and known[0]() is tree else jax.tree.flatten(tree)


def _put_together(leaves: list[Any], structure: Any) -> Any:
    tree = jax.tree.unflatten(structure, leaves)
    if isinstance(tree, eqx.Module):
        key = id(tree)
        _APART[key] = (weakref.ref(tree, lambda _: _APART.pop(key, None)), leaves, structure)
    return tree
