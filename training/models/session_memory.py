"""What sessions before this one say of its next item: neighbours of its items, and the items themselves again.

V-SKNN without its limits is linear in co-occurrence: summed over all sessions that share an item, the score of an item
is the sum over the history of (weight by lag) x (sessions with both) (Ludewig & Jannach 2018, section 3.2). So the
neighbours are a table of the catalogue, and finding them is a product inside the graph. That an item comes again is
learned by lag (RepeatNet, Ren et al. 2019, has a network for it).
``LinearMemory`` has the weights of a linear autoencoder in that table (EASE, Steck 2019, eq. 8): it reads the whole
history alike, for logs that are small and of steady taste.
Axis legend: B requests, T history events, V item ids, K neighbours kept an item, S sessions.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from vivace.contract import FIRST_ID, PADDING_ID

LONGEST = 50  # newest items of a session that count: bounds the table's cost to its square an event
DECAY = 0.85  # of an event's weight with each later one, before fitting
LINEAR_DECAY = 0.97  # the same of ``LinearMemory``
LARGEST = 20_000  # rows of the matrix that ``linear_weights`` inverts: 3 GB and minutes
BLOCK = 1024  # items whose weights are worked out at once


def neighbour_shares(sessions_SV: sp.csr_matrix, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [V, K], shares float32 [V, K]): of the sessions with an item the share that has the other too, the
    ``keep`` largest, of equals the smaller id first; id PADDING_ID and share 0 where there are fewer. ``sessions_SV``:
    1 where a session has an item."""
    both = (sessions_SV.T @ sessions_SV).tocsr()
    count = both.diagonal()
    both.setdiag(0)
    both.eliminate_zeros()
    both.sort_indices()
    ids = np.full((both.shape[0], keep), PADDING_ID, np.int64)
    shares = np.zeros((both.shape[0], keep), np.float32)
    for item in range(both.shape[0]):
        part = slice(both.indptr[item], both.indptr[item + 1])
        best = np.argsort(-both.data[part], kind="stable")[:keep]
        ids[item, : len(best)] = both.indices[part][best]
        shares[item, : len(best)] = both.data[part][best] / count[item]
    return ids, shares


