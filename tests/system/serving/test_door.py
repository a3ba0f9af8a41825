"""Nobody gets in: what reaches Triton through the guard, what does not, and that the server outlives all of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import stat
import threading
import time
import zlib

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving.launcher import TritonServer
from serving.segments import SHM
from serving.server_options import ServerOptions
from serving.wheel import ServerError
from tests.support import NOON, PATIENCE_S, PatientClient, heard, wait_until, waited_too_long
from vivace.client import inputs_of
from vivace.client_request import request_tensors
from vivace.store.lmdb_store import LmdbStore

HISTORY = ["sku-00001", "sku-00002"]
INFER = "/v2/models/recommend/infer"


def post(server: TritonServer, path: str, body: bytes | str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    with contextlib.closing(
        http.client.HTTPConnection(server.host, server.http_port, timeout=PATIENCE_S)
    ) as connection:
        connection.request("POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


def call(client: grpcclient.InferenceServerClient, model: str, inputs: list, **more) -> object:
    """The answer, or the error's text; asked again where a queue refused."""
    while True:
        try:
            result = client.infer(model, inputs, client_timeout=PATIENCE_S, **more)
            response = result.get_response()
            names = sorted(o.name for o in response.outputs)
            return response.id, response.model_name, {n: result.as_numpy(n).tolist() for n in names}
        except InferenceServerException as error:
            if not waited_too_long(error):
                return str(error)


@pytest.fixture
def witness(served):
    """Before and after a test the same question has the same answer, over both protocols, from the same process."""
    server, _ = served

    def answers() -> list:
        found = []
        for protocol, port in (("grpc", server.grpc_port), ("http", server.http_port)):
            with PatientClient(f"{server.host}:{port}", protocol) as client:
                found.append(client.recommend(history=HISTORY, top_k=5, context=NOON).items)
        return [*found, server.pid]

    before = answers()
    yield server
    assert answers() == before


MANAGEMENT = [
    "/v2/repository/index", "/v2/repository/models/intruder/load", "/v2/repository/models/recommend/unload",
    "/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/region/x/register", "/v2/logging",
    "/v2/trace/setting", "/v2/models/recommend/trace/setting", "/v2/models/response/infer",
    "/v2/models/recommend/../response/infer", "/v2/models/recommend%2f..%2fresponse/infer",
    "/v2/models/recommend/versions/1/../../../response/infer", "/v2/models/recommend/generate", "//v2//logging",
]  # fmt: skip


@pytest.mark.parametrize("path", MANAGEMENT)
def test_no_management_call_and_no_inner_model_is_reached_over_http(witness, path):
    status, text = post(witness, path, "{}")
    assert status == 404 and "no such path" in text, (status, text)


def test_no_management_call_and_no_inner_model_is_reached_over_grpc(witness):
    with grpcclient.InferenceServerClient(f"{witness.host}:{witness.grpc_port}") as client:
        calls = [
            lambda: client.load_model("recommend"), lambda: client.unload_model("recommend"),
            client.get_model_repository_index, client.get_inference_statistics,
            lambda: client.update_log_settings({"log_info": False}), client.get_trace_settings,
            lambda: client.register_system_shared_memory("x", "/x", 8),
        ]  # fmt: skip
        for forbidden in calls:
            with pytest.raises(InferenceServerException, match="no such path"):
                forbidden()
        inputs = inputs_of(grpcclient, request_tensors(history=HISTORY))
        for model in ("response", "retrieval", "feature_transform", "", "recommend/../response"):
            assert "no other model takes requests" in call(client, model, inputs)


