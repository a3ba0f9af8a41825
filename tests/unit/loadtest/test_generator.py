"""The open-loop generator by hand: arrivals, what it counts, and where it finds the knee."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.generate.arrivals import due_times, picks
from loadtest.generate.generator import LoadRun, best, knee, summarize
from loadtest.generate.open_loop import report_page


@pytest.mark.parametrize("kind", ["poisson", "constant", "burst", "diurnal"])
def test_arrivals_have_the_rate_and_the_shape_they_promise(kind):
    due = due_times(kind, 200, 60, 3, recorded_ms=[0, 1000, 1000, 4000])
    assert len(due) == pytest.approx(12_000, rel=0.05) and (np.diff(due) >= 0).all() and due[0] >= 0 and due[-1] <= 60
    counts = np.bincount(due.astype(int), minlength=61)[:60]
    dispersion = counts.var() / counts.mean()
    assert {"poisson": 0.6 < dispersion < 1.6, "constant": dispersion < 0.01}.get(kind, dispersion > 10)
    assert np.array_equal(due, due_times(kind, 200, 60, 3, recorded_ms=[0, 1000, 1000, 4000]))
    if kind == "burst":  # the first second of five has four times the rate of the others
        assert counts[::5].sum() == pytest.approx(12_000 / 2, rel=0.05)


def test_a_run_is_summarized_from_when_requests_were_due():
    records = [(0.0, 0.0, 0.010, ""), (0.1, 0.1, 0.130, ""), (0.2, 0.25, 0.260, ""), (0.3, 0.3, 0.305, "UNAVAILABLE")]
    r = summarize(records, 4, 1, slo_ms=20)
    assert r.answered == 3 and r.refused == {"UNAVAILABLE": 1} and r.attainment == 0.25 and r.goodput == 1
    assert r.p50 == pytest.approx(30)  # 10, 30 and, though the server took 10 ms, 60 since it was due
    assert r.service_p99 < 31 and r.late == pytest.approx(48.5, abs=1)


def test_the_knee_is_found_between_the_rates_tried():
    def measure(rate: float) -> LoadRun:
        share = 1.0 if rate <= 730 else 0.5
        return LoadRun(rate, 1, 1, 1, {}, 1, 1, 1, 1, 0, 20, share, rate * share, 0, share)

    runs = knee(measure, 100, steps=6)
    met = best(runs)
    assert met is not None and 715 <= met.qps <= 730
    assert f"{met.qps:.0f} requests a second" in report_page(runs, 20, "t")
    assert best(knee(lambda rate: measure(10_000), 100, steps=2)) is None


def test_a_few_users_make_most_of_the_traffic():
    chosen = np.bincount(picks(10_000, 1000, 1.0, 3), minlength=1000)
    assert np.sort(chosen)[::-1][:100].sum() > 6000 > np.sort(np.bincount(picks(10_000, 1000, 0, 3)))[::-1][:100].sum()
