"""Gymnasium spaces as codream's: observations as vectors or images of one shape, actions as Discrete."""

from __future__ import annotations

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
    """Turns one agent's raw observations into arrays of one `shape`: a vector, or an image."""

    def __init__(self, where: str, space: spaces.Space) -> None:
        self.has_mask = isinstance(space, spaces.Dict) and set(space.spaces) == {"observation", "action_mask"}
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
                self._encode = lambda image: _resize(np.moveaxis(image, 0, -1) if first else image)
            else:
                self.shape = (int(np.prod(space.shape, dtype=int)),)
                self._encode = np.ravel
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

    def __call__(self, raw: Any) -> np.ndarray:
        if not isinstance(self.space, spaces.Box):
            if not self.space.contains(raw):
                raise ValueError(f"expected a member of {self.space}, got {raw!r}")
            return np.asarray(spaces.flatten(self.space, raw))
        array = np.asarray(raw)
        if array.shape != self.space.shape:
            raise ValueError(f"expected shape {self.space.shape}, got {array.shape}")
        return self._encode(array)


def _leaves(space: spaces.Space) -> list[spaces.Space]:
    if isinstance(space, spaces.Dict):
        return [leaf for part in space.spaces.values() for leaf in _leaves(part)]
    if isinstance(space, spaces.Tuple):
        return [leaf for part in space.spaces for leaf in _leaves(part)]
    return [space]


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] <= 4 and min(shape[1:]) >= SMALLEST_IMAGE


def _is_image(space: spaces.Space) -> bool:
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    rows = space.shape[1:] if _channels_first(space.shape) else space.shape[:2]
    unit = np.issubdtype(space.dtype, np.floating) and bool((space.low >= 0).all() and (space.high <= 1).all())
    return min(rows) >= SMALLEST_IMAGE and (space.dtype == np.uint8 or unit)


def _resize(image: np.ndarray) -> np.ndarray:
    """An image [height, width(, channels)] as uint8 [64, 64, channels], by averaging boxes of pixels."""
    from PIL import Image

    if image.dtype != np.uint8:
        if not np.isfinite(image).all():
            raise ValueError("expected pixels within 0…1, got NaN or infinity")
        image = np.clip(np.round(image * 255.0), 0, 255).astype(np.uint8)
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
