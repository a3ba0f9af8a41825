"""The tuner's parts by hand: objectives, the queueing model, the journal, knees, and what a decision may claim."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from loadtest.generate.generator import LoadRun
from loadtest.generate.run_locust import level
from loadtest.tune.decision import quality_sentence, shows
from loadtest.tune.journal import BudgetError, Journal
from loadtest.tune.live import close_in
from loadtest.tune.offline import gains, share_kept
from loadtest.tune.queueing import Batcher, Service, knee, latencies
from loadtest.tune.space import Objective
from preprocessing.requests import recorded
from vivace import contract
from vivace.context import ContextColumns
from vivace.run import Run


def test_objectives_are_read_or_refused():
    assert Objective.parse("p99.9=5ms", 0.98) == Objective(99.9, 5, 0.98)
    for slo, quality, words in (("99%=20", 1, "p99=20ms"), ("p100=20ms", 1, "p99=20ms"), ("p99=20ms", 1.2, "share")):
        with pytest.raises(ValueError, match=words):
            Objective.parse(slo, quality)


def test_the_queue_by_hand():
    """M/D/1 waits rho S / (2 (1 - rho)) on average (Pollaczek-Khinchine): 5 ms of work, 100 a second, 2.5 ms."""
    one = Service({1: 5.0, 2: 6.0}, request=0.0, batch=0.0)
    mean = np.mean([latencies(one, 100, Batcher(1, 1), 1, seed).mean() for seed in range(8)])
    assert mean == pytest.approx(5 + 2.5, rel=0.06)
    assert latencies(one, 0.01, Batcher(1, 2, 0, 3.0), 1).max() == pytest.approx(8)  # alone: the delay and the work
    assert [Batcher(1, 16, 4).size(n) for n in (1, 3, 4, 7, 8, 15, 16, 40)] == [1, 3, 4, 4, 8, 8, 16, 16]
    pairs = Service({1: 5.0, 2: 5.0}, 0.0, 0.0)
    single, both = (knee(pairs, Batcher(1, b), 1, 99, 50) for b in (1, 2))
    assert 150 < single < 200 and 1.8 * single < both < 400  # bounds: 200 and 400 a second
    assert knee(pairs, Batcher(1, 2), 1, 99, 4.9) == 0


def test_a_journal_keeps_what_was_measured_beyond_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    first = Journal(path, 60)
    assert first(["run", 1], lambda: 3.5) == 3.5 and first(["run", 1], lambda: 0) == 3.5
    with path.open("a") as log:
        log.write('{"key": "[\\"run\\", 2]", "val')  # cut off
    again = Journal(path, -1)
    assert again(["run", 1], lambda: 0) == 3.5
    with pytest.raises(BudgetError):
        again(["run", 2], lambda: 4)


def test_load_shapes_keep_their_mean():
    for shape in ("constant", "burst", "diurnal"):
        assert np.mean([level(shape, t / 100, 60) for t in range(6000)]) == pytest.approx(1, abs=0.01)
    assert [level("ramp", t, 50) for t in (0, 10, 49)] == [0.2, 0.4, 1.0] and level("burst", 1, 60) == 2.5


class Moment:
    columns = ContextColumns()


class Backwards:
    """Stands for the served graphs: answers items 12, 11, ... 3 to every request."""

    class transform:  # noqa: N801
        moment = Moment

        @staticmethod
        def item_ids(names: list[str]) -> np.ndarray:
            return np.array([int(name) for name in names])

    def __call__(self, rows: list) -> tuple:
        ids = np.tile(np.arange(12, 2, -1), (len(rows), 1))
        return (ids, ids.astype(np.float32)), None, None


def test_quality_is_judged_on_validation_and_the_test_is_not_read(tmp_path):
    """Only validation requests are recorded here: whoever reads the test finds no file."""
    Run(tmp_path).compiled.mkdir()
    targets = ["12", "11", "3", "2", "40"]  # at places 0, 1 and 9; a special id; never answered
    frame = pd.DataFrame({contract.USER: "u", contract.ITEM: [["5"]] * 5, contract.TARGET: targets})
    frame.to_parquet(Run(tmp_path).requests_file("valid"))
    expected = [1.0, 1 / math.log2(3), 1 / math.log2(11), 0.0, 0.0]
    assert gains(Backwards(), tmp_path) == pytest.approx(expected, abs=1e-4)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"part 'test'.*vivace compile"):
        recorded(tmp_path)
    with pytest.raises(ValueError, match=r"\('test', 'valid'\), got 'train'"):
        recorded(tmp_path, "train")


def test_a_share_has_the_interval_of_the_differences():
    whole = np.array([0.5, 1.0, 0.0, 0.5] * 50)
    assert share_kept(whole, whole) == (1.0, (1.0, 1.0))
    share, (low, high) = share_kept(whole, whole - 0.01 * whole)
    assert share == pytest.approx(0.99) and low < 0.99 < high and high - low < 0.01  # paired: the requests cancel out
    share, (low, high) = share_kept(whole, np.roll(whole, 1))
    assert share == pytest.approx(1) and low < 0.9 and high > 1.1


def test_an_interval_that_includes_the_bound_shows_nothing():
    record = {"objective": {"quality": 0.99}, "judged_requests": 5000}
    wide = {**record, "chosen": {"quality": 1.001, "interval": (0.97, 1.03)}}
    assert not shows((0.97, 1.03), 0.99) and shows((0.99, 1.0), 0.99)
    assert quality_sentence(wide) == (
        "NDCG@10 is 100.1% of the whole model's, 95 % interval 97.0% to 103.0%, on 5,000 validation requests: the "
        "interval reaches below 99.0%, which this does not show to be kept"
    )
    narrow = {**record, "chosen": {"quality": 0.995, "interval": (0.991, 0.999)}}
    assert quality_sentence(narrow).endswith("5,000 validation requests: at least 99.0% is kept")


def run_of(qps: float, full: float, late: float = 0.0) -> LoadRun:
    return LoadRun(qps, 1, 1, 1, {}, 1, 1, 1, 1, late, 20, full, qps, 0, full)


def between(capacity: float, guess: float, least: float = 0.0) -> tuple[float, float, list[float]]:
    """(met, failed, rates tried) of a server that holds ``capacity`` requests a second."""
    tried = []

    def offered(qps: float) -> LoadRun:
        tried.append(qps)
        return run_of(qps, 1.0 if qps <= capacity else 0.5)

    return (*close_in(offered, Objective(99, 20, 0.99), guess, least), tried)


@pytest.mark.parametrize("guess", [300.0, 500.0, 2000.0])
def test_the_rate_is_closed_in_from_any_guess(guess):
    met, failed, tried = between(480, guess)
    assert met <= 480 < failed and failed / met < 1.35 and len(tried) <= 8
    assert met in tried and failed in tried


def test_a_trial_that_does_not_beat_the_best_is_left():
    met, failed, tried = between(480, 400, least=600)
    assert (met, failed, tried) == (0.0, 600.0, [600.0])


def test_a_run_is_kept_as_it_was():
    assert LoadRun(**asdict(run_of(10, 1.0))) == run_of(10, 1.0)
