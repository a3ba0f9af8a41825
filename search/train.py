"""``vivace train --task search``: makes a run's catalogue searchable, in ``artifacts/<name>/query_search``.

The text encoder learns from the catalogue; the ranker from held-out requests. Where a log has no queries, they are
made of the item that the user went to: half of them some of its words, half two or three of its attributes
(``search.encoder.Questions``), with typing errors in a tenth of the words. So the ranker sees what history and query
say together, on events that the recommender's models were not trained on: it learns from validation requests and is
judged on test requests, with and without the history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import torch

from preprocessing import contract as c
from preprocessing.prepare import CATALOGUE_FILE, Features
from search.data import Catalogue
from search.encoder import EncoderTraining, Questions, SearchEncoderConfig, TextSearchEncoder, item_texts
from search.evaluate import ndcg
from search.features import feature_names, personal
from search.hybrid import HybridIndex, diversify
from search.lexical import Field, Lexical
from search.online import ENCODER, RANKER, VECTORS, QuerySearch, Wish, write_catalogue
from search.published import FOLDER
from search.ranker import Ensemble, RankerConfig, train_search_ranker
from search.understanding import QueryUnderstanding, with_typos
from training import data
from training.evaluation import bootstrap
from training.presets import Preset
from training.ranking_model import RankingGraph
from training.retrieval_model import RetrievalGraph
from training.train import load_ranker, load_retrieval
from vivace.artifacts import Step, read_manifest, write_text

OPSET = 17
BATCH = 64
DIVERSITIES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class SearchTraining:
    """``requests``: validation requests that teach the ranker, test requests that judge it; ``typos``: share of the
    words of made queries with an error."""

    encoder: SearchEncoderConfig = field(default_factory=SearchEncoderConfig)
    ranker: RankerConfig = field(default_factory=lambda: RankerConfig(epochs=15, batch_size=32))
    requests: int = 2000
    typos: float = 0.1


def catalogue_of(features: Features) -> Catalogue:
    """The run's catalogue, rows in the order of item ids. Raises ValueError if it has no text."""
    path = features.folder / CATALOGUE_FILE
    if not path.exists():
        raise ValueError(f"search: no {path}; run 'vivace prepare' again")
    frame, schema = pd.read_parquet(path), features.schema
    texts = {c.TITLE: frame[c.TITLE].fillna("").tolist()}
    if (frame[c.TEXT].fillna("") != frame[c.TITLE].fillna("")).any():
        texts[c.TEXT] = frame[c.TEXT].fillna("").tolist()
    if not any(any(column) for column in texts.values()):
        raise ValueError(f"search: the items of {schema.name} have neither title nor text; name them in the mapping")
    attributes = {a: frame[a].fillna("").astype(str).tolist() for a in schema.item_categoricals}
    texts |= {a: attributes[a] for a in attributes}
    numbers = {n: frame[n].to_numpy(np.float32) for n in schema.item_continuous}
    counts = np.zeros(len(frame) + c.FIRST_ID)
    for file in features.files("train"):
        for ids in pd.read_parquet(file, columns=[c.ITEM])[c.ITEM]:
            np.add.at(counts, ids, 1)
    return Catalogue(
        frame[c.ITEM].tolist(), texts, attributes, numbers, np.log1p(counts[c.FIRST_ID :]).astype(np.float32)
    )


def fields_of(catalogue: Catalogue) -> list[Field]:
    boosts = {c.TITLE: 2.0, c.TEXT: 0.5}
    return [Field(name, boosts.get(name, 1.0)) for name in catalogue.texts]


def export_encoder(encoder: TextSearchEncoder, path: Path, features: int) -> None:
    """TOKENS int64 [B, S] to VECTOR float32 [B, E] and INTENTS float32 [B, K]; what is needed beside is metadata."""
    tokens = torch.zeros(2, encoder.config.query_tokens, dtype=torch.int64)
    tokens[:, :3] = 5
    names = ["VECTOR", "INTENTS"]
    torch.onnx.export(
        encoder.model, (tokens,), str(path), input_names=["TOKENS"], output_names=names, opset_version=OPSET,
        dynamic_axes={n: {0: "batch"} for n in ("TOKENS", *names)}, dynamo=False,
    )  # fmt: skip
    model = onnx.load(str(path))
    record = {
        "attributes": json.dumps(encoder.model.attributes, ensure_ascii=False),
        "tokens": str(encoder.config.query_tokens), "features": str(features),
    }  # fmt: skip
    for key, value in record.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))


