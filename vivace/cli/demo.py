"""``make demo``: the whole path on one data set, with its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vivace import contract
from vivace.cli.compile import compile_
from vivace.cli.evaluate import evaluate
from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Data, DataPath, PresetName, Seed, console, say
from vivace.cli.prepare import SPLITS, prepare
from vivace.cli.query import print_answer, titles
from vivace.cli.runs import run_name, say_next, steps_follow
from vivace.cli.train import train
from vivace.cli.tune import tune
from vivace.cli.values import choice
from vivace.cli.why import print_explained
from vivace.client import VivaceClient
from vivace.run import Run

if TYPE_CHECKING:
    from serving.launcher import TritonServer

LOAD_USERS = 8
NEW_ITEM_S = 10.0
EXPLAINED = 3  # items of the first answer whose reasons are printed
TUNED = "tuned"
SHOP = "shop"


def _answers(run: Run, server: TritonServer, search: bool) -> None:
    """A few readable answers: held-out users, a newcomer before and after a first event; with ``search`` a query with
    a typing error, with and without a history."""
    from preprocessing.features import Features
    from preprocessing.requests import recorded
    from vivace.cli.demo_present import is_over, send_again

    sample, features = recorded(run.root), Features(run.features)
    with VivaceClient(f"{server.host}:{server.grpc_port}") as client:
        if run.shapes().rising and is_over(features):
            say("live counters count what is clicked now, and this log is over: its last events are sent once more")
            say(f"sent {send_again(features, client):,} events, by readers named log-…; again today they count once")
        columns = [contract.USER, contract.ITEM, contract.TARGET]
        for user, history, target in sample.head(2)[columns].itertuples(index=False):
            answer = client.recommend(user, list(history), 5)
            print_answer(run, user, list(history), answer)
            (title,) = titles(run, [target])
            say(f"next item in the log, which the final fit has learned too: {target} {title}")
        print_explained(run, client.explain(sample[contract.USER][0], list(sample[contract.ITEM][0]), EXPLAINED))
        visitor, item = f"visitor-{int(time.time())}", sample[contract.TARGET][0]
        print_answer(run, visitor, [], client.recommend(visitor, top_k=5))
        client.append(visitor, item)
        say(f"appended one event of {visitor}: {item} {titles(run, [item])[0]}")
        print_answer(run, visitor, [item], client.recommend(visitor, top_k=5))
        if run.shapes().fresh:
            _new_item(run, client, visitor, item)
        if search:
            user, history = sample[contract.USER][0], list(sample[contract.ITEM][0])
            words = (titles(run, history[-1:])[0] or history[-1]).split()[:3]
            query = " ".join([*words[:2], words[-1][:-2] + words[-1][-1]])
            for who, events in ((user, history), ("", [])):
                say(f"QUERY {query!r}")
                print_answer(run, who, events, client.recommend(who, events, 5, query))


def _new_item(run: Run, client: VivaceClient, visitor: str, like: str) -> None:
    """Puts a new item into the catalogue, described as ``like`` is, and says when ``visitor`` gets it."""
    import numpy as np
    import pandas as pd

    from preprocessing.features import CATALOGUE_FILE

    catalogue = pd.read_parquet(run.features / CATALOGUE_FILE).set_index(contract.ITEM)
    described = catalogue.loc[like, list(run.schema().item_columns)]
    row = {name: value for name, value in described.items() if isinstance(value, np.ndarray) or not pd.isna(value)}
    new = {contract.ITEM: f"new-{int(time.time())}", **row, contract.TITLE: f"{row[contract.TITLE]} (new)"}
    began = time.monotonic()
    (status,) = client.upsert_items([new])
    say(f"new item: {new[contract.ITEM]} {new[contract.TITLE]}; STATUS {status}")
    while new[contract.ITEM] not in (items := client.recommend(visitor, top_k=contract.MAX_TOP_K).items):
        if time.monotonic() - began > NEW_ITEM_S:
            if run.schema().name != SHOP:  # of the shop it is known that it comes
                say(f"it is not among the first {len(items)} for {visitor}: others are nearer to one event")
                return
            raise ValueError(f"demo: {new[contract.ITEM]} is in no answer {NEW_ITEM_S} s after it was put in")
        time.sleep(0.05)
    place, seconds = items.index(new[contract.ITEM]) + 1, time.monotonic() - began
    say(f"it is recommended to {visitor} {seconds:.1f} s later, at place {place} of {len(items)}")


def _load(run: Run, server: TritonServer, seconds: int) -> None:
    """A short run of locust, as clients and as the server measured it."""

    from loadtest.generate.run_locust import results, run_locust
    from loadtest.generate.statistics import between, quantiles, statistics

    client = server.control_client()
    before = statistics(client)
    code = run_locust(
        run.root, server.host, server.http_port, server.grpc_port, "both", LOAD_USERS, seconds, quiet=True
    )
    stages, spread = between(before, statistics(client)), quantiles(server.host, server.metrics_port)
    client.close()
    table = Table(
        title=f"locust, {LOAD_USERS} users in a closed loop for {seconds} s: latency in ms", title_justify="left"
    )
    for name in ("", "p50", "p95", "p99", "QPS", "mean batch", "failures"):
        table.add_column(name, justify="left" if not name else "right")
    for row in results(run.root):
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
            f"locust: some requests failed (exit code {code}); see {run.root / 'locust.log'} and {run.server_log}"
        )


class Clock:
    """Seconds of each step, printed as each ends."""

    def __init__(self) -> None:
        self.started = self.since = time.monotonic()
        self.steps: list[tuple[str, float]] = []

    def done(self, name: str) -> None:
        self.steps.append((name, time.monotonic() - self.since))
        console.rule(f"{name}: {self.steps[-1][1]:.0f} s", align="left")
        self.since = time.monotonic()

    def summary(self) -> str:
        each = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.steps)
        return f"seconds: {each}; in all {time.monotonic() - self.started:.0f}"


def run_demo(
    data: str,
    path: Path | None,
    artifacts: Path,
    seed: int,
    preset: str,
    load_seconds: int,
    search: bool = False,
    tune_minutes: float = 0.0,
    split: str = "",
) -> None:
    """Runs every step; each one that is already there is not done again. With ``tune_minutes`` the server has the
    profile that a search of so many minutes found."""
    from preprocessing.requests import recorded
    from serving.default_profile import default_profile
    from serving.server_options import ServerOptions
    from serving.service import interrupt_on_signals, service

    interrupt_on_signals()
    clock = Clock()
    with steps_follow():
        run = prepare(data=data, path=path, artifacts=artifacts, seed=seed, split=split)
        clock.done("prepare")
        name = run_name(run, artifacts)
        steps: list[tuple[str, Callable[..., None]]] = [("train", train), ("evaluate", evaluate)]
        steps += [("final fit", partial(train, final=True))]
        steps += [("search", partial(train, task="search"))] if search else []
        for label, verb in (*steps, ("compile", compile_)):
            verb(name=name, artifacts=artifacts, preset=preset, seed=seed)
            clock.done(label)
        profile, which = default_profile(run.repository)
        if tune_minutes:
            try:
                tune(name=name, artifacts=artifacts, budget=tune_minutes, save_as=TUNED)
                profile, which = TUNED, f"profile {TUNED}"
            except ValueError as error:  # such as an objective that nothing meets here: it is served as it is
                say(f"{str(error).replace('--budget', '--tune-minutes')}; served untuned")
            clock.done("tune")
    say(which)
    options = ServerOptions(
        repository=run.repository, http_port=0, grpc_port=0, metrics_port=0, log=run.server_log, guard=True,
        profile=profile,
    )  # fmt: skip
    with service(options, say) as (server, _):
        clock.done("serve")
        _answers(run, server, search)
        clock.since = time.monotonic()
        _load(run, server, load_seconds)
        clock.done("load")
    say(clock.summary())
    say_next("serve", run, artifacts)
    say_next("ui", run, artifacts)
    say_next(f"query --user {recorded(run.root)[contract.USER][0]}", run, artifacts)


def demo(
    data: Data = "shop",
    path: DataPath = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    preset: PresetName = "",
    load_seconds: Annotated[int, typer.Option(help="length of the locust run", min=1)] = 15,
    search: Annotated[bool, typer.Option(help="make the catalogue searchable too: some minutes more")] = False,
    tune_minutes: Annotated[
        float,
        typer.Option(help="search so long for the settings that answer most within 'vivace tune's objective", min=0),
    ] = 0.0,
    split: Annotated[str, choice("--split", SPLITS, "what is held out, as for 'vivace prepare'")] = "",
) -> None:
    """The whole path: prepare, train, evaluate, compile, serve, a few answers, a short load test."""
    run_demo(
        data=data, path=path, artifacts=artifacts, seed=seed, preset=preset, load_seconds=load_seconds, search=search,
        tune_minutes=tune_minutes, split=split,
    )  # fmt: skip
