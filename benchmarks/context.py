"""What event types and the context of a request are worth: the same training with and without them.

    python -m benchmarks.context --name shop --seeds 7,8,9

Trains a retriever and a ranker a row and seed on the features of a prepared run, and ranks the test requests once. A
gain is against the row without both, request by request, of the mean over the seeds. Of the demo shop, whose taste
depends on the moment by a rule (``Shop.log_appeal``), the row "oracle" adds what it says, times a weight chosen on
validation, to the scores of the models without context: the share of its gain that the models with context recover is
printed. Rows that are trained are kept: the command goes on where it was stopped. The last line of stdout is one JSON
object.

``--crossed RUN`` adds the row "context and crosses": the same log, prepared with ``vivace prepare --cross``. ``--listed
RUN`` adds "item attributes as lists": the same log, prepared with attributes of several values, such as ML-1M's
(``--data ml-1m-benchmark-genres``); beside it "item attributes", which both models of the row read too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from loadtest.reports.record import record_line
from preprocessing.features import Features
from preprocessing.readers.shop import DAY_PARTS, DEVICES, SENSITIVITIES, Shop, ShopConfig
from preprocessing.workflow import load_workflow
from preprocessing.workflow_onnx import event_vocabulary
from training.checkpoints import load_ranker, load_retrieval
from training.data import batches
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.metrics import bootstrap, ndcg_of, ranks, ranks_after
from training.models.ranking import RankingModel
from training.models.retrieval import EXCLUDED, RetrievalModel, propose
from training.presets import Preset, with_values
from training.scoring import SCORED, scored
from vivace.cli.options import chosen_preset, console
from vivace.contract import FIRST_ID, HOUR, ITEM, PADDING_ID
from vivace.manifest import read_manifest
from vivace.run import Run

WITHOUT, TYPES, CONTEXT, BOTH, ORACLE = "neither", "event types", "context", "types and context", "oracle"
CROSSED = "context and crosses"
ATTRIBUTES, LISTED = "item attributes", "item attributes as lists"
ROWS: dict[str, dict[str, Any]] = {
    WITHOUT: {"encoder.types": False, "encoder.context": False},
    TYPES: {"encoder.types": True, "encoder.context": False},
    CONTEXT: {"encoder.types": False, "encoder.context": True},
    BOTH: {"encoder.types": True, "encoder.context": True},
    CROSSED: {"encoder.types": False, "encoder.context": True},
    ATTRIBUTES: {"encoder.types": False, "encoder.context": False, "encoder.attributes": True},
    LISTED: {"encoder.types": False, "encoder.context": False, "encoder.attributes": True},
}
RETRIEVAL, RANKED = "retrieval", "retrieval + ranking"
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5)
CHOOSING = 16  # batches of validation requests that choose one of them
Adjust = Callable[[batches.Requests, Tensor], Tensor]


def ndcg_by_request(
    features: Features,
    preset: Preset,
    models: tuple[RetrievalModel, RankingModel],
    part: str,
    adjust: Adjust,
    most: int | None = None,
) -> dict[str, np.ndarray]:
    """NDCG@10 of every request of a part, by stage; of the first ``most`` batches. ``adjust``: what is added to the
    scores of all items [B, V]."""
    (retriever, ranker), schema = models, features.schema
    count = min(preset.ranker.candidates, features.item_count() - FIRST_ID)
    parts: dict[str, list[np.ndarray]] = {RETRIEVAL: [], RANKED: []}
    with torch.no_grad():
        heads = [h.name for h in schema.heads]
        requests = batches.requests(features.files(part), heads, preset.encoder.window, SCORED)
        for request in itertools.islice(requests, most):
            _, scores_BV, encoded = scored(retriever, request, schema.exclude_seen)
            more_BV = adjust(request, scores_BV)
            adjusted_BV = torch.where(scores_BV > EXCLUDED / 2, scores_BV + more_BV, scores_BV)
            ids_BN, _ = propose(adjusted_BV, count)
            rank_B = ranks(adjusted_BV, request.target_B, request.number_B)
            moment, memory = request.read_by(retriever), encoded[:, -preset.ranker.memory :]
            logits_BNH = ranker(request.history_BT, ids_BN, scores_BV.gather(1, ids_BN), memory, *moment)
            logits_BN = logits_BNH[..., 0] + more_BV.gather(1, ids_BN)
            logits_BN = torch.where(ids_BN == PADDING_ID, EXCLUDED, logits_BN)
            after_B = ranks_after(logits_BN, ids_BN, request.target_B, rank_B, request.number_B)
            parts[RETRIEVAL].append(ndcg_of(rank_B.numpy()))
            parts[RANKED].append(ndcg_of(after_B.numpy()))
    return {stage: np.concatenate(values) for stage, values in parts.items()}


def nothing(request: batches.Requests, scores_BV: Tensor) -> Tensor:
    return torch.zeros_like(scores_BV)


class ShopRule:
    """The demo shop's own rule, of encoded requests."""

    def __init__(self, features: Features, config: ShopConfig) -> None:
        self.shop = Shop(config)
        if self.shop.fingerprint() != read_manifest(features.folder, "vivace prepare")["inputs"]["data"]:
            raise typer.BadParameter(f"{features.folder}: prepared of another shop than {config}; give --users, …")
        workflow = load_workflow(features.folder / "workflow")
        names = {name: i for i, name in enumerate(self.shop.items()[ITEM])}
        self.place_V = np.array([names[name] for name in features.items()[ITEM]])
        context = features.context
        self.column = {name: context.categoricals.index(name) for name in context.categoricals}
        self.words = {name: event_vocabulary(workflow, name) for name in context.categoricals}

    def _numbers(self, ids_BC: np.ndarray, column: str, names: tuple[str, ...]) -> np.ndarray:
        words = self.words[column]
        return np.array([names.index(words[i]) if i in words.index else 0 for i in ids_BC[:, self.column[column]]])

    def __call__(self, request: batches.Requests) -> Tensor:
        """float32 [B, V]; 0 for the special ids."""
        assert request.context_BC is not None
        ids_BC = request.context_BC.numpy()
        hours = self._numbers(ids_BC, HOUR, tuple(str(h) for h in range(24)))
        appeal_BI = self.shop.log_appeal(
            self._numbers(ids_BC, "device", DEVICES),
            hours * DAY_PARTS // 24,
            self._numbers(ids_BC, "price_sensitivity", tuple(SENSITIVITIES)),
        )
        out = np.zeros((len(ids_BC), len(self.place_V) + FIRST_ID), np.float32)
        out[:, FIRST_ID:] = appeal_BI[:, self.place_V]
        return torch.from_numpy(out)