def export_ranker(ranker: Ensemble, inputs: int, path: Path) -> None:
    """FEATURES float32 [B, N, X] to SCORES float32 [B, N]."""
    torch.onnx.export(
        ranker.eval(), (torch.zeros(2, 3, inputs),), str(path), input_names=["FEATURES"], output_names=["SCORES"],
        opset_version=OPSET, dynamic_axes={n: {0: "batch", 1: "items"} for n in ("FEATURES", "SCORES")}, dynamo=False,
    )  # fmt: skip


@dataclass
class Requests:
    """Held-out requests with a made query: what the history recommends and what the query found."""

    by_attributes: np.ndarray  # bool: how the query was made
    targets: np.ndarray
    ids: np.ndarray
    features: np.ndarray
    ranked: list[np.ndarray]
    scores: list[np.ndarray]

    def with_history(self, i: int) -> np.ndarray:
        return personal(self.features[i], self.ids[i], self.ranked[i], self.scores[i])[0]

    @property
    def places(self) -> range:
        return range(len(self.targets))

    def found(self, i: int) -> int:
        """How many items the query found."""
        return int((self.ids[i] != c.PADDING_ID).sum())

    def gains(self, i: int) -> np.ndarray:
        return (self.ids[i] == self.targets[i]).astype(float)


def collect(
    features: Features, preset: Preset, root: Path, search: QuerySearch, catalogue: Catalogue, part: str,
    config: SearchTraining, seed: int,
) -> Requests:  # fmt: skip
    """Of ``part``, "valid" or "test": the first requests whose target can be found at all."""
    schema, items = features.schema, features.item_count()
    count = min(preset.ranker.candidates, items - c.FIRST_ID)
    retrieval = RetrievalGraph(load_retrieval(features, preset, root).cpu(), count, preset.ranker.memory).eval()
    ranking = RankingGraph(load_ranker(features, preset, root).cpu()).eval()
    make, rng = Questions(catalogue), np.random.default_rng([seed, len(part)])
    parts: list[tuple[np.ndarray, ...]] = []
    total = 0
    heads = [h.name for h in schema.heads]
    for request in data.requests(features.files(part), heads, preset.encoder.history, BATCH):
        real = (request.target_B >= c.FIRST_ID).numpy()
        times = [request.time_BT] if preset.encoder.time_bias else []
        with torch.inference_mode():
            exclude = request.exclude(items, schema.exclude_seen)
            ranked, values = ranking(request.history_BT, *retrieval(request.history_BT, exclude, *times))
        targets = request.target_B.numpy()[real]
        kinds = rng.random(len(targets)) < 0.5
        made = [make.by_attributes if k else make for k in kinds]
        queries = [own(int(t) - c.FIRST_ID, rng) for own, t in zip(made, targets, strict=True)]
        queries = [with_typos(q, config.typos, int(rng.integers(1 << 31))) for q in queries]
        ids, x, _ = search(queries, [Wish()] * len(queries))
        parts.append((kinds, targets, ids, x, ranked.numpy()[real], values.numpy()[real, 0]))
        total += len(targets)
        if total >= config.requests:
            break
    if not parts:
        raise ValueError(f"search: no {part} request whose item is in the vocabulary")
    kinds, targets, ids, x, ranked_all, scores = (np.concatenate(v) for v in zip(*parts, strict=True))
    return Requests(kinds, targets, ids, x, list(ranked_all), list(scores))


def judge(requests: Requests, ranker: Ensemble, history: bool) -> np.ndarray:
    """NDCG@10 of each request."""
    return np.array([ndcg(requests.gains(i)[_order(requests, ranker, i, history)], [1.0]) for i in requests.places])


def _order(requests: Requests, ranker: Ensemble, i: int, history: bool) -> np.ndarray:
    n = requests.found(i)
    x = requests.with_history(i)[:n] if history else requests.features[i][:n]
    return np.argsort(-ranker.score(x), kind="stable") if n else np.empty(0, int)


