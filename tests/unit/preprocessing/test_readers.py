"""Readers: bad rows are counted by reason and kept in the rejects file; good rows come out typed and in order."""

from __future__ import annotations

import csv
import datetime
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from preprocessing.cleaning import clean_items
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.readers.base import Chunk
from preprocessing.readers.shop import Shop, ShopConfig
from preprocessing.rejects import Rejects
from preprocessing.splits import SplitConfig
from vivace import contract

MAPPING = """
name = "corner-shop"
[interactions]
files = "events.{kind}"
user = "visitor"
item = "sku"
time = "at"
time_unit = "iso"
event_type = "did"
context = ["device"]
[interactions.weights]
view = 1
buy = 3
[items]
files = "items.csv"
item = "sku"
title = ["brand", "name"]
categorical = ["category"]
continuous = ["price"]
[heads]
click = 0
buy = 3
"""
ITEMS = (
    "sku,brand,name,category,price\nA,Opus,café cup,cups,9.5\nB,Opus,pan,pans,\nC,,plate,,x\n"
    "A,again,again,cups,1\n,no,id,cups,1\n"
)
GOOD = [
    ("u1", "A", "2026-01-01T00:00:00", "view", "phone"),
    ("u1", "B", "2026-01-01T00:00:01", "buy", "phone"),
    ("u1", "C", "2026-01-01T00:00:02", "view", ""),
    ("ü2", "B", "2026-01-01T00:00:03", "view", "desktop"),
    ("ü2", "A", "2026-01-02T00:00:03", "buy", "desktop"),
    ("ü2", "C", "2026-01-03T00:00:03", "view", "desktop"),
]
BAD = [
    ("", "A", "2026-01-01T00:00:00", "view", "phone"),  # missing user id
    ("u1", "", "2026-01-01T00:00:00", "view", "phone"),  # missing item id
    ("u1", "A", "yesterday", "view", "phone"),  # unparsable time
    ("u1", "Z", "2026-01-01T00:00:00", "view", "phone"),  # unknown item
    ("u1", "A", "2026-01-01T00:00:00", "view", "phone"),  # duplicate
    ("u" * 2000, "A", "2026-01-01T00:00:00", "view", "phone"),  # id too long
]
REASONS = {
    "interactions: missing user id": 1,
    "interactions: missing item id": 1,
    "interactions: unparsable time": 1,
    "interactions: unknown item": 1,
    "interactions: duplicate": 1,
    "interactions: id longer than 1024 bytes": 1,
    "items: duplicate": 1,
    "items: missing item id": 1,
}


def _tables(folder: Path, kind: str) -> Path:
    columns = ["visitor", "sku", "at", "did", "device"]
    frame = pd.DataFrame(GOOD + BAD, columns=columns)
    if kind == "csv":
        text = frame.to_csv(index=False)
        (folder / "events.csv").write_text(text + "one,field,too,many,for,this,row\n")
    else:
        frame.replace("", None).to_parquet(folder / "events.parquet")
    (folder / "items.csv").write_text(ITEMS)
    mapping = folder / "mapping.toml"
    mapping.write_text(MAPPING.format(kind=kind))
    return mapping


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_report_every_bad_row_by_reason(tmp_path, kind):
    source = open_source("tables", _tables(tmp_path, kind))
    root = tmp_path / "artifacts"
    results = prepare(source, PrepareConfig(partitions=2), root, 0, lambda _: None)["results"]
    expected = dict(REASONS)
    if kind == "csv":
        expected["interactions: malformed row"] = 1
    assert results["rejected"] == expected
    assert results["events"] == len(GOOD)
    with (root / "features" / "rejects.csv").open() as stream:
        rejected = list(csv.DictReader(stream))
    assert len(rejected) == sum(expected.values())
    assert any("Z" in r["record"] and r["reason"] == "unknown item" for r in rejected)
    # the rows that were left are whole: sequences in time order, labels from the weights
    train = pd.concat(pd.read_parquet(f) for f in Features(root / "features").files("train")).set_index(contract.USER)
    items = Features(root / "features").items()
    names = dict(zip(items.index + contract.FIRST_ID, items[contract.ITEM], strict=True))
    assert [names[i] for i in train.loc["u1", contract.ITEM]] == ["A"]
    assert [names[i] for i in train.loc["ü2", contract.ITEM]] == ["B"]
    assert items.set_index(contract.ITEM)[contract.TITLE]["A"] == "Opus café cup"


