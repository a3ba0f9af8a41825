"""What all workers of a machine keep together: one LMDB file in /dev/shm.

Two generations make the bound: what is put goes into the newer one, and when that is full the older one goes as a
whole. So what goes is what was put, or moved over by a reader, least recently.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

if TYPE_CHECKING:
    Transaction = lmdb.Transaction[Any]

log = logging.getLogger(__name__)
SHARE = 0.4  # of the room that one generation takes: the pages of one that goes are free only in the next transaction
_CURRENT = b"current"


class Generations:
    """``path``: of the file, made where there is none; ``room_bytes``: how large it may grow, ``least`` at least;
    ``what``: it keeps, for messages. Not for several threads. Nothing raises once it is open: where the file cannot be
    read or written there is nothing in it.

    Attributes: ``evicted``: entries that this process has dropped for want of room."""

    def __init__(self, path: Path, room_bytes: int, what: str, least: int, others: int = 0) -> None:
        if room_bytes < least:
            raise ValueError(f"{what}: expected at least {least} bytes, got {room_bytes}")
        self._path, self._what, self._said, self.evicted = path, what, False, 0
        self._env = lmdb.open(
            os.fspath(path), map_size=room_bytes, subdir=False, max_dbs=3 + others, mode=0o600, sync=False,
            metasync=False, readahead=False, max_readers=512,
        )  # fmt: skip
        self._env.reader_check()
        self._generations = [self._env.open_db(name) for name in (b"0", b"1")]
        self._about = self._env.open_db(b"about")
        self._limit, self._page = int(room_bytes * SHARE), int(self._env.stat()["psize"])

    def _current(self, transaction: Transaction) -> int:
        return int(bytes(transaction.get(_CURRENT, db=self._about) or b"0"))

    def _keep(
        self, entries: Sequence[tuple[bytes, bytes]], gone: Sequence[bytes] = (),
        also: Callable[[Transaction], None] | None = None,
    ) -> None:  # fmt: skip
        """Keeps values under keys in the place of those that are ``gone``. ``also``: done in the same transaction."""

        def write(transaction: Transaction) -> None:
            current = self._current(transaction)
            for key in gone:
                for generation in self._generations:
                    transaction.delete(key, db=generation)
            for key, value in entries:
                transaction.put(key, value, db=self._generations[current])
            if also is not None:
                also(transaction)
            if self._size(transaction, current) > self._limit:
                self._drop(transaction, 1 - current)
                transaction.put(_CURRENT, b"%d" % (1 - current), db=self._about)

        def make_room(transaction: Transaction) -> None:
            self._drop(transaction, 1 - self._current(transaction))

        # pages may lie so that nothing fits before the bound is reached; a batch larger than the room never does
        if not (self._done(write) or (self._done(make_room) and self._done(write))):
            self._done(self._clear)

    def _done(self, work: Callable[[Transaction], None]) -> bool:
        """Whether ``work`` was done, as a whole."""
        try:
            with self._env.begin(write=True) as transaction:
                work(transaction)
        except lmdb.Error as error:
            self._failed(error)
            return False
        return True

    def _clear(self, transaction: Transaction) -> None:
        for number in range(2):
            self._drop(transaction, number)

    def _failed(self, error: lmdb.Error) -> None:
        """Says so once, and frees the places of readers that were killed, which keep pages from being used again."""
        if not self._said and not isinstance(error, lmdb.MapFullError):
            self._said = True
            log.warning("%s: %s: %s; it is done without meanwhile", self._what, self._path, error)
        self._env.reader_check()

    def _size(self, transaction: Transaction, number: int) -> int:
        pages = transaction.stat(self._generations[number])
        return self._page * int(pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])

    def _drop(self, transaction: Transaction, number: int) -> None:
        self.evicted += int(transaction.stat(self._generations[number])["entries"])
        transaction.drop(self._generations[number], delete=False)

    def size(self) -> int:
        """Bytes that entries take."""
        try:
            with self._env.begin() as transaction:
                return sum(self._size(transaction, number) for number in range(2))
        except lmdb.Error as error:
            self._failed(error)
            return 0

    def close(self) -> None:
        self._env.close()
