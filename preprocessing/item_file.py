"""A file of rows of the catalogue, for a server that runs: read and cleaned as ``vivace prepare`` reads the catalogue.

CSV and Parquet by the columns of a mapping's [items] or, without one, by the schema's own names; JSON, an object a line
or a list of objects, by the schema's own names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from preprocessing.cleaning import clean_items
from preprocessing.item_rows import ItemRow, parse_item, to_json
from preprocessing.readers.base import Chunk
from preprocessing.readers.csv_rows import CsvFile
from preprocessing.readers.mapping import ITEMS, Section, read_mapping, texts
from preprocessing.readers.parts import is_parquet, parts
from preprocessing.rejects import Rejects
from vivace.contract import ITEM, MAX_ROW_BYTES, STOCK, TEXT, TITLE, DataSchema

JSON_LINES, JSON = (".jsonl", ".ndjson"), ".json"
CSV, PARQUET = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
COMPRESSED = ".gz"  # of CSV alone


def _ending(file: Path) -> str:
    """What a file is by its name: one of JSON_LINES, JSON, CSV and PARQUET. Raises ValueError for another."""
    name = file.name.lower()
    ending = Path(name).suffix
    if ending == COMPRESSED and Path(name.removesuffix(COMPRESSED)).suffix in CSV:
        ending = CSV[0]
    if ending not in (*JSON_LINES, JSON, *CSV, *PARQUET):
        raise ValueError(
            f"{file}: expected a name that says what it is: {', '.join((*CSV, *PARQUET, *JSON_LINES, JSON))} or "
            f"{CSV[0]}{COMPRESSED}; rename it, or write it anew as one of these"
        )
    return ending


def _json_records(text: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record: of a list, of a single object over several lines, or of lines; a ValueError stands
    for what cannot be read."""
    start = text.lstrip()[:1]
    if start == "[":
        try:
            yield from ((f"row {n}", value) for n, value in enumerate(json.loads(text), 1))
            return
        except (ValueError, RecursionError):  # or lines, the first of which is at fault
            pass
    if start == "{" and not text.lstrip().partition("\n")[0].rstrip().endswith("}"):
        try:
            yield "row 1", json.loads(text)
            return
        except (ValueError, RecursionError):
            pass
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", ValueError(str(error))


