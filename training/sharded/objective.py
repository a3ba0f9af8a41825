"""What a retriever with a sharded item table minimises, and what its held-back users say of it.

A step reads the rows of its own ids alone (histories, targets and the negatives that all processes share) and works on
them as on a table of U items. Axis legend: B windows or requests, T events, P predicted places, V item ids, U ids of a
step, D width, S negatives, R rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from training.data import batches
from training.data.batches import Requests
from training.data.columns import EventColumns
from training.losses import gbce, sampled_softmax
from training.metrics import ALL_ITEMS, MISS, mean_ndcg, place
from training.models.retrieval import EXCLUDED, MASKED, RetrievalModel
from training.presets import RetrievalTraining
from training.scoring import SCORED
from training.sharded.table import BIASES, BLOCK, ROWS, ShardedItems
from vivace.contract import FIRST_ID, PADDING_ID


class Negatives:
    """Negatives that every process draws alike, by seed and step, so that their number does not change a run."""

    def __init__(self, counts: np.ndarray, config: RetrievalTraining, seed: int) -> None:
        """``counts``: training events of each item id, int [V]."""
        weight_V = (torch.from_numpy(counts).double() + 1.0) ** config.negative_power
        weight_V[:FIRST_ID] = 0.0
        self.config, self.seed, self.step = config, seed, 0
        self.seen_V = torch.from_numpy(counts > 0)
        self.log_V = (config.negatives * weight_V / weight_V.sum()).log().float()
        self.cumulative_V = weight_V.cumsum_(0)  # torch.multinomial takes no more than 2**24 items

    def draw(self) -> Tensor:
        """Ids int64 [S] of this step, on the CPU: uniform for "gbce", by popularity for "sampled"."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        count, items = self.config.negatives, len(self.cumulative_V)
        if self.config.loss == "gbce":
            return torch.randint(FIRST_ID, items, (count,), generator=generator)
        uniform_S = torch.rand(count, dtype=torch.float64, generator=generator) * self.cumulative_V[-1]
        return torch.searchsorted(self.cumulative_V, uniform_S, right=True).clamp_max(items - 1)

    def of(self, ids_U: Tensor) -> tuple[Tensor, Tensor]:
        """Of ids: (log of how often each is expected among the negatives, what is added to its bias as items without a
        training event are no negatives), float32 [U]."""
        at = ids_U.cpu()
        unseen_U = torch.where(self.seen_V[at] | (at < FIRST_ID), 0.0, MASKED)
        return self.log_V[at].to(ids_U.device), unseen_U.to(ids_U.device)


