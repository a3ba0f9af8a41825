"""Builds the FAISS index of a trained retriever, finds the effort it needs, and refuses it if it finds too little.

It is asked with the states of real histories and with the vectors of items, the catalogue's odd ones first: those that
several items share, and the shortest. See ``serving.runtime.item_index``. Axis legend: B states, V item ids, D width,
N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.features import Features
from serving.runtime.encoded import OF_ITEMS, POPULAR
from serving.runtime.item_index import DISTANCES, PRODUCTS, Groups, ItemIndex, asking, with_bias
from training.compile.onnx_export import PARITY_REQUESTS, export
from training.data import batches
from training.judge.gate import GateError
from training.models.context import exportable
from training.models.int8_table import Int8Rows
from training.models.retrieval import RetrievalModel, read_inputs
from training.presets import Preset
from vivace.contract import FIRST_ID, MAX_SEEN, PADDING_ID
from vivace.onnx_session import open_session

RECALL = 0.98  # of the exact top N that an index must find for real histories to be published
ITEM_RECALL = 0.95  # and for the vectors of items
ITEM_QUERIES = 400
CHUNK = 64  # states that are scored against every item at a time
DEAR = 4  # efforts above so many times N are reason to try the other kind of graph
NEAR = 1e-5  # relative difference of scores that rounding makes


class EncoderGraph(nn.Module):
    """What is exported as ``encoder.onnx``: the inputs of retrieval without the exclusions to the encoded history;
    before it, where the context is read, the state that items are scored against, and, with ``rising`` items, their
    scores. ``int8``: the embeddings of histories are read from rows of one byte a number."""

    table_VD: Tensor | Int8Rows

    def __init__(self, model: RetrievalModel, memory: int = 0, int8: bool = False, rising: int = 0) -> None:
        super().__init__()
        self.model, self.memory, self.rising = exportable(model), memory, rising
        with torch.no_grad():
            table = model.table().detach().clone()
        if int8:
            self.table_VD = Int8Rows(table)
        else:
            self.register_buffer("table_VD", table)

    def forward(self, history_ids: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        times, types, context, rest = read_inputs(self.model, more)
        encoded: Tensor = self.model.encode(history_ids, self.table_VD, times, self.memory, types)
        state_BD = self.model.state(encoded[:, -1], context)
        states = [] if self.model.context is None else [state_BD]
        return (*states, *([self._scores(state_BD, rest[0])] if self.rising else []), encoded)

    def _scores(self, state_BD: Tensor, rising_BM: Tensor) -> Tensor:
        """Retrieval scores float32 [B, M] of some items, to the bit those of the graph that scores every item: the
        diagonal of all states against all of them. One state too many, as ONNX Runtime 1.32 sums a product of a single
        row in another order where the other matrix is no constant."""
        b, m = rising_BM.shape
        ids_P = rising_BM.reshape(-1)
        rows_PD = F.embedding(ids_P, self.table_VD) if isinstance(self.table_VD, Tensor) else self.table_VD(ids_P)
        states_QD = torch.cat([state_BD, state_BD[:1]])
        scores_BBM = F.linear(states_QD, rows_PD, self.model.bias[ids_P])[:b].reshape(b, b, m)
        own_B1M = torch.arange(b, device=ids_P.device)[:, None, None].expand(b, 1, m)
        return scores_BBM.gather(1, own_B1M).squeeze(1)


class Log1p(nn.Module):
    """Counts float32 [1, V] to the scores of a history without a known item."""

    def forward(self, counts: Tensor) -> Tensor:
        return torch.log1p(counts)


class Exact:
    """Every item's score: what an index is measured by. Items of equal scores stand for one another."""

    def __init__(self, table_VD: np.ndarray, bias_V: np.ndarray) -> None:
        self.rows = with_bias(table_VD, bias_V)

    def least(self, states_BD: np.ndarray, count: int) -> np.ndarray:
        """The score float32 [B] of each state's ``count``-th best item."""
        queries, out = asking(states_BD), []
        for start in range(0, len(queries), CHUNK):
            scores = queries[start : start + CHUNK] @ self.rows.T
            out.append(np.partition(scores, -count, axis=1)[:, -count])
        return np.concatenate(out)

    def recall(self, states_BD: np.ndarray, least_B: np.ndarray, ids_BN: np.ndarray) -> float:
        """Mean share of N that ``ids_BN`` has, each item once, of items as good as the N best. PADDING_ID is none."""
        shares = []
        for query, least, ids in zip(asking(states_BD), least_B, ids_BN, strict=True):
            real = np.unique(ids[ids != PADDING_ID])
            scores = self.rows[real - FIRST_ID] @ query
            shares.append((scores >= least - NEAR * (1 + abs(least))).sum() / len(ids))
        return float(np.mean(shares))


@dataclass(frozen=True)
class Probe:
    """Queries that an index must answer."""

    name: str
    states_BD: np.ndarray
    recall: float
    """The share of the exact best that it must find."""


@dataclass(frozen=True)
class Tuned:
    """The least effort that reaches the recall of every probe, what it reached of the worst, and what every effort
    tried reached, as a share of what was needed."""

    effort: int
    recall: float
    tried: dict[int, float]


