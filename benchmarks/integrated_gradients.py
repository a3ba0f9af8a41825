"""Whether the exact reasons are those of another method: Integrated Gradients of the PyTorch models beside what the
served graphs answer without each item of the history.

    python -m benchmarks.integrated_gradients artifacts/shop --cases 300

Integrated Gradients (Sundararajan, Taly and Yan 2017, eq. 3): each event's vectors, in the encoder and where the ranker
attends to them, are led from zero to what they are, and the gradient of the item's score is summed along the way; a
Riemann sum by midpoints. What it cannot move stays as it is: places, types, and counters that go by ids. So between
the two stand the events with their gates at zero, exact in the same way. Completeness: the sum over the events against
what the score changes along the whole way. Rank correlations (Spearman) by case, of the items of the history; intervals
are 95 %, by bootstrap over users. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.deletion import LEAST, SEED, figures, interval, shuffled_users
from loadtest.reports.record import record_line
from preprocessing.features import Features
from serving.runtime.pipeline import Pipeline
from serving.runtime.stages import Row
from serving.runtime.why import FAR, Counterfactuals
from training.checkpoints import load_ranker, load_retrieval
from training.models.retrieval import read_inputs
from vivace.cli.options import chosen_preset
from vivace.contract import PADDING_ID
from vivace.run import FINAL, Run
from vivace.store.opening import store_of_worker

SAME = 1e-2  # between the score in PyTorch and the served one
K_TOLD = 1e-3  # of a whole change: below it completeness is not relative to anything


class Gated:
    """The score of an item by the PyTorch models of a run, each event's vectors times a gate. T events, K ways."""

    def __init__(self, run: Run, pipeline: Pipeline) -> None:
        features, preset, final = Features(run.features), chosen_preset("", run.root), run.has(FINAL)
        self.pipeline, self.shapes = pipeline, pipeline.shapes
        self.retriever = load_retrieval(features, preset, run.root, final).cpu().eval()
        self.ranker = load_ranker(features, preset, run.root, final=final).cpu().eval()
        for model in (self.retriever, self.ranker):
            model.requires_grad_(False)
        with torch.no_grad():
            self.table_VD = self.retriever.table()

    def request(self, row: Row) -> None:
        """What the models read of a row, and the candidates that the served graphs found."""
        inputs, _ = self.pipeline.transform([row])
        ids_1N, _ = self.pipeline.rank(
            inputs[0], self.pipeline.retrieve(inputs), self.pipeline.count_to_rank(row.top_k)
        )
        self.candidates_1N = torch.from_numpy(ids_1N)
        self.history_1T = torch.from_numpy(inputs[0])
        more = [torch.from_numpy(x) for x in inputs[2:]]
        self.times, self.types, self.context, _ = read_inputs(self.retriever, more)
        self.passed = [torch.from_numpy(x) for x in inputs[self.shapes.passed_on :]]

    @contextlib.contextmanager
    def _gate(self, gate_KT: Tensor) -> Iterator[None]:
        """While it holds, the ranker attends to items of the history times their gates."""
        d = self.ranker.width

        def gated(_: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            (memory_KTE,) = given
            gate = gate_KT[:, -memory_KTE.shape[1] :, None]
            return (torch.cat([memory_KTE[..., :d], memory_KTE[..., d:] * gate], 2),)

        hooks = [layer.register_forward_pre_hook(gated) for layer in (self.ranker.key, self.ranker.value)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def scores(self, gate_KT: Tensor) -> Tensor:
        """float32 [K, N]: of every candidate."""
        k, t = gate_KT.shape

        def each(x: Any) -> Any:
            """The same in every row."""
            return None if x is None else x.expand(k, *x.shape[1:])

        vectors_KTD = self.table_VD[self.history_1T] * gate_KT[..., None]
        rows = torch.cat([vectors_KTD.new_zeros(1, vectors_KTD.shape[2]), vectors_KTD.flatten(0, 1)])
        known_1T = self.history_1T != PADDING_ID
        ids_KT = (1 + torch.arange(k * t).view(k, t)) * known_1T  # each event is a row of its own, padding the first
        encoded = self.retriever.encode(ids_KT, rows, each(self.times), types=each(self.types))
        context = (each(self.context[0]), each(self.context[1]))
        history_KT, candidates_KN = each(self.history_1T), each(self.candidates_1N)
        exclude = torch.zeros(k, len(self.table_VD), dtype=torch.bool)
        found_KV = self.retriever.scores(history_KT, encoded, exclude, self.table_VD, context)
        with self._gate(gate_KT):
            logits = self.ranker(
                history_KT, candidates_KN, found_KV.gather(1, candidates_KN), encoded[:, -self.shapes.memory :],
                *(each(x) for x in self.passed),
            )  # fmt: skip
        scores_KN: Tensor = logits[..., 0]
        return scores_KN

    def attributions(self, places: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(float [P, T] of each event for the candidates at ``places``, float [P] of what the score changes in all)."""
        t = self.history_1T.shape[1]
        middles = (torch.arange(steps) + 0.5) / steps
        gate_KT = middles[:, None].repeat(1, t).requires_grad_(True)
        scores_KN, out = self.scores(gate_KT), []
        for place in places:
            (gradient_KT,) = torch.autograd.grad(scores_KN[:, place].sum(), gate_KT, retain_graph=True)
            out.append(gradient_KT.mean(0))
        with torch.no_grad():
            ends = self.scores(torch.tensor([[0.0], [1.0]]).repeat(1, t))
        return torch.stack(out).numpy(), (ends[1] - ends[0])[places].numpy()

    def switched_off(self, places: list[int], of_item_UT: np.ndarray) -> np.ndarray:
        """float [P, U]: what the score loses with the gates of each item's events at zero and all else as it is."""
        with torch.no_grad():
            off_UT = 1.0 - torch.from_numpy(of_item_UT.astype(np.float32))
            scores_KN = self.scores(torch.cat([torch.ones_like(off_UT[:1]), off_UT]))[:, places]
        drops: np.ndarray = (scores_KN[:1] - scores_KN[1:]).T.numpy()
        return drops


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, 0 where either says nothing."""
    return float(np.nan_to_num(spearmanr(one, other).statistic))


def case(exact_U: np.ndarray, gradients_U: np.ndarray, off_U: np.ndarray) -> dict[str, float]:
    """Of one recommended item, by items of the history: what the score loses by the served graphs, by Integrated
    Gradients, and in PyTorch with the item's gates at zero."""
    return {
        "exact and gradients": correlation(exact_U, gradients_U),
        "exact and gates at zero": correlation(exact_U, off_U),
        "gates at zero and gradients": correlation(off_U, gradients_U),
        "the largest is the same": float(exact_U.argmax() == gradients_U.argmax()),
        "by chance": 1 / len(exact_U),
    }


def main(
    root: Annotated[Path, typer.Argument(help="a compiled run")],
    cases: Annotated[int, typer.Option(help="recommended items, two of a user")] = 300,
    steps: Annotated[int, typer.Option(help="of the sum", min=1)] = 64,
    top_k: int = 10,
) -> None:
    run, rng, of_users, errors = Run(root), np.random.default_rng(SEED), list[list[dict[str, float]]](), list[float]()
    with contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        pipeline = Pipeline.published(root, store)
        gated = Gated(run, pipeline)
        for user in shuffled_users(run, rng):
            if 2 * len(of_users) >= cases:
                break
            asked = Counterfactuals(pipeline, row := Row(user, None, top_k))
            shown = asked.shown().tolist()
            if asked.of_history < LEAST or len(shown) < 2:
                continue
            ids = [shown[0], int(rng.choice(shown[1:]))]
            gated.request(row)
            candidates = gated.candidates_1N[0].tolist()
            if not set(ids) <= set(candidates):
                continue  # an item that was put in live, which another graph ranks
            places = [candidates.index(id_) for id_ in ids]
            of_events, changes = gated.attributions(places, steps)
            with torch.no_grad():
                whole = gated.scores(torch.ones(1, gated.history_1T.shape[1]))[0, places].numpy()
            served = np.array([asked.score(id_) for id_ in ids])
            assert np.abs(whole - served).max() < SAME, f"PyTorch scores {whole}, the served graphs {served}"
            errors += [abs(a.sum() - c) / abs(c) for a, c in zip(of_events, changes, strict=True) if abs(c) > K_TOLD]
            names_T = pipeline.respond.names_of(gated.history_1T[0].numpy())
            of_item_UT = np.stack([names_T == item.encode() for item in asked.units])
            off_PU = gated.switched_off(places, of_item_UT)
            exact_PU = np.stack([np.clip(asked.drops(id_)[: asked.of_history], -FAR, FAR) for id_ in ids])
            of_users.append([case(*of) for of in zip(exact_PU, of_events @ of_item_UT.T, off_PU, strict=True)])
    if not of_users:
        raise RuntimeError(f"{root}: no user of the test split has {LEAST} items and more in the store")
    results = {name: interval([[one[name] for one in user] for user in of_users]) for name in of_users[0][0]}
    for name, of in results.items():
        print(f"{name:28} {figures(of)}")
    completeness = {"median": float(np.median(errors)), "p95": float(np.quantile(errors, 0.95))}
    print(f"completeness error: {completeness}")
    print(record_line("integrated gradients", run=root.name, cases=2 * len(of_users), steps=steps, top_k=top_k,
                      results=results, completeness=completeness))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
