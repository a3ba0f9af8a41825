"""The tuner's memory: what was measured is kept and never measured twice, within a budget of time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class BudgetError(Exception):
    """The budget is spent."""


class Journal:
    """What was measured, by key: a file of one JSON object a line. Asks for what it does not have, within a budget."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self.path, self.until, self.measured = path, time.monotonic() + budget_s, dict[str, Any]()
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that an interruption cut
                    continue
                self.measured[entry["key"]] = entry["value"]

    def __call__(self, key: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """The value of ``key``, measured if it is not known. Raises BudgetError when there is no time left."""
        name = json.dumps(key)
        if name not in self.measured:
            if time.monotonic() > self.until:
                raise BudgetError
            value = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as log:
                log.write(json.dumps({"key": name, "value": value, "at": round(time.time(), 1)}) + "\n")
            self.measured[name] = json.loads(json.dumps(value))
        return self.measured[name]


def live_runs(journal: Journal) -> int:
    """How many times a server was put under load."""
    return sum(json.loads(key)[0] in ("run", "turn", "limits") for key in journal.measured)
