"""Users of the synthetic shop who are shown rankings and click: by the generator's own taste, and by the place.

A user looks at a place with a chance that is planted (1 / position, as in the shop's searches), and clicks what is
looked at by the item's attraction: odds in proportion to the chance that the generator's user begins a session with it
at this moment (``Shop.wanted``). So the truth of any ranking is known exactly. A version orders the items by that
chance too, but errs: to its logarithm noise is added that is the version's own in part and shared in part, as errors of
models trained on one log are. More noise, fewer clicks.
Axis legend: U users, M moments of each, C candidates, K places, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from preprocessing.readers.shop import DAY_PARTS, DEVICES, Shop
from training.judge.clicks.experiment import CLICKS, SHOWN, UNIT
from vivace.columns import TIME

PLACES, CANDIDATES, MOMENTS = 10, 30, 2
BEST_CTR = 0.12  # clicks a shown item of the best order: what attraction is scaled to
SHARED = 0.5  # of the variance of a version's errors: what all versions err in
ACTIVITY = 0.6  # standard deviation of the logarithm of how often users come, as the generator's
HOUR_MS, CHUNK = 3_600_000, 2_000
EXAMINED = 1 / np.arange(1, PLACES + 1)


@dataclass(frozen=True)
class Version:
    """A ranking of everyone's candidates: ``order`` int16 [U, M, C], best first; ``ctr``: its true clicks a shown item
    over the first PLACES."""

    order: np.ndarray
    noise: float
    ctr: float


class Population:
    """Users of a shop at their moments. ``attraction`` float32 [U, M, C] of the candidates, the likeliest C items of
    the moment, ``items`` int32 [U, M, C], their numbers in the shop."""

    def __init__(self, shop: Shop, seed: int = 0, candidates: int = CANDIDATES) -> None:
        rng, users = np.random.default_rng(seed), shop.config.users
        self.device = rng.choice(len(DEVICES), (users, MOMENTS), p=(0.6, 0.3, 0.1))
        self.day_part = rng.integers(0, DAY_PARTS, (users, MOMENTS))
        self.items = np.empty((users, MOMENTS, candidates), np.int32)
        self.wanted = np.empty((users, MOMENTS, candidates), np.float32)
        for moment in range(MOMENTS):
            for start in range(0, users, CHUNK):
                some = np.arange(start, min(start + CHUNK, users))
                wanted = shop.wanted(some, self.device[some, moment], self.day_part[some, moment])
                top = np.argpartition(-wanted, candidates, axis=1)[:, :candidates]
                self.items[some, moment] = top
                self.wanted[some, moment] = np.take_along_axis(wanted, top, 1)
        self.scale = self._scaled_to(BEST_CTR)
        self.attraction = self._attraction(self.scale)
        self._errors = np.random.default_rng([seed, 1]).normal(size=self.items.shape).astype(np.float32)

    def _attraction(self, scale: float) -> np.ndarray:
        odds = scale * np.exp(self.wanted)
        attraction: np.ndarray = (odds / (1 + odds)).astype(np.float32)
        return attraction

    def _scaled_to(self, ctr: float) -> float:
        best, low, high = np.sort(-self.wanted, 2)[:, :, :PLACES], -3.0, 8.0
        for _ in range(40):
            middle = (low + high) / 2
            odds = 10**middle * np.exp(-best)
            low, high = (middle, high) if (odds / (1 + odds) * EXAMINED).mean() < ctr else (low, middle)
        return float(10**low)

    def version(self, seed: int, noise: float, shared: float = SHARED) -> Version:
        """A version whose errors have the standard deviation ``noise``, of a logarithm."""
        own = np.random.default_rng([seed, 2]).normal(size=self.items.shape).astype(np.float32)
        error = np.sqrt(shared) * self._errors + np.sqrt(1 - shared) * own
        order = np.argsort(-(self.wanted + noise * error), axis=2).astype(np.int16)
        clicked = np.take_along_axis(self.attraction, order[:, :, :PLACES].astype(np.int64), 2) * EXAMINED
        return Version(order, noise, float(clicked.mean()))

    def version_of(self, seed: int, ctr: float, shared: float = SHARED) -> Version:
        """A version of such a true CTR, to a ten-thousandth of it. Raises ValueError where no noise gives it."""
        low, high = 0.0, 8.0
        if not self.version(seed, high, shared).ctr < ctr < self.version(seed, low, shared).ctr:
            raise ValueError(f"population: expected a CTR between the best order's and chance, got {ctr:.4f}")
        while True:
            version = self.version(seed, (low + high) / 2, shared)
            if abs(version.ctr / ctr - 1) < 1e-4:
                return version
            low, high = (version.noise, high) if version.ctr > ctr else (low, version.noise)

    def visits(self, rng: np.random.Generator, people: int, hours: int) -> Visits:
        """Visits of ``people`` drawn from the population, one and by a Poisson of their activity (mean 1) more each,
        evenly over the hours; by time."""
        who = rng.integers(0, len(self.items), people)
        activity = rng.lognormal(-(ACTIVITY**2) / 2, ACTIVITY, people)
        person = np.repeat(np.arange(people), 1 + rng.poisson(activity))
        time_ms = rng.integers(0, hours * HOUR_MS, len(person))
        person = person[np.argsort(time_ms, kind="stable")]
        return Visits(person, who[person], rng.integers(0, MOMENTS, len(person)), np.sort(time_ms))

    def clicks(self, rng: np.random.Generator, visits: Visits, shown_RK: np.ndarray) -> np.ndarray:
        """Whether each shown item is clicked, bool [R, K]. ``shown_RK``: numbers of candidates, int [R, K]."""
        attraction = np.take_along_axis(self.attraction[visits.user, visits.moment], shown_RK.astype(np.int64), 1)
        clicked: np.ndarray = rng.random(shown_RK.shape) < attraction * EXAMINED
        return clicked

    def overlap(self, first: Version, second: Version) -> float:
        """Share of the first PLACES that two versions have in common."""
        places = [np.argsort(v.order, axis=2) < PLACES for v in (first, second)]
        return float((places[0] & places[1]).sum(2).mean() / PLACES)


@dataclass(frozen=True)
class Visits:
    """Requests: ``person`` int64 [R], who is ``user`` of the population, at one of that user's moments, at a time."""

    person: np.ndarray
    user: np.ndarray
    moment: np.ndarray
    time_ms: np.ndarray

    def __len__(self) -> int:
        return len(self.person)

    def take(self, rows: np.ndarray) -> Visits:
        return Visits(self.person[rows], self.user[rows], self.moment[rows], self.time_ms[rows])

    def shown(self, version: Version) -> np.ndarray:
        """Numbers of the candidates that a version shows, int16 [R, K]."""
        shown: np.ndarray = version.order[self.user, self.moment, :PLACES]
        return shown


def arm(visits: Visits, clicked_RK: np.ndarray) -> pd.DataFrame:
    """Requests as ``training.judge.clicks.experiment.looks`` reads an arm's."""
    return pd.DataFrame({UNIT: visits.person, TIME: visits.time_ms, CLICKS: clicked_RK.sum(1), SHOWN: PLACES})