def sharded_loss(
    model: RetrievalModel, items: ShardedItems, config: RetrievalTraining, negatives: Negatives
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Loss of a batch of windows of the columns that the model reads, int64 [B, T + 1] or [B, T + 1, W]: (mean, number
    of its terms). ``model``: everything but the item table."""
    columns = EventColumns.read_by(model)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        events = columns.read(batch.to(items.device))
        inputs, targets = events.ids[:, :-1], events.ids[:, 1:]
        times, types = (None if x is None else x[:, :-1] for x in (events.times, events.types))
        keep = (inputs != PADDING_ID) & (targets >= FIRST_ID)
        context = tuple(None if x is None else x[:, 1:][keep] for x in events.context)
        negative_S, target_P = negatives.draw().to(items.device), targets[keep]
        padding = inputs.new_full((1,), PADDING_ID)
        ids_U = torch.unique(torch.cat([padding, inputs.flatten(), target_P, negative_S]))
        rows_UD, bias_U = items(ids_U)
        at = lambda ids: torch.searchsorted(ids_U, ids)  # noqa: E731 - place of an id among those of this step
        encoded = model.encode(at(inputs.contiguous()), rows_UD, times, types=types)[keep]
        states_PD = model.state(encoded, (context[0], context[1])).float()
        log_U, unseen_U = negatives.of(ids_U)
        arguments = states_PD, rows_UD, bias_U + unseen_U, at(target_P), at(negative_S)
        if config.loss == "gbce":
            value = gbce(*arguments, negatives.cumulative_V.numel() - FIRST_ID, config.calibration)
        else:
            value = sampled_softmax(*arguments, log_U)
        return value, keep.sum()

    return loss


@torch.no_grad()
def sharded_scores(
    items: ShardedItems, states_BD: Tensor, target_B: Tensor, excluded: list[np.ndarray]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of states over the whole catalogue: (score of the target float32 [B], log of the sum of all items' exponentials
    [B], items above the target int64 [B], others equal to it [B]). ``excluded``: ids of each row that take no part, nor
    do the special ids. Each process scores its rows; only these figures travel."""
    unique_U, at_B = torch.unique(target_B, return_inverse=True)
    rows_UD, bias_U = items(unique_U)
    score_B = (states_BD * rows_UD[at_B]).sum(1) + bias_U[at_B]
    seen_B = torch.tensor([int(t) in set(ids.tolist()) for t, ids in zip(target_B, excluded, strict=True)])
    score_B = torch.where(seen_B.to(score_B.device) | (target_B < FIRST_ID), EXCLUDED, score_B)
    row_E = torch.from_numpy(np.repeat(np.arange(len(excluded)), [len(ids) for ids in excluded])).to(items.device)
    id_E = torch.from_numpy(np.concatenate(excluded)).to(items.device)
    log_B, above_B, equal_B = torch.full_like(score_B, -torch.inf), 0 * target_B, 0 * target_B
    for (first, rows), biases in zip(items.local(ROWS), _biases_beside(items), strict=True):
        for start in range(0, len(rows), BLOCK):
            low, part = first + start, rows[start : start + BLOCK]
            scores = torch.addmm(biases[start : start + BLOCK], states_BD, part.t())
            here = (id_E >= low) & (id_E < low + len(part))
            scores[row_E[here], id_E[here] - low] = EXCLUDED
            scores[:, : max(FIRST_ID - low, 0)] = EXCLUDED
            mine_B = (target_B >= low) & (target_B < low + len(part))
            scores[mine_B.nonzero()[:, 0], target_B[mine_B] - low] = -torch.inf  # counted once, by ``score_B``
            log_B = torch.logaddexp(log_B, scores.logsumexp(1))
            above_B += (scores > score_B[:, None]).sum(1)
            equal_B += (scores == score_B[:, None]).sum(1)
    top_B = log_B.clone()
    dist.all_reduce(top_B, dist.ReduceOp.MAX)
    shares_B = (log_B - top_B).exp()
    for total in (shares_B, above_B, equal_B):
        dist.all_reduce(total)
    return score_B, torch.logaddexp(top_B + shares_B.log(), score_B), above_B, equal_B


def _biases_beside(items: ShardedItems) -> list[Tensor]:
    """The biases [R] of the rows that ``items.local(ROWS)`` gives. All processes call it."""
    there = {first: rows[:, 0] for first, rows in items.local(BIASES)}
    if items.sharding.kind == "row":
        return [there[first] for first, _ in items.local(ROWS)]
    whole_V = there.get(0, torch.zeros(0)).contiguous().to(items.device)
    whole_V = whole_V if len(whole_V) else torch.zeros(items.items, device=items.device)
    dist.broadcast(whole_V, items.world.size - 1)
    return [whole_V for _ in items.local(ROWS)]


def sharded_metric(
    model: RetrievalModel, items: ShardedItems, probes: list[np.ndarray], columns: EventColumns, exclude_seen: bool
) -> Callable[[], dict[str, float]]:
    """Log loss and NDCG@10 of the events that were held back, the last of each of ``probes``, against all items. All
    processes call it, with the same probes."""
    of_history = replace(columns, context=(), amounts=())

    def states(request: Requests) -> Tensor:
        request = request.to(items.device)
        ids_U = torch.unique(torch.cat([request.history_BT.new_zeros(1), request.history_BT.flatten()]))
        rows_UD, _ = items(ids_U)
        known_BT = torch.searchsorted(ids_U, request.history_BT.contiguous())
        encoded = model.encode(known_BT, rows_UD, request.time_BT, 1, request.type_BT)
        return model.state(encoded[:, -1], request.context).float()

    def metric() -> dict[str, float]:
        ranks, losses = [], []
        with torch.no_grad():
            for start in range(0, len(probes), SCORED):
                part = probes[start : start + SCORED]
                target_B = torch.tensor([int(p[-1, 0]) for p in part])
                context = columns.read(torch.from_numpy(np.stack([p[-1] for p in part]))).context
                histories = [p[:-1, : of_history.width] for p in part]
                request = batches.of_sequences(
                    histories, model.config.window, target_B, {}, start, columns=of_history, context=context
                )
                seen = [s[:, 0] if exclude_seen else s[:0, 0] for s in histories]
                target_B = target_B.to(items.device)
                score_B, log_B, above_B, equal_B = sharded_scores(items, states(request), target_B, seen)
                live_B = score_B > EXCLUDED / 2
                rank_B = place(above_B, equal_B, request.number_B, ALL_ITEMS)
                ranks.append(torch.where(live_B, rank_B, MISS))
                losses.append((log_B - score_B)[live_B])
        if not ranks or not sum(len(x) for x in losses):
            return {"log_loss": 0.0}
        figures = torch.tensor([float(torch.cat(losses).mean()), mean_ndcg(ranks)], device=items.device)
        dist.broadcast(figures, 0)  # one decision on early stopping, whatever the last digit
        return {"log_loss": float(figures[0]), "NDCG@10": float(figures[1])}

    return metric
