"""The general reader: CSV or Parquet tables of interactions and items, described by a small TOML mapping.

```toml
name = "my-shop"
unknown_items = "reject"            # or "keep"
exclude_seen = true                 # false: items of the history may be answered again

[interactions]
files = "events/*.parquet"          # seen from the mapping's folder; .csv, .csv.gz or .parquet
user = "visitor"
item = "sku"
time = "ts"
time_unit = "s"                     # s, ms or iso
event_type = "behaviour"            # optional
weight = "stars"                    # optional: a column, or the table below
context = ["device"]                # optional categorical columns of the event

[interactions.weights]              # optional: weight of each event type
view = 1
buy = 3

[items]                             # optional
files = "items.csv"
item = "sku"
title = ["brand", "name"]           # joined by a blank
categorical = ["category"]
continuous = ["price"]

[searches]                          # optional: what queries showed, one row an item that was shown
files = "searches/*.parquet"
search = "search_id"                # rows with the same value are one list of results
user = "visitor"                    # "" for someone unknown
time = "ts"
time_unit = "s"
query = "q"
item = "sku"
position = "rank"                   # from 1
clicked = "clicked"                 # 0 or 1, or true and false

[heads]                             # task head = least weight of its positive events
click = 0
buy = 3
```
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from preprocessing.cleaning import parse_time_ms
from preprocessing.readers.base import CHUNK_ROWS, Chunk
from vivace.contract import (
    CLICKED,
    EVENT,
    ITEM,
    POSITION,
    QUERY_TEXT,
    SEARCH,
    SOURCE_ROW,
    TIME,
    TITLE,
    USER,
    WEIGHT,
    DataSchema,
    TaskHead,
)
from vivace.manifest import fingerprint_files

_KEYS = {
    "": {"name", "unknown_items", "exclude_seen", "interactions", "items", "searches", "heads", "licence"},
    "interactions": {"files", "user", "item", "time", "time_unit", "event_type", "weight", "weights", "context"},
    "items": {"files", "item", "title", "categorical", "continuous"},
    "searches": {"files", "search", "user", "time", "time_unit", "query", "item", "position", "clicked"},
}
_NEEDED = {
    "interactions": ("files", "user", "item", "time"),
    "searches": ("files", "search", "user", "time", "query", "item", "position", "clicked"),
}


def _text(column: pa.ChunkedArray) -> pd.Series:
    """Strings of a binary column; bytes that are not UTF-8 become null (the row is then reported by what it lacks)."""

    def decode(value: bytes | None) -> str | None:
        try:
            return value.decode() if value else None
        except UnicodeDecodeError:
            return None

    return pd.Series([decode(v) for v in column.to_pylist()], dtype=object)


def _read_csv(file: Path, columns: list[str]) -> Iterator[tuple[pd.DataFrame, list[str]]]:
    """Chunks of a CSV with every field as text, and the text of the rows that could not be cut into fields."""
    bad: list[str] = []

    def on_bad(row: pa_csv.InvalidRow) -> str:
        bad.append(row.text)
        return "skip"

    with pa.CompressedInputStream(str(file), "gzip") if file.suffix == ".gz" else pa.OSFile(str(file)) as stream:
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(block_size=32 << 20, use_threads=False),
            parse_options=pa_csv.ParseOptions(invalid_row_handler=on_bad, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.binary()), include_columns=columns, strings_can_be_null=True
            ),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            yield pd.DataFrame({c: _text(table[c]) for c in columns}), bad
            bad = []
    if bad:
        yield pd.DataFrame({c: pd.Series(dtype=object) for c in columns}), bad


def read_table(file: Path, columns: list[str]) -> Iterator[tuple[pd.DataFrame, list[str]]]:
    """Chunks of ``columns`` of a CSV or Parquet file, with the malformed lines met on the way."""
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                missing = set(columns) - set(parquet.schema_arrow.names)
                if missing:
                    raise ValueError(f"{file}: expected columns {columns}, {sorted(missing)} are missing")
                for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
                    yield batch.to_pandas(), []
        else:
            yield from _read_csv(file, columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{file}: expected a table with the columns {columns}; {error}") from error


class Tables:
    """A data set described by a mapping file (see the module's text for its form)."""

    def __init__(self, mapping: Path) -> None:
        if not mapping.exists():
            raise FileNotFoundError(f"mapping: no file {mapping}; check --path (a TOML file)")
        self.mapping = mapping
        try:
            self.spec: dict[str, Any] = tomllib.loads(mapping.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{mapping}: not TOML: {error}") from None
        for section, known in _KEYS.items():
            unknown = set(self.spec.get(section, {}) if section else self.spec) - known
            if unknown:
                raise ValueError(
                    f"{mapping}: [{section or 'top'}] unknown keys {sorted(unknown)}; known: {sorted(known)}"
                )
        if "interactions" not in self.spec:
            raise ValueError(f"{mapping}: expected a table [interactions], found none")
        for section, keys in _NEEDED.items():
            for key in keys:
                if section in self.spec and key not in self.spec[section]:
                    raise ValueError(f"{mapping}: [{section}] expected the key '{key}', found none")
        items = self.spec.get("items", {})
        heads = self.spec.get("heads", {"click": float("-inf")})
        self.schema = DataSchema(
            name=self.spec.get("name", mapping.stem),
            event_categoricals=(EVENT, *self.spec["interactions"].get("context", ())),
            item_categoricals=tuple(items.get("categorical", ())),
            item_continuous=tuple(items.get("continuous", ())),
            heads=tuple(TaskHead(name, float(weight)) for name, weight in heads.items()),
            unknown_items=self.spec.get("unknown_items", "reject"),
            exclude_seen=bool(self.spec.get("exclude_seen", True)),
            licence=self.spec.get("licence", ""),
        )

    def _files(self, section: str) -> list[Path]:
        files = sorted(self.mapping.parent.glob(self.spec[section]["files"]))
        if not files:
            raise FileNotFoundError(
                f"{self.mapping}: [{section}] files = {self.spec[section]['files']!r} matches nothing in "
                f"{self.mapping.parent}"
            )
        return files

    def fingerprint(self) -> str:
        sections = [s for s in ("interactions", "items", "searches") if s in self.spec]
        return fingerprint_files([self.mapping, *(f for s in sections for f in self._files(s))])

    def items(self) -> pd.DataFrame | None:
        spec = self.spec.get("items")
        if spec is None:
            return None
        titles = [spec["title"]] if isinstance(spec.get("title"), str) else list(spec.get("title", []))
        attributes = [*self.schema.item_categoricals, *self.schema.item_continuous]
        columns = list(dict.fromkeys([spec["item"], *titles, *attributes]))
        frame = pd.concat([f for file in self._files("items") for f, _ in read_table(file, columns)])
        title = frame[titles].fillna("").astype(str).agg(" ".join, axis=1).str.strip() if titles else ""
        return pd.DataFrame({ITEM: frame[spec["item"]], TITLE: title, **{a: frame[a] for a in attributes}})

    def interactions(self) -> Iterator[Chunk]:
        spec = self.spec["interactions"]
        context = list(spec.get("context", ()))
        optional = [spec[k] for k in ("event_type", "weight") if k in spec]
        columns = list(dict.fromkeys([spec["user"], spec["item"], spec["time"], *optional, *context]))
        first = 0
        for file in self._files("interactions"):
            for raw, malformed in read_table(file, columns):
                rows = pd.DataFrame(
                    {
                        USER: raw[spec["user"]],
                        ITEM: raw[spec["item"]],
                        TIME: parse_time_ms(raw[spec["time"]], spec.get("time_unit", "s")),
                        EVENT: raw[spec["event_type"]] if "event_type" in spec else "event",
                        **{name: raw[name] for name in context},
                        SOURCE_ROW: np.arange(first, first + len(raw)),
                    }
                )
                rows[WEIGHT] = self._weights(raw, rows)
                first += len(raw)
                bad = pd.DataFrame({"line": malformed, SOURCE_ROW: -1}) if malformed else None
                yield Chunk(rows, bad)

    def searches(self) -> Iterator[Chunk] | None:
        spec = self.spec.get("searches")
        return None if spec is None else self._searches(spec)

    def _searches(self, spec: dict[str, Any]) -> Iterator[Chunk]:
        names = {SEARCH: "search", USER: "user", QUERY_TEXT: "query", ITEM: "item", POSITION: "position",
                 CLICKED: "clicked"}  # fmt: skip
        columns = list(dict.fromkeys(spec[k] for k in _NEEDED["searches"] if k != "files"))
        first = 0
        for file in self._files("searches"):
            for raw, malformed in read_table(file, columns):
                rows = pd.DataFrame({ours: raw[spec[theirs]] for ours, theirs in names.items()})
                rows[TIME] = parse_time_ms(raw[spec["time"]], spec.get("time_unit", "s"))
                rows[SOURCE_ROW] = np.arange(first, first + len(raw))
                first += len(raw)
                yield Chunk(rows, pd.DataFrame({"line": malformed, SOURCE_ROW: -1}) if malformed else None)

    def _weights(self, raw: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
        spec = self.spec["interactions"]
        if "weight" in spec:
            return pd.to_numeric(raw[spec["weight"]], errors="coerce")
        if "weights" in spec:
            return rows[EVENT].map(spec["weights"]).astype(float)
        return pd.Series(1.0, index=raw.index)
