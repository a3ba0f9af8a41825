"""Row checks shared by every reader: a bad row is counted by reason and written to the rejects file, never dropped
silently and never a crash."""

from __future__ import annotations

import numpy as np
import pandas as pd

from preprocessing.item_lists import object_column
from preprocessing.item_rows import list_values
from preprocessing.readers.base import Chunk
from preprocessing.readers.csv_rows import ENCODING, QUOTE
from preprocessing.rejects import MALFORMED, Rejects
from vivace.context import clock
from vivace.contract import (
    CLICKED,
    EVENT,
    EVENT_PART,
    ITEM,
    MAX_ID_BYTES,
    MAX_QUERY_BYTES,
    POSITION,
    QUERY_TEXT,
    SEARCH,
    SOURCE_ROW,
    SPLIT,
    TEXT,
    TIME,
    TITLE,
    USER,
    WEIGHT,
    DataSchema,
)

NO_USER = "missing user id"
NO_ITEM = "missing item id"
LONG_ID = f"id longer than {MAX_ID_BYTES} bytes"
PARTED_ID = "id with the character U+001F"
BAD_TIME = "unparsable time"
OTHER_TIME = "time before 1970 or after 9999"
UNKNOWN_ITEM = "unknown item"
DUPLICATE = "duplicate"
NO_SEARCH, NO_QUERY = "missing search id", "missing query"
LONG_QUERY = f"query longer than {MAX_QUERY_BYTES} bytes"
MAX_POSITION = 1000  # nobody looks further
BAD_POSITION, BAD_CLICK = f"position not in 1..{MAX_POSITION}", "clicked neither 0 nor 1"

_FILE_HINTS = {
    MALFORMED: "check the delimiter",
    ENCODING: "set encoding",
    QUOTE: 'set quote = "" if quotes are text',
    NO_ITEM: "check the column",
    LONG_ID: "check the column",
}
EVENT_HINTS = {
    **_FILE_HINTS,
    NO_USER: "check the column user",
    BAD_TIME: "check the column time and time_unit (s, ms, us, ns, or iso for ISO 8601)",
    OTHER_TIME: "check time_unit",
    UNKNOWN_ITEM: 'check the item columns of events and catalogue; unknown_items = "keep" keeps such events',
    DUPLICATE: "rows of one user, item, time and type are one event; check these columns",
}
ITEM_HINTS = {**_FILE_HINTS}
USER_HINTS = {**_FILE_HINTS, NO_USER: "check the column user of [users]"}
SEARCH_HINTS = {**_FILE_HINTS, **{reason: "check the columns of [searches]" for reason in (
    NO_SEARCH, NO_QUERY, LONG_QUERY, BAD_TIME, OTHER_TIME, BAD_POSITION, BAD_CLICK, UNKNOWN_ITEM
)}}  # fmt: skip


def text_ids(raw: pd.Series) -> pd.Series:
    """Ids as text without surrounding blanks; null where there is none."""
    if raw.dtype != object:
        whole = lambda v: str(int(v)) if float(v).is_integer() else str(v)  # noqa: E731
        return raw.astype(object).where(raw.notna(), None).map(whole, na_action="ignore")
    stripped = raw.map(lambda v: str(v).strip(), na_action="ignore")
    return stripped.where(stripped.notna() & (stripped != ""), None)


def _too_long(ids: pd.Series) -> pd.Series:
    ids = ids.astype(object)
    return ids.str.len().mul(4).gt(MAX_ID_BYTES) & ids.map(lambda v: len(str(v).encode()) > MAX_ID_BYTES)


def _reject(
    table: str, chunk: Chunk, frame: pd.DataFrame, checks: list[tuple[str, pd.Series]], rejects: Rejects
) -> pd.Series:
    """Each row that a check finds bad goes to ``rejects`` once, by the first reason; True where a row is good."""
    good = pd.Series(True, index=frame.index)
    for reason, bad in checks:
        bad = bad.fillna(False).astype(bool)
        rejects.add(table, reason, frame[good & bad], chunk)
        good &= ~bad
    return good


def clean_interactions(chunk: Chunk, schema: DataSchema, catalogue: pd.Index | None, rejects: Rejects) -> pd.DataFrame:
    """Checks one chunk: columns of the contract in, typed rows out; each bad row goes to ``rejects`` once."""
    rejects.take("interactions", chunk)
    frame = chunk.rows.reset_index(drop=True)
    if frame.empty:
        return frame
    frame[USER], frame[ITEM] = text_ids(frame[USER]), text_ids(frame[ITEM])
    checks = [
        (NO_USER, frame[USER].isna()),
        (NO_ITEM, frame[ITEM].isna()),
        (LONG_ID, _too_long(frame[USER]) | _too_long(frame[ITEM])),
        (PARTED_ID, frame[ITEM].astype(object).str.contains(EVENT_PART, regex=False)),
        (BAD_TIME, frame[TIME].isna()),
        (OTHER_TIME, np.isinf(frame[TIME])),
    ]
    if catalogue is not None and schema.unknown_items == "reject":
        checks.append((UNKNOWN_ITEM, ~frame[ITEM].isin(catalogue)))
    frame = frame[_reject("interactions", chunk, frame, checks, rejects)]
    typed = {USER: frame[USER], ITEM: frame[ITEM], TIME: frame[TIME].astype("int64")}
    of_users = schema.user_columns  # their values join later: see ``joined_users``
    for name in schema.event_categoricals:
        typed[name] = None if name in of_users else text_ids(frame[name])
    if schema.time_zone:
        typed.update(clock(typed[TIME].to_numpy(), schema.time_zone))
    for name in schema.event_continuous:
        typed[name] = np.nan if name in of_users else pd.to_numeric(frame[name], errors="coerce").astype("float32")
    typed[SOURCE_ROW] = frame[SOURCE_ROW].astype("int64")
    if SPLIT in frame:  # a reader that brings a test set
        typed[SPLIT] = frame[SPLIT].astype("int8")
    return pd.DataFrame(typed)


