"""One run, or the runs of several seeds as one program, behind one interface for `codream.loop`.

Seeds are an axis like any other: the in-graph driver is mapped over runners, so that the small products of each become
one that fills the device. Every run stays what it would be by itself, up to the rounding of such products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from codream.hosts import on_this
from codream.mesh import placed
from codream.metrics import Sums
from codream.training import GraphDriver, HostDriver, Runner

__all__ = ["Alone", "Runs", "Together"]


@runtime_checkable
class Runs(Protocol):
    """Runs that advance together. `runners` is whatever the implementation makes of their runners."""

    @property
    def driver(self) -> HostDriver | GraphDriver: ...

    def join(self, runners: Sequence[Runner]) -> Any:
        """The runners of all runs, in their order, as one value. They are used up."""
        ...

    def advance(self, runners: Any) -> tuple[Any, tuple[Sums, ...]]:
        """One chunk of steps of all runs, and the metrics of each. `runners` is used up."""
        ...

    def steps(self, runners: Any) -> list[int]:
        """Environment steps that each has done."""
        ...

    def member(self, runners: Any, run: int) -> Runner:
        """The runner of one run."""
        ...

    def replaced(self, runners: Any, run: int, runner: Runner) -> Any:
        """`runners` with another one for one run."""
        ...


class Alone:
    """A single run, on any driver. `devices`: see `codream.mesh`."""

    def __init__(self, driver: HostDriver | GraphDriver, devices: int = 1):
        self.driver, self._devices = driver, devices

    def join(self, runners: Sequence[Runner]) -> Runner:
        (runner,) = runners
        return placed(runner, self._devices)

    def advance(self, runners: Runner) -> tuple[Runner, tuple[Sums, ...]]:
        runner, metrics = self.driver.advance(runners)
        return runner, (metrics,)

    def steps(self, runners: Runner) -> list[int]:
        return [self.driver.steps(runners)]

    def member(self, runners: Runner, run: int) -> Runner:
        return on_this(runners)

    def replaced(self, runners: Runner, run: int, runner: Runner) -> Runner:
        return self.join([runner])


class Together:
    """`count` runs of one configuration with different seeds, on an in-graph environment.

    `runners` has the arrays of all runners with a leading axis of runs; what is no array is the same in all.
    """

    def __init__(self, driver: GraphDriver, count: int):
        self.driver, self.count = driver, count
        self._static = eqx.partition(driver.template(), _is_array)[1]
        self._advance = jax.jit(self._step, donate_argnums=0)
        self._member = jax.jit(lambda arrays, run: jax.tree.map(lambda x: x[run], arrays))
        self._put = jax.jit(
            lambda arrays, run, one: jax.tree.map(lambda x, y: x.at[run].set(y), arrays, one), donate_argnums=0
        )

    def join(self, runners: Sequence[Runner]) -> Any:
        arrays = [eqx.filter(runner, eqx.is_array) for runner in runners]
        return jax.tree.map(lambda *each: jnp.stack(each), *arrays)

    def _step(self, runners: Any) -> tuple[Any, tuple[Sums, ...]]:
        def one(arrays: Any) -> tuple[Any, Sums]:
            runner, metrics = self.driver.scanned(eqx.combine(arrays, self._static))
            return eqx.filter(runner, eqx.is_array), metrics

        runners, metrics = jax.vmap(one)(runners)
        return runners, tuple(jax.tree.map(lambda x, run=run: x[run], metrics) for run in range(self.count))

    def advance(self, runners: Any) -> tuple[Any, tuple[Sums, ...]]:
        return self._advance(runners)

    def steps(self, runners: Any) -> list[int]:
        return [int(steps) for steps in jax.device_get(runners.state.steps)]

    def member(self, runners: Any, run: int) -> Runner:
        return eqx.combine(self._member(runners, run), self._static)

    def replaced(self, runners: Any, run: int, runner: Runner) -> Any:
        return self._put(runners, run, eqx.filter(runner, eqx.is_array))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
