"""The trained models in PyTorch as a service without Triton would hold them: what the peers serve."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore")

from preprocessing.features import Features  # noqa: E402
from training.checkpoints import load_ranker, load_retrieval  # noqa: E402
from training.models.ranking import RankingGraph  # noqa: E402
from training.models.retrieval import RetrievalGraph  # noqa: E402
from training.presets import from_json  # noqa: E402
from vivace import contract  # noqa: E402
from vivace.masks import excluded  # noqa: E402
from vivace.run import Run  # noqa: E402


class EagerRecommender:
    """Item ids in, item ids out, by PyTorch eager; the same weights, candidates and order as the ensemble."""

    def __init__(self, root: Path) -> None:
        features = Features(Run(root).features)
        preset = from_json(json.loads(Run(root).preset.read_text()))
        names = features.items()[contract.ITEM].tolist()
        self.names = [""] * contract.FIRST_ID + names
        self.ids = {name: i + contract.FIRST_ID for i, name in enumerate(names)}
        self.heads = [h.name for h in features.schema.heads]
        self.seen = features.schema.exclude_seen
        self.length, self.items = preset.encoder.history, features.item_count()
        if preset.encoder.time_bias:
            raise ValueError("peers: expected a model without times, got one with time_bias")
        count = min(preset.ranker.candidates, self.items - contract.FIRST_ID)
        encoder = load_retrieval(features, preset, root).cpu()
        if encoder.read_context.time_zone:
            raise ValueError(
                "peers: expected a model without a clock, as peers have none; train with encoder.context false"
            )
        self.retrieval = RetrievalGraph(encoder, count, preset.ranker.memory).eval()
        self.ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()

    def __call__(self, histories: Sequence[Sequence[str]], top_k: Sequence[int]) -> list[dict[str, Any]]:
        """One answer a row: item_id, score and a probability a head, best first."""
        histories_ids = [np.array([self.ids.get(i, contract.OOV_ID) for i in h], np.int64) for h in histories]
        padded = np.zeros((len(histories_ids), self.length), np.int64)
        for row, ids in zip(padded, histories_ids, strict=True):
            last = ids[-self.length :]
            row[self.length - len(last) :] = last
        exclude = excluded([ids if self.seen else ids[:0] for ids in histories_ids], self.items)
        with torch.inference_mode():
            history = torch.from_numpy(padded)
            ids, values = self.ranking(history, *self.retrieval(history, torch.from_numpy(exclude)))
        out = []
        for row, values_CN, k in zip(ids.tolist(), values.numpy(), top_k, strict=True):
            items = [self.names[i] for i in row[:k] if i != contract.PADDING_ID]
            score, *heads = values_CN[:, : len(items)].tolist()
            out.append({"item_id": items, "score": score, **dict(zip(self.heads, heads, strict=True))})
        return out
