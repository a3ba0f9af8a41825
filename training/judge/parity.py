"""How far two answers to the same requests are apart; live ones beside those of the offline path.

Axis legend: R requests, T history events, N candidates.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from preprocessing.features import Features
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.data.columns import EventColumns
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import Preset, shapes
from vivace import contract
from vivace.impressions.files import ITEMS, PROPENSITIES, REQUEST_ID, SCORES, STATUS, parts
from vivace.impressions.queue import folder_of as impressions_of
from vivace.impressions.samples import RESULT, Sample, folder_of, read, write
from vivace.manifest import write_json
from vivace.run import FINAL, Run
from vivace.windows import Window

TIED = 1e-5  # of scores of magnitude 10: float32 knows no smaller difference


def difference(expected: Sequence[np.ndarray], got: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Share of equal ids of the first tensor, position by position; largest absolute difference of the others.

    A place counts as equal too where the reference's own neighbours have the same score (within TIED: such as variants
    of one product that nobody bought) and the answer has that score there: which of them comes first is chance. The
    second tensor has the scores, [B, N] or as row 0 of [B, C, N]. Values that belong to items are compared item by
    item: two items of equal score may change places.
    """
    reference, answer = list(expected), list(got)
    equal = reference[0] == answer[0]
    if len(reference) > 1:
        score_BN, other_BN = (x[1] if x[1].ndim == 2 else x[1][:, 0] for x in (reference, answer))
        near = np.abs(np.diff(score_BN, axis=1)) <= TIED
        tied = np.pad(near, ((0, 0), (1, 0))) | np.pad(near, ((0, 0), (0, 1)))
        equal |= tied & (np.abs(score_BN - other_BN) <= TIED)
    apart = {names[0]: float(equal.mean())}
    orders = [np.argsort(ids, axis=1, kind="stable") for ids in (reference[0], answer[0])]
    same = np.take_along_axis(reference[0], orders[0], 1) == np.take_along_axis(answer[0], orders[1], 1)
    same &= np.take_along_axis(reference[0], orders[0], 1) != contract.PADDING_ID
    for name, e, g in zip(names[1:], reference[1:], answer[1:], strict=True):
        if name != contract.ENCODED_HISTORY:
            (b, n), rows = reference[0].shape, 1 if e.ndim == 2 else e.shape[1]
            e, g = (
                np.take_along_axis(x.reshape(b, rows, n), o[:, None], 2).swapaxes(1, 2)[same]
                for x, o in zip((e, g), orders, strict=True)
            )
        apart[name] = float(np.abs(e - g).max(initial=0.0))
    return apart


# -- live answers beside the offline path ----------------------------------------------------------------
APART = 1e-3  # of scores of magnitude 10, served graphs beside PyTorch: seen 1e-4; what is nearer may change places
SAME, IDS, ANSWER = "same", "ids", "answer"


@dataclass(frozen=True)
class Replayed:
    """One sample computed again. ``verdict``: SAME; IDS where NVTabular makes other ids of it than the server did;
    ANSWER where the models answer otherwise; ``what`` differs, in words."""

    id: str
    verdict: str
    what: str = ""


