"""JSON that people write: what readers of JSON accept in silence is refused."""

from __future__ import annotations

import json
from typing import Any


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected each key once, got {', '.join(map(repr, twice))} several times; leave one of each")
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"expected finite numbers, got {text}")


def strict_json(text: str) -> Any:
    """The value that ``text`` holds. Raises ValueError for what is no JSON, for a key that comes twice in an object, of
    which Python would take the last, and for NaN and Infinity, which are no JSON."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(
            "expected values nested a few times, got brackets in brackets beyond what Python reads"
        ) from None
