"""The tabular side of both models: the context of a request as one vector.

Built from Merlin's blocks where Merlin is: a tabular input (an embedding a categorical column, the continuous ones as
they are), a cross layer (DCN V2, Wang et al. 2021, eq. 1) and a layer. What Merlin's blocks compute is written once
more in plain PyTorch, for machines without Merlin and for the exported graphs, where theirs leave control flow behind;
a test compares the two, and the weights have the same names.
Axis legend: B requests, P rows, C categorical and F continuous columns, E width of an embedding, W width of the vector;
of live counters N candidates, M rising items, R of them in training, F features.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.blocks import Names, mm
from vivace.context import ContextColumns
from vivace.contract import NULL_ID, PADDING_ID

M = TypeVar("M", bound=nn.Module)
EMBEDDING = 16  # E
CONTEXT_WIDTH = 32  # W

Context = tuple[Tensor | None, Tensor | None]
"""Of a request: ids int64 [..., C] of its categorical columns and float32 [..., F] of its continuous ones; None where
there are no such columns, or nothing is known."""


def moment_of(
    types: int, columns: ContextColumns, more: Sequence[Tensor]
) -> tuple[Tensor | None, Context, list[Tensor]]:
    """(types of the history, context, what comes behind) of a stage's last inputs (``StageTensors.moment``), for a
    model that reads ``types`` event types, 0 for none, and ``columns``."""
    left = list(more)
    of_events = left.pop(0) if types and left else None
    ids = left.pop(0) if columns.categoricals and left else None
    amounts = left.pop(0) if columns.continuous and left else None
    return of_events, (ids, amounts), left


UNKNOWN = 0.1  # share of the rows of a training step whose context is left out, so that a request may leave it out
CLAMP = 6.0  # standard deviations of a continuous column

_INPUT, _CROSS, _LAYER = "values.0.branches.categorical.branches.{}.values.0.to_wrap.table", "values.1", "values.2"
_CROSS_LINEAR, _LAYER_LINEAR = f"{_CROSS}.values.0.values.0.to_wrap", f"{_LAYER}.values.1.to_wrap"


def exportable(model: M) -> M:
    """``model`` itself, or a copy of it that shares all but the ``context`` tower, which is plain."""
    tower = getattr(model, "context", None)
    if not isinstance(tower, ContextTower) or tower.plain:
        return model
    copied = copy.copy(model)
    copied._modules = {**model._modules, "context": tower.plain_copy()}
    return copied


def _column(place: int) -> str:
    return f"c{place:03d}"  # Merlin joins columns in the order of their names


def _merlin(columns: ContextColumns, width: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cross: Any = importlib.import_module("merlin.models.torch.blocks.cross")
        embedding: Any = importlib.import_module("merlin.models.torch.inputs.embedding")
        schema: Any = importlib.import_module("merlin.schema")
    tags = schema.Tags
    described = [
        schema.ColumnSchema(
            _column(i), tags=[tags.CATEGORICAL], dtype="int64",
            properties={"domain": {"min": 0, "max": size - 1, "name": _column(i)}},
        )
        for i, size in enumerate(columns.sizes)
    ] + [
        schema.ColumnSchema(_column(len(columns.sizes) + i), tags=[tags.CONTINUOUS], dtype="float32")
        for i in range(len(columns.continuous))
    ]  # fmt: skip

    def routes(block: Any) -> None:
        if columns.sizes:
            block.add_route(tags.CATEGORICAL, embedding.EmbeddingTables(EMBEDDING, seq_combiner="mean"))
        if columns.continuous:
            block.add_route(tags.CONTINUOUS)

    inputs = mm.TabularInputBlock(schema.Schema(described), init=routes, agg="concat")
    layer = mm.MLPBlock([width], activation=nn.GELU)
    return mm.Block(inputs, cross.CrossBlock.with_depth(1), layer)  # type: ignore[no-any-return]


class _Plain(nn.Module):
    """The same weights under the same names."""

    def __init__(self, columns: ContextColumns, width: int) -> None:
        super().__init__()
        joined = EMBEDDING * len(columns.sizes) + len(columns.continuous)
        tables = {_column(i): nn.Embedding(size, EMBEDDING) for i, size in enumerate(columns.sizes)}
        parts: dict[str, nn.Module] = {
            _INPUT.format(name).removeprefix("values."): table for name, table in tables.items()
        }
        parts[_CROSS_LINEAR.removeprefix("values.")] = nn.Linear(joined, joined)
        parts[_LAYER_LINEAR.removeprefix("values.")] = nn.Linear(joined, width)
        self.add_module("values", _nested(parts))


def _nested(parts: dict[str, nn.Module]) -> nn.Module:
    """Modules at dotted paths."""
    heads = dict.fromkeys(path.partition(".")[0] for path in parts)
    children: dict[str, nn.Module] = {}
    for head in heads:
        below = {path.partition(".")[2]: module for path, module in parts.items() if path.partition(".")[0] == head}
        children[head] = below[""] if "" in below else _nested(below)
    return Names("", children)


class ContextTower(nn.Module):
    """float32 [..., W] of a context, for the rows of an encoding or a candidate vector ``like`` [..., D].

    Args:
        columns: of the data set.
        width: W.
        plain: without Merlin.
    """

    def __init__(self, columns: ContextColumns, width: int, plain: bool = mm is None) -> None:
        super().__init__()
        self.sizes, self.amounts, self.width = columns.sizes, len(columns.continuous), width
        self.plain = plain
        self.net = _Plain(columns, width) if plain else _merlin(columns, width)
        with torch.no_grad():  # Merlin's layers take their input width from the first batch
            self.forward((None, None), torch.zeros(2, 1))
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # a value that training never meets says next to nothing
                nn.init.trunc_normal_(module.weight, std=0.02)

    def plain_copy(self) -> ContextTower:
        """The same tower without Merlin's wrappers, which torch.export does not take."""
        columns = ContextColumns(sizes=self.sizes, continuous=tuple(map(str, range(self.amounts))))
        copied = ContextTower(columns, self.width, plain=True)
        copied.load_state_dict(self.state_dict())
        first = next(self.parameters())
        return copied.to(first.device, first.dtype).train(self.training).requires_grad_(first.requires_grad)

    def forward(self, context: Context, like: Tensor) -> Tensor:
        rows = like.shape[:-1]
        ids, amounts = self._some_left_out(context) if self.training else context
        if ids is None:
            ids = torch.full((*rows, len(self.sizes)), NULL_ID, device=like.device)
        if amounts is None:
            amounts = like.new_zeros(*rows, self.amounts)
        amounts_PF = amounts.to(like.dtype).reshape(-1, self.amounts).clamp(-CLAMP, CLAMP) if self.amounts else None
        ids_PC = ids.reshape(-1, len(self.sizes)) if self.sizes else None
        if self.plain or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            out = self._by_weights(ids_PC, amounts_PF)
        else:
            named = {_column(i): ids_PC[:, i : i + 1] for i in range(len(self.sizes))} if ids_PC is not None else {}
            if amounts_PF is not None:
                named |= {_column(len(self.sizes) + i): amounts_PF[:, i : i + 1] for i in range(self.amounts)}
            out = self.net(named)
        return out.reshape(*rows, self.width)

    def _some_left_out(self, context: Context) -> Context:
        ids, amounts = context
        first = ids if ids is not None else amounts
        if first is None:
            return context
        left_out = torch.rand(*first.shape[:-1], 1, device=first.device) < UNKNOWN
        return (
            None if ids is None else torch.where(left_out, NULL_ID, ids),
            None if amounts is None else torch.where(left_out, 0.0, amounts),
        )

    def _by_weights(self, ids_PC: Tensor | None, amounts_PF: Tensor | None) -> Tensor:
        """What ``net`` computes, by its layers."""
        layer = self.net.get_submodule
        tables = [layer(_INPUT.format(_column(i))) for i in range(len(self.sizes))]
        parts = [] if ids_PC is None else [table(ids_PC[:, i]) for i, table in enumerate(tables)]
        x = torch.cat(parts if amounts_PF is None else [*parts, amounts_PF], 1)
        return F.gelu(layer(_LAYER_LINEAR)(x + x * layer(_CROSS_LINEAR)(x)))


class LiveFeatures(nn.Module):
    """What live counters say of each candidate, normalised: nothing (zeros before) of those that are not rising."""

    mean: Tensor
    spread: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))
        self.direct = nn.Linear(count, 1, bias=False)
        nn.init.zeros_(self.direct.weight)

    def measure(self, live_RF: Tensor) -> None:
        """Takes mean and spread of features float [R, F] of rising items in training."""
        if len(live_RF) > 1:  # else nothing had been clicked before any request
            self.mean.copy_(live_RF.float().mean(0))
            self.spread.copy_(live_RF.float().std(0).clamp_min(1e-3))

    def forward(self, candidates_BN: Tensor, rising_BM: Tensor, live_BMF: Tensor) -> Tensor:
        """float32 [B, N, F], of -6 to 6."""
        same_BNM = (candidates_BN[:, :, None] == rising_BM[:, None, :]) & (candidates_BN != PADDING_ID)[:, :, None]
        return self.normalised(same_BNM.to(live_BMF.dtype) @ live_BMF)

    def normalised(self, live_BNF: Tensor) -> Tensor:
        """The same of features that were counted, float32 [B, N, F]."""
        return ((live_BNF - self.mean) / self.spread).clamp(-6.0, 6.0)
