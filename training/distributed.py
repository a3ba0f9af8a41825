"""Data-parallel training under ``torchrun``: gloo on CPUs, NCCL on GPUs, on one machine or several.

    torchrun --nproc-per-node 2 --max-restarts 3 -m vivace.cli train --name shop

Each global batch is cut among the processes by rows, so the steps are those of one process at the same batch size; with
``shard_reading`` each process reads its own share of the rows through Merlin's loader instead, which a log that is too
large to be read by every process needs. A process that dies ends its group; torchrun starts the group anew and it goes
on from the last checkpoint, which the first process writes.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among the others. ``local_rank`` counts within the machine and names its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch_BT: Tensor) -> Tensor:
        """This process's rows of a global batch; empty where there are fewer rows than processes."""
        return batch_BT[self.rank :: self.size]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def smallest(self, value: int) -> int:
        """The smallest ``value`` of all processes."""
        if self.size == 1:
            return value
        smallest = torch.tensor(value, device=device(self))
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)


ALONE = World()


def device(world: World) -> torch.device:
    return torch.device(f"cuda:{world.local_rank}" if torch.cuda.is_available() else "cpu")


def fresh_store(store: dist.Store, world: World, patience_s: float = 600) -> dist.Store:
    """A part of ``store`` that no earlier start of this run has written to.

    torchrun (2.13) hands every restart the same store, in which gloo then finds the addresses of dead processes, and
    waits for them. Counting the starts is no way out: machines count their own failures only. So the processes that
    live find each other by names drawn at random: each says hello, the first answers with the name of this start.
    """
    if not world.first:
        greeting = uuid.uuid4().hex
        store.set(f"hello/{world.rank}", greeting)
        start = store.get(f"welcome/{greeting}").decode()
        store.set(f"{start}/here/{world.rank}", "")
        return dist.PrefixStore(start, store)
    start, missing, deadline = uuid.uuid4().hex, set(range(1, world.size)), time.monotonic() + patience_s
    while missing:
        for rank in sorted(missing):
            if store.check([f"{start}/here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):  # it may be of a dead process: asked again until the live one is here
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", start)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"training: {world.size} processes were expected to meet within {patience_s:.0f} s, but ranks "
                f"{sorted(missing)} did not come; look for their errors above, and see that all machines reach "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            )
        time.sleep(0.01)
    return dist.PrefixStore(start, store)


@contextlib.contextmanager
def group() -> Iterator[World]:
    """The process group that torchrun's environment describes; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(device(world))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = fresh_store(next(iter(dist.rendezvous("env://")))[0], world)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


# without cuDNN's: preset "cpu" met NaN within 27 steps on an H100 (torch 2.11), where only its masks reach that kernel
ATTENTION_ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Objective(nn.Module):
    """A loss as a module, which is what DistributedDataParallel wraps. ``loss`` gives the mean of a batch and the
    number of terms in it; on a GPU its forward pass runs in bfloat16."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        cuda = torch.cuda.is_available()
        with (
            torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext(),
            sdpa_kernel(ATTENTION_ON_CUDA) if cuda else contextlib.nullcontext(),
        ):
            result = self.loss(batch)
        value, count = result if isinstance(result, tuple) else (result, torch.ones(()))
        return value, count.to(value.device)


def whole(state: Any) -> Any:
    """``state`` (a nest of dicts) with every sharded tensor put together, on the CPU. All processes must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    return {k: whole(v) for k, v in state.items()} if isinstance(state, dict) else state


def sharded_like(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: whole tensors sharded as those of the same name in ``like`` are."""
    return {
        k: distribute_tensor(v.to(like[k].device), like[k].device_mesh, like[k].placements)  # type: ignore[attr-defined]
        if isinstance(like.get(k), DTensor)
        else v
        for k, v in state.items()
    }


class Parallel:
    """Calls an objective so that the averaged gradients of all processes are those of the global mean. ``shard``: each
    process keeps its part of the parameters, gradients and optimizer state (FSDP), and the encoder's blocks are put
    together one at a time."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Any], world: World, shard: bool = False) -> None:
        self.world, self.sharded = world, shard and world.size > 1
        self.objective: nn.Module = Objective(model, loss)
        if self.sharded:
            for block in getattr(getattr(model, "encoder", None), "blocks", []):
                fully_shard(block)
            fully_shard(self.objective)
        elif world.size > 1:
            ids = [world.local_rank] if torch.cuda.is_available() else None
            self.objective = DistributedDataParallel(self.objective, device_ids=ids, broadcast_buffers=False)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The model with whole parameters, for use outside the objective; all processes must enter."""
        parts = [m for m in self.objective.modules() if isinstance(m, FSDPModule)] if self.sharded else []
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()

    def agreed(self, wish: bool) -> bool:
        """What the first process wishes: clocks differ, and sharded processes must save together."""
        if not self.sharded:
            return wish
        agreed = torch.tensor(int(wish), device=device(self.world))
        dist.broadcast(agreed, 0)
        return bool(agreed)

    def __call__(self, batch: Any) -> tuple[Tensor, float]:
        """(loss to run backward from, mean loss of the global batch)."""
        value, count = self.objective(batch)
        if self.world.size == 1:
            return value, float(value.detach())
        totals = torch.stack([value.detach() * count, count.to(value.dtype)])
        dist.all_reduce(totals)
        return value * count * self.world.size / totals[1], float(totals[0] / totals[1])
