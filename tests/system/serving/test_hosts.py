"""One door before guards of other machines: calls reach those that answer, and one that is silent costs little."""

from __future__ import annotations

import socket
import time
import urllib.request
from dataclasses import replace

import pytest

from serving.door.endpoints import RECOMMEND
from serving.door.hosts import Upstream, parse_hosts
from serving.door.options import AccessOptions, DoorOptions
from serving.door.process import Door
from serving.door.tls import make_pair
from serving.hosts import HostsDoor, HostsDoorOptions
from serving.launcher import TritonServer
from serving.start_checks import free_port
from serving.wheel import ServerError
from tests.support import PatientClient, on_free_ports, own_copy, quiet, wait_until
from tests.system.serving.test_versions import HISTORY
from vivace.run import Run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A certificate for 127.0.0.1 and its key in one file; its own authority."""
    certificate, key = make_pair(tmp_path_factory.mktemp("tls"), ["127.0.0.1"])
    certificate.write_text(certificate.read_text() + key.read_text())
    return certificate


@pytest.fixture(scope="module")
def host(root, tmp_path_factory, pair):
    """A server of a copy of the small shop whose guard wants a certificate of ``pair``, as on another machine."""
    run = Run(own_copy(root, tmp_path_factory.mktemp("hosts")))
    access = AccessOptions(certificate=pair, private_key=pair, client_ca=pair)
    with TritonServer(on_free_ports(run.repository, guard=True, profile="fused", access=access)) as server:
        assert isinstance(server.door, Door)
        server.door.tell_ready(True)
        yield server


@pytest.fixture(scope="module")
def silent():
    """A port of a machine that is there and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_calls_are_answered_by_whoever_speaks(host, silent, pair):
    told = []
    hosts = parse_hosts(f"127.0.0.1:{silent},127.0.0.1:{host.http_port}:{host.grpc_port}")
    options = HostsDoorOptions(
        upstream=Upstream(hosts=hosts, ca=pair, cert=pair), http_port=0, grpc_port=0, metrics_port=0
    )
    with HostsDoor(options, told.append) as door:
        o = door.options
        wait_until(lambda: (door.look(), list(door.well.values()))[1] == [False, True], "one that is well")
        of_silent = [line for line in told if line.startswith(f"127.0.0.1:{silent}:")]
        assert of_silent == [f"127.0.0.1:{silent}: no answer in 1 s; others are asked"]
        began = time.monotonic()
        for protocol, port in (("grpc", o.grpc_port), ("http", o.http_port)):
            with PatientClient(f"127.0.0.1:{port}", protocol) as client:
                assert len({tuple(client.recommend(history=HISTORY, top_k=5).items) for _ in range(10)}) == 1
                assert client.append(f"over {protocol}", HISTORY[0], "view") == 1
        assert time.monotonic() - began < 10
        with urllib.request.urlopen(f"http://127.0.0.1:{o.metrics_port}/metrics") as page:
            text = page.read().decode()
        assert f'vivace_host_up{{host="127.0.0.1:{host.http_port}"}} 1.0' in text
        host.door.refuse()  # as a guard that stops: what it refuses, an event too, is asked of another, or refused
        wait_until(lambda: (door.look(), list(door.well.values()))[1] == [False, False], "none that is well")
        host.door.ask("POST", "/runtime_modify?vivace.stopping=0&vivace.unready=0")
        wait_until(lambda: (door.look(), list(door.well.values()))[1] == [False, True], "it is well again")


def calls_of(door: HostsDoor) -> dict[str, int]:
    """Calls of ``recommend`` that each server was sent, by its address."""
    lines = [x.split("::") for x in door.door.ask("GET", "/clusters").splitlines() if x.startswith(f"{RECOMMEND}::")]
    return {x[1]: int(x[3]) for x in lines if len(x) == 4 and x[2] == "rq_total"}


def test_a_users_calls_go_to_one_server_and_users_to_all(host, pair):
    real = Upstream(hosts=parse_hosts(f"127.0.0.1:{host.http_port}:{host.grpc_port}"), ca=pair, cert=pair)
    ports, users = dict(http_port=0, grpc_port=0, metrics_port=0), [f"ü/{n}\n" for n in range(24)]
    with (
        HostsDoor(HostsDoorOptions(upstream=real, **ports), quiet) as one,
        HostsDoor(HostsDoorOptions(upstream=real, **ports), quiet) as other,
    ):
        both = ",".join(f"127.0.0.1:{d.options.http_port}:{d.options.grpc_port}" for d in (one, other))
        options = HostsDoorOptions(upstream=Upstream(hosts=parse_hosts(both)), balance="user", **ports)
        with HostsDoor(options, quiet) as door:
            wait_until(lambda: (door.look(), list(door.well.values()))[1] == [True, True], "two that are well")
            o = door.options
            with (
                PatientClient(f"127.0.0.1:{o.grpc_port}") as grpc,
                PatientClient(f"127.0.0.1:{o.http_port}", "http") as http,
            ):
                strays, slow, before = 0, 0, calls_of(door)
                taken = dict.fromkeys(before, 0)
                for user in users:
                    for client in (grpc, http, grpc, http):
                        began = time.monotonic()
                        client.recommend(user, history=HISTORY, top_k=5)
                        slow += time.monotonic() - began >= DoorOptions.try_s
                    after = calls_of(door)
                    sent = {address: after[address] - before[address] for address in after}
                    strays, before = strays + min(sent.values()), after
                    taken[max(sent, key=sent.__getitem__)] += 1
    assert strays <= 2 + slow, "but for what was slow and asked of another as well"
    assert min(taken.values()) >= 1 and sum(taken.values()) == len(users)


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("another authority", "its certificate is not of the authority in --hosts-ca"),
        ("no certificate", "it wants a certificate; give --hosts-cert"),
        ("another certificate", "the authority of --hosts-cert is none of its --client-ca"),
        ("no tls", "it takes TLS only; give --hosts-ca"),
    ],
)
def test_hosts_that_are_not_trusted_are_not_asked_and_the_reason_is_told(host, pair, tmp_path, shown, words):
    other, key = make_pair(tmp_path, ["127.0.0.1"])
    other.write_text(other.read_text() + key.read_text())
    asked = {
        "another authority": {"ca": other}, "no certificate": {"ca": pair},
        "another certificate": {"ca": pair, "cert": other}, "no tls": {},
    }  # fmt: skip
    told = []
    hosts = parse_hosts(f"127.0.0.1:{host.http_port}:{host.grpc_port}")
    options = HostsDoorOptions(upstream=Upstream(hosts=hosts, **asked[shown]), http_port=0, grpc_port=0, metrics_port=0)
    with HostsDoor(options, told.append) as door:
        wait_until(lambda: (door.look(), list(door.well.values()))[1] == [False], "nobody that is trusted")
    assert words in told[0], told


def test_a_door_is_no_server_of_its_own(tmp_path):
    port = free_port("127.0.0.1")
    options = HostsDoorOptions(
        upstream=Upstream(hosts=parse_hosts(f"127.0.0.1:{port}")), http_port=port, grpc_port=0, metrics_port=0
    )
    for listening in (options, replace(options, host="0.0.0.0", access=AccessOptions(insecure_network=True))):
        with pytest.raises(ServerError, match="is where this door itself listens"):
            listening.checked()
