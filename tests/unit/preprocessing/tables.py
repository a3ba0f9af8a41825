"""A small shop as tables, and what the general reader makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.cleaning import clean_interactions, clean_items
from preprocessing.readers.tables import Tables
from preprocessing.rejects import Rejects
from vivace import contract

HEAD = '[interactions]\nfiles = "{events}"\nuser = "user"\nitem = "item"\ntime = "ts"\n'
ITEMS = '[items]\nfiles = "{items}"\nitem = "item"\ntitle = "title"\ncategorical = ["cat"]\ncontinuous = ["price"]\n'
CATALOGUE = "item,title,cat,price\nA,Thing A,y,1.5\nB,Thing B,x,2.5\nC,Thing C,y,3.5\nD,Thing D,x,4.5\n"


@dataclass
class Read:
    """What one data set came out as."""

    events: pd.DataFrame
    items: pd.DataFrame | None
    rejects: Rejects

    def column(self, name: str) -> list:
        return self.events[name].astype(object).where(self.events[name].notna(), None).tolist()

    def rejected(self) -> dict[str, int]:
        return self.rejects.summary()

    def records(self) -> list[dict]:
        return pd.read_csv(self.rejects.path, keep_default_na=False).to_dict("records")


def write(folder: Path, name: str, content: str | bytes | pa.Table) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(
    folder: Path,
    events: str | bytes | pa.Table,
    items: str | bytes | pa.Table | None = None,
    keys: str = "",
    item_keys: str = "",
    top: str = "",
    rest: str = "",
) -> Read:
    """Reads tables written to ``folder``; ``keys`` are added to [interactions], ``item_keys`` to [items], ``top``
    above and ``rest`` below."""
    names = ["e.parquet" if isinstance(events, pa.Table) else "e.csv"]
    write(folder, names[0], events)
    mapping = top + "\n" + HEAD.format(events=names[0]) + keys + "\n"
    if items is not None:
        names.append("i.parquet" if isinstance(items, pa.Table) else "i.csv")
        write(folder, names[1], items)
        mapping += (item_keys or ITEMS).format(items=names[1])
    write(folder, "mapping.toml", mapping + rest)
    return taken(folder / "mapping.toml")


def taken(mapping: Path) -> Read:
    """Everything of a mapping's tables, checked."""
    source = Tables(mapping)
    rejects = Rejects(mapping.parent / "features" / "rejects.csv")
    chunks = source.items()
    catalogue = None if chunks is None else clean_items(chunks, source.schema, rejects)
    known = None if catalogue is None else pd.Index(catalogue[contract.ITEM])
    parts = [clean_interactions(chunk, source.schema, known, rejects) for chunk in source.interactions()]
    return Read(pd.concat([p for p in parts if len(p)], ignore_index=True) if any(map(len, parts)) else parts[0],
                catalogue, rejects)  # fmt: skip