HOSTILE = {
    "nested JSON": ("[" * 300_000, {}, 400),
    "nested data": ('{"inputs":[{"name":"USER_ID","data":' + "[" * 50_000 + "]" * 50_000 + "}]}", {}, 400),
    "classification": ('{"inputs":[],"outputs":[{"name":"ITEM_ID","parameters":{"classification":1}}]}', {}, 400),
    "classification, escaped": ('{"outputs":[{"parameters":{"cl\\u0061ssification" : 1}}]}', {}, 400),
    "compressed": (zlib.compress(bytes(1_000_000)), {"Content-Encoding": "gzip"}, 415),
    "too long": (b"x" * (9 << 20), {}, 413),
    "too many headers": ("{}", {f"x-{i}": "1" for i in range(100)}, 431),
    "a long header": ("{}", {"x": "y" * 100_000}, 431),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_that_ends_triton_does_not_reach_it(witness, name):
    body, headers, expected = HOSTILE[name]
    status, text = post(witness, INFER, body, headers)
    assert status == expected, (status, text[:300])


def test_brackets_in_text_are_no_nesting(witness):
    """A query may hold as many brackets and quotes as it likes."""
    tensors = request_tensors(history=HISTORY, query='[{"' * 200)
    inputs = [
        {"name": t.name, "datatype": t.datatype, "shape": list(v.shape),
         "data": [x.decode() if isinstance(x, bytes) else int(x) for x in v.ravel()]}
        for t, v in tensors
    ]  # fmt: skip
    status, text = post(witness, INFER, json.dumps({"inputs": inputs}))
    assert status == 200, text


def test_small_chunks_arrive_as_one_body(witness):
    with socket.create_connection((witness.host, witness.http_port), timeout=PATIENCE_S) as s:
        s.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(60):
            s.sendall(b"2\r\nAA\r\n" * 10_000)
        s.sendall(b"0\r\n\r\n")
        words = b"failed to parse the request JSON"
        assert words in heard(s, words)


def test_lengths_that_lie_are_refused(witness):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with socket.create_connection((witness.host, witness.http_port), timeout=PATIENCE_S) as s:
        s.sendall(head.encode())
        assert b" 400 " in s.recv(2000).splitlines()[0]


def test_grpc_refuses_what_ends_triton_or_names_memory(witness):
    inputs = inputs_of(grpcclient, request_tensors(history=HISTORY))
    with grpcclient.InferenceServerClient(f"{witness.host}:{witness.grpc_port}") as client:
        counted = [grpcclient.InferRequestedOutput("ITEM_ID", class_count=1)]
        assert "classification are not supported" in call(client, "recommend", inputs, outputs=counted)
        assert "expected it uncompressed" in call(client, "recommend", inputs, compression_algorithm="gzip")
        there = grpcclient.InferInput("USER_ID", [1, 1], "BYTES")
        there.set_shared_memory("region", 8)
        assert "shared memory are not supported" in call(client, "recommend", [there, *inputs[1:]])
        long = inputs_of(grpcclient, request_tensors(user_id="u" * 20_000_000))
        assert "expected at most" in call(client, "recommend", long)
    garbage = grpc.insecure_channel(f"{witness.host}:{witness.grpc_port}").unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", request_serializer=bytes, response_deserializer=bytes
    )
    rng = random.Random(5)
    for size in (1, 2, 7, 60, 4000):
        with pytest.raises(grpc.RpcError) as refused:
            garbage(rng.randbytes(size), timeout=PATIENCE_S)
        assert refused.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_grpc_through_the_guard_equals_grpc_to_triton(served):
    """Answers, ids and errors are the same as from Triton's own gRPC, whatever form a request has."""
    server, _ = served
    inputs = inputs_of(grpcclient, request_tensors("user-00012", ["sku-00003", "öß漢"], 7))
    outputs = [grpcclient.InferRequestedOutput(n) for n in ("STATUS", "ITEM_ID")]
    forms: list[dict] = [
        {}, {"request_id": 'a"b\\cé漢\t'}, {"outputs": outputs}, {"model_version": "1"}, {"model_version": "9"},
        {"timeout": 60_000_000}, {"priority": 1}, {"parameters": {"filters": '{"values": {"a": ["é漢\\"x"]}}'}},
        {"parameters": {"diversity": "0.5", "k": True, "n": 5}},
    ]  # fmt: skip
    more = [{"user_id": "x" * 2000}, {"top_k": 0}, {"top_k": 101}, {"user_id": b"\xff\xfe"}, {"query": "lamp"}]
    tensors = [inputs_of(grpcclient, request_tensors(**m)) for m in [*more, {"history": HISTORY * 20_000}]]
    with (
        server.control_client() as direct,
        grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as guarded,
    ):
        for form in forms:
            assert call(guarded, "recommend", inputs, **form) == call(direct, "recommend", inputs, **form), form
        for given in tensors:
            assert call(guarded, "recommend", given) == call(direct, "recommend", given)
        assert call(guarded, "recommend", inputs[:2]) == call(direct, "recommend", inputs[:2])


