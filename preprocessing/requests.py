"""Recorded requests: held-out histories of real users, as raw ids, for load tests, parity and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vivace import contract
from vivace.run import Run

if TYPE_CHECKING:  # NVTabular, which a load test does without
    from preprocessing.features import Features

OUT_OF_VOCABULARY = "(out of vocabulary)"


def record(features: Features, path: Path, limit: int, seed: int, part: str = "test") -> int:
    """Writes ``limit`` random requests of a part of the split: USER, HISTORY (raw ids before the held-out event) and
    the target item. Load tests and parity replay those of "test"; what is chosen by quality is chosen on those of
    "valid"."""
    names = np.array([""] * contract.OOV_ID + [OUT_OF_VOCABULARY, *features.items()[contract.ITEM]], object)
    names[contract.NULL_ID] = OUT_OF_VOCABULARY
    table = pa.concat_tables(
        pq.read_table(f, columns=[contract.USER, contract.ITEM, contract.TARGET]).combine_chunks()
        for f in features.files(part)
    )
    chosen = np.random.default_rng(seed).permutation(len(table))[:limit]
    frame = table.take(pa.array(chosen)).to_pandas()
    out = pd.DataFrame(
        {
            contract.USER: frame[contract.USER],
            contract.ITEM: [names[h].tolist() for h in frame[contract.ITEM]],
            contract.TARGET: [names[t] for t in frame[contract.TARGET]],
        }
    )
    out.to_parquet(path, index=False)
    return len(out)


def recorded(root: Path, part: str = "test") -> pd.DataFrame:
    """Recorded requests of ``artifacts/<name>``: columns USER, ITEM (list of raw ids) and TARGET."""
    path = Run(root).requests_file(part)
    if not path.exists():
        raise FileNotFoundError(
            f"recorded requests of the part {part!r}: none at {path}; run 'vivace compile --name {root.name}' first"
        )
    return pd.read_parquet(path)


def replay(root: Path, seed: int) -> Iterator[tuple[str, list[bytes]]]:
    """Endless (user, history) pairs in a seeded random order."""
    frame = recorded(root)
    users = frame[contract.USER].tolist()
    histories = [[i.encode() for i in h] for h in frame[contract.ITEM]]
    rng = np.random.default_rng(seed)
    while True:
        for i in rng.permutation(len(frame)):
            yield users[i], histories[i]
