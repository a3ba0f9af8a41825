"""Two rankings in one answer, and which of them its clicks speak for: interleaving by team draft.

Source: Radlinski, Kurup and Joachims 2008, "How does clickthrough data reflect retrieval quality?", algorithm 2. Both
teams pick in turn, each the best of its ranking that is not taken; who begins a round is drawn by a coin. The coins are
a hash of the request's id: whoever has the two rankings and the id can draft the answer again, and no caller is
favoured.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
NOBODY = ""  # in a team's place: a click there tells nothing


@dataclass(frozen=True)
class Draft(Generic[Item]):
    """``items`` in the order shown; of each the team that picked it, 0 or 1, its place in that team's ranking, from 0,
    and whether a click on it tells the teams apart: not where the same item would stand there whichever way the coin of
    its round falls, as where both rankings begin alike. There the team is the coin's, and the click noise. What is left
    out does not depend on the coin, so clicks by chance still speak for each team as often."""

    items: list[Item]
    teams: list[int]
    places: list[int]
    tells: list[bool]

    def credited(self, names: Sequence[str]) -> list[str]:
        """Of each item the name of the team that a click on it speaks for, or NOBODY."""
        return [names[team] if tells else NOBODY for team, tells in zip(self.teams, self.tells, strict=True)]


def coins(request_id: str, rounds: int, salt: str = "") -> list[int]:
    """Who begins each round, 0 or 1. Another salt, other coins for the same request."""
    digest = hashlib.shake_256(f"{salt}\0{request_id}".encode()).digest(-(-rounds // 8))
    return [digest[r // 8] >> r % 8 & 1 for r in range(rounds)]


def draft(first: Sequence[Item], second: Sequence[Item], count: int, request_id: str, salt: str = "") -> Draft[Item]:
    """At most ``count`` items of the rankings of team 0 and 1, best first each. A team whose ranking is at its end
    picks no more; the other goes on. Rankings of ``count`` items each are enough to fill the answer."""
    drafted = Draft[Item]([], [], [], [])
    taken: set[Item] = set()
    rankings, at = (first, second), [0, 0]
    for begins in coins(request_id, -(-count // 2) or 1, salt):
        picked = _round(drafted, rankings, at, taken, begins, count)
        if not picked:
            break
    while len(drafted.items) < count and _round(drafted, rankings, at, taken, 0, count):
        pass  # what is left of one of them
    return drafted


def chances(first: Sequence[Item], second: Sequence[Item], count: int) -> dict[Item, list[float]]:
    """How likely ``draft`` shows each item at each place over all coins, [count] of each item that it may show. Coins
    that leave the same items to be drafted are gone on with together, which are most."""
    rankings, tossed = (first, second), -(-count // 2) or 1
    out: dict[Item, list[float]] = {}
    likely: dict[frozenset[Item], float] = {frozenset(): 1.0}
    for number in itertools.count():
        after: dict[frozenset[Item], float] = {}
        coin = (0, 1) if number < tossed else (0,)
        for (taken, chance), begins in itertools.product(likely.items(), coin):
            picked, now_taken = Draft[Item]([], [], [], []), set(taken)
            if not _round(picked, rankings, [0, 0], now_taken, begins, count - len(taken)):
                continue
            key = frozenset(now_taken)
            after[key] = after.get(key, 0.0) + chance / len(coin)
            for place, item in enumerate(picked.items, len(taken)):
                out.setdefault(item, [0.0] * count)[place] += chance / len(coin)
        if not after:
            return out
        likely = after
    raise AssertionError  # a draft ends


def _round(
    drafted: Draft[Item], rankings: Sequence[Sequence[Item]], at: list[int], taken: set[Item], begins: int, count: int
) -> bool:
    """One pick of each team; whether there was any. ``at``: where each has got to in its ranking."""
    before, alike = len(drafted.items), True
    for team in (begins, 1 - begins):
        best = [_best(ranking, at, t, taken) for t, ranking in enumerate(rankings)]
        alike = alike and best[0] == best[1]
        if best[team] is None or len(drafted.items) >= count:
            continue
        item = rankings[team][at[team]]
        taken.add(item)
        drafted.items.append(item)
        drafted.teams.append(team)
        drafted.places.append(at[team])
        drafted.tells.append(not alike)
    return len(drafted.items) > before


def _best(ranking: Sequence[Item], at: list[int], team: int, taken: set[Item]) -> Item | None:
    """The best of a team's ranking that is not taken; None at its end. Moves the team there."""
    while at[team] < len(ranking) and ranking[at[team]] in taken:
        at[team] += 1
    return ranking[at[team]] if at[team] < len(ranking) else None


def winner(teams: Sequence[Hashable], clicked: Sequence[bool], first: Hashable = 0) -> int:
    """Of one request: -1 where more of team ``first``'s items were clicked, 1 where more of the other's, 0 for a tie,
    which says nothing. ``teams``: of each item shown, as ``clicked``, or NOBODY."""
    telling = (team for team, click in zip(teams, clicked, strict=True) if click and team != NOBODY)
    lead = sum(1 if team != first else -1 for team in telling)
    return (lead > 0) - (lead < 0)
