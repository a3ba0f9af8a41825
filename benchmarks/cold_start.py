"""New items: how often is an item found that no training event touched, with and without its text?

    python -m benchmarks.cold_start --name beauty --preset beauty

Of the items a share is drawn; all their events leave the training sequences; the retriever is trained on the rest, by
ids alone and with the words of the items' text; then the test requests whose target is one of them are ranked among
all items. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import tempfile
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
from training.learn.retriever import train_retrieval
from training.metrics import bootstrap
from training.presets import Preset, with_values
from training.scoring import SCORED, scored
from vivace.contract import FIRST_ID, ITEM
from vivace.run import Run

CUTS = (10, 100)
ROWS: dict[str, dict[str, Any]] = {
    "ids": {"encoder.text_tokens": 0, "retrieval.new_items": "described"},
    "ids and text": {"encoder.text_tokens": 24, "retrieval.new_items": "described"},
    "ids, nearest by text": {"encoder.text_tokens": 0},
    "ids and text, nearest by text": {"encoder.text_tokens": 24},
    "ids and text, nearest by text and minilm": {"encoder.text_tokens": 24, "retrieval.new_items": "tower"},
    "the same, shown more": {
        "encoder.text_tokens": 24,
        "retrieval.new_items": "tower",
        "retrieval.new_item_boost": 0.25,
    },
    "ids left out in a fifth, and text": {
        "encoder.text_tokens": 24,
        "encoder.id_dropout": 0.2,
        "retrieval.new_items": "described",
    },
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


def ranks_without(
    features: Features, items: np.ndarray, values: dict[str, Any], base: Preset, root: Path, seed: int
) -> np.ndarray:
    """Rank of every test request's target that is among ``items``, after training without them."""
    chosen = with_values(base, values)
    train_retrieval(features, chosen, root, seed, lambda _: None, quiet=True)
    model, heads = load_retrieval(features, chosen, root), [h.name for h in features.schema.heads]
    out = []
    with torch.no_grad():
        for request in batches.requests(features.files("test"), heads, chosen.encoder.window, SCORED):
            rank = scored(model, request, features.schema.exclude_seen)[0].cpu().numpy()
            out.append(rank[np.isin(request.target_B.numpy(), items)])
    return np.concatenate(out)


def main(
    name: str = "beauty",
    artifacts: Path = Path("artifacts"),
    preset: str = "",
    share: Annotated[float, typer.Option(help="of the items that are held out")] = 0.05,
    seed: int = 7,
) -> None:
    from vivace.cli.options import chosen_preset

    root = artifacts / name
    whole = Features(Run(root).features)
    count = whole.item_count() - FIRST_ID
    items = FIRST_ID + np.random.default_rng(seed).choice(count, round(share * count), replace=False)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        features = WithoutItems(whole, items, Path(folder))
        for row, values in ROWS.items():
            ranks = ranks_without(features, items, values, chosen_preset(preset, root), Path(folder) / row, seed)
            rows[row] = {f"recall@{k}": round(float((ranks < k).mean()), 4) for k in CUTS}
            rows[row]["interval@100"] = [round(x, 4) for x in bootstrap((ranks < 100).astype(float))]
            rows[row]["requests"] = len(ranks)
            print(row, rows[row], flush=True)
    print(record_line(
        "items without training events", data=name, held_out_items=len(items), seed=seed, rows=rows
    ))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
