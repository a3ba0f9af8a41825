"""The second half of ``vivace train``: the ranker, on requests whose labels the retriever has not seen.

Axis legend: B requests, T history events, N candidates, H task heads, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.caps import learned_from
from preprocessing.features import Features
from training.checkpoints import build_ranker, device, finish_training, keep_only_own_checkpoint, load_retrieval
from training.data import batches
from training.data.live import check_live, with_live
from training.data.shown import ShownClicks, ShownLog, shown_clicks
from training.learn.loop import Loop, LoopConfig
from training.metrics import list_auc, mean_ndcg, ranks_after
from training.models.ranking import RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel
from training.presets import Preset, recorded_fields, shapes
from training.scoring import SCORED, behind_rising, candidates, candidates_with
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.manifest import Progress, Step
from vivace.run import CONTROL, RANKING, RETRIEVAL, Run
from vivace.store.opening import store_of_worker


def held_out_users(request: batches.Requests, share: float, seed: int) -> np.ndarray:
    """bool [B]: whether a request's user is held out of a ranker's training. By the user, so that all requests of one
    are on the same side, and the same users always."""
    mixed_B = (request.user_B.numpy() + seed * 40503) % 1_000_003 % 1000
    held_out_B: np.ndarray = mixed_B < share * 1000
    return held_out_B


class RankerBatch(NamedTuple):
    """Requests with the retriever's candidates; ``memory`` newest of the T encoded events."""

    history_BT: Tensor
    candidates_BN: Tensor
    scores_BN: Tensor
    encoded_BTD: Tensor
    hit_BN: Tensor  # bool: the candidate is the target
    labels_BH: Tensor
    rank_B: Tensor  # of the target, before the ranker
    target_B: Tensor
    number_B: Tensor  # of the request
    more: tuple[Tensor, ...]  # what the ranker reads of the moment and of live counters
    among_BN: Tensor | None = None  # bool: of a click in a log, what was shown with it and not clicked, and itself
    weight_B: Tensor | None = None  # of such clicks

    @property
    def there(self) -> Tensor:
        """bool [B, N]: a candidate, not the padding where there were fewer."""
        return self.candidates_BN != PADDING_ID

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model reads."""
        return self.history_BT, self.candidates_BN, self.scores_BN, self.encoded_BTD, *self.more

    def keep(self, rows_B: Tensor) -> RankerBatch:
        """The requests where ``rows_B`` is true."""
        kept = {n: x[rows_B] for n, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**kept, more=tuple(x[rows_B] for x in self.more))


class RankerData:
    """Ranker batches: requests of the last training events and then of the validation events, whose labels the
    retriever has not seen; as a control, or where there is no validation event, of training events alone. ``known``:
    other requests in their place. ``shown``: clicks of a log to learn from beside them."""

    def __init__(
        self,
        features: Features,
        retriever: RetrievalModel,
        preset: Preset,
        seed: int,
        control: bool,
        known: batches.Requests | None = None,
        shown: ShownClicks | None = None,
    ) -> None:
        self.features, self.retriever, self.preset, self.seed = features, retriever, preset, seed
        self.shown = shown
        self.without_validation = not features.files("valid")
        self.control = control or self.without_validation
        self.schema = features.schema
        self.heads = [h.name for h in self.schema.heads]
        self.count = min(preset.ranker.candidates, features.item_count() - FIRST_ID)
        self.known = known if known is not None or not preset.ranker.rising else self._replayed()

    def _replayed(self) -> batches.Requests:
        """The validation requests with what was rising at the moment of each."""
        ranker = self.preset.ranker
        check_live(self.features, ranker.rising, self.control and not self.without_validation, ranker.shown_rates)
        parts = batches.requests(self.features.files("valid"), self.heads, self.preset.encoder.window, SCORED)
        return batches.together(list(with_live(parts, self.features, "valid", shapes(self.preset, self.features))))

    def sources(self, held_out: bool) -> list[tuple[list[Path], int]]:
        """(files, how far back the event to predict lies; 0: the validation event). Of the held-out users only the
        newest event of each kind of run."""
        train, valid = self.features.files("train"), self.features.files("valid")
        past = self.preset.ranking.past_events
        if held_out:
            return [(train, 1)] if self.control else [(valid, 0)]
        if self.control:
            return [(train, back) for back in range(past + 1, 0, -1)]
        return [*((train, back) for back in range(past, 0, -1)), (valid, 0)]

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch, about: what the schedule is made for."""
        rows = sum(pq.read_metadata(f).num_rows for files, _ in self.sources(False) for f in files)
        shown = -(-len(self.shown) // batch_size) if self.shown is not None else 0
        return -(-(rows if self.known is None else len(self.known.target_B)) // batch_size) + shown

    def _requests(self, held_out: bool, shuffle_seed: int | None, batch_size: int) -> Iterator[batches.Requests]:
        if self.known is not None:
            order = np.arange(len(self.known.target_B))
            if shuffle_seed is not None:
                order = np.random.default_rng(shuffle_seed).permutation(order)
            for start in range(0, len(order), batch_size):
                yield self.known.take(order[start : start + batch_size])
            return
        history = self.preset.encoder.window
        for files, back in self.sources(held_out):
            yield from batches.requests(files, self.heads, history, batch_size, shuffle_seed, back)

    def _of_side(self, request: batches.Requests, held_out: bool) -> batches.Requests:
        of_side = held_out_users(request, self.preset.ranking.held_out, self.seed) == held_out
        # the retriever scores every item for each request: only for those that are read
        return request if of_side.all() else request.take(np.flatnonzero(of_side))

    def _batch(
        self, request: batches.Requests, rank_B: Tensor, ids_BN: Tensor, scores_BN: Tensor, encoded_BTD: Tensor
    ) -> RankerBatch:
        where = ids_BN.device
        target = request.target_B.to(where)
        labels = torch.stack([request.labels[h] for h in self.heads], 1).to(where)
        more = tuple(x.to(where) for x in request.read_by(self.retriever))
        return RankerBatch(
            request.history_BT.to(where), ids_BN, scores_BN, encoded_BTD, ids_BN == target[:, None], labels,
            behind_rising(rank_B, request), target, request.number_B.to(where), more,
        )  # fmt: skip

    def batches(self, held_out: bool, shuffle_seed: int | None, batch_size: int) -> Iterator[RankerBatch]:
        """Requests whose target is among the candidates (training), or all of them (held out); in training, clicks of
        the log of impressions among them."""
        of_events = self._event_batches(held_out, shuffle_seed, batch_size)
        if held_out or self.shown is None:
            yield from of_events
            return
        seed = 0 if shuffle_seed is None else shuffle_seed
        of_clicks, rng = self._click_batches(batch_size, seed), np.random.default_rng([seed, 1])
        left = [self.steps(batch_size), -(-len(self.shown) // batch_size)]
        left[0] -= left[1]
        sources = [of_events, of_clicks]
        while sources:
            which = int(len(sources) > 1 and rng.random() * sum(left) >= left[0])
            batch = next(sources[which], None)
            if batch is None:
                sources.pop(which)
                left.pop(which)
                continue
            left[which] = max(left[which] - 1, 1)
            yield batch

    def _event_batches(self, held_out: bool, shuffle_seed: int | None, batch_size: int) -> Iterator[RankerBatch]:
        for request in self._requests(held_out, shuffle_seed, batch_size):
            request = self._of_side(request, held_out)
            if not len(request.target_B):
                continue
            rank, ids, scores, encoded = candidates(
                self.retriever, request, self.count, self.schema.exclude_seen, self.preset.ranker.memory
            )
            batch = self._batch(request, rank, ids, scores, encoded)
            keep = batch.hit_BN.any(1) if not held_out else torch.ones_like(batch.hit_BN[:, 0])
            if keep.any():
                yield batch.keep(keep)

    def _click_batches(self, batch_size: int, seed: int) -> Iterator[RankerBatch]:
        """The retriever's candidates as in a request, with what was shown in the place of its last ones."""
        assert self.shown is not None
        for clicks in self.shown.batches(batch_size, seed):
            trained = np.flatnonzero(~held_out_users(clicks.requests, self.preset.ranking.held_out, self.seed))
            if not len(trained):
                continue
            clicks = clicks.take(trained)
            rank, ids, scores, encoded, shown = candidates_with(
                self.retriever, clicks.requests, clicks.among_RK, self.count, self.schema.exclude_seen,
                self.preset.ranker.memory,
            )  # fmt: skip
            batch = self._batch(clicks.requests, rank, ids, scores, encoded)
            batch = batch._replace(among_BN=shown, weight_B=clicks.weight_R.to(ids.device))
            there = batch.hit_BN.any(1)  # not so where the item was of the history already
            if there.any():
                yield batch.keep(there)


def without_padding(logits_BN: Tensor, there_BN: Tensor) -> Tensor:
    """Logits with EXCLUDED where there is no candidate."""
    return torch.where(there_BN, logits_BN, torch.full_like(logits_BN, EXCLUDED))


def ranker_loss(model: RankingModel, batch: RankerBatch) -> Tensor:
    """Listwise softmax over the candidates for the head that orders; binary cross-entropy for the others. Of a click in
    a log over what was shown alone, and by its weight."""
    logits = model(*batch.inputs)
    there_BN = batch.there if batch.among_BN is None else batch.among_BN
    target_B = batch.hit_BN.to(torch.int64).argmax(1)
    of_heads = [F.cross_entropy(without_padding(logits[..., 0], there_BN), target_B, reduction="none")]
    for head in range(1, logits.shape[2]):
        label_BN = batch.hit_BN.float() * batch.labels_BH[:, head, None]
        loss_BN = F.binary_cross_entropy_with_logits(logits[..., head], label_BN, reduction="none")
        of_heads.append((loss_BN * there_BN).sum(1))
    losses = [(loss_B if batch.weight_B is None else loss_B * batch.weight_B).mean() for loss_B in of_heads]
    return model.task_weights(losses, model.own.weight)


def _minimise(w: Tensor, loss_of: Callable[[], Tensor]) -> None:
    """Minimises ``loss_of()`` over ``w``, in place."""
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)


def fit_platt(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(slope, offset) that minimise the log loss of sigmoid(slope x + offset) for labels ``y``; both float64 [n].

    Where one class is alone, or the fit would turn the order of ``x`` round, as by chance among few positives, the
    slope is 1, and the offset gives the share of positives (one half added, Platt 1999)."""
    if 0 < y.sum() < len(y):
        w = torch.tensor([1.0, 0.0], dtype=torch.double, requires_grad=True)
        _minimise(w, lambda: F.binary_cross_entropy_with_logits(x * w[0] + w[1], y))
        slope, offset = (float(v) for v in w.detach().clamp(-100, 100))
        if slope > 0 and math.isfinite(offset):
            return slope, offset
    share = (y.sum() + 0.5) / (len(y) + 1)
    b = torch.logit(share).detach().clone().requires_grad_()
    _minimise(b, lambda: F.binary_cross_entropy_with_logits(x + b, share.expand(len(x))))
    return 1.0, float(b.detach().clamp(-100, 100))


def calibrate(model: RankingModel, held_out: Iterator[RankerBatch]) -> dict[str, list[float]]:
    """Platt scaling of each head on held-out requests (Platt 1999): slope and offset go into the model."""
    logits, labels = [], []
    with torch.no_grad():
        for batch in held_out:
            logits.append(model(*batch.inputs)[batch.there].cpu())
            labels.append((batch.hit_BN[..., None] * batch.labels_BH[:, None, :])[batch.there].cpu())
    if not logits:
        return {}
    x, y = torch.cat(logits).double(), torch.cat(labels).double()
    fitted = {}
    for head, name in enumerate(model.head_names):
        slope, offset = fit_platt(x[:, head], y[:, head])
        model.calibration[head] = torch.tensor([slope, offset])
        fitted[name] = [slope, offset]
    return fitted


def _held_out_metric(model: RankingModel, source: RankerData) -> Callable[[], dict[str, float]]:
    """Log loss and NDCG@10 of the held-out requests."""

    def metric() -> dict[str, float]:
        ranks, losses = [], []
        with torch.no_grad():
            for batch in source.batches(True, None, SCORED):
                logits = without_padding(model(*batch.inputs)[..., 0], batch.there)
                ranks.append(ranks_after(logits, batch.candidates_BN, batch.target_B, batch.rank_B, batch.number_B))
                among = batch.hit_BN.any(1)
                place = batch.hit_BN[among].to(torch.int64).argmax(1)
                losses.append(F.cross_entropy(logits[among], place, reduction="none"))
        if not ranks or not sum(len(x) for x in losses):
            return {"log_loss": 0.0}
        return {"log_loss": float(torch.cat(losses).mean()), "NDCG@10": mean_ndcg(ranks)}

    return metric


def clicks_of(log: ShownLog, features: Features, preset: Preset, run: Run, say: Progress) -> ShownClicks:
    """What a log teaches; says how much that is."""
    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        shown = shown_clicks(log, features, shapes(preset, features), store)
    out = "; ".join(f"{count:,} {reason}" for reason, count in shown.left_out.items() if count)
    say(f"impressions: the ranker learns from {len(shown):,} clicks" + (f"; left out: requests {out}" if out else ""))
    return shown


def train_ranker(
    features: Features, preset: Preset, root: Path, seed: int, say: Progress, control: bool = False,
    quiet: bool = False, log: ShownLog | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains ``artifacts/<name>/ranking``. ``control``: on the last training event instead of the validation event,
    so without a label that the retriever has not seen (``ranking_control``). ``log``: impressions to learn from too."""
    run, name, training = Run(root, features.folder), CONTROL if control else RANKING, preset.ranking
    config = {
        "ranker": recorded_fields(preset.ranker),
        "training": asdict(training),
        "control": control,
        "held_out_by": "user",
    }
    if log is not None:
        config["impressions"] = log.key()
    step = Step(run.step(name), "train ranking", config, seed, {RETRIEVAL: run.key(RETRIEVAL)})
    if (manifest := step.finished(say, "ranker is there")) is not None:
        return manifest
    keep_only_own_checkpoint(step)
    torch.manual_seed(seed)
    features = learned_from(features, preset.retrieval.caps, step.folder / "parts")
    retriever = load_retrieval(features, preset, root)
    model = build_ranker(features, preset, retriever).to(device())
    retriever.to(device())
    shown = None if log is None else clicks_of(log, features, preset, run, say)
    source = RankerData(features, retriever, preset, seed, control, shown=shown)
    if source.without_validation:
        say(
            "no validation request (no user has three events, or too little is held out): the ranker learns from "
            "the last training events"
        )
    if model.live is not None and source.known is not None:
        ids_BM, live_BMF = source.known.live
        model.live.measure(live_BMF[ids_BM >= FIRST_ID])
    loop = Loop(
        model,
        LoopConfig(
            epochs=training.epochs, steps_per_epoch=source.steps(training.batch_size), warmup_steps=50, seed=seed,
            learning_rate=training.learning_rate, weight_decay=training.weight_decay, clip_norm=training.clip_norm,
            patience=training.patience,
        ),
        step.folder,
        name,
        lambda epoch: source.batches(False, seed * 1000 + epoch, training.batch_size),
        lambda batch: ranker_loss(model, batch),
        _held_out_metric(model, source),
        quiet,
    )  # fmt: skip
    loop.resume(say)
    report = loop.run()
    calibration = calibrate(model, source.batches(True, None, SCORED))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return finish_training(step, model, report, calibration=calibration, parameters=parameters)


def head_auc(probability_BN: Tensor, hit_BN: Tensor, label_B: Tensor, there_BN: Tensor | None = None) -> Tensor:
    """AUC of one head within each candidate list whose target carries the label; ``there_BN``: as in ``list_auc``."""
    return list_auc(probability_BN, hit_BN & (label_B[:, None] > 0), there_BN)
