"""``vivace evaluate --compare``: any set of evaluated runs side by side, with intervals over users and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from training.judge.evaluate import RANKED, RANKS, RETRIEVAL, WITHOUT_TIMES
from training.metrics import bootstrap, metrics, ndcg_of
from vivace.manifest import write_json
from vivace.run import EVALUATION, RANKING, RETRIEVAL as RETRIEVAL_STEP, Run

METHODS = (RETRIEVAL, RANKED, RETRIEVAL + WITHOUT_TIMES, RANKED + WITHOUT_TIMES)


@dataclass(frozen=True)
class Row:
    """NDCG@10 of one method of one run. ``gain`` against the same method of the first run, user by user, with its
    interval; None for the first run, or where the runs do not answer the same requests."""

    run: str
    method: str
    requests: int
    hr10: float
    ndcg10: float
    interval: tuple[float, float]
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    minutes: float = 0.0
    commit: str = ""
    seed: int = 0


def compare(runs: Sequence[Path], methods: Sequence[str] = METHODS) -> list[Row]:
    """Rows of ``runs`` (folders under artifacts, each evaluated). Raises FileNotFoundError or StaleError, which name
    the step to run."""
    rows: list[Row] = []
    first: dict[str, np.ndarray] = {}
    for number, root in enumerate(runs):
        run = Run(root)
        manifest = run.manifest(EVALUATION)
        minutes = sum(run.manifest(name)["seconds"] for name in (RETRIEVAL_STEP, RANKING)) / 60
        with np.load(run.evaluation / RANKS) as saved:
            ranks = {method: saved[method] for method in methods if method in saved}
        for method, rank in ranks.items():
            values = ndcg_of(rank)
            gain = interval = None
            if number == 0:
                first[method] = values
            elif method in first and len(first[method]) == len(values):
                difference = values - first[method]
                gain, interval = float(difference.mean()), bootstrap(difference)
            rows.append(
                Row(
                    root.name, method, len(rank), metrics(rank)["HR@10"], float(values.mean()), bootstrap(values),
                    gain, interval, round(minutes, 1), manifest["commit"], manifest["seed"],
                )
            )  # fmt: skip
    return rows


def render(rows: Sequence[Row]) -> Table:
    table = Table(title="NDCG@10 with 95 % bootstrap intervals over users; gain against the first run")
    for name in ("run", "method", "HR@10", "NDCG@10", "interval", "gain", "interval of the gain", "minutes", "seed"):
        table.add_column(name, justify="left" if name in ("run", "method") else "right")
    for r in rows:
        gain = "" if r.gain is None else f"{r.gain:+.4f}"
        spread = "" if r.gain_interval is None else f"{r.gain_interval[0]:+.4f} … {r.gain_interval[1]:+.4f}"
        table.add_row(
            r.run, r.method, f"{r.hr10:.4f}", f"{r.ndcg10:.4f}", f"{r.interval[0]:.4f} … {r.interval[1]:.4f}", gain,
            spread, f"{r.minutes:.1f}", str(r.seed),
        )  # fmt: skip
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """NDCG@10 and its interval, one bar a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    axis = figure.add_subplot()
    for place, r in enumerate(reversed(rows)):
        low, high = r.interval
        color = "tab:blue" if r.method == RANKED else "tab:gray"
        axis.errorbar(r.ndcg10, place, xerr=[[r.ndcg10 - low], [high - r.ndcg10]], fmt="o", color=color, capsize=3)
    axis.set_yticks(range(len(rows)), [f"{r.run}: {r.method}" for r in reversed(rows)])
    axis.set_xlabel("NDCG@10, 95 % interval over users")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    write_json(path, [asdict(row) for row in rows])
