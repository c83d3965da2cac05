"""A few frames of an episode and its dream as a still picture: for print, and where scripts are off."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from codream.report.curves import drawn

__all__ = ["extent", "storyboard"]

FRAMES = 6
SIZE = 130
DREAMT = 1.5  # how far out a dream may widen the picture


def storyboard(scene: Mapping[str, Any], focal: int, agents: Sequence[str]) -> str:
    """Dream and reality of one focal agent over one another, at evenly spaced steps from the start of the dream on."""
    steps, start = scene["steps"], scene["start"]
    shown = sorted({round(start + k * (steps - start) / (FRAMES - 1)) for k in range(FRAMES)})
    view = scene["views"][focal]
    if scene["kind"] == "curves":
        return _curves(scene, view, focal, agents)
    if scene["kind"] == "plane":
        low, high = extent(scene)
        draw = lambda t: _plane(scene, view, t, low, high)  # noqa: E731
    elif scene["kind"] == "image":
        draw = lambda t: _images(view, t, steps + 1)  # noqa: E731
    else:
        draw = lambda t: _boards(view, t)  # noqa: E731
    figures = "".join(
        f"<figure>{draw(t)}<figcaption>step {t}{' (start)' if t == start else ''}</figcaption></figure>" for t in shown
    )
    if view["dream"] is None:
        return (
            f'<div class="storyboard"><p>{html.escape(scene["label"]).capitalize()}, as '
            f'<b>{html.escape(agents[focal])}</b> saw it.</p><div class="frames">{figures}</div></div>'
        )
    how = {
        "plane": "filled: what happened; dashed outline: what was imagined; thin lines join the two",
        "grid": "above: what happened; below: what was imagined, the paler the less sure",
        "image": "above: what happened; below: what was imagined",
    }[scene["kind"]]
    return (
        f'<div class="storyboard"><p>{html.escape(scene["label"]).capitalize()}, as '
        f"<b>{html.escape(agents[focal])}</b> "
        f'imagined it from step {start} on ({how}).</p><div class="frames">{figures}</div></div>'
    )


def _curves(scene: Mapping[str, Any], view: Mapping[str, Any], focal: int, agents: Sequence[str]) -> str:
    """All steps at once."""
    who = f"<b>{html.escape(agents[focal])}</b>"
    told = (
        f"as {who} imagined it from step {scene['start']} on (the vertical line): black: what happened; dashed: one "
        "dream; shaded: the range of eight."
        if view["dream"] is not None
        else f"as {who} saw it."
    )
    return (
        f'<div class="storyboard"><p>{html.escape(scene["label"]).capitalize()}, {told}</p>'
        f"{drawn(view, scene['start'], scene['steps'], focal)}</div>"
    )


def extent(scene: Mapping[str, Any]) -> tuple[float, float]:
    """Ends of the square that holds everything real, with some room; at least the arena from −1 to 1. What was imagined
    may widen it a little, but a dream that runs away must not make all else small."""
    values = [abs(v) for view in scene["views"] for frame in view["real"] for pair in frame for v in pair]
    dreamt = (abs(v) for view in scene["views"] for frame in view["dream"] or () for pair in frame for v in pair)
    values += (min(v, DREAMT) for v in dreamt)
    half = min(max([1.05, *values]) * 1.08, 3.0)
    return -half, half


def _plane(scene: Mapping[str, Any], view: Mapping[str, Any], t: int, low: float, high: float) -> str:
    to = lambda v: (v - low) / (high - low) * SIZE  # noqa: E731
    flip = lambda v: SIZE - to(v)  # noqa: E731
    scale = SIZE / (high - low)
    radii = scene["radii"]
    out = "".join(
        f'<circle class="rock" cx="{to(x):.1f}" cy="{flip(y):.1f}" r="{radii["landmark"] * scale:.1f}"/>'
        for x, y in view["marks"][t]
    )
    for i, (x, y) in enumerate(view["real"][t]):
        r = max(radii["agents"][i] * scale, 2.5)
        if view["dream"] is None:
            out += f'<circle cx="{to(x):.1f}" cy="{flip(y):.1f}" r="{r:.1f}" style="fill:var(--a{i})"/>'
            continue
        u, v = view["dream"][t][i]
        out += (
            f'<path class="gap" d="M{to(x):.1f} {flip(y):.1f}L{to(u):.1f} {flip(v):.1f}"/>'
            f'<circle cx="{to(x):.1f}" cy="{flip(y):.1f}" r="{r:.1f}" style="fill:var(--a{i})"/>'
            f'<circle class="dreamt" cx="{to(u):.1f}" cy="{flip(v):.1f}" r="{r + 1.5:.1f}" style="stroke:var(--a{i})"/>'
        )
    return f'<svg class="arena" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="step {t}">{out}</svg>'


def _images(view: Mapping[str, Any], t: int, count: int) -> str:
    """Each frame is a window on the strip of all frames, cut by the inner SVG."""
    edge = view.get("edge", 0.0)
    return "".join(
        f'<svg class="film" viewBox="0 0 1 1" role="img" aria-label="{what}, step {t}">'
        f'<svg width="1" height="1" viewBox="{t + edge:.5f} {edge:.5f} {1 - 2 * edge:.5f} {1 - 2 * edge:.5f}">'
        f'<image href="{view[what]}" x="0" y="0" width="{count}" height="1" preserveAspectRatio="none"/></svg></svg>'
        for what in ("real", "dream")
        if view[what] is not None
    )


def _boards(view: Mapping[str, Any], t: int) -> str:
    cell, out = 40, ""
    for what in ("real", "dream"):
        if view[what] is None:
            continue
        drawn = ""
        for c, sure in enumerate(view[what][t]):
            x, y = (c % view["width"]) * cell, (c // view["width"]) * cell
            drawn += f'<rect class="cell" x="{x}" y="{y}" width="{cell}" height="{cell}"/>'
            mx, my = x + cell / 2, y + cell / 2
            for (kind, agent), p in zip(view["things"], sure, strict=True):
                if p < 0.03:
                    continue
                r = cell * (0.3 if kind == "agent" else 0.17)
                shape = (
                    f'<circle cx="{mx:g}" cy="{my:g}" r="{r:g}"'
                    if kind == "agent"
                    else f'<path class="coin" d="M{mx:g} {my - r:g}l{r:g} {r:g}l{-r:g} {r:g}l{-r:g} {-r:g}Z"'
                )
                drawn += f'{shape} style="fill:var(--a{agent});fill-opacity:{p:g}"/>'
        size = f"0 0 {view['width'] * cell} {view['height'] * cell}"
        out += f'<svg class="arena" viewBox="{size}" role="img" aria-label="{what}, step {t}">{drawn}</svg>'
    return out
