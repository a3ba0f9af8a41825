"""What was worked out of users' events, kept in a worker's memory: a history that has grown is encoded from where it
was left.

An entry lies under a hash of its events (ids and, as the encoder reads them, times and types) and holds those events,
which are compared: it is never taken for another history, and never old. A changed history, such as one without a
forgotten event, is another one; what was kept of it before goes when room is needed. Axis legend: n events, E numbers
of an event, C states of an event, D width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

MOST_NEW = 16  # events by which a history may have grown since; more are encoded from the first on
ROOM = 16  # events by which an entry grows at once at least
DIGEST = 16  # bytes of a hash
BESIDE = 512  # bytes of an entry beside its arrays, by tracemalloc


@dataclass(eq=False)
class Entry:
    """Of one history: ``count`` events int64 [capacity, E], their states float32 [capacity, C] and encodings float32
    [capacity, D]. Rows before ``count`` never change, so who holds an entry may read them whatever becomes of it."""

    key: bytes
    count: int
    events: np.ndarray
    states: np.ndarray
    encoded: np.ndarray

    @property
    def size(self) -> int:
        """Bytes."""
        return self.events.nbytes + self.states.nbytes + self.encoded.nbytes + BESIDE


def _appended(held: np.ndarray | None, count: int, new: np.ndarray, in_place: bool) -> np.ndarray:
    """``count`` rows of ``held`` and ``new`` behind them, with room for more; in place where there is room."""
    total = count + len(new)
    if held is None or not in_place or len(held) < total:
        wider = np.empty((total + max(ROOM, total // 16), new.shape[1]), new.dtype)
        if held is not None:
            wider[:count] = held[:count]
        held = wider
    held[count:total] = new
    return held


def prefixes(events_nE: np.ndarray) -> list[bytes]:
    """Hashes of all events, of all but the newest, and so on up to MOST_NEW fewer."""
    n = len(events_nE)
    shortest = max(1, n - MOST_NEW)
    hashed = hashlib.blake2b(events_nE[:shortest].tobytes(), digest_size=DIGEST)
    keys = [hashed.digest()]
    for event in events_nE[shortest:]:
        hashed.update(event.tobytes())
        keys.append(hashed.copy().digest())
    return keys[::-1]


class StateCache:
    """``room_bytes``: of all entries together; the least recently read go. Not for several threads. ``evicted``: those
    that went for want of room."""

    def __init__(self, room_bytes: int) -> None:
        if room_bytes < 1:
            raise ValueError(f"StateCache: expected at least 1 byte of room, got {room_bytes}")
        self._room, self.bytes, self.evicted = room_bytes, 0, 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: list[bytes], events_nE: np.ndarray) -> Entry | None:
        """The entry of the most of these events; None where there is none. ``keys``: their ``prefixes``."""
        for fewer, key in enumerate(keys):
            entry, count = self._entries.get(key), len(events_nE) - fewer
            if entry is not None and np.array_equal(entry.events[: entry.count], events_nE[:count]):
                self._entries.move_to_end(key)
                return entry
        return None

    def put(
        self, key: bytes, events_nE: np.ndarray, states_SC: np.ndarray, encoded_SD: np.ndarray,
        before: Entry | None = None, count: int = 0,
    ) -> Entry:  # fmt: skip
        """Keeps what the newest S of the events came to, under ``key``, the first of their ``prefixes``. ``before``:
        the entry of the ``count`` events before them, which grows in place, or is copied where it has grown
        otherwise since."""
        there = self._entries.get(key)
        if there is not None:
            self._drop(there)
        in_place = before is not None and self._entries.get(before.key) is before and before.count == count
        if before is not None and in_place:
            self._drop(before)
        held = (None, None, None) if before is None else (before.events, before.states, before.encoded)
        new = (events_nE[count:], states_SC, encoded_SD)
        grown = [_appended(h, count, n, in_place) for h, n in zip(held, new, strict=True)]
        entry = Entry(key, len(events_nE), *grown)
        self._entries[key] = entry
        self.bytes += entry.size
        while self.bytes > self._room:
            self._drop(next(iter(self._entries.values())))
            self.evicted += 1
        return entry

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self.bytes -= entry.size
