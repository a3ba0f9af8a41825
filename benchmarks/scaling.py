"""Quality against size: a ladder of retrievers by one recipe, and the power laws that their losses follow.

    vivace prepare --data ml-1m-benchmark --path /folder/of/ml-1m --name ml-1m-benchmark
    python -m benchmarks.scaling --epochs 8 --test --plot docs/scaling.png --json docs/benchmarks/scaling.json

Recipe: preset ``cpu`` with the peak learning rate 4e-3 x 64 / width (as maximal update has it for Adam, Yang et al.
2022, table 3; at most 8e-3), the same epochs for all, so that schedule and data are equal. A size is written
"WIDTHxLAYERS"; with changes ("96x3,encoder.dropout=0.3") it is a trial beside the ladder, which no law is fitted to.
Each is trained by a process of its own into ``--work``; what is there is not trained again, and a training that was
stopped goes on from its checkpoint.

Loss and NDCG@10 are those of all validation requests, seen items filtered; the test is read for ``--test`` alone. FLOPs
of a training count the matrix products forward and twice that backward (``benchmarks.estimate``), the softmax over all
items with them, times the events that were predicted. The laws: ``benchmarks.scaling_law``. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from benchmarks.estimate import estimate
from benchmarks.scaling_law import Ladder, draw, laws
from loadtest.reports.record import record_line
from preprocessing.features import Features
from training.checkpoints import limit_threads, load_retrieval
from training.data import batches
from training.data.columns import ITEMS_ALONE
from training.distributed import ALONE
from training.intervals import bootstrap, ndcg_of
from training.learn.retriever import train_retrieval, training_windows
from training.models.retrieval import EXCLUDED
from training.presets import Preset, cpu as cpu_preset, with_values
from training.scoring import SCORED, scored
from vivace.contract import PADDING_ID
from vivace.manifest import environment
from vivace.run import Run

WIDTH, RATE, LARGEST_RATE = 64, 4e-3, 8e-3  # of the preset ``cpu``; of any size
HEAD = 32  # width of an attention head, as in ``cpu``
LADDER = "16x1 32x1 32x2 48x2 64x2 96x3"
USERS = "users.npz"  # loss and rank of each validation request


@dataclass(frozen=True)
class Size:
    """One rung, or with ``changes`` (fields of a preset by dotted name) a trial beside it."""

    width: int
    layers: int
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parsed(cls, text: str) -> Size:
        """ "96x3,encoder.dropout=0.3". Raises ValueError for anything else."""
        size, *changes = text.split(",")
        width, _, layers = size.partition("x")
        if not (width.isdigit() and layers.isdigit()) or not all("=" in c for c in changes):
            raise ValueError(
                f"--sizes: expected WIDTHxLAYERS, with changes such as 96x3,encoder.dropout=0.3, got {text!r}"
            )
        pairs = (c.split("=", 1) for c in changes)
        return cls(int(width), int(layers), tuple((k, json.loads(v)) for k, v in pairs))

    @property
    def label(self) -> str:
        return ",".join([f"{self.width}x{self.layers}", *(f"{k}={json.dumps(v)}" for k, v in self.changes)])

    def preset(self, epochs: int) -> Preset:
        """The recipe at this size."""
        chosen = cpu_preset()
        encoder = replace(chosen.encoder, width=self.width, layers=self.layers, heads=max(1, self.width // HEAD))
        rate = min(LARGEST_RATE, RATE * WIDTH / self.width)
        training = replace(chosen.retrieval, learning_rate=rate, epochs=epochs)
        return with_values(replace(chosen, encoder=encoder, retrieval=training), dict(self.changes))


@torch.no_grad()
def judged(features: Features, preset: Preset, root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(log loss float64 [n], rank int64 [n]) of a part's requests. A target that is excluded or out of vocabulary has
    the loss NaN and counts as a miss."""
    model, losses, places = load_retrieval(features, preset, root), [], []
    heads = [head.name for head in features.schema.heads]
    for request in batches.requests(features.files(part), heads, preset.encoder.window, SCORED):
        rank, scores, _ = scored(model, request, features.schema.exclude_seen)
        loss = F.cross_entropy(scores, request.target_B.to(scores.device), reduction="none").double()
        losses.append(torch.where(loss < -EXCLUDED / 2, loss, torch.nan).cpu().numpy())
        places.append(rank.cpu().numpy())
    return np.concatenate(losses), np.concatenate(places)


def predicted_events(features: Features, preset: Preset, seed: int) -> int:
    """Events of an epoch that are predicted, without padding."""
    of_epoch, _ = training_windows(features.files("train"), preset, seed, ALONE, ITEMS_ALONE)
    return sum(int((batch[:, 1:] != PADDING_ID).sum()) for batch in of_epoch(0))


