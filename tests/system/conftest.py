"""What is compared in a test is asked within one hour."""

from __future__ import annotations

import time

import pytest

HOUR_S, CLEAR_S = 3600, 30


@pytest.fixture(autouse=True)
def within_an_hour() -> None:
    """The models read the hour, so the same question may have another answer after it is over. A test that may take
    longer than CLEAR_S says in its questions what time it is: ``tests.support.NOON``."""
    left_s = HOUR_S - time.time() % HOUR_S
    if left_s < CLEAR_S:
        time.sleep(left_s + 0.1)
