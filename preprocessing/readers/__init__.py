"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from preprocessing.readers.base import Source


def open_source(data: str, path: Path | None, size: dict[str, int] | None = None) -> Source:
    """The reader of data set ``data``: shop, ml-1m, ml-1m-benchmark, beauty, globo, hm, retailrocket, or tables, whose
    ``path`` is a TOML mapping.

    ``size`` overrides sizes of the synthetic shop. Raises ValueError or FileNotFoundError with what to do.
    """
    from preprocessing.readers.amazon import Beauty
    from preprocessing.readers.globo import Globo
    from preprocessing.readers.hm import HM
    from preprocessing.readers.movielens import MovieLens, MovieLensBenchmark
    from preprocessing.readers.retailrocket import Retailrocket
    from preprocessing.readers.shop import Shop, ShopConfig
    from preprocessing.readers.tables import Tables

    if data == "shop":
        return Shop(ShopConfig(**(size or {})))
    readers: dict[str, Callable[[Path], Source]] = {
        "ml-1m": MovieLens,
        "ml-1m-benchmark": MovieLensBenchmark,
        "beauty": Beauty,
        "globo": Globo,
        "hm": HM,
        "retailrocket": Retailrocket,
        "tables": Tables,
    }
    if data not in readers:
        raise ValueError(f"--data: expected one of {['shop', *readers]}, got {data!r}")
    if path is None:
        raise ValueError(f"--data {data} needs --path: the folder of the data set (for tables: the mapping file)")
    return readers[data](path)
