"""What was worked out of users' events, in memory that all workers of a machine share: a history that has grown is
encoded from where it was left, whichever worker left it.

An entry lies under a hash of its events (ids and, as the encoder reads them, times and types) and of the encoder, and
holds those events, which are compared: it is never taken for another history, and never old. A changed history, such as
one without a forgotten event, is another one; what was kept of it before goes when room is needed. Axis legend: n
events, E numbers of an event, C states of an event, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import numpy as np

from serving.runtime.cache_settings import LEAST_STATE_BYTES
from serving.runtime.generations import Generations

if TYPE_CHECKING:
    from serving.runtime.generations import Transaction

MOST_NEW = 16  # events by which a history may have grown since; more are encoded from the first on
DIGEST = 16  # bytes of a hash
_SIZES = np.dtype("<i8")  # a value begins with n, E, C and D


@dataclass(frozen=True, eq=False)
class Entry:
    """Of one history: events int64 [n, E], encodings float32 [n, D] and states float32 [n, C], None where no event is
    new."""

    key: bytes
    events: np.ndarray
    encoded: np.ndarray
    states: np.ndarray | None

    @property
    def count(self) -> int:
        """n."""
        return len(self.events)


def prefixes(events_nE: np.ndarray, model: bytes = b"") -> list[bytes]:
    """Hashes of all events, of all but the newest, and so on up to MOST_NEW fewer. ``model``: of the encoder, 64 bytes
    at most."""
    n = len(events_nE)
    shortest = max(1, n - MOST_NEW)
    hashed = hashlib.blake2b(events_nE[:shortest].tobytes(), digest_size=DIGEST, key=model)
    keys = [hashed.digest()]
    for event in events_nE[shortest:]:
        hashed.update(event.tobytes())
        keys.append(hashed.copy().digest())
    return keys[::-1]


def packed(
    events_nE: np.ndarray, states: Sequence[np.ndarray], encoded: Sequence[np.ndarray]
) -> bytes:  # fmt: skip
    """The value of an entry. ``states`` and ``encoded``: parts, float32 [., C] and [., D], of n events together."""
    sizes = np.array([*events_nE.shape, states[0].shape[1], encoded[0].shape[1]], _SIZES)
    return b"".join(np.ascontiguousarray(part).data for part in (sizes, events_nE, *states, *encoded))


def _unpacked(value: memoryview) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events, states and encodings of what ``packed`` packed, as views."""
    n, e, c, d = (int(size) for size in np.frombuffer(value, _SIZES, 4))
    start, parts = 4 * _SIZES.itemsize, list[np.ndarray]()
    for width, dtype in ((e, np.int64), (c, np.float32), (d, np.float32)):
        parts.append(np.frombuffer(value, dtype, n * width, start).reshape(n, width))
        start += parts[-1].nbytes
    return parts[0], parts[1], parts[2]


class StateMemory(Generations):
    """``path``: of the file, made where there is none; ``room_bytes``: how large it may grow."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        super().__init__(path, room_bytes, "state cache", LEAST_STATE_BYTES)

    def find(self, keys: Sequence[bytes], events_nE: np.ndarray) -> Entry | None:
        """The entry of the most of these events; None where there is none. ``keys``: their ``prefixes``."""
        try:
            with self._env.begin(buffers=True) as transaction:
                entry, old = self._look(transaction, keys, events_nE)
        except lmdb.Error as error:
            self._failed(error)
            return None
        if entry is not None and old:
            self._keep([(entry.key, old)])
        return entry

    def _look(
        self, transaction: Transaction, keys: Sequence[bytes], events_nE: np.ndarray
    ) -> tuple[Entry | None, bytes]:
        """The entry, and its value where that stays only if it is kept again."""
        current = self._current(transaction)
        for fewer, key in enumerate(keys):
            for number in (current, 1 - current):
                value = transaction.get(key, db=self._generations[number])
                if value is None:
                    continue
                events, states, encoded = _unpacked(memoryview(value))
                if np.array_equal(events, events_nE[: len(events_nE) - fewer]):
                    entry = Entry(key, events.copy(), encoded.copy(), states.copy() if fewer else None)
                    return entry, bytes(value) if number != current and not fewer else b""
        return None, b""

    def put(self, entries: Sequence[tuple[bytes, bytes]], grown: Sequence[bytes]) -> None:
        """Keeps ``packed`` values under their keys, each the first of its events' ``prefixes``. ``grown``: keys of the
        histories that they have grown from. What is larger than a generation is left out."""
        self._keep([(key, value) for key, value in entries if len(value) < self._limit], grown)
