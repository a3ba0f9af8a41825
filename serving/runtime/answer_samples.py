"""A sample of a worker's answers, for whoever compares two versions while one is on trial.

One datagram a few times a second goes to a Unix socket that the owner alone opens; where nobody listens nothing is
kept. A worker never waits for it: what does not fit is gone. Requests are chosen by a hash of their ids, so two servers
that answer the same request choose alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import msgpack
import numpy as np

from vivace.contract import STATUS_ERROR
from vivace.impressions.queue import Drafts, Viewer, row_ids

ENVIRONMENT = "VIVACE_ANSWERS"  # what a server tells its workers: JSON of ``Listener``
LOOK_S, HAND_OVER_S = 1.0, 0.25
MOST, SHOWN = 32, 10  # answers of a datagram, items of an answer
_SPAN = 1 << 32


@dataclass(frozen=True)
class Listener:
    """Where answers are sent, if anyone listens there, and as whose: of the version on trial, or of the served one."""

    path: str
    on_trial: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Answer(NamedTuple):
    """What one row was answered. ``who``: its user, or the session of someone anonymous. ``score``: of the first item,
    0 where there is none. ``teams``: the version that a click on each item speaks for; none where no two were
    interleaved."""

    request_id: str
    who: str
    latency_ms: float
    items: list[str]
    score: float
    teams: list[str]


def packed(on_trial: bool, answers: Sequence[Answer]) -> bytes:
    raw: bytes = msgpack.packb([on_trial, answers])
    return raw


def unpacked(raw: bytes) -> tuple[bool, list[Answer]]:
    """Raises ValueError, or what ``msgpack`` raises, for what is no datagram of ours."""
    on_trial, answers = msgpack.unpackb(raw)
    return bool(on_trial), [Answer(*answer) for answer in answers]


class AnswerSamples:
    """One process's. ``put`` and ``hand_over`` never wait and never raise for want of a listener."""

    def __init__(self, environment: str) -> None:
        self._to = Listener(**json.loads(environment)) if environment else None
        self._looked = self._sent = -LOOK_S
        self._listens, self._share = False, 1.0
        self._waiting: list[Answer] = []

    def on(self) -> bool:
        """Whether anyone listened a second ago."""
        if self._to is None:
            return False
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked, self._listens = now, os.path.exists(self._to.path)
        return self._listens

    def put(
        self, request_id: str, rows: Sequence[Viewer | bytes | None], items_BK: np.ndarray, scores_BK: np.ndarray,
        statuses: Sequence[bytes], made_ms: float, drafts: Drafts | None,
    ) -> None:  # fmt: skip
        """One request's answer: as ``vivace.impressions.queue.Shown``."""
        ids = row_ids(request_id, len(rows)) if request_id else [""] * len(rows)
        for row, viewer in enumerate(rows):
            if not viewer or len(self._waiting) >= MOST or statuses[row].startswith(STATUS_ERROR.encode()):
                continue
            place = zlib.crc32(ids[row].encode()) / _SPAN if ids[row] else random.random()
            if place >= self._share:
                continue
            user, _, _, began_ms, session = msgpack.unpackb(viewer) if isinstance(viewer, bytes) else viewer
            items = [item.decode("utf-8", "replace") for item in items_BK[row, :SHOWN].tolist() if item]
            score = float(scores_BK[row, 0]) if items else 0.0
            teams = [] if drafts is None else drafts.teams_BK[row, : len(items)].tolist()
            self._waiting.append(Answer(ids[row], user or session, made_ms - began_ms, items, score, teams))

    def hand_over(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._to is None or not self._waiting or (now - self._sent < HAND_OVER_S and not at_once):
            return
        # of as many as fit, and chosen alike in both servers: half of what there was where it was too much
        if len(self._waiting) >= MOST:
            self._share /= 2
        elif len(self._waiting) < MOST // 4:
            self._share = min(1.0, 2 * self._share)
        # a worker that sends nothing has no socket open; nobody listens any more, or too slowly: left out
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.setblocking(False)
            to.sendto(packed(self._to.on_trial, self._waiting), self._to.path)
        self._sent = now
        self._waiting.clear()
