"""One encoded partition to rows of training and held-out requests. Needs no NVTabular."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vivace import contract

WHOLE = "whole"  # all that a final fit learns from: see ``write_requests``
PARTS = {"valid": (contract.VALID,), "test": (contract.TEST, contract.GIVEN_TEST)}  # marks of the events to predict


def cut_lists(values: pa.ListArray, rows: np.ndarray, stops: np.ndarray) -> pa.ListArray:
    """The first ``stops[i]`` values of list ``rows[i]``."""
    offsets, flat = values.offsets.to_numpy(), values.values.to_numpy(zero_copy_only=False)
    new = np.concatenate([[0], np.cumsum(stops)])
    take = np.repeat(offsets[:-1][rows] - new[:-1], stops) + np.arange(new[-1])
    return pa.ListArray.from_arrays(pa.array(new, pa.int32()), pa.array(flat[take]))


def _one(values: pa.ListArray, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Value ``index[i]`` of list ``rows[i]``."""
    flat = values.values.to_numpy(zero_copy_only=False)
    picked: np.ndarray = flat[values.offsets.to_numpy()[:-1][rows] + index]
    return picked


def _list(table: pa.Table, column: str) -> pa.ListArray:
    array = table[column].combine_chunks()
    array = array.cast(pa.list_(array.type.value_type))
    return pa.ListArray.from_arrays(
        pa.array(array.offsets.to_numpy() - array.offsets[0].as_py(), pa.int32()), array.flatten()
    )


def held_out(flags: np.ndarray, owner: np.ndarray, place: np.ndarray, part: str, every: bool) -> np.ndarray:
    """Places, in the flat lists, of the events of a part that are predicted, int64: of each row the first, or ``every``
    one. ``flags`` marks of SPLIT, ``owner`` row and ``place`` from 0 in it of every event."""
    hits = np.flatnonzero(np.isin(flags, PARTS[part]) & (place > 0))
    if every or not len(hits):
        return hits
    _, first = np.unique(owner[hits], return_index=True)
    return hits[first]


def write_requests(encoded: Path, folder: Path, schema: contract.DataSchema, every: bool = False) -> dict[str, int]:
    """One encoded partition to its rows of train, valid, test and whole; how many of each.

    train: whole training sequences. valid and test: the history before a held-out event, its item, time, context and
    labels; of each user the first held-out event, or ``every`` one, as of sessions. whole: all events of the log in
    training sequences, those held out too, but not those of a test set that came with it. Each with the times of its
    events, in ms.
    """
    table = pq.read_table(encoded)
    split = _list(table, f"{contract.SPLIT}-list")
    offsets = split.offsets.to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(split)), np.diff(offsets))
    place = np.arange(len(owner)) - offsets[owner]
    flags = split.values.to_numpy(zero_copy_only=False)
    learned = np.bincount(owner, flags == contract.TRAIN, minlength=len(split)).astype(np.int64)
    own = np.bincount(owner, flags < contract.GIVEN, minlength=len(split)).astype(np.int64)
    read = np.bincount(owner, np.isin(flags, (contract.TRAIN, contract.CONTEXT, contract.GIVEN)), minlength=len(split))
    columns = [contract.ITEM, contract.TIME, *schema.encoded_categoricals, *schema.event_continuous]
    lists = {name: _list(table, f"{name}-list") for name in columns}
    labels = {
        contract.label_column(h.name): _list(table, f"{contract.label_column(h.name)}-list") for h in schema.heads
    }
    users = table[contract.USER].combine_chunks()
    written = {}

    def write(part: str, rows: np.ndarray, stops: np.ndarray, more: dict[str, Any]) -> None:
        (folder / part).mkdir(parents=True, exist_ok=True)
        written[part] = len(rows)
        if len(rows):
            cut = {name: cut_lists(values, rows, stops) for name, values in lists.items()}
            out = pa.table({contract.USER: users.take(pa.array(rows)), **cut, **more})
            pq.write_table(out, folder / part / encoded.name, row_group_size=len(rows))

    for part, lengths in (("train", learned), (WHOLE, own)):
        rows = np.flatnonzero(lengths)
        write(
            part, rows, lengths[rows], {name: cut_lists(values, rows, lengths[rows]) for name, values in labels.items()}
        )
    for part in PARTS:
        events = held_out(flags, owner, place, part, every)
        events = events[read[owner[events]] > 0]
        rows, index = owner[events], place[events]
        targets = {name: _one(values, rows, index) for name, values in labels.items()}
        targets[contract.TARGET] = _one(lists[contract.ITEM], rows, index)
        targets[contract.TARGET_TIME] = _one(lists[contract.TIME], rows, index)
        for name in (*schema.context_categoricals, *schema.context_continuous):
            targets[contract.target_column(name)] = _one(lists[name], rows, index)
        write(part, rows, index, targets)
    asked = np.bincount(owner, np.isin(flags, sum(PARTS.values(), ())), minlength=len(split)) > 0
    written["skipped_without_training_history"] = int((asked & (read == 0)).sum())
    return written


def _of_types(old: list[Path], column: str, values: list[str]) -> pd.DataFrame:
    """What the data set's events of a type have: mean of ``values`` by the type's id."""
    if column not in pq.read_schema(old[0]).names:
        return pd.DataFrame(columns=values)
    tables = [pq.read_table(file, columns=[column, *values]) for file in old]
    names = (column, *values)
    flat = [{n: t[n].combine_chunks().flatten().to_numpy(zero_copy_only=False) for n in names} for t in tables]
    return pd.concat(pd.DataFrame(part) for part in flat).groupby(column)[values].mean()


def typed(rows: pd.DataFrame, old: list[Path], schema: contract.DataSchema) -> pd.DataFrame:
    """Labels and weight of encoded new events: those that the data set's events of the same type have (``old``: files
    of WHOLE). A type that it does not have says nothing: its label is 1 where a head takes every event."""
    labels = {contract.label_column(head.name): head for head in schema.heads}
    values = [*labels, *(name for name in schema.event_continuous if name == contract.WEIGHT)]
    means, kind = _of_types(old, contract.EVENT, values), contract.EVENT
    for name in values:
        of_type = rows[kind].map(means[name]) if kind in rows and name in means else pd.Series(np.nan, rows.index)
        if name in labels:
            every = float(labels[name].min_weight == float("-inf"))
            rows[name] = of_type.fillna(every).round().astype("int64")
        elif name in rows:
            rows[name] = of_type.fillna(rows[name]).to_numpy(rows[name].dtype)
    return rows
