"""How much of a retriever's training batches is padding, and what a step costs with packing and without.

    python -m benchmarks.padding artifacts/ml/features --lengths 200,1000,2000

Batches are those of a training epoch (``training.data.batches``): windows sorted by length within a pool. Counted are
the share of the places that are padded, and of the pairs of places that attention would look at. Timed is the processor
time with packing (``training.models.long.packed``) and without, in turns: of loss and gradients over such batches, and
of encoding a batch of test requests in the order of the log, width by ``--width``. Use one thread (OMP_NUM_THREADS=1).
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data.batches import requests, training_batches
from training.data.counters import popularity
from training.learn.objectives import log_expected_counts, retrieval_loss
from training.models.long import packed
from training.models.long.attention import LONG
from training.models.retrieval import EncoderConfig, RetrievalModel
from training.presets import RetrievalTraining
from vivace.contract import PADDING_ID

SEED, NEVER = 7, 2.0


def counted(batches: list[Tensor]) -> dict[str, Any]:
    """Windows, events and the shares of padding of what the encoder reads of ``batches``, int64 [B, T + 1] each."""
    places = pairs = events = of_events = windows = 0
    for batch in batches:
        length_B = (batch[:, :-1] != PADDING_ID).sum(1)
        rows, width = len(batch), batch.shape[1] - 1
        windows, places, pairs = windows + rows, places + rows * width, pairs + rows * width**2
        events, of_events = events + int(length_B.sum()), of_events + int((length_B**2).sum())
    shares = {"padded": 1 - events / places, "padded_pairs": 1 - of_events / pairs}
    return {"steps": len(batches), "windows": windows, "events": events} | shares


def small_model(features: Features, length: int, width: int) -> RetrievalModel:
    """An untrained retriever of two layers."""
    popularity_V = torch.tensor(popularity(features.files("train"), features.item_count()))
    torch.manual_seed(SEED)
    return RetrievalModel(EncoderConfig(width=width, history=length, context=False), len(popularity_V), popularity_V)


def in_both_ways(step: Callable[[], object], turns: int) -> dict[str, Any]:
    """Processor ms of ``step`` with packing and without, and their ratio by turn."""
    share, ms = packed.PADDED, {"packed": list[float](), "padded": list[float]()}
    try:
        for _, way in in_turns(turns, list(ms)):
            packed.PADDED = share if way == "packed" else NEVER
            began = time.process_time()
            step()
            ms[way].append((time.process_time() - began) * 1000)
    finally:
        packed.PADDED = share
    ratio = [a / b for a, b in zip(ms["packed"], ms["padded"], strict=True)]
    return {f"{way}_ms": spread(of_way) for way, of_way in ms.items()} | {"ratio": spread(ratio)}


def of_training(batches: list[Tensor], model: RetrievalModel, turns: int) -> dict[str, Any]:
    """Of loss and gradients over ``batches``."""
    training = RetrievalTraining()
    loss = retrieval_loss(model, training, log_expected_counts(model.popularity, training))

    def step() -> None:
        for batch in batches:
            model.zero_grad()
            loss(batch)[0].backward()

    return in_both_ways(step, turns)


def of_requests(history_BT: Tensor, model: RetrievalModel, turns: int) -> dict[str, Any]:
    """Of encoding requests in the order of the log, as a ranker's training and evaluation do."""
    padded = float((history_BT == PADDING_ID).float().mean())
    with torch.no_grad():
        return {"padded": padded} | in_both_ways(lambda: model.eval().encode(history_BT), turns)


def main(
    features: Annotated[Path, typer.Argument(help="folder of prepared features")],
    lengths: Annotated[str, typer.Option(help="events of a history, by commas")] = "200,1000,2000",
    batch: Annotated[int, typer.Option(help="windows a step", min=1)] = 64,
    width: Annotated[int, typer.Option(help="of the model that is timed, 2 layers", min=2)] = 64,
    timed_steps: Annotated[int, typer.Option(help="of an epoch's first; 17 hold a pool (0: none)", min=0)] = 17,
    turns: Annotated[int, typer.Option(help="of the timing", min=1)] = 3,
) -> None:
    torch.set_num_threads(1)
    data, rows = Features(features), dict[str, Any]()
    for length in (int(n) for n in lengths.split(",")):
        read = list(training_batches(data.files("train"), length, batch, SEED, 1, random_offset=True))
        row = counted(read)
        line = f"{length}: {row['padded']:.1%} of the places, {row['padded_pairs']:.1%} of the pairs padded"
        model = small_model(data, length, width)
        if length > LONG:  # shorter ones are never packed
            history_BT = next(requests(data.files("test"), [], length, batch)).history_BT
            row["requests"] = of_requests(history_BT, model, turns)
            line += "; requests: {:.1%}, packed {} of the time".format(
                row["requests"]["padded"], with_spread(row["requests"]["ratio"], 2)
            )
            if timed_steps:
                row["training"] = of_training(read[:timed_steps], model, turns)
                line += f"; steps: packed {with_spread(row['training']['ratio'], 2)} of the time"
        rows[str(length)] = row
        typer.echo(line)
    typer.echo(record_line("padding", figures={"batch": batch, "width": width, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
