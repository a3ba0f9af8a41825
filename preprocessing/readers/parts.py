"""Chunks of one file of a table, CSV or Parquet, with its columns as Arrow has them and then as we want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing import arrow_types
from preprocessing.item_lists import object_column
from preprocessing.item_rows import list_values
from preprocessing.readers import csv_rows
from preprocessing.readers.base import CHUNK_ROWS, DETAIL, LINE, REASON, Chunk
from preprocessing.readers.csv_rows import ENCODING, CsvFile, Malformed
from preprocessing.readers.mapping import Section
from vivace.context import FALSE_WORDS, TRUE_WORDS
from vivace.contract import SOURCE_ROW

UNREADABLE, NOT_FINITE = (
    "unreadable number in {}, taken as missing",
    "number that is not finite in {}, taken as missing",
)
BLANKS, BOOLEAN_WORDS = "blanks around {} removed", "{} spelled as true or false"
TIDIED = "blanks, empty parts or repeats in {} removed"
SEPARATORS = (",", ";", "|", "/")  # one of these in most texts of a list column, and not its own: the wrong one is set
_PARQUET_MAGIC = b"PAR1"


@dataclass
class Part:
    """Rows ``table`` [n] of ``file``; ``lines`` [n] are their lines (CSV, the header is 1) or rows (Parquet, from 1).

    ``changed`` and ``notes`` grow as columns are read.
    """

    section: Section
    file: Path
    table: pa.Table
    lines: np.ndarray
    malformed: list[Malformed] = field(default_factory=list)
    changed: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def where(self, column: str) -> str:
        return f"{self.file}: column {column!r}"

    def array(self, column: str) -> pa.Array:
        """A column with the mapping's words for a missing value as null."""
        array = arrow_types.plain(self.table[column])
        if self.section.missing and arrow_types.is_text(array.type):
            words = pa.array(self.section.missing, array.type)
            missing = pc.is_in(pc.utf8_trim_whitespace(array), value_set=words)
            array = pc.if_else(missing, pa.scalar(None, array.type), array)
        return array

    def change(self, reason: str, mask: np.ndarray) -> None:
        if mask.any():
            self.changed[reason] = np.union1d(self.changed.get(reason, np.zeros(0, np.int64)), np.flatnonzero(mask))

    def text(self, column: str) -> pd.Series:
        """A column as text, None where missing."""
        return arrow_types.to_series(arrow_types.text(self.array(column), self.where(column)))

    def ids(self, column: str) -> pd.Series:
        """Ids: text without blanks around it, None where nothing is left."""
        array = self.array(column)
        if pa.types.is_floating(array.type) and len(array):
            high = pc.max(pc.abs(array)).as_py()
            if high is not None and arrow_types.EXACT_FLOAT <= high < float("inf"):
                self.notes.append(f"{self.where(column)}: ids are floats above 2^53, which cannot hold them exactly")
        return self._stripped(column, arrow_types.ids(array, self.where(column)))

    def category(self, column: str) -> pd.Series:
        """The same of a category; true and false have one spelling."""
        array = arrow_types.text(self.array(column), self.where(column))
        for word, spellings in (("true", TRUE_WORDS), ("false", FALSE_WORDS)):
            other = pc.is_in(array, value_set=pa.array(spellings[1:], array.type))
            if pc.any(other).as_py():
                self.change(BOOLEAN_WORDS.format(column), other.to_numpy(zero_copy_only=False))
                array = pc.if_else(other, word, array)
        return self._stripped(column, array)

    def _stripped(self, column: str, array: pa.Array) -> pd.Series:
        stripped = pc.utf8_trim_whitespace(array)
        moved = pc.and_(pc.not_equal(stripped, array), pc.not_equal(stripped, ""))
        self.change(BLANKS.format(column), pc.fill_null(moved, False).to_numpy(zero_copy_only=False))
        empty = pc.fill_null(pc.equal(stripped, ""), True)
        return arrow_types.to_series(pc.if_else(empty, pa.scalar(None, stripped.type), stripped))

    def lists(self, column: str, separator: str) -> pd.Series:
        """Values of each row (``item_rows.list_values``), from lists or from texts whose values ``separator`` parts."""
        array, where = self.array(column), self.where(column)
        if arrow_types.is_list(array.type):
            cells = self._list_cells(array, where)
        else:
            cells = arrow_types.text(array, where).to_pylist()
            self._doubt_separator(cells, where, separator)
        values = [list_values(cell, where, separator) for cell in cells]
        tidied = [_is_tidied(cell, of, separator) for cell, of in zip(cells, values, strict=True)]
        self.change(TIDIED.format(column), np.array(tidied, bool))
        return pd.Series(object_column(values))

    def _list_cells(self, array: pa.Array, where: str) -> list[list[str | None]]:
        inner = arrow_types.plain(array.flatten())
        if arrow_types.is_binary(inner.type):
            inner, _ = arrow_types.decoded(inner, False)
        values = arrow_types.text(inner, where).to_pylist()
        missing, at, cells = set(self.section.missing), 0, list[list[str | None]]()
        for length in pc.list_value_length(array).to_pylist():
            row = values[at : at + (length or 0)]
            at += length or 0
            cells.append([None if v is not None and v.strip() in missing else v for v in row])
        return cells

    def _doubt_separator(self, cells: list[str | None], where: str, separator: str) -> None:
        """A note where no text has the separator and most have the same other one."""
        known = [cell for cell in cells if cell and cell.strip()]
        if not known or any(separator in cell for cell in known):
            return
        for other in SEPARATORS:
            if sum(other in cell for cell in known) > len(known) / 2:
                self.notes.append(
                    f"{where}: no value has the separator {separator!r}, most have {other!r}: set separator in "
                    f"[{self.section.name}]"
                )

    def numbers(self, column: str) -> np.ndarray:
        """float64 [n], NaN where missing; what is no number or not finite is counted as a change."""
        values, unreadable, not_finite = arrow_types.numbers(
            self.array(column), self.where(column), self.section.decimal
        )
        self.change(UNREADABLE.format(column), unreadable)
        self.change(NOT_FINITE.format(column), not_finite)
        return values

    def times(self, column: str) -> np.ndarray:
        section = self.section
        return arrow_types.times_ms(self.array(column), section.unit, section.zone, self.where(column), section.decimal)

    def chunk(self, rows: pd.DataFrame, base: int) -> Chunk:
        """``rows`` of this part for the reader to yield; SOURCE_ROW is set."""
        rows[SOURCE_ROW] = base + self.lines
        bad = pd.DataFrame(
            [(m.text, base + m.line, m.reason, m.detail) for m in self.malformed],
            columns=[LINE, SOURCE_ROW, REASON, DETAIL],
        )
        return Chunk(rows, bad if len(bad) else None, self.file.name, base, self.table, self.changed, tuple(self.notes))

    def last_line(self) -> int:
        return max([0, *self.lines[-1:].tolist(), *(m.line for m in self.malformed)])


