"""``vivace evaluate --replay``: each test request is answered with what was known at its moment.

The requests are walked in order of time, beside the stream of all events: live counters know exactly the events
strictly before the moment of a request. The models are those of the run, as they are. "static + counters" adds what is
rising to the retriever's candidates and orders all by the ranker's first logit plus w x log1p(decayed count). As the
logit has learned what was popular in training, a second row takes log1p(training count) off it, and a third does so
without the logit: what the model itself brings. Weights and half-lives are chosen on validation requests, replayed the
same way.

Axis legend: B requests, V item ids, N candidates, M rising items, L half-lives.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from preprocessing.features import Features
from training.data import batches
from training.data.counters import popularity
from training.data.live import check_times
from training.judge.evaluate import RANKED, RETRIEVAL, Candidates, Models
from training.judge.replay_figures import Answers, figures, plot_by_hour
from training.learn.ranker import held_out_users
from training.metrics import ndcg_of, ranks, ranks_after
from training.models.retrieval import EXCLUDED, propose
from training.presets import Preset
from training.scoring import SCORED, scored
from vivace.contract import FIRST_ID, ITEM, PADDING_ID, TARGET_TIME, TIME
from vivace.counters import LiveCounts, WindowCounts
from vivace.manifest import Progress, environment, write_json
from vivace.run import RANKING, Run

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
WINDOWS = {
    "clicks of the last 30 min": 30 * MINUTE,
    "clicks of the last hour": HOUR,
    "clicks of the last 2 h": 2 * HOUR,
    "clicks of the last 6 h": 6 * HOUR,
}
LAST_HOUR = "clicks of the last hour"
HALF_LIVES = {"10 min": 10 * MINUTE, "30 min": 30 * MINUTE, "2 h": 2 * HOUR, "1 d": DAY}
TRAINED = "popularity of the training period"
COUNTED = "static + counters"
RENEWED = "static + counters - trained popularity"
MODELLESS = "counters - trained popularity, no model"
KNOWN_ITEMS = "retrieval + ranking, without new items"
REFRESHED, REFRESHED_COUNTED = "+ refresh", "+ refresh + counters"
UNSEEN_BIAS = 1e6  # taken off the score of an item without a training event: it comes behind all others
RISING = 100  # M: items of the live counter that join the retriever's candidates
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)  # w; the last is the counter alone
TAKEN_OFF = (0.5, 1.0, 1.5, 2.0)  # of the trained popularity, for a logit
TAKEN_OFF_COUNTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # and where the counter's weight is 1
LEAST_CHOOSING = 200  # validation requests of users whom the ranker did not train on; with fewer, all are used
SCORES = 1 << 22  # of one method held at once
FILE, PLOT = "replay.json", "replay.png"


@dataclass(frozen=True)
class Blend:
    """A score: ``model`` times the ranker's first logit, plus ``weight`` times log1p of the count that decays by
    ``half_life``, less ``taken_off`` times log1p of the training count."""

    half_life: str
    weight: float
    taken_off: float = 0.0
    model: float = 1.0


def blends() -> dict[str, list[Blend]]:
    """What is tried on validation requests, by row."""
    return {
        COUNTED: [Blend(h, w) for h in HALF_LIVES for w in WEIGHTS],
        RENEWED: [Blend(h, w, off) for h in HALF_LIVES for w in WEIGHTS for off in TAKEN_OFF],
        MODELLESS: [Blend(h, 1.0, off, 0.0) for h in HALF_LIVES for off in TAKEN_OFF_COUNTS],
    }


# -- requests and what is known at their moments -------------------------------------------------------
def by_moment(features: Features, models: Models, part: str) -> tuple[batches.Requests, np.ndarray]:
    """(the requests of a part of the split, their moments int64 in ms), in order of time. Numbers stay those of the
    files, so ties fall as in ``vivace evaluate``."""
    parts, files = list(models.requests(part)), features.files(part)
    if not parts:
        raise ValueError(
            f"replay: expected {part} requests in {features.folder}, found none; prepare more data, or with another "
            "split"
        )
    moments = np.concatenate([pq.read_table(f, columns=[TARGET_TIME])[TARGET_TIME].to_numpy() for f in files])
    whole = batches.together(parts)
    order = np.argsort(moments, kind="stable")
    return whole.take(order), moments[order]


class Present:
    """What counters know at moments that go forward: of the stream, exactly the events strictly before each."""

    def __init__(self, stream: dict[str, np.ndarray], items: int) -> None:
        self.ids, self.times = stream[ITEM], stream[TIME]
        self.live = LiveCounts(items, tuple(HALF_LIVES.values()))
        self.windows = {name: WindowCounts(items, width) for name, width in WINDOWS.items()}
        self._fed = 0

    def _feed(self, until_ms: int) -> None:
        stop = int(np.searchsorted(self.times, until_ms))
        for counts in (self.live, *self.windows.values()):
            counts.add(self.ids[self._fed : stop], self.times[self._fed : stop])
        self._fed = max(self._fed, stop)

    def decayed(self, moments: np.ndarray) -> dict[str, Tensor]:
        """Decayed counts float32 [B, V] by name of the half-life."""
        self._feed(int(moments[-1]))
        rows = [[self.live.every(int(now), h) for h in HALF_LIVES.values()] for now in moments]
        stacked = torch.from_numpy(np.array(rows, np.float32))
        return {name: stacked[:, i] for i, name in enumerate(HALF_LIVES)}

    def counted(self, moments: np.ndarray) -> dict[str, Tensor]:
        """Clicks float32 [B, V] by name of the window."""
        self._feed(int(moments[-1]))
        return {
            name: torch.from_numpy(np.array([window.every(int(now)) for now in moments], np.float32))
            for name, window in self.windows.items()
        }


def steps(requests: batches.Requests, moments: np.ndarray, items: int) -> Iterator[tuple[batches.Requests, np.ndarray]]:
    """The requests a few at a time, as many as memory for their scores of all items allows."""
    rows = min(SCORED, max(1, SCORES // items))
    for start in range(0, len(moments), rows):
        chosen = np.arange(start, min(start + rows, len(moments)))
        yield requests.take(chosen), moments[chosen]


# -- static models and counters together ---------------------------------------------------------------
@dataclass(frozen=True)
class Extended:
    """The retriever's candidates and what is rising: ids int64 [B, N + M], and of the same shape float32 the ranker's
    first logits, log1p of the decayed counts and log1p of the training counts; ``before_B``: ranks of targets that are
    not among them."""

    ids_BN: Tensor
    logit_BN: Tensor
    count_BN: Tensor
    trained_BN: Tensor
    before_B: Tensor

    def scores(self, blend: Blend) -> Tensor:
        """float32 [B, N + M]."""
        counters_BN = blend.weight * self.count_BN - blend.taken_off * self.trained_BN
        scores_BN = blend.model * self.logit_BN + counters_BN
        return torch.where(self.ids_BN == PADDING_ID, torch.full_like(scores_BN, EXCLUDED), scores_BN)

    def ranks(self, blend: Blend, request: batches.Requests) -> Tensor:
        """Ranks of the targets, int64 [B]."""
        target_B, number_B = request.target_B.to(self.ids_BN.device), request.number_B
        return ranks_after(self.scores(blend), self.ids_BN, target_B, self.before_B, number_B)


class Static:
    """The run's models at a few requests: scored once for all that is asked of them."""

    def __init__(self, models: Models, request: batches.Requests) -> None:
        self.models, self.request = models, request
        with torch.no_grad():
            rank_B, self.scores_BV, encoded = scored(models.retriever, request, models.features.schema.exclude_seen)
        ids_BN, top_BN = propose(self.scores_BV, models.count)
        self.proposed = Candidates(rank_B, ids_BN, top_BN, encoded[:, -models.preset.ranker.memory :])

    def extended(self, decayed_BV: Tensor) -> Extended:
        """With the ``RISING`` items of the largest decayed counts that the retriever has not proposed."""
        ids_BN, before_B = self.proposed.ids_BN, self.proposed.rank_B
        decayed_BV = decayed_BV.to(ids_BN.device)
        fresh_BV = torch.where(self.scores_BV > EXCLUDED / 2, decayed_BV, torch.zeros_like(decayed_BV))
        fresh_BV = fresh_BV.scatter(1, ids_BN, 0.0)
        count_BM, rising_BM = torch.topk(fresh_BV, min(RISING, fresh_BV.shape[1]), dim=1)
        rising_BM = torch.where(count_BM > 0, rising_BM, torch.zeros_like(rising_BM))
        all_BN = torch.cat([ids_BN, rising_BM], 1)
        score_BM = self.scores_BV.gather(1, rising_BM)  # of padding EXCLUDED
        scores_BN = torch.cat([self.proposed.scores_BN, score_BM], 1)
        whole = Candidates(before_B, all_BN, scores_BN, self.proposed.encoded_BMD)
        logit_BN = self.models.logits(self.request, whole)[..., 0]
        target_B1 = self.request.target_B.to(ids_BN.device)[:, None]
        # a target that ties put behind the candidates is none, as in ranks_after; whatever is not proposed comes after
        joined_B = (rising_BM == target_B1).any(1)
        after_B = torch.where(before_B < ids_BN.shape[1], before_B, before_B + rising_BM.shape[1])
        count_BN = torch.log1p(decayed_BV.gather(1, all_BN))
        trained_BN = torch.log1p(self.models.retriever.popularity[all_BN])
        before_B = torch.where(joined_B, torch.zeros_like(after_B), after_B)
        return Extended(all_BN, logit_BN, count_BN, trained_BN, before_B)


