"""A deep and cross network (Wang et al. 2017) on what ``vivace prepare --for hugectr`` wrote, in HugeCTR's container.

    docker run --gpus all -v $PWD/artifacts/shop/hugectr:/data -v $PWD/deploy/hugectr:/script -w /data \
        nvcr.io/nvidia/merlin/merlin-hugectr:nightly python /script/train.py --gpus 0,1

Its embedding table is cut over the GPUs by slots, or with --distributed each slot over all of them by rows. It needs an
NVIDIA GPU and HugeCTR, which this project's machines have not: written by HugeCTR's documentation, not run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH = 16  # of an embedding
LAYERS, HIDDEN = 3, 256  # cross layers; channels of the deep part
ADAM_STATES = 2  # numbers of optimizer state a weight


def workspace_mb(slot_sizes: list[int], gpus: int) -> int:
    """Memory of a GPU's part of the table and its optimizer in MB, with a quarter to spare: slots differ in size."""
    numbers = sum(slot_sizes) * WIDTH * (1 + ADAM_STATES)
    return int(1.25 * numbers * 4 / gpus / 2**20) + 1


def build(hugectr: Any, slots: dict[str, Any], options: argparse.Namespace) -> Any:
    """The compiled model. ``slots``: what slots.json holds."""
    gpus = [int(gpu) for gpu in options.gpus.split(",")]
    labels, sizes, dense = slots["labels"], slots["slot_size_array"], len(slots["continuous"])
    solver = hugectr.CreateSolver(
        batchsize=options.batch, batchsize_eval=options.batch, lr=options.rate, vvgpu=[gpus], repeat_dataset=True,
        max_eval_batches=max(1, slots["events"]["valid"] // options.batch), i64_input_key=True,
    )  # fmt: skip
    reader = hugectr.DataReaderParams(
        data_reader_type=hugectr.DataReaderType_t.Parquet, source=["./train/_file_list.txt"],
        eval_source="./valid/_file_list.txt", check_type=hugectr.Check_t.Non, slot_size_array=sizes,
    )  # fmt: skip
    optimizer = hugectr.CreateOptimizer(
        optimizer_type=hugectr.Optimizer_t.Adam, update_type=hugectr.Update_t.Local, epsilon=1e-7
    )
    model = hugectr.Model(solver, reader, optimizer)
    model.add(
        hugectr.Input(
            label_dims=[1] * len(labels), label_names=labels, dense_dim=dense, dense_name="dense",
            data_reader_sparse_param_array=[hugectr.DataReaderSparseParam("slots", 1, True, len(sizes))],
        )
    )  # fmt: skip
    kinds = hugectr.Embedding_t
    model.add(
        hugectr.SparseEmbedding(
            embedding_type=(
                kinds.DistributedSlotSparseEmbeddingHash if options.distributed
                else kinds.LocalizedSlotSparseEmbeddingHash
            ),
            workspace_size_per_gpu_in_mb=workspace_mb(sizes, len(gpus)), embedding_vec_size=WIDTH, combiner="sum",
            sparse_embedding_name="embedding", bottom_name="slots", optimizer=optimizer,
        )
    )  # fmt: skip
    _network(hugectr, model, labels, len(sizes) * WIDTH, dense)
    model.compile(loss_names=labels, loss_weights=[1 / len(labels)] * len(labels))
    return model


def _network(hugectr: Any, model: Any, labels: list[str], embedded: int, dense: int) -> None:
    """Cross layers beside a deep part, a logit and a loss a label; losses come last, as HugeCTR asks."""
    layers = hugectr.Layer_t

    def layer(kind: Any, bottom: list[str], top: list[str], **how: Any) -> None:
        model.add(hugectr.DenseLayer(layer_type=kind, bottom_names=bottom, top_names=top, **how))

    layer(layers.Reshape, ["embedding"], ["features"], leading_dim=embedded)
    width, features = embedded + dense, "features"
    if dense:
        layer(layers.Concat, ["features", "dense"], ["all"])
        features = "all"
    layer(layers.Slice, [features], ["wide", "deep"], ranges=[(0, width), (0, width)])
    layer(layers.MultiCross, ["wide"], ["crossed"], num_layers=LAYERS)
    layer(layers.InnerProduct, ["deep"], ["hidden"], num_output=HIDDEN)
    layer(layers.ReLU, ["hidden"], ["active"])
    layer(layers.Dropout, ["active"], ["dropped"], dropout_rate=0.2)
    layer(layers.Concat, ["dropped", "crossed"], ["joined"])
    joined, parts = HIDDEN + width, [f"for_{label}" for label in labels]
    if len(labels) > 1:
        layer(layers.Slice, ["joined"], parts, ranges=[(0, joined)] * len(labels))
    for label, part in zip(labels, parts if len(labels) > 1 else ["joined"], strict=True):
        layer(layers.InnerProduct, [part], [f"logit_{label}"], num_output=1)
    for label in labels:
        layer(layers.BinaryCrossEntropyLoss, [f"logit_{label}", label], [f"loss_{label}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="0", help="indices, by commas")
    parser.add_argument("--batch", type=int, default=4096, help="events a step, of all GPUs together")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--distributed", action="store_true", help="cut each slot's rows over all GPUs")
    options = parser.parse_args()
    import hugectr
    from mpi4py import MPI  # noqa: F401 - HugeCTR starts MPI by it

    slots = json.loads(Path("slots.json").read_text())
    model = build(hugectr, slots, options)
    model.summary()
    steps = max(1, options.epochs * slots["events"]["train"] // options.batch)
    model.fit(
        max_iter=steps, display=max(1, steps // 20), eval_interval=max(1, steps // 5), snapshot=steps,
        snapshot_prefix="dcn",
    )  # fmt: skip


if __name__ == "__main__":
    main()
