"""The live catalogue, served: a new item is in the next answer, what is taken out in none, a user can be forgotten."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.service import service
from tests.support import (
    NOON,
    PatientClient,
    Second,
    on_free_ports,
    own_copy,
    quiet,
    untouched_store,
    users_of_data,
    vivace,
    wait_until,
)
from vivace.client import VivaceError
from vivace.contract import MAX_TOP_K, UPDATE_STORE
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore


@pytest.fixture(scope="module")
def own_root(root, tmp_path_factory):
    """The small shop with a store of its own."""
    return own_copy(root, tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="module")
def catalogue(features):
    """Rows of the catalogue by item id."""
    import pandas as pd

    frame = pd.read_parquet(features.folder / "catalogue.parquet")
    return {row["item_id"]: row for row in json.loads(frame.to_json(orient="records"))}


@pytest.mark.parametrize("profile", ["", "fused"])
def test_a_new_item_is_in_the_next_answer_and_what_is_taken_out_in_none(own_root, root, catalogue, profile):
    user = min(users_of_data(root))
    with (
        service(on_free_ports(own_root / "model_repository", profile=profile, guard=True), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.grpc_port}") as client,
    ):
        before = client.recommend(user, top_k=MAX_TOP_K, context=NOON)
        # as their texts are: which of them the small ranker takes is its own affair
        named = {f"new of {profile or 'default'} {item}": item for item in before.items[:12]}
        second = Second(server)
        twins = [{**catalogue[item], "item_id": name, "price": 12.5} for name, item in named.items()]
        assert client.upsert_items(twins) == ["ok"] * len(twins)
        after = client.recommend(user, top_k=MAX_TOP_K, context=NOON)
        new = [item for item in after.items if item in named]
        assert new and second.left_s() > 0
        others = [item for item in after.items if item not in named]
        assert others == before.items[: len(others)]  # nothing else has moved
        kept = [score for item, score in zip(after.items, after.scores, strict=True) if item not in named]
        np.testing.assert_array_equal(kept, before.scores[: len(kept)])
        assert all(0 < p[after.items.index(new[0])] < 1 for p in after.heads.values())

        assert client.append(user, new[0], "view").status == "ok"
        seen = client.recommend(user, top_k=MAX_TOP_K)
        assert new[0] not in seen.items and seen.status == "ok"

        assert client.remove_items([*named, before.items[1]]) == ["ok"] * (1 + len(named))
        third = client.recommend(user, top_k=MAX_TOP_K)
        assert not {*named, before.items[1]} & set(third.items)
        assert client.upsert_items([{**catalogue[before.items[2]], "stock": 0}]) == ["ok"]
        assert before.items[2] not in client.recommend(user, top_k=MAX_TOP_K).items
        assert (
            client.upsert_items([catalogue[before.items[1]], {**catalogue[before.items[2]], "stock": 3}]) == ["ok"] * 2
        )
        back = client.recommend("", list(client.recommend(user, top_k=1).items), MAX_TOP_K)
        assert {before.items[1], before.items[2]} & set(back.items)


def test_new_items_alike_keep_their_order_whatever_comes_and_goes(own_root, root, catalogue):
    """Of equal scores the newest comes first, after others have come and gone, and after a restart too."""
    user = min(users_of_data(root))
    expected = [f"alike-{n}" for n in (5, 4, 3, 2, 1, 0)]
    rows: list[dict] = []

    def alike(client) -> list[str]:
        answer = client.recommend(user, top_k=MAX_TOP_K)
        scores = {s for i, s in zip(answer.items, answer.scores, strict=True) if i.startswith("alike-")}
        assert len(scores) == 1
        return [item for item in answer.items if item.startswith("alike-")]

    for restart in (False, True):
        with (
            service(on_free_ports(own_root / "model_repository"), quiet) as (server, _),
            PatientClient(f"{server.host}:{server.grpc_port}") as client,
        ):
            if not restart:
                row = catalogue[client.recommend(user).items[0]]
                rows = [{**row, "item_id": f"alike-{n}"} for n in range(9)]
                assert client.upsert_items(rows[:6]) == ["ok"] * 6
            assert alike(client) == expected
            assert client.upsert_items(rows[6:]) == ["ok"] * 3 and alike(client)[3:] == expected
            assert client.remove_items([r["item_id"] for r in rows[6:]]) == ["ok"] * 3
            assert alike(client) == expected
    with closing(LmdbStore(own_root / "feature_store")) as store:
        store.drop_changes([c.number for c in store.catalogue_changes(0) if c.item_id.startswith("alike-")])


def test_what_was_acknowledged_outlives_a_worker_that_is_killed_and_health_stays_well(own_root, catalogue):
    rows, acknowledged, over = list(catalogue.values()), list[str](), threading.Event()
    with service(on_free_ports(own_root / "model_repository", guard=True), quiet) as (server, watchdog):
        place = f"{server.host}:{server.grpc_port}"
        wait_until(lambda: watchdog.health.ready, "ready")

        def upserting() -> None:
            with PatientClient(place) as client:
                for n in range(100_000):
                    part = [{**rows[(n + i) % len(rows)], "item_id": f"k{10 * n + i}"} for i in range(10)]
                    try:
                        if client.upsert_items(part) == ["ok"] * 10:
                            acknowledged.extend(row["item_id"] for row in part)
                    except VivaceError:  # the worker is dead just now
                        time.sleep(0.05)
                    if over.is_set():
                        return

        thread = threading.Thread(target=upserting)
        thread.start()
        for _ in range(2):
            before = len(acknowledged)
            wait_until(lambda before=before: len(acknowledged) >= before + 50, "upserts")
            os.kill(next(p for p, m in watchdog.workers().items() if m == UPDATE_STORE), signal.SIGKILL)
        before = len(acknowledged)
        wait_until(lambda: len(acknowledged) >= before + 50, "upserts after the kills")
        over.set()
        thread.join()
        with PatientClient(place) as client:
            first = list(watchdog.health.canary._history)
            client.remove_items(client.recommend(history=first, top_k=3).items)
        wait_until(lambda: watchdog.health.ready, "ready")
        time.sleep(2.5)  # two questions of the canary
        assert watchdog.health.canary.fault == "", watchdog.health.canary.fault
        with closing(LmdbStore(own_root / "feature_store", readonly=True)) as store:
            stored = {change.item_id for change in store.catalogue_changes(0)}
    assert set(acknowledged) <= stored


def test_bad_rows_are_refused_alone(own_root, catalogue):
    rows = [{"title": "no id"}, {"item_id": "x", "colour": "red"}, next(iter(catalogue.values())),
            {"item_id": "y" * 2000}, {"item_id": "z", "price": [1]},
            {**next(iter(catalogue.values())), "price": "abc", "stock": "many"}]  # fmt: skip
    with (
        service(on_free_ports(own_root / "model_repository", guard=True), quiet) as (server, _),
        PatientClient(f"{server.host}:{server.http_port}", "http") as client,
    ):
        statuses = client.upsert_items(rows)
        assert client.upsert_items(rows[:1]) == statuses[:1]
        assert client.forget("nobody at all") == "ok: nothing was known of this user"
    assert [s.partition(":")[0] for s in statuses] == ["error", "error", "ok", "error", "error", "degraded"]
    assert statuses[-1] == (
        "degraded: price: expected a number, got 'abc'; taken as missing; stock: expected a number, got 'many'; taken "
        "as missing"
    )
    for part, status in zip(
        ("item_id: expected an item id", "'colour'", "", "1024 bytes", "price", ""), statuses, strict=True
    ):
        assert part in status


def test_files_change_the_catalogue_by_the_command_line(own_root, tmp_path):
    rows = [{"item_id": f"typed-{n}", "title": f"Alto kettle {n}", "brand": "Alto", "price": n} for n in range(130)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"title": "none"}])))
    (tmp_path / "old.csv").write_text("item_id\n" + "\n".join(row["item_id"] for row in rows[1:]))
    with service(on_free_ports(own_root / "model_repository"), quiet) as (server, _):
        place = f"{server.host}:{server.grpc_port}"
        more = ("--name", own_root.name, "--artifacts", str(own_root.parent), "--url", place)
        upserted = vivace("items", "upsert", str(tmp_path / "new.jsonl"), *more)
        assert upserted.returncode == 1 and "stored 130 of 131 rows" in upserted.stdout, upserted
        assert "line 131: item_id: expected an item id" in upserted.stdout
        with closing(LmdbStore(own_root / "feature_store", readonly=True)) as store:
            assert store.titles(["typed-7"]) == ["Alto kettle 7"]
            removed = vivace("items", "remove", str(tmp_path / "old.csv"), *more)
            assert removed.returncode == 0 and "removed 129 of 129 rows" in removed.stdout, removed
            left = [c.item_id for c in store.catalogue_changes(0) if c.item_id.startswith("typed") and c.row]
        assert left == ["typed-0"]
        assert "nothing was known" in vivace("forget", "nobody", *more).stdout
    none = vivace("items", "upsert", str(tmp_path / "new.jsonl"), *more[:4])  # another run's server may be at the port
    assert none.returncode == 1 and f"no server of {own_root.name} runs here" in none.stderr, none
    user = "typed user"
    with closing(LmdbStore(own_root / "feature_store")) as store:
        store.append([Event(user, "x")])
    gone = vivace("forget", user, "--name", own_root.name, "--artifacts", str(own_root.parent))
    assert "its bytes are gone from the file" in gone.stdout, gone
    assert user.encode() not in (own_root / "feature_store" / "data.mdb").read_bytes()


def test_a_forgotten_user_is_unknown_at_once_and_in_no_byte_after_the_next_start(own_root, root):
    user = max(users_of_data(root))
    data = own_root / "feature_store" / "data.mdb"
    options = on_free_ports(own_root / "model_repository")
    with service(options, quiet) as (server, _), PatientClient(f"{server.host}:{server.grpc_port}") as client:
        client.append(user, "an item of theirs alone", "view")
        assert "is unknown" not in client.recommend(user).status
        assert client.forget(user).startswith("ok: forgotten")
        assert "is unknown" in client.recommend(user).status
        assert user.encode() in data.read_bytes()
    with service(options, quiet) as (server, _), PatientClient(f"{server.host}:{server.grpc_port}") as client:
        raw = data.read_bytes()
        assert user.encode() not in raw and b"an item of theirs alone" not in raw
        assert "is unknown" in client.recommend(user).status
        client.append(user, "a new life", "view")
        assert client.recommend(min(users_of_data(root))).status == "ok"


def test_answers_are_those_of_before_where_nothing_changed(root, tmp_path):
    """The same graphs with and without a live catalogue: equal to the last bit."""
    from dataclasses import replace

    run = Run(root)
    store = LmdbStore(untouched_store(root), readonly=True)
    shapes = run.shapes()
    assert shapes.fresh
    users = [Row(user, None, 20) for user in sorted(users_of_data(root))[:50]]
    version = str(run.version())
    answers = []
    for with_ in (shapes, replace(shapes, fresh=0)):
        pipeline = Pipeline(run.repository, version, with_, store, run.schema().exclude_seen)
        (ids, values), _, status = pipeline(users)
        answers.append([*pipeline.respond(ids, values, np.full(50, 20), [s.encode() for s in status])])
    for a, b in zip(*answers, strict=True):
        np.testing.assert_array_equal(a, b)
    store.close()
