"""Gymnasium spaces as codream's: observations as vectors or images of one shape, actions as Discrete."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

__all__ = ["IMAGE_SIZE", "SMALLEST_IMAGE", "Encoder", "discrete"]

IMAGE_SIZE = 64  # images are resized to this many rows and columns
SMALLEST_IMAGE = 16  # anything with fewer rows or columns is a grid, and is flattened


def discrete(where: str, space: spaces.Space) -> spaces.Discrete:
    """The action space, if it is Discrete; `ValueError` naming `where` if it is not."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"{where} has the action space {space}, but only Discrete actions are supported; look for a "
            "keyword of the environment that makes them so (e.g. continuous=False), or wrap it"
        )
    return space


class Encoder:
    """Turns one agent's raw observations into arrays of one `shape`: a vector, or an image.

    `where`: whose they are, for messages. `warns`: say so, once, where a vector lies outside its space; it is taken as
    it is, also as a part of other observations (`part`). An image must lie in its space, since the space says what its
    numbers mean.
    """

    def __init__(self, where: str, space: spaces.Space, *, warns: bool = True, part: bool = False) -> None:
        self._where, self._warns = where, warns
        masked = isinstance(space, spaces.Dict) and set(space.spaces) == {"observation", "action_mask"}
        self.has_mask = masked and not part
        if self.has_mask:
            space = space["observation"]  # type: ignore[index]
        self.space = space
        self.is_image = _is_image(space)
        self._encode: Callable[[Any], np.ndarray]
        if isinstance(space, spaces.Box):
            if self.is_image:
                first = _channels_first(space.shape)
                channels = 1 if len(space.shape) == 2 else space.shape[0 if first else 2]
                self.shape = (IMAGE_SIZE, IMAGE_SIZE, int(channels))
                bytes_ = space.dtype == np.uint8
                self._encode = lambda image: _resize(_pixels(np.moveaxis(image, 0, -1) if first else image, bytes_))
                self._warns = False
            else:
                self.shape = (int(np.prod(space.shape, dtype=int)),)
                self._encode = np.ravel
                slack = 1e-5  # rounding
                low, high = (np.asarray(end, np.float64) for end in (space.low, space.high))
                self._low, self._high = low - slack * (1 + np.abs(low)), high + slack * (1 + np.abs(high))
                self._warns = warns and bool(np.isfinite([space.low, space.high]).any())
        elif not space.is_np_flattenable:
            raise ValueError(f"{where} has the observation space {space}, which has no fixed length")
        elif any(_is_image(part) for part in _leaves(space)):
            raise ValueError(
                f"{where} has the observation space {space}, which mixes an image with other parts; "
                "expected an image alone, or parts that can be flattened to a vector (wrap the "
                "environment to choose)"
            )
        else:
            self.shape = (int(spaces.flatdim(space)),)
        self._parts = {
            name: Encoder(f"{where}, part {name}", inner, warns=warns, part=True) for name, inner in _parts(space)
        }

    def __call__(self, raw: Any) -> np.ndarray:
        if self._parts:
            return self._joined(raw)
        if not isinstance(self.space, spaces.Box):
            if not self.space.contains(raw):
                raise ValueError(f"expected a member of {self.space}, got {raw!r}")
            return np.asarray(spaces.flatten(self.space, raw))
        array = np.asarray(raw)
        if array.shape != self.space.shape:
            raise ValueError(f"expected shape {self.space.shape}, got {array.shape}")
        if self._warns and ((array < self._low) | (array > self._high)).any():
            self._warn(array)
        return self._encode(array)

    def _joined(self, raw: Any) -> np.ndarray:
        """Its parts, each as a vector, one after the other: `gymnasium.spaces.flatten`."""
        if isinstance(self.space, spaces.Dict):
            if not hasattr(raw, "keys") or not self._parts.keys() <= set(raw):
                raise ValueError(f"expected a dictionary with {', '.join(map(str, self._parts))}, got {raw!r}")
        elif not isinstance(raw, tuple | list) or len(raw) != len(self._parts):
            raise ValueError(f"expected a tuple of {len(self._parts)}, got {raw!r}")
        found = []
        for name, encoder in self._parts.items():
            try:
                found.append(encoder(raw[name]))
            except ValueError as err:
                raise ValueError(f"{name}: {err}") from err
        return np.concatenate(found)

    def _warn(self, array: np.ndarray) -> None:
        """The first entry that lies outside."""
        self._warns = False
        assert isinstance(self.space, spaces.Box)
        at = tuple(np.argwhere((array < self._low) | (array > self._high))[0])
        warnings.warn(
            f"{self._where}: an observation lies outside its space: entry {list(map(int, at))} is {array[at]:g}, the "
            f"space has {self.space.low[at]:g}…{self.space.high[at]:g} there. It is taken as it is, now and later",
            RuntimeWarning,
            stacklevel=2,
        )


def _parts(space: spaces.Space) -> list[tuple[Any, spaces.Space]]:
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else []


def _leaves(space: spaces.Space) -> list[spaces.Space]:
    return [leaf for _, part in _parts(space) for leaf in _leaves(part)] or [space]


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] <= 4 and min(shape[1:]) >= SMALLEST_IMAGE


def _is_image(space: spaces.Space) -> bool:
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    rows = space.shape[1:] if _channels_first(space.shape) else space.shape[:2]
    unit = np.issubdtype(space.dtype, np.floating) and bool((space.low >= 0).all() and (space.high <= 1).all())
    return min(rows) >= SMALLEST_IMAGE and (space.dtype == np.uint8 or unit)


def _pixels(image: np.ndarray, bytes_: bool) -> np.ndarray:
    """An image as uint8: of a space of `bytes_` (whole numbers 0…255), else of one of floats within 0…1."""
    if bytes_ and image.dtype == np.uint8:
        return image
    wanted, most = ("whole numbers within 0…255", 255) if bytes_ else ("pixels within 0…1", 1)
    if not np.isfinite(image).all():
        raise ValueError(f"expected {wanted}, got NaN or infinity")
    low, high = float(image.min()), float(image.max())
    if low < -1e-5 or high > most + 1e-5:
        raise ValueError(f"expected {wanted}, as the space says, got {low:g}…{high:g}")
    if bytes_ and (image != np.round(image)).any():
        raise ValueError(f"expected {wanted}, as the space says, got fractions within {low:g}…{high:g}")
    return np.clip(np.round(image if bytes_ else image * 255.0), 0, 255).astype(np.uint8)


def _resize(image: np.ndarray) -> np.ndarray:
    """A uint8 image [height, width(, channels)] as [64, 64, channels], by averaging boxes of pixels."""
    from PIL import Image

    if image.ndim == 2:
        image = image[..., None]
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    size, box = (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size, box))
    # One channel at a time: Pillow would weigh the colours of a four-channel image by its alpha.
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, box))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, axis=-1)
