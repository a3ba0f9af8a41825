"""What a store holds, as either end of a copy gives it, and how two of them are compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgpack

from vivace.store.interface import Change, GroupState
from vivace.store.lmdb_log import Record, packed_record
from vivace.store.remote.catalogue import stored_change

Pair = tuple[bytes, bytes]  # key of a user or an item, and what there is of it


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
    types and times in ms. Of groups of readers a copy has where each is; what they have in hand comes again."""

    name: str

    def about(self) -> About: ...
    def users(self) -> Iterator[Pair]: ...
    def attributes(self) -> Iterator[Pair]: ...
    def titles(self) -> Iterator[Pair]: ...
    def log(self) -> Iterator[Record]: ...
    def changes(self) -> Iterator[Change]: ...
    def groups(self) -> list[GroupState]: ...
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


def _record_bytes(record: Record) -> bytes:
    value: bytes = msgpack.packb([record.number, value_of(record)])
    return value


def value_of(record: Record) -> bytes:
    """A record as both logs hold it."""
    return packed_record(record.event, record.digest, record.came_ms)
