"""What was appended live joins the prepared features: encoded by the same fitted workflow, behind the same ids.

    features/            as prepared, or as refreshed before
    log of the store     what was appended since   ──▶   features of the next state, split by time

The newest of the appended events become the test, those before them the validation, all else is for training, so no
event that is judged was learned by the models that are there or is learned by those that come. Events of the data set
are never judged again. New items get ids behind the old ones; fitted statistics stay.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.cleaning import clean_items
from preprocessing.events import write_events
from preprocessing.features import CATALOGUE_FILE, EVENTS_FILE, LOG_NUMBER, SHOWN_FILE, Features
from preprocessing.item_lists import object_column
from preprocessing.item_rows import sold_out
from preprocessing.items import ITEM_WORKFLOW, SHOWN, described, encoded, write_catalogue
from preprocessing.prepare import WORKFLOW, WORKFLOWS, compile_transforms
from preprocessing.readers.base import Chunk
from preprocessing.rejects import Rejects
from preprocessing.sequences import WHOLE, typed, write_requests
from preprocessing.shown import impressions, write_shown
from preprocessing.workflow import checksums, dataset, extend_vocabulary, load_workflow, nvt
from vivace import contract
from vivace.context import category_text, clock, number
from vivace.contract import (
    CONTEXT,
    EVENT,
    ITEM,
    SOURCE_ROW,
    SPLIT,
    TEST,
    TEXT,
    TIME,
    TITLE,
    TRAIN,
    USER,
    VALID,
    DataSchema,
)
from vivace.manifest import MANIFEST, Progress, Step, read_manifest, replaced
from vivace.store.histories import SECOND_MS
from vivace.store.interface import Event, StoreError
from vivace.store.opening import store_of_worker
from vivace.suspects import Suspects

REMADE = ("train", "valid", "test", WHOLE, "scratch", EVENTS_FILE, SHOWN_FILE, MANIFEST)
MOST = 5_000_000  # events of the log that are taken at once, the newest
_NEW, _PLACE = "new", "place"


@dataclass(frozen=True)
class Appended:
    """Events of the store's log: ``rows`` USER, ITEM, EVENT (None without a type), TIME in ms, what they carry of
    their moment and what the store knows of the user, in the order they came. ``until``: number of the newest;
    ``aged_out``: those between that the log no longer has; ``suspect``: those that are left out; ``shown``: USER, ITEM
    and TIME of what was only shown."""

    rows: pd.DataFrame
    until: int
    aged_out: int
    suspect: int = 0
    shown: pd.DataFrame = field(default_factory=lambda: _columns([]))


def appended_since(
    store: Path,
    after: int,
    until: int | None = None,
    user_columns: tuple[str, ...] = (),
    context: tuple[str, ...] = (),
    minute_events: int = 0,
) -> Appended:
    """What the log of the store has after event number ``after``, up to ``until`` (None: to its end), with the columns
    ``context`` that the events carry; of ``user_columns``, where they do not, what the store knows of the user.
    ``minute_events``: of a person (``Features.minute_events``)."""
    log = store_of_worker(store, readonly=True)
    try:
        newest, logged = log.live_events(after, most=MOST, until=until)
        suspects, taken = Suspects(minute_events), [event for event in logged if not event.shown]
        events = [e for e in taken if not suspects.why(e.user_id, e.timestamp_ms, e.came_ms)]
        users = list(dict.fromkeys(event.user_id for event in events))
        known = dict(zip(users, log.attributes(users) if users and user_columns else [None] * len(users), strict=True))
        if fault := log.fault():
            raise StoreError(f"attributes of users: {fault}; try again, or with a larger limit_ms in its URL")
    finally:
        log.close()
    rows = _columns(events)
    moments = [_readable(json.loads(e.context)) if e.context else {} for e in events]
    for name in dict.fromkeys((*context, *user_columns)):
        of_user = [(known[e.user_id] or {}).get(name) if name in user_columns else None for e in events]
        rows[name] = [m.get(name, of) for m, of in zip(moments, of_user, strict=True)]
    shown = _columns([event for event in logged if event.shown])
    return Appended(rows, newest, max(newest - after - len(logged), 0), len(taken) - len(events), shown)


def _columns(events: Sequence[Event]) -> pd.DataFrame:
    """USER, ITEM, EVENT and TIME."""
    columns = {
        USER: [e.user_id for e in events],
        ITEM: [e.item_id for e in events],
        EVENT: [e.event_type or None for e in events],
    }
    rows = pd.DataFrame({name: np.array(values, object) for name, values in columns.items()})
    rows[TIME] = np.array([e.timestamp_ms for e in events], np.int64)
    return rows


def _readable(context: dict[str, Any]) -> dict[str, Any]:
    """Values of an event's context, without text that no UTF-8 can hold, which a store of before may have taken."""
    return {n: v for n, v in context.items() if not isinstance(v, str) or v == v.encode(errors="ignore").decode()}


