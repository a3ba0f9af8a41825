"""What a tuning found, as a record and in words: the choice, what each knob was worth, what was out of reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from loadtest.tune.journal import BudgetError
from loadtest.tune.live import Knee
from loadtest.tune.quality import PART
from loadtest.tune.space import KNOBS, Trial, trials, untuned
from loadtest.tune.tuner import Tuner
from vivace.manifest import environment
from vivace.run import Run


def decision(tuner: Tuner, best: Knee | None, everything: Sequence[Trial]) -> dict[str, Any]:
    """The record. ``chosen`` is None where nothing met the objective."""
    start = tuner.knees.get(untuned(tuner.root))
    rows = []
    for k in sorted(tuner.knees.values(), key=lambda k: -k.met):
        share, interval = tuner.quality.share(k.trial.answer)
        at = k.at_knee
        rows.append({
            "trial": asdict(k.trial), "qps": k.met, "failed_at": k.failed if math.isfinite(k.failed) else None,
            "p50": at.p50 if at else None, "p99": at.p99 if at else None, "quality": share,
            "interval": interval, "shown": shows(interval, tuner.objective.quality), "runs": len(k.runs),
        })  # fmt: skip
    chosen = next((r for r in rows if best and r["trial"] == asdict(best.trial)), None)
    others = [r for r in rows if r is not chosen and r["qps"]]
    judged = len(tuner.quality.gains(untuned(tuner.root).answer)) if rows else 0
    return {
        "objective": asdict(tuner.objective), "chosen": chosen, "runner_up": others[0] if others else None,
        "untuned": start.met if start else None, "trials": rows, "space": tuner.space,
        "configurations": len(everything), "configurations_run": len(tuner.knees),
        "judged_on": PART, "judged_requests": judged,
        "seconds": tuner.seconds, **environment(),
    }  # fmt: skip


def shows(interval: Sequence[float], bound: float) -> bool:
    """Whether a share's 95 % interval shows that at least ``bound`` is kept: the whole of it must lie there."""
    return interval[0] >= bound


def quality_sentence(record: Mapping[str, Any]) -> str:
    """What is known of the chosen configuration's quality: the share, its interval, and whether that shows the
    bound."""
    chosen, bound = record["chosen"], record["objective"]["quality"]
    low, high = chosen["interval"]
    sentence = (
        f"NDCG@10 is {chosen['quality']:.1%} of the whole model's, 95 % interval {low:.1%} to {high:.1%}, on "
        f"{record['judged_requests']:,} validation requests"
    )
    if shows(chosen["interval"], bound):
        return f"{sentence}: at least {bound:.1%} is kept"
    return f"{sentence}: the interval reaches below {bound:.1%}, which this does not show to be kept"


def worth(tuner: Tuner, best: Knee) -> dict[str, dict[str, Any]]:
    """Knee of the best configuration with one knob as it is untuned, for every knob that was moved."""
    start, by_knob = untuned(tuner.root), {}
    for knob in KNOBS:
        back = replace(best.trial, **{knob: getattr(start, knob)})
        if back == best.trial:
            continue
        s = Run(tuner.engines[back.engine]).shapes()
        if back.layout == "ensemble" and back.ranked != s.candidates:
            back = replace(back, ranked=s.candidates)
        if back.ranked > s.candidates or back.history > s.history:
            back = replace(back, ranked=min(back.ranked, s.candidates), history=min(back.history, s.history))
        try:
            k = tuner.knees.get(back)
            if k is None or not k.met:
                k = tuner.measure(back, best.met * 0.8)
        except BudgetError:
            break
        before = getattr(start, knob)
        tuner.say(f"with {knob} {'whole model' if before == '' else before}: {k.met:.0f} requests a second")
        by_knob[knob] = {"value": getattr(best.trial, knob), "untuned": before, "qps": k.met}
    return by_knob


def reachable(tuner: Tuner) -> list[str]:
    """Where the objective is out of reach: the nearest that are not, in words."""
    sentences = []
    objective, s = tuner.objective, Run(tuner.root).shapes()
    answers = sorted({t.answer for t in trials(tuner.space, tuner.root)}, key=lambda a: (a.engine, a.history))
    shares = {a: tuner.quality.kept(a) for a in answers}
    best = max(shares.values())
    if best < objective.quality:
        sentences.append(f"quality of {objective.quality:.1%}: the best that can be served has {best:.1%}")
    fit = [a for a in answers if shares[a] >= min(objective.quality, best)]
    quickest = min(fit, key=lambda a: tuner.service(a, "fused").batches[1])
    trial = Trial(**asdict(quickest), layout="fused", instances=1, threads=1, batch=1, preferred=0, delay_us=0)
    with tuner.live.server(trial) as server:
        tuner.live.warm(server, 20.0)
        low = tuner.live.offer(server, 20.0, 1, 4.0)
    sentences.append(
        f"p{objective.percentile:g} of {low['p99']:.1f} ms at 20 requests a second, the whole of it one "
        f"request at a time, with {shares[quickest]:.1%} of the quality (history {quickest.history} of {s.history})"
    )
    return sentences
