"""What of the guard's processor time is Envoy's own: the guard, beside Envoy with its router alone, before one Triton.

    python -m benchmarks.guard_parts artifacts/shop --turns 40 --before ../another-checkout

Each takes turns for a few requests, over gRPC and over HTTP, one after the other. The figure is the processor time of
the Envoy, all its threads, a request; that of Triton and of the caller is left out. "router": no checks, no limits,
gRPC to Triton's own gRPC and HTTP to its HTTP: what a proxy costs at the least. ``--before``: the guard of
another checkout as well. Ratios are by turn, to the guard of this one. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import tritonclient.http as triton_http
import typer

from benchmarks.turns import in_turns, quartiles
from loadtest.generate.generator import METHOD, message
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.door.endpoints import Sockets, pipe
from serving.door.process import envoy_binary
from serving.launcher import TritonServer
from serving.start_checks import free_port
from vivace import contract
from vivace.client_request import request_tensors
from vivace.http_pool import UnixConnection
from vivace.manifest import CHECKOUT
from vivace.run import Run

HOST = "127.0.0.1"
INFER = "/v2/models/recommend/infer"
FILTERS = "type.googleapis.com/envoy.extensions.filters"
GUARD, ROUTER, BEFORE = "guard", "router", "guard before"
# run in a checkout: writes what its guard's Envoy reads
WRITE = """
import sys
from pathlib import Path
from serving.door.config import render
from serving.door.endpoints import Sockets, Turn
from serving.door.options import DoorOptions
from serving.door.process import Door
folder, sockets, http, grpc, metrics = Path(sys.argv[1]), Sockets(Path(sys.argv[2])), *map(int, sys.argv[3:])
door = Door(DoorOptions(host="127.0.0.1", http_port=http, grpc_port=grpc, metrics_port=metrics), folder)
door.point(lambda: {sockets: Turn.TAKES})
door.files.bootstrap.write_text(render(door.options, door.files))
"""


@dataclass
class Proxy:
    """An Envoy that runs, and a caller's connection to each of its ports."""

    name: str
    pid: int
    grpc: grpc.Channel
    http: http.client.HTTPConnection

    def busy_us(self) -> float:
        """Processor time so far, to the nanosecond: ticks of 10 ms would hide a request's."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that ended
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1000


def _router(folder: Path, sockets: Sockets, ports: dict[str, int]) -> Path:
    """The bootstrap of an Envoy with nothing but routes."""
    listeners, clusters = [], []
    for name, socket in (("http", sockets.http), ("grpc", sockets.grpc)):
        manager = {
            "@type": f"{FILTERS}.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": name,
            "codec_type": "HTTP2" if name == "grpc" else "AUTO",
            "route_config": {"virtual_hosts": [
                {"name": name, "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]}
            ]},
            "http_filters": [{"name": "router", "typed_config": {"@type": f"{FILTERS}.http.router.v3.Router"}}],
        }  # fmt: skip
        address = {"socket_address": {"address": HOST, "port_value": ports[name]}}
        chain = {"filters": [{"name": "manager", "typed_config": manager}]}
        listeners.append({"name": name, "address": address, "filter_chains": [chain]})
        kind = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        protocol: dict[str, object] = (
            {"http2_protocol_options": {}} if name == "grpc" else {"http_protocol_options": {}}
        )
        place = {"lb_endpoints": [{"endpoint": {"address": pipe(socket)}}]}
        clusters.append({
            "name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": [place]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": kind, "explicit_http_config": protocol
                }
            },
        })  # fmt: skip
    bootstrap = folder / "envoy.json"
    admin = {"address": pipe(folder / "envoy-admin")}
    static = {"listeners": listeners, "clusters": clusters}
    bootstrap.write_text(json.dumps({"admin": admin, "static_resources": static}))
    return bootstrap


@contextlib.contextmanager
def proxy(name: str, checkout: Path, sockets: Sockets) -> Iterator[Proxy]:
    """An Envoy in front of ``sockets``: the guard of ``checkout``, or the router alone."""
    with tempfile.TemporaryDirectory(prefix="vivace-guard-") as text:
        folder, ports = Path(text), {port: free_port(HOST) for port in ("http", "grpc", "metrics")}
        if name == ROUTER:
            bootstrap = _router(folder, sockets, ports)
        else:
            command = [sys.executable, "-c", WRITE, str(folder), str(sockets.folder), *map(str, ports.values())]
            subprocess.run(command, cwd=checkout, check=True)
            bootstrap = folder / "envoy.json"
        command = [str(envoy_binary()), "-c", str(bootstrap), "--concurrency", "2", "--disable-hot-restart"]
        process = subprocess.Popen([*command, "--log-level", "error"], stdin=subprocess.DEVNULL)
        try:
            _wait_until_live(folder / "envoy-admin")
            connection = http.client.HTTPConnection(HOST, ports["http"], timeout=60)
            with grpc.insecure_channel(f"{HOST}:{ports['grpc']}") as channel, contextlib.closing(connection):
                yield Proxy(name, process.pid, channel, connection)
        finally:
            process.terminate()
            process.wait()


def _wait_until_live(admin: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(UnixConnection(admin, 2.0)) as connection,
        ):
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise TimeoutError("Envoy: expected it to be live within 20 s")


def http_request(history: list[str]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a call with binary tensors."""
    inputs = []
    for tensor, value in request_tensors(history=history, top_k=10):
        given = triton_http.InferInput(tensor.name, list(value.shape), tensor.datatype)
        inputs.append(given.set_data_from_numpy(value))
    body, length = triton_http.InferenceServerClient.generate_request_body(inputs)
    return bytes(body), {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}


