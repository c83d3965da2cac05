"""Dataclasses from plain data, such as JSON, and flat. Every value is checked against its annotation; nothing runs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, TypeVar

__all__ = ["build", "changes", "check", "flat"]

T = TypeVar("T")


def build(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping; dataclasses in its fields are read in turn.

    Fields that are missing keep their defaults. Raises ValueError, with the field's path, for a field that does not
    exist (naming the nearest) and for a value of another type than the annotation's.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected {path.rstrip('.') or cls.__name__} as a JSON object, got {_shown(values)}")
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3)
            raise ValueError(
                f"unknown option {path}{name}; "
                + (f"nearest: {', '.join(near)}" if near else f"options: {', '.join(fields)}")
            )
    hints = _hints(cls)
    return cls(**{name: _value(hints[name], value, f"{path}{name}") for name, value in values.items()})


def check(instance: Any, path: str = "") -> None:
    """Raises ValueError, with the field's path, for a value in the dataclass that is not of its annotation's type."""
    hints = _hints(type(instance))
    for field in dataclasses.fields(instance):
        hint, value, place = hints[field.name], getattr(instance, field.name), f"{path}{field.name}"
        if not dataclasses.is_dataclass(hint):
            _value(hint, value, place)
        elif isinstance(value, typing.cast(type, hint)):
            check(value, f"{place}.")
        else:
            raise ValueError(f"expected {place} to be a {typing.cast(type, hint).__name__}, got {_shown(value)}")


_hints = functools.cache(typing.get_type_hints)


def changes(before: Any, after: Any, free: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """The fields, as `flat` names them, in which two of one dataclass differ, but for those that are free to."""
    old, new = flat(before), flat(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name] and name not in free}


def flat(config: Any) -> dict[str, Any]:
    """The fields of a dataclass by name; those of a dataclass in it as `outer.inner`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{inner}": one for inner, one in flat(value).items()}
        else:
            found[field.name] = value
    return found


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{path}.")
    if hint is Any:
        return value
    kind = typing.get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
        return _value(hint, value, path)
    if kind is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_value(item, one, f"{path}[{i}]") for i, one in enumerate(value))
        raise ValueError(f"expected {path} to be a list, got {_shown(value)}")
    if kind is Literal:
        if any(value == one and type(value) is type(one) for one in typing.get_args(hint)):
            return value
        raise ValueError(f"expected {path} to be one of {', '.join(typing.get_args(hint))}, got {_shown(value)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is dict and isinstance(value, dict):
        return {name: _value(typing.get_args(hint)[1], one, f"{path}[{name!r}]") for name, one in value.items()}
    wanted = kind or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"expected {path} to be {_NAMES.get(wanted, wanted.__name__)}, got {_shown(value)}")
    return value


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a JSON object"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
