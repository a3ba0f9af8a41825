"""Why two sides of a TLS connection do not trust each other, told apart on real connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest

from serving.door.tls import make_pair
from serving.door.trust import distrust
from tests.unit.serving.test_tls import dated
from vivace.credentials import Credentials
from vivace.http_pool import HttpPool


@contextlib.contextmanager
def listening(certificate, key):
    """A TLS server of one connection, by its address; with its key None it speaks plainly."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if key is None:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.recv(1000)
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate, key)
                context.wrap_socket(connection, server_side=True).recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("kind", ["unknown", "name", "expired", "not yet", "plain"])
def test_each_reason_has_its_words(tmp_path, kind):
    good, key = make_pair(tmp_path / "good", ["127.0.0.1"])
    shown, trusted, name = (good, key), good, ""
    if kind == "unknown":
        trusted, _ = make_pair(tmp_path / "else", ["127.0.0.1"])
        words = r"not of the authority in --shard-ca"
    elif kind == "name":
        shown = make_pair(tmp_path / "name", ["127.0.0.9"])
        trusted, words = shown[0], "for another address than the one in --shard-hosts"
    elif kind in ("expired", "not yet"):
        old = ("20200101000000Z", "20200201000000Z")
        shown = dated(tmp_path, kind[:3], *(old if kind == "expired" else ("20900101000000Z", "20910101000000Z")))
        name, trusted, words = "localhost", shown[0], "has expired" if kind == "expired" else "not valid yet"
    else:
        shown, words = (good, None), "it speaks no TLS"
    with listening(*shown) as address, pytest.raises(ssl.SSLError) as refused:
        HttpPool(address, Credentials(key="", ca=trusted, server_name=name)).post("/", b"", {}, 5.0)
    assert words in distrust(refused.value), distrust(refused.value)
