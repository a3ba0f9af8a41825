"""The retrieval model: an encoder of the user's events, scored against every item.

Source: SASRec (Kang & McAuley 2018) with pre-normalised blocks, tied item embeddings and a softmax over the whole
catalogue (Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023); other encoders in ``encoders``.
Axis legend: B requests, T history events, V item ids, D width, N candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.encoders import MASKED, Adapter, EncoderConfig, build_encoder, dropout
from training.models.int8_table import Int8Table
from training.models.item_table import ItemAttributes, ItemTable
from training.models.session_memory import SessionMemory
from vivace.contract import FIRST_ID, PADDING_ID

__all__ = ["EXCLUDED", "MASKED", "EncoderConfig", "RetrievalGraph", "RetrievalModel", "propose"]

EXCLUDED = -1e30


class RetrievalModel(nn.Module):
    """Encoder with tied item embeddings.

    Args:
        config: shape of the encoder.
        items: V, the number of item ids including the special ids 0..2.
        popularity: float [V], events of each item in the training data; orders the answer to an empty history.
        attributes: what the catalogue says of the items, where ``config`` asks for it.
    """

    popularity: Tensor

    def __init__(
        self, config: EncoderConfig, items: int, popularity: Tensor, attributes: ItemAttributes | None = None
    ) -> None:
        super().__init__()
        if popularity.shape != (items,):
            raise ValueError(f"popularity: expected shape [{items}], got {list(popularity.shape)}")
        self.config = config
        self.masked = config.family == "bert4rec"
        length = config.history + self.masked  # the place that asks for the next item comes last
        self.items = ItemTable(items, config.width, attributes, config.id_dropout)
        recurrent = config.family in ("gru", "lstm")
        self.position = None if recurrent else nn.Embedding(length, config.width)  # the last row is the newest event's
        self.encoder = build_encoder(config, length)
        self.norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(items))
        self.register_buffer("popularity", popularity.float())
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Adapter):
                module.reset()
        with torch.no_grad():
            self.items.id.weight[PADDING_ID].zero_()
        self.memory = SessionMemory(items, config.neighbours, config.history) if config.neighbours else None
        self.remembers = True  # False while the encoder is trained: the memory's table holds the targets of training
        self.mask_token = nn.Parameter(torch.zeros(config.width).normal_(std=0.02)) if self.masked else None

    def table(self) -> Tensor:
        """Embeddings of all items float32 [V, D]; training asks once a step, an exported graph holds them."""
        table: Tensor = self.items()
        return table

    def _run(self, x_BTD: Tensor, known_BT: Tensor, times: Tensor | None, newest: int = 0) -> Tensor:
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[self.position.num_embeddings - x_BTD.shape[1] :]
        x_BTD = dropout(x_BTD, self.config.dropout, self.training)
        if not self.config.time_bias:
            times = None
        elif times is None:
            times = torch.zeros_like(known_BT, dtype=torch.long)
        h = self.norm(self.encoder(x_BTD, known_BT, times, newest))
        return h * known_BT[:, -newest:, None].to(x_BTD.dtype)

    def _embedded(self, history_BT: Tensor, table: Tensor | Int8Table) -> Tensor:
        rows = table(history_BT) if isinstance(table, Int8Table) else F.embedding(history_BT, table)
        return rows * self.config.width**0.5

    def encode(
        self,
        history_BT: Tensor,
        table_VD: Tensor | Int8Table | None = None,
        times: Tensor | None = None,
        newest: int = 0,
    ) -> Tensor:
        """Encoded history float32 [B, T, D] of ids int64 [B, T], padded on the left; T <= config.history. ``times`` in
        ms, int64 [B, T], 0 where unknown: read by a configuration with ``time_bias``. ``newest``: only the last so many
        rows are worked out, [B, newest, D] (0: all).

        The newest row is the user's state, which is scored against the items; rows of padding are zero."""
        table_VD = self.table() if table_VD is None else table_VD
        known_BT = history_BT != PADDING_ID
        x_BTD = self._embedded(history_BT, table_VD)
        if self.mask_token is None:
            return self._run(x_BTD, known_BT, times, newest)
        mask_B1D = self.mask_token + torch.zeros_like(x_BTD[:, :1])
        if times is not None:  # the place that asks stands beside the newest event
            times = torch.cat([times, times[:, -1:]], 1)
        h = self._run(
            torch.cat([x_BTD, mask_B1D], 1), torch.cat([known_BT, torch.ones_like(known_BT[:, :1])], 1), times
        )
        return torch.cat([h[:, : history_BT.shape[1] - 1], h[:, -1:]], 1)[:, -newest:]

    def encode_masked(
        self, window_BT: Tensor, hidden_BT: Tensor, table_VD: Tensor, times: Tensor | None = None
    ) -> Tensor:
        """Encodings [B, T, D] of a window whose ``hidden_BT`` items are replaced by the mask (Sun et al. 2019)."""
        if self.mask_token is None:
            raise ValueError("encode_masked: only the bert4rec family has a mask token")
        x_BTD = torch.where(hidden_BT[:, :, None], self.mask_token, self._embedded(window_BT, table_VD))
        return self._run(x_BTD, window_BT != PADDING_ID, times)

    def logits(self, encoded: Tensor, table_VD: Tensor | Int8Table | None = None) -> Tensor:
        """Score of every item, float32 [..., V], of encodings [..., D]."""
        if isinstance(table_VD, Int8Table):
            return table_VD.scores(encoded) + self.bias
        return F.linear(encoded, self.table() if table_VD is None else table_VD, self.bias)

    def scores(
        self,
        history_BT: Tensor,
        encoded_BTD: Tensor,
        exclude_BV: Tensor,
        table_VD: Tensor | Int8Table | None = None,
    ) -> Tensor:
        """Retrieval score float32 [B, V]: the newest encoding against every item, with what the session
        memory adds; where the history holds no known item, log popularity. Excluded items and the special ids get
        EXCLUDED."""
        scores_BV = self.logits(encoded_BTD[:, -1], table_VD)
        if self.memory is not None and self.remembers:
            scores_BV = self.memory(scores_BV, history_BT)
        if scores_BV.dtype != torch.float32:  # a graph cast to 16 bits: EXCLUDED is beyond half precision
            scores_BV = scores_BV.float()
        empty_B1 = (history_BT < FIRST_ID).all(dim=1, keepdim=True)
        scores_BV = torch.where(empty_B1, torch.log1p(self.popularity.float())[None], scores_BV)
        special_V = torch.arange(scores_BV.shape[1], device=scores_BV.device) < FIRST_ID
        return torch.where(exclude_BV | special_V, torch.full_like(scores_BV, EXCLUDED), scores_BV)


