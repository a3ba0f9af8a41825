"""``vivace presets``."""

from __future__ import annotations

import inspect

from rich.table import Table

from vivace.cli.options import console, say


def presets() -> None:
    """List the presets of --preset: what each is for, and its sizes."""
    from training.presets import PRESETS

    table = Table(title="presets", title_justify="left")
    for column in ("name", "for", "sizes"):
        table.add_column(column)
    for name, make in PRESETS.items():
        sizes, purpose = make(), inspect.getdoc(make) or ""
        encoder = sizes.encoder
        table.add_row(
            name,
            " ".join(purpose.split()).replace("``", ""),
            f"{encoder.family} {encoder.width} x {encoder.layers}, history {encoder.history}, "
            f"{sizes.retrieval.epochs} epochs",
        )
    console.print(table)
    say("sizes: family, width x layers of the encoder; events of the history that it reads; epochs of the retriever")
    say('one of your own is a JSON file: {"preset": "cpu", "encoder.width": 128}; vivace train --preset FILE.json')
