"""A run's own folder as an end of a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgpack

from vivace.store.forgetting import compact
from vivace.store.history_rows import batches, packed
from vivace.store.interface import Change, GroupState, StoreError
from vivace.store.lmdb_catalogue import CHANGED, CHANGES, LAST_NUMBER
from vivace.store.lmdb_log import NEWCOMER, NOBODY, OF_DATA_SET, EventLog, Record, key_of, number_key
from vivace.store.lmdb_store import (
    _ABOUT,
    _ATTRIBUTES,
    _EVENT_TYPES,
    _FILLED,
    _IDS,
    _ITEMS,
    _LOG,
    _MARKS,
    _SLOT,
    _USERS,
    LmdbStore,
)  # fmt: skip
from vivace.store.remote.contents import About, End, Pair, value_of
from vivace.store.retention import SETTINGS


class LmdbEnd:
    """A folder. What is written goes to a folder beside it, which takes its place at the end."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        self._store: LmdbStore | None = None

    def _open(self) -> LmdbStore:
        if self._store is None:
            self._store = LmdbStore(self._folder, readonly=True)
        return self._store

    def _rows(self, name: bytes) -> Iterator[Pair]:
        store = self._open()
        database = store._databases.get(name)
        if database is None:
            return
        with store._begin() as transaction:
            for key, value in transaction.cursor(db=database):
                yield bytes(key), bytes(value)

    def _get(self, name: bytes, key: bytes) -> bytes | None:
        store = self._open()
        if name not in store._databases:
            return None
        with store._begin() as transaction:
            return transaction.get(key, db=store._databases[name])

    @property
    def _slot(self) -> int:
        return int(self._get(_ABOUT, _SLOT) or 0)

    def about(self) -> About:
        store = self._open()
        number, types = self._get(_ABOUT, LAST_NUMBER), self._get(_ABOUT, _EVENT_TYPES)
        return About(
            store.live_events(0, most=0)[0], int(number or 0), tuple(msgpack.unpackb(types)) if types else (),
            int(self._get(_ABOUT, _FILLED) or 0),
        )  # fmt: skip

    def users(self) -> Iterator[Pair]:
        marks = dict(self._rows(_MARKS[self._slot]))
        for key, value in self._rows(_USERS[self._slot]):
            yield key, msgpack.packb([marks.get(key, b"")[8:] != NEWCOMER, *msgpack.unpackb(value)])

    def attributes(self) -> Iterator[Pair]:
        return self._rows(_ATTRIBUTES[self._slot])

    def titles(self) -> Iterator[Pair]:
        return self._rows(_ITEMS[self._slot])

    def log(self) -> Iterator[Record]:
        records = (Record.read(*row) for row in self._rows(_LOG))
        return (record for record in records if record.event != NOBODY)

    def changes(self) -> Iterator[Change]:
        return iter(self._open().catalogue_changes(0))

    def groups(self) -> list[GroupState]:
        return self._open().groups()

    def is_empty(self) -> bool:
        return not (self._folder / "data.mdb").exists()

    def write(self, source: End, say: Callable[[str], None]) -> None:
        if not self.is_empty() and not compact(self._folder):  # it asks for what it needs: that nobody has it open
            raise StoreError(f"{self.name}: a server or another process has it open; stop it, then copy again")
        partial = self._folder.with_name(f"{self._folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        store = LmdbStore(partial)
        try:
            _into_lmdb(store, source, say)
            store._env.sync(True)
        finally:
            store.close()
        if (self._folder / SETTINGS).exists():
            shutil.copy(self._folder / SETTINGS, partial)
        old = self._folder.with_name(f"{self._folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self._folder.exists():
            os.replace(self._folder, old)
        os.replace(partial, self._folder)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def _into_lmdb(store: LmdbStore, source: End, say: Callable[[str], None]) -> None:
    d, about, last = store._databases, source.about(), dict[bytes, int]()

    def put(name: bytes, rows: Iterable[Pair]) -> None:
        for batch in batches(rows):
            with store._begin(write=True) as transaction:
                for key, value in batch:
                    transaction.put(key, value, db=d[name])

    say("live events")
    for records in batches(source.log()):
        with store._begin(write=True) as transaction:
            for record in records:
                transaction.put(number_key(record.number), value_of(record), db=d[_LOG])
                if record.digest:
                    transaction.put(record.digest, number_key(record.number), db=d[_IDS])
                if not record.event.shown:
                    last[key_of(record.event.user_id)] = record.number
    say("users")
    marks = list[Pair]()

    def users() -> Iterator[Pair]:
        for key, value in source.users():
            of_data_set, *columns = msgpack.unpackb(value)
            if key in last:
                marks.append((key, number_key(last[key]) + (OF_DATA_SET if of_data_set else NEWCOMER)))
            yield key, packed(*columns)

    put(_USERS[0], users())
    put(_MARKS[0], marks)
    put(_ATTRIBUTES[0], source.attributes())
    say("titles and changes")
    put(_ITEMS[0], source.titles())
    changes = list(source.changes())
    columns = [[c.item_id, c.row, c.slot, c.came_ms, c.made_by, c.vector] for c in changes]
    put(CHANGES, [(number_key(c.number), msgpack.packb(row)) for c, row in zip(changes, columns, strict=True)])
    put(CHANGED, [(key_of(c.item_id), number_key(c.number)) for c in changes])
    with store._begin(write=True) as transaction:
        log = EventLog(d[_LOG], d[_IDS])
        if about.last_event > log.last(transaction):
            log.add(transaction, about.last_event, NOBODY, 0)
        for key, value in (
            (LAST_NUMBER, str(about.last_change)), (_SLOT, "0"), (_FILLED, str(about.filled_ms)),
        ):  # fmt: skip
            transaction.put(key, value.encode(), db=d[_ABOUT])
        transaction.put(_EVENT_TYPES, msgpack.packb(list(about.event_types)), db=d[_ABOUT])
    for group in source.groups():
        store.create_group(group.name, group.acknowledged_to)
