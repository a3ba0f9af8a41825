"""Logs of sessions: whole sessions are held out, each event of them is a request, and a test set that comes with the
log teaches nothing."""

from __future__ import annotations

import pandas as pd
import pytest

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.splits import SplitConfig
from vivace.contract import FIRST_ID, ITEM, OOV_ID, TARGET, USER

SESSIONS = ["a b a", "b c", "a a b", "c b", "a c", "b a c", "c", "a b", "d a", "b d d e"]  # 24 events
TESTS = ["a b\tc", "d\ta", "a z\tb", "a\tz"]
BY_SESSION = SplitConfig("sessions", valid_share=0.2, test_share=0.15)


def prepared(folder, sessions=SESSIONS, tests=(), split=BY_SESSION, partitions=3) -> Features:
    (folder / "train_sessions.txt").write_text("\n".join(sessions) + "\n")
    if tests:
        (folder / "test_prefix_target.tsv").write_text("\n".join(tests) + "\n")
    source = open_source("sessions", folder)
    prepare(source, PrepareConfig(split=split, partitions=partitions), folder / "run", 0, lambda _: None)
    return Features(folder / "run" / "features")


def sequences(features: Features, part: str) -> dict[str, list[str]]:
    """Items of each user's rows as one text; of a request "history > target"."""
    names = dict(enumerate(features.items()[ITEM], FIRST_ID)) | {OOV_ID: "?"}
    out: dict[str, list[str]] = {}
    for file in features.files(part):
        for row in pd.read_parquet(file).to_dict("records"):
            text = " ".join(names[i] for i in row[ITEM])
            out.setdefault(row[USER], []).append(f"{text} > {names[row[TARGET]]}" if TARGET in row else text)
    return out


def test_whole_sessions_are_held_out_and_each_later_event_is_a_request(tmp_path):
    features = prepared(tmp_path)
    # events 1..24: .65 of the way from the first to the last is 15, .85 is 20; the sessions end at 3, 5, 8, 10, 12,
    # 15, 16, 18, 20, 24
    assert sequences(features, "train") == {f"s{i}": [SESSIONS[i - 1]] for i in range(1, 6)}
    assert sequences(features, "valid") == {"s6": ["b > a", "b a > c"], "s8": ["a > b"]}
    assert sequences(features, "test") == {"s10": ["b > d", "b d > d", "b d d > e"], "s9": ["d > a"]}
    assert sequences(features, "whole") == {f"s{i}": [s] for i, s in enumerate(SESSIONS, 1)}
    assert set(features.items()[ITEM][:3]) == set("abc"), "counted items come first"
    assert set(features.items()[ITEM][3:]) == {"d", "e"}, "then those of held-out events, for the final fit"


def test_a_test_set_of_the_log_is_the_test_and_teaches_nothing(tmp_path):
    features = prepared(tmp_path, tests=TESTS)
    assert sequences(features, "test") == {"t1": ["a b > c"], "t2": ["d > a"], "t3": ["a ? > b"], "t4": ["a > ?"]}
    taught = {user for part in ("train", "valid", "whole") for user in sequences(features, part)}
    assert taught == {f"s{i}" for i in range(1, 11)}
    assert len(features.events()[ITEM]) == 24, "no live counter sees it"
    assert "z" not in set(features.items()[ITEM])


def test_the_split_by_session_is_the_same_for_any_number_of_partitions(tmp_path):
    found = []
    for count in (1, 4):
        (tmp_path / str(count)).mkdir()
        features = prepared(tmp_path / str(count), tests=TESTS, partitions=count)
        found.append({part: sequences(features, part) for part in ("train", "valid", "test", "whole")})
    assert found[0] == found[1]


def test_a_test_set_of_the_log_asks_for_the_split_by_session(tmp_path):
    with pytest.raises(ValueError, match="split leave-one-out: a log that brings its own test requests is split by"):
        prepared(tmp_path, tests=TESTS, split=SplitConfig())


def test_a_line_that_is_no_request_is_rejected_by_line(tmp_path):
    features = prepared(tmp_path, tests=[*TESTS, "a b", "\tc", "a\tb c"])
    rejected = pd.read_csv(features.rejects)
    assert rejected["row"].tolist() == [5, 6, 7]
    assert rejected["record"].str.contains("a line of test_prefix_target.tsv: expected items, a tab").all()


def test_leave_one_out_hands_every_event_to_the_final_fit(tmp_path):
    features = prepared(tmp_path, split=SplitConfig())
    assert sequences(features, "train")["s10"] == ["b d"]
    assert sequences(features, "whole")["s10"] == ["b d d e"]


def test_tables_of_sessions_need_no_times(tmp_path):
    rows = [f"{i},{item}" for i, line in enumerate(SESSIONS, 1) for item in line.split()]
    (tmp_path / "log.csv").write_text("\n".join(["visit,sku", *rows]) + "\n")
    mapping = 'sessions = true\n[interactions]\nfiles = "log.csv"\nuser = "visit"\nitem = "sku"\n'
    (tmp_path / "mapping.toml").write_text(mapping)
    source = open_source("tables", tmp_path / "mapping.toml")
    assert source.schema.sessions and not source.schema.exclude_seen
    prepare(source, PrepareConfig(split=BY_SESSION), tmp_path / "run", 0, lambda _: None)
    features = Features(tmp_path / "run" / "features")
    assert sequences(features, "whole") == {str(i): [s] for i, s in enumerate(SESSIONS, 1)}
    assert sequences(features, "test")["10"] == ["b > d", "b d > d", "b d d > e"]
    (tmp_path / "mapping.toml").write_text(mapping.replace("sessions = true\n", ""))
    with pytest.raises(ValueError, match="expected the key 'time'"):
        open_source("tables", tmp_path / "mapping.toml")
