"""The embedded feature store: one memory-mapped LMDB file that several processes of one machine read without a lock
while one writes.

A data set fills one of two slots while the other is read; then one short transaction adds what was appended meanwhile
and exchanges them. So a store can be filled anew under a running server, and a fill that is killed changes nothing.
What was appended live is also kept in a log of its own, in the order it came, and joins every later data set.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import lmdb
import msgpack

from vivace.store.histories import MAX_STORED_EVENTS, merged
from vivace.store.interface import Event, StoreError

T = TypeVar("T")
DISK_TROUBLE = ("Input/output error", "No space left", "MDB_PANIC")  # in LMDB's words

MAP_SIZE_BYTES = 64 << 30  # address space, not disk: the file is sparse; it grows where that is not enough
MAX_READERS = 512
FILL_ROWS = 5_000  # users or titles that a fill writes in one transaction, between which events can be appended
_MAX_KEY_BYTES = 511  # LMDB's compiled limit
_USERS, _ITEMS = (b"users", b"users.1"), (b"items", b"items.1")  # the slots
_LOG, _ABOUT = b"log", b"about"
_SLOT, _EVENT_TYPES = b"slot", b"event_types"  # keys of ``about``

UserRow = tuple[str, Sequence[str], Sequence[str], Sequence[int]]  # user, items, event types, times in ms, oldest first


def _key(text: str) -> bytes:
    """LMDB's keys are short: a longer id is keyed by its digest, behind a byte that no UTF-8 text starts with."""
    raw = text.encode()
    if len(raw) <= _MAX_KEY_BYTES and raw:
        return raw
    return b"\xff" + hashlib.sha256(raw).digest()


def _batches(rows: Iterable, size: int = FILL_ROWS) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


