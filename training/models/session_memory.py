"""What sessions before this one say of its next item: neighbours of its items, and the items themselves again.

V-SKNN without its limits is linear in co-occurrence: summed over all sessions that share an item, the score of an item
is the sum over the history of (weight by lag) x (sessions with both) (Ludewig & Jannach 2018, section 3.2). So the
neighbours are a table of the catalogue, and finding them is a product inside the graph. That an item comes again is
learned by lag (RepeatNet, Ren et al. 2019, has a network for it).
Axis legend: B requests, T history events, V item ids, K neighbours kept an item.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from vivace.contract import FIRST_ID, PADDING_ID

LONGEST = 50  # newest items of a session that count: bounds the table's cost to its square an event
DECAY = 0.85  # of an event's weight with each later one, before fitting


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

    def forward(self, scores_BV: Tensor, history_BT: Tensor) -> Tensor:
        """Scores float32 [B, V] of the retriever's ``scores_BV`` and a history int64 [B, T], padded on the left."""
        t = history_BT.shape[1]  # without int(): a free axis of the exported graph
        known_BT = (history_BT >= FIRST_ID).to(scores_BV.dtype)
        lag_T = torch.arange(t - 1, -1, -1, device=history_BT.device).to(scores_BV.dtype)
        weight_T = torch.exp(lag_T * nn.functional.logsigmoid(self.decay))
        ids = self.neighbour_ids_VK[history_BT].to(torch.int64).flatten(1)
        shares = (self.neighbour_shares_VK[history_BT] * (known_BT * weight_T)[:, :, None]).flatten(1)
        # few passes over [B, V]: what concerns items of the history alone is worked out at its places
        near_BV = torch.log(torch.zeros_like(scores_BV).scatter_add(1, ids, shares) + torch.exp(self.floor))
        length_B1 = torch.log(known_BT.sum(1, keepdim=True).clamp_min(1.0))
        of_seen_BT = self.seen + self.seen_length * length_B1 + self.seen_weight * near_BV.gather(1, history_BT)
        again_BTT = (history_BT[:, :, None] == history_BT[:, None, :]) & (lag_T[:, None] > lag_T[None, :])[None]
        newest_BT = (again_BTT.to(scores_BV.dtype).sum(2) == 0).to(scores_BV.dtype)
        again_T = self.again_T[self.again_T.shape[0] - t :]
        places_BT = known_BT * (again_T + newest_BT * of_seen_BT)
        return (self.own * scores_BV + self.weight * near_BV).scatter_add(1, history_BT, places_BT)
