"""The served answers against the evaluated ones: PyTorch on NVTabular's parquet, then the live ensemble.

    python -m benchmarks.parity --name ml-1m-benchmark --users 500

Starts the server, asks for held-out users by their raw histories, compares items, order, scores and NDCG@10. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks.answers import NO_CLOCK, agreement
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from preprocessing.features import Features
from preprocessing.requests import OUT_OF_VOCABULARY
from serving.service import service
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.metrics import MISS, metrics
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph
from training.presets import Preset, shapes
from vivace import contract
from vivace.client import AsyncVivaceClient, Recommendation
from vivace.run import Run

CONCURRENCY = 32


@dataclass(frozen=True)
class Offline:
    """Evaluated answers: raw histories and targets, item names [users][N] and scores [users, N], best first."""

    requests: batches.Requests
    histories: list[list[str]]
    targets: list[str]
    ranked: np.ndarray
    scores: np.ndarray


def offline_answers(features: Features, preset: Preset, root: Path, users: int) -> Offline:
    """The first ``users`` test requests through PyTorch."""
    retriever, ranker = load_retrieval(features, preset, root).cpu(), load_ranker(features, preset, root).cpu()
    names = np.array(["", OUT_OF_VOCABULARY, OUT_OF_VOCABULARY, *features.items()[contract.ITEM]], object)
    heads = [h.name for h in features.schema.heads]
    request = next(iter(batches.requests(features.files("test"), heads, preset.encoder.window, users)))
    timeless = torch.zeros_like(request.time_BT)  # the same requests are served without times, types and context
    request = replace(request, time_BT=timeless, type_BT=None, context_BC=None, amount_BF=None)
    s = shapes(preset, features)
    inputs = [torch.from_numpy(x) for x in request.inputs(s, features.schema.exclude_seen)]
    graph = RetrievalGraph(retriever, s.candidates, s.memory)
    with torch.no_grad():
        ranked, values = RankingGraph(ranker)(inputs[0], *graph(*inputs), *inputs[s.passed_on :])
    return Offline(
        request,
        [names[h].tolist() for h in request.histories],
        names[request.target_B.numpy()].tolist(),
        names[ranked.numpy()],
        values[:, 0].numpy(),
    )


def served_answers(url: str, histories: list[list[str]]) -> list[Recommendation]:
    """The same histories through the live ensemble, many at once; a run without a clock says so in STATUS."""

    async def ask() -> list[Recommendation]:
        limit = asyncio.Semaphore(CONCURRENCY)
        async with AsyncVivaceClient(url) as client:

            async def one(history: list[str]) -> Recommendation:
                async with limit:
                    return await client.recommend("", history, contract.MAX_TOP_K, context=NO_CLOCK)

            return await asyncio.gather(*(one(h) for h in histories))

    return asyncio.run(ask())


def compare(offline: Offline, answers: list[Recommendation]) -> dict[str, Any]:
    """How the answers differ: rows equal in order, places that differ (tied or not), score difference, NDCG@10."""
    expected, furthest = [], 0.0
    for row, answer in enumerate(answers):
        items = [i for i in offline.ranked[row].tolist() if i][: contract.MAX_TOP_K]
        scores = offline.scores[row][: len(items)]
        expected.append((items, scores))
        if len(answer.items) == len(items):
            furthest = max(furthest, float(np.abs(answer.scores - scores).max(initial=0.0)))
    same = agreement(expected, [a.items for a in answers], contract.MAX_TOP_K)

    def ndcg(lists: list[list[str]]) -> float:
        rank = [i.index(t) if t in i else MISS for i, t in zip(lists, offline.targets, strict=True)]
        return metrics(np.array(rank))["NDCG@10"]

    return {
        "users": len(answers),
        "rows_equal": same.answers_equal,
        "places_tied": same.places_tied,
        "places_wrong": same.places_wrong,
        "largest_score_difference": furthest,
        "ndcg@10_offline": ndcg([r.tolist() for r in offline.ranked]),
        "ndcg@10_served": ndcg([a.items for a in answers]),
    }


def main(name: str = "shop", artifacts: Path = Path("artifacts"), preset: str = "", users: int = 500) -> None:
    from vivace.cli.options import chosen_preset

    root = artifacts / name
    offline = offline_answers(Features(Run(root).features), chosen_preset(preset, root), root, users)
    with service(on_free_ports(Run(root).repository, log=Run(root).server_log), print) as (server, _):
        answers = served_answers(grpc_address(server), offline.histories)
    print(record_line("served against evaluated", data=name, **compare(offline, answers)))


if __name__ == "__main__":
    typer.run(main)
