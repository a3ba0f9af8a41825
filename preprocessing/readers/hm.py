"""H&M: a catalogue of 105,542 articles with text, and one week of purchases.

Licence: H&M Personalized Fashion Recommendations, Kaggle: non-commercial use.
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

LICENCE = "H&M (Kaggle): non-commercial use"
FILES = ("articles.parquet", "valid_split.parquet")
ATTRIBUTES = {
    "product_type_name": "type", "colour_group_name": "colour", "graphical_appearance_name": "appearance",
    "department_name": "department", "section_name": "section", "garment_group_name": "garment",
}  # fmt: skip
NO_VALUE = ("Unknown", "undefined", "Unknown ")
ID_DIGITS = 10


class HM:
    """``articles.parquet`` and ``valid_split.parquet`` (t_dat, customer_id, article_id). Purchases name articles
    without the leading zero that the catalogue has. People buy an article twice, so items of the history may be
    answered. Prices are not read: only articles that were sold have one, which would tell what will be sold.
    """

    schema = DataSchema(
        name="hm", item_categoricals=tuple(ATTRIBUTES.values()), heads=(TaskHead("buy", float("-inf")),),
        exclude_seen=False, licence=LICENCE,
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        require(path, FILES, "H&M")
        self.path = path

    def fingerprint(self) -> str:
        return fingerprint_files(self.path / f for f in FILES)

    def items(self) -> pd.DataFrame:
        frame = pd.read_parquet(self.path / FILES[0], columns=["article_id", "prod_name", "detail_desc", *ATTRIBUTES])
        named = frame[list(ATTRIBUTES)].rename(columns=ATTRIBUTES).astype(str)
        named = named.mask(named.isin(NO_VALUE), "")
        words = named[["type", "colour", "appearance", "section"]].agg(" ".join, axis=1)
        text = frame["prod_name"].fillna("") + ". " + words + ". " + frame["detail_desc"].fillna("")
        return pd.DataFrame({ITEM: frame["article_id"].astype(str), TITLE: frame["prod_name"], TEXT: text, **named})

    def interactions(self) -> Iterator[Chunk]:
        log = pd.read_parquet(self.path / FILES[1], columns=["t_dat", "customer_id", "article_id"])
        for first in range(0, len(log), CHUNK_ROWS):
            frame = log.iloc[first : first + CHUNK_ROWS].reset_index(drop=True)
            rows = pd.DataFrame({USER: frame["customer_id"]})
            rows[ITEM] = frame["article_id"].astype(str).str.zfill(ID_DIGITS)
            rows[EVENT], rows[WEIGHT] = "buy", 1.0
            rows[TIME] = parse_time_ms(frame["t_dat"].astype(str), "iso")
            rows[SOURCE_ROW] = np.arange(first, first + len(rows))
            yield Chunk(rows)
