"""Who is let in: keys, certificates and limits, by the real Envoy, with a real Triton behind it and with nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serving.door.keys import add_key, digest, remove_key
from serving.door.options import AccessOptions
from serving.door.tls import make_pair
from serving.fleet import warm_up
from serving.service import service
from tests.support import PATIENCE_S, on_free_ports, quiet, wait_until
from vivace.client import AsyncVivaceClient, VivaceClient, VivaceError

PROTOCOLS = ["grpc", "http"]
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
        assert warm_up(server) < PATIENCE_S
        wait_until(lambda: server.door.told_ready, "a server that is ready, as its own questions are answered")
        ports = {"grpc": server.grpc_port, "http": server.http_port}
        yield Shop(ports, keys, file, certificate, cert)
        assert watchdog.health.ready, watchdog.health.faults


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
        assert client.recommend(history=HISTORY).items
        for call in (
            lambda: client.append("nobody", "sku-00001"),
            lambda: client.remove_items(["sku-00001"]),
            lambda: client.forget("nobody"),
        ):
            with pytest.raises(VivaceError, match="may only read"):
                call()
    with shop.client(protocol, "writer") as client:
        assert client.recommend("nobody").status != "error" and client.append(f"writer-{protocol}", "sku-00001") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_needs_tls_and_a_certificate(shop, protocol):
    url, key = f"127.0.0.1:{shop.ports[protocol]}", shop.keys["writer"]
    for access in ({"ca": ""}, {"ca": shop.ca}, {"tls": True, "ca": "", "cert": shop.cert}):
        with VivaceClient(url, protocol, timeout_s=5, key=key, **access) as client, pytest.raises(VivaceError):
            client.recommend(history=HISTORY)


def test_a_plain_caller_is_told_that_this_port_takes_tls(shop):
    with (
        VivaceClient(f"127.0.0.1:{shop.ports['http']}", "http", timeout_s=PATIENCE_S, key="x") as client,
        pytest.raises(VivaceError, match="takes TLS only"),
    ):
        client.recommend(history=HISTORY)


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
