"""Observations without a picture of their own: each entry of the vector over an episode, real and imagined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from codream.report.dreams import Dreamed

__all__ = ["MOST_ENTRIES", "curves_of", "drawn", "point"]

MOST_ENTRIES = 12  # of a vector; those that change most
WIDTH, HEIGHT = 220, 96
LEFT, RIGHT, TOP, BOTTOM = 6, 6, 20, 8


def curves_of(real: Shaped[np.ndarray, "steps_1 size"], dreamed: Dreamed, size: int, start: int) -> dict[str, Any]:
    """The entries that change most (of those that do), in the environment's own units: what happened (`real`), one
    dream (`dream`), the range of all dreams (`low`, `high`, from `start` on), and the ends of each entry's axis
    (`span`)."""
    real = np.asarray(real, float)[:, :size]
    order = np.argsort(-real.std(axis=0), kind="stable")[:MOST_ENTRIES]
    kept = np.sort(order[np.ptp(real, axis=0)[order] > 0])
    shown = real[:, kept]
    low, high = shown.min(axis=0), shown.max(axis=0)
    found: dict[str, Any] = {"real": _plain(shown), "dream": None}
    if dreamed.obs is not None:
        dreams = np.asarray(dreamed.obs, float)[:, :, :size][..., kept]
        found |= {
            "dream": _plain(dreams[0]),
            "low": _plain(dreams[:, start:].min(axis=0)),
            "high": _plain(dreams[:, start:].max(axis=0)),
        }
        # A dream that runs away must not make flat what happened.
        room = (high - low) / 2
        low = np.minimum(low, np.maximum(dreams.min(axis=(0, 1)), low - room))
        high = np.maximum(high, np.minimum(dreams.max(axis=(0, 1)), high + room))
    room = 0.06 * (high - low)
    span = np.stack([low - room, high + room], axis=-1)
    return found | {"entries": kept.tolist(), "left_out": size - len(kept), "span": span.tolist()}


def _plain(x: np.ndarray) -> Any:
    """With five digits."""
    return [[float(f"{value:.5g}") for value in row] for row in x.tolist()]


def point(view: Mapping[str, Any], k: int, steps: int, t: float, value: float) -> tuple[float, float]:
    """Where a value of the k-th entry lies at step `t` of `steps`: shares of the width from the left and of the height
    from the top, within 0…1."""
    low, high = view["span"][k]
    return t / max(steps, 1), min(max((high - value) / (high - low), 0.0), 1.0)


def drawn(view: Mapping[str, Any], start: int, steps: int, focal: int) -> str:
    """A small chart for every entry, as SVG that needs no script."""
    charts = (_chart(view, k, start, steps, focal) for k in range(len(view["entries"])))
    return f'<div class="curves">{"".join(charts)}</div>'


def _chart(view: Mapping[str, Any], k: int, start: int, steps: int, focal: int) -> str:
    def place(t: int, value: float) -> str:
        x, y = point(view, k, steps, t, value)
        return f"{LEFT + x * (WIDTH - LEFT - RIGHT):.1f} {TOP + y * (HEIGHT - TOP - BOTTOM):.1f}"

    def path(values: Any, begin: int = 0) -> str:
        return "L".join(place(begin + t, row[k]) for t, row in enumerate(values))

    inner = f'<rect class="cell" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    low, high = (f"{v:.3g}" for v in view["span"][k])
    inner += (
        f'<text x="{LEFT}" y="13">entry {view["entries"][k]}</text>'
        f'<text class="soft" x="{WIDTH - RIGHT}" y="13" text-anchor="end">{low} … {high}</text>'
    )
    if view["dream"] is not None:
        back = "L".join(place(start + t, row[k]) for t, row in reversed(list(enumerate(view["low"]))))
        at = place(start, view["span"][k][1]).split()[0]
        inner += (
            f'<path class="band" style="fill:var(--a{focal})" d="M{path(view["high"], start)}L{back}Z"/>'
            f'<path class="since" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>'
        )
    inner += f'<path class="line" d="M{path(view["real"])}"/>'
    if view["dream"] is not None:
        inner += (
            f'<path class="line imagined" style="stroke:var(--a{focal})" d="M{path(view["dream"][start:], start)}"/>'
        )
    label = f"entry {view['entries'][k]}"
    return f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{inner}</svg>'
