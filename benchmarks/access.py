"""What TLS and keys cost, and what a flood of one key does to another.

    python -m benchmarks.access artifacts/shop --turns 5

Cost: the same run behind the guard, with TLS, keys and limits and without, taking turns as in ``benchmarks.guard``.
Flood: a polite key asks ``recommend`` some times a second; beside it another key is idle, floods another door on the
same machine far above its limit, floods this one so, or floods it without a limit, in turns. The flood comes from a
process of its own at the lowest priority, which still takes of the same cores: "elsewhere" shows how much that is.
Differences and ratios are by turn. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from benchmarks.guard import AT_ONCE, MODES, measure
from benchmarks.turns import in_turns, spread, with_spread
from loadtest.generate.generator import METHOD, message
from loadtest.generate.local_server import on_free_ports
from loadtest.reports.record import record_line
from preprocessing.requests import recorded
from serving.door.keys import add_key
from serving.door.options import AccessOptions, DoorOptions
from serving.door.process import Door
from serving.door.tls import self_signed
from serving.launcher import TritonServer
from serving.start_checks import free_port
from vivace import contract
from vivace.client import VivaceClient, VivaceError
from vivace.client_request import request_tensors
from vivace.credentials import Credentials
from vivace.run import Run

BURST_S = 1.5  # the calls of a second that a limit lets through at once are over then
POLITE_A_SECOND, FLOOD_A_SECOND, LIMIT = 30, 600, 20
BESIDE = ("idle", "elsewhere", "limited", "unlimited")
KEYS = {"polite": 100_000, "limited": LIMIT, "unlimited": 100_000}


def flood(url: str, ca: Path, key: str, seconds: float) -> None:
    """Offers ``FLOOD_A_SECOND`` calls for ``seconds``, whatever comes back; prints how many of each code."""
    access = Credentials(key=key, ca=ca)
    sent = message(contract.ENSEMBLE, request_tensors(history=["-"] * 20))
    metadata = tuple((access.headers or {}).items())
    codes: Counter[str] = Counter()
    with access.channel(grpc, url) as channel:
        infer = channel.unary_unary(METHOD)
        with contextlib.suppress(grpc.RpcError):
            infer(sent, timeout=10, metadata=metadata, wait_for_ready=True)
        began, calls, told = time.monotonic(), list[Any](), False
        while (passed := time.monotonic() - began) < seconds + BURST_S:
            if passed > BURST_S and not told:
                told = True
                print("flooding", flush=True)
            for _ in range(int(passed * FLOOD_A_SECOND) - len(calls)):
                calls.append(infer.future(sent, timeout=10, metadata=metadata))
            time.sleep(0.01)
        for call in calls:
            codes[call.code().name] += 1
    print(dict(codes))


@contextlib.contextmanager
def flooding(url: str, ca: Path, key: str, seconds: float) -> Iterator[None]:
    """A flood by a process of its own, under way before the block begins and after it ends; none without a key."""
    if not key:
        yield
        return
    code = f"from benchmarks.access import flood; from pathlib import Path; flood({url!r}, Path({str(ca)!r}), "
    command = ["nice", "-n", "19", sys.executable, "-c", f"{code}{key!r}, {seconds + 1})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "flooding\n"
        yield
        print(f"  flood: {process.communicate()[0].strip()}")


def polite_ms(url: str, histories: list[list[str]], seconds: float, access: dict[str, Any]) -> tuple[list[float], int]:
    """Times of calls at ``POLITE_A_SECOND``, from when each was due, and how many were refused."""
    took, refused = list[float](), 0
    with VivaceClient(url, **access) as client:
        client.recommend(history=histories[0])
        began = time.monotonic()
        for n in range(int(seconds * POLITE_A_SECOND)):
            due = began + n / POLITE_A_SECOND
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                client.recommend(history=histories[n % len(histories)])
                took.append((time.monotonic() - due) * 1000)
            except VivaceError:
                refused += 1
    return took, refused


def cost(plain: TritonServer, asking: TritonServer, access: dict[str, Any], histories: list[list[str]], turns: int,
         seconds: float) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of ``guard.MODES``."""
    figures: dict[tuple[str, int, bool], list[dict[str, float]]] = {}
    for server in (plain, asking):
        measure(server, "grpc", AT_ONCE, histories, seconds, **(access if server is asking else {}))  # warm
    for _, server in in_turns(turns, (plain, asking)):
        for protocol, callers in MODES:
            more = access if server is asking else {}
            row = measure(server, protocol, callers, histories, seconds, **more)
            figures.setdefault((protocol, callers, server is asking), []).append(row)
    rows = []
    for protocol, callers in MODES:
        off, on = (figures[protocol, callers, access] for access in (False, True))
        more_ms = spread([b["p50_ms"] - a["p50_ms"] for a, b in zip(off, on, strict=True)])
        cpu = spread([b["cpu_ms"] / a["cpu_ms"] for a, b in zip(off, on, strict=True)])
        p50 = spread([b["p50_ms"] for b in on])
        envoy = spread([b["door_cpu_ms"] - a["door_cpu_ms"] for a, b in zip(off, on, strict=True)])
        share = spread(
            [(b["door_cpu_ms"] - a["door_cpu_ms"]) / a["cpu_ms"] for a, b in zip(off, on, strict=True)]
        )  # fmt: skip
        rows.append(
            {"protocol": protocol, "callers": callers, "p50_ms": p50, "more_ms": more_ms, "cpu_ratio": cpu,
             "more_of_envoy_ms": envoy, "more_of_envoy_share": share}
        )  # fmt: skip
        print(
            f"{protocol}, {callers} at once: p50 {with_spread(p50, 2)} ms with TLS and keys, "
            f"{with_spread(more_ms, 2)} more than without; processor time {with_spread(cpu, 2)} times, "
            f"Envoy's alone {with_spread(envoy, 3)} ms more, {with_spread(share, 3)} of all"
        )
    return rows


