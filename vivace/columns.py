"""Special ids, columns and the schema of a data set: the part of the contract that the data side reads.

``vivace.contract`` holds all of it too; everything else imports it from there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PUBLIC_TENSORS = frozenset(
    {"USER_ID", "QUERY", "HISTORY", "TOP_K", "CONTEXT", "ITEM_ID", "SCORE", "STATUS", "UNDERSTOOD"}
)
"""Names of the public call that no task head may have."""

# -- ids: what Categorify in NVTabular 23.8 writes -------------------------------------------------
PADDING_ID = 0
NULL_ID = 1
OOV_ID = 2
FIRST_ID = 3  # the vocabulary follows, by falling frequency

# -- columns of the typed tables -------------------------------------------------------------------
USER = "user_id"
ITEM = "item_id"
TIME = "timestamp_ms"
EVENT = "event_type"
WEIGHT = "weight"
TITLE = "title"
STOCK = "stock"  # of a live row of the catalogue: 0 or less is sold out, and not answered
TEXT = "text"  # what models read of an item, if it is more than its title
SEARCH = "search_id"  # of a log of searches: rows with the same value are one list of results
QUERY_TEXT = "query"
POSITION = "position"  # of an item in the list, from 1
CLICKED = "clicked"
SOURCE_ROW = "source_row"  # position in the source: breaks ties of time, and names rejected rows
SPLIT = "split"
HOUR, WEEKDAY = "hour", "weekday"  # of a moment in the data's time zone, "0" (midnight, Monday) and up

MAX_VALUES = 16  # of one list attribute of one item that models read, the most frequent first
SEPARATOR = "|"  # of the values of a list attribute that is written as text, unless the schema says otherwise

TRAIN, VALID, TEST = 0, 1, 2  # values of SPLIT
CONTEXT = 3  # of a held-out session: history of the events to predict, learned from by the final fit alone
GIVEN, GIVEN_TEST = 4, 5  # of a test set that came with the log: history, event to predict; nothing learns from them
TARGET = "target"  # item id of the held-out event of a request
TARGET_TIME = "target_time_ms"  # when that event was: the moment of the request


def label_column(head: str) -> str:
    """Column that holds a task head's label (0 or 1) of an event, or of a request's target."""
    return f"label_{head}"


def target_column(name: str) -> str:
    """Column that holds what a request's context was: that of the event to predict."""
    return f"{name}-target"


def cross_name(cross: Sequence[str]) -> str:
    """Column of the values of several columns together: "device_x_hour"."""
    return "_x_".join(cross)


def cross_value(values: Sequence[str]) -> str:
    """What stands for values of several columns together, none of them null."""
    return json.dumps(list(values), ensure_ascii=False)


@dataclass(frozen=True)
class TaskHead:
    """A thing to predict of the next event: its label is 1 where the event's weight is at least ``min_weight``."""

    name: str
    min_weight: float

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"TaskHead: expected a lower-case identifier, got {self.name!r}")
        if self.name.upper() in PUBLIC_TENSORS:
            raise ValueError(f"TaskHead: {self.name!r} is the name of another tensor; choose another")


