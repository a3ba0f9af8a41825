"""Vivace beside its peers: one machine, one run, the same weights, requests, answers and load.

    python -m benchmarks.peers.compare artifacts/ml-1m --tuned tuned

Each peer has an environment of its own under .tools/peers (its packages beside those of this one) and must first give
the answers that the ensemble gives. Then, each in turn and ``--rounds`` times: latency of one request at a time, the
knee under open-loop load (largest rate with 99 % within the objective), processor time a request there, memory. The
last line of stdout is one JSON object; ``--out`` keeps it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import grpc
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2

from loadtest.generate.open_loop import (
    METHOD,
    CallError,
    Run,
    best,
    complete,
    due_times,
    knee,
    message,
    messages,
    offer,
    picks,
    summarize,
)
from preprocessing.requests import recorded
from serving.launcher import ServerOptions, TritonServer, free_port
from serving.repository import served_from
from vivace import contract
from vivace.client import VivaceClient
from vivace.machine import cpu
from vivace.manifest import CHECKOUT, commit

HERE = Path(__file__).resolve().parent
TOP_K, CHECKED, ALONE = 10, 40, 300
READY_S = 120.0

console = Console(width=120)

Call = Callable[[bytes], Awaitable[Any]]


def environment(name: str) -> Path:
    """Python of the peer's own environment, made on first use: its packages before those of this environment."""
    folder = CHECKOUT / ".tools" / "peers" / name
    python, wanted = folder / "bin" / "python", (HERE / f"{name}.txt").read_text()
    done = folder / ".ready"
    if not done.exists() or done.read_text() != wanted:
        console.print(f"setting up {name}")
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        ours = next(p for p in sys.path if p.endswith("site-packages"))
        (site / "beside.pth").write_text(f"{ours}\n{CHECKOUT}\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / f"{name}.txt"], check=True)
        done.write_text(wanted)
    return python


@dataclass(frozen=True)
class Served:
    """A running system: how it is called, its requests (bytes on the wire), its process."""

    pid: int
    sent: list[bytes]
    connect: Callable[[], Any]  # an async context manager that yields a Call
    items: Callable[[str, list[str]], list[str]]  # items that it answers to a user's history


class Http:
    """JSON over HTTP to ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Call:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=512), timeout=aiohttp.ClientTimeout(total=10)
        )

        async def call(body: bytes) -> bytes:
            try:
                headers = {"Content-Type": "application/json"}
                async with self.session.post(self.url, data=body, headers=headers) as reply:
                    answer = await reply.read()
                    if reply.status != 200:
                        raise CallError(f"HTTP {reply.status}")
                    return answer
            except (aiohttp.ClientError, TimeoutError) as error:
                raise CallError(type(error).__name__) from None

        return call

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()


class Grpc:
    """Triton's gRPC at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Call:
        self.channel = grpc.aio.insecure_channel(self.url)
        method = self.channel.unary_unary(METHOD)

        async def call(message: bytes) -> Any:
            return await method(message, timeout=10, wait_for_ready=True)

        return call

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()


@contextmanager
def vivace(root: Path, profile: str) -> Iterator[Served]:
    folder = served_from(root, profile)
    options = ServerOptions(
        folder / "model_repository", http_port=0, grpc_port=0, metrics_port=0, profile=profile, log=root / "peers.log"
    )
    with TritonServer(options) as server:
        url = f"{server.host}:{server.grpc_port}"

        def items(user: str, history: list[str]) -> list[str]:
            with VivaceClient(url) as client:
                return client.recommend("", history, TOP_K).items

        yield Served(server.pid, messages(root, TOP_K), lambda: Grpc(url), items)


def strings(values: list[str]) -> np.ndarray:
    return np.array([v.encode() for v in values], object)


def ragged(history: list[str]) -> bytes:
    """A history as Merlin's ensemble takes a list column: its values, and where each row begins and ends."""
    values = contract.WireTensor(f"{contract.ITEM}__values", "BYTES", (-1,))
    return message(contract.ENSEMBLE, [
        (values, strings(history)),
        (contract.WireTensor(f"{contract.ITEM}__offsets", "INT32", (-1,)), np.array([0, len(history)], np.int32)),
    ])  # fmt: skip


def batched(history: list[str]) -> bytes:
    return message(
        contract.ENSEMBLE, [(contract.WireTensor(contract.ITEM, "BYTES", (-1,)), strings(history).reshape(1, -1))]
    )


@contextmanager
def merlin(root: Path, kind: str) -> Iterator[Served]:
    """Merlin Systems 23.8 on the same tritonserver: "stock" as its code exports it, "best" as made by hand."""
    python, names = environment("merlin"), item_names(root)
    with tempfile.TemporaryDirectory(prefix="vivace-merlin-") as whole:
        folder = str(Path(whole) / "repository")  # beside it what Categorify leaves where it runs
        command = [str(python), "-m", "benchmarks.peers.merlin_export", str(root.resolve()), folder, kind]
        done = subprocess.run(command, cwd=whole, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"Merlin, {kind}: not exported:\n{done.stderr[-2000:]}")
        stages = sorted(
            d.name for d in Path(folder).iterdir() if d.name != contract.ENSEMBLE
        )  # its first model calls them
        options = ServerOptions(
            Path(folder), http_port=0, grpc_port=0, metrics_port=0, log=root / f"peer-merlin-{kind}.log", python=python,
            extra=tuple(f"--load-model={s}" for s in stages),
        )  # fmt: skip
        encode = {"stock": ragged, "best": batched}[kind]
        with TritonServer(options) as server:
            url = f"{server.host}:{server.grpc_port}"

            def items(_: str, history: list[str]) -> list[str]:
                async def ask() -> Any:
                    async with Grpc(url) as call:
                        return await call(encode(history))

                answer = service_pb2.ModelInferResponse.FromString(complete(ask()))
                place = [t.name for t in answer.outputs].index("ids")
                ids = np.frombuffer(answer.raw_output_contents[place], np.int64)
                return [names[i] for i in ids if i >= contract.FIRST_ID]

            yield Served(server.pid, [encode(list(h)) for h in recorded(root)[contract.ITEM]], lambda: Grpc(url), items)


def item_names(root: Path) -> list[str]:
    """Raw item ids by number, for systems that answer numbers."""
    version = json.loads((root / "compiled" / "manifest.json").read_text())["results"]["version"]
    path = root / "model_repository" / contract.RESPONSE / str(version) / "items.json"
    return [""] * contract.FIRST_ID + json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def http_peer(root: Path, name: str, arguments: Callable[[int], list[str]], **more: str) -> Iterator[Served]:
    """A peer that answers POST /predict, with the Python of its own environment."""
    import urllib.error
    import urllib.request

    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}/predict"
    environ = {**os.environ, "VIVACE_ROOT": str(root.resolve()), "PYTHONPATH": str(CHECKOUT), **more}
    with (root / f"peer-{name}.log").open("w") as log:
        process = subprocess.Popen(
            [str(environment(name)), *arguments(port)], cwd=CHECKOUT, env=environ, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def ask(body: bytes) -> dict[str, Any]:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return dict(json.load(reply))

    body = lambda history: json.dumps({"history": history, "top_k": TOP_K}).encode()  # noqa: E731
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                ask(body([]))
                break
            except (OSError, ValueError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"{name}: did not start; see {root / f'peer-{name}.log'}") from None
                time.sleep(0.5)
        sent = [body(list(h)) for h in recorded(root)[contract.ITEM]]
        yield Served(process.pid, sent, lambda: Http(url), lambda _, history: list(ask(body(history))["item_id"]))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def fastapi(port: int) -> list[str]:
    return ["-m", "uvicorn", "benchmarks.peers.fastapi_app:app", "--port", str(port), "--log-level", "warning"]


def litserve(root: Path) -> Callable[[int], list[str]]:
    return lambda port: ["-m", "benchmarks.peers.litserve_app", str(root.resolve()), str(port)]


def processes(pid: int) -> list[psutil.Process]:
    own = psutil.Process(pid)
    return [own, *own.children(recursive=True)]


def processor_s(pid: int) -> float:
    return float(sum(sum(p.cpu_times()[:2]) for p in processes(pid)))


def memory_mib(pid: int) -> float:
    """Proportional set size: shared pages are counted once."""
    return float(sum(p.memory_full_info().pss for p in processes(pid)) / 2**20)


@dataclass
class Row:
    """What one system did in one round. Times in ms."""

    system: str
    p50: float
    p99: float
    knee: float
    cpu_ms: float
    mib: float
    runs: list[Run]


def measure(system: str, served: Served, slo: float, seconds: float, first: float) -> Row:
    def go(due: np.ndarray, which: np.ndarray, length: float) -> Run:
        async def inside() -> list[Any]:
            async with served.connect() as call:
                await call(served.sent[0])
                return await offer(call, due, [served.sent[i] for i in which])

        return summarize(complete(inside()), len(due) / length, length, slo)

    async def alone() -> list[float]:
        times = []
        async with served.connect() as call:
            for i in range(ALONE + 20):
                t = time.perf_counter()
                await call(served.sent[i])
                times.append((time.perf_counter() - t) * 1000)
        return times[20:]

    times = complete(alone())
    used: dict[float, float] = {}

    def at(rate: float) -> Run:
        due = due_times("poisson", rate, seconds, 7)
        before = processor_s(served.pid)
        found = go(due, picks(len(due), len(served.sent), 0.7, 7), seconds)
        used[found.qps] = (processor_s(served.pid) - before) * 1000 / len(due)
        return found

    runs = knee(at, first, steps=4)
    top = best(runs)
    p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
    return Row(
        system, p50, p99, top.qps if top else 0.0, used[top.qps] if top else float("nan"), memory_mib(served.pid), runs
    )


def checked(system: str, served: Served, expected: list[list[str]], cases: list[list[str]]) -> None:
    """Raises ValueError unless the system answers as the ensemble does (items of equal score may change places)."""
    same = sum(set(served.items("", h)) == set(e) for h, e in zip(cases, expected, strict=True))
    if same < len(cases) * 0.95:
        raise ValueError(f"{system}: {same} of {len(cases)} answers are the ensemble's; not the same work")


def main(
    root: Annotated[Path, typer.Argument(help="the run, artifacts/<name>; its weights are what all serve")],
    tuned: Annotated[list[str], typer.Option(help="profiles of ours beside the untuned")] = ["fused"],  # noqa: B006
    other: Annotated[list[str], typer.Option(help="profiles that may answer otherwise (compressed)")] = [],  # noqa: B006
    slo: Annotated[float, typer.Option(help="ms")] = 20.0,
    seconds: Annotated[float, typer.Option(help="of one run")] = 5.0,
    rounds: int = 1,
    out: Annotated[Path | None, typer.Option(help="file for the JSON")] = None,
) -> None:
    cases = [list(h) for h in recorded(root)[contract.ITEM].head(CHECKED)]
    systems: dict[str, Callable[[], Any]] = {
        "Vivace, untuned ensemble": lambda: vivace(root, ""),
        **{f"Vivace, {p}": partial(vivace, root, p) for p in (*tuned, *other)},
        "FastAPI, PyTorch, its threads": lambda: http_peer(root, "fastapi", fastapi),
        "FastAPI, PyTorch, one thread": lambda: http_peer(root, "fastapi", fastapi, VIVACE_TORCH_THREADS="1"),
        "LitServe, PyTorch, batches": lambda: http_peer(root, "litserve", litserve(root)),
        "Merlin Systems, as exported": lambda: merlin(root, "stock"),
        "Merlin, by hand": lambda: merlin(root, "best"),
    }
    expected: list[list[str]] = []
    rows: list[Row] = []
    failed: dict[str, str] = {}  # a peer that does not run costs its own row alone
    for _round in range(rounds):
        for system, start in systems.items():
            try:
                with start() as served:
                    if not expected:
                        expected = [served.items("", h) for h in cases]
                    if system.removeprefix("Vivace, ") not in other:
                        checked(system, served, expected, cases)
                    rows.append(measure(system, served, slo, seconds, 40.0))
            except Exception as error:
                if system.startswith("Vivace"):
                    raise
                failed[system] = f"{type(error).__name__}: {error}"
                console.print(f"{system}: {failed[system]}", style="red", markup=False)
                continue
            r = rows[-1]
            console.print(f"{system}: p50 {r.p50:.1f} ms, knee {r.knee:.0f}, {r.cpu_ms:.2f} ms CPU a request")
    middle = {s: {k: float(np.median([getattr(r, k) for r in rows if r.system == s]))
                  for k in ("p50", "p99", "knee", "cpu_ms", "mib")}
              for s in systems if s not in failed}  # fmt: skip
    reference = middle[f"Vivace, {tuned[-1]}"]["knee"]
    title = f"{root.name}: p99 within {slo:g} ms on {cpu()[0]}, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left")
    for name in ("", "p50 alone", "p99 alone", "QPS at the knee", "ours over it", "CPU ms a request", "MiB"):
        table.add_column(name, justify="right" if name else "left")
    for system, m in middle.items():
        ratio = f"{reference / m['knee']:.2f}" if m["knee"] else "-"
        table.add_row(
            system, f"{m['p50']:.1f}", f"{m['p99']:.1f}", f"{m['knee']:.0f}", ratio, f"{m['cpu_ms']:.2f}",
            f"{m['mib']:.0f}",
        )  # fmt: skip
    console.print(table)
    record = json.dumps({
        "benchmark": "peers", "data": root.name, "slo_ms": slo, "seconds": seconds, "rounds": rounds,
        "systems": middle, "failed": failed,
        "rows": [asdict(r) for r in rows], "cpu": cpu()[0], "cores": os.cpu_count(),
        "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    })  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(record + "\n", encoding="utf-8")
    print(record)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
