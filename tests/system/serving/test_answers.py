"""The live ensemble over gRPC and HTTP: good and bad input, alone and beside others."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from loadtest.generate.statistics import largest_batches
from preprocessing.requests import recorded
from tests.support import NOON, PatientClient, patient, patient_async_client, patiently
from vivace import contract
from vivace.client import VivaceError, read_answer
from vivace.client_request import request_tensors

POPULAR = "degraded: popular items: "


@pytest.fixture(scope="module")
def requests(root):
    frame = recorded(root)
    return list(zip(frame[contract.USER], [list(h) for h in frame[contract.ITEM]], strict=True))


def _raw(served, protocol: str, tensors, model: str = contract.ENSEMBLE):
    """A call with arbitrary arrays: (name, datatype, array)."""
    server, _ = served
    module = grpcclient if protocol == "grpc" else httpclient
    port = server.grpc_port if protocol == "grpc" else server.http_port
    client = module.InferenceServerClient(f"{server.host}:{port}")
    inputs = []
    for name, datatype, value in tensors:
        item = module.InferInput(name, list(value.shape), datatype)
        item.set_data_from_numpy(value)
        inputs.append(item)
    try:
        return patient(lambda: client.infer(model, inputs))
    finally:
        client.close()


def _tensors(**changed):
    base = {t.name: (t.name, t.datatype, v) for t, v in request_tensors("someone", ["sku-00001"], 5)}
    for name, (datatype, value) in changed.items():
        base[name] = (name, datatype, value)
    return list(base.values())


def test_a_known_user_gets_ranked_items_and_probabilities(client, requests):
    user, _ = requests[0]
    answer = client.recommend(user, top_k=7)
    assert answer.status == contract.STATUS_OK and len(answer.items) == 7 == len(set(answer.items))
    assert (np.diff(answer.scores) <= 0).all()
    assert set(answer.heads) == {"click", "buy"}
    assert all(((p >= 0) & (p <= 1)).all() and len(p) == 7 for p in answer.heads.values())


def test_popular_items_when_nothing_is_known(client, features):
    by_count = features.items()[contract.ITEM].tolist()
    for user, reason in (("", "anonymous user"), ("nobody-yet", "'nobody-yet' is unknown")):
        answer = client.recommend(user, top_k=5)
        assert answer.status.startswith(POPULAR) and reason in answer.status and len(answer.items) == 5
        assert answer.items == by_count[:5]
    unknown = client.recommend("", ["no-such-item", "日本"], 5)
    assert unknown.items == by_count[:5] and "none of the recent history" in unknown.status


def test_unknown_items_are_said(client, requests):
    _, history = requests[0]
    answer = client.recommend(history=[*history, "no-such-item"], top_k=5)
    assert answer.status == f"degraded: 1 of {len(history) + 1} HISTORY items are not in the catalogue"
    assert len(answer.items) == 5


@pytest.mark.parametrize("top_k", [0, -1, 10**6])
def test_top_k_out_of_range_is_refused(client, top_k):
    with pytest.raises(VivaceError, match=rf"TOP_K: expected 1\.\.100, got {top_k}"):
        client.recommend("someone", top_k=top_k)


def test_a_history_of_ten_thousand_events_is_answered_without_its_items(client, features):
    names = features.items()[contract.ITEM].tolist()
    seen = names[:100]
    answer = client.recommend(history=(seen * 100)[:10_000], top_k=50)
    assert answer.status == contract.STATUS_OK and not set(answer.items) & set(seen)


def test_everything_seen_leaves_nothing(client, features):
    names = features.items()[contract.ITEM].tolist()
    assert client.recommend(history=names, top_k=5).items == []
    left = client.recommend(history=names[2:], top_k=5)
    assert sorted(left.items) == sorted(names[:2])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
class TestRefused:
    """Each names the input at fault."""

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"TOP_K": ("FP32", np.ones((1, 1), np.float32))}, "TOP_K"),
            ({"TOP_K": ("INT32", np.ones((1, 2), np.int32))}, "TOP_K"),
            ({"USER_ID": ("BYTES", np.array([[b"a", b"b"]], object))}, "USER_ID"),
            ({"USER_ID": ("BYTES", np.array([[b"\xff\xfe"]], object))}, "USER_ID: expected UTF-8, got byte 0xff"),
            ({"QUERY": ("BYTES", np.array([[b"ok\xc3"]], object))}, "QUERY: expected UTF-8"),
            ({"HISTORY": ("BYTES", np.array([[b"fine", b"\xf0\x28"]], object))}, r"HISTORY\[1\]: expected UTF-8"),
            ({"HISTORY": ("INT64", np.array([[1, 2]], np.int64))}, "HISTORY"),
            ({"USER_ID": ("BYTES", np.array([[b"u" * 5_000_000]], object))}, "USER_ID: expected at most 1024 bytes"),
            ({"QUERY": ("BYTES", np.array([[b"q" * 5_000_000]], object))}, "QUERY: expected at most 4096 bytes"),
            ({"HISTORY": ("BYTES", np.full((1, 100_001), b"x", object))}, "HISTORY: expected at most 100000 events"),
        ],
    )
    def test_a_row_with_a_bad_input(self, served, protocol, changed, message):
        with pytest.raises(Exception, match=message):
            _raw(served, protocol, _tensors(**changed))

    def test_a_batch_without_rows(self, served, protocol):
        empty = [(t.name, t.datatype, v[:0]) for t, v in request_tensors("a", ["b"], 5)]
        with pytest.raises(Exception, match=r"USER_ID|TOP_K|QUERY|HISTORY|batch"):
            _raw(served, protocol, empty)

    def test_a_request_without_top_k(self, served, protocol):
        with pytest.raises(Exception, match=r"expected 4 inputs|TOP_K|missing"):
            _raw(served, protocol, _tensors()[:-1])

    def test_a_bad_row_leaves_its_neighbours(self, served, protocol, requests):
        (_, one), (_, two) = requests[:2]
        width = max(len(one), len(two))
        history = np.full((3, width), b"", object)
        for row, items in ((0, one), (2, two)):
            history[row, : len(items)] = [i.encode() for i in items]
        result = _raw(
            served,
            protocol,
            [
                ("USER_ID", "BYTES", np.array([[b"a"], [b"\xff"], [b"c"]], object)),
                ("QUERY", "BYTES", np.full((3, 1), b"", object)),
                ("HISTORY", "BYTES", history),
                ("TOP_K", "INT32", np.array([[3], [5], [6]], np.int32)),
            ],
        )
        status = [s.decode() for s in result.as_numpy("STATUS")[:, 0]]
        assert status[0] == status[2] == contract.STATUS_OK and "USER_ID: expected UTF-8" in status[1]
        items = result.as_numpy("ITEM_ID")
        assert items.shape == (3, 6)
        assert [b for b in items[1] if b] == []
        for row, history_of_row, k in ((0, one, 3), (2, two, 6)):
            alone = read_answer(
                _raw(served, protocol, [(t.name, t.datatype, v) for t, v in request_tensors("", history_of_row, k)])
            )
            assert [b.decode() for b in items[row] if b] == alone.items


def test_a_long_item_id_is_an_unknown_item(served):
    answer = read_answer(_raw(served, "grpc", _tensors(HISTORY=("BYTES", np.array([[b"x" * 5_000_000]], object)))))
    assert "none of the recent history items" in answer.status


def test_batch_equals_single_and_batches_are_formed(served, requests):
    """64 different requests at once, with bad ones among them, answer what each answers alone."""
    server, _ = served
    url = f"{server.host}:{server.grpc_port}"
    chosen = requests[:64]
    with PatientClient(url) as client:
        alone = [client.recommend(u, h, 10, context=NOON) for u, h in chosen]

    async def together():
        async with patient_async_client(url) as client:
            calls = []
            for i, (user, history) in enumerate(chosen):
                for top_k in (10, 0) if i % 8 == 0 else (10,):
                    calls.append(patiently(partial(client.recommend, user, history, top_k, context=NOON)))
            return await asyncio.gather(*calls, return_exceptions=True)

    def batched() -> bool:
        with server.control_client() as triton:
            return all(size > 1 for size in largest_batches(triton).values())

    for turn in range(50):
        if turn and batched():
            break
        answers = asyncio.run(together())
        good = [a for a in answers if not isinstance(a, Exception)]
        assert len(good) == 64 and all("TOP_K" in str(a) for a in answers if isinstance(a, Exception))
        for one, other in zip(alone, good, strict=True):
            assert one.items == other.items and one.status == other.status
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)
    assert batched()


def test_a_new_click_changes_the_next_answer(client, features, request):
    user = f"newcomer-{request.node.callspec.params['client']}"
    names = features.items()[contract.ITEM].tolist()
    assert client.recommend(user, top_k=5).items == names[:5]
    assert client.append(user, names[0], "view") == 1
    after = client.recommend(user, top_k=5)
    assert after.status == contract.STATUS_OK and names[0] not in after.items
    assert client.append(user, names[40], "buy", 1_700_000_000_000) == 2
    assert client.recommend(user, top_k=5).items != after.items
    for bad in (("", names[0]), (user, "")):
        with pytest.raises(VivaceError, match="got an empty string"):
            client.append(*bad)


def test_a_query_without_search_is_answered_and_reported(client, requests):
    """The recommendation, and STATUS says that nothing was searched for; over both protocols."""
    user, history = requests[0]
    plain, searched = client.recommend(user, history, 5), client.recommend(user, history, 5, "red shoe")
    assert plain.status == contract.STATUS_OK and searched.items == plain.items
    assert searched.status.startswith("degraded: no search in this run; QUERY was left out")
    anonymous = client.recommend(query="red shoe")
    assert anonymous.status.startswith("degraded: popular items") and "no search in this run" in anonymous.status


def test_appends_from_many_clients_are_all_kept(served, features):
    server, _ = served
    item = features.items()[contract.ITEM][0]

    def run(_: int) -> None:
        with PatientClient(f"{server.host}:{server.grpc_port}") as client:
            for _ in range(10):
                client.append("busy", item)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.append("busy", item) == 81


def test_the_asyncio_client_is_answered_over_http(served, requests):
    server, _ = served

    async def run():
        async with patient_async_client(f"{server.host}:{server.http_port}", "http") as client:
            return await patiently(lambda: client.recommend(*requests[0], 3))

    assert len(asyncio.run(run()).items) == 3


def test_the_readme_curl_line_as_json(served):
    """Plain JSON over HTTP, as the README's curl sends it; an empty HISTORY is a list of none."""
    server, _ = served
    body = {
        "inputs": [
            {"name": "USER_ID", "datatype": "BYTES", "shape": [1, 1], "data": ["user-00001"]},
            {"name": "QUERY", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
            {"name": "HISTORY", "datatype": "BYTES", "shape": [1, 0], "data": []},
            {"name": "TOP_K", "datatype": "INT32", "shape": [1, 1], "data": [3]},
        ]
    }
    url = f"http://{server.host}:{server.http_port}/v2/models/recommend/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
        outputs = {o["name"]: o for o in json.load(answer)["outputs"]}
    assert len(outputs["ITEM_ID"]["data"]) == 3 and outputs["STATUS"]["data"] == ["ok"]
    body["inputs"][3]["data"] = [0]
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()))
    assert error.value.code == 400 and "TOP_K" in error.value.read().decode()
