"""What the cache of states is worth to a whole server: processor time, latency and rate, with and without it.

    python -m benchmarks.state_reuse_served artifacts/shop --out docs/benchmarks/state_reuse_served.json

Of the run only the features are read. For each length two models of the preset ``cpu``'s size with random weights
(they do not change the time) are compiled and served twice, profile ``fused``, once with the cache of states, over one
store in which users have long histories. "replay": ``state_reuse.log_of``, users by a power law, each event appended to
the store and followed by a request, one in four requests without a new event; its first half fills the cache, in the
second both servers are asked each request, one at a time, in changing order, and their answers are compared.
Processor time is that of all processes of a server. "closed": four callers at once, all users asked once and a third
of them again after an event each, server by server. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.state_reuse import config_of, log_of
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from preprocessing.features import Features
from serving.launcher import TritonServer
from serving.runtime.cache_settings import StateSettings
from training.checkpoints import build_ranker, finish_training
from training.compile.compiler import compile_models
from training.models.item_table import item_attributes
from training.models.retrieval import RetrievalModel
from training.presets import Preset, cpu
from vivace.client import Recommendation, VivaceClient
from vivace.machine import memory_mib, processor_seconds
from vivace.manifest import Step
from vivace.run import FEATURES, RANKING, RETRIEVAL, Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore, fill_store

SEED, TOP_K, TIES = 7, 100, 1e-4  # TIES: scores so near may change places
CALLERS, AGAIN, SETTLE_S = 4, 3, 0.4  # one user in AGAIN is asked twice
NOON = {"hour": "12", "weekday": "2"}
ANEW, REUSED = "anew", "reused"
BARS = {200: 1.3, 1_000: 2.5, 4_096: 5.0}
COUNTER = re.compile(r'^vivace_state_cache_(\w+?)(?:\{[^}]*result="(\w+)"[^}]*\}|\{[^}]*\})? (\S+)$', re.M)


def untrained(features: Features, preset: Preset, root: Path) -> None:
    """Models with random weights in ``root``, in the place of trained ones."""
    torch.manual_seed(SEED)
    run, items = Run(root, features.folder), features.item_count()
    retriever = RetrievalModel(
        preset.encoder, items, 50 * torch.rand(items), item_attributes(features, preset.encoder), features.context
    )
    ranker = build_ranker(features, preset, retriever)
    for model in (retriever, ranker):
        with torch.no_grad():  # what is zero before training would hide a difference, items alike would change places
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.shape[:1] == (items,) else 0.05))
    for name, model, source in ((RETRIEVAL, retriever, FEATURES), (RANKING, ranker, RETRIEVAL)):
        step = Step(run.step(name), f"random {name}", {}, SEED, {source: run.key(source)})
        step.reset()
        finish_training(step, model, {"seconds": 0.0})


def compiled(features: Features, length: int, root: Path) -> None:
    preset = replace(cpu(), encoder=replace(config_of("sasrec", length), context=True, types=True))
    untrained(features, preset, root)
    compile_models(features, preset, root, SEED, lambda _: None)


class Log:
    """Users' histories in a store, which grow in the order of ``log_of``; items by a power law."""

    def __init__(self, features: Features, store: Path, users: int, events: int, length: int) -> None:
        names = features.items()["item_id"].tolist()
        self._rng = np.random.default_rng(SEED)
        share = 1 / np.arange(1, len(names) + 1)
        self._names, self._share = names, share / share.sum()
        self.asked = [(f"user {user}", len(ids)) for user, ids in log_of(users, events, length)]
        first: dict[str, int] = {}
        for user, count in self.asked:
            first.setdefault(user, count - 1)
        self.users, self._count = sorted(first), first
        rows = ((u, self._items(n), ["view"] * n, [0] * n) for u, n in first.items())
        fill_store(store, rows, ())
        self._store = LmdbStore(store)

    def _items(self, count: int) -> list[str]:
        return [self._names[i] for i in self._rng.choice(len(self._names), count, p=self._share)]

    def append(self, users: Sequence[str]) -> None:
        """An event of each."""
        items = self._items(len(users))
        self._store.append(Event(u, i, "view", int(time.time() * 1000)) for u, i in zip(users, items, strict=True))

    def before(self, user: str, count: int) -> None:
        """What ``user`` did before a request of the log."""
        if count > self._count[user]:
            self._count[user] = count
            self.append([user])

    def close(self) -> None:
        self._store.close()