def beside_a_flood(
    server: TritonServer, other: Door, keys: dict[str, str], ca: Path, histories: list[list[str]], turns: int,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """p50 and p99 in ms of the polite key, and how many times those beside an idle key they are."""
    url, took = f"{server.host}:{server.grpc_port}", {beside: list[list[float]]() for beside in BESIDE}
    refused = dict.fromkeys(BESIDE, 0)
    for _, beside in in_turns(turns, BESIDE):
        at = f"127.0.0.1:{other.options.grpc_port}" if beside == "elsewhere" else url
        with flooding(at, ca, keys.get(beside.replace("elsewhere", "limited"), ""), seconds):
            times, count = polite_ms(url, histories, seconds, {"key": keys["polite"], "ca": ca})
            took[beside].append(times)
            refused[beside] += count
    result: dict[str, Any] = {}
    for beside in BESIDE:
        p99 = [float(np.percentile(t, 99)) for t in took[beside]]
        ratio = [a / float(np.percentile(b, 99)) for a, b in zip(p99, [*map(list, took["idle"])], strict=True)]
        every = np.concatenate(took[beside])
        result[beside] = {
            "p50_ms": round(float(np.median(every)), 3), "p99_of_all_ms": round(float(np.percentile(every, 99)), 3),
            "p99_ms": spread(p99), "p99_ratio": spread(ratio), "refused": refused[beside],
        }  # fmt: skip
        row = result[beside]
        print(
            f"beside another key that is {beside}: p50 {row['p50_ms']:.2f}, p99 {with_spread(row['p99_ms'], 2)} ms, "
            f"{with_spread(row['p99_ratio'], 2)} times; {refused[beside]} refused"
        )
    return result


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run, such as artifacts/shop")],
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of one measurement", min=0.5)] = 4.0,
    profile: Annotated[str, typer.Option(help="configs/<profile>.pbtxt")] = "",
    only: Annotated[str, typer.Option(help="cost or flood; both if empty")] = "",
) -> None:
    run = Run(root)
    histories = [list(h) for h in recorded(root)[contract.ITEM][:300]]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        file = Path(folder) / "keys.toml"
        keys = {name: add_key(file, name, rate=rate)[1] for name, rate in KEYS.items()}
        certificate, private_key, _ = self_signed(Path(folder) / "tls", "127.0.0.1")
        options = AccessOptions(keys=file, certificate=certificate, private_key=private_key)
        plain, asking = (
            servers.enter_context(
                TritonServer(on_free_ports(run.repository, profile, root / f"{name}.log", guard=True, access=access))
            )
            for name, access in (("open", AccessOptions()), ("asking", options))
        )
        access = {"key": keys["polite"], "ca": certificate}
        rows = cost(plain, asking, access, histories, turns, seconds) if only != "flood" else []
        folder_of_other = Path(folder) / "other"
        folder_of_other.mkdir()
        http, rpc, metrics = (free_port("127.0.0.1") for _ in range(3))
        listens = DoorOptions(host="127.0.0.1", http_port=http, grpc_port=rpc, metrics_port=metrics)
        other = servers.enter_context(Door(listens, folder_of_other, options))
        floods: dict[str, Any] = {}
        if only != "cost":
            floods = beside_a_flood(asking, other, keys, certificate, histories, turns, 3 * seconds)
    print(
        record_line(
            "access", turns=turns, seconds=seconds, profile=profile, cost=rows, flood=floods,
            rates={"polite": POLITE_A_SECOND, "flood": FLOOD_A_SECOND, "limit": LIMIT},
        )
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
