"""Are two answers the same? Place by place, in order; items of nearly equal score may change places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vivace.contract import HOUR, WEEKDAY

NO_CLOCK = {HOUR: None, WEEKDAY: None}  # CONTEXT of a request whose answer must not change with the hour
TIE = 1e-4  # scores nearer than this are a tie: float32 sums in another order differ by about 1e-5


@dataclass(frozen=True)
class Agreement:
    """Of answers compared with expected ones: how many, how many are equal in order, and of their places those that
    are equal, those that differ by a tie alone and those that are wrong."""

    answers: int
    answers_equal: int
    places: int
    places_tied: int
    places_wrong: int

    @property
    def share(self) -> float:
        """Places that are equal or tied, as a share of all."""
        return 1 - self.places_wrong / max(self.places, 1)

    def __str__(self) -> str:
        return (
            f"{self.answers_equal:,} of {self.answers:,} answers equal in order; of {self.places:,} places "
            f"{self.places_tied:,} differ by a tie and {self.places_wrong:,} are wrong ({self.share:.3%} right)"
        )


def differing(expected: Sequence[str], scores: Sequence[float], items: Sequence[str]) -> tuple[int, int]:
    """(tied, wrong) places of ``items`` beside the first ``len(items)`` of ``expected``, whose ``scores`` fall. A place
    is tied where the item that stands there has, by ``scores``, the score of the item that should. An item too many is
    wrong."""
    place_of, tied, wrong = {item: place for place, item in enumerate(expected)}, 0, 0
    for place, item in enumerate(items):
        if place < len(expected) and item == expected[place]:
            continue
        own_place = place_of.get(item)
        is_tie = own_place is not None and place < len(expected) and abs(scores[place] - scores[own_place]) < TIE
        tied, wrong = tied + int(is_tie), wrong + int(not is_tie)
    return tied, wrong + len(items) - len(set(items))


def agreement(
    expected: Iterable[tuple[Sequence[str], Sequence[float]]], answers: Iterable[Sequence[str]], length: int
) -> Agreement:
    """Compares ``length`` places of each answer; ``expected``: items and scores, best first, which may go on beyond
    ``length`` so that a tie with what comes after it is seen."""
    count = equal = places = tied_places = wrong_places = 0
    for (items, scores), answer in zip(expected, answers, strict=True):
        due = min(length, len(items))
        tied, wrong = differing(items, scores, answer[:length])
        wrong += max(0, due - len(answer))
        count, places = count + 1, places + max(due, min(length, len(answer)))
        equal += list(answer[:length]) == list(items[:due])
        tied_places, wrong_places = tied_places + tied, wrong_places + wrong
    return Agreement(count, equal, places, tied_places, wrong_places)
