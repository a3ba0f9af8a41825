"""What this machine is, processor and GPU, and what processes use of it: the one place that reads either."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil

CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX",
    "amx_bf16": "AMX BF16",
}


def cpu() -> tuple[str, list[str]]:
    """(model name, vector extensions that matter here)."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    name = next((x.split(":", 1)[1].strip() for x in text.splitlines() if x.startswith("model name")), "unknown")
    flags = next((x.split(":", 1)[1].split() for x in text.splitlines() if x.startswith("flags")), [])
    return name, [label for flag, label in CPU_FLAGS.items() if flag in flags]


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def gpu() -> str:
    """Name, memory and driver of each GPU, one a line; "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def process_tree(pids: int | Iterable[int]) -> list[psutil.Process]:
    """The processes and all their descendants that live, each once."""
    tree: dict[int, psutil.Process] = {}
    for pid in [pids] if isinstance(pids, int) else pids:
        try:
            root = psutil.Process(pid)
            tree |= {p.pid: p for p in (root, *root.children(recursive=True))}
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
    return list(tree.values())


def processor_seconds(pids: int | Iterable[int]) -> float:
    """Processor time, user and system, that the process trees have used so far. A process that ended counts no more:
    of servers, whose workers stay."""
    seconds = 0.0
    for process in process_tree(pids):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def memory_by_process(pids: int | Iterable[int]) -> dict[int, float]:
    """MiB of each process of the trees, by pid: proportional set size, which counts shared pages once in a sum."""
    mib = {}
    for process in process_tree(pids):
        try:
            mib[process.pid] = process.memory_full_info().pss / 2**20
        except psutil.NoSuchProcess:
            continue
    return mib


def memory_mib(pids: int | Iterable[int]) -> float:
    """MiB of the process trees together (proportional set size)."""
    return sum(memory_by_process(pids).values())
