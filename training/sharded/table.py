"""The item table cut over processes by TorchRec: each holds its rows, their biases and their optimizer's state.

A step asks for the rows of the ids it needs; TorchRec fetches them from the processes that hold them, and in the
backward pass brings the gradients there, where FBGEMM applies row-wise Adagrad to these rows alone (Gupta et al. 2014;
one number of state a row). No process ever holds the whole table or its gradient.

Axis legend: V item ids, D width, U ids of a step (each once), R rows of this process.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan
from torchrec.optim import RowWiseAdagrad

from training.distributed import World, device
from training.sharded.config import TableSharding

BIAS_WIDTH = 4  # FBGEMM's narrowest row; its first number is the item's bias
BLOCK = 65_536  # rows that are drawn, or scored, at once
START_STD = 0.02  # of a random start, as in ``RetrievalModel``
ROWS, BIASES = "rows.embeddings.item.weight", "biases.embeddings.bias.weight"


class _Tables(nn.Module):
    """The two tables as TorchRec knows them, not yet made anywhere."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.rows, self.biases = (
            EmbeddingCollection(
                device=torch.device("meta"),
                tables=[EmbeddingConfig(name=name, num_embeddings=items, embedding_dim=n, feature_names=["item"])],
            )
            for name, n in (("item", width), ("bias", BIAS_WIDTH))
        )

    def forward(self, ids: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        return self.rows(ids)["item"].values(), self.biases(ids)["item"].values()


def _plan(tables: _Tables, kind: str, world: World, of: str, sharder: EmbeddingCollectionSharder) -> ShardingPlan:
    """Where the rows of both tables lie; ``of``: type of the device."""
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    places: dict[str, EmbeddingModuleShardingPlan] = {}
    for module, table, rank in (("rows", "item", 0), ("biases", "bias", world.size - 1)):
        how = row_wise() if kind == "row" else table_wise(rank=rank)
        places[module] = construct_module_sharding_plan(
            getattr(tables, module), {table: how}, sharder, local_size=on_machine, world_size=world.size, device_type=of
        )
    return ShardingPlan(places)  # type: ignore[arg-type]


class ShardedItems:
    """Embeddings [V, D] and biases [V] of all items, over the processes of a group. All processes call every method."""

    def __init__(self, items: int, width: int, sharding: TableSharding, world: World) -> None:
        if width % 4:
            raise ValueError(f"sharded item table: expected a width that 4 divides, as FBGEMM's rows need, got {width}")
        self.items, self.width, self.sharding, self.world = items, width, sharding, world
        self.device = device(world)
        tables, sharder = _Tables(items, width), EmbeddingCollectionSharder()
        apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": sharding.learning_rate})
        self.model = DistributedModelParallel(
            tables,
            ShardingEnv.from_process_group(dist.new_group()),  # of its own: DDP's calls may come in between
            self.device,
            _plan(tables, sharding.kind, world, self.device.type, sharder),
            [sharder],
            init_data_parallel=False,
        )

    def __call__(self, ids_U: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings float32 [U, D], biases [U]) of ids int64 [U], of any process; each process may ask for others.
        The backward pass changes the rows where they lie."""
        lengths = torch.tensor([len(ids_U)], device=ids_U.device)
        rows_UD, biases = self.model(KeyedJaggedTensor(keys=["item"], values=ids_U, lengths=lengths))
        return rows_UD, biases[:, 0]

    def rate(self, factor: float) -> None:
        """Sets the optimizer's rate to ``factor`` of its peak, for the steps that fetch their rows after this."""
        for group in self.model.fused_optimizer.param_groups:
            group["lr"] = self.sharding.learning_rate * factor
        self.model.fused_optimizer.step()  # hands the rate to FBGEMM; the rows change in the backward pass

    def local(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(id of the first row, rows [R, width]) of this process's parts of table ROWS or BIASES, which share memory
        with the table."""
        for shard in self.model.state_dict()[name].local_shards():
            if len(shard.tensor):
                yield shard.metadata.shard_offsets[0], shard.tensor.detach()

    def held(self) -> int:
        """Rows of embeddings in this process."""
        return sum(len(rows) for _, rows in self.local(ROWS))

    @torch.no_grad()
    def start(self, seed: int, rows: Callable[[int, int], Tensor] | None = None, biases: Tensor | None = None) -> None:
        """Random embeddings, the same for any number of processes, and biases of zero. ``rows(first, last)``: rows
        [n, D] to start from instead, where they are not zero; ``biases`` [V]."""
        for first, held in self.local(ROWS):
            for block in range(first // BLOCK, (first + len(held) - 1) // BLOCK + 1):
                drawn = torch.empty(BLOCK, self.width)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
                nn.init.trunc_normal_(drawn, std=START_STD, generator=generator)
                low, high = max(first, block * BLOCK), min(first + len(held), (block + 1) * BLOCK)
                part = drawn[low - block * BLOCK : high - block * BLOCK]
                if rows is not None:
                    given = rows(low, high)
                    part = torch.where((given != 0).any(1, keepdim=True), given, part)
                held[low - first : high - first] = part.to(held.device)
            if first == 0:
                held[0] = 0.0  # padding
        for first, held in self.local(BIASES):
            held.zero_()
            if biases is not None:
                held[:, 0] = biases[first : first + len(held)].to(held)

    # -- on disk: torch.distributed.checkpoint, a file a process --------------------------------------------
    def save(self, folder: Path) -> None:
        """Writes tables and optimizer; any number of processes can read them."""
        with _quiet():
            dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Takes up what ``save`` wrote."""
        state = self._state()
        with _quiet():
            dcp.load(state, checkpoint_id=folder)  # in place: the tensors are those of the table
        self.model.fused_optimizer.load_state_dict(state["optimizer"])

    def _state(self) -> dict[str, Any]:
        return {"tables": self.model.state_dict(), "optimizer": self.model.fused_optimizer.state_dict()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that DTensor will take ShardedTensor's place, which TorchRec 1.8 has to know of, not us, and
    that one process reads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def mapped(file: Path, *shape: int) -> Tensor:
    """A float32 tensor of zeros in a new file, mapped into memory: pages go to disk when memory is short."""
    size = 1
    for n in shape:
        size *= n
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).reshape(shape)


def read_whole(saved: Path, items: int, width: int, scratch: Path) -> tuple[Tensor, Tensor]:
    """(embeddings [V, D], biases [V, BIAS_WIDTH]) of a saved table, shard after shard into mapped files in ``scratch``.
    One process calls it."""
    scratch.mkdir(parents=True, exist_ok=True)
    rows, biases = mapped(scratch / "rows.bin", items, width), mapped(scratch / "biases.bin", items, BIAS_WIDTH)
    with _quiet():
        dcp.load({"tables": {ROWS: rows, BIASES: biases}}, checkpoint_id=saved, no_dist=True)
    return rows, biases