def test_typed_contents_arrive_as_they_are(root, served):
    """A client may send values as protobuf's own fields: negative, large and many-byte ones too."""
    server, _ = served
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"{server.host}:{server.grpc_port}"))
    times = [1, 127, 128, 2**31, 1_700_000_000_123]
    refused = {-1: "got -1;", 2**53 + 1: "got 9007199254740993;", -(2**63): "got -9223372036854775808;"}
    for time_ms in (*times, *refused):
        request = service_pb2.ModelInferRequest(model_name="append_event")
        for name, value in (("USER_ID", b"typed \xc3\xb6"), ("ITEM_ID", b"sku-00003"), ("EVENT_TYPE", b"view")):
            request.inputs.add(name=name, datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(value)
        request.inputs.add(name="TIMESTAMP_MS", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(time_ms)
        if time_ms in times:
            stub.ModelInfer(request, timeout=PATIENCE_S)
            continue
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request, timeout=PATIENCE_S)
        assert "expected Unix time in ms" in error.value.details() and refused[time_ms] in error.value.details()
    events = LmdbStore(root / "feature_store", readonly=True).events("typed ö")
    assert [e.timestamp_ms for e in events] == times


def test_cancelled_and_timed_out_calls_do_not_end_the_server(witness):
    """What ordinary clients do: 3,000 calls, most given up about when their answer comes."""
    address, calls = f"{witness.host}:{witness.grpc_port}", 500
    ask = service_pb2.ModelInferRequest(model_name="recommend")
    for tensor, value in request_tensors(history=HISTORY, top_k=5):
        item = ask.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(value.shape))
        if value.dtype == np.int32:
            item.contents.int_contents.extend(value.ravel().tolist())
        else:
            item.contents.bytes_contents.extend(value.ravel().tolist())

    failures: list[str] = []  # of calls that were given their time

    def caller(seed: int) -> None:
        rng, usual_s = random.Random(seed), 0.005
        stub = service_pb2_grpc.GRPCInferenceServiceStub(
            grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        )
        for n in range(calls):
            started = time.monotonic()
            if n % 10 == 0:
                try:
                    stub.ModelInfer(ask, timeout=PATIENCE_S)
                    usual_s = 0.8 * usual_s + 0.2 * (time.monotonic() - started)
                except grpc.RpcError as error:
                    if not waited_too_long(error.details()):
                        failures.append(error.details())
            elif n % 2:
                with contextlib.suppress(grpc.RpcError):
                    stub.ModelInfer(ask, timeout=max(0.001, usual_s * rng.uniform(0.1, 0.6)))
            else:
                running = stub.ModelInfer.future(ask, timeout=PATIENCE_S)
                time.sleep(usual_s * rng.uniform(0.1, 1.3))
                running.cancel()

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and witness.running()


