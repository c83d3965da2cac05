"""Episodes, alone or beside a dream, as animated pictures. Drawn without a display, from the scenes of a report."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from codream.report.charts import colours
from codream.report.curves import point
from codream.report.storyboard import extent

__all__ = ["FPS", "check_film", "film", "framed", "frames_of", "write_film"]

FPS = 4
SIZE = 280  # of one picture, in pixels
FILM_ENTRIES = 6  # of a vector
FINER = 3  # drawn that much larger and then reduced, so that edges are smooth
HEAD = 40  # for what is written above the pictures
LEGEND = 26  # for the names of the agents below
ROOM = 10
PAPER, INK, SOFT, LINE, ROCK = "#fbfaf7", "#1d2328", "#5d666e", "#d9d8d2", "#d5d1c6"


def film(scene: Mapping[str, Any], focal: int, sides: Mapping[str, Sequence[int]]) -> bytes:
    """An animated GIF. Left: what happened. Right: what agent `focal` imagined, where it has a world model."""
    out = io.BytesIO()
    _save_gif(out, frames_of(scene, focal, sides), FPS)
    return out.getvalue()


def write_film(path: Path, frames: Sequence[Image.Image], fps: float = FPS) -> None:
    """Write frames as GIF or MP4, as the file's name ends. Raises ModuleNotFoundError with the command to type where
    MP4 lacks its library, ValueError for another ending."""
    check_film(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = _save_gif if path.suffix.lower() == ".gif" else _save_mp4
    save(path, frames, fps)


def check_film(path: Path) -> None:
    """Raise what `write_film` would for this file's name, before anything is played."""
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"expected a file that ends in .gif or .mp4, got {path}")
    if path.suffix.lower() == ".mp4":
        _mp4_writer()


def frames_of(
    scene: Mapping[str, Any],
    focal: int,
    sides: Mapping[str, Sequence[int]],
    agents: Sequence[str] | None = None,
    title: str = "",
) -> list[Image.Image]:
    """One picture for every step, beside what agent `focal` imagined, if it did. `agents`: their names, for the legend.
    `title`: written at the top."""
    view = scene["views"][focal]
    colours = _colours(sides)
    columns = ["real"] if view["dream"] is None else ["real", "dream"]
    who = agents[focal] if agents else f"agent {focal}"
    wide = len(columns) * SIZE + (len(columns) + 1) * ROOM
    legend = LEGEND if agents else 0
    pages = []
    total = np.zeros(len(scene["reward"][0]) if scene["reward"] else 0)
    for t in range(scene["steps"] + 1):
        page = Image.new("RGB", (wide, HEAD + SIZE + ROOM + legend), "white")
        draw = ImageDraw.Draw(page)
        if t:
            total = total + np.asarray(scene["reward"][t - 1])
        told = f"step {t} of {scene['steps']}"
        heads = {"real": f"{title or 'what happened'}", "dream": f"what {who} imagined"}
        left = scene["start"] - t
        small = {
            "real": told,
            "dream": "still watching" if left >= 0 else f"{-left} steps into its dream",
        }
        for k, what in enumerate(columns):
            x = ROOM + k * (SIZE + ROOM)
            draw.text((x, 4), heads[what], INK, _font(15))
            draw.text((x, 23), small[what], SOFT, _font(12))
            page.paste(_tile(scene, view, what, t, focal, colours), (x, HEAD))
            draw.rectangle((x, HEAD, x + SIZE - 1, HEAD + SIZE - 1), outline=LINE)
        if agents:
            _names(draw, HEAD + SIZE + 8, agents, total, colours, wide)
        pages.append(page)
    return pages