def _is_tidied(cell: str | list[str | None] | None, values: list[str], separator: str) -> bool:
    """Whether ``values`` are not all that a cell of a list column held; one without any is as it was."""
    parts = cell.split(separator) if isinstance(cell, str) and cell.strip() else cell
    return isinstance(parts, list) and sorted("" if part is None else part for part in parts) != values


def is_parquet(file: Path) -> bool:
    if file.suffix in (".parquet", ".pq"):
        return True
    with file.open("rb") as stream:
        return stream.read(4) == _PARQUET_MAGIC


def parts(section: Section, file: Path, columns: list[str]) -> Iterator[Part]:
    """Chunks of ``columns`` of a file; one of no row and a note for a file without content.

    Raises ValueError that names the file where it cannot be read or has not these columns.
    """
    try:
        if file.stat().st_size == 0:
            yield _empty(section, file, columns)
        elif is_parquet(file):
            yield from _parquet_parts(section, file, columns)
        else:
            yield from _csv_parts(section, file, columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{file}: expected a table with the columns {columns}; {error}") from error
    except csv_rows.READ_ERRORS as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def _empty(section: Section, file: Path, columns: list[str]) -> Part:
    table = pa.table({name: pa.nulls(0, pa.large_string()) for name in columns})
    return Part(section, file, table, np.zeros(0, np.int64), notes=[f"{file.name} is empty: skipped"])


def _check_columns(section: Section, file: Path, columns: list[str], there: list[str], hint: str = "") -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        near = {n: [t for t in there if t.strip().casefold() == n.strip().casefold()] for n in missing}
        close = "".join(f"; is {n!r} the column {t[0]!r}?" for n, t in near.items() if t)
        raise ValueError(f"{file}: [{section.name}] no column {_listed(missing)}; its columns are {there}{close}{hint}")
    twice = [name for name in columns if there.count(name) > 1]
    if twice:
        raise ValueError(f"{file}: [{section.name}] the column {_listed(twice)} is there more than once; rename one")


def _listed(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names)


def _csv_parts(section: Section, file: Path, columns: list[str]) -> Iterator[Part]:
    source = CsvFile(file, section.form(file))
    try:
        if not source.header:
            yield _empty(section, file, columns)
            return
        likely = csv_rows.likely_delimiter(source.header)
        hint = f"; the delimiter is probably {likely!r}: set delimiter = {_toml(likely)} in [{section.name}]"
        _check_columns(section, file, columns, source.header, hint if likely else "")
        for rows in source.rows(CHUNK_ROWS):
            fields = csv_rows.columns_of(rows, source.header, columns)
            table = pa.table({name: pa.array(values, pa.large_string()) for name, values in fields.items()})
            yield Part(section, file, table, np.array(rows.lines, np.int64), rows.malformed)
    finally:
        source.close()


def _toml(text: str | None) -> str:
    return '"\\t"' if text == "\t" else f'"{text}"'


def _parquet_parts(section: Section, file: Path, columns: list[str]) -> Iterator[Part]:
    with pq.ParquetFile(file) as parquet:
        _check_columns(section, file, columns, parquet.schema_arrow.names)
        uuids = {name: _holds_uuids(parquet, name) for name in columns}
        first = 1
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
            arrays, bad = {}, np.zeros(batch.num_rows, bool)
            for name in columns:
                arrays[name], undecoded = arrow_types.decoded(batch.column(name), uuids[name])
                bad |= undecoded
            table, lines = pa.table(arrays), np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            faults = []
            if bad.any():
                records = table.filter(pa.array(bad)).to_pylist()
                faults = [Malformed(int(n), str(r), ENCODING, "not UTF-8")
                          for n, r in zip(lines[bad], records, strict=True)]  # fmt: skip
                table, lines = table.filter(pa.array(~bad)), lines[~bad]
            yield Part(section, file, table, lines, faults)


def _holds_uuids(parquet: pq.ParquetFile, name: str) -> bool:
    """Whether the binary column holds UUIDs: by its own type, or as all its values do (see ``arrow_types``)."""
    kind = parquet.schema_arrow.field(name).type
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not arrow_types.is_binary(kind):
        return False
    for i in range(len(parquet.schema)):
        column = parquet.schema.column(i)
        if column.path == name and column.logical_type.type == "UUID":
            return True
    values = [b.column(0) for b in parquet.iter_batches(CHUNK_ROWS, columns=[name])]
    return bool(values) and arrow_types.holds_uuids(pa.chunked_array(values))
