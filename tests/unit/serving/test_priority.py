"""A server that starts beside others, and then serves in their place."""

from __future__ import annotations

import os
import subprocess

from serving.process import become_server, may_return, step_aside, step_closer, step_forward


def scheduled(pid: int) -> tuple[int, int]:
    return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


def test_a_process_steps_aside_and_comes_back_as_it_was():
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen(["sleep", "60"], process_group=0, preexec_fn=become_server) as server:
        assert os.getsid(server.pid) == os.getsid(0)  # else the kernel compares the sessions, and not the two
        serving = scheduled(server.pid)
        assert serving == (os.SCHED_BATCH, ours)
        if step_aside(server.pid):
            assert os.sched_getscheduler(server.pid) == os.SCHED_IDLE
            assert not step_closer(server.pid)
            assert scheduled(server.pid) == (os.SCHED_BATCH, min(ours + 5, 19))
        else:
            assert not may_return() and scheduled(server.pid) == serving
        step_forward(server.pid)
        assert scheduled(server.pid) == serving
        server.kill()
