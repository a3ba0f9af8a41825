"""Who is let in: keys, certificates and limits, by the real Envoy, with a real Triton behind it and with nobody."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from serving.door.access import PROBES_RATE
from serving.door.keys import add_key, digest, remove_key
from serving.door.options import AccessOptions, DoorOptions
from serving.door.process import Door
from serving.door.tls import make_pair
from serving.service import service
from serving.start_checks import free_port
from tests.support import PATIENCE_S, on_free_ports, quiet, wait_until
from vivace.client import AsyncVivaceClient, VivaceClient, VivaceError

PROTOCOLS = ["grpc", "http"]
FLOOD_RATE = 5  # calls a second that a key may make
HISTORY = ["sku-00001", "sku-00002"]


@dataclass(frozen=True)
class Shop:
    """A server with keys, TLS and certificates of callers."""

    ports: dict[str, int]
    keys: dict[str, str]
    """By name."""
    file: Path
    ca: Path
    cert: tuple[Path, Path]

    def client(self, protocol: str, name: str = "", **more) -> VivaceClient:
        access = {"key": self.keys.get(name, name), "ca": self.ca, "cert": self.cert} | more
        return VivaceClient(f"127.0.0.1:{self.ports[protocol]}", protocol, timeout_s=PATIENCE_S, **access)


def expired(file: Path, name: str, key: str) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with file.open("a") as f:
        f.write(f'{name} = {{ sha256 = "{digest(key)}", expires = {yesterday:%Y-%m-%d} }}\n')


@pytest.fixture(scope="module")
def shop(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("access")
    file = folder / "keys.toml"
    keys = {name: add_key(file, name, rate=500, write=name == "writer")[1] for name in ("writer", "reader")}
    keys["late"] = "late-key"
    expired(file, "late", keys["late"])
    certificate, private_key = make_pair(folder / "server", ["localhost", "127.0.0.1"])
    cert = make_pair(folder / "caller", ["caller"])
    access = AccessOptions(keys=file, certificate=certificate, private_key=private_key, client_ca=cert[0])
    options = on_free_ports(root / "model_repository", guard=True, access=access)
    with service(options, quiet) as (server, watchdog):
        wait_until(lambda: server.door.told_ready, "a server that is ready, as its own questions are answered")
        ports = {"grpc": server.grpc_port, "http": server.http_port}
        yield Shop(ports, keys, file, certificate, cert)
        wait_until(lambda: watchdog.health.ready, "a server that is well after all of it")


REFUSED = {
    "": "expected one, got none", "vivace_other": "not one of this server's", "late": "key late: has expired",
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_caller_without_a_good_key_is_told_so(shop, name, protocol):
    with shop.client(protocol, name) as client:
        for call in (lambda: client.recommend(history=HISTORY), lambda: client.append("ann", "sku-00001")):
            with pytest.raises(VivaceError, match=REFUSED[name]):
                call()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_key_that_reads_does_not_write(shop, protocol):
    with shop.client(protocol, "reader") as client:
        assert client.recommend(history=HISTORY).items and client.explain(history=HISTORY).items
        for call in (
            lambda: client.append("nobody", "sku-00001"),
            lambda: client.remove_items(["sku-00001"]),
            lambda: client.forget("nobody"),
        ):
            with pytest.raises(VivaceError, match="may only read") as refused:
                call()
            if protocol == "grpc":
                assert refused.value.__cause__.status() == "StatusCode.PERMISSION_DENIED"
    with shop.client(protocol, "writer") as client:
        assert client.recommend("nobody").status != "error" and client.append(f"writer-{protocol}", "sku-00001") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_needs_tls_and_a_certificate(shop, protocol):
    url, key = f"127.0.0.1:{shop.ports[protocol]}", shop.keys["writer"]
    for access in ({"ca": ""}, {"ca": shop.ca}, {"tls": True, "ca": "", "cert": shop.cert}):
        with VivaceClient(url, protocol, timeout_s=5, key=key, **access) as client, pytest.raises(VivaceError):
            client.recommend(history=HISTORY)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_plain_caller_is_told_that_this_port_takes_tls(shop, protocol):
    with VivaceClient(f"127.0.0.1:{shop.ports[protocol]}", protocol, timeout_s=PATIENCE_S, key="x") as client:
        for history in (HISTORY, ["a long one"] * 200_000):  # of which it reads nothing before it answers
            with pytest.raises(VivaceError, match="takes TLS only"):
                client.recommend(history=history)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_asynchronous_client_and_the_environment(shop, protocol, monkeypatch):
    monkeypatch.setenv("VIVACE_KEY", shop.keys["reader"])
    monkeypatch.setenv("VIVACE_TLS_CA", str(shop.ca))

    async def ask() -> list[str]:
        url = f"127.0.0.1:{shop.ports[protocol]}"
        async with AsyncVivaceClient(url, protocol, timeout_s=PATIENCE_S, cert=shop.cert) as client:
            with pytest.raises(VivaceError, match="may only read"):
                await client.append("nobody", "sku-00001")
            return (await client.recommend(history=HISTORY)).items

    with shop.client(protocol, "writer") as client:
        assert asyncio.run(ask()) == client.recommend(history=HISTORY).items


def test_keys_that_are_added_and_removed_count_at_once(shop):
    kept, key = add_key(shop.file, "guest")
    with shop.client("grpc", key) as client:

        def answered() -> bool:
            with contextlib.suppress(VivaceError):
                return bool(client.recommend(history=HISTORY).items)
            return False

        wait_until(answered, "the new key taken")
        before = shop.file.read_text()
        shop.file.write_text("guest = nonsense")  # what is broken changes nothing
        time.sleep(2.5)
        assert answered()
        shop.file.write_text(before)
        remove_key(shop.file, kept.name)
        wait_until(lambda: not answered(), "the key refused")


# -- with nobody behind the door: who is let in gets its 404 ----------------------------------------------------------
@contextlib.contextmanager
def door(tmp_path_factory, access):
    """A door with nobody behind it."""
    ports = {f"{name}_port": free_port("127.0.0.1") for name in ("http", "grpc", "metrics")}
    with Door(DoorOptions(host="127.0.0.1", **ports), tmp_path_factory.mktemp("d"), access) as alone:
        yield alone


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(door, file of keys, key by name); http alone is looked at, without TLS."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys = {f"of {n} bytes": "k" * n for n in (1, 54, 55, 56, 63, 64, 65, 119, 120, 200)} | {"known": "good"}
    file.write_text("".join(f'k{n} = {{ sha256 = "{digest(key)}" }}\n' for n, key in enumerate(keys.values())))
    keys |= {name: add_key(file, name, rate=rate)[1] for name, rate in (("flood", FLOOD_RATE), ("polite", 1000))}
    with door(tmp_path_factory, AccessOptions(keys=file)) as running:
        yield running, file, keys


def asked(port: int, path: str = "/nowhere", *authorization: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.putrequest("GET", path)
        for value in authorization:
            connection.putheader("Authorization", value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_a_key_of_any_length_is_known_by_its_digest(alone):
    running, _, keys = alone
    for key in keys.values():
        assert asked(running.options.http_port, "/nowhere", f"Bearer {key}")[0] == 404
        assert asked(running.options.http_port, "/nowhere", f"Bearer {key}x")[0] == 401


HEADERS = {
    "none": (), "another scheme": ("Basic good",), "no scheme": ("good",), "no key": ("Bearer ",),
    "two": ("Bearer good", "Bearer good"), "two in one": ("Bearer good, Bearer good",), "more": ("Bearer good more",),
    "far too long": ("Bearer " + "x" * 5000,), "bytes": ("Bearer \xff\xfe",), "Lua": ('Bearer "]=nil--',),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("which", ["http_port", "metrics_port"])
def test_anything_else_is_refused_with_a_sentence(alone, name, which):
    status, text = asked(getattr(alone[0].options, which), "/metrics", *HEADERS[name])
    assert status == 401 and text.startswith('{"error":"key: '), (status, text)


@pytest.mark.parametrize("spelling", ["Bearer good", "bearer good", "BEARER  good "])
def test_a_scheme_is_spelt_as_one_likes(alone, spelling):
    assert asked(alone[0].options.http_port, "/nowhere", spelling)[0] == 404


def test_headers_of_our_own_open_nothing(alone):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", alone[0].options.http_port)) as connection:
        connection.request("GET", "/nowhere", headers={"x-vivace-key": "polite", "x-vivace-access": "write"})
        assert connection.getresponse().status == 401


def test_a_flood_is_limited_and_a_polite_key_is_not(alone):
    running, _, keys = alone
    port = running.options.http_port
    began = time.monotonic()
    flood = [asked(port, "/nowhere", f"Bearer {keys['flood']}") for _ in range(40)]
    most = FLOOD_RATE * (2 + time.monotonic() - began)  # of each second that it touched
    assert {status for status, _ in flood} == {404, 429} and sum(s == 404 for s, _ in flood) <= most
    assert any("more calls a second than it has" in text for _, text in flood)
    assert {asked(port, "/nowhere", f"Bearer {keys['polite']}")[0] for _ in range(40)} == {404}
    channel = grpc.insecure_channel(f"127.0.0.1:{running.options.grpc_port}")
    call, codes = channel.unary_unary("/x/y"), set()
    for _ in range(40):
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", metadata=(("authorization", f"Bearer {keys['flood']}"),), timeout=PATIENCE_S)
        codes.add(refused.value.code())
    assert codes == {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    with pytest.raises(grpc.RpcError) as refused:
        call(b"", timeout=PATIENCE_S)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED and "got none" in refused.value.details()


def test_probes_need_no_key_but_have_a_limit(alone):
    answers, port = set(), alone[0].options.http_port
    with ThreadPoolExecutor(8) as pool:

        def both() -> bool:  # a second has so many more than are let through, however slow the machine is
            answers.update(pool.map(lambda _: asked(port, "/v2/health/ready?x=1")[0], range(4 * PROBES_RATE)))
            return answers >= {503, 429}

        wait_until(both, "not ready, and not for everybody at once")
    assert answers == {503, 429}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_a_certificate_that_is_renewed_is_taken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = make_pair(folder, ["localhost", "127.0.0.1"])
    access = AccessOptions(certificate=certificate, private_key=key)
    with door(tmp_path_factory, access) as running:
        address = ("127.0.0.1", running.options.http_port)
        assert ssl.get_server_certificate(address) == certificate.read_text()
        old = key.read_text()
        key.write_text("half a renewal")
        time.sleep(2.5)
        assert ssl.get_server_certificate(address) == certificate.read_text()
        key.write_text(old)
        make_pair(folder, ["localhost", "127.0.0.1"])
        wait_until(lambda: ssl.get_server_certificate(address) == certificate.read_text(), "the new certificate")
        versions = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        assert [speaks(address, version) for version in versions] == [False, False, True, True]


def speaks(address: tuple[str, int], version: ssl.TLSVersion) -> bool:
    context = ssl._create_unverified_context()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with contextlib.suppress(OSError), socket.create_connection(address) as s, context.wrap_socket(s) as encrypted:
        return bool(encrypted.version())
    return False
