"""The systems that are compared: each serves the same weights, started for the length of a block.

Each peer has an environment of its own under .tools/peers, its packages beside those of this one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from loadtest.generate.generator import METHOD, CallError, complete, message, messages
from loadtest.generate.local_server import grpc_address, on_free_ports
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from serving.repository import served_from
from serving.start_checks import free_port
from vivace import contract
from vivace.client import VivaceClient
from vivace.manifest import CHECKOUT
from vivace.run import Run

HERE = Path(__file__).resolve().parent
TOP_K = 10
READY_S = 120.0

Call = Callable[[bytes], Awaitable[Any]]


def environment(name: str) -> Path:
    """Python of the peer's own environment, made on first use: its packages before those of this environment."""
    folder = CHECKOUT / ".tools" / "peers" / name
    python, packages = folder / "bin" / "python", (HERE / f"{name}.txt").read_text()
    done = folder / ".ready"
    if not done.exists() or done.read_text() != packages:
        print(f"setting up the environment of {name}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        ours = [p for p in sys.path if p.endswith("site-packages")]
        (site / "beside.pth").write_text("\n".join([*ours, str(CHECKOUT), ""]))
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / f"{name}.txt"], check=True)
        done.write_text(packages)
    return python


@dataclass(frozen=True)
class Served:
    """A running system: how it is called, its requests (bytes on the wire), its process."""

    pid: int
    sent: list[bytes]
    connect: Callable[[], Any]  # an async context manager that yields a Call
    items: Callable[[list[str]], list[str]]  # TOP_K items that it answers to a history


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
    """The run itself by a profile ("": the ensemble of stages)."""
    options = on_free_ports(Run(served_from(root, profile)).repository, profile, root / "peers.log")
    with TritonServer(options) as server:
        url = grpc_address(server)

        def items(history: list[str]) -> list[str]:
            with VivaceClient(url) as client:
                return client.recommend("", history, TOP_K).items

        yield Served(server.pid, messages(root, TOP_K), lambda: Grpc(url), items)


def reference(root: Path, histories: list[list[str]]) -> list[tuple[list[str], list[float]]]:
    """What the ensemble of stages answers, one request at a time: items and scores, further than TOP_K so that a tie
    across its end is seen."""
    options = on_free_ports(Run(root).repository, log=root / "peers.log")
    with TritonServer(options) as server, VivaceClient(grpc_address(server)) as client:
        answers = [client.recommend("", h, 2 * TOP_K) for h in histories]
    return [(a.items, [float(x) for x in a.scores]) for a in answers]


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


def merlin_export(root: Path, kind: str, folder: Path) -> Path:
    """Model repository of Merlin Systems 23.8 under ``folder``: "stock" as its code exports it, with a Python stage in
    libtorch's place; "best" as made by hand. Raises ValueError with the exporter's words."""
    repository = folder / kind / "repository"  # beside it what Categorify leaves where it runs
    if not repository.exists():
        repository.parent.mkdir(parents=True)
        command = [
            str(environment("merlin")), "-m", "benchmarks.peers.merlin_export", str(root.resolve()), str(repository),
            kind,
        ]  # fmt: skip
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=repository.parent, env=environ, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(repository.parent)
            raise ValueError(f"Merlin, {kind}: not exported:\n{done.stderr[-2000:]}")
    return repository


@contextmanager
def merlin(root: Path, kind: str, folder: Path) -> Iterator[Served]:
    """Merlin Systems 23.8 on the same tritonserver (``merlin_export``; ``folder`` keeps the exports)."""
    repository, names = merlin_export(root, kind, folder), item_names(root)
    stages = sorted(
        d.name for d in repository.iterdir() if d.is_dir() and d.name != contract.ENSEMBLE
    )  # its first model calls them
    options = on_free_ports(
        repository, log=root / f"peer-merlin-{kind}.log", python=environment("merlin"),
        extra=tuple(f"--load-model={s}" for s in stages),
    )  # fmt: skip
    encode = {"stock": ragged, "best": batched}[kind]
    with TritonServer(options) as server:
        url = grpc_address(server)

        def items(history: list[str]) -> list[str]:
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
    run = Run(root)
    path = run.repository / contract.RESPONSE / str(run.version()) / "items.json"
    return [""] * contract.FIRST_ID + json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def http_peer(root: Path, name: str, arguments: Callable[[int], list[str]], **more: str) -> Iterator[Served]:
    """A peer that answers POST /predict, with the Python of its own environment."""
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
        yield Served(process.pid, sent, lambda: Http(url), lambda history: list(ask(body(history))["item_id"]))
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
