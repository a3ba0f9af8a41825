"""What was worked out of users' events, in memory that all workers of a machine share: a history that has grown is
encoded from where it was left, whichever worker left it.

A history lies there in blocks of BLOCK events, which stay as it grows, and an end, which is written anew. Each lies
under a hash of the encoder and of all events up to its last (ids and, as the encoder reads them, times and types), and
holds its events, which are compared: it is never taken for another history's, and never old. A changed history, such as
one without a forgotten event, is another one; what was kept of it before goes when room is needed. Axis legend: n
events, E numbers of an event, C states of an event, D width, S new events.
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
BLOCK = 64  # events
DIGEST = 16  # bytes of a hash
_SIZES = np.dtype("<i8")  # a value begins with n, E, C and D


@dataclass(frozen=True)
class Keys:
    """Of one history: ``ends`` of all its events, of all but the newest, and so on up to MOST_NEW fewer; ``blocks``."""

    ends: list[bytes]
    blocks: list[bytes]


@dataclass(frozen=True, eq=False)
class Entry:
    """Of one history: events int64 [n, E], encodings float32 [n, D] and states float32 [n, C], None where no event is
    new. ``old``: keys and values of it that stay only if they are kept again."""

    key: bytes
    events: np.ndarray
    encoded: np.ndarray
    states: np.ndarray | None
    old: list[tuple[bytes, bytes]]

    @property
    def count(self) -> int:
        """n."""
        return len(self.events)


def keys_of(events_nE: np.ndarray, model: bytes = b"") -> Keys:
    """``model``: of the encoder, 64 bytes at most."""
    n, start, keys = len(events_nE), 0, Keys([], [])
    first_end = max(1, n - MOST_NEW)
    hashed = hashlib.blake2b(digest_size=DIGEST, key=model)
    for stop in sorted({*range(BLOCK, n + 1, BLOCK), *range(first_end, n + 1)}):
        hashed.update(events_nE[start:stop].tobytes())
        digest, start = hashed.copy().digest(), stop
        if stop % BLOCK == 0:
            keys.blocks.append(b"block " + digest)
        if stop >= first_end:
            keys.ends.insert(0, digest)
    return keys


def _packed(events: np.ndarray, states: np.ndarray, encoded: np.ndarray) -> bytes:
    """The value of a block or an end."""
    sizes = np.array([*events.shape, states.shape[1], encoded.shape[1]], _SIZES)
    return b"".join(np.ascontiguousarray(part).data for part in (sizes, events, states, encoded))


def _unpacked(value: memoryview) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events, states and encodings of what ``_packed`` packed, as views."""
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

    def find(self, keys: Keys, events_nE: np.ndarray) -> Entry | None:
        """The entry of the most of these events; None where there is none."""
        entry = None
        try:
            with self._env.begin(buffers=True) as transaction:
                for fewer, key in enumerate(keys.ends):
                    entry = self._whole(transaction, key, keys.blocks, events_nE[: len(events_nE) - fewer], fewer > 0)
                    if entry is not None:
                        break
        except lmdb.Error as error:
            self._failed(error)
            return None
        if entry is not None and entry.old and entry.states is None:  # who grows it keeps it again
            self._keep(entry.old)
        return entry

    def _whole(
        self, transaction: Transaction, key: bytes, blocks: list[bytes], events_nE: np.ndarray, grows: bool
    ) -> Entry | None:
        """The entry of exactly these events, None where a part of it is not there. ``grows``: with its states."""
        n, parts, old = len(events_nE), list[tuple[np.ndarray, np.ndarray]](), list[tuple[bytes, bytes]]()
        current = self._current(transaction)
        for part in (key, *blocks[: n // BLOCK]):  # the end first, which most often is what is missing
            value = transaction.get(part, db=self._generations[current])
            if value is None:
                value = transaction.get(part, db=self._generations[1 - current])
                if value is None:
                    return None
                if not (grows and part == key):
                    old.append((part, bytes(value)))
            events, states, encoded = _unpacked(memoryview(value))
            start = n - n % BLOCK if part == key else BLOCK * (len(parts) - 1)
            if not np.array_equal(events, events_nE[start : start + BLOCK]):
                return None
            parts.append((states, encoded))
        parts.append(parts.pop(0))
        states_nC = np.concatenate([states for states, _ in parts]) if grows else None
        return Entry(key, events_nE, np.concatenate([encoded for _, encoded in parts]), states_nC, old)

    def put(self, grown: Sequence[tuple[Keys, np.ndarray, np.ndarray, np.ndarray, Entry | None]]) -> None:
        """Keeps histories: (keys, events [n, E], states [S, C] and encodings [S, D] of the new ones, the entry of those
        before them). One that would take more than a generation is left out."""
        kept, gone = dict[bytes, bytes](), list[bytes]()
        for keys, events_nE, states_SC, encoded_SD, before in grown:
            bytes_of_event = sum(x.shape[1] * x.itemsize for x in (events_nE, states_SC, encoded_SD))
            if keys.ends[0] in kept or len(events_nE) * bytes_of_event > self._limit:
                continue
            first = 0  # event of what changes
            if before is not None and before.states is not None:
                first = before.count - before.count % BLOCK
                states_SC = np.concatenate([before.states[first:], states_SC])
                encoded_SD = np.concatenate([before.encoded[first:], encoded_SD])
                kept.update(before.old)
                gone.append(before.key)
            for start in range(first, len(events_nE) + 1, BLOCK):
                stop = min(start + BLOCK, len(events_nE))
                key = keys.ends[0] if stop < start + BLOCK else keys.blocks[start // BLOCK]
                rows = slice(start - first, stop - first)
                kept[key] = _packed(events_nE[start:stop], states_SC[rows], encoded_SD[rows])
        self._keep(list(kept.items()), gone)
