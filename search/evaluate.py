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
from search.encoder import EncoderTraining, SearchEncoderConfig, TextSearchEncoder, item_texts
from search.hybrid import HybridIndex
from search.lexical import Field, Lexical
from search.ranker import RankerConfig, features, train_search_ranker
from search.text import normalise
from search.understanding import QueryUnderstanding, Understood, with_typos
from training.evaluation import bootstrap

CANDIDATES, K, DEEP = 200, 10, 100
WORDS, MEANING, HYBRID, RANKED, TYPOS = "BM25", "dense", "hybrid", "hybrid + ranker", "hybrid + ranker, typos"
BM25_TYPOS = "BM25, typos"
TYPO_SHARE = 0.2
FULL = 1.0  # gain of an item that answers the query


def ndcg(gains: Sequence[float], ideal: Sequence[float], k: int = K) -> float:
    """Of the ranked items' ``gains``; ``ideal``: those of all judged items. 0 where nothing gains."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = np.sort(np.asarray(ideal, float))[::-1][:k]
    own = np.asarray(gains, float)[:k]
    most = float(best @ discount[: len(best)])
    return float(own @ discount[: len(own)]) / most if most else 0.0


def judge(items: Sequence[str], gains: Mapping[str, float]) -> dict[str, float]:
    """NDCG@10, recall@100 and MRR of a ranked list."""
    own = [gains.get(i, 0.0) for i in items[:DEEP]]
    full = [i for i, g in gains.items() if g >= FULL]
    first = next((r for r, g in enumerate(own) if g >= FULL), None)
    return {
        "NDCG@10": ndcg(own, list(gains.values())),
        "recall@100": sum(g >= FULL for g in own) / len(full) if full else 0.0,
        "MRR": 0.0 if first is None else 1 / (first + 1),
    }


def group(query: str) -> str:
    """Query group by length: short queries name a thing, long ones describe it."""
    n = len(query.split())
    return "1-2 words" if n <= 2 else "3-4 words" if n <= 4 else "5 words and more"


@dataclass(frozen=True)
class SearchConfig:
    """``fields`` of the catalogue with their boosts."""

    fields: tuple[Field, ...]
    encoder: SearchEncoderConfig
    ranker: RankerConfig = field(default_factory=RankerConfig)
    folds: int = 5


def esci_config() -> SearchConfig:
    """For Amazon's products."""
    fields = (Field("title", 3.0), Field("bullets", 0.5), Field("description", 0.3), Field("brand", 0.5),
              Field("colour", 0.3))  # fmt: skip
    return SearchConfig(fields, SearchEncoderConfig())


class Asked:
    """Queries put to one index: understood, encoded, with their candidates and features."""

    def __init__(
        self, index: HybridIndex, understanding: QueryUnderstanding, encoder: TextSearchEncoder, queries: Sequence[str]
    ) -> None:  # fmt: skip
        first = [understanding(q) for q in queries]
        self.vectors, logits = encoder.queries([normalise(u.mended) for u in first])
        self.understood: list[Understood] = [
            understanding(q, encoder.intents(row)) for q, row in zip(queries, logits, strict=True)
        ]
        self.index = index
        pairs = list(zip(self.understood, self.vectors, strict=True))
        self.words = [index.candidates(u, None, CANDIDATES) for u, _ in pairs]
        self.meaning = [index.candidates(None, v, CANDIDATES) for _, v in pairs]
        self.hybrid = [index.candidates(u, v, CANDIDATES) for u, v in pairs]
        self.features = [features(index, u, v, h) for (u, v), h in zip(pairs, self.hybrid, strict=True)]

    def items(self, rows: np.ndarray) -> list[str]:
        return [self.index.catalogue.items[r] for r in rows]

    def gains(self, place: int, judged: Mapping[str, float]) -> np.ndarray:
        return np.array([judged.get(i, 0.0) for i in self.items(self.hybrid[place].rows)])


