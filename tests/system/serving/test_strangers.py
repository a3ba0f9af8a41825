"""What strangers try, over both protocols, against the real server: code of theirs, its memory, web pages, every call
that management offers; and what the guard does with connections that hold places."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from benchmarks.deaths import REQUESTS, SIGNALS_OF
from serving.door.options import DoorOptions
from serving.door.process import Door
from serving.launcher import TritonServer
from serving.service import service
from serving.start_checks import free_port
from tests.support import PATIENCE_S, PatientClient, heard, on_free_ports, wait_until
from vivace.client import VivaceError, inputs_of, read_answer
from vivace.client_request import request_tensors
from vivace.store.lmdb_store import LmdbStore

HISTORY = ["sku-00001", "sku-00002"]
INFER = "/v2/models/recommend/infer"
WEB_PAGES = {
    "of elsewhere": {"Origin": "http://evil.example", "Content-Type": "text/plain"},
    "of nowhere": {"Origin": "null", "Content-Type": "text/plain"},
    "of a name that points here": {"Host": "evil.example:18000"},
    "of a name, in capitals and with a dot": {"Host": "EVIL.Example."},
    "that only reads": {"Sec-Fetch-Site": "cross-site"},
}


def send(server: TritonServer, method: str, path: str, body: bytes = b"", headers: dict | None = None):
    """(status, text) over HTTP."""
    connection = http.client.HTTPConnection(server.host, server.http_port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


def as_json(history: list[str], **more) -> bytes:
    tensors = request_tensors(history=history, top_k=3)
    inputs = [
        {"name": t.name, "datatype": t.datatype, "shape": list(v.shape),
         "data": [x.decode() if isinstance(x, bytes) else int(x) for x in v.ravel()]}
        for t, v in tensors
    ]  # fmt: skip
    return json.dumps({"inputs": inputs, **more}).encode()


def stored(root: Path, user: str) -> list:
    """Events of a user."""
    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        return store.events(user)


# -- code and memory ----------------------------------------------------------------------------------------------
def intruder(marker: Path) -> tuple[str, dict[str, bytes]]:
    """(configuration, files) of a model that writes ``marker`` when it is loaded."""
    code = f"open({str(marker)!r}, 'w').close()\nclass TritonPythonModel:\n    def execute(self, r): return []\n"
    tensor = {"data_type": "TYPE_INT32", "dims": [1]}
    config = {"backend": "python", "input": [{"name": "A", **tensor}], "output": [{"name": "B", **tensor}]}
    return json.dumps(config), {"file:1/model.py": code.encode()}


@pytest.mark.parametrize("page", ["", *WEB_PAGES])
def test_code_of_a_stranger_is_not_loaded_over_http(served, tmp_path, page):
    config, files = intruder(tmp_path / "marker")
    parameters = {"config": config, **{name: base64.b64encode(code).decode() for name, code in files.items()}}
    body = json.dumps({"parameters": parameters}).encode()
    status, text = send(served[0], "POST", "/v2/repository/models/intruder/load", body, WEB_PAGES.get(page))
    assert status == (403 if page else 404) and "error" in json.loads(text)
    assert not (tmp_path / "marker").exists()


def test_code_of_a_stranger_is_not_loaded_over_grpc(served, tmp_path):
    server, _ = served
    config, files = intruder(tmp_path / "marker")
    with (
        grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client,
        pytest.raises(InferenceServerException, match="no such path"),
    ):
        client.load_model("intruder", config=config, files=files)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_memory_of_the_server_is_read_or_written(served, side, protocol):
    server, _ = served
    module = grpcclient if protocol == "grpc" else httpclient
    port = server.grpc_port if protocol == "grpc" else server.http_port
    inputs = inputs_of(module, request_tensors(history=HISTORY))
    outputs = [module.InferRequestedOutput("ITEM_ID")]
    (inputs if side == "inputs" else outputs)[0].set_shared_memory(f"{server.segments.prefix}x", 64)
    with (
        module.InferenceServerClient(f"{server.host}:{port}") as client,
        pytest.raises(InferenceServerException, match=r"not supported|shared memory region"),
    ):
        client.infer("recommend", inputs, outputs=outputs)


@pytest.mark.parametrize("page", WEB_PAGES)
def test_no_web_page_is_answered(served, root, page):
    """A page of anywhere may post plain text to a port of its reader's machine; nothing that it sends is stored."""
    server, _ = served
    columns = {"USER_ID": "a page's user", "ITEM_ID": "sku-00001", "EVENT_TYPE": ""}
    inputs = [{"name": n, "datatype": "BYTES", "shape": [1, 1], "data": [v]} for n, v in columns.items()]
    inputs.append({"name": "TIMESTAMP_MS", "datatype": "INT64", "shape": [1, 1], "data": [0]})
    body = json.dumps({"inputs": inputs}).encode()
    for method, path, content in (
        ("POST", "/v2/models/append_event/infer", body), ("POST", INFER, as_json(HISTORY)), ("GET", "/v2", b""),
    ):  # fmt: skip
        status, text = send(server, method, path, content, WEB_PAGES[page])
        assert status == 403 and "web page" in text, (status, text)
    assert not stored(root, "a page's user")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "triton", "x"])
