"""The quality gate: an engine whose ranking quality fell by more than the bound is not published.

Quality is NDCG@10 of the graphs themselves, as they will be served; the fall is measured request by request against
the uncompressed PyTorch models, so its interval is that of the difference. Both answer validation requests: an engine
is chosen by them, so that the test requests, which ``vivace evaluate`` reports, stay unseen by every choice.

The ranker was trained on the validation events of all users but a held-out share. Two engines of the same weights know
them alike, so all of them judge; a variant that was trained anew may know them better or worse than its reference
does, so there only users judge that were held out of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from preprocessing.features import Features
from training.data import batches
from training.data.live import with_live
from training.judge.evaluate import RANKED, VALIDATION_RANKS
from training.learn.ranker import held_out_users
from training.metrics import MISS, bootstrap, ndcg_of, ranks_after
from vivace import contract
from vivace.run import EVALUATION, RANKING, Run

BOUND = 0.01  # relative fall of NDCG@10 that is let through
BATCH = 64
ALL_USERS = "validation requests"
HELD_OUT_USERS = "validation requests of users held out of the ranker's training"


class GateError(ValueError):
    """An engine was refused."""


@dataclass(frozen=True)
class Verdict:
    """NDCG@10 of the engine and of its reference, the relative change with its 95 % interval over requests, and
    whether the fall is within ``bound``. ``split``: which requests judged."""

    reference: float
    engine: float
    change: float
    interval: tuple[float, float]
    bound: float
    requests: int
    split: str
    forced: bool = False

    @property
    def passed(self) -> bool:
        return self.change >= -self.bound

    @property
    def few(self) -> bool:
        """Whether chance alone moves the change by more than the bound."""
        return not self.interval[1] - self.interval[0] <= 2 * self.bound

    def record(self) -> dict[str, Any]:
        """For model card and metadata."""
        return {**asdict(self), "passed": self.passed, "few_requests": self.few}

    def sentence(self) -> str:
        few = f": few, chance alone moves them by more than {self.bound:.1%}" if self.few else ""
        return (
            f"NDCG@10 {self.engine:.4f} against {self.reference:.4f}: {self.change:+.2%} "
            f"({self.interval[0]:+.2%} to {self.interval[1]:+.2%}) on {self.requests:,} {self.split}{few}"
        )

    def refusal(self) -> str:
        """Why it was not published, whether that may be chance, and what to do."""
        if not self.reference:
            loss = "the reference itself ranks no target among its first ten, so nothing can be compared"
        elif self.interval[1] < -self.bound:
            loss = f"the loss is beyond noise: the whole interval lies below -{self.bound:.1%}"
        elif self.interval[1] < 0:
            loss = f"a loss is beyond noise, but not that it is above {self.bound:.1%}: the interval reaches over it"
        else:
            loss = "the loss is within noise: the interval holds 0"
        return (
            f"quality gate: not published: {self.sentence()}; at most {self.bound:.1%} may be lost; {loss}. Leave more "
            "of the model (vivace compress), train the recovery longer (--epochs), keep it in float32 (--precision "
            "fp32), let more through (--bound), or publish it as it is (--force)"
        )


def judge(
    reference_ranks: np.ndarray,
    engine_ranks: np.ndarray,
    bound: float = BOUND,
    forced: bool = False,
    split: str = ALL_USERS,
) -> Verdict:
    """Compares ranks (from 0) of the same requests' targets. Raises GateError if the fall exceeds ``bound``, unless
    ``forced``; ValueError where there is no request, or not the same number."""
    if len(reference_ranks) != len(engine_ranks):
        raise ValueError(
            f"gate: expected the same requests, got {len(reference_ranks)} of the reference and {len(engine_ranks)} of "
            "the engine; evaluate the reference on the same features"
        )
    if not len(engine_ranks):
        raise ValueError(
            f"gate: expected {split}, got none; prepare with a validation part, and train with ranking.held_out above 0"
        )
    before, after = ndcg_of(reference_ranks), ndcg_of(engine_ranks)
    mean = float(before.mean()) or np.nan  # relative to nothing there is no change
    low, high = bootstrap(after - before)
    verdict = Verdict(
        float(before.mean()), float(after.mean()), float((after - before).mean()) / mean, (low / mean, high / mean),
        bound, len(after), split, forced,
    )  # fmt: skip
    if not verdict.passed and not forced:
        raise GateError(verdict.refusal())
    return verdict


def graph_ranks(
    features: Features,
    tensors: contract.StageTensors,
    answer: Callable[[list[np.ndarray]], Sequence[np.ndarray]],
    part: str = "valid",
) -> np.ndarray:
    """Rank of every request's target, int64, in what ``answer(inputs of retrieval)`` returns: ids int64 [B, N] and
    values float32 [B, C, N], of which row 0 orders; MISS where it is not among them. Ties as in ``metrics``; which of
    equal candidates the retrieval picked is as it is served."""
    heads = [h.name for h in features.schema.heads]
    parts = []
    requests = batches.requests(features.files(part), heads, tensors.history, BATCH)
    for request in with_live(requests, features, part, tensors):
        ids_BN, values_BCN, *_ = answer(request.inputs(tensors, features.schema.exclude_seen))
        known_B = request.target_B >= contract.FIRST_ID
        hit_B = torch.from_numpy(ids_BN == request.target_B.numpy()[:, None]).any(1) & known_B
        before_B = torch.where(hit_B, 0, MISS)
        scores_BN = torch.from_numpy(values_BCN[:, 0])
        ids = torch.from_numpy(ids_BN)
        parts.append(ranks_after(scores_BN, ids, request.target_B, before_B, request.number_B).numpy())
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def reference_ranks(run: Run) -> np.ndarray:
    """Ranks of retrieval + ranking for validation requests that ``vivace evaluate`` wrote. Raises StaleError where it
    wrote them for other models than those there are now."""
    run.manifest(EVALUATION)
    with np.load(run.evaluation / VALIDATION_RANKS) as saved:
        ranks: np.ndarray = saved[RANKED]
    return ranks


def held_out_requests(features: Features, runs: Sequence[Run]) -> np.ndarray:
    """bool, for each validation request: whether its user was held out of every one of ``runs``' rankers."""
    trained = [run.manifest(RANKING) for run in runs]
    heads = [h.name for h in features.schema.heads]
    parts = []
    for request in batches.requests(features.files("valid"), heads, 1, BATCH):
        masks = [held_out_users(request, m["config"]["training"]["held_out"], m["seed"]) for m in trained]
        parts.append(np.logical_and.reduce(masks))
    return np.concatenate(parts) if parts else np.empty(0, bool)


def judge_engine(
    features: Features,
    tensors: contract.StageTensors,
    answer: Callable[[list[np.ndarray]], Sequence[np.ndarray]],
    run: Run,
    reference: Run,
    bound: float = BOUND,
    forced: bool = False,
    before: np.ndarray | None = None,
) -> Verdict:
    """Judges the graphs ``answer`` of ``run`` against the evaluated ``reference``, on all validation requests if that
    is the same run. ``before``: ranks to compare with in place of the evaluated ones, as of a final fit. Raises
    GateError."""
    before = reference_ranks(reference) if before is None else before
    after = graph_ranks(features, tensors, answer)
    if reference == run:
        return judge(before, after, bound, forced, ALL_USERS)
    held_out = held_out_requests(features, (run, reference))
    return judge(before[held_out], after[held_out], bound, forced, HELD_OUT_USERS)
