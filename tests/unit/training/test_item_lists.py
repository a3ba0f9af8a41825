"""List attributes in the models: means by hand, padding and order, and a live row that is what the prepared row is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from preprocessing.features import Features
from preprocessing.item_lists import padded
from preprocessing.item_rows import parse_item
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from serving.runtime.new_items import NewItems
from tests.unit.preprocessing.tables import HEAD, write
from training.compile.onnx_export import export
from training.data.counters import item_tables, popularity
from training.data.fresh_ranking import CATEGORIES, INPUTS, LISTS, NUMBERS, OUTPUT, FreshRankingGraph
from training.data.new_items import new_item_tables
from training.models.encoders import EncoderConfig
from training.models.item_table import (
    ItemAttributes,
    ItemLists,
    ItemTable,
    ItemTables,
    item_attributes,
    list_mean,
    nearest_seen,
)
from training.models.ranking import RankerConfig, RankingGraph, RankingModel
from training.models.ranking_gpu import gpu_graph
from training.models.retrieval import RetrievalGraph, RetrievalModel
from vivace.contract import FIRST_ID, MAX_VALUES, NULL_ID, OOV_ID, PADDING_ID
from vivace.onnx_session import open_session

ITEMS, WIDTH, T, N = 40, 16, 6, 10
ENCODER = EncoderConfig(width=WIDTH, layers=1, heads=2, history=T, attributes=True)


def _lists() -> ItemLists:
    g = torch.Generator().manual_seed(5)
    rows = [
        [[int(i) for i in torch.randperm(6, generator=g)[: k % 5 + 1] + FIRST_ID] for k in range(ITEMS)] for _ in "ab"
    ]
    ids = np.stack([padded(of) for of in rows], 1)
    ids[:FIRST_ID] = PADDING_ID
    return ItemLists(torch.from_numpy(ids), (FIRST_ID + 6, FIRST_ID + 6))


def _attributes(lists: ItemLists | None) -> ItemAttributes:
    none = torch.zeros(ITEMS, 0)
    return ItemAttributes(none.long(), (), none, none.long(), 1, none, lists)


def _models(lists: ItemLists | None) -> tuple[RetrievalModel, RankingModel]:
    torch.manual_seed(0)
    retriever = RetrievalModel(ENCODER, ITEMS, torch.arange(ITEMS).float(), _attributes(lists)).eval()
    followers = torch.randint(FIRST_ID, ITEMS, (ITEMS, 8))
    tables = ItemTables(
        torch.rand(ITEMS), followers, torch.rand(ITEMS, 8), torch.randint(0, 5, (ITEMS, 1)), (5,),
        torch.randn(ITEMS, 1), lists,
    )  # fmt: skip
    config = RankerConfig(candidates=N, heads=2, experts=2, expert_width=8, lags=3, followers=8)
    ranker = RankingModel(config, tables, retriever, ("click", "buy")).eval()
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return retriever, ranker.requires_grad_(False)


def _request() -> tuple[torch.Tensor, torch.Tensor]:
    history = torch.tensor([[0, 0, 0, 5, 9, 12], [7, 8, 9, 10, 11, 12], [0] * T])
    return history, torch.zeros(3, ITEMS, dtype=torch.bool)


def test_a_list_is_the_mean_of_its_values_whatever_their_order_and_padding():
    values = torch.nn.Embedding(6, 2)
    with torch.no_grad():
        values.weight.copy_(torch.tensor([[9.0, 9], [8, 8], [7, 7], [1, 2], [3, 6], [5, 1]]))
    ids = torch.tensor([[3, 4, 0, 0], [4, 3, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    expected = torch.tensor([[2.0, 4], [2, 4], [5, 1], [0, 0]])  # (1 + 3) / 2, (2 + 6) / 2; padding's 9 counts nothing
    assert torch.equal(list_mean(values, ids), expected)
    assert torch.equal(list_mean(values, ids[:, :2]), expected)
    lists = ItemLists(torch.from_numpy(padded([[]] * FIRST_ID + ids.tolist()))[:, None], (6,))
    none = torch.zeros(7, 0)
    table = ItemTable(7, 2, ItemAttributes(none.long(), (), none, none.long(), 1, none, lists))
    with torch.no_grad():
        table.id.weight.zero_()
        table.listed[0].weight.copy_(values.weight)
        torch.testing.assert_close(table()[FIRST_ID:], expected)


def test_graphs_with_lists_answer_what_pytorch_answers(tmp_path):
    lists = _lists()
    retriever, ranker = _models(lists)
    given = _request()
    with torch.no_grad():
        found = RetrievalGraph(retriever, N)(*given)
        inputs = (given[0], *found)
        expected = RankingGraph(ranker)(*inputs)
        for other in (RankingGraph(ranker, folded=True), gpu_graph(ranker, torch.float32)):
            torch.testing.assert_close(other(*inputs)[1], expected[1], atol=2e-5, rtol=1e-4)
        moved = replace(lists, ids=torch.roll(lists.ids, 1, 2).contiguous())  # another order, padding in front
        torch.testing.assert_close(RankingGraph(_models(moved)[1])(*inputs)[1], expected[1], atol=2e-5, rtol=1e-4)
    names = ["HISTORY", "IDS", "SCORES", "ENCODED"]
    export(RankingGraph(ranker), inputs, names, ["RANKED", "VALUES"], tmp_path / "ranking.onnx", {})
    answer = open_session(tmp_path / "ranking.onnx").run(
        None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    )
    np.testing.assert_array_equal(answer[0], expected[0].numpy())
    np.testing.assert_allclose(answer[1], expected[1].numpy(), atol=2e-5)


def test_a_fresh_item_is_described_as_an_item_of_the_tables(tmp_path):
    _, ranker = _models(_lists())
    ids = torch.tensor([[5, 9, 30]])
    graph = FreshRankingGraph(ranker)
    described = graph._describe(ranker.item(ids), ranker.categories[ids], ranker.lists[ids], ranker.numbers[ids])
    torch.testing.assert_close(described, ranker.describe(ids))
    given = [torch.tensor([[0, 0, 0, 5, 9, 12]]), torch.randn(1, N), torch.randn(1, T, WIDTH), torch.randn(1, 3),
             ranker.item(ids), ranker.categories[ids], ranker.lists[ids], ranker.numbers[ids]]  # fmt: skip
    names = [*INPUTS, CATEGORIES, LISTS, NUMBERS]
    export(graph, tuple(given), names, [OUTPUT], tmp_path / "fresh.onnx", {LISTS: (1, "fresh")})
    feed = {name: x.numpy() for name, x in zip(names, given, strict=True)}
    answer = open_session(tmp_path / "fresh.onnx").run(None, feed)[0]
    np.testing.assert_allclose(answer, graph(*given).numpy(), atol=2e-5)
    feed[LISTS] = np.full_like(feed[LISTS], PADDING_ID)
    assert np.abs(open_session(tmp_path / "fresh.onnx").run(None, feed)[0] - answer).max() > 1e-3


# -- of a prepared catalogue -----------------------------------------------------------------------------
GENRES = {
    "A": "Drama|War",
    "B": "Comedy",
    "C": "War|Drama|Comedy",
    "D": "Comedy",
    "E": "",
    "N": "War|Drama",
    "O": "Comedy",
}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Features:
    folder = tmp_path_factory.mktemp("films")
    write(
        folder,
        "e.csv",
        "user,item,ts\n" + "".join(f"u{i % 9},{'ABCDE'[i % 5]},{1_700_000_000 + i}\n" for i in range(90)),
    )
    write(folder, "i.csv", "item,genres,year\n" + "".join(f"{i},{g},{len(g)}\n" for i, g in GENRES.items()))
    text = '[items]\nfiles = "i.csv"\nitem = "item"\nlists = "genres"\ncontinuous = "year"\n'
    write(folder, "mapping.toml", HEAD.format(events="e.csv") + text)
    prepare(Tables(folder / "mapping.toml"), PrepareConfig(partitions=1), folder / "run", 0, lambda _: None)
    return Features(folder / "run" / "features")


def test_items_without_events_stand_near_those_with_their_values(features):
    names = features.items()["item_id"].tolist()
    seen = popularity(features.files("train"), features.item_count()) > 0
    ids, neighbours, share = nearest_seen(features, seen, keep=1)
    nearest = {names[i - FIRST_ID]: names[n - FIRST_ID] for i, n in zip(ids, neighbours[:, 0], strict=True)}
    assert nearest["N"] == "A" and nearest["O"] in "BD" and (share == 1).all()


def test_a_live_row_has_the_ids_of_the_prepared_row(features):
    tables, counts = item_tables(features, 4), popularity(features.files("train"), features.item_count())
    attributes = item_attributes(features, ENCODER)
    assert attributes is not None and tables.lists is not None
    assert torch.equal(attributes.lists.ids, tables.lists.ids) and tables.lists.sizes == (FIRST_ID + 3,)
    retriever = RetrievalModel(ENCODER, features.item_count(), torch.tensor(counts), attributes)
    new_items = NewItems(new_item_tables(features, retriever, counts))
    raw = pd.read_parquet(features.folder / "catalogue.parquet")
    for at, row in enumerate(json.loads(raw.to_json(orient="records"))):
        live = new_items.attributes(parse_item({**row, "genres": "|".join(reversed(row["genres"]))}, features.schema))
        assert live.lists.tolist() == tables.lists.ids[at + FIRST_ID].tolist()
    of = lambda genres: new_items.attributes({"genres": genres}).lists[0, :3].tolist()  # noqa: E731
    first = features.list_values()["genres"]
    assert of(["unheard"]) == [OOV_ID, 0, 0] and of([]) == [NULL_ID, 0, 0]
    assert of(["unheard", first[1], first[0]]) == [FIRST_ID, FIRST_ID + 1, 0] and MAX_VALUES >= 3
    (like_n,) = new_items([parse_item({"item_id": "x", "genres": ["War", "Drama"]}, features.schema)])
    assert like_n is not None and features.items()["item_id"][like_n.nearest - FIRST_ID] == "A"


# -- a planted effect ------------------------------------------------------------------------------------
TAGS, FILMS, LIKED = 12, 400, 5  # tags; items, a quarter of them in no training event; events of a history


def _found(with_lists: bool) -> float:
    """Share of requests whose next item, one that no model has seen, is among the ten best of those. Every user likes a
    tag, and every item has three: nothing but the lists says which item has which."""
    rng, items = np.random.default_rng(0), FILMS + FIRST_ID
    tags = np.array([rng.choice(TAGS, 3, replace=False) + FIRST_ID for _ in range(FILMS)])
    seen = np.arange(FILMS) % 4 > 0
    rows = padded([[]] * FIRST_ID + tags.tolist())[:, None]
    lists = ItemLists(torch.from_numpy(rows), (FIRST_ID + TAGS,)) if with_lists else None
    none = torch.zeros(items, 0)
    torch.manual_seed(0)
    attributes = ItemAttributes(none.long(), (), none, none.long(), 1, none, lists)
    model = RetrievalModel(replace(ENCODER, dropout=0.0), items, torch.zeros(items), attributes)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    of_tag = [np.flatnonzero((tags == tag + FIRST_ID).any(1)) for tag in range(TAGS)]

    def batch(size: int, target_seen: bool) -> torch.Tensor:
        likes = rng.integers(0, TAGS, size)
        known = [of[seen[of]] for of in of_tag]
        asked = known if target_seen else [of[~seen[of]] for of in of_tag]
        rows = [np.append(rng.choice(known[t], LIKED), rng.choice(asked[t])) for t in likes]
        return torch.from_numpy(np.stack(rows)) + FIRST_ID

    for _ in range(250):
        events = batch(64, True)
        scores = model.encode(events[:, :-1])[:, -1] @ model.table()[FIRST_ID:][torch.from_numpy(seen)].T
        place = torch.from_numpy(np.cumsum(seen) - 1)[events[:, -1] - FIRST_ID]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, place).backward()
        optimizer.step()
    with torch.no_grad():
        events = batch(500, False)
        table = model.eval().table()
        scores = model.encode(events[:, :-1])[:, -1] @ table.T
        target = scores.gather(1, events[:, -1:])
        unseen = torch.from_numpy(np.flatnonzero(~seen) + FIRST_ID)
        return float(((scores[:, unseen] > target).sum(1) < 10).float().mean())


def test_what_only_the_lists_tell_is_learned():
    with_lists, without = _found(True), _found(False)
    assert without < 0.2 and with_lists > 0.3, (with_lists, without)  # by chance .1; of the tag's 25 or so, .4
