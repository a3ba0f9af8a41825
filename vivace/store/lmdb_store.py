"""The embedded feature store: one memory-mapped LMDB file that several processes of one machine read without a lock
while one writes.

A data set fills one of two slots while the other is read; then one short transaction adds what was appended meanwhile
and exchanges them. So a store can be filled anew under a running server, and a fill that is killed changes nothing.
What was appended live is also kept in a log of its own, in the order it came, and joins every later data set; what
ages out of the log (``Retention``) goes within the transactions that append, a little each, and by ``sweep``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import msgpack

from vivace.store.forgetting import DUE, drop_user, hold, let_go
from vivace.store.histories import merged
from vivace.store.history_rows import batches, packed, packed_events, unpacked
from vivace.store.interface import Event, StoreError
from vivace.store.lmdb_catalogue import CHANGED, CHANGES, CatalogueStore
from vivace.store.lmdb_groups import GROUPS, OPEN, GroupStore
from vivace.store.lmdb_log import NEWCOMER, OF_DATA_SET, EventLog, LiveEvents, key_of, number_key
from vivace.store.retention import MAX_STORED_EVENTS, Retention

T = TypeVar("T")
DISK_TROUBLE = ("Input/output error", "No space left", "MDB_PANIC")  # in LMDB's words

MAP_SIZE_BYTES = 64 << 30  # address space, not disk: the file is sparse; it grows where that is not enough
MAX_READERS = 512
SWEEP_ROWS = 2_000  # events and users that a sweep looks at in one transaction
_USERS, _ITEMS = (b"users", b"users.1"), (b"items", b"items.1")  # the slots
_ATTRIBUTES = (b"attributes", b"attributes.1")  # of users, by the data set's table of them
_MARKS = (b"marks", b"marks.1")  # of each slot's users: see ``lmdb_log``
_LOG, _IDS, _ABOUT = b"log", b"ids", b"about"
_SLOT, _EVENT_TYPES, _FILLED = b"slot", b"event_types", b"filled_ms"  # keys of ``about``

UserRow = tuple[str, Sequence[str], Sequence[str], Sequence[int]]  # user, items, event types, times in ms, oldest first


class LmdbStore(CatalogueStore, GroupStore):
    """``FeatureStore`` in one LMDB folder. Values: of users, msgpack ``[items, event types, times]``; of items, the
    title; of the log, its ids and marks: see ``lmdb_log``. ``retention``: None takes the folder's own."""

    FORGOTTEN = "forgotten; its bytes leave the store's file when the server starts next"

    def __init__(
        self, path: Path, readonly: bool = False, create: bool = True, retention: Retention | None = None
    ) -> None:
        if (readonly or not create) and not (path / "data.mdb").exists():
            raise FileNotFoundError(f"feature store: no store at {path}; run 'vivace prepare' first")
        path.mkdir(parents=True, exist_ok=True)
        self._readonly = readonly
        self._retention = retention or (Retention() if readonly else Retention.of(path))
        self._alone = threading.RLock()  # the map may only be made larger while no transaction is open
        self._swept_to: bytes | None = b""  # key of the user that the sweep looks at next; None: it has seen all
        self._held, mode = hold(path), 0o600  # what users did is the owner's alone
        try:
            self._env = lmdb.open(
                os.fspath(path), MAP_SIZE_BYTES, max_dbs=24, max_readers=MAX_READERS, readonly=readonly, mode=mode
            )
        except lmdb.Error:
            let_go(self._held)
            raise
        self._env.reader_check()  # slots of processes that died
        self._databases: dict[bytes, lmdb._Database] = {}
        self._open_databases()

    # -- transactions --------------------------------------------------------------------------------
    def _open_databases(self) -> None:
        for name in (*_USERS, *_ITEMS, *_ATTRIBUTES, *_MARKS, _LOG, _IDS, _ABOUT, CHANGES, CHANGED, GROUPS, OPEN):
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
                with self._alone, self._begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                with self._alone:
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
            with self._alone, self._begin() as transaction:
                database = self._databases.get(names[self._slot(transaction)])
                if database is not None:
                    yield transaction, database
                    return
            self._open_databases()  # a fill has made it since
        raise FileNotFoundError(f"feature store: nothing in {self._env.path()}; run 'vivace prepare' first")

    # -- reading -------------------------------------------------------------------------------------
    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        return [None if row is None else row[0] for row in self.typed_histories(user_ids)]

    def typed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[str], list[int]] | None]:
        with self._reading(_USERS) as (transaction, users):
            raw = [transaction.get(key_of(user), db=users) for user in user_ids]
            return [None if r is None else tuple(msgpack.unpackb(r)) for r in raw]

    def attributes(self, user_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        with self._reading(_ATTRIBUTES) as (transaction, attributes):
            raw = [transaction.get(key_of(user), db=attributes) for user in user_ids]
            return [None if r is None else msgpack.unpackb(r) for r in raw]

    def events(self, user_id: str) -> list[Event]:
        """A user's events with types and times, oldest first; empty for an unknown user."""
        with self._reading(_USERS) as (transaction, users):
            raw = transaction.get(key_of(user_id), db=users)
            return [] if raw is None else unpacked(user_id, raw)

    def users(self) -> Iterator[str]:
        """Every user id stored under its own name (not those keyed by digest)."""
        with self._reading(_USERS) as (transaction, users):
            for key in transaction.cursor(db=users).iternext(values=False):
                if key[:1] != b"\xff":
                    yield key.decode()

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        with self._reading(_ITEMS) as (transaction, items):
            raw = [transaction.get(key_of(item), db=items) for item in item_ids]
            changes = [self._catalogue.of(transaction, item) for item in item_ids]
        titles = [None if r is None else r.decode() for r in raw]
        return [title if change is None else change.title(title) for change, title in zip(changes, titles, strict=True)]

    def live_events(
        self, after: int, since_ms: int = 0, most: int = 500_000, until: int | None = None
    ) -> tuple[int, list[Event]]:
        if _LOG not in self._databases:
            self._open_databases()
        if _LOG not in self._databases:
            return after, []
        with self._alone, self._begin() as transaction:
            return self._log.after(transaction, after, since_ms, most, until)

    def fault(self) -> str:
        return ""

    def event_types(self) -> set[str]:
        with self._reading(_USERS) as (transaction, _):
            about = self._databases.get(_ABOUT)
            raw = None if about is None else transaction.get(_EVENT_TYPES, db=about)
            return set() if raw is None else set(msgpack.unpackb(raw))

    # -- writing -------------------------------------------------------------------------------------
    @property
    def _log(self) -> EventLog:
        return EventLog(self._databases[_LOG], self._databases[_IDS])

    def append(self, events: Iterable[Event]) -> dict[str, int]:
        appended, now_ms = list(events), _now_ms()

        def write(transaction: lmdb.Transaction[bytes]) -> dict[str, int]:
            lengths: dict[str, int] = {}
            slot, log = self._slot(transaction), self._log
            number = log.last(transaction)
            for event in appended:
                if not (known := log.has(transaction, event)):  # else its sender did not hear of it
                    number += 1
                    log.add(transaction, number, event, now_ms)
                if known or event.shown:
                    lengths[event.user_id] = self._length(transaction, slot, event.user_id)
                else:
                    lengths[event.user_id] = self._append_to_history(transaction, slot, event, number)
            self._age_out(transaction, slot, 2 * len(appended), now_ms)
            return lengths

        return self._written(write)

    def _length(self, transaction: lmdb.Transaction[bytes], slot: int, user_id: str) -> int:
        raw = transaction.get(key_of(user_id), db=self._databases[_USERS[slot]])
        return len(msgpack.unpackb(raw)[0]) if raw else 0

    def _append_to_history(self, transaction: lmdb.Transaction[bytes], slot: int, event: Event, number: int) -> int:
        """Puts ``event``, the log's ``number``, behind its user's history; the history's new length."""
        users, marks = self._databases[_USERS[slot]], self._databases[_MARKS[slot]]
        key = key_of(event.user_id)
        raw, mark = transaction.get(key, db=users), transaction.get(key, db=marks)
        item_ids, types, times = msgpack.unpackb(raw) if raw else ([], [], [])
        item_ids.append(event.item_id)
        types.append(event.event_type)
        times.append(event.timestamp_ms)
        transaction.put(key, packed(item_ids, types, times), db=users)
        transaction.put(key, number_key(number) + (mark[8:] if mark else OF_DATA_SET if raw else NEWCOMER), db=marks)
        return min(len(item_ids), MAX_STORED_EVENTS)

    # -- a user who is to be forgotten -----------------------------------------------------------------
    def forget(self, user_id: str) -> bool:
        """Takes a user out of histories, marks and the log, in both slots; whether anything was known. Nothing answers
        with it from now on; its bytes are in the file until ``compact``, which is marked as due."""
        with self._alone, self._begin() as transaction:  # a long log is read without keeping appends waiting
            read_to = self._log.last(transaction)
            records = list(self._log.of_user(transaction, user_id))

        def work(transaction: lmdb.Transaction[bytes]) -> bool:
            known = drop_user(
                transaction, [self._databases[name] for name in (*_USERS, *_ATTRIBUTES, *_MARKS)], user_id
            )
            records.extend(self._log.of_user(transaction, user_id, read_to))
            for record in records:
                self._log.erase(transaction, record)
            return bool(records) or known

        Path(self._env.path(), DUE).touch()  # first: what is killed in between is compacted for nothing
        return self._written(work)

    # -- what ages out -------------------------------------------------------------------------------
    def sweep(self, now_ms: int | None = None) -> bool:
        """One short transaction of what has aged out; whether there is more. A server asks now and then until there is
        none."""
        now_ms = now_ms or _now_ms()

        def work(transaction: lmdb.Transaction[bytes]) -> bool:
            slot = self._slot(transaction)
            if transaction.get(_FILLED, db=self._databases[_ABOUT]) is None:  # filled before this was kept
                transaction.put(_FILLED, str(now_ms).encode(), db=self._databases[_ABOUT])
            more = self._age_out(transaction, slot, SWEEP_ROWS, now_ms) == SWEEP_ROWS
            if self._data_set_is_old(transaction, now_ms) and self._swept_to is not None:
                transaction.drop(self._databases[_ATTRIBUTES[slot]], delete=False)
                self._swept_to = self._drop_unmarked(transaction, slot, self._swept_to)
                more = more or self._swept_to is not None
            return more

        more = self._written(work)
        if not more:
            self._swept_to = b""
        return more

    def _data_set_is_old(self, transaction: lmdb.Transaction[bytes], now_ms: int) -> bool:
        filled = transaction.get(_FILLED, db=self._databases[_ABOUT])
        return filled is not None and int(filled) < self._retention.oldest_ms(now_ms)

    def _age_out(self, transaction: lmdb.Transaction[bytes], slot: int, limit: int, now_ms: int) -> int:
        """Removes at most ``limit`` events from the log, the oldest, if they are too many or too old, and users who
        have none left; how many events. The newest event stays: the next one's number follows its."""
        log, removed = self._log, 0
        last, oldest_ms = log.last(transaction), self._retention.oldest_ms(now_ms)
        keep_from = last - self._retention.live_events + 1
        users_are_old = self._data_set_is_old(transaction, now_ms)
        while removed < limit and (record := log.oldest(transaction)) is not None:
            too_old = 0 < record.came_ms < oldest_ms or (not record.came_ms and users_are_old)
            if record.number == last or not (record.number < keep_from or too_old):
                break
            log.remove(transaction, record)
            for group in self._groups.aged_out(transaction, record):
                self._missed(group, 1)
            self._leave(transaction, slot, record.event.user_id, record.number, users_are_old)
            removed += 1
        return removed

    def _leave(
        self, transaction: lmdb.Transaction[bytes], slot: int, user_id: str, number: int, users_are_old: bool
    ) -> None:
        """Event ``number`` is no longer in the log: if it was its user's last, the user goes, or is the data set's."""
        key, marks = key_of(user_id), self._databases[_MARKS[slot]]
        mark = transaction.get(key, db=marks)
        if mark is None or mark[:8] != number_key(number):
            return
        transaction.delete(key, db=marks)
        if mark[8:] == NEWCOMER or users_are_old:
            transaction.delete(key, db=self._databases[_USERS[slot]])

    def _drop_unmarked(self, transaction: lmdb.Transaction[bytes], slot: int, start: bytes) -> bytes | None:
        """Removes users without an event in the log, from key ``start`` on; where to go on, None at the end."""
        cursor = transaction.cursor(db=self._databases[_USERS[slot]])
        keys = list(islice(cursor.iternext(values=False), SWEEP_ROWS)) if cursor.set_range(start) else []
        for key in keys:
            if transaction.get(key, db=self._databases[_MARKS[slot]]) is None:
                transaction.delete(key, db=self._databases[_USERS[slot]])
        return keys[-1] + b"\0" if len(keys) == SWEEP_ROWS else None

    # -- a new data set ------------------------------------------------------------------------------
    def fill(
        self,
        histories: Iterable[UserRow],
        titles: Iterable[tuple[str, str]],
        attributes: Iterable[tuple[str, dict[str, Any]]] = (),
    ) -> dict[str, int]:
        """Replaces histories, titles and attributes of users by those of a data set, under readers and appends that go
        on; what was appended and has not aged out joins the histories (see ``merged``). Each user comes once. Returns
        the data set's numbers of users and titles."""
        with self._begin(write=True) as transaction:
            spare = 1 - self._slot(transaction)
            for leftover in (_USERS, _ITEMS, _ATTRIBUTES, _MARKS):
                transaction.drop(self._databases[leftover[spare]], delete=False)
            last = self._log.last(transaction)
            live = self._log.between(transaction, 1, last)
        counts, event_types = {"users": 0, "titles": 0}, set[str]()
        for batch in batches(histories):
            with self._begin(write=True) as transaction:
                for user, item_ids, types, times in batch:
                    event_types.update(types)
                    value = packed(item_ids, types, times)
                    if user in live.events:
                        value = packed_events(merged(unpacked(user, value), live.events.pop(user)))
                        self._mark(transaction, spare, user, live.last[user], OF_DATA_SET)
                    transaction.put(key_of(user), value, db=self._databases[_USERS[spare]])
            counts["users"] += len(batch)
        for batch in batches(live.events.items()):
            with self._begin(write=True) as transaction:
                for user, events in batch:
                    value = packed_events(merged([], events))
                    transaction.put(key_of(user), value, db=self._databases[_USERS[spare]])
                    self._mark(transaction, spare, user, live.last[user], NEWCOMER)
        for batch in batches(titles):
            with self._begin(write=True) as transaction:
                for item, title in batch:
                    transaction.put(key_of(item), title.encode(), db=self._databases[_ITEMS[spare]])
            counts["titles"] += len(batch)
        for of_users in batches(attributes):
            with self._begin(write=True) as transaction:
                for user, record in of_users:
                    transaction.put(key_of(user), msgpack.packb(record), db=self._databases[_ATTRIBUTES[spare]])
        self._exchange(spare, last, live, event_types)
        return counts

    def _mark(
        self, transaction: lmdb.Transaction[bytes], slot: int, user_id: str, number: int, of_data_set: bytes
    ) -> None:
        transaction.put(key_of(user_id), number_key(number) + of_data_set, db=self._databases[_MARKS[slot]])

    def _exchange(self, spare: int, last: int, live: LiveEvents, event_types: set[str]) -> None:
        """Puts slot ``spare`` in use, with the events of the log after number ``last`` and without those of ``live``
        that have aged out meanwhile, and empties the other."""
        about, log = self._databases[_ABOUT], self._log
        with self._begin(write=True) as transaction:
            first = log.first(transaction)
            for user, number in live.last.items():
                if number < first:
                    self._leave(transaction, spare, user, number, users_are_old=False)
            late = log.between(transaction, last + 1, log.last(transaction))
            for user, events in late.events.items():
                for event in events:
                    self._append_to_history(transaction, spare, event, late.last[user])
            transaction.put(_SLOT, str(spare).encode(), db=about)
            transaction.put(_EVENT_TYPES, msgpack.packb(sorted(event_types - {""})), db=about)
            transaction.put(_FILLED, str(_now_ms()).encode(), db=about)
            for names in (_USERS, _ITEMS, _ATTRIBUTES, _MARKS):
                transaction.drop(self._databases[names[1 - spare]], delete=False)

    def close(self) -> None:
        self._env.close()
        self._held = let_go(self._held)


def _now_ms() -> int:
    return int(time.time() * 1000)


def fill_store(
    path: Path,
    histories: Iterable[UserRow],
    titles: Iterable[tuple[str, str]],
    attributes: Iterable[tuple[str, dict[str, Any]]] = (),
) -> dict[str, int]:
    """Fills the store at ``path``, which a server may be using, from a data set: see ``LmdbStore.fill``."""
    store = LmdbStore(path)
    try:
        return store.fill(histories, titles, attributes)
    finally:
        store.close()
