"""What stores know of a batch of rows, read at one moment: all that an answer goes by beside the row and the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

TypedHistory = tuple[list[str], list[str], list[int]]
"""Items, event types and times in ms, oldest first."""
Histories = Callable[[Sequence[str]], list[TypedHistory | None]]


@dataclass(frozen=True)
class Known:
    """``stored``: histories of the rows that sent none, by place, None for a user who is not known; ``values`` of the
    context by column, one for each row ([] where none is read); ``event_types`` of the data set, where rows sent some;
    ``fault``: why some of it may be old or missing, "" where it is whole; ``number``: of the catalogue's newest change;
    ``epoch``: of the live counters; ``shareable``: whether another process may know the same."""

    stored: Mapping[int, TypedHistory | None]
    values: Sequence[Mapping[str, str | float]]
    event_types: Set[str]
    fault: str
    number: int = 0
    epoch: str = ""
    shareable: bool = True

    def state(self, place: int) -> list[Any]:
        """All of it that the answer to one row goes by, as lists."""
        values = sorted(self.values[place].items()) if self.values else []
        return [self.stored.get(place), values, sorted(self.event_types), self.number, self.epoch]

    def of(self, places: Sequence[int]) -> Known:
        """The same for some of the rows."""
        if len(places) == 0:
            return replace(self, stored={}, values=[])
        stored = {new: self.stored[old] for new, old in enumerate(places) if old in self.stored}
        return replace(self, stored=stored, values=[self.values[p] for p in places] if self.values else [])
