"""The first stage of the ensemble as a plain function on arrays, so that tests need no server.

``FeatureTransform`` turns ragged raw requests into fixed-length tensors in one vectorised pass over all rows it is
handed; ``response.ResponseStage`` turns ranked ids back into the public answer. Neither imports Triton, torch or
NVTabular.
Axis legend: B rows, T history events, V item ids, N candidates, K answered items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from serving.runtime.known import Histories, Known, TypedHistory
from serving.runtime.live_catalogue import LiveCatalogue
from serving.runtime.live_feed import LiveFeed
from serving.runtime.moment import Moment
from vivace import windows
from vivace.context import ContextColumns, parse_context, unknown_names
from vivace.contract import (
    EVENT_PART,
    EVENT_TYPE,
    FIRST_ID,
    HISTORY,
    ITEM,
    MAX_EVENT_TYPE_BYTES,
    MAX_HISTORY_EVENTS,
    MAX_ID_BYTES,
    MAX_QUERY_BYTES,
    MAX_TOP_K,
    OOV_ID,
    PADDING_ID,
    QUERY,
    STATUS_DEGRADED,
    STATUS_ERROR,
    STATUS_OK,
    TOP_K,
    USER_ID,
    StageTensors,
)
from vivace.live import RECENT
from vivace.masks import excluded, seen_ids
from vivace.onnx_session import open_session
from vivace.store.interface import ServingStore

MAX_DIGITS = 15  # of a time in ms
NO_SUCH_ITEM = "\0"
NO_SEARCH = f"no search in this run; {QUERY.name} was left out: 'vivace train --task search', then 'vivace compile'"
SHOWN_TYPES = 20


@dataclass(frozen=True)
class Row:
    """One user's request, validated: ``history`` None means "ask the feature store"."""

    user_id: str
    history: list[str] | None
    top_k: int
    query: str = ""
    types: tuple[str, ...] | None = None
    """Of the events of ``history``, where they came with it; "" for one that is not known."""
    times: tuple[int, ...] | None = None
    """Unix ms of the same; 0 for one that is not known."""
    context: Mapping[str, str | float] = field(default_factory=dict)
    """Values that CONTEXT names, by column."""
    unknown_context: tuple[str, ...] = ()
    """Names in it that are no columns."""


def checked_text(raw: bytes, what: str, limit_bytes: int) -> str:
    """Raises ValueError for what is longer or no UTF-8; ``what``: what errors call it."""
    if len(raw) > limit_bytes:
        raise ValueError(f"{what}: expected at most {limit_bytes} bytes, got {len(raw)}; shorten it")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what}: expected UTF-8, got byte 0x{raw[error.start]:02x} at offset {error.start}; encode it as UTF-8"
        ) from None


def _history_item(raw: bytes, index: int) -> str:
    """One event of HISTORY; an over-long id cannot be an item and becomes one that no catalogue has."""
    item, *parts = raw.split(EVENT_PART.encode())
    if len(item) > MAX_ID_BYTES:
        raw = EVENT_PART.encode().join([NO_SUCH_ITEM.encode(), *parts])
    return checked_text(raw, f"{HISTORY.name}[{index}]", len(raw))


def _parts_of_events(
    events: list[str], shown_types: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...], tuple[int, ...]]:
    """(items, types, times) of events whose parts are joined by EVENT_PART, without those of ``shown_types``. Raises
    ValueError."""
    items, types, times = list[str](), list[str](), list[int]()
    for index, event in enumerate(events):
        item, *more = event.split(EVENT_PART)
        if len(more) > 2 or (len(more) == 2 and more[1] and not more[1].isdecimal()):
            raise ValueError(
                f"{HISTORY.name}[{index}]: expected an item id, or item id, event type and Unix time in ms with "
                f"U+001F between them, got {event[:60]!r}"
            )
        kind, when = [*more, "", ""][:2]
        if len(kind.encode()) > MAX_EVENT_TYPE_BYTES or len(when) > MAX_DIGITS:
            raise ValueError(
                f"{HISTORY.name}[{index}]: expected an event type of at most {MAX_EVENT_TYPE_BYTES} bytes and a time "
                f"in ms, got {event[:60]!r}"
            )
        if kind not in shown_types or not kind:
            items.append(item)
            types.append(kind)
            times.append(int(when or 0))
    return items, tuple(types), tuple(times)


