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


def write_events(encoded: list[Path], events: int, path: Path, context: tuple[str, ...] = ()) -> None:
    """Writes all ``events`` of the encoded partitions to one file: ITEM (id of the vocabulary, or the id of those that
    are out of it), USER (``user_hash``), TIME and the ids of the columns ``context``.

    In order of time; of one time, by user and then as the log had them: the same for any number of partitions. Holds
    these columns in memory, 8 bytes each an event, and as much again to sort them.
    """
    columns = {name: np.empty(events, np.int64) for name in (ITEM, USER, TIME, *context)}
    stop = 0
    for file in encoded:
        part = _flat(file, context)
        start, stop = stop, stop + len(part[ITEM])
        for name, values in part.items():
            columns[name][start:stop] = values
    users, times = columns[USER], columns[TIME]
    if stop != events:
        raise ValueError(f"events: expected {events} in the encoded partitions, found {stop}")
    order = np.lexsort((users, times))  # stable: a user's events of one time stay in their order
    with pq.ParquetWriter(path, pa.schema([(name, pa.int64()) for name in columns])) as writer:
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            writer.write_table(pa.table({name: values[rows] for name, values in columns.items()}))


def _flat(file: Path, context: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of the events of one encoded partition, int64 each; of users the hashes."""
    names = (ITEM, TIME, SPLIT, *context)
    table = pq.read_table(file, columns=[USER, *(f"{name}-list" for name in names)])
    lists = {name: table[f"{name}-list"].combine_chunks() for name in names}
    flat = {n: c.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for n, c in lists.items()}
    flat[USER] = np.repeat(user_hash(table[USER].to_numpy()), np.diff(lists[ITEM].offsets.to_numpy()))
    own = flat.pop(SPLIT) < GIVEN
    return {name: values[own] for name, values in flat.items()}
