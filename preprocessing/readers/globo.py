"""Globo.com news clicks (Kaggle "News Portal User Interactions by Globo.com"), in the owners' layout.

Licence: academic and non-commercial use only.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.arrow_types import parse_time_ms
from preprocessing.readers.base import Chunk
from vivace.contract import EVENT, ITEM, SOURCE_ROW, TIME, TITLE, USER, WEIGHT, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

LICENCE = "Globo.com clicks: academic, non-commercial use only"
CONTEXT = {
    "environment": "click_environment",
    "device": "click_deviceGroup",
    "os": "click_os",
    "country": "click_country",
    "region": "click_region",
    "referrer": "click_referrer_type",
}


class Globo:
    """Hourly click files, as ``clicks/*.csv`` or ``clicks.tar.xz``, and the article metadata.

    The weight is the dwell time in seconds: until the next click of the session, unknown (null) for its last click.
    Metadata covers 96 % of the clicks, so unknown articles stay, with null attributes.
    """

    schema = DataSchema(
        name="globo",
        event_categoricals=(EVENT, *CONTEXT),
        item_categoricals=("category", "publisher"),
        item_continuous=("words", "created_ms"),
        heads=(TaskHead("click", float("-inf")), TaskHead("dwell", 60.0)),
        unknown_items="keep",
        licence=LICENCE,
    )

    def __init__(self, path: Path, max_files: int = 0) -> None:
        """``max_files`` reads only the first hours (0: all)."""
        self.path, self.max_files = path, max_files
        self.metadata = sorted(path.glob("articles_metadata*.csv"))
        self.archive = path / "clicks.tar.xz"
        self.folder = path / "clicks"
        if not self.metadata or not (self.archive.exists() or self.folder.is_dir()):
            raise FileNotFoundError(
                f"Globo: expected articles_metadata*.csv and clicks/ or clicks.tar.xz in {path}; check --path"
            )

    def fingerprint(self) -> str:
        clicks = sorted(self.folder.glob("*.csv")) if self.folder.is_dir() else [self.archive]
        return fingerprint_files([*self.metadata, *clicks]) + (f"-first{self.max_files}" if self.max_files else "")

    def items(self) -> pd.DataFrame:
        frame = pd.concat([pd.read_csv(f, dtype=str) for f in self.metadata])
        return pd.DataFrame(
            {
                ITEM: frame["article_id"],
                TITLE: "article " + frame["article_id"] + ", category " + frame["category_id"],
                "category": frame["category_id"],
                "publisher": frame["publisher_id"],
                "words": frame["words_count"],
                "created_ms": frame["created_at_ts"],
            }
        )

    def _hours(self) -> Iterator[tuple[str, pd.DataFrame]]:
        if self.folder.is_dir():
            for file in sorted(self.folder.glob("*.csv"))[: self.max_files or None]:
                yield file.name, pd.read_csv(file, dtype=str)
            return
        with tarfile.open(self.archive, "r|xz") as archive:  # one pass: members come in the archive's order
            count = 0
            for member in archive:
                if member.isfile() and member.name.endswith(".csv"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield Path(member.name).name, pd.read_csv(io.BytesIO(stream.read()), dtype=str)
                    count += 1
                    if count == self.max_files:
                        return

    def interactions(self) -> Iterator[Chunk]:
        first = 0
        for _, raw in self._hours():
            if raw.empty:
                continue
            rows = pd.DataFrame(
                {
                    USER: raw["user_id"],
                    ITEM: raw["click_article_id"],
                    TIME: parse_time_ms(raw["click_timestamp"], "ms"),
                    EVENT: "click",
                    **{name: raw[column] for name, column in CONTEXT.items()},
                    SOURCE_ROW: np.arange(first, first + len(raw)),
                }
            )
            first += len(raw)
            ordered = rows.assign(session=raw["session_id"]).sort_values(["session", TIME, SOURCE_ROW])
            rows[WEIGHT] = (ordered.groupby("session")[TIME].shift(-1) - ordered[TIME]) / 1000.0
            yield Chunk(rows)
