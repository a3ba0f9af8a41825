"""MovieLens-1M in GroupLens's layout, and the field's benchmark file made from it.

Licence: research use, no redistribution (GroupLens README); obtain it from GroupLens.
"""

from __future__ import annotations

import itertools
import lzma
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.arrow_types import parse_time_ms
from preprocessing.readers.base import CHUNK_ROWS, Chunk, require
from vivace.contract import EVENT, ITEM, SOURCE_ROW, TEXT, TIME, TITLE, USER, WEIGHT, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

LICENCE = "MovieLens: research use only, no redistribution, no commercial use without permission (GroupLens)"
EXTRA_FILE = "movies_extrainfos.dat"  # optional: not of GroupLens
GENRES = "genres"
USER_COLUMNS = ("gender", "age", "occupation")
BENCHMARK_FILE = "sasrec_ml-1m.txt.xz"


def _schema(name: str) -> DataSchema:
    return DataSchema(
        name=name,
        event_categoricals=(EVENT, *USER_COLUMNS),
        item_categoricals=(GENRES, "main_genre"),
        item_continuous=("year",),
        heads=(TaskHead("watched", float("-inf")), TaskHead("liked", 4.0)),
        licence=LICENCE,
        user_columns=USER_COLUMNS,
    )


def _with_lists(schema: DataSchema) -> DataSchema:
    """``schema`` whose genres are a list. The first of them stays a category: the ranker compares by it."""
    categoricals = tuple(name for name in schema.item_categoricals if name != GENRES)
    return replace(schema, name=f"{schema.name}-{GENRES}", item_categoricals=categoricals, item_lists=(GENRES,))


def _fields(path: Path, names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of a ``::``-separated latin-1 file, and the lines with another number of fields."""
    with path.open(encoding="latin-1") as stream:
        lines = [line.rstrip("\r\n") for line in stream]
    return _split_lines(lines, 0, names)


def _split_lines(lines: list[str], first: int, names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    parts = [line.split("::") for line in lines]
    good = [len(p) == len(names) for p in parts]
    rows = pd.DataFrame([p for p, g in zip(parts, good, strict=True) if g], columns=names, dtype=object)
    rows[SOURCE_ROW] = np.flatnonzero(good) + first
    bad = pd.DataFrame({"line": [x for x, g in zip(lines, good, strict=True) if not g and x]}, dtype=object)
    bad[SOURCE_ROW] = [i + first for i, (x, g) in enumerate(zip(lines, good, strict=True)) if not g and x]
    return rows, bad


class MovieLens:
    """``ratings.dat``, ``movies.dat``, ``users.dat`` under ``path``. A rating is an event, its stars the weight."""

    schema = _schema("ml-1m")
    files: tuple[str, ...] = ("ratings.dat", "movies.dat", "users.dat")

    def __init__(self, path: Path) -> None:
        require(path, self.files, "MovieLens-1M")
        self.path = path

    def fingerprint(self) -> str:
        files = [*self.files, *([EXTRA_FILE] if (self.path / EXTRA_FILE).exists() else [])]
        return fingerprint_files(self.path / f for f in files)

    def items(self) -> pd.DataFrame:
        frame, _ = _fields(self.path / "movies.dat", [ITEM, TITLE, GENRES])
        frame["main_genre"] = frame[GENRES].str.split("|").str[0]
        frame[TEXT] = frame[TITLE] + " " + frame[GENRES]
        if (self.path / EXTRA_FILE).exists():
            frame[TEXT] = frame[TEXT].str.cat(frame[ITEM].map(self._extra()).fillna(""), sep=" ")
        frame["year"] = pd.to_numeric(frame[TITLE].str.extract(r"\((\d{4})\)\s*$")[0], errors="coerce")
        return frame

    def _extra(self) -> pd.Series:
        """Words on each film that ``movies_extrainfos.dat`` knows: people as one word each, then the plot."""
        names = [ITEM, TITLE, "year", "rated", "date", "genres", "director", "writer", "actors", "plot"]
        extra, _ = _fields(self.path / EXTRA_FILE, names)
        extra = extra.drop_duplicates(ITEM).set_index(ITEM)
        people = (extra["director"] + ", " + extra["actors"]).str.replace(r"\s*\([^)]*\)", "", regex=True)
        joined = people.str.replace(r"[^\w,]+", "_", regex=True).str.replace(r"_*,_*", " ", regex=True)
        return joined + " " + extra["plot"]

    def users(self) -> list[Chunk]:
        rows, bad = _fields(self.path / "users.dat", [USER, *USER_COLUMNS, "zip"])
        return [Chunk(rows, bad)]

    def interactions(self) -> Iterator[Chunk]:
        first = 0
        with (self.path / "ratings.dat").open(encoding="latin-1") as stream:
            while lines := [x.rstrip("\r\n") for x in itertools.islice(stream, CHUNK_ROWS)]:
                rows, bad = _split_lines(lines, first, [USER, ITEM, WEIGHT, TIME])
                first += len(lines)
                rows[EVENT] = "rating"
                rows[TIME] = parse_time_ms(rows[TIME], "s")
                yield Chunk(rows, bad)


class MovieLensGenres(MovieLens):
    """The same with a film's genres one by one, an attribute of several values, not all of them as one."""

    schema = _with_lists(MovieLens.schema)


class MovieLensBenchmark(MovieLens):
    """``sasrec_ml-1m.txt.xz`` (SASRec's preprocessing: 3,416 items) in its own order, joined to the original ratings.

    Time is the position in the user's sequence: the file has none, and its order is what published figures use.
    """

    schema = _schema("ml-1m-benchmark")
    files = (*MovieLens.files, BENCHMARK_FILE, "sas_to_original_items.txt", "sas_to_original_users.txt")

    def _log(self) -> pd.DataFrame:
        with lzma.open(self.path / BENCHMARK_FILE) as stream:
            frame = pd.read_csv(stream, sep=" ", names=[USER, ITEM], dtype="int64")
        maps = {
            column: pd.read_csv(self.path / f"sas_to_original_{file}.txt", sep=" ", names=["sas", "own"]).set_index(
                "sas"
            )["own"]
            for column, file in ((USER, "users"), (ITEM, "items"))
        }
        frame[SOURCE_ROW] = np.arange(len(frame))
        frame[TIME] = frame.groupby(USER).cumcount().astype(float)
        for column, original in maps.items():
            frame[column] = frame[column].map(original).astype(str)
        return frame

    def items(self) -> pd.DataFrame:
        kept = set(self._log()[ITEM])
        frame = super().items()
        return frame[frame[ITEM].isin(kept)]

    def interactions(self) -> Iterator[Chunk]:
        ratings, _ = _fields(self.path / "ratings.dat", [USER, ITEM, WEIGHT, "seconds"])
        stars = ratings.drop_duplicates([USER, ITEM]).set_index([USER, ITEM])[WEIGHT]
        log = self._log().join(stars, on=[USER, ITEM])
        log[EVENT] = "rating"
        for start in range(0, len(log), CHUNK_ROWS):
            yield Chunk(log.iloc[start : start + CHUNK_ROWS].reset_index(drop=True))


class MovieLensBenchmarkGenres(MovieLensBenchmark):
    """The same with a film's genres one by one, an attribute of several values."""

    schema = _with_lists(MovieLensBenchmark.schema)
