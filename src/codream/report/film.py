"""An episode beside its dream as an animated GIF, for TensorBoard. Drawn without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from codream.report.charts import FAMILIES
from codream.report.storyboard import extent

__all__ = ["film"]

SIZE = 240
MILLISECONDS = 250  # for each frame


def film(scene: Mapping[str, Any], focal: int, sides: Mapping[str, Sequence[int]]) -> bytes:
    """Left: what happened. Right: what agent `focal` imagined, framed in grey while it still watches."""
    frames = []
    colours = {i: FAMILIES[f % 4][k % 4][0] for f, ms in enumerate(sides.values()) for k, i in enumerate(ms)}
    view = scene["views"][focal]
    for t in range(scene["steps"] + 1):
        page = Image.new("RGB", (2 * SIZE + 8, SIZE), "white")
        for column, what in enumerate(("real", "dream")):
            tile = _TILES[scene["kind"]](scene, view, what, t, colours)
            page.paste(tile, (column * (SIZE + 8), 0))
        frames.append(page)
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)
    return out.getvalue()


def _plane(
    scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int, colours: Mapping[int, str]
) -> Image.Image:
    tile, (low, high) = Image.new("RGB", (SIZE, SIZE), "#fbfaf7"), extent(scene)
    draw, scale = ImageDraw.Draw(tile), SIZE / (high - low)

    def disc(x: float, y: float, r: float, **how: Any) -> None:
        cx, cy, r = (x - low) * scale, SIZE - (y - low) * scale, max(r * scale, 3)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), **how)

    for x, y in view["marks" if what == "real" else "dream_marks"][t]:
        disc(x, y, scene["radii"]["landmark"], fill="#d5d1c6")
    for i, (x, y) in enumerate(view[what][t]):
        how = {"fill": colours[i]} if what == "real" or t <= scene["start"] else {"outline": colours[i], "width": 3}
        disc(x, y, scene["radii"]["agents"][i], **how)
    return tile


def _image(
    scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int, colours: Mapping[int, str]
) -> Image.Image:
    del colours
    strip = Image.open(io.BytesIO(base64.b64decode(view[what].partition(",")[2]))).convert("RGB")
    width = strip.width // (scene["steps"] + 1)
    return strip.crop((t * width, 0, (t + 1) * width, strip.height)).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _strip(
    scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int, colours: Mapping[int, str]
) -> Image.Image:
    del scene, colours
    tile = Image.new("RGB", (SIZE, SIZE), "white")
    draw, side = ImageDraw.Draw(tile), view["side"]
    cell = SIZE / side
    for k, value in enumerate(view[what][t]):
        x, y, pale = (k % side) * cell, (k // side) * cell, int(255 * (1 - abs(value)))
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=(255, pale, pale) if value > 0 else (pale, pale, 255))
    return tile


_TILES = {"plane": _plane, "image": _image, "strip": _strip}