class Offline:
    """The path that a run is trained and evaluated by: NVTabular's fitted workflow, then the PyTorch models."""

    def __init__(self, features: Features, preset: Preset, root: Path) -> None:
        from preprocessing.workflow import load_workflow  # NVTabular, which takes seconds

        run = Run(root, features.folder)
        final = run.has(FINAL)
        self._features, self._shapes = features, shapes(preset, features)
        self._workflow = load_workflow(features.folder / "workflow")
        retriever = load_retrieval(features, preset, root, final).cpu()
        self._retrieval = RetrievalGraph(retriever, self._shapes.candidates, self._shapes.memory)
        self._ranking = RankingGraph(load_ranker(features, preset, root, final=final).cpu())
        self._names = np.array([""] * contract.FIRST_ID + features.items()[contract.ITEM].tolist(), object)

    def encode(self, samples: Sequence[Sample]) -> pd.DataFrame:
        """The events of each sample, oldest first, then its moment, encoded by NVTabular: columns of the schema; USER
        is the place of the sample."""
        from preprocessing.refresh import encode_events

        schema, rows = self._features.schema, list[dict[str, Any]]()
        for place, sample in enumerate(samples):
            one = {contract.USER: f"{place:06d}", contract.TIME: sample.moment_ms}  # of equal times the order stays
            for item, kind in zip(sample.items, sample.types, strict=True):
                rows.append({**one, contract.ITEM: item, contract.EVENT: kind})
            rows.append({**one, contract.ITEM: "", contract.EVENT: "", **sample.context})
        frame = pd.DataFrame(rows)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NVTabular's, of a machine without a GPU
            return encode_events(self._workflow, frame, schema, Path(folder) / "encoded")

    def requests(self, samples: Sequence[Sample]) -> batches.Requests:
        """What the models read of the samples, by NVTabular's ids."""
        encoded, columns = self.encode(samples), self._features.context
        of_sample = [frame for _, frame in encoded.groupby(contract.USER, sort=True)]
        types = contract.EVENT in encoded
        kept, histories = EventColumns(timed=True, types=types), []
        for sample, frame in zip(samples, of_sample, strict=True):
            events = {contract.ITEM: frame[contract.ITEM].to_numpy()[:-1], contract.TIME: np.array(sample.times, int)}
            if types:
                events[contract.EVENT] = frame[contract.EVENT].to_numpy()[:-1]
            histories.append(kept.packed(events))
        last = pd.DataFrame([frame.iloc[-1] for frame in of_sample])
        ids = torch.from_numpy(last[list(columns.categoricals)].to_numpy(np.int64)) if columns.categoricals else None
        amounts = torch.from_numpy(last[list(columns.continuous)].to_numpy(np.float32)) if columns.continuous else None
        nobody = torch.zeros(len(samples), dtype=torch.int64)
        window = Window(self._shapes.history, self._shapes.slide)
        return batches.of_sequences(
            histories, window, nobody, {}, columns=kept, context=(ids, amounts)
        )  # fmt: skip

    def replay(self, samples: Sequence[Sample], shown: Mapping[str, Mapping[str, Any]]) -> list[Replayed]:
        """``shown``: rows of the log of impressions by id, one for each sample."""
        request, s = self.requests(samples), self._shapes
        inputs = [torch.from_numpy(x) for x in request.inputs(s, self._features.schema.exclude_seen)]
        with torch.no_grad():
            retrieved = self._retrieval(*inputs[: len(contract.retrieval_inputs(s))])
            ranked_RN, values_RCN = self._ranking(inputs[0], *retrieved, *inputs[s.passed_on :])
        found = []
        for row, sample in enumerate(samples):
            what = self._ids_apart(sample, request, row)
            verdict = IDS if what else SAME
            if not what:
                items, scores = self._names[ranked_RN[row].numpy()], values_RCN[row, 0].numpy()
                what = answer_apart(shown[sample.id], items, scores)
                verdict = ANSWER if what else SAME
            found.append(Replayed(sample.id, verdict, what))
        return found

    def _ids_apart(self, sample: Sample, request: batches.Requests, row: int) -> str:
        offline = [("history", sample.history_ids, [i for i in request.history_BT[row].tolist() if i])]
        if self._shapes.context and request.context_BC is not None:
            offline.append(("context", sample.context_ids, request.context_BC[row].tolist()))
        for name, live, ids in offline:
            if list(live) != list(ids):
                place = next((i for i, (a, b) in enumerate(zip(live, ids, strict=False)) if a != b), len(ids))
                return f"{name}, place {place}: served {live[place : place + 3]}, NVTabular {ids[place : place + 3]}"
        if self._shapes.amounts and request.amount_BF is not None:
            apart = np.abs(np.array(sample.amounts, np.float32) - request.amount_BF[row].numpy())
            if apart.max(initial=0) > APART:
                return f"context, amounts: served {sample.amounts}, NVTabular {request.amount_BF[row].tolist()}"
        return ""


