"""Events of the append call, checked, and what their answer says of them."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set

from serving.runtime.stages import checked_text, unknown_types, with_reason
from vivace.context import ContextColumns, parse_context
from vivace.contract import (
    APPEND_ITEM_ID,
    EVENT_PART,
    EVENT_TYPE,
    FIRST_ID,
    MAX_EVENT_TYPE_BYTES,
    MAX_ID_BYTES,
    MAX_PARAMETER_ID_BYTES,
    STATUS_OK,
    TIMESTAMP_MS,
    USER_ID,
)
from vivace.store.interface import Event
from vivace.suspects import MINUTE_MS, Suspects

DAY_MS = 86_400_000
SUSPECTS = "VIVACE_SUSPECTS"  # environment variable that says what becomes of events that no person sends
KEEP, REFUSE = "keep", "refuse"


def parse_id(given: object, name: str) -> str:
    """The request parameter ``name``; "" where there is none. Raises ValueError for what is no text or too long."""
    if given is None:
        return ""
    if not isinstance(given, str):
        raise ValueError(f"{name}: expected a text, got {type(given).__name__} {str(given)[:60]!r}")
    return checked_text(given.encode("utf-8", "surrogatepass"), name, MAX_PARAMETER_ID_BYTES)


def parse_event(
    user_id: bytes, item_id: bytes, event_type: bytes, timestamp_ms: int, event_id: str = "", context: bytes = b"",
    columns: ContextColumns | None = None, request_id: str = "",
) -> Event:  # fmt: skip
    """One event of the append call; raises ValueError naming the input, what was expected, what came. Names of
    ``context``, CONTEXT, that are no ``columns`` are kept for models that know them."""
    user = checked_text(user_id, USER_ID.name, MAX_ID_BYTES)
    item = checked_text(item_id, APPEND_ITEM_ID.name, MAX_ID_BYTES)
    if not user:
        raise ValueError(f"{USER_ID.name}: expected a user id, got an empty string")
    if not item:
        raise ValueError(f"{APPEND_ITEM_ID.name}: expected an item id, got an empty string")
    if EVENT_PART in item:
        raise ValueError(f"{APPEND_ITEM_ID.name}: expected an id without the character U+001F, got {item[:60]!r}")
    latest_ms = int(time.time() * 1000) + DAY_MS  # clocks differ
    if not 0 < timestamp_ms <= latest_ms:
        raise ValueError(
            f"{TIMESTAMP_MS.name}: expected Unix time in ms, 1 to {latest_ms} (a day from now), got {timestamp_ms}; "
            "0 is now"
        )
    columns = columns or ContextColumns()
    parse_context(context, columns)
    kind = checked_text(event_type, EVENT_TYPE.name, MAX_EVENT_TYPE_BYTES)
    shown = kind in columns.shown_types
    return Event(user, item, kind, timestamp_ms, event_id, context.decode(), request_id, shown=shown)


def event_status(event: Event, item_id: int, event_types: Set[str]) -> str:
    """STATUS of an event that was stored: whether the models know its item, by its id ``item_id``, and the data set its
    type (``event_types``: those there are, none where the data set has no types)."""
    status = STATUS_OK
    if item_id < FIRST_ID:
        status = with_reason(
            status, f"stored, but {APPEND_ITEM_ID.name} {event.item_id[:64]!r} is not in the catalogue of the models"
        )
    without = "" if event.shown else unknown_types([event.event_type], event_types, EVENT_TYPE.name)
    stored = "stored, but " if without and status == STATUS_OK else ""
    return with_reason(status, stored + without)


class SuspectEvents:
    """What becomes of events that no person sends (``vivace.suspects``), as far as this process sees them come:
    whether they count for others is decided by the store's log, which all processes read. ``most``: of a person within
    a minute (0: no limit); ``refuse``: they are not stored either."""

    def __init__(self, most: int, refuse: bool) -> None:
        self._suspects, self._refuse = Suspects(most), refuse
        self._since_report, self._users, self._reported_s = 0, set[str](), -float("inf")

    def reasons(self, events: Sequence[Event], came_ms: int) -> list[str]:
        """Of each of a request's events what STATUS says of it, "" for nothing: of impressions, as one look at a page
        has many. Raises ValueError where one is refused."""
        why = ["" if e.shown else self._suspects.why(e.user_id, e.timestamp_ms, came_ms) for e in events]
        suspect = [(event, text) for event, text in zip(events, why, strict=True) if text]
        self._since_report += len(suspect)
        self._users.update(event.user_id for event, _ in suspect)
        if suspect and self._refuse:
            event, text = suspect[0]
            raise ValueError(
                f"{USER_ID.name} {event.user_id[:60]!r}: expected events as people send them: {text}; nothing of "
                "the request was stored; send it again later, or serve with --suspects keep"
            )
        return [f"stored, but not counted for others: {text}" if text else "" for text in why]

    def report(self, now_s: float) -> str:
        """A line for the log, once a minute at most; "" for none."""
        if not self._users or now_s - self._reported_s < MINUTE_MS / 1000:
            return ""
        count, users, became = self._since_report, len(self._users), "refused" if self._refuse else "not counted"
        example = min(self._users)[:60]
        self._since_report, self._users, self._reported_s = 0, set(), now_s
        return f"append_event: {count:,} suspect events of {users:,} users {became}, such as of {example!r}"
