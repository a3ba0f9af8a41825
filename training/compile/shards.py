"""Retrieval cut over shards: the graph of each, exported and checked against the one that scores every item.

Axis legend: B requests, V item ids, D width, R rows of a shard (row 0 is no item), K seen rows, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.runtime.encoded import ENCODER, EXCLUDED, RISING, ROWS, STATE
from serving.runtime.sharded import LocalShards, ShardedRetrieval
from training.compile.index import EncoderGraph, write_popular
from training.compile.onnx_export import EQUAL_IDS, RETRIEVAL_AXES, TOLERANCE, export, names_of, put_outside
from training.models.retrieval import RetrievalModel
from vivace import contract
from vivace.masks import seen_ids
from vivace.shard_contract import shard_inputs, shard_model, shard_outputs


class ShardGraph(nn.Module):
    """What is exported of shard ``shard``: a state and the rows that may not be answered in, its best items out.
    ``table_nD`` and ``bias_n`` are of its items alone."""

    table_RD: Tensor
    bias_R: Tensor

    def __init__(self, table_nD: Tensor, bias_n: Tensor, s: contract.StageTensors, shard: int) -> None:
        super().__init__()
        self.register_buffer("table_RD", torch.cat([torch.zeros(1, s.width), table_nD]))
        self.register_buffer("bias_R", torch.cat([torch.tensor([EXCLUDED]), bias_n]))
        self.first, self.step = contract.FIRST_ID + shard, s.shards
        self.count = shard_outputs(s, shard)[0].dims[0]

    def forward(self, state_BD: Tensor, seen_BK: Tensor) -> tuple[Tensor, Tensor]:
        scores_BR = F.linear(state_BD, self.table_RD, self.bias_R)
        excluded = torch.full_like(seen_BK, 1, dtype=scores_BR.dtype) * EXCLUDED
        scores_BN, row_BN = torch.topk(scores_BR.scatter(1, seen_BK, excluded), self.count, dim=1)
        ids_BN = self.first + self.step * (row_BN - 1)
        return torch.where(scores_BN > EXCLUDED / 2, ids_BN, torch.full_like(ids_BN, contract.PADDING_ID)), scores_BN


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard_model(shard)}.onnx"


def export_encoder(
    model: RetrievalModel, s: contract.StageTensors, example: Sequence[Tensor], folder: Path, int8: bool = False
) -> None:
    """The encoder alone, ENCODER; ``example``: inputs of the retrieval graph with the exclusions, and what may come
    behind; ``int8``: with the table in ROWS, one byte a number."""
    inputs = names_of(contract.retrieval_inputs(s))
    before = [*([STATE] if s.context or s.amounts else []), *([RISING] if s.rising else [])]
    export(
        EncoderGraph(model, s.memory, int8, s.rising),
        (example[0], *example[2 : len(inputs)]),
        [inputs[0], *inputs[2:]],
        [*before, contract.ENCODED_HISTORY],
        folder / ENCODER,
        RETRIEVAL_AXES,
    )
    if int8:
        put_outside(folder / ENCODER, ROWS)


def export_shard(table_nD: Tensor, bias_n: Tensor, s: contract.StageTensors, shard: int, folder: Path) -> None:
    """One of the graphs."""
    inputs, outputs = names_of(shard_inputs(s)), names_of(shard_outputs(s, shard))
    example = (torch.zeros(2, s.width), torch.zeros(2, 3, dtype=torch.long))
    graph = ShardGraph(table_nD, bias_n, s, shard)
    export(graph, example, inputs, outputs, shard_file(folder, shard), {"SEEN_ROWS": (1, "seen")})


def export_shards(model: RetrievalModel, s: contract.StageTensors, folder: Path) -> None:
    """The graphs of ``s.shards`` shards, and POPULAR."""
    with torch.no_grad():
        table_VD, bias_V = model.table().detach().cpu(), model.bias.detach().cpu()
    for shard in range(s.shards):
        mine = torch.arange(contract.FIRST_ID + shard, s.items, s.shards)
        export_shard(table_VD[mine], bias_V[mine], s, shard, folder)
    write_popular(model, s.candidates, folder, s.rising)


def sharded_engine(folder: Path, s: contract.StageTensors, threads: int = 1) -> ShardedRetrieval:
    """The compiled graphs of ``folder`` as one function in this process."""
    graphs = [shard_file(folder, shard) for shard in range(s.shards)]
    return ShardedRetrieval(folder, s, LocalShards(graphs, threads), threads)


def check_shards(
    folder: Path, s: contract.StageTensors, given: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> dict[str, float]:
    """How far the shards together are from the one graph's answer ``expected`` to ``given``, its inputs. Raises
    ValueError beyond rounding."""
    seen_BS = seen_ids([np.flatnonzero(row) for row in given[1]], s.seen)
    (ids, scores, _), _ = sharded_engine(folder, s)([given[0], seen_BS, *given[2:]])
    same, apart = float((ids == expected[0]).mean()), float(np.abs(scores - expected[1]).max())
    if not (same >= EQUAL_IDS and apart <= TOLERANCE):
        raise ValueError(
            f"shards: {same:.4f} of the ids as one graph answers them, expected {EQUAL_IDS}; scores differ by "
            f"{apart:.3g}, expected at most {TOLERANCE}; not published"
        )
    return {"equal ids": same, "scores": apart}
