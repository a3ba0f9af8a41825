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

from preprocessing.features import Features
from training.checkpoints import load_retrieval
from training.data import batches as data
from training.judge.evaluate import RANKED, RETRIEVAL, evaluate
from training.learn.pretrain import FOLDER, Pretraining, pretrain
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.learn.text import pretrain_text
from training.metrics import bootstrap, metrics, ndcg_of
from training.models.adapters import Adaptation
from training.models.text_encoder import TextConfig
from training.presets import Preset, preset, with_values
from training.scoring import SCORED, scored
from vivace.manifest import Progress, commit, write_text


@dataclass(frozen=True)
class Run:
    """One row: preset values by dotted name, objectives to pretrain with first, and how to fine-tune."""

    values: dict[str, Any] = field(default_factory=dict)
    pretraining: tuple[str, ...] = ()
    adaptation: Adaptation = field(default_factory=Adaptation)


RANDOM = {"retrieval.start": "random"}
SUITES: dict[str, dict[str, Run]] = {
    "families": {
        "sasrec": Run(),
        "sasrec, relative bias": Run({"encoder.position_bias": "relative"}),
        "hstu": Run({"encoder.family": "hstu"}),
        "bert4rec": Run({"encoder.family": "bert4rec"}),
        "gru": Run({"encoder.family": "gru", "encoder.layers": 1}),
        "lstm": Run({"encoder.family": "lstm", "encoder.layers": 1}),
    },
    "losses": {
        "full softmax": Run(),
        "full softmax, label smoothing 0.1": Run({"retrieval.label_smoothing": 0.1}),
        "sampled softmax, 1,024 by popularity": Run({"retrieval.loss": "sampled", "retrieval.negatives": 1024}),
        "gBCE, 1,024 uniform": Run({"retrieval.loss": "gbce", "retrieval.negatives": 1024}),
    },
    "training": {
        "preset": Run(),
        "random start": Run(RANDOM),
        "no weight average": Run({"retrieval.ema": 0.0}),
        "windows always cut at the same places": Run({"retrieval.random_offset": False}),
        "adversarial, 0.25": Run({"retrieval.adversarial": 0.25}),
    },
    "items": {
        "ids": Run({"encoder.text_tokens": 0, "encoder.attributes": False}),
        "ids and text": Run({"encoder.text_tokens": 24, "encoder.attributes": False}),
        "ids, text, attributes": Run({"encoder.text_tokens": 24, "encoder.attributes": True}),
        "ids and text encoder": Run({"encoder.text_tokens": 0, "encoder.text_encoder": True}),
        "ids, text and text encoder": Run({"encoder.text_tokens": 24, "encoder.text_encoder": True}),
    },
    "time": {
        "positions alone": Run(),
        "relative positions": Run({"encoder.position_bias": "relative"}),
        "time between events": Run({"encoder.time_bias": True}),
        "relative positions and time": Run({"encoder.position_bias": "relative", "encoder.time_bias": True}),
        "hstu": Run({"encoder.family": "hstu"}),
        "hstu with time": Run({"encoder.family": "hstu", "encoder.time_bias": True}),
    },
    "pretraining": {
        "none": Run(RANDOM),
        "masked items": Run(RANDOM, ("masked",)),
        "next segment": Run(RANDOM, ("segment",)),
        "next session": Run(RANDOM, ("session",)),
        "contrastive": Run(RANDOM, ("contrastive",)),
    },
    "adapters": {
        "full fine-tuning": Run({}, ("masked",)),
        "LoRA, rank 8, items too": Run({}, ("masked",), Adaptation("lora", 8)),
        "adapters of 16, items too": Run({"encoder.adapter": 16}, ("masked",), Adaptation("adapter")),
        "LoRA, rank 8, items frozen": Run({}, ("masked",), Adaptation("lora", 8, items=False)),
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
        found = evaluate(features, chosen, folder, seed, say)["results"]
        rows.append(
            {
                "row": name,
                "retrieval": found["table"][RETRIEVAL]["NDCG@10"],
                "ndcg@10": found["table"][RANKED]["NDCG@10"],
                "gauc": {h: v["GAUC"] for h, v in found["gauc"].items()},
                "ece": found["ece"],
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
    found = []
    with torch.no_grad():
        for request in data.requests(features.files("test"), heads, chosen.encoder.history, SCORED):
            found.append(scored(model, request, features.schema.exclude_seen)[0].cpu().numpy())
    return np.concatenate(found)


def execute(run: Run, base: Preset, features: Features, folder: Path, seed: int) -> dict[str, Any]:
    """Trains one row with one seed, or finds it; NDCG@10 of every test request with minutes and parameters."""
    done = folder / "row.json"
    chosen = with_values(base, run.values)
    wanted = json.loads(json.dumps({"preset": asdict(chosen), **asdict(run)}))
    if done.exists() and json.loads(done.read_text())["row"] == wanted:
        return {**json.loads(done.read_text()), "ndcg": np.load(folder / "ndcg.npy")}
    folder.mkdir(parents=True, exist_ok=True)
    started, start_from = time.process_time(), None
    if run.pretraining:
        pretrain(features, chosen, Pretraining(run.pretraining), folder, seed, lambda _: None, quiet=True)
        start_from = folder / FOLDER
    manifest = train_retrieval(
        features, chosen, folder, seed, lambda _: None, quiet=True, start_from=start_from, adaptation=run.adaptation
    )
    minutes = (time.process_time() - started) / 60
    rank = ranks_of_test(features, chosen, folder)
    np.save(folder / "ndcg.npy", ndcg_of(rank))
    record = {
        "row": wanted,
        "cpu_minutes": round(minutes, 2),
        "hr10": metrics(rank)["HR@10"],
        "trained": manifest["results"]["trained_parameters"],
    }
    write_text(done, json.dumps(record))
    return {**record, "ndcg": ndcg_of(rank)}


def main(
    suite: Annotated[str, typer.Argument(help=", ".join([*SUITES, "multitask"]))],
    data_name: Annotated[str, typer.Option("--data")] = "shop",
    path: Path | None = None,
    artifacts: Path = Path("artifacts"),
    preset_name: Annotated[str, typer.Option("--preset")] = "",
    seeds: Annotated[str, typer.Option(help="by commas")] = "7",
    split: Annotated[str, typer.Option(help="leave-one-out or time")] = "leave-one-out",
    only: Annotated[str, typer.Option(help="rows, by semicolons; the first row is always run")] = "",
) -> None:
    from vivace.cli.options import chosen_preset, say
    from vivace.cli.prepare import prepare

    if suite not in (*SUITES, "multitask"):
        raise typer.BadParameter(f"expected multitask or one of {sorted(SUITES)}, got {suite!r}")
    root = prepare(data=data_name, path=path, artifacts=artifacts, split=split).root
    features = Features(root / "features")
    base = preset(preset_name) if preset_name else chosen_preset("", root)
    wanted = [int(s) for s in seeds.split(",")]
    keep = {w.strip() for w in only.split(";") if w.strip()}
    if suite == "multitask":
        found_rows = multitask(base, features, root, wanted[0], say, keep)
        print_multitask(found_rows)
        print(
            json.dumps({"suite": suite, "data": data_name, "seed": wanted[0], "rows": found_rows, "commit": commit()})
        )
        return
    if any(run.values.get("encoder.text_encoder") for run in SUITES[suite].values()):
        pretrain_text(features, TextConfig(), root, wanted[0], say)
    rows, first = [], None
    for number, (name, run) in enumerate(SUITES[suite].items()):
        if keep and number and name not in keep:
            continue
        found = []
        for seed in wanted:
            folder = root / "results" / suite / f"{number}-{seed}"
            found.append(execute(run, base, features, folder, seed))
            say(f"{name}, seed {seed}: NDCG@10 {found[-1]['ndcg'].mean():.4f}")
        values = np.mean([f["ndcg"] for f in found], axis=0)
        first = values if first is None else first
        gain = values - first
        rows.append(
            {
                "row": name,
                "ndcg@10": round(float(values.mean()), 4),
                "by_seed": [round(float(f["ndcg"].mean()), 4) for f in found],
                "hr@10": round(float(np.mean([f["hr10"] for f in found])), 4),
                "gain": round(float(gain.mean()), 4),
                "interval": [round(x, 4) for x in bootstrap(gain)] if gain.any() else None,
                "cpu_minutes": round(float(np.mean([f["cpu_minutes"] for f in found])), 1),
                "trained": found[0]["trained"],
            }
        )
    titles = ("row", "HR@10", "NDCG@10", "gain", "95 % interval", "trained parameters", "CPU minutes")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for r in rows:
        gain_text = "" if r["interval"] is None else f"{r['gain']:+.4f}"
        spread = "" if r["interval"] is None else f"{r['interval'][0]:+.4f} … {r['interval'][1]:+.4f}"
        print(
            f"| {r['row']} | {r['hr@10']:.4f} | {r['ndcg@10']:.4f} | {gain_text} | {spread} | {r['trained']:,} "
            f"| {r['cpu_minutes']} |"
        )
    print(json.dumps({"suite": suite, "data": data_name, "seeds": wanted, "rows": rows, "commit": commit()}))


if __name__ == "__main__":
    typer.run(main)