def choose(
    models: Models, stream: dict[str, np.ndarray], seed: int, say: Progress
) -> tuple[dict[str, Blend], dict[str, Any]]:
    """(the best blend of each row on validation requests, how they were chosen). ``seed``: of the ranker's training;
    only users whom it held out of the ranker's training count, as the ranker has learned the others' targets."""
    if models.preset.ranker.rising:  # it reads the counters itself: there is nothing to add
        return {}, {"validation requests": 0, "blends": {}}
    requests, moments = by_moment(models.features, models, "valid")
    held_out = held_out_users(requests, models.preset.ranking.held_out, seed)
    enough = int(held_out.sum()) >= LEAST_CHOOSING
    rows = np.flatnonzero(held_out) if enough else np.arange(len(moments))
    requests, moments = requests.take(rows), moments[rows]
    present, items = Present(stream, models.features.item_count()), models.features.item_count()
    tried = blends()
    gained = {blend: 0.0 for row in tried.values() for blend in row}
    done = 0
    for request, now in steps(requests, moments, items):
        static = Static(models, request)
        extended = {h: static.extended(decayed_BV) for h, decayed_BV in present.decayed(now).items()}
        for blend in gained:
            rank = extended[blend.half_life].ranks(blend, request).cpu().numpy()
            gained[blend] += float(ndcg_of(rank).sum())
        done += len(now)
        say(f"replayed {done:,} of {len(moments):,} validation requests")
    chosen = {name: max(row, key=lambda blend: gained[blend]) for name, row in tried.items()}
    return chosen, {
        "validation requests": len(moments),
        "of users whom the ranker did not train on": enough,
        "blends": {
            name: {**asdict(blend), "validation NDCG@10": gained[blend] / len(moments)}
            for name, blend in chosen.items()
        },
        f"validation NDCG@10 of '{COUNTED}' by half-life and weight": {
            h: {str(w): gained[Blend(h, w)] / len(moments) for w in WEIGHTS} for h in HALF_LIVES
        },
    }


