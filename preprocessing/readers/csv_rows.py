"""CSV as people have it, cut into rows of text: what cannot be cut is handed out with its line, never dropped.

A quoted value may hold line ends. A quote that opens a value and is not closed costs its own line alone: reading goes
on with the next line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

FIELDS = "malformed row"
ENCODING = "bytes that are not text of the encoding"
QUOTE = "quote without its end"
DELIMITERS = (",", ";", "\t", "|")
LONG_TEXT = 500  # characters of a malformed row that are kept
ROWS_LIKE = 3  # fields from which on lines inside a quoted value can be taken for rows
_UNDECODED = re.compile("[\udc80-\udcff]")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class CsvFormat:
    """``delimiter`` and ``quote`` ("" for none) are single characters; ``encoding`` is one that Python knows."""

    delimiter: str = ","
    encoding: str = "utf-8"
    quote: str = '"'


class Malformed(NamedTuple):
    """A line, counted from 1 with the header, that is no row, and why."""

    line: int
    text: str
    reason: str
    detail: str


@dataclass
class Rows:
    """Consecutive rows: ``fields`` of each, the ``lines`` they start in, and the malformed ones between them."""

    fields: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    malformed: list[Malformed] = field(default_factory=list)


class _Lines:
    """Numbered lines with their ends; lines that were read too far can be given back."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream, self._back, self.number = stream, deque[str](), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._stream)
        self.number += 1
        return line

    def give_back(self, lines: list[str]) -> None:
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)


def _bare(line: str) -> str:
    return line.rstrip("\r\n")


class CsvFile:
    """One open CSV file: ``header``, then ``rows``. An empty file has the header []."""

    def __init__(self, file: Path, form: CsvFormat) -> None:
        self.file, self.form = file, form
        raw = cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115 - closed by close
        start = raw.read(4)
        raw.seek(0)
        utf8 = codecs.lookup(form.encoding).name == "utf-8"
        marked = [name for mark, name in _BOMS if start.startswith(mark)] if utf8 else []
        self._encoding = marked[0] if marked else form.encoding
        self._raw = raw
        self._lines = _Lines(io.TextIOWrapper(raw, self._encoding, errors="surrogateescape", newline=""))
        self.header = self._header()

    def close(self) -> None:
        self._raw.close()

    def _header(self) -> list[str]:
        for line in self._lines:
            if _bare(line):
                record = self._record(line, 0)
                if isinstance(record, Malformed):
                    raise ValueError(f"{self.file}: the header in line {record.line} cannot be read: {record.detail}")
                return record
        return []

    def rows(self, count: int) -> Iterator[Rows]:
        """Chunks of up to ``count`` rows."""
        width, quote, delimiter = len(self.header), self.form.quote, self.form.delimiter
        while True:
            out, lines = Rows(), self._lines
            for line in lines:
                number = lines.number
                if line.isascii() and not (quote and quote in line):  # most lines
                    record: list[str] | Malformed = _bare(line).split(delimiter)
                    if record == [""]:
                        continue
                else:
                    record = self._record(line, width)
                if isinstance(record, Malformed):
                    out.malformed.append(record)
                elif len(record) != width:
                    detail = f"{width} fields expected, {len(record)} there"
                    out.malformed.append(self._fault(number, line, FIELDS, detail))
                else:
                    out.fields.append(record)
                    out.lines.append(number)
                if len(out.fields) + len(out.malformed) >= count:
                    break
            if not out.fields and not out.malformed:
                return
            yield out

    def _record(self, line: str, width: int) -> list[str] | Malformed:
        """Fields of the row that starts with ``line``; it may take further lines. ``width``: fields of a row, if
        known."""
        number, quote = self._lines.number, self.form.quote
        if _UNDECODED.search(line):
            return self._fault(number, line, ENCODING, f"not {self._encoding}: set encoding in the mapping")
        if not quote or quote not in line:
            return _bare(line).split(self.form.delimiter)
        further: list[str] = []

        def feed() -> Iterator[str]:
            yield line
            for more in self._lines:
                further.append(more)
                yield more

        why = ""
        try:
            record = next(csv.reader(feed(), delimiter=self.form.delimiter, quotechar=quote, strict=True))
        except csv.Error as error:
            why = "it is never closed" if "unexpected end" in str(error) else str(error)
        else:
            if further and width and len(record) != width:
                why = f"it closes in line {number + len(further)}, and then {len(record)} fields are there, not {width}"
            elif (
                further
                and width >= ROWS_LIKE
                and self._is_row(line, width)
                and any(self._is_row(x, width) for x in further)
            ):
                why = f"it closes in line {number + len(further)}, over lines that are rows themselves"
            elif any(_UNDECODED.search(x) for x in further):
                detail = f"not {self._encoding}: set encoding in the mapping"
                return self._fault(number, line + "".join(further), ENCODING, detail)
        if not why:
            return record
        self._lines.give_back(further)
        return self._fault(number, line, QUOTE, f"a quote opens in line {number}: {why}")

    def _is_row(self, line: str, width: int) -> bool:
        """Whether a line would be a row by itself, its quotes read as such or as text."""
        if line.count(self.form.delimiter) + 1 == width:
            return True
        try:
            alone = next(csv.reader([line], delimiter=self.form.delimiter, quotechar=self.form.quote, strict=True), [])
        except csv.Error:
            return False
        return len(alone) == width

    def _fault(self, number: int, line: str, reason: str, detail: str) -> Malformed:
        shown = _bare(line)[:LONG_TEXT]
        if _UNDECODED.search(shown):
            shown = shown.encode(self._encoding, "surrogateescape").decode(self._encoding, "backslashreplace")
        return Malformed(number, shown, reason, detail)


def likely_delimiter(header: list[str]) -> str | None:
    """What seems to part the names of a header that was not cut."""
    if len(header) != 1:
        return None
    best = max(DELIMITERS, key=header[0].count)
    return best if header[0].count(best) else None


def columns_of(rows: Rows, header: list[str], names: list[str]) -> dict[str, list[str | None]]:
    """Text of the named columns, None where the field is empty."""
    places = [header.index(name) for name in names]
    return {n: [row[p] or None for row in rows.fields] for n, p in zip(names, places, strict=True)}


READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeError)
