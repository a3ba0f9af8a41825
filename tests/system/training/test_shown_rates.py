"""Impressions from a log to the next answer: kept apart by prepare, learned from, served, counted within a second."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from benchmarks.shown_rates import SHOWN, Plant, preset, ranks_of
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from preprocessing.refresh import appended_since, refresh_features
from serving.service import service
from tests.support import PatientClient, Second, on_free_ports, quiet
from training.compile.compiler import compile_models
from training.metrics import ndcg_of
from vivace.contract import EVENT, FIRST_ID, ITEM
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

PLANT = Plant(items=40, rounds=60, judged=500, pages=100, promoted=8, appeal_rounds=20)
FADED = 0.01  # of a score: counts fade from one call to the next
RATES = preset(PLANT.items, True, 6)


@dataclass(frozen=True)
class Trained:
    """A run with rates, and the ranks of its test requests with and without them."""

    run: Run
    features: Features
    log: pd.DataFrame
    with_rates: np.ndarray
    without: np.ndarray


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("promoted")
    root = folder / "run"
    prepare(Tables(PLANT.write(folder)), PrepareConfig(partitions=2), root, 0, quiet)
    features = Features(root / "features")
    without = ranks_of(features, root, 3, preset(PLANT.items, False, 6))
    return Trained(Run(root), features, PLANT.log(), ranks_of(features, root, 3, RATES), without)


def test_what_was_shown_is_no_event_and_no_history(trained):
    clicks = trained.log[trained.log["type"] != SHOWN]
    assert len(trained.features.events()[ITEM]) == len(clicks)
    shown = trained.features.shown()
    assert len(shown) == len(trained.log) - len(clicks) and (np.diff(shown.times_ms) >= 0).all()
    names = trained.features.items()[ITEM].to_numpy()[shown.ids - FIRST_ID]
    expected = trained.log.loc[trained.log["type"] == SHOWN, "item"].value_counts().to_dict()
    assert pd.Series(names).value_counts().to_dict() == expected
    with closing(LmdbStore(trained.run.feature_store, readonly=True)) as store:
        kinds = {kind for _, types, _ in store.typed_histories(["judged 0", "judged 7"]) for kind in types}
    assert kinds == {"click"} and trained.features.context.shown_types == (SHOWN,)


def test_the_planted_promotion_is_seen_through(trained):
    """Clicks alone follow the promotion; the share of those who saw an item and took it is its appeal."""
    with_rates, without = ndcg_of(trained.with_rates).mean(), ndcg_of(trained.without).mean()
    best = ndcg_of(PLANT.oracle(trained.features)).mean()
    assert with_rates > without + 0.3 * (best - without), (without, with_rates, best)


def test_an_item_that_is_shown_and_not_clicked_falls_within_a_second(trained):
    compile_models(trained.features, RATES, trained.run.root, 3, quiet)
    with (
        service(on_free_ports(trained.run.repository, profile="fused"), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        for n in range(40):  # the log lies in the past: two items are clicked now, on a few pages
            for item in ("item 3", "item 4"):
                client.append(f"now {n}", item, SHOWN)
                client.append(f"now {n}", item, "click")

        def scores(user: str = "", history: Sequence[str] = ()) -> dict[str, float]:
            answer = client.recommend(user, history, top_k=PLANT.items)
            return dict(zip(answer.items, answer.scores, strict=True))

        Second(server).pass_by()
        before = scores("judged 5")
        length = client.append("judged 5", "item 3", SHOWN)
        client.append_many([Event(f"idle {n}", "item 3", SHOWN) for n in range(600)])
        second, ahead = Second(server), before["item 3"] - before["item 4"]
        second.shows(
            lambda: scores("judged 5"), lambda now: now["item 3"] - now["item 4"] <= ahead - 0.2, f"less than {ahead}"
        )
        assert length == 3
        second.pass_by()  # by now every process counts the appended events
        ranked, without = (
            scores(history=["item 1\x1fclick\x1f1", *more]) for more in ([f"item 2\x1f{SHOWN}\x1f2"], [])
        )
        assert "item 2" in ranked and ranked == pytest.approx(without, abs=FADED)


def test_a_refresh_takes_impressions_along(trained, tmp_path):
    came = appended_since(trained.run.feature_store, 0)
    assert set(came.rows[EVENT]) == {"click"} and len(came.shown) >= 681 and came.aged_out == 0
    manifest = refresh_features(trained.features, came, tmp_path / "features", 0.1, None, quiet)
    renewed = Features(tmp_path / "features")
    assert manifest["results"]["shown"] == len(renewed.shown()) == len(trained.features.shown()) + len(came.shown)
    assert len(renewed.events()[ITEM]) == len(trained.features.events()[ITEM]) + len(came.rows)
