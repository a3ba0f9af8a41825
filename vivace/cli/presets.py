"""``vivace presets``."""

from __future__ import annotations

import inspect

from rich.table import Table

from vivace.cli.options import console, say


def presets() -> None:
    """List the presets of --preset: what each is for, and its sizes."""
    from training.presets import PRESETS

    table = Table(title="presets", title_justify="left")
    for column in ("name", "for", "encoder", "history", "epochs", "loss", "candidates ranked"):
        table.add_column(column)
    for name, make in PRESETS.items():
        preset = make()
        encoder = preset.encoder
        table.add_row(
            name,
            " ".join(inspect.getdoc(make).split()).replace("``", "") if make.__doc__ else "",
            f"{encoder.family}, width {encoder.width}, {encoder.layers} layers, {encoder.heads} heads",
            str(encoder.history),
            str(preset.retrieval.epochs),
            preset.retrieval.loss,
            str(preset.ranker.candidates),
        )
    console.print(table)
    say('one of your own is a JSON file: {"preset": "cpu", "encoder.width": 128}; vivace train --preset FILE.json')