def read_catalogue(file: Path, schema: DataSchema, rejects: Path) -> pd.DataFrame:
    """Items of a CSV or Parquet file by the schema's own names: ITEM, TITLE, optional TEXT and the attributes. What
    is wrong with a row is written to ``rejects``. Raises ValueError for a column that is missing."""
    rows = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype={ITEM: str})
    missing = [name for name in (ITEM, *schema.item_columns) if name not in rows]
    if missing:
        raise ValueError(f"{file}: expected the columns {[ITEM, *schema.item_columns]}, missing {missing}")
    return clean_items([Chunk(rows)], schema, Rejects(rejects))


def upserted_items(store: Path, schema: DataSchema, rejects: Path) -> pd.DataFrame | None:
    """Items that servers were sent (``vivace items``) and that are not sold out, as ``read_catalogue`` gives them; None
    where there are none."""
    log = store_of_worker(store, readonly=True)
    try:
        rows = [json.loads(change.row) for change in log.catalogue_changes(0) if not change.removed]
    finally:
        log.close()
    rows = [row for row in rows if not sold_out(row)]
    columns = (ITEM, TITLE, TEXT, *schema.item_columns)
    frame = pd.DataFrame({name: object_column([row.get(name) for row in rows]) for name in columns})
    return clean_items([Chunk(frame)], schema, Rejects(rejects)) if rows else None


# -- rows as columns -----------------------------------------------------------------------------------
def _flat(table: pa.Table, suffix: str = "") -> tuple[np.ndarray, pd.DataFrame]:
    """(users object [n], their events one a row: _PLACE, the user's row, and every list column)."""
    names = [name for name in table.column_names if name != USER]
    lists = {name.removesuffix(suffix): table[name].combine_chunks() for name in names}
    lengths = np.diff(next(iter(lists.values())).offsets.to_numpy())
    columns = {name: values.flatten().to_numpy(zero_copy_only=False) for name, values in lists.items()}
    users = table[USER].to_numpy(zero_copy_only=False) if len(table) else np.empty(0, object)
    return users, pd.DataFrame({_PLACE: np.repeat(np.arange(len(table)), lengths), **columns})


