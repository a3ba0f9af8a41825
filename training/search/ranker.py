"""The search ranker: what query and item have in common, as features, and a small network over them.

Learned by the list (softmax over the candidates, Cao et al. 2007) from judgments or, where there are only clicks, from
clicks weighted by ``search.propensity``. Axis legend: Q queries, N candidates, X features, B queries of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.checks import check_fields, check_minimum, check_positive, check_shares

FOLDS = 5
LEFT_OUT = -1e4  # score of the padding behind a shorter list


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


@dataclass(frozen=True, kw_only=True)
class SearchRankerConfig:
    """Size and training of the search ranker."""

    epochs: int = 60
    """Passes over the queries at most; cross-validation picks the number."""
    learning_rate: float = 3e-3
    """Of AdamW, constant."""
    weight_decay: float = 0.02
    """Of AdamW."""
    batch_size: int = 16
    """Queries a step."""
    hidden: int = 32
    """Width of the two hidden layers."""
    dropout: float = 0.2
    """Probability, 0 <= p < 1."""
    members: int = 16
    """Networks from other seeds, their scores averaged."""
    patience: int = 8
    """Epochs without a smaller held-out loss before a fold stops."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 1, "epochs", "batch_size", "hidden", "members", "patience")
        check_minimum(self, 0, "weight_decay")
        check_positive(self, "learning_rate")
        check_shares(self, "dropout")


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
            scores_N: np.ndarray = self.eval()(torch.from_numpy(features_NX)[None])[0].numpy()
        return scores_N


@dataclass(frozen=True)
class QueryLists:
    """Candidates of all queries that teach, padded to the longest list.

    ``x_QNX`` features float32; ``gains_QN`` float32; ``real_QN`` bool, False where padded; ``weight_Q`` float32: how
    much each query teaches, 1 on average.
    """

    x_QNX: Tensor
    gains_QN: Tensor
    real_QN: Tensor
    weight_Q: Tensor

    @classmethod
    def of(
        cls, lists: Sequence[np.ndarray], gains: Sequence[np.ndarray], weights: Sequence[float] | None
    ) -> QueryLists:
        """Raises ValueError where no query has a candidate that gains."""
        taught = [i for i, g in enumerate(gains) if g.sum() > 0]
        if not taught:
            raise ValueError("search ranker: expected at least one query with a candidate that gains, got none")
        inputs, longest = lists[taught[0]].shape[1], max(len(lists[i]) for i in taught)
        x_QNX = torch.zeros(len(taught), longest, inputs)
        gains_QN = torch.zeros(len(taught), longest)
        real_QN = torch.zeros(len(taught), longest, dtype=torch.bool)
        for row, i in enumerate(taught):
            n = len(lists[i])
            x_QNX[row, :n] = torch.from_numpy(lists[i])
            gains_QN[row, :n] = torch.from_numpy(gains[i]).float()
            real_QN[row, :n] = True
        weight_Q = torch.tensor([1.0 if weights is None else weights[i] for i in taught])
        return cls(x_QNX, gains_QN, real_QN, weight_Q / weight_Q.mean())

    def __len__(self) -> int:
        return len(self.weight_Q)

    @property
    def inputs(self) -> int:
        """X."""
        return self.x_QNX.shape[2]

    def loss(self, model: SearchRanker, rows: Tensor) -> Tensor:
        """Listwise softmax against the shares of the gains, weighted mean over the queries ``rows``."""
        scores = model(self.x_QNX[rows]).masked_fill(~self.real_QN[rows], LEFT_OUT)
        share = self.gains_QN[rows] / self.gains_QN[rows].sum(1, keepdim=True)
        return -(self.weight_Q[rows] * (share * F.log_softmax(scores, 1)).sum(1)).mean()


def _fit(
    model: SearchRanker, config: SearchRankerConfig, epochs: int, queries: QueryLists, learned: Tensor,
    held_out: Tensor | None = None,
) -> list[float]:  # fmt: skip
    """Learns from the queries ``learned``; after each epoch the loss on ``held_out``, until it has not fallen for
    ``patience``."""
    real_PX = queries.x_QNX[learned][queries.real_QN[learned]]
    model.mean.copy_(real_PX.mean(0))
    model.scale.copy_(1 / real_PX.std(0).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    curve: list[float] = []
    for _ in range(epochs):
        model.train()
        for rows in learned[torch.randperm(len(learned))].split(config.batch_size):
            optimizer.zero_grad()
            queries.loss(model, rows).backward()
            optimizer.step()
        model.eval()
        if held_out is not None:
            with torch.inference_mode():
                curve.append(float(queries.loss(model, held_out)))
            if int(np.argmin(curve)) < len(curve) - config.patience:
                break
    return curve


def _best_epochs(queries: QueryLists, config: SearchRankerConfig, seed: int) -> int:
    """The number of epochs that serves held-out queries best, by cross-validation; ``config.epochs`` where there are
    too few queries for it."""
    if len(queries) < 2 * FOLDS:
        return config.epochs
    order, curves = np.random.default_rng(seed).permutation(len(queries)), []
    for fold in range(FOLDS):
        torch.manual_seed(seed * 100 + fold)
        held_out = order[fold::FOLDS]
        model = SearchRanker(queries.inputs, config.hidden, config.dropout)
        parts = torch.from_numpy(np.setdiff1d(order, held_out)), torch.from_numpy(held_out)
        curves.append(_fit(model, config, config.epochs, queries, *parts))
    shortest = min(len(curve) for curve in curves)
    return int(np.mean([curve[:shortest] for curve in curves], 0).argmin()) + 1


def train_search_ranker(
    lists: Sequence[np.ndarray], gains: Sequence[np.ndarray], config: SearchRankerConfig, seed: int,
    weights: Sequence[float] | None = None,
) -> Ensemble:  # fmt: skip
    """Each member learns for as many epochs as served queries best that were held out, by cross-validation
    (``config.epochs`` at most, and where there are too few queries for it). ``lists``: features [N_q, X] of each
    query's candidates; ``gains`` [N_q] of the same, or clicks weighted by ``search.propensity``. Queries without any
    gain teach nothing; ``weights``: how much each teaches (all alike), of clicks the sum of their gains, as a list's
    gains count by their shares only."""
    queries = QueryLists.of(lists, gains, weights)
    epochs = _best_epochs(queries, config, seed)
    members = []
    for member in range(config.members):
        torch.manual_seed(seed * 1000 + member)
        members.append(SearchRanker(queries.inputs, config.hidden, config.dropout))
        _fit(members[-1], config, epochs, queries, torch.arange(len(queries)))
    return Ensemble(members)
