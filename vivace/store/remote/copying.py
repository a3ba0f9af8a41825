"""A whole store from LMDB to a Valkey and back, with its numbers, ids and marks, compared at the end.

A copy begins anew where one was killed: what it had written is removed first, and nothing reads it before the end.
Appends have to rest meanwhile, as a Valkey has no view of one moment; the comparison would say so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import lmdb
import msgpack

from vivace.store.forgetting import compact
from vivace.store.history_rows import batches, packed
from vivace.store.interface import Change, StoreError
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
from vivace.store.remote.address import Address, shown
from vivace.store.remote.catalogue import read_change, stored_change
from vivace.store.remote.fill import ROWS, packed_history
from vivace.store.remote.scripts import NUMBER_DIGITS
from vivace.store.remote.store import LOG_ROWS, ValkeyStore, _columns, _record
from vivace.store.retention import SETTINGS

Pair = tuple[bytes, bytes]  # key of a user or an item, and what there is of it
GENERATION = b"1"  # of a copy
SLOW_MS = 30_000.0


@dataclass(frozen=True)
class About:
    """What a store says of itself; the numbers are of the newest event and change that there ever were."""

    last_event: int = 0
    last_change: int = 0
    event_types: tuple[str, ...] = ()
    filled_ms: int = 0


@dataclass
class Counted:
    """What was seen of one kind: how much, and a sum that does not depend on the order."""

    rows: int = 0
    check: int = 0

    def of(self, *parts: bytes) -> None:
        self.rows += 1
        self.check = (self.check + zlib.crc32(msgpack.packb(parts))) % (1 << 64)


@dataclass
class Contents:
    about: About = field(default_factory=About)
    kinds: dict[str, Counted] = field(default_factory=dict)

    def words(self) -> str:
        return ", ".join(f"{counted.rows:,} {kind}" for kind, counted in self.kinds.items())


class End(Protocol):
    """One end of a copy. A user comes as ``(key, history)``: msgpack of whether the data set has the user, items, event
    types and times in ms."""

    name: str

    def about(self) -> About: ...
    def users(self) -> Iterator[Pair]: ...
    def attributes(self) -> Iterator[Pair]: ...
    def titles(self) -> Iterator[Pair]: ...
    def log(self) -> Iterator[Record]: ...
    def changes(self) -> Iterator[Change]: ...
    def is_empty(self) -> bool: ...
    def write(self, source: End, say: Callable[[str], None]) -> None: ...
    def close(self) -> None: ...


def contents(end: End) -> Contents:
    """Everything there is, counted."""
    seen = Contents(end.about(), {k: Counted() for k in ("users", "attributes", "titles", "live events", "changes")})
    kinds = seen.kinds
    for kind, rows in (("users", end.users()), ("attributes", end.attributes()), ("titles", end.titles())):
        for key, value in rows:
            kinds[kind].of(key, value)
    for record in end.log():
        kinds["live events"].of(_record_bytes(record))
    for change in end.changes():
        kinds["changes"].of(stored_change(change))
    return seen


def copy(source: End, target: End, replace_target: bool, say: Callable[[str], None]) -> Contents:
    """Raises StoreError where the target has something and ``replace_target`` is not said, or where the two are not the
    same at the end."""
    if not replace_target and not target.is_empty():
        raise StoreError(f"{target.name}: there is a store already; --replace puts the copy in its place")
    target.write(source, say)
    say("comparing both")
    there, here = contents(source), contents(target)
    if there != here:
        differ = [k for k in there.kinds if there.kinds[k] != here.kinds[k]] or ["about"]
        raise StoreError(
            f"the copy differs in {', '.join(differ)}: expected {there.words()}, got {here.words()}; stop whatever "
            "appends to either, then copy again with --replace"
        )
    return here


def fill(source: LmdbEnd, target: ValkeyEnd) -> dict[str, int]:
    """Puts the data set of a run's own store in the place of the one in a Valkey, whose readers and appends go on and
    whose live events join it; numbers of users and titles. Users who are in the source by live events alone are left
    out."""
    rows = ((key, msgpack.unpackb(value)) for key, value in source.users())
    return target._store.fill(
        ((key, items, types, times) for key, (of_data_set, items, types, times) in rows if of_data_set),
        ((key, title.decode()) for key, title in source.titles()),
        ((key, msgpack.unpackb(value)) for key, value in source.attributes()),
    )


def _record_bytes(record: Record) -> bytes:
    e = record.event
    value: bytes = msgpack.packb(
        [record.number, e.user_id, e.item_id, e.event_type, e.timestamp_ms, record.digest, record.came_ms, e.context]
    )
    return value


def _value(record: Record) -> bytes:
    """A record as both logs hold it."""
    e = record.event
    columns = [e.user_id, e.item_id, e.event_type, e.timestamp_ms, record.digest, record.came_ms]
    value: bytes = msgpack.packb(columns + ([e.context] if e.context else []))
    return value


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
                transaction.put(number_key(record.number), _value(record), db=d[_LOG])
                if record.digest:
                    transaction.put(record.digest, number_key(record.number), db=d[_IDS])
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


class ValkeyEnd:
    """All keys with the address's prefix."""

    def __init__(self, address: Address) -> None:
        self.name = shown(address.url)
        self._store = ValkeyStore(replace(address, limit_ms=SLOW_MS, write_ms=SLOW_MS))

    def about(self) -> About:
        s = self._store
        names = ("number", "event_types", "filled_ms")
        (number, types, filled), change = s._trips([("HMGET", s._log_keys[0], *names), ("GET", s._catalogue_keys[0])])
        event_types = tuple(msgpack.unpackb(types)) if types else ()
        return About(int(number or 0), int(change or 0), event_types, int(filled or 0))

    def _pairs(self, kind: bytes) -> Iterator[Pair]:
        s = self._store
        generation = s._generations()[0]
        for keys in batches(dict.fromkeys(s._scan(generation, kind)), ROWS):
            values = s._trips([("GET", s._key(generation, kind, key)) for key in keys])
            yield from ((key, value) for key, value in zip(keys, values, strict=True) if value is not None)

    def users(self) -> Iterator[Pair]:
        for key, value in self._pairs(b"h"):
            yield key, msgpack.packb([value[:1] == b"\1", *_columns(value)])

    def attributes(self) -> Iterator[Pair]:
        return self._pairs(b"a")

    def titles(self) -> Iterator[Pair]:
        return self._pairs(b"t")

    def log(self) -> Iterator[Record]:
        s, first = self._store, 0
        while True:
            command = ("ZRANGE", s._log_keys[1], first, "+inf", "BYSCORE", "LIMIT", 0, LOG_ROWS)
            (members,) = s._trips([command])
            records = [_record(member) for member in members]
            yield from records
            if len(records) < LOG_ROWS:
                return
            first = records[-1].number + 1

    def changes(self) -> Iterator[Change]:
        s = self._store
        (rows,) = s._trips([("HGETALL", s._catalogue_keys[2])])
        return iter(sorted(map(read_change, rows.values()), key=lambda change: change.number))

    def is_empty(self) -> bool:
        about, _, _ = self._store._log_keys
        exists, copying = self._store._trips([("EXISTS", about), ("HGET", about, "copying")])
        return not exists or copying is not None

    def write(self, source: End, say: Callable[[str], None]) -> None:
        s = self._store
        about, events, ids = s._log_keys
        self._empty()
        s._trips([("HSET", about, "copying", 1)])
        say("live events")
        of_user: dict[bytes, list[int]] = {}
        for records in batches(source.log(), ROWS):
            commands: list[tuple] = []
            for r in records:
                commands.append(("ZADD", events, r.number, b"%0*d" % (NUMBER_DIGITS, r.number) + _value(r)))
                commands += [("HSET", ids, r.digest, r.number)] if r.digest else []
                of_user.setdefault(key_of(r.event.user_id), []).append(r.number)
            s._trips(commands)
        say("users")
        for users in batches(source.users(), ROWS):
            commands = []
            for key, value in users:
                history, numbers, _ = s._user_keys(GENERATION, key)
                commands.append(("SET", history, packed_history(*msgpack.unpackb(value))))
                commands += [("SADD", numbers, *of_user[key])] if key in of_user else []
            s._trips(commands)
        say("attributes, titles and changes")
        for kind, rows in ((b"a", source.attributes()), (b"t", source.titles())):
            for pairs in batches(rows, ROWS):
                s._trips([("SET", s._key(GENERATION, kind, key), value) for key, value in pairs])
        number, changes, items = s._catalogue_keys
        for some in batches(source.changes(), ROWS):
            s._trips([("ZADD", changes, c.number, key_of(c.item_id)) for c in some])
            s._trips([("HSET", items, key_of(c.item_id), stored_change(c)) for c in some])
        of = source.about()
        s._trips([("SET", number, of.last_change)])
        s._trips([("HSET", about, "number", of.last_event, "generation", GENERATION, "generations", GENERATION,
                   "event_types", msgpack.packb(list(of.event_types)), "filled_ms", of.filled_ms)])  # fmt: skip
        s._trips([("HDEL", about, "copying")])

    def _empty(self) -> None:
        """Takes every key with the prefix away."""
        s, cursor = self._store, 0
        pattern = b"".join(b"\\" + bytes([c]) if c in b"\\*?[]" else bytes([c]) for c in s._prefix) + b":*"
        while True:
            ((cursor, keys),) = s._trips([("SCAN", cursor, "MATCH", pattern, "COUNT", LOG_ROWS)])
            s._trips([("UNLINK", key) for key in keys])
            if int(cursor) == 0:
                return

    def close(self) -> None:
        self._store.close()


@contextlib.contextmanager
def end_of(place: str | Path) -> Iterator[End]:
    """A URL, or the folder of a store."""
    end: End = ValkeyEnd(Address.parse(place)) if isinstance(place, str) else LmdbEnd(place)
    try:
        yield end
    except lmdb.Error as error:
        raise StoreError(f"{end.name}: {error}") from None
    finally:
        end.close()