def _encoded(users: np.ndarray, events: pd.DataFrame, file: Path) -> Path:
    """``events`` sorted by _PLACE as one encoded partition, lists by user, as NVTabular writes it."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(events[_PLACE], minlength=len(users)))]), pa.int32())
    columns = {
        f"{name}-list": pa.ListArray.from_arrays(offsets, pa.array(events[name].to_numpy()))
        for name in events
        if name not in (_PLACE, _NEW)
    }
    pq.write_table(pa.table({USER: pa.array(users, pa.string()), **columns}), file, row_group_size=max(len(users), 1))
    return file


# -- items ---------------------------------------------------------------------------------------------
def new_items(rows: pd.DataFrame, known: pd.Index, catalogue: pd.DataFrame | None, config: dict[str, Any]) -> list[str]:
    """Raw ids that the vocabulary gains: those of ``catalogue``, and where the schema keeps items without one those of
    the log, in the order they came. A vocabulary with a limit keeps to it: of ``freq_threshold`` events, or as it is
    (``max_size``)."""
    limits, keeps = config["vocabulary"], config["schema"]["unknown_items"] == "keep"
    if limits["max_size"] or (catalogue is None and not keeps):
        return []
    counts = rows[ITEM].value_counts()
    of_log = [str(item) for item in dict.fromkeys(rows[ITEM]) if counts[item] >= limits["freq_threshold"]]
    listed = [] if catalogue is None else catalogue[ITEM].tolist()
    if limits["freq_threshold"]:
        listed = [item for item in listed if counts.get(item, 0) >= limits["freq_threshold"]]
    allowed = [*listed, *(of_log if keeps else [])]
    return [item for item in dict.fromkeys(allowed) if item not in known]


def _add_items(old: Features, folder: Path, items: list[str], catalogue: pd.DataFrame | None) -> None:
    """Rows of ``items`` behind those that are there, attributes by the fitted workflow."""
    schema = old.schema
    raw = pd.DataFrame({ITEM: np.array(items, object)})
    raw = described(raw if catalogue is None else raw.merge(catalogue, on=ITEM, how="left"), schema)
    there = pd.read_parquet(folder / CATALOGUE_FILE)
    write_catalogue(pd.concat([there, raw[list(there)]], ignore_index=True), schema, folder)
    rows = raw[SHOWN]
    if schema.item_attributes:
        rows = pd.concat([rows, encoded(load_workflow(old.folder / ITEM_WORKFLOW), raw, schema)], axis=1)
    before = old.items()
    pd.concat([before, rows[before.columns]], ignore_index=True).to_parquet(folder / old.items_file.name, index=False)


# -- events --------------------------------------------------------------------------------------------
def encode_events(workflow: nvt.Workflow, rows: pd.DataFrame, schema: DataSchema, scratch: Path) -> pd.DataFrame:
    """``rows`` in their order, encoded, with labels still to be set; USER raw."""
    scratch.mkdir(parents=True)
    frame = rows[[USER, ITEM, TIME]].copy()
    frame[SOURCE_ROW] = np.arange(len(frame))
    rows = rows.assign(**clock(rows[TIME].to_numpy(), schema.time_zone)) if schema.time_zone else rows
    for name in schema.raw_categoricals:
        frame[name] = [category_text(v) or None for v in rows[name]] if name in rows else None
        frame[name] = frame[name].astype(object)
    for name in schema.event_continuous:
        frame[name] = [number(v) for v in rows[name]] if name in rows else np.nan
    for name in (SPLIT, *(contract.label_column(h.name) for h in schema.heads)):
        frame[name] = np.zeros(len(frame), np.int64)
    text = pa.schema([
        (n, pa.string() if t == np.dtype(object) else pa.from_numpy_dtype(t)) for n, t in frame.dtypes.items()
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pandas(frame, text, preserve_index=False), scratch / "rows.parquet")
    workflow.transform(dataset([scratch / "rows.parquet"])).to_parquet(str(scratch / "encoded"))
    parts = [_flat(pq.read_table(f), "-list") for f in sorted((scratch / "encoded").glob("*.parquet"))]
    frames = [events.assign(**{USER: users[events[_PLACE]]}) for users, events in parts]
    return pd.concat(frames, ignore_index=True).drop(columns=[_PLACE, SPLIT])


def _without_known(rows: pd.DataFrame, users: np.ndarray, old: pd.DataFrame) -> np.ndarray:
    """bool [n]: which of the encoded ``rows`` the data set does not have. Each of its events stands for one of the log
    of the same user, item and time, by the millisecond or the whole second (as ``store.histories.merged``)."""
    touched = np.isin(users[old[_PLACE]], rows[USER].unique()) if len(old) else np.empty(0, bool)
    there = old[touched]
    keys = zip(users[there[_PLACE]], there[ITEM], there[TIME], strict=True)
    counts: dict[tuple[str, int, int], int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    fresh = np.ones(len(rows), bool)
    for i, (user, item, time_ms) in enumerate(zip(rows[USER], rows[ITEM], rows[TIME], strict=True)):
        for moment in (time_ms, time_ms - time_ms % SECOND_MS):
            if counts.get((user, item, moment), 0):
                counts[user, item, moment] -= 1
                fresh[i] = False
                break
    return fresh


def cuts(times_ms: np.ndarray, share: float) -> tuple[int, int]:
    """(first time of the validation, first of the test) in ms: the newest ``share`` of the times each."""
    ordered = np.sort(times_ms)
    valid, test = (ordered[min(int(len(ordered) * (1 - k * share)), len(ordered) - 1)] for k in (2, 1))
    return int(valid), int(test)


def _marks(times_ms: np.ndarray, new: np.ndarray, first_valid: int, first_test: int) -> np.ndarray:
    """int8 of each event: only new ones are predicted; those of the data set beside them are history."""
    held_out = np.where(times_ms >= first_test, TEST, VALID)
    held_out = np.where(new, held_out, CONTEXT)
    return np.where(times_ms >= first_valid, held_out, TRAIN).astype("int8")


class _Merge:
    """The partitions that are there with the events of ``rows`` (encoded, USER raw)."""

    def __init__(self, files: list[Path], rows: pd.DataFrame, scratch: Path) -> None:
        self.files, self.scratch = files, scratch
        scratch.mkdir(parents=True)
        self.twice = self.known = 0
        keys = [name for name in (USER, ITEM, TIME, EVENT) if name in rows]
        again = rows.duplicated(keys, keep="first")
        self.twice, rows = int(again.sum()), rows[~again]
        self.parts = [_flat(pq.read_table(file)) for file in files]
        owner: dict[str, int] = {user: i for i, (users, _) in enumerate(self.parts) for user in users}
        spare = pd.util.hash_array(rows[USER].to_numpy(object)) % len(files)
        part = np.array([owner.get(u, int(s)) for u, s in zip(rows[USER], spare, strict=True)], int)
        self.rows: list[pd.DataFrame] = []
        for i, (users, old) in enumerate(self.parts):
            mine = rows[part == i]
            fresh = _without_known(mine, users, old)
            self.known += int((~fresh).sum())
            self.rows.append(mine[fresh])

    @property
    def times(self) -> np.ndarray:
        """Of the events that join, int64 [n]."""
        return np.concatenate([rows[TIME].to_numpy(np.int64) for rows in self.rows])

    def write(self, first_valid: int, first_test: int) -> list[Path]:
        """The encoded partitions, each user's events in order of time, marked."""
        return [self._write(i, first_valid, first_test) for i in range(len(self.files))]

    def _write(self, number: int, first_valid: int, first_test: int) -> Path:
        (users, old), rows = self.parts[number], self.rows[number]
        all_users = pd.Index(users).append(pd.Index(rows[USER].unique()).difference(pd.Index(users), sort=False))
        new = rows.assign(**{_PLACE: all_users.get_indexer(rows[USER]), _NEW: True}).drop(columns=USER)
        for name in old.columns.difference(new.columns):  # what the log does not say
            new[name] = contract.NULL_ID if old[name].dtype.kind == "i" else 0.0
        old = old.assign(**{_NEW: False})
        events = pd.concat([old, new[old.columns].astype(old.dtypes)], ignore_index=True)
        order = np.lexsort((np.arange(len(events)), events[TIME], events[_PLACE]))
        events = events.iloc[order].reset_index(drop=True)
        events[SPLIT] = _marks(events[TIME].to_numpy(), events[_NEW].to_numpy(), first_valid, first_test)
        return _encoded(all_users.to_numpy(object), events, self.scratch / self.files[number].name)