def test_names_of_this_machine_are_answered(served, host):
    assert send(served[0], "POST", INFER, as_json(HISTORY), {"Host": host})[0] == 200


def test_without_the_guard_management_needs_the_key(root):
    with TritonServer(on_free_ports(root / "model_repository", restricted=True)) as server:
        for path in ("repository/models/recommend/unload", "repository/index", "logging", "trace/setting",
                     "systemsharedmemory/region/x/register"):  # fmt: skip
            assert send(server, "POST", f"/v2/{path}", b"{}")[0] == 403, path
        with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
            for call in (lambda: client.unload_model("recommend"), client.get_model_repository_index):
                with pytest.raises(InferenceServerException, match="restricted"):
                    call()
        with PatientClient(f"{server.host}:{server.grpc_port}") as client:
            assert client.recommend(history=HISTORY).items


# -- requests that are refused, or answered, in words ---------------------------------------------------------------
def test_status_alone_is_refused_in_words(served):
    server, _ = served
    for module, port in ((grpcclient, server.grpc_port), (httpclient, server.http_port)):
        inputs = inputs_of(module, request_tensors(history=HISTORY))
        with module.InferenceServerClient(f"{server.host}:{port}") as client:
            with pytest.raises(InferenceServerException, match="ask for ITEM_ID too"):
                client.infer("recommend", inputs, outputs=[module.InferRequestedOutput("STATUS")])
            both = [module.InferRequestedOutput(n) for n in ("STATUS", "SCORE")]
            assert client.infer("recommend", inputs, outputs=both).as_numpy("STATUS")[0, 0] == b"ok"


MALFORMED = {
    "no JSON": (b"nonsense", "failed to parse"),
    "cut off": (as_json(HISTORY)[:-40], "failed to parse"),
    "nothing": (b"", "5 inputs"),
    "no inputs": (b"{}", "'inputs'"),
    "inputs that are none": (b'{"inputs": 5}', "'inputs'"),
    "a number as text": (as_json(HISTORY).replace(b'"sku-00001"', b"7"), "non-string"),
    "shape": (as_json(HISTORY).replace(b"[1, 1]", b"[1, -1]"), "'shape'"),
    "too few values": (as_json(HISTORY).replace(b'"sku-00001", ', b""), "expected 2 string elements"),
    "twice the user": (as_json(HISTORY).replace(b'"QUERY"', b'"USER_ID"'), "USER_ID"),
    "timeout": (as_json(HISTORY, parameters={"timeout": "soon"}), "'timeout'"),
    "unknown output": (as_json(HISTORY, outputs=[{"name": "RANKED_IDS"}]), "RANKED_IDS"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json_is_the_callers_fault_and_named(served, name):
    body, words = MALFORMED[name]
    status, text = send(served[0], "POST", INFER, body)
    assert status == 400 and words in json.loads(text)["error"], (status, text)


def test_how_http_answers_is_not_a_grpc_callers_to_say(served):
    """A parameter that Triton's gRPC ignores changed the form of the answer behind the guard, which then was empty."""
    server, _ = served
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"{server.host}:{server.grpc_port}"))
    ask = service_pb2.ModelInferRequest(model_name="recommend")
    for tensor, value in request_tensors(history=HISTORY, top_k=3):
        item = ask.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(value.shape))
        whole = value.dtype == np.int32
        (item.contents.int_contents if whole else item.contents.bytes_contents).extend(value.ravel().tolist())
    ask.parameters["binary_data_output"].bool_param = False
    answer = grpcclient.InferResult(stub.ModelInfer(ask, timeout=PATIENCE_S))
    assert len(read_answer(answer).items) == 3


