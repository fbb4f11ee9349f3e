"""Values that people write into files and options: their types and bounds, and errors that name where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from math import isfinite, isnan
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from spvla.errors import InputError

NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    NoneType: "null",
}
FAILURES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)


@contextmanager
def naming(where: object, *more: type[Exception]) -> Iterator[None]:
    """Whatever reading or building from a user's values raises becomes an :class:`InputError` that begins with ``where``.

    Args:
        where: a file, an option, ...
        more: exceptions beside :data:`FAILURES`.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}", code=error.code, field=error.field or str(where)) from None
    except Exception as error:
        if not isinstance(error, FAILURES + more):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{where}: {kind}{' '.join(str(error).split())}") from error


def check_values(
    values: Mapping[str, Any],
    types: Mapping[str, Any],
    at_least: Mapping[str, float] | None = None,
    infinite: tuple[str, ...] = (),
    at_most: Mapping[str, float] | None = None,
) -> None:
    """Check ``values`` by name against type annotations, as far as both have the name.

    Args:
        values: as JSON, YAML or Python gives them; lists and arrays pass for tuples. Numbers must be finite.
        types: annotations; what is neither a number, text, list nor map is checked as a class.
        at_least: lower bounds of numbers, and of those in lists.
        infinite: names of numbers that may be infinite, though never NaN.
        at_most: upper bounds of numbers, and of those in lists.

    Raises:
        InputError: names the first value that does not fit, and what would.
    """
    for name in [n for n in types if n in values]:
        value = values[name]
        if not _fits(value, types[name], name in infinite):
            raise InputError(f"{name} must be {_say(types[name])}, got {_short(value)}")
        least = (at_least or {}).get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if least is not None and any(v < least for v in numbers if v is not None):
            raise InputError(f"{name} must be at least {least}, got {_short(value)}")
        most = (at_most or {}).get(name)
        if most is not None and any(v > most for v in numbers if v is not None):
            raise InputError(f"{name} must be at most {most}, got {_short(value)}", code="too-large", field=name)


def check_fields(
    config: Any,
    at_least: Mapping[str, float] | None = None,
    infinite: tuple[str, ...] = (),
    at_most: Mapping[str, float] | None = None,
) -> None:
    """:func:`check_values` of a frozen dataclass's fields; lists become tuples where the annotation says so."""
    types = _types(config.__class__)
    check_values(vars(config), types, at_least, infinite, at_most)
    for name, hint in types.items():
        value = getattr(config, name)
        if isinstance(value, list | np.ndarray) and any(get_origin(h) is tuple for h in (hint, *get_args(hint))):
            object.__setattr__(config, name, _tuple(value))


def check_options(factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """:func:`check_values` of keyword arguments, where ``factory`` has annotations."""
    try:
        types = get_type_hints(factory)
    except (NameError, TypeError):  # names that only a type checker imports
        return
    check_values(options, types)


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _tuple(value: Any) -> Any:
    """Nested lists as nested tuples."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any, infinite: bool) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, h, infinite) for h in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (tuple, list):
        if not isinstance(value, list | tuple | np.ndarray):
            return False
        items = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        return len(value) == len(items) and all(_fits(v, h, infinite) for v, h in zip(value, items, strict=True))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, args[0], infinite) and _fits(v, args[1], infinite) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and (not isnan(value) if infinite else isfinite(value))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _say(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_say, args))
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin in (tuple, list):
        return f"a list ({', '.join('...' if h is ... else _say(h) for h in args)})"
    if origin in (dict, Mapping):
        return "a map of maps" if get_origin(args[1]) is dict else "a map"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
