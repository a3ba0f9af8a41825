"""What it costs to work out the live counters of a log's requests, as ``vivace train`` and ``evaluate --replay`` do.

    python -m benchmarks.live_features artifacts/news48 --requests 6398

Processor time of the stream of events that count, by the limits of ``news-live``, and of the features of the test
requests with that stream; no model is needed. One process. The last line of stdout is one JSON object, with a digest of
all features, so that two versions can be held beside each other.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated

import typer

from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.data.live import LiveAt
from training.presets import preset, shapes
from vivace.limits import CountLimits
from vivace.run import Run


def main(
    run: Annotated[Path, typer.Argument(help="a prepared run's folder")],
    requests: Annotated[int, typer.Option(help="of the test, the first so many", min=1)] = 10_000,
) -> None:
    features, sizes = Features(Run(run).features), preset("news-live")
    tensors = shapes(sizes, features)
    columns, limits = features.context, CountLimits.of(tensors)
    before = time.process_time()
    events = len(features.stream(columns, limits))
    stream_s = time.process_time() - before
    before = time.process_time()
    live = LiveAt.of_part(features, "test", tensors.rising, columns, limits, most=requests)
    seconds, count = time.process_time() - before, len(live.ids)
    digest = hashlib.sha256(live.ids.tobytes() + live.features.tobytes()).hexdigest()[:16]
    print(f"{events:,} events that count: {stream_s:.2f} s; with them {count:,} requests: {seconds:.2f} s; {digest}")
    print(record_line("live features", requests=count, events=events, stream_s=round(stream_s, 3),
                      seconds=round(seconds, 3), digest=digest))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