class ItemFile:
    """``rows`` that can be sent, ``rejected``: how many could not, by reason, ``changed``: what counts as missing as it
    cannot be read, how many by reason, and ``left_out``: columns that the catalogue does not have, of a file that is
    read without a mapping.

    Args:
        file: CSV, Parquet or JSON, by its ending (``_ending``).
        mapping: TOML file whose [items] names the columns; None: they have the schema's names.
        ids_only: nothing but the item's id is read.
        rejects: where rejected rows go.
    """

    def __init__(
        self, file: Path, schema: DataSchema, mapping: Path | None, rejects: Path, ids_only: bool = False
    ) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"items: no file {file}; give a CSV, Parquet or JSON file")
        self.file, self.schema = file, schema
        self.rows: list[ItemRow] = []
        self.rejected, self.changed = Counter[str](), Counter[str]()
        self.left_out: list[str] = []
        if _ending(file) in (*JSON_LINES, JSON):
            self._read_json(ids_only)
            return
        section = self._section(mapping, ids_only)
        if STOCK in section.columns("continuous") and STOCK not in schema.item_columns:
            self.schema = replace(schema, item_continuous=(*schema.item_continuous, STOCK))
        counted, chunks = Rejects(rejects), list(self._chunks(section))
        if not sum(chunk.read for chunk in chunks):
            raise ValueError(f"{file}: expected a row an item, found none")
        clean = clean_items(chunks, self.schema, counted)
        self.rejected.update(counted.summary())
        self.changed.update(counted.changes())
        columns = {n: c.astype(object).where(c.notna(), None).tolist() for n, c in clean.items()}
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.rows = self._small([parse_item(record, self.schema) for record in records])

    def _small(self, rows: list[ItemRow]) -> list[ItemRow]:
        """Rows that a server takes; the others are rejected."""
        small = [row for row in rows if len(to_json(row).encode()) <= MAX_ROW_BYTES]
        if len(small) < len(rows):
            self.rejected[f"row of more than {MAX_ROW_BYTES} bytes"] += len(rows) - len(small)
        return small

    def _read_json(self, ids_only: bool) -> None:
        text, notes = self.file.read_text(encoding="utf-8-sig", errors="surrogateescape"), list[str]()
        for place, record in _json_records(text):
            try:
                if isinstance(record, ValueError):
                    raise record
                if not isinstance(record, dict):
                    raise ValueError(f"expected a JSON object, got {type(record).__name__}")
                self.rows.append(parse_item({ITEM: record.get(ITEM)} if ids_only else record, self.schema, notes))
            except ValueError as error:
                self.rejected[f"{place}: {error}"[:200]] += 1
        self.changed.update(notes)
        if not self.rows and not self.rejected:
            raise ValueError(f"{self.file}: expected a JSON object a line, or a list of objects, found none")
        self.rows = self._small(self.rows)

    def _header(self, section: Section) -> list[str]:
        if is_parquet(self.file):
            return list(pq.ParquetFile(self.file).schema_arrow.names)
        source = CsvFile(self.file, section.form(self.file))
        try:
            return list(source.header)
        finally:
            source.close()

    def _section(self, mapping: Path | None, ids_only: bool) -> Section:
        if mapping is not None:
            section = read_mapping(mapping).sections.get(ITEMS)
            if section is None:
                raise ValueError(f"{mapping}: expected a table [items], found none: it says nothing of a catalogue")
            keys = {"item": section.keys["item"]} if ids_only else dict(section.keys)
            return Section(mapping, ITEMS, {**section.keys, **keys} if not ids_only else self._form(section) | keys)
        section = Section(self.file, ITEMS, {"item": ITEM})
        there = [] if ids_only else self._header(section)
        numbers = dict.fromkeys([*self.schema.item_continuous, STOCK])
        known = {ITEM, TITLE, TEXT, *self.schema.item_categoricals, *self.schema.item_lists, *numbers}
        lists = {name: part for name, part in self.schema.separators.items() if name in there}
        self.left_out = [name for name in there if name not in known]
        keys = {
            "title": [TITLE] if TITLE in there else [],
            "categorical": [name for name in self.schema.item_categoricals if name in there],
            "lists": list(lists),
            "separator": lists,
            "continuous": [name for name in numbers if name in there],
            "text": [TEXT] if TEXT in there else [],
        }
        return Section(self.file, ITEMS, {"item": ITEM, **keys})

    @staticmethod
    def _form(section: Section) -> dict[str, Any]:
        """How the section's files are written, without its columns."""
        columns = ("item", "title", "categorical", "lists", "separator", "continuous", "rename", "files")
        return {key: value for key, value in section.keys.items() if key not in columns}

    def _chunks(self, section: Section) -> Iterator[Chunk]:
        titles, more, keys = texts(section.keys.get("title")), texts(section.keys.get("text")), section.keys
        categorical, continuous = section.columns("categorical"), section.columns("continuous")
        lists, separators = section.columns("lists"), section.separators()
        columns = [keys["item"], *titles, *more, *categorical.values(), *lists.values(), *continuous.values()]
        for part in parts(section, self.file, list(dict.fromkeys(columns))):
            rows = pd.DataFrame({ITEM: part.ids(keys["item"])})
            joined = [part.text(title).fillna("") for title in titles]
            rows[TITLE] = joined[0].str.cat(joined[1:], sep=" ").str.strip() if joined else ""
            if more:
                rows[TEXT] = part.text(more[0]).fillna("")
            for name in self.schema.item_categoricals:
                rows[name] = part.category(categorical[name]) if name in categorical else None
            for name in self.schema.item_lists:
                rows[name] = part.lists(lists[name], separators[name]) if name in lists else None
            for name in dict.fromkeys([*self.schema.item_continuous, *continuous]):
                rows[name] = part.numbers(continuous[name]) if name in continuous else float("nan")
            yield part.chunk(rows, 0)
