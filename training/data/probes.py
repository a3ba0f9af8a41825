"""Training events held back from some users: what early stopping watches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.columns import EventColumns
from vivace.contract import FIRST_ID, ITEM


def hold_back(files: list[Path], folder: Path, users: int, seed: int) -> tuple[list[Path], list[np.ndarray]]:
    """Copies of the training files in which ``users`` random users miss their last event, and those users' whole
    training sequences int64 [n, W] of all columns: what early stopping watches, for one training event each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packing = EventColumns.of_files(files)
    rows = [pq.read_metadata(f).num_rows for f in files]
    chosen = np.random.default_rng(seed).permutation(sum(rows))[: min(users, sum(rows) // 4)]
    probes, out, start = [], [], 0
    for file, count in zip(files, rows, strict=True):
        table = pq.read_table(file, columns=list(packing.names))
        columns = {name: table[name].combine_chunks() for name in packing.names}
        flat = packing.packed({name: c.flatten().to_numpy(zero_copy_only=False) for name, c in columns.items()})
        chosen_rows = set((chosen[(chosen >= start) & (chosen < start + count)] - start).tolist())
        lists = np.split(flat, columns[ITEM].offsets.to_numpy()[1:-1])
        for i in chosen_rows:
            if len(lists[i]) >= 3 and lists[i][-1, 0] >= FIRST_ID:
                probes.append(lists[i])
                lists[i] = lists[i][:-1]
        lengths = np.cumsum([0, *(len(x) for x in lists)])
        offsets, left = pa.array(lengths, pa.int32()), packing.unpacked(np.concatenate(lists))
        table = pa.table({n: pa.ListArray.from_arrays(offsets, values.copy()) for n, values in left.items()})
        pq.write_table(table, folder / file.name, row_group_size=max(count, 1))
        out.append(folder / file.name)
        start += count
    return out, probes
