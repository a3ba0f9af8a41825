"""What a run's own models recommend beside a query: the search ranker learns and is judged with it.

Axis legend: B requests, N candidates with the rising items among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from preprocessing.features import Features
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.data.live import LiveAt
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import Preset, shapes
from vivace import contract


class Recommender:
    """The models as they are served; live counters say what they said at the moment of a request."""

    def __init__(self, features: Features, preset: Preset, root: Path) -> None:
        self.features, self.window = features, preset.encoder.window
        self.shapes = s = shapes(preset, features)
        retriever = load_retrieval(features, preset, root).cpu()
        self.retrieval = RetrievalGraph(retriever, s.candidates, preset.ranker.memory, rising=s.rising).eval()
        self.ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()

    def __call__(self, request: batches.Requests) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [B, N], best first, and their scores float32 [B, N]."""
        inputs = [torch.from_numpy(x) for x in request.inputs(self.shapes, self.features.schema.exclude_seen)]
        given = inputs[: len(contract.retrieval_inputs(self.shapes))]
        with torch.inference_mode():
            ids, values = self.ranking(inputs[0], *self.retrieval(*given), *inputs[self.shapes.passed_on :])
        return ids.numpy(), values.numpy()[:, 0]

    def requests_before(
        self, users: Sequence[str], times: Sequence[int], batch_size: int
    ) -> Iterator[batches.Requests]:
        """What ``users`` would have asked at ``times``, Unix ms, by their training events before those."""
        histories = histories_before(self.features, users, times)
        live = None
        if self.shapes.rising:
            items = [history[:, 0] for history in histories]
            live = LiveAt.of_histories(self.features, np.asarray(times, np.int64), items, self.shapes)
        for start in range(0, len(histories), batch_size):
            part = histories[start : start + batch_size]
            no_target_B = torch.zeros(len(part), dtype=torch.int64)
            request = batches.of_sequences(part, self.window, no_target_B, {}, start)
            yield request if live is None else live.of(request)


def histories_before(features: Features, users: Sequence[str], times: Sequence[int]) -> list[np.ndarray]:
    """Of each user the training events before a time: ids and times int64 [n, 2]."""
    known, history_of = set(users), dict[str, np.ndarray]()
    for file in features.files("train"):
        frame = pd.read_parquet(file, columns=[contract.USER, contract.ITEM, contract.TIME])
        for user, items, when in frame[frame[contract.USER].isin(known)].itertuples(index=False):
            history_of[user] = np.stack([np.asarray(items), np.asarray(when)], 1).astype(np.int64)
    none = np.empty((0, 2), np.int64)
    histories = (history_of.get(user, none) for user in users)
    return [h[h[:, 1] < time] for h, time in zip(histories, times, strict=True)]
