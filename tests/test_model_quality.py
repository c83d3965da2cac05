"""What measures a world model goes through all sequences in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.compiled import quick_jit
from codream.model_quality import PIECE, _in_pieces, opening


def test_short_episodes_are_imagined_after_less_context() -> None:
    assert [opening(8, steps) for steps in (1, 4, 10, 24, 100)] == [2, 2, 3, 8, 8]
    assert opening(1, 10) == 1


@pytest.mark.parametrize("count", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3])
def test_pieces_give_every_row_once_from_one_program(count: int) -> None:
    shapes = []

    def function(rows: jax.Array, given: jax.Array) -> dict[str, jax.Array]:
        shapes.append(rows.shape)  # once a trace
        return {"row": rows, "double": 2 * given[rows]}

    rows = 3 * np.arange(count)
    got = _in_pieces(quick_jit(function), rows, jnp.arange(3 * count))
    np.testing.assert_array_equal(got["row"], rows)
    np.testing.assert_array_equal(got["double"], 2 * rows)
    assert len(shapes) == 1
    assert shapes[0][0] <= PIECE