def answer_apart(shown: Mapping[str, Any], items: np.ndarray, scores: np.ndarray) -> str:
    """Where an answer of the log differs from ``items`` and ``scores`` [N], best first, in words; "" where it does not:
    each item has its offline score, and each place the offline place's. Places that were explored are not compared."""
    of_item = dict(zip(items.tolist(), scores.tolist(), strict=True))
    for place, (item, score) in enumerate(zip(shown[ITEMS], shown[SCORES], strict=True)):
        if shown[PROPENSITIES][place] < EXPLORED:
            continue
        offline = f"offline {items[place]} {scores[place]:.4f}" if place < len(items) else "offline nothing"
        expected = (of_item.get(item, np.inf), scores[place] if place < len(items) else np.inf)
        if max(abs(score - e) for e in expected) > APART:
            return f"place {place + 1}: served {item} {score:.4f}, {offline}"
    return ""


EXPLORED = 0.5  # a propensity below it is of a place that was explored


def replayable(sample: Sample, shown: Mapping[str, Any] | None) -> bool:
    """Whether the offline path knows all that the answer was computed from: no live change of the catalogue, nothing
    left out for load, no store that did not answer, no business rule that changed it."""
    reasons = ("load: ", "store: ", contract.STATUS_RULES)
    return shown is not None and not sample.changes and not any(reason in shown[STATUS] for reason in reasons)


# -- the samples of a run ----------------------------------------------------------------------------------
WAIT_S = 600.0  # for the log of impressions, which is written after the sample
AT_ONCE, EXAMPLES = 64, 5


@dataclass
class Tally:
    """What became of samples since the first look: ``skipped`` are of another version, or hang on what is not known
    offline; ``examples`` of what differed, newest last. Kept beside the samples for whoever counts."""

    replayed: int = 0
    ids: int = 0
    answer: int = 0
    skipped: int = 0
    at_ms: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def skewed(self) -> int:
        return self.ids + self.answer

    @classmethod
    def load(cls, folder: Path) -> Tally:
        file = folder / RESULT
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def save(self, folder: Path) -> None:
        self.at_ms = int(time.time() * 1000)
        write_json(folder / RESULT, asdict(self))

    def add(self, replayed: Sequence[Replayed]) -> None:
        self.replayed += len(replayed)
        self.ids += sum(one.verdict == IDS for one in replayed)
        self.answer += sum(one.verdict == ANSWER for one in replayed)
        self.examples = [*self.examples, *(f"{r.id}: {r.what}" for r in replayed if r.what)][-EXAMPLES:]


def at_low_priority() -> None:
    """This process gives way to a server beside it, and takes one processor at most."""
    os.nice(19)
    torch.set_num_threads(1)


def check_comparable(run: Run) -> None:
    """Raises ValueError for a version whose answers differ from PyTorch's by design."""
    card, tensors = run.card(), run.shapes()
    if card["precision"] != "fp32" or card["tables"] != "fp32" or tensors.indexed or tensors.rising:
        raise ValueError(
            "parity: expected a version of float32 graphs that score every item, without live counters; int8, an index "
            "and counters answer otherwise than PyTorch by design: the quality gate and 'vivace evaluate' judge those"
        )


def look(run: Run, offline: Offline, tally: Tally) -> Tally:
    """Replays the samples of ``run`` whose answers are in the log of impressions, and removes them; the others wait for
    ``WAIT_S``. Writes and returns ``tally`` with what came of them."""
    impressions = impressions_of(run.feature_store)
    folder, version = folder_of(impressions), str(run.version())
    for path, samples in read(folder):
        shown = _shown(impressions, [sample.id for sample in samples])
        waits = [s for s in samples if s.id not in shown]
        young = path.stat().st_mtime > time.time() - WAIT_S
        known = [s for s in samples if s.id in shown]
        chosen = [s for s in known if s.version == version and replayable(s, shown[s.id])]
        for start in range(0, len(chosen), AT_ONCE):
            tally.add(offline.replay(chosen[start : start + AT_ONCE], shown))
        tally.skipped += len(known) - len(chosen) + (0 if young else len(waits))
        if waits and young:
            modified = path.stat().st_mtime
            write(path, waits)
            os.utime(path, (modified, modified))  # they are as old as they were
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    tally.save(folder)
    return tally


def _shown(impressions: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of the log by id, of those that are there."""
    columns = [REQUEST_ID, ITEMS, SCORES, PROPENSITIES, STATUS]
    tables = [pq.read_table(p, columns=columns, filters=[(REQUEST_ID, "in", list(ids))]) for p in parts(impressions)]
    return {row[REQUEST_ID]: row for table in tables for row in table.to_pylist()}
