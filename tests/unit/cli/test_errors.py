"""What a user reads when something goes wrong, and that texts are printed as they are."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from vivace.cli import main, query
from vivace.cli.errors import reported
from vivace.cli.options import console, say
from vivace.client import Recommendation, VivaceError
from vivace.manifest import BusyError

RUNNER = CliRunner()
MARKUP = "[red]x[/red] [interactions] :smile: \\[y]"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(MARKUP), MARKUP),
        (VivaceError("refused"), "refused"),
        (BusyError("another"), "another"),
        (FileNotFoundError("features: run 'vivace prepare'"), "features: run 'vivace prepare'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), "a/b: is a folder, expected a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", Path("a/b")), "a/b: is a file, expected a folder"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: no permission"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), "a/b: no space left on the disk"),
    ],
)
def test_an_expected_error_is_one_line(error, line, capsys):
    with pytest.raises(typer.Exit) as stopped, reported():
        raise error
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err == f"vivace: {line}\n"


def test_a_fault_of_ours_leaves_its_traceback_in_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(typer.Exit) as stopped, reported():
        raise KeyError("planted")
    shown = capsys.readouterr().err
    assert stopped.value.exit_code == 1 and "KeyError: 'planted'" in shown and "Traceback" not in shown
    (path,) = re.findall(r"traceback in (\S+)", shown)
    assert "test_errors.py" in Path(path).read_text()
    monkeypatch.setenv("VIVACE_TRACEBACK", "1")
    with pytest.raises(typer.Exit), reported():
        raise KeyError("planted")
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130_and_usage_errors_pass():
    with pytest.raises(typer.Exit) as stopped, reported():
        raise KeyboardInterrupt
    assert stopped.value.exit_code == 130
    with pytest.raises(typer.BadParameter), reported():
        raise typer.BadParameter("x")


def test_texts_are_printed_as_they_are(capsys):
    say(MARKUP)
    table = Table(title=MARKUP)
    table.add_column(MARKUP)
    table.add_row(MARKUP)
    console.print(table)
    assert capsys.readouterr().out.count(MARKUP) == 4


def test_an_answer_shows_ids_beside_titles_and_no_empty_column(capsys, monkeypatch):
    monkeypatch.setattr(query, "titles", lambda run, items: [MARKUP if item == "i,1" else "" for item in items])
    answer = Recommendation(["i,1", "i2"], np.array([2.0, 1.0]), {"buy": np.array([0.5, 0.25])}, "ok", {"facets": None})
    query.print_answer(None, "", ["i,1"], answer)
    shown = capsys.readouterr().out
    assert f"history of 1, newest last: i,1 {MARKUP}" in shown
    first, second = (line for line in shown.splitlines() if re.match(r"│ \d", line))
    assert [cell.strip() for cell in first.strip("│").split("│")] == ["1", "i,1", MARKUP, "2.00", "0.500"]
    assert [cell.strip() for cell in second.strip("│").split("│")] == ["2", "i2", "", "1.00", "0.250"]
    assert "found by" not in shown and "understood" not in shown and "null" not in shown


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("ok", "answered from all"),
        ("degraded: popular items: USER_ID 'x' is unknown", "--history"),
        ("degraded: 1 of 2 HISTORY items are not in the catalogue", "left out"),
        ("degraded: something new", ""),
    ],
)
def test_a_status_is_explained(status, advice):
    assert advice in query.explained(status) and bool(query.explained(status)) == bool(advice)


def test_a_server_that_does_not_run_is_named_with_the_command(tmp_path):
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        port = unused.getsockname()[1]
        (tmp_path / "books" / "model_repository").mkdir(parents=True)
        out = RUNNER.invoke(
            main.app, ["query", "--url", f"127.0.0.1:{port}", "--artifacts", str(tmp_path), "--user", "u"]
        )
    assert out.exit_code == 1 and "vivace serve --name books" in out.stderr, out.output


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [("tables", "folder", "mapping"), ("ml-1m", "file", "reads the folder"), ("ml-1m", "", "needs --path")],
)
def test_a_path_of_the_wrong_kind_is_named(data, kind, words, tmp_path):
    (tmp_path / "file").write_text("")
    path = {"folder": ["--path", str(tmp_path)], "file": ["--path", str(tmp_path / "file")], "": []}[kind]
    out = RUNNER.invoke(main.app, ["prepare", "--data", data, *path, "--artifacts", str(tmp_path / "runs")])
    assert out.exit_code == 1 and words in out.stderr, out.output
    assert not (tmp_path / "runs").exists()


def test_named_data_sets_are_found_under_vivace_data(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVACE_DATA", str(tmp_path))
    out = RUNNER.invoke(main.app, ["prepare", "--data", "ml-1m-benchmark", "--artifacts", str(tmp_path / "runs")])
    assert out.exit_code == 1 and str(tmp_path / "ml-1m") in out.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--test-share", "0.6", "--valid-share", "0.4"), "expected shares above 0 that sum below 1"),
        (("--test-share", "0.3"), "leave-one-out holds out events of each user"),
    ],
)
def test_shares_that_hold_out_nothing_are_refused(tmp_path, arguments, expected):
    out = RUNNER.invoke(main.app, ["prepare", "--users", "20", "--artifacts", str(tmp_path / "runs"), *arguments])
    assert out.exit_code == 2 and expected in " ".join(out.output.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()
