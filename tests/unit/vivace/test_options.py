"""What the command line says is shown as it is."""

from __future__ import annotations

import pytest
import typer

from vivace.cli.options import reported, say


def test_brackets_are_no_markup(capsys):
    say("Chair [red], [interactions] and [/red]")
    with pytest.raises(typer.Exit), reported():
        raise ValueError("mapping.toml: [interactions] unknown keys ['a']")
    out = capsys.readouterr().out
    assert "Chair [red], [interactions] and [/red]" in out and "[interactions] unknown keys ['a']" in out
