"""The stages of the ensemble as functions of arrays in one process.

The profile ``fused`` serves them as one model: no tensor passes from process to process, and a stage can be skipped.
Without Triton it is what load tests and the tuner compare the server with. Axis legend: B rows, T history events,
V item ids, N candidates, M encoded events, D width, C values of a candidate (its score, then a probability a head).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.runtime.by_length import RANKING_RUN_EVENTS, chunks, retrieved, together
from serving.runtime.cache_settings import StateSettings
from serving.runtime.fresh import FreshRanking
from serving.runtime.grown import GrownRetrieval
from serving.runtime.known import Known
from serving.runtime.live_catalogue import LiveCatalogue
from serving.runtime.overload import Level
from serving.runtime.response import ResponseStage
from serving.runtime.sharded import ShardedRetrieval, local_shards
from serving.runtime.stages import NO_IDS, FeatureTransform, ItemVocabulary, Row
from vivace import contract
from vivace.onnx_session import open_session, session_options
from vivace.run import Run
from vivace.step_contract import ENCODER_STEP
from vivace.store.interface import ServingStore

if TYPE_CHECKING:
    from search.online import SearchOptions

log = logging.getLogger(__name__)
FEWER = 4  # under load, one in so many of the candidates is ranked


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
        states: memory for what was worked out of histories, which are then encoded from where they were left (None:
            each is encoded whole). The answers are the same but for rounding.
    """

    def __init__(
        self,
        repository: Path,
        version: str,
        shapes: contract.StageTensors,
        store: ServingStore,
        exclude_seen: bool = True,
        threads: int = 1,
        ranked: int = 0,
        whole: bool = False,
        states: StateSettings | None = None,
    ) -> None:
        at = lambda stage: repository / stage / version  # noqa: E731
        self.shapes, self.whole = shapes, whole
        self.ranked = min(ranked or shapes.proposed, shapes.proposed)
        catalogue, graph = None, at(contract.FEATURE_TRANSFORM) / "transform.onnx"
        if shapes.fresh:
            ids = ItemVocabulary(graph, lazy=True)
            catalogue = LiveCatalogue(store, at(contract.UPDATE_STORE), ids, shapes, ranks=True)
        self.transform = FeatureTransform(graph, store, shapes, exclude_seen, catalogue=catalogue)
        # threads that wait by spinning take the cores of the other instances: 18 ms CPU a request
        options = session_options(threads, spinning=threads == 1)
        self._index = self._sharded = self.grown = None
        if shapes.indexed:
            from serving.runtime.item_index import IndexedRetrieval  # FAISS, which an exact search does without

            self._index = IndexedRetrieval(at(contract.RETRIEVAL), shapes, threads)
        elif shapes.shards:  # all of them here: the answers are those of their servers
            shards = local_shards(repository, version, shapes, threads)
            self._sharded = ShardedRetrieval(at(contract.RETRIEVAL), shapes, shards, threads)
        elif states is not None and self._grows(at(contract.RETRIEVAL)):
            self.grown = GrownRetrieval(at(contract.RETRIEVAL), shapes, states, options)
        else:
            self._retrieval = open_session(at(contract.RETRIEVAL) / "model.onnx", options=options)
        self.search, self.search_ranking = None, None
        if shapes.search:
            from search.online import QuerySearch, SearchRanking  # its libraries, which a run without does without

            self.search = QuerySearch(at(contract.QUERY_SEARCH), shapes.candidates, catalogue)
            self.search_ranking = SearchRanking(at(contract.RESPONSE))
        self._ranking = open_session(at(contract.RANKING) / "model.onnx", options=options)
        self._fresh = None
        if catalogue is not None:
            self._fresh = FreshRanking(at(contract.RANKING), catalogue, options)
        self.respond = ResponseStage.from_file(at(contract.RESPONSE) / "items.json", catalogue)
        self.heads = int(self._ranking.get_outputs()[1].shape[1]) - 1
        self._retrieval_names = [t.name for t in contract.retrieval_inputs(shapes)]
        self._ranking_names = [t.name for t in contract.ranking_inputs(shapes)]
        inputs, _ = self.transform([Row("", None, 1)])
        inputs[1] = np.zeros_like(inputs[1])  # what is gone now may come back
        if shapes.rising:  # what rises now may fall
            inputs[self._rising_place] = np.zeros_like(inputs[self._rising_place])
        self._popular_N, self._popularity_N = (values[0] for values in self.retrieve(inputs)[:2])

    @property
    def _rising_place(self) -> int:
        """Of RISING_IDS among the inputs, with live counters."""
        return self.shapes.passed_on + len(self.shapes.moment)

    @staticmethod
    def _grows(folder: Path) -> bool:
        """Whether a version has the graph that encodes new events alone; a later one may be compiled without."""
        there = (folder / ENCODER_STEP).exists()
        if not there:
            log.warning("%s: has no %s: histories are encoded whole", folder, ENCODER_STEP)
        return there

    @classmethod
    def published(
        cls, root: Path, store: ServingStore, threads: int = 1, history: int = 0, ranked: int = 0, whole: bool = False
    ) -> Pipeline:
        """That of the version that ``artifacts/<name>`` published last. ``history``: newest events that are read (0:
        as many as were trained)."""
        run = Run(root)
        shapes, seen = run.shapes().reading(history), run.schema().exclude_seen
        return cls(run.repository, str(run.version()), shapes, store, seen, threads, ranked, whole)

    def retrieve(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Candidate ids int64 [B, N] and scores float32 [B, N], encoded history float32 [B, M, D]; then the inputs of
        ranking that come from the feature transform."""
        given, passed_on = inputs[: len(self._retrieval_names)], inputs[self.shapes.passed_on :]
        if self._index is not None:
            return [*self._index(given), *passed_on]
        if self._sharded is not None:
            return [*self._sharded(given)[0], *passed_on]
        if self.grown is not None:
            return [*self.grown(given), *passed_on]
        run = partial(self._retrieval.run, None)
        return [*retrieved(run, self.shapes, self._retrieval_names, given, self.whole), *passed_on]

    def rank(self, history_BT: np.ndarray, retrieved: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """Ids int64 [B, N], best first, and their values float32 [B, C, N]: of the retriever's first ``count``."""
        ids, scores, encoded, *passed_on = retrieved
        seen_fresh = passed_on.pop() if self.shapes.fresh else None
        of_fresh = [passed_on.pop() for _ in self.shapes.rising_of_fresh][::-1]
        rising = [passed_on[-1], *of_fresh] if of_fresh else []
        if count < ids.shape[1]:
            ids, scores = np.ascontiguousarray(ids[:, :count]), np.ascontiguousarray(scores[:, :count])
        parts = []
        for places, t in chunks(history_BT, self.whole, RANKING_RUN_EVENTS):
            of_events = [self.shapes.types and i == 0 for i in range(len(passed_on))]
            more = (x[places, -t:] if is_of_events else x[places]
                    for x, is_of_events in zip(passed_on, of_events, strict=True))  # fmt: skip
            tensors = (history_BT[places, -t:], ids[places], scores[places], encoded[places, -t:], *more)
            parts.append((places, self._ranking.run(None, dict(zip(self._ranking_names, tensors, strict=True)))))
        ranked = together(parts, len(history_BT))
        if self._fresh is None or seen_fresh is None:
            return ranked
        moment = passed_on[: len(self.shapes.moment)]
        return self._fresh.ranked(history_BT, scores, encoded, seen_fresh, moment, rising, *ranked)

    def unranked(self, ids_BN: np.ndarray, scores_BN: np.ndarray) -> list[np.ndarray]:
        """The same for candidates in the order they have: their scores, and no probabilities (0)."""
        values = np.zeros((len(ids_BN), 1 + self.heads, ids_BN.shape[1]), np.float32)
        values[:, 0] = scores_BN
        return [ids_BN, values]

    def retrieved(self, history_BT: np.ndarray, retrieved: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What was ``retrieve``d in the retriever's order, fresh items too."""
        unranked = self.unranked(*retrieved[:2])
        if self._fresh is None:
            return unranked
        moment = retrieved[3:][: len(self.shapes.moment)]
        return self._fresh.unranked(history_BT, retrieved[2], retrieved[-1], moment, *unranked)

    def popular(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Popular items that the rows may be answered, as ``rank`` gives them; by no model. With live counters those
        that are rising come first."""
        popular_N, popularity_N = self._popular_N, self._popularity_N
        if self.shapes.rising:
            rising = inputs[self._rising_place][0]
            rising = rising[rising != contract.PADDING_ID]
            others = ~np.isin(popular_N, rising)
            count = len(popular_N)
            popular_N = np.concatenate([rising, popular_N[others]])[:count]
            first = max(float(popularity_N[0]), 0.0) + np.arange(len(rising), 0, -1, dtype=np.float32)
            popularity_N = np.concatenate([first, popularity_N[others]])[:count]
        if self.shapes.lists_seen:
            taken_BN = np.stack([np.isin(popular_N, seen[seen != contract.PADDING_ID]) for seen in inputs[1]])
        else:
            taken_BN = inputs[1][:, popular_N]
        order_BN = np.argsort(taken_BN, axis=1, kind="stable")  # free ones first, in their order
        ids = np.where(np.take_along_axis(taken_BN, order_BN, 1), contract.PADDING_ID, popular_N[order_BN])
        return self.unranked(ids, popularity_N[order_BN])

    def count_to_rank(self, top_k: int, level: Level = Level.FULL) -> int:
        """How many candidates are ranked when up to ``top_k`` are asked for."""
        share = self.ranked // FEWER if level == Level.FEWER else self.ranked
        return min(self.shapes.proposed, max(share, top_k))

    def count_of(self, rows: Sequence[Row], level: Level = Level.FULL) -> int:
        """How many candidates of ``rows`` are ranked at once. Beside a query it is all but under load, whatever a
        profile ranks: place and score in the whole list are what the search ranker learned from."""
        if level == Level.FULL and self.search is not None and any(row.query for row in rows):
            return self.shapes.proposed
        return self.count_to_rank(max(row.top_k for row in rows), level)

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

    def unwanted(
        self, rows: Sequence[Row], options: Sequence[SearchOptions | None], known: Known | None = None
    ) -> list[np.ndarray]:
        """Ids int64 of the items that each row's query must not find: all of its history, where the request says so."""
        out, at = [NO_IDS] * len(rows), [i for i, of in enumerate(options) if of is not None and not of.seen]
        if at:
            known = self.transform.known(rows) if known is None else known
            for i, ids in zip(at, self.transform.seen([rows[i] for i in at], known.of(at)), strict=True):
                out[i] = ids
        return out

    def searched(
        self,
        queries: Sequence[str],
        options: Sequence[SearchOptions | None],
        seen: Sequence[np.ndarray],
        ranked: tuple[np.ndarray, np.ndarray],
    ) -> tuple[list[np.ndarray], list[str]]:
        """What was ``ranked``, with the rows that have a query answered by what it finds; UNDERSTOOD of each row.
        ``seen``: what queries must not find, as ``unwanted`` gives it."""
        if self.search is None or self.search_ranking is None:
            return list(ranked), [""] * len(queries)
        results = self.search(queries, options, seen)
        return list(self.search_ranking.rows(results, *ranked, options)), [understood for _, _, understood in results]

    def __call__(
        self, rows: Sequence[Row], level: Level = Level.FULL
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
        """(ids [B, N] and values [B, C, N]; inputs of retrieval; status of each row) without deadlines."""
        inputs, status = self.transform(rows)
        if level == Level.POPULAR:
            return self.popular(inputs), list(inputs), status
        retrieved = self.retrieve(inputs)
        if level == Level.RETRIEVED:
            return self.retrieved(inputs[0], retrieved), list(inputs), status
        count = self.count_of(rows, level)
        return self.rank(inputs[0], retrieved, count), list(inputs), status
