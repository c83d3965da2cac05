"""One run on several devices: each works on its share of a batch of sequences or of imagined trajectories.

All else is the same on every device. A share is worked on as if it were the batch (`on_shares`); what concerns all of
it, such as gradients, is summed over the devices inside (`total`, `gathered`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from codream.config import ConfigError
from codream.hosts import number

__all__ = ["data_mesh", "everywhere", "gathered", "on_shares", "placed", "total"]

T = TypeVar("T")

AXIS = "data"


@cache
def data_mesh(devices: int) -> Mesh:
    """The first `devices` devices, of all hosts, in a row. Raises ConfigError where there are fewer."""
    found = jax.devices()
    if devices > len(found):
        raise ConfigError(
            f"devices={devices}, but there {'is' if len(found) == 1 else 'are'} {len(found)} ({found[0].platform}); "
            "use no more than `codream devices` lists"
        )
    return Mesh(np.asarray(found[:devices]), (AXIS,))


def on_shares(
    function: Callable[[Any, Any], Any], devices: int, whole: Any, shares: Any, axis: int, out: int | None = None
) -> Any:
    """`function(whole, shares)` on every device, with its share of axis `axis` of all arrays in `shares`.

    The results are joined along axis `out`, or, where it is None, are the same on every device. Inside a compiled
    function.
    """
    if devices == 1:
        return function(whole, shares)
    arrays, static = eqx.partition(whole, eqx.is_array)
    rest: list[Any] = []

    def one(arrays: Any, shares: Any) -> Any:
        result, other = eqx.partition(function(eqx.combine(arrays, static), shares), eqx.is_array)
        rest.append(other)
        return result

    mapped = jax.shard_map(
        one,
        mesh=data_mesh(devices),
        in_specs=(PartitionSpec(), _along(axis)),
        out_specs=PartitionSpec() if out is None else _along(out),
        check_vma=False,  # else a gradient would be summed where it is taken
    )
    return eqx.combine(mapped(arrays, shares), rest[0])


def _along(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, AXIS)


def total(tree: T, devices: int) -> T:
    """The sum over all devices. Inside `on_shares`."""
    return tree if devices == 1 else jax.lax.psum(tree, AXIS)


def gathered(x: Array, devices: int) -> Array:
    """The rows of all devices, on each. Inside `on_shares`."""
    return x if devices == 1 else jax.lax.all_gather(x, AXIS, tiled=True)


def everywhere(tree: T, devices: int) -> T:
    """`tree` with all its arrays on every device. Inside a compiled function."""
    return _on_all(tree, devices, jax.lax.with_sharding_constraint)


def placed(tree: T, devices: int) -> T:
    """`tree`, which is the same on every host, copied to every device. Outside compiled functions."""
    return _on_all(tree, devices, jax.device_put if number() == 1 else _copied)


def _copied(arrays: T, place: NamedSharding) -> T:
    """What `device_put` does, on devices of which some are another host's."""
    here = sorted(place.addressable_devices, key=lambda device: device.id)

    def copied(x: Any) -> Array:
        parts = [jax.device_put(x, device, may_alias=False) for device in here]
        return jax.make_array_from_single_device_arrays(parts[0].shape, place, parts)

    return jax.tree.map(copied, arrays)


def _on_all(tree: T, devices: int, put: Any) -> T:
    if devices == 1:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(put(arrays, NamedSharding(data_mesh(devices), PartitionSpec())), static)
