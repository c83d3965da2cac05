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
    """`tree` copied to every device. Outside compiled functions."""
    return _on_all(tree, devices, jax.device_put)


def _on_all(tree: T, devices: int, put: Any) -> T:
    if devices == 1:
        return tree
    place = NamedSharding(data_mesh(devices), PartitionSpec())
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda x: put(x, place), arrays), static)
