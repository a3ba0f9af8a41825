"""``vivace compile``: trained models to ONNX, checked against PyTorch on real requests, into a servable repository."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from preprocessing.features import Features
from preprocessing.requests import record
from search import published as search
from serving import repository
from serving.runtime.item_index import ENCODER, INDEX, POPULAR, IndexedRetrieval
from training.checkpoints import load_ranker, load_retrieval
from training.compile.index import EncoderGraph, build_index
from training.compile.parity import difference
from training.compile.quantize import OVERLAP, PRECISIONS, Feed, convert, overlap, prepare, sensitivities
from training.compile.targets import TARGETS, make
from training.compile.targets import files as plans
from training.data import batches as data
from training.judge.gate import BOUND, graph_ranks, judge, reference_ranks
from training.models.ranking import RankingGraph
from training.models.retrieval import RetrievalGraph, RetrievalModel
from training.presets import Preset
from vivace import contract
from vivace.manifest import Progress, Step, read_manifest, write_text
from vivace.onnx_session import open_session
from vivace.run import RECORDED_PARTS, Run

OPSET = 18
TABLES = ("fp32", "int8")  # how items are kept
INDEXES = ("HNSW32", "HNSW32_SQ8")  # FAISS indexes that ``--index`` builds
CALIBRATION_BATCHES = 8
SENSITIVITY_BATCHES = 2
FOLD_ITEMS = 100_000  # items up to which the ranker's table of five numbers for one of the embedding is worth it
TOLERANCE = 2e-4  # absolute, on scores of magnitude 10: float32 sums in another order
LAYOUT = 7  # of the stages' tensors and the recorded requests: what has another layout is compiled again
EQUAL_IDS = 0.99  # by position: items of nearly equal score change places
PARITY_REQUESTS = 64
RECORDED_REQUESTS = 5000


def shapes(preset: Preset, items: int) -> contract.StageTensors:
    """The tensors between the stages for a preset and a vocabulary."""
    count = min(preset.ranker.candidates, items - contract.FIRST_ID)
    e = preset.encoder
    return contract.StageTensors(e.history, count, items, e.width, e.time_bias, preset.ranker.memory)


# axes that are free beside the batch, by tensor: a server may read less of the history and rank fewer candidates
HISTORY_AXES = {t: (1, "history") for t in ("HISTORY_IDS", "HISTORY_TIMES")} | {
    contract.ENCODED_HISTORY: (1, "encoded")
}
RETRIEVAL_AXES = HISTORY_AXES
RANKING_AXES = HISTORY_AXES | {
    **{t: (1, "candidates") for t in ("CANDIDATE_IDS", "CANDIDATE_SCORES", "RANKED_IDS")},
    "RANKED_VALUES": (2, "candidates"),
}


def export(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    free: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """One ONNX file with a free batch axis on every tensor; raises if the checker finds fault. ``free``: one more axis
    of tensors by name, and what it is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
    for name, (axis, called) in (free or {}).items():
        if name in axes:
            axes[name][axis] = called
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # the TorchScript exporter is the one Merlin's expert blocks were known to export with; the newer was not tried
        torch.onnx.export(
            graph.eval().cpu(),
            tuple(x.cpu() for x in example),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path))


def example_requests(features: Features, preset: Preset, count: int = PARITY_REQUESTS) -> tuple[Tensor, ...]:
    """(history ids [B, T], exclude [B, V]), and times [B, T] if the encoder reads them, of held-out requests, the last
    one with an empty history: inputs of the retrieval graph."""
    heads = [h.name for h in features.schema.heads]
    request = next(iter(data.requests(features.files("test"), heads, preset.encoder.history, count)))
    history, times = request.history_BT.clone(), request.time_BT.clone()
    history[-1] = times[-1] = contract.PADDING_ID
    exclude = request.exclude(features.item_count(), features.schema.exclude_seen)
    return (history, exclude, times) if preset.encoder.time_bias else (history, exclude)


def _names(tensors: Sequence[contract.WireTensor]) -> list[str]:
    return [t.name for t in tensors]


def _check(stage: str, found: dict[str, float]) -> None:
    ids, *values = found.items()
    if ids[1] < EQUAL_IDS:
        raise ValueError(
            f"{stage}: {ids[0]}: {ids[1]:.4f} of the ids equal PyTorch's, expected {EQUAL_IDS}; not published"
        )
    for name, value in values:
        if value > TOLERANCE:
            raise ValueError(
                f"{stage}: {name}: PyTorch and ONNX differ by {value:.3g}, expected at most {TOLERANCE}; not published"
            )


