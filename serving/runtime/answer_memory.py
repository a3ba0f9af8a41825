"""Answers in memory that all workers of a machine share: one LMDB file in /dev/shm.

Two generations make the bound: what is put goes into the newer one, and when that is full the older one goes as a
whole. An answer that is read from the older one moves into the newer, so what goes is what was read least recently.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import lmdb

from serving.runtime.cache_settings import LEAST_BYTES

log = logging.getLogger(__name__)
SHARE = 0.4  # of the room that one generation takes: the pages of one that goes are free only in the next transaction
CLAIM_S = 0.1  # after which someone who computes an answer is no longer waited for
_CURRENT = b"current"


class AnswerMemory:
    """``path``: of the file, made where there is none; ``room_bytes``: how large it may grow. Not for several threads.
    Nothing raises once it is open: where the file cannot be read or written there are no answers in it.

    A claim says that a process is about to compute an answer, so that others wait for it in place of doing the same.
    Attributes: ``evicted``: answers that this process has dropped for want of room."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        if room_bytes < LEAST_BYTES:
            raise ValueError(f"answer cache: expected at least {LEAST_BYTES} bytes, got {room_bytes}")
        self._path, self._said = path, False
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
        try:
            with self._env.begin() as transaction:
                current = self._current(transaction)
                for key in keys:
                    value = transaction.get(key, db=self._generations[current])
                    if value is None:
                        value = transaction.get(key, db=self._generations[1 - current])
                        if value is not None:
                            old.append((key, value))
                    values.append(value)
        except lmdb.Error as error:
            self._failed(error)
            return [None] * len(keys)
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
        except lmdb.Error as error:  # such as a batch larger than the room: everything goes
            self._failed(error)
            try:
                with self._env.begin(write=True) as transaction:
                    for number in range(2):
                        self._drop(transaction, number)
                    transaction.drop(self._claims, delete=False)
            except lmdb.Error as again:
                self._failed(again)

    def _failed(self, error: lmdb.Error) -> None:
        """Says so once, and frees the places of readers that were killed, which keep pages from being used again."""
        if not self._said and not isinstance(error, lmdb.MapFullError):
            self._said = True
            log.warning("answer cache: %s: %s; answers are computed meanwhile", self._path, error)
        self._env.reader_check()

    def _size(self, transaction: lmdb.Transaction[bytes], number: int) -> int:
        pages = transaction.stat(self._generations[number])
        return self._page * int(pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])

    def _drop(self, transaction: lmdb.Transaction[bytes], number: int) -> None:
        self.evicted += int(transaction.stat(self._generations[number])["entries"])
        transaction.drop(self._generations[number], delete=False)

    def size(self) -> int:
        """Bytes that answers take."""
        try:
            with self._env.begin() as transaction:
                return sum(self._size(transaction, number) for number in range(2))
        except lmdb.Error as error:
            self._failed(error)
            return 0

    def claim(self, claims: Sequence[bytes]) -> list[bool]:
        """Whether each is this process's to compute; another has claimed what is not, less than CLAIM_S ago."""
        mine = list[bool]()
        try:
            with self._env.begin(write=True) as transaction:
                for claim in claims:
                    mine.append(not self._is_theirs(transaction.get(claim, db=self._claims)))
                    if mine[-1]:
                        transaction.put(claim, time.monotonic_ns().to_bytes(8, "big") + self._me, db=self._claims)
        except lmdb.Error as error:
            self._failed(error)
            return [True] * len(claims)
        return mine

    def claimed(self, claims: Sequence[bytes]) -> list[bool]:
        """Whether another process is still computing each."""
        try:
            with self._env.begin() as transaction:
                return [self._is_theirs(transaction.get(claim, db=self._claims)) for claim in claims]
        except lmdb.Error as error:
            self._failed(error)
            return [False] * len(claims)

    def _is_theirs(self, held: bytes | None) -> bool:
        """``held``: when it was claimed, by the clock that all processes of a machine share, and by whom."""
        if held is None or held[8:] == self._me:
            return False
        return time.monotonic_ns() - int.from_bytes(held[:8], "big") <= CLAIM_S * 1e9

    def close(self) -> None:
        self._env.close()
