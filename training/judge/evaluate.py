"""``vivace evaluate``: baselines, retriever, ranker and controls in one table, by full ranking of the test requests.

It ranks the validation requests too: engines are chosen by those (``gate``), never by the test.
Axis legend: B requests, V item ids, N candidates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from preprocessing.features import Features
from preprocessing.sequences import WHOLE
from training.checkpoints import device, load_ranker, load_retrieval
from training.data import batches
from training.data.counters import follower_matrix, popularity
from training.data.live import with_live
from training.judge.session_neighbours import SESSIONS, SessionNeighbours
from training.judge.tables import plot_reliability
from training.learn.ranker import head_auc, without_padding
from training.metrics import Collected, ranks, ranks_after
from training.models.ranking import RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import Preset, shapes
from training.scoring import SCORED, behind_rising, candidates
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.manifest import Progress, Step, write_json
from vivace.run import CONTROL as CONTROL_STEP, FEATURES, FINAL, RANKING, RETRIEVAL as RETRIEVAL_STEP, Run

RANKS = "ranks.npz"  # rank of every test request's target by method
VALIDATION_RANKS = "validation_ranks.npz"  # the same of the validation requests, of the models alone
LAYOUT = 2  # of these files: an evaluation of another layout is made again
RISING_LAYOUT = 2  # the same, of a ranker with live counters
POPULARITY, NEIGHBOUR = "popularity", "last-item neighbour"
RETRIEVAL, RANKED, CONTROL = "retrieval", "retrieval + ranking", "control: ranker without the extra label"
FINAL_FIT = "final fit: "  # before the name of a row whose models and counts have learned from all of the log
WITHOUT_TIMES = ", HISTORY without times"  # what a request that carries its own HISTORY gets of an encoder with times


def protocol(features: Features) -> dict[str, Any]:
    """The choices that move figures more than most models do."""
    prepared = Run(features.folder.parent, features.folder).manifest(FEATURES)
    return {
        "split": prepared["results"]["split"],
        "candidates ranked": f"all {features.item_count() - FIRST_ID} items of the vocabulary",
        "seen items": "filtered" if features.schema.exclude_seen else "not filtered",
        "ties": "broken at random, seeded by the request",
        "validation event": "label of the ranker only; input of both at test time",
        "targets out of vocabulary": "counted as misses",
        "sampled metrics": "none",
    }


@dataclass(frozen=True)
class Candidates:
    """What a retriever proposes for a batch: ranks of the targets int64 [B], ids int64 and scores float32 [B, N],
    encoded histories [B, memory, D]."""

    rank_B: Tensor
    ids_BN: Tensor
    scores_BN: Tensor
    encoded_BMD: Tensor


class Baselines:
    """Popularity, what most often came after the last item (popularity breaks its ties), and of a log of sessions what
    the nearest ones hold."""

    def __init__(self, features: Features, part: str = "train") -> None:
        """``part`` of the features that is counted."""
        files, items = features.files(part), features.item_count()
        self.sessions = SessionNeighbours(files, items) if features.schema.sessions else None
        self.exclude_seen = features.schema.exclude_seen
        self.counts_V = torch.tensor(popularity(files, items), dtype=torch.float32)
        self.followers_VV: sp.csr_matrix = follower_matrix(files, items)

    def scores(self, request: batches.Requests) -> dict[str, Tensor]:
        """Scores float32 [B, V] by method, under the same exclusions as the models'."""
        excluded_BV = request.exclude(len(self.counts_V), self.exclude_seen)
        popular_BV = self.counts_V[None].expand(len(request.histories), -1)
        last = np.array([int(h[-1]) for h in request.histories])
        near_BV = torch.from_numpy(np.asarray(self.followers_VV[last].todense(), np.float32)) + popular_BV * 1e-9
        scores = {POPULARITY: popular_BV, NEIGHBOUR: near_BV}
        if self.sessions is not None:
            scores[SESSIONS] = torch.from_numpy(self.sessions.scores(request.histories))
        return {
            name: torch.where(excluded_BV, torch.full_like(scores_BV, EXCLUDED), scores_BV)
            for name, scores_BV in scores.items()
        }


def brings_test(features: Features) -> bool:
    """Whether the test requests came with the log as a set of their own, which no fit has learned from."""
    return bool(Run(features.folder.parent, features.folder).manifest(FEATURES)["results"].get("given_test"))