# -- models that are not the run's ------------------------------------------------------------------------
class Renewing(Protocol):
    """Models that are trained on while the requests go by."""

    def models_at(self, now_ms: int) -> Models:
        """Those that have learned from events before ``now_ms`` alone."""

    def answered(self, request: batches.Requests) -> None:
        """Hears of requests whose targets have come to be known."""


class WithoutNewItems:
    """The run's models as if the catalogue had only the items of training."""

    def __init__(self, models: Models) -> None:
        retriever = copy.deepcopy(models.retriever)
        self._seen_V = retriever.popularity > 0
        with torch.no_grad():
            retriever.bias[~self._seen_V] -= UNSEEN_BIAS
        self.models = Models(
            models.features, models.preset, models.features.folder, [RANKING], loaded=(retriever, models.ranker)
        )

    @property
    def same(self) -> bool:
        """Whether every item has a training event."""
        return bool(self._seen_V[FIRST_ID:].all())

    def request(self, request: batches.Requests) -> batches.Requests:
        if request.rising_BM is None:
            return request
        seen_BM = self._seen_V.cpu()[request.rising_BM]
        return replace(request, rising_BM=torch.where(seen_BM, request.rising_BM, PADDING_ID))


def answer_by(models: Models, request: batches.Requests) -> tuple[Tensor, Tensor]:
    """(ranks of the targets int64 [B], ids best first int64 [B, N]) of retrieval + ranking."""
    proposed = models.retrieve(request)
    logits = models.logits(request, proposed)
    return models.ranked(request, proposed, logits), _ordered(proposed.ids_BN, logits[..., 0])


