"""What the retriever minimises: next-item and masked-item losses over a batch of windows, and how it is made to
withstand perturbations of the item embeddings (FGM, Miyato et al. 2017; adversarial personalised ranking, He et al.
2018, eq. 6 to 8).

Axis legend: B windows, T events, V item ids, P predicted places, D width, S sampled negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.data.columns import EventColumns
from training.learn.distill import Teacher
from training.losses import full_softmax, gbce, sampled_softmax
from training.models.retrieval import MASKED, RetrievalModel
from training.presets import RetrievalTraining
from vivace.contract import FIRST_ID, PADDING_ID

LAST_ONLY = 0.2  # share of the masked encoder's windows that hide only the newest item


def log_expected_counts(popularity_V: Tensor, config: RetrievalTraining) -> Tensor:
    """Log of how often each item id is expected among a batch's sampled negatives, float32 [V]: by its events to the
    power of ``negative_power``; -inf for the special ids, which are never drawn."""
    weight_V = (popularity_V.double() + 1.0) ** config.negative_power
    weight_V[:FIRST_ID] = 0.0
    return (config.negatives * weight_V / weight_V.sum()).log().float()


def item_loss(
    model: RetrievalModel, config: RetrievalTraining, log_expected_V: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss of predicting items int64 [P] from encodings [P, D] with the item table [V, D]. An item without a training
    event is no negative: it would be pushed down, and its words with it."""
    sampling_V, items = log_expected_V.exp(), len(log_expected_V)
    assert not sampling_V[:FIRST_ID].any(), "special ids are no negatives: see log_expected_counts"
    unseen_V = torch.where(model.popularity > 0, 0.0, MASKED).to(log_expected_V.device)
    unseen_V[:FIRST_ID] = 0.0

    def loss(h_PD: Tensor, target_P: Tensor, table_VD: Tensor) -> Tensor:
        bias_V = model.bias + unseen_V
        if config.loss == "full":
            return full_softmax(h_PD, table_VD, bias_V, target_P, FIRST_ID, config.label_smoothing)
        if config.loss == "gbce":
            negative_S = torch.randint(FIRST_ID, items, (config.negatives,), device=target_P.device)
            return gbce(h_PD, table_VD, bias_V, target_P, negative_S, items - FIRST_ID, config.calibration)
        sample_S = torch.multinomial(sampling_V, config.negatives, replacement=True)
        return sampled_softmax(h_PD, table_VD, bias_V, target_P, sample_S, log_expected_V)

    return loss


def retrieval_loss(
    model: RetrievalModel, config: RetrievalTraining, log_expected_V: Tensor, teacher: Teacher | None = None
) -> Callable[..., Any]:
    """Loss of a batch of windows of the columns that the model reads, int64 [B, T + 1] or [B, T + 1, W]: (mean, number
    of its terms)."""
    of_items, columns = item_loss(model, config, log_expected_V), EventColumns.read_by(model)

    def next_item(batch: Tensor) -> tuple[Tensor, Tensor]:
        batch, follows_BT = batch.to(model.bias.device), None
        if config.stochastic_length:
            batch, follows_BT = without_places(batch)
        events, table = columns.read(batch), model.table()
        inputs, targets = events.ids[:, :-1], events.ids[:, 1:]
        of_inputs = [None if x is None else x[:, :-1] for x in (events.times, events.types)]
        keep = (inputs != PADDING_ID) & (targets >= FIRST_ID)
        if follows_BT is not None:
            keep &= follows_BT
        ids, amounts = (None if x is None else x[:, 1:][keep] for x in events.context)  # of the moments asked about

        def at(moved: Tensor) -> Tensor:
            encoded = model.encode(inputs, moved, of_inputs[0], types=of_inputs[1])[keep]
            states = model.state(encoded, (ids, amounts)).float()
            loss = of_items(states, targets[keep], moved)
            if teacher is None:
                return loss
            of_teacher = (states, moved, model.bias, inputs, keep, of_inputs[1], (ids, amounts))
            return loss + teacher.loss(*of_teacher)

        if not config.adversarial:
            return at(table), keep.sum()
        return adversarial(at, table, config.adversarial, config.adversarial_weight), keep.sum()

    def masked_item(batch: Tensor) -> tuple[Tensor, Tensor]:
        window, times, _, _ = columns.read(batch.to(model.bias.device))
        table = model.table()
        hidden = hide(window, config.mask_share)
        encoded = model.encode_masked(window, hidden, table, times)[hidden]
        return of_items(encoded.float(), window[hidden], table), hidden.sum()

    return masked_item if model.masked else next_item


def without_places(batch: Tensor) -> tuple[Tensor, Tensor]:
    """(windows int64 [B, T + 1] or [B, T + 1, W], bool [B, T]: whether an event is followed by the next of the log) of
    windows that were ``shortened``, [B, T + 1, W + 1]. An event whose next one was left out predicts nothing."""
    events, place_BT = batch[..., :-1], batch[..., -1]
    return events.squeeze(2) if events.shape[2] == 1 else events, place_BT[:, 1:] == place_BT[:, :-1] + 1


def hide(window_BT: Tensor, share: float) -> Tensor:
    """Which items of a window the masked encoder must guess, bool [B, T]: a random ``share``, or in some rows
    only the newest one, which is what it is asked for when it serves."""
    real = window_BT >= FIRST_ID
    drawn = torch.rand(window_BT.shape, device=window_BT.device) < share
    last = torch.zeros_like(real)
    last[:, -1] = True
    only_last = torch.rand(len(window_BT), 1, device=window_BT.device) < LAST_ONLY
    hidden = torch.where(only_last, last, drawn) & real
    return hidden | (last & real & ~hidden.any(1, keepdim=True))


def direction(gradient_VD: Tensor) -> Tensor:
    """Each row of a gradient at length one; rows without a gradient stay zero."""
    return gradient_VD / gradient_VD.norm(dim=1, keepdim=True).clamp_min(1e-12)


def adversarial(loss_of: Callable[[Tensor], Tensor], table_VD: Tensor, epsilon: float, weight: float) -> Tensor:
    """``loss_of(table)`` plus ``weight`` times the same at the table moved ``epsilon`` of its mean row length along the
    loss's gradient."""
    loss = loss_of(table_VD)
    (gradient,) = torch.autograd.grad(loss, table_VD, retain_graph=True)
    length = table_VD.detach()[FIRST_ID:].norm(dim=1).mean()
    return loss + weight * loss_of(table_VD + epsilon * length * direction(gradient).detach())
