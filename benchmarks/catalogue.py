"""The live catalogue under load: how soon a new item is answered while others are put in, and what it costs.

    python -m benchmarks.catalogue artifacts/shop --upserts 1000 --qps 100 --seconds 20
    python -m benchmarks.catalogue artifacts/shop --cost --turns 5
    python -m benchmarks.catalogue artifacts/shop --alone --seconds 20

The first offers requests at random arrivals while rows are put in at ``--upserts`` a second, and now and then takes one
new item: how long from before its call until an answer has it. The second serves the same graphs with the live
catalogue and without, in turns, and nothing is put in. The third puts rows in as fast as they are taken, without other
requests: the processor time of the server's processes a row, for rows that are new and for the same rows again.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.live_cost import measured
from benchmarks.tables import record_line
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from preprocessing.features import CATALOGUE_FILE
from preprocessing.item_rows import parse_item
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.repository import write_configs
from vivace import contract
from vivace.client import VivaceClient
from vivace.machine import processor_seconds
from vivace.run import Run

SEED, TOP_K, SLO_MS, WARM_S = 7, 10, 1000.0, 1.0
BATCH, SENDERS, PROBE_S, IDLE_S = 50, 2, 0.5, 3.0
NEW_ITEMS = 2_000  # of each sender, put in again and again


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The catalogue's rows, as they can be put in."""
    frame = pd.read_parquet(run.features / CATALOGUE_FILE)
    columns = {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
    schema = run.schema()
    records = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [parse_item(record, schema) for record in records]


class Upserts(threading.Thread):
    """Puts rows in at a rate until ``over``; ``took`` has the milliseconds of each call, ``statuses`` what came."""

    def __init__(
        self, address: str, rows: list[dict[str, Any]], number: int, per_second: float, over: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.rows, self.number, self.per_second, self.over = address, rows, number, per_second, over
        self.took: list[float] = []
        self.statuses = Counter[str]()
        self.most = 0  # rows; 0: no end

    def run(self) -> None:
        start, sent = time.monotonic(), 0
        with VivaceClient(self.address) as client:
            while not self.over.wait(max(0.0, start + sent / self.per_second - time.monotonic())):
                if self.most and sent >= self.most:
                    return
                part = [
                    {
                        **self.rows[n % len(self.rows)],
                        contract.ITEM: f"bench {self.number} {n % NEW_ITEMS}",
                    }
                    for n in range(sent, sent + BATCH)
                ]
                began = time.monotonic()
                self.statuses.update(client.upsert_items(part))
                self.took.append((time.monotonic() - began) * 1000)
                sent += BATCH


class Probes(threading.Thread):
    """Now and then puts in the twin of an item and asks for it; ``seconds`` until an answer had it."""

    def __init__(
        self, address: str, row: dict[str, Any], history: list[str], over: threading.Event, search: bool
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.row, self.history, self.over, self.search = address, row, history, over, search
        self.seconds: list[float] = []
        self.found: list[float] = []
        self.gone: list[float] = []

    def run(self) -> None:
        number = 0
        with VivaceClient(self.address) as client:
            while not self.over.wait(PROBE_S):
                item, word = f"probe {number}", f"probe{number}word"
                row = {**self.row, contract.ITEM: item, contract.TEXT: f"{self.row[contract.TEXT]} {word}"}
                began = time.monotonic()
                client.upsert_items([row])
                self._until(lambda item=item: item in self._recommended(client), began, self.seconds)
                if self.search:
                    self._until(lambda i=item, w=word: i in client.recommend(query=w).items, began, self.found)
                began = time.monotonic()
                client.remove_items([item])
                self._until(lambda item=item: item not in self._recommended(client), began, self.gone)
                number += 1

    def _recommended(self, client: VivaceClient) -> list[str]:
        return client.recommend(history=self.history, top_k=contract.MAX_TOP_K).items

    def _until(self, seen: Any, began: float, into: list[float]) -> None:
        while not self.over.is_set():
            if seen():
                into.append(time.monotonic() - began)
                return


def under_load(root: Path, profile: str, qps: float, seconds: float, upserts: float) -> dict[str, Any]:
    """Figures of one server, first without changes, then with them."""
    whole, pool, over = Run(root), messages(root, TOP_K), threading.Event()
    rows = rows_of(whole)
    with tempfile.TemporaryDirectory() as folder:
        own = with_store_of_its_own(whole, Path(folder))
        with TritonServer(on_free_ports(Run(own).repository, profile)) as server:
            address = grpc_address(server)

            def offered(length: float, due: np.ndarray, sent: list[bytes]) -> LoadRun:
                return run(address, sent, due, length, SLO_MS)

            at_rate(partial(offered, WARM_S), server.pid, pool, qps, WARM_S, SEED)
            before, before_ms = at_rate(partial(offered, seconds), server.pid, pool, qps, seconds, SEED)
            history = [str(item) for item in recorded(root)[contract.ITEM][0]]
            with VivaceClient(address) as client:
                best = client.recommend(history=history, top_k=1).items[0]
            probed = next(row for row in rows if row[contract.ITEM] == best)
            probes = Probes(address, probed, history, over, bool(whole.shapes().search))
            kinds = whole.schema().item_categoricals[:1]
            others = [row for row in rows if all(row[kind] != probed[kind] for kind in kinds)]
            calls = [Upserts(address, others[k::SENDERS], k, upserts / SENDERS, over) for k in range(SENDERS)]
            threads = [*calls, probes]
            for thread in threads:
                thread.start()
            after, after_ms = at_rate(partial(offered, seconds), server.pid, pool, qps, seconds, SEED)
            over.set()
            for thread in threads:
                thread.join(30)
    took = [ms for call in calls for ms in call.took]
    statuses = sum((call.statuses for call in calls), Counter[str]())
    worst = lambda values: round(max(values, default=float("nan")), 3)  # noqa: E731
    return {
        "upserts_a_second": round(BATCH * len(took) / seconds), "statuses": dict(statuses),
        "upsert_ms": {q: round(float(np.percentile(took, q)), 1) for q in (50, 99)},
        "probes": len(probes.seconds), "until_recommended_s": worst(probes.seconds),
        "until_found_by_words_s": worst(probes.found), "until_gone_s": worst(probes.gone),
        "without": _figures(before, before_ms), "with": _figures(after, after_ms),
    }  # fmt: skip


def alone(root: Path, profile: str, seconds: float) -> dict[str, Any]:
    """Rows a second and processor time a row of a server that is asked nothing else."""
    whole = Run(root)
    rows, result = rows_of(whole), {}
    with tempfile.TemporaryDirectory() as folder:
        own = with_store_of_its_own(whole, Path(folder))
        with TritonServer(on_free_ports(Run(own).repository, profile)) as server:
            before = processor_seconds(server.pid)
            time.sleep(IDLE_S)
            idle = (processor_seconds(server.pid) - before) / IDLE_S  # counters, the metrics page: not the rows' cost
            for what in ("new", "again"):
                over, before, began = threading.Event(), processor_seconds(server.pid), time.monotonic()
                calls = [Upserts(grpc_address(server), rows[k::SENDERS], k, 1e6, over) for k in range(SENDERS)]
                for call in calls:
                    call.most = NEW_ITEMS if what == "new" else 0
                    call.start()
                if what == "again":
                    over.wait(seconds)
                    over.set()
                for call in calls:
                    call.join()
                count, took = BATCH * sum(len(call.took) for call in calls), time.monotonic() - began
                spent = processor_seconds(server.pid) - before - idle * took
                result[what] = {
                    "rows": count, "rows_a_second": round(count / took),
                    "processor_ms_a_row": round(spent * 1000 / count, 3),
                }  # fmt: skip
    return result


def _figures(outcome: LoadRun, processor_ms: float) -> dict[str, Any]:
    return {
        "p50_ms": round(outcome.p50, 2), "p99_ms": round(outcome.p99, 2), "processor_ms": round(processor_ms, 2),
        "answered": outcome.answered, "refused": outcome.refused,
    }  # fmt: skip


def with_store_of_its_own(run_: Run, folder: Path) -> Path:
    """A copy of a run for which nothing that is put in stays."""
    own = folder / run_.root.name
    own.mkdir()
    for path in run_.root.iterdir():
        if not path.name.startswith("model_repository") and path.name != "feature_store":
            (own / path.name).symlink_to(path.resolve())
    shutil.copytree(run_.feature_store, own / "feature_store")
    shutil.copytree(run_.repository.resolve(), own / "model_repository")
    return own


def cost(root: Path, profiles: list[str], turns: int, qps: float, seconds: float) -> dict[str, Any]:
    """p50 and processor time with the live catalogue over those without, turn by turn, while nothing changes."""
    whole, result = Run(root), {}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        with_, without = (with_store_of_its_own(whole, Path(folder)) for folder in (one, two))
        shapes, schema = whole.shapes(), whole.schema()
        (without / "model_repository" / "checksums.json").unlink(missing_ok=True)
        write_configs(
            without / "model_repository", replace(shapes, fresh=0, rising_fresh=0), schema.heads, schema.exclude_seen
        )
        figures = defaultdict[tuple[str, Path], list[tuple[float, float]]](list)
        for turn, (profile, own) in in_turns(turns, [(p, own) for p in profiles for own in (without, with_)]):
            figures[profile, own].append(measured(own, profile, qps, seconds, 0.0))
            print(f"turn {turn + 1} {profile or 'default'} {'with' if own == with_ else 'without'}: "
                  f"{figures[profile, own][-1]}", flush=True)  # fmt: skip
        for profile in profiles:
            for k, what in enumerate(("p50", "processor time")):
                a, b = ([figure[k] for figure in figures[profile, own]] for own in (without, with_))
                ratio = spread([y / x for x, y in zip(a, b, strict=True)])
                result[f"{profile or 'default'}, {what}"] = {
                    "ratio": ratio, "without_ms": spread(a), "with_ms": spread(b),
                }  # fmt: skip
                print(f"{profile or 'default'}, {what}: {with_spread(ratio, 3)} times")
    return result


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run whose items have titles")],
    profile: Annotated[list[str], typer.Option(help="may be given again")] = ["", "fused"],  # noqa: B006
    upserts: Annotated[float, typer.Option(help="rows a second")] = 1000.0,
    qps: float = 100.0,
    seconds: float = 20.0,
    only_cost: Annotated[bool, typer.Option("--cost", help="what it costs while nothing changes")] = False,
    only_upserts: Annotated[bool, typer.Option("--alone", help="what a row costs while nothing is asked")] = False,
    turns: int = 5,
) -> None:
    if only_upserts:
        result = {p or "default": alone(root, p, seconds) for p in profile}
        print(record_line("upserts alone", seconds=seconds, results=result))
        return
    if only_cost:
        result = cost(root, profile, turns, qps, seconds)
        print(record_line("cost of the live catalogue", turns=turns, qps=qps, results=result))
        return
    result = {p or "default": under_load(root, p, qps, seconds, upserts) for p in profile}
    print(record_line("live catalogue under load", qps=qps, upserts=upserts, seconds=seconds, results=result))


if __name__ == "__main__":
    typer.run(main)
