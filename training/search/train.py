"""``vivace train --task search``: makes a run's catalogue searchable, in ``artifacts/<name>/query_search``.

The text encoder learns from the catalogue; the ranker from held-out requests, whose queries are made of the item that
the user went to: half of them some of its words, half two or three of its attributes
(``training.search.encoder.Questions``), with typing errors in a tenth of the words. So the ranker
sees what history and query say together, on events that the recommender's models were not trained on: it learns from
validation requests and is judged on test requests, with and without the history.

Where the data set has a log of searches, words that lead to the same items become synonyms, the encoder is fine-tuned
on what was clicked (what was passed over for it is a hard negative), and the ranker learns from the clicks beside the
made queries, each weighted by the inverse of the chance that its place was looked at. The newest part of the log
judges: the order that was shown, the fused one and the ranker's, by the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import torch

from preprocessing.features import CATALOGUE_FILE, Features
from search.data import Catalogue
from search.features import feature_names
from search.hybrid import HybridIndex
from search.late import FILE as STATES, LateInteraction
from search.lexical import Field, Lexical
from search.log import SearchLog
from search.online import RANKER, VECTORS, QuerySearch, SearchOptions, SearchResult, write_catalogue
from search.published import LAYOUT
from search.query_encoder import ENCODER
from search.understanding import QueryUnderstanding, coclick_synonyms, with_typos
from training.data import batches
from training.data.live import with_live
from training.presets import Preset
from training.search.encoder import EncoderTraining, Questions, SearchEncoderConfig, TextSearchEncoder, item_texts
from training.search.judging import SearchRequests, diversity_costs, judged_log, kinds_of
from training.search.ranker import Ensemble, SearchRankerConfig, train_search_ranker
from training.search.recommender import Recommended, Recommender, in_hindsight, without_user
from training.search.tower import OURS, TowerEncoder
from training.text.tower import TextTower
from vivace import contract
from vivace.checks import check_fields, check_minimum, check_shares
from vivace.manifest import Progress, Step, write_text
from vivace.run import FEATURES, RANKING, RETRIEVAL, Run

OPSET = 17
BATCH = 64
LESSONS = 3  # how the ranker is taught: a search that was taught otherwise is trained again
BLIND = 0.3  # share of the requests that teach as those of someone unknown


@dataclass(frozen=True, kw_only=True)
class SearchTraining:
    """What makes a run's catalogue searchable."""

    encoder: SearchEncoderConfig = field(default_factory=SearchEncoderConfig)
    """The encoder of queries and items, where it is ours."""
    tower: str = OURS
    """Name of a pretrained text tower in its place: see ``training.text.tower``."""
    ranker: SearchRankerConfig = field(default_factory=lambda: SearchRankerConfig(epochs=15, batch_size=32, members=4))
    """The ranker of what was found."""
    requests: int = 2000
    """Validation requests that teach the ranker, and test requests that judge it, at most."""
    typos: float = 0.1
    """Share of the words of made queries with an error, 0 <= x < 1."""
    searches: int = 2000
    """Newest searches with a click that teach and judge the ranker."""
    judged: float = 0.25
    """Share of those, the newest, that judge; 0 <= x < 1."""
    clicked: int = 3000
    """Newest searches with a click, but those that judge, that fine-tune the encoder."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 1, "requests")
        check_minimum(self, 0, "searches", "clicked")
        check_shares(self, "typos", "judged")


def catalogue_of(features: Features) -> Catalogue:
    """The run's catalogue, rows in the order of item ids. Raises ValueError if it has no text."""
    path = features.folder / CATALOGUE_FILE
    if not path.exists():
        raise ValueError(f"search: no {path}; run 'vivace prepare' again")
    frame, schema = pd.read_parquet(path), features.schema
    texts = {contract.TITLE: frame[contract.TITLE].fillna("").tolist()}
    if (frame[contract.TEXT].fillna("") != frame[contract.TITLE].fillna("")).any():
        texts[contract.TEXT] = frame[contract.TEXT].fillna("").tolist()
    if not any(any(column) for column in texts.values()):
        raise ValueError(f"search: the items of {schema.name} have neither title nor text; name them in the mapping")
    attributes = {a: frame[a].fillna("").astype(str).tolist() for a in schema.item_categoricals}
    lists = {a: [list(values) for values in frame[a]] for a in schema.item_lists}
    texts |= attributes | {a: [" ".join(values) for values in rows] for a, rows in lists.items()}
    numbers = {n: frame[n].to_numpy(np.float32) for n in schema.item_continuous}
    counts = np.zeros(len(frame) + contract.FIRST_ID)
    for file in features.files("train"):
        for ids in pd.read_parquet(file, columns=[contract.ITEM])[contract.ITEM]:
            np.add.at(counts, ids, 1)
    return Catalogue(
        frame[contract.ITEM].tolist(),
        texts,
        attributes,
        numbers,
        np.log1p(counts[contract.FIRST_ID :]).astype(np.float32),
        lists,
    )