SEARCHES = """
[searches]
files = "searches.csv"
search = "list"
user = "visitor"
time = "at"
time_unit = "iso"
query = "q"
item = "sku"
position = "rank"
clicked = "click"
"""
SEARCHED = """list,visitor,at,q,sku,rank,click
2,ü2,2026-01-02T00:00:00,Café cups,B,1,0
2,ü2,2026-01-02T00:00:09,Café cups,A,2,true
1,,2026-01-01T00:00:00,pan,B,1,1
,u1,2026-01-01T00:00:00,pan,A,1,0
1,u1,2026-01-01T00:00:00,,A,1,0
1,u1,2026-01-01T00:00:00,pan,Z,2,0
1,u1,2026-01-01T00:00:00,pan,A,0,0
1,u1,2026-01-01T00:00:00,pan,A,1,maybe
1,u1,never,pan,A,1,0
1,u1,2026-01-01T00:00:00,pan,B,3,0
"""


def test_a_log_of_searches_is_read_and_its_bad_rows_reported(tmp_path):
    mapping = _tables(tmp_path, "csv")
    assert open_source("tables", mapping).searches() is None
    mapping.write_text(mapping.read_text().replace("[heads]", SEARCHES + "[heads]"))
    (tmp_path / "searches.csv").write_text(SEARCHED)
    source, root = open_source("tables", mapping), tmp_path / "artifacts"
    results = prepare(source, PrepareConfig(partitions=2), root, 0, lambda _: None)["results"]
    rejected = {k.removeprefix("searches: "): n for k, n in results["rejected"].items() if k.startswith("searches")}
    assert results["searches"] == 2 and rejected == {
        "missing search id": 1, "missing query": 1, "unknown item": 1, "position not in 1..1000": 1,
        "clicked neither 0 nor 1": 1, "unparsable time": 1, "duplicate": 1,
    }  # fmt: skip
    found, items = Features(root / "features").searches(), Features(root / "features").items()
    names = items[contract.ITEM].to_numpy()[found[contract.ITEM] - contract.FIRST_ID]
    columns = (
        found[contract.SEARCH],
        found[contract.USER],
        found[contract.QUERY_TEXT],
        names,
        found[contract.POSITION],
        found[contract.CLICKED],
    )
    assert list(zip(*columns, strict=True)) == [
        ("1", "", "pan", "B", 1, True), ("2", "ü2", "Café cups", "B", 1, False), ("2", "ü2", "Café cups", "A", 2, True),
    ]  # fmt: skip
    assert found[contract.TIME].nunique() == 2  # a list has one time
    (tmp_path / "searches.csv").write_text(SEARCHED.replace("click", "tapped"))
    with pytest.raises(ValueError, match="click"):
        list(open_source("tables", mapping).searches())
    mapping.write_text(mapping.read_text().replace('query = "q"', ""))
    with pytest.raises(ValueError, match=r"\[searches\] expected the key 'query'"):
        open_source("tables", mapping)


def test_a_mapping_with_a_typing_error_is_named(tmp_path):
    mapping = _tables(tmp_path, "csv")
    mapping.write_text(mapping.read_text().replace("visitor", "vistor"))
    with pytest.raises(ValueError, match="vistor"):
        list(open_source("tables", mapping).interactions())
    mapping.write_text(mapping.read_text() + "\n[item]\n")
    with pytest.raises(ValueError, match=r"unknown keys \['item'\]"):
        open_source("tables", mapping)


