"""What it is worth to encode only a history's new events: processor time of the encoder, anew against reused.

    python -m benchmarks.state_reuse --turns 5 --out docs/benchmarks/state_reuse.json

Both forms are ONNX graphs in this process with one thread, and take turns. "anew": the graph ``encoder.onnx``, as
exported for a whole history. "reused": ``GrownHistories``, hash, look-up, copies and all. One event is appended to a
history of 200, 1,000 and 4,096 events, one request at a time. "replay": users' histories grow event by event in the
order of a generated log; the first half fills the cache of ``--room-mb``, the second is timed: what hits, grows and
misses is as it falls. Weights are random: they do not change the time. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.turns import in_turns, spread, with_spread
from loadtest.reports.record import record_line
from serving.runtime.cache_settings import StateSettings
from serving.runtime.encoded import Encoder
from serving.runtime.grown import GROWN, HIT, MISSED, GrownHistories
from serving.runtime.state_cache import keys_of
from serving.segments import Segments
from training.compile.onnx_export import export_steps
from training.compile.shards import export_encoder
from training.models.encoders import EncoderConfig
from training.models.retrieval import RetrievalModel
from vivace import contract, windows
from vivace.onnx_session import session_options

ITEMS, CANDIDATES, SEED = 3_000, 100, 7
LENGTHS = (200, 1_000, 4_096)
BUDGET_S = 4.0  # of one form in one turn, about
ANEW, REUSED = "anew", "reused"
Inputs = list[np.ndarray]


def config_of(family: str, length: int) -> EncoderConfig:
    """The preset ``cpu`` with states that stay."""
    values: Any = {"family": family, "position_bias": "relative" if family == "sasrec" else "none"}
    return EncoderConfig(
        history=length, positions="none", slide=max(1, length // 8), context=False, types=False, **values
    )  # fmt: skip


def compiled(config: EncoderConfig, folder: Path) -> contract.StageTensors:
    """Both forms of an encoder with random weights in ``folder``."""
    torch.manual_seed(SEED)
    model = RetrievalModel(config, ITEMS, torch.ones(ITEMS)).eval()
    s = contract.StageTensors(config.history, CANDIDATES, ITEMS, config.width, slide=config.slide)
    example = [torch.from_numpy(x) for x in inputs_of([np.arange(3, 3 + min(100, config.history))], config)]
    export_encoder(model, s, example, folder)
    export_steps(model, s, example, folder)
    return s


def read(ids: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Of ids int64 [n] those that a server reads."""
    return ids[len(ids) - windows.newest(ids, config.history, config.slide) :]


def before_one_more(config: EncoderConfig, rng: np.random.Generator) -> np.ndarray:
    """Ids int64 [n] of the longest history, of some, whose window stays where it is with one event more."""
    ids = rng.integers(contract.FIRST_ID, ITEMS, config.history + 4 * config.slide)
    counts = [len(read(ids[:n], config)) for n in range(config.history, len(ids))]
    stay = [(count, n) for n, (count, after) in enumerate(zip(counts, counts[1:], strict=False)) if after == count + 1]
    return ids[: config.history + max(stay)[1]]


def inputs_of(histories: Sequence[np.ndarray], config: EncoderConfig) -> Inputs:
    """Inputs of retrieval for ids int64 [n], cut as a server cuts them."""
    ids_BT = np.zeros((len(histories), config.history), np.int64)
    for row, ids in zip(ids_BT, histories, strict=True):
        events = read(ids, config)
        row[config.history - len(events) :] = events
    return [ids_BT, np.zeros((len(histories), ITEMS), bool)]


def shared(folder: Path, s: contract.StageTensors, room_mb: int) -> GrownHistories:
    """With an empty cache, where a server has its."""
    segments = Segments()
    try:
        return GrownHistories(folder, s, StateSettings(room_mb << 20).at(segments), session_options(1))
    finally:
        segments.remove()  # the open file stays


def processor_ms(call: Callable[[], object]) -> float:
    """Processor time of this process."""
    began = time.process_time()
    call()
    return (time.process_time() - began) * 1000


