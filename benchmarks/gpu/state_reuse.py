"""Step of the GPU kit: what it is worth to encode only a history's newest event, at 200, 1,000 and 4,096 events.

    python -m benchmarks.gpu.state_reuse --out FOLDER --seconds 40

"anew" encodes the whole history, of which the newest row is asked for; "step" is the graph ``encoder_step`` for one new
event beside the states of the others, which lie on the device; "step_host" first copies them from pinned host memory,
as a cache in the server's memory has them. Preset ``base`` with states that stay, and the same as HSTU; products in
TF32, each form captured as one CUDA graph. ``apart`` is the largest difference of an encoding. Memory is that of the
states of one user.

Expected before the first run (H100): encoding anew is bound by the bias that attention reads (heads x T x T floats):
0.3 ms at 200 events, 1 at 1,000, 10 and more at 4,096 of one request; a step reads 3 KB an event, so it is bound by
launches, about 0.1 ms at any length. Ratio: 2, 8 and 80 at one request; copied from the host (12 MiB at 4,096, at 25
GB/s) 15 at 4,096.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import clock, steps
from benchmarks.gpu.record import Figures
from benchmarks.gpu.steps import Asked
from training.models.encoders import EncoderConfig
from training.models.retrieval import EncoderStepGraph, RetrievalModel, states_of_event
from training.presets import preset
from vivace.contract import FIRST_ID

ITEMS = 50_000
LENGTHS, BATCHES = (4096, 1000, 200), (1, 16, 64)  # the longest first: what the claim is about
MOST_BYTES = 30e9  # of the biases that encoding anew reads
NEEDED_S = 2.0


def config_of(name: str, family: str, length: int) -> EncoderConfig:
    """A preset's encoder whose states stay while a history grows."""
    values: Any = {"family": family, "position_bias": "relative" if family == "sasrec" else "none"}
    encoder = preset(name).encoder
    return replace(
        encoder, history=length, positions="none", slide=max(1, length // 8), context=False, types=False, **values
    )


def points(cpu: bool) -> Iterator[tuple[str, str, int, int]]:
    """(preset, family, events, batch) in order of worth."""
    if cpu:
        yield from (("tiny", "sasrec", 64, 2), ("tiny", "hstu", 64, 2))
        return
    for family in ("sasrec", "hstu"):
        yield from (("base", family, length, batch) for length in LENGTHS for batch in BATCHES)


class Encoders:
    """Both forms of one encoder with random weights on a device."""

    def __init__(self, config: EncoderConfig, items: int, where: torch.device) -> None:
        torch.manual_seed(7)
        with where:
            self.model = RetrievalModel(config, items, torch.ones(items)).eval().requires_grad_(False)
            for block in self.model.encoder.blocks:  # type: ignore[union-attr]
                if block.relative is not None:
                    torch.nn.init.normal_(block.relative.bias_RA, std=0.5)
            self.graph, self.table = EncoderStepGraph(self.model).eval(), self.model.table().detach()
        self.config, self.items, self.where = config, items, where

    def anew(self, history_BT: Tensor) -> Tensor:
        """Encoding of the newest event [B, D]."""
        with self.where:
            return self.model.encode(history_BT, self.table, newest=1)[:, -1]

    def step(self, newest_B1: Tensor, known_BP: Tensor, states_BPC: Tensor) -> Tensor:
        with self.where:
            encoded: Tensor = self.graph(newest_B1, known_BP, states_BPC)[0]
            return encoded[:, -1]

    def states(self, earlier_BP: Tensor) -> Tensor:
        """States [B, P, C] of a history that begins with its first event."""
        none = torch.zeros(len(earlier_BP), 0, dtype=torch.bool, device=self.where)
        empty = torch.zeros(len(earlier_BP), 0, states_of_event(self.config), device=self.where)
        with self.where:
            states: Tensor = self.graph(earlier_BP, none, empty)[1]
            return states


def measure_point(figures: Figures, of: Encoders, name: str, batch: int) -> None:
    """Times of both forms for histories of one length and a batch; one row."""
    length, where = of.config.history, of.where
    history_BT = torch.randint(FIRST_ID, of.items, (batch, length), device=where)
    states_BPC = of.states(history_BT[:, :-1])
    known_BP = torch.ones(batch, length - 1, dtype=torch.bool, device=where)
    host = states_BPC.cpu().pin_memory() if where.type == "cuda" else states_BPC.clone()
    newest_B1 = history_BT[:, -1:].contiguous()

    def from_host() -> Tensor:
        states_BPC.copy_(host, non_blocking=True)
        return of.step(newest_B1, known_BP, states_BPC)

    calls = {
        "anew": lambda: of.anew(history_BT),
        "step": lambda: of.step(newest_B1, known_BP, states_BPC),
        "step_host": from_host,
    }
    ms, answers = {}, {}
    for form, call in calls.items():
        replay, answers[form] = clock.captured(call, where)
        ms[form] = clock.device_ms(replay, where, 0.15 if where.type == "cuda" else 0.02)
    apart = float((answers["anew"] - answers["step"]).abs().max())
    figures.row(
        preset=name, family=of.config.family, history=length, batch=batch, **{f"{k}_ms": v for k, v in ms.items()},
        ratio=ms["anew"] / ms["step"], ratio_host=ms["anew"] / ms["step_host"], apart=apart,
        kib_a_user=host[0].numel() * 4 / 1024, requests_per_s=batch / ms["step"] * 1000,
    )  # fmt: skip


def bias_bytes(config: EncoderConfig, batch: int) -> float:
    """Of what encoding anew holds at once, about: HSTU keeps its weights for each request, SASRec one bias for all."""
    rows = batch if config.family == "hstu" else 1
    return 3.0 * 4 * rows * config.heads * config.history**2


@torch.no_grad()
def measure(figures: Figures, where: torch.device, given: Asked) -> None:
    torch.set_float32_matmul_precision("high")
    items = 500 if given.cpu else ITEMS
    figures.set(items=items, format="tf32")
    made: Encoders | None = None
    for name, family, length, batch in points(given.cpu):
        what, config = f"{name} {family} {length} batch {batch}", config_of(name, family, length)
        if figures.left() < NEEDED_S:
            figures.skip(what, "no time left")
        elif bias_bytes(config, batch) > MOST_BYTES:
            figures.skip(what, f"more than {MOST_BYTES / 1e9:.0f} GB of attention biases")
        else:
            try:
                made = made if made is not None and made.config == config else Encoders(config, items, where)
                measure_point(figures, made, name, batch)
            except Exception as error:  # the other sizes' figures stay
                figures.skip(what, f"{type(error).__name__}: {error}")
            clock.release(where)


if __name__ == "__main__":
    steps.run("state_reuse", measure, "a history's newest event beside its earlier states, against encoding it anew")
