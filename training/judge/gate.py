"""The quality gate: an engine whose ranking quality fell by more than the bound is not published.

Quality is NDCG@10 of the graphs themselves, as they will be served, on the test requests; the fall is measured request
by request against the uncompressed PyTorch models, so its interval is that of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features import Features
from training.data import batches as data
from training.metrics import MISS, bootstrap, ndcg_of
from vivace import contract

BOUND = 0.01  # relative fall of NDCG@10 that is let through
BATCH = 64


class GateError(ValueError):
    """An engine was refused."""


@dataclass(frozen=True)
class Verdict:
    """NDCG@10 of the engine and of its reference, the relative change with its 95 % interval over requests, and
    whether the fall is within ``bound``."""

    reference: float
    engine: float
    change: float
    interval: tuple[float, float]
    bound: float
    requests: int
    forced: bool = False

    @property
    def passed(self) -> bool:
        return self.change >= -self.bound

    def record(self) -> dict[str, Any]:
        """For model card and metadata."""
        return {**asdict(self), "passed": self.passed}

    def sentence(self) -> str:
        return (
            f"NDCG@10 {self.engine:.4f} against {self.reference:.4f}: {self.change:+.2%} "
            f"({self.interval[0]:+.2%} to {self.interval[1]:+.2%}) on {self.requests:,} requests"
        )


def judge(reference_ranks: np.ndarray, engine_ranks: np.ndarray, bound: float = BOUND, forced: bool = False) -> Verdict:
    """Compares ranks (from 0) of the same requests' targets. Raises GateError if the fall exceeds ``bound``, unless
    ``forced``."""
    if len(reference_ranks) != len(engine_ranks) or not len(engine_ranks):
        raise ValueError(
            f"gate: expected the same requests, got {len(reference_ranks)} of the reference and {len(engine_ranks)} of "
            "the engine; evaluate the reference on the same features"
        )
    before, after = ndcg_of(reference_ranks), ndcg_of(engine_ranks)
    mean = max(float(before.mean()), 1e-12)
    low, high = bootstrap(after - before)
    verdict = Verdict(
        float(before.mean()), float(after.mean()), float((after - before).mean()) / mean, (low / mean, high / mean),
        bound, len(after), forced,
    )  # fmt: skip
    if not verdict.passed and not forced:
        raise GateError(
            f"quality gate: not published: {verdict.sentence()}; at most {bound:.1%} may be lost. Leave more of the "
            "model, train the recovery longer, keep sensitive layers in float32, or publish it with --force"
        )
    return verdict


def graph_ranks(
    features: Features, s: contract.StageTensors, answer: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Rank of every test request's target among the ids int64 [B, N] that ``answer(inputs of retrieval)`` ranks best
    first; MISS where it is not among them."""
    heads = [h.name for h in features.schema.heads]
    out = []
    for request in data.requests(features.files("test"), heads, s.history, BATCH):
        inputs = request.inputs(s, features.schema.exclude_seen)
        hit_BN = answer(inputs) == request.target_B.numpy()[:, None]
        hit_BN &= (request.target_B.numpy() >= contract.FIRST_ID)[:, None]
        out.append(np.where(hit_BN.any(1), hit_BN.argmax(1), MISS))
    return np.concatenate(out)


def reference_ranks(evaluation: Path) -> np.ndarray:
    """Ranks of retrieval + ranking that ``vivace evaluate`` wrote."""
    from training.judge.evaluate import RANKED, RANKS
    from vivace.manifest import read_manifest

    read_manifest(evaluation, "vivace evaluate")
    with np.load(evaluation / RANKS) as saved:
        found: np.ndarray = saved[RANKED]
    return found
