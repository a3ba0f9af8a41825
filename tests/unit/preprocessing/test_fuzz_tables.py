"""Random tables come back as they were written, from CSV and from Parquet."""

from __future__ import annotations

from benchmarks.fuzz_tables import fuzz


def test_random_tables_come_back_as_written():
    assert fuzz(seed=0, go_on=lambda cases: cases < 25)["rows"] > 500
