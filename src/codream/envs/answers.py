"""Whether an environment answers in the shapes that its spec promises.

An environment of one's own may not: what is too short would be broadcast, and what is of another kind cast, in silence.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from codream.envs import EnvironmentFailure, EnvSpec

__all__ = ["check_answer"]

_NUMBERS, _WHOLE, _FLAGS = "real numbers", "whole numbers within 0…255", "booleans"
_KINDS: dict[str, tuple[Any, ...]] = {
    _NUMBERS: (jnp.floating, jnp.integer, jnp.bool_),
    _WHOLE: (jnp.integer,),
    _FLAGS: (jnp.bool_,),
}


def check_answer(answer: Any, spec: EnvSpec, copies: int, call: str, *, graph: bool = False) -> None:
    """Raise EnvironmentFailure where a field of the TimeStep that `call` (reset or step) gave has another shape than
    the spec and the number of copies say, or another kind of entries.

    `graph`: the environment is inside JAX and answers for one copy; `answer` is that of all, as `jax.vmap` makes it. It
    may be traced: only shapes are looked at.
    """
    agents = ("agents", spec.num_agents)
    pixels = zip(("height", "width", "channels") if spec.is_image else ("entries",), spec.obs_shape, strict=True)
    wanted: dict[str, tuple[list[tuple[str, int]], str]] = {
        "obs": ([agents, *pixels], _WHOLE if spec.is_image else _NUMBERS),
        "mask": ([agents, ("actions", spec.max_actions)], _FLAGS),
        "reward": ([agents], _NUMBERS),
        "terminal": ([agents], _FLAGS),
        "acting": ([agents], _FLAGS),
        "first": ([], _FLAGS),
        "last": ([], _FLAGS),
    }
    for field, (axes, kind) in wanted.items():
        value: Any = getattr(answer, field, None)
        named = axes if graph else [("copies", copies), *axes]
        value = value if hasattr(value, "dtype") else np.asarray(value)
        got, dtype = value.shape[int(graph) :], value.dtype
        right = tuple(size for _, size in named)
        if got != right:
            meaning = f" ({', '.join(name for name, _ in named)})" if named else ", a single value"
            whose = "one copy" if graph else "its copies"
            raise EnvironmentFailure(
                f"{spec.name}: {call} answered for {whose} with `{field}` of shape {got}, expected {right}{meaning}; "
                "make it so, or change the environment's spec"
            )
        if not any(jnp.issubdtype(dtype, one) for one in _KINDS[kind]):
            raise EnvironmentFailure(
                f"{spec.name}: {call} answered with `{field}` of {dtype}, expected {kind}; make it so before it answers"
            )
