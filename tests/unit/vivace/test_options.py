"""What the command line says is shown as it is."""

from __future__ import annotations

from vivace.cli.options import say


def test_brackets_are_no_markup(capsys):
    say("Chair [red], [interactions] and [/red]")
    assert "Chair [red], [interactions] and [/red]" in capsys.readouterr().out
