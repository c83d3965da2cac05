"""Who foresees whom: how well each agent predicts what each other one does next.

Accuracy says how often the most probable action was the one taken, the base rate how often the other's most frequent
action would have been right, and calibration whether "70 %" comes true seven times in ten (Guo et al. 2017,
arXiv:1706.04599).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["CALIBRATION_BINS", "Foresight", "foresight"]

CALIBRATION_BINS = 10


@dataclasses.dataclass(frozen=True)
class Foresight:
    """Tables are [predictor][predicted], NaN on the diagonal and for an agent that never acted."""

    agents: tuple[str, ...]
    accuracy: tuple[tuple[float, ...], ...]
    """Share of steps on which the predictor's most probable action was the one taken."""
    log_loss: tuple[tuple[float, ...], ...]
    """Mean −ln p̂(action taken), in nats; ln(number of actions) is what guessing scores."""
    calibration_error: tuple[tuple[float, ...], ...]
    """Mean distance of confidence and accuracy over bins of confidence, weighted by their steps."""
    base_rate: tuple[tuple[float, ...], ...]
    """Accuracy of always naming the predicted agent's most frequent action, on the same steps."""
    confidence: tuple[float, ...]
    """Mean probability of the most probable action in each bin of confidence, over all pairs; NaN if empty."""
    hit_rate: tuple[float, ...]
    """How often it was the action taken, in the same bins."""
    steps: tuple[int, ...]
    """Predictions in each bin."""


def foresight(
    agents: tuple[str, ...],
    log_probs: Float[np.ndarray, "episodes agents time others actions"],
    action: Int[np.ndarray, "episodes time agents"],
    acting: Bool[np.ndarray, "episodes time agents"],
) -> Foresight:
    """Compare predictions with what was done. `log_probs`: of every focal agent, about the others in order."""
    n = len(agents)
    accuracy, loss, error, base = (np.full((n, n), math.nan) for _ in range(4))
    confidences, hits = [], []
    for i in range(n):
        for place, j in enumerate(k for k in range(n) if k != i):
            counts = acting[..., j] & acting[..., i]
            if not counts.any():
                continue
            predicted = log_probs[:, i, :, place][counts]
            real = action[..., j][counts]
            hit = predicted.argmax(axis=-1) == real
            sure = np.exp(predicted.max(axis=-1))
            accuracy[i, j], base[i, j] = hit.mean(), _most_frequent(real)
            loss[i, j] = -np.take_along_axis(predicted, real[:, None], axis=-1).mean()
            error[i, j] = _calibration_error(sure, hit)
            confidences.append(sure)
            hits.append(hit)
    sure, hit = np.concatenate(confidences or [np.zeros(0)]), np.concatenate(hits or [np.zeros(0, bool)])
    confidence, rate, steps = _bins(sure, hit)
    return Foresight(
        agents=agents,
        accuracy=_rows(accuracy),
        log_loss=_rows(loss),
        calibration_error=_rows(error),
        base_rate=_rows(base),
        confidence=tuple(confidence.tolist()),
        hit_rate=tuple(rate.tolist()),
        steps=tuple(steps.tolist()),
    )


def _bins(
    sure: Float[np.ndarray, " steps"], hit: Bool[np.ndarray, " steps"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Mean confidence, share of hits and number of predictions in each bin of confidence."""
    place = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    steps = np.bincount(place, minlength=CALIBRATION_BINS)
    some = np.where(steps > 0, steps, math.nan)
    sums = [np.bincount(place, weights=x.astype(float), minlength=CALIBRATION_BINS) for x in (sure, hit)]
    return sums[0] / some, sums[1] / some, steps


def _calibration_error(sure: Float[np.ndarray, " steps"], hit: Bool[np.ndarray, " steps"]) -> float:
    confidence, rate, steps = _bins(sure, hit)
    return float(np.nansum(np.abs(confidence - rate) * steps) / steps.sum())


def _most_frequent(actions: Int[np.ndarray, " steps"]) -> float:
    """Share of the most frequent action; NaN of none."""
    return float(np.bincount(actions).max() / len(actions)) if len(actions) else math.nan


def _rows(table: Float[np.ndarray, "a b"]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