class RetrievalGraph(nn.Module):
    """What is exported as ``retrieval.onnx``: ids and exclusions (and times, if the encoder reads them) in, top-N
    candidates and the encoded history out."""

    table_VD: Tensor | Int8Table

    def __init__(
        self, model: RetrievalModel, candidates: int, memory: int = 0, int8_table: bool = False, rising: int = 0
    ) -> None:
        """``memory``: newest encoded events that are handed to the ranker (0: all); ``rising``: items that join the
        candidates (0: none)."""
        super().__init__()
        self.model, self.candidates, self.memory, self.rising = model, candidates, memory, rising
        with torch.no_grad():
            table = model.table().detach().clone()
        if int8_table:
            self.table_VD = Int8Table(table)
        else:
            self.register_buffer("table_VD", table)

    def forward(
        self, history_ids: Tensor, exclude: Tensor, third: Tensor | None = None, fourth: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs are those of ``contract.retrieval_inputs``: after the exclusions come the times of the history, if
        the encoder reads them, then the rising items, if there are any."""
        more = [x for x in (third, fourth) if x is not None]
        times = more[0] if self.model.config.time_bias and more else None
        encoded = self.model.encode(history_ids, self.table_VD, times, self.memory)
        scores = self.model.scores(history_ids, encoded, exclude, self.table_VD)
        return *propose(scores, self.candidates, more[-1] if self.rising else None), encoded


def propose(scores_BV: Tensor, count: int, rising_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, N], scores [B, N]) of the best ``count`` items, best first; id 0 where only excluded ones are
    left. With ``rising_BM`` int64 [B, M] those come before them, each item once, in [B, M + N]."""
    if rising_BM is None:
        top, ids = torch.topk(scores_BV, count, dim=1)
        return torch.where(top > EXCLUDED / 2, ids, torch.full_like(ids, PADDING_ID)), top
    of_rising_BM = scores_BV.gather(1, rising_BM)
    others_BV = scores_BV.scatter(1, rising_BM, torch.full_like(of_rising_BM, EXCLUDED))
    top, ids = torch.topk(others_BV, count, dim=1)
    ids_BN, scores_BN = torch.cat([rising_BM, ids], 1), torch.cat([of_rising_BM, top], 1)
    there_BN = scores_BN > EXCLUDED / 2
    # in their order, what is left out to the end: topk of distinct integers is a stable sort
    place = torch.arange(ids_BN.shape[1], 0, -1, device=ids_BN.device, dtype=scores_BN.dtype)
    _, order = torch.topk(there_BN.to(scores_BN.dtype) * 65536.0 + place, ids_BN.shape[1], dim=1)
    ids_BN = torch.where(there_BN, ids_BN, torch.full_like(ids_BN, PADDING_ID))
    return ids_BN.gather(1, order), scores_BN.gather(1, order)
