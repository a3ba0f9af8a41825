"""What the parts of an ``LmdbStore`` need of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import lmdb

from vivace.store.lmdb_log import EventLog, Transaction

T = TypeVar("T")


class LmdbPart:
    """A part's methods are those of the store; what it calls itself, the store has."""

    _databases: dict[bytes, lmdb._Database]
    _alone: threading.RLock

    def _open_databases(self) -> None:
        raise NotImplementedError

    def _begin(self, write: bool = False) -> Transaction:
        raise NotImplementedError

    def _written(self, work: Callable[[Transaction], T]) -> T:
        raise NotImplementedError

    @property
    def _log(self) -> EventLog:
        raise NotImplementedError