def appended(family: str, length: int, turns: int) -> dict[str, Any]:
    """One event appended to a history of nearly ``length``, again and again with another event."""
    config, rng = config_of(family, length), np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as name:
        s = compiled(config, Path(name))
        whole, grown = Encoder(Path(name), s), shared(Path(name), s, 256)
        before = before_one_more(config, rng)
        grown(inputs_of([before], config))
        longer = read(np.append(before, 5), config)[:, None]
        entry = grown.cache.find(keys_of(longer, grown.model), longer)
        assert entry is not None and entry.states is not None
        kept = (keys_of(entry.events, grown.model), entry.events, entry.states, entry.encoded, None)
        size = sum(x.nbytes for x in (entry.events, entry.states, entry.encoded))
        apart = 0.0

        def once(form: str) -> float:
            """A question that nobody asked before; the history before it is kept."""
            nonlocal apart
            ids = np.append(before, rng.integers(contract.FIRST_ID, ITEMS))
            asked = inputs_of([ids], config)
            if form == ANEW:
                return processor_ms(lambda: whole(asked))
            took = processor_ms(lambda: grown(asked))
            grown.cache.put([kept])  # as before the event: the history without it
            return took

        ids = np.append(before, 5)
        apart = float(np.abs(whole(inputs_of([ids], config))[1] - grown(inputs_of([ids], config))).max())
        repeats = max(2, min(50, int(BUDGET_S * 1000 / max(once(ANEW), 1.0) / 2)))
        times: dict[str, list[float]] = {ANEW: [], REUSED: []}
        for _, form in in_turns(turns, (ANEW, REUSED)):
            once(form)
            times[form].append(float(np.median([once(form) for _ in range(repeats)])))
    return _record(times, family=family, history=length, repeats=repeats, kib_a_user=size / 1024, apart=apart)


def _record(times: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    ratios = [a / r for a, r in zip(times[ANEW], times[REUSED], strict=True)]
    return {**more, "anew_ms": spread(times[ANEW]), "reused_ms": spread(times[REUSED]), "ratio": spread(ratios)}


def log_of(users: int, events: int, length: int) -> list[tuple[int, np.ndarray]]:
    """(user, history so far) of each request: users by a power law, each asks once after each of its events, and one
    time in three once more. Histories begin at ``length`` of a longer past, in which windows slide."""
    rng = np.random.default_rng(SEED)
    share = 1 / np.arange(1, users + 1)
    order = rng.choice(users, events, p=share / share.sum())
    past = {u: rng.integers(contract.FIRST_ID, ITEMS, int(rng.integers(length // 2, 2 * length))) for u in range(users)}
    asked = []
    for user in order:
        past[user] = np.append(past[user], rng.integers(contract.FIRST_ID, ITEMS))
        asked += [(int(user), past[user])] * (2 if rng.random() < 1 / 3 else 1)
    return asked


def replayed(family: str, length: int, turns: int, room_mb: int, events: int) -> dict[str, Any]:
    """The second half of the same requests by both forms; the first has filled the cache."""
    config = config_of(family, length)
    asked = [inputs_of([ids], config) for _, ids in log_of(max(20, events // 8), events, length)]
    with tempfile.TemporaryDirectory() as name:
        s, times = compiled(config, Path(name)), {ANEW: list[float](), REUSED: list[float]()}
        whole, half = Encoder(Path(name), s), len(asked) // 2
        for _, form in in_turns(turns, (ANEW, REUSED)):
            grown = shared(Path(name), s, room_mb)
            encode: Callable[[Inputs], object] = whole if form == ANEW else grown
            for before in asked[:half] if form == REUSED else ():
                grown(before)
            grown.rows.clear()
            took = processor_ms(lambda encode=encode: [encode(x) for x in asked[half:]])  # type: ignore[misc]
            times[form].append(took / (len(asked) - half))
            if form == REUSED:
                rows, evicted = dict(grown.rows), grown.cache.evicted
    shares = {how: rows.get(how, 0) / (len(asked) - half) for how in (HIT, GROWN, MISSED)}
    return _record(times, family=family, history=length, requests=len(asked), shares=shares, evicted=evicted)


def main(
    turns: Annotated[int, typer.Option(help="of each form", min=1)] = 5,
    family: Annotated[str, typer.Option(help="sasrec, hstu or both by a comma")] = "sasrec,hstu",
    lengths: Annotated[str, typer.Option(help="events of a history")] = ",".join(map(str, LENGTHS)),
    events: Annotated[int, typer.Option(help="of the replay at the least length; 0: no replay")] = 400,
    room_mb: Annotated[int, typer.Option(help="of the replay's cache")] = 256,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures")] = None,
) -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"appended": [], "replayed": []}
    sizes = [int(n) for n in lengths.split(",")]
    for each in family.split(","):
        for length in sizes:
            record = appended(each, length, turns)
            figures["appended"].append(record)
            typer.echo(
                f"{each} {length}: anew {with_spread(record['anew_ms'], 2)} ms, reused "
                f"{with_spread(record['reused_ms'], 2)} ms, ratio {with_spread(record['ratio'], 1)}"
            )
        for length in sizes[: 2 if events else 0]:
            record = replayed(each, length, turns, room_mb, events * sizes[0] // length)
            figures["replayed"].append(record)
            typer.echo(f"{each} {length}, replay: ratio {with_spread(record['ratio'], 1)}, {record['shares']}")
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    typer.echo(record_line("state_reuse", figures=figures))


if __name__ == "__main__":
    typer.run(main)
