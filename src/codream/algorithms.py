"""The learners by name. Drivers and players know a learner only by what `Algorithm` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Bool, Int, PRNGKeyArray

from codream import matwm, wm_rnd
from codream.config import Config, ConfigError
from codream.envs import EnvSpec, TimeStep
from codream.metrics import Metrics

__all__ = ["Algorithm", "State", "algorithm", "of_learner"]

T = TypeVar("T")


@runtime_checkable
class State(Protocol):
    """Everything that training needs to go on, as one Equinox module."""

    steps: Int[Array, ""]  # environment steps, over all copies

    @property
    def spec(self) -> EnvSpec: ...

    def for_acting(self) -> Any:
        """The state without what only training needs."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """Pure functions over one typed state."""

    def init(self, key: PRNGKeyArray, spec: EnvSpec, config: Config) -> Any: ...

    def init_memory(self, state: Any, copies: int, config: Config) -> Any: ...

    def act(
        self,
        state: Any,
        memory: Any,
        here: TimeStep,
        key: PRNGKeyArray,
        config: Config,
        *,
        collect: bool = True,
        greedy: bool = False,
    ) -> tuple[Int[Array, "copies agents"], Any]: ...

    def as_they_are(self, memory: Any) -> Bool[Array, " copies"] | bool:
        """In which copies every agent plays its current policy, not a random or an earlier one."""
        ...

    def first_update(self, spec: EnvSpec, config: Config) -> int:
        """Environment steps before anything is learned, at most."""
        ...

    def observe(self, state: Any, here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep) -> Any: ...

    def update(self, state: Any, key: PRNGKeyArray, config: Config, *due: tuple[int, int]) -> tuple[Any, Metrics]: ...

    updates_due: Callable[..., tuple[int, int]] | None
    """What `update` may be given as `due`, told on the host (see `matwm.updates_due`); None: the device knows it."""


_MODULES: dict[str, ModuleType] = {"matwm": matwm, "wm_rnd": wm_rnd}


def algorithm(config: Config) -> Algorithm:
    """The learner that `config.algo` names."""
    return of_learner(_MODULES, config.algo, "codream.algorithms._MODULES")  # pyright: ignore[reportReturnType]


def of_learner(parts: Mapping[str, T], algo: str, place: str) -> T:
    """What a learner has in the table `parts`, which stands at `place`: reports and inspection know learners by more
    than `Algorithm` lists. Raises ConfigError, with what is to be added, for one that is not there."""
    if algo not in parts:
        raise ConfigError(f"algo={algo} is not in {place}, which has {', '.join(parts)}: add what it needs there")
    return parts[algo]
