"""The stream of events: every event of the log in time order, as ids; what counters and replays read. Events of a test
set that came with the log are none of it.

Needs no NVTabular.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vivace.contract import GIVEN, ITEM, SPLIT, TIME, USER

ROWS = 1 << 20  # of a row group of the file


def user_hash(users: np.ndarray) -> np.ndarray:
    """A number of each user id, int64 [n] from 0 on, the same in every file and run."""
    hashes: np.ndarray = (pd.util.hash_array(users.astype(object)) >> np.uint64(1)).astype(np.int64)
    return hashes


def write_events(encoded: list[Path], events: int, path: Path) -> None:
    """Writes all ``events`` of the encoded partitions to one file: ITEM (id of the vocabulary, or the id of those that
    are out of it), USER (``user_hash``) and TIME.

    In order of time; of one time, by user and then as the log had them: the same for any number of partitions. Holds
    these three columns in memory, 24 bytes an event, and as much again to sort them.
    """
    items, users, times = (np.empty(events, np.int64) for _ in range(3))
    stop = 0
    for file in encoded:
        part = _flat(file)
        start, stop = stop, stop + len(part[0])
        items[start:stop], users[start:stop], times[start:stop] = part
    if stop != events:
        raise ValueError(f"events: expected {events} in the encoded partitions, found {stop}")
    order = np.lexsort((users, times))  # stable: a user's events of one time stay in their order
    with pq.ParquetWriter(path, pa.schema([(name, pa.int64()) for name in (ITEM, USER, TIME)])) as writer:
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            writer.write_table(pa.table({ITEM: items[rows], USER: users[rows], TIME: times[rows]}))


def _flat(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(items, hashes of users, times) of the events of one encoded partition, int64 each."""
    names = (f"{ITEM}-list", f"{TIME}-list", f"{SPLIT}-list")
    table = pq.read_table(file, columns=[USER, *names])
    columns = [table[name].combine_chunks() for name in names]
    users = np.repeat(user_hash(table[USER].to_numpy()), np.diff(columns[0].offsets.to_numpy()))
    items, times, marks = (c.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for c in columns)
    own = marks < GIVEN
    return items[own], users[own], times[own]
