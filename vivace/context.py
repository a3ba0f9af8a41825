"""The context of a request: columns that a data set knows of the moment and of the user, raw.

``ContextColumns`` says which there are; ``merged`` lays what a request sends over what the store knows of the user and
the clock. Training works out the same clock columns of an event's time with the same function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from vivace.contract import CONTEXT_OF_REQUEST, HOUR, MAX_CONTEXT_BYTES, MAX_ID_BYTES, WEEKDAY, DataSchema

CONTEXT_FILE = "context.json"  # of prepared features, and of a published version
TYPES_GRAPH, CONTEXT_GRAPH = "transform_types.onnx", "transform_context.onnx"  # beside it, where they are read
QUARTER_MS = 15 * 60_000  # clocks of time zones are moved at such moments
SHOWN_NAMES = 8
TRUE_WORDS, FALSE_WORDS = ("true", "True", "TRUE"), ("false", "False", "FALSE")


@dataclass(frozen=True)
class ContextColumns:
    """Columns of the request's moment, in the order of the tensors.

    ``categoricals`` with ``sizes``, how many ids each has, the special ones too; ``continuous``; ``types``: how many
    ids event types have (0: events have no types that differ); ``user_columns``: those that the store knows of a user;
    ``time_zone``: of HOUR and WEEKDAY, "" where there are none; ``crosses``: those of ``categoricals`` that are worked
    out of others; ``shown_types``: event types of items that were only shown.
    """

    categoricals: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    continuous: tuple[str, ...] = ()
    types: int = 0
    user_columns: tuple[str, ...] = ()
    time_zone: str = ""
    crosses: tuple[str, ...] = ()
    shown_types: tuple[str, ...] = ()

    @classmethod
    def of(cls, schema: DataSchema, sizes: tuple[int, ...], types: int) -> ContextColumns:
        return cls(
            schema.context_categoricals, sizes, schema.context_continuous, types, schema.user_columns, schema.time_zone,
            schema.cross_columns, schema.shown_types,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> ContextColumns:
        record: dict[str, Any] = json.loads(path.read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**fields)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @property
    def counted(self) -> list[int]:
        """Places among ``categoricals`` of the columns that live counters go by: all but the clock's and crosses."""
        return [i for i, name in enumerate(self.categoricals) if name not in (HOUR, WEEKDAY, *self.crosses)]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.categoricals, *self.continuous)

    @property
    def plain(self) -> tuple[str, ...]:
        """The categorical columns that are no crosses."""
        return tuple(name for name in self.categoricals if name not in self.crosses)

    @property
    def sent(self) -> tuple[str, ...]:
        """Columns that a request may name."""
        return (*self.plain, *self.continuous)


def zone(name: str) -> tzinfo:
    """The time zone ``name``: of the IANA database, or an offset such as "+02:00"."""
    if name == "UTC":
        return UTC
    if name[:1] in "+-":
        hours, minutes = int(name[1:3]), int(name[4:6])
        return timezone((1 if name[0] == "+" else -1) * timedelta(hours=hours, minutes=minutes))
    return ZoneInfo(name)


@lru_cache(4096)
def _clock(quarter: int, name: str) -> tuple[int, int]:
    at = datetime.fromtimestamp(quarter * QUARTER_MS / 1000, zone(name))
    return at.hour, at.weekday()


def clock(times_ms: np.ndarray, time_zone: str) -> dict[str, np.ndarray]:
    """HOUR "0".."23" and WEEKDAY "0" (Monday).."6" of moments int64 [n] in Unix ms, object [n] each."""
    quarters, place = np.unique(np.asarray(times_ms, np.int64) // QUARTER_MS, return_inverse=True)
    parts = np.array([_clock(int(q), time_zone) for q in quarters], np.int64).reshape(-1, 2)
    return {name: parts[:, i].astype(str).astype(object)[place] for i, name in enumerate((HOUR, WEEKDAY))}


def spelled(text: str) -> str:
    """A category as the data's readers spell it: true and false have one spelling."""
    return "true" if text in TRUE_WORDS else "false" if text in FALSE_WORDS else text


def category_text(value: Any) -> str:
    """A JSON value as the data's readers spell it: "" for null, "3" for 3 and 3.0, "true" for true and for "True".
    Raises TypeError for a list or an object."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int | str):
        return spelled(str(value).strip())
    raise TypeError(type(value).__name__)


def number(value: Any) -> float:
    """A JSON value as a number, NaN for null and for what is infinite. Raises TypeError or ValueError for another."""
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(type(value).__name__)
    as_number = float(value)
    return as_number if math.isfinite(as_number) else math.nan


def parse_context(raw: bytes, columns: ContextColumns) -> tuple[dict[str, str | float], list[str]]:
    """(value of each column that a request's CONTEXT names, the names that are no columns). Raises ValueError for what
    is no JSON object of such values."""
    name = CONTEXT_OF_REQUEST.name
    if not raw:
        return {}, []
    if len(raw) > MAX_CONTEXT_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_CONTEXT_BYTES} bytes, got {len(raw)}; send fewer columns")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        example = '{"device": "phone"}'
        raise ValueError(f"{name}: expected JSON such as {example}, got {raw[:60]!r}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(record).__name__} {raw[:60]!r}")
    return checked(record, columns, name)


def checked(record: Mapping[str, Any], columns: ContextColumns, where: str) -> tuple[dict[str, str | float], list[str]]:
    """The same of an object that was read. ``where``: what errors call it."""
    values: dict[str, str | float] = {}
    unknown = [key for key in record if key not in columns.sent]
    for key in record.keys() - set(unknown):
        kind = "a number" if key in columns.continuous else "a text, a number, true or false"
        try:
            values[key] = number(record[key]) if key in columns.continuous else category_text(record[key])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: {key}: expected {kind} or null, got {record[key]!r:.60}") from None
        try:
            str(values[key]).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {key}: expected text that UTF-8 can hold, got {record[key]!r:.60}") from None
        if len(str(values[key])) > MAX_ID_BYTES:
            raise ValueError(f"{where}: {key}: expected at most {MAX_ID_BYTES} characters, got {len(str(values[key]))}")
    return values, unknown


def unknown_names(unknown: Sequence[str], columns: ContextColumns) -> str:
    """Why part of a request's CONTEXT was left out, as a reason of STATUS; "" where nothing was."""
    if not unknown:
        return ""
    shown = ", ".join(repr(n[:40]) for n in sorted(unknown)[:SHOWN_NAMES])
    known = ", ".join(columns.sent[:SHOWN_NAMES]) + (", …" if len(columns.sent) > SHOWN_NAMES else "")
    there = f"it has {known}" if known else "it has none"
    return f"{CONTEXT_OF_REQUEST.name}: this run has no column {shown}; {there}"
