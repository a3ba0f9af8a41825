"""What is measured: rankers and retrievers of a preset with untrained weights, which changes no time, their inputs and
the work that they do. Axis legend: B requests, T history events, N candidates, V item ids, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.models.item_table import ItemTables
from training.models.ranking import RankingModel
from training.models.retrieval import RetrievalGraph, RetrievalModel
from training.presets import Preset, preset
from vivace.contract import FIRST_ID


@dataclass(frozen=True)
class Shape:
    """Sizes of a request."""

    history: int
    """T."""
    candidates: int
    """N."""
    width: int
    """D."""
    items: int
    """V."""


def shape_of(name: str, items: int, candidates: int = 0, history: int = 0) -> Shape:
    """A preset's sizes, with another number of candidates or events where given."""
    chosen = preset(name)
    t = history or chosen.ranker.memory or chosen.encoder.history
    return Shape(t, candidates or chosen.ranker.candidates, chosen.encoder.width, items)


def _with(name: str, shape: Shape) -> Preset:
    chosen = preset(name)
    encoder = replace(chosen.encoder, history=shape.history)
    return replace(chosen, encoder=encoder, ranker=replace(chosen.ranker, candidates=shape.candidates, memory=0))


def ranking_model(name: str, shape: Shape) -> RankingModel:
    """A preset's ranker, untrained. ``with torch.device(...)`` says where this and the others are made."""
    chosen, items = _with(name, shape), shape.items
    smallest = replace(chosen.encoder, layers=1, history=1)  # of the retriever only the item table is read
    retriever = RetrievalModel(smallest, items, torch.ones(items))
    followers = torch.randint(FIRST_ID, items, (items, chosen.ranker.followers), dtype=torch.int32)
    none = torch.zeros(items, 0)
    tables = ItemTables(torch.ones(items), followers, torch.rand(followers.shape), none.long(), (), none)
    model = RankingModel(chosen.ranker, tables, retriever, ("click", "buy"))
    for layer in model.score.values():  # zero before training, and eight bits of nothing have no scale
        torch.nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def ranking_inputs(batch: int, shape: Shape) -> list[Tensor]:
    """HISTORY_IDS, CANDIDATE_IDS, CANDIDATE_SCORES, ENCODED_HISTORY."""
    scores = torch.randn(batch, shape.candidates).sort(1, descending=True).values
    span = shape.items - FIRST_ID
    start = torch.randint(0, span, (batch, 1))
    stride = next(prime for prime in (7, 11, 13, 17, 19) if span % prime)  # walks over all items: none comes twice
    return [
        torch.randint(FIRST_ID, shape.items, (batch, shape.history)),
        (start + torch.arange(shape.candidates) * stride) % span + FIRST_ID,
        scores,
        torch.randn(batch, shape.history, shape.width),
    ]


def retrieval_graph(name: str, shape: Shape) -> RetrievalGraph:
    """A preset's retriever with an exact search of all items, untrained."""
    model = RetrievalModel(_with(name, shape).encoder, shape.items, torch.ones(shape.items))
    return RetrievalGraph(model, shape.candidates).eval().requires_grad_(False)


def retrieval_inputs(batch: int, shape: Shape) -> list[Tensor]:
    """HISTORY_IDS and EXCLUDE."""
    history = torch.randint(FIRST_ID, shape.items, (batch, shape.history))
    return [history, torch.zeros(batch, shape.items, dtype=torch.bool).scatter_(1, history, True)]


def cast(graph: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights of a graph in another format, in place."""
    return graph.to(dtype)


def ranker_flops(name: str, shape: Shape, folded: bool = False) -> float:
    """FLOPs a request of the ranker's linear layers and attention, two for a product and its sum. ``folded``: without
    the layers whose answers are read from tables."""
    of, t, n, d = preset(name).ranker, shape.history, shape.candidates, shape.width
    x = 3 * d + 32
    layers = d * d * (1 if folded else 3) + (5 + 2 * of.lags) * 64 + 64 * 32 + x * of.experts * of.expert_width
    heads = 2 * x * of.experts + 2 * 2 * of.expert_width * 32 + 2 * 32
    keys = t * 2 * d * d * (1 if folded else 2)
    return 2.0 * (n * (layers + heads) + keys + 2 * n * t * d)


def retriever_flops(name: str, shape: Shape) -> float:
    """The same of the encoder and the exact search."""
    of, t, d = preset(name).encoder, shape.history, shape.width
    block = t * (4 * d * d + 2 * d * of.of_ffn) + 2 * t * t * d
    return 2.0 * (of.layers * block + d * shape.items)


def bytes_of(graph: nn.Module, inputs: list[Tensor], outputs: list[Tensor], itemsize: int) -> float:
    """Bytes of weights (item tables of the ranker aside, of which a request reads rows), inputs and outputs."""
    tables = (".item.", "follower_", "popularity", "described_", "candidate_VF", "history_VE")
    every = [*graph.named_parameters(), *graph.named_buffers()]
    weights = sum(x.numel() for name, x in every if x.is_floating_point() and not any(t in name for t in tables))
    return float(weights * itemsize + sum(x.numel() * x.element_size() for x in (*inputs, *outputs)))
