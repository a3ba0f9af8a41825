"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from preprocessing.readers.base import Source

SHOP = "shop"
TABLES = "tables"
FOLDERS = {  # where a data set lies under VIVACE_DATA, by default
    "ml-1m": "ml-1m",
    "ml-1m-benchmark": "ml-1m",
    "ml-1m-genres": "ml-1m",
    "ml-1m-benchmark-genres": "ml-1m",
    "beauty": "beauty",
    "globo": "globo",
    "hm": "hm",
    "retailrocket": "retailrocket",
    "tmall": "tmall",
    "lastfm": "lastfm",
    "lastfm-plays": "lastfm",
    "lastfm-friends": "lastfm",
}
SESSIONS = "sessions"
DATA_SETS = (SHOP, *FOLDERS, SESSIONS, TABLES)
READERS = {
    "ml-1m": "movielens.MovieLens",
    "ml-1m-benchmark": "movielens.MovieLensBenchmark",
    "ml-1m-genres": "movielens.MovieLensGenres",
    "ml-1m-benchmark-genres": "movielens.MovieLensBenchmarkGenres",
    "beauty": "amazon.Beauty",
    "globo": "globo.Globo",
    "hm": "hm.HM",
    "retailrocket": "retailrocket.Retailrocket",
    "tmall": "sessions.Tmall",
    "lastfm": "lastfm.LastFm",
    "lastfm-plays": "lastfm.LastFmPlays",
    "lastfm-friends": "lastfm.LastFmFriends",
    SESSIONS: "sessions.Sessions",
    TABLES: "tables.Tables",
}
DATA_FOLDER = "VIVACE_DATA"  # folder that holds the data sets


def source_path(data: str, path: Path | None) -> Path:
    """Where a data set is read from: ``path``, or its folder under $VIVACE_DATA. Raises ValueError where neither is
    given, and FileNotFoundError, IsADirectoryError or NotADirectoryError where the path is not what ``data`` needs."""
    if path is None and data in FOLDERS and os.environ.get(DATA_FOLDER):
        path = Path(os.environ[DATA_FOLDER]) / FOLDERS[data]
    if path is None:
        what = (
            "the TOML file of the mapping" if data == TABLES else f"its folder (or set {DATA_FOLDER} to the one above)"
        )
        raise ValueError(f"--data {data} needs --path: {what}")
    if not path.exists():
        raise FileNotFoundError(f"--path: no such file or folder: {path}")
    if data == TABLES and path.is_dir():
        raise IsADirectoryError(f"--path {path}: a folder; --data tables reads the TOML file of a mapping")
    if data != TABLES and not path.is_dir():
        raise NotADirectoryError(f"--path {path}: a file; --data {data} reads the folder of the data set")
    return path


def open_source(data: str, path: Path | None, size: Mapping[str, Any] | None = None) -> Source:
    """The reader of data set ``data``, one of ``DATA_SETS``; of tables, ``path`` is a TOML mapping.

    ``size`` overrides sizes of the synthetic shop. Raises ValueError or OSError with what to do.
    """
    if data == SHOP:
        if path is not None:
            raise ValueError(f"--path {path}: the shop is generated and reads nothing; name the data set with --data")
        from preprocessing.readers.shop import Shop, ShopConfig

        return Shop(ShopConfig(**(size or {})))
    if data not in READERS:
        raise ValueError(f"--data: expected one of {DATA_SETS}, got {data!r}")
    module, _, reader = READERS[data].partition(".")
    source: Source = getattr(import_module(f"preprocessing.readers.{module}"), reader)(source_path(data, path))
    return source
