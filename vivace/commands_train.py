"""Verbs that make a run: prepare, train, pretrain, search, evaluate, compress, compile."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Bound,
    Data,
    DataPath,
    Force,
    Name,
    Precision,
    PresetName,
    Seed,
    Tables,
    Wandb,
    chosen_preset,
    console,
    reported,
    run_folder,
    say,
)


def prepare(
    data: Data = "shop",
    path: DataPath = None,
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    split: Annotated[str, typer.Option(help="leave-one-out or time")] = "leave-one-out",
    freq_threshold: Annotated[int, typer.Option(help="items with fewer events are out of vocabulary (0: none)")] = 0,
    max_items: Annotated[int, typer.Option(help="keep only the most frequent items (0: all)")] = 0,
    new_items: Annotated[
        bool, typer.Option(help="items of the catalogue without a training event are known too")
    ] = True,
    partitions: Annotated[int, typer.Option(help="files by user; one must fit in memory")] = 4,
    workers: Annotated[int, typer.Option(help="Dask worker processes (0: this process; CUDA workers with cuDF)")] = 0,
    users: Annotated[int, typer.Option(help="shop only: number of users")] = 20_000,
    items: Annotated[int, typer.Option(help="shop only: number of items")] = 5_000,
    events: Annotated[int, typer.Option(help="shop only: number of events, about")] = 500_000,
) -> None:
    """Read a log, fit NVTabular, write sequences, requests, transform.onnx and the feature store."""
    from preprocessing.contract import FIRST_ID
    from preprocessing.prepare import PrepareConfig
    from preprocessing.prepare import prepare as run
    from preprocessing.readers import open_source
    from preprocessing.splits import SplitConfig
    from preprocessing.workflow import VocabularyConfig
    from vivace.artifacts import exclusive

    with reported():
        root = run_folder(artifacts, name, data)
        vocabulary = VocabularyConfig(freq_threshold, max_items + FIRST_ID if max_items else 0, new_items)
        config = PrepareConfig(SplitConfig(split), vocabulary, partitions, workers)
        size = {"users": users, "items": items, "events": events, "seed": seed}
        with exclusive(root):
            results = run(open_source(data, path, size), config, root, seed, say)["results"]
        say(
            f"{results['events']:,} events, {results['users']:,} users, {results['items_in_vocabulary']:,} items; "
            f"requests {results['requests']}"
        )
        for reason, count in results["rejected"].items():
            say(f"[yellow]rejected[/yellow] {reason}: {count:,} (see {root / 'features' / 'rejects.csv'})")
        if results["licence"]:
            say(f"licence of the data: {results['licence']}")


def train(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    control: Annotated[bool, typer.Option(help="also train the ranker without its extra label")] = False,
    epochs: Annotated[int, typer.Option(help="epochs of the retriever (0: the preset's)")] = 0,
    loss: Annotated[str, typer.Option(help='"full", "sampled" or "gbce" ("": the preset\'s)')] = "",
    start_from: Annotated[
        Path | None, typer.Option("--from", help="folder of a pretrained or trained retriever to start from")
    ] = None,
    adapt: Annotated[str, typer.Option(help="with --from: full, lora or adapter")] = "full",
    rank: Annotated[int, typer.Option(help="with --adapt lora: rank of the updates")] = 8,
    wandb: Wandb = False,
    task: Annotated[str, typer.Option(help="recommend, or search: what makes a trained run's catalogue searchable")] = (
        "recommend"
    ),
) -> None:
    """Train the retriever, then the ranker; resumes from the last checkpoint. --task search: then the text encoder, the
    word index and the search ranker."""
    if task == "search":
        learn_search(artifacts / name, preset, seed)
        return
    track(wandb)
    from preprocessing.prepare import Features
    from training import distributed
    from training.adapt import Adaptation
    from training.train import train_retrieval
    from training.train_ranking import train_ranker
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        chosen = with_overrides(chosen_preset(preset, root, recorded=False), epochs, loss)
        features = Features(root / "features")
        with distributed.group() as world, exclusive(root) if world.first else contextlib.nullcontext():
            first = train_retrieval(
                features, chosen, root, seed, say if world.first else lambda _: None,
                start_from=start_from, adaptation=Adaptation(adapt, rank), world=world,
            )  # fmt: skip
            if not world.first:  # the ranker is small: the first process trains it alone
                return
            sizes = first["results"]
            say(
                f"retriever: {sizes['parameters']:,} parameters, {sizes['trained_parameters']:,} trained, "
                f"{first['seconds']:.0f} s"
            )
            second = train_ranker(features, chosen, root, seed, say)
            say(f"ranker: {second['results']['parameters']:,} parameters, {second['seconds']:.0f} s")
            if control:
                train_ranker(features, chosen, root, seed, say, control=True)


def learn_search(root: Path, preset: str, seed: int) -> None:
    from preprocessing.prepare import Features
    from search.train import SearchTraining, train_search
    from vivace.artifacts import exclusive

    with reported():
        features = Features(root / "features")
        with exclusive(root):
            found = train_search(features, chosen_preset(preset, root), root, SearchTraining(), seed, say)["results"]
        for kind, r in found["queries"].items():
            low, high = r["gain_interval"]
            say(
                f"queries made of {kind}, {r['requests']:,} test requests, NDCG@10: fused {r['fused']:.4f}, ranked "
                f"{r['ranked']:.4f}, with the user's history {r['with_history']:.4f} ({r['gain']:+.4f}, {low:+.4f} to "
                f"{high:+.4f}); {r['found']:.1%} found"
            )
        if log := found.get("log"):
            low, high = log["over_shown_interval"]
            say(
                f"{log['searches']:,} held-out searches of the log, NDCG@10 of clicks by inverse propensity: as shown "
                f"{log['shown']:.4f}, fused {log['fused']:.4f}, ranked {log['ranked']:.4f}, with the user's history "
                f"{log['with_history']:.4f} ({log['over_shown']:+.4f} over shown, {low:+.4f} to {high:+.4f})"
            )
        costs = (f"{d}: {r['NDCG@10']:.4f}, alike {r['alike']:.2f}" for d, r in found["diversity"].items())
        say(f"by diversity: {'; '.join(costs)}")
        say(f"vivace compile --name {root.name}, and QUERY is served")


def track(wandb: bool) -> None:
    from training.tracking import WANDB

    if wandb:
        os.environ[WANDB] = "1"


def with_overrides(chosen: Any, epochs: int = 0, loss: str = "") -> Any:
    if epochs:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, epochs=epochs))
    if loss:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, loss=loss))
    return chosen


def pretrain(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    objective: Annotated[
        str, typer.Option(help="by commas: masked, session, segment, contrastive; or text, for the text encoder")
    ] = "masked",
    epochs: Annotated[int, typer.Option(help="0: 2, and 10 for text")] = 0,
    wandb: Wandb = False,
) -> None:
    """Train the encoder without next-item labels; then: vivace train --from artifacts/<name>/pretrained."""
    track(wandb)
    from preprocessing.prepare import Features
    from training.pretrain import Pretraining
    from training.pretrain import pretrain as run
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        features = Features(root / "features")
        with exclusive(root):
            if objective == "text":
                from training.text_encoder import TextConfig, pretrain_text

                text = TextConfig(epochs=epochs) if epochs else TextConfig()
                manifest = pretrain_text(features, text, root, seed, say)
            else:
                config = Pretraining(tuple(o for o in objective.split(",") if o), epochs or 2)
                manifest = run(features, chosen_preset(preset, root, recorded=False), config, root, seed, say)
        say(f"pretrained: {manifest['results']['parameters']:,} parameters, {manifest['seconds']:.0f} s")


def search(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    trials: Annotated[int, typer.Option(help="trials to add to the study")] = 10,
    epochs: Annotated[int, typer.Option(help="epochs of a trial (0: the preset's)")] = 0,
    space: Annotated[
        Path | None, typer.Option(help='JSON, such as {"encoder.dropout": [0.0, 0.5]}; the default if none')
    ] = None,
) -> None:
    """Search the retriever's hyper-parameters on the validation requests; goes on with an earlier study."""

    from preprocessing.prepare import Features
    from training.search import search as run
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        wanted = json.loads(space.read_text()) if space else None
        chosen = with_overrides(chosen_preset(preset, root, recorded=False), epochs)
        with exclusive(root):
            study = run(Features(root / "features"), chosen, root, seed, trials, say, wanted)
        say(f"{len(study.trials)} trials; best {study.best_value:.4f} with {study.best_params}")
        say(f"study {root / 'search' / 'study.log'}, plot {root / 'search' / 'study.png'}")


