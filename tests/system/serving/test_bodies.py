"""No body that Triton dies of gets through the door: a tripwire listens where Triton would, and nothing touches it."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading

import grpc
import psutil
import pytest

from serving.door.endpoints import Sockets, Turn
from serving.door.options import DoorOptions
from serving.door.process import Door
from serving.start_checks import free_port
from tests.support import PATIENCE_S, wait_until

INFER = "/v2/models/recommend/infer"
MIB = 1 << 20
GOOD = json.dumps({"inputs": []}).encode()


class Tripwire:
    """What arrives at Triton's HTTP and gRPC sockets."""

    def __init__(self, sockets: Sockets) -> None:
        self.arrived: list[bytes] = []
        self._listening = []
        for path in (sockets.http, sockets.grpc):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
            self._listening.append(listener)
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = listener.accept()
                begin = b""
                with contextlib.suppress(ConnectionError), connection:
                    begin = connection.recv(100)
                if begin and not begin.startswith(b"GET /v2/health/live "):  # the door's own question
                    self.arrived.append(begin)

    def close(self) -> None:
        for listener in self._listening:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """(door, tripwire)"""
    sockets = Sockets(tmp_path_factory.mktemp("s"))
    tripwire = Tripwire(sockets)
    ports = {f"{name}_port": free_port("127.0.0.1") for name in ("http", "grpc", "metrics")}
    options = DoorOptions(host="127.0.0.1", recovery_s=0.2, slow_client_s=2.0, **ports)
    running = Door(options, tmp_path_factory.mktemp("d"))
    running.point(lambda: {sockets: Turn.TAKES})
    with running:
        yield running, tripwire
    tripwire.close()


def answer(port: int, head: str, parts: list[bytes]) -> bytes:
    """The status line and what follows; a server that has heard enough may close before all is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as s:
        with contextlib.suppress(ConnectionError):
            s.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            for part in parts:
                s.sendall(part)
        try:
            return s.recv(4096)
        except ConnectionError:
            return b"HTTP/1.1 closed"


def chunks(body: bytes, size: int) -> list[bytes]:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


BOMB = gzip.compress(bytes(64 * MIB))
DEEP = b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CHUNKED = "Transfer-Encoding: chunked"
BODIES = {
    "a bomb": (f"Content-Encoding: gzip\r\nContent-Length: {len(BOMB)}", [BOMB], b" 415 "),
    "a bomb in chunks": (f"Content-Encoding: gzip\r\n{CHUNKED}", chunks(BOMB, 999), b" 415 "),
    "a bomb by another name": (f"Content-Encoding: GZip\r\nContent-Length: {len(BOMB)}", [BOMB], b" 415 "),
    "a bomb in two codings": (f"Content-Encoding: identity, gzip\r\nContent-Length: {len(BOMB)}", [BOMB], b" 415 "),
    "a bomb, named twice": (
        f"Content-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: {len(BOMB)}", [BOMB], b" 415 "
    ),
    "a bomb as deflate": (f"Content-Encoding: deflate\r\nContent-Length: {len(BOMB)}", [BOMB], b" 415 "),
    "a coded transfer": ("Transfer-Encoding: gzip, chunked", chunks(BOMB, 999), b" 501 "),
    "two lengths": (f"Content-Length: {len(GOOD)}\r\nContent-Length: 3", [GOOD], b" 400 "),
    "two lengths in one": (f"Content-Length: {len(GOOD)}, 3", [GOOD], b" 400 "),
    "a length below zero": ("Content-Length: -1", [GOOD], b" 400 "),
    "a length and chunks": (f"Content-Length: 5\r\n{CHUNKED}", chunks(GOOD, 3), b" 400 "),
    "chunks of no size": (CHUNKED, [b"zz\r\nxx\r\n0\r\n\r\n"], b" 400 "),
    "deep": (f"Content-Length: {len(DEEP)}", [DEEP], b" 400 "),
    "deep in chunks": (CHUNKED, chunks(DEEP, 1000), b" 400 "),
    "100 MB": (f"Content-Length: {100 * MIB}", [bytes(MIB)] * 100, b" 413 "),
    "100 MB in chunks": (CHUNKED, chunks(bytes(100 * MIB), MIB), b" 413 "),
    "100 MB that do not come": (f"Content-Length: {100 * MIB}", [b"{"], b" 408 "),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_nothing_of_a_hostile_body_reaches_triton(door, name):
    running, tripwire = door
    head, parts, status = BODIES[name]
    line = answer(running.options.http_port, head, parts)
    assert status in line.splitlines()[0] or line == b"HTTP/1.1 closed", line
    assert not tripwire.arrived and running.answers()
    assert psutil.Process(running.pid).memory_info().rss < 400 * MIB


def test_nothing_of_a_hostile_message_reaches_triton(door):
    running, tripwire = door
    with grpc.insecure_channel(
        f"127.0.0.1:{running.options.grpc_port}", [("grpc.max_send_message_length", -1)]
    ) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for message, how in ((bytes(100 * MIB), {}), (bytes(MIB), {"compression": grpc.Compression.Gzip})):
            with pytest.raises(grpc.RpcError) as refused:
                infer(message, timeout=PATIENCE_S, **how)
            assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)
    assert not tripwire.arrived


def test_the_tripwire_is_where_triton_would_be(door):
    """Else the tests above could not fail."""
    running, tripwire = door
    answer(running.options.http_port, f"Content-Length: {len(GOOD)}", [GOOD])
    wait_until(lambda: any(INFER.encode() in text for text in tripwire.arrived), "a good request at the tripwire")
    tripwire.arrived.clear()
