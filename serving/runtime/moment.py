"""Types of a history's events and the context of a request as tensors, by the compiled workflow.

Axis legend: B rows, T history events, C categorical and F continuous columns of the context.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vivace.context import CONTEXT_FILE, CONTEXT_GRAPH, TYPES_GRAPH, ContextColumns, clock, parse_context
from vivace.contract import EVENT, PADDING_ID, StageTensors
from vivace.onnx_session import open_session
from vivace.store.interface import FeatureStore

Values = Mapping[str, str | float]


class Moment:
    """What models read of the moment of a request beside items and times.

    Args:
        folder: of the version, with CONTEXT_FILE and the compiled graphs that the shapes ask for.
        shapes: of the trained models.
    """

    def __init__(self, folder: Path, shapes: StageTensors, store: FeatureStore, threads: int = 1) -> None:
        path = folder / CONTEXT_FILE
        self.columns = ContextColumns.load(path) if path.exists() else ContextColumns()
        self._shapes, self._store = shapes, store
        self._types = open_session(folder / TYPES_GRAPH, threads) if shapes.types else None
        reads_context = bool(shapes.context or shapes.amounts or shapes.counted)
        self._context = open_session(folder / CONTEXT_GRAPH, threads) if reads_context else None
        if not reads_context:
            self.columns = ContextColumns(types=self.columns.types, shown_types=self.columns.shown_types)

    def sent(self, context: str) -> Values:
        """Values by column of the CONTEXT of a stored event; {} for one that cannot be read."""
        try:
            return parse_context(context.encode(), self.columns)[0]
        except ValueError:  # of another run's columns
            return {}

    def types(self, types: Sequence[Sequence[str]], read: Sequence[int]) -> list[np.ndarray]:
        """[ids int64 [B, T]] of each row's event types, oldest first, as many as it has events ("": not known), the
        newest ``read`` of each padded on the left; [] where they are not read."""
        if self._types is None:
            return []
        t = self._shapes.history
        newest = [list(row[len(row) - count :]) for row, count in zip(types, read, strict=True)]
        flat = [kind for row in newest for kind in row]
        ids = self._types.run(None, {EVENT: np.array(flat, object)})[0] if flat else np.empty(0, np.int64)
        out, start = np.full((len(types), t), PADDING_ID, np.int64), 0
        for row, kinds in enumerate(newest):
            out[row, t - len(kinds) :] = ids[start : start + len(kinds)]
            start += len(kinds)
        return [out]

    def known(self, users: Sequence[str], sent: Sequence[Values], now_ms: int | None = None) -> list[Values]:
        """Values of each row by column: what a request ``sent``, else what the store knows of its user, else the clock
        at ``now_ms`` (Unix ms; None: now); [] where none are read."""
        if self._context is None:
            return []
        columns = self.columns
        attributes = self._store.attributes(users) if columns.user_columns else [None] * len(users)
        of_clock: dict[str, str] = {}
        if columns.time_zone:
            now_ms = int(time.time() * 1000) if now_ms is None else now_ms
            of_clock = {name: v[0] for name, v in clock(np.array([now_ms]), columns.time_zone).items()}
        return [{**of_clock, **(a or {}), **s} for a, s in zip(attributes, sent, strict=True)]

    def encoded(self, known: Sequence[Values]) -> list[np.ndarray]:
        """[ids int64 [B, C]] and [amounts float32 [B, F]] of what is ``known`` of the rows, those of the two that are
        read."""
        if self._context is None:
            return []
        columns = self.columns
        feed: dict[str, np.ndarray] = {
            name: np.array([values.get(name, "") for values in known], object) for name in columns.plain
        }
        for name in columns.continuous:
            feed[name] = np.array([values.get(name, np.nan) for values in known], np.float32)
        encoded = self._context.run(None, feed)
        c = len(columns.categoricals)
        ids = [np.stack(encoded[:c], 1)] if c else []
        return [*ids, *([np.stack(encoded[c:], 1)] if columns.continuous else [])]

    def context(self, users: Sequence[str], sent: Sequence[Values], now_ms: int | None = None) -> list[np.ndarray]:
        """What is ``known`` of the rows, ``encoded``."""
        return self.encoded(self.known(users, sent, now_ms))