def oracle_ndcg(
    features: Features, preset: Preset, models: tuple[RetrievalModel, RankingModel], rule: ShopRule
) -> tuple[dict[str, np.ndarray], float]:
    """(NDCG@10 by stage of the test requests with the rule, the weight that validation chose for it)."""

    def with_weight(weight: float) -> Adjust:
        return lambda request, scores_BV: weight * rule(request)

    of_weight = {w: ndcg_by_request(features, preset, models, "valid", with_weight(w), CHOOSING) for w in WEIGHTS}
    best = max(of_weight, key=lambda w: float(of_weight[w][RETRIEVAL].mean()))
    return ndcg_by_request(features, preset, models, "test", with_weight(best)), best


def trained(features: Features, preset: Preset, root: Path, seed: int) -> tuple[RetrievalModel, RankingModel]:
    """Both models of a row, trained unless they are there."""
    train_retrieval(features, preset, root, seed, console.print)
    train_ranker(features, preset, root, seed, console.print)
    return load_retrieval(features, preset, root), load_ranker(features, preset, root)


def results_of(
    features: Features, base: Preset, folder: Path, seeds: list[int], rows: list[str], rule: ShopRule | None,
    others: Mapping[str, Features],
) -> Iterator[tuple[str, dict[str, np.ndarray], float | None]]:  # fmt: skip
    """(row, NDCG@10 of every test request by stage, the oracle's weight) a seed. ``others``: of rows on features of
    their own."""
    for seed in seeds:
        for row in rows:
            preset, data = with_values(base, ROWS[row]), others.get(row, features)
            models = trained(data, preset, folder / f"{row.replace(' ', '-')}-{seed}", seed)
            yield row, ndcg_by_request(data, preset, models, "test", nothing), None
            if row == WITHOUT and rule is not None:
                yield ORACLE, *oracle_ndcg(features, preset, models, rule)


