"""``vivace compile``: trained models to ONNX, checked against PyTorch on real requests, into a servable repository."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from preprocessing.features import Features
from preprocessing.requests import record
from preprocessing.sequences import WHOLE
from search import published as search
from serving import repository
from serving.releases import newest_is_whole
from serving.runtime.encoded import STATE
from serving.runtime.fresh import GRAPH, STATE_GRAPH
from training.checkpoints import load_ranker, load_retrieval
from training.compile.aoti import without_merlin
from training.compile.engine import Engine
from training.compile.graphs.chunked import export_in_chunks
from training.compile.index import Tuned, build_index, validation_states
from training.compile.onnx_export import (
    OPSET,
    RANKING_AXES,
    RETRIEVAL_AXES,
    check_steps,
    example_requests,
    export,
    export_alike,
    export_checked,
    export_steps,
    names_of,
)
from training.compile.publish import model_card, publish
from training.compile.quantize import OVERLAP, Precision, overlap, reduce_precision
from training.compile.shards import check_shards, export_encoder, export_shards
from training.compile.targets import TargetName, make
from training.data.counters import popularity
from training.data.fresh_ranking import (
    CATEGORIES,
    INPUTS,
    LISTS,
    LIVE,
    NEWEST,
    NUMBERS,
    OUTPUT,
    FreshRankingGraph,
    StateGraph,
)
from training.data.new_items import new_item_tables, with_fresh
from training.judge.evaluate import RANKED, Models, rank_validation
from training.judge.gate import BOUND, Verdict, judge_engine
from training.models.blocks import with_merged_heads
from training.models.ranking import RankingGraph, RankingModel
from training.models.retrieval import RetrievalGraph, RetrievalModel
from training.presets import Preset, shapes
from vivace import contract
from vivace.checks import check_fields, check_minimum
from vivace.manifest import Progress, Step, replaced
from vivace.run import EVALUATION, FEATURES, FINAL, RANKING, RECORDED_PARTS, REFERENCE, RETRIEVAL, SEARCH, Run

FOLD_ITEMS = 100_000  # items up to which the ranker's table of five numbers for one of the embedding is worth it
LAYOUT = 11  # of the stages' tensors and the recorded requests: what has another layout is compiled again
RECORDED_REQUESTS = 5000
Tables = Literal["fp32", "int8"]
Index = Literal["", "HNSW32", "HNSW32_SQ8"]
TABLES: tuple[Tables, ...] = get_args(Tables)  # how items are kept
INDEXES = ("HNSW32", "HNSW32_SQ8")  # FAISS indexes that ``--index`` builds


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How a trained run is compiled."""

    precision: Precision = "fp32"
    """Number format of the graphs' products (see ``quantize``); products that it hurts stay in float32."""
    tables: Tables = "fp32"
    """Number format of the tables of items (see ``int8_table``)."""
    fold: bool = True
    """Whether what hangs on an item alone becomes a table (``FoldedItems``): to FOLD_ITEMS items, of float32."""
    targets: tuple[TargetName, ...] = ()
    """What it is made ready for beside ONNX Runtime on the CPU (see ``targets``)."""
    index: Index = ""
    """FAISS index that finds the candidates (see ``index``); "": every item is scored."""
    shards: int = 0
    """Servers that the items of retrieval are dealt to (see ``shards``); 0: one graph scores them all."""
    reference: Path | None = None
    """Folder of the evaluated run that the quality gate compares with. None: this run itself, where the engine is not
    all float32; an all float32 one is not judged then, as it must equal PyTorch."""
    bound: float = BOUND
    """Relative fall of NDCG@10, 0 to 1, that the gate lets through."""
    force: bool = False
    """Whether to publish what the gate refuses: the model card and the server's metadata say so."""
    at_once: int = 0
    """Candidates that the ranker scores at once, the others after them (see ``graphs.chunked``); 0: all of them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.index and (self.precision != "fp32" or self.targets):
            raise ValueError("--index goes with --precision fp32 and no --target")
        if self.shards < 0 or (self.shards and (self.index or not self.exact or self.targets)):
            raise ValueError("--shards: expected 0 or more, with --precision, --tables fp32, no --index, no --target")
        check_minimum(self, 0, "at_once")
        if self.at_once and (not self.exact or self.targets):
            raise ValueError("--at-once goes with --precision fp32, --tables fp32 and no --target")
        if "aoti" in self.targets and not self.exact:
            raise ValueError("--target aoti goes with --precision fp32 and --tables fp32")
        if self.tables == "int8" and self.precision != "fp32":
            raise ValueError(f"--tables int8 goes with --precision fp32, got {self.precision!r}")

    @property
    def exact(self) -> bool:
        """Whether ONNX must equal PyTorch but for rounding."""
        return self.precision == self.tables == "fp32"

    @property
    def judged(self) -> bool:
        """Whether the quality gate is asked."""
        return not self.exact or bool(self.index) or self.reference is not None


@dataclass
class Compilation:
    """One run of the step: what its parts share, and what they leave for the record."""

    features: Features
    preset: Preset
    run: Run
    config: CompileConfig
    folder: Path
    say: Progress
    retriever: RetrievalModel
    ranker: RankingModel
    tensors: contract.StageTensors
    example: tuple[Tensor, ...]
    """Inputs of the retrieval graph: real requests."""
    candidates: tuple[Tensor, ...] = ()
    """Inputs of the ranking graph after them."""
    parity: dict[str, dict[str, float]] = field(default_factory=dict)
    sensitivities: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, features: Features, preset: Preset, run: Run, config: CompileConfig, folder: Path, say: Progress
    ) -> Compilation:
        final = run.has(FINAL)
        retriever = load_retrieval(features, preset, run.root, final).cpu()
        ranker = load_ranker(features, preset, run.root, final=final).cpu()
        tensors = with_fresh(shapes(preset, features), features)
        example = example_requests(features, preset)
        return cls(features, preset, run, config, folder, say, retriever, ranker, tensors, example)

    @property
    def exact_folder(self) -> Path:
        """Where the float32 graphs go."""
        return self.folder if self.config.exact else self.folder / "fp32"

    @property
    def ranking_outputs(self) -> tuple[contract.WireTensor, ...]:
        return contract.ranking_outputs(self.tensors, self.features.schema.heads)

    @property
    def grows(self) -> bool:
        """Whether what is worked out of earlier events can be kept: float32 graphs that score every item."""
        return self.config.exact and not self.tensors.lists_seen and self.preset.encoder.grows

    @property
    def folded(self) -> bool:
        """Whether the ranker reads what it needs of an item alone from a table."""
        return self.config.fold and self.config.tables == "fp32" and self.tensors.items <= FOLD_ITEMS

    def export_exact(self) -> None:
        """Both graphs in float32, checked against PyTorch."""
        self.exact_folder.mkdir(exist_ok=True)
        s = self.tensors
        self.say("exporting retrieval")
        graph = RetrievalGraph(self.retriever, s.candidates, s.memory, rising=s.rising)
        inputs = contract.retrieval_inputs(s)
        given = self.example[: len(inputs)]
        self.parity[contract.RETRIEVAL] = export_checked(
            contract.RETRIEVAL, graph, inputs, contract.retrieval_outputs(s), given,
            self.exact_folder / "retrieval.onnx",
        )  # fmt: skip
        with torch.no_grad():
            self.candidates = (self.example[0], *graph(*given), *self.example[s.passed_on :])
        self.say("exporting ranking")
        ranking = RankingGraph(with_merged_heads(self.ranker), folded=self.folded)
        self.parity[contract.RANKING] = export_checked(
            contract.RANKING, ranking, contract.ranking_inputs(s), self.ranking_outputs, self.candidates,
            self.exact_folder / "ranking.onnx", RankingGraph(self.ranker), export_in_chunks(self.config.at_once),
        )  # fmt: skip

    def export_grown(self) -> None:
        """The graphs that encode only what is new of a history."""
        given = self.example[: len(contract.retrieval_inputs(self.tensors))]
        export_steps(self.retriever, self.tensors, given, self.folder)
        self.parity["grown"] = check_steps(self.folder, self.tensors, given, self.candidates[1:4])

    def export_fresh(self) -> None:
        """The ranker of items that are not in the tables, and what gives such an item its vector."""
        if not self.tensors.fresh:
            return
        counts = popularity(self.features.files(WHOLE if self.run.has(FINAL) else "train"), self.tensors.items)
        boost = self.preset.retrieval.new_item_boost
        new_item_tables(self.features, self.retriever, counts, boost).save(self.folder)
        graph = FreshRankingGraph(with_merged_heads(self.ranker), counted=bool(self.tensors.rising_fresh))
        history, _, scores, encoded, *_ = self.candidates
        chosen = self.candidates[1][:, : self.tensors.fresh]
        given = [history, scores, encoded, scores[:, : self.tensors.fresh], self.ranker.item(chosen)]
        names = list(INPUTS)
        ranker = self.ranker
        attributes = {CATEGORIES: ranker.categories, NUMBERS: ranker.numbers}
        if len(ranker.listed):
            attributes[LISTS] = ranker.lists
        for name in (CATEGORIES, LISTS, NUMBERS):
            if name in attributes and attributes[name].shape[1]:
                given.append(attributes[name][chosen])
                names.append(name)
        if self.tensors.rising_fresh:
            given.append(self.candidates[-1][:, torch.arange(chosen.shape[1]) % self.tensors.rising])
            names.append(LIVE)
        free = {**RANKING_AXES, OUTPUT: (2, "fresh"), **{name: (1, "fresh") for name in names[3:]}}
        names += names_of(self.tensors.moment)
        given += self.candidates[4 : 4 + len(self.tensors.moment)]
        apart = {OUTPUT: export_alike(graph, given, names, OUTPUT, self.folder / GRAPH, free)}
        if context := self.tensors.moment[self.tensors.types :]:
            given = [encoded[:, -1], *self.candidates[4 + self.tensors.types :][: len(context)]]
            names, state = [NEWEST, *names_of(context)], StateGraph(self.retriever)
            apart[STATE] = export_alike(state, given, names, STATE, self.folder / STATE_GRAPH, {})
        self.parity["fresh"] = apart

    def export_reduced(self) -> None:
        """Both graphs in the number format that the configuration names."""
        s, config = self.tensors, self.config
        kind = "int8 tables" if config.tables == "int8" else config.precision
        self.say(f"converting to {kind}")
        if config.tables == "int8":
            names = names_of(contract.retrieval_inputs(s)), names_of(contract.retrieval_outputs(s))
            retrieval = RetrievalGraph(self.retriever, s.candidates, s.memory, int8_table=True, rising=s.rising)
            export(retrieval, self.example[: len(names[0])], *names, self.folder / "retrieval.onnx", RETRIEVAL_AXES)
            names = names_of(contract.ranking_inputs(s)), names_of(self.ranking_outputs)
            ranking = RankingGraph(with_merged_heads(self.ranker), int8_table=True)
            export(ranking, self.candidates, *names, self.folder / "ranking.onnx", RANKING_AXES)
        else:
            self.sensitivities = reduce_precision(self.features, s, self.exact_folder, self.folder, config.precision)
        inputs = [x.numpy() for x in self.example]
        same = overlap(Engine(self.exact_folder, s)(inputs)[0], Engine(self.folder, s)(inputs)[0])
        left = {n: sum(share < OVERLAP for share in alone.values()) for n, alone in self.sensitivities.items()}
        self.parity[kind] = {"top-10 overlap": same, **{f"{n} in float32": count for n, count in left.items()}}

    def export_index(self) -> Tuned:
        """The encoder alone and the index of the items; from here on ``tensors`` are those of an indexed run."""
        s = self.tensors
        self.say(f"building the index {self.config.index}")
        export_encoder(self.retriever, s, self.example, self.folder, self.config.tables == "int8")
        states_BD = validation_states(self.features, self.preset, self.retriever)
        tuned = build_index(self.retriever, states_BD, s.candidates, self.config.index, self.folder, rising=s.rising)
        self.say(f"index: effort {tuned.effort} finds {tuned.recall:.4f} of the exact candidates")
        self.tensors = replace(s, indexed=True, seen=min(contract.MAX_SEEN, s.items))
        return tuned

    def export_shards(self) -> None:
        """The encoder alone and the shards of the items; from here on ``tensors`` are those of a sharded run."""
        self.say(f"dealing the items to {self.config.shards} shards")
        s = replace(self.tensors, shards=self.config.shards, seen=min(contract.MAX_SEEN, self.tensors.items))
        export_encoder(self.retriever, s, self.example, self.folder)
        export_shards(self.retriever, s, self.folder)
        given = [x.numpy() for x in self.example[: len(contract.retrieval_inputs(s))]]
        exact = Engine(self.exact_folder, self.tensors).retrieve(given)
        self.parity["shards"] = check_shards(self.folder, s, given, exact)
        self.tensors = s

    def judge(self, reference: Run) -> Verdict:
        """Raises GateError where the engine lost too much."""
        self.say("ranking the validation requests by the compiled graphs")
        engine, config, before = Engine(self.folder, self.tensors), self.config, None
        if self.run.has(FINAL) and reference == self.run:  # it knows these requests: only the difference says something
            models = Models(self.features, self.preset, self.run.root, [RANKING], final=True)
            before = rank_validation(models, self.say)[RANKED]
        verdict = judge_engine(
            self.features, self.tensors, engine, self.run, reference, config.bound, config.force, before
        )
        self.say(verdict.sentence())
        return verdict

    def make_targets(self) -> dict[str, dict[str, float]]:
        """What each target records."""
        s, records = self.tensors, dict[str, dict[str, float]]()
        if not self.config.targets:
            return records
        inputs = contract.retrieval_inputs(s)
        graphs = {
            contract.RETRIEVAL: RetrievalGraph(self.retriever, s.candidates, s.memory, rising=s.rising),
            contract.RANKING: RankingGraph(without_merlin(self.ranker), folded=self.folded),
        }
        feeds: dict[str, dict[str, np.ndarray]] = {
            stage: {t.name: x.numpy() for t, x in zip(tensors, values, strict=True)}
            for stage, tensors, values in (
                (contract.RETRIEVAL, inputs, self.example[: len(inputs)]),
                (contract.RANKING, contract.ranking_inputs(s), self.candidates),
            )
        }
        for target in self.config.targets:
            self.say(f"target {target}")
            batches = (1, 16, repository.PROFILES["gpu"].max_batch_size)
            records[target] = make(target, self.folder, feeds, batches, graphs)
        return records


def _step(features: Features, preset: Preset, run: Run, reference: Run, seed: int, config: CompileConfig) -> Step:
    """The step with the keys of all that it is made from. Raises StaleError where those do not belong together."""
    inputs = {name: run.key(name) for name in (FEATURES, RETRIEVAL, RANKING, *([FINAL] if run.has(FINAL) else []))}
    if search.features_of(run.root):
        inputs[SEARCH] = run.key(SEARCH)
    if config.judged:
        inputs[EVALUATION if reference == run else REFERENCE] = reference.key(EVALUATION)
    chosen = {k: v for k, v in asdict(config).items() if k != "reference" and (v or k != "at_once")}  # the later field
    settings = {
        "opset": OPSET,
        "layout": LAYOUT,
        "shapes": with_fresh(shapes(preset, features), features),
        "profiles": {name: repr(profile) for name, profile in repository.PROFILES.items()},
        **chosen,
    }
    return Step(run.compiled, "compile", settings, seed, inputs)


def compile_models(
    features: Features, preset: Preset, root: Path, seed: int, say: Progress, config: CompileConfig | None = None
) -> dict[str, Any]:
    """Writes ``artifacts/<name>/compiled`` and publishes a new version in ``artifacts/<name>/model_repository``. Raises
    StaleError where the models were made from other features, ValueError where ONNX and PyTorch differ or an index
    cannot do what the retriever does, GateError where the engine lost more quality than the bound."""
    config = config or CompileConfig()
    if (config.index or config.shards) and preset.encoder.neighbours:
        raise ValueError(
            "--index and --shards find items by their vectors alone, and this run's retriever has a session memory "
            "beside them: compile without, or train with encoder.neighbours 0"
        )
    run = Run(root, features.folder)
    reference = Run(config.reference, features.folder) if config.reference is not None else run
    step = _step(features, preset, run, reference, seed, config)
    if step.done() and run.repository.is_dir() and newest_is_whole(run.repository):
        say("compiled models are there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    with replaced(step.folder) as folder:  # what is compiled stays whole, and what it left behind is not taken up
        work = Compilation.of(features, preset, run, config, folder, say)
        return _compile(work, reference, replace(step, folder=folder))


def _compile(work: Compilation, reference: Run, step: Step) -> dict[str, Any]:
    """Makes, judges and publishes; returns the manifest."""
    started, config, run = time.monotonic(), work.config, work.run
    work.export_exact()
    work.export_fresh()
    if not config.exact:
        work.export_reduced()
    tuned = work.export_index() if config.index else None
    if config.shards:
        work.export_shards()
    if work.grows:
        work.export_grown()
    verdict = work.judge(reference) if config.judged else None
    targets = work.make_targets()
    for part in filter(work.features.files, RECORDED_PARTS):
        file, reads = step.folder / run.requests_file(part).name, work.tensors
        record(work.features, file, RECORDED_REQUESTS, step.seed, part, bool(reads.types), bool(reads.context))
    tensors = replace(work.tensors, search=search.features_of(run.root))
    gate = verdict.record() if verdict else "not asked: float32, by parity"
    card = model_card(work.features, run, tensors, step.seed, work.parity)
    card |= {"precision": config.precision, "tables": config.tables, "gate": gate}
    version = publish(work.features, work.preset, run, step.folder, tensors, card)
    work.say(f"published version {version} in {run.repository}")
    for profile in repository.tuned_for(run):
        work.say(
            f"profile {profile} was tuned for the graphs before these and is gone with them: run "
            f"'vivace tune --name {run.whole.root.name} --save-as {profile}' again"
        )
    return step.finish(
        time.monotonic() - started,
        parity=work.parity,
        version=version,
        repository=run.repository.name,
        gate=gate,
        targets=targets,
        sensitivities=work.sensitivities,
        index=asdict(tuned) if tuned else {},
    )
