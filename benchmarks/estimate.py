"""What a preset's retriever needs before anyone pays for it: parameters, memory of a GPU, and hours.

    python -m benchmarks.estimate huge --items 10000000 --events 1000000000 --gpus 64

Parameters are those of the model itself, built without memory. FLOPs of a position count the matrix products forward
and twice that backward (a test compares them with PyTorch's counter). Memory: weights, gradients, AdamW's two moments
and the weights' average in float32, sharded where the preset shards; with them the whole item table and the largest
block, which FSDP puts together, and their gradients before they are shared out; activations by Korthikanti et al. 2022,
eq. 2 without the attention scores, which are never kept. Hours assume ``--peak`` and ``--utilisation``, and no waiting
for data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from loadtest.reports.record import record_line
from training.models.retrieval import RetrievalModel
from training.presets import PRESETS, Preset, preset

FLOAT = 4  # bytes
ACTIVATION_BYTES = 34  # of a position, a layer and a unit of width


@dataclass(frozen=True)
class Estimate:
    """Parameters of encoder and item table, ``flops`` of a training position, GiB of each GPU, hours of all epochs."""

    encoder_parameters: int
    item_parameters: int
    flops: float
    states_gib: float
    gathered_gib: float
    activations_gib: float
    hours: float

    @property
    def memory_gib(self) -> float:
        return self.states_gib + self.gathered_gib + self.activations_gib


def flops_of_position(chosen: Preset, items: int, block_parameters: int) -> float:
    """FLOPs to train on one position of a full window."""
    e, t = chosen.encoder, chosen.retrieval
    scored = items if t.loss == "full" else t.negatives + 1
    attention = 2 * 2 * e.history * e.width * e.layers if e.family not in ("gru", "lstm") else 0
    return 3.0 * (2 * block_parameters + attention + 2 * e.width * scored)


def estimate(
    chosen: Preset, items: int, events: float, gpus: int = 1, peak_tflops: float = 989.0, utilisation: float = 0.35
) -> Estimate:
    """``items`` V, ``events`` an epoch (about its positions); ``peak_tflops`` of one GPU in the format of the matrix
    products (989: H100 and H200, bfloat16, dense, by NVIDIA's data sheet)."""
    with torch.device("meta"):
        model = RetrievalModel(chosen.encoder, items, torch.zeros(items))
    everything = sum(p.numel() for p in model.parameters())
    item_part = model.items.id.weight.numel() + model.bias.numel()
    blocks = [sum(p.numel() for p in b.parameters()) for b in getattr(model.encoder, "blocks", [model.encoder])]
    products = sum(p.numel() for p in model.encoder.parameters() if p.dim() > 1)
    t, e = chosen.retrieval, chosen.encoder
    copies = 4 + bool(t.ema)
    shards = gpus if t.shard_model else 1
    gathered = 2 * (item_part + max(blocks)) * FLOAT if t.shard_model and gpus > 1 else 0
    rows = t.batch_size / gpus
    activations = ACTIVATION_BYTES * e.layers * e.width * e.history * rows
    flops = flops_of_position(chosen, items, products)
    seconds = flops * events * t.epochs / (gpus * peak_tflops * 1e12 * utilisation)
    gib = 2**30
    return Estimate(
        everything - item_part, item_part, flops, everything * FLOAT * copies / shards / gib, gathered / gib,
        activations / gib, seconds / 3600,
    )  # fmt: skip


def main(
    name: Annotated[str, typer.Argument(help=", ".join(PRESETS))],
    items: Annotated[int, typer.Option(help="of the vocabulary")] = 1_000_000,
    events: Annotated[float, typer.Option(help="of an epoch")] = 1e8,
    gpus: int = 8,
    peak: Annotated[float, typer.Option(help="TFLOPS of one GPU")] = 989.0,
    utilisation: Annotated[float, typer.Option(help="share of the peak that is reached")] = 0.35,
) -> None:
    needed = estimate(preset(name), items, events, gpus, peak, utilisation)
    print(
        f"{name}, {items:,} items, {events:,.0f} events an epoch, {gpus} GPUs at {utilisation:.0%} of {peak:g} TFLOPS\n"
        f"parameters  {needed.encoder_parameters:,} and {needed.item_parameters:,} of items\n"
        f"a position  {needed.flops / 1e6:,.1f} MFLOP\n"
        f"a GPU       {needed.memory_gib:.1f} GiB: states {needed.states_gib:.1f}, put together "
        f"{needed.gathered_gib:.1f}, activations {needed.activations_gib:.1f}\n"
        f"time        {needed.hours:,.1f} hours"
    )
    print(record_line("estimate", preset=name, items=items, events=events, gpus=gpus, **asdict(needed)))


if __name__ == "__main__":
    typer.run(main)
