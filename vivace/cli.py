"""``vivace``: one verb a step. Each verb is a thin shell over a function of its stage's folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
reports = typer.Typer(no_args_is_help=True)
app.add_typer(reports, name="report", help="Pages that show what was measured.")
console = Console(width=None if sys.stdout.isatty() else 120)

Data = Annotated[
    str, typer.Option("--data", help="shop, ml-1m, ml-1m-benchmark, beauty, globo, hm, retailrocket or tables")
]
DataPath = Annotated[Path | None, typer.Option("--path", help="folder of the data set; for tables the TOML mapping")]
Name = Annotated[str, typer.Option("--name", help="folder under --artifacts; the data set's name if empty")]
Artifacts = Annotated[Path, typer.Option("--artifacts", help="where artifacts go")]
PresetName = Annotated[
    str, typer.Option("--preset", help="sizes by name or JSON file; by the data set, or as trained, if empty")
]
Seed = Annotated[int, typer.Option("--seed")]
Profile = Annotated[str, typer.Option("--profile", help='configs/<profile>.pbtxt; "" is config.pbtxt')]
Precision = Annotated[str, typer.Option("--precision", help="fp32, fp16, int8, int8-qdq or fp8: docs/compress.md")]
Tables = Annotated[str, typer.Option("--tables", help="of items: fp32, or int8 for a quarter of the memory")]
Bound = Annotated[float, typer.Option("--bound", help="relative fall of NDCG@10 that the quality gate lets through")]
Force = Annotated[bool, typer.Option("--force", help="publish what the quality gate refuses; it is recorded")]
Wandb = Annotated[
    bool, typer.Option("--wandb", help="log to Weights & Biases too (offline without a key; WANDB_MODE decides)")
]
Host = Annotated[str, typer.Option("--host", help="address to bind or to call")]
DEFAULT_ARTIFACTS = Path("artifacts")


def say(text: str) -> None:
    console.print(f"[dim]·[/dim] {text}", highlight=False)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Expected errors as one line and exit code 1; Ctrl-C as exit code 130. The rest shows its traceback."""
    from serving.client import VivaceError
    from serving.launcher import ServerError
    from vivace.artifacts import BusyError

    try:
        yield
    except (ValueError, FileNotFoundError, NotImplementedError, ServerError, BusyError, VivaceError) as error:
        console.print(f"[red]vivace:[/red] {error}", highlight=False, markup=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped", highlight=False)
        raise typer.Exit(130) from None


def _root(artifacts: Path, name: str, data: str) -> Path:
    return artifacts / (name or data)


def _preset(name: str, root: Path, recorded: bool = True) -> Any:
    from preprocessing.contract import DataSchema
    from training.presets import PRESET, from_json, preset

    own = root / PRESET
    if recorded and not name and own.exists():
        return from_json(json.loads(own.read_text()))
    schema = root / "features" / "schema.json"
    known = DataSchema.load(schema).name if schema.exists() else ""
    return preset(name or ("shop" if known == "shop" else "cpu"))


@app.command()
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
        root = _root(artifacts, name, data)
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


@app.command()
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
    from training.train import train_ranker, train_retrieval
    from vivace.artifacts import exclusive

    with reported():
        root = artifacts / name
        chosen = with_overrides(_preset(preset, root, recorded=False), epochs, loss)
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
            found = train_search(features, _preset(preset, root), root, SearchTraining(), seed, say)["results"]
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


@app.command()
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
                manifest = run(features, _preset(preset, root, recorded=False), config, root, seed, say)
        say(f"pretrained: {manifest['results']['parameters']:,} parameters, {manifest['seconds']:.0f} s")


@app.command()
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
        chosen = with_overrides(_preset(preset, root, recorded=False), epochs)
        with exclusive(root):
            study = run(Features(root / "features"), chosen, root, seed, trials, say, wanted)
        say(f"{len(study.trials)} trials; best {study.best_value:.4f} with {study.best_params}")
        say(f"study {root / 'search' / 'study.log'}, plot {root / 'search' / 'study.png'}")


@app.command()
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
            manifest = run(features, _preset(preset, root), root, seed, lambda text: status.update(text))
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


@app.command()
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
            run(Features(root / "features"), _preset(preset, root), root, variant, config, seed, say)
        say(f"vivace serve --name {name}/{FOLDER}/{variant}; python -m loadtest.graphs compares the speeds")


@app.command("compile")
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
            manifest = compile_models(Features(root / "features"), _preset(preset, root), root, seed, say, config)
        for stage, values in manifest["results"]["parity"].items():
            say(f"{stage}: PyTorch against ONNX " + ", ".join(f"{k} {v:.2g}" for k, v in values.items()))
        for kind, values in manifest["results"].get("targets", {}).items():
            say(f"target {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


@app.command()
def serve(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any free port")] = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    status_port: Annotated[int, typer.Option(help="Prometheus metrics of the watchdog (0: none)")] = 8003,
    profile: Profile = "",
    cache_mb: Annotated[int, typer.Option(help="cache of encoded users (0: none); takes the profile cached")] = 0,
    trace_url: Annotated[
        str, typer.Option(help="OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces")
    ] = "",
    trace_rate: Annotated[int, typer.Option(help="one of so many requests is traced")] = 100,
    log_file: Annotated[Path | None, typer.Option(help="Triton's log; default artifacts/<name>/triton.log")] = None,
    verbose: int = 0,
) -> None:
    """Start the real Triton with the ensemble, watch its workers, stop cleanly on Ctrl-C."""
    from serving.launcher import ServerOptions
    from serving.repository import served_from
    from serving.service import run_until_signal

    with reported():
        root = artifacts / name
        served = served_from(root, profile)
        if served != root:
            say(f"profile {profile} serves {served}")
        options = ServerOptions(
            repository=served / "model_repository",
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            profile=profile or ("cached" if cache_mb else ""),
            cache_bytes=cache_mb << 20,
            trace_url=trace_url,
            trace_rate=trace_rate,
            log=log_file or root / "triton.log",
            verbose=verbose,
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        run_until_signal(options, status_port, say)


@app.command()
def tune(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    slo: Annotated[str, typer.Option(help="percentile of the latencies and its bound")] = "p99=20ms",
    quality: Annotated[float, typer.Option(help="NDCG@10 as a share of the uncompressed run's")] = 0.99,
    budget: Annotated[float, typer.Option(help="minutes; a search that was cut short goes on where it was")] = 10.0,
    save_as: Annotated[str, typer.Option(help="name of the profile: configs/<name>.pbtxt")] = "tuned",
    space: Annotated[Path | None, typer.Option(help='JSON of values by knob, such as {"batch": [8, 16]}')] = None,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 4.0,
    restart: Annotated[bool, typer.Option(help="forget what an earlier search measured")] = False,
) -> None:
    """Find the configuration that answers the most requests within an objective; then: vivace serve --profile."""
    from loadtest.space import Objective
    from loadtest.tune import FOLDER
    from loadtest.tune import tune as run
    from vivace.artifacts import exclusive

    with reported():
        root, objective = artifacts / name, Objective.parse(slo, quality)
        wanted = json.loads(space.read_text()) if space else None
        with exclusive(root), console.status(str(objective)) as status:
            show = lambda text: status.update(text)  # noqa: E731
            found = run(root, objective, save_as, budget * 60, say, show, wanted, seconds, restart)
        chosen = found["chosen"]
        gain = f", {chosen['qps'] / found['untuned']:.2f} times the untuned" if found["untuned"] else ""
        say(f"{objective}: {chosen['qps']:.0f} requests a second{gain}: {chosen['trial']}")
        say(f"vivace serve --name {name} --profile {save_as}; report {root / FOLDER / save_as}.html")


@app.command()
def query(
    user: Annotated[str, typer.Option(help="user id; the history comes from the feature store")] = "",
    history: Annotated[str, typer.Option(help="item ids, oldest first, separated by commas")] = "",
    top_k: int = 10,
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    url: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    protocol: Annotated[str, typer.Option(help="grpc or http")] = "grpc",
    append: Annotated[str, typer.Option(help="first add this item to the user's history")] = "",
    text: Annotated[str, typer.Option(help="search for this; needs a run with search")] = "",
    filters: Annotated[
        str, typer.Option(help='of --text: {"values": {"brand": ["Alto"]}, "ranges": {"price": [5, null]}}')
    ] = "",
    diversity: Annotated[float, typer.Option(help="of --text: 0 by score, 1 as unlike each other as can be")] = 0.0,
) -> None:
    """Ask the running server and print titles; with --text what it understood and which branches found each item."""
    from serving.client import VivaceClient

    with reported(), VivaceClient(url, protocol) as client:
        if append:
            say(f"{user}: history now has {client.append(user, append)} events")
        items = [i for i in history.split(",") if i]
        wanted = json.loads(filters) if filters else None
        answer = client.recommend(user, items, top_k, text, filters=wanted, diversity=diversity)
        print_answer(artifacts / name, user, items, answer)


def titles(root: Path, items: list[str]) -> list[str]:
    """Titles from the feature store; the id where there is none."""
    from serving.feature_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        return [t or i for t, i in zip(store.titles(items), items, strict=True)]


def print_answer(root: Path, user: str, history: list[str], answer: Any) -> None:
    """History titles and recommended titles side by side with scores."""
    from serving.feature_store import LmdbStore

    with contextlib.closing(LmdbStore(root / "feature_store", readonly=True)) as store:
        known = history or (store.histories([user])[0] if user else None) or []
    past, found = titles(root, known[-5:]), titles(root, answer.items)
    table = Table(title=f"user {user or '(anonymous)'}, STATUS {answer.status}", title_justify="left")
    table.add_column("last in the history")
    table.add_column("recommended")
    table.add_column("score", justify="right")
    for head in answer.heads:
        table.add_column(f"P({head})", justify="right")
    if answer.understood:
        shown = {k: answer.understood[k] for k in ("text", "corrected", "synonyms", "intents", "facets")}
        console.print(json.dumps(shown, ensure_ascii=False), highlight=False)
        table.add_column("found by")
    found_by = answer.understood.get("found_by", {})
    for i in range(max(len(past), len(found))):
        got = i < len(found)
        table.add_row(
            past[i] if i < len(past) else "",
            found[i] if got else "",
            f"{answer.scores[i]:.2f}" if got else "",
            *(f"{p[i]:.3f}" if got else "" for p in answer.heads.values()),
            *([", ".join(found_by.get(answer.items[i], [])) if got else ""] if answer.understood else []),
        )
    console.print(table)


@app.command()
def load(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    host: Host = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    protocol: Annotated[str, typer.Option(help="grpc, http or both")] = "both",
    users: Annotated[int, typer.Option(help="concurrent users")] = 8,
    seconds: int = 20,
    web: Annotated[bool, typer.Option(help="locust's own page on 127.0.0.1:8089 instead of a headless run")] = False,
    shape: Annotated[
        str, typer.Option(help="open loop, latency from the moment due: constant, ramp, burst or diurnal")
    ] = "",
    qps: Annotated[float, typer.Option(help="with --shape: mean rate offered")] = 100.0,
) -> None:
    """Replay held-out requests with locust."""
    from loadtest.run_locust import run_locust

    with reported():
        code = run_locust(
            artifacts / name, host, http_port, grpc_port, protocol, users, seconds, web, shape=shape, qps=qps
        )
        raise typer.Exit(code)


@reports.command("compress")
def report_compress(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    out: Annotated[Path | None, typer.Option(help="folder to write to; artifacts/<name>/report if empty")] = None,
    seconds: Annotated[float, typer.Option(help="of each of five measurements of an engine")] = 1.0,
    openvino: Annotated[bool, typer.Option(help="measure OpenVINO too")] = True,
) -> None:
    """Quality against latency of a run and its compressed variants: compress.html and compress.png."""
    from loadtest.compress_report import report as run

    with reported():
        root = artifacts / name
        target = out or root / "report"
        with console.status("measuring"):
            run(root, target, seconds, openvino)
        say(f"wrote {target}/compress.html and compress.png")


@app.command()
def demo(
    data: Data = "shop",
    path: DataPath = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    seed: Seed = 7,
    preset: PresetName = "",
    load_seconds: Annotated[int, typer.Option(help="length of the locust run")] = 15,
    search: Annotated[bool, typer.Option(help="make the catalogue searchable too: some minutes more")] = False,
) -> None:
    """The whole path: prepare, train, evaluate, compile, serve, a few answers, a short load test."""
    from vivace.demo import run_demo

    with reported():
        run_demo(data, path, artifacts, seed, preset, load_seconds, search)


@app.command()
def doctor(artifacts: Artifacts = DEFAULT_ARTIFACTS) -> None:
    """Say what this machine offers and what is missing."""
    from vivace.doctor import examine

    missing = examine(console, artifacts)
    if missing:
        raise typer.Exit(1)


def main() -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    import warnings

    warnings.filterwarnings("ignore", module="merlin|nvtabular|dask|cudf")
    app()


if __name__ == "__main__":
    main()
