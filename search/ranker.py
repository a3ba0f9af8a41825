"""The search ranker: what query and item have in common, as features, and a small network over them.

Learned by the list (softmax over the candidates, Cao et al. 2007) from judgments or, where there are only clicks, from
clicks weighted by the inverse of the chance that their position was looked at (Joachims et al. 2017); those chances are
estimated from the log by the position-based model's EM (Wang et al. 2018). Axis legend: Q queries, N candidates,
X features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDS = 5


class SearchRanker(nn.Module):
    """Features float32 [B, N, X] to scores float32 [B, N]; each candidate by itself, so their order is irrelevant."""

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, hidden: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.line = nn.Linear(inputs, 1)
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(hidden, 1),
        )  # fmt: skip
        for name, p in self.named_parameters():
            if name in ("line.weight", "net.6.weight"):  # nothing is believed before it was learned
                nn.init.zeros_(p)

    def forward(self, features_BNX: Tensor) -> Tensor:
        x = ((features_BNX - self.mean) * self.scale).clamp(-5, 5)
        scores_BN: Tensor = (self.line(x) + self.net(x)).squeeze(-1)
        return scores_BN


@dataclass(frozen=True)
class RankerConfig:
    epochs: int = 60
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    batch_size: int = 16
    hidden: int = 32
    dropout: float = 0.2
    members: int = 16  # networks from other seeds, their scores averaged
    patience: int = 8


class Ensemble(nn.Module):
    """Mean of the members' scores."""

    def __init__(self, members: Sequence[SearchRanker]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features_BNX: Tensor) -> Tensor:
        return torch.stack([m(features_BNX) for m in self.members]).mean(0)

    def score(self, features_NX: np.ndarray) -> np.ndarray:
        """float32 [N] of one query's candidates."""
        with torch.inference_mode():
            found: np.ndarray = self.eval()(torch.from_numpy(features_NX)[None])[0].numpy()
        return found


def _loss(model: SearchRanker, x_QNX: Tensor, y_QN: Tensor, real_QN: Tensor, weight_Q: Tensor) -> Tensor:
    scores = model(x_QNX).masked_fill(~real_QN, -1e4)
    wanted = y_QN / y_QN.sum(1, keepdim=True)
    return -(weight_Q * (wanted * F.log_softmax(scores, 1)).sum(1)).mean()


def _fit(
    model: SearchRanker, config: RankerConfig, epochs: int, x: Tensor, y: Tensor, real: Tensor, weight: Tensor,
    own: Tensor, held: Tensor | None = None,
) -> list[float]:  # fmt: skip
    """Learns from queries ``own``; after each epoch the loss on ``held``, until it has not fallen for ``patience``."""
    model.mean.copy_(x[own][real[own]].mean(0))
    model.scale.copy_(1 / x[own][real[own]].std(0).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    found: list[float] = []
    for _ in range(epochs):
        model.train()
        for rows in own[torch.randperm(len(own))].split(config.batch_size):
            optimizer.zero_grad()
            _loss(model, x[rows], y[rows], real[rows], weight[rows]).backward()
            optimizer.step()
        model.eval()
        if held is not None:
            with torch.inference_mode():
                found.append(float(_loss(model, x[held], y[held], real[held], weight[held])))
            if int(np.argmin(found)) < len(found) - config.patience:
                break
    return found


def train_search_ranker(
    lists: Sequence[np.ndarray], gains: Sequence[np.ndarray], config: RankerConfig, seed: int,
    weights: Sequence[float] | None = None,
) -> Ensemble:  # fmt: skip
    """Each member learns for as many epochs as served queries best that were held out, by cross-validation
    (``config.epochs`` at most, and where there are too few queries for it). ``lists``: features [N_q, X] of each
    query's candidates; ``gains`` [N_q] of the same, or clicks weighted by ``inverse_propensity``. Queries without any
    gain teach nothing; ``weights``: how much each teaches (all alike), of clicks the sum of their gains, as a list's
    gains count by their shares only."""
    taught = [i for i, g in enumerate(gains) if g.sum() > 0]
    if not taught:
        raise ValueError("search ranker: expected at least one query with a candidate that gains, got none")
    inputs, longest = lists[taught[0]].shape[1], max(len(lists[i]) for i in taught)
    x = torch.zeros(len(taught), longest, inputs)
    y, real = torch.zeros(len(taught), longest), torch.zeros(len(taught), longest, dtype=torch.bool)
    for row, i in enumerate(taught):
        n = len(lists[i])
        x[row, :n], y[row, :n], real[row, :n] = torch.from_numpy(lists[i]), torch.from_numpy(gains[i]).float(), True
    weight = torch.tensor([1.0 if weights is None else weights[i] for i in taught])
    weight = weight / weight.mean()
    order, curves = np.random.default_rng(seed).permutation(len(taught)), []
    if len(taught) >= 2 * FOLDS:
        for fold in range(FOLDS):
            torch.manual_seed(seed * 100 + fold)
            held, own = order[fold::FOLDS], np.setdiff1d(order, order[fold::FOLDS])
            model = SearchRanker(inputs, config.hidden, config.dropout)
            halves = torch.from_numpy(own), torch.from_numpy(held)
            curves.append(_fit(model, config, config.epochs, x, y, real, weight, *halves))
    shortest = min((len(curve) for curve in curves), default=0)
    epochs = int(np.mean([c[:shortest] for c in curves], 0).argmin()) + 1 if curves else config.epochs
    members = []
    for member in range(config.members):
        torch.manual_seed(seed * 1000 + member)
        members.append(SearchRanker(inputs, config.hidden, config.dropout))
        _fit(members[-1], config, epochs, x, y, real, weight, torch.arange(len(taught)))
    return Ensemble(members)


def propensities(
    pair: np.ndarray, position: np.ndarray, clicked: np.ndarray, rounds: int = 100
) -> np.ndarray:  # fmt: skip
    """Chance that each position is looked at, relative to the first, float64 [positions], from a log.

    ``pair``: number of the (query, item) shown int64 [R]; ``position`` from 0; ``clicked`` bool. The same pairs must
    have been shown at several positions. P(click) = seen[position] * relevant[pair].
    """
    seen = np.full(int(position.max()) + 1, 0.5)
    relevant = np.full(int(pair.max()) + 1, 0.5)
    shown_at, shown = np.bincount(position), np.bincount(pair)
    for _ in range(rounds):
        s, r = seen[position], relevant[pair]
        rest = 1 - s * r
        looked = np.where(clicked, 1.0, s * (1 - r) / rest)  # P(seen | click or none)
        good = np.where(clicked, 1.0, (1 - s) * r / rest)
        seen = np.clip(np.bincount(position, looked) / np.maximum(shown_at, 1), 1e-4, 1 - 1e-4)
        relevant = np.clip(np.bincount(pair, good) / np.maximum(shown, 1), 1e-4, 1 - 1e-4)
    return seen / seen[0]


def inverse_propensity(clicked: np.ndarray, position: np.ndarray, seen: np.ndarray, most: float = 20.0) -> np.ndarray:
    """Weight of each shown item: 1 / chance where it was clicked (at most ``most``), 0 elsewhere."""
    weight: np.ndarray = np.where(clicked, np.minimum(1 / np.maximum(seen[position], 1e-9), most), 0.0)
    return weight
