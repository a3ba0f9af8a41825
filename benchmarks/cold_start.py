"""New items: how often is an item found that no training event touched, with and without its text?

    python -m benchmarks.cold_start --name beauty --preset beauty

Of the items a share is drawn; all their events leave the training sequences; the retriever is trained on the rest, by
ids alone and with the words of the items' text; then the test requests whose target is one of them are ranked among
all items, and the others beside them: what new items win the others lose. Rows of one encoder share its training, whose
last step is what new items get. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.checkpoints import load_retrieval
from training.data import batches
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.learn.retriever import train_retrieval
from training.learn.warm_start import finish_unseen
from training.metrics import bootstrap
from training.models.retrieval import RetrievalModel
from training.presets import Preset, with_values
from training.scoring import SCORED, scored
from vivace.contract import FIRST_ID, ITEM
from vivace.run import Run
from vivace.windows import Window

CUTS = (10, 100)
IDS, TEXT = {"encoder.text_tokens": 0}, {"encoder.text_tokens": 24}
TOWER, GRAPH = {"retrieval.new_items": "tower"}, {"retrieval.new_items": "graph"}
BOOST = "retrieval.new_item_boost"
ROWS: dict[str, dict[str, Any]] = {
    "ids": IDS | {"retrieval.new_items": "described"},
    "ids and text": TEXT | {"retrieval.new_items": "described"},
    "ids, nearest by text": IDS,
    "ids and text, nearest by text": TEXT,
    "ids and text, nearest by text, +0.75": TEXT | {BOOST: 0.75},
    "ids and text, nearest by text and the graph": TEXT | GRAPH,
    "ids and text, nearest by text and the graph, +1": TEXT | GRAPH | {BOOST: 1.0},
    "ids and text, nearest by text and the graph, +1.25": TEXT | GRAPH | {BOOST: 1.25},
    "ids and text, nearest by text and minilm": TEXT | TOWER,
    "ids and text, nearest by text and minilm, +0.25": TEXT | TOWER | {BOOST: 0.25},
    "ids left out in a fifth, and text": TEXT | {"encoder.id_dropout": 0.2, "retrieval.new_items": "described"},
}


class WithoutItems(Features):
    """Prepared features whose training sequences lack ``items``; sequences that become empty are dropped."""

    def __init__(self, whole: Features, items: np.ndarray, folder: Path) -> None:
        super().__init__(whole.folder)
        self._train: list[Path] = []
        for file in whole.files("train"):
            columns = EventColumns.of_files([file]).names
            table = pq.read_table(file, columns=list(columns))
            lists = {name: table[name].combine_chunks() for name in columns}
            lengths = np.diff(lists[ITEM].offsets.to_numpy())
            keep = ~np.isin(lists[ITEM].flatten().to_numpy(), items)
            left = np.bincount(np.repeat(np.arange(len(lengths)), lengths), keep, minlength=len(lengths)).astype(int)
            offsets = pa.array(np.concatenate([[0], np.cumsum(left[left > 0])]), pa.int32())
            kept = {n: pa.ListArray.from_arrays(offsets, c.flatten().filter(pa.array(keep))) for n, c in lists.items()}
            pq.write_table(pa.table(kept), folder / file.name, row_group_size=max(len(offsets) - 1, 1))
            self._train.append(folder / file.name)

    def files(self, part: str) -> list[Path]:
        return self._train if part == "train" else super().files(part)


def trained_without(features: Features, chosen: Preset, root: Path, seed: int) -> RetrievalModel:
    """A retriever of the features whose items without events are as their description says; how they are freed is the
    last step of a training, so that rows which differ in nothing else share it."""
    described = with_values(chosen, {"retrieval.new_items": "described", "retrieval.new_item_boost": 0.0})
    train_retrieval(features, described, root, seed, lambda _: None, quiet=True)
    return load_retrieval(features, described, root)


def ranks_of(
    features: Features, part: str, model: RetrievalModel, window: Window, keep: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(rank of the target, the target's id) of the requests of a part of the split, int64 [requests]. ``keep``: of
    targets [n], which are judged, bool [n]."""
    heads, ranks, targets = [h.name for h in features.schema.heads], [], []
    with torch.no_grad():
        for whole in batches.requests(features.files(part), heads, window, SCORED):
            chosen = np.flatnonzero(keep(whole.target_B.numpy()))
            if len(chosen):
                request = whole.take(chosen)
                ranks.append(scored(model, request, features.schema.exclude_seen)[0].cpu().numpy())
                targets.append(request.target_B.numpy())
    return np.concatenate(ranks), np.concatenate(targets)


