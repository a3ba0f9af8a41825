"""The ranker's mixtures of experts and towers: Merlin's blocks, or their equal in plain PyTorch where Merlin is not.

Merlin's wheels hold for Python 3.11 and NumPy 1.26; a machine with a GPU may have neither. Both forms compute the same
(a test compares them) and name their weights alike, so what one trained the other loads.
Axis legend: P rows, F features, E experts, W width of an expert.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vivace.contract import PADDING_ID

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        mm: Any = importlib.import_module("merlin.models.torch")
    except ImportError:
        mm = None

TOWER = 32  # width of a head's own layer


def towers(names: Sequence[str], plain: bool = mm is None) -> nn.Module:
    """One layer a task head: [P, W], or a mixture of each head's own [P, W] by name, all of which every tower reads,
    to [P, TOWER] by name. ``plain``: without Merlin."""
    if plain:
        return PlainTowers(names)
    return mm.ParallelBlock({name: mm.MLPBlock([TOWER], activation=nn.GELU) for name in names})  # type: ignore[no-any-return]


def mixture(
    kind: str, experts: int, width: int, dropout: float, outputs: nn.Module, plain: bool = mm is None
) -> nn.Module:
    """What the towers ``outputs`` read of features [P, F]: "mmoe" (Ma et al. 2018) and "ple" (Tang et al. 2020, two
    layers, one expert a task beside the common ones) give [P, W] by head, "shared" one common [P, W]."""
    if plain:
        assert isinstance(outputs, PlainTowers)
        if kind == "shared":
            return PlainLayer(width, dropout)
        return (PlainMMoE if kind == "mmoe" else PlainPLE)(experts, width, dropout, outputs.names)
    expert = mm.MLPBlock([width], activation=nn.GELU, dropout=dropout or None)
    if kind == "mmoe":
        return mm.MMOEBlock(expert, num_experts=experts, outputs=outputs)  # type: ignore[no-any-return]
    if kind == "ple":
        return mm.PLEBlock(expert, num_shared_experts=experts, num_task_experts=1, depth=2, outputs=outputs)  # type: ignore[no-any-return]
    return expert  # type: ignore[no-any-return]


class Names(nn.Module):
    """Modules under the names that Merlin's containers give them."""

    def __init__(self, path: str, children: Mapping[str, nn.Module]) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        for name, child in ({first: Names(rest, children)} if first else children).items():
            self.add_module(name, child)


class PlainLayer(nn.Module):
    """GELU(linear(x)) with dropout; the input width is that of the first batch."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = [nn.LazyLinear(width)]  # in a list: its weights are named below
        self.add_module("values", Names("1", {"to_wrap": self.linear[0]}))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(nn.functional.gelu(self.linear[0](x)))
        return out


class PlainTowers(nn.Module):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.branches = nn.ModuleDict({name: PlainLayer(TOWER) for name in names})

    def forward(self, mixed: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([mixed[n] for n in sorted(mixed)], 1) if isinstance(mixed, dict) else mixed
        return {name: tower(x) for name, tower in self.branches.items()}


def _layers(count: int, width: int, dropout: float) -> list[PlainLayer]:
    return [PlainLayer(width, dropout) for _ in range(count)]


def _branches(layers: Sequence[nn.Module]) -> Mapping[str, nn.Module]:
    return {str(number): layer for number, layer in enumerate(layers)}


def _stacked(layers: Sequence[nn.Module], x_PF: Tensor) -> Tensor:
    return torch.stack([layer(x_PF) for layer in layers], 1)


def _gated(gate: nn.Module, x_PF: Tensor, experts_PEW: Tensor) -> Tensor:
    return (torch.softmax(gate(x_PF), 1)[..., None] * experts_PEW).sum(1)


class PlainMMoE(nn.Module):
    def __init__(self, experts: int, width: int, dropout: float, names: Sequence[str]) -> None:
        super().__init__()
        self.experts = (_layers(experts, width, dropout),)  # in tuples: named below
        self.gates = ({name: nn.LazyLinear(experts) for name in names},)
        gates = {name: Names("values.0.values.0", {"to_wrap": gate}) for name, gate in self.gates[0].items()}
        children = {
            "0": Names("values.0.branches", _branches(self.experts[0])),
            "1": Names("branches", gates),
        }
        self.add_module("values", Names("", children))

    def forward(self, x_PF: Tensor) -> dict[str, Tensor]:
        experts_PEW = _stacked(self.experts[0], x_PF)
        return {name: _gated(gate, x_PF, experts_PEW) for name, gate in self.gates[0].items()}


class _PlainCGC(nn.Module):
    """One layer of PLE. In the first, whose tasks nobody reads (as in Merlin), only the common gate is run."""

    def __init__(self, experts: int, width: int, dropout: float, names: Sequence[str], common: bool) -> None:
        super().__init__()
        self.experts = (_layers(experts, width, dropout),)
        self.task = ({name: PlainLayer(width, dropout) for name in names},)
        self.gates = ({name: nn.LazyLinear(experts + 1) for name in names},)
        self.common = (nn.LazyLinear(experts) if common else None,)
        branches = {
            name: Names("", {
                "values": Names("0.values.0.values.0", {"to_wrap": self.gates[0][name]}),
                "task_experts": Names("branches", {"0": self.task[0][name]}),
            })
            for name in names
        }  # fmt: skip
        if self.common[0] is not None:
            branches["experts"] = Names("values.0.values.0.values.0", {"to_wrap": self.common[0]})
        self.named = {
            "0": Names("values.0.branches", _branches(self.experts[0])),
            "1": Names("branches", branches),
        }

    def materialise(self, x_PF: Tensor) -> None:
        """Gives the layers that are not run their input width."""
        for layer in (*self.task[0].values(), *self.gates[0].values()):
            layer(x_PF)

    def forward(self, x_PF: Tensor, shared_PF: Tensor) -> Tensor | dict[str, Tensor]:
        experts_PEW = _stacked(self.experts[0], shared_PF)
        if self.common[0] is not None:
            return _gated(self.common[0], x_PF, experts_PEW)
        of_task = {name: torch.cat([experts_PEW, layer(x_PF)[:, None]], 1) for name, layer in self.task[0].items()}
        return {name: _gated(gate, x_PF, of_task[name]) for name, gate in self.gates[0].items()}


class PlainPLE(nn.Module):
    def __init__(self, experts: int, width: int, dropout: float, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(_PlainCGC(experts, width, dropout, names, common) for common in (True, False))
        named = {str(number): Names("values", layer.named) for number, layer in enumerate(self.layers)}
        self.add_module("values", Names("", named))

    def forward(self, x_PF: Tensor) -> dict[str, Tensor]:
        first, second = self.layers
        if isinstance(next(iter(first.gates[0].values())).weight, nn.UninitializedParameter):
            first.materialise(x_PF)
        mixed = second(x_PF, first(x_PF, x_PF))
        assert isinstance(mixed, dict)
        return mixed


def own_counts(same_BNT: Tensor, history_BT: Tensor) -> Tensor:
    """Features float32 [B, N, 2] of how many events of a history are of the candidate's kind: log1p of the number, and
    its share of all events. ``same_BNT``: 1 where they are; B requests, N candidates, T events."""
    count_BN = same_BNT.sum(2)
    events_B1 = (history_BT != PADDING_ID).to(count_BN.dtype).sum(1, keepdim=True)
    return torch.stack([torch.log1p(count_BN), count_BN / events_B1.clamp_min(1.0)], 2)
