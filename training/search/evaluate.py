"""How good the search is: every item of the catalogue is ranked, what is not judged counts as irrelevant.

``vivace evaluate --task search --data esci --path FOLDER``: k folds by query; the encoder's fine-tuning and the ranker
see the judgments of the other folds alone. NDCG@10 by linear gains (Järvelin and Kekäläinen 2002), recall@100 and MRR
of items that gain 1, with intervals by bootstrap over queries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from search.data import Catalogue, Judgments
from search.features import features
from search.hybrid import MATCHED, HybridIndex, top
from search.late import LateInteraction
from search.lexical import Field, Lexical
from search.query_encoder import EncodedQueries, QueryEncoder
from search.text import normalise
from search.understanding import QueryUnderstanding, Understood, likely, with_typos
from training.metrics import bootstrap
from training.models.text_encoder import TOKENIZER
from training.search.encoder import EncoderTraining, SearchEncoderConfig, TextSearchEncoder, item_texts
from training.search.ranker import Ensemble, SearchRankerConfig, train_search_ranker
from training.search.tower import OURS, TowerEncoder
from training.search.trees import Trees, TreesConfig, train_trees
from training.text.tower import TextTower
from vivace.checks import check_fields, check_minimum
from vivace.manifest import Step, digest, write_text
from vivace.run import Run

CANDIDATES, K, DEEP = 200, 10, 100
WORDS, MEANING, HYBRID, RANKED, TYPOS = "BM25", "dense", "hybrid", "hybrid + ranker", "hybrid + ranker, typos"
BM25_TYPOS = "BM25, typos"
TYPO_SHARE = 0.2
FULL, SUBSTITUTE = 1.0, 0.1  # gain of an item that answers the query, of one that might do
HARD = 30  # items that the words find and nobody judged: hard negatives
FILE = Path("query_search", "evaluation.json")


def ndcg(gains: Sequence[float] | np.ndarray, ideal: Sequence[float], k: int = K) -> float:
    """Of the ranked items' ``gains``; ``ideal``: those of all judged items. 0 where nothing gains."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = np.sort(np.asarray(ideal, float))[::-1][:k]
    ranked = np.asarray(gains, float)[:k]
    most = float(best @ discount[: len(best)])
    return float(ranked @ discount[: len(ranked)]) / most if most else 0.0


def judge(items: Sequence[str], gains: Mapping[str, float]) -> dict[str, float]:
    """NDCG@10, recall@100 and MRR of a ranked list."""
    ranked = [gains.get(i, 0.0) for i in items[:DEEP]]
    full = [i for i, g in gains.items() if g >= FULL]
    first = next((r for r, g in enumerate(ranked) if g >= FULL), None)
    return {
        "NDCG@10": ndcg(ranked, list(gains.values())),
        "recall@100": sum(g >= FULL for g in ranked) / len(full) if full else 0.0,
        "MRR": 0.0 if first is None else 1 / (first + 1),
    }


def group(query: str) -> str:
    """Query group by length: short queries name a thing, long ones describe it."""
    n = len(query.split())
    return "1-2 words" if n <= 2 else "3-4 words" if n <= 4 else "5 words and more"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is trained and judged on a catalogue with judgments."""

    fields: tuple[Field, ...]
    """Of the catalogue, with their boosts."""
    encoder: SearchEncoderConfig = field(default_factory=SearchEncoderConfig)
    """The encoder of queries and items."""
    tower: str = OURS
    """Name of a pretrained text tower in the encoder's place: see ``training.text.tower``."""
    ranker: SearchRankerConfig | TreesConfig = field(default_factory=SearchRankerConfig)
    """The ranker of what was found, a network or boosted trees."""
    folds: int = 5
    """Of the cross-validation by query, at least 2."""
    matched: float = 1.0
    """Weight of what is popular among the matches, less than a shop's own: what is known is how many have rated an
    item, not what is bought here."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 2, "folds")
        check_minimum(self, 0, "matched")


def esci_config(tower: str = OURS) -> SearchConfig:
    """For Amazon's products; with a tower the ranker is boosted trees."""
    boosts = {"title": 3.0, "bullets": 0.5, "description": 0.3, "brand": 0.5, "colour": 0.3}
    ranker = SearchRankerConfig() if tower == OURS else TreesConfig()
    return SearchConfig(fields=tuple(Field(name, boost) for name, boost in boosts.items()), tower=tower, ranker=ranker)


