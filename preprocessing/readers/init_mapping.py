"""``vivace init-mapping``: a first mapping.toml from the columns of a table. Guesses, each with what to check."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing import arrow_types, times
from preprocessing.item_rows import is_written_list
from preprocessing.readers.csv_rows import DELIMITERS, READ_ERRORS
from preprocessing.readers.parts import is_parquet

SAMPLE_ROWS, SAMPLE_BYTES = 1000, 1 << 20
MAX_CATEGORIES = 0.5  # distinct values a row, up to which a text column is a category
LIST_SEPARATORS = {"|": 0.25, ";": 0.5, ",": 0.5}  # with the share of a column's texts that have it in a list
YEAR_1990_MS, YEAR_2100_MS = 631_152_000_000, 4_102_444_800_000
LEFT_OUT = "# left out: "  # begins a line on a column of which the mapping says nothing, with the reason
_NONE = "no column looks like it"
SESSION = "session"  # in the name of the column of users: the log is one of sessions
_USER = ("user", "visitor", "customer", "member", "client", "reader", "listener", "viewer", "session", "account", "uid")
_ITEM = ("item", "product", "article", "sku", "asin", "movie", "track", "song", "book", "video", "content", "iid")
_TIME = ("timestamp", "time", "date", "ts", "created", "at", "when")
_EVENT = ("event", "behavior", "behaviour", "action", "activity")
_WEIGHT = ("rating", "stars", "score", "weight", "quantity", "clicked", "dwell", "duration", "watched", "listened")
_AFTER = (*_WEIGHT, "liked", "scroll", "elapsed", "spent", "revenue")  # known when the event is over
_SHOWN = ("impression", "impressions", "shown", "display", "displayed", "exposure")  # types that say what was shown
_OF_ITEM = ("published", "publish", "released", "release", "updated", "expires", "birth")  # times of an item or user
_TITLE = ("title", "headline", "name", "label")


@dataclass(frozen=True)
class Sample:
    """The first rows of a table, and how its file is written (None: as by default)."""

    file: Path
    table: pa.Table
    delimiter: str | None = None
    encoding: str | None = None
    decimal: str | None = None

    def numeric(self, name: str) -> bool:
        array = self.table[name].combine_chunks()
        try:
            read = arrow_types.numbers(array, name, self.decimal or ".")
        except ValueError:
            return False
        return bool(np.isfinite(read.values).any()) and not read.unreadable.any()

    def listed(self, name: str) -> str | None:
        """What parts the values of a column of lists, "" where they are true lists; None where it holds no lists: a
        separator stands in many of its texts, and what it parts repeats."""
        array = self.table[name].combine_chunks()
        if arrow_types.is_list(array.type):
            return None if pa.types.is_nested(array.type.value_type) else ""
        if not arrow_types.is_text(array.type):
            return None
        known = [value for value in array.to_pylist() if value and value.strip()]
        if any(is_written_list(value) for value in known):
            return None
        for separator, least in LIST_SEPARATORS.items():
            parts = [part.strip() for value in known for part in value.split(separator)]
            with_it = sum(separator in value for value in known)
            if with_it and with_it >= least * len(known) and len(set(parts)) <= MAX_CATEGORIES * len(parts):
                return separator
        return None

    def distinct(self, name: str) -> float:
        """Distinct values a row; 1 of a column whose values have parts."""
        array = self.table[name].combine_chunks()
        if pa.types.is_nested(array.type):
            return 1.0
        return len(array.dictionary_encode().dictionary) / max(self.table.num_rows, 1)


def read_sample(file: Path) -> Sample:
    """Raises ValueError or FileNotFoundError that names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"init-mapping: no file {file}")
    try:
        if is_parquet(file):
            with pq.ParquetFile(file) as parquet:
                batch = next(parquet.iter_batches(SAMPLE_ROWS), None)
                table = parquet.schema_arrow.empty_table() if batch is None else pa.table(batch)
            columns = {n: arrow_types.decoded(table[n], arrow_types.is_binary(table[n].type)
                       and arrow_types.holds_uuids(table[n]))[0] for n in table.column_names}  # fmt: skip
            return Sample(file, pa.table(columns))
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            raw = stream.read(SAMPLE_BYTES)
    except (pa.ArrowInvalid, *READ_ERRORS) as error:
        raise ValueError(f"init-mapping: {file} cannot be read: {error}") from error
    return _csv_sample(file, raw)