def export_checked(
    stage: str,
    graph: nn.Module,
    inputs: tuple[contract.WireTensor, ...],
    outputs: tuple[contract.WireTensor, ...],
    example: tuple[Tensor, ...],
    path: Path,
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Exports a stage and compares it with PyTorch (``reference``; the graph itself if none) on ``example``; the
    differences. Raises ValueError beyond them."""
    names_in, names_out = _names(inputs), _names(outputs)
    export(graph, example, names_in, names_out, path, RANKING_AXES if stage == contract.RANKING else RETRIEVAL_AXES)
    with torch.no_grad():
        expected = (reference or graph).eval()(*example)
    got = open_session(path).run(names_out, {n: x.numpy() for n, x in zip(names_in, example, strict=True)})
    found = difference([e.numpy() for e in expected], got, names_out)
    _check(stage, found)
    return found


@dataclass(frozen=True)
class CompileConfig:
    """``precision``: see ``quantize``; products that it hurts are found by measurement and stay in float32. ``tables``:
    of items, "fp32" or "int8" (see ``int8_table``). ``fold``: parts of the ranker that depend on an item alone become a
    table (see FoldedItems), up to FOLD_ITEMS items and with float32 tables. ``targets``: see ``targets``. ``index``:
    candidates come from a FAISS index ("HNSW32" or "HNSW32_SQ8"; see ``index``) and not from scoring every item.

    The quality gate compares the engine with the evaluated run in ``reference``: always where it is not all float32
    (by default this run itself), else only where ``reference`` is given. ``bound``: the relative fall of NDCG@10 it
    lets through; ``force`` publishes all the same and says so in the model card and the server's metadata."""

    precision: str = "fp32"
    tables: str = "fp32"
    fold: bool = True
    targets: tuple[str, ...] = ()
    index: str = ""
    reference: Path | None = None
    bound: float = BOUND
    force: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision: expected one of {PRECISIONS}, got {self.precision!r}")
        for target in self.targets:
            if target not in TARGETS:
                raise ValueError(f"--target: expected one of {TARGETS}, got {target!r}")
        if self.tables not in TABLES:
            raise ValueError(f"--tables: expected one of {TABLES}, got {self.tables!r}")
        if self.index and not (self.precision == self.tables == "fp32" and not self.targets):
            raise ValueError("--index goes with --precision fp32, --tables fp32 and no --target")
        if self.tables == "int8" and self.precision != "fp32":
            raise ValueError(f"--tables int8 goes with --precision fp32, got {self.precision!r}")

    @property
    def exact(self) -> bool:
        """Whether ONNX must equal PyTorch but for rounding."""
        return self.precision == self.tables == "fp32"


def reduce_precision(
    features: Features, s: contract.StageTensors, exact: Path, target: Path, precision: str
) -> dict[str, dict[str, float]]:
    """Writes both graphs in ``precision``, calibrated on validation requests; returns for each stage and product the
    share of the top 10 that stays if it alone is quantized. Products below OVERLAP stayed in float32."""
    heads = [h.name for h in features.schema.heads]
    engine, feeds = Engine(exact, s), {contract.RETRIEVAL: list[Feed](), contract.RANKING: list[Feed]()}
    for request in itertools.islice(
        data.requests(features.files("valid"), heads, s.history, PARITY_REQUESTS), CALIBRATION_BATCHES
    ):
        inputs = request.inputs(s, features.schema.exclude_seen)
        feeds[contract.RETRIEVAL].append(dict(zip(engine.names[0], inputs, strict=True)))
        feeds[contract.RANKING].append(dict(zip(engine.names[1], (inputs[0], *engine.retrieve(inputs)), strict=True)))
    found: dict[str, dict[str, float]] = {}
    for name, own in feeds.items():
        ready, scratch = target / f"{name}.ready.onnx", target / f"{name}.scratch.onnx"
        prepare(exact / f"{name}.onnx", ready)
        few = own[:SENSITIVITY_BATCHES]
        alone: dict[str, float] = {}
        if precision != "fp16":
            alone = sensitivities(
                ready, precision, few, lambda path, f: open_session(path).run(None, dict(f))[0], scratch
            )
        found[name] = alone
        convert(ready, target / f"{name}.onnx", precision, own, [n for n, share in alone.items() if share < OVERLAP])
        ready.unlink()
    return found


def _states(features: Features, preset: Preset, model: RetrievalModel, count: int = 1000) -> Tensor:
    """Encoded states float32 [count, D] of validation requests."""
    heads, found = [h.name for h in features.schema.heads], []
    with torch.no_grad():
        for request in data.requests(features.files("valid"), heads, preset.encoder.history, PARITY_REQUESTS):
            found.append(model.encode(request.history_BT, times=request.time_BT)[:, -1])
            if sum(map(len, found)) >= count:
                break
    return torch.cat(found)[:count]


class Engine:
    """Two compiled graphs as one function of the retrieval graph's inputs."""

    def __init__(self, folder: Path, s: contract.StageTensors, threads: int = 1) -> None:
        self.index = IndexedRetrieval(folder, s, threads) if s.indexed else None
        self.retrieval = None if s.indexed else open_session(folder / f"{contract.RETRIEVAL}.onnx", threads)
        self.ranking = open_session(folder / f"{contract.RANKING}.onnx", threads)
        self.names = [_names(contract.retrieval_inputs(s)), _names(contract.ranking_inputs(s))]

    def retrieve(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the retrieval stage: candidate ids and scores, the encoded history."""
        if self.index is not None:
            return self.index(inputs)
        assert self.retrieval is not None
        found: list[np.ndarray] = self.retrieval.run(None, dict(zip(self.names[0], inputs, strict=True)))
        return found

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the ranking graph: ids best first, values."""
        found = self.retrieve(inputs)
        ranked: list[np.ndarray] = self.ranking.run(None, dict(zip(self.names[1], (inputs[0], *found), strict=True)))
        return ranked


def compile_models(
    features: Features, preset: Preset, root: Path, seed: int, say: Progress, config: CompileConfig | None = None
) -> dict[str, Any]:
    """Writes ``artifacts/<name>/compiled`` and publishes a new version in ``artifacts/<name>/model_repository``. Raises
    ValueError where ONNX and PyTorch differ, GateError where the engine lost more quality than the bound."""
    config = config or CompileConfig()
    inputs = {n: read_manifest(root / n, "vivace train")["key"] for n in ("retrieval", "ranking")}
    inputs["features"] = read_manifest(features.folder, "vivace prepare")["key"]
    if search.features_of(root):
        inputs["search"] = read_manifest(root / search.FOLDER, "vivace train --task search")["key"]
    schema, items = features.schema, features.item_count()
    s = shapes(preset, items)
    profiles = {name: repr(p) for name, p in repository.PROFILES.items()}
    settings = {"opset": OPSET, "layout": LAYOUT, "shapes": s, "profiles": profiles, **asdict(config)}
    judged_always = not config.exact or bool(config.index)
    reference = config.reference or (root / "evaluation" if judged_always else None)
    if reference is not None:
        inputs["reference"] = read_manifest(reference, "vivace evaluate")["key"]
    step = Step(root / "compiled", "compile", settings, seed, inputs)
    target = root / "model_repository"
    if step.done() and target.is_dir():
        say("compiled models are there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    started = time.monotonic()
    step.reset()
    retriever = load_retrieval(features, preset, root).cpu()
    ranker = load_ranker(features, preset, root).cpu()
    example = example_requests(features, preset)
    say("exporting retrieval")
    graph = RetrievalGraph(retriever, s.candidates, s.memory)
    exact = step.folder if config.exact else step.folder / "fp32"
    exact.mkdir(exist_ok=True)
    file = exact / "retrieval.onnx"
    found = export_checked(
        contract.RETRIEVAL, graph, contract.retrieval_inputs(s), contract.retrieval_outputs(s), example, file
    )
    parity = {contract.RETRIEVAL: found}
    with torch.no_grad():
        ids, scores, encoded = graph(*example)
    say("exporting ranking")
    rows, file = (example[0], ids, scores, encoded), exact / "ranking.onnx"
    outputs = contract.ranking_outputs(s, schema.heads)
    plain = RankingGraph(ranker)
    fold = config.fold and config.tables == "fp32" and items <= FOLD_ITEMS
    ranking = RankingGraph(ranker, folded=fold)
    parity[contract.RANKING] = export_checked(
        contract.RANKING, ranking, contract.ranking_inputs(s), outputs, rows, file, plain
    )
    verdict, sensitive = None, dict[str, dict[str, float]]()
    if not config.exact:
        kind = "int8 tables" if config.tables == "int8" else config.precision
        say(f"converting to {kind}")
        feed = [x.numpy() for x in example]
        if config.tables == "int8":
            smaller = RetrievalGraph(retriever, s.candidates, s.memory, int8_table=True)
            names = _names(contract.retrieval_inputs(s)), _names(contract.retrieval_outputs(s))
            export(smaller, example, *names, step.folder / "retrieval.onnx", RETRIEVAL_AXES)
            names = _names(contract.ranking_inputs(s)), _names(outputs)
            export(RankingGraph(ranker, int8_table=True), rows, *names, step.folder / "ranking.onnx", RANKING_AXES)
        else:
            sensitive = reduce_precision(features, s, exact, step.folder, config.precision)
        same = overlap(Engine(exact, s)(feed)[0], Engine(step.folder, s)(feed)[0])
        left = {n: sum(share < OVERLAP for share in alone.values()) for n, alone in sensitive.items()}
        parity[kind] = {"top-10 overlap": same, **{f"{n} in float32": count for n, count in left.items()}}
    tuned = None
    if config.index:
        say(f"building the index {config.index}")
        given = [n.name for n in contract.retrieval_inputs(s) if n != s.exclude]
        encoder = EncoderGraph(retriever, s.memory)
        export(
            encoder,
            (example[0], *example[2:]),
            given,
            [contract.ENCODED_HISTORY],
            step.folder / ENCODER,
            RETRIEVAL_AXES,
        )
        states = _states(features, preset, retriever)
        tuned = build_index(retriever, states, s.candidates, config.index, step.folder)
        say(f"index: effort {tuned.effort} finds {tuned.recall:.4f} of the exact candidates")
        s = replace(s, indexed=True)
    if reference is not None:
        say("ranking the test requests by the compiled graphs")
        engine = Engine(step.folder, s)
        found_ranks = graph_ranks(features, s, lambda x: engine(x)[0])
        verdict = judge(reference_ranks(reference), found_ranks, config.bound, config.force)
        say(verdict.sentence())
    made = {}
    for kind in config.targets:
        say(f"target {kind}")
        feeds = {
            contract.RETRIEVAL: dict(
                zip(_names(contract.retrieval_inputs(s)), (x.numpy() for x in example), strict=True)
            ),
            contract.RANKING: dict(zip(_names(contract.ranking_inputs(s)), (x.numpy() for x in rows), strict=True)),
        }
        made[kind] = make(kind, step.folder, feeds, (1, 16, repository.PROFILES["gpu"].max_batch_size))
    for part in RECORDED_PARTS:
        record(features, Run(root).requests_file(part), RECORDED_REQUESTS, seed, part)
    s = replace(s, search=search.features_of(root))
    items_file = step.folder / "items.json"
    write_text(items_file, json.dumps(features.items()[contract.ITEM].tolist(), ensure_ascii=False))
    write_text(step.folder / "schema.json", json.dumps(schema.to_json()))
    card = _model_card(features, root, s, seed, parity)
    judged = verdict.record() if verdict else "not asked: float32, by parity"
    card |= {"precision": config.precision, "tables": config.tables, "gate": judged}
    write_text(step.folder / "model_card.json", json.dumps(card, indent=2))
    more = search.files_of(root)
    version = repository.assemble(
        target,
        s,
        schema.heads,
        {
            contract.FEATURE_TRANSFORM: {"transform.onnx": features.folder / "transform_request.onnx"},
            contract.RETRIEVAL: {n: step.folder / n for n in (ENCODER, INDEX, POPULAR)}
            if s.indexed
            else {"model.onnx": step.folder / "retrieval.onnx", **plans(step.folder).get(contract.RETRIEVAL, {})},
            contract.RANKING: {
                "model.onnx": step.folder / "ranking.onnx",
                **plans(step.folder).get(contract.RANKING, {}),
            },
            contract.RESPONSE: {"items.json": items_file, **more.pop(contract.RESPONSE, {})},
            **more,
            contract.ENSEMBLE: {"model_card.json": step.folder / "model_card.json"},
        },
        exclude_seen=schema.exclude_seen,
        metadata={"precision": config.precision, "tables": config.tables, "gate": json.dumps(card["gate"])},
    )
    say(f"published version {version} in {target}")
    return step.finish(
        time.monotonic() - started,
        parity=parity,
        version=version,
        repository=str(target.name),
        gate=card["gate"],
        targets=made,
        sensitivities=sensitive,
        index=asdict(tuned) if tuned else {},
    )


def _model_card(
    features: Features, root: Path, s: contract.StageTensors, seed: int, parity: dict[str, Any]
) -> dict[str, Any]:
    """Data, configuration, seed, commit and quality of what is served, beside the models."""
    manifests = {n: read_manifest(root / n, "vivace train") for n in ("features", "retrieval", "ranking")}
    evaluated = root / "evaluation" / "manifest.json"
    return {
        "data": features.schema.name,
        "licence": features.schema.licence,
        "shapes": s.__dict__,
        "seed": seed,
        "parity": parity,
        "quality": json.loads(evaluated.read_text())["results"] if evaluated.exists() else "not evaluated",
        **{n: {k: m[k] for k in ("key", "config", "commit", "versions", "finished")} for n, m in manifests.items()},
    }
