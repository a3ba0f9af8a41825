"""What the set-up needs from the system, checked before anything is downloaded. Standard library only."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile

NEEDED_GIB = 6


def problems() -> list[str]:
    """One line for each thing that is missing, with what to do about it."""
    missing = []
    if sys.platform != "linux" or platform.machine() != "x86_64":
        missing.append(f"the tritonserver wheel is for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    if sys.version_info[:2] != (3, 11):
        missing.append(
            f"Python 3.11 is needed (NVTabular 23.8 and its pins), this is {platform.python_version()}; "
            "apt-get install python3.11, or make PYTHON=/path/to/python3.11"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            missing.append(f"the Python module {module} is missing: apt-get install python3.11-venv")
    for tool, package in (("cc", "gcc"), ("c++", "g++")):
        if not (shutil.which(tool) or shutil.which(package)):
            missing.append(f"no {tool}: NVTabular compiles an extension; apt-get install build-essential")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        missing.append(f"no {header}: NVTabular compiles an extension; apt-get install python3.11-dev")
    try:
        ctypes.CDLL("libpython3.11.so.1.0")
    except OSError:
        local = os.path.join(sysconfig.get_config_var("LIBDIR") or "", "libpython3.11.so.1.0")
        if not os.path.exists(local):
            missing.append("no libpython3.11.so.1.0: Triton's Python workers load it; apt-get install libpython3.11")
    libc, version = platform.libc_ver()
    if libc == "glibc" and tuple(int(x) for x in version.split(".")[:2]) < (2, 35):
        missing.append(f"tritonserver needs glibc 2.35 (Debian 12, Ubuntu 22.04) or newer, this is {version}")
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    if free < NEEDED_GIB:
        missing.append(f"{NEEDED_GIB} GiB of disk are needed here, {free:.1f} GiB are free")
    if not os.access(tempfile.gettempdir(), os.W_OK) or not os.access("/dev/shm", os.W_OK):
        missing.append("a writable temporary folder and /dev/shm are needed")
    return missing


if __name__ == "__main__":
    lacking = problems()
    for line in lacking:
        print(f"vivace set-up: {line}", file=sys.stderr)
    sys.exit(1 if lacking else 0)
