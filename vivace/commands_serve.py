"""Verbs that serve a run and look at it: serve, tune, query, load, report, demo, doctor."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Data,
    DataPath,
    Host,
    Name,
    PresetName,
    Profile,
    Seed,
    console,
    reported,
    say,
)


def serve(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any free port")] = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    status_port: Annotated[int, typer.Option(help="Prometheus metrics of the watchdog (0: none)")] = 8003,
    profile: Profile = "",
    cache_mb: Annotated[int, typer.Option(help="cache of encoded users (0: none); takes the profile cached")] = 0,
    trace_url: Annotated[
        str, typer.Option(help="OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces")
    ] = "",
    trace_rate: Annotated[int, typer.Option(help="one of so many requests is traced")] = 100,
    log_file: Annotated[Path | None, typer.Option(help="Triton's log; default artifacts/<name>/triton.log")] = None,
    verbose: int = 0,
) -> None:
    """Start the real Triton with the ensemble, watch its workers, stop cleanly on Ctrl-C."""
    from serving.launcher import ServerOptions
    from serving.repository import served_from
    from serving.service import run_until_signal

    with reported():
        root = artifacts / name
        served = served_from(root, profile)
        if served != root:
            say(f"profile {profile} serves {served}")
        options = ServerOptions(
            repository=served / "model_repository",
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            profile=profile or ("cached" if cache_mb else ""),
            cache_bytes=cache_mb << 20,
            trace_url=trace_url,
            trace_rate=trace_rate,
            log=log_file or root / "triton.log",
            verbose=verbose,
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        run_until_signal(options, status_port, say)


def tune(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    slo: Annotated[str, typer.Option(help="percentile of the latencies and its bound")] = "p99=20ms",
    quality: Annotated[float, typer.Option(help="NDCG@10 as a share of the uncompressed run's")] = 0.99,
    budget: Annotated[float, typer.Option(help="minutes; a search that was cut short goes on where it was")] = 10.0,
    save_as: Annotated[str, typer.Option(help="name of the profile: configs/<name>.pbtxt")] = "tuned",
    space: Annotated[Path | None, typer.Option(help='JSON of values by knob, such as {"batch": [8, 16]}')] = None,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 4.0,
    restart: Annotated[bool, typer.Option(help="forget what an earlier search measured")] = False,
) -> None:
    """Find the configuration that answers the most requests within an objective; then: vivace serve --profile."""
    from loadtest.space import Objective
    from loadtest.tune import FOLDER
    from loadtest.tune import tune as run
    from vivace.artifacts import exclusive

    with reported():
        root, objective = artifacts / name, Objective.parse(slo, quality)
        wanted = json.loads(space.read_text()) if space else None
        with exclusive(root), console.status(str(objective)) as status:
            show = lambda text: status.update(text)  # noqa: E731
            found = run(root, objective, save_as, budget * 60, say, show, wanted, seconds, restart)
        chosen = found["chosen"]
        gain = f", {chosen['qps'] / found['untuned']:.2f} times the untuned" if found["untuned"] else ""
        say(f"{objective}: {chosen['qps']:.0f} requests a second{gain}: {chosen['trial']}")
        say(f"vivace serve --name {name} --profile {save_as}; report {root / FOLDER / save_as}.html")


def query(
    user: Annotated[str, typer.Option(help="user id; the history comes from the feature store")] = "",
    history: Annotated[str, typer.Option(help="item ids, oldest first, separated by commas")] = "",
    top_k: int = 10,
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    protocol: Annotated[str, typer.Option(help="grpc or http")] = "grpc",
    append: Annotated[str, typer.Option(help="first add this item to the user's history")] = "",
    text: Annotated[str, typer.Option(help="search for this; needs a run with search")] = "",
    filters: Annotated[
        str, typer.Option(help='{"values": {"brand": ["Alto"]}, "ranges": {"price": [5, null]}, "seen": false}')
    ] = "",
    diversity: Annotated[float, typer.Option(help="of --text: 0 by score, 1 as unlike each other as can be")] = 0.0,
) -> None:
    """Ask the running server and print titles; with --text what it understood and which branches found each item."""
    from serving.client import VivaceClient

    with reported(), VivaceClient(url, protocol) as client:
        if append:
            say(f"{user}: history now has {client.append(user, append)} events")
        items = [i for i in history.split(",") if i]
        wanted = json.loads(filters) if filters else None
        answer = client.recommend(user, items, top_k, text, filters=wanted, diversity=diversity)
        print_answer(artifacts / name, user, items, answer)


def titles(root: Path, items: list[str]) -> list[str]:
    """Titles from the feature store; the id where there is none."""
    from serving.feature_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        return [t or i for t, i in zip(store.titles(items), items, strict=True)]


def print_answer(root: Path, user: str, history: list[str], answer: Any) -> None:
    """History titles and recommended titles side by side with scores."""
    from serving.feature_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        known = history or (store.histories([user])[0] if user else None) or []
    past, found = titles(root, known[-5:]), titles(root, answer.items)
    table = Table(title=f"user {user or '(anonymous)'}, STATUS {answer.status}", title_justify="left")
    table.add_column("last in the history")
    table.add_column("recommended")
    table.add_column("score", justify="right")
    for head in answer.heads:
        table.add_column(f"P({head})", justify="right")
    if answer.understood:
        shown = {k: answer.understood[k] for k in ("text", "corrected", "synonyms", "intents", "facets")}
        console.print(json.dumps(shown, ensure_ascii=False), highlight=False)
        table.add_column("found by")
    found_by = answer.understood.get("found_by", {})
    for i in range(max(len(past), len(found))):
        got = i < len(found)
        table.add_row(
            past[i] if i < len(past) else "",
            found[i] if got else "",
            f"{answer.scores[i]:.2f}" if got else "",
            *(f"{p[i]:.3f}" if got else "" for p in answer.heads.values()),
            *([", ".join(found_by.get(answer.items[i], [])) if got else ""] if answer.understood else []),
        )
    console.print(table)


def load(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    protocol: Annotated[str, typer.Option(help="grpc, http or both")] = "both",
    users: Annotated[int, typer.Option(help="concurrent users")] = 8,
    seconds: int = 20,
    web: Annotated[bool, typer.Option(help="locust's own page on 127.0.0.1:8089 instead of a headless run")] = False,
    shape: Annotated[
        str, typer.Option(help="open loop, latency from the moment due: constant, ramp, burst or diurnal")
    ] = "",
    qps: Annotated[float, typer.Option(help="with --shape: mean rate offered")] = 100.0,
) -> None:
    """Replay held-out requests with locust."""
    from loadtest.run_locust import run_locust

    with reported():
        code = run_locust(
            artifacts / name, host, http_port, grpc_port, protocol, users, seconds, web, shape=shape, qps=qps
        )
        raise typer.Exit(code)


def report_compress(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    out: Annotated[Path | None, typer.Option(help="folder to write to; artifacts/<name>/report if empty")] = None,
    seconds: Annotated[float, typer.Option(help="of each of five measurements of an engine")] = 1.0,
    openvino: Annotated[bool, typer.Option(help="measure OpenVINO too")] = True,
) -> None:
    """Quality against latency of a run and its compressed variants: compress.html and compress.png."""
    from loadtest.compress_report import report as run

    with reported():
        root = artifacts / name
        target = out or root / "report"
        with console.status("measuring"):
            run(root, target, seconds, openvino)
        say(f"wrote {target}/compress.html and compress.png")


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
    from vivace.demo import run_demo

    with reported():
        run_demo(data, path, artifacts, seed, preset, load_seconds, search)


def doctor(artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    """Say what this machine offers and what is missing."""
    from vivace.doctor import examine

    missing = examine(console, artifacts)
    if missing:
        raise typer.Exit(1)