def counted(server: TritonServer) -> dict[str, float]:
    """What the server's page says of its cache."""
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
        return {result or name: float(value) for name, result, value in COUNTER.findall(page.read().decode())}


def apart(a: Recommendation, b: Recommendation) -> tuple[bool, bool, float]:
    """(whether both have the same items in the same order, the same but for ties, how far their scores are apart)."""
    of_b = dict(zip(b.items, b.scores.tolist(), strict=True))
    last = float(b.scores[-1]) if len(b.items) else 0.0
    pairs = zip(a.items, a.scores.tolist(), b.items, b.scores.tolist(), strict=False)
    tied = all(i == j or max(abs(of_b.get(i, last) - s), abs(s - t)) < TIES for i, s, j, t in pairs)
    same_count = len(a.items) == len(b.items)
    far = float(np.abs(a.scores - b.scores).max(initial=0.0)) if same_count else float("inf")
    return a.items == b.items, tied and same_count, far


class Pair:
    """The two servers and their callers."""

    def __init__(self, life: ExitStack, root: Path, room_mb: int) -> None:
        repository = Run(root).repository
        options = {ANEW: None, REUSED: StateSettings(room_mb << 20)}
        self.servers = {
            form: life.enter_context(
                TritonServer(on_free_ports(repository, "fused", root / f"{form}.log", state_cache=room))
            )
            for form, room in options.items()
        }
        self.clients = {
            form: [life.enter_context(VivaceClient(grpc_address(server), timeout_s=60)) for _ in range(CALLERS)]
            for form, server in self.servers.items()
        }

    def ask(self, form: str, user: str, caller: int = 0) -> Recommendation:
        return self.clients[form][caller].recommend(user, top_k=TOP_K, context=NOON)

    def ask_all(self, form: str, users: Sequence[str], caller: int) -> None:
        for user in users:
            self.ask(form, user, caller)

    def used(self) -> dict[str, float]:
        """Processor seconds of each server so far."""
        return {form: processor_seconds(server.pid) for form, server in self.servers.items()}


def replayed(pair: Pair, log: Log, turns: int) -> dict[str, Any]:
    """The second half of the log in ``turns`` parts."""
    half = len(log.asked) // 2
    for user, count in log.asked[:half]:
        log.before(user, count)
        pair.ask(REUSED, user)
    pair.ask(ANEW, log.users[0])
    time.sleep(SETTLE_S)
    pair.ask(REUSED, log.users[0])  # counters come with a later batch
    before, ms, cpu = counted(pair.servers[REUSED]), {ANEW: [], REUSED: []}, {ANEW: [], REUSED: []}  # type: ignore[var-annotated]
    same, tied, far = 0, 0, 0.0
    for part in np.array_split(np.arange(half, len(log.asked)), turns):
        used, took = pair.used(), {ANEW: list[float](), REUSED: list[float]()}
        for number in part:
            log.before(*log.asked[number])
            answers = {}
            for form in (ANEW, REUSED) if number % 2 else (REUSED, ANEW):
                began = time.perf_counter()
                answers[form] = pair.ask(form, log.asked[number][0])
                took[form].append((time.perf_counter() - began) * 1000)
            equal, but_ties, by = apart(answers[REUSED], answers[ANEW])
            same, tied, far = same + equal, tied + but_ties, max(far, by)
        for form, seconds in pair.used().items():
            cpu[form].append((seconds - used[form]) * 1000 / len(part))
            ms[form].append(float(np.median(took[form])))
    time.sleep(SETTLE_S)
    pair.ask(REUSED, log.users[0])
    after = counted(pair.servers[REUSED])
    rows = {how: after[how] - before[how] for how in ("hit", "grown", "missed", "evicted_total")}
    shares = {how: rows[how] / (rows["hit"] + rows["grown"] + rows["missed"]) for how in ("hit", "grown", "missed")}
    return {
        "requests": len(log.asked) - half, "same_top": same, "same_but_ties": tied, "scores_apart": far,
        "shares": shares, "evicted": rows["evicted_total"], "processor_ms": both(cpu), "p50_ms": both(ms),
    }  # fmt: skip


