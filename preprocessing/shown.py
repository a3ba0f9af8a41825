"""What was shown: events of the schema's ``shown_types``, kept apart from the log. No workflow is fitted on them, no
history has them and no request is made of them; live counters count them beside the clicks.

Needs no NVTabular.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.cleaning import drop_duplicates
from preprocessing.events import ROWS, user_hash
from preprocessing.rejects import Rejects
from vivace.contract import EVENT, FIRST_ID, ITEM, SOURCE_ROW, TIME, USER, DataSchema

RAW = [USER, ITEM, TIME, EVENT, SOURCE_ROW]


def shown_apart(events: pd.DataFrame, schema: DataSchema) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Clean rows without those that say what was shown, and those, with the columns RAW."""
    if not schema.shown_types or events.empty:
        return events, events.iloc[:0]
    shown = events[EVENT].isin(schema.shown_types)
    return events[~shown], events.loc[shown, RAW]


def impressions(rows: pd.DataFrame, items: pd.Index) -> pd.DataFrame:
    """Raw rows of USER, ITEM and TIME as ids, hashes of users and times, int64; those of items that are not among
    ``items``, raw ids in the order of ids, are left out."""
    ids = items.get_indexer(rows[ITEM])
    columns = {USER: user_hash(rows[USER].to_numpy(object)), ITEM: ids + FIRST_ID, TIME: rows[TIME].to_numpy(np.int64)}
    return pd.DataFrame(columns).astype(np.int64)[ids >= 0]


def of_partitions(files: list[Path], items: pd.Index, rejects: Rejects) -> pd.DataFrame:
    """``impressions`` of files of raw rows that each have whole users; a row that is there twice counts once."""
    parts = [impressions(drop_duplicates(pd.read_parquet(file), rejects), items) for file in files]
    return pd.concat(parts) if parts else impressions(pd.DataFrame(columns=RAW), items)


def only_shown(files: list[Path], schema: DataSchema, read: int) -> str:
    """Why a log of ``read`` rows teaches nothing whose good ones, in ``files``, were all only shown; what to do."""
    kinds = Counter[str]()
    for file in files:
        kinds.update(pq.read_table(file, columns=[EVENT])[EVENT].to_pylist())
    came = ", ".join(f"{kind!r} ({count:,})" for kind, count in kinds.most_common(5))
    return (
        f"expected events that people did, got of {read:,} rows only types that shown_types names: {came}; it names "
        f"{list(schema.shown_types)}. Nothing is learned from what was only shown: take the types that people did, "
        "such as a click, out of shown_types, or add the files that hold them to [interactions]"
    )


def write_shown(parts: Iterable[pd.DataFrame], path: Path) -> int:
    """Writes ``impressions`` in order of time, of one time by user and item; one of the same user, item and time once.
    How many there are."""
    rows = pd.concat(list(parts)).drop_duplicates()
    order = np.lexsort((rows[ITEM], rows[USER], rows[TIME]))
    table = pa.table({name: rows[name].to_numpy(np.int64)[order] for name in (USER, ITEM, TIME)})
    pq.write_table(table, path, row_group_size=ROWS)
    return len(table)