def over_grpc(of: Proxy, histories: list[list[str]]) -> None:
    infer = of.grpc.unary_unary(METHOD)
    for history in histories:
        infer(message(contract.ENSEMBLE, request_tensors(history=history, top_k=10)), timeout=60)


def over_http(of: Proxy, histories: list[list[str]]) -> None:
    for history in histories:
        of.http.request("POST", INFER, *http_request(history))
        answer = of.http.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{of.name}: expected 200, got {answer.status}: {text[:200]!r}")


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    turns: Annotated[int, typer.Option(min=3)] = 40,
    requests: Annotated[int, typer.Option(min=1, help="of one turn and protocol")] = 20,
    before: Annotated[Path | None, typer.Option(help="a checkout whose guard is measured too", exists=True)] = None,
) -> None:
    histories = [list(h) for h in recorded(root)[contract.ITEM][:requests]]
    checkouts = {GUARD: CHECKOUT, ROUTER: CHECKOUT} | ({BEFORE: before} if before else {})
    busy: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        log = root / "guard-parts.log"
        server = stack.enter_context(TritonServer(on_free_ports(Run(root).repository, log=log, guard=True)))
        assert server.sockets is not None
        proxies = [stack.enter_context(proxy(name, path, server.sockets)) for name, path in checkouts.items()]
        for of in (*proxies, *proxies):
            over_grpc(of, histories)
            over_http(of, histories)
        for _, of in in_turns(turns, proxies):
            for protocol, ask in (("grpc", over_grpc), ("http", over_http)):
                began = of.busy_us()
                ask(of, histories)
                busy.setdefault((protocol, of.name), []).append((of.busy_us() - began) / len(histories))
    rows = []
    for (protocol, name), took in sorted(busy.items()):
        ratio = [a / b for a, b in zip(took, busy[protocol, GUARD], strict=True)]
        rows.append({"protocol": protocol, "envoy": name, "us": quartiles(took, 1), "to_guard": quartiles(ratio, 3)})
        print(f"{protocol}, {name}: {rows[-1]['us']} us a request, {rows[-1]['to_guard']} times the guard (quartiles)")
    print(record_line("guard-parts", turns=turns, requests=requests, rows=rows))


if __name__ == "__main__":
    typer.run(main)