# -- the step ------------------------------------------------------------------------------------------
def refresh_features(
    old: Features, appended: Appended, folder: Path, share: float, catalogue: pd.DataFrame | None, say: Progress
) -> dict[str, Any]:
    """Writes the features ``old`` with what was ``appended`` to ``folder``, unless they are there; returns the
    manifest. ``share``: of the new events, the newest for the test and as many before them for the validation.
    ``catalogue``: new items by the schema's columns (``read_catalogue``). Raises ValueError where no event is new."""
    before = read_manifest(old.folder, "vivace prepare")
    config = {**before["config"], "refresh": {"share": share}}
    listed = [] if catalogue is None else catalogue[ITEM].tolist()
    inputs = {"data": before["inputs"].get("data", ""), "refreshed": before["key"], "log": str(appended.until)}
    step = Step(folder, "refresh features", config | {"items": listed}, before["seed"], inputs)
    if (manifest := step.finished(say, "refreshed features are there")) is not None:
        return manifest
    old.files(WHOLE)  # raises ValueError for features of another version
    started = time.monotonic()
    with replaced(folder) as fresh, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shutil.copytree(
            old.folder, fresh, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if n in REMADE]
        )
        results = _build(old, appended, fresh, share, catalogue, say)
        shutil.rmtree(fresh / "scratch")
        sums = {name: checksums(fresh / name) for name in WORKFLOWS if (fresh / name).is_dir()}
        done = Step(fresh, step.name, step.config, step.seed, inputs)
        results = before["results"] | results | {"checksums": sums, "given_test": 0, "given": 0}
        return done.finish(time.monotonic() - started, **results)


