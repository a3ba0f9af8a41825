"""Step of the GPU kit: the real tritonserver, its graphs as AOTInductor packages on the GPU, under open load.

    python -m benchmarks.gpu.served --out FOLDER --seconds 200 [--root FOLDER_OF_A_RUN]

A trained run (``--root``; else the first that lies in the results or among the artifacts, else a tiny one trained here)
is compiled twice at once by the product's own command, with and without ``--target aoti``. Once both are there, each is
served in its turn: the first by the default profile on the processor, the second by "aoti". Answers are compared, and
each is offered rising rates until fewer than 99 % come within the objective. A row has the processor time of all the
server's processes a request, and of the GPU's two times: by NVML (the share of the time in which a kernel ran, sampled)
and by CUDA events around each batch, copies included. Brought along: ``pieces.toml`` says what (tritonserver and its
client, LMDB, NumPy 1 for its workers).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.gpu import workers
from benchmarks.gpu.record import Figures, device
from loadtest.generate.generator import LoadRun, at_rate, messages, run
from loadtest.generate.local_server import grpc_address, on_free_ports
from preprocessing.features import Features
from preprocessing.requests import recorded
from serving.launcher import TritonServer
from training.compile.aoti import LOGS
from vivace import contract
from vivace.client import Recommendation, VivaceClient
from vivace.machine import process_tree
from vivace.manifest import CHECKOUT
from vivace.run import RANKING, RETRIEVAL, Run, StaleError
from vivace.store.lmdb_store import LmdbStore

SEED, TOP_K, COMPARED = 7, 10, 60
ATTAINED = 0.99
FIRST_QPS, RUN_S, MOST_RUNS = 100.0, 3.0, 9
LEAST_SERVED_S = 70.0  # of the step that the compilers leave for both profiles
SAMPLED_S = 0.05
DEVICE_SECONDS = re.compile(r'^vivace_device_seconds_total\{model="(\w+)".*?\} ([0-9.e+-]+)$', re.M)


# -- the run ---------------------------------------------------------------------------------------------
def trained(folder: Path) -> bool:
    run = Run(folder)
    return all((part / "weights.pt").exists() for part in (run.retrieval, run.ranking))


def features_of(root: Path, artifacts: Path) -> Path | None:
    """The prepared features that a run was trained on."""
    for folder in [Run(root).features, *sorted(artifacts.glob("*/features"))]:
        try:
            if folder.is_dir() and Run(root, folder).manifest(RETRIEVAL) and Run(root, folder).manifest(RANKING):
                return folder
        except (StaleError, FileNotFoundError):
            continue
    return None


def chosen_run(root: Path | None, out: Path, artifacts: Path) -> tuple[Path, Path] | None:
    """(folder of a trained run, its features), the named one or the first at hand."""
    at_hand = [root] if root else [out / "runs" / "base-7", *sorted(out.glob("runs/*")), *sorted(artifacts.glob("*"))]
    for folder in at_hand:
        if trained(folder) and (features := features_of(folder, artifacts)):
            return folder, features
    return None


def trained_here(out: Path, artifacts: Path) -> tuple[Path, Path]:
    """A tiny run of the first features at hand."""
    from training.learn.ranker import train_ranker
    from training.learn.retriever import train_retrieval
    from training.presets import tiny

    folders = sorted(artifacts.glob("*/features"))
    if not folders:
        raise SystemExit(f"served: expected prepared features under {artifacts}/*/features, found none")
    root = out / "served" / "tiny"
    for train in (train_retrieval, train_ranker):
        train(Features(folders[0]), tiny(), root, SEED, print, quiet=True)
    return root, folders[0]


def copied(source: Path, features: Path, target: Path) -> Path:
    """A run of its own that shares weights and features with ``source`` and has an empty store."""
    shutil.rmtree(target, ignore_errors=True)
    for part in (Run(source).retrieval, Run(source).ranking):
        shutil.copytree(part, target / part.name)
    if Run(source).preset.exists():
        shutil.copy(Run(source).preset, Run(target).preset)
    Run(target).features.symlink_to(features.resolve(), target_is_directory=True)
    LmdbStore(Run(target).feature_store).close()
    return target


def compiling(root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """``vivace compile`` under way; what it says goes to ``compile.log`` of the run."""
    log = (root / "compile.log").open("wb")
    command = [
        sys.executable, "-m", "vivace.cli.main", "compile", "--name", root.name, "--artifacts", str(root.parent),
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, LOGS: str(root)}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=CHECKOUT, env=environment)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it started."""
    for one in process_tree(process.pid) if process.poll() is None else []:
        one.kill()
    process.wait()


