"""The stages of the ensemble as functions of arrays in one process, and what they leave out when the load is too high.

The profile ``fused`` serves them as one model: no tensor passes from process to process, and a stage can be skipped.
Without Triton it is what load tests and the tuner compare the server with. Axis legend: B rows, T history events,
V item ids, N candidates, M encoded events, D width, C values of a candidate (its score, then a probability a head).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.runtime.by_length import chunks, together
from serving.runtime.stages import FeatureTransform, ResponseStage, Row
from vivace import contract
from vivace.onnx_session import open_session, session_options
from vivace.store.interface import FeatureStore

if TYPE_CHECKING:
    from search.online import Wish

FEWER = 4  # under load, one in so many of the candidates is ranked


class Level(IntEnum):
    """Steps of degradation, each cheaper than the one before."""

    FULL = 0
    FEWER = 1
    RETRIEVED = 2
    POPULAR = 3

    def status(self, ranked: int, candidates: int) -> str:
        """What STATUS says of it; "" for FULL."""
        said = {
            Level.FEWER: f"load: {ranked} of {candidates} candidates ranked",
            Level.RETRIEVED: "load: retrieval order, not ranked",
            Level.POPULAR: "load: popular items",
        }
        return said.get(self, "")


def joined(status: str, reason: str) -> str:
    """``status`` of a row with one more reason to be degraded; an error stays as it is."""
    if not reason or status.startswith(contract.STATUS_ERROR):
        return status
    return f"{contract.STATUS_DEGRADED}{reason}" if status == contract.STATUS_OK else f"{status}; {reason}"


class Overload:
    """Which level to serve at, from the size of the batches that an instance is handed: they are what came while the
    one before was worked on; and from how long batches took.

    ``patience_s`` of nothing but batches of ``rows`` and more is one step down. ``calm_s`` without any is a step up, if
    what came in that time would leave the level above some of the instance's time (``BUSY``). Against that estimate
    a step up is tried after a longer calm, which doubles up to ``longest_s`` with each that does not last. ``rows`` 0:
    always whole.
    """

    BUSY = 0.7

    def __init__(self, rows: int, patience_s: float = 0.1, calm_s: float = 0.5, longest_s: float = 30.0) -> None:
        self.on, self.rows = rows > 0, rows or sys.maxsize
        self.patience_s, self.first_calm_s, self.longest_s = patience_s, calm_s, longest_s
        self.level, self.calm_s = Level.FULL, calm_s
        self.row_s: dict[Level, float] = {}
        self.spread_s: dict[Level, float] = {}
        self._full_since: float | None = None
        self._calm_since: float | None = None
        self._came = 0
        self._raised_at = float("-inf")

    def done(self, level: Level, rows: int, seconds: float) -> None:
        """A batch of ``rows`` took ``seconds``. Small ones are left out: they cost more a row."""
        if rows >= min(self.rows, 8):
            row_s = seconds / rows
            mean_s = self.row_s.get(level, row_s)
            self.spread_s[level] = 0.75 * self.spread_s.get(level, 0.0) + 0.25 * abs(row_s - mean_s)
            self.row_s[level] = 0.8 * mean_s + 0.2 * row_s

    def needs(self, level: Level, rows: int) -> float:
        """Seconds that a batch takes by the mean; 0 if none was seen."""
        return self.row_s.get(level, 0.0) * rows

    def at_worst(self, level: Level, rows: int) -> float:
        """Seconds that few batches exceed: the mean and twice the mean deviation; 0 if none was seen."""
        return (self.row_s.get(level, 0.0) + 2 * self.spread_s.get(level, 0.0)) * rows

    def fitting(self, level: Level, rows: int, left_s: float) -> Level:
        """``level``, or the first below it at which few batches take longer than ``left_s``."""
        return next(
            (Level(n) for n in range(level, Level.POPULAR) if self.at_worst(Level(n), rows) <= left_s), Level.POPULAR
        )

    def __call__(self, rows: int, now: float) -> Level:
        """The level for a batch of ``rows`` that came at ``now`` (seconds of a clock that does not go back)."""
        if rows >= self.rows:
            self._calm_since = None
            if self._full_since is None:
                self._full_since = now
            if now - self._full_since >= self.patience_s and self.level < Level.POPULAR:
                lasted = now - self._raised_at
                self.calm_s = min(2 * self.calm_s, self.longest_s) if lasted < self.calm_s else self.first_calm_s
                self.level, self._full_since = Level(self.level + 1), now
            return self.level
        self._full_since = None
        if self._calm_since is None:
            self._calm_since, self._came = now, 0
        self._came += rows
        if self.level > Level.FULL:
            above, calm = Level(self.level - 1), now - self._calm_since
            fits = 0 < self.needs(above, self._came) <= self.BUSY * calm
            if calm >= (self.first_calm_s if fits else self.calm_s):
                self.level, self._calm_since, self._came, self._raised_at = above, now, 0, now
        return self.level


class Pipeline:
    """Transform, retrieval, ranking and response of a version of a compiled repository.

    Args:
        repository: folder of the models.
        version: folder name of the version, the same in every stage.
        store: where histories live when the request carries none.
        threads: of each graph.
        ranked: candidates that are ranked and answered, the retriever's first, or as many as are asked for (0: all).
        whole: histories are read padded to their full length, as the graphs of the ensemble read them. The answers are
            the same but for rounding.
    """

    def __init__(
        self,
        repository: Path,
        version: str,
        shapes: contract.StageTensors,
        store: FeatureStore,
        exclude_seen: bool = True,
        threads: int = 1,
        ranked: int = 0,
        whole: bool = False,
    ) -> None:
        at = lambda stage: repository / stage / version  # noqa: E731
        self.shapes, self.whole = shapes, whole
        self.ranked = min(ranked or shapes.candidates, shapes.candidates)
        self.transform = FeatureTransform(
            at(contract.FEATURE_TRANSFORM) / "transform.onnx", store, shapes, exclude_seen
        )
        # threads that wait by spinning take the cores of the other instances: 18 ms CPU a request
        options = session_options(threads, spinning=threads == 1)
        self._index = None
        if shapes.indexed:
            from serving.runtime.item_index import IndexedRetrieval  # FAISS, which an exact search does without

            self._index = IndexedRetrieval(at(contract.RETRIEVAL), shapes, threads)
        else:
            self._retrieval = open_session(at(contract.RETRIEVAL) / "model.onnx", options=options)
        self.search, self.search_ranking = None, None
        if shapes.search:
            from search.online import QuerySearch, SearchRanking  # its libraries, which a run without does without

            self.search = QuerySearch(at(contract.QUERY_SEARCH), shapes.candidates)
            self.search_ranking = SearchRanking(at(contract.RESPONSE))
        self._ranking = open_session(at(contract.RANKING) / "model.onnx", options=options)
        self.respond = ResponseStage.from_file(at(contract.RESPONSE) / "items.json")
        self.heads = int(self._ranking.get_outputs()[1].shape[1]) - 1
        self._retrieval_names = [t.name for t in contract.retrieval_inputs(shapes)]
        self._ranking_names = [t.name for t in contract.ranking_inputs(shapes)]
        inputs, _ = self.transform([Row("", None, 1)])
        self._popular_N, self._popularity_N = (found[0] for found in self.retrieve(inputs)[:2])

    @classmethod
    def published(
        cls, root: Path, store: FeatureStore, threads: int = 1, history: int = 0, ranked: int = 0, whole: bool = False
    ) -> Pipeline:
        """That of the version that ``artifacts/<name>`` published last. ``history``: newest events that are read (0:
        as many as were trained)."""
        version = str(json.loads((root / "compiled" / "manifest.json").read_text())["results"]["version"])
        repository = root / "model_repository"
        card = json.loads((repository / contract.ENSEMBLE / version / "model_card.json").read_text())
        seen = contract.DataSchema.load(root / "compiled" / "schema.json").exclude_seen
        shapes = contract.StageTensors(**card["shapes"]).reading(history)
        return cls(repository, version, shapes, store, seen, threads, ranked, whole)

    def retrieve(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Candidate ids int64 [B, N] and scores float32 [B, N], encoded history float32 [B, M, D]."""
        if self._index is not None:
            return self._index(inputs)
        history_BT, exclude_BV, *times = inputs
        parts = []
        for places, t in chunks(history_BT, self.whole):
            own = [history_BT[places, -t:], exclude_BV[places], *(v[places, -t:] for v in times)]
            parts.append((places, self._retrieval.run(None, dict(zip(self._retrieval_names, own, strict=True)))))
        return together(parts, len(history_BT), self.shapes.memory or history_BT.shape[1])

    def rank(self, history_BT: np.ndarray, found: Sequence[np.ndarray], few: int) -> list[np.ndarray]:
        """Ids int64 [B, N], best first, and their values float32 [B, C, N]: of the retriever's first ``few``."""
        ids, scores, encoded = found
        if few < ids.shape[1]:
            ids, scores = np.ascontiguousarray(ids[:, :few]), np.ascontiguousarray(scores[:, :few])
        parts = []
        for places, t in chunks(history_BT, self.whole):
            own = (history_BT[places, -t:], ids[places], scores[places], encoded[places, -t:])
            parts.append((places, self._ranking.run(None, dict(zip(self._ranking_names, own, strict=True)))))
        return together(parts, len(history_BT))

    def unranked(self, ids_BN: np.ndarray, scores_BN: np.ndarray) -> list[np.ndarray]:
        """The same for candidates in the order they have: their scores, and no probabilities (0)."""
        values = np.zeros((len(ids_BN), 1 + self.heads, ids_BN.shape[1]), np.float32)
        values[:, 0] = scores_BN
        return [ids_BN, values]

    def popular(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Popular items that the rows may be answered, as ``rank`` gives them; by no model."""
        if self.shapes.indexed:
            taken_BN = (inputs[1][:, :, None] == self._popular_N).any(1)
        else:
            taken_BN = inputs[1][:, self._popular_N]
        order_BN = np.argsort(taken_BN, axis=1, kind="stable")  # free ones first, in their order
        ids = np.where(np.take_along_axis(taken_BN, order_BN, 1), contract.PADDING_ID, self._popular_N[order_BN])
        return self.unranked(ids, self._popularity_N[order_BN])

    def few(self, top_k: int, level: Level = Level.FULL) -> int:
        """How many candidates are ranked when up to ``top_k`` are asked for."""
        share = self.ranked // FEWER if level == Level.FEWER else self.ranked
        return min(self.shapes.candidates, max(share, top_k))

    def warm(self, rows: int) -> Iterator[tuple[Level, float]]:
        """Answers ``rows`` at once at each level, as long histories as are read: (level, seconds it took). What memory
        the largest batch needs is then there before the first request."""
        names = self.respond.names[contract.FIRST_ID :][: self.shapes.history]
        batch = [Row("", [n.decode() for n in names], 1)] * rows
        for level in reversed(Level):
            began = time.perf_counter()
            (ids, values), _, status = self(batch, level)
            self.respond(ids, values, np.ones(rows, np.int64), [s.encode() for s in status])
            yield level, time.perf_counter() - began

    def searched(
        self,
        queries: Sequence[str],
        wishes: Sequence[Wish | None],
        histories_BT: np.ndarray,
        ranked: tuple[np.ndarray, np.ndarray],
    ) -> tuple[list[np.ndarray], list[str]]:
        """What was ``ranked``, with the rows that have a query answered by what it found; UNDERSTOOD of each row."""
        if self.search is None or self.search_ranking is None:
            return list(ranked), [""] * len(queries)
        found = self.search(queries, wishes, list(histories_BT))
        return list(self.search_ranking.rows(found, *ranked, wishes)), [said for _, _, said in found]

    def __call__(
        self, rows: Sequence[Row], level: Level = Level.FULL
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
        """(ids [B, N] and values [B, C, N]; inputs of retrieval; status of each row) without deadlines."""
        inputs, status = self.transform(rows)
        if level == Level.POPULAR:
            return self.popular(inputs), list(inputs), status
        found = self.retrieve(inputs)
        if level == Level.RETRIEVED:
            return self.unranked(*found[:2]), list(inputs), status
        return self.rank(inputs[0], found, self.few(max(r.top_k for r in rows), level)), list(inputs), status
