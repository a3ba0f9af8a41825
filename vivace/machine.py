"""What this machine is: processor, GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX",
}


def cpu() -> tuple[str, list[str]]:
    """(model name, vector extensions that matter here)."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    name = next((x.split(":", 1)[1].strip() for x in text.splitlines() if x.startswith("model name")), "unknown")
    flags = next((x.split(":", 1)[1].split() for x in text.splitlines() if x.startswith("flags")), [])
    return name, [label for flag, label in CPU_FLAGS.items() if flag in flags]


def gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()
