"""What exploration costs: NDCG@10 of a run's test requests with and without, and the time of a request's step.

    python -m benchmarks.explore artifacts/shop [--share .02] [--turns 20]

Every test request that was recorded is answered once by the published graphs; then each turn explores the same answers
anew. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from preprocessing.requests import recorded, requests_of
from serving.runtime.explore import COUNTS_FILE, FEW, Explorer
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from vivace.contract import RESPONSE
from vivace.manifest import commit
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

TOP_K, BATCH, SEED = 10, 64, 7


def ndcg(ids_BN: np.ndarray, target_B: np.ndarray) -> float:
    """NDCG@10 of one target a request."""
    hit_BK = ids_BN[:, :TOP_K] == target_B[:, None]
    return float((hit_BK / np.log2(np.arange(TOP_K) + 2)).sum(1).mean())


def main(
    root: Path,
    share: Annotated[float, typer.Option(help="of the places")] = 0.02,
    turns: Annotated[int, typer.Option(help="times that the same answers are explored")] = 20,
) -> None:
    run = Run(root)
    store = LmdbStore(run.feature_store, readonly=True)
    pipeline = Pipeline.published(root, store)
    requests = requests_of(recorded(root))
    rows = [Row("", r.items, TOP_K, types=tuple(r.types) if r.types else None, context=r.context) for r in requests]
    answers = [pipeline(rows[start : start + BATCH])[0] for start in range(0, len(rows), BATCH)]
    ids_BN, values_BCN = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    target_B = pipeline.transform.item_ids([r.target for r in requests])
    counts = np.load(run.repository / RESPONSE / str(run.version()) / COUNTS_FILE)
    explorer = Explorer(share, counts >= FEW, np.random.default_rng(SEED))
    top_k_B, may_B = np.full(len(ids_BN), TOP_K), [True] * len(ids_BN)
    before, after, explored, seconds = ndcg(ids_BN, target_B), [], [], []
    for _ in range(turns):
        began = time.perf_counter()
        shown, _, propensity_BN = explorer(ids_BN, values_BCN, top_k_B, may_B)
        seconds.append((time.perf_counter() - began) / len(ids_BN))
        after.append(ndcg(shown, target_B))
        explored.append(float((shown[:, :TOP_K] != ids_BN[:, :TOP_K]).mean()))
    single = []
    for row in range(min(2000, len(ids_BN))):
        began = time.perf_counter()
        explorer(ids_BN[row : row + 1], values_BCN[row : row + 1], top_k_B[:1], may_B[:1])
        single.append(time.perf_counter() - began)
    print(json.dumps({
        "requests": len(ids_BN), "share": share, "turns": turns, "commit": commit(),
        "new items": int((counts[3:] < FEW).sum()), "items": len(counts) - 3,
        "rows with a new item behind the first ten": float((propensity_BN[:, :TOP_K] < 1).any(1).mean()),
        "places explored": statistics.mean(explored), "NDCG@10": before,
        "NDCG@10 explored": statistics.mean(after), "lowest": min(after), "highest": max(after),
        "ratio": statistics.mean(after) / before,
        "microseconds a row of a batch": 1e6 * statistics.median(seconds),
        "microseconds a request": 1e6 * statistics.median(single),
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
