"""What became of the rows that were read: rejected ones and changed ones by reason, with where they are and what they
held. A bad row is never dropped silently and never a crash."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from preprocessing.readers.base import DETAIL, REASON, Chunk
from vivace.contract import SOURCE_ROW

MALFORMED = "malformed row"
NEARLY_ALL = 0.9  # of the rows of a table rejected for one reason: the mapping is wrong, not the rows
CHANGES_KEPT = 1000  # changed rows of one reason that are written down
HEADER = "table,file,row,reason,record\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value.item() if isinstance(value, np.generic) else value


def _json(record: dict[str, Any]) -> str:
    return json.dumps({k: _plain(v) for k, v in record.items()}, ensure_ascii=False, default=str)


def _shown(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column that Python can hold: times as text, or as their number where no calendar has them."""
    if not pa.types.is_temporal(column.type):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return column.cast(pa.int64() if column.type.bit_width == 64 else pa.int32())


@dataclass
class Rejects:
    """Collects rejected and changed rows; ``counts`` and ``changed`` by (table, reason), ``read`` by table.

    Rejected rows are written to ``path`` and the first changed ones of each reason to ``changes_path``, as CSV: table,
    file, row, reason, record (JSON of the row as the file has it, or of its typed columns where a reader has no file).
    ``row`` is the line of a CSV file, whose header is 1, or the row of a Parquet file, from 1.
    """

    path: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _first: dict[tuple[str, str], str] = field(default_factory=dict)
    _files: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(HEADER)
        self.changes_path.write_text(HEADER)

    @property
    def changes_path(self) -> Path:
        return self.path.with_name("changed.csv")

    def take(self, table: str, chunk: Chunk) -> None:
        """Counts the rows of a chunk, and what its reader rejected, changed and has to say."""
        self.read[table] += chunk.read
        self.notes.extend(note for note in chunk.notes if note not in self.notes)
        if chunk.file:
            files = self._files.setdefault(table, [])
            if not files or files[-1] != (chunk.base, chunk.file):
                files.append((chunk.base, chunk.file))
        if chunk.malformed is not None and REASON not in chunk.malformed:
            self.add(table, MALFORMED, chunk.malformed)
        elif chunk.malformed is not None:
            for reason, rows in chunk.malformed.groupby(REASON, sort=False):
                self.add(table, str(reason), rows.drop(columns=[REASON]).rename(columns={DETAIL: "why"}))
        for reason, places in chunk.changed.items():
            kept = CHANGES_KEPT - self.changed[table, reason]
            self.changed[table, reason] += len(places)
            if kept > 0:
                frame = chunk.rows.iloc[places[:kept]]
                self._write(self.changes_path, table, reason, frame, self._records(frame, chunk, places[:kept]))

    def add(self, table: str, reason: str, frame: pd.DataFrame, chunk: Chunk | None = None) -> None:
        """Rejects the rows ``frame``, whose index is their place in ``chunk``."""
        if frame.empty:
            return
        self.counts[table, reason] += len(frame)
        records = self._records(frame, chunk, frame.index.to_numpy())
        names, rows = self._write(self.path, table, reason, frame, records)
        self._first.setdefault((table, reason), f"{names[0]} row {rows[0]}: {records[0]}".strip())

    def _records(self, frame: pd.DataFrame, chunk: Chunk | None, places: np.ndarray) -> list[str]:
        if chunk is not None and chunk.original is not None:
            rows = chunk.original.take(places)
            return [_json(r) for r in pa.table({n: _shown(rows[n]) for n in rows.column_names}).to_pylist()]
        records = frame.drop(columns=[SOURCE_ROW], errors="ignore").astype(object)
        return [_json(r) for r in records.where(records.notna(), None).to_dict("records")]

    def _write(
        self, path: Path, table: str, reason: str, frame: pd.DataFrame, records: list[str]
    ) -> tuple[list[str], list[int]]:
        source = frame[SOURCE_ROW].tolist() if SOURCE_ROW in frame else [-1] * len(frame)
        names, rows = zip(*(self._place(table, int(row)) for row in source), strict=True)
        out = pd.DataFrame({"table": table, "file": names, "row": rows, "reason": reason, "record": records})
        out.to_csv(path, mode="a", header=False, index=False, errors="replace")
        return list(names), list(rows)

    def _place(self, table: str, row: int) -> tuple[str, int]:
        """(file, row in it) of a SOURCE_ROW."""
        files = self._files.get(table, [])
        i = bisect.bisect_left([base for base, _ in files], row) - 1
        return (files[i][1], row - files[i][0]) if i >= 0 else ("", row)

    def refuse_nearly_all(self, table: str, hints: dict[str, str]) -> None:
        """Raises ValueError where nearly all rows of ``table`` were rejected for one of the reasons ``hints``, which
        says what to do."""
        for reason, hint in hints.items():
            count, read = self.counts[table, reason], self.read[table]
            if count > NEARLY_ALL * read:
                raise ValueError(
                    f"{table}: {count:,} of {read:,} rows were rejected for one reason: {reason}; the first: "
                    f"{self._first[table, reason]}; {hint} (all are in {self.path})"
                )

    def summary(self) -> dict[str, int]:
        return {f"{table}: {reason}": n for (table, reason), n in sorted(self.counts.items())}

    def changes(self) -> dict[str, int]:
        return {f"{table}: {reason}": n for (table, reason), n in sorted(self.changed.items())}
