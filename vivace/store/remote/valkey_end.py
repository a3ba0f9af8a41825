"""A Valkey as an end of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgpack

from vivace.store.history_rows import batches
from vivace.store.interface import Change, GroupState
from vivace.store.lmdb_log import Record, key_of
from vivace.store.remote.address import Address, shown
from vivace.store.remote.catalogue import read_change, stored_change
from vivace.store.remote.contents import About, End, Pair, value_of
from vivace.store.remote.fill import ROWS, packed_history
from vivace.store.remote.groups import record_of
from vivace.store.remote.scripts import NUMBER_DIGITS
from vivace.store.remote.store import LOG_ROWS, ValkeyStore, _columns

GENERATION = b"1"  # of a copy
SLOW_MS = 30_000.0


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
            records = [record_of(member) for member in members]
            yield from records
            if len(records) < LOG_ROWS:
                return
            first = records[-1].number + 1

    def changes(self) -> Iterator[Change]:
        s = self._store
        (rows,) = s._trips([("HGETALL", s._catalogue_keys[2])])
        return iter(sorted(map(read_change, rows.values()), key=lambda change: change.number))

    def groups(self) -> list[GroupState]:
        return self._store.groups()

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
                commands.append(("ZADD", events, r.number, b"%0*d" % (NUMBER_DIGITS, r.number) + value_of(r)))
                commands += [("HSET", ids, r.digest, r.number)] if r.digest else []
                if not r.event.shown:
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
        for group in source.groups():
            s.create_group(group.name, group.acknowledged_to)
        s._trips([("HDEL", about, "copying")])

    def _empty(self) -> None:
        """Takes every key with the prefix away."""
        for keys in self._store._trips.scan(self._store._prefix + b":*", LOG_ROWS):
            self._store._trips([("UNLINK", key) for key in keys])

    def close(self) -> None:
        self._store.close()
