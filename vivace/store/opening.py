"""Which store a server reads: the run's own LMDB folder, or the Valkey that servers share."""

from __future__ import annotations

import os
from pathlib import Path

from vivace.store.interface import ServingStore
from vivace.store.lmdb_store import LmdbStore
from vivace.store.retention import Retention

STORE_URL = "VIVACE_STORE"  # environment variable: keeps a password from the list of processes


def open_store(folder: Path, readonly: bool = False, url: str = "") -> ServingStore:
    """The store at ``url``, else the one in ``folder``, which must be there: a server never makes an empty one in a
    missing one's place. Limits of what is kept are those of ``folder``."""
    if url:
        from vivace.store.remote.store import ValkeyStore  # its client, which a run on LMDB does without

        return ValkeyStore(url, Retention.of(folder))
    return LmdbStore(folder, readonly=readonly, create=False)


def store_of_worker(folder: Path, readonly: bool = False) -> ServingStore:
    """The same by the environment: a server tells its workers so, and a user the other verbs."""
    return open_store(folder, readonly, os.environ.get(STORE_URL, ""))
