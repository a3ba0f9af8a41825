"""Answers in memory that all workers of a machine share: one LMDB file in /dev/shm.

Two generations make the bound: what is put goes into the newer one, and when that is full the older one goes as a
whole. An answer that is read from the older one moves into the newer, so what goes is what was read least recently.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import lmdb

from serving.runtime.cache_settings import LEAST_BYTES

SHARE = 0.4  # of the room that one generation takes: the pages of one that goes are free only in the next transaction
CLAIM_S = 0.1  # after which someone who computes an answer is no longer waited for
_CURRENT = b"current"


class AnswerMemory:
    """``path``: of the file, made where there is none; ``room_bytes``: how large it may grow. Not for several threads.

    A claim says that a process is about to compute an answer, so that others wait for it in place of doing the same.
    Attributes: ``evicted``: answers that this process has dropped for want of room."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        if room_bytes < LEAST_BYTES:
            raise ValueError(f"answer cache: expected at least {LEAST_BYTES} bytes, got {room_bytes}")
        self._env = lmdb.open(
            os.fspath(path), map_size=room_bytes, subdir=False, max_dbs=4, mode=0o600, sync=False, metasync=False,
            readahead=False, max_readers=512,
        )  # fmt: skip
        self._env.reader_check()
        self._generations = [self._env.open_db(name) for name in (b"0", b"1")]
        self._about, self._claims = self._env.open_db(b"about"), self._env.open_db(b"claims")
        self._limit, self._page = int(room_bytes * SHARE), int(self._env.stat()["psize"])
        self._me, self.evicted = os.getpid().to_bytes(8, "big"), 0

    def _current(self, transaction: lmdb.Transaction[bytes]) -> int:
        return int(transaction.get(_CURRENT, db=self._about) or b"0")

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What was put under each key; None where there is nothing."""
        values, old = list[bytes | None](), list[tuple[bytes, bytes]]()
        with self._env.begin() as transaction:
            current = self._current(transaction)
            for key in keys:
                value = transaction.get(key, db=self._generations[current])
                if value is None:
                    value = transaction.get(key, db=self._generations[1 - current])
                    if value is not None:
                        old.append((key, value))
                values.append(value)
        if old:
            self.put(old)
        return values

    def put(self, entries: Sequence[tuple[bytes, bytes]], over: Sequence[bytes] = ()) -> None:
        """Keeps values under keys, and ends claims."""
        if not entries and not over:
            return
        try:
            with self._env.begin(write=True) as transaction:
                current = self._current(transaction)
                for key, value in entries:
                    transaction.put(key, value, db=self._generations[current])
                for claim in over:
                    transaction.delete(claim, db=self._claims)
                if self._size(transaction, current) > self._limit:
                    self._drop(transaction, 1 - current)
                    transaction.put(_CURRENT, b"%d" % (1 - current), db=self._about)
        except lmdb.MapFullError:  # a batch that is larger than what a generation may exceed its share by
            with self._env.begin(write=True) as transaction:
                for number in range(2):
                    self._drop(transaction, number)

    def _size(self, transaction: lmdb.Transaction[bytes], number: int) -> int:
        pages = transaction.stat(self._generations[number])
        return self._page * int(pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])

    def _drop(self, transaction: lmdb.Transaction[bytes], number: int) -> None:
        self.evicted += int(transaction.stat(self._generations[number])["entries"])
        transaction.drop(self._generations[number], delete=False)

    def size(self) -> int:
        """Bytes that answers take."""
        with self._env.begin() as transaction:
            return sum(self._size(transaction, number) for number in range(2))

    def claim(self, claims: Sequence[bytes]) -> list[bool]:
        """Whether each is this process's to compute; another has claimed what is not, less than CLAIM_S ago."""
        now_ns, mine = time.monotonic_ns(), list[bool]()  # one clock for all processes of a machine
        with self._env.begin(write=True) as transaction:
            for claim in claims:
                held = transaction.get(claim, db=self._claims)
                theirs = held is not None and held[8:] != self._me
                free = not theirs or now_ns - int.from_bytes(held[:8], "big") > CLAIM_S * 1e9  # type: ignore[index]
                if free:
                    transaction.put(claim, now_ns.to_bytes(8, "big") + self._me, db=self._claims)
                mine.append(free)
        return mine

    def claimed(self, claims: Sequence[bytes]) -> list[bool]:
        """Whether another process is still computing each."""
        now_ns = time.monotonic_ns()
        with self._env.begin() as transaction:
            held = [transaction.get(claim, db=self._claims) for claim in claims]
        return [h is not None and h[8:] != self._me and now_ns - int.from_bytes(h[:8], "big") <= CLAIM_S * 1e9
                for h in held]  # fmt: skip

    def close(self) -> None:
        self._env.close()
