"""Line charts as plain SVG, complete without scripts; the page's script only adds the values under the pointer.

Colours are CSS variables with a light and a dark value, from the palette of Okabe and Ito (2008), which colour-blind
people can tell apart. Agents of one side share a family and differ in shade and dashes.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["PARTS", "Line", "agent_styles", "chart", "colours", "nice", "palette"]

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 42
MOST_POINTS = 240  # of one line
FEW_POINTS = 15  # that are marked by dots

DASHES = ("", "7 3", "2 3", "9 3 2 3")

# (on light, on dark), by side: warm, cool, green, purple; shades within a side.
FAMILIES = (
    (("#d55e00", "#f08442"), ("#e69f00", "#f2b632"), ("#8f3a00", "#c96f3f"), ("#c98a4b", "#e8c08f")),
    (("#0072b2", "#4fa8e0"), ("#56b4e9", "#9bd5f7"), ("#003f66", "#2f7fb5"), ("#5f8fb0", "#b9d9ee")),
    (("#009e73", "#2fc79b"), ("#5cc3a4", "#96e3cc"), ("#005c43", "#1f9472"), ("#7fae9f", "#c3e8dc")),
    (("#cc79a7", "#e3a0c4"), ("#8e4a72", "#bd7aa1"), ("#e5b5d0", "#f3d5e5"), ("#6b3655", "#a9648c")),
)
PARTS = (
    ("#0072b2", "#4fa8e0"),
    ("#d55e00", "#f08442"),
    ("#009e73", "#2fc79b"),
    ("#cc79a7", "#e3a0c4"),
    ("#e69f00", "#f2b632"),
    ("#56b4e9", "#9bd5f7"),
    ("#5b5b5b", "#b5b5b5"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart; `colour` is a CSS value."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = ""
    faint: Sequence[float] | None = None
    """The same before smoothing, drawn faintly behind."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """With `low`: an interval around the line."""


def agent_styles(sides: Mapping[str, Sequence[int]]) -> dict[int, tuple[str, str]]:
    """Colour (a CSS variable) and dashes of every agent, by its number. Where colours begin again, of a side or of
    sides, the dashes are others."""
    shift = 0 if _alone(sides) else 1  # seven hues and four dashes come together again after 28 by themselves
    return {
        i: (f"var(--a{i})", DASHES[(k + shift * (k // len(FAMILIES[0])) + family // len(FAMILIES)) % len(DASHES)])
        for family, members in enumerate(sides.values())
        for k, i in enumerate(members)
    }


def colours(sides: Mapping[str, Sequence[int]]) -> dict[int, tuple[str, str]]:
    """Of every agent, by its number: its colour on light and on dark."""
    found = {}
    for family, members in enumerate(sides.values()):
        shades = PARTS if _alone(sides) else FAMILIES[family % len(FAMILIES)]
        found |= {i: shades[k % len(shades)] for k, i in enumerate(members)}
    return found


def _alone(sides: Mapping[str, Sequence[int]]) -> bool:
    """One side of several agents, which may use every hue."""
    return len(sides) == 1 and all(len(members) > 1 for members in sides.values())


def palette(sides: Mapping[str, Sequence[int]], which: int) -> str:
    """CSS variables: `--a0` … of the agents, `--p0` … of anything else. `which`: 0 on light, 1 on dark."""
    rules = [f"--a{i}:{pair[which]}" for i, pair in colours(sides).items()]
    rules += [f"--p{k}:{pair[which]}" for k, pair in enumerate(PARTS)]
    return ";".join(rules)


def chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marks: Sequence[tuple[str, float]] = (),
    zero: bool = False,
    identity: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    whole: bool = False,
    legend: bool = False,
    label: str = "",
    empty: str = "Nothing was logged for this yet.",
) -> str:
    """An SVG with axes, units and a legend. `marks`: named horizontal reference lines. `zero`: the axis includes 0.
    `identity`: the diagonal is drawn. `whole`: x counts something, so that its ticks are no fractions. Where `log`
    meets values that are not positive they are left out. `legend`: also for a single line. `empty`: what to say
    without lines."""
    lines = [_thinned(line, log) for line in lines]
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return f'<p class="empty">{html.escape(empty)}</p>'
    x0, x1 = x_range or _span([line.x for line in lines])
    if x0 == x1 > 0:  # a single point stands at the end of what led there
        x0 = 0.0
    every = [v for line in lines for v in (line.y, line.faint, line.low, line.high) if v is not None]
    y0, y1 = y_range or _span([*every, [y for _, y in marks], [0.0] if zero and not log else []])
    y0, y1, ticks = _axis(y0, y1, log, exact=y_range is not None)
    to_x = lambda v: LEFT + (v - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    scaled = (lambda v: math.log10(v)) if log else (lambda v: v)
    low, high = scaled(y0), scaled(y1)
    to_y = lambda v: HEIGHT - BOTTOM - (scaled(v) - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)  # noqa: E731

    parts = [_frame(ticks, nice(x0, x1, 5, whole=whole), to_x, to_y, x_label, y_label)]
    if identity:
        parts.append(f'<path class="mark" d="M{to_x(x0):.1f} {to_y(x0):.1f}L{to_x(x1):.1f} {to_y(x1):.1f}"/>')
    for name, y in marks:
        if y0 <= y <= y1:
            parts.append(
                f'<path class="mark" d="M{LEFT} {to_y(y):.1f}H{WIDTH - RIGHT}"/>'
                f'<text class="note" x="{WIDTH - RIGHT}" y="{to_y(y) - 4:.1f}" '
                f'text-anchor="end">{html.escape(name)}</text>'
            )
    for line in lines:
        parts.append(_drawn(line, to_x, to_y))
    shown = {
        "x": [x0, x1],
        "y": [low, high],
        "log": log,
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "x_label": x_label,
        "lines": [
            {"name": ln.name, "colour": ln.colour, "x": [_short(v) for v in ln.x], "y": [_short(v) for v in ln.y]}
            for ln in lines
        ],
    }
    data = html.escape(json.dumps(shown, separators=(",", ":")))
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label or y_label)}" '
        f'tabindex="0" data-chart="{data}">{"".join(parts)}</svg>'
    )
    return svg + (_legend(lines) if legend or len(lines) > 1 or lines[0].faint is not None else "")


def _legend(lines: Sequence[Line]) -> str:
    entries = "".join(
        f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path d="M1 4H25" style="stroke:{line.colour}" '
        f'stroke-dasharray="{line.dash}"/></svg>{html.escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{entries}</ul>'


def _drawn(line: Line, to_x, to_y) -> str:  # type: ignore[no-untyped-def]
    def path(values: Sequence[float]) -> str:
        points = (f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in zip(line.x, values, strict=True))
        return "M" + "L".join(points)

    out = ""
    if line.low is not None and line.high is not None:
        back = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in zip(line.x[::-1], line.low[::-1], strict=True))
        out += f'<path class="band" style="fill:{line.colour}" d="{path(line.high)}L{back}Z"/>'
    if line.faint is not None:
        out += f'<path class="faint" style="stroke:{line.colour}" d="{path(line.faint)}"/>'
    if len(line.x) == 1:
        return out + f'<circle r="3" cx="{to_x(line.x[0]):.1f}" cy="{to_y(line.y[0]):.1f}" style="fill:{line.colour}"/>'
    if len(line.x) <= FEW_POINTS:
        for x, y in zip(line.x, line.y, strict=True):
            out += f'<circle r="2.5" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" style="fill:{line.colour}"/>'
    return out + f'<path class="line" style="stroke:{line.colour}" stroke-dasharray="{line.dash}" d="{path(line.y)}"/>'


def _frame(y_ticks, x_ticks, to_x, to_y, x_label: str, y_label: str) -> str:  # type: ignore[no-untyped-def]
    parts = []
    for y, shown in zip(y_ticks, _numbers(y_ticks), strict=True):
        parts.append(
            f'<path class="grid" d="M{LEFT} {to_y(y):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{to_y(y) + 4:.1f}" text-anchor="end">{shown}</text>'
        )
    for x, shown in zip(x_ticks, _numbers(x_ticks), strict=True):
        anchor = "end" if to_x(x) > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{to_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{shown}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" '
        f'text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="label" transform="translate(12 {middle}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return "".join(parts)


def _thinned(line: Line, log: bool) -> Line:
    """At most MOST_POINTS means of neighbours; without what is not finite (or, on a log axis, not positive)."""
    columns = {
        name: np.asarray(values, float)
        for name, values in (
            ("x", line.x),
            ("y", line.y),
            ("faint", line.faint),
            ("low", line.low),
            ("high", line.high),
        )
        if values is not None
    }
    good = np.ones(len(line.x), bool)
    for name, values in columns.items():
        good &= np.isfinite(values) & ((values > 0) | (not log) | (name == "x"))
    columns = {name: values[good] for name, values in columns.items()}
    if len(columns["x"]) > MOST_POINTS:
        pieces = np.array_split(np.arange(len(columns["x"])), MOST_POINTS)
        columns = {name: np.array([values[p].mean() for p in pieces]) for name, values in columns.items()}
    return dataclasses.replace(line, **{name: values.tolist() for name, values in columns.items()})


def _span(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [v for group in groups for v in group]
    return min(values), max(values)


def _axis(low: float, high: float, log: bool, *, exact: bool) -> tuple[float, float, list[float]]:
    """Ends and ticks; a constant gets some room around it."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        every = max(1, math.ceil((last - first) / 6))
        return 10.0**first, 10.0**last, [10.0**k for k in range(first, last + 1, every)]
    if exact:
        return low, high, nice(low, high, 5)
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5)
    room = 0.05 * (high - low)
    low, high = (low if low == 0 else low - room), high + room
    return low, high, nice(low, high, 5)


def nice(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`. `whole`: none of them is a fraction."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if raw <= m * unit * (1 + 1e-9))
    step = max(math.ceil(step), 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    found = []
    while first * step <= high + 1e-9 * step:
        found.append(round(first * step, 12))
        first += 1
    return found


def _numbers(ticks: Sequence[float]) -> list[str]:
    """Short, with as many digits as tell one tick from the next: 12,000 as 12k, 0.0001 as 1e-4."""
    step = min((b - a for a, b in itertools.pairwise(sorted(ticks))), default=0) or 1.0
    exact = lambda digits: all(abs(float(f"{tick:.{digits}g}") - tick) <= 0.01 * step for tick in ticks)  # noqa: E731
    digits = next(filter(exact, range(1, 15)), 15)
    return [_number(tick, digits) for tick in ticks]


def _number(value: float, digits: int) -> str:
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for least, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.{max(digits, 6)}g}{letter}"
    return f"{value:,.{max(digits, 6)}g}"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
