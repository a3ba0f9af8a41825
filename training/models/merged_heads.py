"""Experts, gates and towers of a trained ranker in few, large products: the same logits but for rounding.

As trained, the widest tensor of the ranker is read by each expert and each gate for itself, and experts are weighed by
a product that writes [P, X, W] for each head. Here experts and gates are one matrix product, towers another, and the
weighing is a sum of X products.
Axis legend: P rows, F features, X experts, W their width, H heads.
"""

from __future__ import annotations

import copy
import re
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
EXPERT = re.compile(r"experts\.values\.0\.values\.0\.branches\.(\d+)\.values\.1\.weight")
MERGED = "mmoe"  # the mixture that has this form


def merged(layers: list[nn.Linear] | list[tuple[Tensor, Tensor]], aligned: int = 1) -> nn.Linear:
    """One layer whose output is that of all, one after the other, padded to a multiple of ``aligned``."""
    pairs = [(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer for layer in layers]
    weight, bias = (torch.cat([pair[i].detach().float() for pair in pairs]) for i in (0, 1))
    missing = -len(weight) % aligned
    one = nn.Linear(weight.shape[1], len(weight) + missing)
    one.weight = nn.Parameter(F.pad(weight, (0, 0, 0, missing)), requires_grad=False)
    one.bias = nn.Parameter(F.pad(bias, (0, missing)), requires_grad=False)
    return one


class MergedHeads(nn.Module):
    """What ``RankingModel`` does with its features, of a trained one whose mixture is MERGED. ``aligned``: experts and
    gates are padded to a multiple of so many channels."""

    def __init__(self, model: Any, aligned: int = 1) -> None:
        super().__init__()
        if model.config.mixture != MERGED:
            raise ValueError(f"MergedHeads: expected the mixture {MERGED!r}, got {model.config.mixture!r}")
        self.experts, self.width, self.heads = model.config.experts, model.config.expert_width, len(model.head_names)
        state = {name.replace(".to_wrap", ""): value for name, value in model.state_dict().items()}
        layer = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
        experts = sorted((name for name in state if EXPERT.fullmatch(name)), key=lambda n: int(n.split(".")[6]))
        if len(experts) != self.experts:
            raise ValueError(f"MergedHeads: expected {self.experts} experts in the weights, got {len(experts)}")
        gates = [layer(f"experts.values.1.branches.{h}.values.0.values.0") for h in sorted(model.head_names)]
        self.mixture = merged([*(layer(name.removesuffix(".weight")) for name in experts), *gates], aligned)
        self.tower = merged([layer(f"towers.branches.{h}.values.1") for h in model.head_names])
        scores = [layer(f"score.{h}") for h in model.head_names]
        weight = torch.block_diag(*(w for w, _ in scores))
        self.score = merged([(weight, torch.cat([b for _, b in scores]))])

    def forward(self, x_PF: Tensor) -> Tensor:
        """Logits [P, H] in the order of the model's heads."""
        x, w, h = self.experts, self.width, self.heads
        both = self.mixture(x_PF)
        expert_PV = F.gelu(both[:, : x * w])
        gate_PHX = torch.softmax(both[:, x * w : x * w + h * x].view(-1, h, x), 2)
        weighed = lambda i: gate_PHX[:, :, i : i + 1] * expert_PV[:, None, i * w : (i + 1) * w]  # noqa: E731
        mixed_PHW = weighed(0)
        for i in range(1, x):
            mixed_PHW = mixed_PHW + weighed(i)
        scores: Tensor = self.score(F.gelu(self.tower(mixed_PHW.flatten(1))))
        return scores


def with_merged_heads(model: M) -> M:
    """A copy of a trained ``RankingModel`` that shares all but its heads, which are merged; ``model`` itself for a
    mixture that has no such form."""
    ranker: Any = model
    if ranker.config.mixture != MERGED:
        return model
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied.merged = MergedHeads(model)
    return copied
