"""``vivace refresh``: takes what was appended, trains the run's models on, and publishes them if they judge no worse.

All work lies beside the run, in ``artifacts/<name>/refresh``, step by step, each with its manifest; what was stopped
goes on with the next call, on the same events. The run itself is touched once, at the end, by an exchange that is
finished whatever stops it (``serving.exchange``).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from preprocessing.features import Features
from preprocessing.refresh import appended_since, read_catalogue, refresh_features, upserted_items
from preprocessing.sequences import WHOLE
from search import published as search
from serving.exchange import WORK, begin_exchange, finish_exchange
from serving.releases import next_version
from training.checkpoints import WEIGHTS, finish_training, keep_only_own_checkpoint, load_ranker, load_retrieval
from training.compile.compiler import CompileConfig, compile_models
from training.data.columns import EventColumns
from training.data.counters import popularity
from training.judge.evaluate import Models, evaluate
from training.judge.gate import GateError
from training.learn.final import chosen_epochs
from training.learn.ranker import RankerData
from training.models.ranking import RankingModel
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from training.refresh.carry import counted_ranker, grown_retriever, served_models
from training.refresh.fit import (
    MoreTraining,
    learned_lengths,
    sequences_to_learn,
    settle,
    train_more,
    train_ranker_more,
    watched_loss,
)
from training.refresh.judge import BOUND, Decision, broken, decide, ranks_of
from vivace.contract import FIRST_ID, ITEM
from vivace.manifest import Progress, Step, read_manifest, write_json
from vivace.run import COMPILED, CONTROL, EVALUATION, FEATURES, FINAL, RANKING, RETRIEVAL, Run

PLAN, DECISION = "plan.json", "decision.json"
PUBLISHED, REFUSED, NOTHING = "published", "refused", "nothing"


@dataclass(frozen=True, kw_only=True)
class RefreshConfig:
    """What a refresh does. ``share``: of the new events, the newest that judge, and as many before them whose items
    are the ranker's labels; ``bound``: of NDCG@10, what may be lost at most; ``force``: publish what is refused;
    ``min_events``: with fewer appended events nothing is done."""

    share: float = 0.2
    bound: float = BOUND
    force: bool = False
    min_events: int = 1
    more: MoreTraining = field(default_factory=MoreTraining)

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5 or self.bound < 0 or self.min_events < 1:
            raise ValueError(f"RefreshConfig: expected 0 < share < 0.5, bound >= 0 and min_events >= 1, got {self}")


@dataclass(frozen=True)
class Outcome:
    """What came of a refresh: PUBLISHED, REFUSED or NOTHING; the log's events by what became of them, the decision, and
    the version that was published (0: the run is not compiled)."""

    status: str
    taken: dict[str, int]
    decision: Decision | None = None
    version: int = 0


def check_refreshable(run: Run, preset: Preset) -> None:
    """Raises ValueError for what cannot be refreshed yet, with what to do."""
    again = "run prepare, train and compile anew instead"
    if run.whole != run:
        raise ValueError(f"refresh: {run.root.name} is a compressed variant; refresh {run.whole.root.name}")
    if search.features_of(run.root):
        raise ValueError(f"refresh: this run has search, whose index and ranker are of its catalogue; {again}")
    if preset.encoder.text_encoder:
        raise ValueError(f"refresh: this run's items are read by a text encoder of its catalogue; {again}")
    if not preset.retrieval.caps.none:
        raise ValueError(f"refresh: this run learns under caps, retrieval.day_events or .same_item_s; {again}")


class Refresh:
    """One refresh of ``run``, begun or taken up."""

    def __init__(self, run: Run, preset: Preset, config: RefreshConfig, say: Progress, items: Path | None) -> None:
        check_refreshable(run, preset)
        self.run, self.preset, self.config, self.say, self.items = run, preset, config, say, items
        self.work = Run(run.root / WORK)
        self.old = Features(run.features)
        self.new = Features(self.work.features)
        self.seed = int(run.manifest(RETRIEVAL)["seed"])

    # -- plan ----------------------------------------------------------------------------------------
    def _state(self) -> dict[str, Any]:
        """What the work is made of: if it changes, the work is begun anew."""
        made = {name: self.run.key(name) for name in (FEATURES, RETRIEVAL, RANKING)}
        if self.run.has(FINAL):
            made[FINAL] = self.run.key(FINAL)
        if self.run.has(COMPILED):
            made[COMPILED] = read_manifest(self.run.compiled, "vivace compile")["key"]
        items = "" if self.items is None else str(self.items.resolve())
        return {"run": made, "config": json.loads(json.dumps(asdict(self.config))), "items": items}

    def plan(self) -> tuple[int, str]:
        """(number of the log's event that it works up to, why there is nothing to do or ""). Work of another state of
        the run, or of other options, is removed."""
        state, file = self._state(), self.work.root / PLAN
        there: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        same = {name: there.get(name) for name in state} == state
        refused = there.get("refused") if same else None
        if same and not refused:
            self.say(f"going on with the refresh up to event {there['until']:,} of the log")
            return int(there["until"]), ""
        after = self.old.log_number()
        seen = int(refused["until"]) if refused else after
        appended = appended_since(self.run.feature_store, seen, minute_events=self.old.minute_events())
        if len(appended.rows) < self.config.min_events and not (self.items and not refused):
            why = f"{len(appended.rows):,} events appended since event {seen:,} of the log; --min-events is "
            why += f"{self.config.min_events:,}"
            return seen, why + (f"; those before were refused: {refused['reason']}" if refused else "")
        shutil.rmtree(self.work.root, ignore_errors=True)
        self.work.root.mkdir()
        self.run.text.mkdir(exist_ok=True)
        self.work.text.symlink_to(Path("..") / self.run.text.name)  # what a text tower has encoded serves both
        write_json(file, state | {"until": appended.until})
        return appended.until, ""

    def forget(self, decision: Decision, until: int) -> None:
        """Removes the work, and keeps why: the same events are not tried again."""
        plan = json.loads((self.work.root / PLAN).read_text())
        write_json(self.work.root / PLAN, plan | {"refused": {"until": until, "reason": decision.reason}})
        for path in self.work.root.iterdir():
            if path.name != PLAN:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    # -- steps ---------------------------------------------------------------------------------------
    def features(self, until: int) -> dict[str, int]:
        """The features with what was appended; how many events by what became of them."""
        schema, rejects = self.old.schema, self.work.root / "rejected_items.csv"
        context = (*schema.plain_context, *schema.context_continuous)
        appended = appended_since(
            self.run.feature_store, self.old.log_number(), until, schema.user_columns, context, self.old.minute_events()
        )
        upserted = upserted_items(self.run.feature_store, schema, self.work.root / "rejected_upserts.csv")
        given = None if self.items is None else read_catalogue(self.items, schema, rejects)
        there = [items for items in (given, upserted) if items is not None]
        catalogue = pd.concat(there, ignore_index=True).drop_duplicates(ITEM) if there else None
        if appended.aged_out:
            why = "too old (retention.json), or of users forgotten"
            self.say(f"{appended.aged_out:,} events left the log before a refresh took them: {why}")
        manifest = refresh_features(self.old, appended, self.work.features, self.config.share, catalogue, self.say)
        taken: dict[str, int] = manifest["results"]["refresh"]
        return taken

    def _learned(self) -> Any:
        """Events of each user that the retriever of the run has learned."""
        return learned_lengths(self.old.files(WHOLE if self.run.has(FINAL) else "train"))

    def retriever(self) -> None:
        old = self.run.manifest(RETRIEVAL)
        config = old["config"] | {"refresh": asdict(self.config.more)}
        inputs = {FEATURES: self.work.key(FEATURES), "before": old["key"]}
        step = Step(self.work.retrieval, "refresh retrieval", config, self.seed, inputs)
        if step.finished(self.say, "refreshed retriever is there"):
            return
        keep_only_own_checkpoint(step)
        torch.manual_seed(self.seed)
        model = grown_retriever(
            self.old, self.new, self.preset, load_retrieval(self.old, self.preset, self.run.root, self.run.has(FINAL))
        )
        counts = popularity(self.new.files("train"), self.new.item_count())
        history, replay = self.preset.encoder.span, self.config.more.replay
        sequences, fresh = sequences_to_learn(
            self.new.files("train"), self._learned(), history, replay, self.seed, EventColumns.read_by(model)
        )
        self.say(
            f"retriever: {fresh:,} sequences with something new, {len(sequences) - fresh:,} older ones beside them"
        )
        report = train_more(
            model, sequences, counts, self.preset, self.config.more, self.seed, step.folder,
            watched_loss(model, self.new, self.preset),
        )  # fmt: skip
        settle(model, self.new, self.new.files("train"), counts, self.preset)
        sizes = {name: old["results"].get(name) for name in ("trained_parameters", "memory")}
        finish_training(
            step, model, report, **sizes, parameters=sum(p.numel() for p in model.parameters()),
            fresh_sequences=fresh, replayed_sequences=len(sequences) - fresh,
        )  # fmt: skip

    def ranker(self) -> None:
        old = self.run.manifest(RANKING)
        config = old["config"] | {"refresh": asdict(self.config.more)}
        step = Step(self.work.ranking, "refresh ranking", config, self.seed, {RETRIEVAL: self.work.key(RETRIEVAL)})
        if step.finished(self.say, "refreshed ranker is there"):
            return
        keep_only_own_checkpoint(step)
        torch.manual_seed(self.seed)
        retriever = load_retrieval(self.new, self.preset, self.work.root)
        given = load_ranker(self.old, self.preset, self.run.root, final=self.run.has(FINAL))
        model = counted_ranker(self.new, self.preset, retriever, given, self.new.files("train"))
        data = RankerData(self.new, retriever, self.preset, self.seed, control=False)
        report = train_ranker_more(model, data, self.preset, self.config.more, self.seed, step.folder)
        self.say(f"ranker: {report['labels']:,} new validation requests")
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        finish_training(step, model, report, parameters=parameters)

    def judge(self) -> Decision:
        """Old and new models on the newest events."""
        before = self._models(served_models(self.run, self.old, self.new, self.preset))
        after = Models(self.new, self.preset, self.work.root, [RANKING])
        old, new = (ranks_of(models, "test") for models in (before, after))
        self.say(f"judged {len(new):,} requests by the old and the new models")
        return decide(old, new, self.config.bound, self.config.force)

    def _models(self, loaded: tuple[RetrievalModel, RankingModel]) -> Models:
        return Models(self.new, self.preset, self.run.root, [RANKING], loaded=loaded)

    def final(self) -> None:
        """Where the run serves a final fit: the judged models on the events that judged as well."""
        if not self.run.has(FINAL):
            return
        judged = self.work.manifest(RETRIEVAL)
        epochs = chosen_epochs(judged)
        inputs = {name: self.work.key(name) for name in (FEATURES, RETRIEVAL, RANKING)}
        step = Step(
            self.work.step(FINAL), "final fit", {"refresh": asdict(self.config.more), "epochs": epochs}, self.seed,
            inputs,
        )  # fmt: skip
        if step.finished(self.say, "final fit is there"):
            return
        started = time.monotonic()
        step.keep_only_own()
        torch.manual_seed(self.seed)
        model = load_retrieval(self.new, self.preset, self.work.root)
        counts = popularity(self.new.files(WHOLE), self.new.item_count())
        learned, more = learned_lengths(self.new.files("train")), self.config.more
        sequences, _ = sequences_to_learn(
            self.new.files(WHOLE),
            learned,
            self.preset.encoder.span,
            more.replay,
            self.seed,
            EventColumns.read_by(model),
        )
        report = train_more(model, sequences, counts, self.preset, more, self.seed, step.folder, epochs=epochs)
        settle(model, self.new, self.new.files(WHOLE), counts, self.preset)
        given = load_ranker(self.new, self.preset, self.work.root)
        ranker = counted_ranker(self.new, self.preset, model, given, self.new.files(WHOLE))
        for folder, trained in ((self.work.final.retrieval, model), (self.work.final.ranking, ranker)):
            folder.mkdir(exist_ok=True)
            torch.save(trained.state_dict(), folder / WEIGHTS)
        (step.folder / "checkpoint.pt").unlink(missing_ok=True)
        step.finish(
            time.monotonic() - started, epochs=report["epochs"], chosen_epochs=epochs,
            events=int(counts[FIRST_ID:].sum()), card=f"final fit on all events, refreshed: {epochs} epochs",
        )  # fmt: skip

    def compile(self) -> int:
        """The new version, as the last one was compiled, in a repository of its own; its number, 0 where the run is not
        compiled. Raises GateError where its number format costs too much."""
        if not self.run.has(COMPILED):
            return 0
        made = read_manifest(self.run.compiled, "vivace compile")
        given = {f.name: made["config"][f.name] for f in fields(CompileConfig) if f.name in made["config"]}
        given["targets"] = tuple(given.get("targets", ()))
        number = next_version(self.run.repository)
        before = self.work.repository.with_name(f"{self.work.repository.name}.{number - 1}")
        if not self.work.has(COMPILED):  # the next number is the run's next one
            before.mkdir(exist_ok=True)
        results = compile_models(self.new, self.preset, self.work.root, made["seed"], self.say, CompileConfig(**given))[
            "results"
        ]
        return int(results["version"])

    def exchange(self, version: int) -> None:
        """From here on the new state is the run's, whatever stops this process."""
        parts = [FEATURES, RETRIEVAL, RANKING, EVALUATION, *[FINAL] * self.work.has(FINAL), *[COMPILED] * bool(version)]
        begin_exchange(self.run.root, parts, [CONTROL], version)
        finish_exchange(self.run.root)


def refresh(
    run: Run, preset: Preset, config: RefreshConfig, say: Progress, items: Path | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Outcome:  # fmt: skip
    """Refreshes ``run``, which the caller holds (``manifest.exclusive``). ``items``: file of new items;
    ``on_step`` hears the name of each step before it begins. Raises ValueError for a run that cannot be refreshed,
    StaleError where its parts do not belong together."""
    finish_exchange(run.root)
    work = Refresh(run, preset, config, say, items)
    until, nothing = work.plan()
    if nothing:
        say(f"nothing to refresh: {nothing}")
        return Outcome(NOTHING, {})
    on_step("features")
    taken = work.features(until)
    file = work.work.root / DECISION
    version = 0
    try:
        for name in ("retriever", "ranker"):
            on_step(name)
            getattr(work, name)()
        on_step("judge")
        decision = Decision(**_tuples(json.loads(file.read_text()))) if file.exists() else work.judge()
        write_json(file, decision.record())
        if decision.publish:
            on_step("final")
            work.final()
            on_step("evaluate")
            evaluate(work.new, preset, work.work.root, work.seed, say)
            on_step("compile")
            version = work.compile()
    except FloatingPointError as error:
        decision = broken(f"training broke: {error}", config.bound)
    except GateError as error:
        decision = broken(str(error), config.bound)
    if not decision.publish:
        work.forget(decision, until)
        return Outcome(REFUSED, taken, decision)
    on_step("exchange")
    work.exchange(version)
    return Outcome(PUBLISHED, taken, decision, version)


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
