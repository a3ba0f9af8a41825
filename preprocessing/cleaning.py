"""Row checks shared by every reader: a bad row is counted by reason and written to the rejects file, never dropped
silently and never a crash."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from vivace.contract import (
    CLICKED,
    EVENT,
    ITEM,
    MAX_ID_BYTES,
    MAX_QUERY_BYTES,
    POSITION,
    QUERY_TEXT,
    SEARCH,
    SOURCE_ROW,
    TEXT,
    TIME,
    USER,
    WEIGHT,
    DataSchema,
)

MALFORMED = "malformed row"
NO_USER = "missing user id"
NO_ITEM = "missing item id"
LONG_ID = f"id longer than {MAX_ID_BYTES} bytes"
BAD_TIME = "unparsable time"
UNKNOWN_ITEM = "unknown item"
DUPLICATE = "duplicate"
NO_SEARCH, NO_QUERY = "missing search id", "missing query"
LONG_QUERY = f"query longer than {MAX_QUERY_BYTES} bytes"
MAX_POSITION = 1000  # nobody looks further
BAD_POSITION, BAD_CLICK = f"position not in 1..{MAX_POSITION}", "clicked neither 0 nor 1"

TIME_UNITS = {"s": 1000.0, "ms": 1.0}
MAX_TIME_MS = 253_402_300_800_000  # the year 10000


@dataclass
class Rejects:
    """Collects rejected rows; ``counts`` by (table, reason). The file is CSV: table, row, reason, record (JSON)."""

    path: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("table,row,reason,record\n")

    def add(self, table: str, reason: str, frame: pd.DataFrame) -> None:
        if frame.empty:
            return
        self.counts[table, reason] += len(frame)
        records = frame.drop(columns=[SOURCE_ROW], errors="ignore").astype(object)
        records = records.where(records.notna(), None).to_dict("records")
        out = pd.DataFrame(
            {
                "table": table,
                "row": frame[SOURCE_ROW].to_numpy() if SOURCE_ROW in frame else -1,
                "reason": reason,
                "record": [json.dumps(r, ensure_ascii=False, default=str) for r in records],
            }
        )
        out.to_csv(self.path, mode="a", header=False, index=False, errors="replace")

    def summary(self) -> dict[str, int]:
        return {f"{table}: {reason}": n for (table, reason), n in sorted(self.counts.items())}


def parse_time_ms(raw: pd.Series, unit: str) -> pd.Series:
    """Unix time in ms as float64, NaN where it cannot be read. ``unit``: "s", "ms" or "iso" (ISO 8601, UTC assumed)."""
    if unit == "iso":
        parsed = pd.to_datetime(raw, errors="coerce", utc=True)
        return (parsed.astype("int64") // 1_000_000).where(parsed.notna()).astype(float)
    if unit not in TIME_UNITS:
        raise ValueError(f"time unit: expected one of {[*TIME_UNITS, 'iso']}, got {unit!r}")
    ms = pd.to_numeric(raw, errors="coerce").astype(float) * TIME_UNITS[unit]
    return ms.where(np.isfinite(ms) & (ms >= 0) & (ms < MAX_TIME_MS))


def text_ids(raw: pd.Series) -> pd.Series:
    """Ids as text without surrounding blanks; null where there is none."""
    if raw.dtype != object:
        whole = lambda v: str(int(v)) if float(v).is_integer() else str(v)  # noqa: E731
        return raw.astype(object).where(raw.notna(), None).map(whole, na_action="ignore")
    stripped = raw.map(lambda v: str(v).strip(), na_action="ignore")
    return stripped.where(stripped.notna() & (stripped != ""), None)


def _too_long(ids: pd.Series) -> pd.Series:
    return ids.str.len().mul(4).gt(MAX_ID_BYTES) & ids.map(lambda v: len(str(v).encode()) > MAX_ID_BYTES)


def clean_interactions(
    frame: pd.DataFrame, schema: DataSchema, catalogue: pd.Index | None, rejects: Rejects
) -> pd.DataFrame:
    """Checks one chunk: columns of the contract in, typed rows out; each bad row goes to ``rejects`` once."""
    frame = frame.reset_index(drop=True)
    frame[USER], frame[ITEM] = text_ids(frame[USER]), text_ids(frame[ITEM])
    checks = [
        (NO_USER, frame[USER].isna()),
        (NO_ITEM, frame[ITEM].isna()),
        (LONG_ID, _too_long(frame[USER]) | _too_long(frame[ITEM])),
        (BAD_TIME, frame[TIME].isna()),
    ]
    if catalogue is not None and schema.unknown_items == "reject":
        checks.append((UNKNOWN_ITEM, ~frame[ITEM].isin(catalogue)))
    good = pd.Series(True, index=frame.index)
    for reason, bad in checks:
        rejects.add("interactions", reason, frame[good & bad.fillna(False)])
        good &= ~bad.fillna(False)
    frame = frame[good]
    typed = {USER: frame[USER], ITEM: frame[ITEM], TIME: frame[TIME].astype("int64")}
    for name in schema.event_categoricals:
        typed[name] = text_ids(frame[name])
    for name in schema.event_continuous:
        typed[name] = pd.to_numeric(frame[name], errors="coerce").astype("float32")
    typed[SOURCE_ROW] = frame[SOURCE_ROW].astype("int64")
    return pd.DataFrame(typed)


def _flag(raw: pd.Series) -> pd.Series:
    """0 or 1 as float64, NaN for anything else. Takes booleans, numbers and their text."""
    text = raw.astype(str).str.strip().str.lower().replace({"true": "1", "false": "0"})
    value = pd.to_numeric(text, errors="coerce")
    return value.where(value.isin([0, 1]))


def clean_searches(frame: pd.DataFrame, known: pd.Index, rejects: Rejects) -> pd.DataFrame:
    """Checks one chunk of a log of searches: typed rows out, USER "" where there is none; each bad row goes to
    ``rejects`` once. ``known``: items that can be answered."""
    frame = frame.reset_index(drop=True)
    for name in (SEARCH, USER, QUERY_TEXT, ITEM):
        frame[name] = text_ids(frame[name])
    place, clicked = pd.to_numeric(frame[POSITION], errors="coerce"), _flag(frame[CLICKED])
    checks = [
        (NO_SEARCH, frame[SEARCH].isna()),
        (NO_QUERY, frame[QUERY_TEXT].isna()),
        (LONG_QUERY, frame[QUERY_TEXT].map(lambda q: len(str(q).encode(errors="replace")) > MAX_QUERY_BYTES)),
        (NO_ITEM, frame[ITEM].isna()),
        (LONG_ID, _too_long(frame[USER].fillna("")) | _too_long(frame[ITEM])),
        (BAD_TIME, frame[TIME].isna()),
        (BAD_POSITION, ~((place >= 1) & (place <= MAX_POSITION) & (place % 1 == 0))),
        (BAD_CLICK, clicked.isna()),
        (UNKNOWN_ITEM, ~frame[ITEM].isin(known)),
    ]
    good = pd.Series(True, index=frame.index)
    for reason, bad in checks:
        rejects.add("searches", reason, frame[good & bad.fillna(False)])
        good &= ~bad.fillna(False)
    frame = frame[good]
    return pd.DataFrame({
        SEARCH: frame[SEARCH], USER: frame[USER].fillna(""), TIME: frame[TIME].astype("int64"),
        QUERY_TEXT: frame[QUERY_TEXT], ITEM: frame[ITEM], POSITION: place[good].astype("int32"),
        CLICKED: clicked[good].astype(bool), SOURCE_ROW: frame[SOURCE_ROW].astype("int64"),
    })  # fmt: skip


def drop_duplicates(frame: pd.DataFrame, rejects: Rejects) -> pd.DataFrame:
    """The same user, item, time and event type again is one event that was logged twice; the first row stays."""
    keys = [k for k in (USER, ITEM, TIME, EVENT) if k in frame]
    again = frame.duplicated(keys, keep="first")
    rejects.add("interactions", DUPLICATE, frame[again])
    return frame[~again]


def clean_items(frame: pd.DataFrame, schema: DataSchema, rejects: Rejects) -> pd.DataFrame:
    """The catalogue: one row an item, ids and attributes typed."""
    frame = frame.reset_index(drop=True)
    frame[SOURCE_ROW] = np.arange(len(frame))
    frame[ITEM] = text_ids(frame[ITEM])
    checks = [
        (NO_ITEM, frame[ITEM].isna()),
        (LONG_ID, _too_long(frame[ITEM])),
        (DUPLICATE, frame[ITEM].notna() & frame.duplicated([ITEM], keep="first")),
    ]
    good = pd.Series(True, index=frame.index)
    for reason, bad in checks:
        rejects.add("items", reason, frame[good & bad.fillna(False)])
        good &= ~bad.fillna(False)
    frame = frame[good]
    typed = {ITEM: frame[ITEM], schema.item_columns[0]: frame[schema.item_columns[0]].fillna("").astype(str)}
    typed[TEXT] = frame[TEXT].fillna("").astype(str) if TEXT in frame else typed[schema.item_columns[0]]
    for name in schema.item_categoricals:
        typed[name] = text_ids(frame[name])
    for name in schema.item_continuous:
        typed[name] = pd.to_numeric(frame[name], errors="coerce").astype("float32")
    return pd.DataFrame(typed).reset_index(drop=True)


def default_event_columns(frame: pd.DataFrame, event: str, weight: float) -> pd.DataFrame:
    """Fills event type and weight where a data set has none."""
    if EVENT not in frame:
        frame[EVENT] = event
    if WEIGHT not in frame:
        frame[WEIGHT] = np.float32(weight)
    return frame
