"""The last line of a measurement: one JSON object that says what was measured, and where."""

from __future__ import annotations

import json
import math
from typing import Any

from vivace.manifest import environment, plain


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON does not know: infinity, not a number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def record_line(benchmark: str, **values: Any) -> str:
    """One line of JSON: the benchmark's name, ``values``, and the environment (commit, date, processor, versions)."""
    return json.dumps({"benchmark": benchmark, **finite(plain(values)), **environment()}, allow_nan=False)
