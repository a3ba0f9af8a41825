"""From a joined log to the figures of each arm and the page, on a log whose figures are known."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest.reports.experiment import arm_rows, team_rows, write
from serving.door.rollout import Split
from serving.rollout_steps import RolloutSteps
from serving.runtime.team_draft import coins, draft
from training.judge.clicks import experiment
from training.judge.clicks.drafts import credits_of, looked_at, teams
from training.judge.clicks.experiment import CTR, NDCG, evidence
from vivace.impressions.files import DRAFTED_FROM
from vivace.impressions.joined import JOINED
from vivace.sequential import Plan

HOUR_MS = 3_600_000


def log(path, rows):
    """``rows``: (request, user, ms, variant, item, place, clicked), and the team where two were interleaved."""
    columns = {name: [] for name in JOINED.names}
    for request, user, ms, variant, item, place, clicked, *team in rows:
        user, _, session = user.partition(" of ")
        values = {"request_id": request, "user_id": user, "session": session,
                  "timestamp_ms": ms, "variant": variant, "item_id": item,
                  "position": place, "clicked": clicked, "latency_ms": 10.0 * place,
                  "model_version": "2" if team else "1", "team": "".join(team),
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


def test_a_step_of_a_rollout_does_not_choose_among_its_users(tmp_path):
    """Two versions that are alike: old users click, new ones do not, and a step takes some of both."""
    steps, rows = RolloutSteps("s", 0.5, ((100, 0.1), (200, 0.5))), []
    for user in (f"{kind}{n}" for kind in ("old", "new") for n in range(400)):
        for at, share in ((150, 0.1), (250, 0.5)) if user.startswith("old") else ((250, 0.5),):
            arm = "trial" if Split("s", share).takes(user) else ""
            rows.append((f"{user} {at}", user, at, arm, "x", 1, user.startswith("old")))
    rows.append(("late", "old1", 260, "", "x", 1, True))  # whom the trial's server could not answer, or a newcomer
    file = log(tmp_path / "log.parquet", rows)
    served, trial = evidence(file, Plan(), steps=steps).arms
    assert trial.rates[CTR].value == pytest.approx(served.rates[CTR].value, abs=0.05)
    assert evidence(file, Plan(), steps=steps).crossed == 0 and trial.users == pytest.approx(400, abs=30)
    chosen = evidence(file, Plan())
    assert chosen.crossed > 100 and chosen.arms[1].rates[CTR].value < 0.7 * chosen.arms[0].rates[CTR].value
    steps.write(tmp_path)
    assert RolloutSteps.read(tmp_path) == steps and RolloutSteps.read(tmp_path / "none") is None
    (tmp_path / "rollout.json").write_text('{"salt": "s", "most": 0.5, "steps": [[1, 0.9]]}')
    with pytest.raises(ValueError, match="expected the steps of a rollout"):
        RolloutSteps.read(tmp_path)


def test_teams_by_hand(tmp_path):
    file = log(tmp_path / "log.parquet", [
        ("r0", "u0", 0, "trial", "x", 1, True, "2"),  # of one place: the next names the served version
        ("r1", "u1", 1, "trial", "x", 1, True, "1"), ("r1", "u1", 1, "trial", "y", 2, False, "2"),
        ("r2", "u1", 2, "trial", "x", 1, True, "2"), ("r2", "u1", 2, "trial", "y", 2, False, "1"),
        ("r3", "u2", 3, "trial", "x", 1, True, "2"), ("r3", "u2", 3, "trial", "y", 2, True, "1"),  # a tie
        ("r4", "u2", 4, "trial", "x", 1, False, "2"), ("r4", "u2", 4, "trial", "y", 2, False, "1"),
        ("r5", "u3", 5, "trial", "x", 1, False, "2"), ("r5", "u3", 5, "trial", "y", 3, True, "1"),  # too far down
        ("r6", "u4", 6, "", "x", 1, True),  # of the served version alone
    ])  # fmt: skip
    unknown = [math.nan] * 2
    (seen,) = teams(file, Plan(), unknown)
    assert (seen.served, seen.tried, seen.users, seen.requests, seen.clicked, seen.decided) == ("1", "2", 4, 6, 4, 3)
    assert math.isnan(seen.preference.share) and not seen.preference.differs  # three users say nothing
    assert teams(log(tmp_path / "other.parquet", [("r", "u", 0, "", "x", 1, True)]), Plan(), unknown) == []
    old = pq.read_table(file).drop_columns(["team"])
    pq.write_table(old, tmp_path / "old.parquet")
    assert teams(tmp_path / "old.parquet", Plan(), unknown) == []
    header, (ctr, won) = team_rows([seen])
    assert len(header) == len(ctr) == len(won) and won[-2] == "too few users with a winner yet"
    assert ctr[-2] == "too few users or clicks yet"  # nor were the rankings logged


def test_a_lift_by_hand(tmp_path):
    """Each of 200 users is shown a draft of ab and ba once, the same number each way, and clicks one item."""
    rows, of_draft = [], {}
    for number in range(200):
        items, picked = ("ab", "12") if number % 2 else ("ba", "21")
        clicked = "b" if number % 10 < 6 else "a"
        of_draft[f"r{number}"] = (["a", "b"], ["b", "a"])
        rows += [(f"r{number}", f"u{number}", 0, "trial", item, place, item == clicked, team)
                 for place, (item, team) in enumerate(zip(items, picked, strict=True), 1)]  # fmt: skip
    table = pq.read_table(log(tmp_path / "log.parquet", rows))
    ids, places = (table[name].to_pylist() for name in ("request_id", "position"))
    first = [of_draft[id_] if place == 1 else (None, None) for id_, place in zip(ids, places, strict=True)]
    for name, rankings in zip(DRAFTED_FROM, zip(*first, strict=True), strict=True):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(rankings, table.schema.field(name).type))
    pq.write_table(table, tmp_path / "drafted.parquet")
    (seen,) = teams(tmp_path / "drafted.parquet", Plan(effect=0.1), [1.0, 0.5])
    # either item is looked at .75 times a draft, and .5 more by the version that has it first: 2/3 of a click
    assert seen.lift.lift == pytest.approx(math.expm1(2 / 3 * (0.6 - 0.4))) and seen.preference.share == 0.6
    variance = (2 / 3) ** 2 * (1 - 0.2**2) / 199
    radius = Plan(effect=0.1).radius(variance)
    assert seen.lift.high == pytest.approx(math.expm1(2 / 15 + radius)) and seen.lift.verdict == "no difference seen"


@pytest.mark.parametrize("second", ["bcxyz", "axbyc", "abxcd", "vwxyz", "dcxba", "ab", "bxcdy"])
def test_credits_are_of_what_either_ranking_would_have_shown(second):
    first, second, looked = list("abxcd"), list(second), np.array([1.0, 0.6, 0.5, 0.3, 0.2])
    credit = credits_of(first, second, looked)
    of_coins = {tuple(coins(f"r{n}", 3)): draft(first, second, 5, f"r{n}").items for n in range(400)}

    def told(attraction) -> float:
        """Clicks by which the second is ahead, in expectation over coins and clicks."""
        return sum(
            looked[place] * attraction(item) * credit[item]
            for items in of_coins.values() for place, item in enumerate(items)
        ) / len(of_coins)  # fmt: skip

    assert told(lambda item: 0.1) == pytest.approx(0, abs=1e-12)  # clicks by chance prefer neither
    assert credits_of(second, first, looked) == pytest.approx({item: -value for item, value in credit.items()})
    if len(credit) == len({*first, *second}) and len(second) == 5:  # all may be shown: the true difference
        appeal = {item: 0.1 + 0.05 * number for number, item in enumerate(sorted(credit))}
        truth = sum(look * (appeal[b] - appeal[a]) for look, a, b in zip(looked, first, second, strict=True))
        assert told(appeal.get) == pytest.approx(truth)


def test_places_of_which_the_log_says_too_little_are_taken_as_by_ndcg():
    assert looked_at([1.0, math.nan]).tolist() == [1.0, 1 / math.log2(3)]
    assert looked_at([1.0, -0.1]).tolist() == [1.0, 0.01]


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


def test_an_arm_that_nobody_clicked_is_told_in_words(tmp_path):
    file = log(tmp_path / "log.parquet", [("r1", "u1", 0, "", "x", 1, False), ("r2", "u2", 0, "", "y", 1, False)])
    header, (row,) = arm_rows(evidence(file, Plan()))
    assert row[0] == "(unnamed)" and dict(zip(header, row, strict=True))["NDCG of clicks"] == "no clicks"
    with pytest.raises(ValueError, match="leave --control out"):
        evidence(file, Plan(), control="nosuch")
