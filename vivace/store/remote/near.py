"""The values a process has read last, for when the store does not answer."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

KEPT_S = 600.0  # a user who was forgotten is not answered for longer by a process that could not hear of it
OVERHEAD = 200  # bytes of an entry beside its value


class NearCache:
    """The newest ``room`` bytes of what was put, each for ``KEPT_S``. Thread-safe."""

    def __init__(self, room: int) -> None:
        self._room, self._used, self._lock = room, 0, threading.Lock()
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()

    def put(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """None takes a key out."""
        now = time.monotonic()
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                old = self._entries.pop(key, None)
                if old is not None:
                    self._used -= len(old[0]) + OVERHEAD
                if value is not None:
                    self._entries[key] = value, now
                    self._used += len(value) + OVERHEAD
            while self._used > self._room:
                _, (value, _) = self._entries.popitem(last=False)
                self._used -= len(value) + OVERHEAD

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        oldest = time.monotonic() - KEPT_S
        with self._lock:
            found = [self._entries.get(key) for key in keys]
        return [None if entry is None or entry[1] < oldest else entry[0] for entry in found]