def evaluate(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    compare: Annotated[str, typer.Option(help="names of evaluated runs, by commas: print them side by side")] = "",
    plot: Annotated[Path, typer.Option(help="picture of --compare")] = Path("compare.png"),
    task: Annotated[str, typer.Option(help="recommend, or search with --data esci and its --path")] = "recommend",
    data: Annotated[str, typer.Option("--data", help="of --task search: esci")] = "esci",
    path: DataPath = None,
) -> None:
    """Rank every item for every test request: baselines, retriever, ranker, control. --compare: several runs. --task
    search: BM25, dense, hybrid and ranker on judged queries."""
    if task == "search":
        evaluate_search(artifacts / (name if name != "shop" else data), data, path, seed)
        return
    if compare:
        compare_runs([artifacts / n for n in compare.split(",") if n], plot)
        return
    from preprocessing.prepare import Features
    from training.evaluate import evaluate as run
    from training.evaluate import render
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        with exclusive(root), console.status("ranking test requests") as status:
            features = Features(root / "features")
            manifest = run(features, chosen_preset(preset, root), root, seed, lambda text: status.update(text))
        for table in render(manifest, name):
            console.print(table)


def evaluate_search(root: Path, data: str, path: Path | None, seed: int) -> None:
    from search.data import read_esci
    from search.evaluate import FILE, esci_config, evaluate_step, render
    from vivace.artifacts import exclusive

    with reported():
        if data != "esci" or path is None:
            raise ValueError("--task search: expected --data esci and --path, the folder of the data set")
        with exclusive(root):
            results = evaluate_step(*read_esci(path), esci_config(), root, seed, say)
        console.print(render(results, f"{data}: search, {results['queries']} judged queries, all items ranked"))
        say(f"figures {root / FILE}")


