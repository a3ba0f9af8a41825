"""Every benchmark that is run by hand says how."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "loadtest")
    for path in (ROOT / folder).rglob("*.py")
    if "typer.run(main)" in path.read_text() or "app.command()(main)" in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    module = importlib.import_module(name)
    app = typer.Typer()
    app.command()(module.main)
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0, done.output
    assert f"python -m {name}" in module.__doc__  # the command as one types it


def test_all_are_there():
    assert {"benchmarks.bench", "benchmarks.tuned", "benchmarks.peers.compare", "loadtest.generate.open_loop"} <= {
        *COMMANDS
    }
