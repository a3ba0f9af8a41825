"""Random tables as CSV and Parquet, read by ``--data tables`` and compared with what was written into them.

    python -m benchmarks.fuzz_tables --minutes 5 --seed 0

Every table has users, items, times, a category, a weight, and a catalogue, each of a random type and spelling: words
that look like nothing, quotes, line ends, encodings, delimiters, decimal marks, time zones, integers above 2^53,
binary, dictionaries. A row comes back equal, or it is counted as rejected; a value comes back equal, or it is counted
as changed. The last line of stdout is one JSON object; the first difference stops with the seed that gives it again.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from loadtest.reports.record import record_line
from preprocessing.cleaning import clean_interactions, clean_items
from preprocessing.readers.tables import Tables
from preprocessing.rejects import Rejects
from vivace.contract import ITEM, TIME, TITLE, USER, WEIGHT

ODD = ["NA", "null", "nan", "None", "N/A", "0", "1", "1.0", "01", "1e5", "-1", "inf", "#N/A", "undefined", "x;y", "a,b",
       'say "hi"', "'", "tab\there", "pipe|", "two\nlines", "[red]", "{}", "$5", "a" * 300, "b c"]  # fmt: skip
WIDE = ["é", "ü", "ß", "naïve"]
WIDER = ["日本", "😀", "Ω", "٣"]
T0 = 1_600_000_000
UTC = datetime.UTC
ZONES = (None, "UTC", "Europe/Berlin", "America/New_York", "+05:30")
Form = dict[str, str]


@dataclass
class Column:
    """One column three ways: Arrow's, the text in CSV (None: empty), and what must come back."""

    arrow: pa.Array
    text: list[str | None]
    truth: list[Any]


def with_holes(rng: random.Random, values: list[Any], share: float) -> list[Any]:
    return [None if rng.random() < share else v for v in values]


def words(rng: random.Random, n: int, encoding: str) -> list[str]:
    pool = ODD + (WIDE if encoding != "ascii" else []) + (WIDER if encoding.startswith("utf") else [])
    pool = [*rng.sample(pool, rng.randint(1, len(pool))), *(f"w{i}" for i in range(rng.randint(0, 6)))]
    return [rng.choice(pool) for _ in range(n)]


def text_column(rng: random.Random, n: int, encoding: str, holes: float) -> Column:
    values = with_holes(rng, words(rng, n, encoding), holes)
    padded = [None if v is None else v if rng.random() < 0.95 else f" {v} " for v in values]
    kind = rng.choice(["string", "large", "binary", "dictionary"])
    array = pa.array(padded, pa.large_string() if kind == "large" else pa.string())
    array = array.cast(pa.binary()) if kind == "binary" else array
    array = array.dictionary_encode() if kind == "dictionary" else array
    return Column(array, padded, [None if v is None else v.strip() or None for v in values])


def integer_column(rng: random.Random, n: int, encoding: str, holes: float) -> Column:
    low = rng.choice([0, 2**53, 2**62, -5])
    values = with_holes(rng, [low + rng.randrange(20) for _ in range(n)], holes)
    texts = [None if v is None else str(v) for v in values]
    kind = pa.uint64() if low >= 0 and rng.random() < 0.2 else pa.int64()
    return Column(pa.array(values, kind), texts, texts)


def uuid_column(rng: random.Random, n: int, encoding: str, holes: float) -> Column:
    pool = [uuid.UUID(int=rng.getrandbits(128) | 0x80 << 120) for _ in range(5)]
    values = with_holes(rng, [rng.choice(pool) for _ in range(n)], holes)
    texts = [None if v is None else str(v) for v in values]
    return Column(pa.array([None if v is None else v.bytes for v in values], pa.binary(16)), texts, texts)


def boolean_column(rng: random.Random, n: int, encoding: str, holes: float) -> Column:
    values = with_holes(rng, [rng.random() < 0.5 for _ in range(n)], holes)
    spell = rng.choice([str.title, str.lower, str.upper])
    truth = [None if v is None else str(v).lower() for v in values]
    return Column(pa.array(values, pa.bool_()), [None if v is None else spell(str(v)) for v in values], truth)


