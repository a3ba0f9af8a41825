"""Checks of a config dataclass when it is made: a wrong value is refused with the values there are."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
}
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, both among them unless ``above`` (the first is not) or ``below`` (the last is
    not): ``Annotated[int, Range(1, 9)]``."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        low = self.least < value if self.above else self.least <= value  # NaN is in no range
        return bool(low and (value < self.most if self.below else value <= self.most))

    def __str__(self) -> str:
        return f"{self.least:,} {'<' if self.above else '<='} x {'<' if self.below else '<='} {self.most:,}"


Size = Annotated[int, Range(1, 2**20)]
"""Of a model, a batch or what is kept, and epochs: 1 to about a million."""
SizeOrNone = Annotated[int, Range(0, 2**20)]
"""The same, 0 for none."""
Whole = Annotated[int, Range(0, 2**31 - 1)]
"""Steps, epochs, events or seconds, from 0."""
Share = Annotated[float, Range(0, 1, below=True)]
"""A share or probability below 1."""
Amount = Annotated[float, Range(0, 1e9)]
"""A number from 0."""
Positive = Annotated[float, Range(0, 1e9, above=True)]
"""A number above 0."""


def _check_number(where: str, value: Any, annotation: Any, within: Range | None) -> None:
    kind, words = _KINDS[annotation]
    is_bool = isinstance(value, bool) and annotation is not bool  # True is an int to Python
    fits = isinstance(value, kind) and not is_bool
    if fits and within is not None:
        fits, words = value in within, f"{words}, {within}"
    elif fits and annotation is float:
        fits = -sys.float_info.max <= value <= sys.float_info.max
    if not fits:
        raise ValueError(f"{where}: expected {words}, got {_SHOWN.repr(value)}")


def check_fields(config: Any, options: Mapping[str, str] | None = None) -> None:
    """Compares every field with its annotation: ``Literal`` and tuples of it, int, float, str, bool, numbers within a
    ``Range`` (``Annotated``), and dataclasses.

    Raises ValueError that names the field (or the option of the command line that set it, by ``options``), what it may
    be and what came."""
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        where = (options or {}).get(name, f"{type(config).__name__}.{name}")
        within = None
        if get_origin(annotation) is Annotated:
            annotation, within = get_args(annotation)[:2]
        if get_origin(annotation) is Literal:
            if value not in get_args(annotation):
                raise ValueError(f"{where}: expected one of {list(get_args(annotation))}, got {_SHOWN.repr(value)}")
        elif get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is Literal:
            choices = get_args(get_args(annotation)[0])
            if isinstance(value, str) or any(v not in choices for v in value):
                raise ValueError(f"{where}: expected some of {list(choices)}, got {value!r}")
        elif annotation in _KINDS:
            _check_number(where, value, annotation, within)
        elif isinstance(annotation, type) and is_dataclass(annotation) and not isinstance(value, annotation):
            raise ValueError(f"{where}: expected {annotation.__name__}, got {_SHOWN.repr(value)}")


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
