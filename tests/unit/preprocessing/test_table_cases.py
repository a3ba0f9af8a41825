"""Tables as people have them: each row of these lists is one kind of table and what is right for it."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import uuid

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from tests.unit.preprocessing.tables import CATALOGUE, HEAD, ITEMS, read, taken, write
from vivace.contract import EVENT, ITEM, SOURCE_ROW, TIME, TITLE, USER, WEIGHT

T0 = 1_700_000_000
ROWS = [("u0", "A"), ("u0", "B"), ("u0", "C"), ("u1", "B"), ("u1", "C"), ("u1", "D")]
EVENTS = "user,item,ts\n" + "".join(f"{u},{i},{T0 + n}\n" for n, (u, i) in enumerate(ROWS))


def _ids(users: pa.Array, items: pa.Array | None = None, **more: pa.Array) -> pa.Table:
    count = len(users)
    items = pa.array(["A"] * count) if items is None else items
    return pa.table({"user": users, "item": items, "ts": pa.array(range(T0, T0 + count)), **more})


# -- text is text ----------------------------------------------------------------------------------------
def test_words_for_nothing_are_text_in_csv(tmp_path):
    events = (
        "user,item,ts,country\nnull,A,1700000000,NA\nNA,NA,1700000001,DE\nnan,NULL,1700000002,\nu1,n/a,1700000003,DE\n"
    )
    items = "item,title,cat,price\nA,NA,NA,1.5\nNA,N/A Club,NA,2\nNULL,null,,3\nn/a,nan,nan,4\n"
    out = read(tmp_path, events, items, 'context = ["country"]')
    assert out.column(USER) == ["null", "NA", "nan", "u1"] and out.column("country") == ["NA", "DE", None, "DE"]
    assert out.items[TITLE].tolist() == ["NA", "N/A Club", "null", "nan"]
    assert out.items["cat"].tolist() == ["NA", "NA", None, "nan"] and not out.rejected()


def test_words_that_mean_missing_are_a_key(tmp_path):
    out = read(
        tmp_path, "user,item,ts,dev\nNA,A,1,x\nu,A,2,-\nu, NA ,3,x\n", keys='missing = ["NA", "-"]\ncontext = ["dev"]'
    )
    assert out.column("dev") == [None] and out.rejected() == {
        "interactions: missing user id": 1, "interactions: missing item id": 1,
    }  # fmt: skip


@pytest.mark.parametrize("ids", [["1", "01", "1.0", "1e0"], ["True", "true", "é", "0x1"], ["a b", 'a"b', "a'b", "-"]])
def test_ids_stay_as_they_are_spelled(tmp_path, ids):
    out = read(tmp_path, "user,item,ts\n" + "".join(f"{i},{i},{n}\n" for n, i in enumerate(ids)), keys='quote = ""')
    assert out.column(USER) == out.column(ITEM) == ids


def test_bytes_that_are_not_utf8_are_rejected_with_their_row_or_read_by_their_encoding(tmp_path):
    items = "item,title,cat,price\nA,Café,Möbel,1\nB,B,x,2\n".encode("latin-1")
    out = read(tmp_path, "user,item,ts\nu,A,1\nu,B,2\n", items)
    assert out.rejected() == {"interactions: unknown item": 1, "items: bytes that are not text of the encoding": 1}
    (row,) = [r for r in out.records() if r["table"] == "items"]
    assert row["row"] == 2 and row["file"] == "i.csv" and "Caf\\\\xe9" in row["record"]
    out = read(tmp_path, "user,item,ts\nu,A,1\nu,B,2\n", items, top='encoding = "latin-1"')
    assert out.items[TITLE].tolist() == ["Café", "B"] and out.items["cat"][0] == "Möbel" and not out.rejected()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marked_encodings_need_no_key(tmp_path, encoding):
    assert read(tmp_path, "user,item,ts\nü,A,1\n".encode(encoding)).column(USER) == ["ü"]


# -- rows ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("line", "detail"), [
    ('u2,C,1700000002,"tv', "it is never closed"),
    ('u2,C,1700000002,"tv" x', "expected after"),
])  # fmt: skip
def test_a_stray_quote_costs_its_own_line(tmp_path, line, detail):
    rows = [f"u{n % 3},A,{T0 + n},tv" for n in range(12)]
    rows[2] = line
    out = read(tmp_path, "user,item,ts,q\n" + "\n".join(rows), keys='context = ["q"]')
    assert len(out.events) == 11 and out.rejected() == {"interactions: quote without its end": 1}
    (row,) = out.records()
    assert row["row"] == 4 and json.loads(row["record"])["line"] == line and detail in row["record"]


def test_a_quote_that_closes_over_other_rows_does_not_swallow_them(tmp_path):
    rows = [f"u{n % 3},A,{T0 + n},tv" for n in range(12)]
    rows[2], rows[7] = f'u2,A,{T0 + 2},"tv', f'u1,A,{T0 + 7},tv"'
    out = read(tmp_path, "user,item,ts,q\n" + "\n".join(rows), keys='context = ["q"]')
    assert len(out.events) == 11 and out.records()[0]["row"] == 4 and out.column("q")[6] == 'tv"'


def test_quoted_values_may_hold_delimiters_quotes_and_lines(tmp_path):
    items = 'item,title,cat,price\nA,"a ""red"", big\r\nchair",x,1\nB,plain,"x\ny",2\n\nC,"",x,3\n'
    out = read(tmp_path, "user,item,ts\nu,A,1\nu,B,2\nu,C,3\n", items)
    assert out.items[TITLE].tolist() == ['a "red", big\r\nchair', "plain", ""] and out.items["cat"][1] == "x\ny"
    assert not out.rejected()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_other_lengths_are_named_by_line(tmp_path, end):
    out = read(tmp_path, end.join(["user,item,ts", "u,A,1", "u,B,2,x", "u", "", "v,C,3"]))
    assert out.column(USER) == ["u", "v"] and out.rejected() == {"interactions: malformed row": 2}
    assert [(r["row"], json.loads(r["record"])["line"]) for r in out.records()] == [(3, "u,B,2,x"), (4, "u")]


@pytest.mark.parametrize(("text", "keys"), [
    ("user;item;ts\nu;A;1\n", 'delimiter = ";"'), ("user\titem\tts\nu\tA\t1\n", 'delimiter = "\\t"'),
    ("user|item|ts\nu|A|1\n", 'delimiter = "|"'), ("user,item,ts\n'u',A,1\n", 'quote = "\'"'),
])  # fmt: skip
def test_the_form_of_a_csv_is_in_the_mapping(tmp_path, text, keys):
    assert read(tmp_path, text, keys=keys).column(USER) == ["u"]


def test_gzip_tabs_folders_and_empty_parts(tmp_path):
    write(tmp_path, "p/1.tsv.gz", gzip.compress(b"user\titem\tts\nu\tA\t1\n"))
    write(tmp_path, "p/2.csv", "")
    write(tmp_path, "p/3.parquet", _ids(pa.array(["v"])))
    write(tmp_path, "p/_SUCCESS", "")
    write(tmp_path, "mapping.toml", HEAD.format(events="p"))
    out = taken(tmp_path / "mapping.toml")
    assert out.column(USER) == ["u", "v"] and out.rejects.notes[0] == "2.csv is empty: skipped"
    assert out.events[SOURCE_ROW].is_monotonic_increasing


# -- types of Arrow --------------------------------------------------------------------------------------
BIG = 9_007_199_254_740_993
SOME_UUID = uuid.UUID("12345678-1234-5678-9234-567812345678")
TYPES = {
    "int64 with nulls": (pa.array([BIG, BIG + 1, None], pa.int64()), [str(BIG), str(BIG + 1)]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    "float": (pa.array([1.0, 2.5, None, float("nan")]), ["1", "2.5"]),
    "decimal": (pa.array([decimal.Decimal("7.00"), decimal.Decimal("7.25")], pa.decimal128(10, 2)), ["7", "7.25"]),
    "binary": (pa.array([b"u0", "ü".encode()], pa.binary()), ["u0", "ü"]),
    "fixed text": (pa.array([b"0123456789abcdef"], pa.binary(16)), ["0123456789abcdef"]),
    "uuid": (pa.array([SOME_UUID.bytes, None], pa.binary(16)), [str(SOME_UUID)]),
    "dictionary": (pa.array(["u0", "u1", "u0"]).dictionary_encode(), ["u0", "u1", "u0"]),
    "dictionary of binary": (pa.array([b"u0", b"u1"]).dictionary_encode(), ["u0", "u1"]),
    "large text": (pa.array([" u0 ", "", None], pa.large_string()), ["u0"]),
    "bool": (pa.array([True, False]), ["true", "false"]),
    "date": (pa.array([datetime.date(2023, 11, 14)]), ["2023-11-14"]),
    "timestamp": (pa.array([T0 * 1000, T0 * 1000 + 500], pa.timestamp("ms")),
                  ["2023-11-14 22:13:20", "2023-11-14 22:13:20.5"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_ids_of_every_type_become_text(tmp_path, kind):
    array, expected = TYPES[kind]
    out = read(tmp_path, _ids(array, array))
    assert out.column(USER) == out.column(ITEM) == expected
    assert out.rejects.counts.total() == len(array) - len(expected)


def test_binary_that_is_no_text_is_rejected_with_its_row(tmp_path):
    out = read(tmp_path, _ids(pa.array([b"u", b"\xff\xfe", b"v"], pa.binary())))
    assert out.column(USER) == ["u", "v"] and out.records()[0]["row"] == 2 and "xff" in out.records()[0]["record"]


def test_titles_and_categories_of_every_type(tmp_path):
    items = pa.table({
        "item": pa.array(["A", "B"]).dictionary_encode(), "title": pa.array([7, None], pa.int32()),
        "cat": pa.array([True, None]), "price": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(8, 2)),
    })  # fmt: skip
    out = read(tmp_path, "user,item,ts\nu,A,1\nu,B,2\n", items)
    assert out.items[TITLE].tolist() == ["7", ""] and out.items["cat"].tolist() == ["true", None]
    assert out.items["price"][0] == 1.5 and np.isnan(out.items["price"][1])


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.struct([("a", pa.string())]), pa.map_(pa.string(), pa.string())]
)
def test_nested_columns_are_named(tmp_path, kind):
    value = {"a": "x"} if pa.types.is_struct(kind) else [("a", "x")] if pa.types.is_map(kind) else ["x", "y"]
    items = pa.table({"item": ["A"], "title": ["t"], "cat": pa.array([value], kind), "price": [1.0]})
    advice = "under lists" if pa.types.is_list(kind) else "columns of their own|under lists"
    with pytest.raises(ValueError, match=f"column 'cat': expected single values.*({advice})"):
        read(tmp_path, EVENTS, items)


def test_booleans_have_one_spelling_over_all_parts(tmp_path):
    write(tmp_path, "p/1.csv", "user,item,ts,new\nu,A,1,True\nu,B,2,FALSE\nu,C,3,true\n")
    write(tmp_path, "p/2.parquet", _ids(pa.array(["u"]), new=pa.array([False])))
    write(tmp_path, "mapping.toml", HEAD.format(events="p/*") + 'context = ["new"]\n')
    out = taken(tmp_path / "mapping.toml")
    assert out.column("new") == ["true", "false", "true", "false"]
    assert out.rejects.changes() == {"interactions: new spelled as true or false": 2}


# -- times -----------------------------------------------------------------------------------------------
ISO = {
    "2023": 1_672_531_200_000, "2023-11": 1_698_796_800_000, "2023-11-14": 1_699_920_000_000,
    "2023-11-14T22": 1_699_999_200_000, "2023-11-14 22:13:20": T0 * 1000, "2023-11-14T22:13:20.5Z": T0 * 1000 + 500,
    "2023-11-14T22:13:20,1239": T0 * 1000 + 123, "20231114T221320Z": T0 * 1000, "2023-11-15T00:13:20+02:00": T0 * 1000,
    "2023-11-14T16:43:20-0530": T0 * 1000, "1970-01-01": 0, "2024-02-29T24:00": 1_709_251_200_000,
    "9999-12-31": 253_402_214_400_000,
}  # fmt: skip
NOT_ISO = ["10", "12:30", "May", "now", "today", "03/04/2023", "13/04/2023", "1700000000", "1700000000.5", "Tuesday",
           "2023-W46-2", "2023-13-01", "2023-02-29", "2023-11-14T25:00", "2023-11-14T22:60", "14 Nov 2023"]  # fmt: skip


def test_iso_8601_and_nothing_else(tmp_path):
    texts = [*ISO, *NOT_ISO]
    events = "user,item,ts\n" + "".join(f'u,{n},"{t}"\n' for n, t in enumerate(texts))
    out = read(tmp_path, events, keys='time_unit = "iso"')
    assert dict(zip(ISO, out.column(TIME), strict=True)) == ISO
    assert out.rejected() == {"interactions: unparsable time": len(NOT_ISO)}
    assert [json.loads(r["record"])["ts"] for r in out.records()] == NOT_ISO
    assert [r["row"] for r in out.records()] == list(range(2 + len(ISO), 2 + len(texts)))


@pytest.mark.parametrize(("values", "unit"), [
    (pa.array([T0, -1, 253_402_300_800, 2**62]), "s"), (pa.array([f"{T0}", "-1", "253402300800", "9e18"]), "s"),
    (pa.array([T0 * 10**9, -1, -(10**18), -(2**62)]), "ns"),
    (pa.array(["2023-11-14T22:13:20", "1969-12-31", "0001-01-01", "1677-01-01"]), "iso"),
    (pa.array([T0 * 10**3, -1, 253_402_300_800_000, -(2**60)], pa.timestamp("ms")), "s"),
])  # fmt: skip
def test_one_rule_for_before_1970_and_after_9999(tmp_path, values, unit):
    out = read(
        tmp_path, pa.table({"user": ["u"] * 4, "item": list("ABCD"), "ts": values}), keys=f'time_unit = "{unit}"'
    )
    assert out.column(TIME) == [T0 * 1000]
    assert out.rejected() == {"interactions: time before 1970 or after 9999": 3}


@pytest.mark.parametrize("values", [
    pa.array([T0], pa.timestamp("s")), pa.array([T0 * 10**9], pa.timestamp("ns")),
    pa.array([T0 * 10**6], pa.timestamp("us", "Asia/Tokyo")), pa.array([float(T0)]), pa.array([T0], pa.int32()),
    pa.array([decimal.Decimal(T0)], pa.decimal128(12, 0)), pa.array([f" {T0} "]),
])  # fmt: skip
def test_times_by_their_own_type(tmp_path, values):
    assert read(tmp_path, pa.table({"user": ["u"], "item": ["A"], "ts": values})).column(TIME) == [T0 * 1000]


@pytest.mark.parametrize("values", [
    pa.array(["2023-07-14T22:00", "2023-12-14T22:00", "2023-12-14T22:00Z"]),
    pa.array(["2023-10-29T02:30", "2023-03-26T02:30", "9999-06-01"]),
])  # fmt: skip
def test_a_time_zone_is_that_of_times_without_an_offset(tmp_path, values):
    summer = values[0].as_py().startswith("2023-07")
    expected = ["2023-07-14T20:00", "2023-12-14T21:00", "2023-12-14T22:00"] if summer else [
        "2023-10-29T00:30", "2023-03-26T01:00", None]  # fmt: skip
    table = pa.table({"user": ["u"] * 3, "item": list("ABC"), "ts": values})
    out = read(tmp_path, table, keys='time_unit = "iso"\ntime_zone = "Europe/Berlin"')
    got = [str(np.datetime64(t, "ms"))[:16] for t in out.column(TIME)]
    assert all(e is None or e == g for e, g in zip(expected, got, strict=True))


# -- numbers, weights, labels ----------------------------------------------------------------------------
def test_what_is_no_number_is_counted_and_named(tmp_path):
    values = ["€ 12.50", "$3", "4 EUR", '"1,299.00"', '"12,50"', "inf", "nan", "1e999", "-2.5e-1", "+7", " 8 ", ""]
    items = "item,title,cat,price\n" + "".join(f"{n},t,x,{v}\n" for n, v in enumerate(values))
    out = read(tmp_path, "user,item,ts\nu,0,1\n", items)
    assert np.array_equal(out.items["price"], [np.nan] * 8 + [-0.25, 7, 8, np.nan], equal_nan=True)
    assert out.rejects.changes() == {
        "items: number that is not finite in price, taken as missing": 3,
        "items: unreadable number in price, taken as missing": 5,
    }
    assert "€ 12.50" in out.rejects.changes_path.read_text()


def test_decimal_commas_are_a_key(tmp_path):
    items = "item;title;cat;price\nA;t;x;12,50\nB;t;x;1.299,00\nC;t;x;3\n"
    out = read(tmp_path, "user;item;ts\nu;A;1\n", items, top='delimiter = ";"\ndecimal = ","')
    assert np.array_equal(out.items["price"], [12.5, np.nan, 3], equal_nan=True)


@pytest.mark.parametrize("clicked", [
    "true,false,True,FALSE", "1,0,1.0,0", pa.array([True, False, True, False]), pa.array([1, 0, 1, 0]),
    pa.array([1.0, 0.0, 1.0, 0.0]), pa.array(["true", "false", "1", "0"]),
])  # fmt: skip
def test_weights_may_be_true_and_false(tmp_path, clicked):
    if isinstance(clicked, str):
        events: str | pa.Table = "user,item,ts,w\n" + "".join(
            f"u,A,{n},{v}\n" for n, v in enumerate(clicked.split(","))
        )
    else:
        events = _ids(pa.array(["u"] * 4), w=clicked)
    assert read(tmp_path, events, keys='weight = "w"').column(WEIGHT) == [1, 0, 1, 0]


def test_event_types_without_a_weight_are_counted_and_named(tmp_path):
    events = "user,item,ts,act\nu,A,1,view\nu,B,2, buy \nu,C,3,like\nu,D,4,\n"
    out = read(tmp_path, events, keys='event_type = "act"\n[interactions.weights]\nview = 1\nbuy = 3\ncart = 2\n')
    assert out.column(EVENT) == ["view", "buy", "like", None] and out.column(WEIGHT) == [1, 3, None, None]
    assert out.rejects.changes() == {
        "interactions: blanks around act removed": 1,
        "interactions: event type 'like' without a weight: its labels are 0": 1,
        "interactions: no event type, so no weight: labels are 0": 1,
    }
    assert "no event has the type 'cart'" in out.rejects.notes[0]


# -- the mapping -----------------------------------------------------------------------------------------
WRONG = {
    "exclude_seen": ('exclude_seen = "false"\n' + HEAD, r"\[top\] exclude_seen: expected true or false, got 'false'"),
    "section shown": (HEAD + 'delimeter = ";"\n', r"\[interactions\] unknown keys \['delimeter'\]"),
    "weights without types": (HEAD + "[interactions.weights]\nview = 1\n", "event_type"),
    "unit": (HEAD + 'time_unit = "minutes"\n', r"time_unit: expected one of \['s', 'ms', 'us', 'ns', 'iso'\]"),
    "zone": (HEAD + 'time_zone = "Berlin"\n', "time_zone: expected a name"),
    "encoding": (HEAD + 'encoding = "utf-9"\n', "encoding: expected"),
    "decimal": (HEAD + 'decimal = ";"\n', "decimal: expected"),
    "delimiter": (HEAD + 'delimiter = "::"\n', "delimiter: expected one character"),
    "column split": (HEAD + 'context = ["split"]\n', 'column \'split\'.*rename = { "split" = "split_" }'),
    "slash": (HEAD + 'context = ["a/b"]\n', 'column \'a/b\'.*rename = { "a/b" = "a_b" }'),
    "not a table": ("interactions = 3\n", r"expected a table \[interactions\]"),
    "weights": (HEAD + 'event_type = "e"\n[interactions.weights]\nview = true\n', "weights: expected numbers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_a_mapping_is_named(tmp_path, kind):
    text, message = WRONG[kind]
    write(tmp_path, "mapping.toml", text.format(events="e.csv") if "{events}" in text else text)
    with pytest.raises(ValueError, match=message):
        Tables(tmp_path / "mapping.toml")


@pytest.mark.parametrize(
    "files", ['"e.csv"', '["e.csv"]', '"{here}/e.csv"', '"*.csv"', '"**/e.csv"', '["e.csv", "e*"]']
)
def test_files_are_a_path_a_list_or_a_pattern(tmp_path, files):
    write(tmp_path, "e.csv", EVENTS)
    text = HEAD.format(events="X").replace('"X"', files.replace("{here}", str(tmp_path)))
    write(tmp_path, "mapping.toml", b"\xef\xbb\xbf" + text.encode())
    assert len(taken(tmp_path / "mapping.toml").events) == len(ROWS)


def test_a_missing_column_is_shown_beside_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'user', 'item', 'ts'; its columns are \['user;item;ts'\].*';'"):
        read(tmp_path, EVENTS.replace(",", ";"))
    with pytest.raises(ValueError, match=r"no column 'user'; its columns are \['User ', 'item', 'ts'\]; is 'user'"):
        read(tmp_path, EVENTS.replace("user,", "User ,"))
    with pytest.raises(ValueError, match="'ts' is there more than once"):
        read(tmp_path, "user,item,ts,ts\nu,A,1,2\n")


def test_columns_with_taken_or_odd_names_can_be_renamed(tmp_path):
    events = EVENTS.replace("\n", ",a\n").replace("ts,a", "ts,split")
    items = CATALOGUE.replace("cat,price", "cat/sub,weight")
    item_keys = ITEMS.replace('["cat"]', '["cat/sub", "title"]').replace("price", "weight") + (
        'rename = {{ "cat/sub" = "Sub cat.1", "title" = "words" }}\n'
    )
    out = read(tmp_path, events, items, 'context = ["split"]\nrename = { "split" = "arm" }', item_keys)
    assert out.column("arm") == ["a"] * len(ROWS)
    assert out.items["Sub cat.1"].tolist() == list("yxyx") and out.items["words"][0] == "Thing A"
    assert out.items["weight"].tolist() == [1.5, 2.5, 3.5, 4.5]


# -- whole tables ----------------------------------------------------------------------------------------
def _prepared(folder, events, items=CATALOGUE, **more):
    read(folder, events, items, **more)
    return prepare(Tables(folder / "mapping.toml"), PrepareConfig(partitions=1), folder / "out", 0, lambda _: None)[
        "results"
    ]


def test_all_null_columns_work(tmp_path):
    events = EVENTS.replace("\n", ",\n").replace("ts,", "ts,dev")
    items = "item,title,cat,price\n" + "".join(f"{i},{i},,inf\n" for i in "ABCD")
    results = _prepared(tmp_path, events, items, keys='context = ["dev"]')
    assert results["events"] == len(ROWS) and results["items_in_vocabulary"] == 4
    assert results["changed"] == {"items: number that is not finite in price, taken as missing": 4}


def test_prepare_stops_where_nearly_all_rows_go_for_one_reason(tmp_path):
    events = "user,item,ts\n" + "".join(f"u,A,{t}\n" for t in ["2023", *["now"] * 11])
    with pytest.raises(ValueError, match=r"11 of 12 rows.*unparsable time; the first: e\.csv row 3.*now.*time_unit"):
        _prepared(tmp_path, events, keys='time_unit = "iso"')
    with pytest.raises(ValueError, match=r"unknown item.*unknown_items"):
        _prepared(
            tmp_path,
            EVENTS,
            CATALOGUE.replace("A,T", "1,T").replace("B,T", "2,T").replace("C,T", "3,T").replace("D,T", "4,T"),
        )
    with pytest.raises(ValueError, match=r"no row in .*i\.csv"):
        _prepared(tmp_path, EVENTS, "item,title,cat,price\n")


def test_labels_that_would_all_be_zero_are_refused_and_one_silent_head_is_said(tmp_path):
    events = EVENTS.replace("\n", ",view\n").replace("ts,view", "ts,act")
    weights, heads = 'event_type = "act"\n[interactions.weights]\nVIEW = 1\n', "[heads]\nclick = 0\nbuy = 3\n"
    with pytest.raises(ValueError, match=r"every label would be 0.*no event has the type 'VIEW'"):
        _prepared(tmp_path, events, keys=weights, rest=heads)
    results = _prepared(tmp_path, events, keys=weights.replace("VIEW", "view"), rest=heads)
    assert results["notes"] == ["head 'buy': no event has a weight of 3 or more, so all its labels are 0"]


def test_a_wrong_unit_is_doubted(tmp_path):
    results = _prepared(tmp_path, EVENTS, keys='time_unit = "ms"')
    assert "lie in 1970 (the median is 1970-01-20)" in results["notes"][0]
