"""Live changes of the catalogue in LMDB: rows that were put in or taken out since, in the order they came.

Keys and values: of the log, a number that rises by one for ever, and msgpack ``[item, row as JSON ("": taken out),
slot, when it came in ms, key of the tables that made the vector, vector]``; of the index, the item, and the number of
its newest change, which is the only one the log keeps of it. The index is a projection of the log: ``rebuild`` makes
it anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import lmdb
import msgpack

from vivace.store.interface import Change
from vivace.store.lmdb_log import Transaction, key_of, number_key
from vivace.store.lmdb_part import LmdbPart

ABOUT, CHANGES, CHANGED = b"about", b"changes", b"changed"  # databases: the last two are the log and its index
LAST_NUMBER = b"catalogue_number"  # key of ``about``: of the newest change there ever was


def _read(key: bytes, value: bytes) -> Change:
    item, row, slot, came_ms, made_by, vector = msgpack.unpackb(value)
    return Change(item, row, made_by, vector, int.from_bytes(key, "big"), slot, came_ms)


class CatalogueLog:
    """The log and its index in a transaction that the caller holds. ``log`` None: a store of before there was one."""

    def __init__(self, log: lmdb._Database | None, index: lmdb._Database | None, about: lmdb._Database | None) -> None:
        self._log, self._index, self._about = log, index, about

    def last(self, transaction: Transaction) -> int:
        """Number of the newest change there ever was; 0 if there was none."""
        raw = None if self._about is None else transaction.get(LAST_NUMBER, db=self._about)
        return 0 if raw is None else int(raw)

    def of(self, transaction: Transaction, item_id: str) -> Change | None:
        """The newest change of an item."""
        if self._index is None:
            return None
        number = transaction.get(key_of(item_id), db=self._index)
        if number is None:
            return None
        value = transaction.get(number, db=self._log)
        assert value is not None, f"the index names change {int.from_bytes(number, 'big')} of {item_id!r}"
        return _read(bytes(number), bytes(value))

    def add(self, transaction: Transaction, changes: Sequence[Change], now_ms: int) -> list[Change]:
        """Writes changes in their order; them with their numbers and slots."""
        number, written = self.last(transaction), []
        for change in changes:
            before = self.of(transaction, change.item_id)
            number += 1
            if before is not None:
                transaction.delete(number_key(before.number), db=self._log)
            slot = number if before is None else before.slot
            written.append(replace(change, number=number, slot=slot, came_ms=now_ms))
            value = msgpack.packb([change.item_id, change.row, slot, now_ms, change.made_by, change.vector])
            transaction.put(number_key(number), value, db=self._log, append=True)
            transaction.put(key_of(change.item_id), number_key(number), db=self._index)
        transaction.put(LAST_NUMBER, str(number).encode(), db=self._about)
        return written

    def after(self, transaction: Transaction, number: int, most: int) -> list[Change]:
        """The oldest ``most`` changes of a number above ``number``, in their order."""
        changes = list[Change]()
        if self._log is None:
            return changes
        cursor = transaction.cursor(db=self._log)
        if cursor.set_range(number_key(number + 1)):
            for key, value in cursor:
                changes.append(_read(bytes(key), bytes(value)))
                if len(changes) == most:
                    break
        return changes

    def drop(self, transaction: Transaction, numbers: Sequence[int]) -> int:
        """Takes changes out of the log, those that are still the newest of their items; how many."""
        dropped = 0
        for number in numbers:
            value = transaction.get(number_key(number), db=self._log)
            if value is not None:
                transaction.delete(key_of(_read(number_key(number), bytes(value)).item_id), db=self._index)
                transaction.delete(number_key(number), db=self._log)
                dropped += 1
        return dropped

    def rebuild(self, transaction: Transaction) -> int:
        """Makes the index anew from the log; how many items it has."""
        assert self._index is not None, "opened for writing"
        transaction.drop(self._index, delete=False)
        changes = self.after(transaction, 0, -1)
        for change in changes:
            transaction.put(key_of(change.item_id), number_key(change.number), db=self._index)
        return len(changes)


class CatalogueStore(LmdbPart):
    """What an ``LmdbStore`` knows of changes of the catalogue."""

    @property
    def _catalogue(self) -> CatalogueLog:
        return CatalogueLog(*(self._databases.get(name) for name in (CHANGES, CHANGED, ABOUT)))

    def change_catalogue(self, changes: Sequence[Change]) -> list[Change]:
        """Puts items in or takes them out, durably on return; the changes with their numbers and slots."""
        return self._written(lambda transaction: self._catalogue.add(transaction, changes, int(time.time() * 1000)))

    def catalogue_changes(self, after: int, most: int = -1) -> list[Change]:
        """The newest change of each item whose number is above ``after``, in their order: the oldest
        ``most`` (-1: all)."""
        if CHANGES not in self._databases:
            self._open_databases()
        with self._alone, self._begin() as transaction:
            if self._catalogue.last(transaction) <= after:
                return []
            return self._catalogue.after(transaction, after, most)

    def last_change(self) -> int:
        """Number of the newest change there ever was; 0 if there was none."""
        with self._alone, self._begin() as transaction:
            return self._catalogue.last(transaction)

    def catalogue_change(self, item_id: str) -> Change | None:
        """The newest change of an item; None where there is none."""
        with self._alone, self._begin() as transaction:
            return self._catalogue.of(transaction, item_id)

    def drop_changes(self, numbers: Sequence[int]) -> int:
        """Takes changes out that a newer catalogue holds; how many were still there."""
        return self._written(lambda transaction: self._catalogue.drop(transaction, numbers))

    def rebuild(self) -> int:
        """Makes the index of changed items anew from their log; how many items it has. Histories are made anew from the
        log of events by ``fill``."""
        return self._written(self._catalogue.rebuild)