def framed(
    picture: np.ndarray,
    title: str,
    t: int,
    agents: Sequence[str],
    total: Any,
    sides: Mapping[str, Sequence[int]],
) -> Image.Image:
    """An environment's own picture with a title above and the agents' rewards so far below."""
    image = Image.fromarray(np.asarray(picture, np.uint8))
    scale = min(2 * SIZE / image.width, 1.5 * SIZE / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (2 * SIZE + 3 * ROOM, HEAD + round(1.5 * SIZE) + ROOM + LEGEND), "white")
    draw = ImageDraw.Draw(page)
    draw.text((ROOM, 4), title, INK, _font(15))
    draw.text((ROOM, 23), f"step {t}", SOFT, _font(12))
    page.paste(image, ((page.width - image.width) // 2, HEAD))
    _names(draw, page.height - LEGEND + 4, agents, total, _colours(sides), page.width)
    return page


def _colours(sides: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """As in the report, on light."""
    return {i: light for i, (light, _) in colours(sides).items()}


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _names(
    draw: ImageDraw.ImageDraw, y: int, agents: Sequence[str], total: Any, colours: Mapping[int, str], wide: int
) -> None:
    """The agents in their colours, and what each has earned so far."""
    x = ROOM
    for i, name in enumerate(agents):
        text = f"{name} {total[i]:+.0f}" if len(total) else name
        if x + 18 + draw.textlength(text, _font(11)) > wide:
            draw.text((x, y - 1), "…", SOFT, _font(11))
            return
        draw.ellipse((x, y + 1, x + 9, y + 10), fill=colours[i])
        draw.text((x + 13, y - 1), text, INK, _font(11))
        x += 24 + int(draw.textlength(text, _font(11)))


def _tile(
    scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int, focal: int, colours: Mapping[int, str]
) -> Image.Image:
    if scene["kind"] == "image":
        return _image(scene, view, what, t)
    tile = Image.new("RGB", (SIZE * FINER, SIZE * FINER), PAPER)
    draw = ImageDraw.Draw(tile)
    if scene["kind"] == "plane":
        _plane(draw, scene, view, what, t, focal, colours)
    elif scene["kind"] == "grid":
        _grid(draw, view, what, t, focal, colours)
    else:
        _curves(draw, scene, view, what, t, colours[focal])
    return tile.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _plane(
    draw: ImageDraw.ImageDraw,
    scene: Mapping[str, Any],
    view: Mapping[str, Any],
    what: str,
    t: int,
    focal: int,
    colours: Mapping[int, str],
) -> None:
    low, high = extent(scene)
    scale = SIZE * FINER / (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - low) * scale, SIZE * FINER - (y - low) * scale

    def disc(x: float, y: float, r: float, **how: Any) -> None:
        (cx, cy), r = place(x, y), max(r * scale, 3 * FINER)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), **how)

    (left, bottom), (right, top) = place(-1, -1), place(1, 1)
    if not scene.get("centred"):
        draw.rectangle((left, top, right, bottom), outline=LINE, width=FINER)
    for x, y in view["marks" if what == "real" else "dream_marks"][t]:
        disc(x, y, scene["radii"]["landmark"], fill=ROCK)
    for i, _ in enumerate(view[what][t]):  # where they came from
        path = [place(*view[what][k][i]) for k in range(max(t - 6, 0), t + 1)]
        if len(path) > 1:
            draw.line(path, fill=colours[i], width=FINER)
    dreaming = what == "dream" and t > scene["start"]
    for i, (x, y) in enumerate(view[what][t]):
        r = scene["radii"]["agents"][i]
        if dreaming:
            disc(x, y, r, fill=PAPER, outline=colours[i], width=2 * FINER)
            u, v = view["real"][t][i]
            disc(u, v, 0, fill=colours[i])
        else:
            disc(x, y, r, fill=colours[i])
        if i == focal and view["dream"] is not None:
            disc(x, y, r + 0.06, outline=INK, width=FINER)


def _grid(
    draw: ImageDraw.ImageDraw, view: Mapping[str, Any], what: str, t: int, focal: int, colours: Mapping[int, str]
) -> None:
    cell = SIZE * FINER / max(view["width"], view["height"])
    for c, sure in enumerate(view[what][t]):
        x, y = (c % view["width"]) * cell, (c // view["width"]) * cell
        draw.rectangle((x, y, x + cell, y + cell), outline=LINE, width=FINER)
        for (kind, agent), p in zip(view["things"], sure, strict=True):
            if p < 0.03:
                continue
            mx, my, r = x + cell / 2, y + cell / 2, cell * (0.3 if kind == "agent" else 0.17)
            fill = _mixed(colours[agent], p)
            if kind == "agent":
                draw.ellipse((mx - r, my - r, mx + r, my + r), fill=fill)
                if agent == focal and p > 0.4:
                    q = r + 5 * FINER
                    draw.ellipse((mx - q, my - q, mx + q, my + q), outline=INK, width=FINER)
            else:
                draw.polygon(((mx, my - r), (mx + r, my), (mx, my + r), (mx - r, my)), fill=fill, outline=PAPER)


def _mixed(colour: str, share: float) -> tuple[int, ...]:
    """A colour on the paper, by how sure it is."""
    parts = [(int(colour[k : k + 2], 16), int(PAPER[k : k + 2], 16)) for k in (1, 3, 5)]
    return tuple(round(share * a + (1 - share) * b) for a, b in parts)


def _curves(
    draw: ImageDraw.ImageDraw, scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int, colour: str
) -> None:
    """The entries that change most, up to step `t`; of a dream, over what happened."""
    shown = sorted(sorted(range(len(view["entries"])), key=lambda k: -_liveliness(view, k))[:FILM_ENTRIES])
    columns = 1 if len(shown) <= 3 else 2
    wide, high = SIZE * FINER / columns, SIZE * FINER / max(-(-len(shown) // columns), 1)
    head, room = 14 * FINER, 5 * FINER
    for n, k in enumerate(shown):
        left, top = (n % columns) * wide, (n // columns) * high

        def path(
            values: Any, begin: int, left: float = left, top: float = top, k: int = k
        ) -> list[tuple[float, float]]:
            ends = (point(view, k, scene["steps"], s, values[s][k]) for s in range(begin, t + 1))
            return [(left + room + x * (wide - 2 * room), top + head + y * (high - head - room)) for x, y in ends]

        draw.rectangle((left + room, top + head, left + wide - room, top + high - room), outline=LINE, width=FINER)
        draw.text((left + room, top + 2 * FINER), f"entry {view['entries'][k]}", SOFT, _font(10 * FINER))
        lines = [(path(view["real"], 0), INK if what == "real" else SOFT, FINER)]
        if what == "dream" and t >= scene["start"]:
            lines.append((path(view["dream"], scene["start"]), colour, 2 * FINER))
        for line, fill, width in lines:
            if len(line) > 1:
                draw.line(line, fill=fill, width=width)
            x, y = line[-1]
            draw.ellipse((x - 3 * FINER, y - 3 * FINER, x + 3 * FINER, y + 3 * FINER), fill=fill)


def _liveliness(view: Mapping[str, Any], k: int) -> float:
    """How much an entry changes."""
    return float(np.std([row[k] for row in view["real"]]))


def _image(scene: Mapping[str, Any], view: Mapping[str, Any], what: str, t: int) -> Image.Image:
    strip = Image.open(io.BytesIO(base64.b64decode(view[what].partition(",")[2]))).convert("RGB")
    width = strip.width // (scene["steps"] + 1)
    edge = round(view.get("edge", 0.0) * width)
    frame = (t * width + edge, edge, (t + 1) * width - edge, strip.height - edge)
    return strip.crop(frame).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _save_gif(to: Any, frames: Sequence[Image.Image], fps: float) -> None:
    """With one palette for all frames, so that colours do not flicker and the file stays small."""
    whole = Image.new("RGB", (frames[0].width, frames[0].height * min(len(frames), 8)))
    for k, frame in enumerate(frames[:: max(len(frames) // 8, 1)][:8]):
        whole.paste(frame, (0, k * frame.height))
    palette = whole.quantize(96, dither=Image.Dither.NONE)
    shown = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown[0].save(to, "GIF", save_all=True, append_images=shown[1:], duration=round(1000 / fps), loop=0, optimize=False)


def _save_mp4(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    imageio_ffmpeg = _mp4_writer()
    width, height = (n - n % 2 for n in frames[0].size)  # as the codec wants it
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():  # JAX warns of any fork; this one only becomes ffmpeg
        warnings.filterwarnings("ignore", r"os\.fork\(\)", RuntimeWarning)
        writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(np.asarray(frame.crop((0, 0, width, height)))))
    writer.close()


def _mp4_writer() -> Any:
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'MP4 needs a library that is not installed; type: pip install "codream[video]", or choose a .gif'
        ) from None
    return imageio_ffmpeg
