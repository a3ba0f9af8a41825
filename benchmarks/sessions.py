"""A log of sessions: P@20 and MRR@20 of each row of an evaluation, and what it gains over V-SKNN.

    python -m benchmarks.sessions --name tmall

Reads what ``vivace evaluate`` wrote. Requests of one session share its items, so intervals are over sessions: a
request belongs to the longest one that it is a beginning of. A row of the final fit is compared with V-SKNN over as
many events. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.judge.evaluate import FINAL_FIT, RANKS
from training.judge.session_neighbours import SESSIONS
from training.scoring import SCORED
from vivace.cli.options import console
from vivace.run import EVALUATION, Run

K, DRAWS = 20, 2000


def sessions_of(histories: list[list[int]], targets: list[int]) -> np.ndarray:
    """The session of each request, int64 from 0 on: requests whose items and target begin another's items are of one
    session with it."""
    whole = [(*history, target) for history, target in zip(histories, targets, strict=True)]
    longer = {tuple(history): full for history, full in zip(histories, whole, strict=True)}

    def longest(full: tuple[int, ...]) -> tuple[int, ...]:
        while full in longer:
            full = longer[full]
        return full

    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(longest(full), len(numbers)) for full in whole], np.int64)


def interval(values: np.ndarray, session: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` of requests, float64, over sessions drawn with replacement."""
    sums, counts = np.bincount(session, values), np.bincount(session)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(sums), len(sums)) for _ in range(DRAWS))
    low, high = np.quantile([sums[d].sum() / counts[d].sum() for d in draws], [0.025, 0.975])
    return float(low), float(high)


def of_ranks(rank: np.ndarray) -> dict[str, np.ndarray]:
    """P@K and MRR@K of each request, float64, of ranks from 0."""
    hit = rank < K
    return {f"P@{K}": hit.astype(float), f"MRR@{K}": np.where(hit, 1 / (rank + 1.0), 0.0)}


def rows_of(ranks: dict[str, np.ndarray], session: np.ndarray) -> list[dict[str, Any]]:
    """A row a method: its figures with their intervals, and those of the difference to V-SKNN."""
    rows = []
    for method, rank in ranks.items():
        base = of_ranks(ranks[FINAL_FIT + SESSIONS if method.startswith(FINAL_FIT) else SESSIONS])
        row: dict[str, Any] = {"method": method}
        for name, values in of_ranks(rank).items():
            gain = values - base[name]
            row[name], row[f"{name} interval"] = float(values.mean()), interval(values, session)
            row[f"{name} gain"], row[f"{name} gain interval"] = float(gain.mean()), interval(gain, session)
        rows.append(row)
    return rows


def main(
    name: Annotated[str, typer.Option(help="an evaluated run of a log of sessions")] = "tmall",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
) -> None:
    run = Run(artifacts / name)
    manifest, features = run.manifest(EVALUATION), Features(run.features)
    with np.load(run.evaluation / RANKS) as saved:
        ranks = {method: saved[method] for method in saved.files}
    if SESSIONS not in ranks:
        raise typer.BadParameter(f"{name} is no log of sessions: its evaluation has no row {SESSIONS!r}")
    read = list(batches.requests(features.files("test"), [], 1, SCORED))
    histories = [h.tolist() for request in read for h in request.histories]
    session = sessions_of(histories, [t for request in read for t in request.target_B.tolist()])
    rows = rows_of(ranks, session)
    table = Table(title=f"{name}: {len(session):,} requests of {session.max() + 1:,} sessions", title_justify="left")
    for column in ("method", f"P@{K}", f"MRR@{K}", f"P@{K} over V-SKNN", f"MRR@{K} over V-SKNN"):
        table.add_column(column, justify="left" if column == "method" else "right")
    percent = lambda row, key: f"{row[key]:.2%} ({row[f'{key} interval'][0]:.2%} to {row[f'{key} interval'][1]:.2%})"  # noqa: E731
    for row in rows:
        keys = (f"P@{K}", f"MRR@{K}", f"P@{K} gain", f"MRR@{K} gain")
        table.add_row(row["method"], *(percent(row, key) for key in keys))
    console.print(table)
    count, results = int(session.max()) + 1, manifest["results"]
    print(record_line("sessions", rows=rows, protocol=results["protocol"], seed=manifest["seed"], sessions=count))


if __name__ == "__main__":
    typer.run(main)
