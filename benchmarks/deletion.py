"""Whether explanations name what matters: rank and score of a recommended item without the named events, and without as
many random ones of the same history.

    python -m benchmarks.deletion artifacts/shop --cases 500

Of each user the answer's first item and one drawn from the rest of the first ``--top-k``. Comprehensiveness: what the
score loses without the named events (the largest reasons, as many as ``--named``). Sufficiency: what it loses with the
named ones alone (small is good). DeYoung et al., "ERASER", ACL 2020. Intervals are 95 %, by bootstrap over users. Then
the smallest sets, as the served call looks for them: whether each does what it says, and whether any smaller set of the
same history does it too, by trying all. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer

from loadtest.reports.record import record_line
from preprocessing.features import Features
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.runtime.variants import Left
from serving.runtime.why import SERVED_MOST, SERVED_TRIED, Counterfactuals
from vivace.columns import USER
from vivace.run import Run
from vivace.store.opening import store_of_worker

LEAST = 4  # distinct items of a history: of fewer nothing is left to compare with
SEED, DRAWS = 7, 2000


def interval(of_users: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean of all values with the bounds of a 95 % interval, by bootstrap over users."""
    sums = np.array([(sum(values), len(values)) for values in of_users])
    drawn = np.random.default_rng(SEED).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn, 0].sum(1) / sums[drawn, 1].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(sums[:, 0].sum() / sums[:, 1].sum()), "low": float(low), "high": float(high)}


def figures(interval_of: dict[str, float], digits: int = 2) -> str:
    return "{mean:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**interval_of, d=digits)


class Case:
    """One recommended item of one request, ``named``: so many of its largest reasons among the history."""

    def __init__(self, asked: Counterfactuals, id_: int, named: int) -> None:
        self.asked, self.id = asked, id_
        self.named: Left = frozenset(np.argsort(-asked.drops(id_)[: asked.of_history], kind="stable")[:named].tolist())

    def stands(self, left: Left) -> tuple[float, float]:
        """(place, what the score has lost); an item that is no candidate any more stands behind all candidates with the
        last one's score."""
        answer = self.asked[left]
        place, score = self.asked.at(self.id, left)
        last = len(answer.at)
        whole = self.asked.score(self.id)
        return (place, whole - score) if place else (last + 1, whole - float(answer.values[0, last - 1]))

    def deleted(self, rng: np.random.Generator) -> dict[str, float]:
        """Place and lost score: as answered, without the named, without random ones, with the named ones alone."""
        units = range(self.asked.of_history)
        drawn = frozenset(rng.choice(len(units), len(self.named), replace=False).tolist())
        out = {}
        every = frozenset(units)
        lefts = {"whole": frozenset[int](), "named": self.named, "random": drawn}
        for how, left in (lefts | {"named alone": every - self.named, "random alone": every - drawn}).items():
            out[f"{how}, place"], out[f"{how}, lost"] = self.stands(left)
        out["falls farther than random"] = float(out["named, place"] > out["random, place"])
        return out


def is_least(asked: Counterfactuals, id_: int, left: Left) -> bool:
    """Whether no smaller set of the history's parts does what ``left`` does, by trying all."""
    smaller = [
        frozenset(units)
        for size in range(1, len(left))
        for units in itertools.combinations(range(asked.of_history), size)
    ]
    asked.ask(smaller)
    return not any(asked.is_gone(id_, other) for other in smaller)


def sets_of(asked: Counterfactuals, ids: list[int]) -> dict[str, list[float]]:
    """What the served call's sets are worth, of items of one answer."""
    out = defaultdict[str, list[float]](list)
    for id_, left in asked.smallest_of(ids, tried=SERVED_TRIED, most=SERVED_MOST).items():
        out["has a set"].append(float(left is not None))
        if left is not None:
            out["does it"].append(float(asked.is_gone(id_, left)))
            out["is least"].append(float(is_least(asked, id_, left)))
            out["size"].append(float(len(left)))
    return out


def shuffled_users(run: Run, rng: np.random.Generator) -> list[str]:
    """Users of the test split, in random order."""
    files = Features(run.features).files("test")
    users = {user for file in files for user in pq.read_table(file, columns=[USER])[USER].to_pylist()}
    order: list[str] = rng.permutation(sorted(users)).tolist()
    return order


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run")],
    cases: Annotated[int, typer.Option(help="recommended items, two of a user")] = 500,
    named: Annotated[int, typer.Option(help="events of an explanation")] = 2,
    top_k: int = 10,
) -> None:
    run, rng = Run(root), np.random.default_rng(SEED)
    deleted, sets = list[list[dict[str, float]]](), defaultdict[str, list[float]](list)
    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        pipeline = Pipeline.published(root, store)
        for user in shuffled_users(run, rng):
            if 2 * len(deleted) >= cases:
                break
            asked = Counterfactuals(pipeline, Row(user, None, top_k))
            shown = asked.shown().tolist()
            if asked.of_history < LEAST or len(shown) < 2:
                continue
            ids = [shown[0], int(rng.choice(shown[1:]))]
            deleted.append([Case(asked, id_, named).deleted(rng) for id_ in ids])
            for name, values in sets_of(asked, ids).items():
                sets[name] += values
    if not deleted:
        raise RuntimeError(f"{root}: no user of the test split has {LEAST} items and more in the store")
    result = {name: interval([[case[name] for case in of_user] for of_user in deleted]) for name in deleted[0][0]}
    for name, of in result.items():
        print(f"{name:28} {figures(of)}")
    least = {name: float(np.mean(values)) for name, values in sets.items()}
    print(f"sets: {least}, of {len(sets['is least'])}")
    print(record_line("deletion", run=root.name, cases=2 * len(deleted), named=named, top_k=top_k, results=result,
                      sets=least | {"sets": len(sets["is least"])}))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