def _movielens(folder: Path) -> Path:
    (folder / "ratings.dat").write_text(
        "1::10::5::978300760\n1::20::3::978300760\n1::10::4\n1::30::4::978300800\n2::99::4::1\n"
    )
    (folder / "movies.dat").write_bytes(
        "10::Amélie (2001)::Comedy|Romance\n20::Heat (1995)::Crime\n30::Up (2009)::Animation\n".encode("latin-1")
    )
    extra = "10::Amélie::2001::R::x::Comedy::Jean-Pierre Jeunet::W (story)::Audrey Tautou, Rufus::A shy waitress\n"
    (folder / "movies_extrainfos.dat").write_bytes(extra.encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::25::3::1\n")
    return folder


def test_movielens_layout(tmp_path):
    source = open_source("ml-1m", _movielens(tmp_path))
    items = source.items().set_index(contract.ITEM)
    assert items.loc["10", contract.TITLE] == "Amélie (2001)" and items.loc["10", "year"] == 2001
    assert (
        items.loc["10", contract.TEXT]
        == "Amélie (2001) Comedy|Romance Jean_Pierre_Jeunet Audrey_Tautou Rufus A shy waitress"
    )
    assert items.loc["20", contract.TEXT] == "Heat (1995) Crime "
    (chunk,) = source.interactions()
    assert chunk.rows[contract.ITEM].tolist() == ["10", "20", "30", "99"]
    assert chunk.rows[contract.TIME].tolist()[0] == 978300760000.0
    lists = open_source("ml-1m-genres", tmp_path)
    rejects = Rejects(tmp_path / "rejects.csv")
    catalogue = clean_items([Chunk(lists.items())], lists.schema, rejects).set_index(contract.ITEM)
    assert list(catalogue.loc["10", "genres"]) == ["Comedy", "Romance"]
    assert catalogue.loc["10", "main_genre"] == "Comedy" and catalogue.loc["10", "year"] == 2001
    (users,) = source.users()
    assert users.rows[[contract.USER, "gender", "age"]].to_numpy().tolist() == [["1", "F", "1"], ["2", "M", "25"]]
    assert chunk.malformed["line"].tolist() == ["1::10::4"]
    with pytest.raises(FileNotFoundError, match=r"users\.dat"):
        (tmp_path / "users.dat").unlink()
        open_source("ml-1m", tmp_path)


def test_s3rec_layout(tmp_path):
    (tmp_path / "Beauty.txt").write_text("1 5 7\n2 7\n")
    (tmp_path / "Beauty_item2attributes.json").write_text('{"5": [3, 9], "8": [3]}')
    (tmp_path / "Beauty_id_asin_keywords.tsv").write_text("5\tB00X\tred polish\n", encoding="utf-8")
    source = open_source("beauty", tmp_path)
    items = source.items().set_index(contract.ITEM)
    assert items.index.tolist() == ["5", "7", "8"]
    assert items.loc["5", contract.TITLE] == "red polish" and items.loc["5", contract.TEXT] == "red polish a3 a9"
    (chunk,) = source.interactions()
    assert chunk.rows[[contract.USER, contract.ITEM, contract.TIME]].to_numpy().tolist() == [
        ["1", "5", 0.0],
        ["1", "7", 1.0],
        ["2", "7", 0.0],
    ]


def test_retailrocket_layout(tmp_path):
    (tmp_path / "train_events.csv").write_text(
        "user,item,behavior,timestamp\n0,3,view,1433221969\n0,3,buy,1433221999\n"
    )
    (tmp_path / "kg.txt").write_text("3 0 6\n3 1 7\n6 0 3\n")
    source = open_source("retailrocket", tmp_path)
    (chunk,) = source.interactions()
    assert (
        chunk.rows[contract.WEIGHT].tolist() == [1.0, 3.0] and chunk.rows[contract.TIME].tolist()[0] == 1433221969000.0
    )
    assert source.items().set_index(contract.ITEM)[contract.TEXT].to_dict() == {"3": "r0t6 r1t7", "6": "r0t3"}


def test_globo_layout_and_dwell_time(tmp_path):
    (tmp_path / "clicks").mkdir()
    header = (
        "user_id,session_id,session_start,session_size,click_article_id,click_timestamp,"
        "click_environment,click_deviceGroup,click_os,click_country,click_region,click_referrer_type\n"
    )
    (tmp_path / "clicks" / "clicks_hour_000.csv").write_text(
        header + "0,7,1,2,11,1506826800026,4,1,17,1,14,2\n0,7,1,2,12,1506826890026,4,1,17,1,14,2\n"
    )
    (tmp_path / "articles_metadata.csv").write_text(
        "article_id,category_id,created_at_ts,publisher_id,words_count\n11,1,1453205323000,0,224\n"
    )
    source = open_source("globo", tmp_path)
    (chunk,) = source.interactions()
    assert chunk.rows[contract.WEIGHT].tolist()[0] == pytest.approx(90.0)  # seconds to the session's next click
    assert np.isnan(chunk.rows[contract.WEIGHT].tolist()[1])
    assert source.items()[contract.ITEM].tolist() == ["11"]


def test_shop_is_seeded():
    small = ShopConfig(users=50, items=60, events=800, seed=1)
    one, two = (pd.concat(x.rows for x in Shop(small).interactions()) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    other = pd.concat(x.rows for x in Shop(ShopConfig(users=50, items=60, events=800, seed=2)).interactions())
    assert one[contract.ITEM].tolist() != other[contract.ITEM].tolist()


def test_split_by_time_keeps_the_future_out(tmp_path):
    config = PrepareConfig(SplitConfig("time", 0.1, 0.1), partitions=2)
    source = Shop(ShopConfig(users=200, items=80, events=4000, seed=5))
    prepare(source, config, tmp_path, 0, lambda _: None)
    log = pd.concat(x.rows for x in source.interactions())
    cut = int(np.quantile(log[contract.TIME], 0.8))
    past = set(log[log[contract.TIME] < cut][contract.ITEM])
    items = Features(tmp_path / "features").items()[contract.ITEM].tolist()
    assert set(items[: len(past)]) == past  # fitted on what came before the cut; the rest of the catalogue follows
    assert len(items) == 80
    rows = pd.concat(pd.read_parquet(f) for f in Features(tmp_path / "features").files("train"))
    assert sum(len(x) for x in rows[contract.ITEM]) == (log[contract.TIME] < cut).sum()


@pytest.mark.skipif("VIVACE_DATA" not in os.environ, reason="VIVACE_DATA does not point to the real data sets")
def test_real_movielens_benchmark_file():
    source = open_source("ml-1m-benchmark", Path(os.environ["VIVACE_DATA"]) / "ml-1m")
    rows = pd.concat(x.rows for x in source.interactions())
    assert (len(rows), rows[contract.USER].nunique(), rows[contract.ITEM].nunique()) == (999_611, 6_040, 3_416)
    assert rows[contract.WEIGHT].notna().all()


def test_hm_layout(tmp_path):
    """Purchases lack the leading zero of the catalogue's ids; what is not known of an article is empty."""
    names = ["product_type_name", "colour_group_name", "graphical_appearance_name", "department_name", "section_name"]
    row = {"article_id": "0108775015", "prod_name": "Strap top", "detail_desc": "Jersey top"}
    row |= {"garment_group_name": "Unknown"}
    pd.DataFrame([{**row, **dict.fromkeys(names, "Solid")}]).to_parquet(tmp_path / "articles.parquet")
    bought = [{"t_dat": datetime.date(2020, 9, 16), "customer_id": "a", "article_id": "108775015"}]
    pd.DataFrame(bought).to_parquet(tmp_path / "valid_split.parquet")
    source = open_source("hm", tmp_path)
    (item,) = source.items().to_dict("records")
    (event,) = next(iter(source.interactions())).rows.to_dict("records")
    assert (
        item[contract.ITEM] == event[contract.ITEM] == "0108775015"
        and item["garment"] == ""
        and item["section"] == "Solid"
    )
    assert item[contract.TEXT] == "Strap top. Solid Solid Solid Solid. Jersey top"
    assert event[contract.TIME] == 1_600_214_400_000.0
