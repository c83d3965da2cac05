"""Social outcomes of an episode: efficiency, equality, sustainability, cooperation.

Source: Perolat et al. 2017 (arXiv:1707.06600), section 2.3, with equality extended to negative returns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["Outcomes", "Social", "equality"]


def equality(returns: Float[np.ndarray, "*b agents"]) -> Float[np.ndarray, "*b"]:
    """1 − Gini = 1 − Σ_ij |R_i − R_j| / (2 N Σ_i |R_i|), from 0 to 1.

    For returns that are not negative this is the usual measure. The absolute value in the denominator, ours, keeps it
    within 0 … 1 for all others too: returns of −2 and −2 are as equal as 2 and 2. If all are 0 it is 1.
    """
    n = returns.shape[-1]
    apart = np.abs(returns[..., :, None] - returns[..., None, :]).sum(axis=(-2, -1))
    size = 2 * n * np.abs(returns).sum(axis=-1)
    return np.asarray(1.0 - np.divide(apart, size, out=np.zeros(apart.shape), where=size > 0))


@dataclasses.dataclass(frozen=True)
class Social:
    """Means over episodes with their standard errors; None where an environment or an episode defines none."""

    efficiency: tuple[float, float]
    """Sum of all agents' returns."""
    equality: tuple[float, float]
    """1 − Gini of the returns, see `equality`."""
    sustainability: tuple[float, float] | None
    """Mean step (from 0) at which an agent gets a positive reward."""
    cooperation: dict[str, tuple[float, float]] | None
    """Each agent's share of cooperative choices, by name; and `all`, of all choices together."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no NaN, so the standard error of a single episode is None."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(value) for name, value in x.items()}
            return None if x is None else [None if math.isnan(v) else v for v in x]

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def sentence(self) -> str:
        """All of it in one line."""
        shown = [f"efficiency {_shown(self.efficiency)}", f"equality {_shown(self.equality)}"]
        if self.sustainability is not None:
            shown.append(f"sustainability {_shown(self.sustainability)}")
        if self.cooperation is not None:
            shown += [f"cooperation of {name} {_shown(value)}" for name, value in self.cooperation.items()]
        return "Self-play, per episode: " + ", ".join(shown) + "."


def _shown(value: tuple[float, float]) -> str:
    return f"{value[0]:.2f} ± {value[1]:.2f}"


class Outcomes:
    """Collects what happens in each copy, and turns finished episodes into a `Social`."""

    def __init__(self, agents: tuple[str, ...], copies: int):
        self.agents = agents
        shape = (copies, len(agents))
        self._step = np.zeros(copies)
        self._return, self._times, self._paid = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._choices = np.zeros((*shape, 2))
        self._any_choices = False
        self._rows: list[dict[str, np.ndarray]] = []

    def begin(self) -> None:
        """All copies start an episode; unfinished ones do not count."""
        for total in (self._return, self._times, self._paid, self._choices, self._step):
            total[:] = 0

    def step(
        self,
        reward: Float[np.ndarray, "copies agents"],
        fresh: Bool[np.ndarray, " copies"],
        choices: Float[np.ndarray, "copies agents 2"] | None,
    ) -> None:
        """One step of all copies. `fresh`: it was a reset. `choices`: cooperative ones, and all."""
        for total in (self._return, self._times, self._paid, self._choices, self._step):
            total[fresh] = 0
        now = ~fresh
        paid = (reward > 0) & now[:, None]
        self._return += np.where(now[:, None], reward, 0.0)
        self._times += np.where(paid, self._step[:, None], 0.0)
        self._paid += paid
        self._step += now
        if choices is not None:
            self._any_choices = True
            self._choices += np.where(now[:, None, None], choices, 0.0)

    def finish(self, copy: int) -> None:
        """The episode of this copy is over and counts."""
        self._rows.append(
            {
                "return": self._return[copy].copy(),
                "times": self._times[copy].copy(),
                "paid": self._paid[copy].copy(),
                "choices": self._choices[copy].copy(),
            }
        )

    def social(self) -> Social:
        """The outcomes of all finished episodes."""
        columns = {name: np.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        when = np.divide(
            columns["times"], columns["paid"], out=np.full_like(columns["times"], np.nan), where=columns["paid"] > 0
        )
        ever = ~np.isnan(when).all(axis=1)
        times = np.nanmean(when[ever], axis=1)
        cooperation = None
        if self._any_choices:
            made = columns["choices"]
            each = {agent: _ratio(made[:, i]) for i, agent in enumerate(self.agents)}
            shares = {**each, "all": _ratio(made.sum(axis=1))}
            cooperation = {name: x for name, x in shares.items() if x is not None} or None
        return Social(
            efficiency=_mean(columns["return"].sum(axis=1)),
            equality=_mean(equality(columns["return"])),
            sustainability=_mean(times) if len(times) else None,
            cooperation=cooperation,
        )


def _mean(x: Float[np.ndarray, " n"]) -> tuple[float, float]:
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(error)


def _ratio(made: Float[np.ndarray, "n 2"]) -> tuple[float, float] | None:
    """Cooperative over all choices of all episodes, and its standard error (a ratio estimate over episodes)."""
    cooperative, every = made.sum(axis=0)
    if every == 0:
        return None
    share, n = cooperative / every, len(made)
    left = made[:, 0] - share * made[:, 1]
    error = math.sqrt((left**2).sum() / max(n - 1, 1) / n) / (every / n) if n > 1 else math.nan
    return float(share), float(error)
