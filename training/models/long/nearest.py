"""Of the events before those that come encoded, the ones nearest to the candidates, for the ranker to attend to.

Source: TransAct V2 (Xia et al. 2025), which hands a ranking Transformer, beside the newest events of a lifelong
history, the ones whose item vectors are nearest to the candidate's; ETA (Chen et al. 2021) for the same by hashes.
Axis legend: B requests, O older events, N candidates, K chosen events, D width, A heads, H width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.contract import PADDING_ID

AGES = 16  # buckets of how long ago an older event was, by powers of two
TIE = 1e-6  # of a place: equal items are told apart by which came later, in every engine alike
NOTHING = -2.0  # below any cosine


class Chosen:
    """Chosen events: keys and values [B, N, K, D] or, the same for all candidates, [B, 1, K, D]; what is added to
    their attention, [B, N or 1, K], MASKED where none is left; and two features of each candidate, [B, N, 2]."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor, features: Tensor, shared: bool) -> None:
        self.key, self.value, self.mask, self.features, self.shared = key, value, mask, features, shared


class NearestEvents(nn.Module):
    """``per_candidate``: each candidate has K events of its own; else the K that are nearest to any candidate serve
    all."""

    unit_key_value_VE: Tensor | None

    def __init__(self, width: int, count: int, per_candidate: bool) -> None:
        super().__init__()
        self.width, self.count, self.per_candidate = width, count, per_candidate
        self.key_value = nn.Linear(width, 2 * width)
        self.age = nn.Embedding(AGES, 2 * width)
        self.direct = nn.Linear(2, 1, bias=False)  # of the features, onto the score
        nn.init.zeros_(self.age.weight)
        nn.init.zeros_(self.direct.weight)
        self.register_buffer("unit_key_value_VE", None)

    def fold(self, items_VD: Tensor) -> None:
        """Works out what is read of each item once."""
        with torch.no_grad():
            self.unit_key_value_VE = torch.cat([F.normalize(items_VD, dim=1), self.key_value(items_VD)], 1)

    def _of_items(self, ids: Tensor, item: nn.Module) -> tuple[Tensor, Tensor]:
        """(vectors of length one [..., D], keys and values [..., 2 D]) of items."""
        if self.unit_key_value_VE is not None:
            unit, key_value = F.embedding(ids, self.unit_key_value_VE).split([self.width, 2 * self.width], -1)
            return unit, key_value
        vectors = item(ids)
        return F.normalize(vectors, dim=-1), self.key_value(vectors)

    def forward(
        self, older_BO: Tensor, candidate_BND: Tensor, ids_BN: Tensor, item: nn.Module,
        of_types_BOE: Tensor | None = None, masked: float = -1e9,
    ) -> Chosen:  # fmt: skip
        """``older_BO``: ids of the older events, int64, padded on the left; ``candidate_BND``: the candidates' item
        vectors; ``ids_BN``: their ids, PADDING_ID where there is none; ``of_types_BOE``: what the events' types add to
        keys and values, [B, O, 2 D]."""
        k, d = self.count, self.width
        older_BO = F.pad(older_BO, (k, 0), value=PADDING_ID)  # there are always as many as are chosen
        o = older_BO.shape[1]  # without int(): a free axis of the exported graph
        unit_BOD, key_value_BOE = self._of_items(older_BO, item)
        if of_types_BOE is not None:
            key_value_BOE = key_value_BOE + F.pad(of_types_BOE, (0, 0, k, 0))
        age_O = torch.arange(o, 0, -1, device=older_BO.device)  # 1: the newest of them
        bucket_O = (torch.log2(age_O.to(torch.float32)) + 1e-4).to(torch.int64).clamp_max(AGES - 1)
        key_value_BOE = key_value_BOE + self.age(bucket_O)
        known_B1O = (older_BO != PADDING_ID)[:, None, :]
        near_BNO = F.normalize(candidate_BND, dim=-1) @ unit_BOD.transpose(1, 2)
        near_BNO = torch.where(known_B1O, near_BNO - TIE * age_O.to(near_BNO.dtype), torch.full_like(near_BNO, NOTHING))
        if self.per_candidate:
            near_BNK, place_BNK = torch.topk(near_BNO, k, dim=2)
            flat = place_BNK.flatten(1)[..., None].expand(-1, -1, 2 * d)
            key_value = key_value_BOE.gather(1, flat).unflatten(1, (-1, k))
            mask = (near_BNK <= NOTHING).to(near_BNK.dtype) * masked
            of_chosen_BNK = older_BO.gather(1, place_BNK.flatten(1)).unflatten(1, (-1, k))
        else:
            to_any_BO = torch.where(
                (ids_BN != PADDING_ID)[..., None], near_BNO, torch.full_like(near_BNO, NOTHING)
            ).amax(1)
            to_any_BK, place_BK = torch.topk(to_any_BO, k, dim=1)
            key_value = key_value_BOE.gather(1, place_BK[..., None].expand(-1, -1, 2 * d))[:, None]
            n = near_BNO.shape[1]
            near_BNK = near_BNO.gather(2, place_BK[:, None].expand(-1, n, -1))
            mask = (to_any_BK <= NOTHING).to(near_BNK.dtype)[:, None] * masked
            of_chosen_BNK = older_BO.gather(1, place_BK)[:, None]
        key, value = key_value.split(d, -1)
        nearest = near_BNK.amax(2).clamp_min(-1.0)
        again = (of_chosen_BNK == ids_BN[..., None]).to(near_BNK.dtype).sum(2)
        return Chosen(key, value, mask, torch.stack([nearest, torch.log1p(again)], 2), not self.per_candidate)


def attend_both(query_BAND: Tensor, key_BATD: Tensor, value_BATD: Tensor, mask_B11T: Tensor, chosen: Chosen) -> Tensor:
    """One softmax over the encoded events and the chosen ones, [B, N, A x H]; ``query_BAND`` [B, A, N, H]."""
    heads, of_head = query_BAND.shape[1], query_BAND.shape[3]
    split = lambda x: x.unflatten(3, (heads, of_head)).permute(0, 3, 1, 2, 4)  # noqa: E731  [B, A, N or 1, K, H]
    key, value = split(chosen.key), split(chosen.value)
    scale = of_head**-0.5
    to_new = (query_BAND @ key_BATD.transpose(2, 3)) * scale + mask_B11T
    to_old = query_BAND @ key[:, :, 0].transpose(2, 3) if chosen.shared else (query_BAND[:, :, :, None] * key).sum(4)
    to_old = to_old * scale + chosen.mask[:, None]
    t = key_BATD.shape[2]
    weight = torch.softmax(torch.cat([to_new, to_old], 3), 3)
    of_new, of_old = weight[..., :t], weight[..., t:]
    old = of_old @ value[:, :, 0] if chosen.shared else (of_old[..., None] * value).sum(3)
    return (of_new @ value_BATD + old).transpose(1, 2).flatten(2)
