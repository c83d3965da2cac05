"""Episodes and dreams as plain values that a page can draw: positions, cells of a grid, images, curves of entries."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from codream.envs import EnvSpec
from codream.report.curves import curves_of
from codream.report.dreams import Dreamed, Episode
from codream.report.grids import Grid, grids
from codream.report.scene import Layout, layouts

__all__ = ["scene_of"]

# Radii in the arena's units: of agents by side, and of landmarks.
_RADII: dict[str, tuple[dict[str, float], float]] = {
    "simple_tag": ({"adversary": 0.075, "agent": 0.05}, 0.2),
    "simple_spread": ({"agent": 0.15}, 0.05),
    "simple_adversary": ({"adversary": 0.15, "agent": 0.15}, 0.08),
    "simple": ({"agent": 0.05}, 0.05),
}


def scene_of(episode: Episode, spec: EnvSpec, others: str = "predicted", common: bool = False) -> dict[str, Any]:
    """One episode and all dreams of it, as plain lists.

    `kind` says how to draw it: `plane` (positions), `grid` (cells with things in them), `image` (strips of frames as
    PNG) or `curves` (entries of a vector over the steps). Without a world model views have no `dream`, `reward`, `gap`
    and `still`. `others` says what the bars of the others are: `predicted`, or `mirrored` (what the agent would do in
    their place). `common`: rewards are the sum of all agents', see `Config.common_reward`.
    """
    found, boards = layouts(spec), grids(spec)
    kind = "image" if spec.is_image else "plane" if found is not None else "grid" if boards is not None else "curves"
    views = []
    for dreamed in episode.dreams:
        real = episode.obs[:, dreamed.focal]
        view = {
            "others": _plain(dreamed.others, 3),
            "policy": _plain(dreamed.policy, 3),
            "reward": _plain(dreamed.reward, 2),
            "value": _plain(dreamed.value, 2),
            "gap": _plain(dreamed.gap, 4),
            "still": _plain(dreamed.still, 4),
        }
        if found is not None:
            view |= _in_the_plane(found[dreamed.focal], real, dreamed, episode.start, spec.num_agents)
        elif spec.is_image:
            view |= {"real": _film(real), "dream": None if dreamed.obs is None else _film(dreamed.obs[0])}
            view["edge"] = 1 / (real.shape[1] + 2)
        elif boards is not None:
            view |= _on_the_board(boards[dreamed.focal], real, dreamed)
        else:
            seen = _held(real, episode.acting[:, dreamed.focal])
            view |= curves_of(seen, dreamed, int(spec.obs_valid[dreamed.focal].sum()), episode.start)
        views.append(view)
    return {
        "kind": kind,
        "label": episode.label,
        "start": episode.start,
        "steps": len(episode.action),
        "action": episode.action.tolist(),
        "acting": episode.acting.tolist(),
        "reward": _plain(episode.reward, 2),
        "common": common,
        "gap_label": _GAP[kind],
        "others": others,
        "views": views,
        **({"radii": _radii(spec), "centred": found is not None and found[0].own is None} if kind == "plane" else {}),
    }


_GAP = {
    "plane": "mean distance, arena units",
    "grid": "squared error, all cells",
    "image": "squared error, all pixels",
    "curves": "squared error, symlog units",
}


def _plain(x: np.ndarray | None, digits: int) -> Any:
    return None if x is None else np.round(np.asarray(x, float), digits).tolist()


def _held(
    real: Shaped[np.ndarray, "steps_1 size"], acts: Bool[np.ndarray, " steps"]
) -> Shaped[np.ndarray, "steps_1 size"]:
    """Where the agent has ended or not come yet, what it saw last or first, instead of filler."""
    there = np.append(acts, False) | np.append(False, acts)
    last = np.maximum.accumulate(np.where(there, np.arange(len(real)), -1))
    return real[np.where(last < 0, np.argmax(there), last)]


def _radii(spec: EnvSpec) -> dict[str, Any]:
    game = re.sub(r"_v\d+$", "", spec.name.rpartition(":")[2].removeprefix("MPE_"))
    by_side, landmark = _RADII[game]
    sides = spec.sides
    agents = [
        next(by_side.get(side, 0.05) for side, members in sides.items() if i in members)
        for i in range(len(spec.agents))
    ]
    return {"agents": agents, "landmark": landmark}


def _in_the_plane(
    layout: Layout, real: Shaped[np.ndarray, "steps_1 size"], dreamed: Dreamed, start: int, count: int
) -> dict[str, Any]:
    """Positions, and the gap as the mean distance between where every moving thing is and where it was imagined."""
    truly = layout.agents(real, count)
    if dreamed.obs is None:
        return {"real": _plain(truly, 3), "marks": _plain(layout.places(real), 3), "dream": None}
    imagined = layout.agents(dreamed.obs, count)
    shown = np.arange(count) if layout.own is not None else np.asarray([j for j in range(count) if j != layout.focal])
    if not len(shown):  # alone, in the middle of its own picture: the landmarks move
        gap = np.linalg.norm(layout.places(dreamed.obs) - layout.places(real), axis=-1).mean(axis=(0, 2))
        still = np.linalg.norm(layout.places(real[start]) - layout.places(real), axis=-1).mean(axis=1)
    else:
        gap = np.linalg.norm(imagined - truly, axis=-1)[..., shown].mean(axis=(0, 2))
        still = np.linalg.norm(truly[start] - truly, axis=-1)[..., shown].mean(axis=1)
    before = np.arange(len(real)) <= start
    return {
        "real": _plain(truly, 3),
        "marks": _plain(layout.places(real), 3),
        "dream": _plain(imagined[0], 3),
        "dream_marks": _plain(layout.places(dreamed.obs[0]), 3),
        "ghosts": _plain(imagined[1:, start + 1 :], 2),
        "gap": _plain(np.where(before, 0.0, gap), 4),
        "still": _plain(np.where(before, 0.0, still), 4),
    }


def _on_the_board(grid: Grid, real: Shaped[np.ndarray, "steps_1 size"], dreamed: Dreamed) -> dict[str, Any]:
    """Cells as the focal agent sees them; of a dream, the mean over its samples: how sure it is."""
    return {
        "real": _plain(grid.cells(real), 2),
        "dream": None if dreamed.obs is None else _plain(grid.cells(dreamed.obs).mean(axis=0), 2),
        "height": grid.height,
        "width": grid.width,
        "things": [[thing.kind, thing.agent] for thing in grid.things],
    }


def _film(frames: Shaped[np.ndarray, "steps h w c"]) -> str:
    """All frames beside one another as one PNG, in a data URI.

    Each has its outermost pixels twice (`edge` of a view is their share): a browser rounds boxes to whole pixels of the
    screen, and would else show a sliver of the next frame.
    """
    from PIL import Image

    pixels = np.clip(np.round(np.asarray(frames, float)), 0, 255).astype(np.uint8)
    channels = pixels.shape[-1]
    if channels not in (1, 3):  # stacked frames or masks: their mean says most
        pixels, channels = pixels.mean(axis=-1, keepdims=True).astype(np.uint8), 1
    strip = np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0)), mode="edge") for frame in pixels], axis=1)
    out = io.BytesIO()
    Image.fromarray(strip[..., 0] if channels == 1 else strip).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