# -- the walk --------------------------------------------------------------------------------------------
def walk(
    models: Models,
    stream: dict[str, np.ndarray],
    chosen: dict[str, Blend],
    say: Progress,
    renewing: Callable[[np.ndarray], Renewing] | None = None,
) -> tuple[Answers, np.ndarray]:
    """(everything about the test requests, their moments). ``chosen``: how models and counters join, by row;
    ``renewing`` makes, for the moments, models that are trained on meanwhile."""
    features, items = models.features, models.features.item_count()
    say("counting what was known at each test request")
    requests, moments = by_moment(features, models, "test")
    present, answers = Present(stream, items), Answers(items)
    trained_V = torch.tensor(popularity(features.files("train"), items), dtype=torch.float32)
    renewed, without_new, done = None if renewing is None else renewing(moments), WithoutNewItems(models), 0
    for request, now in steps(requests, moments, items):
        excluded_BV = request.exclude(items, features.schema.exclude_seen)
        decayed, counted = present.decayed(now), present.counted(now)
        lists = {TRAINED: trained_V.expand_as(excluded_BV), **counted}
        lists |= {f"decayed by half in {name}": counts_BV for name, counts_BV in decayed.items()}
        for method, counts_BV in lists.items():
            scores_BV = torch.where(excluded_BV, torch.full_like(counts_BV, EXCLUDED), counts_BV)
            rank_B = ranks(scores_BV, request.target_B, request.number_B)
            answers.add(method, rank_B, propose(scores_BV, min(answers.CUT, items))[0])
        static = None if models.preset.ranker.rising else Static(models, request)
        proposed = models.retrieve(request) if static is None else static.proposed
        logits = models.logits(request, proposed)
        alone = proposed if static is not None else models.retrieve(replace(request, rising_BM=None, live_BMF=None))
        answers.add(RETRIEVAL, proposed.rank_B, alone.ids_BN)
        answers.add(RANKED, models.ranked(request, proposed, logits), _ordered(proposed.ids_BN, logits[..., 0]))
        if static is not None:
            extended = {h: static.extended(decayed[h]) for h in {blend.half_life for blend in chosen.values()}}
            for method, blend in chosen.items():
                joined = extended[blend.half_life]
                answers.add(method, joined.ranks(blend, request), _ordered(joined.ids_BN, joined.scores(blend)))
        if not without_new.same:
            answers.add(KNOWN_ITEMS, *answer_by(without_new.models, without_new.request(request)))
        if renewed is not None:
            _add_renewed(answers, renewed.models_at(int(now[0])), request, decayed, chosen.get(COUNTED))
            renewed.answered(request)
        hour_BV = counted[LAST_HOUR]
        answers.add_propensity(hour_BV.gather(1, request.target_B[:, None])[:, 0], hour_BV.sum(1))
        answers.unknown += int((request.target_B < FIRST_ID).sum())
        done += len(now)
        say(f"replayed {done:,} of {len(moments):,} test requests")
    return answers, moments


def _add_renewed(
    answers: Answers, models: Models, request: batches.Requests, decayed: dict[str, Tensor], blend: Blend | None
) -> None:
    """The rows of models that were trained on; with counters where they do not read those themselves."""
    answers.add(REFRESHED, *answer_by(models, request))
    if blend is not None:
        joined = Static(models, request).extended(decayed[blend.half_life])
        answers.add(REFRESHED_COUNTED, joined.ranks(blend, request), _ordered(joined.ids_BN, joined.scores(blend)))


def _ordered(ids_BN: Tensor, scores_BN: Tensor) -> Tensor:
    """The ids by falling score, int64 [B, N]."""
    return ids_BN.gather(1, torch.argsort(scores_BN, dim=1, descending=True, stable=True))


def replay(
    features: Features,
    preset: Preset,
    root: Path,
    say: Progress,
    renewing: Callable[[np.ndarray], Renewing] | None = None,
) -> dict[str, Any]:
    """Walks the test requests in order of time; writes figures and a plot to the run's evaluation folder and returns
    the figures. ``renewing``: see ``walk``. Raises StaleError where the models were made from other features."""
    check_times(features)
    run, started = Run(root, features.folder), time.monotonic()
    ranking = run.manifest(RANKING)
    models, stream = Models(features, preset, root, [RANKING]), features.events()
    chosen, how = choose(models, stream, ranking["seed"], say)
    answers, moments = walk(models, stream, chosen, say, renewing)
    hours = (moments - int(stream[TIME][0])) // HOUR
    results = {
        "requests": len(moments),
        "targets_out_of_vocabulary": answers.unknown,
        "chosen": how,
        **figures(answers, hours, LAST_HOUR),
        "ranking": ranking["key"],
        "seed": ranking["seed"],
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(),
    }
    run.evaluation.mkdir(parents=True, exist_ok=True)
    write_json(run.evaluation / FILE, results)
    plot_by_hour(results, run.evaluation / PLOT)
    return results
