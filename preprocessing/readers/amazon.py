"""Amazon reviews in the layout that S3-Rec published (Beauty, Sports, Toys, …): one line a user, items in time order.

Licence: research use; obtain it from the data's and S3-Rec's owners.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.readers.base import CHUNK_ROWS, Chunk, require
from vivace.contract import EVENT, ITEM, SOURCE_ROW, TEXT, TIME, TITLE, USER, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

LICENCE = "Amazon reviews (S3-Rec's files): research use"


class Beauty:
    """``Beauty.txt`` (``user item item …``), ``Beauty_item2attributes.json`` and, where it is there,
    ``Beauty_id_asin_keywords.tsv``. Time is the position in the line: the files have none."""

    schema = DataSchema(name="beauty", event_continuous=(), heads=(TaskHead("review", float("-inf")),), licence=LICENCE)
    name = "Beauty"

    def __init__(self, path: Path) -> None:
        self.log, self.attributes = path / f"{self.name}.txt", path / f"{self.name}_item2attributes.json"
        self.keywords = path / f"{self.name}_id_asin_keywords.tsv"
        require(path, (self.log.name, self.attributes.name), f"Amazon {self.name} in S3-Rec's layout")

    def fingerprint(self) -> str:
        return fingerprint_files(p for p in (self.log, self.attributes, self.keywords) if p.exists())

    def items(self) -> pd.DataFrame:
        """Every item of the log or the attributes; its attribute ids become words of its text ("a17")."""
        attributes = {item: [f"a{a}" for a in ids] for item, ids in json.loads(self.attributes.read_text()).items()}
        titles: dict[str, str] = {}
        if self.keywords.exists():
            for line in self.keywords.read_text(encoding="utf-8").splitlines():
                item, _, words = line.split("\t", 2)
                titles[item] = words
        listed = {item for line in self.log.read_text().splitlines() for item in line.split()[1:]}
        items = sorted(listed | set(attributes), key=lambda i: (len(i), i))
        title = [titles.get(i, f"item {i}") for i in items]
        text = [" ".join([titles.get(i, ""), *attributes.get(i, [])]) for i in items]
        return pd.DataFrame({ITEM: items, TITLE: title, TEXT: text})

    def interactions(self) -> Iterator[Chunk]:
        rows: dict[str, list] = {USER: [], ITEM: [], TIME: []}
        with self.log.open() as stream:
            for line in stream:
                user, *items = line.split()
                rows[USER] += [user] * len(items)
                rows[ITEM] += items
                rows[TIME] += range(len(items))
        frame = pd.DataFrame(rows).astype({TIME: float})
        frame[EVENT], frame[SOURCE_ROW] = "review", np.arange(len(frame))
        for start in range(0, len(frame), CHUNK_ROWS):
            yield Chunk(frame.iloc[start : start + CHUNK_ROWS].reset_index(drop=True))
