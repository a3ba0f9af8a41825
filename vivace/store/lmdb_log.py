"""The log of what was appended live, in LMDB: events in the order they came, the ids by which retries are known, and
whose last event is which.

Keys and values: of the log, a number that rises by one, and msgpack ``[user, item, event type, time in ms, digest of
its id, when it came in ms, context, id of the request, whether it was only shown]`` (older records lack what is behind
the time); of the ids, the digest, and the event's number; of the marks, the user, and the number of the user's last
live event that the history has, with a byte that says whether the user was there before the first.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lmdb
import msgpack

from vivace.store.interface import Event

_MAX_KEY_BYTES = 511  # LMDB's compiled limit
_DIGEST_BYTES = 16
OF_DATA_SET, NEWCOMER = b"\1", b"\0"

NOBODY = Event("", "")  # what stands where the newest event was forgotten

Transaction = lmdb.Transaction  # with bytes as values


def key_of(text: str) -> bytes:
    """LMDB's keys are short: a longer id is keyed by its digest, behind a byte that no UTF-8 text starts with."""
    raw = text.encode()
    if len(raw) <= _MAX_KEY_BYTES and raw:
        return raw
    return b"\xff" + hashlib.sha256(raw).digest()


def number_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def digest(event: Event) -> bytes:
    """Key of an event's id: ids of different users are different."""
    if not event.event_id:
        return b""
    return hashlib.sha256(msgpack.packb([event.user_id, event.event_id])).digest()[:_DIGEST_BYTES]


_ABSENT = [None, None, None, None, b"", 0, "", "", False]  # columns that logs of before they were kept do not have


def packed_record(event: Event, id_digest: bytes, came_ms: int) -> bytes:
    """A record as every log holds it; columns at the end that say nothing are left out."""
    columns: list[Any] = [event.user_id, event.item_id, event.event_type, event.timestamp_ms, id_digest, came_ms]
    more = [event.context, event.request_id, event.shown]
    while more and not more[-1]:
        more.pop()
    columns += more
    packed: bytes = msgpack.packb(columns)
    return packed


@dataclass(frozen=True)
class Record:
    """One event of the log."""

    number: int
    event: Event
    digest: bytes
    came_ms: int
    """0: not known."""

    @classmethod
    def read(cls, key: bytes, value: bytes) -> Record:
        columns = msgpack.unpackb(value)
        user, item, kind, time_ms, id_digest, came_ms, context, request_id, shown = columns + _ABSENT[len(columns) :]
        event = Event(user, item, kind, time_ms, "", context, request_id, came_ms=came_ms, shown=shown)
        return cls(int.from_bytes(key, "big"), event, id_digest, came_ms)


@dataclass
class LiveEvents:
    """Part of the log: each user's events that histories have, in the order they came, and the number of the last."""

    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, int] = field(default_factory=dict)


class EventLog:
    """The log and its ids in a transaction that the caller holds."""

    def __init__(self, log: lmdb._Database, ids: lmdb._Database) -> None:
        self._log, self._ids = log, ids

    def last(self, transaction: Transaction) -> int:
        """Number of the newest event; 0 if there is none."""
        cursor = transaction.cursor(db=self._log)
        return int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def first(self, transaction: Transaction) -> int:
        """Number of the oldest event; 0 if there is none."""
        cursor = transaction.cursor(db=self._log)
        return int.from_bytes(cursor.key(), "big") if cursor.first() else 0

    def has(self, transaction: Transaction, event: Event) -> bool:
        """Whether an event with the same id of the same user is there."""
        key = digest(event)
        return bool(key) and transaction.get(key, db=self._ids) is not None

    def add(self, transaction: Transaction, number: int, event: Event, came_ms: int) -> None:
        key = digest(event)
        transaction.put(number_key(number), packed_record(event, key, came_ms), db=self._log, append=True)
        if key:
            transaction.put(key, number_key(number), db=self._ids)

    def get(self, transaction: Transaction, number: int) -> Record | None:
        """An event of the log; None where it is not there, or of nobody."""
        value = transaction.get(number_key(number), db=self._log)
        record = None if value is None else Record.read(number_key(number), bytes(value))
        return None if record is None or record.event == NOBODY else record

    def from_number(self, transaction: Transaction, number: int) -> Iterator[Record]:
        """Events from a number on, oldest first, with those of nobody."""
        cursor = transaction.cursor(db=self._log)
        for key, value in cursor if cursor.set_range(number_key(number)) else ():
            yield Record.read(bytes(key), bytes(value))

    def count_from(self, transaction: Transaction, number: int) -> int:
        """How many there are from a number on, those of nobody included."""
        cursor = transaction.cursor(db=self._log)
        return sum(1 for _ in cursor.iternext(values=False)) if cursor.set_range(number_key(number)) else 0

    def oldest(self, transaction: Transaction) -> Record | None:
        cursor = transaction.cursor(db=self._log)
        return Record.read(bytes(cursor.key()), bytes(cursor.value())) if cursor.first() else None

    def remove(self, transaction: Transaction, record: Record) -> None:
        transaction.delete(number_key(record.number), db=self._log)
        if record.digest:
            transaction.delete(record.digest, db=self._ids)

    def erase(self, transaction: Transaction, record: Record) -> None:
        """``remove``, and where it is the newest event an event of nobody in its place: numbers go on from it."""
        newest = record.number == self.last(transaction)
        self.remove(transaction, record)
        if newest:
            self.add(transaction, record.number, NOBODY, record.came_ms)

    def after(
        self, transaction: Transaction, number: int, since_ms: int, most: int, until: int | None = None
    ) -> tuple[int, list[Event]]:
        """(number of the newest event, or ``until`` if that is older; the ``most`` newest events of a number above
        ``number`` and up to that one that came since ``since_ms``, oldest first)."""
        cursor, events, last = transaction.cursor(db=self._log), list[Event](), self.last(transaction)
        newest = max(number, last if until is None else min(last, until))
        for key, value in cursor.iterprev() if cursor.last() else ():
            record = Record.read(bytes(key), bytes(value))
            if record.number > newest:
                continue
            too_old = record.number <= number or (record.came_ms and record.came_ms < since_ms)
            if too_old or len(events) == most:
                break
            if record.event != NOBODY:
                events.append(record.event)
        return newest, events[::-1]

    def of_user(self, transaction: Transaction, user_id: str, after: int = 0) -> Iterator[Record]:
        """A user's events of a number above ``after``, oldest first."""
        cursor, packed = transaction.cursor(db=self._log), msgpack.packb([user_id])[1:]
        for key, value in cursor if cursor.set_range(number_key(after + 1)) else ():
            if packed in value and (record := Record.read(bytes(key), bytes(value))).event.user_id == user_id:
                yield record

    def between(self, transaction: Transaction, first: int, last: int) -> LiveEvents:
        """Events of the numbers ``first`` to ``last``."""
        live = LiveEvents()
        cursor = transaction.cursor(db=self._log)
        if cursor.set_range(number_key(first)):
            for key, value in cursor:
                record = Record.read(bytes(key), bytes(value))
                if record.number > last:
                    break
                if record.event == NOBODY or record.event.shown:
                    continue
                live.events[record.event.user_id].append(record.event)
                live.last[record.event.user_id] = record.number
        return live