def _build(
    old: Features, appended: Appended, folder: Path, share: float, catalogue: pd.DataFrame | None, say: Progress
) -> dict[str, Any]:
    """Fills ``folder``; what the manifest says of it."""
    schema, scratch = old.schema, folder / "scratch"
    config = read_manifest(old.folder, "vivace prepare")["config"]
    load_workflow(old.folder / WORKFLOW)  # its checksums hold, so the copy's may be taken
    known = pd.Index(old.items()[ITEM])
    timed = appended.rows[appended.rows[TIME] > 0]
    items = new_items(timed, known, catalogue, config)
    rows = timed
    if schema.unknown_items == "reject":
        rows = timed[timed[ITEM].isin(known.append(pd.Index(items, dtype=object)))]
    if not len(rows):
        raise ValueError(
            f"refresh: expected appended events of items that the catalogue has, got none among {len(timed):,}; name "
            "the file of new items with --items"
        )
    extend_vocabulary(folder / WORKFLOW, ITEM, items)
    if items:
        _add_items(old, folder, items, catalogue)
    workflow = load_workflow(folder / WORKFLOW, checksums(folder / WORKFLOW))
    say(f"{len(rows):,} appended events, {len(items):,} new items; encoding")
    files = old.files(WHOLE)
    encoded = typed(encode_events(workflow, rows, schema, scratch / "new"), files, schema)
    merge = _Merge(files, encoded, scratch / "encoded")
    times = merge.times
    if not len(times):
        raise ValueError(f"refresh: expected new events, got {len(rows):,} that the features have already")
    first_valid, first_test = cuts(times, share)
    partitions, counts = merge.write(first_valid, first_test), dict[str, int]()
    users = sum(pq.read_metadata(f).num_rows for f in partitions)
    events = sum(len(part) for _, part in merge.parts) + len(times)
    write_events(partitions, events, folder / EVENTS_FILE, schema.context_categoricals)
    shown = 0
    if schema.shown_types:
        before = old.shown()
        there = pd.DataFrame({USER: before.users, ITEM: before.ids, TIME: before.times_ms})
        came = impressions(appended.shown, pd.Index(Features(folder).items()[ITEM]))
        shown = write_shown([there, came], folder / SHOWN_FILE)
    for part in partitions:
        for name, n in write_requests(part, folder, schema, schema.sessions).items():
            counts[name] = counts.get(name, 0) + n
    if items:
        compile_transforms(workflow, schema, folder)
    say(f"{len(times):,} new events: validation from {first_valid} ms, test from {first_test} ms")
    return {
        LOG_NUMBER: appended.until, "events": events, "users": users, "requests": counts,
        "items_in_vocabulary": len(known) + len(items), "shown": shown,
        "split": f"appended events by time: validation from {first_valid} ms, test from {first_test} ms",
        "refresh": {
            "taken": len(times), "new items": len(items), "aged out of the log": appended.aged_out,
            "suspect": appended.suspect,
            "had before": merge.known, "twice": merge.twice, "without a time": len(appended.rows) - len(timed),
            "of items without a catalogue row": len(timed) - len(rows),
        },
    }  # fmt: skip