@dataclass(frozen=True)
class DataSchema:
    """What one data set carries beyond user, item and time.

    ``heads[0]`` is the task that orders the answer. ``unknown_items`` says what happens to an event whose item the
    catalogue does not list: "reject" (to the rejects file) or "keep" (attributes stay null).
    ``exclude_seen``: items of the history are not answered. ``sessions``: a user is one session of somebody unknown.

    ``item_lists`` are attributes of several values, such as genres; ``list_separators``: of each, what parts its values
    where they are written as one text (none: SEPARATOR for all).

    All event columns but type and weight are *context*: known when a request is made. ``user_columns`` names those of
    them that are a user's own and come from the table of users; ``time_zone``, such as "UTC", adds HOUR and WEEKDAY
    ("": neither). ``crosses``: groups of categorical columns of the context whose values together are a column too,
    called by ``cross_name``; null where one of them is.

    ``shown_types``: event types that say that an item was shown, not that something was done with it. They are counted
    apart (``vivace.live_shown``) and are in no history, and no model predicts them.
    """

    name: str
    event_categoricals: tuple[str, ...] = (EVENT,)
    event_continuous: tuple[str, ...] = (WEIGHT,)
    item_categoricals: tuple[str, ...] = ()
    item_continuous: tuple[str, ...] = ()
    heads: tuple[TaskHead, ...] = field(default=(TaskHead("click", float("-inf")),))
    unknown_items: str = "reject"
    exclude_seen: bool = True
    licence: str = ""
    sessions: bool = False
    user_columns: tuple[str, ...] = ()
    time_zone: str = ""
    item_lists: tuple[str, ...] = ()
    list_separators: tuple[str, ...] = ()
    crosses: tuple[tuple[str, ...], ...] = ()
    shown_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unknown_items not in ("reject", "keep"):
            raise ValueError(f"DataSchema.unknown_items: expected 'reject' or 'keep', got {self.unknown_items!r}")
        if not self.heads:
            raise ValueError("DataSchema.heads: expected at least one task head, got none")
        for cross in self.crosses:
            if len(cross) < 2 or len(set(cross)) < len(cross) or not set(cross) <= set(self.plain_context):
                columns = f"categorical columns of the context, here {', '.join(self.plain_context) or 'none'}"
                raise ValueError(f"cross {list(cross)}: expected two or more different {columns}")
            if sum(set(cross) == set(other) for other in self.crosses) > 1:
                raise ValueError(f"cross {list(cross)}: is there twice, maybe in another order; name it once")
        for names in (self.event_columns, (ITEM, TEXT, *self.item_columns)):  # two tables
            if len(set(names)) != len(names):
                raise ValueError(f"DataSchema {self.name}: column names repeat: {sorted(names)}")
        if "" in self.shown_types or (self.shown_types and EVENT not in self.event_categoricals):
            raise ValueError(
                f"DataSchema.shown_types: expected types of events that have one, got {list(self.shown_types)}; name "
                "the column of event types too"
            )
        if self.list_separators and (len(self.list_separators) != len(self.item_lists) or "" in self.list_separators):
            raise ValueError(
                f"DataSchema.list_separators: expected a text for each of {list(self.item_lists)}, got "
                f"{list(self.list_separators)}"
            )
        if strange := sorted(set(self.user_columns) - {*self.context_categoricals, *self.context_continuous}):
            raise ValueError(f"DataSchema.user_columns: expected event columns, got {strange}")

    @property
    def clock_columns(self) -> tuple[str, ...]:
        """What is worked out of an event's time."""
        return (HOUR, WEEKDAY) if self.time_zone else ()

    @property
    def plain_context(self) -> tuple[str, ...]:
        """Categorical columns that are known when a request is made."""
        return (*(n for n in self.event_categoricals if n != EVENT), *self.clock_columns)

    @property
    def cross_columns(self) -> tuple[str, ...]:
        return tuple(cross_name(cross) for cross in self.crosses)

    @property
    def context_categoricals(self) -> tuple[str, ...]:
        """The same and what is crossed of them."""
        return (*self.plain_context, *self.cross_columns)

    @property
    def context_continuous(self) -> tuple[str, ...]:
        return tuple(n for n in self.event_continuous if n != WEIGHT)

    @property
    def encoded_categoricals(self) -> tuple[str, ...]:
        """All categorical columns of an event that are encoded."""
        return (*self.raw_categoricals, *self.cross_columns)

    @property
    def raw_categoricals(self) -> tuple[str, ...]:
        """Those that an event brings, and those of its time: what the crosses are made of is among them."""
        return (*self.event_categoricals, *self.clock_columns)

    @property
    def event_columns(self) -> tuple[str, ...]:
        return (USER, ITEM, TIME, *self.encoded_categoricals, *self.event_continuous)

    @property
    def item_columns(self) -> tuple[str, ...]:
        """Columns of the catalogue other than its key (ITEM)."""
        return (TITLE, *self.item_attributes)

    @property
    def item_attributes(self) -> tuple[str, ...]:
        """Columns of the catalogue that say what an item is like."""
        return (*self.item_categoricals, *self.item_lists, *self.item_continuous)

    @property
    def separators(self) -> dict[str, str]:
        """Of each list attribute, what parts its values in a text."""
        return dict(zip(self.item_lists, self.list_separators or [SEPARATOR] * len(self.item_lists), strict=True))

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        for head in record["heads"]:
            head["min_weight"] = None if head["min_weight"] == float("-inf") else head["min_weight"]
        if not self.crosses:  # so that what was prepared without them stays as it is
            del record["crosses"]
        if not self.shown_types:
            del record["shown_types"]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> DataSchema:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        fields["heads"] = tuple(
            TaskHead(h["name"], float("-inf") if h["min_weight"] is None else float(h["min_weight"]))
            for h in record["heads"]
        )
        fields["crosses"] = tuple(tuple(cross) for cross in record.get("crosses", ()))
        return cls(**fields)

    @classmethod
    def load(cls, path: Path) -> DataSchema:
        return cls.from_json(json.loads(path.read_text()))