def date_column(rng: random.Random, n: int, encoding: str, holes: float) -> Column:
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(rng.randrange(9)) for _ in range(n)]
    values = with_holes(rng, days, holes)
    texts = [None if v is None else v.isoformat() for v in values]
    return Column(pa.array(values, pa.date32()), texts, texts)


IDS = (text_column, text_column, integer_column, uuid_column, date_column)
CATEGORIES = (*IDS, boolean_column)


def number_column(rng: random.Random, n: int, mark: str) -> Column:
    """Numbers; in text a few that are none."""
    values = with_holes(rng, [round(rng.uniform(-100, 100), rng.randint(0, 4)) for _ in range(n)], 0.1)
    kind = rng.choice(["float", "decimal", "text", "integer", "boolean"])
    if kind in ("integer", "boolean"):
        values = [None if v is None else float(v > 0) if kind == "boolean" else float(round(v)) for v in values]
    texts = [None if v is None else (f"{v:.4f}" if kind == "decimal" else repr(v)).replace(".", mark) for v in values]
    truth = [np.nan if v is None else v for v in values]
    if kind == "text":
        bad = ["$ 5", "1,299.00", "1.299,00", "twelve", "inf", "NaN", "1_000", "0x10"]
        spoiled = [rng.random() < 0.1 for _ in values]
        texts = [rng.choice(bad) if s else t for s, t in zip(spoiled, texts, strict=True)]
        truth = [np.nan if s else t for s, t in zip(spoiled, truth, strict=True)]
        return Column(pa.array(texts, pa.string()), texts, truth)
    if kind == "decimal":
        exact = [None if v is None else decimal.Decimal(f"{v:.4f}") for v in values]
        return Column(pa.array(exact, pa.decimal128(12, 4)), texts, truth)
    if kind == "integer":
        texts = [None if v is None else str(int(v)) for v in values]
        return Column(pa.array([None if v is None else int(v) for v in values], pa.int32()), texts, truth)
    if kind == "boolean":
        texts = [
            None if v is None else rng.choice(["true", "True", "1"] if v else ["false", "FALSE", "0"]) for v in values
        ]
        return Column(pa.array([None if v is None else v > 0 for v in values], pa.bool_()), texts, truth)
    return Column(pa.array(values, pa.float64()), texts, truth)


def _wall(ms: int, zone: str | None) -> datetime.datetime:
    moment = datetime.datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    if zone is None:
        return moment
    if zone.startswith("+"):
        return moment.astimezone(datetime.timezone(datetime.timedelta(hours=int(zone[1:3]), minutes=int(zone[4:]))))
    return moment.astimezone(ZoneInfo(zone))


