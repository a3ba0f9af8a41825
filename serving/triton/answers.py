"""The cache of answers between Triton's requests and the stages, under the profile ``fused``.

Runs inside Triton's Python stub only (it imports ``triton_python_backend_utils``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.runtime.answer_cache import AnswerCache, Question, identity
from serving.runtime.answer_memory import AnswerMemory
from serving.runtime.cache_settings import CacheSettings
from serving.runtime.known import Histories, Known, TypedHistory
from serving.runtime.overload import Level
from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.triton.batch import Batch
from serving.triton.graph_model import answer
from serving.triton.stage import Counts, ParsedRequest, asks_itself
from vivace import contract
from vivace.store.interface import ServingStore, SharedAnswers

Compute = Callable[[Batch, Level, Known | None], None]
Shown = Callable[[Batch, ParsedRequest, list[np.ndarray]], None]
MISS, JOINED, PASSED = "miss", "joined", "passed"
EVERY_S = 1.0  # each hand-over of counters costs as much as an answer's place in the cache


@dataclass(frozen=True, eq=False)
class _Way:
    """A request of a batch, the place of its first row, and what it asks; None where it is not looked up."""

    request: ParsedRequest
    row: int
    question: Question | None


@dataclass(frozen=True)
class _Run:
    """One batch on its way through the cache."""

    batch: Batch
    outputs: Sequence[str]
    level: Level
    known: Known
    compute: Compute
    shown: Shown


class Answers:
    """Answers requests of one row from what was answered before, and keeps what is computed, if nothing was wrong with
    it: STATUS "ok", at the full level. Requests of several rows go by.

    ``recalled``: places of the requests of this call that the models were not asked for."""

    def __init__(
        self, settings: CacheSettings, pipeline: Pipeline, store: ServingStore, release: Path,
        parameters: Mapping[str, str], business: Rules,
    ) -> None:  # fmt: skip
        self.pipeline, self._transform = pipeline, pipeline.transform
        self._shared = store if isinstance(store, SharedAnswers) else None
        memory = AnswerMemory(Path(settings.path), settings.room_bytes)
        self.cache = AnswerCache(memory, self._shared, identity(release, parameters), settings.seconds)
        self._business = business
        self.recalled: set[int] = set()
        self._counts = Counts("vivace_answer_cache_total", "Rows by what the cache had", "result", EVERY_S)
        kinds = (
            ("vivace_answer_cache_bytes", "Memory that answers take", pb_utils.MetricFamily.GAUGE),
            ("vivace_answer_cache_evicted_total", "Answers dropped for want of room", pb_utils.MetricFamily.COUNTER),
        )
        self._families = [pb_utils.MetricFamily(name=n, description=d, kind=k) for n, d, k in kinds]
        self._bytes, self._evicted = (family.Metric(labels={}) for family in self._families)
        for result in ("memory", "shared", JOINED, MISS, PASSED):
            self._counts(result, 0)

    def hand_over(self) -> None:
        self.recalled = set()
        if self._counts.hand_over():
            self._bytes.set(self.cache.memory.size())
            if self.cache.memory.evicted:
                self._evicted.increment(self.cache.memory.evicted)
                self.cache.memory.evicted = 0

    def __call__(self, batch: Batch, outputs: Sequence[str], level: Level, compute: Compute, shown: Shown) -> None:
        """Answers ``batch``, by ``compute`` what is not there. Requests that ask for the same are computed once."""
        questions = [self._question(request) for request in batch.requests]
        asked = [question for question in questions if question is not None]
        if not asked:
            compute(batch, level, None)
            return
        ways, row = list[_Way](), 0
        for request, question in zip(batch.requests, questions, strict=True):
            ways.append(_Way(request, row, question))
            row += len(request.rows)
        beside: list[bytes | None] = []
        known = self._transform.known(batch.rows, self._reading([q.key for q in asked], beside))
        run = _Run(batch, outputs, level, known, compute, shown)
        if known.fault or self._transform.late():  # what is not known to be whole is neither asked for nor kept
            ways = [_Way(way.request, way.row, None) for way in ways]
        else:
            self.cache.recall(asked, known, [way.row for way in ways if way.question is not None], beside)
        self._answer(run, ways)

    def _question(self, request: ParsedRequest) -> Question | None:
        """None for what is not looked up: of several rows, or with nothing to go by, which is degraded."""
        if len(request.rows) != 1:
            return None
        row, parameters = request.rows[0], dict[str, str]()
        if row.query and self.pipeline.search is not None:
            given = json.loads(request.request.parameters() or "{}")
            parameters = {name: str(given[name]) for name in (contract.FILTERS, contract.DIVERSITY) if name in given}
        elif row.history is None and not row.user_id:
            return None
        if not self.cache.repeats.worth(row):
            self._counts(PASSED)
            return None
        return self.cache.question(row, parameters | {"rules": self._business.stamp})

    def _reading(self, keys: Sequence[bytes], beside: list[bytes | None]) -> Histories | None:
        """Reads histories, and in the same trip into ``beside`` what the shared store has under ``keys``."""
        shared = self._shared
        if shared is None or not keys or self._transform.live is not None:
            return None

        def read(users: Sequence[str]) -> list[TypedHistory | None]:
            histories, values = shared.histories_and_answers(users, keys)
            beside.extend(values)
            return histories

        return read

    def _answer(self, run: _Run, ways: Sequence[_Way]) -> None:
        first: dict[bytes, _Way] = {}  # of equal questions
        follow, lead = list[_Way](), list[_Way]()
        for way in ways:
            question = way.question
            if question is None:
                lead.append(way)
            elif question.answer is not None:
                self._give(run, way, question.answer, question.tier)
            elif question.claim in first:
                follow.append(way)
            else:
                first[question.claim] = way
                lead.append(way)
        claims = list(first) if run.level == Level.FULL else []  # of less than a whole answer nothing is kept
        mine = self.cache.memory.claim(claims) if claims else []
        waiting = [first[claim] for claim, is_mine in zip(claims, mine, strict=True) if not is_mine]
        self._compute(run, [way for way in lead if way not in waiting])
        if waiting:
            self.cache.wait([way.question for way in waiting if way.question is not None])
            for way in waiting:
                if way.question is not None and way.question.answer is not None:
                    self._give(run, way, way.question.answer, JOINED)
        for way in follow:
            assert way.question is not None
            values = run.batch.answers.get(first[way.question.claim].request.place)
            if values is not None:
                self._give(run, way, values, JOINED)
        self._compute(run, [way for way in (*lead, *follow) if run.batch.responses[way.request.place] is None])

    def _give(self, run: _Run, way: _Way, values: list[np.ndarray], result: str) -> None:
        run.batch.answer(way.request, answer(way.request.request, run.outputs, values))
        run.shown(run.batch, way.request, values)
        run.batch.answers[way.request.place] = values
        self.recalled.add(way.request.place)
        self._counts(result)
        self.cache.repeats.seen(True)
        if asks_itself(way.request.request):
            return
        status = values[-1][0, 0].decode()
        run.batch.counts.answered([status], "full" if status == contract.STATUS_OK else run.level.name.lower())

    def _compute(self, run: _Run, ways: Sequence[_Way]) -> None:
        """Computes what is asked, and keeps the answers that may be given again."""
        if not ways:
            return
        part = Batch([way.request for way in ways], run.batch.responses, run.batch.counts)
        part.began_ms = run.batch.began_ms
        rows = [way.row + n for way in ways for n in range(len(way.request.rows))]
        counted = self.pipeline.count_of(part.rows)
        run.compute(part, run.level, run.known.of(rows))
        run.batch.answers.update(part.answers)
        asked = [way.question for way in ways if way.question is not None]
        self._counts(MISS, len(asked))
        for _ in asked:
            self.cache.repeats.seen(False)
        places = {id(way.question): way.request.place for way in ways}
        answers = [(q, part.answers[place]) for q in asked if (place := places[id(q)]) in part.answers]
        whole = [(q, values[:-1]) for q, values in answers if self._may_be_kept(run, q, values, counted)]
        self.cache.keep(whole, asked if run.level == Level.FULL else [], run.known.shareable)

    def _may_be_kept(self, run: _Run, question: Question, values: list[np.ndarray], counted: int) -> bool:
        """Whether it is what anyone who asks the same would be answered: whole, and neither changed by its neighbours
        in the batch, for which ``counted`` candidates were ranked, nor by a catalogue that changed meanwhile."""
        status, items = values[-1][0, 0], values[0]
        return bool(
            run.level == Level.FULL
            and status == contract.STATUS_OK.encode()
            and items.size
            and self.pipeline.count_of([question.row]) == counted
            and question.number == self._transform.number
        )
