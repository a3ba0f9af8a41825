"""Experiments on a population whose taste is known: how often the project's own decisions are right.

    python -m benchmarks.population --seeds 100

Users of the synthetic shop click by its own taste and by the place (``simulated_users``). The control and versions
whose true CTR is 3 % better and 3 % worse are put to them for two weeks, and ``training.judge`` decides at a look every
hour. Each seed draws other users, arms and clicks. Checked are: A/B (``experiment.looks``), the same with two equal
arms, interleaving (``serving.runtime.team_draft``, judged by ``clicks.drafts``: by CTR, and by requests won),
the position bias (``places.examined``), and the doubly robust estimate of a version that nobody saw
(``counterfactual``). The first seed also goes through a file (``experiment.evidence``), which has to say the same. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.simulated_users import EXAMINED, HOUR_MS, PLACES, SHARED, Population, Version, Visits, arm
from loadtest.reports.record import record_line
from preprocessing.readers.shop import Shop, ShopConfig
from serving.runtime.team_draft import draft, winner
from training.judge.clicks.drafts import credits_of, looked_at
from training.judge.clicks.experiment import CTR, evidence, looks
from training.judge.clicks.places import examined
from training.judge.counterfactual import UNIT, counterfactual
from vivace.columns import CLICKED, ITEM, POSITION, TIME
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.joined import JOINED, PROPENSITY
from vivace.sequential import Comparison, Plan, Preference, Rate, compare, drafted, preferred

HOURS, DAYS = 24 * 14, 14
NOISE = 1.5  # of the control's errors
CONTROL, BETTER, WORSE = 1, 2, 3  # seeds of the versions' errors
EXPLORED, DEPTH = (
    0.5,
    12,
)  # of the log that estimates are of: requests whose first DEPTH are shown in an order by chance
BETTER_BY = 0.03
UNDECIDED = "no difference seen"
ALIKE = {"alike": 0.9, "unlike": 0.5}  # how much of their errors two versions share that are interleaved


class Experiments:
    """The population and its versions. ``people``: users of both arms in all, as many as the plan asks for."""

    def __init__(self, config: ShopConfig, plan: Plan) -> None:
        self.population, self.plan = Population(Shop(config)), plan
        self.control, self.better, self.worse = self.versions()

    def versions(self, shared: float = SHARED) -> tuple[Version, Version, Version]:
        """The control, one that is better and one that is worse."""
        control = self.population.version(CONTROL, NOISE, shared)
        better = self.population.version_of(BETTER, control.ctr * (1 + BETTER_BY), shared)
        return control, better, self.population.version_of(WORSE, control.ctr * (1 - BETTER_BY), shared)

    def users_for(self, plan: Plan, pilot: int = 10_000) -> int:
        """Users of both arms in all that the plan asks for, by what it says after a pilot of the control alone."""
        arms = self._arms(np.random.default_rng([9, 9]), pilot, self.control, self.control)
        clicks = [a.groupby(UNIT)[["clicks", "shown"]].sum().to_numpy(float) for a in arms]
        first, second = (Rate.of(c[:, 0], c[:, 1]) for c in clicks)
        return pilot + compare(first, second, plan).users_needed

    def _arms(
        self, rng: np.random.Generator, people: int, first: Version, second: Version
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        visits, second_arm = self.population.visits(rng, people, HOURS), rng.random(people) < 0.5
        parts = []
        for side, version in ((False, first), (True, second)):
            of_arm = visits.take(np.flatnonzero(second_arm[visits.person] == side))
            parts.append(arm(of_arm, self.population.clicks(rng, of_arm, of_arm.shown(version))))
        return parts[0], parts[1]

    def ab(self, seed: int, people: int, version: Version) -> tuple[str, int]:
        """(verdict of the first hourly look that has one, items shown until then in both arms)."""
        control, treatment = self._arms(np.random.default_rng([seed, 1]), people, self.control, version)
        for look in looks(control, treatment, self.plan, HOURS):
            if look.comparison.differs:
                return look.comparison.verdict, _shown(control, look.until_ms) + _shown(treatment, look.until_ms)
        return UNDECIDED, _shown(control) + _shown(treatment)

    def equal(self, seed: int, people: int) -> tuple[bool, bool]:
        """Whether two equal arms are told apart at any of the hourly looks: by ``looks``, and by a usual 95 % interval,
        which is made for a single look."""
        control, treatment = self._arms(np.random.default_rng([seed, 1]), people, self.control, self.control)
        seen = [look.comparison for look in looks(control, treatment, self.plan, HOURS)]
        judged = [c for c in seen if c.low > -1]
        usual = any(abs(np.log1p(c.lift)) > 1.96 * _error(c, self.plan) for c in judged)
        return any(c.differs for c in seen), usual

    def interleaved(
        self, seed: int, people: int, control: Version, version: Version, looked_at_K: np.ndarray
    ) -> dict[str, tuple[str, int]]:
        """The same by team draft of two versions, for everyone: by what clicks say of CTR ("lift"), and by the requests
        that a version won ("won")."""
        rng, population = np.random.default_rng([seed, 2]), self.population
        visits = population.visits(rng, people, HOURS)
        sums = {name: (np.zeros(people), np.zeros(people)) for name in ("lift", "won")}
        judge: dict[str, Callable[..., Comparison | Preference]] = {"lift": drafted, "won": preferred}
        out: dict[str, tuple[str, int]] = {}
        ends = np.searchsorted(visits.time_ms, np.arange(1, HOURS + 1) * HOUR_MS)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            hour = visits.take(np.arange(start, end))
            rankings = list(zip(hour.shown(control).tolist(), hour.shown(version).tolist(), strict=True))
            drafts = [draft(a, b, PLACES, f"{seed}-{start + i}") for i, (a, b) in enumerate(rankings)]
            clicked = population.clicks(rng, hour, np.array([d.items for d in drafts]).reshape(-1, PLACES))
            for person, d, of, row in zip(hour.person, drafts, rankings, clicked.tolist(), strict=True):
                if not any(row):
                    continue
                winning = winner(d.credited("ab"), row, "a")
                sums["won"][0][person] += winning > 0
                sums["won"][1][person] += winning != 0
                credit = credits_of(*of, looked_at_K)
                sums["lift"][0][person] += sum(credit[item] for item, click in zip(d.items, row, strict=True) if click)
                sums["lift"][1][person] += sum(row)
            for name in sums.keys() - out.keys():
                seen = judge[name](*sums[name], self.plan)
                if seen.differs:
                    out[name] = seen.verdict, int(end) * PLACES
            if len(out) == len(sums):
                break
        return {name: out.get(name, (UNDECIDED, len(visits) * PLACES)) for name in sums}

    def places(self, seed: int, people: int, by_moment: bool) -> np.ndarray:
        """How often each place is looked at, beside what was planted: 1 is right; float64 [K]. The ranker is trained
        anew every day."""
        rng, population = np.random.default_rng([seed, 3]), self.population
        visits = population.visits(rng, people, HOURS)
        day, shown = visits.time_ms // (24 * HOUR_MS), np.empty((len(visits), PLACES), np.int64)
        for number in range(DAYS):
            rows = np.flatnonzero(day == number)
            shown[rows] = visits.take(rows).shown(population.version(1000 + number, NOISE))
        clicked = population.clicks(rng, visits, shown)
        item = population.items[visits.user[:, None], visits.moment[:, None], shown]
        pair = visits.person[:, None] * len(population.items) + item
        if by_moment:
            pair = pair * population.items.shape[1] + visits.moment[:, None]
        place = np.tile(np.arange(PLACES), len(visits))
        return examined(pair.ravel(), place, clicked.ravel(), PLACES) / EXAMINED

    def estimated(self, seed: int, people: int) -> tuple[bool, float]:
        """(whether the doubly robust interval covers the better version's true CTR, its half width beside that)."""
        rng, population = np.random.default_rng([seed, 4]), self.population
        visits = population.visits(rng, people, HOURS)
        first = self.control.order[visits.user, visits.moment, :DEPTH]
        by_chance = rng.random(len(visits)) < EXPLORED
        page = np.where(by_chance[:, None], rng.permuted(first, axis=1), first)[:, :PLACES]
        as_ranked = page == first[:, :PLACES]
        shown = self._rows(visits, page).assign(**{
            CLICKED: population.clicks(rng, visits, page).ravel(),
            PROPENSITY: (EXPLORED / DEPTH + (1 - EXPLORED) * as_ranked).ravel(),
            UNIT: np.repeat(visits.person, PLACES),
        })  # fmt: skip
        estimate = counterfactual(shown, self._rows(visits, self._reranked(visits.user, visits.moment)), seed=seed)
        truth = self._truth_of_reranked()
        bounds = estimate.doubly_robust
        return bounds.low <= truth <= bounds.high, (bounds.high - bounds.low) / 2 / truth

    def _reranked(self, user: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """What the better version makes of the control's first DEPTH, int16 [R, K]: the log has shown nothing else."""
        place = np.argsort(self.better.order[user, moment], axis=1)  # of each candidate in the better version
        first = self.control.order[user, moment, :DEPTH].astype(np.int64)
        order = np.argsort(np.take_along_axis(place, first, 1), axis=1)
        reranked: np.ndarray = np.take_along_axis(first, order, 1)[:, :PLACES]
        return reranked

    def _truth_of_reranked(self) -> float:
        users, moments, _ = self.population.items.shape
        user, moment = np.repeat(np.arange(users), moments), np.tile(np.arange(moments), users)
        attraction = self.population.attraction[user, moment]
        return float((np.take_along_axis(attraction, self._reranked(user, moment), 1) * EXAMINED).mean())

    def _rows(self, visits: Visits, shown_RK: np.ndarray) -> pd.DataFrame:
        request = np.repeat(np.arange(len(visits)), PLACES)
        item = self.population.items[visits.user[:, None], visits.moment[:, None], shown_RK.astype(np.int64)]
        place = np.tile(np.arange(1, PLACES + 1), len(visits))
        return pd.DataFrame({REQUEST_ID: request, ITEM: item.ravel(), POSITION: place})

    def through_a_file(self, seed: int, people: int) -> tuple[Comparison, Comparison]:
        """The better version's last look by ``looks``, and by ``evidence`` of a file of the same."""
        control, better = self._arms(np.random.default_rng([seed, 1]), people, self.control, self.better)
        parts = []
        for name, requests in (("a", control), ("b", better)):
            place = np.tile(np.arange(1, PLACES + 1), len(requests))
            person = np.repeat(requests[UNIT].to_numpy(), PLACES)
            clicked = place <= np.repeat(requests["clicks"].to_numpy(), PLACES)  # as many, wherever they were
            text = {REQUEST_ID: [f"{name}{i // PLACES}" for i in range(len(place))], "variant": name,
                    "user_id": [f"user-{p}" for p in person], ITEM: [f"i{p}" for p in place]}  # fmt: skip
            frame = pd.DataFrame({**text, POSITION: place, CLICKED: clicked,
                                  TIME: requests[TIME].to_numpy().repeat(PLACES)})  # fmt: skip
            for field in JOINED:
                if field.name not in frame:
                    filler = None if pa.types.is_list(field.type) else 1
                    frame[field.name] = "" if pa.types.is_string(field.type) else filler
            parts.append(pa.Table.from_pandas(frame, JOINED, preserve_index=False))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "joined.parquet"
            pq.write_table(pa.concat_tables(parts), file)
            seen = evidence(file, self.plan, control="a", top_k=PLACES)
        began = max(requests[TIME].min() for requests in (control, better))  # before, there was no choice
        control, better = (requests[requests[TIME] >= began] for requests in (control, better))
        return looks(control, better, self.plan, 1)[-1].comparison, seen.arms[1].beside[CTR]


def _shown(requests: pd.DataFrame, until_ms: int | None = None) -> int:
    return PLACES * int(len(requests) if until_ms is None else (requests[TIME] <= until_ms).sum())


def _error(comparison: Comparison, plan: Plan) -> float:
    """Standard error of the logarithm of the ratio, from the half width that the plan gave it."""
    radius, low, high = np.log1p(comparison.lift) - np.log1p(comparison.low), 1e-12, 10.0
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if plan.radius(middle) < radius else (low, middle)
    return float(np.sqrt(low))


def decided(outcomes: list[tuple[str, int]], right: str) -> dict[str, Any]:
    """How many decided so, or the other way, and how many items they showed until then."""
    verdicts, shown = [o[0] for o in outcomes], [o[1] for o in outcomes]
    other = {"better": "worse", "worse": "better"}[right]
    return {
        "right": verdicts.count(right), "wrong": verdicts.count(other), "of": len(outcomes),
        "shown": {"median": int(np.median(shown)), "p95": int(np.percentile(shown, 95)), "most": max(shown)},
    }  # fmt: skip


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 100,
    power: Annotated[float, typer.Option(help="of the plan that says how many users there are")] = 0.95,
    share: Annotated[float, typer.Option(help="users of interleaving, of those of the A/B")] = 0.2,
    place_people: Annotated[int, typer.Option(help="users whose clicks say how often a place is looked at")] = 400_000,
    place_seeds: int = 5,
    estimate_people: Annotated[int, typer.Option(help="users of the log that estimates are of")] = 2_000,
    users: Annotated[int, typer.Option(help="of the shop")] = ShopConfig.users,
    items: Annotated[int, typer.Option(help="of the shop")] = ShopConfig.items,
) -> None:
    began, plan = time.monotonic(), Plan(power=power)
    e = Experiments(ShopConfig(users=users, items=items), plan)
    people = {p: e.users_for(replace(plan, power=p)) for p in (0.8, power)}
    n = people[power]
    result: dict[str, Any] = {
        "users_for_power": people, "hours": HOURS, "ctr": e.control.ctr,
        "ratio": {"better": e.better.ctr / e.control.ctr, "worse": e.worse.ctr / e.control.ctr},
    }  # fmt: skip
    _say(began, "versions", result)
    by_looks, by_file = e.through_a_file(0, n)
    assert np.allclose(astuple(by_looks), astuple(by_file), rtol=1e-9, atol=0), (by_looks, by_file)
    ab = {right: decided([e.ab(s, n, v) for s in range(seeds)], right) for right, v in _versions(e)}
    _say(began, "A/B", ab)
    equal = np.array([e.equal(s, n) for s in range(seeds)])
    aa = {"called": int(equal[:, 0].sum()), "by_a_usual_interval": int(equal[:, 1].sum()), "of": seeds}
    _say(began, "A/A", aa)
    looked_at_K = looked_at(e.places(0, n, by_moment=True) * EXAMINED)  # of a log of before, as long as the A/B's
    interleaving = {
        how: interleaved(e, shared, seeds, round(n * share), ab, looked_at_K) for how, shared in ALIKE.items()
    }
    _say(began, "interleaving", interleaving)
    places = {
        how: np.round([e.places(s, place_people, by_moment) for s in range(place_seeds)], 3)
        for how, by_moment in (("same user and item", False), ("same moment too", True))
    }
    _say(began, "places", places)
    covered = [e.estimated(s, estimate_people) for s in range(seeds)]
    estimates = {
        "covered": sum(c for c, _ in covered),
        "of": seeds,
        "half_width": float(np.median([w for _, w in covered])),
    }
    _say(began, "doubly robust", estimates)
    seconds = round(time.monotonic() - began)
    print(
        record_line(
            "population", seeds=seeds, effect=plan.effect, alpha=plan.alpha, power=power, seconds=seconds, **result,
            ab=ab, aa=aa, looked_at=looked_at_K.round(4).tolist(),
            interleaving=interleaving, places={k: v.tolist() for k, v in places.items()},
            doubly_robust=estimates,
        )
    )  # fmt: skip


def interleaved(
    e: Experiments, shared: float, seeds: int, people: int, ab: dict[str, Any], looked_at_K: np.ndarray
) -> dict[str, Any]:
    """Outcomes with versions that share so much of their errors, beside those of the A/B: items shown until the
    decision, at the median and where 95 % of the seeds have one."""
    control, better, worse = e.versions(shared)
    equal = e.population.version_of(BETTER, control.ctr, shared)
    outcomes = {
        right: [e.interleaved(s, people, control, version, looked_at_K) for s in range(seeds)]
        for right, version in (("better", better), ("worse", worse), ("equal", equal))
    }
    figures: dict[str, Any] = {"overlap@10": e.population.overlap(control, better)}
    for how in ("lift", "won"):
        figures[how] = {}
        for right in ("better", "worse"):
            of = decided([outcome[how] for outcome in outcomes[right]], right)
            beside = {what: of["shown"][what] / ab[right]["shown"][what] for what in ("median", "p95")}
            figures[how][right] = of | {"shown_beside_ab": beside}
        figures[how]["equal_called"] = sum(outcome[how][0] != UNDECIDED for outcome in outcomes["equal"])
    return figures


def _versions(e: Experiments) -> tuple[tuple[str, Version], tuple[str, Version]]:
    return ("better", e.better), ("worse", e.worse)


def _say(began: float, what: str, figures: Any) -> None:
    print(f"{time.monotonic() - began:5.0f} s  {what}: {figures}", flush=True)


if __name__ == "__main__":
    typer.run(main)
