"""Odd queries, filters and diversities against a live server, for some minutes: each gets an answer or a clear error.

    python -m loadtest.fuzz_search artifacts/shop --minutes 5

Hypothesis makes the requests: any Unicode text, words of the catalogue cut and mixed with control characters, emoji,
right-to-left marks, SQL and regular expressions, bytes that are no text, filters that are any JSON or none. What counts
as found: an exception other than a named refusal, an answer that is short or not in order, a server that is not ready,
or a plain query whose answer has changed. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from preprocessing import contract as c
from preprocessing.prepare import CATALOGUE_FILE
from serving.client import VivaceClient, VivaceError, read_answer, request_tensors
from serving.launcher import ServerOptions, TritonServer
from vivace.artifacts import commit

TOP_K, ROUND = 5, 200
REFUSALS = ("QUERY:", f"{c.FILTERS}:", f"{c.DIVERSITY}:", "filter ")
ODD = ["\x00", "\x1b[31m", "\u202e", "\u200d", "😀", "👩‍👩‍👧", "ﷺ", "' OR 1=1 --", "(a+)+$", "[", "\\", "%s", "{}", "ß",
       "İ", "№ 5", "½", "１２", "10cm", "1e309", "-", "\n", "\t", "a" * 300, "红色", "שלום", "ก็"]  # fmt: skip


def requests(words: list[str]) -> st.SearchStrategy[tuple[bytes, Any, Any]]:
    """(QUERY, raw FILTERS or None, raw DIVERSITY or None)."""
    word = st.sampled_from(words).flatmap(lambda w: st.integers(0, len(w)).map(lambda n: w[:n] or w))
    mixed = st.lists(st.one_of(word, st.sampled_from(ODD), st.text(max_size=8)), max_size=30)
    joined = st.builds(lambda parts, by: by.join(parts), mixed, st.sampled_from(["", " ", "\u3000"]))
    query = st.one_of(
        joined.map(lambda q: q.encode(errors="replace")), st.text().map(lambda q: q.encode(errors="replace")),
        st.binary(max_size=200), st.builds(lambda w, n: (w * n).encode(), word, st.integers(1, 4000)),
    )  # fmt: skip
    leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
    names = st.sampled_from(["values", "ranges", "brand", "category", "price", ""])
    inner = lambda e: st.lists(e, max_size=3) | st.dictionaries(names, e, max_size=3)  # noqa: E731
    anything = st.recursive(leaf, inner, max_leaves=8)
    filters = st.one_of(st.none(), st.none(), anything.map(json.dumps), st.text(max_size=20))
    diversity = st.one_of(st.none(), st.none(), st.floats().map(str), st.text(max_size=5))
    return st.tuples(query, filters, diversity)


class Fuzz:
    """Asks and checks; counts what it saw."""

    def __init__(self, client: VivaceClient, known: str) -> None:
        self.client, self.known, self.seen = client, known, Counter[str]()
        self.expected = client.recommend(top_k=TOP_K, query=known)

    def __call__(self, case: tuple[bytes, Any, Any]) -> None:
        query, filters, diversity = case
        parameters = {k: v for k, v in ((c.FILTERS, filters), (c.DIVERSITY, diversity)) if v is not None}
        try:
            tensors = request_tensors("", [], TOP_K, query)
            answer = read_answer(self.client._infer(c.ENSEMBLE, tensors, parameters=parameters))
        except VivaceError as error:
            said = str(error)
            assert any(r in said for r in REFUSALS), said
            self.seen["refused"] += 1
            return
        narrow = bool(filters)  # may leave fewer than TOP_K
        assert len(answer.items) == len(set(answer.items)) and (narrow or len(answer.items) == TOP_K), answer
        assert np.isfinite(answer.scores).all(), answer
        self.seen["searched" if answer.understood else "recommended"] += 1

    def unchanged(self) -> None:
        now = self.client.recommend(top_k=TOP_K, query=self.known)
        assert now.items == self.expected.items and now.understood == self.expected.understood, now


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>, compiled with search")],
    minutes: float = 5.0,
    profile: str = "",
    first: Annotated[int, typer.Option(help="seed")] = 0,
) -> None:
    catalogue = pd.read_parquet(root / "features" / CATALOGUE_FILE)
    words = sorted({w for t in catalogue[c.TITLE].head(2000) for w in str(t).split()})
    options = ServerOptions(
        root / "model_repository", http_port=0, grpc_port=0, metrics_port=0, profile=profile, log=root / "fuzz.log"
    )
    with TritonServer(options) as server, VivaceClient(f"{server.host}:{server.grpc_port}") as client:
        fuzz, stop, rounds = Fuzz(client, str(catalogue[c.TITLE][0])), time.monotonic() + minutes * 60, 0
        rules = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        while time.monotonic() < stop:
            seed(first + rounds)(rules(given(requests(words))(fuzz.__call__)))()
            fuzz.unchanged()
            rounds += 1
            print(f"{sum(fuzz.seen.values()):,} requests: {dict(fuzz.seen)}", flush=True)
    print(json.dumps({
        "benchmark": "fuzz of search", "data": root.name, "profile": profile, "minutes": minutes, "seed": first,
        "rounds": rounds, "seen": dict(fuzz.seen), "found": 0, "commit": commit(),
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