def test_the_stores_place_is_not_shown(served):
    server, _ = served
    assert send(server, "GET", "/v2/models/append_event/config")[0] == 404
    assert send(server, "GET", "/v2/models/recommend/config")[0] == 200
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.get_model_config("recommend").config.name == "recommend"
        with pytest.raises(InferenceServerException, match="no other model is shown"):
            client.get_model_config("append_event")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("name", ["USER_ID", "ITEM_ID", "EVENT_TYPE"])
def test_a_long_text_is_refused_before_it_is_kept(served, root, name, protocol):
    server, _ = served
    fields = {"USER_ID": "brief", "ITEM_ID": "sku-00001", "EVENT_TYPE": "view"}
    values = fields | {name: fields[name] + "x" * 1024}
    port = server.grpc_port if protocol == "grpc" else server.http_port
    with (
        PatientClient(f"{server.host}:{port}", protocol) as client,
        pytest.raises(VivaceError, match=rf"{name}: expected at most (1024|128) bytes"),
    ):
        client.append(*values.values())
    assert not stored(root, "brief") and not stored(root, values["USER_ID"])


# -- connections ----------------------------------------------------------------------------------------------------
@pytest.fixture
def door(tmp_path):
    """A guard with small limits and nobody behind it."""
    ports = {f"{name}_port": free_port("127.0.0.1") for name in ("http", "grpc", "metrics")}
    limits = {"max_connections": 4, "silent_s": 1.0, "idle_s": 3.0, "slow_client_s": 1.0}
    with Door(DoorOptions(host="127.0.0.1", **ports, **limits), tmp_path) as running:
        yield running


@pytest.fixture
def connect():
    """Opens connections to a port, which are closed at the end."""
    with contextlib.ExitStack() as held:
        yield lambda port, count: [
            held.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)
        ]


def ended(connections: list[socket.socket]) -> bool:
    """Whether the other side closed every one; what it said before does not matter."""
    for connection in connections:
        connection.setblocking(False)
        try:
            while connection.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
    return True


def status_of(port: int, headers: str = "") -> bytes:
    """Status line of a request for a path that is none: the guard's own 404."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as s:
        s.sendall(f"GET /nowhere HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        return s.recv(1000)[:12]


@pytest.mark.parametrize("which", ["http", "grpc"])
def test_connections_that_say_nothing_take_nobodys_place(door, connect, which):
    port = getattr(door.options, f"{which}_port")
    silent = connect(port, 10)  # more than the limit
    if which == "http":
        assert status_of(port) == b"HTTP/1.1 404"
    else:
        call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary(
            "/x/y", request_serializer=bytes, response_deserializer=bytes
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=PATIENCE_S)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    began = time.monotonic()
    wait_until(lambda: ended(silent), "silent connections closed")
    assert time.monotonic() - began < 30  # far less than the idle time of a real guard


def test_idle_connections_fill_a_port_for_a_while_only(door, connect):
    port = door.options.http_port
    held = []
    for _ in range(4):
        (connection,) = connect(port, 1)
        held.append(connection)
        connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404")
    with contextlib.suppress(ConnectionError):
        assert status_of(port) == b""  # closed at once: clear, and cheap
    wait_until(lambda: ended(held), "idle connections closed")
    wait_until(lambda: status_of(port) == b"HTTP/1.1 404", "room again")


@pytest.mark.parametrize(
    "head", ["GET /v2 HTTP/1.1\r\nHost:", f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{"]
)
def test_a_request_that_does_not_arrive_is_ended(door, head):
    with socket.create_connection(("127.0.0.1", door.options.http_port), timeout=PATIENCE_S) as s:
        s.sendall(head.encode())
        answer = heard(s, b"send it faster")
    assert answer.startswith(b"HTTP/1.1 408") and b"send it faster" in answer, answer


# -- deaths ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own(root):
    """(server, what its watchdog reports) of a server that may die."""
    events: list[str] = []
    with service(on_free_ports(root / "model_repository", guard=True), events.append) as (server, _):
        yield server, events


@pytest.mark.parametrize("trigger", SIGNALS_OF)
def test_a_server_that_a_request_ends_comes_back(own, trigger):
    """By the requests that Triton dies of, sent to its own sockets: the signal is named, and the callers of the guard
    get their answers."""
    server, events = own
    dead, before = server.pid, len(events)
    threading.Thread(target=REQUESTS[trigger], args=(server,), daemon=True).start()
    wait_until(lambda: server.pid != dead and server.ready(), "a new server")
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.recommend(history=HISTORY).items
    assert any(f"was ended by {SIGNALS_OF[trigger]}" in e for e in events[before:]), events
