"""Hostile accounts in a training log that know whom they attack: into how many answers of a run trained on it they push
an item, with and without caps of what one account teaches.

    python -m benchmarks.poisoned_log --name small --accounts 10,40 --caps 50

An attack copies lists: after every three events of some victim's history, in their order, comes the target, one event
every ``--pace`` seconds. It is by so many accounts that copy a victim each, the newest events of theirs (profile
injection, Burke et al. 2005), or by one that copies as many one after another. Each of ``--targets`` items, that
training saw least, has as many accounts. ``--caps``: of each user's events of a day the first so many are learned from,
and on one item one within half an hour (``preprocessing.caps``); the log's own users are held to it too. Tables are
those of ``benchmarks.item_knn``; with ``--train`` retriever and ranker of the preset are trained from the start on each
log. A row is the share of answers whose first ten hold a target, mean over targets, and NDCG@10 of the same requests:
of tables the validation requests, of models the test requests. The last line of stdout is one JSON object.
Axis legend: B requests, N candidates.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.item_knn import ALL, ease, item_knn
from benchmarks.shilling import TOP, answered
from loadtest.reports.record import record_line
from preprocessing.caps import LearningCaps
from preprocessing.features import Features
from training.data.counters import popularity
from training.judge.evaluate import Models
from training.learn.memory import session_sets
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.metrics import ndcg_of
from training.presets import Preset, preset as preset_of
from vivace.cli.options import console
from vivace.contract import FIRST_ID, ITEM, TIME, USER
from vivace.run import RANKING, Run

COPIED, EVERY, SEED = 9, 3, 7  # events of a victim; a target after so many


@dataclass(frozen=True)
class Attack:
    """``accounts`` copied lists for each target, by as many accounts or by ``one`` alone, an event every ``pace_s``."""

    accounts: int
    one: bool = False
    pace_s: int = 10

    def sequences(self, histories: list[np.ndarray], targets: list[int], now_ms: int) -> Iterator[tuple[Any, Any]]:
        """(items, times in ms) of each hostile account."""
        rng = np.random.default_rng(SEED)
        copies = [_copy(histories, target, rng) for _ in range(self.accounts) for target in targets]
        for items in [np.concatenate(copies)] if self.one and copies else copies:
            yield items, now_ms - 1000 * self.pace_s * np.arange(len(items), 0, -1)


def _copy(histories: list[np.ndarray], target: int, rng: np.random.Generator) -> np.ndarray:
    victim = histories[int(rng.integers(len(histories)))][-COPIED:]
    parts = [[*victim[at : at + EVERY], target] for at in range(0, len(victim), EVERY)]
    return np.concatenate(parts)


def poisoned(features: Features, folder: Path, attack: Attack, targets: list[int], caps: LearningCaps) -> float:
    """Writes features with the attack among the training sequences, held to ``caps``; the share of the log's own
    training events that these leave out."""
    shutil.copytree(features.folder, folder)
    files = Features(folder).files("train")
    tables = [pq.read_table(file) for file in files]
    histories = [np.array(h) for table in tables for h in table[ITEM].to_pylist() if len(h) >= COPIED]
    now_ms = max(int(table[TIME].combine_chunks().flatten().to_numpy().max()) for table in tables)
    dropped = own = 0
    for place, (file, table) in enumerate(zip(files, tables, strict=True)):
        kept = caps.table(table)
        own += len(table[ITEM].combine_chunks().flatten())
        dropped += len(table[ITEM].combine_chunks().flatten()) - len(kept[ITEM].combine_chunks().flatten())
        if not place:
            rows = list(attack.sequences(histories, targets, now_ms))
            kept = pa.concat_tables([kept, *([caps.table(_accounts(table, rows))] if rows else [])])
        pq.write_table(kept, file, row_group_size=max(len(kept), 1))
    return dropped / own


def _accounts(table: pa.Table, rows: list[tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    """Sequences as rows of ``table``; what else an event has is that of the table's first one."""
    columns: dict[str, Any] = {}
    for field in table.schema:
        if field.name == USER:
            columns[USER] = pa.array([f"hostile {n}" for n in range(len(rows))], field.type)
        elif field.name in (ITEM, TIME):
            columns[field.name] = pa.array([row[field.name == TIME].tolist() for row in rows], field.type)
        else:
            first = table[field.name][0].as_py()[0]
            columns[field.name] = pa.array([[first] * len(items) for items, _ in rows], field.type)
    return pa.table(columns, table.schema)