def fields_of(catalogue: Catalogue) -> list[Field]:
    boosts = {contract.TITLE: 2.0, contract.TEXT: 0.5}
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


class SearchStudy:
    """Requests with a query that teach and judge a run's search ranker, made by the run's own models."""

    def __init__(
        self, features: Features, preset: Preset, root: Path, folder: Path, catalogue: Catalogue,
        config: SearchTraining, seed: int,
    ) -> None:  # fmt: skip
        self.features, self.preset, self.config, self.seed = features, preset, config, seed
        self.recommend = Recommender(features, preset, root)
        count = min(preset.ranker.candidates, features.item_count() - contract.FIRST_ID)
        self.search = QuerySearch(folder, count)
        self.questions = Questions(catalogue)

    def _first_requests(self, part: str) -> list[batches.Requests]:
        """As many batches of a part's requests as have ``config.requests`` targets in the vocabulary, or all."""
        heads, window = [h.name for h in self.features.schema.heads], self.preset.encoder.window
        chosen, total = list[batches.Requests](), 0
        for request in batches.requests(self.features.files(part), heads, window, BATCH):
            chosen.append(request)
            total += int((request.target_B >= contract.FIRST_ID).sum())
            if total >= self.config.requests:
                break
        return chosen

    def made_requests(self, part: str) -> tuple[SearchRequests, np.ndarray]:
        """Requests of "valid" or "test" with a query made of the target; whether it was made of attributes alone, bool
        [requests]. Raises ValueError where there is none."""
        rng = np.random.default_rng([self.seed, len(part)])
        parts, results = list[tuple[np.ndarray, np.ndarray, Recommended]](), list[SearchResult]()
        chosen = self._first_requests(part)
        of_part = self.features, part, self.recommend.shapes, sum(len(r.histories) for r in chosen)
        of_nobody = with_live(map(without_user, chosen), *of_part, nobody=True)
        for request, nobody in zip(with_live(chosen, *of_part), of_nobody, strict=True):
            real = (request.target_B >= contract.FIRST_ID).numpy()
            targets = request.target_B.numpy()[real]
            by_attributes = rng.random(len(targets)) < 0.5
            makers = [self.questions.by_attributes if b else self.questions for b in by_attributes]
            queries = [make(int(t) - contract.FIRST_ID, rng) for make, t in zip(makers, targets, strict=True)]
            queries = [with_typos(q, self.config.typos, int(rng.integers(1 << 31))) for q in queries]
            results += self.search(queries, [SearchOptions()] * len(queries))
            parts.append((by_attributes, targets, self.recommend.beside(request, nobody).take(real)))
        if not parts:
            raise ValueError(f"search: no {part} request whose item is in the vocabulary")
        by_attributes, targets, recommended = zip(*parts, strict=True)
        gained = [{t: 1.0} for t in np.concatenate(targets).tolist()]
        requests = SearchRequests.of(gained, results, Recommended.together(recommended))
        return requests, np.concatenate(by_attributes)

    def logged_requests(self, log: SearchLog, seen: np.ndarray) -> SearchRequests:
        """The lists of ``log`` as they would be found now, with what the users' histories recommended then. ``seen``:
        chance that each position was looked at."""
        users, times = log.column(contract.USER), log.column(contract.TIME)
        queries, recommended, results = log.column(contract.QUERY_TEXT), list[Recommended](), list[SearchResult]()
        for request, nobody in self.recommend.requests_before(users, times, BATCH):
            part_queries = queries[len(results) : len(results) + len(request.histories)]
            results += self.search(part_queries, [SearchOptions()] * len(part_queries))
            recommended.append(self.recommend.beside(request, nobody))
        hindsight = in_hindsight(self.features, users, times, log.clicked())
        return SearchRequests.of(log.gains(seen), results, Recommended.together(recommended), hindsight)

    def judge(self, ranker: Ensemble, vectors_VE: np.ndarray) -> dict[str, Any]:
        """Figures on the test requests."""
        tested, by_attributes = self.made_requests("test")
        return {
            "queries": kinds_of(tested, by_attributes, ranker),
            "diversity": diversity_costs(tested, ranker, vectors_VE),
        }


def _learned_searches(features: Features, config: SearchTraining) -> tuple[SearchLog | None, SearchLog | None]:
    """(the searches with a click, those of them that teach: all but the newest, which judge); None without a log."""
    frame = features.searches()
    if frame is None or not frame[contract.CLICKED].any():
        return None, None
    log = SearchLog.of(frame).with_clicks()
    return log, log.part(0, len(log) - int(config.judged * min(len(log), config.searches)))


