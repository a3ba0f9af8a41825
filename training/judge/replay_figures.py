"""Figures of a replay: by method, by hour of the log, and as tables and a plot for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from training.metrics import bootstrap, ndcg_of
from vivace.contract import FIRST_ID

PROPENSITY_FLOOR = 1e-3
DEBIASED = (
    "sum(NDCG@10 / p) / sum(1 / p) over the requests; p: share of the last hour's clicks that were on the target, at "
    f"least {PROPENSITY_FLOOR}"
)
MODELS = 8  # the last rows, which are more than a counter: drawn bold
PLOTTED = 20  # requests of an hour, at least, for the plot
COLUMNS = ("NDCG@10", "HR@10", "coverage@10", "debiased NDCG@10")


class Answers:
    """Ranks and first answers by method, gathered in order of time."""

    CUT = 10

    def __init__(self, items: int) -> None:
        self.rank: dict[str, list[np.ndarray]] = {}
        self.answered_V: dict[str, np.ndarray] = {}
        self._share: list[np.ndarray] = []
        self.items, self.unknown = items, 0

    def add(self, method: str, rank_B: Tensor, ids_BN: Tensor) -> None:
        """Ranks of the targets, and the answer, best first; id 0 where there is none."""
        self.rank.setdefault(method, []).append(rank_B.cpu().numpy())
        answered_V = self.answered_V.setdefault(method, np.zeros(self.items, bool))
        answered_V[ids_BN[:, : self.CUT].cpu().numpy().ravel()] = True

    def add_propensity(self, target_B: Tensor, total_B: Tensor) -> None:
        """The last hour's clicks on each target, and on everything."""
        self._share.append((target_B / total_B.clamp_min(1)).cpu().numpy().astype(np.float64))

    def ranks(self) -> dict[str, np.ndarray]:
        return {method: np.concatenate(parts) for method, parts in self.rank.items()}

    def weights(self) -> np.ndarray:
        """Inverse propensity of each request's target, float64: at most 1 / PROPENSITY_FLOOR."""
        return 1.0 / np.maximum(np.concatenate(self._share), PROPENSITY_FLOOR)

    def coverage(self, method: str) -> float:
        """Distinct items of all answers over those of the catalogue."""
        return float(self.answered_V[method][FIRST_ID:].sum() / (self.items - FIRST_ID))


def figures(answers: Answers, hours: np.ndarray, reference: str) -> dict[str, Any]:
    """``rows`` by method with the gain over ``reference`` (mean and 95 % interval, paired by request), and ``by_hour``
    and ``by_day`` of the log, days with the same gains. ``hours``: of each request since the log's beginning, int64."""
    ranks, weights = answers.ranks(), answers.weights()
    ndcg = {method: ndcg_of(rank, answers.CUT) for method, rank in ranks.items()}
    rows: dict[str, dict[str, Any]] = {}
    for method, values in ndcg.items():
        gain = values - ndcg[reference]
        rows[method] = {
            "NDCG@10": float(values.mean()),
            "HR@10": float((ranks[method] < answers.CUT).mean()),
            "coverage@10": answers.coverage(method),
            "debiased NDCG@10": float((values * weights).sum() / weights.sum()),
            "gain": [float(gain.mean()), *bootstrap(gain)],
        }
    there = np.unique(hours)
    by_hour = {
        "hour": there.tolist(),
        "requests": [int((hours == h).sum()) for h in there],
        "NDCG@10": {method: [float(v[hours == h].mean()) for h in there] for method, v in ndcg.items()},
    }
    days = hours // 24
    of_days = {int(day): np.flatnonzero(days == day) for day in np.unique(days)}
    by_day = {
        "day": list(of_days),
        "requests": [len(requests) for requests in of_days.values()],
        "NDCG@10": {method: [float(v[r].mean()) for r in of_days.values()] for method, v in ndcg.items()},
        "gain": {
            method: [[float(gain[r].mean()), *bootstrap(gain[r])] for r in of_days.values()]
            for method, gain in ((method, values - ndcg[reference]) for method, values in ndcg.items())
        },
    }
    return {"rows": rows, "by_hour": by_hour, "by_day": by_day, "gain over": reference, "debiased": DEBIASED}


def render(results: dict[str, Any], name: str) -> Table:
    """The table for the terminal."""
    chosen = results["chosen"]
    notes = [
        f"{row}: {blend['model']:g} x logit + {blend['weight']:g} x log1p(count, half-life {blend['half_life']}) - "
        f"{blend['taken_off']:g} x log1p(training count)"
        for row, blend in chosen["blends"].items()
    ]
    table = Table(
        title=f"{name}: replay of {results['requests']:,} test requests",
        caption=""
        if not notes
        else "\n".join(notes) + f"\nchosen on {chosen['validation requests']:,} validation requests; gain over "
        f"{results['gain over']}, 95 % interval",
        caption_justify="left",
    )
    table.add_column("method")
    for column in (*COLUMNS, "gain", "interval"):
        table.add_column(column, justify="right")
    for method, row in results["rows"].items():
        gain, low, high = row["gain"]
        table.add_row(
            method, *(f"{row[column]:.4f}" for column in COLUMNS), f"{gain:+.4f}", f"{low:+.4f} … {high:+.4f}"
        )
    return table


def render_days(results: dict[str, Any], method: str) -> Table:
    """A method beside what its gain is over, by day of the log."""
    by_day, reference = results["by_day"], results["gain over"]
    table = Table(title=f"{method}, by day of the log: NDCG@10")
    for column in ("day", "requests", reference, method, "gain", "interval"):
        table.add_column(column, justify="right")
    of_days = zip(by_day["NDCG@10"][reference], by_day["NDCG@10"][method], by_day["gain"][method], strict=True)
    for day, requests, (before, after, gain) in zip(by_day["day"], by_day["requests"], of_days, strict=True):
        mean, low, high = gain
        table.add_row(
            str(day + 1), f"{requests:,}", f"{before:.4f}", f"{after:.4f}", f"{mean:+.4f}", f"{low:+.4f} … {high:+.4f}"
        )
    return table


def plot_by_hour(results: dict[str, Any], path: Path) -> None:
    """NDCG@10 of every method by hour of the log, and how many requests an hour had; hours of fewer than ``PLOTTED``
    requests are left out where any has so many."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    by_hour = results["by_hour"]
    requests = np.array(by_hour["requests"])
    shown = requests >= min(PLOTTED, requests.max())
    hours = np.array(by_hour["hour"])[shown]
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    methods = list(by_hour["NDCG@10"])
    for number, method in enumerate(methods):
        model = number >= len(methods) - MODELS
        style = {"linewidth": 2.5, "marker": "o"} if model else {"linewidth": 1, "linestyle": "--", "marker": "."}
        values = np.array(by_hour["NDCG@10"][method])[shown]
        top.plot(hours, values, label=method, color=colormaps["tab20"](number), **style)
    top.set(ylabel="NDCG@10")
    top.grid(alpha=0.3)
    top.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    below.bar(hours, requests[shown], color="tab:gray")
    below.set(xlabel=f"hour of the log with {PLOTTED} requests and more", ylabel="requests")
    figure.savefig(path, dpi=120)
