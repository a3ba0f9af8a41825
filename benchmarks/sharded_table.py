"""An item table too large for one process: steps a second and memory with its rows cut over processes by TorchRec.

    python -m benchmarks.sharded_table --rows 20000000 --processes 1,2 --turns 3 --save table.json

The training is that of ``vivace train --table-processes`` (``training/sharded``): sampled softmax, AdamW for the
encoder, row-wise Adagrad for the table; without dropout, so that the losses can be compared. Windows are made up: a
user stays in one of the blocks of 64 items, which are drawn by popularity. With more than one process the last one
kills itself after half of the steps; torchrun starts the group anew, and it goes on from the checkpoint. Steps a second
are those of the second half, and so is the processor time, which says more beside other work. Memory of each process:
proportional set size at each stage, and the largest resident size, which has what is read of a checkpoint in it and, in
the first process, the whole table's mapped file. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from torch import Tensor

from benchmarks.turns import in_turns, spread
from loadtest.reports.record import record_line
from training import distributed
from training.distributed import World, device
from training.learn.loop import LoopConfig
from training.presets import Preset, news
from vivace.contract import FIRST_ID
from vivace.manifest import CHECKOUT, environment, write_json

BLOCK = 64  # items that a user's events are of
POWER = 1.5  # popularity of a block falls with its number to this power
EVENTS = 50_000_000  # of the log that the item counts stand for
SEED = 7


def preset(width: int, batch: int) -> Preset:
    """``news`` at another width."""
    sizes = news()
    return replace(
        sizes,
        encoder=replace(sizes.encoder, width=width, dropout=0.0),
        retrieval=replace(sizes.retrieval, batch_size=batch, ema=0.0, start="random", probe_users=0),
    )


def popularity(rows: int) -> np.ndarray:
    """Expected events of each item id, float32 [V]: a power law over blocks of items."""
    counts = np.zeros(rows, np.float32)
    block = np.arange(rows - FIRST_ID, dtype=np.int64) // BLOCK
    counts[FIRST_ID:] = (block + 10.0) ** -POWER
    return counts * np.float32(EVENTS / counts.sum(dtype=np.float64))


def windows(counts: np.ndarray, history: int, batch: int, steps: int, world: World) -> Iterator[Tensor]:
    """Batches of this process, int64 [B, T + 1]; the global batch depends on the step alone."""
    blocks = (len(counts) - FIRST_ID) // BLOCK
    cumulative = np.cumsum((np.arange(blocks) + 10.0) ** -POWER)
    for step in range(steps):
        rng = np.random.default_rng([SEED, step])
        block_B = np.searchsorted(cumulative, rng.random(batch) * cumulative[-1]).clip(max=blocks - 1)
        ids_BT = FIRST_ID + block_B[:, None] * BLOCK + rng.integers(0, BLOCK, (batch, history + 1))
        yield world.share(torch.from_numpy(ids_BT))


def _mib(process: psutil.Process) -> float:
    return round(process.memory_full_info().pss / 2**20)


def work(order: dict[str, Any]) -> None:
    """What each process runs; leaves ``rank-<n>.json`` in the folder."""
    from training.sharded.config import TableSharding
    from training.sharded.loop import CHECKPOINT, ShardedLoop
    from training.sharded.objective import Negatives, sharded_loss
    from training.sharded.retriever import dense_retriever, process_group
    from training.sharded.table import ShardedItems, read_whole

    folder, steps, me = Path(order["folder"]), order["steps"], psutil.Process()
    sizes = preset(order["width"], order["batch"])
    with distributed.group() as world, process_group():
        memory = {"libraries": _mib(me)}
        counts = popularity(order["rows"])
        torch.manual_seed(SEED)
        model = dense_retriever(sizes).to(device(world))
        negatives = Negatives(counts, sizes.retrieval, SEED)
        memory["and counts"] = _mib(me)
        items = ShardedItems(len(counts), order["width"], TableSharding(processes=world.size), world)
        loop = ShardedLoop(
            items, negatives, model,
            LoopConfig(
                epochs=1, steps_per_epoch=steps, learning_rate=sizes.retrieval.learning_rate, checkpoint_s=1e9,
                seed=SEED,
            ),
            folder, f"{order['rows']:,} rows", lambda _: windows(
                counts, sizes.encoder.history, order["batch"], steps, world
            ),
            sharded_loss(model, items, sizes.retrieval, negatives), lambda: {}, True, world,
        )  # fmt: skip
        resumed = loop.resume()
        if not resumed:
            items.start(SEED)
        memory["and table"] = _mib(me)
        if not resumed:
            loop.run(steps // 2)
            if world.size > 1 and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.barrier()  # with one that is dead: torchrun ends this process too
        taken, losses, used = loop.taken, _recorded(loop), sum(me.cpu_times()[:2])
        loop.run()
        used = sum(me.cpu_times()[:2]) - used
        record = {
            "rows held": items.held(), "resumed at step": taken if resumed else 0, "steps measured": loop.taken - taken,
            "steps_per_s": round((loop.taken - taken) / losses[1], 2),
            "processor ms a step": round(used * 1000 / (loop.taken - taken), 1), "mean loss": loop.history[-1]["loss"],
            "mean loss of these": float(np.mean(losses[0])), "last loss": losses[0][-1],
        }  # fmt: skip
        memory["after training"] = _mib(me)
        began = time.monotonic()
        loop.write_table(folder / "table")
        record["seconds to write table and optimizer"] = round(time.monotonic() - began, 1)
        world.barrier()
        if world.first:
            began = time.monotonic()
            rows_VD, _ = read_whole(folder / "table", len(counts), order["width"], folder / "whole")
            record["seconds to read it whole"] = round(time.monotonic() - began, 1)
            for first, held in items.local("rows.embeddings.item.weight"):
                assert torch.equal(rows_VD[first : first + 1000], held[:1000].cpu())
            shutil.rmtree(folder / CHECKPOINT)
        memory["largest resident"] = round(_peak_kib() / 1024)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps({"rank": world.rank, **record, "mib": memory}))


def _peak_kib() -> int:
    return int(next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")).split()[1])


def _recorded(loop: Any) -> Any:
    """[losses of the steps taken, seconds in them], filled while the loop runs."""
    losses: list[Any] = [[], 0.0]
    take = loop._take

    def timed(batch: Tensor) -> float:
        began = time.monotonic()
        value: float = take(batch)
        losses[0].append(value)
        losses[1] += time.monotonic() - began
        return value

    loop._take = timed
    return losses


def measured(
    processes: int, rows: int, width: int, steps: int, batch: int, scratch: Path | None
) -> list[dict[str, Any]]:
    """What each of ``processes`` reports."""
    with tempfile.TemporaryDirectory(prefix="vivace-table-", dir=scratch) as name:
        order = {"folder": name, "rows": rows, "width": width, "steps": steps, "batch": batch}
        (Path(name) / "order.json").write_text(json.dumps(order))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            "--max-restarts=1", "-m", "benchmarks.sharded_table", "--work", f"{name}/order.json",
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), **os.environ}
        subprocess.run(command, check=True, env=environment)
        return [json.loads((Path(name) / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def main(
    rows: Annotated[int, typer.Option(help="of the item table, the special ids with them")] = 20_000_000,
    width: Annotated[int, typer.Option(help="of an embedding")] = 16,
    processes: Annotated[
        str, typer.Option(help="numbers of processes, by commas, measured one after the other")
    ] = "1,2",
    steps: int = 300,
    turns: Annotated[int, typer.Option(help="runs of each number of processes")] = 1,
    batch: Annotated[int, typer.Option(help="windows a step, of all processes together")] = 64,
    scratch: Annotated[Path | None, typer.Option(help="folder for checkpoints")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
    work_order: Annotated[Path | None, typer.Option("--work", hidden=True)] = None,
) -> None:
    if work_order is not None:
        work(json.loads(work_order.read_text()))
        return
    numbers = [int(n) for n in processes.split(",")]
    runs: dict[int, list[list[dict[str, Any]]]] = {n: [] for n in numbers}
    for turn, number in in_turns(turns, numbers):
        runs[number].append(measured(number, rows, width, steps, batch, scratch))
        for rank in runs[number][-1]:
            print(f"turn {turn}, {number} processes, rank {rank['rank']}: {json.dumps(rank)}", flush=True)
    rates = {n: spread([ranks[0]["steps_per_s"] for ranks in runs[n]]) for n in numbers}
    costs = {n: spread([sum(rank["processor ms a step"] for rank in ranks) for ranks in runs[n]]) for n in numbers}
    first = costs[numbers[0]]["turns"]
    ratios = {n: spread([b / a for a, b in zip(first, costs[n]["turns"], strict=True)]) for n in numbers[1:]}
    record = {
        "rows": rows, "width": width, "steps": steps, "batch": batch, "steps_per_s": rates,
        "processor ms a step, all processes": costs, f"over {numbers[0]} processes": ratios, "runs": runs,
    }  # fmt: skip
    if save is not None:
        command = " ".join(["python -m benchmarks.sharded_table", *sys.argv[1:]])
        write_json(save, {"command": command, **environment(), **record})
    print(record_line("sharded item table", **record))


if __name__ == "__main__":
    typer.run(main)
