"""How a server's processes are run: their memory, their scheduling, and that none is left behind.

The one place for settings of the operating system; each says why it is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

# glibc gives blocks of 128 KiB and more back to the kernel at each free: tensors of a batch are of that size.
# Needed as long as the server's allocator is glibc's.
_MALLOC = {  # the largest threshold that glibc takes is 32 MiB
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 24),
    "MALLOC_ARENA_MAX": "2",
}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
STUB = "triton_python_backend_stub"  # the program of a Python worker
_WORKER_NICENESS = 5


def server_environment(environment: dict[str, str]) -> dict[str, str]:
    """``environment`` with what a server's memory and threads need; malloc settings that are in it stay."""
    return _MALLOC | environment | {"OMP_NUM_THREADS": "1"}  # numpy's BLAS would start a pool in every worker


def end_with_parent() -> None:
    """In a child before it starts: the kernel asks it to end when the process that started it is gone, however."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def become_server() -> None:
    """In the server's process before it starts: the kernel ends it if its launcher is killed outright, and a thread of
    it that wakes up does not interrupt one that computes (SCHED_BATCH)."""
    end_with_parent()
    os.umask(0o077)  # logs, sockets and shared memory hold what users did
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def become_triton() -> None:
    """``become_server`` for tritonserver, which never waits for a worker that was killed: the kernel removes it."""
    become_server()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # stays through exec


def give_way() -> None:
    """Lowers the priority of a worker and all its threads: where processors are short, the server that takes, queues
    and refuses requests comes first. Once it has loaded: whoever waits for a worker that died waits for that."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            niceness = os.getpriority(os.PRIO_PROCESS, int(thread.name)) + _WORKER_NICENESS
            os.setpriority(os.PRIO_PROCESS, int(thread.name), min(niceness, 19))


IDLE_S = 10.0  # so long a server that starts beside one that serves takes only what that leaves
_ASIDE = 5  # its niceness from then on: a quarter of what the other gets, not nothing


def may_return() -> bool:
    """Whether a process of this user that was made nicer can be made as it was: who is not allowed to would leave a
    server at the lower priority for ever."""
    allowed = []

    def attempt() -> None:  # a thread of its own: where it may not return, nothing else has changed
        thread = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, thread)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, before + 1)
            os.setpriority(os.PRIO_PROCESS, thread, before)
            allowed.append(True)

    prober = threading.Thread(target=attempt)
    prober.start()
    prober.join()
    return bool(allowed)


def _schedule(niceness: dict[int, int]) -> None:
    """All threads of the processes in ``niceness``, a tritonserver's and its workers', which are of this process's
    session: the kernel compares sessions first where it groups them (autogroup, sched(7))."""
    for process, nice in niceness.items():
        for thread in Path(f"/proc/{process}/task").glob("*"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, int(thread.name), min(nice, 19))


def step_aside(server: int) -> bool:
    """A tritonserver, just started, and what it starts take the processor time that others leave, and give it back at
    once. False, and nothing happens, where it could not return from there."""
    if not may_return():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.sched_setscheduler(server, os.SCHED_IDLE, os.sched_param(0))  # its threads and children inherit it
    return True


def step_closer(server: int) -> bool:
    """A server that stepped aside gets a quarter of what another one gets, however busy that is. Always False: it no
    longer stands aside."""
    nice = os.getpriority(os.PRIO_PROCESS, 0) + _ASIDE
    _schedule({server: nice} | dict.fromkeys(living_workers(server), nice + _WORKER_NICENESS))
    return False


def step_forward(server: int) -> None:
    """Back to the priority of a server, this process's own, and of a worker, which gives way to it."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    workers = dict.fromkeys(living_workers(server), ours + _WORKER_NICENESS)
    _schedule({server: ours} | workers)


def close_callers() -> None:
    """Lets go of the connections of the server's callers, which a worker that was started again inherits; before
    anything is opened."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(link.name) > 2 and os.readlink(link).startswith("socket:"):
                os.close(int(link.name))


def children(pid: int | str = "self") -> set[int]:
    """Processes that a process started or adopted."""
    pids: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pids.update(map(int, task.read_text().split()))
    return pids


def living_workers(pid: int) -> set[int]:
    """Python workers of the tritonserver ``pid``."""
    workers = set()
    for child in children(pid):
        with contextlib.suppress(OSError):
            if STUB.encode() in Path(f"/proc/{child}/cmdline").read_bytes().partition(b"\0")[0]:  # a zombie has none
                workers.add(child)
    return workers


def adopt_orphans() -> None:
    """What this process's children leave when they end becomes its own child, not one of the machine's first process;
    in a container it may be that itself."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Reaper:
    """Waits for adopted children, which nobody else would: those that were dead at the last look too, so that whoever
    started one has had the time to wait for it."""

    def __init__(self) -> None:
        self._dead: set[int] = set()

    def reap(self, but: set[int]) -> list[int]:
        """The children that it waited for; none of ``but``."""
        dead = {pid for pid in children() - but if not living(pid)}
        reaped = []
        for pid in dead & self._dead:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
                reaped.append(pid)
        self._dead = dead
        return reaped


def living(pid: int) -> bool:
    """Whether the process is there and no zombie; far cheaper than a scan of all processes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # such as no descriptor left: not known, so not dead
        return True


class SilenceWatch:
    """Kills a process that has not answered for ``patience_s``, so that whoever watches it starts another."""

    def __init__(self, name: str, patience_s: float, say: Callable[[str], None]) -> None:
        self.name, self.patience_s, self._say = name, patience_s, say
        self._silent: tuple[int, float] | None = None  # a process, and since when

    def look(self, pid: int, answers: bool) -> None:
        if answers:
            self._silent = None
        elif self._silent is None or self._silent[0] != pid:
            self._silent = (pid, time.monotonic())
        elif time.monotonic() - self._silent[1] > self.patience_s:
            self._silent = None
            self._say(f"{self.name}: has not answered for {self.patience_s:.0f} s; ending it")
            os.kill(pid, signal.SIGKILL)
