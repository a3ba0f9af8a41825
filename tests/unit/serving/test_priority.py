"""A server that starts beside others, and then serves in their place."""

from __future__ import annotations

import os
import subprocess

from serving.process import may_return, step_aside, step_forward


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def test_a_process_steps_aside_and_comes_back_as_it_was():
    ours = niceness(0)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as server:
        step_aside(server.pid)
        assert niceness(server.pid) == (min(ours + 5, 19) if may_return() else ours)
        step_forward(server.pid)
        assert niceness(server.pid) == ours == niceness(0)
        server.kill()