def linear_weights(sessions_SV: sp.csr_matrix, keep: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [V, K], weights float32 [V, K]): row i is what item i says of others, the ``keep`` largest weights
    above 0 of the linear autoencoder with a zero diagonal and a ridge penalty; id PADDING_ID and weight 0 where there
    are fewer. ``sessions_SV``: 1 where a session has an item.

    With P = (X'X + ridge I)^-1 the weights are -P_ij / P_jj. Of sessions and of seen items the fewer are inverted: with
    fewer sessions ridge P = I - X' (XX' + ridge I)^-1 X. Raises ValueError for more than LARGEST of both."""
    items = sessions_SV.shape[1]
    ids, weights = np.full((items, keep), PADDING_ID, np.int64), np.zeros((items, keep), np.float32)
    seen = np.flatnonzero(sessions_SV.getnnz(axis=0))
    if not len(seen):
        return ids, weights
    x_SW = sessions_SV[:, seen].astype(np.float64).tocsr()
    few = x_SW.shape[0] < len(seen)
    gram = (x_SW @ x_SW.T if few else x_SW.T @ x_SW).toarray()
    if len(gram) > LARGEST:
        raise ValueError(
            f"encoder.neighbours_by 'linear': expected at most {LARGEST:,} sequences or seen items, got "
            f"{x_SW.shape[0]:,} and {len(seen):,}; train with encoder.neighbours_by 'sessions'"
        )
    gram[np.diag_indices_from(gram)] += ridge
    inverse = np.linalg.inv(gram)
    left_WS = np.asarray(x_SW.T @ inverse) if few else np.empty((0, 0))
    share_W = np.asarray(x_SW.T.multiply(left_WS).sum(1)).ravel() if few else 1.0 - ridge * inverse.diagonal()
    for start in range(0, len(seen), BLOCK):
        rows = slice(start, start + BLOCK)
        fitted_IW = np.asarray(left_WS[rows] @ x_SW) if few else -ridge * inverse[rows]
        fitted_IW = fitted_IW / (1.0 - share_W)
        at = np.arange(len(fitted_IW))
        fitted_IW[at, at + start] = 0.0
        best_IK = np.argsort(-fitted_IW, axis=1, kind="stable")[:, :keep]
        value_IK = np.take_along_axis(fitted_IW, best_IK, 1)
        kept = slice(0, best_IK.shape[1])
        ids[seen[rows], kept] = np.where(value_IK > 0, seen[best_IK], PADDING_ID)
        weights[seen[rows], kept] = np.maximum(value_IK, 0.0)
    return ids, weights


class SessionMemory(nn.Module):
    """Adds to a retriever's scores what co-occurrence and repetition say. Its few numbers are fitted on requests whose
    targets are not in the table: those of training would find themselves."""

    neighbour_ids_VK: Tensor
    neighbour_shares_VK: Tensor

    def __init__(self, items: int, neighbours: int, history: int) -> None:
        super().__init__()
        self.register_buffer("neighbour_ids_VK", torch.zeros(items, neighbours, dtype=torch.int32))
        self.register_buffer("neighbour_shares_VK", torch.zeros(items, neighbours))
        self.own = nn.Parameter(torch.tensor(0.3))  # of the retriever's scores
        self.weight = nn.Parameter(torch.tensor(0.8))  # of the log of the neighbours' sum
        self.floor = nn.Parameter(torch.tensor(-6.0))  # log of what an item has that is no neighbour
        self.decay = nn.Parameter(torch.logit(torch.tensor(DECAY)))
        self.again_T = nn.Parameter(torch.linspace(0.0, 0.7, history))  # of each place the item stands at, newest last
        self.seen = nn.Parameter(torch.tensor(7.0))  # of an item of the history
        self.seen_weight = nn.Parameter(torch.tensor(0.0))  # the same, of the log of its neighbours' sum
        self.seen_length = nn.Parameter(torch.tensor(-0.7))  # the same, of the log of the history's length
        self.requires_grad_(False)  # the encoder's training leaves them alone

    def remember(self, ids_VK: np.ndarray, shares_VK: np.ndarray) -> None:
        """Takes the table of ``neighbour_shares``."""
        self.neighbour_ids_VK.copy_(torch.from_numpy(ids_VK))
        self.neighbour_shares_VK.copy_(torch.from_numpy(shares_VK))

    def near(self, scores_BV: Tensor, history_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log of each item's sum over the history [B, V], 1 where an event's item is known [B, T], lag of each event
        [T], 0 the newest)."""
        t = history_BT.shape[1]  # without int(): a free axis of the exported graph
        known_BT = (history_BT >= FIRST_ID).to(scores_BV.dtype)
        lag_T = torch.arange(t - 1, -1, -1, device=history_BT.device).to(scores_BV.dtype)
        weight_T = torch.exp(lag_T * nn.functional.logsigmoid(self.decay))
        ids = self.neighbour_ids_VK[history_BT].to(torch.int64).flatten(1)
        shares = (self.neighbour_shares_VK[history_BT] * (known_BT * weight_T)[:, :, None]).flatten(1)
        near_BV = torch.log(torch.zeros_like(scores_BV).scatter_add(1, ids, shares) + torch.exp(self.floor))
        return near_BV, known_BT, lag_T

    def of_seen(self, near_BV: Tensor, known_BT: Tensor, history_BT: Tensor) -> Tensor:
        """What an item of the history has for being one, [B, T]."""
        length_B1 = torch.log(known_BT.sum(1, keepdim=True).clamp_min(1.0))
        of_seen: Tensor = self.seen + self.seen_length * length_B1 + self.seen_weight * near_BV.gather(1, history_BT)
        return of_seen

    def forward(self, scores_BV: Tensor, history_BT: Tensor) -> Tensor:
        """Scores float32 [B, V] of the retriever's ``scores_BV`` and a history int64 [B, T], padded on the left."""
        t = history_BT.shape[1]
        # few passes over [B, V]: what concerns items of the history alone is worked out at its places
        near_BV, known_BT, lag_T = self.near(scores_BV, history_BT)
        of_seen_BT = self.of_seen(near_BV, known_BT, history_BT)
        again_BTT = (history_BT[:, :, None] == history_BT[:, None, :]) & (lag_T[:, None] > lag_T[None, :])[None]
        newest_BT = (again_BTT.to(scores_BV.dtype).sum(2) == 0).to(scores_BV.dtype)
        again_T = self.again_T[self.again_T.shape[0] - t :]
        places_BT = known_BT * (again_T + newest_BT * of_seen_BT)
        return (self.own * scores_BV + self.weight * near_BV).scatter_add(1, history_BT, places_BT)


class LinearMemory(SessionMemory):
    """The same with the table of ``linear_weights``. That an item comes again has a few numbers instead of one a place:
    by how often it is in the history, and how long ago."""

    def __init__(self, items: int, neighbours: int, history: int) -> None:
        super().__init__(items, neighbours, history)
        del self.again_T
        first = {"own": 0.5, "weight": 1.0, "seen": 2.0, "seen_length": -0.5, "decay": math.log(LINEAR_DECAY)}
        first["decay"] -= math.log1p(-LINEAR_DECAY)
        for name, value in first.items():
            getattr(self, name).data.fill_(value)
        self.seen_lag = nn.Parameter(torch.tensor(0.0), requires_grad=False)  # of log1p of the newest place's lag
        self.seen_count = nn.Parameter(torch.tensor(0.5), requires_grad=False)  # of the log of how often

    def forward(self, scores_BV: Tensor, history_BT: Tensor) -> Tensor:
        """See ``SessionMemory.forward``."""
        near_BV, known_BT, lag_T = self.near(scores_BV, history_BT)
        same_BTT = history_BT[:, :, None] == history_BT[:, None, :]
        later_BTT = (same_BTT & (lag_T[:, None] > lag_T[None, :])[None]).to(scores_BV.dtype)
        newest_BT = (later_BTT.sum(2) == 0).to(scores_BV.dtype)
        count_BT = same_BTT.to(scores_BV.dtype).sum(2)
        of_seen_BT = self.of_seen(near_BV, known_BT, history_BT)
        of_seen_BT = of_seen_BT + self.seen_lag * torch.log1p(lag_T) + self.seen_count * torch.log(count_BT)
        places_BT = known_BT * newest_BT * of_seen_BT
        return (self.own * scores_BV + self.weight * near_BV).scatter_add(1, history_BT, places_BT)
