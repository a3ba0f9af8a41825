"""From a joined log to the figures of each arm and the page, on a log whose figures are known."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest.reports.experiment import write
from training.judge import experiment
from training.judge.experiment import CTR, NDCG, evidence
from training.judge.sequential import Plan
from vivace.impressions.joined import JOINED

HOUR_MS = 3_600_000


def log(path, rows):
    """``rows``: (request, user, ms, variant, item, place, clicked)."""
    columns = {name: [] for name in JOINED.names}
    for request, user, ms, variant, item, place, clicked in rows:
        user, _, session = user.partition(" of ")
        values = {"request_id": request, "user_id": user, "session": session,
                  "timestamp_ms": ms, "variant": variant, "item_id": item,
                  "position": place, "clicked": clicked, "latency_ms": 10.0 * place, "model_version": "1",
                  "context": "", "query": "", "status": "ok", "score": 0.0, "propensity": 1.0}  # fmt: skip
        for name in columns:
            columns[name].append(values.get(name))
    pq.write_table(pa.table(columns, schema=JOINED), path, row_group_size=3)
    return path


def test_figures_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "BATCH", 3)  # requests go on from one read to the next
    file = log(tmp_path / "log.parquet", [
        ("r0", "u4", 3, "a", "n", 1, True), ("r0b", " of s", 4, "a", "n", 1, True),  # before b was there
        ("r1", "u1", 5, "a", "x", 1, False), ("r1", "u1", 5, "a", "y", 2, True), ("r1", "u1", 5, "a", "z", 3, True),
        ("r2", "u2", 9, "a", "x", 1, False), ("r2", "u2", 9, "a", "w", 2, False),
        ("r3", " of s", 5, "b", "x", 1, True), ("r3", " of s", 5, "b", "q", 2, False),
        ("r6", " of s", 8, "b", "x", 1, True), ("r7", "", 8, "b", "x", 1, False), ("r8", "", 8, "b", "x", 1, False),
        ("r4", "u3", 6, "a", "x", 1, True), ("r5", "u3", 7, "b", "x", 1, False),
    ])  # fmt: skip
    seen = evidence(file, Plan(), top_k=2)
    a, b = seen.arms
    assert (seen.control, seen.crossed, seen.items) == ("a", 1, 4)  # u3 was in both; x, y, w, q among the first two
    assert (a.users, a.requests, a.rates[CTR].value, a.coverage) == (2, 2, 1 / 4, 3)
    assert a.rates[NDCG].value == pytest.approx(1 / math.log2(3))  # one click, at the second place
    assert (b.users, b.requests, b.rates[CTR].value, b.rates[NDCG].value) == (3, 4, 2 / 5, 1.0)  # s and two without
    assert b.beside[CTR].verdict == "no difference seen" and math.isnan(b.beside[CTR].lift)  # three users say nothing


def test_copies_that_nobody_saw_are_left_out(tmp_path):
    file = log(tmp_path / "log.parquet", [
        ("r1", "u1", 0, "", "x", 1, True), ("r1", "u1", 0, "trial", "y", 1, False),
        ("r2", "u2", 0, "trial", "x", 1, True),
    ])  # fmt: skip
    served, trial = evidence(file, Plan()).arms
    assert (served.users, trial.users, trial.rates[CTR].value, trial.coverage) == (1, 1, 1.0, 1)


def test_a_better_arm_is_called_and_drawn(tmp_path):
    rng, rows = np.random.default_rng(5), []
    for number in range(2_000):
        arm = "ab"[number % 2]
        for place in (1, 2, 3):
            clicked = bool(rng.random() < (0.3 if arm == "a" else 0.45) / place)
            rows.append((f"r{number}", f"u{number // 2 % 500}{arm}", number * HOUR_MS // 20, arm, f"i{place}", place,
                         clicked))  # fmt: skip
    seen = evidence(log(tmp_path / "log.parquet", rows), Plan(effect=0.2))
    beside, looks = seen.arms[1].beside[CTR], seen.arms[1].looks
    assert beside.verdict == "better" and beside.low < 0.5 < beside.high  # 0.45 beside 0.3
    assert looks[-1].comparison == beside  # the last look is the whole
    assert math.isnan(looks[0].comparison.lift)  # the first has too few users
    write(seen, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "better" in page and page.count("<img") == 2
