"""What counting every call costs: the same run behind a guard with its histograms and one without, taking turns.

    python -m benchmarks.door_statistics artifacts/shop --turns 5

Processor milliseconds a request of Triton, its workers and Envoy together, and of Envoy alone, with a scrape of the
status page's collector each second. Ratios are by turn. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated
from unittest import mock

import psutil
import typer

from benchmarks.guard import AT_ONCE, measure
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.door import config
from serving.door.statistics import DoorStatistics
from serving.launcher import TritonServer
from vivace import contract
from vivace.run import Run

SCRAPE_S = 1.0


def without_statistics(*kept: str) -> dict[str, object]:
    """What Envoy kept before: the calls under way."""
    return {"stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": r}} for r in kept]}}}


def turn(server: TritonServer, histories: list[list[str]], seconds: float, scraped: bool) -> dict[str, float]:
    """Figures of one turn; milliseconds."""
    assert server.door is not None
    envoy, stop, door = psutil.Process(server.door.pid), threading.Event(), server.door

    def scrape() -> None:
        statistics = DoorStatistics(lambda path: door.ask("GET", path))
        while not stop.wait(SCRAPE_S):
            list(statistics.collect())

    thread = threading.Thread(target=scrape)
    if scraped:
        thread.start()
    before = sum(envoy.cpu_times()[:2])
    figures = measure(server, "grpc", AT_ONCE, histories, seconds)
    requests = seconds * AT_ONCE * 1000 / figures["p50_ms"]  # about: for Envoy's own share alone
    figures["envoy_ms"] = (sum(envoy.cpu_times()[:2]) - before) * 1000 / requests
    stop.set()
    if scraped:
        thread.join()
    return figures


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of one measurement", min=0.5)] = 4.0,
    control: Annotated[bool, typer.Option("--control", help="both count: what chance alone gives")] = False,
) -> None:
    run, other = Run(root), config.stats_config if control else without_statistics
    histories = [list(h) for h in recorded(root)[contract.ITEM][:300]]
    counting = TritonServer(on_free_ports(run.repository, "", root / "counting.log", guard=True))
    plain = TritonServer(on_free_ports(run.repository, "", root / "plain.log", guard=True))
    rows: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with counting, mock.patch.object(config, "stats_config", other), plain:
        for server in (plain, counting):
            measure(server, "grpc", AT_ONCE, histories, seconds)  # warm
        for _, server in in_turns(turns, (plain, counting)):
            rows[server is counting].append(turn(server, histories, seconds, server is counting))
    pairs = list(zip(rows[False], rows[True], strict=True))
    ratios = {name: spread([b[name] / a[name] for a, b in pairs]) for name in ("p50_ms", "cpu_ms", "envoy_ms")}
    for name, ratio in ratios.items():
        print(f"{name}: {with_spread(spread([b[name] for _, b in pairs]), 3)}, {with_spread(ratio, 3)} times")
    print(record_line("door_statistics", turns=turns, seconds=seconds, control=control, ratios=ratios))


if __name__ == "__main__":
    typer.run(main)
