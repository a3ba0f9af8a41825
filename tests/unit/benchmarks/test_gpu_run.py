"""The GPU kit's runner: a step that hangs or fails costs its own time alone, and results are written after each."""

from __future__ import annotations

import sys
import time

import psutil

from benchmarks.gpu import run

WRITES = "import json, pathlib; pathlib.Path(r'{path}').write_text(json.dumps(dict(rows=[1], not_run=dict())))"
HANGS = "import subprocess, time; subprocess.Popen(['sleep', '77.5']); print('hanging', flush=True); time.sleep(99)"


def test_each_step_costs_its_own_time_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    monkeypatch.setattr(run, "WORTH_S", 0.1)

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code.replace("{", "{{").replace("}", "}}")]

    steps = [
        ("hangs", 1.0, python(HANGS)),
        ("fails", 15.0, python("raise SystemExit('no such card')")),
        ("works", 15.0, python(WRITES.replace("{path}", str(tmp_path / "works.json")))),
        ("late", 5.0, python("pass")),
    ]
    known: list[list[str]] = []
    began = time.monotonic()
    seconds = 60.0

    def on_step(results):
        known.append(list(results))
        if "works" in results:  # nothing is left for the last one
            monkeypatch.setattr(run, "WORTH_S", 1e9)

    results = run.run_steps(steps, tmp_path, seconds, on_step)
    assert time.monotonic() - began < 20
    assert results["hangs"]["outcome"] == "stopped" and results["hangs"]["last_words"] == "hanging"
    assert results["fails"]["outcome"] == "failed" and "no such card" in results["fails"]["last_words"]
    assert results["works"]["outcome"] == "ok" and results["works"]["rows"] == [1]
    assert "not begun" in results["late"]["outcome"]
    assert known[0] == ["hangs"] and known[-1] == ["hangs", "fails", "works", "late"]
    alive = [p for p in psutil.process_iter(["name", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
    assert not [p for p in alive if p.info["name"] == "sleep" and "77.5" in p.cmdline()]


def test_a_steps_results_of_an_earlier_run_are_not_taken_for_its_own(tmp_path):
    (tmp_path / "step.json").write_text('{"rows": ["old"]}')
    results = run.run_steps([("step", 5.0, [sys.executable, "-c", "pass"])], tmp_path, 60.0, lambda _: None)
    assert "rows" not in results["step"]


def test_what_runs_beside_a_step_ends_with_it_and_keeps_its_figures(tmp_path):
    figures = WRITES.replace("{path}", str(tmp_path / "sleeps.json"))
    code = f"import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); {figures}; time.sleep(99)"
    sleeper = [sys.executable, "-c", code.replace("{", "{{").replace("}", "}}")]
    waits = f"import pathlib, time\nwhile not list(pathlib.Path(r'{tmp_path}').glob('sleeps.json')): time.sleep(0.05)"
    steps = [("step", 50.0, [sys.executable, "-c", waits])]
    results = run.run_steps(steps, tmp_path, 60.0, lambda _: None, {"step": ("sleeps", sleeper)})
    assert results["step"]["outcome"] == "ok"
    assert results["sleeps"]["outcome"] == "beside step" and results["sleeps"]["rows"] == [1]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
