"""One run on several hosts: a process on each runs the same program, over the devices of all.

The first process keeps the run: it alone steps a host environment, reads and writes the run's folder, and decides; the
others compute what it computes and are told the rest. A run that loses one of its processes ends, and is resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codream.config import ConfigError
from codream.envs import HostEnv, TimeStep

__all__ = [
    "FirstHostFailed",
    "SharedEnv",
    "from_first",
    "is_first",
    "join",
    "leave",
    "most",
    "number",
    "on_this",
    "perhaps_from_first",
    "text_from_first",
]

T = TypeVar("T")


class FirstHostFailed(RuntimeError):
    """What the first process of a run could not do, so that this one cannot go on; its own message says why."""


def join(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Become one of the processes of a run; before anything computes.

    `coordinator`: host:port of the first one; or `auto`, where JAX knows the cluster (Slurm, Open MPI, Kubernetes,
    TPU). `processes`: how many there are; `process`: which this is, from 0. Waits for the others. Raises ConfigError
    where they do not come within five minutes, or something is missing.
    """
    if coordinator == "auto":
        if processes is not None or process is not None:
            raise ConfigError("--coordinator auto finds --processes and --process by itself; leave them out")
    elif processes is None or process is None:
        raise ConfigError(f"--coordinator {coordinator} needs --processes (how many) and --process (which this is)")
    elif not 0 <= process < processes:
        raise ConfigError(f"--process must be from 0 to {processes - 1}, got {process}")
    try:
        jax.distributed.initialize(None if coordinator == "auto" else coordinator, processes, process)
    except (RuntimeError, ValueError) as err:
        raise ConfigError(f"cannot join the processes of --coordinator {coordinator}: {err}") from err
    _connect()


def _connect() -> None:
    """Connect all devices while the processes are at the same place: later one may compile for a minute longer than
    another, and connections on the CPU are waited for 30 seconds only."""
    most(0)
    devices = Mesh(np.asarray(jax.devices()), ("data",))
    one_each = jax.jit(lambda: jnp.ones(devices.size), out_shardings=NamedSharding(devices, PartitionSpec("data")))()
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(devices, PartitionSpec()))(one_each))


def leave() -> None:
    """Part from the other processes once all of them have come here; what this one computes from now on is its own.

    Nothing where a run has one process.
    """
    if number() > 1:
        jax.distributed.shutdown()


def number() -> int:
    """How many processes share this run."""
    return jax.process_count()


def is_first() -> bool:
    return jax.process_index() == 0


def most(*values: int) -> tuple[int, ...]:
    """Of each value the greatest that any process has. All have to ask, in the same order."""
    if number() == 1:
        return values
    found = np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))
    return tuple(int(x) for x in found.reshape(-1, len(values)).max(axis=0))


def from_first(make: Callable[[], T], like: T) -> T:
    """What `make` gives in the first process, in every one: arrays on the host, and what is no array from `like`.

    `like` has the shapes and types (see `jax.eval_shape`). Where `make` fails, the first process raises what it raised,
    and the others FirstHostFailed.
    """
    if number() == 1:
        return make()
    arrays, static = eqx.partition(like, _is_array)
    wanted, structure = jax.tree.flatten(jax.eval_shape(_data, arrays))
    sizes = [x.size * x.dtype.itemsize for x in wanted]
    sent, error = np.zeros(1 + sum(sizes), np.uint8), None
    if is_first():
        try:
            made = jax.tree.leaves(jax.device_get(_data(eqx.filter(make(), _is_array))))
            if [np.shape(x) for x in made] != [x.shape for x in wanted]:
                raise ValueError(f"expected arrays of {wanted}, got {jax.tree.map(np.shape, made)}")
            flat = [np.asarray(x, y.dtype).reshape(-1).view(np.uint8) for x, y in zip(made, wanted, strict=True)]
            sent = np.concatenate([np.ones(1, np.uint8), *flat])
        except BaseException as err:
            error = err
    # One array of bytes: whatever the numbers are, they arrive as they are. The first says that they are there.
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    if error is not None:
        raise error
    if not received[0]:
        raise FirstHostFailed("the first process of this run could not go on; its own message says why")
    parts = np.split(received[1:], np.cumsum(sizes)[:-1])
    values = [part.view(x.dtype).reshape(x.shape) for part, x in zip(parts, wanted, strict=True)]
    return eqx.combine(_with_keys(jax.tree.unflatten(structure, values), arrays), static)


def perhaps_from_first(make: Callable[[], T | None], like: T) -> T | None:
    """`from_first`, where there may be nothing."""
    made: list[T] = []

    def there() -> Any:
        found = make()
        if found is not None:
            made.append(found)
        return np.asarray(len(made), np.int32)

    return from_first(lambda: made[0], like) if from_first(there, np.zeros((), np.int32)) else None


def text_from_first(make: Callable[[], str]) -> str:
    """`from_first` for a text of at most 4,096 bytes, such as a path."""

    def coded() -> np.ndarray:
        return np.frombuffer(make().encode().ljust(4096, b"\0"), np.uint8)

    return bytes(from_first(coded, np.zeros(4096, np.uint8))).rstrip(b"\0").decode()


def on_this(tree: T) -> T:
    """`tree`, which is the same on all devices, as arrays of this process alone."""
    if number() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


class SharedEnv:
    """A host environment that the first process steps, for all."""

    def __init__(self, env: HostEnv):
        self._env, self.spec, self.num_envs = env, env.spec, env.num_envs
        self._like = TimeStep.blank(env.spec, env.num_envs)

    def reset(self, seeds: Any) -> TimeStep:
        return from_first(lambda: self._env.reset(seeds), self._like)

    def step(self, actions: Any, seeds: Any) -> TimeStep:
        return from_first(lambda: self._env.step(actions, seeds), self._like)

    def close(self) -> None:
        self._env.close()


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(tree: Any) -> Any:
    """`tree` with keys as the numbers they are."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _with_keys(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.random.wrap_key_data(x) if _is_key(y) else x, tree, like)