def test_a_server_that_is_killed_comes_back_and_its_callers_get_their_answers(served):
    server, watchdog = served
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        expected, seen, errors = client.recommend(history=HISTORY, top_k=5, context=NOON).items, [], []
        stop = threading.Event()

        def caller() -> None:
            with PatientClient(f"{server.host}:{server.grpc_port}") as mine:
                while not stop.is_set():
                    try:
                        seen.append(mine.recommend(history=HISTORY, top_k=5, context=NOON).items)
                    except Exception as error:  # of those that waited longer than the door tries
                        errors.append(str(error))

        thread = threading.Thread(target=caller)
        thread.start()
        for _ in range(2):
            dead, answered = server.pid, len(seen)
            os.kill(dead, signal.SIGKILL)
            wait_until(lambda gone=dead: server.pid != gone and server.ready(), "a new server")
            wait_until(lambda before=answered: len(seen) > before + 3, "answers again")
        stop.set()
        thread.join()
    assert all(items == expected for items in seen)
    assert all("try again" in e for e in errors), errors
    assert watchdog.metrics.registry.get_sample_value("vivace_server_restarts_total", {"which": "tritonserver"}) >= 2


def test_a_door_that_is_killed_comes_back(served):
    server, _ = served
    dead = server.door.pid
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: server.door.running() and server.door.pid != dead and server.door.answers(), "a door")
    with PatientClient(f"{server.host}:{server.grpc_port}") as client:
        assert client.recommend(history=HISTORY, top_k=5).items


def test_sockets_log_and_shared_memory_are_the_owners_alone(served):
    server, _ = served
    assert stat.S_IMODE(server.sockets.folder.stat().st_mode) == 0o700
    segments = list(SHM.glob(f"{server.segments.prefix}*"))
    assert segments
    for path in (*segments, server.log):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_an_open_address_needs_the_guard(root):
    with pytest.raises(ServerError, match="leave --no-guard out"):
        TritonServer(ServerOptions(root / "model_repository", host="0.0.0.0", guard=False))


def test_what_nobody_needs_ends_early_and_clearly(witness):
    for headers in ({"x": "y" * 8_300}, {"Inference-Header-Content-Length": "400x"}, {"Expect": "100-continue"}):
        status, text = post(witness, INFER, b"{}", headers)
        assert status in (400, 431, 500), (headers, status, text)
    body = b"".join(b"\n\x09recommend" if n == 0 else b"*\x00" for n in range(1_000_000))
    infer = grpc.insecure_channel(f"{witness.host}:{witness.grpc_port}").unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", request_serializer=bytes, response_deserializer=bytes
    )
    with pytest.raises(grpc.RpcError, match="inputs: too many"):
        infer(body, timeout=PATIENCE_S)


SPELLINGS = ["400x", "400,400", "400 1", "0x190", "400.9", "-1", "", "٤٠٠"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_length_of_the_head_is_read_as_triton_reads_it(witness, spelling):
    with socket.create_connection((witness.host, witness.http_port), timeout=PATIENCE_S) as s:
        lengths = f"Inference-Header-Content-Length: {spelling}\r\nContent-Length: 2"
        s.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lengths}\r\n\r\n{{}}".encode())
        assert b" 400 " in s.recv(2000).splitlines()[0]


def test_grpc_reads_are_checked_too(witness, served):
    wait_until(lambda: served[0].door.told_ready, "ready after what the tests before did")
    with grpcclient.InferenceServerClient(f"{witness.host}:{witness.grpc_port}") as client:
        assert client.is_server_ready() and client.is_model_ready("recommend")
        assert client.get_model_metadata("append_event").name == "append_event"
        for read in (client.get_model_config, client.get_model_metadata, client.is_model_ready):
            with pytest.raises(InferenceServerException, match="no other model is shown"):
                read("retrieval")
    channel = grpc.insecure_channel(f"{witness.host}:{witness.grpc_port}", compression=grpc.Compression.Gzip)
    live = channel.unary_unary(
        "/inference.GRPCInferenceService/ServerLive", request_serializer=bytes, response_deserializer=bytes
    )
    for message in (bytes(1_000_000), bytes(100)):
        with pytest.raises(grpc.RpcError) as refused:
            live(message, timeout=PATIENCE_S)
        assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)
