"""What every reader yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd

from vivace.contract import DataSchema

CHUNK_ROWS = 250_000


@dataclass(frozen=True)
class Chunk:
    """Some rows of the interaction log.

    ``rows`` has the schema's event columns and SOURCE_ROW; TIME is float ms, NaN where unreadable. ``malformed`` has
    the lines that could not be cut into fields, with SOURCE_ROW.
    """

    rows: pd.DataFrame
    malformed: pd.DataFrame | None = None


class Source(Protocol):
    """A data set: its schema, its catalogue and its log in chunks that fit in memory."""

    schema: DataSchema

    def fingerprint(self) -> str:
        """Identity of the data: of the files' contents, or of the generator's configuration."""

    def items(self) -> pd.DataFrame | None:
        """Catalogue with ITEM and the schema's item columns; None where the data set has none."""

    def interactions(self) -> Iterator[Chunk]: ...


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
