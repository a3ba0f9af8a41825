"""Old and new models on the newest events: the same requests, the same catalogue, and whether the new ones go out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from training.judge.evaluate import Models
from training.metrics import bootstrap, ndcg_of

BOUND = 0.05  # share of NDCG@10 that may be lost at most, at 95 %
CUT = 10
LEAST_JUDGED = 30  # requests; of fewer, most of which change nothing, the bootstrap's interval is too narrow


@dataclass(frozen=True)
class Decision:
    """Figures of the judged requests: NDCG@10 and HR@10 (old, new), their difference with its 95 % interval over
    requests, and whether the new models are published. ``reason`` says why."""

    requests: int
    ndcg: tuple[float, float]
    ndcg_change: tuple[float, float, float]
    hit_rate: tuple[float, float]
    hit_rate_change: tuple[float, float, float]
    bound: float
    publish: bool
    reason: str
    forced: bool = False

    def record(self) -> dict[str, Any]:
        return asdict(self)


def ranks_of(models: Models, part: str) -> np.ndarray:
    """Ranks int64 of a part's targets, in the order of its requests."""
    ranks = [np.empty(0, np.int64)]
    for request in models.requests(part):
        proposed = models.retrieve(request)
        ranks.append(models.ranked(request, proposed, models.logits(request, proposed)).cpu().numpy())
    return np.concatenate(ranks)


def _change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    return (float((after - before).mean()), *bootstrap(after - before))


def decide(before: np.ndarray, after: np.ndarray, bound: float = BOUND, force: bool = False) -> Decision:
    """From the ranks of the same requests, LEAST_JUDGED and more, by the old and the new models: published is what is
    better, the whole interval above 0, or not inferior, the whole interval above the loss that ``bound`` lets through.
    ``force`` publishes anyway."""
    if len(before) != len(after):
        raise ValueError(f"refresh: expected ranks of the same requests, got {len(before)} and {len(after)}")
    if not len(before):
        nothing = "no request to judge by: none of the newest events has a history before it; wait for more events"
        zero = (0.0, 0.0, 0.0)
        return Decision(0, zero[:2], zero, zero[:2], zero, bound, force, nothing, force)
    ndcg, hit = (ndcg_of(before, CUT), ndcg_of(after, CUT)), (before < CUT, after < CUT)
    old, change = float(ndcg[0].mean()), _change(*ndcg)
    low, high, least = change[1], change[2], -bound * float(ndcg[0].mean())
    if len(before) < LEAST_JUDGED:
        publish = False
        reason = f"not sure: {len(before)} requests to judge by, expected {LEAST_JUDGED} and more; wait for more events"
    elif low > 0:
        publish, reason = True, "better: the whole interval is above 0"
    elif low >= least:
        publish, reason = True, f"not inferior: at most {bound:.1%} of {old:.4f} are lost, as the interval says"
    elif high < least:
        publish, reason = False, f"worse: the whole interval is below the loss of {bound:.1%} that is let through"
    else:
        publish = False
        reason = (
            f"not sure: the interval reaches below the loss of {bound:.1%} that is let through; wait for more events"
        )
    hits = (hit[0].astype(float), hit[1].astype(float))
    return Decision(
        len(before), (old, float(ndcg[1].mean())), change, (float(hits[0].mean()), float(hits[1].mean())),
        _change(*hits), bound, publish or force, reason, force and not publish,
    )  # fmt: skip


def broken(reason: str, bound: float) -> Decision:
    """What is decided of models that could not be trained."""
    zero = (0.0, 0.0, 0.0)
    return Decision(0, zero[:2], zero, zero[:2], zero, bound, False, reason)


def render(name: str, taken: dict[str, Any], decision: Decision) -> Table:
    """The one table of a refresh."""
    table = Table(title=f"{name}: refresh", title_justify="left")
    for column in ("what", "old", "new", "change", "95 % interval"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, count in taken.items():
        if count or what in ("taken", "new items"):
            table.add_row({"taken": "events taken"}.get(what, what), "", f"{count:,}", "", "")
    table.add_row("requests judged", "", f"{decision.requests:,}", "", "")
    for what, pair, change in (
        ("NDCG@10", decision.ndcg, decision.ndcg_change),
        ("HR@10", decision.hit_rate, decision.hit_rate_change),
    ):
        if decision.requests:
            mean, low, high = change
            table.add_row(what, f"{pair[0]:.4f}", f"{pair[1]:.4f}", f"{mean:+.4f}", f"{low:+.4f} … {high:+.4f}")
    forced = " (--force)" if decision.forced else ""
    table.add_row("decision", "", ("published" if decision.publish else "not published") + forced, "", "")
    table.caption, table.caption_justify = decision.reason, "left"
    return table