def _csv_sample(file: Path, raw: bytes) -> Sample:
    encoding, text = None, ""
    for name in ("utf-8-sig", "utf-16", "cp1252") if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        try:
            text = raw[: raw.rfind(b"\n") + 1 or None].decode(name)
            encoding = name
            break
        except UnicodeDecodeError:
            continue
    else:
        text = raw.decode("latin-1")
        encoding = "latin-1"
    lines = text.splitlines()[: SAMPLE_ROWS + 1]
    if not lines:
        raise ValueError(f"init-mapping: {file} is empty")
    delimiter = max(DELIMITERS, key=lines[0].count)
    header, *rows = [r for r in csv.reader(lines, delimiter=delimiter) if r]
    rows = [r for r in rows if len(r) == len(header)]
    table = pa.table({n: pa.array([r[i] or None for r in rows], pa.large_string()) for i, n in enumerate(header)})
    columns = [[v for r in rows if (v := r[i].strip())] for i in range(len(header))]
    comma = any(_decimal(values, ",") for values in columns) and not any(_decimal(values, ".") for values in columns)
    return Sample(
        file, table, None if delimiter == "," else delimiter,
        None if encoding in ("utf-8-sig", "utf-16") else encoding, "," if comma else None,
    )  # fmt: skip


def _decimal(values: list[str], sign: str) -> bool:
    """Whether a column holds numbers alone, some with ``sign`` before their decimals."""
    number = re.compile(rf"[+-]?\d+({re.escape(sign)}\d+)?")
    return any(sign in value for value in values) and all(number.fullmatch(value) for value in values)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def _guess(names: list[str], words: tuple[str, ...], fits: Callable[[str], bool] = lambda name: True) -> str | None:
    """The column whose name is, or has as a part, one of ``words``: the first word that fits decides."""
    parts = {n: _words(n) for n in names}
    for match in (lambda n, w: n.lower() == w, lambda n, w: w in parts[n], lambda n, w: len(w) > 3 and w in n.lower()):
        for word in words:
            for name in names:
                if match(name, word) and fits(name):
                    return name
    return None


def time_unit(sample: Sample, name: str) -> str | None:
    """The unit in which a column's times lie between 1990 and 2100; None if it needs none, or none fits."""
    array = sample.table[name].combine_chunks()
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        return None
    for unit in times.TIME_UNITS:
        try:
            ms = arrow_types.times_ms(array, unit, None, name)
        except ValueError:
            return None
        known = ms[np.isfinite(ms)]
        if len(known) and len(known) >= 0.9 * len(ms) and YEAR_1990_MS < np.median(known) < YEAR_2100_MS:
            return unit
    return None


def _is_time(sample: Sample, name: str) -> bool:
    kind = sample.table[name].type
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or time_unit(sample, name) is not None


def _toml(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)  # a TOML basic string is a JSON one, for text without odd controls


def _form(sample: Sample) -> list[str]:
    keys = {"delimiter": sample.delimiter, "encoding": sample.encoding, "decimal": sample.decimal}
    check = {"decimal": "  # check: the sign before decimals"}
    return [f"{key} = {_toml(value)}{check.get(key, '')}" for key, value in keys.items() if value is not None]


def _key(key: str, column: str | None, check: str) -> str:
    return f"{key} = {_toml(column)}  # check: {check}" if column else f'# {key} = ""  # {check}: {_NONE}'


def missing(text: str) -> list[str]:
    """Keys of a ``draft`` that a mapping must have and that no column looked like."""
    needed = (f"# {key} = " for key in ("user", "item"))
    return [start[2:-3] for start in needed if any(line.startswith(start) for line in text.splitlines())]


def _interactions(sample: Sample, item_hint: str | None, folder: Path) -> list[str]:
    names = list(sample.table.column_names)
    taken: list[str] = []

    def guess(words: tuple[str, ...], fits: Callable[[str], bool] = lambda name: True) -> str | None:
        name = _guess([n for n in names if n not in taken], words, fits)
        taken.extend([name] if name else [])
        return name

    of_event = [n for n in names if _is_time(sample, n) and not set(_words(n)) & set(_OF_ITEM)]
    when = guess(_TIME, lambda n: n in of_event) or next(iter(of_event), None)
    taken.extend([when] if when else [])
    user = guess(_USER)
    item = item_hint if item_hint in names and item_hint not in taken else guess(_ITEM)
    item = item or guess(_TITLE[:2], lambda n: sample.distinct(n) <= MAX_CATEGORIES)
    event = guess(_EVENT, lambda n: not sample.numeric(n))
    weight = None if event else guess(_WEIGHT, sample.numeric)
    unit = time_unit(sample, when) if when else None
    out = [f"files = {_toml(os.path.relpath(sample.file, folder))}", *_form(sample)]
    out += [_key("user", user, "who"), _key("item", item, "what"), _key("time", when, "when")]
    out += [f'time_unit = "{unit}"  # check: s, ms, us, ns, or iso for ISO 8601'] if unit else []
    out += ['# time_zone = "Europe/Berlin"  # of times without an offset; UTC without it']
    if event:
        kinds = [str(k) for k in sample.table[event].unique().to_pylist() if k is not None][:10]
        shown = [kind for kind in kinds if kind.lower() in _SHOWN]
        if shown:
            out += [f"shown_types = {_toml(shown)}  # check: what was shown, which is nothing that the user did"]
        out += [
            _key("event_type", event, "what the user did"),
            "",
            "[interactions.weights]  # check: what each is worth",
        ]
        out += [f"{_toml(kind)} = 1" for kind in kinds if kind not in shown]
    elif weight:
        out += [_key("weight", weight, "how much the event says")]
    rest = [n for n in names if n not in (user, item, when, event, weight)]
    later = [n for n in rest if set(_words(n)) & set(_AFTER)]
    before = [n for n in rest if n not in later]
    if before:
        at = out.index("") if "" in out else len(out)
        out.insert(at, f"# context = {_toml(before)}  # columns of the event that may matter, as categories")
    reasons = {n: "take it in by the line 'context' if it matters" for n in before}
    reasons |= dict.fromkeys(later, "known only after the event, as it looks, so no request could say it")
    return [*out, *(_left_out(name, reasons[name]) for name in rest)]


