"""``vivace doctor``: what this machine offers and what is missing, in plain words."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, console
from vivace.machine import cpu, gpu

ENGINES = ("onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "torch-tensorrt")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _triton() -> tuple[bool, str]:
    from serving.wheel import ServerError, wheel_folder

    try:
        binary = wheel_folder() / "tritonserver" / "bin" / "tritonserver"
    except ServerError as error:
        return False, str(error)
    return binary.exists(), f"tritonserver of nvidia-pytriton {_version('nvidia-pytriton')}"


def _libpython() -> tuple[bool, str]:
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False, f"{name} is not found: apt-get install {name.removesuffix('.so.1.0')}"
    return True, f"{name}, for Triton's Python workers"


def _engines() -> str:
    """What could run a graph on the GPU at hand, by package and version."""
    rows = [f"{name} {version}" for name in ENGINES if (version := _version(name))]
    torch = _version("torch")
    with_cuda = bool(torch) and "+cpu" not in torch and bool(gpu())
    aoti = [f"torch {torch} (compile, AOTInductor)"] if with_cuda else []
    return ", ".join([*aoti, *rows]) or "none: a GPU needs onnxruntime-gpu, tensorrt or a torch with CUDA"


def _artifacts(folder: Path) -> str:
    ready = [p.parent.name for p in sorted(folder.glob("*/model_repository"))]
    return (
        f"ready to serve in {folder}: {', '.join(ready)}" if ready else f"none in {folder} yet: 'make demo' makes some"
    )


def examine(console: Console, artifacts: Path) -> int:
    """Prints the findings; returns how many things that serving on CPU needs are missing."""
    name, extensions = cpu()
    memory = psutil.virtual_memory()
    device = gpu()
    triton_ok, triton = _triton()
    library_ok, library = _libpython()
    shm = shutil.disk_usage("/dev/shm")
    rows: list[tuple[str, bool | None, str]] = [
        ("CPU", True, f"{len(os.sched_getaffinity(0))} cores, {name}, {', '.join(extensions) or 'no AVX2'}"),
        ("int8 on CPU", None if "VNNI" not in str(extensions) else True,
         "VNNI: int8 products are exact and fast" if "VNNI" in str(extensions) else "no VNNI: int8 needs reduce_range"),
        ("bf16 on CPU", None if "BF16" not in str(extensions) else True,
         "PyTorch and OpenVINO compute in it; ONNX Runtime, which serves, has no products in it here"
         if "BF16" in str(extensions) else "not there; graphs are served in float32 or int8"),
        ("memory", memory.available > 2**31, f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"),
        ("shared memory", shm.free > 64 << 20, f"/dev/shm has {shm.free / 2**20:.0f} MiB free"),
        ("Triton", triton_ok, triton),
        ("Python library", library_ok, library),
    ]  # fmt: skip
    for package in (
        "torch",
        "nvtabular",
        "merlin-models",
        "merlin-dataloader",
        "onnxruntime",
        "tritonclient",
        "lmdb",
        "locust",
    ):
        version = _version(package)
        rows.append((package, bool(version), version or "not installed: run 'make setup'"))
    rows += [
        ("GPU", True if device else None, device or "none: training and serving use the CPU profile"),
        ("GPU engines", True if device else None, _engines()),
        ("cuDF", True if _version("cudf-cu12") else None, "GPU pre-processing" if _version("cudf-cu12") else
         "not installed: NVTabular runs on CPU (prepare --workers N spreads it)"),
        ("Redis", True if shutil.which("redis-server") else None, "found; nothing uses it yet"
         if shutil.which("redis-server") else "not found; not needed, the embedded store (LMDB) is used"),
        ("Docker", True if shutil.which("docker") else None, "found" if shutil.which("docker")
         else "not found; not needed"),
        ("artifacts", None, _artifacts(artifacts)),
    ]  # fmt: skip
    table = Table(show_header=False)
    marks = {True: Text("ok", style="green"), False: Text("missing", style="red"), None: Text("-", style="dim")}
    for what, ok, text in rows:
        table.add_row(what, marks[ok], text)
    console.print(table)
    return sum(ok is False for _, ok, _ in rows)


def doctor(artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    """Say what this machine offers and what is missing."""

    missing = examine(console, artifacts)
    if missing:
        raise typer.Exit(1)
