"""``make quality``: the ML-1M figures of the README, from the benchmark file, with protocol, seed and wall times.

    python -m benchmarks.quality --path /folder/of/ml-1m [--seed 7] [--name ml-1m-benchmark]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from loadtest.reports.record import record_line
from training.judge.evaluate import CONTROL, RANKED, RETRIEVAL as RETRIEVED
from vivace.cli.evaluate import evaluate
from vivace.cli.options import DEFAULT_ARTIFACTS
from vivace.cli.prepare import prepare
from vivace.cli.train import train
from vivace.run import RANKING, RETRIEVAL, Run


def main(
    path: Annotated[Path, typer.Option(help="folder of ml-1m with sasrec_ml-1m.txt.xz")],
    artifacts: Path = DEFAULT_ARTIFACTS,
    name: str = "ml-1m-benchmark",
    seed: int = 7,
    control: Annotated[bool, typer.Option(help="also train the ranker without its extra label")] = True,
) -> None:
    root, started = artifacts / name, time.monotonic()
    prepare(data="ml-1m-benchmark", path=path, name=name, artifacts=artifacts, seed=seed)
    busy = time.process_time()
    train(name=name, artifacts=artifacts, preset="cpu", seed=seed)
    busy = time.process_time() - busy  # of both models with all that belongs to it; 0 if they were there
    if control:
        train(name=name, artifacts=artifacts, preset="cpu", seed=seed, control=True)
    evaluate(name=name, artifacts=artifacts, preset="cpu", seed=seed)
    results = json.loads((Run(root).evaluation / "metrics.json").read_text())
    table = results["table"]
    seconds = {n: Run(root).manifest(n)["seconds"] for n in (RETRIEVAL, RANKING)}
    summary = {
        "retrieval_ndcg@10": round(table[RETRIEVED]["NDCG@10"], 4),
        "ranked_ndcg@10": round(table[RANKED]["NDCG@10"], 4),
        "lift": round(table[RANKED]["NDCG@10"] / table[RETRIEVED]["NDCG@10"] - 1, 4),
        "control_ndcg@10": round(table[CONTROL]["NDCG@10"], 4) if CONTROL in table else None,
        "retrieval_hr@10": round(table[RETRIEVED]["HR@10"], 4),
        "ranked_hr@10": round(table[RANKED]["HR@10"], 4),
        "ranked_hr@1": round(table[RANKED]["HR@1"], 4),
        "retrieval_hr@1": round(table[RETRIEVED]["HR@1"], 4),
        "training_cpu_minutes": round(busy / 60, 1),
        "seconds": {**seconds, "all": round(time.monotonic() - started)},
        "seed": seed,
        "protocol": results["protocol"],
    }
    print(record_line("ml-1m leave-one-out, full ranking", **summary))


if __name__ == "__main__":
    typer.run(main)
