"""Item tables of one byte a number: memory, ranking and time beside float32, on a synthetic catalogue.

    python -m benchmarks.tables --items 1000000

Items are drawn around centres, as embeddings of a catalogue with categories are; a user's state is the item that
follows, plus noise. Both graphs answer the same requests in one run, taking turns. Memory is that of the graphs' files,
whose weights are loaded as they are. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from loadtest.reports.record import record_line
from training.compile.onnx_export import export
from training.metrics import MISS, bootstrap, ndcg_of
from training.models.int8_table import Int8Table
from vivace.onnx_session import open_session

TOP = 100


class Scoring(nn.Module):
    """States float32 [B, D] to the ``top`` best items, by either table."""

    table_VD: Tensor

    def __init__(self, table_VD: Tensor, int8: bool, top: int = TOP) -> None:
        super().__init__()
        self.top = top
        self.int8 = Int8Table(table_VD) if int8 else None
        if not int8:
            self.register_buffer("table_VD", table_VD)

    def forward(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.int8.scores(states_BD) if self.int8 is not None else states_BD @ self.table_VD.t()
        top, ids = torch.topk(scores, self.top, dim=1)
        return ids, top


def catalogue(
    items: int, width: int, centres: int = 5000, noise: float = 1.2, requests: int = 2000, seed: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    """(item embeddings [V, D], states of requests [R, D], the item that each asks for [R])."""
    g = torch.Generator().manual_seed(seed)
    offsets_VD = torch.randn(items, width, generator=g)
    middle = torch.randn(centres, width, generator=g)
    table = middle[torch.randint(centres, (items,), generator=g)] + 0.6 * offsets_VD
    table *= torch.rand(items, 1, generator=g) + 0.5  # lengths differ, as popularity makes them
    target = torch.randint(items, (requests,), generator=g)
    unit = torch.nn.functional.normalize(table, dim=1)
    states = unit[target] * width**0.5 + noise * 0.6 * torch.randn(requests, width, generator=g)
    return table, states, target


def main(
    items: int = 1_000_000,
    width: int = 64,
    centres: Annotated[int, typer.Option(help="of the synthetic catalogue")] = 5000,
    noise: Annotated[float, typer.Option(help="of a state around its item, in lengths of an item's offset")] = 1.2,
    requests: int = 2000,
    batch: int = 8,
    seed: int = 7,
) -> None:
    table, states, target = catalogue(items, width, centres, noise, requests, seed)
    sizes: dict[str, int] = {}
    ranks: dict[str, list[np.ndarray]] = {}
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name in ("fp32", "int8"):
            path = Path(folder) / f"{name}.onnx"
            export(Scoring(table, name == "int8"), (states[:2],), ["STATES"], ["IDS", "SCORES"], path)
            sizes[name], graphs[name] = path.stat().st_size, open_session(path)
            ranks[name], spent[name] = [], []
        for start in range(0, requests, batch):
            feed = {"STATES": states[start : start + batch].numpy()}
            for name in ("fp32", "int8") if (start // batch) % 2 else ("int8", "fp32"):
                began = time.perf_counter()
                ids = graphs[name].run(None, feed)[0]
                spent[name].append(time.perf_counter() - began)
                hit = ids == target[start : start + batch, None].numpy()
                ranks[name].append(np.where(hit.any(1), hit.argmax(1), MISS))
    ndcg = {name: ndcg_of(np.concatenate(r)) for name, r in ranks.items()}
    exact = float(ndcg["fp32"].mean())
    low, high = bootstrap(ndcg["int8"] - ndcg["fp32"])
    result = {
        "items": items, "width": width, "requests": requests, "seed": seed,
        "mib": {n: round(s / 2**20, 1) for n, s in sizes.items()},
        "smaller": round(sizes["fp32"] / sizes["int8"], 2),
        "ndcg@10": {n: round(float(v.mean()), 4) for n, v in ndcg.items()},
        "change": round(float((ndcg["int8"] - ndcg["fp32"]).mean()) / exact, 5),
        "interval": [round(x / exact, 5) for x in (low, high)],
        "ms_a_request": {n: round(float(np.median(t)) / batch * 1000, 2) for n, t in spent.items()},
        "faster": round(float(np.median(np.array(spent["fp32"]) / np.array(spent["int8"]))), 2),
    }  # fmt: skip
    for key in ("mib", "smaller", "ndcg@10", "change", "interval", "ms_a_request", "faster"):
        print(f"{key:14} {result[key]}")
    print(record_line("int8 item table", **result))


if __name__ == "__main__":
    typer.run(main)
