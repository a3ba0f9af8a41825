"""What live rates of clicks by impressions bring where places on a page, not taste, decide what is clicked most.

    python -m benchmarks.shown_rates --folder artifacts/shown_rates --seeds 7,8,9

Writes a log of one day with a plant, prepares it and trains two rankers a seed on the same retriever: with live
counters, and with what was shown beside them (``ranker.shown_rates``). Both rank the test requests once.

The plant: each item has an appeal, the chance that who sees it clicks it, drawn anew every few hours. A crowd sees
pages, and every two hours the site promotes some items, which then take most of the places. So an item of much appeal
that is seldom shown has as many clicks as a dull one on every page. Whom the models are judged by come by other ways
than a page, such as a mail, and click an item by its appeal. The row "oracle" ranks by the appeal itself. The last line
of stdout is one JSON object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer
from rich.table import Table

from loadtest.reports.record import record_line
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from training.judge.evaluate import RANKED, RANKS, evaluate
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.metrics import MISS, bootstrap, ndcg_of
from training.presets import Preset, tiny
from vivace.cli.options import console
from vivace.contract import FIRST_ID, ITEM, TARGET, TARGET_TIME
from vivace.run import Run

START = 1_700_000_000_000
ROUND_MS = 10 * 60_000  # for which a promotion lasts
CLICK, SHOWN = "click", "impression"
COUNTERS, RATES, ORACLE = "live counters", "live counters and rates", "oracle"
MAPPING = f"""name = "promoted"
unknown_items = "keep"
exclude_seen = false