def time_column(rng: random.Random, n: int) -> tuple[Column, str, str | None]:
    """(the column, time_unit, time_zone); times that no clock shows twice."""
    unit, zone = rng.choice(["s", "ms", "us", "ns", "iso", "iso", "typed", "typed"]), rng.choice(ZONES)
    step = 1000 if unit == "s" else 1
    ms = [T0 * 1000 + rng.randrange(0, 86_400_000 * 30, step) for _ in range(n)]  # 13 September to 13 October
    bad = [rng.random() < 0.05 for _ in range(n)]
    truth = [None if b else t for b, t in zip(bad, ms, strict=True)]
    walls = [_wall(t, zone) for t in ms]
    if unit == "typed":
        kind = pa.timestamp(rng.choice(["ms", "us", "ns"]), rng.choice([None, "UTC", "Asia/Tokyo"]))
        utc = [_wall(t, None).replace(tzinfo=None) for t in ms]
        naive = utc if kind.tz else [w.replace(tzinfo=None) for w in walls]
        numbers = [round((v - datetime.datetime(1970, 1, 1)) / datetime.timedelta(milliseconds=1)) for v in naive]
        per = {"ms": 1, "us": 1000, "ns": 1_000_000}[kind.unit]
        array = pa.array([None if b else v * per for b, v in zip(bad, numbers, strict=True)], pa.int64()).cast(kind)
        texts = [None if b else v.isoformat(sep=rng.choice("T ")) + ("Z" if kind.tz else "")
                 for b, v in zip(bad, naive, strict=True)]  # fmt: skip
        return Column(array, texts, truth), "iso", zone
    if unit == "iso":
        texts = [rng.choice(["now", "12:30", "01/02/2023", "today", "2023-W01-1"]) if b else
                 w.isoformat() if rng.random() < 0.5 else w.replace(tzinfo=None).isoformat(sep=" ")
                 for b, w in zip(bad, walls, strict=True)]  # fmt: skip
        return Column(pa.array(texts, pa.string()), list(texts), truth), "iso", zone
    factor, divisor = {"s": (1, 1000), "ms": (1, 1), "us": (1000, 1), "ns": (1_000_000, 1)}[unit]
    whole = [None if b else t * factor // divisor for b, t in zip(bad, ms, strict=True)]
    return Column(pa.array(whole, pa.int64()), [None if v is None else str(v) for v in whole], truth), unit, zone


@dataclass
class Case:
    """One data set: how its CSV is written, its columns, and lines that are no rows."""

    form: Form
    events: dict[str, Column]
    items: dict[str, Column]
    broken: list[str] = field(default_factory=list)


def random_case(rng: random.Random) -> Case:
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
    form = {"encoding": encoding, "delimiter": rng.choice(",;\t|"), "decimal": rng.choice([".", ".", ","]),
            "quote": rng.choice(['"', '"', "'"])}  # fmt: skip
    n = rng.randint(1, 60)
    when, form["time_unit"], zone = time_column(rng, n)
    if zone is not None:
        form["time_zone"] = zone
    make = lambda kinds, rows, holes: rng.choice(kinds)(rng, rows, encoding, holes)  # noqa: E731
    events = {"user": make(IDS, n, 0.05), "item": make(IDS, n, 0.05), "ts": when, "kind": make(CATEGORIES, n, 0.2),
              "w": number_column(rng, n, form["decimal"])}  # fmt: skip
    m = rng.randint(1, 20)
    keys: list[Any] = [f"i{k}" for k in range(m)]
    items = {"key": Column(pa.array(keys), keys, keys),
             "title": make((text_column, integer_column), m, 0.2), "cat": make(CATEGORIES, m, 0.3),
             "price": number_column(rng, m, form["decimal"])}  # fmt: skip
    d, q = form["delimiter"], form["quote"]
    choices = [
        d.join(["too", "many"] + ["x"] * 5),
        "few",
        q + d.join(["open", "b", "c", "d", "e"]),
        d.join("abcd") + d + q,
    ]
    return Case(form, events, items, rng.sample(choices, rng.randint(0, 2)) if rng.random() < 0.4 else [])


def csv_bytes(rng: random.Random, columns: dict[str, Column], form: Form, broken: list[str]) -> bytes:
    """The table as CSV with the ``broken`` lines somewhere between its rows."""
    end, quote_all = rng.choice(["\n", "\r\n"]), rng.random() < 0.3
    rows = []
    for row in ([*columns], *zip(*(c.text for c in columns.values()), strict=True)):
        out = io.StringIO()
        csv.writer(
            out,
            delimiter=form["delimiter"],
            quotechar=form["quote"],
            lineterminator=end,
            quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL,
        ).writerow(row)
        rows.append(out.getvalue())
    for line in broken:
        rows.insert(rng.randint(1, len(rows)), line + end)
    return "".join(rows).encode(form["encoding"])


def write_case(folder: Path, rng: random.Random, case: Case, kind: str) -> Path:
    """The mapping of the case as ``kind`` "csv" or "parquet"."""
    folder.mkdir(parents=True)
    for name, columns in (("events", case.events), ("items", case.items)):
        if kind == "csv":
            broken = case.broken if name == "events" else []
            (folder / f"{name}.csv").write_bytes(csv_bytes(rng, columns, case.form, broken))
        else:
            table = pa.table({n: c.arrow for n, c in columns.items()})
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=rng.choice([7, 1000]))
    shared = {k: v for k, v in case.form.items() if k != "time_unit"}
    if shared["encoding"] in ("utf-8-sig", "utf-16"):
        del shared["encoding"]  # the mark at its start says so
    lines = [f"{k} = {json.dumps(v)}" for k, v in shared.items()]
    lines += ['unknown_items = "keep"', "[interactions]", f'files = "events.{kind}"', 'user = "user"', 'item = "item"',
              'time = "ts"', f'time_unit = "{case.form["time_unit"]}"', 'weight = "w"', 'context = ["kind"]', "[items]",
              f'files = "items.{kind}"', 'item = "key"', 'title = "title"', 'categorical = ["cat"]',
              'continuous = ["price"]']  # fmt: skip
    (folder / "mapping.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "mapping.toml"


def read_back(mapping: Path) -> tuple[pd.DataFrame, pd.DataFrame, Rejects]:
    source, rejects = Tables(mapping), Rejects(mapping.parent / "out" / "rejects.csv")
    catalogue = clean_items(source.items() or [], source.schema, rejects)
    parts = [clean_interactions(chunk, source.schema, None, rejects) for chunk in source.interactions()]
    return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True), catalogue, rejects


