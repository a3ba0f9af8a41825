"""QUERY through the real Triton: two branches of one ensemble, and all in one process; answers, filters, bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from benchmarks.fuzz_search import Fuzz
from preprocessing.requests import recorded
from search.features import personal
from search.log import SearchLog
from search.online import (
    RANKER,
    QuerySearch,
    SearchOptions,
    SearchRanking,
    pack,
    read_catalogue,
    searchable as has_words,
    unpack,
)
from search.published import FOLDER
from serving.launcher import TritonServer
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from tests.support import PATIENCE_S, PatientClient, Second, on_free_ports, quiet, wait_until
from training.compile.compiler import compile_models
from training.models.text_encoder import TextConfig
from training.presets import tiny
from training.search.encoder import SearchEncoderConfig
from training.search.ranker import SearchRankerConfig
from training.search.train import SearchStudy, SearchTraining, catalogue_of, train_search
from vivace import contract
from vivace.client import VivaceError
from vivace.context import clock
from vivace.manifest import read_manifest
from vivace.onnx_session import open_session
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

SEED = 3


@pytest.fixture(scope="module")
def searchable(root, features, tmp_path_factory):
    """The small shop with search, compiled anew."""
    folder = tmp_path_factory.mktemp("search") / "shop"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.log", "tuning"))
    own = type(features)(folder / "features")
    encoder = SearchEncoderConfig(
        text=TextConfig(width=32, layers=1, heads=2, tokens=16, vocabulary=500), query_tokens=12, vector=32,
        language_epochs=1, question_epochs=8, judged_epochs=2, batch_size=32, learning_rate=3e-3,
    )  # fmt: skip
    train_search(
        own,
        tiny(),
        folder,
        SearchTraining(encoder=encoder, ranker=SearchRankerConfig(epochs=8, members=1), requests=300),
        SEED,
        quiet,
        True,
    )
    compile_models(own, tiny(), folder, SEED, quiet)
    return folder


@pytest.fixture(scope="module", params=["", "fused"])
def server(request, searchable):
    options = on_free_ports(searchable / "model_repository", profile=request.param, guard=True)  # clients give up
    with TritonServer(options) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def client(request, server):
    port = server.grpc_port if request.param == "grpc" else server.http_port
    with PatientClient(f"{server.host}:{port}", request.param) as own:
        yield own


@pytest.fixture(scope="module")
def titles(features):
    frame = features.items()
    return dict(zip(frame[contract.ITEM], frame[contract.TITLE], strict=True))


def test_training_measures_both_kinds_of_queries_and_what_diversity_costs(searchable):
    """The figures of search: both kinds of queries, and what diversity costs."""
    found = read_manifest(searchable / FOLDER, "")["results"]
    kinds, costs = found["queries"], list(found["diversity"].values())
    assert kinds["words"]["requests"] + kinds["attributes"]["requests"] >= 300
    for kind in kinds.values():
        assert kind["gain"] == pytest.approx(kind["with_history"] - kind["ranked"])
        assert kind["gain_interval"][0] <= kind["gain"] <= kind["gain_interval"][1]
    log = found["log"]
    assert (
        log["searches"] > 10
        and log["in_hindsight"] > 5
        and log["over_shown"] == pytest.approx(log["with_history"] - log["shown"])
    )
    assert all(0 < log[name] <= 1 for name in ("shown", "fused", "ranked", "with_history"))
    assert log["seen"][0] == 1 and np.mean(log["seen"][:3]) > np.mean(log["seen"][5:])  # they look at 1/place
    whole = sum(k["requests"] * k["with_history"] for k in kinds.values()) / sum(k["requests"] for k in kinds.values())
    assert costs[0]["NDCG@10"] == pytest.approx(whole, abs=0.01)  # diversity 0 is the ranker's order
    assert np.all(np.diff([x["alike"] for x in costs]) < 0)  # the more diverse, the less alike


def some_user(searchable) -> tuple[str, list[str]]:
    row = recorded(searchable).iloc[0]
    return row[contract.USER], list(row[contract.ITEM])


def test_a_query_finds_what_it_names(client, searchable, titles):
    user, history = some_user(searchable)
    answer = client.recommend(user, history, 5, "kettel Alto")  # a typing error, a brand
    assert answer.status == "ok" and answer.understood["corrected"] == {"kettel": "kettle"}
    assert {"attribute": "brand", "value": "Alto", "probability": 1.0, "named": True} in answer.understood["intents"]
    assert any("kettle" in titles[i] for i in answer.items) and len(answer.items) == 5
    assert all(answer.understood["found_by"][i] for i in answer.items)
    assert np.all(np.diff(answer.scores) <= 1e-6) and "category" in answer.understood["facets"]
    anonymous = client.recommend("", [], 5, "kettle")
    assert anonymous.status == "ok" and "kettle" in titles[anonymous.items[0]]


def test_without_a_query_nothing_changes(client, searchable, root, served):
    other, _ = served
    user, history = some_user(searchable)
    with PatientClient(f"{other.host}:{other.grpc_port}") as plain:
        for h in (history, []):
            a, b = client.recommend(user, h, 10), plain.recommend(user, h, 10)
            assert a.items == b.items and a.scores == pytest.approx(b.scores, abs=1e-4) and a.status == b.status
            assert a.understood == {}


def test_the_answer_is_that_of_the_functions(client, searchable):
    """Served equals the same code in process; history counts."""
    user, history = some_user(searchable)
    shapes = contract.StageTensors(**json.loads((searchable / "compiled" / "model_card.json").read_text())["shapes"])
    search, ranking = QuerySearch(searchable / FOLDER, shapes.candidates), SearchRanking(searchable / FOLDER)
    plain = client.recommend(user, history, contract.MAX_TOP_K)
    (ids, x, said), nothing = search(["oak lamp", "😀"], [SearchOptions(), None])
    assert not len(nothing[0]) and pack(*nothing) == b"" and unpack(b"")[2] == ""
    for packed, own in zip(unpack(pack(ids, x, said)), (ids, x, said), strict=True):
        np.testing.assert_array_equal(packed, own)
    names = ["", "", "", *search.index.catalogue.items]
    place = {n: i for i, n in enumerate(names)}
    ranked = np.array([place[i] for i in plain.items])
    values = np.stack([plain.scores, *plain.heads.values()])
    assert len(ranked) == shapes.candidates  # the whole recommendation was answered
    expected, _ = ranking(ids, x, ranked, values, SearchOptions())
    answer = client.recommend(user, history, 10, "oak lamp")
    assert answer.items == [names[i] for i in expected[:10]]
    assert answer.understood == json.loads(said)
    alone = client.recommend("", [], 10, "oak lamp")
    assert sorted(alone.items) != [] and not np.allclose(
        alone.scores, client.recommend(user, history, 10, "oak lamp").scores
    )


MOMENT_MS = 1_790_000_000_000  # after the log: every training event of a user lies before it


@pytest.fixture(scope="module")
def lists(searchable, features):
    """One logged search of each kind of user by name, with its features as they teach the search ranker: (kinds, users'
    HISTORY, the study's requests)."""
    files = pd.read_parquet(features.folder / "train")
    long, short = (files.iloc[n] for n in (int(files[contract.ITEM].map(len).argmax()), 0))
    kinds = {"anonymous": "", "unknown": "nobody has this name", "known": short[contract.USER], "long": long.iloc[0]}
    log = pd.DataFrame({
        contract.SEARCH: list(kinds), contract.USER: list(kinds.values()), contract.TIME: MOMENT_MS,
        contract.QUERY_TEXT: ["oak lamp", "kettle", "alto mug", "linen"], contract.ITEM: contract.FIRST_ID,
        contract.POSITION: 1, contract.CLICKED: True,
    })  # fmt: skip
    study = SearchStudy(
        type(features)(searchable / "features"), tiny(), searchable, searchable / FOLDER, catalogue_of(features),
        SearchTraining(), SEED,
    )  # fmt: skip
    names, types = features.items()[contract.ITEM].tolist(), event_names(features)
    histories = {"anonymous": [], "unknown": []}
    for kind, row in (("known", short), ("long", long)):
        events = zip(row[contract.ITEM], row[contract.EVENT], row[contract.TIME], strict=True)
        histories[kind] = [(names[i - contract.FIRST_ID], types[t], int(ms)) for i, t, ms in events]
    return kinds, histories, study.logged_requests(SearchLog.of(log), np.ones(1)), log[contract.QUERY_TEXT].tolist()


def event_names(features) -> list[str]:
    """Names of event types by id, "" for the special ones."""
    words = pd.read_parquet(features.folder / "workflow" / "categories" / f"unique.{contract.EVENT}.parquet")
    return ["", "", "", *words[contract.EVENT].dropna().tolist()]


@pytest.mark.parametrize("kind", ["anonymous", "unknown", "known", "long"])
def test_search_learns_from_what_is_served(server, searchable, lists, kind):
    """Features of one list: as they teach the search ranker, and by what the server recommends beside the query; then
    the scores that the server gives it. Someone of whom nothing is known is recommended what is popular."""
    kinds, histories, taught, queries = lists
    i, items = list(kinds).index(kind), read_catalogue(searchable / FOLDER).items
    names = {item: n for n, item in enumerate(items, contract.FIRST_ID)}
    asks = [(kinds[kind], histories[kind], taught.with_history(i))]
    if not histories[kind]:  # what teaches a share of the lists of everybody
        asks.append((kinds[kind], [], taught.without_history(i)))
    hour, weekday = (int(x[0]) for x in clock(np.array([MOMENT_MS]), "UTC").values())
    moment = {"hour": hour, "weekday": weekday}
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        for user, history, x_NX in asks:
            plain = client.recommend(user, history, contract.MAX_TOP_K, context=moment)
            ranked = np.array([names[item] for item in plain.items])
            served_NX, at_N = personal(taught.features[i], taught.ids[i], ranked, np.array(plain.scores, np.float32))
            assert (at_N >= 0).sum() > 3, "too few of the list are recommended to tell anything"
            np.testing.assert_allclose(served_NX, x_NX, atol=2e-4)
            answer = client.recommend(user, history, contract.MAX_TOP_K, queries[i], context=moment)
            scores = open_session(searchable / FOLDER / RANKER).run(None, {"FEATURES": x_NX[None]})[0][0]
            expected = dict(zip(taught.ids[i].tolist(), scores.tolist(), strict=True))
            assert [expected[names[item]] for item in answer.items] == pytest.approx(list(answer.scores), abs=1e-3)


def test_beside_a_query_all_is_ranked_whatever_a_profile_ranks(searchable, lists, tmp_path):
    """Else the search ranker would read other places and scores than it learned from."""
    _, histories, _, queries = lists
    shutil.copytree(searchable / "feature_store", tmp_path / "store")
    history = [item for item, *_ in histories["known"]]
    with contextlib.closing(LmdbStore(tmp_path / "store", readonly=True)) as store:
        few, whole = (Pipeline.published(searchable, store, ranked=n) for n in (10, 0))
        for row in (Row("", history, 5, queries[0]), Row("", history, 5)):
            answers = []
            for pipeline in (few, whole):
                ranked, inputs, _ = pipeline([row])
                answers.append(pipeline.searched([row.query], [SearchOptions()], inputs[0], ranked)[0])
            same = answers[0][0].shape == answers[1][0].shape and (answers[0][1] == answers[1][1]).all()
            assert same == bool(row.query)


def test_filters_narrow_and_diversity_spreads_the_answer(client, titles):
    narrow = client.recommend("", [], 10, "lamp", filters={"values": {"brand": ["Alto", "Brio"]}})
    assert len(narrow.items) == 10  # filled, though few lamps are of these brands
    assert all(titles[i].split()[0] in ("Alto", "Brio") for i in narrow.items)
    found = client.recommend("", [], 10, "lamp").items
    new = client.recommend("", found[:3], contract.MAX_TOP_K, "lamp", filters={"seen": False}).items
    assert not set(new) & set(found[:3]) and set(found[3:]) <= set(new)
    spread = client.recommend("", [], 10, "lamp", diversity=0.9)
    assert spread.items != client.recommend("", [], 10, "lamp").items
    for nothing in ({"values": {"brand": ["nope"]}}, {"values": {"brand": []}}, {"ranges": {"price": [5, 1]}}):
        answer = client.recommend("", [], 10, "lamp", filters=nothing)
        assert answer.items == [] and answer.status == contract.STATUS_OK and answer.understood["found_by"] == {}
    for filters, diversity, said in (
        ({"ranges": {"price": [True, None]}}, 0, "filters: expected JSON"),
        ({"ranges": {"price": [float("nan"), None]}}, 0, "filters: expected JSON"),
        ({"values": {"size": ["1"]}}, 0, "expected an attribute of"), ({"what": 1}, 0, "filters: expected JSON"),
        ({"seen": 1}, 0, "filters: expected JSON"),
        ({}, 3, "diversity: expected 0..1"),
    ):  # fmt: skip
        with pytest.raises(VivaceError, match=said):
            client.recommend("", [], 10, "lamp", filters=filters, diversity=diversity)
    assert len(client.recommend("", [], 3, "lamp").items) == 3


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("😀😀", "QUERY has no word"), ("   ", "QUERY has no word"), ("‮مرحبا بالعالم‬", "ok"), ("lamp\x00\x07", "ok"),
        ("'; DROP TABLE items; --", "ok"), ("(a+)+$ [x", "ok"), ("lamp " * 800, "ok"), ("红色 连衣裙", "ok"),
    ],
)  # fmt: skip
def test_any_query_is_answered(client, query, status):
    answer = client.recommend("", [], 5, query)
    assert status in answer.status and len(answer.items) == 5
    assert bool(answer.understood) == has_words(query)


