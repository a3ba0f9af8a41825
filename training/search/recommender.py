"""What a run's own models recommend beside a query: the search ranker learns and is judged with it.

Axis legend: B requests, N candidates with the rising items among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from preprocessing.features import Features
from search.hybrid import NOWHERE, top
from serving.runtime.encoded import without_history
from serving.runtime.moment import Moment
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.data.columns import TIMED, EventColumns
from training.data.live import LiveAt
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import Preset, shapes
from vivace import contract
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Recommended:
    """Ids int64 [B, N], best first, and scores float32 [B, N] of what is recommended beside B queries; the same of
    someone unknown who asks at the same moments."""

    ids: np.ndarray
    scores: np.ndarray
    ids_of_nobody: np.ndarray
    scores_of_nobody: np.ndarray

    def take(self, keep_B: np.ndarray) -> Recommended:
        """Those of the rows that are True in ``keep_B``."""
        return Recommended(*(getattr(self, f.name)[keep_B] for f in fields(self)))

    @classmethod
    def together(cls, parts: Sequence[Recommended]) -> Recommended:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Recommender:
    """The models as they are served; live counters say what they said at the moment of a request."""

    def __init__(self, features: Features, preset: Preset, root: Path) -> None:
        self.features, self.window = features, preset.encoder.window
        self._store = Run(root, features.folder).feature_store
        self.shapes = s = shapes(preset, features)
        retriever = load_retrieval(features, preset, root).cpu()
        self.retrieval = RetrievalGraph(retriever, s.candidates, preset.ranker.memory, rising=s.rising).eval()
        self.ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()
        self._popularity_V = torch.log1p(retriever.popularity.float()).numpy()

    def __call__(self, request: batches.Requests) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [B, N], best first, and their scores float32 [B, N]."""
        inputs = [torch.from_numpy(x) for x in request.inputs(self.shapes, self.features.schema.exclude_seen)]
        given = inputs[: len(contract.retrieval_inputs(self.shapes))]
        with torch.inference_mode():
            ids, values = self.ranking(inputs[0], *self.retrieval(*given), *inputs[self.shapes.passed_on :])
        ids_BN = ids.numpy()
        for row in without_history(inputs[0].numpy()):
            rising = NO_IDS if request.rising_BM is None else request.rising_BM[row].numpy()
            ids_BN[row] = self._popular(ids_BN[row], inputs[1][row].numpy(), rising)
        return ids_BN, values.numpy()[:, 0]

    def _popular(self, ids_N: np.ndarray, taken_V: np.ndarray, rising: np.ndarray) -> np.ndarray:
        """What someone without a history is recommended, ids int64 [N], equally popular items by id, as ONNX Runtime
        gives them: of equal values ``torch.topk`` takes any. ``ids_N``: the same with any of them."""
        first = ids_N[np.isin(ids_N, rising) & (ids_N != contract.PADDING_ID)]
        others_V = np.where(taken_V, NOWHERE, self._popularity_V)
        others_V[first] = NOWHERE
        out_N = np.full_like(ids_N, contract.PADDING_ID)
        popular = np.concatenate([first, top(others_V, self.shapes.candidates)])
        out_N[: len(popular)] = popular
        return out_N

    def beside(self, request: batches.Requests, nobody: batches.Requests) -> Recommended:
        """What is recommended beside the queries of ``request``, and beside the same of someone unknown, ``nobody``."""
        if nobody.rising_BM is not None:
            return Recommended(*self(request), *self(nobody))
        of_one = self(nobody.take(np.zeros(1, np.int64)))  # without live counters all of those are alike
        return Recommended(*self(request), *(np.broadcast_to(x, (len(nobody.histories), x.shape[1])) for x in of_one))

    def requests_before(
        self, users: Sequence[str], times: Sequence[int], batch_size: int
    ) -> Iterator[tuple[batches.Requests, batches.Requests]]:
        """What ``users`` would have asked at ``times``, Unix ms, by their training events before those, with the
        context that a server knows of a request that sends none; beside it the same of someone unknown."""
        s, columns = self.shapes, replace(TIMED, types=bool(self.shapes.types))
        histories = histories_before(self.features, users, times, columns)
        context_BC, amount_BF = self._context(users, times)
        live = of_nobody = None
        if s.rising:
            moments, items = np.asarray(times, np.int64), [history[:, 0] for history in histories]
            live = LiveAt.of_histories(self.features, moments, items, s, context_BC)
            of_nobody = LiveAt.of_histories(self.features, moments, [NO_IDS] * len(items), s)
        for start in range(0, len(histories), batch_size):
            part = slice(start, start + batch_size)
            of_part = tuple(None if x is None else torch.from_numpy(x[part]) for x in (context_BC, amount_BF))
            no_target_B = torch.zeros(len(histories[part]), dtype=torch.int64)
            request = batches.of_sequences(
                histories[part], self.window, no_target_B, {}, start, None, columns, (of_part[0], of_part[1])
            )
            nobody = without_user(request)
            if live is not None and of_nobody is not None:
                request, nobody = live.of(request), of_nobody.of(nobody)
            yield request, nobody

    def _context(self, users: Sequence[str], times: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Ids int64 [B, C] and amounts float32 [B, F] of requests that send no context, by the code that serves: what
        the feature store knows of the user, and the clock; None for what is not read."""
        s, columns = self.shapes, self.features.context
        if not (s.context or s.amounts or s.counted):
            return None, None
        with contextlib.closing(LmdbStore(self._store, readonly=True)) as store:
            moment = Moment(self.features.folder, s, store)
            values = [v for u, ms in zip(users, times, strict=True) for v in moment.known([u], [{}], int(ms))]
        encoded = moment.encoded(values)
        return encoded[0] if columns.categoricals else None, encoded[-1] if columns.continuous else None


def without_user(request: batches.Requests) -> batches.Requests:
    """The same moments of someone of whom nothing is known: no history, no context. What is rising for them is another
    matter: see ``LiveAt``."""
    none_BT = torch.full_like(request.history_BT, contract.PADDING_ID)
    return replace(
        request, histories=[h[:0] for h in request.histories], history_BT=none_BT, time_BT=torch.zeros_like(none_BT),
        type_BT=None, context_BC=None, amount_BF=None,
    )  # fmt: skip


def _training_events(features: Features, users: Iterable[str], columns: EventColumns) -> dict[str, np.ndarray]:
    """``columns`` of the training events of those of ``users`` who have some, int64 [n, W]."""
    known, events_of = set(users), dict[str, np.ndarray]()
    for file in features.files("train"):
        frame = pd.read_parquet(file, columns=[contract.USER, *columns.names])
        for user, *values in frame[frame[contract.USER].isin(known)].itertuples(index=False):
            named = zip(columns.names, map(np.asarray, values), strict=True)
            events_of[user] = columns.packed(dict(named))
    return events_of


def histories_before(
    features: Features, users: Sequence[str], times: Sequence[int], columns: EventColumns
) -> list[np.ndarray]:
    """Of each user the training events before a time: ``columns`` of them, int64 [n, W]."""
    events_of, none = _training_events(features, users, columns), np.empty((0, columns.width), np.int64)
    histories = (events_of.get(user, none) for user in users)
    return [h[h[:, 1] < time] for h, time in zip(histories, times, strict=True)]


def in_hindsight(
    features: Features, users: Sequence[str], times: Sequence[int], clicked: Sequence[Sequence[int]]
) -> np.ndarray:
    """bool [requests]: whether an item that was ``clicked`` is a training event of the user from the request's time on.
    What is recommended to them then knows the answer, as it never does in a request."""
    events_of = _training_events(features, users, TIMED)
    out = np.zeros(len(users), bool)
    for i, (user, time, items) in enumerate(zip(users, times, clicked, strict=True)):
        if user in events_of:
            ids, when = events_of[user].T
            out[i] = np.isin(ids[when >= time], list(items)).any()
    return out
