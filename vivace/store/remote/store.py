"""The feature store in a Valkey (or Redis), which servers of several machines share.

Keys, behind the address's prefix: ``<generation>:h:{user}``, ``:n:{user}`` and ``:a:{user}``, a user's history, the
numbers of the live events in it, and attributes; ``<generation>:t:{item}``, titles; ``{log}:about``, ``{log}:events``
(a sorted set of records by number) and ``{log}:ids``, the log of live events; ``answer:{digest}``, answers that servers
have computed, which alone go by themselves after a time. ``catalogue`` and ``groups`` say
what else.

An append takes two trips: one gives the batch its numbers and writes it to the log, in one step, and one puts each
event into its user's history, whose set of numbers tells what is there already. Nothing is acknowledged before both. A
sender that died in between has an event in the log that the history lacks; the same event sent again completes it.

In a cluster (``cluster=1`` in the address) no command and no script has keys of two slots. Users are spread over the
nodes; log and catalogue are one slot each, as their numbers need one place that counts, and reads go to primaries.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgpack

from vivace.store.history_rows import FILL_ROWS
from vivace.store.interface import Event, StoreError
from vivace.store.lmdb_log import Record, digest, key_of, packed_record
from vivace.store.remote.address import Address
from vivace.store.remote.catalogue import ValkeyCatalogue, read_change
from vivace.store.remote.fill import Filling
from vivace.store.remote.groups import ValkeyGroups, record_of
from vivace.store.remote.near import NearCache
from vivace.store.remote.scripts import APPLY_EVENTS, ERASE, FIND, LEAVE, LOG_EVENTS
from vivace.store.remote.trips import Trips
from vivace.store.retention import MAX_STORED_EVENTS, Retention

SWEEP_ROWS = 2_000
LOG_ROWS = 10_000  # of the log in one trip
OLD_NEWS = "; answered as last known"


class ValkeyStore(Filling, ValkeyCatalogue, ValkeyGroups):
    """``ServingStore`` behind an address such as ``valkey://127.0.0.1:6379/0``. Reads on the request path never raise:
    where the server does not answer in time they give what this process has read last, else nothing, and ``fault`` says
    so. Everything else raises StoreError. Nothing is sent before the first call."""

    FORGOTTEN = "forgotten; its bytes leave the files of the Valkey when it writes them anew, which it was asked to do"

    def __init__(self, address: str | Address, retention: Retention | None = None) -> None:
        self.address = Address.parse(address) if isinstance(address, str) else address
        self._trips, self._prefix = Trips(self.address), self.address.prefix.encode()
        self._retention = retention or Retention()
        self._near = NearCache(int(self.address.near_mb * (1 << 20)))
        self._generation = b"0"  # that was in use when this process last read; each read asks again
        self._types: set[str] = set()
        self._of_thread = threading.local()

    # -- keys ----------------------------------------------------------------------------------------
    def _key(self, generation: bytes, kind: bytes, key: bytes) -> bytes:
        return b"%b:%b:%b:{%b}" % (self._prefix, generation, kind, key)

    def _user_keys(self, generation: bytes, key: bytes) -> tuple[bytes, bytes, bytes]:
        """A user's history, numbers and attributes."""
        history, numbers, attributes = (self._key(generation, kind, key) for kind in (b"h", b"n", b"a"))
        return history, numbers, attributes

    @property
    def _log_keys(self) -> tuple[bytes, bytes, bytes]:
        about, events, ids = (b"%b:{log}:%b" % (self._prefix, name) for name in (b"about", b"events", b"ids"))
        return about, events, ids

    def _generations(self) -> list[bytes]:
        """The one in use, then the one that is being filled, if there is one."""
        ((current, filling),) = self._trips([("HMGET", self._log_keys[0], "generation", "filling")], "write")
        return [current or b"0", *([filling] if filling else [])]

    # -- reading -------------------------------------------------------------------------------------
    def _read(self, kind: bytes, ids: Sequence[str], more: Sequence[tuple] = ()) -> tuple[list[bytes | None], list]:
        """(values of the generation in use; replies to ``more``, [] where there is no answer), in one trip but after a
        fill. The generation is read last: what was read before it was of the same one."""
        keys = [key_of(id_) for id_ in ids]
        near = [kind + key for key in keys]
        try:
            while True:
                commands: list[tuple] = [("GET", self._key(self._generation, kind, key)) for key in keys]
                commands += [*more, ("HGET", self._log_keys[0], "generation")]
                *replies, generation = self._trips(commands)
                if (generation or b"0") == self._generation:
                    break
                self._generation = generation or b"0"
        except StoreError as error:
            self._of_thread.fault = f"{error}{OLD_NEWS}"
            return self._near.get(near), []
        values = replies[: len(keys)]
        self._near.put(near, values)
        return values, replies[len(keys) :]

    def fault(self) -> str:
        fault: str = getattr(self._of_thread, "fault", "")
        self._of_thread.fault = ""
        return fault

    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        return [None if row is None else row[0] for row in self.typed_histories(user_ids)]

    def typed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[str], list[int]] | None]:
        values, _ = self._read(b"h", user_ids)
        return [None if value is None else _columns(value) for value in values]

    def histories_and_answers(
        self, user_ids: Sequence[str], keys: Sequence[bytes]
    ) -> tuple[list[tuple[list[str], list[str], list[int]] | None], list[bytes | None]]:
        values, answers = self._read(b"h", user_ids, [("GET", self._answer_key(key)) for key in keys])
        return [None if value is None else _columns(value) for value in values], answers

    def keep_answers(self, entries: Sequence[tuple[bytes, bytes]], life_ms: int) -> None:
        self._trips([("SET", self._answer_key(key), value, "PX", life_ms) for key, value in entries], "write")

    def _answer_key(self, key: bytes) -> bytes:
        return b"%b:answer:{%b}" % (self._prefix, key.hex().encode())

    def attributes(self, user_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        values, _ = self._read(b"a", user_ids)
        return [None if value is None else msgpack.unpackb(value) for value in values]

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        rows = [("HGET", self._catalogue_keys[2], key_of(item)) for item in item_ids]
        values, changed = self._read(b"t", item_ids, rows)
        titles = [None if value is None else value.decode() for value in values]
        changes = [None if row is None else read_change(row) for row in changed] or [None] * len(titles)
        return [title if change is None else change.title(title) for change, title in zip(changes, titles, strict=True)]

    def events(self, user_id: str) -> list[Event]:
        """A user's events with types and times, oldest first; empty for an unknown user."""
        (columns,) = self.typed_histories([user_id])
        return [] if columns is None else [Event(user_id, *event) for event in zip(*columns, strict=True)]

    def users(self) -> Iterator[str]:
        """Every user id stored under its own name (not those keyed by digest)."""
        for key in self._scan(self._generations()[0], b"h"):
            if key[:1] != b"\xff":
                yield key.decode()

    def _scan(self, generation: bytes, kind: bytes) -> Iterator[bytes]:
        """Ids as keys of a generation's entries; one may come twice."""
        start = self._key(generation, kind, b"")[:-1]
        pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", start) + b"*"
        for keys in self._trips.scan(pattern, LOG_ROWS):
            yield from (key[len(start) : -1] for key in keys)

    def event_types(self) -> set[str]:
        try:
            (raw,) = self._trips([("HGET", self._log_keys[0], "event_types")])
        except StoreError as error:
            self._of_thread.fault = f"{error}{OLD_NEWS}"
            return self._types
        self._types = set() if raw is None else set(msgpack.unpackb(raw))
        return self._types

    def filled(self) -> bool:
        """Whether a data set was filled in or copied here, to its end. Raises StoreError."""
        ((generation, copying),) = self._trips([("HMGET", self._log_keys[0], "generation", "copying")])
        return generation is not None and not copying

    # -- the log -------------------------------------------------------------------------------------
    def last_event(self) -> int:
        """Number of the newest event there ever was; 0 if there was none."""
        (number,) = self._trips([("HGET", self._log_keys[0], "number")], "bulk")
        return int(number or 0)

    def live_events(
        self, after: int, since_ms: int = 0, most: int = 500_000, until: int | None = None
    ) -> tuple[int, list[Event]]:
        last, events = self.last_event(), list[Event]()
        newest = max(after, last if until is None else min(last, until))
        high = newest
        while high > after and len(events) < most:
            records = self._records(high, after + 1, LOG_ROWS)
            for record in records:
                if len(events) == most or (record.came_ms and record.came_ms < since_ms):
                    return newest, events[::-1]
                events.append(record.event)
            if len(records) < LOG_ROWS:
                break
            high = records[-1].number - 1
        return newest, events[::-1]

    def _records(self, first: int, last: int, most: int) -> list[Record]:
        """Of the numbers ``first`` to ``last``; backward where ``last`` is below."""
        order = ("REV",) if last < first else ()
        command = ("ZRANGE", self._log_keys[1], first, last, "BYSCORE", *order, "LIMIT", 0, most)
        (members,) = self._trips([command], "bulk")
        return [record_of(member) for member in members]

    # -- writing -------------------------------------------------------------------------------------
    def append(self, events: Iterable[Event]) -> dict[str, int]:
        appended, now_ms = list(events), int(time.time() * 1000)
        if not appended:
            return {}
        columns = [
            (digest(e), packed_record(e, digest(e), now_ms), key_of(e.user_id), _packed_event(e)) for e in appended
        ]
        logged = [x for id_digest, record, _, _ in columns for x in (id_digest, record)]
        # the second trip waits for replicas; the first too where the second may go to other nodes, or write nothing
        alone = self.address.cluster or any(event.shown for event in appended)
        ((generation, filling, *numbers),) = self._trips.script(
            LOG_EVENTS, [(self._log_keys, logged)], "write", lasting=alone
        )
        of_user: dict[bytes, list[bytes]] = defaultdict(list)
        for event, (_, _, key, row), number in zip(appended, columns, numbers, strict=True):
            of_user[key] += () if event.shown else (number, row)
        generations = [generation, *([filling] if filling else [])]
        calls = [
            (self._user_keys(g, key)[:2], [MAX_STORED_EVENTS, *parts])
            for g in generations
            for key, parts in of_user.items()
        ]
        applied = self._trips.script(APPLY_EVENTS, calls, "write", lasting=True)
        lengths = dict(zip(of_user, applied[: len(of_user)], strict=True))
        return {e.user_id: int(lengths[key_of(e.user_id)]) for e in appended}

    def forget(self, user_id: str) -> bool:
        """Takes a user out of histories and the log; whether anything was known. The memory is free at once; a Valkey
        that keeps an append-only file is asked to write it anew, as the old one names the user."""
        key, needle, known, looked = key_of(user_id), msgpack.packb([user_id])[1:], False, 0
        while looked < (last := self.last_event()):
            for first in range(max(looked + 1, self._first()), last + 1, LOG_ROWS):
                call = ([self._log_keys[1]], [first, min(first + LOG_ROWS - 1, last), needle])
                (members,) = self._trips.script(FIND, [call], "slow")
                records = [r for r in map(record_of, members) if r.event.user_id == user_id]
                known = bool(records) or known
                self._erase(records)
            looked = last
        keys = [key_ for g in self._generations() for key_ in self._user_keys(g, key)]
        known = any([int(n) for n in self._trips([("DEL", key_) for key_ in keys], "write")]) or known
        with contextlib.suppress(StoreError):  # an account that may not, or one that is under way
            about = self._trips.everywhere("INFO", "persistence", kind="write")
            if known and any(int(node["aof_enabled"]) for node in about):
                self._trips.everywhere("BGREWRITEAOF", kind="write")
        return known

    def _erase(self, records: Sequence[Record]) -> None:
        arguments = [x for record in records for x in (record.number, record.digest)]
        if arguments:
            self._trips.script(ERASE, [(self._log_keys[1:], arguments)], "write")

    def _first(self) -> int:
        """Number of the oldest event in the log; 1 if there is none."""
        (members,) = self._trips([("ZRANGE", self._log_keys[1], 0, 0)], "slow")
        return record_of(members[0]).number if members else 1

    # -- what ages out -------------------------------------------------------------------------------
    def sweep(self, now_ms: int | None = None) -> bool:
        """One short turn of removing the oldest events of the log, where they are too many or too old, and users who
        were never of the data set and have none left; whether there is more. Users of an old data set stay until the
        next fill."""
        now_ms = now_ms or int(time.time() * 1000)
        last, oldest_ms = self.last_event(), self._retention.oldest_ms(now_ms)
        keep_from = last - self._retention.live_events + 1
        aged = list[Record]()
        for record in self._records(0, last, SWEEP_ROWS):
            if record.number == last or not (record.number < keep_from or 0 < record.came_ms < oldest_ms):
                break
            aged.append(record)
        self._leave((key_of(record.event.user_id), record.number) for record in aged)  # first: once more does no harm
        self._age_out(aged)
        return len(aged) == SWEEP_ROWS

    def _leave(self, events: Iterable[tuple[bytes, int]]) -> None:
        """These, a user's key and a number, are no longer in the log."""
        numbers: dict[bytes, list[int]] = defaultdict(list)
        for key, number in events:
            numbers[key].append(number)
        for generation in self._generations() if numbers else ():
            calls = [(self._user_keys(generation, key), n) for key, n in numbers.items()]
            for start in range(0, len(calls), FILL_ROWS):
                self._trips.script(LEAVE, calls[start : start + FILL_ROWS], "slow")

    def close(self) -> None:
        self._trips.close()


def _columns(value: bytes) -> tuple[list[str], list[str], list[int]]:
    events = msgpack.unpackb(value[1:])
    return [e[0] for e in events], [e[1] for e in events], [e[2] for e in events]


def _packed_event(event: Event) -> bytes:
    value: bytes = msgpack.packb([event.item_id, event.event_type, event.timestamp_ms])
    return value
