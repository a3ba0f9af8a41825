"""The preset that a data set gets where none is named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.splits import SplitConfig
from training.advice import LogSizes, outsized, sizes_of, suited
from training.presets import PRESETS, base, cpu, large

LOGS = {  # users, items, training events, of the median user, real times
    "ML-1M": (LogSizes(6_040, 3_416, 987_531, 94, False), "cpu"),
    "Beauty": (LogSizes(22_363, 12_101, 153_776, 4, False), "beauty"),
    "Globo": (LogSizes(322_897, 46_033, 2_300_000, 4, True), "news-time"),
    "Globo, hour by hour": (LogSizes(322_897, 46_033, 2_300_000, 4, True, False, 0.74, 0.3), "news-live"),
    "two days of it": (LogSizes(40_000, 46_033, 370_000, 4, True, False, 0.74, 0.3), "news-live"),
    "popular at all times": (LogSizes(322_897, 46_033, 2_300_000, 4, True, False, 0.4, 0.3), "news-time"),
    "news without times": (LogSizes(322_897, 46_033, 2_300_000, 4, False), "news"),
    "demo shop": (LogSizes(10_000, 5_000, 250_000, 23, True), "shop"),
    "Retailrocket": (LogSizes(2_174, 29_905, 93_000, 21, True), "beauty"),
    "Tmall": (LogSizes(61_232, 40_727, 375_000, 4, False, True), "session"),
    "Last.fm": (LogSizes(1_892, 18_018, 81_918, 7, True, listed_again=True), "music"),
    "nothing": (LogSizes(0, 0, 0, 0, False), "beauty"),
}


@pytest.mark.parametrize("log", LOGS)
def test_each_kind_of_log_gets_its_preset(log):
    sizes, expected = LOGS[log]
    name, why = suited(sizes)
    assert name == expected and name in PRESETS
    assert f"{sizes.items:,} items" in why and "\n" not in why


def sizes(folder, mapping: str) -> LogSizes:
    """Of 60 visits of three events each, one of which is on an item that came before."""
    rows = [f"v{v},i{item},{10 * v + n}" for v in range(60) for n, item in enumerate((v % 7, v % 5, v % 7))]
    (folder / "log.csv").write_text("\n".join(["visit,sku,at", *rows]) + "\n")
    (folder / "items.csv").write_text("\n".join(["sku,title", *(f"i{i},thing {i}" for i in range(7))]) + "\n")
    columns = '[interactions]\nfiles = "log.csv"\nuser = "visit"\nitem = "sku"\ntime = "at"\n'
    top, _, tables = mapping.partition("[")
    (folder / "mapping.toml").write_text(top + columns + ("[" + tables if tables else ""))
    source = open_source("tables", folder / "mapping.toml")
    prepare(source, PrepareConfig(split=SplitConfig("sessions")), folder / "run", 0, lambda _: None)
    return sizes_of(Features(folder / "run" / "features"))


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ("sessions = true\n", True),
        ("exclude_seen = false\n", True),
        ("", False),
        ('exclude_seen = false\n[items]\nfiles = "items.csv"\nitem = "sku"\ntitle = "title"\n', False),
    ],
)
def test_sessions_are_told_by_the_mapping_or_by_what_comes_again(tmp_path, mapping, expected):
    assert sizes(tmp_path, mapping).sessions == expected


def log_of(rows: list[str], folder, more: str = "") -> LogSizes:
    """Of rows "user,item,seconds"."""
    (folder / "log.csv").write_text("\n".join(["user,item,at", *rows]) + "\n")
    columns = '[interactions]\nfiles = "log.csv"\nuser = "user"\nitem = "item"\ntime = "at"\ntime_unit = "s"\n'
    (folder / "mapping.toml").write_text(more + columns)
    prepare(open_source("tables", folder / "mapping.toml"), PrepareConfig(), folder / "run", 0, lambda _: None)
    return sizes_of(Features(folder / "run" / "features"))


def test_what_a_user_has_just_had_is_not_what_is_hot(tmp_path):
    """400 users, one every three hours, who come back to an item of theirs: the hour's most clicked are their own."""
    rng, rows = np.random.default_rng(3), []
    for user in range(400):
        items, start = rng.integers(0, 900, 4), 1_700_000_000 + 10_800 * user + int(rng.integers(900))
        rows += [f"u{user},i{item},{start + 61 * n}" for n, item in enumerate([*items, *items[2:]])]
    log = log_of(rows, tmp_path, "exclude_seen = false\n")
    assert log.times and log.hour_hits < 0.05 and not log.fresh


@pytest.mark.parametrize("moves", [True, False])
def test_a_log_whose_hot_items_change_by_the_hour_is_fresh(tmp_path, moves):
    """20 hours of 100 users: one of ten hot items each, of the hour or always the same ten, after any two of 500."""
    rng, rows = np.random.default_rng(3), []
    for hour, place in itertools.product(range(20), range(100)):
        first = 10 * hour if moves else 0
        times = 1_700_000_000 + 3600 * hour + np.sort(rng.integers(0, 3600, 4))
        items = (300 + rng.integers(500), 300 + rng.integers(500), first + place % 10, first)
        rows += [f"u{hour}-{place},i{item},{at}" for item, at in zip(items, times, strict=True)]
    log = log_of(rows, tmp_path)
    assert log.times and log.fresh == moves and (suited(log)[0] == "news-live") == moves
    assert log.hour_hits > 0.3 and (log.ever_hits > 0.3) != moves


def test_a_model_far_larger_than_its_log_is_said():
    ml_1m = 987_000
    assert not outsized(cpu().encoder, ml_1m) and not outsized(base().encoder, ml_1m)
    assert "25.2 million weights" in outsized(large().encoder, ml_1m) and "987,000 training events" in outsized(
        large().encoder, ml_1m
    )
    assert not outsized(large().encoder, 10_000_000)