def test_what_is_no_query_is_refused(client):
    for query, said in ((b"\xff\xfe", "QUERY: expected UTF-8"), ("x" * 10_000, "QUERY: expected at most 4096 bytes")):
        with pytest.raises(VivaceError, match=said):
            client.recommend("", [], 5, query)


def test_two_inputs_wrong_at_once_are_refused_and_the_server_lives(client):
    """Triton's ensemble answers nothing more once two of its steps have failed side by side: one of them must not."""
    for _ in range(3):
        with pytest.raises(VivaceError, match=r"QUERY: expected at most 4096 bytes|diversity: expected"):
            client.recommend("", [], 5, "x" * 5000, diversity=1e250)
    assert len(client.recommend("", [], 5, "oak lamp").items) == 5


def test_neighbours_in_a_batch_change_nothing(server):
    queries = ["oak lamp", "", "linen towel", "😀", "alto kettle", "", "copper mug", "novel"] * 4
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        alone = [client.recommend("", [], 5, q) for q in queries]

        def ask(q: str):
            with PatientClient(f"{server.host}:{server.grpc_port}") as own:
                return own.recommend("", [], 5, q)

        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, queries))
    for a, b in zip(alone, together, strict=True):
        assert (a.items, a.understood, a.status) == (b.items, b.understood, b.status)
        assert a.scores == pytest.approx(b.scores, abs=1e-4)