class Models:
    """A run's retriever and rankers, by the names of their steps. ``final``: as fitted again on all events of the log,
    of which they can say nothing any more; an engine made of them is compared with them. ``loaded``: retriever and
    ranker in the place of those on disk."""

    def __init__(
        self,
        features: Features,
        preset: Preset,
        root: Path,
        rankers: list[str],
        final: bool = False,
        loaded: tuple[RetrievalModel, RankingModel] | None = None,
    ) -> None:
        self.features, self.preset, self.final = features, preset, final
        self.heads = [head.name for head in features.schema.heads]
        self.count = min(preset.ranker.candidates, features.item_count() - FIRST_ID)
        if loaded is not None:
            self.retriever, self.rankers = loaded[0], {RANKING: loaded[1]}
            return
        self.retriever = load_retrieval(features, preset, root, final)
        self.rankers = {name: load_ranker(features, preset, root, name, final) for name in rankers}

    @property
    def ranker(self) -> RankingModel:
        return self.rankers[RANKING]

    def requests(self, part: str) -> Iterator[batches.Requests]:
        """Raises ValueError for test requests that a final fit has learned from."""
        if self.final and part == "test" and not brings_test(self.features):
            raise ValueError(
                "evaluate: the final fit has learned from these test requests; judge the models of 'vivace train', or "
                "prepare a log that brings a test set of its own"
            )
        requests = batches.requests(self.features.files(part), self.heads, self.preset.encoder.window, SCORED)
        return with_live(requests, self.features, part, shapes(self.preset, self.features))

    def retrieve(self, request: batches.Requests) -> Candidates:
        exclude_seen = self.features.schema.exclude_seen
        return Candidates(*candidates(self.retriever, request, self.count, exclude_seen, self.preset.ranker.memory))

    def logits(self, request: batches.Requests, proposed: Candidates, name: str = RANKING) -> Tensor:
        """Logits float32 [B, N, heads] of a ranker for the candidates."""
        history_BT = request.history_BT.to(proposed.ids_BN.device)
        with torch.no_grad():
            more = (x.to(history_BT.device) for x in request.read_by(self.retriever))
            logits: Tensor = self.rankers[name](
                history_BT, proposed.ids_BN, proposed.scores_BN, proposed.encoded_BMD, *more
            )
        return logits

    def ranked(self, request: batches.Requests, proposed: Candidates, logits_BNH: Tensor) -> Tensor:
        """Ranks of the targets int64 [B] when the first head's logits order the candidates."""
        ids_BN = proposed.ids_BN
        target_B = request.target_B.to(ids_BN.device)
        before_B = behind_rising(proposed.rank_B, request)
        return ranks_after(
            without_padding(logits_BNH[..., 0], ids_BN != PADDING_ID), ids_BN, target_B, before_B, request.number_B
        )


def _add_heads(collected: Collected, models: Models, request: batches.Requests, ids_BN: Tensor, logits: Tensor) -> None:
    """Adds calibration and AUC of each task head within the candidates."""
    hit_BN, there_BN = ids_BN == request.target_B.to(ids_BN.device)[:, None], ids_BN != PADDING_ID
    probability_BNH = models.ranker.probabilities(logits)
    for number, head in enumerate(models.heads):
        label_B = request.labels[head].to(ids_BN.device)
        labelled_BN = hit_BN & (label_B[:, None] > 0)
        collected.add_calibration(head, probability_BNH[..., number][there_BN], labelled_BN[there_BN])
        collected.add_auc(head, head_auc(logits[..., number], hit_BN, label_B, there_BN))


