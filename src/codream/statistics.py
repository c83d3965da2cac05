"""Several seeds as one number: interquartile means and bootstrap intervals.

As recommended by Agarwal et al. 2021 (arXiv:2108.13264) and computed by their library `rliable`. That one needs
arch < 8, whose decorators pandas 3 broke, so it would hold everybody to pandas 2; and it brings seaborn and
statsmodels. A test compares both where it is installed (`pip install "codream[rliable]"`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

__all__ = ["interval", "iqm"]


def iqm(scores: Float[np.ndarray, "runs *rest"]) -> Float[np.ndarray, "*rest"]:
    """Interquartile mean over runs: the mean of the middle half (of fewer than four runs, of all)."""
    return np.asarray(stats.trim_mean(np.asarray(scores, float), 0.25, axis=0))


def interval(
    scores: Float[np.ndarray, "runs *rest"], *, level: float = 0.95, repeats: int = 2_000, seed: int = 0
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Percentile bootstrap interval of the interquartile mean, runs drawn with replacement.

    Of one run there is no interval: both ends are that run's scores. Raises ValueError without any run.
    """
    scores = np.asarray(scores, float)
    if not len(scores):
        raise ValueError("expected the scores of at least one run, got none")
    draws = np.random.default_rng(seed).integers(len(scores), size=(repeats, len(scores)))
    means = np.stack([iqm(scores[draw]) for draw in draws])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
