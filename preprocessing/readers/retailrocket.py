"""Retailrocket e-commerce behaviours: views, carts and purchases, with a graph of items.

Licence: CC BY-NC-SA 4.0 (Retailrocket, Kaggle): non-commercial use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.arrow_types import parse_time_ms
from preprocessing.readers.base import CHUNK_ROWS, Chunk, require
from vivace.contract import EVENT, ITEM, SOURCE_ROW, TEXT, TIME, TITLE, USER, WEIGHT, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

LICENCE = "Retailrocket: CC BY-NC-SA 4.0, non-commercial use"
WEIGHTS = {"view": 1.0, "cart": 2.0, "buy": 3.0}
FILES = ("train_events.csv", "kg.txt")


class Retailrocket:
    """``train_events.csv`` (user, item, behavior, Unix seconds) and ``kg.txt`` (head, relation, tail of items).

    A purchase often follows a view of the same item, so items of the history may be answered. ``test_buy.csv`` has no
    times and is not read: splits are by time or leave-one-out of the events.
    """

    schema = DataSchema(
        name="retailrocket",
        heads=(TaskHead("view", float("-inf")), TaskHead("cart", 2.0), TaskHead("buy", 3.0)),
        exclude_seen=False,
        unknown_items="keep",
        licence=LICENCE,
    )

    def __init__(self, path: Path) -> None:
        require(path, FILES, "Retailrocket")
        self.path = path

    def fingerprint(self) -> str:
        return fingerprint_files(self.path / f for f in FILES)

    def items(self) -> pd.DataFrame:
        """Items of the graph; each relation to another item is a word of its text ("r0t285")."""
        graph = pd.read_csv(self.path / "kg.txt", sep=r"\s+", names=["head", "relation", "tail"], dtype=str)
        graph["word"] = "r" + graph["relation"] + "t" + graph["tail"]
        text = graph.groupby("head", sort=False)["word"].agg(" ".join)
        return pd.DataFrame({ITEM: text.index, TITLE: "item " + text.index, TEXT: text.to_numpy()})

    def interactions(self) -> Iterator[Chunk]:
        first = 0
        for frame in pd.read_csv(self.path / "train_events.csv", dtype=str, chunksize=CHUNK_ROWS):
            frame = frame.reset_index(drop=True)
            rows = pd.DataFrame({USER: frame["user"], ITEM: frame["item"], EVENT: frame["behavior"]})
            rows[TIME] = parse_time_ms(frame["timestamp"], "s")
            rows[WEIGHT] = frame["behavior"].map(WEIGHTS)
            rows[SOURCE_ROW] = np.arange(first, first + len(rows))
            first += len(rows)
            yield Chunk(rows)
