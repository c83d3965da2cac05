"""Who foresees whom, on cases whose answer is known on paper."""

import math

import numpy as np
import pytest

from codream.foresight import foresight


def test_one_who_knows_and_one_who_guesses() -> None:
    rng = np.random.default_rng(0)
    action = rng.integers(0, 4, (50, 20, 2))
    log_probs = np.full((50, 2, 20, 1, 4), math.log(0.25))
    sure = np.full((50, 20, 4), math.log(0.1 / 3))
    np.put_along_axis(sure, action[..., 1:], math.log(0.9), axis=-1)
    log_probs[:, 0, :, 0] = sure  # the first agent gives the second's real action 0.9
    seen = foresight(("a", "b"), log_probs, action, np.ones((50, 20, 2), bool))
    assert seen.accuracy[0][1] == 1.0
    assert seen.accuracy[1][0] == pytest.approx(0.25, abs=0.05)
    assert math.isnan(seen.accuracy[0][0])
    assert seen.log_loss[0][1] == pytest.approx(-math.log(0.9))
    assert seen.log_loss[1][0] == pytest.approx(math.log(4))
    assert seen.calibration_error[0][1] == pytest.approx(0.1, abs=1e-6)  # 0.9 sure, always right
    assert seen.calibration_error[1][0] == pytest.approx(0.0, abs=0.05)
    assert (seen.base_rate[0][1], seen.base_rate[1][0]) == pytest.approx((0.25, 0.25), abs=0.05)
    assert sum(seen.steps) == 2 * 50 * 20


def test_only_steps_on_which_both_act_count() -> None:
    action = np.zeros((1, 4, 2), int)
    acting = np.array([[[True, True], [True, False], [True, True], [False, True]]])
    log_probs = np.log(np.broadcast_to([0.8, 0.2], (1, 2, 4, 1, 2)))
    seen = foresight(("a", "b"), log_probs, action, acting)
    assert sum(seen.steps) == 4
    assert seen.accuracy[0][1] == 1.0
    nobody = foresight(("a", "b"), log_probs, action, np.zeros_like(acting))
    assert math.isnan(nobody.accuracy[0][1])
    assert math.isnan(nobody.base_rate[0][1])


def test_the_base_rate_is_that_of_the_steps_which_are_compared() -> None:
    """While the first is there, the second does always the same."""
    action = np.array([[[0, 1], [0, 1], [0, 0], [0, 0], [0, 2]]])
    acting = np.array([[[True, True], [True, True], [False, True], [False, True], [False, True]]])
    seen = foresight(("a", "b"), np.log(np.full((1, 2, 5, 1, 3), 1 / 3)), action, acting)
    assert seen.base_rate[0][1] == 1.0
