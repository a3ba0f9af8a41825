"""What every reader yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow as pa

from vivace.contract import DataSchema

CHUNK_ROWS = 250_000
LINE, REASON, DETAIL = "line", "reason", "detail"  # columns of malformed rows


@dataclass(frozen=True)
class Chunk:
    """Some rows of the interaction log.

    ``rows`` has the schema's event columns and SOURCE_ROW; TIME is float ms, NaN where unreadable, infinite where it
    lies before 1970 or after 9999. ``malformed`` has the rows that could not be cut into fields: LINE, SOURCE_ROW, and
    where the reader tells them REASON and DETAIL.

    A reader of files also gives ``file``; ``base``, so that SOURCE_ROW - base is the line or row in it; ``original``,
    the rows as the file has them; ``changed``, places of rows in which something was changed, by reason;
    ``notes`` for the user.
    """

    rows: pd.DataFrame
    malformed: pd.DataFrame | None = None
    file: str = ""
    base: int = 0
    original: pa.Table | None = None
    changed: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def read(self) -> int:
        return len(self.rows) + (0 if self.malformed is None else len(self.malformed))


class Source(Protocol):
    """A data set: its schema, its catalogue and its log in chunks that fit in memory."""

    schema: DataSchema

    def fingerprint(self) -> str:
        """Identity of the data: of the files' contents, or of the generator's configuration."""

    def items(self) -> pd.DataFrame | list[Chunk] | None:
        """Catalogue with ITEM and the schema's item columns, as chunks where the reader has something to report of
        its rows; None where the data set has none."""

    def interactions(self) -> Iterator[Chunk]: ...


@runtime_checkable
class UserSource(Protocol):
    """A data set that also has a table of users, or None."""

    def users(self) -> list[Chunk] | None:
        """Rows of USER, SOURCE_ROW and the schema's ``user_columns``."""
        ...


@runtime_checkable
class SearchSource(Protocol):
    """A data set that also has a log of searches, or None."""

    def searches(self) -> Iterator[Chunk] | None:
        """Rows of SEARCH, USER, TIME, QUERY_TEXT, ITEM, POSITION, CLICKED and SOURCE_ROW, one an item that was shown;
        TIME is float ms, NaN where unreadable."""
        ...


def require(path: Path, names: tuple[str, ...], what: str) -> None:
    """Raises FileNotFoundError naming what is missing and where it was looked for."""
    missing = [n for n in names if not (path / n).exists()]
    if missing:
        raise FileNotFoundError(f"{what}: expected {list(names)} in {path}, missing {missing}; check --path")
