"""The catalogue in the order of item ids: as it was (``catalogue.parquet``), and encoded by NVTabular.

NVTabular 23.8 on CPU refuses a list column with a null or without any value, and encodes a null in a list as out of
vocabulary. So it is given a list of one null for a list without values, and what that means is said here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.features import CATALOGUE_FILE, VALUES_FILE
from preprocessing.item_lists import list_ids, object_column
from preprocessing.workflow import item_workflow, nvt
from preprocessing.workflow_onnx import event_vocabulary
from vivace.contract import FIRST_ID, ITEM, MAX_VALUES, TEXT, TITLE, DataSchema

ITEM_WORKFLOW = "item_workflow"  # folder of what NVTabular fitted
SHOWN = [ITEM, TITLE, TEXT]


def _values(cell: object) -> list[str]:
    """What a cell of a list column holds; [] where a join found no row."""
    return list(cell) if isinstance(cell, list | np.ndarray) else []


def described(frame: pd.DataFrame, schema: DataSchema) -> pd.DataFrame:
    """Rows of the catalogue, columns of those that have none filled: title and text "", categories None, lists [],
    numbers NaN. Columns: SHOWN and the schema's attributes."""
    out = {ITEM: frame[ITEM]}
    out |= {name: frame[name].fillna("") if name in frame else "" for name in (TITLE, TEXT)}
    for name in (*schema.item_categoricals, *schema.item_lists):
        column = frame[name].astype(object) if name in frame else pd.Series(None, frame.index, object)
        out[name] = column if name in schema.item_categoricals else object_column([_values(cell) for cell in column])
    for name in schema.item_continuous:
        out[name] = (frame[name] if name in frame else pd.Series(np.nan, frame.index)).astype("float32")
    return pd.DataFrame(out, index=frame.index)


def write_catalogue(frame: pd.DataFrame, schema: DataSchema, folder: Path) -> None:
    """CATALOGUE_FILE of ``folder``; list attributes are list<string>, also where no item has a value."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for name in schema.item_lists:
        values = pa.array([_values(cell) for cell in frame[name]], pa.list_(pa.string()))
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, folder / CATALOGUE_FILE)


def encoded(workflow: nvt.Workflow, frame: pd.DataFrame, schema: DataSchema) -> pd.DataFrame:
    """The attributes of ``described`` rows by the fitted item workflow: int64 ids, lists of them
    (``item_lists.list_ids``), float32 numbers."""
    out = workflow.transform(nvt.Dataset(_given(frame, schema))).compute().reset_index(drop=True)
    for name in schema.item_lists:
        out[name] = object_column([
            np.array(list_ids(ids, len(values)), np.int64) for ids, values in zip(out[name], frame[name], strict=True)
        ])  # fmt: skip
    return out[list(schema.item_attributes)]


def _given(frame: pd.DataFrame, schema: DataSchema) -> pd.DataFrame:
    """What NVTabular gets of ``described`` rows."""
    out = frame[list(schema.item_attributes)].reset_index(drop=True)
    for name in schema.item_lists:
        out[name] = object_column([list(values) or [None] for values in out[name]])
    return out


def cut_values(frame: pd.DataFrame, schema: DataSchema) -> list[str]:
    """A note on each list attribute of which some item has more values than models read."""
    notes = []
    for name in schema.item_lists:
        over = np.array([len(values) - MAX_VALUES for values in frame[name]])
        if (over > 0).any():
            notes.append(
                f"{name}: {int((over > 0).sum()):,} items have more than {MAX_VALUES} values; models read the "
                f"{MAX_VALUES} most frequent, {int(over[over > 0].sum()):,} values are left out"
            )
    return notes


def items_table(
    workflow: nvt.Workflow, catalogue: pd.DataFrame, schema: DataSchema, folder: Path
) -> tuple[pd.DataFrame, list[str]]:
    """(every item of the vocabulary in the order of ids with encoded attributes, null where there are none; notes for
    the user). Writes CATALOGUE_FILE, VALUES_FILE and the fitted ITEM_WORKFLOW to ``folder``."""
    words = event_vocabulary(workflow, ITEM)
    if list(words.index) != list(range(FIRST_ID, FIRST_ID + len(words))):
        raise ValueError(f"{ITEM}: expected the vocabulary's ids to run from {FIRST_ID}, got {words.index[:5]}…")
    frame = pd.DataFrame({ITEM: words.to_numpy(object)}).merge(catalogue, on=ITEM, how="left")
    frame = described(frame, schema)
    write_catalogue(frame, schema, folder)
    attributes = item_workflow(schema, folder / "scratch" / "item_categories")
    if attributes is None:
        return frame[SHOWN], []
    attributes.fit(nvt.Dataset(_given(frame, schema)))
    attributes.save(str(folder / ITEM_WORKFLOW))
    vocabularies = {name: event_vocabulary(attributes, name).tolist() for name in schema.item_lists}
    if vocabularies:
        (folder / VALUES_FILE).write_text(json.dumps(vocabularies, ensure_ascii=False), encoding="utf-8")
    return pd.concat([frame[SHOWN], encoded(attributes, frame, schema)], axis=1), cut_values(frame, schema)
