"""The set-up names what the system lacks before it downloads anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def test_preflight_is_content_here():
    done = subprocess.run([sys.executable, str(CHECKOUT / "deploy" / "preflight.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_named(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(CHECKOUT / "deploy" / "preflight.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "build-essential" in done.stderr


def test_a_missing_python_is_named(tmp_path):
    command = [str(CHECKOUT / "deploy" / "setup.sh"), "python3.11-is-not-here", str(tmp_path / "venv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "python3.11-is-not-here" in done.stderr
    assert not (tmp_path / "venv").exists()