[interactions]
files = "log.csv"
user = "user"
item = "item"
time = "time"
time_unit = "ms"
event_type = "type"
shown_types = "{SHOWN}"
"""


@dataclass(frozen=True)
class Plant:
    """Size of the log. ``judged``: users with a validation and a test event; ``pages``: of the crowd in a round, of
    ``places`` items each; ``promoted``: items that are, for ``promotion_rounds``, ``push`` times as often on a page as
    others."""

    items: int = 60
    rounds: int = 144
    judged: int = 1500
    pages: int = 200
    places: int = 8
    promoted: int = 12
    push: float = 30.0
    promotion_rounds: int = 12
    appeal_rounds: int = 24
    seed: int = 0

    def appeals(self) -> np.ndarray:
        """Of each round and item, float64 [rounds, items]: each item's is drawn anew every ``appeal_rounds``, not all
        at the same time."""
        rng = np.random.default_rng([self.seed, 1])
        drawn = 0.03 + 0.5 * rng.random((self.rounds // self.appeal_rounds + 2, self.items)) ** 8
        phase = rng.integers(0, self.appeal_rounds, self.items)
        spell = (np.arange(self.rounds)[:, None] + phase[None, :]) // self.appeal_rounds
        appeals: np.ndarray = drawn[spell, np.arange(self.items)[None, :]]
        return appeals

    def log(self) -> pd.DataFrame:
        """user, item, time in ms and type of every event, in order of time."""
        rng, appeals = np.random.default_rng([self.seed, 2]), self.appeals()
        rows: list[tuple[str, str, int, str]] = []

        def page(user: str, items: np.ndarray, clicked: np.ndarray, time_ms: int) -> None:
            rows.extend((user, f"item {i}", time_ms, SHOWN) for i in items.tolist())
            rows.extend((user, f"item {i}", time_ms + 3_000 + 2_000 * n, CLICK) for n, i in enumerate(clicked.tolist()))

        for round_ in range(self.rounds):
            if round_ % self.promotion_rounds == 0:
                chance = np.ones(self.items)
                chance[rng.choice(self.items, self.promoted, replace=False)] = self.push
            for n in range(self.pages):
                items = rng.choice(self.items, self.places, replace=False, p=chance / chance.sum())
                clicked = items[rng.random(self.places) < appeals[round_, items]][:2]  # two of a user are for training
                page(f"crowd {round_} {n}", items, clicked, START + int((round_ + rng.random()) * ROUND_MS))
        for n in range(self.judged):
            times = np.sort(rng.random(3)) * 0.5 + rng.random() * (self.rounds - 1)  # rounds: within five minutes
            for at in times.tolist():
                weight = appeals[int(at)]
                clicked = rng.choice(self.items, 1, p=weight / weight.sum())
                page(f"judged {n}", clicked[:0], clicked, START + int(at * ROUND_MS))
        log = pd.DataFrame(rows, columns=["user", "item", "time", "type"])
        return log.sort_values("time", kind="stable").reset_index(drop=True)

    def write(self, folder: Path) -> Path:
        """The log and its mapping; where that is."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log().to_csv(folder / "log.csv", index=False)
        (folder / "mapping.toml").write_text(MAPPING)
        return folder / "mapping.toml"

    def oracle(self, features: Features) -> np.ndarray:
        """Ranks int64 [R] of the test requests' targets by their appeal at the moment."""
        names = features.items()[ITEM].tolist()
        number = np.array([int(name.split()[1]) for name in names])
        parts = [pq.read_table(f, columns=[TARGET, TARGET_TIME]) for f in features.files("test")]
        target = np.concatenate([t[TARGET].to_numpy() for t in parts])
        moment = np.concatenate([t[TARGET_TIME].to_numpy() for t in parts])
        appeal = self.appeals()[np.minimum((moment - START) // ROUND_MS, self.rounds - 1)]
        known = target >= FIRST_ID
        of_target = appeal[np.arange(len(target)), number[np.where(known, target - FIRST_ID, 0)]]
        return np.where(known, (appeal > of_target[:, None]).sum(1), MISS)


def preset(items: int, rates: bool, epochs: int) -> Preset:
    """A small model whose ranker gets all items with their live counts."""
    base = tiny()
    return replace(
        base,
        ranker=replace(base.ranker, candidates=items, rising=items, shown_rates=rates),
        ranking=replace(base.ranking, epochs=epochs, learning_rate=5e-3, patience=0),
    )


def ranks_of(features: Features, root: Path, seed: int, chosen: Preset) -> np.ndarray:
    """Ranks int64 [R] of the test requests' targets after the ranker of ``chosen`` was trained."""
    train_retrieval(features, chosen, root, seed, console.print, quiet=True)
    train_ranker(features, chosen, root, seed, console.print, quiet=True)
    evaluate(features, chosen, root, seed, console.print)
    with np.load(Run(root, features.folder).evaluation / RANKS) as saved:
        ranks: np.ndarray = saved[RANKED]
    return ranks


def main(
    folder: Annotated[Path, typer.Option(help="for the log and what is made of it")],
    seeds: Annotated[str, typer.Option(help="of the training, by commas")] = "7,8,9",
    judged: Annotated[int, typer.Option(help="users that the models are judged by")] = Plant.judged,
    pages: Annotated[int, typer.Option(help="of the crowd in ten minutes")] = Plant.pages,
    epochs: Annotated[int, typer.Option(help="of the ranker")] = 8,
) -> None:
    plant = Plant(judged=judged, pages=pages)
    prepare(Tables(plant.write(folder)), PrepareConfig(), folder / "run", 0, console.print)
    features = Features(folder / "run" / "features")
    numbers, ndcg = [int(s) for s in seeds.split(",")], dict[str, list[np.ndarray]]()
    for seed in numbers:
        for row, rates in ((COUNTERS, False), (RATES, True)):
            chosen = preset(plant.items, rates, epochs)
            ranks = ranks_of(features, folder / str(seed), seed, chosen)
            ndcg.setdefault(row, []).append(ndcg_of(ranks))
            console.print(f"seed {seed}, {row}: NDCG@10 {ndcg[row][-1].mean():.4f}")
    mean = {row: np.mean(values, axis=0) for row, values in ndcg.items()}
    mean[ORACLE] = ndcg_of(plant.oracle(features))
    table, lines = Table(title=f"NDCG@10 of {len(mean[ORACLE]):,} test requests, seeds {seeds}"), list[dict[str, Any]]()
    for column in ("row", "NDCG@10", "gain", "95 % interval"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row, values in mean.items():
        gain = values - mean[COUNTERS]
        low, high = bootstrap(gain)
        lines.append({
            "row": row, "ndcg10": round(float(values.mean()), 4), "gain": round(float(gain.mean()), 4),
            "gain_interval": [round(low, 4), round(high, 4)],
            "seeds": [round(float(v.mean()), 4) for v in ndcg.get(row, [])],
        })  # fmt: skip
        table.add_row(row, f"{values.mean():.4f}", f"{gain.mean():+.4f}", f"{low:+.4f} to {high:+.4f}")
    console.print(table)
    share = lines[1]["gain"] / lines[2]["gain"]
    console.print(f"share of the oracle's gain that rates recover: {share:.2f}")
    print(record_line("shown_rates", seeds=numbers, plant=plant.__dict__, rows=lines, recovered=round(share, 3)))


if __name__ == "__main__":
    typer.run(main)
