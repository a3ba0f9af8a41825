"""Business rules: what a file may say, and what becomes of rankings; caps hold whatever comes."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from serving.rules_keeper import RulesKeeper
from serving.runtime import ruled
from serving.runtime.explore import COUNTS_FILE
from serving.runtime.response import ResponseStage
from serving.runtime.rules import RulesError, parse_rules
from serving.wheel import ServerError
from vivace.columns import TaskHead
from vivace.contract import FIRST_ID, DataSchema

SCHEMA = DataSchema(
    "shop", "made up", heads=(TaskHead("click", float("-inf")),), item_categoricals=("brand",),
    item_continuous=("price",), item_lists=("tags",),
)  # fmt: skip
BRANDS = ["Alto", "Alto", "Alto", "Brio", "Brio", None, "Coda", "Alto"]
PRICES = [5.0, 10.0, 20.0, 5.0, None, 7.0, 9.0, 11.0]
TAGS = [["wool"], [], ["wool", "red"], ["red"], None, [], ["blue"], ["red"]]
COUNTS = [9, 9, 9, 9, 9, 9, 2, 9]  # item g is new
NAMES = list("abcdefgh")
IDS = {name: FIRST_ID + i for i, name in enumerate(NAMES)}


class Live:
    """A live catalogue as the response sees it."""

    def __init__(self) -> None:
        self.number, self.rows, self.ids, self.gone = 0, {}, {}, np.zeros(0, np.int64)

    def refresh(self) -> None: ...

    def name(self, id_: int) -> bytes:
        return next(item.encode() for item, i in self.ids.items() if i == id_)

    def put(self, item: str, row: dict | None, slot: int = 0) -> None:
        self.rows[item], self.number = row, self.number + 1
        self.ids[item] = IDS.get(item, FIRST_ID + len(NAMES) + slot)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """(rules over eight items, whose file ``write`` writes; their live catalogue)."""
    monkeypatch.setattr(ruled, "LOOK_S", 0.0)
    brand, price = pa.array(BRANDS, pa.string()), pa.array(PRICES, pa.float32())
    pq.write_table(
        pa.table({"brand": brand, "price": price, "tags": pa.array(TAGS, pa.list_(pa.string()))}),
        tmp_path / ruled.ATTRIBUTES,
    )
    (tmp_path / ruled.SCHEMA).write_text(json.dumps(SCHEMA.to_json()))
    np.save(tmp_path / COUNTS_FILE, np.array([0] * FIRST_ID + COUNTS, np.uint8))
    live = Live()
    respond = ResponseStage(np.array([b""] * FIRST_ID + [n.encode() for n in NAMES], object), live)
    return ruled.Rules(tmp_path / "rules.toml", tmp_path, respond), live


def write(rules: ruled.Rules, *tables: str) -> None:
    text = "".join(f"[[rule]]\nname = 'r{i}'\n{table}\n" for i, table in enumerate(tables))
    rules._path.write_text(text)
    os.utime(rules._path, ns=(1, write.__dict__.setdefault("n", 0)))
    write.n += 1


def ranked(rules: ruled.Rules, order: str, top_k: int = 8, queried: bool = False) -> tuple[str, str]:
    """(what is shown, STATUS) of candidates in an order, scores falling."""
    ids = np.array([[rules._respond.catalogue.ids.get(n) or IDS[n] for n in order]], np.int64)
    scores = np.linspace(1, 0.1, len(order), dtype=np.float32)
    values = np.stack([scores, scores / 2])[None]
    before = ids.copy(), values.copy()
    out, of_out, status = rules(ids, values, np.array([top_k]), [queried], np.array([b"ok"], object))
    assert (ids == before[0]).all() and (values == before[1]).all()
    shown = rules._respond(out, of_out, np.array([top_k]), status)
    return "".join(item.decode() for item in shown[0][0]), status[0].decode()


def test_without_a_file_nothing_changes(shop):
    assert ranked(shop[0], "abcdefgh", 3) == ("abc", "ok")


@pytest.mark.parametrize(
    ("tables", "shown", "status"),
    [
        (["do = 'block'\nwhere = {brand = ['Alto']}"], "defg", "ok; rules: r0"),
        (["do = 'block'\nitems = ['h']"], "abcd", "ok"),  # it was not among the first four
        (["do = 'block'\nwhere = {price = {max = 7}}"], "bceg", "ok; rules: r0"),  # e has no price: like nothing
        (["do = 'block'\nwhere = {tags = ['red', 'blue']}"], "abef", "ok; rules: r0"),
        (["do = 'block'\nwhere = {tags = ['red'], brand = ['Alto']}"], "abde", "ok; rules: r0"),  # all of them
        (["do = 'bury'\nwhere = {brand = ['Alto']}"], "defg", "ok; rules: r0"),
        (["do = 'boost'\nplaces = 2\nwhere = {brand = ['Coda']}"], "abcd", "ok"),  # g comes to place 5
        (["do = 'boost'\nplaces = 4\nwhere = {brand = ['Coda']}"], "abgc", "ok; rules: r0"),
        (["do = 'pin'\nitems = ['f', 'a']\nplace = 2"], "bfac", "ok; rules: r0"),
        (["do = 'pin'\nitems = ['nowhere']"], "abcd", "ok"),
        (["do = 'cap'\nby = 'brand'\nmost = 1"], "adfg", "ok; rules: r0"),  # f has no brand: none is full
        (["do = 'cap'\nby = 'tags'\nmost = 1"], "abde", "ok; rules: r0"),
        (["do = 'cap'\nby = 'brand'\nmost = 1", "do = 'pin'\nitems = ['c']\nplace = 3"], "dfcg", "ok; rules: r0, r1"),
        (["do = 'block'\nitems = ['c']", "do = 'pin'\nitems = ['c']"], "abde", "ok; rules: r0"),
        (["do = 'new'\nshare = 0.25"], "abcg", "ok; rules: r0"),
    ],
)
def test_golden_answers(shop, tables, shown, status):
    write(shop[0], *tables)
    assert ranked(shop[0], "abcdefgh", 4) == (shown, status)


def test_what_is_buried_is_known_so_that_it_is_not_explored(shop):
    rules, _ = shop
    assert not rules.buries(np.array([[IDS["a"], 0]])).any()  # no rules yet
    write(rules, "do = 'bury'\nwhere = {brand = ['Alto']}", "do = 'block'\nitems = ['d']")
    ranked(rules, "a", 1)
    alto = [name for name, brand in zip(NAMES, BRANDS, strict=True) if brand == "Alto"]
    assert [n for n in NAMES if rules.buries(np.array([IDS[n]]))[0]] == alto


def test_a_pinned_item_that_no_model_proposed_takes_the_score_of_its_place(shop):
    rules, live = shop
    write(rules, "do = 'pin'\nitems = ['h']\nplace = 2")
    values = np.array([[[0.9, 0.8, 0.7], [0.3, 0.2, 0.1]]], np.float32)
    ids = np.array([[IDS["a"], IDS["b"], IDS["c"]]])
    out, of_out, status = rules(ids, values, np.array([3]), [False], np.array([b"ok"], object))
    assert out.tolist() == [[IDS["a"], IDS["h"], IDS["b"]]] and status.tolist() == [b"ok; rules: r0"]
    np.testing.assert_allclose(of_out[0], [[0.9, 0.8, 0.8], [0.3, 0, 0.2]], rtol=1e-6)
    live.put("h", None)  # taken out or sold out
    assert ranked(rules, "abc", 3)[0] == "abc"


def test_what_was_put_in_live_counts(shop):
    rules, live = shop
    write(rules, "do = 'block'\nwhere = {price = {max = 7}}", "do = 'cap'\nby = 'brand'\nmost = 2")
    assert ranked(rules, "abcdefgh")[0] == "bcegh"[:2] + "eg"
    live.put("a", {"brand": "Dolce", "price": 30.0, "tags": []})  # it cost 5
    live.put("x", {"brand": "Alto", "price": 30.0, "tags": ["red"]}, 1)
    live.put("y", {"brand": "Alto", "price": 3.0, "tags": []}, 2)
    assert ranked(rules, "yaxbcdefgh")[0] == "axbeg"
    live.put("a", {"brand": "Dolce", "price": 1.0, "tags": []})
    assert ranked(rules, "yaxbcdefgh")[0] == "xbeg"


def test_bounds_are_included_as_float32_holds_them(shop):
    rules, live = shop
    live.put("a", {"brand": "Alto", "price": float(np.float32(16.05)), "tags": []})
    write(rules, "do = 'block'\nwhere = {price = {min = 16.05, max = 16.05}}")
    assert ranked(rules, "ab")[0] == "b"


def test_a_server_keeps_the_rules_that_it_accepted(shop, tmp_path):
    """Also for workers that start after the file broke, and against a version that could not follow them."""
    rules, _ = shop
    (release := tmp_path / "model_repository.1").mkdir()
    (release / "response").mkdir()
    (release / "response" / "1").symlink_to(tmp_path)
    told: list[str] = []
    write(rules, "do = 'block'\nitems = ['a']")
    with RulesKeeper(rules._path, tmp_path / "accepted.toml", lambda: [release], told.append) as keeper:
        good = keeper.accepted.read_text()
        for broken in (b"[[rule]\n", b"[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {colour = ['red']}\n", b"\xe9"):
            rules._path.write_bytes(broken)
            keeper.look()
            assert keeper.accepted.read_text() == good and "rules.toml: " in keeper.fault
        rules._path.write_text(good)
        keeper.look()
        assert not keeper.fault, "what it has accepted is there again"
        rules._path.write_bytes(b"\xe9")
        keeper.look()
        assert len(told) == 4 and all(text.endswith("the rules before it stay") for text in told)
        with pytest.raises(ServerError, match="expected UTF-8"):
            RulesKeeper(rules._path, tmp_path / "other.toml", lambda: [release], told.append).__enter__()
        (old := tmp_path / "model_repository.0").mkdir()
        with pytest.raises(ServerError, match="before there were rules"):
            keeper.check(old)
        rules._path.write_bytes(
            b"\xef\xbb\xbf[[rule]]\nname = 'x'\ndo = 'bury'\nitems = ['b']\n"
        )  # as Notepad saves it
        keeper.look()
        assert not keeper.fault and "bury" in keeper.accepted.read_text()
        rules._path.unlink()
        keeper.look()
        assert not keeper.accepted.exists()


def test_rules_are_for_recommendations_or_searches(shop):
    write(shop[0], "do = 'block'\nitems = ['a']\nfor = 'searches'", "do = 'pin'\nitems = ['h']")
    assert ranked(shop[0], "abcd", 3) == ("hab", "ok; rules: r1")
    assert ranked(shop[0], "abcd", 3, queried=True) == ("bcd", "ok; rules: r0")


def test_a_file_is_followed_and_one_that_cannot_be_read_changes_nothing(shop):
    rules, _ = shop
    write(rules, "do = 'block'\nitems = ['a']")
    assert ranked(rules, "abc", 2)[0] == "bc"
    write(rules, "do = 'nonsense'")
    assert ranked(rules, "abc", 2)[0] == "bc" and "do: expected one of block" in rules.error
    rules._path.unlink()
    assert ranked(rules, "abc", 2) == ("ab", "ok") and not rules.error


def test_an_answer_that_is_an_error_stays(shop):
    rules, _ = shop
    write(rules, "do = 'pin'\nitems = ['h']")
    ids, values = np.zeros((1, 3), np.int64), np.zeros((1, 2, 3), np.float32)
    out, _, status = rules(ids, values, np.array([3]), [False], np.array([b"error: no"], object))
    assert not out.any() and status.tolist() == [b"error: no"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_caps_are_never_broken_and_places_are_filled(shop_of_module, data):
    rules = shop_of_module
    most, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    order = "".join(data.draw(st.permutations(NAMES))[: data.draw(st.integers(1, 8))])
    pins = data.draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    place, share = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    tables = [f"do = 'cap'\nby = 'brand'\nmost = {most}"]
    tables += [f"do = 'pin'\nitems = {pins}\nplace = {place}"] if pins else []
    tables += [f"do = 'new'\nshare = {share}"] if share else []
    write(rules, *tables)
    shown, _ = ranked(rules, order, top_k)
    brands = [BRANDS[NAMES.index(item)] for item in shown]
    assert len(set(shown)) == len(shown) <= top_k
    assert all(brands.count(brand) <= most for brand in set(brands) - {None})
    left = [n for n in order if n not in shown]
    if len(shown) < min(top_k, len(order)):  # then nothing that is left would fit
        assert all((b := BRANDS[NAMES.index(n)]) is not None and brands.count(b) == most for n in left)
    without = [n for n in shown if n not in pins and n != "g"]
    assert without == sorted(without, key=order.index), "what no rule moves stays in its order"


@pytest.fixture(scope="module")
def shop_of_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield shop.__wrapped__(tmp_path_factory.mktemp("rules"), patch)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]]", "rule 1: name: expected"),
        ("[rule]\nname = 'x'", "two brackets"),
        ("rules = 3", "expected [[rule]] tables alone"),
        ("[[rule]]\nname = 'x'", "rule 'x': do: expected one of block"),
        ("[[rule]]\nname = 'x'\ndo = 'block'", "where or items"),
        ("[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {colour = ['red']}", "brand, tags, price, got 'colour'"),
        ("[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {brand = 'Alto'}", "where.brand: expected a list of texts"),
        ("[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {price = {over = 3}}", "{min = …, max = …}"),
        ("[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {price = {min = 3, max = 2}}", "min up to max"),
        ("[[rule]]\nname = 'x'\ndo = 'boost'\nitems = ['a']", "places: expected with do = 'boost'"),
        ("[[rule]]\nname = 'x'\ndo = 'boost'\nplaces = 0\nitems = ['a']", "1 to 100, got 0"),
        ("[[rule]]\nname = 'x'\ndo = 'cap'\nby = 'price'\nmost = 1", "by: expected one of brand, tags"),
        ("[[rule]]\nname = 'x'\ndo = 'new'\nshare = 20", "share: expected a number over 0"),
        ("[[rule]]\nname = 'x'\ndo = 'bury'\nitems = ['a']\nmost = 3", "most: expected where, items"),
        ("[[rule]]\nname = 'x'\ndo = 'bury'\nitems = ['a']\n" * 2, "got it twice"),
        ("[[rule]\n", "expected TOML"),
        ("a = " + "[" * 5000, "expected TOML"),
        ("a = " + "9" * 5000, "expected TOML"),
        (
            "[[rule]]\nname = 'x'\ndo = 'block'\nwhere = {price = {max = " + "9" * 400 + "}}",
            "where.price.max: expected",
        ),
        ("[[rule]]\nname = 'x'\ndo = 'pin'\nitems = " + str([str(i) for i in range(101)]), "at most 100 to pin"),
        ("".join(f"[[rule]]\nname = '{i}'\ndo = 'cap'\nby = 'brand'\nmost = 1\n" for i in range(21)), "at most 20"),
    ],
)
def test_faults_name_the_rule_and_its_field(text, words):
    with pytest.raises(RulesError) as error:
        parse_rules(text, SCHEMA)
    assert words in str(error.value)