def _rank_test(models: Models, baselines: Baselines, say: Progress) -> tuple[Collected, int, int]:
    """(everything about the test requests, how many there are, how many targets are out of vocabulary)."""
    labels = {RANKING: RANKED, CONTROL_STEP: CONTROL}
    collected, done, unknown = Collected(), 0, 0
    for request in models.requests("test"):
        for method, scores_BV in baselines.scores(request).items():
            collected.add_ranks(method, ranks(scores_BV, request.target_B, request.number_B))
        proposed = models.retrieve(request)
        collected.add_ranks(RETRIEVAL, proposed.rank_B)
        for name in models.rankers:
            logits = models.logits(request, proposed, name)
            collected.add_ranks(labels[name], models.ranked(request, proposed, logits))
            if name == RANKING:
                _add_heads(collected, models, request, proposed.ids_BN, logits)
        if models.preset.encoder.time_bias:
            timeless = replace(request, time_BT=torch.zeros_like(request.time_BT))
            proposed = models.retrieve(timeless)
            collected.add_ranks(RETRIEVAL + WITHOUT_TIMES, proposed.rank_B)
            ranked_B = models.ranked(timeless, proposed, models.logits(timeless, proposed))
            collected.add_ranks(RANKED + WITHOUT_TIMES, ranked_B)
        done += len(request.target_B)
        unknown += int((request.target_B < FIRST_ID).sum())
        say(f"ranked {done:,} test requests")
    return collected, done, unknown


def _rank_final(models: Models, baselines: Baselines, say: Progress) -> Collected:
    """Ranks of the test requests by the final fit, and by baselines that counted as much."""
    collected, done = Collected(), 0
    for request in models.requests("test"):
        for method, scores_BV in baselines.scores(request).items():
            collected.add_ranks(FINAL_FIT + method, ranks(scores_BV, request.target_B, request.number_B))
        proposed = models.retrieve(request)
        collected.add_ranks(FINAL_FIT + RETRIEVAL, proposed.rank_B)
        ranked_B = models.ranked(request, proposed, models.logits(request, proposed))
        collected.add_ranks(FINAL_FIT + RANKED, ranked_B)
        done += len(request.target_B)
        say(f"ranked {done:,} test requests by the final fit")
    return collected


def rank_validation(models: Models, say: Progress) -> dict[str, np.ndarray]:
    """Ranks of the validation requests' targets int64 by method, in the order of the requests."""
    collected, done = Collected(), 0
    for request in models.requests("valid"):
        proposed = models.retrieve(request)
        collected.add_ranks(RETRIEVAL, proposed.rank_B)
        collected.add_ranks(RANKED, models.ranked(request, proposed, models.logits(request, proposed)))
        done += len(request.target_B)
        say(f"ranked {done:,} validation requests")
    return collected.ranks() or {method: np.empty(0, np.int64) for method in (RETRIEVAL, RANKED)}


def evaluate(features: Features, preset: Preset, root: Path, seed: int, say: Progress) -> dict[str, Any]:
    """Runs the step unless its artifact is there; returns its manifest with ``results`` table, gauc and protocol.
    Raises StaleError where the models were made from other features.

    The models are those that ``vivace train`` left. Those of a final fit have rows of their own, where the test set
    came with the log; elsewhere they have learned from what would be asked."""
    run = Run(root, features.folder)
    rankers = [RANKING] + [CONTROL_STEP] * run.has(CONTROL_STEP)
    inputs = {name: run.key(name) for name in (RETRIEVAL_STEP, *rankers)}
    if final := run.has(FINAL) and brings_test(features):
        inputs[FINAL] = run.key(FINAL)
    settings = {"layout": LAYOUT} | ({"rising": RISING_LAYOUT} if preset.ranker.rising else {})
    step = Step(run.evaluation, "evaluate", settings, seed, inputs)
    if step.done():
        assert step.manifest is not None
        return step.manifest
    started = time.monotonic()
    step.reset()
    models = Models(features, preset, root, rankers)
    collected, done, unknown = _rank_test(models, Baselines(features), say)
    if not done:
        raise ValueError(
            f"evaluate: expected test requests in {features.folder}, found none: no user has a test event after "
            "training events; prepare more data, or with another split"
        )
    if final:
        of_final = Models(features, preset, root, [RANKING], final)
        collected.rank |= _rank_final(of_final, Baselines(features, WHOLE), say).rank
    table = collected.table()
    np.savez_compressed(step.folder / RANKS, **collected.ranks())
    np.savez_compressed(step.folder / VALIDATION_RANKS, **rank_validation(models, say))
    plot_reliability(collected.reliability(), step.folder / "reliability.png")
    manifest = step.finish(
        time.monotonic() - started, table=table, gauc=collected.gauc(), ece=collected.ece(),
        protocol=protocol(features), requests=done, targets_out_of_vocabulary=unknown, device=str(device()),
    )  # fmt: skip
    write_json(step.folder / "metrics.json", manifest["results"])
    return manifest
