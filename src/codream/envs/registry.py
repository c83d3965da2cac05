"""Names of environments: which exist, and which one a name means. Finding out imports no package."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from codream.envs import GraphEnv, HostEnv

__all__ = ["UnknownEnvironment", "available_envs", "envs_table", "make_named"]


class UnknownEnvironment(ValueError):
    """No environment has this name; the message lists those that exist, the nearest first."""


def available_envs() -> list[str]:
    """Names that `make_env` takes, from the installed packages; imports none of them."""
    return [f"{family}:{name}" for family, entry in _FAMILIES.items() for name in entry.names()]


def envs_table() -> Table:
    """The same names by family, and what to type for a family that is not installed; imports none of them either."""
    table = Table(
        title="Environments by name",
        title_justify="left",
        caption="Family, version and MPE_ may be left out: simple_tag is mpe2:simple_tag_v3, of the first family that "
        "has it. What agents see and do there: codream inspect --env NAME. One of your own: --env-from MODULE:NAME.",
        caption_justify="left",
    )
    table.add_column("family")
    table.add_column("environments")
    for family, entry in _FAMILIES.items():
        missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
        lines = [", ".join(entry.names())] + [f"needs {' and '.join(missing)}: {entry.install}"] * bool(missing)
        table.add_row(family, escape("\n".join(filter(None, lines))))
    return table


def make_named(name: str, num_envs: int, workers: int, kwargs: dict[str, Any]) -> HostEnv | GraphEnv:
    """Build the environment that a name means (see `codream.envs.make_env`)."""
    family, full = _resolve(name)
    return _FAMILIES[family].make(full, num_envs, workers, kwargs)


@dataclasses.dataclass(frozen=True)
class _Family:
    """Where the names of one family come from and how one of them is made."""

    names: Callable[[], list[str]]
    make: Callable[[str, int, int, dict[str, Any]], HostEnv | GraphEnv]
    packages: tuple[str, ...]
    install: str
    prefix: str = ""  # may be left out of a name, e.g. `MPE_`


def _package_folder(package: str) -> Path | None:
    """Folder of an installed top-level package, found without importing it."""
    found = importlib.util.find_spec(package)
    locations = found.submodule_search_locations if found else None
    return Path(locations[0]) if locations else None


def _versioned_modules(package: str, *parts: str) -> list[str]:
    """Module names like `simple_tag_v3` in a folder of an installed package."""
    folder = _package_folder(package)
    files = sorted(folder.joinpath(*parts).glob("*_v*.py")) if folder else []
    return [file.stem for file in files if re.fullmatch(r".+_v\d+", file.stem)]


def _mpe2_names() -> list[str]:
    return _versioned_modules("mpe2")


def _butterfly_names() -> list[str]:
    return _versioned_modules("pettingzoo", "butterfly")


def _assigned(file: Path, variable: str) -> list[str]:
    """The strings of a list, or the keys of a dictionary, assigned to `variable` in a source file."""
    if not file.exists():
        return []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets):
            value = node.value
            items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return []


def _jaxmarl_names() -> list[str]:
    folder = _package_folder("jaxmarl")
    if folder is None:
        return []
    # Not offered: continuous actions only (MABrax, facmac), other packages', and one that needs a policy.
    left_out = re.compile(r"ant_|halfcheetah_|hopper_|humanoid_|walker2d_|JaxRobotarium|Learned|MPE_simple_facmac")
    registered = [name for name in _assigned(folder / "registration.py", "registered_envs") if not left_out.match(name)]
    maps = _assigned(folder / "environments" / "smax" / "smax_env.py", "MAP_NAME_TO_SCENARIO")
    return registered + [f"smax_{name}" for name in maps]


def _socialjax_names() -> list[str]:
    folder = _package_folder("socialjax")
    return _assigned(folder / "registration.py", "REGISTERED_ENVS") if folder else []


def _make_mpe2(name: str, num_envs: int, workers: int, kwargs: dict[str, Any]) -> HostEnv:
    from codream.envs.pettingzoo import PettingZooEnv

    maker = importlib.import_module(f"mpe2.{name}").parallel_env
    return PettingZooEnv(maker, num_envs, name=f"mpe2:{name}", kwargs=kwargs, workers=workers)


_DEFAULTS: dict[str, dict[str, Any]] = {
    # Without a render mode PettingZoo 1.27 draws nothing, and every observation is one blank image.
    "cooperative_pong": {"render_mode": "rgb_array"},
    "pistonball": {"render_mode": "rgb_array", "continuous": False},
}


def _make_butterfly(name: str, num_envs: int, workers: int, kwargs: dict[str, Any]) -> HostEnv:
    from codream.envs.pettingzoo import PettingZooEnv

    base = name.rpartition("_v")[0]
    try:  # the versioned module warns that it is deprecated, the one behind it does not
        maker = importlib.import_module(f"pettingzoo.butterfly.{base}.{base}").parallel_env
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError(
            f"butterfly:{name} needs {err.name}, which is not installed: {_FAMILIES['butterfly'].install}"
        ) from err
    kwargs = _DEFAULTS.get(base, {}) | kwargs
    return PettingZooEnv(maker, num_envs, name=f"butterfly:{name}", kwargs=kwargs, workers=workers)


def _make_jaxmarl(name: str, num_envs: int, workers: int, kwargs: dict[str, Any]) -> GraphEnv:
    from codream.envs.jaxmarl import make_jaxmarl

    del num_envs, workers  # a graph environment is one copy; its driver maps over copies
    return make_jaxmarl(name, **kwargs)


def _make_socialjax(name: str, num_envs: int, workers: int, kwargs: dict[str, Any]) -> GraphEnv:
    from codream.envs.socialjax import make_socialjax

    del num_envs, workers
    return make_socialjax(name, **kwargs)


_FAMILIES = {
    "mpe2": _Family(_mpe2_names, _make_mpe2, ("mpe2",), "pip install mpe2"),
    "butterfly": _Family(
        _butterfly_names, _make_butterfly, ("pettingzoo", "pygame", "pymunk"), 'pip install "codream[butterfly]"'
    ),
    "jaxmarl": _Family(_jaxmarl_names, _make_jaxmarl, ("jaxmarl",), "pip install jaxmarl", prefix="MPE_"),
    "socialjax": _Family(
        _socialjax_names,
        _make_socialjax,
        ("socialjax",),
        "it is on no package index, so git clone https://github.com/cooperativex/SocialJax and put the folder on "
        "PYTHONPATH",
    ),
}


def _short(name: str, prefix: str = "") -> str:
    """A name without prefix and version, in lower case."""
    return re.sub(r"_v\d+$", "", name.removeprefix(prefix)).lower()


def _version(name: str) -> int:
    found = re.search(r"_v(\d+)$", name)
    return int(found.group(1)) if found else 0


def _resolve(name: str) -> tuple[str, str]:
    """`family:name` as registered, from a name with or without its family, prefix and version."""
    asked_family, _, asked = name.rpartition(":")
    if asked_family and asked_family not in _FAMILIES:
        raise UnknownEnvironment(_unknown(name, f"families are {', '.join(_FAMILIES)}"))
    for family in (asked_family,) if asked_family else _FAMILIES:
        entry = _FAMILIES[family]
        names = entry.names()
        exact = [n for n in names if asked.lower() in (n.lower(), n.removeprefix(entry.prefix).lower())]
        bare = asked.lower().removeprefix(entry.prefix.lower())
        same = exact or [n for n in names if _short(n, entry.prefix) == bare]
        if same:
            return family, max(same, key=_version)
    if asked_family and not _FAMILIES[asked_family].names():
        raise ModuleNotFoundError(f"{name}: {asked_family} is not installed: {_FAMILIES[asked_family].install}")
    raise UnknownEnvironment(_unknown(name))


def _unknown(name: str, hint: str = "") -> str:
    every = available_envs()
    short = {full: _short(full.partition(":")[2], _FAMILIES[full.partition(":")[0]].prefix) for full in every}
    asked = _short(name.rpartition(":")[2], "MPE_")
    nearest = difflib.get_close_matches(asked, list(short.values()), n=5, cutoff=0.5)
    near = sorted((full for full in every if short[full] in nearest), key=lambda full: nearest.index(short[full]))
    rest = [full for full in every if full not in near]
    return (
        f"no environment is called {name!r}"
        + (f" ({hint})" if hint else "")
        + (f"; the nearest: {', '.join(near)}" if near else "")
        + ". One of your own: --env-from MODULE:NAME, in Python env=maker, where maker() returns a PettingZoo "
        f"ParallelEnv. {'Others' if near else 'Those that exist'}: {', '.join(rest)}"
    )
