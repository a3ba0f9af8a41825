"""Rows of NVTabular's parquet in batches: by ``merlin.dataloader``, or read plainly where Merlin is not, or where the
lists are long: its loader makes a Python number of each of their values.

A batch is a dict of tensors: a list column as two, ``<name>__values`` and ``<name>__offsets`` (one offset more than
rows), any other column as one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from preprocessing.events import user_hash
from training.distributed import ALONE, World
from vivace.contract import USER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from merlin.dataloader.torch import Loader
        from merlin.io import Dataset
    except ImportError:
        Loader: Any = None  # type: ignore[no-redef]

LONG_LISTS = 256  # values of a row beyond which Merlin's loader takes most of a step's time
PUT_WAIT_S = 0.1  # the loader's thread retries a full queue each microsecond by default: a third of two cores' time


def batches_of_rows(
    files: list[Path],
    columns: list[str],
    rows: int,
    shuffle: bool,
    seed: int,
    world: World = ALONE,
    plain: bool | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Batches of ``columns`` (USER as its ``user_hash``), on the CPU, in an order set by ``seed`` alone; of several
    processes each gets its share of the rows. ``plain``: without Merlin, in an order of its own; None: where there is
    no Merlin, or a row has more than LONG_LISTS values in the mean."""
    if not files:
        raise ValueError("training data: no parquet file; run 'vivace prepare' first")
    if plain is None:
        plain = Loader is None or values_a_row(files, columns) > LONG_LISTS
    return (_plain if plain else _by_merlin)(files, columns, rows, shuffle, seed, world)


def values_a_row(files: list[Path], columns: list[str]) -> float:
    """Mean number of values in the longest of ``columns``, by the files' footers."""
    values, rows = dict.fromkeys(columns, 0), 0
    for file in files:
        footer = pq.read_metadata(file)
        rows += footer.num_rows
        for group in range(footer.num_row_groups):
            for number in range(footer.num_columns):
                column = footer.row_group(group).column(number)
                if (name := column.path_in_schema.split(".")[0]) in values:
                    values[name] += column.num_values
    return max(values.values(), default=0) / max(rows, 1)


def _with_user_hash(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{USER: user_hash(frame[USER].to_numpy())})


def _by_merlin(
    files: list[Path], columns: list[str], rows: int, shuffle: bool, seed: int, world: World
) -> Iterator[dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = Dataset([str(f) for f in files], engine="parquet", part_size="4GB", cpu=True)
        frame = lazy.to_ddf()[columns]
        data = Dataset(frame.map_partitions(_with_user_hash) if USER in columns else frame, cpu=True)
        np.random.seed(seed)  # what Merlin's loader shuffles by
        loader = Loader(
            data, batch_size=rows, shuffle=shuffle, drop_last=False, global_size=world.size, global_rank=world.rank
        )
        loader._buff.put_wait = PUT_WAIT_S
        with loader:
            for inputs, _ in loader:
                yield {k: v.cpu() for k, v in inputs.items()}


def _plain(
    files: list[Path], columns: list[str], rows: int, shuffle: bool, seed: int, world: World
) -> Iterator[dict[str, Tensor]]:
    table = pa.concat_tables([pq.read_table(f, columns=columns) for f in files]).combine_chunks()
    order = np.random.default_rng(seed).permutation(len(table)) if shuffle else np.arange(len(table))
    order = order[world.rank :: world.size]
    for start in range(0, len(order), rows):
        part = table.take(order[start : start + rows]).combine_chunks()
        batch: dict[str, Tensor] = {}
        for name in columns:
            column = pa.concat_arrays(part[name].chunks)
            if name == USER:
                batch[name] = torch.from_numpy(user_hash(column.to_numpy(zero_copy_only=False)))
            elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                batch[f"{name}__values"] = torch.tensor(column.flatten().to_numpy(zero_copy_only=False))
                offsets = column.offsets.to_numpy().astype(np.int64)
                batch[f"{name}__offsets"] = torch.from_numpy(offsets - offsets[0])
            else:
                batch[name] = torch.tensor(column.to_numpy(zero_copy_only=False))
        yield batch
