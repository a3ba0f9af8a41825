"""Retrieval in shards: equal answers, time and memory on this machine, and a simulation of what it cannot hold.

    python -m benchmarks.shards --items 1000000 --shards 1,2,4 --report shards.html

A synthetic catalogue is dealt to real shard servers, which are asked one request after the other as the retrieval stage
asks them, with 50 seen items. Beside it one shard is asked alone, and while another one is kept busy: from those times
alone the simulation predicts what all shards take together, before that is compared. Then a shard of the size that
``--simulated-items`` over ``--simulated-shards`` have is measured alone and put on as many machines. All take turns.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.turns import in_turns, spread
from loadtest.reports import html
from loadtest.reports.record import record_line
from loadtest.tune.shards import Cluster, Measured, on_one_machine, over_machines
from serving.launcher import TritonServer
from serving.repository import DEFAULT_HEADS, assemble
from serving.runtime.sharded import merged, rows_of_shards
from serving.server_options import ServerOptions
from serving.shard_addresses import ShardAddresses
from serving.shards.calls import RemoteShards
from serving.shards.servers import as_shard
from training.compile.shards import export_shard, shard_file
from vivace import contract
from vivace.http_pool import UNIX
from vivace.machine import cores, memory_mib
from vivace.shard_contract import shard_model

WIDTH, CANDIDATES, SEEN, WAIT_S, MS = 64, 100, 50, 30.0, 1000.0
USES, SHARES = (0.1, 0.3, 0.5, 0.7), (50.0, 99.0)


def shapes_of(items: int, shards: int) -> contract.StageTensors:
    v = items + contract.FIRST_ID
    return contract.StageTensors(history=50, candidates=CANDIDATES, items=v, width=WIDTH, shards=shards, seen=SEEN)


class Servers:
    """Real servers of a synthetic catalogue, or of its first shard alone, and who asks them. ``table_VD``: of its items
    in their order, or of that shard's."""

    def __init__(self, folder: Path, table_VD: torch.Tensor, s: contract.StageTensors, alone: bool = False) -> None:
        self.shapes, self.folder, self.count, self.life = s, folder, 1 if alone else s.shards, contextlib.ExitStack()
        files = {}
        for shard in range(self.count):
            mine = table_VD if alone else table_VD[shard :: s.shards].contiguous()
            export_shard(mine, torch.zeros(len(mine)), s, shard, folder)
            files[shard_model(shard)] = {"model.onnx": shard_file(folder, shard)}
        assemble(folder / "model_repository", s, DEFAULT_HEADS, files)
        for file in files.values():
            file["model.onnx"].unlink()

    def __enter__(self) -> Servers:
        options, addresses, self.mib = ServerOptions(self.folder / "model_repository"), list[str](), list[int]()
        for shard in range(self.count):
            log = self.folder / f"shard-{shard}.log"
            server = self.life.enter_context(TritonServer(as_shard(options, shard, log)))
            assert server.sockets is not None
            addresses.append(f"{UNIX}{server.sockets.http}")
            self.mib.append(round(memory_mib(server.pid)))
        self.together = self._asking(addresses)
        self.single = [self._asking([address], shard) for shard, address in enumerate(addresses)]
        return self

    def __exit__(self, *_: object) -> None:
        self.life.close()

    def _asking(self, addresses: list[str], first: int = 0) -> RemoteShards:
        twins = ShardAddresses(tuple((address,) for address in addresses))
        shards = RemoteShards(twins, "1", self.shapes, WAIT_S, first)
        self.life.callback(shards.close)
        return shards

    def ask_all(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        state_BD, seen_BS = question(self.shapes, number)
        answers, missing = self.together(state_BD, rows_of_shards(seen_BS, self.shapes.shards))
        assert not missing, missing
        return merged(answers, 1, CANDIDATES)

    def ask_one(self, shard: int, number: int) -> None:
        state_BD, seen_BS = question(self.shapes, number)
        _, missing = self.single[shard](state_BD, [rows_of_shards(seen_BS, self.shapes.shards)[shard]])
        assert not missing, missing

    @contextlib.contextmanager
    def kept_busy(self, shard: int) -> Iterator[None]:
        """Another caller asks ``shard`` one question after the other."""
        over = threading.Event()

        def ask() -> None:
            number = 0
            while not over.is_set():
                self.ask_one(shard, number)
                number += 1

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def question(s: contract.StageTensors, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A user's state float32 [1, D] and seen items int64 [1, S]; of one catalogue the same however it is cut."""
    rng = np.random.default_rng(number)
    state = rng.standard_normal((1, WIDTH)).astype(np.float32)
    return state, rng.integers(contract.FIRST_ID, s.items, (1, SEEN))


def timed(call: Callable[[int], object], requests: int) -> tuple[list[float], float]:
    """(milliseconds of each call, processor milliseconds of this process a call)."""
    took, before = [], time.process_time()
    for number in range(requests):
        began = time.perf_counter()
        call(number)
        took.append((time.perf_counter() - began) * MS)
    return took, (time.process_time() - before) * MS / requests


def turn_of(servers: Servers, requests: int) -> dict[str, Any]:
    """One turn: a shard alone, the same beside another one at work, all together; milliseconds."""
    alone, call = timed(lambda n: servers.ask_one(0, n), requests)
    beside = alone
    if servers.count > 1:
        with servers.kept_busy(1):
            beside, _ = timed(lambda n: servers.ask_one(0, n), requests)
    together, _ = timed(servers.ask_all, requests) if servers.count > 1 else (alone, call)
    return {"alone": alone, "beside": beside, "together": together, "call": call}


def percentiles(ms: np.ndarray | list[float]) -> dict[str, float]:
    return {f"p{q:g}": round(float(np.percentile(ms, q)), 2) for q in SHARES}


def measured_of(turns: list[dict[str, Any]]) -> Measured:
    """What the simulation is told: of one shard, nothing of several asked together."""
    alone = np.concatenate([t["alone"] for t in turns])
    call = float(np.median([t["call"] for t in turns]))
    slowed = float(np.median([np.median(t["beside"]) / np.median(t["alone"]) for t in turns]))
    return Measured(service=(alone - call).tolist(), call=call, slowed=max(1.0, slowed))


def predicted(turns: list[dict[str, Any]], shards: int) -> np.ndarray:
    """Milliseconds of requests, turn by turn from its own times: what else the machine does changes with time."""
    each = 4000 // len(turns)
    return np.concatenate(
        [on_one_machine(measured_of([t]), shards, cores(), each, seed) for seed, t in enumerate(turns)]
    )


def compared(turns: list[dict[str, Any]], told: np.ndarray | None, mib: list[int]) -> dict[str, Any]:
    """Measured beside predicted, of one number of shards."""
    got, model = percentiles(np.concatenate([t["together"] for t in turns])), measured_of(turns)
    expected = None if told is None else percentiles(told)
    return {
        "measured": got, "predicted": expected,
        "off": expected and {q: round(expected[q] / got[q] - 1, 3) for q in got},
        "measured_p50_by_turn": spread([float(np.median(t["together"])) for t in turns]),
        "alone": percentiles(np.concatenate([t["alone"] for t in turns])),
        "call_ms": round(model.call, 3), "slowed": round(model.slowed, 3), "mib": mib,
    }  # fmt: skip


def simulated(turns: list[dict[str, Any]], shards: int) -> list[dict[str, Any]]:
    """A shard a machine: rows by how much of a machine's time is used, without twins and with. A twin is asked when 95
    of 100 answers would have come, as the servers do."""
    model, rows = measured_of(turns), []
    for twins in (1, 2):
        for used in USES:
            qps = used * twins * MS / float(np.mean(model.service))
            outcome = over_machines(model, Cluster(shards=shards, twins=twins), qps)
            if twins > 1:
                late = float(np.percentile(outcome.questions, 95))
                outcome = over_machines(model, Cluster(shards=shards, twins=twins, hedge_ms=late), qps)
            rows.append({"twins": twins, "machines": shards * twins, "qps": round(qps, 1), "used": used,
                         **percentiles(outcome.ms), "asked_twice": round(outcome.asked_twice, 3),
                         "cores_in_front": round(qps * shards * model.call / MS, 1)})  # fmt: skip
    return rows


def report(path: Path, result: dict[str, Any], samples: dict[str, list[float]]) -> None:
    """A page with both tables and a picture of the tail."""

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
        for name, ms in samples.items():
            axes[0].plot(np.sort(ms), np.linspace(0, 1, len(ms)), label=name)
        axes[0].set(xlabel="ms", ylabel="share of requests", xscale="log", title="measured and predicted")
        for twins in (1, 2):
            rows = [row for row in result["simulated"]["rows"] if row["twins"] == twins]
            for q in ("p50", "p99"):
                axes[1].plot([r["qps"] for r in rows], [r[q] for r in rows], label=f"{q}, {twins} of each shard")
        axes[1].set(xlabel="requests a second", ylabel="ms", yscale="log", title="simulated")
        for axis in axes:
            axis.legend()
        return figure

    rows = [[s, r["measured"], r["predicted"], r["off"], r["mib"]] for s, r in result["by_shards"].items()]
    rows_simulated = [list(row.values()) for row in result["simulated"]["rows"]]
    parts = [
        html.image(html.drawn(draw), "shares of requests by milliseconds"),
        html.table(["shards", "measured ms", "predicted ms", "off", "MiB of each server"], rows),
        html.table(list(result["simulated"]["rows"][0]), rows_simulated),
    ]
    path.write_text(html.page("Retrieval in shards", parts))


def main(
    items: int = 1_000_000,
    shards: str = "1,2,4",
    requests: Annotated[int, typer.Option(help="of each kind a turn")] = 40,
    turns: int = 20,
    simulated_items: int = 100_000_000,
    simulated_shards: int = 64,
    report_file: Annotated[Path | None, typer.Option("--report", help="HTML page")] = None,
) -> None:
    counts = [int(n) for n in shards.split(",")]
    table_VD = torch.randn(items, WIDTH, generator=torch.Generator().manual_seed(7))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as life:
        groups: dict[int, Servers] = {}
        for count in counts:
            folder = Path(name) / str(count) / "run"
            folder.mkdir(parents=True)
            groups[count] = life.enter_context(Servers(folder, table_VD, shapes_of(items, count)))
        rows = -(-simulated_items // simulated_shards)
        folder = Path(name) / "simulated" / "run"
        folder.mkdir(parents=True)
        one = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(8))
        groups[0] = life.enter_context(Servers(folder, one, shapes_of(simulated_items, simulated_shards), alone=True))
        del one, table_VD
        equal = all(
            all(np.array_equal(a, b) for a, b in zip(groups[counts[0]].ask_all(n), groups[c].ask_all(n), strict=True))
            for c in counts
            for n in range(50)
        )
        taken: dict[int, list[dict[str, Any]]] = {count: [] for count in groups}
        for turn, count in in_turns(turns, list(groups)):
            taken[count].append(turn_of(groups[count], requests) if count else _alone(groups[0], requests))
            print(f"turn {turn + 1}, {count or 'simulated'} shards", flush=True)
        mib = {count: group.mib for count, group in groups.items()}
    told = {count: predicted(taken[count], count) for count in counts if count > 1}
    result: dict[str, Any] = {
        "items": items, "width": WIDTH, "candidates": CANDIDATES, "requests": requests * turns, "cores": cores(),
        "equal_answers": equal, "by_shards": {c: compared(taken[c], told.get(c), mib[c]) for c in counts},
        "simulated": {
            "items": simulated_items, "shards": simulated_shards, "rows_of_a_shard": rows, "mib_of_a_shard": mib[0][0],
            "alone": percentiles(np.concatenate([t["alone"] for t in taken[0]])),
            "call_ms": round(measured_of(taken[0]).call, 3),
            "rows": simulated(taken[0], simulated_shards),
        },
    }  # fmt: skip
    for count, row in result["by_shards"].items():
        print(f"{count} shards: {row}")
    for row in result["simulated"]["rows"]:
        print(row)
    if report_file is not None:
        samples = {f"{c} shards, measured": list(np.concatenate([t["together"] for t in taken[c]])) for c in counts}
        samples |= {f"{c} shards, predicted": list(ms) for c, ms in told.items()}
        report(report_file, result, samples)
    print(record_line("retrieval in shards", **result))


def _alone(servers: Servers, requests: int) -> dict[str, Any]:
    alone, call = timed(lambda n: servers.ask_one(0, n), requests)
    return {"alone": alone, "beside": alone, "call": call}


if __name__ == "__main__":
    typer.run(main)
