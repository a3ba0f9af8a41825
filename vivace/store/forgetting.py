"""What it takes to forget a user: out of every database at once, and out of the file when it is written anew.

LMDB uses the pages of what was removed again, and until then their bytes stay; a key may also stay in a page between
others. So the file is written anew, record by record, which needs that nobody has it open: at once, or by the next
server that starts. A mark in the folder says that it is due.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import lmdb

from vivace.store.lmdb_log import Transaction, key_of

DUE = "compaction.due"
HELD = "open.lock"  # whoever has the store open holds it shared; who writes it anew, alone
BATCH = 20_000  # records of a transaction


def hold(folder: Path) -> int:
    """Waits until nobody writes the store anew, then keeps anyone from it; the descriptor to close at the end, -1
    where the folder cannot be written to: nobody could write the store anew either."""
    try:
        handle = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def let_go(handle: int) -> int:
    """Ends what ``hold`` began; -1, which can be let go again."""
    if handle >= 0:
        os.close(handle)
    return -1


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether nobody has the store open, and if so nobody opens it meanwhile."""
    handle = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
    finally:
        os.close(handle)


def is_due(folder: Path) -> bool:
    return (folder / DUE).exists()


def compact(folder: Path) -> bool:
    """Writes the store in ``folder`` anew, so that nothing of what was removed is left in its file. False, and nothing
    is done, while a server or another process has it open. A process that is killed leaves the store as it was."""
    with _alone(folder) as alone:
        if not alone:
            return False
        partial = folder / "compacted.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _copy(folder, partial)
        for name in ("data.mdb", "lock.mdb"):
            (partial / name).chmod(0o600)
        # the lock file speaks of transactions of the old data: away first, the next one to open makes it
        (folder / "lock.mdb").unlink(missing_ok=True)
        os.replace(partial / "data.mdb", folder / "data.mdb")
        shutil.rmtree(partial, ignore_errors=True)
        (folder / DUE).unlink(missing_ok=True)
        _sync(folder)
    return True


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(source: Path, target: Path) -> None:
    """Every record of every database, in the order of the keys."""
    target.mkdir()
    size = (source / "data.mdb").stat().st_size
    before = lmdb.open(os.fspath(source), readonly=True, max_dbs=64, lock=False)
    after = lmdb.open(os.fspath(target), map_size=2 * size + (64 << 20), max_dbs=64)
    try:
        with before.begin() as reading:
            names = [bytes(key) for key in reading.cursor().iternext(values=False)]
            databases = {name: before.open_db(name, reading, create=False) for name in names}
            for name, database in databases.items():
                copied, cursor = after.open_db(name), reading.cursor(db=database)
                more = cursor.first()
                while more:
                    with after.begin(write=True) as writing:
                        for _ in range(BATCH):
                            writing.put(cursor.key(), cursor.value(), db=copied, append=True)
                            if not (more := cursor.next()):
                                break
        after.sync(True)
    finally:
        before.close()
        after.close()


def drop_user(transaction: Transaction, databases: list[lmdb._Database], user_id: str) -> bool:
    """Takes a user out of ``databases`` that are keyed by users; whether any had it."""
    return any([transaction.delete(key_of(user_id), db=database) for database in databases])