def parse_row(
    user_id: bytes,
    query: bytes,
    history: np.ndarray,
    top_k: int,
    context: bytes = b"",
    columns: ContextColumns | None = None,
) -> Row:
    """One row of the public call; raises ValueError naming the input, what was expected, what came."""
    user = checked_text(user_id, USER_ID.name, MAX_ID_BYTES)
    text = checked_text(query, QUERY.name, MAX_QUERY_BYTES)
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"{TOP_K.name}: expected 1..{MAX_TOP_K}, got {top_k}")
    if len(history) > MAX_HISTORY_EVENTS:
        raise ValueError(
            f"{HISTORY.name}: expected at most {MAX_HISTORY_EVENTS} events, got {len(history)}; send the newest ones"
        )
    try:
        items = [raw.decode() for raw in history if raw]  # "" pads rows of unequal length
        if items and max(map(len, items)) > MAX_ID_BYTES:
            raise ValueError
    except ValueError:  # name the event at fault, or let over-long ids pass as unknown items
        items = [_history_item(raw, i) for i, raw in enumerate(history) if raw]
    types = times = None
    if any(EVENT_PART in item for item in items):
        items, types, times = _parts_of_events(items, columns.shown_types if columns else ())
        if not items:
            types = times = None
    values, unknown = parse_context(context, columns or ContextColumns()) if context else ({}, [])
    return Row(user, items or None, int(top_k), text, types, times, values, tuple(unknown))


def unknown_types(types: Iterable[str], event_types: Set[str], name: str) -> str:
    """Which of ``types``, sent in the tensor ``name``, the data set does not have, as a reason of STATUS; "" where it
    has them all, or no types at all."""
    unknown = sorted({kind for kind in types if kind} - set(event_types)) if event_types else []
    if not unknown:
        return ""
    known = sorted(event_types)
    shown = ", ".join(known[:SHOWN_TYPES]) + (", …" if len(known) > SHOWN_TYPES else "")
    return f"the data has no {name} {unknown[0][:64]!r}; it has {shown}"


def with_reason(status: str, reason: str) -> str:
    """``status`` of a row with one more reason to be degraded ("": none); an error stays as it is."""
    if not reason or status.startswith(STATUS_ERROR):
        return status
    return f"{STATUS_DEGRADED}{reason}" if status == STATUS_OK else f"{status}; {reason}"


NO_IDS = np.empty(0, np.int64)


def search_for(unwanted: np.ndarray, query: str) -> str:
    """One row of SEARCH_FOR."""
    return f"{','.join(map(str, unwanted.tolist()))} {query}" if query else ""


def read_search_for(raw: bytes) -> tuple[np.ndarray, str]:
    """The reverse: (ids int64, query), (none, "") for a row without a query."""
    if not raw:
        return NO_IDS, ""
    ids, query = raw.decode().split(" ", 1)
    return np.array(ids.split(",") if ids else [], np.int64), query


class ItemVocabulary:
    """Raw item ids to ids, by the compiled workflow: ``graph`` has one string input and one int64 output [events]; it
    is read at once, or (``lazy``) when it is first needed."""

    def __init__(self, graph: Path, threads: int = 1, lazy: bool = False) -> None:
        self._graph, self._threads = graph, threads
        self._session = None if lazy else open_session(graph, threads)

    def __call__(self, items: Sequence[str]) -> np.ndarray:
        """Ids int64 [len(items)]; below FIRST_ID for an item that the models do not know."""
        if not items:
            return np.empty(0, np.int64)
        if self._session is None:
            self._session = open_session(self._graph, self._threads)
        ids: np.ndarray = self._session.run(None, {ITEM: np.array(items, object)})[0]
        return ids


