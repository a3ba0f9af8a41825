"""``make demo``: the whole path on one data set, with its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import tritonclient.grpc as grpcclient
import typer
from rich.console import Console
from rich.table import Table

from loadtest.generate.run_locust import results, run_locust
from loadtest.generate.statistics import between, quantiles, statistics
from preprocessing.requests import recorded
from serving.launcher import ServerOptions, TritonServer
from serving.service import interrupt_on_signals, service
from vivace import contract
from vivace.cli.compile import compile_
from vivace.cli.evaluate import evaluate
from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Data, DataPath, PresetName, Seed, console, reported, say
from vivace.cli.prepare import prepare
from vivace.cli.query import print_answer, titles
from vivace.cli.train import train
from vivace.client import VivaceClient

LOAD_USERS = 8


def _answers(root: Path, server: TritonServer, search: bool) -> None:
    """A few readable answers: held-out users, an anonymous one; with ``search`` a query with a typing error, with and
    without a history."""
    sample = recorded(root)
    with VivaceClient(f"{server.host}:{server.grpc_port}") as client:
        for user, history, target in sample.head(2)[[contract.USER, contract.ITEM, contract.TARGET]].itertuples(
            index=False
        ):
            answer = client.recommend(user, list(history), 5)
            print_answer(root, user, list(history), answer)
            (title,) = titles(root, [target])
            say(f"held-out next item: {title}" + (" (among the answers)" if target in answer.items else ""))
        print_answer(root, "", [], client.recommend(top_k=5))
        if search:
            user, history = sample[contract.USER][0], list(sample[contract.ITEM][0])
            words = titles(root, history[-1:])[0].split()[:3]
            query = " ".join([*words[:2], words[-1][:-2] + words[-1][-1]])
            for who, own in ((user, history), ("", [])):
                say(f"QUERY {query!r}")
                print_answer(root, who, own, client.recommend(who, own, 5, query))


def _load(root: Path, server: TritonServer, seconds: int, console: Console) -> None:
    client = grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}")
    before = statistics(client)
    code = run_locust(root, server.host, server.http_port, server.grpc_port, "both", LOAD_USERS, seconds, quiet=True)
    stages, spread = between(before, statistics(client)), quantiles(server.host, server.metrics_port)
    client.close()
    table = Table(
        title=f"locust, {LOAD_USERS} users in a closed loop for {seconds} s: latency in ms", title_justify="left"
    )
    for name in ("", "p50", "p95", "p99", "QPS", "mean batch", "failures"):
        table.add_column(name, justify="left" if not name else "right")
    for row in results(root):
        cells = [f"{row[k]:.1f}" for k in ("p50", "p95", "p99", "qps")]
        table.add_row(f"client, {row['protocol']}", *cells, "", str(row["failures"]))
    for model in stages:
        p = spread.get(model, {})
        cells = [f"{p[k]:.1f}" if k in p else "-" for k in ("p50", "p95", "p99")]
        batch = f"{stages[model]['batch']:.1f}" if model in contract.STAGES else ""
        table.add_row(f"server, {model}", *cells, f"{stages[model]['requests'] / seconds:.1f}", batch, "")
    console.print(table)
    if code:
        raise ValueError(
            f"locust: some requests failed (exit code {code}); see {root / 'locust.log'} and {root / 'triton.log'}"
        )


def run_demo(
    data: str, path: Path | None, artifacts: Path, seed: int, preset: str, load_seconds: int, search: bool = False
) -> None:
    """Runs every step; each one that is already there is not done again."""
    interrupt_on_signals()
    root, started = artifacts / data, time.monotonic()
    times: list[tuple[str, float]] = []

    def timed(name: str, since: float) -> None:
        times.append((name, time.monotonic() - since))
        console.rule(f"{name}: {times[-1][1]:.0f} s", align="left")

    t = time.monotonic()
    prepare(data=data, path=path, artifacts=artifacts, seed=seed)
    timed("prepare", t)
    learn_search = partial(train, task="search")
    steps: list[tuple[str, Callable[..., None]]]
    steps = [("train", train), ("evaluate", evaluate)]
    steps += [("search", learn_search)] if search else []
    for name, step in (*steps, ("compile", compile_)):
        t = time.monotonic()
        step(name=data, artifacts=artifacts, preset=preset, seed=seed)
        timed(name, t)
    t = time.monotonic()
    options = ServerOptions(
        root / "model_repository", http_port=0, grpc_port=0, metrics_port=0, log=root / "triton.log"
    )
    with service(options, say) as (server, _):
        timed("serve", t)
        _answers(root, server, search)
        t = time.monotonic()
        _load(root, server, load_seconds, console)
        timed("load", t)
    total = time.monotonic() - started
    say("seconds: " + ", ".join(f"{n} {s:.0f}" for n, s in times) + f"; in all {total:.0f}")
    say(
        f"serve it with: vivace serve --name {data}   "
        f"then: vivace query --name {data} --user {recorded(root)[contract.USER][0]}"
    )


def demo(
    data: Data = "shop",
    path: DataPath = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    preset: PresetName = "",
    load_seconds: Annotated[int, typer.Option(help="length of the locust run")] = 15,
    search: Annotated[bool, typer.Option(help="make the catalogue searchable too: some minutes more")] = False,
) -> None:
    """The whole path: prepare, train, evaluate, compile, serve, a few answers, a short load test."""

    with reported():
        run_demo(data, path, artifacts, seed, preset, load_seconds, search)