def clean_users(chunks: list[Chunk], schema: DataSchema, rejects: Rejects) -> pd.DataFrame:
    """The table of users: one row a user, indexed by id, with ``user_columns``: text or None, float32."""
    known, parts = pd.Index([], dtype=object), []
    for chunk in chunks:
        rejects.take("users", chunk)
        frame = chunk.rows.reset_index(drop=True)
        frame[USER] = text_ids(frame[USER])
        again = frame[USER].notna() & (frame.duplicated([USER], keep="first") | frame[USER].isin(known))
        checks = [(NO_USER, frame[USER].isna()), (LONG_ID, _too_long(frame[USER])), (DUPLICATE, again)]
        frame = frame[_reject("users", chunk, frame, checks, rejects)]
        known = known.union(pd.Index(frame[USER], dtype=object), sort=False)
        typed = {}
        for name in schema.user_columns:
            number = name in schema.event_continuous
            as_number = pd.to_numeric(frame[name], errors="coerce").astype("float32") if number else None
            typed[name] = text_ids(frame[name]) if as_number is None else as_number.where(np.isfinite(as_number))
        parts.append(pd.DataFrame(typed).set_index(pd.Index(frame[USER], dtype=object)))
    return pd.concat(parts)


def joined_users(events: pd.DataFrame, users: pd.DataFrame | None) -> pd.DataFrame:
    """Clean events with the attributes of their users; null for users that the table does not have."""
    if users is None:
        return events
    return events.assign(**{name: events[USER].map(users[name]) for name in users.columns})


def _flag(raw: pd.Series) -> pd.Series:
    """0 or 1 as float64, NaN for anything else. Takes booleans, numbers and their text."""
    text = raw.astype(str).str.strip().str.lower().replace({"true": "1", "false": "0"})
    value = pd.to_numeric(text, errors="coerce")
    return value.where(value.isin([0, 1]))


def clean_searches(chunk: Chunk, known: pd.Index, rejects: Rejects) -> pd.DataFrame:
    """Checks one chunk of a log of searches: typed rows out, USER "" where there is none; each bad row goes to
    ``rejects`` once. ``known``: items that can be answered."""
    rejects.take("searches", chunk)
    frame = chunk.rows.reset_index(drop=True)
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
        (OTHER_TIME, np.isinf(frame[TIME])),
        (BAD_POSITION, ~((place >= 1) & (place <= MAX_POSITION) & (place % 1 == 0))),
        (BAD_CLICK, clicked.isna()),
        (UNKNOWN_ITEM, ~frame[ITEM].isin(known)),
    ]
    good = _reject("searches", chunk, frame, checks, rejects)
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


def clean_items(chunks: list[Chunk], schema: DataSchema, rejects: Rejects) -> pd.DataFrame:
    """The catalogue: one row an item, ids and attributes typed."""
    known, parts = pd.Index([], dtype=object), []
    for chunk in chunks:
        rejects.take("items", chunk)
        frame = chunk.rows.reset_index(drop=True)
        if SOURCE_ROW not in frame:
            frame[SOURCE_ROW] = np.arange(len(frame))
        frame[ITEM] = text_ids(frame[ITEM])
        checks = [
            (NO_ITEM, frame[ITEM].isna()),
            (LONG_ID, _too_long(frame[ITEM])),
            (PARTED_ID, frame[ITEM].astype(object).str.contains(EVENT_PART, regex=False)),
            (DUPLICATE, frame[ITEM].notna() & (frame.duplicated([ITEM], keep="first") | frame[ITEM].isin(known))),
        ]
        frame = frame[_reject("items", chunk, frame, checks, rejects)]
        known = known.union(pd.Index(frame[ITEM], dtype=object), sort=False)
        typed = {ITEM: frame[ITEM], TITLE: frame[TITLE].fillna("").astype(str)}
        typed[TEXT] = frame[TEXT].fillna("").astype(str) if TEXT in frame else typed[TITLE]
        for name in schema.item_categoricals:
            typed[name] = text_ids(frame[name])
        for name, separator in schema.separators.items():
            values = [list_values(value, name, separator) for value in frame[name]]
            typed[name] = pd.Series(object_column(values), frame.index)
        for name in schema.item_continuous:
            typed[name] = pd.to_numeric(frame[name], errors="coerce").astype("float32")
        parts.append(pd.DataFrame(typed))
    return pd.concat(parts, ignore_index=True)


def default_event_columns(frame: pd.DataFrame, event: str, weight: float) -> pd.DataFrame:
    """Fills event type and weight where a data set has none."""
    if EVENT not in frame:
        frame[EVENT] = event
    if WEIGHT not in frame:
        frame[WEIGHT] = np.float32(weight)
    return frame
