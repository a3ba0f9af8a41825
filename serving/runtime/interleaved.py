"""The served version beside the one on trial, in one process: both answer a request, and a draft of the two is shown.

Axis legend: B rows, N candidates, C values of a candidate, K answered items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.runtime.overload import Level
from serving.runtime.pipeline import Pipeline
from serving.runtime.ruled import Rules
from serving.runtime.stages import Row
from serving.runtime.team_draft import draft
from vivace import contract
from vivace.impressions.queue import Drafts
from vivace.store.interface import ServingStore

if TYPE_CHECKING:
    from search.online import SearchOptions

ENVIRONMENT = "VIVACE_INTERLEAVE"  # what a server tells its workers: JSON of ``Interleave``


@dataclass(frozen=True)
class Interleave:
    """The served version, for the server of the one on trial. ``parameters``: of its configuration as one process.
    ``salt``: of the coins."""

    release: str
    version: str
    parameters: dict[str, str]
    salt: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Interleave:
        return cls(**json.loads(text))


class Interleaved:
    """The served version in a process that serves the one on trial, ``version``. Team 0 is the served one. ``rules``:
    the run's file of business rules."""

    def __init__(self, settings: Interleave, version: str, store: ServingStore, threads: int, rules: Path) -> None:
        given = settings.parameters
        shapes = contract.StageTensors(**json.loads(given["shapes"]))
        seen, ranked = given["exclude_seen"] == "true", int(given["ranked"])
        release = Path(settings.release)
        self.pipeline = Pipeline(release, settings.version, shapes, store, seen, threads, ranked)
        self.business = Rules(rules, release / contract.RESPONSE / settings.version, self.pipeline.respond)
        self.teams, self.salt = (settings.version, version), settings.salt

    def ranked(
        self, rows: Sequence[Row], options: Sequence[SearchOptions | None], level: Level
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int64 [B, N], values float32 [B, C, N], status object [B]) as the served version answers the rows."""
        (ids_BN, values_BCN), _, statuses = self.pipeline(rows, level)
        if self.pipeline.search is not None:
            queries = [row.query for row in rows]
            unwanted = self.pipeline.unwanted(rows, options)
            (ids_BN, values_BCN), _ = self.pipeline.searched(queries, options, unwanted, (ids_BN, values_BCN))
        return ids_BN, values_BCN, np.array(statuses, object)

    def drafted(
        self, served: Sequence[np.ndarray], tried: Sequence[np.ndarray], row_ids: Sequence[str]
    ) -> tuple[list[np.ndarray], Drafts]:
        """Of the answers of both to one request, each ITEM_ID (object [B, K]), SCORE and the heads (float32 [B, K]):
        what is shown, in the same order and types, and what is to be known of it when it is clicked."""
        both = (served, tried)
        rankings = [[[item for item in row if item] for row in of[0].tolist()] for of in both]
        shown = max(of[0].shape[1] for of in both)
        drafts = [
            draft(first, second, max(len(first), len(second)), row_id, self.salt)
            for first, second, row_id in zip(*rankings, row_ids, strict=True)
        ]
        items = np.full((len(drafts), shown), b"", object)
        teams = np.full((len(drafts), shown), "", object)
        values = [np.zeros((len(drafts), shown), np.float32) for _ in served[1:]]
        for row, drafted in enumerate(drafts):
            count = len(drafted.items)
            items[row, :count] = drafted.items
            teams[row, :count] = drafted.credited(self.teams)
            for value, *of_both in zip(values, served[1:], tried[1:], strict=True):
                picks = zip(drafted.teams, drafted.places, strict=True)
                value[row, :count] = [of_both[team][row, place] for team, place in picks]
        return [items, *values], Drafts(teams, (served[0], tried[0]))


def both_statuses(tried_B: np.ndarray, served_B: np.ndarray) -> np.ndarray:
    """STATUS of rows that two versions answered, object [B]: what is amiss with either."""
    return np.where(tried_B == contract.STATUS_OK, served_B, tried_B)


def both_rules(tried_B: np.ndarray, served_B: np.ndarray) -> np.ndarray:
    """STATUS of drafted rows, object [B]: the business rules that changed either version's answer."""
    mark, out_B = f"; {contract.STATUS_RULES}".encode(), tried_B.copy()
    for row, (tried, served) in enumerate(zip(tried_B, served_B, strict=True)):
        status, _, names = tried.partition(mark)
        if all_names := [n for n in dict.fromkeys([*names.split(b", "), *served.partition(mark)[2].split(b", ")]) if n]:
            out_B[row] = status + mark + b", ".join(all_names)
    return out_B


def settings_of(environment: str) -> Interleave | None:
    """Of the worker of a server that was told to (``environment``: of ENVIRONMENT); None where it was not."""
    return Interleave.from_json(environment) if environment else None


def differing(served: Sequence[Any], tried: Sequence[Any]) -> str:
    """Why two versions cannot answer in one, by the outputs of their configurations; "" where they can."""
    names = [[output.name for output in of] for of in (served, tried)]
    if names[0] == names[1]:
        return ""
    has, answers = (", ".join(of) for of in names)
    return f"expected the outputs of the served version, {has}, got {answers}"
