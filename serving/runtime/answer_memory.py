"""Answers in memory that all workers of a machine share: one LMDB file in /dev/shm (``generations``). An answer that
is read from the older generation moves into the newer, so what goes is what was read least recently."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from serving.runtime.cache_settings import LEAST_BYTES
from serving.runtime.generations import Generations

if TYPE_CHECKING:
    from serving.runtime.generations import Transaction

CLAIM_S = 0.1  # after which someone who computes an answer is no longer waited for


class AnswerMemory(Generations):
    """``path``: of the file, made where there is none; ``room_bytes``: how large it may grow.

    A claim says that a process is about to compute an answer, so that others wait for it in place of doing the same."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        super().__init__(path, room_bytes, "answer cache", LEAST_BYTES, others=1)
        self._claims = self._env.open_db(b"claims")
        self._me = os.getpid().to_bytes(8, "big")

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
        if entries or over:
            self._keep(entries, also=lambda transaction: self._end(transaction, over))

    def _end(self, transaction: Transaction, claims: Sequence[bytes]) -> None:
        for claim in claims:
            transaction.delete(claim, db=self._claims)

    def _clear(self, transaction: Transaction) -> None:
        super()._clear(transaction)
        transaction.drop(self._claims, delete=False)

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
