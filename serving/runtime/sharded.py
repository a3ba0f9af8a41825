"""Retrieval over shards: the user's state once, every shard's best items, merged as one graph would have ranked them.

Items are dealt to the shards one by one, by falling popularity, so that a shard that is away costs every part of the
catalogue alike. A shard scores all its items and answers its best N; the best N of those are the best N of all, and
equal scores are ordered by id, as in the exact graph. Axis legend: B rows, D width, N candidates, M rising items, S
seen items, K seen items that lie in one shard, E encoded events.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from serving.runtime.encoded import EXCLUDED, Encoder, Popular, rising_of, with_rising, without_history
from vivace.contract import FIRST_ID, PADDING_ID, StageTensors
from vivace.onnx_session import open_session
from vivace.shard_contract import shard_model

LEAST_SEEN = 16  # rows of seen items are padded to this or one of its multiples by 4: equal shapes are batched together
Answer = tuple[np.ndarray, np.ndarray]
"""Of one shard: ids int64 [B, <= N] and scores float32 [B, <= N], best first."""


class Shards(Protocol):
    """Whoever asks all shards."""

    def __call__(self, state_BD: np.ndarray, seen: Sequence[np.ndarray]) -> tuple[list[Answer | None], str]:
        """(each shard's answer, None of one that gave none; which are missing and why, "" where all answered) to states
        and, for each shard, its rows int64 [B, K] that may not be answered."""


class LocalShards:
    """All shards in this process: what the servers answer, without any. ``graphs``: of each shard."""

    def __init__(self, graphs: Sequence[Path], threads: int = 1) -> None:
        self._graphs = [open_session(graph, threads) for graph in graphs]

    def __call__(self, state_BD: np.ndarray, seen: Sequence[np.ndarray]) -> tuple[list[Answer | None], str]:
        names = [i.name for i in self._graphs[0].get_inputs()]
        answers = [graph.run(None, dict(zip(names, (state_BD, rows), strict=True)))
                   for graph, rows in zip(self._graphs, seen, strict=True)]  # fmt: skip
        return [(ids, scores) for ids, scores in answers], ""


def local_shards(repository: Path, version: str, shapes: StageTensors, threads: int = 1) -> LocalShards:
    """Those of a published version."""
    graphs = [repository / shard_model(i) / version / "model.onnx" for i in range(shapes.shards)]
    return LocalShards(graphs, threads)


def rows_of_shards(seen_BS: np.ndarray, shards: int) -> list[np.ndarray]:
    """For each shard its rows int64 [B, K] of the seen ids, 0 where there are fewer."""
    real_BS = seen_BS >= FIRST_ID
    place_BS = np.where(real_BS, seen_BS - FIRST_ID, 0)
    of_shard_BS, row_BS = place_BS % shards, place_BS // shards + 1
    out = []
    for shard in range(shards):
        mine_BS = real_BS & (of_shard_BS == shard)
        count_B = mine_BS.sum(1)
        width = LEAST_SEEN
        while width < count_B.max(initial=0):
            width *= 4
        rows_BK = np.zeros((len(seen_BS), width), np.int64)
        rows_BK[np.arange(width) < count_B[:, None]] = row_BS[mine_BS]  # both row by row
        out.append(rows_BK)
    return out


def merged(answers: Sequence[Answer | None], rows: int, count: int) -> Answer:
    """The ``count`` best of all shards, best first and of equal scores the lower id first; PADDING_ID and EXCLUDED
    where there are fewer."""
    ids = np.full((rows, count), PADDING_ID, np.int64)
    scores = np.full((rows, count), EXCLUDED, np.float32)
    there = [a for a in answers if a is not None]
    if there:
        all_ids, all_scores = (np.concatenate(parts, 1) for parts in zip(*there, strict=True))
        order = np.lexsort((all_ids, -all_scores), axis=1)[:, :count]
        n = order.shape[1]
        ids[:, :n], scores[:, :n] = (np.take_along_axis(x, order, 1) for x in (all_ids, all_scores))
    return ids, scores


class ShardedRetrieval:
    """The retrieval stage as a function over ``shards``. Files of ``folder``: ENCODER, and POPULAR, which answers a
    history without a known item, and any where no shard answers."""

    def __init__(self, folder: Path, shapes: StageTensors, shards: Shards, threads: int = 1) -> None:
        self.encoder, self.popular = Encoder(folder, shapes, threads, whole=True), Popular(folder)
        self.shapes, self.shards = shapes, shards

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
        """(candidate ids int64 [B, M + N], scores float32 [B, M + N], encoded history float32 [B, E, D]; for each row
        which shards it does without and why, "" where none) of what ``contract.retrieval_inputs`` names, the M rising
        items, which need no shard, before the N best others."""
        history_BT, seen_BS, *_ = inputs
        state_BD, encoded, of_rising = self.encoder(inputs)
        rising_BM = rising_of(self.shapes, inputs)
        left_out = np.concatenate([seen_BS, rising_BM], 1)
        cold = without_history(history_BT)
        warm = np.setdiff1d(np.arange(len(history_BT)), cold)
        ids, scores = merged([], len(history_BT), self.shapes.candidates)
        reasons = [""] * len(history_BT)
        if len(warm):
            answers, missing = self.shards(state_BD[warm], rows_of_shards(left_out[warm], self.shapes.shards))
            ids[warm], scores[warm] = merged(answers, len(warm), self.shapes.candidates)
            for i in warm if missing else ():
                reasons[i] = missing
            if not any(a is not None for a in answers):
                cold = np.arange(len(history_BT))
        self.popular.fill(cold, left_out, ids, scores)
        if self.shapes.rising:
            of_rising[cold] = self.popular.of(rising_BM[cold])
        return [*with_rising(rising_BM, of_rising, seen_BS, ids, scores), encoded], reasons
