"""A new data set for a store in a Valkey: a generation of keys of its own, which one step puts in use.

While it is written, appends go into both generations: into the new one those of a later number than the fill began at.
The others it takes from the log itself. So nothing is left to do at the exchange, and a fill that is killed leaves keys
that the next one removes.
"""

from __future__ import annotations

import re
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from vivace.store.histories import merged
from vivace.store.history_rows import batches
from vivace.store.interface import Event
from vivace.store.lmdb_log import Record, key_of
from vivace.store.remote.address import Address
from vivace.store.remote.scripts import BEGIN_FILL, EXCHANGE, NEWCOMER, OF_DATA_SET, PUT_HISTORY
from vivace.store.remote.trips import Trips
from vivace.store.retention import MAX_STORED_EVENTS

# user (its id, or the key that stands for a long one), items, event types, times in ms, oldest first
UserRow = tuple[str | bytes, Sequence[str], Sequence[str], Sequence[int]]
Live = dict[bytes, list[tuple[int, Event]]]  # of each user's key, number and event, oldest first
ROWS = 1_000  # users or titles of a trip


def packed_history(of_data_set: bool, items: Sequence[str], types: Sequence[str], times: Sequence[int]) -> bytes:
    """A history as it lies in the store: see ``scripts``."""
    rows = list(zip(items, types, times, strict=True))[-MAX_STORED_EVENTS:]
    head = (OF_DATA_SET if of_data_set else NEWCOMER) + b"\xdd" + struct.pack(">I", len(rows))
    return head + b"".join(msgpack.packb(row) for row in rows)


def _key(id_: str | bytes) -> bytes:
    return id_ if isinstance(id_, bytes) else key_of(id_)


class Filling:
    """What a ``ValkeyStore`` does to be filled anew."""

    address: Address
    _trips: Trips
    _prefix: bytes

    def _key(self, generation: bytes, kind: bytes, key: bytes) -> bytes:
        raise NotImplementedError

    def _user_keys(self, generation: bytes, key: bytes) -> tuple[bytes, bytes, bytes]:
        raise NotImplementedError

    @property
    def _log_keys(self) -> tuple[bytes, bytes, bytes]:
        raise NotImplementedError

    def _records(self, first: int, last: int, most: int) -> list[Record]:
        raise NotImplementedError

    def _first(self) -> int:
        raise NotImplementedError

    def _leave(self, events: Iterable[tuple[bytes, int]]) -> None:
        raise NotImplementedError

    def fill(
        self,
        histories: Iterable[UserRow],
        titles: Iterable[tuple[str | bytes, str]],
        attributes: Iterable[tuple[str | bytes, dict[str, Any]]] = (),
    ) -> dict[str, int]:
        """Replaces histories, titles and attributes of users by those of a data set, under readers and appends that go
        on; what was appended and has not aged out joins the histories (see ``merged``). Each user comes once. Returns
        the data set's numbers of users and titles. Raises RuntimeError where another fill began meanwhile."""
        ((mine, last),) = self._trips.script(BEGIN_FILL, [(self._log_keys[:1], [])], "slow")
        live, joined = self._live(int(last)), dict[bytes, list[int]]()
        counts, event_types = {"users": 0, "titles": 0}, set[str]()

        def put(key: bytes, of_data_set: bool, events: Sequence[Event]) -> tuple[Sequence[Any], Sequence[Any]]:
            appended = live.pop(key, [])
            if appended:
                joined[key] = [number for number, _ in appended]
            rows = merged(events, [event for _, event in appended]) if appended else events
            value = packed_history(
                of_data_set, [e.item_id for e in rows], [e.event_type for e in rows], [e.timestamp_ms for e in rows]
            )
            return self._user_keys(mine, key)[:2], [MAX_STORED_EVENTS, value, *joined.get(key, ())]

        for batch in batches(histories, ROWS):
            calls = []
            for user, items, types, times in batch:
                event_types.update(types)
                calls.append(put(_key(user), True, [Event("", *row) for row in zip(items, types, times, strict=True)]))
            self._trips.script(PUT_HISTORY, calls, "slow")
            counts["users"] += len(batch)
        for batch in batches(list(live), ROWS):
            self._trips.script(PUT_HISTORY, [put(key, False, []) for key in batch], "slow")
        for batch in batches(titles, ROWS):
            self._trips([("SET", self._key(mine, b"t", _key(i)), title.encode()) for i, title in batch], "slow")
            counts["titles"] += len(batch)
        for batch in batches(attributes, ROWS):
            self._trips([("SET", self._key(mine, b"a", _key(u)), msgpack.packb(r)) for u, r in batch], "slow")
        self._exchange(mine, event_types)
        first = self._first()
        self._leave((key, n) for key, numbers in joined.items() for n in numbers if n < first)  # aged out meanwhile
        self.remove_leftovers()
        return counts

    def _exchange(self, mine: bytes, event_types: set[str]) -> None:
        arguments = [mine, msgpack.packb(sorted(event_types - {""})), int(time.time() * 1000)]
        (done,) = self._trips.script(EXCHANGE, [(self._log_keys[:1], arguments)], "slow")
        if not int(done):
            raise RuntimeError("store: another fill has begun since; this one changes nothing. Let one run at a time")

    def _live(self, last: int) -> Live:
        """What histories have of the log up to the number ``last``."""
        live: Live = defaultdict(list)
        first = 1
        while first <= last and (records := self._records(first, last, 10 * ROWS)):
            for record in records:
                if record.event.shown:
                    continue
                live[key_of(record.event.user_id)].append((record.number, record.event))
            first = records[-1].number + 1
        return live

    def remove_leftovers(self) -> int:
        """Removes every generation before the one in use; how many keys. Numbers of generations rise."""
        removed = 0
        (current,) = self._trips([("HGET", self._log_keys[0], "generation")], "slow")
        of_generation = re.compile(re.escape(self._prefix) + rb":(\d+):[hnat]:\{", re.DOTALL)
        for keys in self._trips.scan(self._prefix + b":[0-9]*", 10 * ROWS):
            old = [k for k in keys if (m := of_generation.match(k)) and int(m[1]) < int(current or 0)]
            removed += len(old)
            self._trips([("UNLINK", key) for key in old], "slow")
        return removed
