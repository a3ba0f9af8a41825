"""The client refuses values of a wrong type by name, before anything is sent."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.client import Appended, VivaceClient

RECOMMEND = {
    "history: expected a list of item ids, got 'abc'; write \\['abc'\\]": {"history": "abc"},
    "history: expected a list of item ids, got b'abc'": {"history": b"abc"},
    "history: expected a list of item ids, got int 7": {"history": 7},
    "history: expected a list of item ids, got dict": {"history": {"a": 1}},
    "history\\[1\\]: expected a str, got int 7": {"history": ["a", 7]},
    "user_id: expected a str, got int 42": {"user_id": 42},
    "user_id: expected a str, got NoneType None": {"user_id": None},
    "user_id: expected text that UTF-8 can hold": {"user_id": "\ud800"},
    "query: expected a str, got list": {"query": ["red"]},
    "top_k: expected an int, got str '10'": {"top_k": "10"},
    "top_k: expected an int, got float 10.0": {"top_k": 10.0},
    "top_k: expected an int, got bool True": {"top_k": True},
    "top_k: expected an int of 32 bits, got 2147483648": {"top_k": 1 << 31},
    "within_ms: expected a number, got str '5'": {"within_ms": "5"},
    "within_ms: expected a number, got float inf": {"within_ms": float("inf")},
    "within_ms: expected 0 .no limit. or more, got -5": {"within_ms": -5},
    "history: expected a list of item ids, got NoneType None": {"history": None},
    "diversity: expected a number, got float nan": {"diversity": float("nan")},
    "filters: expected a dict, got list": {"filters": ["red"]},
    "filters: expected what JSON can hold": {"filters": {"values": {"brand": {"a", "b"}}}},
}
APPEND = {
    "user_id: expected a str, got int 1": (1, "a"),
    "item_id: expected a str, got int 1": ("u", 1),
    "event_type: expected a str, got NoneType None": ("u", "a", None),
    "timestamp_ms: expected an int, got float 1.5": ("u", "a", "view", 1.5),
    "timestamp_ms: expected an int of 64 bits": ("u", "a", "view", 1 << 63),
    "event_id: expected a str, got int 7": ("u", "a", "view", 1, 7),
}


@pytest.fixture
def client():
    with VivaceClient("127.0.0.1:9") as client:  # nobody answers there: nothing may be sent
        yield client


@pytest.mark.parametrize("message", RECOMMEND)
def test_recommend_names_what_is_wrong(client, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        client.recommend(**RECOMMEND[message])


@pytest.mark.parametrize("message", APPEND)
def test_append_names_what_is_wrong(client, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        client.append(*APPEND[message])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://shop:1/", "shop", "shop:", ":8001", "shop:x", "", 8001]
)
def test_an_address_is_host_and_port(protocol, url):
    with pytest.raises(ValueError, match=r"^url: expected host:port without a scheme or a path, such as"):
        VivaceClient(url, protocol)


def test_kinds_of_numbers_and_text_that_are_right_pass():
    from vivace.client_request import request_tensors

    columns = dict((t.name, v) for t, v in request_tensors(b"u", np.array(["a", "b"]), np.int64(3), "red"))
    assert columns["HISTORY"].tolist() == [[b"a", b"b"]] and columns["TOP_K"].dtype == np.int32
    assert columns["USER_ID"].tolist() == [[b"u"]] and columns["QUERY"].tolist() == [[b"red"]]


def test_a_new_length_is_an_int_with_a_status():
    appended = Appended(3, "degraded: x")
    assert appended == 3 and appended + 1 == 4 and appended.status == "degraded: x" and Appended(1).status == ""
