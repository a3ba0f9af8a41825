"""Whole answers of requests that were answered before, in the memory of the machine and in the Valkey that servers
share.

An entry lies under what was asked, and says what it was answered from: the user's history and attributes as the store
has them, the hour, the catalogue's newest change, the live counters. Whoever finds it has read all of these anew, and
takes the answer only where they are the same. So an entry is never old: an append, by whichever server, changes the
history, and with it what the entry must say.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from serving.releases import CHECKSUMS
from serving.runtime.answer_memory import AnswerMemory
from serving.runtime.known import Known
from serving.runtime.stages import Row
from vivace import contract
from vivace.store.interface import SharedAnswers, StoreError

DIGEST = 16  # bytes
HEAD = DIGEST + 8  # of an entry: the state it was computed from, then until when it holds, Unix ms
SHARE_EVERY_S, SHARE_SELDOM_S = 0.1, 1.0  # what was computed goes to the shared store so often; where few repeat
MOST_WAITING = 2_000  # answers on their way there; more are not shared


@dataclass
class Question:
    """One row that may be answered from the cache. ``key``: of what is asked; ``state``: of what the answer goes by;
    ``number``: of the catalogue's newest change then. ``tier``: where ``answer`` was found, "" for nowhere."""

    row: Row
    key: bytes
    state: bytes = b""
    number: int = 0
    tier: str = ""
    answer: list[np.ndarray] | None = None

    @property
    def claim(self) -> bytes:
        return self.key + self.state


class Repeats:
    """Whether requests repeat. Where almost none does, looking and keeping would cost more than they save: then it is
    done for a share of the users alone, by whom it is seen when that changes."""

    WINDOW, FEWER, LEAST, SHARE = 500, 64, 0.12, 16  # rows to judge by; hits that are worth it; one in so many users

    def __init__(self) -> None:
        self.few, self._rows, self._hits = False, 0, 0

    def worth(self, row: Row) -> bool:
        """Whether ``row`` is looked up: the same in every process that sees few repeats."""
        if not self.few:
            return True
        who = row.user_id or (row.history or [row.query])[-1]
        return zlib.crc32(who.encode()) % self.SHARE == 0

    def seen(self, hit: bool) -> None:
        """One row that was looked up."""
        self._rows += 1
        self._hits += hit
        if self._rows == (self.FEWER if self.few else self.WINDOW):
            self.few = self._hits < self.LEAST * self._rows
            self._rows = self._hits = 0


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(msgpack.packb(value), digest_size=DIGEST).digest()


def identity(release: Path, parameters: Mapping[str, str]) -> bytes:
    """Of the models and the settings that answers go by: equal on every machine that serves the same. Where a version
    has no checksums it is this process's alone."""
    checksums = release / CHECKSUMS
    models = checksums.read_bytes() if checksums.exists() else uuid.uuid4().bytes
    return _digest([models, sorted(parameters.items())])


def packed(values: Sequence[np.ndarray]) -> bytes:
    """The answer to one row: ITEM_ID [1, K], float32 tensors [1, K], and UNDERSTOOD [1, 1] where there is one."""
    items, *others = values
    understood = others.pop()[0, 0] if others[-1].dtype == object else None
    body: bytes = msgpack.packb([items[0].tolist(), np.stack(others).astype(np.float32).tobytes(), understood])
    return body


def unpacked(body: bytes) -> list[np.ndarray]:
    """What ``packed`` packed, and STATUS, which is "ok"."""
    items, floats, understood = msgpack.unpackb(body)
    ids = np.empty((1, len(items)), object)
    ids[0] = items
    numbers = np.frombuffer(floats, np.float32)
    count = len(numbers) // len(items) if items else 0
    values = [ids, *numbers.reshape(count, 1, len(items))]
    more = [] if understood is None else [understood]
    return [*values, *(np.array([[text]], object) for text in (*more, contract.STATUS_OK.encode()))]


class AnswerCache:
    """``shared``: the store where it keeps answers too; ``identity``: see above. ``asked`` counts, by how, the rows
    since they were last taken."""

    def __init__(self, memory: AnswerMemory, shared: SharedAnswers | None, identity: bytes, seconds: float) -> None:
        self.memory, self._shared, self._identity, self._life_ms = memory, shared, identity, int(seconds * 1000)
        self.repeats = Repeats()
        self._waiting: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._to_share = threading.Event()
        if shared is not None:
            threading.Thread(target=self._share, name="answers to the shared store", daemon=True).start()

    def question(self, row: Row, parameters: Mapping[str, Any]) -> Question:
        """``parameters``: of the request, those that change the answer."""
        sent = [row.history, row.types, row.times]
        context = [sorted(row.context.items()), row.unknown_context]
        asked = [row.user_id, sent, row.top_k, row.query, context, sorted(parameters.items())]
        return Question(row, _digest([self._identity, asked]))

    # -- before ---------------------------------------------------------------------------------------
    def recall(
        self, questions: Sequence[Question], known: Known, places: Sequence[int], beside: Sequence[bytes | None]
    ) -> None:
        """Gives each question its state, and the answer where there is one of that state. ``places``: of the questions
        in what is ``known``; ``beside``: what the shared store has under their keys, [] where it was not asked."""
        for question, place in zip(questions, places, strict=True):
            question.state, question.number = _digest(known.state(place)), known.number
        self._look(questions, self.memory.get([q.key for q in questions]), "memory")
        if not known.shareable:
            return
        new = list[tuple[bytes, bytes]]()
        for question, raw in zip(questions, beside, strict=True) if beside else ():
            if question.answer is None and raw is not None:
                self._look([question], [raw], "shared")
                if question.answer is not None:
                    new.append((question.key, raw))
        self.memory.put(new)

    @staticmethod
    def _look(questions: Sequence[Question], values: Sequence[bytes | None], tier: str) -> None:
        now_ms = int(time.time() * 1000)
        for question, raw in zip(questions, values, strict=True):
            if raw is not None and raw[:DIGEST] == question.state and now_ms < int.from_bytes(raw[DIGEST:HEAD], "big"):
                question.answer, question.tier = unpacked(raw[HEAD:]), tier

    def wait(self, questions: Sequence[Question]) -> None:
        """Until others have computed these, or have given them up; gives those answers that came."""
        while True:
            still = self.memory.claimed([q.claim for q in questions])
            self._look(questions, self.memory.get([q.key for q in questions]), "joined")
            if not any(c and q.answer is None for c, q in zip(still, questions, strict=True)):
                return
            time.sleep(0.001)

    # -- after ----------------------------------------------------------------------------------------
    def keep(self, answers: Sequence[tuple[Question, list[np.ndarray]]], over: Sequence[Question], share: bool) -> None:
        """Keeps whole answers; ``over``: questions whose claims end."""
        until = (int(time.time() * 1000) + self._life_ms).to_bytes(8, "big")
        entries = [(q.key, q.state + until + packed(values)) for q, values in answers]
        self.memory.put(entries, [q.claim for q in over])
        if self._shared is not None and share and entries:
            with self._lock:
                if len(self._waiting) < MOST_WAITING:
                    self._waiting.update(entries)
            self._to_share.set()

    def _share(self) -> None:
        assert self._shared is not None
        while True:
            self._to_share.wait()
            time.sleep(SHARE_SELDOM_S if self.repeats.few else SHARE_EVERY_S)
            self._to_share.clear()
            with self._lock:
                entries, self._waiting = list(self._waiting.items()), {}
            try:
                self._shared.keep_answers(entries, self._life_ms)
            except StoreError:  # it logs when it goes; answers are computed meanwhile
                continue