class LmdbStore:
    """``FeatureStore`` in one LMDB folder. Values: of users, msgpack ``[items, event types, times]``; of items, the
    title; of the log, by a number that rises, msgpack ``[user, item, event type, time]``."""

    def __init__(self, path: Path, readonly: bool = False, create: bool = True) -> None:
        if (readonly or not create) and not (path / "data.mdb").exists():
            raise FileNotFoundError(f"feature store: no store at {path}; run 'vivace prepare' first")
        path.mkdir(parents=True, exist_ok=True)
        self._readonly = readonly
        self._env = lmdb.open(
            os.fspath(path),
            map_size=MAP_SIZE_BYTES,
            max_dbs=6,
            max_readers=MAX_READERS,
            readonly=readonly,
            mode=0o600,  # what users did is the owner's alone
        )
        self._env.reader_check()  # slots of processes that died
        self._databases: dict[bytes, lmdb._Database] = {}
        self._open_databases()

    # -- transactions --------------------------------------------------------------------------------
    def _open_databases(self) -> None:
        for name in (*_USERS, *_ITEMS, _LOG, _ABOUT):
            if name not in self._databases:
                try:
                    self._databases[name] = self._env.open_db(name, create=not self._readonly)
                except lmdb.NotFoundError:  # a reader of a store that was filled before it had these
                    continue

    def _begin(self, write: bool = False) -> lmdb.Transaction[bytes]:
        """A transaction; where readers that were killed hold every place, their places are freed first."""
        try:
            return self._env.begin(write=write)
        except lmdb.ReadersFullError:
            self._env.reader_check()
        except lmdb.MapResizedError:  # another process has made the map larger
            self._env.set_mapsize(0)
        return self._env.begin(write=write)

    def _written(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        """What ``work`` returns, after its transaction is on disk. A map that is full grows. Raises StoreError where
        the disk is full: nothing of the transaction was kept, and writes go on once there is room."""
        while True:
            try:
                with self._begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.Error as error:
                if not any(sign in str(error) for sign in DISK_TROUBLE):
                    raise
                raise StoreError(
                    "feature store: not stored, as its disk is full or failing; try again when there is room"
                ) from error

    def _slot(self, transaction: lmdb.Transaction[bytes]) -> int:
        about = self._databases.get(_ABOUT)
        raw = None if about is None else transaction.get(_SLOT, db=about)
        return 0 if raw is None else int(raw)

    @contextmanager
    def _reading(self, names: tuple[bytes, bytes]) -> Iterator[tuple[lmdb.Transaction[bytes], lmdb._Database]]:
        """A transaction, and the one of the databases ``names`` that is in use in it."""
        if _ABOUT not in self._databases:
            self._open_databases()
        for _ in range(2):
            with self._begin() as transaction:
                database = self._databases.get(names[self._slot(transaction)])
                if database is not None:
                    yield transaction, database
                    return
            self._open_databases()  # a fill has made it since
        raise FileNotFoundError(f"feature store: nothing in {self._env.path()}; run 'vivace prepare' first")

    # -- reading -------------------------------------------------------------------------------------
    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        return [None if timed is None else timed[0] for timed in self.timed_histories(user_ids)]

    def timed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[int]] | None]:
        with self._reading(_USERS) as (transaction, users):
            raw = [transaction.get(_key(user), db=users) for user in user_ids]
            rows = [None if r is None else msgpack.unpackb(r) for r in raw]
        return [None if row is None else (row[0], row[2]) for row in rows]

    def events(self, user_id: str) -> list[Event]:
        """A user's events with types and times, oldest first; empty for an unknown user."""
        with self._reading(_USERS) as (transaction, users):
            raw = transaction.get(_key(user_id), db=users)
            return [] if raw is None else _events(user_id, raw)

    def users(self) -> Iterator[str]:
        """Every user id stored under its own name (not those keyed by digest)."""
        with self._reading(_USERS) as (transaction, users):
            for key in transaction.cursor(db=users).iternext(values=False):
                if key[:1] != b"\xff":
                    yield key.decode()

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        with self._reading(_ITEMS) as (transaction, items):
            raw = [transaction.get(_key(item), db=items) for item in item_ids]
            return [None if r is None else r.decode() for r in raw]

    def event_types(self) -> set[str]:
        with self._reading(_USERS) as (transaction, _):
            about = self._databases.get(_ABOUT)
            raw = None if about is None else transaction.get(_EVENT_TYPES, db=about)
            return set() if raw is None else set(msgpack.unpackb(raw))

    # -- writing -------------------------------------------------------------------------------------
    def append(self, events: Iterable[Event]) -> dict[str, int]:
        appended = list(events)

        def write(transaction: lmdb.Transaction[bytes]) -> dict[str, int]:
            lengths: dict[str, int] = {}
            users, log = self._databases[_USERS[self._slot(transaction)]], self._databases[_LOG]
            for number, event in enumerate(appended, self._last_number(transaction) + 1):
                record = [event.user_id, event.item_id, event.event_type, event.timestamp_ms]
                transaction.put(_number_key(number), msgpack.packb(record), db=log)
                lengths[event.user_id] = _append_to_history(transaction, users, event)
            return lengths

        return self._written(write)

    def fill(self, histories: Iterable[UserRow], titles: Iterable[tuple[str, str]]) -> dict[str, int]:
        """Replaces histories and titles by those of a data set, under readers and appends that go on; what was ever
        appended joins the histories (see ``merged``). Each user comes once. Returns the data set's numbers of users
        and titles."""
        with self._begin(write=True) as transaction:
            spare = 1 - self._slot(transaction)
            users, items = self._databases[_USERS[spare]], self._databases[_ITEMS[spare]]
            for leftover in (users, items):
                transaction.drop(leftover, delete=False)
            last = self._last_number(transaction)
            live = self._log(transaction, 1, last)
        counts, event_types = {"users": 0, "titles": 0}, set[str]()
        for batch in _batches(histories):
            with self._begin(write=True) as transaction:
                for user, item_ids, types, times in batch:
                    event_types.update(types)
                    value = _packed(item_ids, types, times)
                    if user in live:
                        value = _packed_events(merged(_events(user, value), live.pop(user)))
                    transaction.put(_key(user), value, db=users)
            counts["users"] += len(batch)
        for batch in _batches(live.items()):
            with self._begin(write=True) as transaction:
                for user, events in batch:
                    transaction.put(_key(user), _packed_events(merged([], events)), db=users)
        for batch in _batches(titles):
            with self._begin(write=True) as transaction:
                for item, title in batch:
                    transaction.put(_key(item), title.encode(), db=items)
            counts["titles"] += len(batch)
        self._exchange(spare, last, event_types)
        return counts

    def _exchange(self, spare: int, last: int, event_types: set[str]) -> None:
        """Puts slot ``spare`` in use, with the events of the log after number ``last``, and empties the other."""
        about = self._databases[_ABOUT]
        with self._begin(write=True) as transaction:
            users = self._databases[_USERS[spare]]
            for events in self._log(transaction, last + 1, self._last_number(transaction)).values():
                for event in events:
                    _append_to_history(transaction, users, event)
            transaction.put(_SLOT, str(spare).encode(), db=about)
            transaction.put(_EVENT_TYPES, msgpack.packb(sorted(event_types - {""})), db=about)
            for names in (_USERS, _ITEMS):
                transaction.drop(self._databases[names[1 - spare]], delete=False)

    def _last_number(self, transaction: lmdb.Transaction[bytes]) -> int:
        """Number of the newest event of the log; 0 if there is none."""
        cursor = transaction.cursor(db=self._databases[_LOG])
        return int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def _log(self, transaction: lmdb.Transaction[bytes], first: int, last: int) -> dict[str, list[Event]]:
        """Events of the log by user, in the order they came."""
        events: dict[str, list[Event]] = defaultdict(list)
        cursor = transaction.cursor(db=self._databases[_LOG])
        if cursor.set_range(_number_key(first)):
            for key, value in cursor:
                if int.from_bytes(key, "big") > last:
                    break
                event = Event(*msgpack.unpackb(value))
                events[event.user_id].append(event)
        return events

    def close(self) -> None:
        self._env.close()


def _number_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _packed(item_ids: Sequence[str], types: Sequence[str], times: Sequence[int]) -> bytes:
    keep = slice(-MAX_STORED_EVENTS, None)
    packed: bytes = msgpack.packb([list(item_ids[keep]), list(types[keep]), list(times[keep])])
    return packed


def _packed_events(events: Sequence[Event]) -> bytes:
    return _packed(
        [e.item_id for e in events], [e.event_type for e in events], [e.timestamp_ms for e in events]
    )  # fmt: skip


def _events(user_id: str, packed: bytes) -> list[Event]:
    return [Event(user_id, *columns) for columns in zip(*msgpack.unpackb(packed), strict=True)]


def _append_to_history(transaction: lmdb.Transaction[bytes], users: lmdb._Database, event: Event) -> int:
    """Puts ``event`` behind its user's history; the history's new length."""
    key = _key(event.user_id)
    raw = transaction.get(key, db=users)
    item_ids, types, times = msgpack.unpackb(raw) if raw else ([], [], [])
    item_ids.append(event.item_id)
    types.append(event.event_type)
    times.append(event.timestamp_ms)
    transaction.put(key, _packed(item_ids, types, times), db=users)
    return min(len(item_ids), MAX_STORED_EVENTS)


def fill_store(path: Path, histories: Iterable[UserRow], titles: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Fills the store at ``path``, which a server may be using, from a data set: see ``LmdbStore.fill``."""
    store = LmdbStore(path)
    try:
        return store.fill(histories, titles)
    finally:
        store.close()
