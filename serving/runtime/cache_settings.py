"""How answers and states are kept, as a server tells its workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Self

from serving.segments import SHM, Segments

ANSWER_CACHE = "VIVACE_ANSWER_CACHE"  # environment variables by which it does
STATE_CACHE = "VIVACE_STATE_CACHE"
LEAST_BYTES, LEAST_STATE_BYTES, MAX_S = 1 << 20, 1 << 19, 86_400.0


@dataclass(frozen=True)
class _Room:
    """``room_bytes`` of memory, for all workers of a machine together; ``path`` of the file in shared memory, "" until
    a server has one."""

    room_bytes: int
    path: str = field(default="", kw_only=True)

    FILE: ClassVar[str] = ""

    def at(self, segments: Segments) -> Self:
        """The same with a file among these, if it has none yet."""
        return self if self.path else replace(self, path=str(SHM / f"{segments.prefix}{self.FILE}"))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class StateSettings(_Room):
    """Of the cache of states."""

    FILE: ClassVar[str] = "states"

    def __post_init__(self) -> None:
        if self.room_bytes < LEAST_STATE_BYTES:
            raise ValueError(f"--state-cache-mb: expected 1 and more, got {self.room_bytes} bytes")


@dataclass(frozen=True)
class CacheSettings(_Room):
    """Of the cache of answers; ``seconds`` that one holds at most."""

    seconds: float = 60.0

    FILE: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        if self.room_bytes < LEAST_BYTES:
            raise ValueError(f"--answer-cache-mb: expected 1 and more, got {self.room_bytes} bytes")
        if not 0 < self.seconds <= MAX_S:
            raise ValueError(f"--answer-cache-s: expected seconds above 0, at most {MAX_S:.0f}, got {self.seconds}")
