"""What the machine is: card, memory, versions, the engines that can be imported, and what it computes and copies at
best.

    python -m benchmarks.gpu.machine --out FOLDER --seconds 20
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu import peaks, steps
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked

ENGINES = ("triton", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "numpy")
MODULES = (*ENGINES, "merlin", "tritonclient", "pytriton", "pandas", "pyarrow", "scipy", "sklearn")
ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_cap"


def answer(*command: str) -> str:
    """First line that a program prints; why not if it does not run."""
    if shutil.which(command[0]) is None:
        return "not here"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"did not run: {error}"[:200]
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1 if command[0] == "nvcc" else 0][:200] if lines else ""


def module(name: str) -> str:
    """Version of a module; of an engine, the reason where it cannot be imported."""
    if name not in ENGINES:
        here = importlib.util.find_spec(name.partition(".")[0]) is not None
        return "here" if here else "not here"
    try:
        return str(getattr(importlib.import_module(name), "__version__", "here"))
    except Exception as error:  # libraries that miss a shared object raise all sorts
        return f"{type(error).__name__}: {error}"[:200]


def card() -> dict[str, object]:
    """What CUDA says of the first card."""
    if not torch.cuda.is_available():
        return {}
    of = torch.cuda.get_device_properties(0)
    return {
        "name": of.name, "memory": of.total_memory, "multiprocessors": of.multi_processor_count,
        "capability": f"{of.major}.{of.minor}", "l2": getattr(of, "L2_cache_size", 0), "nvidia_smi": answer(
            "nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"),
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def providers() -> list[str]:
    """What ONNX Runtime can run on."""
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers())
    except ImportError:
        return []


def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    figures.set(
        card=card(), cuda=torch.version.cuda, python=platform.python_version(), system=platform.platform(),
        cores=os.cpu_count(), gcc=answer("g++", "--version"), nvcc=answer("nvcc", "--version"),
        modules={name: module(name) for name in MODULES}, onnxruntime_providers=providers(),
        data_sheet_bf16=peaks.DATA_SHEET_BF16,
    )  # fmt: skip
    kinds = peaks.ALL if where.type == "cuda" else ("bf16", "fp32")
    for kind, rate in peaks.measure(figures, where, kinds, 0.5 if where.type == "cuda" else 0.05).items():
        figures.row(what=kind, tera_per_s=rate / 1e12)


if __name__ == "__main__":
    steps.run("machine", measure, "what the machine is")