def compiled(process: subprocess.Popen[bytes], root: Path, seconds: float) -> None:
    """Waits for it. Raises RuntimeError with its last words."""
    try:
        code: int | str = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        stop(process)
        code = "stopped, as the step's time was short"
    if code:
        logs = [root / "compile.log", *sorted(root.glob("r*.log"))]  # its own, and those of retrieval and ranking
        words = " | ".join(" ".join(f.read_text(errors="replace").split()[-60:])[-600:] for f in logs)
        raise RuntimeError(f"vivace compile: {code}: {words}")


# -- the GPU's own time ----------------------------------------------------------------------------------
@dataclass
class Utilisation:
    """Shares of time in which the GPU ran a kernel, as NVML gives them, sampled while the block runs."""

    shares: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return float(np.mean(self.shares)) if self.shares else 0.0


@contextmanager
def utilisation(on_gpu: bool) -> Iterator[Utilisation]:
    """Empty without a GPU or without NVML's Python module."""
    samples, over = Utilisation(), threading.Event()
    try:
        import pynvml

        if on_gpu:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as error:  # whatever NVML says: the other figures do not need it
        print(f"no utilisation: {error}", flush=True)
        on_gpu = False

    def sample() -> None:
        while not over.wait(SAMPLED_S):
            samples.shares.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    thread = threading.Thread(target=sample, daemon=True)
    if on_gpu:
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if on_gpu:
            thread.join(1)


def device_seconds(server: TritonServer) -> dict[str, float]:
    """By model, from Triton's metrics page: what the workers counted by CUDA events."""
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics", timeout=5) as page:
        return {model: float(value) for model, value in DEVICE_SECONDS.findall(page.read().decode())}


# -- serving ---------------------------------------------------------------------------------------------
def answers(server: TritonServer, histories: list[list[str]]) -> list[Recommendation]:
    with VivaceClient(grpc_address(server)) as client:
        return [client.recommend("", history, TOP_K) for history in histories]


def apart(expected: list[Recommendation], got: list[Recommendation]) -> dict[str, float]:
    """Shares of equal lists and of items in common, and the largest difference of two scores of one place."""
    pairs = list(zip(expected, got, strict=True))
    return {
        "equal_lists": float(np.mean([list(a.items) == list(b.items) for a, b in pairs])),
        "overlap": float(np.mean([len(set(a.items) & set(b.items)) / max(len(a.items), 1) for a, b in pairs])),
        "scores_apart": max(float(np.abs(a.scores - b.scores).max()) for a, b in pairs if len(a.items) == len(b.items)),
    }


def offered(
    server: TritonServer, pool: list[bytes], qps: float, slo_ms: float, on_gpu: bool
) -> tuple[LoadRun, dict[str, Any]]:
    """One run at ``qps``, and the row that it makes."""
    before, began = device_seconds(server), time.monotonic()
    with utilisation(on_gpu) as gpu:
        outcome, processor_ms = at_rate(
            lambda due, sent: run(grpc_address(server), sent, due, RUN_S, slo_ms), server.pid, pool, qps, RUN_S, SEED
        )
    wall, after, answered = time.monotonic() - began, device_seconds(server), max(outcome.answered, 1)
    row: dict[str, Any] = {
        "offered": outcome.qps, "answered": outcome.answered, "refused": sum(outcome.refused.values()),
        "p50_ms": outcome.p50, "p95_ms": outcome.p95, "p99_ms": outcome.p99, "in_time": outcome.attainment,
        "generator_late_ms": outcome.late, "processor_ms": processor_ms,
    }  # fmt: skip
    if on_gpu:
        row |= {"gpu_busy": gpu.mean, "gpu_ms_by_nvml": gpu.mean * wall * 1000 / answered}
        row |= {f"gpu_ms_{m}": (s - before.get(m, 0.0)) * 1000 / answered for m, s in after.items()}
    return outcome, row