def both(of: dict[str, list[float]]) -> dict[str, Any]:
    ratio = [a / r for a, r in zip(of[ANEW], of[REUSED], strict=True)]
    return {ANEW: spread(of[ANEW]), REUSED: spread(of[REUSED]), "times": spread(ratio)}


def closed(pair: Pair, log: Log, turns: int) -> dict[str, Any]:
    """Requests a second of each server under CALLERS at once."""
    rates: dict[str, list[float]] = {ANEW: [], REUSED: []}
    asked = [*log.users, *log.users[::AGAIN]]
    for turn, form in in_turns(turns + 1, (ANEW, REUSED)):
        log.append(log.users)
        began = time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as pool:
            for done in [pool.submit(pair.ask_all, form, asked[n::CALLERS], n) for n in range(CALLERS)]:
                done.result()
        if turn:  # in the first both workers met the users
            rates[form].append(len(asked) / (time.perf_counter() - began))
    ratio = [r / a for a, r in zip(rates[ANEW], rates[REUSED], strict=True)]
    return {ANEW: spread(rates[ANEW]), REUSED: spread(rates[REUSED]), "times": spread(ratio), "requests": len(asked)}


def measured(features: Features, length: int, events: int, turns: int, room_mb: int) -> dict[str, Any]:
    users = max(20, events // 20)
    with tempfile.TemporaryDirectory() as name, ExitStack() as life:
        root = Path(name) / "shop"
        root.mkdir()
        (root / "features").symlink_to(features.folder.resolve())
        compiled(features, length, root)
        log = Log(features, Run(root).feature_store, users, events, length)
        life.callback(log.close)
        pair = Pair(life, root, room_mb)
        record = {"history": length, "users": users, "replay": replayed(pair, log, turns)}
        entries = counted(pair.servers[REUSED])["bytes"]
        record |= {"closed": closed(pair, log, min(turns, 3)), "cache_mib": entries / 2**20}
        record |= {"memory_mib": {form: memory_mib(server.pid) for form, server in pair.servers.items()}}
        return record


def in_words(replay: dict[str, Any]) -> str:
    """What a replay through both servers has come to."""
    cpu, shares = replay["processor_ms"], {how: f"{share:.1%}" for how, share in replay["shares"].items()}
    return (
        f"{replay['requests']} requests: processor time {with_spread(cpu[ANEW], 1)} ms anew, "
        f"{with_spread(cpu[REUSED], 1)} reused, {with_spread(cpu['times'], 2)} times; p50 "
        f"{with_spread(replay['p50_ms']['times'], 2)} times; {replay['same_top']} top 100 equal, but for ties "
        f"{replay['same_but_ties']}; {shares}"
    )


def main(
    root: Annotated[Path, typer.Argument(help="a run with features, such as artifacts/shop")],
    lengths: Annotated[str, typer.Option(help="events of a history")] = ",".join(map(str, BARS)),
    requests: Annotated[str, typer.Option(help="compared at each length, about")] = "1300,500,60",
    turns: Annotated[int, typer.Option(help="parts that the replay is cut into", min=1)] = 5,
    room_mb: Annotated[int, typer.Option(help="of the cache")] = 256,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    features, figures = Features(root / "features"), []
    for length, count in zip(map(int, lengths.split(",")), map(int, requests.split(",")), strict=True):
        record = measured(features, length, count * 3 // 2, turns, room_mb)
        figures.append(record)
        replay, rate = record["replay"], record["closed"]
        typer.echo(f"{length}: {in_words(replay)}; rate {with_spread(rate['times'], 2)} times")
        if out is not None:
            out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("state_reuse_served", data=root.name, figures=figures))


if __name__ == "__main__":
    typer.run(main)