def _learn_understanding(catalogue: Catalogue, taught: SearchLog | None, folder: Path, say: Progress) -> None:
    """What queries mean by the catalogue, with synonyms by the clicks of ``taught``."""
    synonyms: dict[str, list[str]] = {}
    if taught is not None:
        clicks = [dict.fromkeys(map(str, items), 1.0) for items in taught.clicked()]
        synonyms = coclick_synonyms(taught.column(contract.QUERY_TEXT), clicks)
        say(f"{len(taught):,} searches with a click teach; {len(synonyms):,} words have synonyms by them")
    QueryUnderstanding.learn(list(catalogue.texts.values()), catalogue.values(), synonyms).save(folder)


def _rows(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of the catalogue of lists of item ids."""
    return [[item - contract.FIRST_ID for item in items] for items in lists]


def _train_encoder(
    catalogue: Catalogue, taught: SearchLog | None, config: SearchTraining, folder: Path, seed: int, quiet: bool
) -> TextSearchEncoder:
    training = EncoderTraining(catalogue, config.encoder, folder, seed, quiet)
    training.language()
    training.questions()
    if taught is not None:
        newest = taught.part(max(0, len(taught) - config.clicked), len(taught))
        training.judged(newest.column(contract.QUERY_TEXT), _rows(newest.clicked()), _rows(newest.passed_over()))
    return training.finish()


def _train_ranker(
    teachers: Sequence[tuple[SearchRequests, list[float]]], config: SearchTraining, seed: int
) -> Ensemble:
    """Learned from requests, each with what it weighs among those of its kind."""
    rng = np.random.default_rng(seed)
    lists, gains, weights = [], [], list[float]()
    for requests, kind_weights in teachers:
        blind = rng.random(len(kind_weights)) < BLIND
        lists += [requests.without_history(i) if blind[i] else requests.with_history(i) for i in requests.places]
        gains += [requests.gains(i) for i in requests.places]
        weights += [w / float(np.mean(kind_weights)) for w in kind_weights]
    return train_search_ranker(lists, gains, config.ranker, seed, weights)


def train_search(
    features: Features, preset: Preset, root: Path, config: SearchTraining, seed: int, say: Progress,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Trains unless it is there; returns the manifest."""
    run = Run(root, features.folder)
    inputs = {name: run.key(name) for name in (FEATURES, RETRIEVAL, RANKING)}
    step = Step(run.search, "train search", asdict(config) | {"layout": LAYOUT, "lessons": LESSONS}, seed, inputs)
    if (manifest := step.finished(say, "search is there")) is not None:
        return manifest
    started = time.monotonic()
    step.keep_only_own()
    folder, catalogue = step.folder, catalogue_of(features)
    lexical = Lexical.build(catalogue.texts, fields_of(catalogue))
    lexical.save(folder)
    log, taught = _learned_searches(features, config)
    _learn_understanding(catalogue, taught, folder, say)
    say(f"{len(catalogue.items):,} items, {len(lexical.vocabulary):,} terms; text encoder: {config.tower}")
    write_catalogue(catalogue, folder)
    if config.tower == OURS:
        encoder = _train_encoder(catalogue, taught, config, folder, seed, quiet)
        index = HybridIndex(catalogue, lexical, encoder.items(item_texts(catalogue)))
        export_encoder(encoder, folder / ENCODER, len(feature_names(index)))
    else:
        tower = TowerEncoder(TextTower(config.tower), run.text)
        items = tower.items(catalogue, say)
        np.save(folder / STATES, items.states)
        index = HybridIndex(catalogue, lexical, items.vectors, late=LateInteraction(items.states))
        tower.export(folder, len(feature_names(index)))
    vectors, width = index.vectors, len(feature_names(index))
    np.save(folder / VECTORS, vectors)
    say("teaching the search ranker")
    study = SearchStudy(features, preset, root, folder, catalogue, config, seed)
    learned, _ = study.made_requests("valid")
    teachers, seen = [(learned, [1.0] * len(learned.places))], np.ones(1)
    if taught is not None:
        seen = taught.seen()
        newest = taught.part(max(0, len(taught) - int((1 - config.judged) * config.searches)), len(taught))
        clicked = study.logged_requests(newest, seen)
        teachers.append((clicked, [sum(gains.values()) for gains in clicked.gained]))
    ranker = _train_ranker(teachers, config, seed)
    export_ranker(ranker, width, folder / RANKER)
    results = study.judge(ranker, vectors)
    if log is not None and taught is not None and len(taught) < len(log):
        rest = log.part(len(taught), len(log))
        if judged := judged_log(rest, study.logged_requests(rest, seen), ranker):
            results["log"] = judged | {"seen": [round(float(s), 4) for s in seen[:10]]}
        else:
            say(f"the log judges nothing: the clicks of its newest {len(rest):,} searches are all training events")
    results |= {"features": width, "index_mib": round((lexical.bytes + vectors.nbytes) / 2**20, 1)}
    write_text(folder / "evaluation.json", json.dumps(results, indent=2))
    return step.finish(time.monotonic() - started, **results)
