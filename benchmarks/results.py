"""The ablation tables of docs/results.md: what each method brings on one data set, against the first row, user by user.

    python -m benchmarks.results items --data beauty --path /folder/of/beauty --preset beauty --seeds 7,8,9

Every row is the preset with a few values changed; rows share the prepared features. A row that was run is not run
again. Prints a Markdown table; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.checkpoints import load_retrieval
from training.data import batches
from training.judge.evaluate import RANKED, RETRIEVAL, evaluate
from training.learn.pretrain import FOLDER, Objective, Pretraining, pretrain
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.learn.text import pretrain_text
from training.metrics import bootstrap, metrics, ndcg_of
from training.models.adapters import Adaptation
from training.models.text_encoder import TextConfig
from training.presets import Preset, preset, with_values
from training.scoring import SCORED, scored
from vivace.manifest import Progress, write_text
from vivace.run import Run


@dataclass(frozen=True)
class Row:
    """One row: preset values by dotted name, objectives to pretrain with first, and how to fine-tune."""

    values: dict[str, Any] = field(default_factory=dict)
    pretraining: tuple[Objective, ...] = ()
    adaptation: Adaptation = field(default_factory=Adaptation)


RANDOM = {"retrieval.start": "random"}
SUITES: dict[str, dict[str, Row]] = {
    "families": {
        "sasrec": Row(),
        "sasrec, relative bias": Row({"encoder.position_bias": "relative"}),
        "hstu": Row({"encoder.family": "hstu"}),
        "bert4rec": Row({"encoder.family": "bert4rec"}),
        "gru": Row({"encoder.family": "gru", "encoder.layers": 1}),
        "lstm": Row({"encoder.family": "lstm", "encoder.layers": 1}),
    },
    "losses": {
        "full softmax": Row(),
        "full softmax, label smoothing 0.1": Row({"retrieval.label_smoothing": 0.1}),
        "sampled softmax, 1,024 by popularity": Row({"retrieval.loss": "sampled", "retrieval.negatives": 1024}),
        "gBCE, 1,024 uniform": Row({"retrieval.loss": "gbce", "retrieval.negatives": 1024}),
    },
    "training": {
        "preset": Row(),
        "random start": Row(RANDOM),
        "no weight average": Row({"retrieval.ema": 0.0}),
        "windows always cut at the same places": Row({"retrieval.random_offset": False}),
        "adversarial, 0.25": Row({"retrieval.adversarial": 0.25}),
    },
    "items": {
        "ids": Row({"encoder.text_tokens": 0, "encoder.attributes": False}),
        "ids and text": Row({"encoder.text_tokens": 24, "encoder.attributes": False}),
        "ids, text, attributes": Row({"encoder.text_tokens": 24, "encoder.attributes": True}),
        "ids and text encoder": Row({"encoder.text_tokens": 0, "encoder.text_encoder": True}),
        "ids, text and text encoder": Row({"encoder.text_tokens": 24, "encoder.text_encoder": True}),
    },
    "time": {
        "positions alone": Row(),
        "relative positions": Row({"encoder.position_bias": "relative"}),
        "time between events": Row({"encoder.time_bias": True}),
        "relative positions and time": Row({"encoder.position_bias": "relative", "encoder.time_bias": True}),
        "hstu": Row({"encoder.family": "hstu"}),
        "hstu with time": Row({"encoder.family": "hstu", "encoder.time_bias": True}),
    },
    "pretraining": {
        "none": Row(RANDOM),
        "masked items": Row(RANDOM, ("masked",)),
        "next segment": Row(RANDOM, ("segment",)),
        "next session": Row(RANDOM, ("session",)),
        "contrastive": Row(RANDOM, ("contrastive",)),
    },
    "adapters": {
        "full fine-tuning": Row({}, ("masked",)),
        "LoRA, rank 8, items too": Row({}, ("masked",), Adaptation(method="lora", rank=8)),
        "adapters of 16, items too": Row({"encoder.adapter": 16}, ("masked",), Adaptation(method="adapter")),
        "LoRA, rank 8, items frozen": Row({}, ("masked",), Adaptation(method="lora", rank=8, items=False)),
    },
}


MULTITASK: dict[str, dict[str, Any]] = {
    "MMoE, static weights": {},
    "PLE": {"ranker.mixture": "ple"},
    "shared bottom": {"ranker.mixture": "shared"},
    "MMoE, uncertainty weights": {"ranking.weighting": "uncertainty"},
    "MMoE, GradNorm": {"ranking.weighting": "gradnorm"},
}


def multitask(
    base: Preset, features: Features, root: Path, seed: int, say: Progress, keep: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Rankers that differ in how the heads share and weigh, and one single-task ranker a head, on one retriever; of
    these the rows that are named in ``keep`` and the first, if any are named."""
    first = root / "results" / "multitask" / f"retriever-{seed}"
    train_retrieval(features, base, first, seed, say, quiet=True)
    single = {f"{h.name} alone": {"ranking.weighting": f"only-{i}"} for i, h in enumerate(features.schema.heads)}
    rows = []
    for number, (name, values) in enumerate({**MULTITASK, **single}.items()):
        if keep and number and name not in keep:
            continue
        folder, chosen = root / "results" / "multitask" / f"{number}-{seed}", with_values(base, values)
        shutil.copytree(first / "retrieval", folder / "retrieval", dirs_exist_ok=True)
        ranker = train_ranker(features, chosen, folder, seed, say, quiet=True)
        results = evaluate(features, chosen, folder, seed, say)["results"]
        rows.append(
            {
                "row": name,
                "retrieval": results["table"][RETRIEVAL]["NDCG@10"],
                "ndcg@10": results["table"][RANKED]["NDCG@10"],
                "gauc": {h: v["GAUC"] for h, v in results["gauc"].items()},
                "ece": results["ece"],
                "seconds": ranker["seconds"],
            }
        )
    return rows


