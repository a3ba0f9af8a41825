"""Our training loop beside RecTools' SASRec: same events, width, layers, history, batch and loss, one after the other.

    python3.11 -m venv rectools-env && rectools-env/bin/pip install torch==2.13.0 "rectools[torch]==0.19.0"
    python -m benchmarks.speed --name ml-1m-benchmark --peer rectools-env/bin/python

Positions (next items to predict) a second of training alone, CPU minutes and NDCG@10 of each, all items ranked, seen
items filtered. RecTools trains on the newest window of each user, ours on all windows: positions, not epochs, compare.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from benchmarks.results import ranks_of_test
from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data import batches
from training.learn.retriever import train_retrieval
from training.metrics import metrics
from vivace.contract import ITEM, TARGET, USER
from vivace.run import Run

PEER = Path(__file__).resolve().parent / "peers" / "rectools_sasrec.py"


def _long(frame: pd.DataFrame) -> pd.DataFrame:
    lengths = frame[ITEM].map(len)
    return pd.DataFrame(
        {
            "user": np.repeat(frame[USER].to_numpy(), lengths),
            "item": np.concatenate(frame[ITEM].to_numpy()),
            "order": np.concatenate([np.arange(n) for n in lengths]),
        }
    )


def write_events(features: Features, folder: Path) -> None:
    """The encoded events as the peer reads them."""
    train = pd.concat([pd.read_parquet(f, columns=[USER, ITEM]) for f in features.files("train")])
    test = pd.concat([pd.read_parquet(f, columns=[USER, ITEM, TARGET]) for f in features.files("test")])
    _long(train).to_csv(folder / "train.csv", index=False)
    _long(test).to_csv(folder / "history.csv", index=False)
    test[[USER, TARGET]].set_axis(["user", "item"], axis=1).to_csv(folder / "target.csv", index=False)


def main(
    peer: Annotated[str, typer.Option(help="python of an environment with rectools[torch]")],
    name: str = "ml-1m-benchmark",
    artifacts: Path = Path("artifacts"),
    preset: str = "",
    epochs: Annotated[int, typer.Option(help="ours")] = 3,
    peer_epochs: int = 3,
    seed: int = 7,
) -> None:
    from vivace.cli.options import chosen_preset

    root = artifacts / name
    features, chosen = Features(Run(root).features), chosen_preset(preset, root)
    chosen = replace(chosen, retrieval=replace(chosen.retrieval, epochs=epochs, probe_users=0))
    e, t = chosen.encoder, chosen.retrieval
    sizes = {
        "layers": e.layers, "heads": e.heads, "width": e.width, "history": e.history, "dropout": e.dropout,
        "batch_size": t.batch_size, "learning_rate": 1e-3, "epochs": peer_epochs,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name_of:
        folder = Path(name_of)
        write_events(features, folder)
        windows = batches.training_batches(features.files("train"), e.history, t.batch_size, seed, 0)
        positions = sum(int((b[:, :-1] != 0).sum()) for b in windows)
        started = time.process_time()
        manifest = train_retrieval(features, chosen, folder / "ours", seed, lambda _: None, quiet=True)
        minutes = (time.process_time() - started) / 60
        ours_table = metrics(ranks_of_test(features, chosen, folder / "ours"))
        ours = {
            "positions_per_second": positions * len(manifest["results"]["epochs"]) / manifest["seconds"],
            "seconds": manifest["seconds"],
            "cpu_minutes": minutes,
            "ndcg@10": ours_table["NDCG@10"],
            "hr@10": ours_table["HR@10"],
            "epochs": epochs,
        }
        out = folder / "peer.json"
        done = subprocess.run(
            [peer, str(PEER), str(folder), json.dumps(sizes), str(out)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"rectools: exit code {done.returncode}: {done.stderr[-2000:]}")
        other: dict[str, Any] = json.loads(out.read_text())
    for label, r in (("ours", ours), ("RecTools", other)):
        print(
            f"{label:10s} {r['positions_per_second']:10,.0f} positions/s, {r['cpu_minutes']:.1f} CPU minutes, "
            f"NDCG@10 {r['ndcg@10']:.4f}"
        )
    record = {
        "data": name, "ours": ours, "rectools": other,
        "ratio": round(ours["positions_per_second"] / other["positions_per_second"], 2),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(record_line("training speed, positions a second", **record))


if __name__ == "__main__":
    typer.run(main)