class FeatureTransform:
    """Rows to the tensors of ``retrieval``.

    Args:
        graph: path of ``transform.onnx``, see ``ItemVocabulary``.
        store: where histories live when the request carries none.
        shapes: T and V of the trained models.
        exclude_seen: whether items of the history may not be answered.
        catalogue: what changed of it, where fresh items join.
    """

    def __init__(
        self, graph: Path, store: ServingStore, shapes: StageTensors, exclude_seen: bool = True, threads: int = 1,
        catalogue: LiveCatalogue | None = None,
    ) -> None:  # fmt: skip
        self.item_ids = ItemVocabulary(graph, threads)
        self.moment = Moment(graph.parent, shapes, store, threads)
        self.live = None
        if shapes.rising:
            counted = shapes if catalogue is not None else replace(shapes, rising_fresh=0)
            self.live = LiveFeed(graph.parent / RECENT, store, self.item_ids, counted, self.moment)
        self._store, self._shapes, self._exclude_seen, self._catalogue = store, shapes, exclude_seen, catalogue

    def known(self, rows: Sequence[Row], histories: Histories | None = None) -> Known:
        """What the stores know of ``rows`` now. ``histories``: reads those of users, None the store itself."""
        if self._catalogue is not None:
            self._catalogue.refresh()
        unsent = [i for i, row in enumerate(rows) if row.history is None and row.user_id]
        read, users = histories or self._store.typed_histories, [rows[i].user_id for i in unsent]
        stored = dict(zip(unsent, read(users) if users or histories else [], strict=True))
        sent_types = self._shapes.types and any(row.types for row in rows)
        types = self._store.event_types() if sent_types else set[str]()
        values = self.moment.known([row.user_id for row in rows], [row.context for row in rows])
        known = Known(stored, values, types, self._store.fault())
        if self.live is not None:
            known = replace(known, epoch=self.live.epoch, shareable=False)
        if self._catalogue is not None:
            whole = known.shareable and not self._catalogue.left_out  # which are left out goes by what came first
            known = replace(known, number=self.number, shareable=whole)
        return known

    def seen(self, rows: Sequence[Row], known: Known) -> list[np.ndarray]:
        """Ids int64 of all items of each row's history, however much of it the models read; of those that were put in
        since, the live catalogue's ids."""
        late = {} if self._catalogue is None else self._catalogue.ids
        histories = [
            row.history if row.history is not None else (known.stored.get(i) or [[]])[0] for i, row in enumerate(rows)
        ]
        ids = [zip(history, self.item_ids(history).tolist(), strict=True) for history in histories]
        of_rows = ([id_ if id_ >= FIRST_ID else late.get(item, PADDING_ID) for item, id_ in of] for of in ids)
        return [np.array([id_ for id_ in of if id_ != PADDING_ID], np.int64) for of in of_rows]

    @property
    def number(self) -> int:
        """Of the newest change of the catalogue that is known; 0 where none is read."""
        return 0 if self._catalogue is None else self._catalogue.number

    def still(self) -> AbstractContextManager[object]:
        """While it is held live counters do not move."""
        return nullcontext() if self.live is None else self.live.still

    def late(self) -> str:
        """Why changes of the catalogue or live counters may be old, as a reason of STATUS; "" where they are not."""
        parts = [part.status() for part in (self.live, self._catalogue) if part is not None]
        return "; ".join(filter(None, parts))

    def __call__(self, rows: Sequence[Row], known: Known | None = None) -> tuple[list[np.ndarray], list[str]]:
        """(inputs of ``retrieval`` in the contract's order, status of each row): history ids int64 [B, T], exclude bool
        [B, V] (for an index seen ids int64 [B, S]) and, as the shapes read them, times and types int64 [B, T] (0 and
        null where the history came without), context ids int64 [B, C] and amounts float32 [B, F]; with live counters,
        rising ids int64 [B, M] and features float32 [B, M, F]; with a live catalogue, rising fresh items alike, then
        fresh items of the history int64 [B, M']. ``known``: what the stores know of the rows, None to read it."""
        t, catalogue = self._shapes.history, self._catalogue
        known = self.known(rows) if known is None else known
        stored = known.stored
        histories = [
            row.history if row.history is not None else (stored.get(i) or [[]])[0] for i, row in enumerate(rows)
        ]
        ids = self.item_ids([item for history in histories for item in history])
        history_BT = np.full((len(rows), t), PADDING_ID, np.int64)
        ids_to_exclude, status, read, start = [], [], list[int](), 0
        seen_fresh = np.zeros((len(rows), self._shapes.fresh), np.int64)
        for i, history in enumerate(histories):
            history_ids = ids[start : start + len(history)]
            start += len(history)
            raw_ids = history_ids
            if catalogue is not None and catalogue.fresh is not None:
                history_ids = self._with_fresh(history, history_ids, seen_fresh[i])
            newest = history_ids[len(history_ids) - windows.newest(history_ids, t, self._shapes.slide) :]
            read.append(len(newest))
            history_BT[i, t - len(newest) :] = newest
            ids_to_exclude.append(raw_ids if self._exclude_seen else raw_ids[:0])
            status.append(self._status(rows[i], history_ids, known_user=stored.get(i) is not None))
        gone = NO_IDS if catalogue is None else catalogue.gone
        if self._shapes.lists_seen:
            if len(gone):
                ids_to_exclude = [np.concatenate([h, gone]) for h in ids_to_exclude]
            seen = seen_ids(ids_to_exclude, self._shapes.seen)
            status = [with_reason(s, self._not_left_out(h)) for s, h in zip(status, ids_to_exclude, strict=True)]
        else:
            seen = excluded(ids_to_exclude, self._shapes.items)
            seen[:, gone] = True
        moment = self.moment.types(self._types(rows, histories, stored), read)
        if moment and any(row.types for row in rows):
            where = f"{EVENT_TYPE.name} in {HISTORY.name}"
            unknown = [unknown_types(row.types or (), known.event_types, where) for row in rows]
            status = [with_reason(s, reason) for s, reason in zip(status, unknown, strict=True)]
        status = [
            with_reason(s, unknown_names(row.unknown_context, self.moment.columns)) if row.unknown_context else s
            for s, row in zip(status, rows, strict=True)
        ]
        context = self.moment.encoded(known.values)
        moment += context if self._shapes.context or self._shapes.amounts else []
        live: list[np.ndarray] = []
        if self.live is not None:
            newest_B = history_BT[:, -1] if catalogue is None else catalogue.newest(histories, history_BT[:, -1])
            live = self.live.rows(context[0] if self._shapes.counted else None, newest_B)
        if catalogue is not None:
            live = [*live, seen_fresh]
        if late := self.late():
            status = [with_reason(s, late) for s in status]
        if known.fault:
            status = [with_reason(s, known.fault) if row.user_id else s for s, row in zip(status, rows, strict=True)]
        if not self._shapes.timed:
            return [history_BT, seen, *moment, *live], status
        time_BT = np.zeros((len(rows), t), np.int64)
        for i, timed in stored.items():
            if timed is not None and timed[2]:
                times = timed[2][max(0, len(timed[2]) - read[i]) :]
                time_BT[i, t - len(times) :] = times
        for i, row in enumerate(rows):
            if row.times:
                time_BT[i, t - read[i] :] = row.times[len(row.times) - read[i] :]
        return [history_BT, seen, time_BT, *moment, *live], status

    @staticmethod
    def _types(
        rows: Sequence[Row], histories: Sequence[Sequence[str]], stored: Mapping[int, TypedHistory | None]
    ) -> list[Sequence[str]]:
        """Types of each row's events, as many as it has events."""
        types: list[Sequence[str]] = []
        for i, (row, history) in enumerate(zip(rows, histories, strict=True)):
            typed = stored.get(i)
            types.append(row.types if row.types is not None else typed[1] if typed else [""] * len(history))
        return types

    def _with_fresh(self, history: list[str], ids: np.ndarray, seen_M: np.ndarray) -> np.ndarray:
        """A history's ids with the trained items that stand for its fresh ones; ``seen_M``, if seen items must not be
        answered, takes the slots of those, the newest last."""
        out, slots = ids.copy(), dict[int, None]()
        assert self._catalogue is not None
        for place in np.flatnonzero(ids < FIRST_ID):
            slot, nearest = self._catalogue.stands_for(history[place])
            if slot:
                out[place] = nearest
                slots.pop(slot, None)
                slots[slot] = None
        newest = list(slots)[-len(seen_M) :] if self._exclude_seen else []
        seen_M[len(seen_M) - len(newest) :] = newest
        return out

    def _not_left_out(self, history_ids: np.ndarray) -> str:
        """What an index may answer although it was seen, as a reason of STATUS; "" where that is nothing."""
        if len(history_ids) <= self._shapes.seen:
            return ""
        distinct = len(np.unique(history_ids[history_ids >= FIRST_ID]))
        if distinct <= self._shapes.seen:
            return ""
        return f"of {distinct} items seen, the newest {self._shapes.seen} are left out of the answer"

    def _status(self, row: Row, ids: np.ndarray, known_user: bool) -> str:
        if row.query and self._shapes.search:
            from search.online import searchable  # its libraries, which a run without search does without

            if searchable(row.query):
                return STATUS_OK
            return with_reason(
                self._status(replace(row, query=""), ids, known_user), f"{QUERY.name} has no word to search for"
            )
        if row.query:
            return with_reason(self._status(replace(row, query=""), ids, known_user), NO_SEARCH)
        unknown = int((ids <= OOV_ID).sum())
        recent_known = bool((ids[-self._shapes.history :] >= FIRST_ID).any())
        if recent_known:
            if row.history is None or not unknown:
                return STATUS_OK
            return f"{STATUS_DEGRADED}{unknown} of {len(ids)} HISTORY items are not in the catalogue"
        if len(ids):
            return f"{STATUS_DEGRADED}popular items: none of the recent history items is in the catalogue"
        if not row.user_id:
            return f"{STATUS_DEGRADED}popular items: anonymous user without HISTORY"
        why = "has no history" if known_user else "is unknown"
        return f"{STATUS_DEGRADED}popular items: USER_ID {row.user_id[:64]!r} {why}"
