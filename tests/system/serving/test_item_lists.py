"""A run whose items have lists, from prepare to a live row that is ranked, found and refused as it should be."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from preprocessing.refresh import appended_since, read_catalogue, refresh_features
from search.hybrid import Filters
from search.online import SearchOptions
from serving.runtime.live_catalogue import LiveCatalogue
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import ItemVocabulary, Row
from serving.runtime.updates import Updates
from tests.support import quiet, users_of_data
from training.compile.compiler import compile_models
from training.judge.evaluate import evaluate
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.models.text_encoder import TextConfig
from training.presets import Preset, tiny
from training.refresh.carry import served_models
from training.search.encoder import SearchEncoderConfig
from training.search.ranker import SearchRankerConfig
from training.search.train import SearchTraining, train_search
from vivace.contract import FEATURE_TRANSFORM, FIRST_ID, MAX_VALUES, OOV_ID, UPDATE_STORE
from vivace.run import Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

SEED = 3


class TaggedShop(Shop):
    """A shop whose items have tags in the place of a category."""

    def __init__(self) -> None:
        super().__init__(ShopConfig(users=200, items=120, events=4000, seed=SEED))
        self.schema = replace(self.schema, item_categoricals=("brand",), item_lists=("tags",), list_separators=(",",))

    def items(self) -> pd.DataFrame:
        frame = super().items()
        return frame.assign(tags=frame["category"] + ", " + frame["brand"]).drop(columns="category")


def _preset() -> Preset:
    return replace(tiny(), encoder=replace(tiny().encoder, attributes=True))


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    root = tmp_path_factory.mktemp("tagged") / "shop"
    preset = _preset()
    prepare(TaggedShop(), PrepareConfig(partitions=2), root, SEED, quiet)
    features = Features(root / "features")
    train_retrieval(features, preset, root, SEED, quiet, quiet=True)
    train_ranker(features, preset, root, SEED, quiet, quiet=True)
    evaluate(features, preset, root, SEED, quiet)
    encoder = SearchEncoderConfig(
        text=TextConfig(width=32, layers=1, heads=2, tokens=16, vocabulary=500), query_tokens=12, vector=32,
        language_epochs=1, question_epochs=1, judged_epochs=1, batch_size=32,
    )  # fmt: skip
    search = SearchTraining(encoder=encoder, ranker=SearchRankerConfig(epochs=1, members=1), requests=50)
    train_search(features, preset, root, search, SEED, quiet, True)
    compile_models(features, preset, root, SEED, quiet)
    return root


def test_a_refresh_takes_new_items_with_lists_in(tagged, tmp_path):
    old, preset = Features(tagged / "features"), _preset()
    names = old.items()["item_id"].tolist()
    like = pd.read_parquet(old.folder / "catalogue.parquet").iloc[:2]
    later = like.assign(item_id=["later-0", "later-1"], tags=[", ".join(like["tags"][0]), "a tag unheard of"])
    later.to_csv(tmp_path / "items.csv", index=False)
    catalogue = read_catalogue(tmp_path / "items.csv", old.schema, tmp_path / "rejects.csv")
    now = int(time.time() * 1000)
    shutil.copytree(tagged / "feature_store", tmp_path / "store")
    with closing(LmdbStore(tmp_path / "store")) as store:
        store.append([Event(f"user {i}", item, "view", now + 1000 * i + k) for i in range(30)
                      for k, item in enumerate([names[i], names[i + 1], "later-0"])])  # fmt: skip
    appended = appended_since(tmp_path / "store", 0)
    refresh_features(old, appended, tmp_path / "features", 0.2, catalogue, quiet)
    new = Features(tmp_path / "features")
    ids = new.items()["tags"]
    assert ids.iloc[-2].tolist() == old.items()["tags"][0].tolist() and ids.iloc[-1].tolist() == [OOV_ID]
    retriever, ranker = served_models(Run(tagged), old, new, preset)
    assert ranker.lists.shape == (new.item_count(), 1, MAX_VALUES) and len(retriever.table()) == new.item_count()


def test_a_live_row_with_a_list_is_recommended_and_found(tagged):
    run, features = Run(tagged), Features(tagged / "features")
    parity = json.loads((tagged / "compiled" / "model_card.json").read_text())["parity"]
    assert parity["fresh"]["FRESH_VALUES"] < 1e-4
    raw = pd.read_parquet(features.folder / "catalogue.parquet")
    like = json.loads(raw.to_json(orient="records"))
    at = run.repository / UPDATE_STORE / str(run.version())
    ids = ItemVocabulary(run.repository / FEATURE_TRANSFORM / str(run.version()) / "transform.onnx", lazy=True)
    with closing(LmdbStore(run.feature_store)) as store:
        update = Updates(store, at, ids)
        put = lambda row: update([b"upsert"], [json.dumps(row).encode()])[0]  # noqa: E731
        assert put({**like[0], "item_id": "bad", "tags": {"a": 1}}).startswith("error: tags: expected a list of texts")
        twins = [{**row, "item_id": f"new-{i}", "tags": ",".join(row["tags"])} for i, row in enumerate(like[:40])]
        assert {put(row) for row in twins} == {"ok"}
        pipeline = Pipeline.published(tagged, store)
        (found, values), *_ = pipeline([Row(user, None, 50) for user in sorted(users_of_data(tagged))[:20]])
        assert (found >= pipeline.shapes.items).any() and np.isfinite(values).all()
        brand = like[0]["brand"]
        having = [i for i, row in enumerate(like) if brand in row["tags"]]
        options = SearchOptions(Filters({"tags": [brand]}))
        ((found, _, understood),) = pipeline.search([brand], [options])
        new = {int(pipeline.shapes.items + slot) for slot in range(len(twins) + 1)}
        assert set(found) <= {i + FIRST_ID for i in having} | new and set(found) & new
        said = json.loads(understood)
        assert said["facets"]["tags"][0] == [brand, len(having) + sum(i < len(twins) for i in having)]
        assert {"attribute": "tags", "value": brand, "probability": 0.5, "named": True} in said["intents"]  # or a brand
        fresh = LiveCatalogue(store, at, ids, run.shapes(), ranks=True).fresh
        assert fresh is not None
        of_prepare = features.items()["tags"]
        for i in range(len(twins)):
            row = fresh.of("lists")[fresh.place[f"new-{i}"], 0]
            assert row[row > 0].tolist() == of_prepare[i].tolist()
