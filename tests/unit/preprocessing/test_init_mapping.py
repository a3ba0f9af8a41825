"""A first mapping guessed from a table can be used; the mapping shown in the docs is one."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from preprocessing.readers.init_mapping import draft, missing
from preprocessing.readers.mapping import read_mapping
from tests.unit.preprocessing.tables import taken, write
from vivace.cli import main
from vivace.contract import EVENT, ITEM, TIME, TITLE, USER

DOCS = Path(__file__).resolve().parents[3] / "docs" / "preprocessing.md"


def test_a_guessed_mapping_reads_its_tables(tmp_path):
    rows = [("a", "X1", "2023-11-14 22:00:00", "view"), ("b", "X2", "2023-11-14 23:00:00", "buy")]
    text = "customer_id;product_sku;Timestamp;action\n" + "".join(";".join(r) + "\n" for r in rows)
    write(tmp_path, "e.csv", text)
    items = "sku;name;cat;price\nX1;Café;a;12,50\nX2;Tee;a;1,5\nX3;T;a;2\n".encode("cp1252")
    write(tmp_path, "i.csv", items)
    write(tmp_path, "mapping.toml", draft(tmp_path / "e.csv", tmp_path / "i.csv", tmp_path))
    out = taken(tmp_path / "mapping.toml")
    assert out.column(USER) == ["a", "b"] and out.column(ITEM) == ["X1", "X2"] and out.column(EVENT) == ["view", "buy"]
    assert out.column(TIME) == [1_699_999_200_000, 1_700_002_800_000]
    assert out.items[TITLE].tolist() == ["Café", "Tee", "T"] and out.items["price"].tolist() == [12.5, 1.5, 2.0]


@pytest.mark.parametrize(("times", "unit"), [
    (pa.array([1_700_000_000]), "s"), (pa.array([1_700_000_000_000]), "ms"), (pa.array(["2023-11-14"]), "iso"),
    (pa.array([1_700_000_000], pa.timestamp("s")), None),
])  # fmt: skip
def test_the_unit_of_times_is_guessed(tmp_path, times, unit):
    write(tmp_path, "e.parquet", pa.table({"userId": ["u"], "movieId": ["A"], "rating": [4.0], "when": times}))
    text = draft(tmp_path / "e.parquet", None, tmp_path)
    assert ('time_unit = "' in text) == (unit is not None) and (unit is None or f'time_unit = "{unit}"' in text)
    assert 'user = "userId"' in text and 'item = "movieId"' in text and 'weight = "rating"' in text


def test_the_mapping_in_the_docs_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    write(tmp_path, "mapping.toml", text)
    schema = read_mapping(tmp_path / "mapping.toml").schema
    assert schema.context_categoricals == ("os", "country", "hour", "weekday", "os_x_hour") and schema.user_columns == (
        "country",
        "age",
    )
    assert schema.context_continuous == ("price_cap", "age") and schema.time_zone == "UTC"


def test_a_table_by_session_is_one_of_sessions_and_needs_no_times(tmp_path):
    write(tmp_path, "e.csv", "SessionId,ItemId\ns1,A\ns1,A\ns2,B\n")
    write(tmp_path, "mapping.toml", draft(tmp_path / "e.csv", None, tmp_path))
    schema = read_mapping(tmp_path / "mapping.toml").schema
    assert schema.sessions and not schema.exclude_seen
    out = taken(tmp_path / "mapping.toml")
    assert out.column(ITEM) == ["A", "A", "B"] and out.column(TIME) == [2, 3, 4], "places in the file: its lines"
    write(tmp_path, "e.csv", "user,SessionId,ItemId\nu,s1,A\n")
    assert "sessions" not in draft(tmp_path / "e.csv", None, tmp_path)


def test_columns_of_several_values_are_lists(tmp_path):
    write(tmp_path, "e.csv", "user,item,time\n" + "".join(f"u,{i},{1_700_000_000 + i}\n" for i in range(6)))
    genres = ["Drama|War", "Comedy", "Drama", "Comedy|War", "Drama|Comedy", ""]
    tags = ["a, b", "b, a", "a, c", "c", "a, b", "b, c"]
    rows = [f'{i},"A film, number {i}",{g},"{t}"\n' for i, (g, t) in enumerate(zip(genres, tags, strict=True))]
    write(tmp_path, "i.csv", "item,plot,genres,tags\n" + "".join(rows))
    write(tmp_path, "mapping.toml", draft(tmp_path / "e.csv", tmp_path / "i.csv", tmp_path))
    out = taken(tmp_path / "mapping.toml")
    assert read_mapping(tmp_path / "mapping.toml").schema.separators == {"genres": "|", "tags": ","}
    assert out.items["genres"][3] == ["Comedy", "War"] and out.items["tags"][0] == ["a", "b"]
    lists = [None if not g else g.split("|") for g in genres]
    write(tmp_path, "i.parquet", pa.table({"item": [str(i) for i in range(6)], "genres": lists}))
    text = draft(tmp_path / "e.csv", tmp_path / "i.parquet", tmp_path)
    assert 'lists = ["genres"]' in text and "separator" not in text


def test_every_column_is_used_or_left_out_with_a_reason(tmp_path):
    """Whatever a table holds, no column goes in silence: in the mapping, and in what the command says."""
    n = range(40)
    events = {
        "user": [f"u{i % 7}" for i in n], "sku": [f"s{i % 9}" for i in n], "ts": [1_700_000_000 + i for i in n],
        "rating": [1.0 + i % 5 for i in n], "action": ["view"] * 40, "url": [f"/p/{i}" for i in n], "tag": [["x"]] * 40,
        "device": ["phone", "tablet"] * 20, "empty": [None] * 40,
    }  # fmt: skip
    items = {
        "sku": [f"s{i}" for i in n], "name": [f"Lamp {i}" for i in n], "price": [i / 2 for i in n], "brand": ["a"] * 40,
        "describes": [f"No two alike, {i}" for i in n], "genres": ["War|Love", "War"] * 20, "empty": [None] * 40,
        "parts": [{"a": i} for i in n], "nested": [[[i]] for i in n], "printed": [f"['x', 'y{i}']" for i in n],
    }  # fmt: skip
    for name, columns in (("e", events), ("i", items)):
        write(tmp_path, f"{name}.parquet", pa.table(columns))
    out = CliRunner().invoke(main.app, ["init-mapping", str(tmp_path / "e.parquet"), "--items",
                                        str(tmp_path / "i.parquet"), "--out", str(tmp_path / "m.toml")])  # fmt: skip
    assert out.exit_code == 0, out.output
    text = (tmp_path / "m.toml").read_text()
    read_mapping(tmp_path / "m.toml")
    of_events, _, of_items = text.partition("[items]")
    for section, columns in ((of_events, events), (of_items, items)):
        used = "\n".join(line for line in section.splitlines() if not line.startswith("#"))
        for column in columns:
            line = re.search(rf'^# (left out: "{column}": .+)$', section, re.MULTILINE)
            assert (f'"{column}"' in used) != (line is not None), (column, text)
            assert line is None or line[1] in out.output.replace("\n", ""), out.output
    for column, reason in (("describes", "too many"), ("parts", "struct"), ("printed", "printed lists")):
        assert re.search(rf'left out: "{column}": .*{reason}', of_items), text


@pytest.mark.parametrize(
    ("rows", "decimal"),
    [
        (['a,"1,001",12.34', "b,Book,3.5"], False),  # one title that looks like a number
        (['a,"3,5",12.34', 'b,"7,9",3.5'], False),  # ids that a comma parts, beside numbers with a point
        (['a,Lamp,"12,34"', 'b,Book,"3,5"'], True),
    ],
)
def test_a_decimal_comma_is_told_by_whole_columns(tmp_path, rows, decimal):
    (tmp_path / "events.csv").write_text("user,item,ts\nu,a,1700000000\n")
    (tmp_path / "items.csv").write_text("item,name,price\n" + "\n".join(rows) + "\n")
    text = draft(tmp_path / "events.csv", tmp_path / "items.csv", tmp_path)
    assert ('decimal = ","' in text) == decimal and 'continuous = ["price"]' in text


def test_the_mappings_of_each_domain_in_the_docs_are_some(tmp_path):
    text = (DOCS.parent / "domains.md").read_text(encoding="utf-8")
    shop, news, music = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    schemas = []
    for number, mapping in enumerate((shop, news, music)):
        write(tmp_path, f"{number}.toml", mapping)
        schemas.append(read_mapping(tmp_path / f"{number}.toml").schema)
    assert [s.exclude_seen for s in schemas] == [True, True, False]
    assert [s.unknown_items for s in schemas] == ["reject", "keep", "reject"]
    assert schemas[0].item_continuous == ("price",) and schemas[2].item_lists == ("tags",)
    assert [len(s.context_categoricals) for s in schemas] == [3, 3, 0]


def test_a_news_log_is_known_and_what_is_known_after_an_event_is_no_context(tmp_path):
    """The columns of docs/domains.md's news mapping, and a log that says what was done as well."""
    write(tmp_path, "c.csv", "reader,article,ts,dwell_s,device\nr1,A,1700000000000,12.5,tv\nr2,B,1700000001000,,tv\n")
    write(tmp_path, "a.csv", "article,section,section_name,headline\nA,s,Sport,Goal\nB,s,Sport,Rain\n")
    text = draft(tmp_path / "c.csv", tmp_path / "a.csv", tmp_path)
    for line in ('user = "reader"', 'item = "article"', 'time_unit = "ms"', 'weight = "dwell_s"', 'title = "headline"'):
        assert line in text, text
    assert '# context = ["device"]' in text
    write(tmp_path, "c.csv", "reader,article,ts,event,dwellSeconds,device\nr1,A,1700000000000,read,12.5,tv\n")
    text = draft(tmp_path / "c.csv", None, tmp_path)
    assert 'event_type = "event"' in text and '# context = ["device"]' in text and "weight =" not in text
    assert '# left out: "dwellSeconds": known only after the event' in text


def test_times_of_the_item_are_none_of_the_event_and_what_was_shown_is_no_event(tmp_path):
    rows = "".join(f"r{n},Goal,2026-01-0{n}T00:00:00Z,2026-02-0{n}T00:00:00Z,impression\n" for n in (1, 2, 3))
    write(tmp_path, "c.csv", f"reader,headline,published_at,read_at,event\n{rows}")
    text = draft(tmp_path / "c.csv", None, tmp_path)
    for line in ('item = "headline"', 'time = "read_at"', 'shown_types = ["impression"]'):
        assert line in text, text
    assert not missing(text)
    write(tmp_path, "d.csv", "reader,read_at\nr1,2026-01-01T00:00:00Z\n")
    assert missing(draft(tmp_path / "d.csv", None, tmp_path)) == ["item"]
