"""``vivace prepare --for hugectr``: the prepared events as HugeCTR's Parquet reader takes them.

One row an event, its labels as float32, its continuous columns as float32 and its categorical ones (slots) as int64,
none missing, none a list. NVTabular writes the files with ``_metadata.json`` and ``_file_list.txt``; SLOTS beside them
says how many ids each slot has. Format: HugeCTR's Python interface, DataReaderParams, Parquet.
"""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.features import Features
from preprocessing.workflow import dataset
from vivace import contract
from vivace.contract import FIRST_ID, ITEM, OOV_ID, PADDING_ID, TARGET, USER
from vivace.manifest import Progress, Step, read_manifest, replaced, write_json

PARTS = ("train", "valid")
SLOTS = "slots.json"
FILE_LIST = "_file_list.txt"
PREVIOUS = "previous_item_id"  # the item of the user's event before, PADDING_ID of the first


@dataclass(frozen=True)
class Columns:
    """What a row has. ``slots``: ids of each categorical column, the special ones too, in the order of the slots."""

    labels: tuple[str, ...]
    continuous: tuple[str, ...]
    slots: dict[str, int]

    @classmethod
    def of(cls, features: Features, items: pd.DataFrame, users: int) -> Columns:
        """Event types and weights are left out: they say what the labels are."""
        schema, context, item_count = features.schema, features.context, features.item_count()
        slots = {USER: users + FIRST_ID, ITEM: item_count, PREVIOUS: item_count}
        slots |= dict(zip(context.categoricals, context.sizes, strict=True))
        slots |= {name: int(items[name].max()) + 1 for name in schema.item_categoricals}
        labels = tuple(contract.label_column(head.name) for head in schema.heads)
        return cls(labels, (*context.continuous, *schema.item_continuous), slots)


def _users(files: list[Path]) -> pd.Index:
    """Users of the training sequences; the id of each is its place + FIRST_ID."""
    return pd.Index(np.concatenate([pq.read_table(f, columns=[USER])[USER].to_numpy() for f in files])).unique()


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values of a list column one after the other, how many each row has)."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False), column.value_lengths().to_numpy().astype(np.int64)


def _of_sequences(table: pa.Table, names: list[str], users: pd.Index) -> dict[str, np.ndarray]:
    """Columns of the events of training sequences."""
    item, lengths = _lists(table, ITEM)
    out = {name: _lists(table, name)[0] for name in names}
    previous = np.concatenate([[PADDING_ID], item[:-1]]) if len(item) else item
    first = np.cumsum(lengths) - lengths
    previous[first[lengths > 0]] = PADDING_ID
    return out | {ITEM: item, PREVIOUS: previous, USER: np.repeat(users.get_indexer(table[USER].to_numpy()), lengths)}


def _of_requests(table: pa.Table, columns: Columns, names: list[str], users: pd.Index) -> dict[str, np.ndarray]:
    """Columns of the events to predict of held-out requests."""
    history, lengths = _lists(table, ITEM)
    last = np.cumsum(lengths) - 1
    previous = np.where(lengths > 0, history[last.clip(0)], PADDING_ID) if len(history) else 0 * lengths
    out = {n: table[n if n in columns.labels else contract.target_column(n)].to_numpy() for n in names}
    item = table[TARGET].to_numpy()
    return out | {ITEM: item, PREVIOUS: previous, USER: users.get_indexer(table[USER].to_numpy())}


def rows_of(file: Path, part: str, columns: Columns, items: pd.DataFrame, users: pd.Index) -> pa.Table:
    """The rows of one file of the features: labels, then continuous columns, then slots. ``items``: attributes by item
    id, those of the special ids 0."""
    table = pq.read_table(file)
    names = [n for n in (*columns.labels, *columns.continuous, *columns.slots) if n not in items]
    names = [n for n in names if n not in (USER, ITEM, PREVIOUS)]
    given = _of_sequences(table, names, users) if part == "train" else _of_requests(table, columns, names, users)
    given[USER] = np.where(given[USER] < 0, OOV_ID, given[USER] + FIRST_ID)
    given |= {n: items[n].to_numpy()[given[ITEM]] for n in (*columns.continuous, *columns.slots) if n in items}
    out = {n: np.nan_to_num(given[n].astype(np.float32)) for n in (*columns.labels, *columns.continuous)}
    out |= {n: given[n].astype(np.int64) for n in columns.slots}
    for name, size in columns.slots.items():
        if len(out[name]) and not (out[name].min() >= 0 and out[name].max() < size):
            raise ValueError(f"{file}: {name}: expected ids from 0 to {size - 1}, got up to {out[name].max()}")
    return pa.table(out)


def _relative(file_list: Path) -> None:
    """Paths from the folder of both parts on, so that they hold in a container as well."""
    count, *paths = file_list.read_text().split("\n")
    names = [f"./{file_list.parent.name}/{Path(path).name}" for path in paths if path]
    file_list.write_text("\n".join([count, *names]) + "\n")


def write_hugectr(features: Features, folder: Path, say: Progress) -> dict[str, Any]:
    """Writes ``folder`` unless it is there: train/, valid/ and SLOTS; returns its manifest."""
    inputs = {"features": read_manifest(features.folder, "vivace prepare")["key"]}
    step = Step(folder, "prepare for hugectr", {"parts": PARTS}, 0, inputs)
    if (manifest := step.finished(say, "HugeCTR's files are there")) is not None:
        return manifest
    started, schema = time.monotonic(), features.schema
    users, raw = _users(features.files("train")), features.items()
    attributes = raw[[*schema.item_categoricals, *schema.item_continuous]].fillna(0)
    special = pd.DataFrame(0, index=range(FIRST_ID), columns=attributes.columns)
    items = pd.concat([special, attributes], ignore_index=True)
    columns, counts = Columns.of(features, items, len(users)), dict[str, int]()
    with replaced(folder) as building:
        for part in PARTS:
            scratch = building / "scratch" / part
            scratch.mkdir(parents=True)
            files = []
            for file in features.files(part):
                rows = rows_of(file, part, columns, items, users)
                if len(rows):
                    pq.write_table(rows, scratch / file.name, row_group_size=len(rows))
                    files.append(scratch / file.name)
                counts[part] = counts.get(part, 0) + len(rows)
            if not files:
                raise ValueError(f"hugectr: no {part} events in {features.folder}; prepare a longer log")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset(files).to_parquet(
                    str(building / part), cats=list(columns.slots), conts=list(columns.continuous),
                    labels=list(columns.labels),
                )  # fmt: skip
            _relative(building / part / FILE_LIST)
            say(f"HugeCTR's {part} files: {counts[part]:,} events")
        shutil.rmtree(building / "scratch")
        record = {
            "labels": columns.labels, "continuous": columns.continuous, "slots": list(columns.slots),
            "slot_size_array": list(columns.slots.values()), "events": counts,
        }  # fmt: skip
        write_json(building / SLOTS, record)
        step = Step(building, step.name, step.config, step.seed, step.inputs)
        return step.finish(time.monotonic() - started, **record)
