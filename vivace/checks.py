"""Checks of a config dataclass when it is made: a wrong value is refused with the values there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
}


def check_fields(config: Any, options: Mapping[str, str] | None = None) -> None:
    """Compares every field with its annotation: ``Literal`` and tuples of it, int, float, str, bool.

    Raises ValueError that names the field (or the option of the command line that set it, by ``options``), what it may
    be and what came."""
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        where = (options or {}).get(name, f"{type(config).__name__}.{name}")
        if get_origin(annotation) is Literal:
            if value not in get_args(annotation):
                raise ValueError(f"{where}: expected one of {list(get_args(annotation))}, got {value!r}")
        elif get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is Literal:
            choices = get_args(get_args(annotation)[0])
            if isinstance(value, str) or any(v not in choices for v in value):
                raise ValueError(f"{where}: expected some of {list(choices)}, got {value!r}")
        elif annotation in _KINDS:
            kind, words = _KINDS[annotation]
            is_bool = isinstance(value, bool) and annotation is not bool  # True is an int to Python
            if is_bool or not isinstance(value, kind) or (annotation is float and not math.isfinite(value)):
                raise ValueError(f"{where}: expected {words}, got {value!r}")


def check_shares(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is no share or probability, 0 <= x < 1."""
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{type(config).__name__}.{name}: expected 0 <= x < 1, got {value}")


def check_minimum(config: Any, minimum: float, *names: str) -> None:
    """Raises ValueError for a field below ``minimum``."""
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ValueError(f"{type(config).__name__}.{name}: expected at least {minimum}, got {value}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not above zero."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{type(config).__name__}.{name}: expected a number above 0, got {value}")
