"""The whole call as one Python model: what the profile ``fused`` puts in the ensemble's place.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from typing import Any

import numpy as np

from serving.runtime.cache_settings import ANSWER_CACHE, STATE_CACHE, CacheSettings, StateSettings
from serving.runtime.drift import counts_of_worker
from serving.runtime.explore import Explorer, explored
from serving.runtime.interleaved import ENVIRONMENT as INTERLEAVE, Interleaved, both_rules, both_statuses, settings_of
from serving.runtime.known import Known
from serving.runtime.overload import Level, Overload
from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.runtime.sampling import sampling_of_worker
from serving.runtime.stages import with_reason
from serving.triton import impressions
from serving.triton.answers import Answers
from serving.triton.batch import Batch
from serving.triton.drift import count_answer, count_requests, sample
from serving.triton.graph_model import answer, each_by_itself, failure, hopeless
from serving.triton.grown import GrownCounts
from serving.triton.stage import Counts, ParsedRequest, Stage, refused, search_options, strings
from vivace import contract
from vivace.impressions.queue import Drafts, row_ids, usable_id
from vivace.impressions.samples import writer_of_worker

WAY_BACK_MS = 10  # from the answer to the client where processors are short


class RecommendModel(Stage):
    """The whole call in one process: takes the ensemble's place under the profile ``fused``.

    Before each stage requests whose deadline has passed are answered so and left out. Under load (see ``Overload``)
    stages are skipped, and STATUS says which.
    """

    def setup(self) -> None:
        seen, threads = self.parameters["exclude_seen"] == "true", int(self.parameters["intra_op_thread_count"])
        repository, ranked = self.folder.parent.parent, int(self.parameters["ranked"])
        store = self.store(readonly=True)
        kept = os.environ.get(STATE_CACHE)
        states = StateSettings.read(kept) if kept else None
        self.pipeline = Pipeline(
            repository, self.folder.name, self.shapes(), store, seen, threads, ranked, states=states
        )
        self.overload, self.counts = Overload(int(self.parameters["overload_rows"])), Counts()
        self.answers, self.interleaved = None, None
        self.business = Rules(self.rules_file, self.beside(contract.RESPONSE), self.pipeline.respond)
        if interleave := settings_of(os.environ.get(INTERLEAVE, "")):
            self.interleaved = Interleaved(interleave, self.folder.name, store, threads, self.rules_file)
        elif settings := os.environ.get(ANSWER_CACHE):  # a draft is of one request
            cache = CacheSettings.read(settings)
            self.answers = Answers(cache, self.pipeline, store, repository, self.parameters, self.business)
        self.impressions = impressions.Impressions(self.folder.name, [contract.SHOWN_TO.name])  # in its own hands
        self.drift = counts_of_worker(self.folder, self.pipeline.shapes, self.pipeline.transform.moment.columns)
        writer = writer_of_worker() if self.interleaved is None else None  # a draft is no one version's answer
        self.sampling = sampling_of_worker(writer, self.pipeline.shapes, self.folder.name)
        self.explorer = Explorer.of_worker(self.beside(contract.RESPONSE))
        pipelines = [self.pipeline, *([self.interleaved.pipeline] if self.interleaved is not None else [])]
        for of_pipelines in zip(*(pipeline.warm(self.largest) for pipeline in pipelines), strict=True):
            self.overload.done(of_pipelines[0][0], self.largest, sum(seconds for _, seconds in of_pipelines))
        self.grown = None if self.pipeline.grown is None else GrownCounts(self.pipeline.grown.histories)

    @each_by_itself
    def execute(self, requests: list[Any]) -> list[Any]:
        columns = self.pipeline.transform.moment.columns
        parsed = [ParsedRequest(i, request, columns) for i, request in enumerate(requests)]
        batch = Batch(parsed, [None] * len(requests), self.counts)
        rows, began, batch.began_ms = len(batch.rows), time.monotonic(), time.time() * 1000
        level = self._level(batch, rows)
        self._answer(batch, level)
        computed = [r for r in parsed if self.answers is None or r.place not in self.answers.recalled]
        answered = sum(len(r.rows) for r in computed if not batch.responses[r.place].has_error())
        self.overload.done(level, answered, time.monotonic() - began)
        self.counts.hand_over()
        for cache in (self.answers, self.grown):
            if cache is not None:
                cache.hand_over()
        self.impressions.hand_over()
        return batch.responses

    def finalize(self) -> None:
        self.impressions.close()
        for each in (self.drift, self.sampling):
            if each is not None:
                each.close()

    def _level(self, batch: Batch, rows: int) -> Level:
        """The level at which these are answered: under load, one at which half of those with a deadline keep it. The
        others, which cannot be answered in time, are refused."""
        level = self.overload(rows, time.monotonic())
        if not self.overload.on or all(r.deadline == math.inf for r in batch.requests):
            return level
        now_ms = time.time() * 1000
        left_ms = [r.deadline - now_ms - WAY_BACK_MS for r in batch.requests]
        level = self.overload.fitting(level, rows, statistics.median(left_ms) / 1000)
        needs_ms = self.overload.at_worst(level, rows) * 1000
        for request, left in zip(batch.requests, left_ms, strict=True):
            if -WAY_BACK_MS <= left < needs_ms:  # what is past has its own words
                batch.answer(request, hopeless(max(left, 0.0), needs_ms))
                self.counts("deadline near", len(request.rows))
        return level

    def _answer(self, batch: Batch, level: Level) -> None:
        whole = list(batch.requests)
        try:
            self._stages(batch, level)
        except Exception as error:
            if len(whole) > 1:  # find the request that is at fault: the others get their answers
                for request in whole:
                    if batch.responses[request.place] is None:
                        self._answer(Batch([request], batch.responses, self.counts), level)
                return
            batch.answer(whole[0], failure(error))

    def _stages(self, batch: Batch, level: Level) -> None:
        for request in batch.requests:
            if batch.responses[request.place] is None and len(request.rows) == 1 and request.errors[0]:
                batch.answer(request, refused(request.errors[0]))
        batch.keep_unanswered()
        batch.refuse_late(contract.FEATURE_TRANSFORM)
        self._read_search_options(batch)
        if not batch.requests:
            return
        if self.answers is None:
            self._computed(batch, level, None)
        else:
            self.answers(batch, self.outputs, level, self._computed, self._shown)

    def _computed(self, batch: Batch, level: Level, known: Known | None) -> None:
        """Answers what is at hand by the models. ``known``: what the stores know of its rows, None to read it."""
        rows = batch.rows
        known = self.pipeline.transform.known(rows) if known is None else known
        if self.pipeline.search is not None:
            options = [request.options for request in batch.requests for _ in request.rows]
            unwanted = iter(self.pipeline.unwanted(rows, options, known))
            for request in batch.requests:
                request.unwanted = list(itertools.islice(unwanted, len(request.rows)))
        inputs, statuses = self.pipeline.transform(rows, known)
        sample(self.sampling, batch.requests, known, inputs)
        count_requests(self.drift, batch.requests, inputs)
        status_B, arrays = np.array(statuses, object), inputs
        ranked_count = self.pipeline.ranked
        if level == Level.POPULAR:
            history_BT = inputs[0]
            ranked_BN, values_BCN = self.pipeline.popular(inputs)
        else:
            status_B, *arrays = batch.refuse_late(contract.RETRIEVAL, [status_B, *inputs])
            if not batch.requests:
                return
            history_BT, retrieved = arrays[0], self.pipeline.retrieve(arrays)
            if level == Level.RETRIEVED:
                ranked_BN, values_BCN = self.pipeline.retrieved(history_BT, retrieved)
            else:
                status_B, history_BT, *retrieved = batch.refuse_late(
                    contract.RANKING, [status_B, history_BT, *retrieved]
                )
                if not batch.requests:
                    return
                ranked_count = self.pipeline.count_of(batch.rows, level)
                ranked_BN, values_BCN = self.pipeline.rank(history_BT, retrieved, ranked_count)
        ranked_BN, values_BCN = self._search(batch, ranked_BN, values_BCN)
        served = self._served_beside(batch, level)
        status_B, ranked_BN, values_BCN, *served = batch.refuse_late(
            contract.RESPONSE, [status_B, ranked_BN, values_BCN, *served]
        )
        reason = level.status(ranked_count, self.pipeline.ranked)
        self._respond(batch, ranked_BN, values_BCN, status_B, reason, served)
        start = 0
        for request in batch.requests:
            stop = start + len(request.rows)
            if not request.itself:
                self.counts.answered(status_B[start:stop], level.name.lower())
            start = stop

    def _read_search_options(self, batch: Batch) -> None:
        """Reads what requests with a query ask of its answer; those that cannot be met get their errors."""
        if self.pipeline.search is None:
            return
        for request in batch.requests:
            try:
                if request.has_query:
                    request.options = search_options(request.request)
                    self.pipeline.search.index.allowed(request.options.filters)
                    if self.interleaved is not None and self.interleaved.pipeline.search is not None:
                        self.interleaved.pipeline.search.index.allowed(request.options.filters)
            except ValueError as error:
                batch.answer(request, refused(str(error)))
        batch.keep_unanswered()

    def _search(self, batch: Batch, ranked_BN: np.ndarray, values_BCN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranked ids and values, those of rows with a query from what the query finds."""
        if self.pipeline.search is None:
            return ranked_BN, values_BCN
        options = [request.options for request in batch.requests for _ in request.rows]
        queries = [row.query for row in batch.rows]
        unwanted = [ids for request in batch.requests for ids in request.unwanted]
        (ranked_BN, values_BCN), understood = self.pipeline.searched(
            queries, options, unwanted, (ranked_BN, values_BCN)
        )
        texts = iter(understood)
        for request in batch.requests:
            request.understood = [next(texts) for _ in request.rows]
        return ranked_BN, values_BCN

    def _served_beside(self, batch: Batch, level: Level) -> list[np.ndarray]:
        """Ranked ids, values and status of the served version, where this one is on trial and interleaved with it."""
        if self.interleaved is None or not batch.requests:
            return []
        options = [request.options for request in batch.requests for _ in request.rows]
        return list(self.interleaved.ranked(batch.rows, options, level))

    def _respond(
        self, batch: Batch, ranked_BN: np.ndarray, values_BCN: np.ndarray, status_B: np.ndarray, reason: str,
        served: list[np.ndarray],
    ) -> None:  # fmt: skip
        """``served``: what ``_served_beside`` answers, none where nothing is interleaved."""
        start = 0
        for request in batch.requests:
            stop = start + len(request.rows)
            # what the server asks itself is of the version on trial alone: by that it is judged
            drafts = self.interleaved is not None and not request.itself and not self.business.exact
            status_of = both_statuses(status_B[start:stop], served[2][start:stop]) if drafts else status_B[start:stop]
            rows = zip(request.errors, status_of, strict=True)
            status = strings(
                [f"{contract.STATUS_ERROR}{error}" if error else with_reason(status, reason) for error, status in rows]
            )
            top_k = np.array([row.top_k for row in request.rows])
            queried = [bool(row.query) for row in request.rows]
            ruled_by = (top_k, queried, status[:, 0])
            ranked, of_ranked, told_B = self.business(ranked_BN[start:stop], values_BCN[start:stop], *ruled_by)
            propensities = None
            # who picked a place of a draft is not explored, nor one that rules give
            if self.explorer is not None and not drafts and not self.business.exact:
                ranked, of_ranked, propensities = explored(
                    self.explorer, self.pipeline.respond, request.itself, ranked, of_ranked, top_k, status[:, 0],
                    queried, self.business.buries,
                )  # fmt: skip
            values = self.pipeline.respond(ranked, of_ranked, top_k, status[:, 0])
            count_answer(self.drift, request.itself, values, told_B, queried)
            request_id, drafted = "", None
            if drafts and self.interleaved is not None:
                by_served = self.interleaved.business
                ids, of_ids, of_served_B = by_served(served[0][start:stop], served[1][start:stop], *ruled_by)
                beside = self.interleaved.pipeline.respond(ids, of_ids, top_k, status[:, 0])
                told_B = both_rules(told_B, of_served_B)
                request_id = usable_id(impressions.id_of(request.request))
                values, drafted = self.interleaved.drafted(beside, values, row_ids(request_id, len(request.rows)))
            if self.pipeline.search is not None:
                values.append(strings(request.understood))
            values.append(told_B[:, None])
            self._shown(batch, request, values, request_id, drafted, propensities)
            if self.answers is not None and len(request.rows) == 1:
                batch.answers[request.place] = values
            batch.answer(request, answer(request.request, self.outputs, values))
            start = stop

    def _shown(
        self, batch: Batch, request: ParsedRequest, values: list[np.ndarray], request_id: str = "",
        drafted: Drafts | None = None, propensities_BK: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Puts what a request is answered among the impressions: see ``Impressions.put``."""
        if self.impressions:
            viewers = impressions.viewers(request, batch.began_ms)
            shown = (values[0], values[1], values[-1][:, 0])
            self.impressions.put(request.request, viewers, *shown, request_id, drafted, propensities_BK)
