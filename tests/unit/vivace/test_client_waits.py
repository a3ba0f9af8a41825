"""The client beside servers that say nothing, hang up, talk nonsense or come back: its own errors, in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from vivace import contract
from vivace.client import AsyncVivaceClient, VivaceClient, VivaceError, VivaceTimeoutError
from vivace.client_errors import RETRIES_S

PATIENCE_S = 30.0


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """host:port of a server that hands each connection to ``serve``, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

        def serve_one(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield "{}:{}".format(*server.getsockname())


def request_of(connection: socket.socket) -> bytes:
    """One HTTP request, whole; b"" at the end."""
    text = b""
    while b"\r\n\r\n" not in text:
        part = connection.recv(65536)
        if not part:
            return b""
        text += part
    head, _, body = text.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length"))
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answer(body: dict | bytes, status: str = "200 OK") -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


def result(**outputs: tuple[str, object]) -> bytes:
    """An answer of Triton's: each output of one row and one value, behind its JSON (KServe's binary tensors)."""
    parts = {name: _binary(datatype, value) for name, (datatype, value) in outputs.items()}
    described = [
        {"name": n, "datatype": outputs[n][0], "shape": [1, 1], "parameters": {"binary_data_size": len(part)}}
        for n, part in parts.items()
    ]
    head = json.dumps({"outputs": described}).encode()
    length = f"inference-header-content-length: {len(head)}\r\n".encode()
    return answer(head + b"".join(parts.values())).replace(b"\r\n", b"\r\n" + length, 1)


def _binary(datatype: str, value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", len(value)) + value.encode()
    return struct.pack({"INT32": "<i", "FP32": "<f"}[datatype], value)


APPENDED = result(HISTORY_LENGTH=("INT32", 3), STATUS=("BYTES", "ok"))
RECOMMENDED = result(ITEM_ID=("BYTES", "a"), SCORE=("FP32", 1.0), STATUS=("BYTES", "ok"))


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def trickles(connection: socket.socket) -> None:
    request_of(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"{")
        time.sleep(0.02)


@pytest.mark.parametrize(("protocol", "serve"), [("grpc", silent), ("http", silent), ("http", trickles)])
@pytest.mark.parametrize(
    ("timeout_s", "within_ms", "message"),
    [(20.0, 200, "within_ms: no answer came within 200 ms"), (0.2, 0, "timeout_s: no answer came within 0.2 s"),
     (0.2, 5_000, "timeout_s: no answer came within 0.2 s")],
)  # fmt: skip
def test_a_server_that_never_answers(protocol, serve, timeout_s, within_ms, message):
    with listening(serve) as url, VivaceClient(url, protocol, timeout_s) as client:
        began = time.monotonic()
        with pytest.raises(VivaceTimeoutError, match=message):
            client.recommend("u", within_ms=within_ms)
        assert time.monotonic() - began < PATIENCE_S / 2


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_never_answers_asyncio(protocol):
    async def run(url: str) -> None:
        async with AsyncVivaceClient(url, protocol, timeout_s=20) as client:
            with pytest.raises(VivaceTimeoutError, match="within_ms: no answer came within 200 ms"):
                await client.recommend("u", within_ms=200)

    with listening(silent) as url:
        asyncio.run(asyncio.wait_for(run(url), PATIENCE_S))


def test_many_threads_share_one_http_client():
    """Each call has a connection to itself; as many as there are calls at a time, kept for the next."""
    connections: list[int] = []

    def serve(connection: socket.socket) -> None:
        connections.append(1)
        while request_of(connection):
            time.sleep(0.002)
            connection.sendall(RECOMMENDED)

    with listening(serve) as url, VivaceClient(url, "http", PATIENCE_S) as client:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.recommend("u").items, range(200)))
        assert answers == [["a"]] * 200 and len(connections) <= 8


