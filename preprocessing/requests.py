"""Recorded requests: held-out histories of real users, as callers send them, for load tests, parity and evaluation.

Of event types and the context there is what the models read, so that a run that reads none is asked as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vivace import contract
from vivace.run import Run

if TYPE_CHECKING:  # NVTabular, which a load test does without
    from preprocessing.features import Features

OUT_OF_VOCABULARY = "(out of vocabulary)"
CONTEXT = "context"  # column of recorded requests


@dataclass(frozen=True)
class RecordedRequest:
    """One request: ``items`` oldest first with their ``types``, or none; ``context`` by column, ``target`` the item
    that the user took next."""

    user: str
    items: list[str]
    target: str
    types: list[str] | None = None
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[Any]:
        """As ``vivace.client`` takes it: ids, or pairs of id and type."""
        return self.items if self.types is None else list(zip(self.items, self.types, strict=True))


def words_of(features: Features, column: str, null: str | None) -> np.ndarray:
    """Raw values of a categorical column by id, object; ``null`` for none."""
    file = features.folder / "workflow" / "categories" / f"unique.{column}.parquet"
    known = pd.read_parquet(file, columns=[column])[column].tolist()
    return np.array([null, null, OUT_OF_VOCABULARY, *known], object)


def _contexts(features: Features, frame: pd.DataFrame) -> list[str]:
    """CONTEXT of each request, JSON: its categorical columns, null where the log had none."""
    columns = features.context.plain
    words = {name: words_of(features, name, None)[frame[contract.target_column(name)].to_numpy()] for name in columns}
    return [json.dumps({name: words[name][i] for name in columns}, ensure_ascii=False) for i in range(len(frame))]


def record(
    features: Features, path: Path, limit: int, seed: int, part: str = "test", types: bool = False,
    context: bool = False,
) -> int:  # fmt: skip
    """Writes ``limit`` random requests of a part of the split: USER, HISTORY (raw ids before the held-out event) and
    the target item; with ``types`` and ``context`` those too. Load tests and parity replay those of "test"; what is
    chosen by quality is chosen on those of "valid"."""
    names = np.array([""] * contract.OOV_ID + [OUT_OF_VOCABULARY, *features.items()[contract.ITEM]], object)
    names[contract.NULL_ID] = OUT_OF_VOCABULARY
    targets = [contract.target_column(name) for name in features.context.plain] if context else []
    columns = [contract.USER, contract.ITEM, contract.TARGET, *([contract.EVENT] if types else []), *targets]
    table = pa.concat_tables(pq.read_table(f, columns=columns).combine_chunks() for f in features.files(part))
    chosen = np.random.default_rng(seed).permutation(len(table))[:limit]
    frame = table.take(pa.array(chosen)).to_pandas()
    out = pd.DataFrame(
        {
            contract.USER: frame[contract.USER],
            contract.ITEM: [names[h].tolist() for h in frame[contract.ITEM]],
            contract.TARGET: [names[t] for t in frame[contract.TARGET]],
        }
    )
    if types:
        words = words_of(features, contract.EVENT, "")
        out[contract.EVENT] = [words[t].tolist() for t in frame[contract.EVENT]]
    if targets:
        out[CONTEXT] = _contexts(features, frame)
    out.to_parquet(path, index=False)
    return len(out)


def recorded(root: Path, part: str = "test") -> pd.DataFrame:
    """Recorded requests of ``artifacts/<name>``: columns USER, ITEM (list of raw ids) and TARGET; EVENT (list of types)
    and CONTEXT (JSON) where the models read them."""
    path = Run(root).requests_file(part)
    if not path.exists():
        raise FileNotFoundError(
            f"recorded requests of the part {part!r}: none at {path}; run 'vivace compile --name {root.name}' first"
        )
    return pd.read_parquet(path)


def requests_of(frame: pd.DataFrame) -> list[RecordedRequest]:
    """The rows of ``recorded``."""
    types = [list(t) for t in frame[contract.EVENT]] if contract.EVENT in frame else [None] * len(frame)
    contexts = frame[CONTEXT].map(json.loads).tolist() if CONTEXT in frame else [{}] * len(frame)
    rows = zip(frame[contract.USER], frame[contract.ITEM], frame[contract.TARGET], types, contexts, strict=True)
    return [RecordedRequest(user, list(items), target, kinds, sent) for user, items, target, kinds, sent in rows]


def replay(root: Path, seed: int) -> Iterator[RecordedRequest]:
    """The recorded requests, endlessly, in a seeded random order."""
    requests = requests_of(recorded(root))
    rng = np.random.default_rng(seed)
    while True:
        yield from (requests[i] for i in rng.permutation(len(requests)))