def print_multitask(rows: list[dict[str, Any]]) -> None:
    heads = list(rows[0]["gauc"])
    titles = ["row", "NDCG@10", *(f"GAUC {h}" for h in heads), *(f"ECE {h}" for h in heads), "seconds"]
    print(f"\nretrieval NDCG@10 {rows[0]['retrieval']:.4f}\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for r in rows:
        cells = ["-" if r["gauc"][h] is None else f"{r['gauc'][h]:.4f}" for h in heads] + [
            f"{r['ece'][h]:.5f}" for h in heads
        ]
        print(f"| {r['row']} | {r['ndcg@10']:.4f} | {' | '.join(cells)} | {r['seconds']:.0f} |")


def ranks_of_test(features: Features, chosen: Preset, root: Path) -> np.ndarray:
    """Rank of the target of every test request among all items, int64."""
    model = load_retrieval(features, chosen, root)
    heads = [h.name for h in features.schema.heads]
    ranks_by_batch = []
    with torch.no_grad():
        for request in batches.requests(features.files("test"), heads, chosen.encoder.window, SCORED):
            ranks_by_batch.append(scored(model, request, features.schema.exclude_seen)[0].cpu().numpy())
    return np.concatenate(ranks_by_batch)


def execute(row: Row, base: Preset, features: Features, folder: Path, seed: int) -> dict[str, Any]:
    """Trains one row with one seed unless it is there; NDCG@10 of every test request with minutes and parameters."""
    done = folder / "row.json"
    chosen = with_values(base, row.values)
    description = json.loads(json.dumps({"preset": asdict(chosen), **asdict(row)}))
    if done.exists() and json.loads(done.read_text())["row"] == description:
        return {**json.loads(done.read_text()), "ndcg": np.load(folder / "ndcg.npy")}
    folder.mkdir(parents=True, exist_ok=True)
    started, start_from = time.process_time(), None
    if row.pretraining:
        pretrain(features, chosen, Pretraining(objectives=row.pretraining), folder, seed, lambda _: None, quiet=True)
        start_from = folder / FOLDER
    manifest = train_retrieval(
        features, chosen, folder, seed, lambda _: None, quiet=True, start_from=start_from, adaptation=row.adaptation
    )
    minutes = (time.process_time() - started) / 60
    rank = ranks_of_test(features, chosen, folder)
    np.save(folder / "ndcg.npy", ndcg_of(rank))
    record = {
        "row": description,
        "cpu_minutes": round(minutes, 2),
        "hr10": metrics(rank)["HR@10"],
        "trained": manifest["results"]["trained_parameters"],
    }
    write_text(done, json.dumps(record))
    return {**record, "ndcg": ndcg_of(rank)}


def compare(
    suite: str, base: Preset, features: Features, root: Path, seeds: list[int], say: Progress,
    keep: Collection[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of a suite over seeds, each against the first, user by user; ``keep``: these rows and the first alone."""
    rows: list[dict[str, Any]] = []
    first: np.ndarray | None = None
    for number, (name, row) in enumerate(SUITES[suite].items()):
        if keep and number and name not in keep:
            continue
        by_seed = []
        for seed in seeds:
            folder = root / "results" / suite / f"{number}-{seed}"
            by_seed.append(execute(row, base, features, folder, seed))
            say(f"{name}, seed {seed}: NDCG@10 {by_seed[-1]['ndcg'].mean():.4f}")
        values = np.mean([r["ndcg"] for r in by_seed], axis=0)
        first = values if first is None else first
        gain = values - first
        rows.append(
            {
                "row": name,
                "ndcg@10": round(float(values.mean()), 4),
                "by_seed": [round(float(r["ndcg"].mean()), 4) for r in by_seed],
                "hr@10": round(float(np.mean([r["hr10"] for r in by_seed])), 4),
                "gain": round(float(gain.mean()), 4),
                "interval": [round(x, 4) for x in bootstrap(gain)] if gain.any() else None,
                "cpu_minutes": round(float(np.mean([r["cpu_minutes"] for r in by_seed])), 1),
                "trained": by_seed[0]["trained"],
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    titles = ("row", "HR@10", "NDCG@10", "gain", "95 % interval", "trained parameters", "CPU minutes")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for r in rows:
        gain = "" if r["interval"] is None else f"{r['gain']:+.4f}"
        interval = "" if r["interval"] is None else f"{r['interval'][0]:+.4f} … {r['interval'][1]:+.4f}"
        print(
            f"| {r['row']} | {r['hr@10']:.4f} | {r['ndcg@10']:.4f} | {gain} | {interval} | {r['trained']:,} "
            f"| {r['cpu_minutes']} |"
        )


def main(
    suite: Annotated[str, typer.Argument(help=", ".join([*SUITES, "multitask"]))],
    data_name: Annotated[str, typer.Option("--data")] = "shop",
    path: Path | None = None,
    artifacts: Path = Path("artifacts"),
    preset_name: Annotated[str, typer.Option("--preset")] = "",
    seeds: Annotated[str, typer.Option(help="by commas; multitask takes the first")] = "7",
    split: Annotated[str, typer.Option(help="leave-one-out or time")] = "leave-one-out",
    only: Annotated[str, typer.Option(help="rows, by semicolons; the first row is always run")] = "",
) -> None:
    from vivace.cli.options import chosen_preset, say
    from vivace.cli.prepare import prepare

    if suite not in (*SUITES, "multitask"):
        raise typer.BadParameter(f"expected multitask or one of {sorted(SUITES)}, got {suite!r}")
    root = prepare(data=data_name, path=path, artifacts=artifacts, split=split).root
    features = Features(Run(root).features)
    base = preset(preset_name) if preset_name else chosen_preset("", root)
    numbers = [int(s) for s in seeds.split(",")]
    keep = {w.strip() for w in only.split(";") if w.strip()}
    if suite == "multitask":
        numbers = numbers[:1]
        rows = multitask(base, features, root, numbers[0], say, keep)
        print_multitask(rows)
    else:
        if any(row.values.get("encoder.text_encoder") for row in SUITES[suite].values()):
            pretrain_text(features, TextConfig(), root, numbers[0], say)
        rows = compare(suite, base, features, root, numbers, say, keep)
        print_rows(rows)
    print(record_line("ablations", suite=suite, data=data_name, seeds=numbers, rows=rows))


if __name__ == "__main__":
    typer.run(main)
