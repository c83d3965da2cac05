"""Several seeds as one number: interquartile means and bootstrap intervals (Agarwal et al. 2021, arXiv:2108.13264).

Their library `rliable` computes both where it is installed (`pip install "codream[rliable]"`). It is optional because
its dependency arch < 8 does not import beside pandas 3, and it brings seaborn and statsmodels. Without it the same
measure is computed here; a test compares the two.
"""

from __future__ import annotations

import functools
import importlib.metadata
from types import ModuleType
from typing import Literal

import numpy as np
from jaxtyping import Float

__all__ = ["SAID", "Summary", "interval", "iqm", "source", "summarised"]

Summary = Literal["iqm", "median"]
"""How several runs become one number. `iqm`: interquartile mean, with its 95 % bootstrap interval. `median`: with the
standard deviation over runs, as MATWM's paper reports (of 50 episodes of each of 4 seeds)."""

SAID = {
    "iqm": "interquartile mean over seeds, 95 % bootstrap interval",
    "median": "median over seeds, ± standard deviation over seeds",
}


def summarised(
    scores: Float[np.ndarray, "runs *rest"], summary: Summary = "iqm", *, repeats: int = 2_000
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """The middle, and what lies below and above it: the ends of the interval, or one standard deviation (of one run
    there is neither)."""
    scores = np.asarray(scores, float)
    if summary == "iqm":
        return iqm(scores), *interval(scores, repeats=repeats)
    middle = np.median(scores, axis=0)
    spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros_like(middle)
    return middle, middle - spread, middle + spread


def iqm(scores: Float[np.ndarray, "runs *rest"]) -> Float[np.ndarray, "*rest"]:
    """Interquartile mean over runs: the mean of the middle half (of fewer than four runs, of all)."""
    return _middle(np.asarray(scores, float), axis=0)


def interval(
    scores: Float[np.ndarray, "runs *rest"], *, level: float = 0.95, repeats: int = 2_000, seed: int = 0
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Percentile bootstrap interval of the interquartile mean, runs drawn with replacement. There is one task, so
    rliable's bootstrap, stratified by task, draws the same way.

    Of one run there is no interval: both ends are that run's scores. Raises ValueError without any run.
    """
    scores = np.asarray(scores, float)
    if not len(scores):
        raise ValueError("expected the scores of at least one run, got none")
    library = _rliable()
    if library is not None:
        return _by_rliable(library, scores, level, repeats, seed)
    draws = np.random.default_rng(seed).integers(len(scores), size=(repeats, len(scores)))
    means = _middle(scores[draws], axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def _middle(scores: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    from scipy import stats  # here, as it takes nearly as long to import as all of codream

    return np.asarray(stats.trim_mean(scores, 0.25, axis=axis))


def source() -> str:
    """Who computes the intervals: rliable and its version, or codream."""
    return "codream’s own bootstrap" if _rliable() is None else f"rliable {importlib.metadata.version('rliable')}"


@functools.cache
def _rliable() -> ModuleType | None:
    try:
        from rliable import library  # pyright: ignore[reportMissingImports]
    except (ImportError, TypeError):  # TypeError: arch < 8 beside pandas 3
        return None
    return library


def _by_rliable(
    library: ModuleType, scores: Float[np.ndarray, "runs *rest"], level: float, repeats: int, seed: int
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """The scores as those of one task, with a column for every place of `rest`."""
    columns = scores.reshape(len(scores), 1, -1)
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002 (rliable 1.2 draws from NumPy's global generator, whatever random_state it got)
    try:
        _, found = library.get_interval_estimates(
            {"runs": columns}, lambda drawn: iqm(drawn[:, 0]), reps=repeats, confidence_interval_size=level
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002
    low, high = (end.reshape(scores.shape[1:]) for end in found["runs"])
    return low, high