def compare_runs(runs: list[Path], plot_file: Path) -> None:
    from training import compare

    with reported():
        rows = compare.compare(runs)
        console.print(compare.render(rows))
        compare.plot(rows, plot_file)
        compare.write_json(rows, plot_file.with_suffix(".json"))
        say(f"plot {plot_file}, figures {plot_file.with_suffix('.json')}")


def compress(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    variant: Annotated[str, typer.Option(help="folder under artifacts/<name>/compressed")] = "small",
    layers: Annotated[int, typer.Option(help="layers left of the retriever (0: all)")] = 0,
    heads: Annotated[int, typer.Option(help="attention heads left in each layer (0: all)")] = 0,
    ffn: Annotated[int, typer.Option(help="feed-forward channels left (0: all)")] = 0,
    width: Annotated[int, typer.Option(help="embedding dimensions left (0: all)")] = 0,
    memory: Annotated[int, typer.Option(help="newest encoded events the ranker reads (0: all)")] = 0,
    ranker_heads: Annotated[int, typer.Option(help="attention heads of the ranker (0: as before)")] = 0,
    followers: Annotated[int, typer.Option(help="followers kept of an item for the ranker (0: as before)")] = 0,
    mixture: Annotated[str, typer.Option(help='of the ranker\'s heads: "mmoe", "ple", "shared" ("": as before)')] = "",
    learning_rate: Annotated[float, typer.Option(help="of the recovery")] = 3e-3,
    dropout: Annotated[float, typer.Option(help="of the recovery")] = 0.1,
    sparsity: Annotated[str, typer.Option(help='of the encoder: "2:4", or a share of zeros such as 0.8')] = "",
    qat: Annotated[bool, typer.Option(help="recover with weights and activations rounded to eight bits")] = False,
    fresh: Annotated[bool, typer.Option(help="a new small model instead of the pruned one, taught likewise")] = False,
    epochs: Annotated[int, typer.Option(help="of recovery training under the whole model's eye")] = 4,
    precision: Precision = "fp32",
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Prune an evaluated run, let the whole model teach it, compile it, refuse it if it lost too much."""
    from preprocessing.prepare import Features
    from training.compress import FOLDER, Compression, SmallerRanker
    from training.compress import compress as run
    from training.constraints import Constraint
    from training.prune import Target
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        target, smaller = Target(layers, heads, ffn, width), SmallerRanker(memory, ranker_heads, followers, mixture)
        config = Compression(
            target,
            smaller,
            fresh,
            Constraint(sparsity, qat),
            epochs,
            learning_rate,
            dropout,
            precision=precision,
            bound=bound,
            force=force,
        )
        with exclusive(root):
            run(Features(root / "features"), chosen_preset(preset, root), root, variant, config, seed, say)
        say(f"vivace serve --name {name}/{FOLDER}/{variant}; python -m loadtest.graphs compares the speeds")


def compile_(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    preset: PresetName = "",
    seed: Seed = 7,
    precision: Precision = "fp32",
    tables: Tables = "fp32",
    fold: Annotated[bool, typer.Option(help="what depends on an item alone becomes a table of the catalogue")] = True,
    target: Annotated[
        list[str] | None, typer.Option(help="beside the CPU: openvino, cuda, tensorrt, tensorrt-rtx; may be repeated")
    ] = None,
    index: Annotated[str, typer.Option(help="candidates from a FAISS index: HNSW32 or HNSW32_SQ8 (else exact)")] = "",
    bound: Bound = 0.01,
    force: Force = False,
) -> None:
    """Export to ONNX, check against PyTorch (int8: by the quality gate), publish a new version of the repository."""
    from preprocessing.prepare import Features
    from training.export import CompileConfig, compile_models
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        config = CompileConfig(precision, tables, fold, tuple(target or ()), index, bound=bound, force=force)
        with exclusive(root):
            manifest = compile_models(Features(root / "features"), chosen_preset(preset, root), root, seed, say, config)
        for stage, values in manifest["results"]["parity"].items():
            say(f"{stage}: PyTorch against ONNX " + ", ".join(f"{k} {v:.2g}" for k, v in values.items()))
        for kind, values in manifest["results"].get("targets", {}).items():
            say(f"target {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