def tune(index: ItemIndex, exact: Exact, probes: Sequence[Probe], count: int) -> Tuned:
    """Doubles ``index.effort`` from ``count`` on until it finds enough of the exact ``count`` best of each probe; the
    index keeps that effort. Raises GateError if looking at one item in 16 does not find them."""
    tried: dict[int, float] = {}
    least = [exact.least(probe.states_BD, count) for probe in probes]
    effort = count
    while True:
        index.effort = effort
        reached = [
            exact.recall(probe.states_BD, least_B, index.search(probe.states_BD, count)[0])
            for probe, least_B in zip(probes, least, strict=True)
        ]
        worst = min(range(len(probes)), key=lambda i: reached[i] / probes[i].recall)
        tried[effort] = reached[worst] / probes[worst].recall
        if tried[effort] >= 1:
            return Tuned(effort, reached[worst], tried)
        if effort >= max(index.index.ntotal // 16, 16 * count):
            raise GateError(
                f"index: not published: for {probes[worst].name} it finds {reached[worst]:.4f} of the exact candidates "
                f"at effort {effort} of {len(exact.rows):,} items, expected {probes[worst].recall}; take HNSW32 "
                "instead of eight-bit rows, or the exact search"
            )
        effort *= 2


def tuned_index(
    table_VD: np.ndarray, bias_V: np.ndarray, factory: str, exact: Exact, probes: Sequence[Probe], count: int
) -> tuple[ItemIndex, Tuned]:
    """An index that finds enough with the least effort, by inner products or by distances; the second is built where
    the first needs more than DEAR times ``count``. Raises GateError."""
    best: tuple[ItemIndex, Tuned] | None = None
    fault: GateError | None = None
    for by in (PRODUCTS, DISTANCES):
        index = ItemIndex.build(table_VD, bias_V, factory, by=by)
        try:
            tuned = tune(index, exact, probes, count)
        except GateError as error:
            fault = fault or error
            continue
        if best is None or tuned.effort < best[1].effort:
            best = index, tuned
        if tuned.effort <= DEAR * count:
            break
    if best is None:
        assert fault is not None
        raise fault
    return best


def item_states(table_VD: np.ndarray, states_BD: np.ndarray, count: int = ITEM_QUERIES, seed: int = 0) -> np.ndarray:
    """Vectors of items as long as the mean of ``states_BD``, float32 [<= count, D]: up to half of them of items that
    share theirs with others and of the shortest, the rest of any. Vectors of length 0 ask for nothing."""
    rows = table_VD[FIRST_ID:]
    length = np.linalg.norm(rows, axis=1)
    groups, first = Groups.of(with_bias(table_VD, np.zeros(len(table_VD), np.float32)))
    shared = first[np.argsort(-np.diff(groups.starts), kind="stable")][: count // 4]
    shortest = np.argsort(length, kind="stable")
    shortest = shortest[length[shortest] > 0][: count // 4]
    any_other = np.random.default_rng(seed).permutation(len(rows))[: count - len(shared) - len(shortest)]
    chosen = np.unique(np.concatenate([shared, shortest, any_other]))
    chosen = chosen[length[chosen] > 0]
    unit = rows[chosen] / length[chosen, None]
    return np.asarray(unit * np.linalg.norm(states_BD, axis=1).mean(), np.float32)


def validation_states(features: Features, preset: Preset, model: RetrievalModel, count: int = 1000) -> Tensor:
    """Encoded states float32 [<= count, D] of validation requests."""
    heads, parts = [h.name for h in features.schema.heads], list[Tensor]()
    with torch.no_grad():
        for request in batches.requests(features.files("valid"), heads, preset.encoder.window, PARITY_REQUESTS):
            encoded = model.encode(request.history_BT, times=request.time_BT, types=request.type_BT)[:, -1]
            parts.append(model.state(encoded, request.context))
            if sum(map(len, parts)) >= count:
                break
    return torch.cat(parts)[:count]


def write_popular(model: RetrievalModel, count: int, folder: Path, rising: int = 0) -> None:
    """Writes POPULAR: so many that ``count`` are left whatever was seen and is rising; scores as the exact graph gives
    them, with ``rising`` items those of all."""
    graph = folder / "log1p.onnx"
    export(Log1p(), (model.popularity.cpu()[None],), ["COUNTS"], ["SCORES"], graph)  # rounds otherwise than torch
    popularity = open_session(graph).run(None, {"COUNTS": model.popularity.cpu()[None].numpy()})[0][0].copy()
    graph.unlink()
    popularity[:FIRST_ID] = -np.inf
    best = np.argsort(-popularity, kind="stable")[: min(count + MAX_SEEN + rising, len(popularity) - FIRST_ID)]
    every = {OF_ITEMS: popularity.astype(np.float32)} if rising else {}
    np.savez(folder / POPULAR, ids=best.astype(np.int64), scores=popularity[best].astype(np.float32), **every)


def build_index(
    model: RetrievalModel, states_BD: Tensor, count: int, factory: str, folder: Path, least: float = RECALL,
    rising: int = 0,
) -> Tuned:  # fmt: skip
    """Writes the index and POPULAR into ``folder``: the index of ``model``'s items with the least effort that finds
    ``least`` of the exact ``count`` best for half of ``states_BD``, and ITEM_RECALL for vectors of items; ``recall`` is
    that of the other half. ``rising``: items that join what it finds. Raises GateError."""
    with torch.no_grad():
        table, bias = model.table().detach().cpu().numpy(), model.bias.detach().cpu().numpy()
    exact, states = Exact(table, bias), states_BD.numpy()
    half = len(states) // 2
    probes = [
        Probe("real histories", states[:half], least),
        Probe("vectors of items", item_states(table, states), ITEM_RECALL),
    ]
    index, tuned = tuned_index(table, bias, factory, exact, probes, count)
    index.save(folder)
    write_popular(model, count, folder, rising)
    rest = states[half:]
    held_out = exact.recall(rest, exact.least(rest, count), index.search(rest, count)[0])
    return Tuned(tuned.effort, held_out, tuned.tried)
