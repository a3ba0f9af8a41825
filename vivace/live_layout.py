"""How many numbers the live counters say of an item, and of which half-lives."""

from __future__ import annotations

LIVE_HALF_LIVES_MS = tuple(minutes * 60_000 for minutes in (3, 10, 30, 120, 720))
LIVE_FEATURES = 4 * len(LIVE_HALF_LIVES_MS) + 1
SHOWN_FEATURES = 2 * len(LIVE_HALF_LIVES_MS)


def live_features(columns: int, shown: bool = False) -> int:
    """Numbers of a rising item in the context of a request, of whose columns so many are counted by; ``shown``: with
    how often it was shown, which come last (``vivace.live_shown``)."""
    return LIVE_FEATURES + 2 * columns + 2 + shown * SHOWN_FEATURES
