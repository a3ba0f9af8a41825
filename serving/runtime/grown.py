"""Retrieval that encodes only what is new of a history, by two graphs and the cache of states between them.

Axis legend: B rows, T history events, n known events of a row, E numbers of an event, S new events, P earlier ones,
C states of an event, D width, M encoded events, N candidates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.runtime.by_length import STEP, rows_at_once
from serving.runtime.cache_settings import StateSettings
from serving.runtime.state_cache import DIGEST, Entry, Keys, StateMemory, keys_of
from vivace.contract import PADDING_ID, StageTensors
from vivace.onnx_session import open_session
from vivace.step_contract import (
    EARLIER_STATES,
    ENCODER_STEP,
    SCORING,
    scoring_inputs,
    scoring_outputs,
    step_inputs,
    step_outputs,
)

HIT, GROWN, MISSED = "hit", "grown", "missed"


@dataclass
class Row:
    """One history: its known events int64 [n, E] (ids, then times and types as they are read), the hashes of them, and
    the entry of the first of them, None where there is none."""

    place: int
    events: np.ndarray
    keys: Keys
    entry: Entry | None

    @property
    def count(self) -> int:
        """Events whose states are there."""
        return 0 if self.entry is None else self.entry.count

    @property
    def new(self) -> int:
        """S."""
        return len(self.events) - self.count


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def _digest(graph: Path) -> bytes:
    """Of a graph and what lies beside it: the states of one encoder are not another's."""
    hashed = hashlib.blake2b(digest_size=DIGEST)
    for file in sorted(graph.parent.glob(f"{graph.name}*")):
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.digest()


class GrownHistories:
    """Histories to encodings by the graph ENCODER_STEP of ``folder``, from where the cache left them.

    ``settings``: of the cache, which every process with the same ones shares; ``model``: what tells this encoder's
    entries from others'. ``rows`` counts rows by HIT (nothing new), GROWN and MISSED since they were last taken."""

    def __init__(
        self, folder: Path, shapes: StageTensors, settings: StateSettings, options: ort.SessionOptions | None = None
    ) -> None:
        self._graph = open_session(folder / ENCODER_STEP, options=options)
        states = {i.name: i.shape for i in self._graph.get_inputs()}[EARLIER_STATES][-1]
        self._shapes, self._states, self.model = shapes, int(states), _digest(folder / ENCODER_STEP)
        self.cache, self.rows = StateMemory(Path(settings.path), settings.room_bytes), Counter[str]()
        self._names = [t.name for t in step_inputs(shapes, self._states)]
        self._outputs = [t.name for t in step_outputs(shapes, self._states)]

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Encoded histories float32 [B, M, D] of what ``contract.retrieval_inputs`` names."""
        s = self._shapes
        history_BT, _, *more = inputs
        events_BTE = np.stack([history_BT, *more[: s.timed + s.types]], 2)
        known_BT = history_BT != PADDING_ID
        rows = [self._row(i, events[known]) for i, (events, known) in enumerate(zip(events_BTE, known_BT, strict=True))]
        encoded_BMD = np.zeros((len(rows), s.memory or history_BT.shape[1], s.width), np.float32)
        waiting = []
        for row in rows:
            if row.new:
                waiting.append(row)
            elif row.entry is not None:
                self._write(encoded_BMD, row.place, row.entry.encoded)
        for part in self._parts(waiting):
            for row, encoded in zip(part, self._encoded(part), strict=True):
                self._write(encoded_BMD, row.place, encoded)
        return encoded_BMD

    def _row(self, place: int, events_nE: np.ndarray) -> Row:
        if not len(events_nE):
            return Row(place, events_nE, Keys([], []), None)
        keys = keys_of(events_nE, self.model)
        row = Row(place, events_nE, keys, self.cache.find(keys, events_nE))
        self.rows[MISSED if row.entry is None else GROWN if row.new else HIT] += 1
        return row

    @staticmethod
    def _write(encoded_BMD: np.ndarray, place: int, encoded_nD: np.ndarray) -> None:
        newest = encoded_nD[-encoded_BMD.shape[1] :]
        encoded_BMD[place, encoded_BMD.shape[1] - len(newest) :] = newest

    @staticmethod
    def _parts(rows: list[Row]) -> list[list[Row]]:
        """Rows of about as many new and earlier events together, at most ``rows_at_once`` in each: those without
        earlier ones apart."""
        out = []
        for some in ([r for r in rows if r.entry is None], [r for r in rows if r.entry is not None]):
            some.sort(key=lambda r: len(r.events))
            most = rows_at_once(max((r.new for r in some), default=1))
            out += [some[i : i + most] for i in range(0, len(some), most)]
        return out

    def _encoded(self, rows: list[Row]) -> list[np.ndarray]:
        """Encodings float32 [n, D] of rows with new events, which the cache keeps."""
        b, s, p = len(rows), max(r.new for r in rows), _padded(max(r.count for r in rows))
        s = s if p else min(_padded(s), self._shapes.history)
        width = rows[0].events.shape[1]
        new_BSE = np.full((b, s, width), PADDING_ID, np.int64)
        known_BP, earlier_BPE = np.zeros((b, p), bool), np.zeros((b, p, width), np.int64)
        states_BPC = np.zeros((b, p, self._states), np.float32)
        for i, row in enumerate(rows):
            new_BSE[i, : row.new] = row.events[row.count :]
            if row.entry is not None:
                known_BP[i, p - row.count :] = True
                earlier_BPE[i, p - row.count :] = row.entry.events
                states_BPC[i, p - row.count :] = row.entry.states
        of_events = [np.ascontiguousarray(new_BSE[:, :, e]) for e in range(width)]
        tensors = [of_events[0], known_BP, states_BPC]
        if self._shapes.timed:
            tensors += [of_events[1], np.ascontiguousarray(earlier_BPE[:, :, 1])]
        if self._shapes.types:
            tensors.append(of_events[-1])
        encoded, states = self._graph.run(self._outputs, dict(zip(self._names, tensors, strict=True)))
        new = [(states[i, : r.new], encoded[i, : r.new]) for i, r in enumerate(rows)]
        self.cache.put([(r.keys, r.events, *of, r.entry) for r, of in zip(rows, new, strict=True)])
        return [
            of_new if r.entry is None else np.concatenate([r.entry.encoded, of_new])
            for r, (_, of_new) in zip(rows, new, strict=True)
        ]


class GrownRetrieval:
    """The stage ``retrieval`` by the graphs ENCODER_STEP and SCORING of ``folder``: the answers of the one graph but
    for rounding."""

    def __init__(
        self, folder: Path, shapes: StageTensors, settings: StateSettings, options: ort.SessionOptions | None = None
    ) -> None:
        self.histories = GrownHistories(folder, shapes, settings, options)
        self._graph, self._shapes = open_session(folder / SCORING, options=options), shapes
        self._names = [t.name for t in scoring_inputs(shapes)]
        self._outputs = [t.name for t in scoring_outputs(shapes)]

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Candidate ids int64 [B, N] and scores float32 [B, N], encoded history float32 [B, M, D]."""
        s = self._shapes
        encoded_BMD = self.histories(inputs)
        history_BT, exclude, *more = inputs
        newest_BD = np.ascontiguousarray(encoded_BMD[:, -1])
        tensors = (history_BT, exclude, newest_BD, *more[s.timed + s.types :])
        ids, scores = self._graph.run(self._outputs, dict(zip(self._names, tensors, strict=True)))
        return [ids, scores, encoded_BMD]
