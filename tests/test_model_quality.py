"""What measures a world model goes through all sequences in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.compiled import quick_jit
from codream.envs import EnvSpec, TimeStep
from codream.model_quality import PIECE, _in_pieces, opening, sequences_of


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


def test_with_common_reward_recorded_steps_are_paid_as_in_training() -> None:
    """The sum of what all who acted earned, which is what the world model has learned to predict."""
    spec = EnvSpec("toy", ("cat_0", "mouse_0"), ((1,), (1,)), (2, 2), False)
    earned = np.asarray([[0, 0], [1, 2], [4, 8]], np.float32)
    acting = [[True, True], [True, False], [False, False]]  # the mouse is gone before the second action
    blank = jax.tree.map(np.asarray, TimeStep.blank(spec, 1))
    steps = [
        TimeStep(
            obs=blank.obs,
            mask=blank.mask,
            reward=earned[t][None],
            terminal=blank.terminal,
            acting=np.asarray([acting[t]]),
            first=np.asarray([t == 0]),
            last=np.asarray([t == 2]),
        )
        for t in range(3)
    ]
    actions = [np.zeros((1, 2), int)] * 2
    np.testing.assert_array_equal(sequences_of(steps, actions, 2).reward, [[1, 4, 0], [2, 8, 0]])
    np.testing.assert_array_equal(sequences_of(steps, actions, 2, common=True).reward, [[3, 4, 0], [3, 4, 0]])
