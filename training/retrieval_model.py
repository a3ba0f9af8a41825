"""The retrieval Transformer: a causal encoder of the user's events, scored against every item.

Source: SASRec (Kang & McAuley 2018) with pre-normalised blocks, tied item embeddings and a softmax over the whole
catalogue (Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023).
Axis legend: B requests, T history events, V item ids, D width, A attention heads, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.contract import FIRST_ID, PADDING_ID

MASKED = -1e9  # finite, so that a row whose keys are all padding stays a number
EXCLUDED = -1e30


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of the history encoder. ``history`` is T; dropout is a probability."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    history: int = 200
    dropout: float = 0.2
    ffn_factor: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"EncoderConfig: width {self.width} is not a multiple of heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"EncoderConfig.dropout: expected 0 <= p < 1, got {self.dropout}")


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward. An additive mask float32 [B, 1, T, T] carries what may be seen."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d = config.width
        self.heads, self.p = config.heads, config.dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, config.ffn_factor * d), nn.Linear(config.ffn_factor * d, d)

    def forward(self, x_BTD: Tensor, mask_B1TT: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(self.norm_attention(x_BTD)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT)  # no dropout here: slow on CPU
        a = self.out(a.transpose(1, 2).reshape(b, t, d))
        x_BTD = x_BTD + F.dropout(a, self.p, self.training)
        h = self.down(F.gelu(self.up(self.norm_ffn(x_BTD))))
        return x_BTD + F.dropout(h, self.p, self.training)


class RetrievalModel(nn.Module):
    """Causal encoder with tied item embeddings.

    Args:
        config: shape of the encoder.
        items: V, the number of item ids including the special ids 0..2.
        popularity: float [V], events of each item in the training data; orders the answer to an empty history.
    """

    popularity: Tensor
    causal_TT: Tensor

    def __init__(self, config: EncoderConfig, items: int, popularity: Tensor) -> None:
        super().__init__()
        if popularity.shape != (items,):
            raise ValueError(f"popularity: expected shape [{items}], got {list(popularity.shape)}")
        self.config = config
        self.item = nn.Embedding(items, config.width, padding_idx=PADDING_ID)
        self.position = nn.Embedding(config.history, config.width)  # the last row is the newest event's
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(items))
        self.register_buffer("popularity", popularity.float())
        t = config.history
        causal = torch.full((t, t), MASKED).triu(1)
        self.register_buffer("causal_TT", causal, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[PADDING_ID].zero_()

    def encode(self, history_BT: Tensor) -> Tensor:
        """Encoded history float32 [B, T, D] of ids int64 [B, T], padded on the left; T <= config.history."""
        t = int(history_BT.shape[1])  # a constant of the exported graph: only the batch axis is free
        known_BT = history_BT != PADDING_ID
        x_BTD = self.item(history_BT) * self.config.width**0.5 + self.position.weight[self.config.history - t :]
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        mask = self.causal_TT[:t, :t] + (~known_BT)[:, None, None, :].to(x_BTD.dtype) * MASKED
        for block in self.blocks:
            x_BTD = block(x_BTD, mask)
        return self.norm(x_BTD) * known_BT[:, :, None].to(x_BTD.dtype)

    def logits(self, encoded: Tensor) -> Tensor:
        """Score of every item, float32 [..., V], of encodings [..., D]."""
        return F.linear(encoded, self.item.weight, self.bias)

    def scores(self, history_BT: Tensor, encoded_BTD: Tensor, exclude_BV: Tensor) -> Tensor:
        """Retrieval score float32 [B, V]: the newest encoding against every item; where the history holds no
        known item, log popularity. Excluded items and the special ids get EXCLUDED."""
        scores_BV = self.logits(encoded_BTD[:, -1])
        empty_B1 = (history_BT < FIRST_ID).all(dim=1, keepdim=True)
        scores_BV = torch.where(empty_B1, torch.log1p(self.popularity)[None], scores_BV)
        special_V = torch.arange(scores_BV.shape[1], device=scores_BV.device) < FIRST_ID
        return torch.where(exclude_BV | special_V, torch.full_like(scores_BV, EXCLUDED), scores_BV)


class RetrievalGraph(nn.Module):
    """What is exported as ``retrieval.onnx``: ids and exclusions in, top-N candidates and the encoded history out."""

    def __init__(self, model: RetrievalModel, candidates: int) -> None:
        super().__init__()
        self.model, self.candidates = model, candidates

    def forward(self, history_ids: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self.model.encode(history_ids)
        scores = self.model.scores(history_ids, encoded, exclude)
        top, ids = torch.topk(scores, self.candidates, dim=1)
        ids = torch.where(top > EXCLUDED / 2, ids, torch.full_like(ids, PADDING_ID))
        return ids, top, encoded
