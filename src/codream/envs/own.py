"""Environments of one's own: by the place where Python finds them (MODULE:NAME, as the command line is given them), and
copies of those that are objects."""

from __future__ import annotations

import copy
import difflib
import importlib
import re
import site
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from codream.envs import EnvSpec, HostEnv
from codream.envs.registry import UnknownEnvironment

__all__ = ["apart", "found_at", "maker", "own_copies", "place_of", "raised_at"]

_FOUND: dict[int, tuple[str, Any]] = {}
"""What was found where, by identity: an instance, a lambda or a partial does not know its own place. Kept, so that
no other object gets the same number."""


def maker(place: str) -> Any:
    """NAME in MODULE, a class or function that makes an environment, for the `place` "MODULE:NAME". MODULE is imported
    as Python would from the current folder, or from PYTHONPATH.

    `place_of` remembers what was found. Raises UnknownEnvironment where there is no such place; what MODULE itself
    raises passes.
    """
    name, _, attribute = place.partition(":")
    if not name or not attribute or name.endswith(".py"):
        raise UnknownEnvironment(
            f"expected MODULE:NAME, e.g. my_envs:Meeting for the class Meeting in my_envs.py, got {place!r}"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # `python -m` has it there, a command does not
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name is None or not f"{name}.".startswith(f"{err.name}."):
            raise  # something that MODULE imports
        raise UnknownEnvironment(
            f"{place}: Python finds no module {err.name}; it looks in {here} and on PYTHONPATH"
        ) from err
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=3)
            raise UnknownEnvironment(
                f"{place}: {getattr(module, '__file__', name)} has no {attribute}"
                + (f"; the nearest: {', '.join(near)}" if near else "")
            )
        found = getattr(found, part)
    found_at(found, place)
    return found


def found_at(env: Any, place: str | None) -> None:
    """Have `place_of` remember where this was found, e.g. by the process that it came from."""
    if place is not None:
        _FOUND[id(env)] = (place, env)


def apart(env: Any) -> Any:
    """For playing on the same environment beside whoever else plays on it: of a PettingZoo environment that is an
    object, also with its copies as `make_env` makes them, what makes more of it; anything else, which makes new ones
    or holds no state, as it is.

    Raises TypeError where it cannot be copied.
    """
    if env is None:
        return env
    from codream.envs.pettingzoo import Again, PettingZooEnv  # which takes a while to import

    if isinstance(env, PettingZooEnv):
        return Again(env)
    if own_copies(env):
        return env
    if isinstance(env, type) or not hasattr(env, "possible_agents") or not hasattr(env, "reset"):
        return env
    try:
        first = [copy.deepcopy(env)]
    except Exception as err:
        raise TypeError(
            f"the environment {type(env).__name__} cannot be deep-copied ({err}), so nothing else can be played on it; "
            "pass its class or a function that makes one"
        ) from err

    def copied() -> Any:
        return first.pop() if first else copy.deepcopy(env)

    copied.__qualname__ = f"a copy of {type(env).__name__}"
    return copied


def own_copies(env: Any) -> bool:
    """Whether this is an object that steps copies of its own: a `HostEnv`."""
    return isinstance(env, HostEnv) and isinstance(env.spec, EnvSpec)  # PettingZoo's have a `spec` of another kind


def place_of(env: Any) -> str | None:
    """MODULE:NAME where `maker` would find this class or function, or found this object; None for all else, and for
    what belongs to a script, a notebook or another function."""
    module, name = getattr(env, "__module__", None), getattr(env, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and module != "__main__":
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is env:
            return f"{module}:{name}"
    return _FOUND[id(env)][0] if id(env) in _FOUND else None


def raised_at(err: BaseException) -> str | None:
    """Where in an environment's own code an error began, as `FILE:LINE, in FUNCTION: CODE`; None where no code but
    codream's and that of the libraries below it took part.

    Of another process's error the traceback is a note (`codream.envs.workers`). Code that is not installed goes before
    installed code: what a library was given is what its caller can mend.
    """
    while type(err).__module__.startswith("codream") and err.__cause__ is not None:
        err = err.__cause__
    if type(err).__module__.startswith("codream"):
        return None
    told = "".join([*traceback.format_tb(err.__traceback__), *getattr(err, "__notes__", [])])
    own = [found for found in _FRAME.findall(told) if not _is_below(found[0])]
    own = [found for found in own if not _is_in(found[0], _INSTALLED)] or own
    if not own:
        return None
    file, line, function, code = own[-1]
    return f"{file}:{line}, in {function}" + (f": {code}" if code else "")


_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)\n(?:    (.*)\n)?', re.MULTILINE)
_PATHS = sysconfig.get_paths()
_INSTALLED = {_PATHS["purelib"], _PATHS["platlib"], *site.getsitepackages(), site.getusersitepackages()}
_CODREAM = str(Path(__file__).parents[1])
_BELOW = ("pettingzoo", "gymnasium", "numpy", "jaxtyping", "beartype")
"""They only hand on what an environment or codream gives them."""


def _is_below(file: str) -> bool:
    below = {_CODREAM} | {str(Path(folder) / name) for folder in _INSTALLED for name in _BELOW}
    standard = _is_in(file, {_PATHS["stdlib"]}) and not _is_in(file, _INSTALLED)
    return file.startswith("<") or standard or _is_in(file, below)


def _is_in(file: str, folders: set[str]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)
