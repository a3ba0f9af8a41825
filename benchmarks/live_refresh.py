"""What a look at what is rising costs a server: it is taken five times a second, whatever is asked.

    python -m benchmarks.live_refresh --items 50000

Of a table of live counters that holds an hour of 36,000 events in three columns of context, processor time of adding
two events and working out the rising items anew. One thread, no server. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

from loadtest.reports.record import record_line
from vivace.contract import FIRST_ID
from vivace.live import LiveTable

EVENTS, COLUMNS, HOUR_MS, EVERY_MS, NOW_MS = 36_000, 3, 3_600_000, 200, 1_700_000_000_000


def looks_ms(items: int, rising: int, fresh: int, looks: int) -> np.ndarray:
    """Processor time of each look float64 [looks], in ms."""
    rng, table = np.random.default_rng(0), LiveTable(items + FIRST_ID, rising, COLUMNS, fresh)
    ids = rng.zipf(1.3, EVENTS) % items + FIRST_ID
    times = np.sort(NOW_MS - rng.integers(0, HOUR_MS, EVENTS))
    context = rng.integers(FIRST_ID, 8, (EVENTS, COLUMNS))
    table.add(ids, times, rng.random(EVENTS) < 0.2, context, ids)
    table.moment(NOW_MS)
    out = np.empty(looks)
    for look in range(looks):
        now_ms, two = NOW_MS + (look + 1) * EVERY_MS, slice(2 * look, 2 * look + 2)
        before = time.process_time()
        table.add(ids[two], np.full(2, now_ms - 1), np.array([True, False]), context[two], ids[two])
        table.moment(now_ms)
        out[look] = (time.process_time() - before) * 1000
    return out


def main(
    items: Annotated[int, typer.Option(help="of the catalogue", min=100)] = 5_000,
    rising: Annotated[int, typer.Option(help="items that join the candidates", min=1)] = 100,
    fresh: Annotated[int, typer.Option(help="the same of items that were put in live", min=0)] = 16,
    looks: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    spent = looks_ms(items, rising, fresh, looks)
    low, median, high = (round(float(np.percentile(spent, q)), 3) for q in (5, 50, 95))
    print(f"processor time of a look: {median} ms ({low} to {high}), of {items:,} items")
    print(record_line("live refresh", items=items, rising=rising, fresh=fresh, looks=looks, median_ms=median,
                      p5_ms=low, p95_ms=high))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
