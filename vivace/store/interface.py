"""The feature store as the request path sees it: what is known of a user, and the titles of items."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from vivace.contract import TITLE


class StoreError(RuntimeError):
    """The store cannot keep what it was given just now; the message is for the caller."""


class StoreUnreachableError(StoreError):
    """The store did not answer in time: what it was given may be kept or not."""


@dataclass(frozen=True, slots=True)
class Event:
    """One interaction. ``timestamp_ms`` is Unix time in milliseconds. ``event_id``: what its sender calls it, the same
    when it is sent again; "" where it has no name. ``context``: JSON of what was known of the moment, or "".
    ``request_id``: of the request whose answer it is of, or "". ``came_ms``: when the store took it, where its log
    says so. ``shown``: the item was shown and nothing was done with it: the log keeps it, and no history has it."""

    user_id: str
    item_id: str
    event_type: str = ""
    timestamp_ms: int = 0
    event_id: str = field(default="", compare=False)
    context: str = field(default="", compare=False)
    request_id: str = field(default="", compare=False)
    came_ms: int = field(default=0, compare=False)
    shown: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Change:
    """One item put in (``row``: its JSON) or taken out (``row`` "").

    ``slot``: the number of the item's first change; an item that the models do not know is known by it. ``vector``:
    float32 as bytes, what stands for such an item in the models whose tables have the key ``made_by``; b"" for none.
    ``came_ms``: Unix ms."""

    item_id: str
    row: str = ""
    made_by: str = ""
    vector: bytes = b""
    number: int = 0
    slot: int = 0
    came_ms: int = 0

    @property
    def removed(self) -> bool:
        return not self.row

    def title(self, before: str | None) -> str | None:
        """The item's title, if it was ``before``: what is taken out keeps the one it had."""
        return str(json.loads(self.row).get(TITLE) or "") if self.row else before


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event of the log as a group's reader gets it. ``number``: of the event in the log, by which one that comes
    again is known. ``times``: how often it was handed out, this time included."""

    number: int
    event: Event
    times: int = 1


@dataclass(frozen=True, slots=True)
class GroupState:
    """How far a group of readers is. ``delivered``: number of the newest event that any of them got; ``open``: events
    that were handed out and are not acknowledged; ``ahead``: events that nobody got yet; ``missed``: events that aged
    out before the group had acknowledged them."""

    name: str
    delivered: int
    open: int
    ahead: int
    missed: int
    acknowledged_to: int
    """Up to this number everything is acknowledged."""


class EventGroups(Protocol):
    """Readers that share the log of live events: each event is handed to one of a group, and again to another where it
    is not acknowledged in time. Names of groups and consumers: see ``event_groups.check_name``."""

    def create_group(self, group: str, after: int | None = None) -> bool:
        """Makes a group that begins behind the event of the number ``after`` (None: the newest); False where it is
        there, which changes nothing."""

    def read_group(self, group: str, consumer: str, most: int, idle_ms: int) -> list[Delivery]:
        """At most ``most`` events for ``consumer``: first those that someone of the group got ``idle_ms`` ago and has
        not acknowledged, then those that nobody got; [] where there is none. Events of forgotten users are left out.
        Raises ValueError where there is no such group."""

    def acknowledge(self, group: str, numbers: Sequence[int]) -> int:
        """Events that are done with and do not come again; how many were open."""

    def groups(self) -> list[GroupState]:
        """The groups there are, by name."""

    def drop_group(self, group: str) -> bool:
        """Removes a group with all that it knows; whether it was there."""


class FeatureStore(Protocol):
    """What the request path needs; every method takes many keys at once."""

    def histories(self, user_ids: Sequence[str]) -> list[list[str] | None]:
        """Item ids of each user, oldest first; None for a user who is not known."""

    def typed_histories(self, user_ids: Sequence[str]) -> list[tuple[list[str], list[str], list[int]] | None]:
        """The same with event types and times in ms: (items, types, times)."""

    def attributes(self, user_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """What the data set's table of users says of each, by column, as prepared; None where it says nothing."""

    def append(self, events: Iterable[Event]) -> dict[str, int]:
        """Adds events at the end of their users' histories, those that are only ``shown`` to the log alone; returns the
        length of each user's history. Durable on return, and kept when the histories are replaced by those of another
        data set. An event whose id its user has already sent is not added again."""

    def live_events(
        self, after: int, since_ms: int = 0, most: int = 500_000, until: int | None = None
    ) -> tuple[int, list[Event]]:
        """(number of the newest event that was appended, or ``until`` if that is older; those of a number above
        ``after`` and up to that one in the order they came: the ``most`` newest of those that came since
        ``since_ms``). Numbers rise; those of forgotten users are missing."""

    def event_types(self) -> set[str]:
        """Event types of the data set; empty if its events have none."""

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        """Title of each item; None where there is none."""

    def fault(self) -> str:
        """Why what this thread has read since it last asked may be old or missing, as a reason of STATUS; "" where it
        is whole."""

    def close(self) -> None: ...


class ServingStore(FeatureStore, EventGroups, Protocol):
    """What a server needs beside the request path: changes of the catalogue, and what goes."""

    FORGOTTEN: str
    """What a caller is told of a user who was forgotten."""

    def change_catalogue(self, changes: Sequence[Change]) -> list[Change]:
        """Puts items in or takes them out, durably on return; the changes with their numbers and slots."""

    def catalogue_changes(self, after: int, most: int = -1) -> list[Change]:
        """The newest change of each item whose number is above ``after``, in their order: the oldest
        ``most`` (-1: all)."""

    def last_change(self) -> int:
        """Number of the newest change there ever was; 0 if there was none."""

    def catalogue_change(self, item_id: str) -> Change | None:
        """The newest change of an item; None where there is none."""

    def drop_changes(self, numbers: Sequence[int]) -> int:
        """Takes changes out that a newer catalogue holds; how many were still there."""

    def forget(self, user_id: str) -> bool:
        """Takes a user out of everything; whether anything was known."""

    def sweep(self, now_ms: int | None = None) -> bool:
        """One short turn of removing what has aged out; whether there is more."""


@runtime_checkable
class SharedAnswers(Protocol):
    """A store that servers share and that keeps answers for a while beside what it is for."""

    def histories_and_answers(
        self, user_ids: Sequence[str], keys: Sequence[bytes]
    ) -> tuple[list[tuple[list[str], list[str], list[int]] | None], list[bytes | None]]:
        """``typed_histories`` of users and what is kept under ``keys``, in one trip; no answers, [], where the store
        does not answer."""

    def keep_answers(self, entries: Sequence[tuple[bytes, bytes]], life_ms: int) -> None:
        """Keeps values under keys for so long, in one trip. Raises StoreError."""
