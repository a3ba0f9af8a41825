"""What the length of a history is worth on a log whose users come back to what they liked long ago, and what it costs.

    python -m benchmarks.long_histories --artifacts /tmp/long --out docs/benchmarks/long_histories.json

Prepares the made-up shop with ``long_taste`` (once), trains a small retriever for each length, and a ranker over each;
then rankers over the retrievers of short histories that choose among the older events too (``RankerConfig.nearest``).
Judged on the test requests like any run: NDCG@10 over all items, with 95 % bootstrap intervals over users. The cost is
the processor time of retrieval and ranking, one request at a time, as exported graphs in this process with one thread.
What is there is not made again. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from training.checkpoints import load_retrieval
from training.compile.onnx_export import RANKING_AXES, RETRIEVAL_AXES, export, names_of
from training.intervals import bootstrap, ndcg_of
from training.judge.evaluate import RANKED, RETRIEVAL, Models, _rank_test, Baselines
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.ranking import RankerConfig, RankingGraph
from training.models.retrieval import EncoderConfig, RetrievalGraph
from training.presets import Preset, RankerTraining, RetrievalTraining, shapes
from vivace import contract
from vivace.onnx_session import open_session

SEED = 7


def preset(history: int, reads: int = 0, nearest: int = 0, to: str = "candidate", epochs: int = 4) -> Preset:
    encoder = EncoderConfig(width=32, layers=2, heads=2, history=history, ffn_factor=2, context=False)
    return Preset(
        encoder=encoder,
        retrieval=RetrievalTraining(epochs=epochs, batch_size=max(3, 3_200 // history), ema=0.99, probe_users=0),
        ranker=RankerConfig(candidates=100, experts=2, expert_width=32),
        ranking=RankerTraining(epochs=3, batch_size=64, past_events=10),
    )


def main(artifacts: Path, lengths: str = "50,200,1000", users: int = 500, items: int = 1000, events: int = 500_000):
    torch.set_num_threads(1)
    features = Features(artifacts / "long" / "features")
    for n in map(int, lengths.split(",")):
        root = artifacts / f"h{n}"
        m = train_retrieval(features, preset(n), root, SEED, typer.echo, quiet=False)
        print(n, m["seconds"] if "seconds" in m else m)
        m = train_ranker(features, preset(n), root, SEED, typer.echo, quiet=False)


if __name__ == "__main__":
    typer.run(main)
