"""Files of what was shown: whole or not there, merged by day, without a user who was forgotten; joined with events."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import wait_until
from vivace.columns import CLICKED, ITEM, POSITION
from vivace.impressions import files, joined
from vivace.impressions.files import REQUEST_ID, SCHEMA, USER, Part, forget, parts, tidy
from vivace.impressions.queue import Drafts, ImpressionOptions, ImpressionQueue, packed_viewer, row_ids, table_of
from vivace.impressions.samples import LATE_S, TURN, SampleOptions, SampleWriter, next_turn_s
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000


def shown(request_id: str, *users: str, items=((b"x", b"y"),), made_ms: float = NOW_MS, drafts=None):
    """One request of a row a user, as a stage puts it into the queue."""
    rows = [packed_viewer((user, "", b'{"device": "phone"}', made_ms - 4, "" if user else "s")) for user in users]
    scores = np.linspace(2, 1, len(items[0]) * len(rows), dtype=np.float32).reshape(len(rows), -1)
    shown_items = np.array(items, object).reshape(len(rows), -1)
    return request_id, rows, shown_items, scores, [b"ok"] * len(rows), made_ms, drafts, None


def rows_of(folder):
    return [row for path in parts(folder) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def test_a_request_becomes_a_row():
    several = shown("r2", "v", "", items=((b"x", b"y"), (b"z", b"")))
    first, second, third = table_of([shown("r1", "u"), several], "b", "7").to_pylist()
    assert first == {
        "request_id": "r1", "user_id": "u", "session": "", "timestamp_ms": NOW_MS,
        "context": '{"device": "phone"}', "query": "",
        "items": ["x", "y"], "scores": [2.0, 1.0], "propensities": [1.0, 1.0], "variant": "b", "model_version": "7",
        "latency_ms": 4.0, "status": "ok", "team": ["", ""],
        "served_ranking": [], "tried_ranking": [],
    }  # fmt: skip
    assert (second["request_id"], third["request_id"]) == ("r2/0", "r2/1")
    assert (third["user_id"], third["session"]) == ("", "s")
    assert third["items"] == ["z"] and third["scores"] == [pytest.approx(4 / 3)]  # what only fills the row is left out


def test_an_id_is_made_where_there_is_none_that_an_event_can_name():
    for given in ("", "é" * 65):
        (made,) = row_ids(given, 1)
        assert len(made) == 32 and made != row_ids(given, 1)[0]


def test_the_queue_writes_what_waits_and_counts_what_it_drops(tmp_path):
    queue = ImpressionQueue(ImpressionOptions(str(tmp_path / "log"), "b", waiting=3), "7")
    for number in range(5):
        queue.put(shown(f"r{number}", "u"))
    queue.close()
    assert queue.dropped == 2 and queue.logged == 3
    assert [row[REQUEST_ID] for row in rows_of(tmp_path / "log")] == ["r0", "r1", "r2"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in parts(tmp_path / "log"))


def test_a_disk_that_refuses_costs_the_log_and_nothing_else(tmp_path):
    (tmp_path / "log").write_text("no folder")
    queue = ImpressionQueue(ImpressionOptions(str(tmp_path / "log")), "7")
    queue.put(shown("r", "u"))
    queue.close()
    assert (queue.logged, queue.dropped) == (0, 1)


def test_a_log_that_was_removed_goes_on(tmp_path):
    part = Part(tmp_path / "log")
    part.write(table_of([shown("r1", "u")], "", "1"))
    shutil.rmtree(tmp_path / "log")
    part.write(table_of([shown("r2", "u")], "", "1"))
    assert [row[REQUEST_ID] for row in rows_of(tmp_path / "log")] == ["r2"]


def test_a_forgotten_user_is_in_no_file_and_in_none_that_is_about_to_be_written(tmp_path):
    part = Part(tmp_path)
    part.write(table_of([shown("r1", "u"), shown("r2", "v")], "", "1"))
    part.write(table_of([shown("r3", "u")], "", "1"))
    waits = table_of([shown("r4", "u", made_ms=1), shown("r5", "v")], "", "1")  # of before
    assert forget(tmp_path, "u") == 2
    part.write(waits)
    part.write(table_of([shown("r6", "u", made_ms=9 * NOW_MS)], "", "1"))  # of someone who came again
    assert [(row[REQUEST_ID], row[USER]) for row in rows_of(tmp_path)] == [("r2", "v"), ("r5", "v"), ("r6", "u")]
    assert "u" not in (tmp_path / files.FORGOTTEN).read_text().split('"')
    assert forget(tmp_path / "nothing", "u") == 0


def test_days_that_are_over_become_one_file_and_old_ones_go(tmp_path):
    part, today = Part(tmp_path), files._day(NOW_MS)
    for number in range(4):
        part.write(table_of([shown(f"r{number}", "u")], "", "1"))
    _as_written_before_there_were_teams(parts(tmp_path)[1])
    days = [files._day(NOW_MS - age * DAY_MS) for age in (9, 1, 1, 0)]
    for path, day in zip(parts(tmp_path), days, strict=True):
        path.rename(tmp_path / f"{day}{path.name[8:]}")
    (tmp_path / "left.parquet.partial").write_bytes(b"of a writer that was killed")
    tidy(tmp_path, days=5, now_ms=NOW_MS)
    assert [path.name[:9] for path in parts(tmp_path)] == [f"{days[1]}.", f"{today}T"]
    assert [(row[REQUEST_ID], row["team"]) for row in rows_of(tmp_path)] == [
        ("r1", ["", ""]), ("r2", ["", ""]), ("r3", ["", ""])
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def _as_written_before_there_were_teams(path):
    pq.write_table(pq.read_table(path).drop_columns(["team", *files.DRAFTED_FROM]), path)


def test_a_merge_that_was_killed_leaves_each_row_once(tmp_path):
    part, yesterday = Part(tmp_path), files._day(NOW_MS - DAY_MS)
    for number in range(2):
        part.write(table_of([shown(f"r{number}", "u")], "", "1"))
    for path in parts(tmp_path):
        path.rename(tmp_path / f"{yesterday}{path.name[8:]}")
    whole = pa.concat_tables(pq.read_table(path, schema=SCHEMA) for path in parts(tmp_path))
    files.write_whole(whole, tmp_path / f"{yesterday}.parquet")  # and then it was killed: the parts are still there
    assert [row[REQUEST_ID] for row in rows_of(tmp_path)] == ["r0", "r1"]
    tidy(tmp_path, days=0, now_ms=NOW_MS)
    assert os.listdir(tmp_path).count(f"{yesterday}.parquet") == 1 == len(list(tmp_path.glob("*.parquet")))


def test_a_click_joins_what_it_was_of(tmp_path):
    part = Part(tmp_path / "log")
    rankings = (np.array([[b"x", b"q"]], object), np.array([[b"y", b""]], object))
    drafts = Drafts(np.array([["6", "7"]], object), rankings)
    part.write(table_of([shown("r1", "u", drafts=drafts), shown("empty", "w", items=((b"",),))], "b", "7"))
    part.write(table_of([shown("r2", "v")], "b", "7"))
    _as_written_before_there_were_teams(parts(tmp_path / "log")[1])
    store = LmdbStore(tmp_path / "store")
    store.append([
        Event("u", "y", "view", 5, "e1", request_id="r1"),
        Event("u", "y", "buy", 6, "e2", request_id="r1"),  # the first counts
        Event("v", "x", "view", 7, "e3"),  # names no request
        Event("v", "y", "view", 8, "e4", '{"device": "tv"}', request_id="r1"),  # another's request
    ])  # fmt: skip
    out = tmp_path / "joined.parquet"
    counts = joined.join(tmp_path / "log", store, out)
    assert (counts.requests, counts.empty, counts.shown, counts.clicked, counts.strays) == (3, 1, 4, 1, 1)
    columns = [REQUEST_ID, ITEM, POSITION, CLICKED, "event_type", "event_ms", "team", *files.DRAFTED_FROM]
    rows = [tuple(row.values()) for row in pq.read_table(out).select(columns).to_pylist()]
    assert rows == [
        ("r1", "x", 1, False, None, None, "6", ["x", "q"], ["y"]),
        ("r1", "y", 2, True, "view", 5, "7", None, None),
        ("r2", "x", 1, False, None, None, "", None, None), ("r2", "y", 2, False, None, None, "", None, None),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--event buyy: no event .* there are: "):
        joined.join(tmp_path / "log", store, out, types=["buyy"])
    joined.join(tmp_path / "log", store, out, types=["buy"])
    assert pq.read_table(out)["event_ms"].to_pylist() == [None, 6, None, None]
    store.close()


WRITER = """
import sys, numpy as np
from vivace.impressions.queue import ImpressionOptions, ImpressionQueue
queue = ImpressionQueue(ImpressionOptions(sys.argv[1], rows=500, seconds=0.1), "1")
items, scores = np.array([[b"x", b"y"]], object), np.ones((1, 2), np.float32)
print("goes", flush=True)
number = 0
while True:
    if len(queue._waiting) < 1_000:
        queue.put((f"r{number}", [("u", "", b"", 1.0, "")], items, scores, [b"ok"], 2.0, None, None))
        number += 1
"""


def test_a_writer_that_is_killed_leaves_whole_files_without_a_gap(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"goes\n"
    deadline = time.monotonic() + 60
    while len(parts(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    ids = [row[REQUEST_ID] for row in rows_of(tmp_path)]  # each file can be read to its end
    assert len(ids) >= 300 and ids == [f"r{number}" for number in range(len(ids))]
    tidy(tmp_path, days=0)
    assert not list(tmp_path.glob("*.partial"))  # what it was writing


def test_when_the_next_samples_come_is_known_before_the_first(tmp_path):
    folder = tmp_path / "parity"
    assert next_turn_s(folder) is None
    writer = SampleWriter(SampleOptions(str(folder), 0.01, seconds=60.0))
    wait_until(lambda: next_turn_s(folder) is not None, "word of the first turn")
    left = next_turn_s(folder)
    assert left is not None and 0 < left <= 60
    writer.close()
    assert [file.name for file in folder.iterdir()] == [TURN] and (folder.stat().st_mode & 0o777) == 0o700
    late = time.time() - 60 - LATE_S - 1  # the server ended long ago
    os.utime(folder / TURN, (late, late))
    assert next_turn_s(folder) is None