def train(size: Size, name: str, artifacts: Path, work: Path, epochs: int, seed: int) -> None:
    """Trains one size and writes what is known of it: ``record.json`` and the losses of each user."""
    limit_threads(1)
    preset, root, features = size.preset(epochs), work / size.label, Features(Run(artifacts / name).features)
    busy = time.process_time()
    manifest = train_retrieval(features, preset, root, seed, print, quiet=True, on_epoch=print)
    busy = time.process_time() - busy
    loss, rank = judged(features, preset, root, "valid")
    np.savez(root / USERS, loss=loss, rank=rank)
    ran, items = len(manifest["results"]["epochs"]), features.item_count()
    events = predicted_events(features, preset, seed)
    of = estimate(preset, items, events)
    record = {
        "size": size.label, "width": size.width, "layers": size.layers, "changes": dict(size.changes), "seed": seed,
        "learning_rate": preset.retrieval.learning_rate, "epochs": ran, "events": events,
        "parameters": {"encoder": of.encoder_parameters, "items": of.item_parameters},
        "training_flops": of.flops * events * ran, "flops_of_position": of.flops, "cpu_s": round(busy),
        "loss": float(np.nanmean(loss)), "ndcg@10": float(ndcg_of(rank).mean()),
        "ndcg@10_interval": bootstrap(ndcg_of(rank)), "curve": manifest["results"]["epochs"],
    }  # fmt: skip
    (root / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def trained(sizes: list[Size], name: str, artifacts: Path, work: Path, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Records of all sizes, each trained by a process of its own where it is not there. Raises SystemExit where one
    fails."""
    records = []
    for size in sizes:
        path = work / size.label / "record.json"
        if not path.exists():
            print(f"{size.label}: training", flush=True)
            ended = subprocess.run([
                sys.executable, "-m", "benchmarks.scaling", "--name", name, "--artifacts", str(artifacts), "--work",
                str(work), "--epochs", str(epochs), "--seed", str(seed), "--train", size.label,
            ])  # fmt: skip
            if ended.returncode:
                raise SystemExit(f"scaling: {size.label} ended with {ended.returncode}; run again to go on")
        records.append(json.loads(path.read_text()))
        r = records[-1]
        print(
            f"{r['size']:40} {r['parameters']['encoder']:>9,} + {r['parameters']['items']:>9,} "
            f"{r['training_flops'] / 1e12:7.1f} TFLOP {r['cpu_s']:5} s  loss {r['loss']:.4f}  "
            f"NDCG@10 {r['ndcg@10']:.4f}",
            flush=True,
        )
    return records


def ladder_of(records: list[dict[str, Any]], work: Path) -> Ladder:
    """The rungs that a law is fitted to."""
    rungs = [r for r in records if not r["changes"]]
    encoder = np.array([r["parameters"]["encoder"] for r in rungs], float)
    return Ladder(
        labels=tuple(r["size"] for r in rungs),
        axes={
            "parameters without the item table": encoder,
            "parameters": encoder + [r["parameters"]["items"] for r in rungs],
            "training FLOPs": np.array([r["training_flops"] for r in rungs]),
        },
        losses=np.stack([np.load(work / r["size"] / USERS)["loss"] for r in rungs]),
    )


def main(
    name: Annotated[str, typer.Option(help="prepared run whose features are read")] = "ml-1m-benchmark",
    artifacts: Path = Path("artifacts"),
    work: Annotated[Path, typer.Option(help="folder of the trainings")] = Path("artifacts/scaling"),
    sizes: Annotated[str, typer.Option(help="WIDTHxLAYERS, by spaces; with changes: a trial")] = LADDER,
    epochs: Annotated[int, typer.Option(help="of every size at most", min=1)] = 8,
    seed: int = 7,
    test: Annotated[bool, typer.Option("--test", help="read the test for the best rung of the validation")] = False,
    plot: Annotated[Path | None, typer.Option(help="picture to write")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON of all figures")] = None,
    one: Annotated[str, typer.Option("--train", help="train this size in this process, and no more")] = "",
) -> None:
    if one:
        train(Size.parsed(one), name, artifacts, work, epochs, seed)
        return
    records = trained([Size.parsed(s) for s in sizes.split()], name, artifacts, work, epochs, seed)
    ladder = ladder_of(records, work)
    figures: dict[str, Any] = {"rungs": records, "laws": [asdict(law) for law in laws(ladder)]}
    for law in figures["laws"]:
        low, high = law["exponent_interval"]
        print(
            f"loss by {law['axis']}, {law['form']}: exponent {law['exponent']:.3f} ({low:.3f} to {high:.3f}), "
            f"floor {law['floor']:.3f}, largest miss {law['largest_miss']:.4f}"
        )
    if test:
        best = min((r for r in records if not r["changes"]), key=lambda r: float(r["loss"]))
        size = Size.parsed(best["size"])
        _, rank = judged(Features(Run(artifacts / name).features), size.preset(epochs), work / size.label, "test")
        figures["test"] = {
            "size": size.label,
            "ndcg@10": float(ndcg_of(rank).mean()),
            "hr@10": float((rank < 10).mean()),
        }
        print(f"test, {size.label}: {figures['test']}")
    if plot is not None:
        draw(ladder, laws(ladder), plot)
    if out is not None:
        out.write_text(json.dumps({**figures, **environment()}, indent=1) + "\n")
    print(record_line("scaling", rungs=len(records), laws=figures["laws"], test=figures.get("test")))


if __name__ == "__main__":
    typer.run(main)
