"""The last line of a measurement is JSON that anyone can read, and says where it was measured."""

from __future__ import annotations

import json

import numpy as np

from loadtest.reports.record import record_line


def test_the_line_is_strict_json_with_the_environment():
    line = record_line("b", p99=float("inf"), runs=[{"ms": float("nan")}, (1.5, float("-inf"))], n=np.int64(3))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert "\n" not in line and record["benchmark"] == "b"
    assert record["p99"] is None and record["runs"] == [{"ms": None}, [1.5, None]]
    assert {"commit", "date", "cpu", "cores", "gpu", "versions"} <= set(record)
