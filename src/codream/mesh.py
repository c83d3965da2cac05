"""One run on several devices: batches of sequences and of imagined trajectories lie in shares on a mesh.

All else is the same on every device. JAX's partitioner makes the rest of it: gradients are summed across devices.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codream.config import ConfigError
from codream.hosts import number

__all__ = ["data_mesh", "everywhere", "placed", "spread"]

T = TypeVar("T")


@cache
def data_mesh(devices: int) -> Mesh:
    """The first `devices` devices, of all hosts, in a row. Raises ConfigError where there are fewer."""
    found = jax.devices()
    if devices > len(found):
        raise ConfigError(
            f"devices={devices}, but there {'is' if len(found) == 1 else 'are'} {len(found)} ({found[0].platform}); "
            "use no more than `codream devices` lists"
        )
    return Mesh(np.asarray(found[:devices]), ("data",))


def spread(tree: T, axis: int, devices: int) -> T:
    """`tree` with axis `axis` of its arrays in equal shares on the devices. Inside a compiled function."""
    if devices == 1:
        return tree
    place = NamedSharding(data_mesh(devices), PartitionSpec(*[None] * axis, "data"))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), tree)


def everywhere(tree: T, devices: int) -> T:
    """`tree` with all its arrays on every device. Inside a compiled function."""
    return _on_all(tree, devices, jax.lax.with_sharding_constraint)


def placed(tree: T, devices: int) -> T:
    """`tree`, which is the same on every host, copied to every device. Outside compiled functions."""
    return _on_all(tree, devices, jax.device_put if number() == 1 else _computed)


def _computed(arrays: T, place: NamedSharding) -> T:
    """What `device_put` does, on devices of which some are another host's."""
    return jax.jit(_same, out_shardings=place)(arrays)


def _same(arrays: T) -> T:
    return arrays


def _on_all(tree: T, devices: int, put: Any) -> T:
    if devices == 1:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(put(arrays, NamedSharding(data_mesh(devices), PartitionSpec())), static)
