"""Groups of readers of the log of live events in a Valkey, by the consumer groups of a stream.

Keys: ``{log}:numbers``, a stream whose ids are the log's numbers, with the groups; ``{log}:missed``, by group, events
that aged out before it had acknowledged them. The stream holds numbers alone, as what is deleted from a stream stays in
its bytes: a user who is forgotten leaves the log itself. It is there while there are groups, and a read puts the
numbers in that the log has got since, so appends cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from vivace.store.event_groups import Missed, check_name, no_such_group
from vivace.store.interface import Delivery, GroupState
from vivace.store.lmdb_log import Record
from vivace.store.remote.scripts import (
    AGE_OUT,
    CREATE_GROUP,
    DROP_GROUP,
    GROUP_STATES,
    NUMBER_DIGITS,
    READ_GROUP,
)
from vivace.store.remote.trips import Trips
from vivace.store.retention import DAY_MS

LOOKED_AT = 5_000  # numbers that join the stream in one step


def record_of(member: bytes) -> Record:
    return Record.read(int(member[:NUMBER_DIGITS]).to_bytes(8, "big"), member[NUMBER_DIGITS:])


class ValkeyGroups:
    """What a ``ValkeyStore`` knows of groups of readers."""

    _trips: Trips
    _prefix: bytes

    @property
    def _log_keys(self) -> tuple[bytes, bytes, bytes]:
        raise NotImplementedError

    def last_event(self) -> int:
        raise NotImplementedError

    @cached_property
    def _missed(self) -> Missed:
        return Missed()

    @property
    def _group_keys(self) -> tuple[bytes, bytes, bytes]:
        numbers, missed = (b"%b:{log}:%b" % (self._prefix, name) for name in (b"numbers", b"missed"))
        return self._log_keys[1], numbers, missed

    def create_group(self, group: str, after: int | None = None) -> bool:
        check_name("group", group)
        last = self.last_event()
        begin = last if after is None else min(after, last)
        (made,) = self._trips.script(CREATE_GROUP, [(self._group_keys, [group, begin])], "write")
        return bool(made)

    def read_group(self, group: str, consumer: str, most: int, idle_ms: int) -> list[Delivery]:
        check_name("consumer", consumer)
        call = (self._group_keys, [group, consumer, most, idle_ms, LOOKED_AT])
        while True:
            (reply,) = self._trips.script(READ_GROUP, [call], "write")
            if not reply:
                raise no_such_group(group, [state.name for state in self.groups()])
            more, *rows = reply
            if rows or not more:
                members = zip(rows[1::3], rows[2::3], strict=True)
                return [Delivery(r.number, r.event, int(times)) for times, m in members for r in [record_of(m)]]

    def acknowledge(self, group: str, numbers: Sequence[int]) -> int:
        if not numbers:
            return 0
        (closed,) = self._trips([("XACK", self._group_keys[1], group, *(f"{n}-0" for n in numbers))], "write")
        if not closed and all(state.name != group for state in self.groups()):
            raise no_such_group(group, [state.name for state in self.groups()])
        return int(closed)

    def groups(self) -> list[GroupState]:
        (rows,) = self._trips.script(GROUP_STATES, [(self._group_keys, [])], "write")
        states = []
        for name, delivered, open_, oldest, ahead, missed in rows:
            up_to = int(oldest.partition(b"-")[0]) - 1 if oldest else int(delivered)
            states.append(GroupState(name.decode(), int(delivered), int(open_), int(ahead), int(missed), up_to))
        return states

    def drop_group(self, group: str) -> bool:
        (gone,) = self._trips.script(DROP_GROUP, [(self._group_keys, [group])], "write")
        return bool(gone)

    def _age_out(self, records: Sequence[Record]) -> None:
        """Takes the oldest events from the log; groups that had not acknowledged them have missed them."""
        arguments = [x for record in records for x in (record.number, record.digest)]
        keys = (*self._group_keys, self._log_keys[2])
        (losing,) = self._trips.script(AGE_OUT, [(keys, [DAY_MS, *arguments])], "slow")
        for group, count in losing:
            self._missed(group.decode(), int(count))
