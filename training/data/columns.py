"""What windows and histories hold of an event beside its item, packed in one array.

Axis legend: W columns of a packed event, C categorical and F continuous columns of the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from training.models.retrieval import RetrievalModel
from vivace.contract import EVENT, ITEM, TIME, WEIGHT, target_column


class Events(NamedTuple):
    """Packed events as tensors [...]: ids, times in ms, ids of types, and the context [..., C] and [..., F]."""

    ids: Tensor
    times: Tensor | None
    types: Tensor | None
    context: tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class EventColumns:
    """Columns of an event, in their order: its item, then its time, its type, its context's categories and its amounts,
    those that there are. Packed, all are int64; amounts keep the bits of their float32."""

    timed: bool = True
    types: bool = False
    context: tuple[str, ...] = ()
    amounts: tuple[str, ...] = ()

    @classmethod
    def of_files(cls, files: list[Path]) -> EventColumns:
        """All columns of prepared sequences or requests."""
        schema = pq.read_schema(files[0])
        lists = {
            field.name: field.type.value_type
            for field in schema
            if (pa.types.is_list(field.type) or pa.types.is_large_list(field.type))
            and field.name not in (ITEM, TIME, EVENT, WEIGHT)
            and not field.name.startswith("label_")
        }
        amounts = tuple(n for n, kind in lists.items() if pa.types.is_floating(kind))
        return cls(True, EVENT in schema.names, tuple(n for n in lists if n not in amounts), amounts)

    @classmethod
    def read_by(cls, model: RetrievalModel) -> EventColumns:
        """Those that training windows need for a retriever."""
        context = model.read_context
        return cls(model.config.time_bias, bool(model.types), context.categoricals, context.continuous)

    @property
    def names(self) -> tuple[str, ...]:
        return (ITEM, *([TIME] if self.timed else []), *([EVENT] if self.types else []), *self.context, *self.amounts)

    @property
    def width(self) -> int:
        """W."""
        return len(self.names)

    @property
    def targets(self) -> list[str]:
        """Columns that hold the context of the event to predict."""
        return [target_column(name) for name in (*self.context, *self.amounts)]

    def packed(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """int64 [n, W] of a column [n] each."""
        return np.stack([_packed(values[name], name in self.amounts) for name in self.names], 1)

    def unpacked(self, events: np.ndarray) -> dict[str, np.ndarray]:
        """The reverse."""
        columns = {name: events[:, i] for i, name in enumerate(self.names)}
        return {n: c.astype(np.int32).view(np.float32) if n in self.amounts else c for n, c in columns.items()}

    def read(self, events: Tensor) -> Events:
        """Tensors of packed events int64 [..., W], or of ids [...] alone."""
        if self == ITEMS_ALONE:
            return Events(events, None, None, (None, None))
        c, f = len(self.context), len(self.amounts)
        first = events.shape[-1] - c - f
        context = events[..., first : first + c] if c else None
        amounts = events[..., first + c :].to(torch.int32).view(torch.float32) if f else None
        times = events[..., 1] if self.timed else None
        types = events[..., 1 + self.timed] if self.types else None
        return Events(events[..., 0], times, types, (context, amounts))

    def of_targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The context of the events to predict, int64 [B, C] and float32 [B, F], of a batch with ``targets``."""
        at = lambda names: [batch[target_column(n)].reshape(-1) for n in names]  # noqa: E731
        context = torch.stack(at(self.context), 1).to(torch.int64) if self.context else None
        return context, torch.stack(at(self.amounts), 1).float() if self.amounts else None


def _packed(values: np.ndarray, is_amount: bool) -> np.ndarray:
    return values.astype(np.float32).view(np.int32).astype(np.int64) if is_amount else values.astype(np.int64)


ITEMS_ALONE, TIMED = EventColumns(timed=False), EventColumns()