def summary(values: dict[str, list[dict[str, np.ndarray]]]) -> list[dict[str, Any]]:
    """A row and stage each: the mean over requests and seeds, those of the seeds, and the gain with its interval."""
    out = []
    for row, by_seed in values.items():
        for stage in (RETRIEVAL, RANKED):
            mean = np.mean([v[stage] for v in by_seed], 0)
            gain = mean - np.mean([v[stage] for v in values[WITHOUT]], 0)
            out.append({
                "row": row, "stage": stage, "ndcg10": round(float(mean.mean()), 4),
                "seeds": [round(float(v[stage].mean()), 4) for v in by_seed], "gain": round(float(gain.mean()), 4),
                "gain_interval": [round(x, 4) for x in bootstrap(gain)], "requests": len(mean),
            })  # fmt: skip
    return out


def main(
    name: Annotated[str, typer.Option(help="a prepared run")] = "shop",
    artifacts: Annotated[Path, typer.Option(help="where runs lie")] = Path("artifacts"),
    preset: Annotated[str, typer.Option(help="as for 'vivace train'")] = "",
    seeds: Annotated[str, typer.Option(help="of the training, by commas")] = "7,8,9",
    rows: Annotated[str, typer.Option(help="rows beside 'neither', by commas")] = f"{TYPES},{CONTEXT},{BOTH}",
    epochs: Annotated[int, typer.Option(help="of the retriever (0: the preset's)")] = 0,
    users: Annotated[int, typer.Option(help="of the demo shop, as prepared")] = ShopConfig.users,
    items: Annotated[int, typer.Option(help="of the demo shop, as prepared")] = ShopConfig.items,
    events: Annotated[int, typer.Option(help="of the demo shop, as prepared")] = ShopConfig.events,
    crossed: Annotated[str, typer.Option(help="a run of the same log that was prepared with --cross")] = "",
    listed: Annotated[str, typer.Option(help="a run of the same log with attributes as lists")] = "",
) -> None:
    root = artifacts / name
    features = Features(Run(root).features)
    base = chosen_preset(preset, root)
    base = with_values(base, {"retrieval.epochs": epochs}) if epochs else base
    rule = ShopRule(features, ShopConfig(users, items, events)) if features.schema.name == "shop" else None
    values: dict[str, list[dict[str, np.ndarray]]] = {}
    weights = []
    chosen = [WITHOUT, *(r.strip() for r in rows.split(",") if r.strip())]
    if strange := sorted(set(chosen) - (ROWS.keys() - {CROSSED, LISTED})):
        known = ", ".join(sorted(ROWS.keys() - {WITHOUT, CROSSED, LISTED}))
        raise typer.BadParameter(f"expected rows of {known}, got {strange[0]!r}", param_hint="--rows")
    numbers = [int(s) for s in seeds.split(",")]
    runs = {row: run for row, run in ((CROSSED, crossed), (LISTED, listed)) if run}
    others = {row: Features(Run(artifacts / run).features) for row, run in runs.items()}
    chosen += [*([ATTRIBUTES] if listed and ATTRIBUTES not in chosen else []), *others]
    for row, ndcg, weight in results_of(features, base, root / "context", numbers, chosen, rule, others):
        values.setdefault(row, []).append(ndcg)
        weights += [] if weight is None else [weight]
        console.print(f"{row}: {', '.join(f'{s} {v.mean():.4f}' for s, v in ndcg.items())}")
    lines = summary(values)
    table = Table(title=f"{name}: NDCG@10 of the test requests, seeds {seeds}", title_justify="left")
    for column in ("row", "stage", "NDCG@10", "gain", "95 % interval"):
        table.add_column(column, justify="left" if column in ("row", "stage") else "right")
    for line in lines:
        low, high = line["gain_interval"]
        shown = f"{line['ndcg10']:.4f}", f"{line['gain']:+.4f}", f"{low:+.4f} to {high:+.4f}"
        table.add_row(line["row"], line["stage"], *shown)
    console.print(table)
    more: dict[str, Any] = {}
    if ORACLE in values and CONTEXT in values:
        gain = {(line["row"], line["stage"]): line["gain"] for line in lines}
        more["recovered"] = {s: round(gain[CONTEXT, s] / gain[ORACLE, s], 3) for s in (RETRIEVAL, RANKED)}
        more["oracle_weights"] = weights
        console.print(f"share of the oracle's gain that context recovers: {more['recovered']}")
    print(record_line("context", data=name, preset=preset, seeds=numbers, rows=lines, **more))


if __name__ == "__main__":
    typer.run(main)
