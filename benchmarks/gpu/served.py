"""Step of the GPU kit: the real tritonserver with its graphs on the GPU, under open load.

    python -m benchmarks.gpu.served --out FOLDER --seconds 210 [--root FOLDER_OF_A_RUN]

A trained run (``--root``; else the first that lies in the results or among the artifacts, else one of an epoch made
here: ``base`` on a GPU, whose times are those of a trained one) is compiled twice at once by the product's own command,
with and without ``--target aoti``. Three profiles are served in their turn: "gpu", ONNX Runtime's CUDA provider, as
soon as the plain graphs are there, while AOTInductor still compiles on other cores (``beside_compiler`` says so); the
default one on the processor; "aoti" once its packages are there. A compiler that does not end in its time leaves the
place where it is. Answers are compared with the first profile's; one request after the other, beside the same graphs
called in this process, says what the server adds (``overhead_ms``: transport, feature transform, both queues, answer);
then each is offered rising rates until fewer than 99 % come within the objective. A row has the processor time of all
the server's processes a request, and of the GPU's two times: by NVML (the share of the time in which a kernel ran,
sampled) and, of "aoti", by CUDA events around each batch, copies included. Brought along: ``pieces.toml`` says what
(tritonserver and its client, LMDB, NumPy 1 for its workers, ONNX Runtime with CUDA).
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
from benchmarks.gpu.alone import graphs_ms
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
LEAST_SERVED_S = 35.0  # of the step that a compiler leaves for what is served
KEPT_S = {"gpu": 60.0, "": 45.0, "aoti": 4.0}  # of the step for what comes after a profile
LAST_LINES = 30  # of a log that are kept
ALONE_S = 1.0  # of the graphs called directly
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


def trained_here(out: Path, artifacts: Path, cpu: bool) -> tuple[Path, Path]:
    """A run of one epoch of the first features at hand: ``base`` on a GPU, a tiny one in a rehearsal."""
    from training.learn.ranker import train_ranker
    from training.learn.retriever import train_retrieval
    from training.presets import base, tiny, with_values

    folders = sorted(artifacts.glob("*/features"))
    if not folders:
        raise SystemExit(f"served: expected prepared features under {artifacts}/*/features, found none")
    features = folders[0 if cpu else -1]  # of those packed: ML-1M's
    chosen = tiny() if cpu else with_values(base(), {"retrieval.epochs": 1, "ranking.epochs": 1})
    root = out / "served" / ("tiny" if cpu else "base-one-epoch")
    for train in (train_retrieval, train_ranker):
        train(Features(features), chosen, root, SEED, print, quiet=True)
    return root, features


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
        "nice", sys.executable, "-m", "vivace.cli.main", "compile", "--name", root.name,
        "--artifacts", str(root.parent), *arguments,
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
        raise RuntimeError(f"vivace compile: {code}: {' '.join(last_words(root)['compile.log'][-3:])}")


def last_words(root: Path) -> dict[str, list[str]]:
    """The ends of a compiler's logs: its own and those of retrieval and ranking, with where they were at the time."""
    logs = [root / "compile.log", *sorted(root.glob("r*.log"))]
    return {log.name: log.read_text(errors="replace").splitlines()[-LAST_LINES:] for log in logs}


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


def timed(server: TritonServer, histories: list[list[str]]) -> tuple[list[Recommendation], tuple[float, float]]:
    """Answers, one request after the other, and the p50 and p99 of their times in ms."""
    got, ms = [], []
    with VivaceClient(grpc_address(server)) as client:
        for history in histories:
            began = time.perf_counter()
            got.append(client.recommend("", history, TOP_K))
            ms.append((time.perf_counter() - began) * 1000)
    return got, (float(np.percentile(ms, 50)), float(np.percentile(ms, 99)))


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
    source, features = chosen_run(root, out, artifacts) or trained_here(out, artifacts, cpu)
    figures.set(run=source.name, features=features.parent.name, found_s=time.monotonic() - began)
    roots = {target: copied(source, features, out / "served" / (target or "plain")) for target in ("", "aoti")}
    under_way = {"": compiling(roots[""]), "aoti": compiling(roots["aoti"], "--target", "aoti")}
    reference: list[Recommendation] = []
    try:
        for profile in ("gpu", "", "aoti"):
            label, target = profile or "default", "aoti" if profile == "aoti" else ""
            if profile == "gpu" and where.type != "cuda":
                figures.skip("profile gpu, by cuda", "there is no GPU")
                continue
            try:
                compiled(under_way[target], roots[target], figures.left() - LEAST_SERVED_S)
                figures.set(**{f"compiled_{target or 'default'}_s": time.monotonic() - began})
                compiler = under_way["aoti"].poll() is None
                keep_s = KEPT_S[profile] if where.type == "cuda" else 4.0

                def enough(runs: int, keep_s: float = keep_s) -> bool:
                    """Whether the time, or the profiles to come, call for an end."""
                    return runs >= MOST_RUNS or figures.left() < RUN_S + keep_s

                serve(
                    figures, roots[target], profile, python, slo, enough, where.type == "cuda" and profile != "",
                    reference, compiler,
                )  # fmt: skip
            except Exception as error:  # the other profiles' figures stay
                figures.skip(f"profile {label}", f"{type(error).__name__}: {error}")
                figures.set(**{f"last_words_{label}": last_words(roots[target])})
    finally:
        for process in under_way.values():
            stop(process)
    figures.set(seconds=time.monotonic() - began, done=True)


def serve(
    figures: Figures, root: Path, profile: str, python: Path, slo_ms: float, enough: Callable[[int], bool],
    on_gpu: bool, reference: list[Recommendation], compiler: bool,
) -> None:  # fmt: skip
    """Starts a profile, asks it the recorded requests, then loads it. ``reference``: the first profile's answers, which
    this one's are compared with; empty: they become it. ``compiler``: one is running meanwhile."""
    label, started = profile or "default", time.monotonic()
    extra = ("--allow-gpu-metrics=false",)
    options = on_free_ports(
        Run(root).repository, profile, figures.path.parent / f"triton-{label}.log", python=python, extra=extra,
        start_timeout_s=max(10.0, figures.left() - 5),
    )  # fmt: skip
    histories = [list(h) for h in recorded(root)[contract.ITEM].tolist()[:COMPARED]]
    with TritonServer(options) as server:
        figures.set(**{f"started_{label}_s": time.monotonic() - started})
        answers(server, histories[:10])  # warm
        got, ms = timed(server, histories)
        if reference:
            figures.set(**{f"answers_{label}": apart(reference, got)})
        else:
            reference.extend(got)
        alone = graphs_ms(Run(root), profile, ALONE_S)
        figures.row(
            profile=label, offered="one after the other", answered=len(got), p50_ms=ms[0], p99_ms=ms[1],
            graphs_ms=alone, overhead_ms=ms[0] - alone, beside_compiler=compiler,
        )  # fmt: skip
        met = load(figures, server, root, slo_ms, enough, profile=label, on_gpu=on_gpu, beside_compiler=compiler)
        figures.set(**{f"knee_{label}_qps": met})


if __name__ == "__main__":
    typer.run(main)
