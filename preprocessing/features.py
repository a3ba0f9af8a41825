"""What ``vivace prepare`` wrote, for those who read it: training, evaluation, compilation. Needs no NVTabular."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vivace import contract
from vivace.context import CONTEXT_FILE, ContextColumns
from vivace.limits import CountLimits
from vivace.live import Stream
from vivace.live_shown import ShownStream
from vivace.manifest import read_manifest

SCHEMA_FILE = "schema.json"
REQUEST_GRAPH = "transform_request.onnx"
CATALOGUE_FILE = "catalogue.parquet"  # attributes as they were, in the order of item ids: what search reads
VALUES_FILE = "list_values.json"  # of each list attribute, its values in the order of their ids, from FIRST_ID on
SEARCHES_FILE = "searches.parquet"  # the log of searches, where there is one; ITEM are ids
EVENTS_FILE = "events.parquet"  # every event of the log in time order, those of no request too: see ``events``
SHOWN_FILE = "shown.parquet"  # what was shown, in time order, where the log says so: see ``shown``
MINUTE_EVENTS = "minute_events"  # in the manifest's results: see ``Features.minute_events``
LOG_NUMBER = "log_number"  # in the manifest's results: see ``Features.log_number``
LAYOUT = 5  # of the files: features of another layout are prepared again


class Features:
    """Paths and loaders of what ``prepare`` wrote under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items_file = folder / "items.parquet"
        self.transform = folder / "transform.onnx"
        self.rejects = folder / "rejects.csv"

    @property
    def schema(self) -> contract.DataSchema:
        return contract.DataSchema.load(self.folder / SCHEMA_FILE)

    @property
    def context(self) -> ContextColumns:
        """Columns of a request's moment, and how many ids each has."""
        self._check_layout()
        return ContextColumns.load(self.folder / CONTEXT_FILE)

    def files(self, part: str) -> list[Path]:
        """Parquet files of "train", "valid", "test" or "whole" (``sequences.write_requests``). Raises ValueError
        if an earlier version wrote them."""
        self._check_layout()
        return sorted((self.folder / part).glob("*.parquet"))

    def _check_layout(self) -> None:
        layout = read_manifest(self.folder, "vivace prepare")["config"].get("layout")
        if layout != LAYOUT:
            raise ValueError(
                f"features: {self.folder} was written by another version of vivace (layout {layout}, expected "
                f"{LAYOUT}); run 'vivace prepare' again"
            )

    def items(self) -> pd.DataFrame:
        """One row an item id from FIRST_ID on, in order: ITEM (raw), TITLE, TEXT, encoded attributes: int64 ids, lists
        of 1 to MAX_VALUES of them, normalised numbers."""
        return pd.read_parquet(self.items_file)

    def list_values(self) -> dict[str, list[str]]:
        """Of each list attribute, its values in the order of their ids, from FIRST_ID on."""
        path = self.folder / VALUES_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def events(self) -> dict[str, np.ndarray]:
        """The stream of events, int64 each: ITEM (ids), USER (hashes), TIME and ids of the context's categorical
        columns, in order of time. Raises ValueError if an earlier version wrote the features."""
        self._check_layout()
        table = pq.read_table(self.folder / EVENTS_FILE)
        return {name: table[name].to_numpy() for name in table.column_names}

    def stream(self, columns: ContextColumns, limits: CountLimits | None = None, until_ms: int | None = None) -> Stream:
        """The same as live counters take them, with the context of the columns that they go by; of each user as much
        as ``limits`` allow. ``until_ms``: events before that time alone; those of later change nothing of them."""
        events = self.events()
        stop = None if until_ms is None else int(np.searchsorted(events[contract.TIME], until_ms))
        events = {name: values[:stop] for name, values in events.items()}
        context = [events[columns.categoricals[i]] for i in columns.counted]
        context_NC = np.stack(context, 1) if context else np.empty((len(events[contract.ITEM]), 0), np.int64)
        users, ids, times_ms = (events[name] for name in (contract.USER, contract.ITEM, contract.TIME))
        seen = None
        if limits is not None and limits.newcomers and (path := self.folder / SHOWN_FILE).exists():
            table = pq.read_table(path, columns=[contract.USER, contract.TIME])
            seen = table[contract.USER].to_numpy(), table[contract.TIME].to_numpy()
        return Stream.of(users, ids, times_ms, context_NC, limits, seen)

    def has_shown(self) -> bool:
        """Whether the log says what was shown."""
        path = self.folder / SHOWN_FILE
        return path.exists() and pq.read_metadata(path).num_rows > 0

    def shown(self, limits: CountLimits | None = None) -> ShownStream:
        """What was shown, as live counters take it: ids of items, hashes of users and times; of each user as much as
        ``limits`` allow. None where the log does not say."""
        path = self.folder / SHOWN_FILE
        if not path.exists():
            return ShownStream.none()
        table = pq.read_table(path)
        stream = ShownStream(*(table[name].to_numpy() for name in (contract.USER, contract.ITEM, contract.TIME)))
        return stream if limits is None else stream.limited(limits)

    def log_number(self) -> int:
        """Number of the newest event of the store's log that a refresh has put among these; 0 where none has."""
        return int(read_manifest(self.folder, "vivace prepare")["results"].get(LOG_NUMBER, 0))

    def minute_events(self) -> int:
        """What an account may send within a minute and be a person (``vivace.suspects``); 0, no limit, where an earlier
        version wrote the features."""
        return int(read_manifest(self.folder, "vivace prepare").get("results", {}).get(MINUTE_EVENTS, 0))

    def searches(self) -> pd.DataFrame | None:
        """The log of searches by time and list, ITEM as ids; None where there is none."""
        path = self.folder / SEARCHES_FILE
        return pd.read_parquet(path) if path.exists() else None

    def item_count(self) -> int:
        """V: item ids with the special ones."""
        return pq.read_metadata(self.items_file).num_rows + contract.FIRST_ID
