"""Groups of readers of the log of live events, in LMDB: how far each is, and what is in whose hands.

Keys and values: of the groups, the name, and msgpack ``[number of the newest event that was handed out, events that
were missed]``; of what is open, the group's digest and the event's number, and msgpack ``[consumer, when it was handed
out in ms, how often]``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import lmdb
import msgpack

from vivace.store.event_groups import Missed, check_name, no_such_group
from vivace.store.interface import Delivery, GroupState
from vivace.store.lmdb_log import NOBODY, EventLog, Record, Transaction, number_key
from vivace.store.lmdb_part import LmdbPart

GROUPS, OPEN = b"groups", b"open"
_DIGEST_BYTES = 16


def _prefix(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()[:_DIGEST_BYTES]


class Groups:
    """The groups in a transaction that the caller holds. ``groups`` None: a store of before there were any."""

    def __init__(self, log: EventLog, groups: lmdb._Database | None, open_: lmdb._Database | None) -> None:
        self._log, self._groups, self._open = log, groups, open_

    def names(self, transaction: Transaction) -> list[str]:
        if self._groups is None:
            return []
        return [bytes(key).decode() for key in transaction.cursor(db=self._groups).iternext(values=False)]

    def known(self, transaction: Transaction, group: str) -> tuple[int, int] | None:
        """(number of the newest event that was handed out, events that were missed)."""
        raw = None if self._groups is None else transaction.get(group.encode(), db=self._groups)
        return None if raw is None else tuple(msgpack.unpackb(raw))

    def put(self, transaction: Transaction, group: str, delivered: int, missed: int) -> None:
        transaction.put(group.encode(), msgpack.packb([delivered, missed]), db=self._groups)

    def open(self, transaction: Transaction, group: str) -> Iterator[tuple[int, str, int, int]]:
        """(number, consumer, when it was handed out, how often) of what is open, by number."""
        prefix = _prefix(group)
        cursor = transaction.cursor(db=self._open)
        for key, value in cursor if cursor.set_range(prefix) else ():
            if not bytes(key).startswith(prefix):
                return
            yield (int.from_bytes(key[_DIGEST_BYTES:], "big"), *msgpack.unpackb(value))

    def close(self, transaction: Transaction, group: str, number: int) -> bool:
        return transaction.delete(_prefix(group) + number_key(number), db=self._open)

    def overdue(self, transaction: Transaction, group: str, before_ms: int, most: int) -> list[tuple[int, int]]:
        """(number, how often it was handed out) of what was handed out before then."""
        late = list[tuple[int, int]]()
        for number, _, handed_ms, times in self.open(transaction, group):
            if len(late) == most:
                break
            if handed_ms <= before_ms:
                late.append((number, times))
        return late

    def read(
        self, transaction: Transaction, group: str, consumer: str, most: int, now_ms: int, idle_ms: int
    ) -> list[Delivery]:
        known = self.known(transaction, group)
        assert known is not None, group
        delivered, missed = known
        batch = list[Delivery]()
        for number, times in self.overdue(transaction, group, now_ms - idle_ms, most):
            record = self._log.get(transaction, number)
            if record is None:  # of a user who was forgotten
                self.close(transaction, group, number)
            else:
                batch.append(Delivery(number, record.event, times + 1))
        for record in self._log.from_number(transaction, delivered + 1):
            if len(batch) >= most:
                break
            delivered = record.number
            if record.event != NOBODY:
                batch.append(Delivery(record.number, record.event))
        for d in batch:
            value = msgpack.packb([consumer, now_ms, d.times])
            transaction.put(_prefix(group) + number_key(d.number), value, db=self._open)
        self.put(transaction, group, delivered, missed)
        return batch

    def aged_out(self, transaction: Transaction, record: Record) -> list[str]:
        """Groups that had not acknowledged an event that leaves the log; it is missed by them from now on."""
        losing = list[str]()
        for group in self.names(transaction):
            known = self.known(transaction, group)
            assert known is not None
            delivered, missed = known
            if self.close(transaction, group, record.number) or record.number > delivered:
                self.put(transaction, group, max(delivered, record.number), missed + (record.event != NOBODY))
                losing += [group] * (record.event != NOBODY)
        return losing

    def drop(self, transaction: Transaction, group: str) -> bool:
        for number in [number for number, *_ in self.open(transaction, group)]:
            self.close(transaction, group, number)
        return transaction.delete(group.encode(), db=self._groups)

    def state(self, transaction: Transaction, group: str) -> GroupState:
        known = self.known(transaction, group)
        assert known is not None
        delivered, missed = known
        numbers = [number for number, *_ in self.open(transaction, group)]
        ahead = self._log.count_from(transaction, delivered + 1)
        return GroupState(group, delivered, len(numbers), ahead, missed, min(numbers) - 1 if numbers else delivered)


class GroupStore(LmdbPart):
    """What an ``LmdbStore`` knows of groups of readers."""

    @cached_property
    def _missed(self) -> Missed:
        return Missed()

    @property
    def _groups(self) -> Groups:
        return Groups(self._log, self._databases.get(GROUPS), self._databases.get(OPEN))

    def _must_be_there(self, transaction: Transaction, group: str) -> tuple[int, int]:
        known = self._groups.known(transaction, group)
        if known is None:
            raise no_such_group(group, self._groups.names(transaction))
        return known

    def create_group(self, group: str, after: int | None = None) -> bool:
        check_name("group", group)

        def work(transaction: Transaction) -> bool:
            if self._groups.known(transaction, group) is not None:
                return False
            last = self._log.last(transaction)
            self._groups.put(transaction, group, last if after is None else min(after, last), 0)
            return True

        return self._written(work)

    def read_group(self, group: str, consumer: str, most: int, idle_ms: int) -> list[Delivery]:
        check_name("consumer", consumer)
        now_ms = int(time.time() * 1000)
        with self._alone, self._begin() as transaction:  # nothing to do costs no write
            delivered, _ = self._must_be_there(transaction, group)
            late = self._groups.overdue(transaction, group, now_ms - idle_ms, 1)
            if not late and self._log.last(transaction) <= delivered:
                return []

        def work(transaction: Transaction) -> list[Delivery]:
            self._must_be_there(transaction, group)
            return self._groups.read(transaction, group, consumer, most, now_ms, idle_ms)

        return self._written(work)

    def acknowledge(self, group: str, numbers: Sequence[int]) -> int:
        def work(transaction: Transaction) -> int:
            self._must_be_there(transaction, group)
            return sum(self._groups.close(transaction, group, number) for number in numbers)

        return self._written(work) if numbers else 0

    def groups(self) -> list[GroupState]:
        if GROUPS not in self._databases:
            self._open_databases()
        with self._alone, self._begin() as transaction:
            return [self._groups.state(transaction, group) for group in self._groups.names(transaction)]

    def drop_group(self, group: str) -> bool:
        return self._written(lambda transaction: self._groups.drop(transaction, group))
