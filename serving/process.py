"""How a server's processes are run: their memory, their scheduling, and that none is left behind.

The one place for settings of the operating system; each says why it is there.
"""

from __future__ import annotations

import ctypes
import os
import signal

# glibc gives blocks of 128 KiB and more back to the kernel at each free: tensors of a batch are of that size.
# Needed as long as the server's allocator is glibc's.
_MALLOC = {  # the largest threshold that glibc takes is 32 MiB
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 24),
    "MALLOC_ARENA_MAX": "2",
}
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_WORKER_NICENESS = 5


def server_environment(environment: dict[str, str]) -> dict[str, str]:
    """``environment`` with what a server's memory and threads need; malloc settings that are in it stay."""
    return _MALLOC | environment | {"OMP_NUM_THREADS": "1"}  # numpy's BLAS would start a pool in every worker


def become_server() -> None:
    """In the server's process before it starts: the kernel ends it if its launcher is killed outright, and a thread of
    it that wakes up does not interrupt one that computes (SCHED_BATCH)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.umask(0o077)  # logs, sockets and shared memory hold what users did
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def give_way() -> None:
    """Lowers the priority of a worker: where processors are short, the server that takes, queues and refuses requests
    comes first. Its threads inherit it."""
    os.nice(_WORKER_NICENESS)