def judged(targets: np.ndarray, items: np.ndarray, others: float, rng: np.random.Generator) -> np.ndarray:
    """bool [n]: all requests for ``items``, of the rest a share."""
    chosen: np.ndarray = np.isin(targets, items) | (rng.random(len(targets)) < others)
    return chosen


def figures(ranks: np.ndarray, is_new: np.ndarray) -> dict[str, Any]:
    """Of requests for new items: recall, its interval; of the others NDCG@10 and recall@100."""
    new, others = ranks[is_new], ranks[~is_new]
    out: dict[str, Any] = {f"recall@{k}": round(float((new < k).mean()), 4) for k in CUTS}
    out["interval@100"] = [round(x, 4) for x in bootstrap((new < 100).astype(float))]
    gains = np.where(others < 10, 1 / np.log2(others + 2.0), 0.0)
    others_100 = round(float((others < 100).mean()), 4)
    return out | {"requests": len(new), "others": {"NDCG@10": round(float(gains.mean()), 4), "recall@100": others_100}}


def main(
    name: str = "beauty",
    artifacts: Path = Path("artifacts"),
    preset: str = "",
    share: Annotated[float, typer.Option(help="of the items that are held out")] = 0.05,
    seed: int = 7,
    only: Annotated[str, typer.Option(help="rows whose name has this")] = "",
    models_in: Annotated[
        Path | None, typer.Option("--models", help="keeps the trained models, for another run")
    ] = None,
    others: Annotated[float, typer.Option(help="share of the requests for other items that is judged")] = 1.0,
    split: Annotated[str, typer.Option(help="whose requests: test, or valid, by which boosts are chosen")] = "test",
) -> None:
    from vivace.cli.options import chosen_preset

    root = artifacts / name
    whole = Features(Run(root).features)
    count = whole.item_count() - FIRST_ID
    items = FIRST_ID + np.random.default_rng(seed).choice(count, round(share * count), replace=False)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, RetrievalModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        features, kept = WithoutItems(whole, items, Path(folder)), models_in or Path(folder)
        counts = popularity(features.files("train"), features.item_count())
        freed: dict[str, RetrievalModel] = {}
        for row, values in ROWS.items():
            if only not in row:
                continue
            chosen = with_values(chosen_preset(preset, root), values)
            encoder, how = repr(chosen.encoder), repr((chosen.encoder, chosen.retrieval.new_items))
            if encoder not in models:
                models[encoder] = trained_without(features, chosen, kept / f"encoder-{len(models)}", seed)
            if how not in freed:  # a boost is added to what it makes
                freed[how] = copy.deepcopy(models[encoder])
                finish_unseen(freed[how], counts, features, replace(chosen.retrieval, new_item_boost=0.0))
            model, drawn = copy.deepcopy(freed[how]).eval(), np.random.default_rng(seed)
            with torch.no_grad():
                model.bias[FIRST_ID:][torch.from_numpy(counts[FIRST_ID:] == 0)] += chosen.retrieval.new_item_boost
            ranks, targets = ranks_of(
                features, split, model, chosen.encoder.window,
                partial(judged, items=items, others=others, rng=drawn),
            )  # fmt: skip
            rows[row] = figures(ranks, np.isin(targets, items))
            print(row, rows[row], flush=True)
    print(record_line(
        "items without training events", data=name, held_out_items=len(items), seed=seed, split=split, rows=rows
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
