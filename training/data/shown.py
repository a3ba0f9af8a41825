"""What was shown and clicked, as requests that teach the ranker: of each click the items beside it are what was not
clicked, and its weight undoes the chance that its place was looked at, and that the item was put there.

Weights: Joachims et al. 2017, "Unbiased learning-to-rank with biased feedback". A request is as it was: the user's
events strictly before it, its context by the workflow that serves.
Axis legend: R clicks, B of a batch, K places, T history events.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from preprocessing.events import user_hash
from preprocessing.features import Features
from preprocessing.sequences import WHOLE, typed
from search.propensity import inverse_propensity
from serving.runtime.moment import Moment, Values
from training.data import batches
from training.data.columns import EventColumns
from vivace.columns import CLICKED, EVENT, ITEM, POSITION, TARGET_TIME, TIME, USER, label_column
from vivace.context import TYPES_GRAPH
from vivace.contract import FIRST_ID, PADDING_ID, TRIAL, StageTensors
from vivace.impressions.files import CONTEXT, QUERY, REQUEST_ID, VARIANT
from vivace.impressions.joined import PROPENSITY
from vivace.onnx_session import open_session
from vivace.store.interface import FeatureStore
from vivace.windows import Window

MOST_WEIGHT = 20.0  # of a click, before the weights' mean is made 1
# why requests are left out
ANONYMOUS, SEARCHES, UNKNOWN, NO_HISTORY = "of nobody known", "searches", "with unknown items", "without a history"
LATER, JUDGED = "later than the features", "at or after an event that the test judges"
LEARNED = "before an event that the retriever has learned"  # its score of what was clicked then is hindsight


@dataclass(frozen=True)
class ShownLog:
    """A file of ``vivace experiment impressions``. ``examined``: how often each place is looked at beside the first,
    float64 [K] (``training.judge.clicks.places``), NaN where the log does not say: then as the place before.
    ``unseen``: requests whose answers by the version on trial nobody saw."""

    file: Path
    examined: np.ndarray
    unseen: frozenset[str] = frozenset()

    def rows(self, columns: list[str], chosen: pc.Expression) -> pd.DataFrame:
        """What was shown and seen, with the columns REQUEST_ID, ITEM, CLICKED and ``columns``."""
        columns = [REQUEST_ID, VARIANT, ITEM, CLICKED, *columns]
        rows = pq.read_table(self.file, columns=columns, filters=chosen).to_pandas()
        return rows[(rows[VARIANT] != TRIAL) | ~rows[REQUEST_ID].isin(list(self.unseen))]

    def looked_at(self, position: np.ndarray) -> np.ndarray:
        """Of positions from 1, float64 [R]. Places behind the last known one are as that one."""
        seen = pd.Series(self.examined).ffill().fillna(1.0).to_numpy(float)
        chances: np.ndarray = seen[np.minimum(position, len(seen)) - 1]
        return chances

    def key(self) -> str:
        """Of what is learned from it."""
        with self.file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        digest.update(np.nan_to_num(self.examined).astype(np.float32).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ShownClicks:
    """``requests``: one a click, its item the target. ``among_RK``: ids of what was shown with it and not clicked, and
    its own first, int64 [R, K], padded. ``weight_R``: float32, of mean 1. ``left_out``: requests by the reason."""

    requests: batches.Requests
    among_RK: Tensor
    weight_R: Tensor
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.weight_R)

    def take(self, rows: np.ndarray) -> ShownClicks:
        index = torch.from_numpy(rows)
        return ShownClicks(self.requests.take(rows), self.among_RK[index], self.weight_R[index], self.left_out)

    def batches(self, batch_size: int, seed: int) -> Iterator[ShownClicks]:
        """In an order set by ``seed``."""
        order = np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(order), batch_size):
            yield self.take(order[start : start + batch_size])


def shown_clicks(log: ShownLog, features: Features, shapes: StageTensors, store: FeatureStore) -> ShownClicks:
    """Clicks of known users on known items, of requests whose history the features have, that come after what the
    retriever has learned and before what the test judges. Raises ValueError where none is left, or the ranker reads
    live counters."""
    if shapes.rising:
        raise ValueError(
            f"--impressions: expected a ranker without live counters, got ranker.rising {shapes.rising}: what was "
            "rising when an answer was shown is not replayed; train with ranker.rising 0"
        )
    clicked = log.rows([USER, TIME, CONTEXT, QUERY, POSITION, PROPENSITY, EVENT], pc.field(CLICKED))
    clicked = clicked.drop_duplicates([REQUEST_ID, ITEM])
    rows = log.rows([], pc.is_in(pc.field(REQUEST_ID), pa.array(clicked[REQUEST_ID].unique(), pa.string())))
    ids = {item: number for number, item in enumerate(features.items()[ITEM], FIRST_ID)}
    rows = rows.assign(id=rows[ITEM].map(ids).fillna(PADDING_ID).astype("int64"))
    histories, left_out = Histories(features, set(clicked[USER])), Counter[str]()
    clicked = histories.known_before(clicked, left_out)
    known = clicked[ITEM].isin(ids)
    left_out[UNKNOWN] += int((~known).sum())
    clicked = clicked[known].reset_index(drop=True)
    if not len(clicked):
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "no click"
        raise ValueError(
            f"{log.file}: no click that the ranker may learn from ({why}); 'vivace refresh' puts live events among the "
            "features"
        )
    chance = log.looked_at(clicked[POSITION].to_numpy()) * clicked[PROPENSITY].to_numpy(float)
    weight = inverse_propensity(np.ones(len(chance), bool), np.arange(len(chance)), chance, MOST_WEIGHT)
    requests = _requests(clicked, ids, histories, features, shapes, store)
    among = torch.from_numpy(_among(clicked[REQUEST_ID], requests.target_B.numpy(), rows))
    return ShownClicks(requests, among, torch.from_numpy((weight / weight.mean()).astype(np.float32)), left_out)


class Histories:
    """Events of some users before a moment, as packed sequences; ``EventColumns`` of all features' files."""

    def __init__(self, features: Features, users: set[str]) -> None:
        files = features.files(WHOLE)
        self.all_columns = EventColumns.of_files(files)
        self.columns = EventColumns(True, self.all_columns.types)
        self.of: dict[str, np.ndarray] = {}
        self.newest_ms = 0
        for file in files:
            table = pq.read_table(file, columns=[USER, *self.columns.names])
            lists = {name: table[name].combine_chunks() for name in self.columns.names}
            flat = self.columns.packed({n: c.flatten().to_numpy(zero_copy_only=False) for n, c in lists.items()})
            self.newest_ms = max(self.newest_ms, int(flat[:, 1].max(initial=0)))
            offsets = lists[ITEM].offsets.to_numpy()
            for row, user in enumerate(table[USER].to_pylist()):
                if user in users:
                    self.of[user] = flat[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]]
        learned = [pq.read_table(f, columns=[USER, TIME]) for f in features.files("train")]
        ends = [(t[USER].to_pylist(), t[TIME].combine_chunks()) for t in learned]
        self.learned = pd.Series(
            {u: ms for users, times in ends for u, ms in zip(users, _last(times), strict=True)}, dtype="float64"
        )
        tests = [pq.read_table(f, columns=[USER, TARGET_TIME]).to_pandas() for f in features.files("test")]
        self.judged = pd.concat(tests).groupby(USER)[TARGET_TIME].min() if tests else pd.Series(dtype="int64")

    def known_before(self, clicked: pd.DataFrame, left_out: Counter[str]) -> pd.DataFrame:
        """Rows whose history is known and may be learned from; counts the requests that are left out."""
        first = pd.Series({user: events[0, 1] for user, events in self.of.items()}, dtype="float64")
        judged = clicked[USER].map(self.judged).fillna(np.inf)
        reasons = {
            ANONYMOUS: clicked[USER] == "",
            SEARCHES: clicked[QUERY] != "",
            JUDGED: clicked[TIME] >= judged,
            LATER: clicked[TIME] > self.newest_ms,
            LEARNED: clicked[TIME] < clicked[USER].map(self.learned),
            NO_HISTORY: ~(clicked[USER].map(first) < clicked[TIME]),
        }
        kept = pd.Series(True, clicked.index)
        for reason, out in reasons.items():
            left_out[reason] += int(clicked[REQUEST_ID][kept & out].nunique())
            kept &= ~out
        return clicked[kept]

    def before(self, user: str, moment_ms: int) -> np.ndarray:
        """Events strictly before, int64 [n, W]."""
        events = self.of[user]
        return events[: int(np.searchsorted(events[:, 1], moment_ms))]