def rows_of(frame: pd.DataFrame, names: list[str]) -> list[tuple[Any, ...]]:
    plain = lambda v: None if v is None or v != v else float(np.float32(v)) if isinstance(v, float) else v  # noqa: E731
    return [tuple(plain(v) for v in row) for row in frame[names].astype(object).itertuples(index=False)]


def expected(case: Case) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], int]:
    """(events, items, rows that must be rejected) of the truth."""
    plain = lambda v: None if v is None or v != v else float(np.float32(v)) if isinstance(v, float) else v  # noqa: E731
    rows = [tuple(plain(v) for v in r) for r in zip(*(c.truth for c in case.events.values()), strict=True)]
    kept = [r for r in rows if None not in r[:3]]
    items = list(zip(*(c.truth for c in case.items.values()), strict=True))
    return kept, [(k, t or "", c, plain(p)) for k, t, c, p in items], len(rows) - len(kept)


def check(folder: Path, seed: int) -> int:
    """One case, both ways; returns the rows compared. Raises ValueError at the first difference."""
    case = random_case(random.Random(seed))
    events, items, lost = expected(case)
    if not events:
        return 0
    for kind in ("csv", "parquet"):
        got, catalogue, rejects = read_back(write_case(folder / kind, random.Random(seed), case, kind))
        broken = len(case.broken) if kind == "csv" else 0
        ours = rows_of(got, [USER, ITEM, TIME, "kind", WEIGHT]) if len(got) else []
        for what, have, want in (
            ("events", ours, events), ("items", rows_of(catalogue, [ITEM, TITLE, "cat", "price"]), items),
            ("rejected", sum(rejects.counts.values()), lost + broken),
        ):  # fmt: skip
            if have != want:
                pairs = zip(have, want, strict=False) if isinstance(have, list) and isinstance(want, list) else []
                first = next(((a, b) for a, b in pairs if a != b), (have, want))
                raise ValueError(f"seed {seed}, {kind}, {what}: got {first[0]!r}, written {first[1]!r}; "
                                 f"{case.form}, rejected {rejects.summary()}, broken {case.broken}")  # fmt: skip
    return 2 * (len(events) + len(items))


def fuzz(seed: int, go_on: Callable[[int], bool]) -> dict[str, int]:
    """Cases ``seed``, ``seed`` + 1, … while ``go_on(cases so far)``."""
    cases = rows = 0
    while go_on(cases):
        with tempfile.TemporaryDirectory(prefix="vivace-fuzz-") as name:
            rows += check(Path(name), seed + cases)
        cases += 1
    return {"seed": seed, "tables": 4 * cases, "rows": rows}


def main(minutes: float = 5.0, seed: int = 0) -> None:
    until = time.monotonic() + minutes * 60
    print(record_line("fuzz tables", **fuzz(seed, lambda _: time.monotonic() < until)))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
