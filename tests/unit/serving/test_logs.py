"""Logs stay within their size, keep a few older files, and are their owner's alone."""

from __future__ import annotations

import stat
import subprocess
import sys

from serving.logs import open_log, rotate, tail


def test_a_log_is_emptied_under_its_writer_and_kept(tmp_path):
    path = tmp_path / "triton.log"
    with open_log(path) as log:
        for n in range(4):
            log.write(f"part {n}\n".encode() * 10)
            log.flush()
            assert not rotate(path, max_bytes=1000, kept=2)
            assert rotate(path, max_bytes=50, kept=2)
        log.write(b"now\n")
    assert path.read_text() == "now\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["triton.log", "triton.log.1", "triton.log.2"]
    assert (tmp_path / "triton.log.1").read_text().startswith("part 3")
    assert (tmp_path / "triton.log.2").read_text().startswith("part 2")
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in tmp_path.iterdir())


def test_a_log_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "log"
    path.write_text("before\n")
    path.chmod(0o644)
    with open_log(path) as log:
        start = log.tell()
        log.write(b"after\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    where = f"\nthe whole log: {path}"
    assert tail(path, 5, start) == f"after{where}" and tail(None, 5) == ""
    assert tail(path, 5) == tail(path, 5, 10_000) == f"before\nafter{where}"  # emptied since


ORPHANS = """
import subprocess, time
from serving.process import Reaper, adopt_orphans, children
adopt_orphans()
mine = subprocess.Popen(["true"])
subprocess.run(["sh", "-c", "sleep 0.1 & sleep 0.1 & exit 0"])
reaper, reaped, until = Reaper(), 0, time.monotonic() + 20
while reaped < 2 and time.monotonic() < until:
    reaped += len(reaper.reap(but={mine.pid}))
    time.sleep(0.1)
print(reaped, mine.wait(), children())
"""


def test_orphans_are_waited_for_and_others_left_alone():
    out = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True)
    assert out.stdout.strip() == "2 0 set()", out.stderr


def test_of_a_long_log_the_errors_are_quoted_with_what_follows_them(tmp_path):
    path = tmp_path / "triton.log"
    why = [
        "E1128 03:00:00 1 model.cc:1] failed to load 'ranking': ModuleNotFoundError",
        "",
        "At:",
        "  model.py(12): load",
    ]
    table = ["+-------+", "| model | version | " + "x" * 2000, "+-------+"]
    notes = [f"I1128 03:00:0{n} 1 server.cc:2] note {n}" for n in range(9)]
    path.write_text("\n".join([*notes, *why, *notes, *table, "W1128 03:00:09 1 long " + "y" * 900]))
    assert tail(path, 25).splitlines() == [why[0], "At:", "  model.py(12): load", f"the whole log: {path}"]
    path.write_text("\n".join([*notes, *table, "W1128 03:00:09 1 long " + "y" * 900]))
    assert [len(line) for line in tail(path, 2).splitlines()[:2]] == [len(notes[-1]), 401]