def load(
    figures: Figures, server: TritonServer, root: Path, slo_ms: float, enough: Callable[[int], bool], **about: Any
) -> float:
    """Doubling rates until one is not met, then between; the largest that was met. ``enough``: of so many runs."""
    pool, on_gpu = messages(root, TOP_K), bool(about.pop("on_gpu"))
    met, rate, failed, runs = 0.0, FIRST_QPS, 0.0, 0
    run(grpc_address(server), pool[:50], np.linspace(0, 0.5, 50), 0.5, slo_ms)  # warm
    while not enough(runs) and (not failed or failed - met > 0.15 * failed):
        (outcome, row), runs = offered(server, pool, rate, slo_ms, on_gpu), runs + 1
        figures.row(**about, **row)
        if outcome.full >= ATTAINED:
            met = max(met, rate)
        else:
            failed = min(failed or rate, rate)
        rate = (met + failed) / 2 if failed else 2 * rate
    return met


def main(
    out: Annotated[Path, typer.Option(help="folder of the results")],
    seconds: float = 75.0,
    cpu: bool = False,
    root: Annotated[Path | None, typer.Option(help="folder of a trained run")] = None,
    artifacts: Annotated[Path, typer.Option(help="folder of prepared runs")] = Path("artifacts"),
    slo: Annotated[float, typer.Option(help="ms within which a request must be answered")] = 50.0,
) -> None:
    where, began = device(cpu), time.monotonic()
    out, artifacts = out.resolve(), artifacts.resolve()  # the server and the compilers run elsewhere
    figures = Figures(out, "served", seconds)
    figures.set(device=torch.cuda.get_device_name() if where.type == "cuda" else "cpu", slo_ms=slo, run_s=RUN_S)
    python = workers.make(out / "served" / "python")
    source, features = chosen_run(root, out, artifacts) or trained_here(out, artifacts)
    figures.set(run=source.name, features=features.parent.name, found_s=time.monotonic() - began)
    runs = {profile: copied(source, features, out / "served" / (profile or "default")) for profile in ("", "aoti")}
    under_way = {"": compiling(runs[""]), "aoti": compiling(runs["aoti"], "--target", "aoti")}
    reference: list[Recommendation] = []
    try:
        failed: dict[str, Exception] = {}
        for profile, folder in runs.items():  # all of them before the first is measured, which wants quiet cores
            try:
                compiled(under_way[profile], folder, figures.left() - LEAST_SERVED_S)
                figures.set(**{f"compiled_{profile or 'default'}_s": time.monotonic() - began})
            except RuntimeError as error:
                failed[profile] = error
        for profile, folder in runs.items():
            try:
                if profile in failed:
                    raise failed[profile]
                keep_s = LEAST_SERVED_S / 2 if not profile and "aoti" not in failed else 4.0

                def enough(runs: int, keep_s: float = keep_s) -> bool:
                    """Whether the time, or for the first profile the next one, calls for an end."""
                    return runs >= MOST_RUNS or figures.left() < RUN_S + keep_s

                on_gpu = where.type == "cuda" and profile != ""
                serve(figures, folder, profile, python, slo, enough, on_gpu, reference)
            except Exception as error:  # the other profile's figures stay
                figures.skip(f"profile {profile or 'default'}", f"{type(error).__name__}: {error}")
    finally:
        for process in under_way.values():
            stop(process)
    figures.set(seconds=time.monotonic() - began, done=True)


def serve(
    figures: Figures, root: Path, profile: str, python: Path, slo_ms: float, enough: Callable[[int], bool],
    on_gpu: bool, reference: list[Recommendation],
) -> None:  # fmt: skip
    """Starts a profile, asks it the recorded requests, then loads it. ``reference``: the first profile's answers, which
    this one's are compared with; empty: they become it."""
    label, started = profile or "default", time.monotonic()
    extra = ("--allow-gpu-metrics=false",)
    options = on_free_ports(
        Run(root).repository, profile, figures.path.parent / f"triton-{label}.log", python=python, extra=extra,
        start_timeout_s=max(10.0, figures.left() - 5),
    )  # fmt: skip
    histories = [list(h) for h in recorded(root)[contract.ITEM].tolist()[:COMPARED]]
    with TritonServer(options) as server:
        figures.set(**{f"started_{label}_s": time.monotonic() - started})
        got = answers(server, histories)
        if reference:
            figures.set(answers=apart(reference, got))
        else:
            reference.extend(got)
        met = load(figures, server, root, slo_ms, enough, profile=label, on_gpu=on_gpu)
        figures.set(**{f"knee_{label}_qps": met})


if __name__ == "__main__":
    typer.run(main)
