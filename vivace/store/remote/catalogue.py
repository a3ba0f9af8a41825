"""Live changes of the catalogue in a Valkey: the newest of each item, in the order they came.

Keys: ``number`` of the newest change there ever was; ``changes``, a sorted set of items by the number of their newest
change; ``rows``, by item, number, slot and time of it in 16 digits each, then msgpack ``[item, row, key of the tables
that made the vector, vector]``. All of one slot of a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import msgpack

from vivace.store.interface import Change
from vivace.store.lmdb_log import key_of
from vivace.store.remote.scripts import CHANGE, CHANGES_AFTER, DROP_CHANGES, NUMBER_DIGITS
from vivace.store.remote.trips import Trips

AT_ONCE = 500  # changes of a trip


def packed_change(change: Change) -> bytes:
    value: bytes = msgpack.packb([change.item_id, change.row, change.made_by, change.vector])
    return value


def stored_change(change: Change) -> bytes:
    """A row of ``rows``."""
    head = "".join(f"{number:0{NUMBER_DIGITS}d}" for number in (change.number, change.slot, change.came_ms))
    return head.encode() + packed_change(change)


def read_change(raw: bytes) -> Change:
    number, slot, came_ms = (int(raw[i : i + NUMBER_DIGITS]) for i in (0, NUMBER_DIGITS, 2 * NUMBER_DIGITS))
    item, row, made_by, vector = msgpack.unpackb(raw[3 * NUMBER_DIGITS :])
    return Change(item, row, made_by, vector, number, slot, came_ms)


class ValkeyCatalogue:
    """What a ``ValkeyStore`` knows of changes of the catalogue."""

    _trips: Trips
    _prefix: bytes

    @property
    def _catalogue_keys(self) -> tuple[bytes, bytes, bytes]:
        number, changes, rows = (b"%b:{catalogue}:%b" % (self._prefix, n) for n in (b"number", b"changes", b"rows"))
        return number, changes, rows

    def change_catalogue(self, changes: Sequence[Change]) -> list[Change]:
        """Puts items in or takes them out, in one step; the changes with their numbers and slots."""
        now_ms = int(time.time() * 1000)
        arguments = [x for change in changes for x in (key_of(change.item_id), packed_change(change))]
        (reply,) = self._trips.script(CHANGE, [(self._catalogue_keys, [now_ms, *arguments])], "write", lasting=True)
        numbers = list(map(int, reply))
        return [
            replace(change, number=number, slot=slot, came_ms=now_ms)
            for change, number, slot in zip(changes, numbers[::2], numbers[1::2], strict=True)
        ]

    def catalogue_changes(self, after: int, most: int = -1) -> list[Change]:
        """The newest change of each item whose number is above ``after``, in their order: the oldest
        ``most`` (-1: all)."""
        if self.last_change() <= after:
            return []
        changes = list[Change]()
        while most < 0 or len(changes) < most:
            count = AT_ONCE if most < 0 else min(AT_ONCE, most - len(changes))
            (rows,) = self._trips.script(CHANGES_AFTER, [(self._catalogue_keys, [after, count])], "bulk")
            changes += [read_change(row) for row in rows]
            if len(rows) < count:
                break
            after = changes[-1].number
        return changes

    def last_change(self) -> int:
        """Number of the newest change there ever was; 0 if there was none."""
        (number,) = self._trips([("GET", self._catalogue_keys[0])])
        return int(number or 0)

    def catalogue_change(self, item_id: str) -> Change | None:
        """The newest change of an item; None where there is none."""
        (row,) = self._trips([("HGET", self._catalogue_keys[2], key_of(item_id))])
        return None if row is None else read_change(row)

    def drop_changes(self, numbers: Sequence[int]) -> int:
        """Takes changes out that a newer catalogue holds; how many were still there."""
        (dropped,) = self._trips.script(DROP_CHANGES, [(self._catalogue_keys, list(numbers))], "write")
        return int(dropped)
