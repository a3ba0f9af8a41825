"""Odd queries, filters, diversities and storms against a live server: each request gets an answer or a clear error.

    python -m benchmarks.fuzz_search artifacts/shop --minutes 5

Hypothesis makes the requests: any Unicode text, words of the catalogue cut and mixed with control characters, emoji,
right-to-left marks, SQL and regular expressions, bytes that are no text, filters that are right, any JSON or none. What
counts as a fault: an exception other than a named refusal, an answer that is short, a server that is not ready, an item
of the history where nothing seen was asked for, or a plain query whose answer has changed. Between the rounds there are
storms: searches after a history, far more at once than the queues hold, half of them with deadlines. Each must be
answered as it is alone (or cheaper, and say so) or refused with UNAVAILABLE, in whichever stage it is when another
branch works for it. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from loadtest.generate.local_server import grpc_address, on_free_ports
from loadtest.reports.record import record_line
from preprocessing.features import CATALOGUE_FILE
from preprocessing.requests import recorded
from search.online import SearchOptions
from serving.launcher import TritonServer
from vivace import contract
from vivace.client import AsyncVivaceClient, Recommendation, VivaceClient, VivaceError, VivaceTimeoutError, read_answer
from vivace.client_request import request_tensors
from vivace.run import Run

TOP_K, ROUND = 5, 200
STORM, STORM_S = 1500, 180.0  # far beyond any queue: what is not answered by then is lost
SHED = (
    "timeout expired",
    "exceeds maximum queue size",
    "more requests than it takes",
    "Exceeds maximum queue size",
    f"{contract.DEADLINE}:",
)
REFUSALS = ("QUERY:", f"{contract.FILTERS}:", f"{contract.DIVERSITY}:")
ODD = ["\x00", "\x1b[31m", "\u202e", "\u200d", "😀", "👩‍👩‍👧", "ﷺ", "' OR 1=1 --", "(a+)+$", "[", "\\", "%s", "{}", "ß",
       "İ", "№ 5", "½", "１２", "10cm", "1e309", "-", "\n", "\t", "a" * 300, "红色", "שלום", "ก็"]  # fmt: skip


def requests(words: list[str], items: list[str]) -> st.SearchStrategy[tuple[bytes, list[str], Any, Any]]:
    """(QUERY, HISTORY, raw FILTERS or None, raw DIVERSITY or None)."""
    word = st.sampled_from(words).flatmap(lambda w: st.integers(0, len(w)).map(lambda n: w[:n] or w))
    mixed = st.lists(st.one_of(word, st.sampled_from(ODD), st.text(max_size=8)), max_size=30)
    joined = st.builds(lambda parts, by: by.join(parts), mixed, st.sampled_from(["", " ", "\u3000"]))
    query = st.one_of(
        joined.map(lambda q: q.encode(errors="replace")), st.text().map(lambda q: q.encode(errors="replace")),
        st.binary(max_size=200), st.builds(lambda w, n: (w * n).encode(), word, st.integers(1, 4000)),
    )  # fmt: skip
    leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
    names = st.sampled_from(["values", "ranges", "seen", "brand", "category", "price", ""])
    inner = lambda e: st.lists(e, max_size=3) | st.dictionaries(names, e, max_size=3)  # noqa: E731
    anything = st.recursive(leaf, inner, max_leaves=8)
    right = st.fixed_dictionaries({}, optional={
        "values": st.dictionaries(names, st.lists(st.text(max_size=8), max_size=3), max_size=2),
        "ranges": st.dictionaries(names, st.tuples(st.none() | st.integers(), st.none() | st.floats()), max_size=2),
        "seen": st.booleans(),
    })  # fmt: skip
    filters = st.one_of(st.none(), st.none(), right.map(json.dumps), anything.map(json.dumps), st.text(max_size=20))
    diversity = st.one_of(st.none(), st.none(), st.floats().map(str), st.text(max_size=5))
    return st.tuples(query, st.lists(st.sampled_from(items), max_size=5), filters, diversity)


class Fuzz:
    """Asks and checks; counts what it saw."""

    def __init__(self, client: VivaceClient, known: str) -> None:
        self.client, self.known, self.seen = client, known, Counter[str]()
        self.expected = client.recommend(top_k=TOP_K, query=known)

    def __call__(self, case: tuple[bytes, list[str], Any, Any]) -> None:
        query, history, filters, diversity = case
        parameters = {k: v for k, v in ((contract.FILTERS, filters), (contract.DIVERSITY, diversity)) if v is not None}
        try:
            tensors = request_tensors("", history, TOP_K, query)
            answer = read_answer(self.client._infer(contract.ENSEMBLE, tensors, parameters=parameters))
        except VivaceError as error:
            assert any(r in str(error) for r in REFUSALS), error
            self.seen["refused"] += 1
            return
        narrow = bool(filters)  # may leave fewer than TOP_K
        assert len(answer.items) == len(set(answer.items)) and (narrow or len(answer.items) == TOP_K), answer
        assert np.isfinite(answer.scores).all(), answer
        how = "searched" if answer.understood else "recommended"
        reached = (filters or "").partition("\0")[0]  # Triton hands parameters on as C strings
        if answer.understood and not SearchOptions.parse({contract.FILTERS: reached}).seen:
            assert not set(answer.items) & set(history), answer
            how = "searched for what is new"
        self.seen[how] += 1

    def whole(self, history: list[str], query: str) -> Recommendation:
        """The answer when no load makes it cheaper."""
        stop = time.monotonic() + STORM_S
        while True:
            answer = self.client.recommend(history=history, top_k=TOP_K, query=query)
            if not answer.degraded:
                return answer
            assert time.monotonic() < stop, f"still degraded after {STORM_S:g} s: {answer}"
            time.sleep(0.1)

    def storm(
        self, url: str, asks: list[tuple[list[str], str]], size: int, rng: np.random.Generator, limited: float = 0.5
    ) -> None:
        """``size`` of ``asks`` (history and query) at once, a share ``limited`` of them with a deadline."""
        alone = [self.whole(h, q) for h, q in asks]
        picked = rng.integers(len(asks), size=size)
        within = np.where(rng.random(size) >= limited, 0, rng.integers(5, 1000, size))

        async def one(client: AsyncVivaceClient, which: int, ms: float) -> None:
            history, query = asks[which]
            try:
                answer = await client.recommend(history=history, top_k=TOP_K, query=query, within_ms=ms)
            except VivaceTimeoutError:
                assert ms, "a request without a limit was lost"
                self.seen["given up by the client"] += 1
                return
            except VivaceError as error:
                assert any(r in str(error) for r in SHED), error
                self.seen["shed"] += 1
                return
            if answer.degraded:
                self.seen["degraded in a storm"] += 1
                return
            assert answer.items == alone[which].items, (asks[which], answer, alone[which])
            self.seen["answered in a storm"] += 1

        async def all_at_once() -> None:
            async with AsyncVivaceClient(url, timeout_s=STORM_S) as client:
                await asyncio.gather(*(one(client, int(i), float(ms)) for i, ms in zip(picked, within, strict=True)))

        asyncio.run(all_at_once())

    def unchanged(self) -> None:
        now = self.client.recommend(top_k=TOP_K, query=self.known)
        assert now.items == self.expected.items and now.understood == self.expected.understood, now


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>, compiled with search")],
    minutes: float = 5.0,
    profile: str = "",
    first: Annotated[int, typer.Option(help="seed")] = 0,
) -> None:
    run = Run(root)
    catalogue = pd.read_parquet(run.features / CATALOGUE_FILE)
    words = sorted({w for t in catalogue[contract.TITLE].head(2000) for w in str(t).split()})
    items = catalogue[contract.ITEM].head(2000).tolist()
    options = on_free_ports(run.repository, profile, root / "fuzz.log")
    with TritonServer(options) as server, VivaceClient(grpc_address(server)) as client:
        fuzz, stop, rounds = Fuzz(client, str(catalogue[contract.TITLE][0])), time.monotonic() + minutes * 60, 0
        url, rng = grpc_address(server), np.random.default_rng(first)
        histories = [list(h) for h in recorded(root).head(50)[contract.ITEM]]
        asks = [(h, " ".join(rng.choice(words, 2))) for h in histories]
        rules = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        while time.monotonic() < stop:
            seed(first + rounds)(rules(given(requests(words, items))(fuzz.__call__)))()
            fuzz.storm(url, asks, STORM, rng)
            fuzz.unchanged()
            rounds += 1
            print(f"{sum(fuzz.seen.values()):,} requests: {dict(fuzz.seen)}", flush=True)
    print(record_line(
        "fuzz of search", data=root.name, profile=profile, minutes=minutes, seed=first, rounds=rounds,
        seen=dict(fuzz.seen), faults=0,
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
