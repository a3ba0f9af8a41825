"""How answers are kept, as a server tells its workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from serving.segments import SHM, Segments

ANSWER_CACHE = "VIVACE_ANSWER_CACHE"  # environment variable by which it does
STATE_CACHE = "VIVACE_STATE_CACHE"  # bytes of each worker's cache of states; "" for none
LEAST_BYTES, MAX_S = 1 << 20, 86_400.0


@dataclass(frozen=True)
class CacheSettings:
    """``room_bytes`` of memory, for all workers of a machine together; ``seconds`` that an answer holds at most;
    ``path`` of the file in shared memory, "" until a server has one."""

    room_bytes: int
    seconds: float = 60.0
    path: str = ""

    def __post_init__(self) -> None:
        if self.room_bytes < LEAST_BYTES:
            raise ValueError(f"--answer-cache-mb: expected 1 and more, got {self.room_bytes} bytes")
        if not 0 < self.seconds <= MAX_S:
            raise ValueError(f"--answer-cache-s: expected seconds above 0, at most {MAX_S:.0f}, got {self.seconds}")

    def at(self, segments: Segments) -> CacheSettings:
        """The same with a file among these, if it has none yet."""
        return self if self.path else replace(self, path=str(SHM / f"{segments.prefix}answers"))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> CacheSettings:
        return cls(**json.loads(text))