def _last(lists: pa.ListArray) -> np.ndarray:
    """The last value of each list, which has one."""
    offsets = lists.offsets.to_numpy()
    last: np.ndarray = lists.values.to_numpy(zero_copy_only=False)[offsets[1:] - 1]
    return last


def _requests(
    clicked: pd.DataFrame, ids: dict[str, int], histories: Histories, features: Features, shapes: StageTensors,
    store: FeatureStore,
) -> batches.Requests:  # fmt: skip
    users, times = clicked[USER].tolist(), clicked[TIME].tolist()
    moment = Moment(features.folder, shapes, store)
    sent = [moment.sent(context) for context in clicked[CONTEXT]]
    known: list[Values] = [
        values for user, of, ms in zip(users, sent, times, strict=True) for values in moment.known([user], [of], ms)
    ]
    encoded = [torch.from_numpy(x) for x in moment.encoded(known)] if known else []
    context = encoded.pop(0) if shapes.context else None
    amounts = encoded.pop(0) if shapes.amounts else None
    schema = features.schema
    kinds = pd.DataFrame(index=clicked.index)
    if (graph := features.folder / TYPES_GRAPH).exists():
        kinds[EVENT] = open_session(graph).run(None, {EVENT: clicked[EVENT].fillna("").to_numpy(object)})[0]
    labelled = typed(kinds, features.files(WHOLE), schema)
    target, user = torch.tensor([ids[item] for item in clicked[ITEM]]), user_hash(np.array(users, object))
    labels = {h.name: torch.tensor(labelled[label_column(h.name)].to_numpy(np.float32)) for h in schema.heads}
    return batches.of_sequences(
        [histories.before(user, ms) for user, ms in zip(users, times, strict=True)],
        Window(shapes.history, shapes.slide),
        target, labels, 0, torch.from_numpy(user), histories.columns, (context, amounts),
    )  # fmt: skip


def _among(request: pd.Series, target: np.ndarray, shown: pd.DataFrame) -> np.ndarray:
    """``ShownClicks.among_RK`` of clicks: of the ``request`` and on the ``target``."""
    rest = shown[~shown[CLICKED] & (shown["id"] >= FIRST_ID)]
    of_request = {name: part.to_numpy() for name, part in rest.groupby(REQUEST_ID)["id"]}
    rows = [np.concatenate([[item], of_request.get(name, [])]) for name, item in zip(request, target, strict=True)]
    out = np.full((len(rows), max(map(len, rows))), PADDING_ID, np.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out
