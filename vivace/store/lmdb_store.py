"""The embedded feature store: one memory-mapped LMDB file that several processes of one machine read without a lock
while one writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import msgpack

from vivace.store.interface import Event

MAX_STORED_EVENTS = 4096  # per user; older events fall off
MAP_SIZE_BYTES = 64 << 30  # address space, not disk: the file is sparse
_MAX_KEY_BYTES = 511  # LMDB's compiled limit


def _key(text: str) -> bytes:
    """LMDB's keys are short: a longer id is keyed by its digest, behind a byte that no UTF-8 text starts with."""
    raw = text.encode()
    if len(raw) <= _MAX_KEY_BYTES and raw:
        return raw
    import hashlib

    return b"\xff" + hashlib.sha256(raw).digest()


class LmdbStore:
    """``FeatureStore`` in one LMDB folder. Values: users, msgpack ``[items, event types, times]``; items, the title."""

    def __init__(self, path: Path, readonly: bool = False, durable: bool = True) -> None:
        if readonly and not (path / "data.mdb").exists():
            raise FileNotFoundError(f"feature store: no store at {path}; run 'vivace prepare' first")
        path.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(
            os.fspath(path), map_size=MAP_SIZE_BYTES, max_dbs=2, max_readers=512, readonly=readonly, sync=durable
        )
        self._env.reader_check()  # slots of processes that died
        self._users = self._env.open_db(b"users", create=not readonly)
        self._items = self._env.open_db(b"items", create=not readonly)

    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        return [None if found is None else found[0] for found in self.timed_histories(user_ids)]

    def timed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[int]] | None]:
        with self._env.begin(db=self._users, buffers=True) as transaction:
            raw = [transaction.get(_key(u)) for u in user_ids]
            rows = [None if r is None else msgpack.unpackb(r) for r in raw]
        return [None if row is None else (row[0], row[2]) for row in rows]

    def events(self, user_id: str) -> list[Event]:
        """A user's events with types and times, oldest first; empty for an unknown user."""
        with self._env.begin(db=self._users) as transaction:
            raw = transaction.get(_key(user_id))
        return [Event(user_id, *e) for e in zip(*msgpack.unpackb(raw), strict=True)] if raw else []

    def append(self, events: Iterable[Event]) -> dict[str, int]:
        lengths: dict[str, int] = {}
        with self._env.begin(db=self._users, write=True) as transaction:
            for event in events:
                key = _key(event.user_id)
                raw = transaction.get(key)
                items, types, times = msgpack.unpackb(raw) if raw else ([], [], [])
                items.append(event.item_id)
                types.append(event.event_type)
                times.append(event.timestamp_ms)
                keep = slice(-MAX_STORED_EVENTS, None)
                transaction.put(key, msgpack.packb([items[keep], types[keep], times[keep]]))
                lengths[event.user_id] = len(items[keep])
        return lengths

    def put_histories(self, rows: Iterable[tuple[str, Sequence[str], Sequence[str], Sequence[int]]]) -> int:
        """Replaces whole histories: (user, items, event types, times in ms), oldest first. Returns the number."""
        count = 0
        with self._env.begin(db=self._users, write=True) as transaction:
            for user, items, types, times in rows:
                keep = slice(-MAX_STORED_EVENTS, None)
                value = msgpack.packb([list(items[keep]), list(types[keep]), list(times[keep])])
                transaction.put(_key(user), value)
                count += 1
        return count

    def put_titles(self, rows: Iterable[tuple[str, str]]) -> int:
        count = 0
        with self._env.begin(db=self._items, write=True) as transaction:
            for item, title in rows:
                transaction.put(_key(item), title.encode())
                count += 1
        return count

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        with self._env.begin(db=self._items) as transaction:
            raw = [transaction.get(_key(i)) for i in item_ids]
        return [None if r is None else r.decode() for r in raw]

    def users(self) -> Iterator[str]:
        """Every user id stored under its own name (not those keyed by digest)."""
        with self._env.begin(db=self._users) as transaction:
            for key in transaction.cursor().iternext(values=False):
                if key[:1] != b"\xff":
                    yield bytes(key).decode()

    def sync(self) -> None:
        self._env.sync(True)

    def close(self) -> None:
        self._env.close()