class AnsweredQueries:
    """Queries put to one index: understood, encoded, with their candidates and features."""

    def __init__(
        self, index: HybridIndex, understanding: QueryUnderstanding,
        encode: Callable[[Sequence[Understood]], EncodedQueries], attributes: Mapping[str, Sequence[str]],
        queries: Sequence[str],
    ) -> None:  # fmt: skip
        first = [understanding(q) for q in queries]
        encoded = encode(first)
        self.understood: list[Understood] = [
            u.with_intents(likely(attributes, row)) for u, row in zip(first, encoded.logits, strict=True)
        ]
        self.index = index
        pairs = list(zip(self.understood, encoded.vectors, strict=True))
        self.words = [index.candidates(u, None, CANDIDATES) for u, _ in pairs]
        self.meaning = [index.candidates(None, v, CANDIDATES) for _, v in pairs]
        self.hybrid = [index.candidates(u, v, CANDIDATES) for u, v in pairs]
        self.features = [
            features(index, u, v, h, s) for (u, v), h, s in zip(pairs, self.hybrid, encoded.states, strict=True)
        ]

    def items(self, rows: np.ndarray) -> list[str]:
        return [self.index.catalogue.items[r] for r in rows]

    def gains(self, place: int, judged: Mapping[str, float]) -> np.ndarray:
        return np.array([judged.get(i, 0.0) for i in self.items(self.hybrid[place].rows)])


class Study:
    """One catalogue with judged queries: what does not see judgments, the word index and the understanding."""

    def __init__(
        self, catalogue: Catalogue, judgments: Judgments, config: SearchConfig, folder: Path, seed: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.catalogue, self.judgments, self.config, self.folder, self.seed = catalogue, judgments, config, folder, seed
        self.say = say
        self.lexical = Lexical.build(catalogue.texts, config.fields)
        self.understanding = QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.values())
        say(
            f"{len(catalogue.items):,} items, {len(judgments.queries)} queries; "
            f"lexical index {self.lexical.bytes / 2**20:.1f} MiB"
        )

    def queries(self, places: Sequence[int]) -> list[str]:
        return [self.judgments.queries[q] for q in places]

    def train_ranker(self, lists: list[np.ndarray], gains: list[np.ndarray]) -> Ensemble | Trees:
        if isinstance(self.config.ranker, TreesConfig):
            return train_trees(lists, gains, self.config.ranker, self.seed)
        return train_search_ranker(lists, gains, self.config.ranker, self.seed)


Answers = Callable[[Sequence[str]], AnsweredQueries]