def trained(features: Features, preset: Preset, root: Path, targets: list[int]) -> dict[str, tuple[float, float]]:
    """(share with a target among the first ten, NDCG@10) of the test requests, by the retriever alone and as served."""
    train_retrieval(features, preset, root, SEED, console.print, quiet=True)
    train_ranker(features, preset, root, SEED, console.print, quiet=True)
    models, hits, ranks = (
        Models(features, preset, root, [RANKING]),
        np.zeros((2, len(targets))),
        list[list[np.ndarray]](),
    )
    for request in models.requests("test"):
        proposed = models.retrieve(request)
        logits = models.logits(request, proposed)
        order = logits[..., 0].masked_fill(proposed.ids_BN < FIRST_ID, -torch.inf).argsort(dim=1, descending=True)
        for method, ids in enumerate((proposed.ids_BN, proposed.ids_BN.gather(1, order))):
            hits[method] += [int((ids[:, :TOP] == target).any(1).sum()) for target in targets]
        ranks.append([proposed.rank_B.numpy(), models.ranked(request, proposed, logits).numpy()])
    of_method = [np.concatenate(parts) for parts in zip(*ranks, strict=True)]
    shares = hits.mean(1) / len(of_method[0])
    names = ("retriever", "retriever + ranker")
    return {n: (float(s), float(ndcg_of(r).mean())) for n, s, r in zip(names, shares, of_method, strict=True)}


def main(
    name: Annotated[str, typer.Option(help="a prepared run")] = "shop",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    accounts: Annotated[str, typer.Option(help="copied lists of a target, by commas")] = "10,40",
    caps: Annotated[int, typer.Option(help="events of a user and a day that are learned from", min=1)] = 50,
    pace: Annotated[int, typer.Option(help="seconds from one hostile event of an account to the next", min=1)] = 10,
    targets: int = 3,
    train: Annotated[str, typer.Option(help="retriever and ranker of this preset on each log; a minute each")] = "",
) -> None:
    features = Features(Run(artifacts / name).features)
    counts_V = popularity(features.files("train"), features.item_count())
    rare = np.flatnonzero(counts_V == counts_V[counts_V > 0].min())
    chosen = np.random.default_rng(SEED).choice(rare, min(targets, len(rare)), replace=False).tolist()
    attacks = [Attack(0), *(Attack(int(n), one, pace) for n in accounts.split(",") for one in (False, True))]
    again = 0.0 if features.schema.exclude_seen else 0.1
    rows: list[dict[str, Any]] = []
    for attack in attacks:
        for limits in (LearningCaps(), LearningCaps(day_events=caps, same_item_s=1800)):
            with tempfile.TemporaryDirectory() as scratch:
                root = Path(scratch) / name
                dropped = poisoned(features, root / "features", attack, chosen, limits)
                if limits.day_events and not attack.accounts and not dropped:
                    continue  # the same log
                log = Features(root / "features")
                sets_SV = session_sets(log.files("train"), log.item_count(), ALL)
                judged = {
                    "item-kNN": answered(item_knn(sets_SV, 500), log, chosen, again),
                    "EASE, ridge 300": answered(ease(sets_SV, 300.0), log, chosen, again),
                    "EASE, ridge 1000": answered(ease(sets_SV, 1000.0), log, chosen, again),
                }
                if train:
                    judged |= trained(log, preset_of(train), root, chosen)
            for method, (share, ndcg) in judged.items():
                rows.append({
                    "lists": attack.accounts, "by one account": attack.one, "caps": bool(limits.day_events),
                    "method": method, "top 10": share, "NDCG@10": ndcg, "own events left out": dropped,
                })  # fmt: skip
                console.print(rows[-1])
    print(
        record_line(
            "a poisoned training log", data=name, preset=train, targets=chosen, caps=caps, pace_s=pace, rows=rows
        )
    )


if __name__ == "__main__":
    typer.run(main)
