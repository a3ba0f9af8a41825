"""The page of an experiment: each arm's figures, what may be said of their difference, and how it came to that."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.reports.html import drawn, image, page, table
from training.judge.clicks.drafts import Teams
from training.judge.clicks.experiment import CTR, Evidence
from training.judge.counterfactual import Counterfactual
from vivace.contract import TRIAL
from vivace.sequential import Comparison, Plan, Preference

HOW = (
    "Intervals hold at all looks together: one may look every hour and stop when one likes. Users are the unit. "
    "A verdict is of one figure; CTR is the one that the plan is for."
)
TEAM_WORDS = (
    "Interleaved: CTR is what the clicks on drafts say of both rankings alone, and the figure to go by. A request with "
    "more clicks on one version's items is won by it, a tie counts for none. The arm "
    f'"{TRIAL}" above was shown drafts of both, so its CTR is of the two together.'
)


def per_cent(share: float, digits: int = 2) -> str:
    return f"{100 * share:+.{digits}f} %" if math.isfinite(share) else "–"


def when(moment_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment_ms / 1000))


def arm_rows(seen: Evidence) -> tuple[list[str], list[list[Any]]]:
    """(header, a row an arm)."""
    header = [
        "arm",
        "users",
        "requests",
        f"CTR@{seen.top_k}",
        "NDCG of clicks",
        "of the items shown",
        "p50 ms",
        "p99 ms",
    ]
    rows = []
    for arm in seen.arms:
        rates = [
            "no clicks" if math.isnan(rate.value) else f"{rate.value:.4f} ± {1.96 * math.sqrt(rate.variance):.4f}"
            for rate in arm.rates.values()
        ]
        rows.append(
            [arm.name or "(unnamed)", f"{arm.users:,}", f"{arm.requests:,}", *rates,
             f"{arm.coverage:,} ({arm.coverage / seen.items:.0%})", f"{arm.p50_ms:.1f}", f"{arm.p99_ms:.1f}"]
        )  # fmt: skip
    return header, rows


def comparison_rows(seen: Evidence) -> tuple[list[str], list[list[str]]]:
    """(header, a row a figure of each arm but the control)."""
    header = [
        "arm",
        "figure",
        f"beside {seen.control or 'the unnamed arm'}",
        "interval",
        "p",
        "verdict",
        "users needed",
    ]
    rows = [
        [arm.name or '""', name, per_cent(c.lift), interval(c), chance(c.p_value), verdict(c), needed(c)]
        for arm in seen.arms
        for name, c in arm.beside.items()
    ]
    return header, rows


def chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def interval(c: Comparison) -> str:
    return f"{per_cent(c.low)} to {per_cent(c.high)}" if math.isfinite(c.lift) else "–"


def verdict(c: Comparison) -> str:
    return c.verdict if math.isfinite(c.lift) else "too few users or clicks yet"


def needed(c: Comparison | Preference) -> str:
    if c.differs or c.users_needed == 0:
        return "enough"
    return f"{c.users_needed:,} more" if c.users_needed > 0 else "not known yet"


def team_rows(of: Sequence[Teams]) -> tuple[list[str], list[list[str]]]:
    """(header, two rows for each two versions that were interleaved: CTR, and the requests that were won)."""
    header = [
        "version", "beside", "users", "requests", "figure, of requests", "", "interval", "p", "verdict", "users needed",
    ]  # fmt: skip
    rows = []
    for t in of:
        c, p, known = t.lift, t.preference, math.isfinite(t.preference.share)
        head = [t.tried, t.served, f"{t.users:,}", f"{t.requests:,}", f"{CTR}, clicks in {t.clicked:,}"]
        rows.append([*head, per_cent(c.lift), interval(c), chance(c.p_value), verdict(c), needed(c)])
        rows.append(
            ["", "", "", "", f"won, of {t.decided:,}", f"{p.share:.1%}" if known else "–",
             f"{p.low:.1%} to {p.high:.1%}" if known else "–", chance(p.p_value),
             p.verdict if known else "too few users with a winner yet", needed(p)]
        )  # fmt: skip
    return header, rows


def place_words(seen: Evidence) -> str:
    """How often each place is looked at; "" where the log does not say."""
    shares = [f"{place} {share:.0%}" for place, share in enumerate(seen.examined, 1) if math.isfinite(share)]
    if len(shares) < 2:
        return ""
    return f"looked at, beside the first place (of what a user was shown at both): {', '.join(shares[1:])}"


def plan_words(plan: Plan) -> str:
    return (
        f"Plan: to find {per_cent(plan.effect, 0)} of CTR with power {plan.power:.0%}, error {plan.alpha:.3g} at all "
        "looks together"
    )


def counterfactual_rows(estimate: Counterfactual) -> tuple[list[str], list[list[str]]]:
    named = {
        "shown (logged)": estimate.logged, "other version, IPS": estimate.ips, "other version, SNIPS": estimate.snips,
        "other version, doubly robust": estimate.doubly_robust,
    }  # fmt: skip
    rows = [[name, f"{e.value:.4f}", f"{e.low:.4f} to {e.high:.4f}"] for name, e in named.items()]
    return ["clicks a shown item", "estimate", "95 % interval"], rows


def counterfactual_words(estimate: Counterfactual) -> str:
    return (
        f"effective sample size {estimate.effective:,.0f} shown items; the log could have shown "
        f"{estimate.support:.0%} of what the other version shows"
    )


def _lifts(seen: Evidence) -> bytes:
    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(figsize=(9, 4))
        for arm in seen.arms:
            known = [look for look in arm.looks if math.isfinite(look.comparison.lift)]
            if not known:
                continue
            hours = [(look.until_ms - seen.began_ms) / 3_600_000 for look in known]
            columns = ([100 * getattr(look.comparison, name) for look in known] for name in ("lift", "low", "high"))
            lift, low, high = columns
            (line,) = axes.plot(hours, lift, label=arm.name)
            axes.fill_between(hours, low, high, alpha=0.2, color=line.get_color())
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="hours since the first request", ylabel=f"{CTR} beside {seen.control or 'control'}, %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        return figure

    return drawn(draw)


def _places(seen: Evidence) -> bytes:
    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(figsize=(9, 4))
        for arm in seen.arms:
            rates = [clicked / max(shown, 1) for shown, clicked in arm.by_place]
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=arm.name or '""')
        axes.set(xlabel="place", ylabel="clicks a shown item", ylim=(0, None))
        axes.legend()
        return figure

    return drawn(draw)


def write(seen: Evidence, file: Path, more: Sequence[str] = ()) -> None:
    """Writes the page. ``more``: parts of HTML at its end."""
    arms, beside = arm_rows(seen), comparison_rows(seen)
    crossed = f" {seen.crossed:,} users were in several arms and are left out." if seen.crossed else ""
    parts = [f"<p>{when(seen.began_ms)} to {when(seen.ended_ms)}. {plan_words(seen.plan)}.{crossed}</p>", table(*arms)]
    if beside[1]:
        parts += [table(*beside), f"<p>{HOW}</p>", image(_lifts(seen), "difference of CTR over time")]
    parts += ["<h2>By place</h2>", image(_places(seen), "clicks by place"), f"<p>{place_words(seen)}</p>", *more]
    file.write_text(page("Experiment", parts), encoding="utf-8")
