"""The cache of states on the real server: what is encoded from where it was left is answered as encoded anew."""

from __future__ import annotations

import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.acceptance import Acceptance
from serving.fleet import Fleet
from serving.releases import releases
from serving.runtime.cache_settings import StateSettings
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.start_checks import check_state_cache
from serving.wheel import ServerError
from tests.support import NOON, PatientClient, on_free_ports, quiet, recommend_rows, untouched_store, wait_until
from training.compile.compiler import compile_models
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.presets import tiny
from vivace import contract
from vivace.client_request import request_tensors
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

TOP_K, USERS, APPENDED = 100, 24, 3
SCORES = 1e-4  # absolute, float32 logits: sums in another order, through both models
ROOM = StateSettings(1 << 19)
LINE = re.compile(r'^vivace_state_cache_(\w+?)(?:\{[^}]*result="(\w+)"[^}]*\}|\{[^}]*\})? (\S+)$', re.M)


@pytest.fixture(scope="module")
def run(root, features, tmp_path_factory) -> Run:
    """The small shop with a retriever whose states stay, of which two versions are published: of other weights."""
    own = tmp_path_factory.mktemp("reuse") / "shop"
    shutil.copytree(root / "features", own / "features")
    shutil.copytree(untouched_store(root), own / "feature_store")
    encoder = replace(tiny().encoder, positions="none", position_bias="relative", slide=4)
    preset = replace(tiny(), encoder=encoder, retrieval=replace(tiny().retrieval, epochs=1))
    train_retrieval(features, preset, own, 3, quiet, quiet=True)
    train_ranker(features, preset, own, 3, quiet, quiet=True)
    compile_models(features, preset, own, 3, quiet)
    weights = torch.load(own / "retrieval" / "weights.pt", weights_only=True)
    noise = torch.Generator().manual_seed(5)
    for name, values in weights.items():
        if name.startswith("encoder.") and values.is_floating_point():
            values += 0.3 * torch.randn(values.shape, generator=noise)
    torch.save(weights, own / "retrieval" / "weights.pt")
    compile_models(features, preset, own, 4, quiet)
    return Run(own)


@pytest.fixture(scope="module")
def fleet(run) -> Iterator[Fleet]:
    """A server of the first version, whose workers share the least cache there is."""
    first = releases(run.repository)[0]
    with Fleet(on_free_ports(first, profile="fused", state_cache=ROOM, guard=True), quiet) as fleet:
        yield fleet


class Anew:
    """The answers of a version that keeps nothing, from the store that the server reads."""

    def __init__(self, run: Run, store: LmdbStore, release: Path) -> None:
        (version,) = {p.name for p in (release / contract.RANKING).iterdir() if p.name.isdigit()}
        self._pipeline = Pipeline(release, version, run.shapes(), store)

    def __call__(self, users: list[str]) -> list[dict[str, float]]:
        rows = [Row(user, None, TOP_K, context=NOON) for user in users]
        (ids, values), _, status = self._pipeline(rows)
        items, scores = self._pipeline.respond(ids, values, np.full(len(rows), TOP_K), [s.encode() for s in status])[:2]
        return _by_item(items, scores)


def _by_item(items_BK: np.ndarray, scores_BK: np.ndarray) -> list[dict[str, float]]:
    return [
        {item.decode(): float(score) for item, score in zip(*row, strict=True) if item}
        for row in zip(items_BK, scores_BK, strict=True)
    ]


def served(fleet: Fleet, users: list[str]) -> list[dict[str, float]]:
    """Items and scores that the server answers each user, all in one request."""
    answers = recommend_rows(fleet.replicas[0].server, [request_tensors(u, top_k=TOP_K, context=NOON) for u in users])
    return [row for a in answers for row in _by_item(a.as_numpy("ITEM_ID"), a.as_numpy("SCORE"))]


def assert_same(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The same items in the same order, but for those whose scores are within rounding."""
    for a, b in zip(got, expected, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), abs=SCORES)
        for item, other in zip(a, b, strict=True):
            assert item == other or abs(b.get(item, a[item]) - b[other]) < SCORES


def counts(fleet: Fleet) -> dict[str, float]:
    """What the server's metrics say of its cache: hit, grown, missed, bytes, evicted_total."""
    server = fleet.replicas[0].server
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics") as page:
        return {result or name: float(value) for name, result, value in LINE.findall(page.read().decode())}


def test_growing_histories_are_answered_as_anew_whatever_becomes_of_the_cache(fleet, run):
    first, second = releases(run.repository)
    rng, server = np.random.default_rng(2), fleet.replicas[0].server
    with (
        closing(LmdbStore(run.feature_store, readonly=True)) as store,
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        anew, anew_of_second = (Anew(run, store, release) for release in (first, second))
        users = sorted(store.users())[:USERS]

        def round_of(by: Anew) -> list[dict[str, float]]:
            """Answers to some users, who then do something more."""
            asking = [str(u) for u in rng.choice(users, USERS // 2)]  # some twice in a request
            expected = by(asking)
            assert_same(served(fleet, asking), expected)
            for user, answer in zip(asking[:4], expected, strict=False):
                for item in list(answer)[: rng.integers(1, APPENDED + 1)]:
                    client.append(user, item, "view")
            few = asking[:2]  # whose states are there
            expected = by(few)
            assert_same(served(fleet, few), expected)
            return expected

        for _ in range(8):
            round_of(anew)
        wait_until(lambda: round_of(anew) and counts(fleet)["grown"] > 0, "counts on the page")
        seen = counts(fleet)
        assert min(seen[how] for how in ("hit", "grown", "missed")) > 0
        assert 0 < seen["bytes"] <= ROOM.room_bytes

        watchdog = fleet.replicas[0].watchdog
        restarts = watchdog.metrics.restarts.labels(contract.ENSEMBLE)._value
        os.kill(next(p for p, model in watchdog.workers().items() if model == contract.ENSEMBLE), signal.SIGKILL)
        wait_until(lambda: restarts.get() >= 1, "new workers")  # what was sent to the dead one is refused till then
        for _ in range(3):
            round_of(anew)

        last = users[:4]
        of_first = anew(last)
        assert_same(served(fleet, last), of_first)
        fleet.serve(second, Acceptance([]), quiet)
        of_second = anew_of_second(last)
        assert_same(served(fleet, last), of_second)
        assert [list(a) for a in of_first] != [list(a) for a in of_second]
        for _ in range(3):
            round_of(anew_of_second)


def test_a_profile_that_keeps_no_states_refuses_the_room(run):
    with pytest.raises(ServerError, match="the profile ensemble keeps no states; serve the profile fused"):
        check_state_cache(releases(run.repository)[0], "", ROOM)
