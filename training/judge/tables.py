"""An evaluation for people: tables for the terminal, a reliability diagram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from training.judge.session_neighbours import SESSIONS

COLUMNS = ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@5", "NDCG@10", "NDCG@50", "MRR@10")
OF_SESSIONS = ("HR@1", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@10", "MRR@10", "MRR@20")  # HR@20 is published as P@20


def render(manifest: dict[str, Any], data_name: str) -> list[Table]:
    """Tables for the terminal, of the manifest that ``evaluate`` returns."""
    results = manifest["results"]
    main = Table(title=f"{data_name}: full ranking of {results['requests']:,} test requests, seed {manifest['seed']}")
    main.add_column("method")
    columns = OF_SESSIONS if SESSIONS in results["table"] else COLUMNS
    for name in columns:
        main.add_column(name, justify="right")
    for method, values in results["table"].items():
        main.add_row(method, *(f"{values[column]:.4f}" for column in columns))
    heads = Table(title="within the candidates, by task head")
    for name in ("head", "GAUC", "lists", "ECE"):
        heads.add_column(name, justify="left" if name == "head" else "right")
    for head, values in results["gauc"].items():
        gauc = "-" if values["GAUC"] is None else f"{values['GAUC']:.4f}"
        heads.add_row(head, gauc, f"{values['lists']:,}", f"{results['ece'][head]:.5f}")
    how = Table(title="protocol", show_header=False)
    for key, value in results["protocol"].items():
        how.add_row(key, str(value))
    return [main, heads, how]


def plot_reliability(curves: dict[str, np.ndarray], path: Path) -> None:
    """Reliability diagram of every head: predicted against observed, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.add_subplot()
    low = min(max(float(curve[:, :2].min()), 1e-5) for curve in curves.values())
    axis.plot([low, 1], [low, 1], color="gray", linewidth=1)
    for head, curve in curves.items():
        axis.plot(curve[:, 0].clip(low), curve[:, 1].clip(low), marker="o", label=head)
    axis.set(xscale="log", yscale="log", xlabel="predicted probability", ylabel="observed share")
    axis.legend()
    figure.savefig(path, dpi=120)