def _items(sample: Sample, item: str, folder: Path) -> list[str]:
    names = [n for n in sample.table.column_names if n != item]
    title = _guess(names, _TITLE, lambda n: not sample.numeric(n))
    rest = [n for n in names if n != title]
    numbers = [n for n in rest if sample.numeric(n) and n not in (title,)]
    lists = {n: separator for n in rest if n not in numbers and (separator := sample.listed(n)) is not None}
    kinds = [n for n in rest if n not in numbers and n not in lists and sample.distinct(n) <= MAX_CATEGORIES]
    out = [f"files = {_toml(os.path.relpath(sample.file, folder))}", *_form(sample), _key("item", item, "its key")]
    out += [_key("title", title, "what people read")]
    out += [f"categorical = {_toml(kinds)}  # check: attributes with few values"] if kinds else []
    out += [f"lists = {_toml(list(lists))}  # check: attributes of several values"] if lists else []
    parted = {n: separator for n, separator in lists.items() if separator}
    each = ", ".join(f"{_toml(n)} = {_toml(separator)}" for n, separator in parted.items())
    out += [f"separator = {{ {each} }}  # check: what parts the values"] if parted else []
    out += [f"continuous = {_toml(numbers)}  # check: numbers, such as a price"] if numbers else []
    used = {*numbers, *lists, *kinds}
    return out + [_left_out(n, _why_left_out(sample, n)) for n in rest if n not in used]


def _left_out(name: str, reason: str) -> str:
    return f"{LEFT_OUT}{_toml(name)}: {reason}"


def _why_left_out(sample: Sample, name: str) -> str:
    array = sample.table[name].combine_chunks()
    if pa.types.is_nested(array.type):
        return f"its values are {array.type}, which no key takes"
    if arrow_types.is_text(array.type) and any(is_written_list(v) for v in array.to_pylist() if v):
        return "its values are printed lists: part them by a separator, or give true lists (Parquet)"
    return (
        f"{len(array.dictionary_encode().dictionary):,} values in {sample.table.num_rows:,} rows are too many for a "
        "category: if people read it, add it to title"
    )


def draft(file: Path, items: Path | None, folder: Path) -> str:
    """Text of a mapping in ``folder`` for events in ``file`` and, where given, a catalogue in ``items``."""
    events = read_sample(file)
    catalogue = read_sample(items) if items is not None else None
    key = None
    if catalogue is not None:
        names = list(catalogue.table.column_names)
        shared = [n for n in names if n in events.table.column_names]
        key = _guess(shared, _ITEM) or _guess(names, (*_ITEM, "id")) or names[0]
    lines = [f"# A first mapping of {file.name}, guessed from its columns: check each line (docs/preprocessing.md)."]
    name = re.sub(r"[^\w.\-]+", "-", file.resolve().parent.name).strip("-.") or "data"
    interactions = _interactions(events, key, folder)
    of_sessions = any(line.startswith("user = ") and SESSION in line.lower() for line in interactions)
    lines += [f"name = {_toml(name)}"]
    lines += ["sessions = true  # check: each is of somebody unknown, and its items may come again"] * of_sessions
    lines += ["", "[interactions]", *interactions]
    if catalogue is not None and key is not None:
        lines += ["", "[items]", *_items(catalogue, key, folder)]
    lines += ["", "[heads]  # what to predict: the least weight of an event that counts", "click = 0"]
    return "\n".join(lines) + "\n"