def test_a_storm_mixes_nothing_up(server, searchable):
    """What is answered is what is answered alone, all else is refused by name: nothing is lost, whether clients give up
    or wait."""
    url, queries = f"{server.host}:{server.grpc_port}", ["oak lamp", "linen towel", "alto kettle", "copper mug"]
    asks = [(list(h), q) for h in recorded(searchable).head(6)[contract.ITEM] for q in queries]
    with PatientClient(url) as client:
        fuzz = Fuzz(client, "oak lamp")
        for seed, limited in enumerate((0.5, 0.0, 0.0)):
            fuzz.storm(url, asks, 1500, np.random.default_rng(seed), limited)
            fuzz.unchanged()
        assert fuzz.seen["shed"] and fuzz.seen["answered in a storm"] + fuzz.seen["degraded in a storm"]


def test_garbage_for_the_inner_search_fails_alone(server, searchable):
    """Only someone of the server's own user reaches that stage; its neighbours are answered all the same."""
    if server.options.profile:
        pytest.skip("fused has no inner stage")
    strange = [b"garbage", b"x lamp", b"\xff", b"1,,2 lamp", b"9" * 30 + b" lamp"]
    errors: list[str] = []
    shapes = Run(searchable).shapes()

    def stranger(n: int) -> None:
        with server.control_client() as client:
            item = grpcclient.InferInput(contract.SEARCH_FOR.name, [1, 1], "BYTES")
            item.set_data_from_numpy(np.array([[strange[n % len(strange)]]], object))
            ranked = grpcclient.InferInput(shapes.ranked_ids.name, [1, shapes.candidates], "INT64")
            ranked.set_data_from_numpy(np.zeros((1, shapes.candidates), np.int64))
            for _ in range(20):
                try:
                    client.infer(contract.QUERY_SEARCH, [item, ranked], client_timeout=PATIENCE_S)
                except InferenceServerException as error:
                    errors.append(str(error))

    with PatientClient(f"{server.host}:{server.grpc_port}") as client, ThreadPoolExecutor(10) as pool:
        expected = client.recommend("", [], 10, "lamp").items
        strangers = [pool.submit(stranger, n) for n in range(5)]
        answers = list(pool.map(lambda _: client.recommend("", [], 10, "lamp").items, range(40)))
        for done in strangers:
            done.result()
    assert all(items == expected for items in answers)
    assert errors and not [e for e in errors if "Traceback" in e or ".py" in e]