class LearnedStudy(Study):
    """With the encoder that is learned here; before its fine-tuning it is learned once."""

    def __init__(
        self, catalogue: Catalogue, judgments: Judgments, config: SearchConfig, folder: Path, seed: int,
        say: Callable[[str], None], quiet: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(catalogue, judgments, config, folder, seed, say)
        self.quiet = quiet
        self.base = EncoderTraining(catalogue, config.encoder, folder / "encoder", seed, quiet)
        self.base.language()
        self.base.questions()
        self.start = {k: v.clone() for k, v in self.base.model.state_dict().items()}
        self.texts = item_texts(catalogue)
        self.at = {item: i for i, item in enumerate(catalogue.items)}

    def fine_tuned(self, places: Sequence[int], name: str) -> TextSearchEncoder:
        """The encoder after the judgments of the queries at ``places``."""
        training = EncoderTraining(self.catalogue, self.config.encoder, self.folder / name, self.seed, self.quiet)
        training.tokenizer, training.tokens = self.base.tokenizer, self.base.tokens
        training.tokenizer.save(str(training.folder / TOKENIZER))
        training.model.load_state_dict(self.start)
        judged = [self.judgments.gains[q] for q in places]
        positives = [[self.at[i] for i, g in gains.items() if g >= FULL] for gains in judged]
        hard = []
        for query, gains in zip(self.queries(places), judged, strict=True):
            matching = top(self.lexical(self.understanding(query).terms), HARD)
            poor = {self.at[i] for i, g in gains.items() if g < SUBSTITUTE}
            hard.append(sorted(poor | {int(r) for r in matching if not gains.get(self.catalogue.items[r])}))
        training.judged(self.queries(places), positives, hard)
        return training.finish()

    def answer(self, encoder: TextSearchEncoder, queries: Sequence[str]) -> AnsweredQueries:
        def encode(understood: Sequence[Understood]) -> EncodedQueries:
            vectors, logits = encoder.queries([normalise(u.mended) for u in understood])
            return EncodedQueries(vectors, logits, [np.empty((0, 0), np.float32)] * len(understood))

        index = HybridIndex(self.catalogue, self.lexical, encoder.items(self.texts), {MATCHED: self.config.matched})
        return AnsweredQueries(index, self.understanding, encode, encoder.model.attributes, queries)

    def fold(self, train: Sequence[int], name: str) -> tuple[Answers, Ensemble | Trees]:
        """(how queries are answered, the ranker) after the judgments of ``train``. The ranker learned from features by
        encoders that have not seen the query they are for: two halves of ``train``, each judged by the encoder of the
        other. Else it would trust the encoder as it is on what it was taught."""
        encoder = self.fine_tuned(train, name)
        lists, gains = [], []
        for half in (0, 1):
            judged, other = train[half::2], train[1 - half :: 2]
            answered = self.answer(self.fine_tuned(other, f"{name}-half{half}"), self.queries(judged))
            lists += answered.features
            gains += [answered.gains(i, self.judgments.gains[q]) for i, q in enumerate(judged)]
        return lambda queries: self.answer(encoder, queries), self.train_ranker(lists, gains)


class TowerStudy(Study):
    """With a pretrained tower, which sees no judgment: the ranker learns from all of ``train`` at once. Queries are
    encoded as they are served, int8."""

    def __init__(
        self, catalogue: Catalogue, judgments: Judgments, config: SearchConfig, folder: Path, seed: int,
        say: Callable[[str], None], cache: Path,
    ) -> None:  # fmt: skip
        super().__init__(catalogue, judgments, config, folder, seed, say)
        encoder = TowerEncoder(TextTower(config.tower), cache)
        items = encoder.items(catalogue, say)
        encoder.export(folder, 0)
        weights = {MATCHED: config.matched}
        self.index = HybridIndex(catalogue, self.lexical, items.vectors, weights, LateInteraction(items.states))
        self.encode = QueryEncoder(folder)

    def answer(self, queries: Sequence[str]) -> AnsweredQueries:
        return AnsweredQueries(self.index, self.understanding, self.encode.understood, self.encode.attributes, queries)

    def fold(self, train: Sequence[int], name: str) -> tuple[Answers, Ensemble | Trees]:
        answered = self.answer(self.queries(train))
        gains = [answered.gains(i, self.judgments.gains[q]) for i, q in enumerate(train)]
        return self.answer, self.train_ranker(answered.features, gains)


def evaluate_folds(
    catalogue: Catalogue, judgments: Judgments, config: SearchConfig, folder: Path, seed: int,
    say: Callable[[str], None], quiet: bool = False, cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains and judges; returns the table. What was trained stays in ``folder``; ``cache``: what a tower encoded."""
    started = time.monotonic()
    if config.tower == OURS:
        study: LearnedStudy | TowerStudy = LearnedStudy(catalogue, judgments, config, folder, seed, say, quiet)
    else:
        study = TowerStudy(catalogue, judgments, config, folder, seed, say, cache or folder)
    rows: dict[str, list[dict[str, float]]] = {}
    order: list[int] = []
    for fold, (train, test) in enumerate(judgments.folds(config.folds, seed)):
        answer, ranker = study.fold(train, f"fold{fold}")
        clean = study.queries(test)
        wrong = [with_typos(q, TYPO_SHARE, seed * 1000 + i) for q, i in zip(clean, test, strict=True)]
        for queries, names in ((clean, (WORDS, MEANING, HYBRID, RANKED)), (wrong, (BM25_TYPOS, None, None, TYPOS))):
            answered = answer(queries)
            for i, q in enumerate(test):
                hybrid = answered.hybrid[i].rows
                ranked = hybrid[np.argsort(-ranker.score(answered.features[i]), kind="stable")]
                by_method = (answered.words[i].rows, answered.meaning[i].rows, hybrid, ranked)
                for name, method_rows in zip(names, by_method, strict=True):
                    if name:
                        rows.setdefault(name, []).append(judge(answered.items(method_rows), judgments.gains[q]))
        order += test
        means = ", ".join(f"{n} {np.mean([r['NDCG@10'] for r in v[-len(test) :]]):.4f}" for n, v in rows.items())
        say(f"fold {fold + 1} of {config.folds}: NDCG@10 {means}")
    return summary(rows, study.queries(order), time.monotonic() - started)


def evaluate_step(
    catalogue: Catalogue, judgments: Judgments, config: SearchConfig, root: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """``evaluate_folds`` unless its figures are there; writes them to ``root / FILE``."""
    data = digest([catalogue.items, catalogue.texts, judgments.queries, judgments.gains])
    step = Step(root / FILE.parent, "evaluate search", config, seed, {"data": data})
    if step.finished(say, "the figures are there") is not None:
        figures: dict[str, Any] = json.loads((root / FILE).read_text(encoding="utf-8"))
        return figures
    step.keep_only_own()
    results = evaluate_folds(catalogue, judgments, config, step.folder, seed, say, cache=Run(root).text)
    write_text(root / FILE, json.dumps(results, indent=2))
    step.finish(results["seconds"], **{name: row["NDCG@10"]["mean"] for name, row in results["table"].items()})
    return results


def summary(
    rows: Mapping[str, Sequence[Mapping[str, float]]], queries: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Means with intervals, gains over BM25 query by query, means by query group."""
    groups = [group(q) for q in queries]
    table: dict[str, Any] = {}
    base = np.array([r["NDCG@10"] for r in rows[WORDS]])
    for name, of_method in rows.items():
        metrics = {k: np.array([r[k] for r in of_method]) for k in of_method[0]}
        table[name] = {k: {"mean": float(v.mean()), "interval": bootstrap(v)} for k, v in metrics.items()}
        difference = metrics["NDCG@10"] - base
        table[name]["over BM25"] = {"mean": float(difference.mean()), "interval": bootstrap(difference)}
        table[name]["groups"] = {
            g: float(metrics["NDCG@10"][np.array(groups) == g].mean()) for g in sorted(set(groups))
        }  # fmt: skip
    return {
        "table": table, "queries": len(queries), "groups": {g: groups.count(g) for g in sorted(set(groups))},
        "seconds": round(seconds),
    }  # fmt: skip


def render(results: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    names = ["NDCG@10", "over BM25", "recall@100", "MRR"]
    groups = list(results["groups"])
    for column in ("", *names, *(f"{g} ({results['groups'][g]})" for g in groups)):
        table.add_column(column, justify="right" if column else "left")
    cell = lambda m: f"{m['mean']:.4f} ({m['interval'][0]:.4f} … {m['interval'][1]:.4f})"  # noqa: E731
    for name, row in results["table"].items():
        table.add_row(name, *(cell(row[n]) for n in names), *(f"{row['groups'][g]:.4f}" for g in groups))
    return table
