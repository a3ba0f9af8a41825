"""What processes use: of a tree, each once, whether or not one has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vivace.machine import memory_by_process, memory_mib, process_tree, processor_seconds

BURN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
while time.process_time() < 0.3:
    pass
print("done", flush=True)
input()
child.communicate(b"\\n")
"""


def test_a_tree_is_read_each_process_once():
    process = subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"done\n"
        pid = process.pid
        pids = {p.pid for p in process_tree(pid)}
        assert pid in pids and len(pids) == 2
        assert processor_seconds(pid) >= 0.28  # counted in hundredths, user and system apart
        by_process = memory_by_process(pid)
        assert set(by_process) == pids and all(mib > 0.5 for mib in by_process.values())
        (other,) = pids - {pid}
        together = [p.pid for p in process_tree([pid, other, os.getpid()])]
        assert len(together) == len(set(together)) and set(together) >= {*pids, os.getpid()}
    finally:
        process.communicate(b"\n")
    assert process_tree(process.pid) == [] and processor_seconds(process.pid) == memory_mib(process.pid) == 0


def test_own_memory_is_a_part_of_the_machine():
    assert memory_mib(os.getpid()) == pytest.approx(memory_mib([os.getpid(), os.getpid()]), rel=0.2)