def evaluate_folds(
    catalogue: Catalogue,
    judgments: Judgments,
    config: SearchConfig,
    folder: Path,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains and judges; returns the table, per-query figures in ``queries``. What was trained stays in ``folder``."""
    started = time.monotonic()
    lexical = Lexical.build(catalogue.texts, config.fields)
    understanding = QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.attributes)
    say(
        f"{len(catalogue.items):,} items, {len(judgments.queries)} queries; "
        f"lexical index {lexical.bytes / 2**20:.1f} MiB"
    )
    base = folder / "encoder"
    training = EncoderTraining(catalogue, config.encoder, base, seed)
    training.language()
    training.questions()
    start = {k: v.clone() for k, v in training.model.state_dict().items()}
    texts = item_texts(catalogue)
    rows: dict[str, list[dict[str, float]]] = {}
    order: list[int] = []
    at = {item: i for i, item in enumerate(catalogue.items)}
    for fold, (train, test) in enumerate(judgments.folds(config.folds, seed)):
        own = EncoderTraining(catalogue, config.encoder, folder / f"fold{fold}", seed)
        own.tokenizer, own.tokens = training.tokenizer, training.tokens
        own.model.load_state_dict(start)
        by_words = [lexical(understanding(judgments.queries[q]).terms) for q in train]
        positives = [[at[i] for i, g in judgments.gains[q].items() if g >= FULL] for q in train]
        hard = [
            [at[i] for i, g in judgments.gains[q].items() if g < 0.1]
            + [int(i) for i in np.argsort(-s)[:30] if judgments.gains[q].get(catalogue.items[i], 0.0) == 0]
            for q, s in zip(train, by_words, strict=True)
        ]
        own.judged([judgments.queries[q] for q in train], positives, hard)
        encoder = own.finish()
        index = HybridIndex(catalogue, lexical, encoder.items(texts))
        asked = Asked(index, understanding, encoder, [judgments.queries[q] for q in train])
        gains = [asked.gains(i, judgments.gains[q]) for i, q in enumerate(train)]
        ranker = train_search_ranker(asked.features, gains, config.ranker, seed)
        for typos, names in ((False, (WORDS, MEANING, HYBRID, RANKED)), (True, (BM25_TYPOS, None, None, TYPOS))):
            queries = [judgments.queries[q] for q in test]
            if typos:
                queries = [with_typos(q, TYPO_SHARE, seed * 1000 + i) for q, i in zip(queries, test, strict=True)]
            asked = Asked(index, understanding, encoder, queries)
            for i, q in enumerate(test):
                ranked = asked.hybrid[i].rows[np.argsort(-ranker.score(asked.features[i]), kind="stable")]
                found = (asked.words[i].rows, asked.meaning[i].rows, asked.hybrid[i].rows, ranked)
                for name, own_rows in zip(names, found, strict=True):
                    if name:
                        rows.setdefault(name, []).append(judge(asked.items(own_rows), judgments.gains[q]))
        order += test
        said = ", ".join(f"{n} {np.mean([r['NDCG@10'] for r in v[-len(test) :]]):.4f}" for n, v in rows.items())
        say(f"fold {fold + 1} of {config.folds}: NDCG@10 {said}")
    return summary(rows, [judgments.queries[q] for q in order], time.monotonic() - started)


def summary(
    rows: Mapping[str, Sequence[Mapping[str, float]]], queries: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Means with intervals, gains over BM25 query by query, means by query group."""
    groups = [group(q) for q in queries]
    table: dict[str, Any] = {}
    base = np.array([r["NDCG@10"] for r in rows[WORDS]])
    for name, found in rows.items():
        own = {k: np.array([r[k] for r in found]) for k in found[0]}
        table[name] = {k: {"mean": float(v.mean()), "interval": bootstrap(v)} for k, v in own.items()}
        difference = own["NDCG@10"] - base
        table[name]["over BM25"] = {"mean": float(difference.mean()), "interval": bootstrap(difference)}
        table[name]["groups"] = {
            g: float(own["NDCG@10"][np.array(groups) == g].mean()) for g in sorted(set(groups))
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


def write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