def diversity_costs(requests: Requests, ranker: Ensemble, vectors_VE: np.ndarray) -> dict[str, dict[str, float]]:
    """By DIVERSITY: NDCG@10 with the history, and how alike the ten items are (mean cosine of their text's vectors)."""
    out = {}
    for diversity in DIVERSITIES:
        gained, alike = [], []
        for i in requests.places:
            n = requests.found(i)
            if n < 2:
                continue
            vectors = vectors_VE[requests.ids[i][:n] - c.FIRST_ID]
            best = diversify(ranker.score(requests.with_history(i)[:n]), vectors, min(n, 10), diversity)
            gained.append(ndcg(requests.gains(i)[best], [1.0]))
            near = vectors[best] @ vectors[best].T
            alike.append((near.sum() - np.trace(near)) / (len(best) * (len(best) - 1)))
        out[f"{diversity:g}"] = {"NDCG@10": float(np.mean(gained)), "alike": float(np.mean(alike))}
    return out


def kinds_of(requests: Requests, ranker: Ensemble) -> dict[str, Any]:
    """By how the query was made: NDCG@10 of the fused order, of the ranker, of the ranker with the history and what
    that adds, with its interval."""
    fused = np.array([ndcg(requests.gains(i), [1.0]) for i in requests.places])
    without, with_history = judge(requests, ranker, False), judge(requests, ranker, True)
    found = np.array([requests.gains(i).any() for i in requests.places])
    out = {}
    for name, own in (("words", ~requests.by_attributes), ("attributes", requests.by_attributes)):
        if own.any():
            gain = (with_history - without)[own]
            out[name] = {
                "requests": int(own.sum()), "found": float(found[own].mean()), "fused": float(fused[own].mean()),
                "ranked": float(without[own].mean()), "with_history": float(with_history[own].mean()),
                "gain": float(gain.mean()), "gain_interval": bootstrap(gain),
            }  # fmt: skip
    return out


def train_search(
    features: Features, preset: Preset, root: Path, config: SearchTraining, seed: int, say: Callable[[str], None],
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Trains unless it is there; returns the manifest."""
    inputs = {n: read_manifest(root / n, "vivace train")["key"] for n in ("features", "retrieval", "ranking")}
    step = Step(root / FOLDER, "train search", asdict(config), seed, inputs)
    if step.done():
        say("search is there: nothing to do")
        assert step.manifest is not None
        return step.manifest
    started = time.monotonic()
    step.reset()
    folder, catalogue = step.folder, catalogue_of(features)
    lexical = Lexical.build(catalogue.texts, fields_of(catalogue))
    lexical.save(folder)
    QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.attributes).save(folder)
    say(f"{len(catalogue.items):,} items, {len(lexical.vocabulary):,} terms; teaching the text encoder")
    training = EncoderTraining(catalogue, config.encoder, folder, seed, quiet)
    training.language()
    training.questions()
    encoder = training.finish()
    vectors = encoder.items(item_texts(catalogue))
    np.save(folder / VECTORS, vectors)
    write_catalogue(catalogue, folder)
    width = len(feature_names(HybridIndex(catalogue, lexical, vectors)))
    export_encoder(encoder, folder / ENCODER, width)
    count = min(preset.ranker.candidates, features.item_count() - c.FIRST_ID)
    search = QuerySearch(folder, count)
    say("teaching the search ranker")
    learned = collect(features, preset, root, search, catalogue, "valid", config, seed)
    rng = np.random.default_rng(seed)
    blind = rng.random(len(learned.targets)) < 0.3  # some without history: a query of someone unknown
    lists = [learned.features[i] if blind[i] else learned.with_history(i) for i in range(len(blind))]
    ranker = train_search_ranker(lists, [learned.gains(i) for i in range(len(blind))], config.ranker, seed)
    export_ranker(ranker, width, folder / RANKER)
    tested = collect(features, preset, root, search, catalogue, "test", config, seed)
    results = {
        "queries": kinds_of(tested, ranker), "diversity": diversity_costs(tested, ranker, vectors),
        "features": width, "index_mib": round((lexical.bytes + vectors.nbytes) / 2**20, 1),
    }  # fmt: skip
    write_text(folder / "evaluation.json", json.dumps(results, indent=2))
    return step.finish(time.monotonic() - started, **results)