def test_an_idle_connection_that_the_server_closed_is_no_error():
    def serve(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(RECOMMENDED)  # and hangs up

    with listening(serve) as url, VivaceClient(url, "http", PATIENCE_S) as client:
        for _ in range(5):
            assert client.recommend("u").items == ["a"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer(b"<html>", "200 OK"), r"."),
        (answer({"outputs": []}), "the answer is not one of a Vivace server"),
        (result(X=("INT32", 1)), "the answer is not one of a Vivace server"),
        (answer({"error": "TOP_K: no"}, "400 Bad Request"), "^TOP_K: no$"),
        (answer(b"no such page", "404 Not Found"), "no such page"),
        (answer(b"", "500 Oops"), "no reason given"),
        (b"garbage\r\n\r\n", r"."),
        (b"", r"."),
    ],
)
def test_nonsense_is_an_error_of_ours(reply, message):
    def serve(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(reply)

    with (
        listening(serve) as url,
        VivaceClient(url, "http", PATIENCE_S) as client,
        pytest.raises(VivaceError, match=message) as error,
    ):
        client.recommend("u")
    assert str(error.value)


def event_id_of(request: bytes) -> str:
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [x.split(b":")[1] for x in head.lower().splitlines() if x.startswith(b"inference-header-content-length")]
    return json.loads(body[: int(lengths[0])] if lengths else body)["parameters"][contract.EVENT_ID]


FAILURES = {
    "hangs up": b"",
    "is not there yet": answer({"error": "try again"}, "503 Service Unavailable"),
    "has no server behind it": answer(b"upstream connect error", "502 Bad Gateway"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_append_is_sent_again_under_the_same_id(name):
    ids: list[str] = []

    def serve(connection: socket.socket) -> None:
        while request := request_of(connection):
            ids.append(event_id_of(request))
            connection.sendall(APPENDED if len(ids) % 3 == 0 else FAILURES[name])
            if len(ids) % 3 and not FAILURES[name]:
                return

    with listening(serve) as url, VivaceClient(url, "http", PATIENCE_S) as client:
        assert client.append("u", "a") == 3 == client.append("u", "a", event_id="mine")
    assert len(set(ids[:3])) == 1 and len(ids[0]) == 32 and ids[3:] == ["mine"] * 3


@pytest.mark.parametrize(
    "error", ["EVENT_TYPE: expected UTF-8", "feature store: not stored, as its disk is full or failing"]
)
def test_what_the_server_refuses_is_not_sent_again(error):
    status, ids = "503 Service Unavailable" if "disk" in error else "400 Bad Request", []

    def serve(connection: socket.socket) -> None:
        while request := request_of(connection):
            ids.append(event_id_of(request))
            connection.sendall(answer({"error": error}, status))

    with (
        listening(serve) as url,
        VivaceClient(url, "http", PATIENCE_S) as client,
        pytest.raises(VivaceError, match=error),
    ):
        client.append("u", "a")
    assert len(ids) == 1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_append_where_nobody_listens_fails_after_its_tries(protocol):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = "{}:{}".format(*server.getsockname())
    began = time.monotonic()
    with VivaceClient(url, protocol, PATIENCE_S) as client, pytest.raises(VivaceError, match=r"refused|connect"):
        client.append("u", "a")
    assert sum(RETRIES_S) <= time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_closed_client_is_closed(protocol):
    client = VivaceClient("127.0.0.1:9", protocol)
    client.close()
    client.close()
    for call in (lambda: client.recommend("u"), lambda: client.append("u", "a")):
        with pytest.raises(VivaceError, match="this client is closed"):
            call()

    async def run() -> None:
        other = AsyncVivaceClient("127.0.0.1:9", protocol)
        await other.close()
        with pytest.raises(VivaceError, match="this client is closed"):
            await other.recommend("u")

    asyncio.run(run())


def test_an_asyncio_client_belongs_to_its_loop():
    with pytest.raises(VivaceError, match="inside a running event loop"):
        AsyncVivaceClient("127.0.0.1:9")

    async def make() -> AsyncVivaceClient:
        return AsyncVivaceClient("127.0.0.1:9", "http")

    async def use(client: AsyncVivaceClient) -> None:
        with pytest.raises(VivaceError, match="made in another event loop"):
            await client.recommend("u")

    asyncio.run(use(asyncio.run(make())))


@pytest.mark.parametrize("value", [0, -1, "5", None, float("nan"), True])
def test_a_timeout_is_a_number_above_zero(value):
    with pytest.raises(ValueError, match="timeout_s: expected"):
        VivaceClient("127.0.0.1:9", timeout_s=value)