def test_what_is_put_in_is_found_by_its_words_within_a_second_and_what_is_taken_out_is_not(
    server, searchable, features
):
    place = f"{server.host}:{server.grpc_port}"
    new = f"new at {server.grpc_port}"
    row = {"item_id": new, "title": "Zanzibar kettle", "category": "kettle", "brand": "Alto", "price": 4321.0}
    dear = {"ranges": {"price": [4000, None]}}
    with PatientClient(place) as client:
        answered = client.recommend("", [], 20, "kettle")
        before = answered.items
        second = Second(server)
        assert client.upsert_items([row]) == ["ok"]
        assert client.recommend("", [], 5, "zanzibar").items[0] == new and second.left_s() > 0
        answer = client.recommend("", [], 20, "kettle", filters=dear)
        assert answer.items == [new] and "lexical" in answer.understood["found_by"][new]
        others = [item for item in client.recommend("", [], 20, "kettle").items if item != new]
        assert set(others[:3]) <= set(before)
        history = [new, *before[:3], *[before[4]] * 30]  # more events than models read
        unseen = client.recommend("", history, 100, "zanzibar kettle", filters={"seen": False}).items
        every = client.recommend("", history, 100, "zanzibar kettle").items
        assert {*history} <= {*every} and {*every} - {*history} <= {*unseen} and not {*history} & {*unseen}
        assert len(client.recommend("", [], 5, "zanzibar kettle", diversity=0.5).items) == 5

        time.sleep(0.5)
        assert client.upsert_items([{**row, "price": 1.0}]) == ["ok"]
        wait_until(lambda: client.recommend("", [], 20, "kettle", filters=dear).items == [], "the new price")
        assert client.remove_items([new, before[0]]) == ["ok", "ok"]
        gone = client.recommend("", [], 20, "zanzibar kettle").items
        assert new not in gone and before[0] not in gone and gone
        raw = pd.read_parquet(features.folder / "catalogue.parquet").set_index("item_id").loc[before[0]]
        client.upsert_items([{"item_id": before[0], **json.loads(raw.to_json())}])

        def as_before() -> bool:  # a row as it was compiled is no change
            again = client.recommend("", [], 20, "kettle")
            return (again.items, list(again.scores)) == (before, list(answered.scores))

        wait_until(lambda: all(as_before() for _ in range(8)), "the item back, in every process")


def test_an_answer_to_a_query_is_explained_by_what_matches(client):
    asked = {"query": "chair", "history": ["sku-00012", "sku-00040"], "top_k": 3}
    answer, explained = client.recommend(**asked), client.explain(**asked)
    assert [of.item for of in explained.items] == answer.items
    assert explained.items[0].score == pytest.approx(float(answer.scores[0]), abs=1e-3)
    kinds = {reason["kind"] for of in explained.items for reason in of.reasons}
    assert "query" in kinds
    with pytest.raises(VivaceError, match="filters"):
        client.explain(**asked, filters={"values": {"no such column": ["x"]}})
