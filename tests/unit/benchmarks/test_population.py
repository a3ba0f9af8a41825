"""The simulated population: what is said of it is true of its clicks."""

import numpy as np
import pytest

from benchmarks.population import Experiments
from benchmarks.simulated_users import Population
from preprocessing.readers.shop import CATEGORIES, Shop, ShopConfig
from vivace.sequential import Plan

SMALL = ShopConfig(users=300, items=200, events=4_000, seed=3)


def test_what_a_session_begins_with_is_what_the_log_says():
    shop = Shop(ShopConfig(users=4_000, items=120, events=8_000, seed=3))
    log = next(iter(shop.interactions())).rows
    first = log.drop_duplicates("user_id")  # in order of time
    user = first["user_id"].str[5:].astype(int).to_numpy()
    device = np.searchsorted(["desktop", "phone", "tablet"], first["device"])  # DEVICES: phone, desktop, tablet
    day_part = (first["timestamp_ms"].to_numpy() % 86_400_000 * 4 // 86_400_000).astype(int)
    chance = np.exp(shop.wanted(user, np.array([1, 0, 2])[device], day_part))
    assert chance.sum(1) == pytest.approx(np.ones(len(user)))
    category = np.array([CATEGORIES.index(title.split()[2]) for title in shop.items()["title"]])
    expected = np.zeros(len(CATEGORIES))
    np.add.at(expected, category, chance.sum(0))
    seen = np.bincount(category[first["item_id"].str[4:].astype(int)], minlength=len(CATEGORIES))
    # tastes drift before some first sessions, which moves a few
    assert np.abs(seen - expected).sum() / len(user) < 0.1
    assert np.corrcoef(seen, expected)[0, 1] > 0.95


def test_clicks_are_as_many_as_a_version_is_said_to_get():
    population, rng = Population(Shop(SMALL)), np.random.default_rng(0)
    control = population.version(1, 1.5)
    better = population.version_of(2, control.ctr * 1.03)
    assert better.ctr / control.ctr == pytest.approx(1.03, rel=1e-3) and population.overlap(control, control) == 1
    visits = population.visits(rng, 20_000, 24)
    for version in (control, better):
        clicked = population.clicks(rng, visits, visits.shown(version))
        assert clicked.mean() == pytest.approx(version.ctr, abs=4 * clicked.std() / np.sqrt(clicked.size) * 1.5)


def test_decisions_through_a_file_are_those_of_the_looks():
    e = Experiments(SMALL, Plan())
    by_looks, by_file = e.through_a_file(0, 1_000)
    assert by_looks.lift == pytest.approx(by_file.lift) and by_looks.low == pytest.approx(by_file.low)
